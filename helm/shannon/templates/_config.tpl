{{/*
The gateway's configuration: `config` of the values, completed with what this chart decides. Settings of the chart's own
are refused in `config` by _validate.tpl, so that manifests and configuration can't disagree.
*/}}

{{- define "shannon.port" -}}8080{{- end -}}

{{/* Engines as YAML; the demo model where none are named. Several nodes are passed to vLLM here. */}}
{{- define "shannon.engines" -}}
{{- $engines := deepCopy (.Values.config.engines | default (dict "main" (dict "kind" "embedded" "model" "demo"))) -}}
{{- if eq .Values.workload "LeaderWorkerSet" -}}
{{- range $name, $engine := $engines -}}
{{- $defaults := dict -}}
{{- $args := dict "distributed_executor_backend" $.Values.multiNode.executor -}}
{{- if eq $.Values.multiNode.executor "mp" -}}
{{- /* The leader holds the port that all nodes meet at; the others name it by LWS_LEADER_ADDRESS. */ -}}
{{- $args = merge $args (dict "nnodes" $.Values.multiNode.size "node_rank" 0 "master_addr" "127.0.0.1" "master_port" $.Values.multiNode.port) -}}
{{- /* vLLM's command line, which the others run, has defaults of its own for these two; nodes must agree. */ -}}
{{- $defaults = dict "max_num_seqs" 256 "max_num_batched_tokens" 8192 -}}
{{- end -}}
{{- $_ := set $engine "args" (mergeOverwrite $defaults (deepCopy ($engine.args | default dict)) $args) -}}
{{- /* An engine rebuilt would wait for workers that still belong to the dead one: the whole group restarts. */ -}}
{{- $_ := set $engine "max_engine_restarts" 0 -}}
{{- end -}}
{{- end -}}
{{- toYaml $engines -}}
{{- end -}}

{{/* Replicas at most: what a process may spend of a limit while the store is away is the limit over this. */}}
{{- define "shannon.maxReplicas" -}}
{{- if .Values.autoscaling.type }}{{ .Values.autoscaling.maxReplicas }}{{ else }}{{ max 1 .Values.replicas }}{{ end -}}
{{- end -}}

{{/* Whose store: valkey (this release's), external, bundled (in the one replica). */}}
{{- define "shannon.store" -}}
{{- if .Values.valkey.enabled }}valkey
{{- else if or .Values.secrets.existingSecret (get .Values.secrets.env "SHANNON_REDIS_URL") }}external
{{- else }}bundled
{{- end -}}
{{- end -}}

{{/* The configuration as YAML. */}}
{{- define "shannon.config" -}}
{{- $own := dict
  "engines" (include "shannon.engines" . | fromYaml)
  "server" (dict "host" "0.0.0.0" "port" (include "shannon.port" . | int) "drain_timeout_s" .Values.drain.timeoutSeconds)
  "store" (dict "url_env" "SHANNON_REDIS_URL" "data_dir" "/data")
  "weights" (dict "cache_dir" "/models")
  "limits" (dict "replicas" (include "shannon.maxReplicas" . | int))
-}}
{{- $keys := .Values.config.keys | default list -}}
{{- if .Values.secrets.acceptPreviousKey -}}
{{- $keys = append $keys (dict "name" "bootstrap-previous" "key_file" "/etc/shannon/secrets/SHANNON_PREVIOUS_BOOTSTRAP_KEY" "admin" true) -}}
{{- end -}}
{{- if .Values.monitoring.serviceMonitor.enabled -}}
{{- $keys = append $keys (dict "name" "metrics" "key_file" "/etc/shannon/secrets/SHANNON_METRICS_KEY" "models" list "metrics" true) -}}
{{- end -}}
{{- if $keys }}{{ $_ := set $own "keys" $keys }}{{ end -}}
{{- mergeOverwrite (deepCopy .Values.config) $own | toYaml -}}
{{- end -}}

{{/* What must change for the pods to be replaced. Not the number of replicas: scaling must restart no pod. */}}
{{- define "shannon.configChecksum" -}}
{{- $config := include "shannon.config" . | fromYaml -}}
{{- $_ := unset $config.limits "replicas" -}}
{{- if eq .Values.configRollout "needed" -}}
{{- $config = omit $config "models" "default_model" "keys" "limits" "prefix_cache" -}}{{/* gateway/serving/reload.py */}}
{{- end -}}
{{- toYaml $config | sha256sum -}}
{{- end -}}

{{/* GPUs per pod: given, or what vLLM will ask for. */}}
{{- define "shannon.gpus" -}}
{{- if eq .Values.mode "remote" -}}0
{{- else if kindIs "invalid" .Values.gpu.count -}}
{{- $gpus := 0 -}}
{{- range (include "shannon.engines" . | fromYaml) -}}
{{- if has .kind (list "embedded" "pooling") -}}
{{- $args := .args | default dict -}}
{{- $gpus = add $gpus (mul (get $args "tensor_parallel_size" | default 1) (get $args "pipeline_parallel_size" | default 1) (get $args "data_parallel_size" | default 1)) -}}
{{- end -}}
{{- end -}}
{{- if eq .Values.workload "LeaderWorkerSet" }}{{ div $gpus .Values.multiNode.size }}{{ else }}{{ $gpus }}{{ end -}}
{{- else }}{{ .Values.gpu.count }}
{{- end -}}
{{- end -}}

{{/* `true` where some model comes from a hub, and so must be downloaded. */}}
{{- define "shannon.downloads" -}}
{{- range (include "shannon.engines" . | fromYaml) -}}
{{- if and (has .kind (list "embedded" "pooling")) (regexMatch "^[A-Za-z0-9][^/]*/[^/]+$" (.model | default "demo")) }}true{{ end -}}
{{- end -}}
{{- end -}}
