{{/*
A worker of a LeaderWorkerSet: GPUs for the engine that the leader's gateway holds. It serves no HTTP and knows no keys.
With `mp` it runs vLLM's headless executor, with the leader's engine arguments; with `ray`, a node of the leader's Ray.
*/}}

{{/* The leader's engine arguments as options of `vllm serve`, but for those that name the node. */}}
{{- define "shannon.workerArgs" -}}
{{- range (include "shannon.engines" . | fromYaml) -}}
{{- $options := dict "model" .model "headless" true -}}
{{- with .revision }}{{ $_ := set $options "revision" . }}{{ $_ := set $options "tokenizer-revision" . }}{{ end -}}
{{- with .trust_remote_code }}{{ $_ := set $options "trust-remote-code" true }}{{ end -}}
{{- range $name, $value := omit .args "node_rank" "master_addr" -}}
{{- $_ := set $options ($name | replace "_" "-") $value -}}
{{- end -}}
{{- toYaml $options -}}
{{- end -}}
{{- end -}}

{{- define "shannon.workerTemplate" -}}
metadata:
  labels: {{- include "shannon.instanceLabels" . | nindent 4 }}
    app.kubernetes.io/component: worker
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
  {{- if include "shannon.downloads" . }}
  initContainers:
    - {{ include "shannon.downloadContainer" . | nindent 6 | trim }}
  {{- end }}
  containers:
    - name: worker
      image: {{ include "shannon.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [/bin/sh, -ec]
      args:
        {{- if eq .Values.multiNode.executor "ray" }}
        - exec tini -- ray start --block --disable-usage-stats --address="$LWS_LEADER_ADDRESS:{{ .Values.multiNode.port }}"
        {{- else }}
        - exec tini -- vllm serve --config /etc/shannon/release/worker.yaml --node-rank "$LWS_WORKER_INDEX" --master-addr "$LWS_LEADER_ADDRESS"
        {{- end }}
      env:
        - {name: HF_HUB_CACHE, value: /models}
        - {name: HF_HUB_OFFLINE, value: "1"} # the download before it has brought all
        {{- include "shannon.env" . | nindent 8 }}
      resources: {{- include "shannon.resources" . | nindent 8 }}
      securityContext: {{- include "shannon.securityContext" . | nindent 8 }}
      lifecycle:
        preStop: # not before the leader has drained: its streams need these GPUs
          exec:
            command: [python, /etc/shannon/release/wait_for_leader.py, {{ include "shannon.port" . | quote }}]
      volumeMounts: {{- include "shannon.volumeMounts" . | nindent 8 }}
  volumes: {{- include "shannon.volumes" . | nindent 4 }}
{{- end -}}
