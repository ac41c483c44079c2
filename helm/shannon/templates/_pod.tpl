{{/* What pods hold: the gateway's, which every workload shares, and pieces that other pods share with it. */}}

{{- define "shannon.image" -}}
{{- $variant := "" -}}
{{- if eq .Values.mode "remote" }}{{ $variant = "-gateway" }}{{ else if eq (include "shannon.gpus" .) "0" }}{{ $variant = "-cpu" }}{{ end -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (printf "%s%s" .Chart.AppVersion $variant) }}
{{- end -}}
{{- end -}}

{{/* Restricted pod security, the pod's half. */}}
{{- define "shannon.podSecurityContext" -}}
runAsNonRoot: true
{{- with .Values.user }}
runAsUser: {{ int . }}
runAsGroup: {{ int . }}
fsGroup: {{ int . }}
fsGroupChangePolicy: OnRootMismatch # a cache of weights has many files
{{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* The container's half. */}}
{{- define "shannon.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "shannon.terminationGracePeriodSeconds" -}}
{{- add .Values.drain.preStopSeconds .Values.drain.timeoutSeconds .Values.drain.marginSeconds -}}
{{- end -}}

{{/* Environment of everything that runs the image. */}}
{{- define "shannon.env" -}}
- {name: SHANNON_CONFIG, value: /etc/shannon/release/shannon.yaml}
{{- if eq .Values.workload "LeaderWorkerSet" }}
- {name: VLLM_HOST_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Environment of the `shannon` command. Secrets come by reference; its own keys as files, which SIGHUP reads again. */}}
{{- define "shannon.commandEnv" -}}
{{ include "shannon.env" . }}
- {name: SHANNON_BOOTSTRAP_KEY, value: ""} # of the Secret, which brings all it has
- {name: SHANNON_BOOTSTRAP_KEY_FILE, value: /etc/shannon/secrets/SHANNON_BOOTSTRAP_KEY}
{{- $store := include "shannon.store" . }}
{{- if eq $store "valkey" }}
- {name: VALKEY_PASSWORD, valueFrom: {secretKeyRef: {name: {{ include "shannon.valkey.secretName" . }}, key: VALKEY_PASSWORD}}}
- {name: SHANNON_REDIS_URL, value: "redis://:$(VALKEY_PASSWORD)@{{ include "shannon.fullname" . }}-valkey:6379/0"}
{{- else if eq $store "external" }}
- {name: SHANNON_REDIS_URL, valueFrom: {secretKeyRef: {name: {{ include "shannon.secretName" . }}, key: SHANNON_REDIS_URL}}}
{{- end }}
{{- end -}}

{{- define "shannon.volumeMounts" -}}
- {name: config, mountPath: /etc/shannon/release, readOnly: true}
- {name: data, mountPath: /data}
- {name: cache, mountPath: /cache}
- {name: tmp, mountPath: /tmp}
{{- if eq .Values.mode "embedded" }}
- {name: models, mountPath: /models}
{{- end }}
{{- if ne (include "shannon.gpus" .) "0" }}
- {name: shm, mountPath: /dev/shm}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Where /models comes from: a `claim` for all pods, one for `each`, or `none` that outlives the pod. */}}
{{- define "shannon.modelCache" -}}
{{- with .Values.modelCache -}}
{{- if .existingClaim }}claim
{{- else if not .enabled }}none
{{- else if eq $.Values.workload "StatefulSet" }}each
{{- else if include "shannon.downloads" $ }}claim
{{- else }}none
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A StatefulSet brings data, and maybe models, by claims of each replica. */}}
{{- define "shannon.volumes" -}}
- name: config
  configMap: {name: {{ include "shannon.fullname" . }}}
- name: cache
  emptyDir: {sizeLimit: {{ .Values.cacheSize }}}
