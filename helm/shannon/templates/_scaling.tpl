{{/* What scales, how fast, and by which metrics: the same for HPA and KEDA. */}}

{{- define "shannon.scaleTarget" -}}
apiVersion: {{ ternary "leaderworkerset.x-k8s.io/v1" "apps/v1" (eq .Values.workload "LeaderWorkerSet") }}
kind: {{ .Values.workload }}
name: {{ include "shannon.fullname" . }}
{{- end -}}

{{/* Up at once; down one by one, each after its streams had time to end. */}}
{{- define "shannon.scaleBehavior" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  policies:
    - {type: Pods, value: 4, periodSeconds: 60}
scaleDown:
  stabilizationWindowSeconds: {{ .Values.autoscaling.scaleDownSeconds }}
  policies:
    - {type: Pods, value: 1, periodSeconds: {{ min 1800 (include "shannon.terminationGracePeriodSeconds" .) }}}
{{- end -}}

{{/* vLLM's ranks in a replica: each reports a KV cache of its own. */}}
{{- define "shannon.ranks" -}}
{{- $ranks := 0 -}}
{{- range (include "shannon.engines" . | fromYaml) -}}
{{- if eq .kind "embedded" }}{{ $ranks = add $ranks (get (.args | default dict) "data_parallel_size" | default 1) }}{{ end -}}
{{- end -}}
{{- $ranks -}}
{{- end -}}

{{/* Metric -> its target, as the sum over a pod. */}}
{{- define "shannon.podMetrics" -}}
{{- with .Values.autoscaling -}}
{{- $ranks := include "shannon.ranks" $ | int -}}
{{- if and .queueDepth (eq $.Values.mode "embedded") }}
shannon_queue_depth: {{ .queueDepth }}
{{- end }}
{{- if and .unfinishedRequests (eq $.Values.mode "embedded") }}
shannon_engine_unfinished_requests: {{ .unfinishedRequests }}
{{- end }}
{{- if and .kvCacheUsage $ranks }}
"vllm:kv_cache_usage_perc": {{ mulf .kvCacheUsage $ranks }}
{{- end }}
{{- if and .streamsOpen (eq $.Values.mode "remote") }}
shannon_streams_open: {{ .streamsOpen }}
{{- end }}
{{- end -}}
{{- end -}}
