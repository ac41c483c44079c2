{{/* Names and labels. What a pod holds is in _pod.tpl, the gateway's configuration in _config.tpl. */}}

{{- define "shannon.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "shannon.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "shannon.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "shannon.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Selectors can't be changed after the install: nothing that an upgrade changes may stand here. */}}
{{- define "shannon.selectorLabels" -}}
{{ include "shannon.instanceLabels" . }}
app.kubernetes.io/component: gateway
{{- end -}}

{{- define "shannon.valkey.selectorLabels" -}}
{{ include "shannon.instanceLabels" . }}
app.kubernetes.io/component: valkey
{{- end -}}

{{- define "shannon.instanceLabels" -}}
app.kubernetes.io/name: {{ include "shannon.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Labels of objects, without those of a component. */}}
{{- define "shannon.commonLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: shannon
{{- end -}}

{{- define "shannon.labels" -}}
{{ include "shannon.selectorLabels" . }}
{{ include "shannon.commonLabels" . }}
{{- end -}}

{{- define "shannon.valkey.labels" -}}
{{ include "shannon.valkey.selectorLabels" . }}
{{ include "shannon.commonLabels" . }}
{{- end -}}

{{- define "shannon.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (include "shannon.fullname" .) -}}
{{- end -}}

{{- define "shannon.secretName" -}}
{{- .Values.secrets.existingSecret | default (include "shannon.fullname" .) -}}
{{- end -}}

{{- define "shannon.valkey.secretName" -}}
{{- .Values.valkey.existingSecret | default (printf "%s-valkey" (include "shannon.fullname" .)) -}}
{{- end -}}

{{- define "shannon.modelClaim" -}}
{{- .Values.modelCache.existingClaim | default (printf "%s-models" (include "shannon.fullname" .)) -}}
{{- end -}}