- name: tmp
  emptyDir: {sizeLimit: {{ .Values.tmpSize }}}
{{- if ne .Values.workload "StatefulSet" }}
- name: data
  emptyDir: {sizeLimit: {{ .Values.data.size }}}
{{- end }}
{{- if eq .Values.mode "embedded" }}
{{- $cache := include "shannon.modelCache" . }}
{{- if eq $cache "claim" }}
- name: models
  persistentVolumeClaim: {claimName: {{ include "shannon.modelClaim" . }}}
{{- else if eq $cache "none" }}
- name: models
  emptyDir: {sizeLimit: {{ .Values.modelCache.size }}}
{{- end }}
{{- end }}
{{- if ne (include "shannon.gpus" .) "0" }}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.gpu.shmSize }}}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Requests and limits, with the GPUs in both: they can't be overcommitted. */}}
{{- define "shannon.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- $gpus := include "shannon.gpus" . | int -}}
{{- if $gpus -}}
{{- $_ := set $resources.requests .Values.gpu.resource $gpus -}}
{{- $_ := set $resources.limits .Values.gpu.resource $gpus -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Weights are complete before the server starts: it would fetch what is missing without resuming or checking it. */}}
{{- define "shannon.downloadContainer" -}}
name: download
image: {{ include "shannon.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args: [download]
envFrom:
  - secretRef: {name: {{ include "shannon.secretName" . }}}
env: {{- include "shannon.commandEnv" . | nindent 2 }}
resources: {{- toYaml .Values.download.resources | nindent 2 }}
securityContext: {{- include "shannon.securityContext" . | nindent 2 }}
volumeMounts:
  - {name: config, mountPath: /etc/shannon/release, readOnly: true}
  - {name: cache, mountPath: /cache}
  - {name: tmp, mountPath: /tmp}
  - {name: models, mountPath: /models}
{{- end -}}

{{/* Fields of a pod's spec that concern where and how it runs; of all pods but Valkey's. */}}
{{- define "shannon.scheduling" -}}
{{- $gpus := ne (include "shannon.gpus" .) "0" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- $nodeSelector := ternary (merge (deepCopy .Values.nodeSelector) .Values.gpu.nodeSelector) .Values.nodeSelector $gpus }}
{{- with $nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with ternary (concat .Values.tolerations .Values.gpu.tolerations) .Values.tolerations $gpus }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "shannon.podAnnotations" -}}
checksum/config: {{ include "shannon.configChecksum" . }}
{{- if not .Values.secrets.existingSecret }}
checksum/secret: {{ .Values.secrets.env | toJson | sha256sum }}
{{- end }}
{{- with .Values.secrets.rotation }}
shannon/rotation: {{ . | quote }}
{{- end }}
{{- with .Values.podAnnotations }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The gateway's pod: metadata and spec of a template. */}}
{{- define "shannon.podTemplate" -}}
metadata:
  labels: {{- include "shannon.selectorLabels" . | nindent 4 }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations: {{- include "shannon.podAnnotations" . | nindent 4 }}
spec:
  serviceAccountName: {{ include "shannon.serviceAccountName" . }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "shannon.terminationGracePeriodSeconds" . }}
  securityContext: {{- include "shannon.podSecurityContext" . | nindent 4 }}
  {{- with include "shannon.scheduling" . | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- if .Values.topologySpread }}
  topologySpreadConstraints:
    {{- range .Values.topologySpread }}
    - {{ merge (deepCopy .) (dict "maxSkew" 1 "whenUnsatisfiable" "ScheduleAnyway") | toYaml | nindent 6 | trim }}
      labelSelector:
        matchLabels: {{- include "shannon.selectorLabels" $ | nindent 10 }}
      {{- if eq $.Values.workload "Deployment" }}
      matchLabelKeys: [pod-template-hash]
      {{- end }}
    {{- end }}
  {{- end }}
  {{- if include "shannon.downloads" . }}
  initContainers:
    - {{ include "shannon.downloadContainer" . | nindent 6 | trim }}
  {{- end }}
  containers:
    - name: gateway
      image: {{ include "shannon.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      {{- if and (eq .Values.workload "LeaderWorkerSet") (eq .Values.multiNode.executor "ray") }}
      command: [/bin/sh, -ec]
      args:
        - |
          ray start --head --port={{ .Values.multiNode.port }} --disable-usage-stats --include-dashboard=false
          exec tini -- shannon serve
      {{- else }}
      args: [serve]
      {{- end }}
      ports:
        - {name: http, containerPort: {{ include "shannon.port" . }}}
      envFrom:
        - secretRef: {name: {{ include "shannon.secretName" . }}}
      env: {{- include "shannon.commandEnv" . | nindent 8 }}
      resources: {{- include "shannon.resources" . | nindent 8 }}
      securityContext: {{- include "shannon.securityContext" . | nindent 8 }}
      # /ready is 503 until every engine answers. The others wait for it, so that a long load is not taken for a hang.
      startupProbe:
        httpGet: {path: /ready, port: http}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: {{ div (add .Values.probes.startupSeconds 9) 10 }}
      livenessProbe:
        httpGet: {path: /health, port: http}
        periodSeconds: 10
        timeoutSeconds: 10
        failureThreshold: {{ div (add .Values.probes.livenessSeconds 9) 10 }}
      readinessProbe:
        httpGet: {path: /ready, port: http}
        periodSeconds: {{ .Values.probes.readinessPeriodSeconds }}
        timeoutSeconds: 5
        failureThreshold: 2
      lifecycle:
        preStop:
          sleep: {seconds: {{ .Values.drain.preStopSeconds }}}
      volumeMounts:
        - {name: secrets, mountPath: /etc/shannon/secrets, readOnly: true}
        {{- include "shannon.volumeMounts" . | nindent 8 }}
  volumes:
    - name: secrets
      secret: {secretName: {{ include "shannon.secretName" . }}}
    {{- include "shannon.volumes" . | nindent 4 }}
{{- end -}}

{{/* A claim template: `name`, and `volume` with size and storageClass. No labels that upgrades change. */}}
{{- define "shannon.claim" -}}
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ .name }}
  labels: {{- include "shannon.instanceLabels" .root | nindent 4 }}
spec:
  accessModes: [ReadWriteOnce]
  {{- with .volume.storageClass }}
  storageClassName: {{ . }}
  {{- end }}
  resources:
    requests: {storage: {{ .volume.size }}}
{{- end -}}
