{{/*
Values that fit the schema each by itself, but not together. Messages name the value and what would be right.
*/}}
{{- define "shannon.validate" -}}
{{- $values := .Values -}}

{{- range list "server.host" "server.port" "server.drain_timeout_s" "store.url_env" "store.data_dir" "weights.cache_dir" "limits.replicas" -}}
{{- $path := splitList "." . -}}
{{- if hasKey (get $values.config (first $path) | default dict) (last $path) -}}
{{- fail (printf "config.%s is set by this chart; take it out of `config`%s" . (get (dict "server.drain_timeout_s" " and set drain.timeoutSeconds" "limits.replicas" " and set replicas or autoscaling.maxReplicas") .)) -}}
{{- end -}}
{{- end -}}

{{- if and (eq .Values.mode "remote") (not .Values.config.engines) -}}
{{- fail "mode: remote needs config.engines of kind remote, with the urls of the servers" -}}
{{- end -}}
{{- range $name, $engine := include "shannon.engines" . | fromYaml -}}
{{- $here := has $engine.kind (list "embedded" "pooling") -}}
{{- if and $here (eq $values.mode "remote") -}}
{{- fail (printf "mode: remote runs no engine in its pods, but config.engines.%s.kind is %s; make it `remote`, or set mode: embedded" $name $engine.kind) -}}
{{- end -}}
{{- if and (eq $engine.kind "remote") (eq $values.mode "embedded") (eq (include "shannon.embeddedEngines" $) "") -}}
{{- fail (printf "mode: embedded needs an engine of kind embedded or pooling, but config.engines.%s.kind is remote; set mode: remote" $name) -}}
{{- end -}}
{{- end -}}

{{- if eq .Values.mode "remote" -}}
{{- if ne .Values.workload "Deployment" }}{{ fail (printf "workload: %s is for engines in the pods; with mode: remote it must be Deployment" .Values.workload) }}{{ end -}}
{{- if .Values.download.job }}{{ fail "download.job: there are no weights to download with mode: remote; set it to false" }}{{ end -}}
{{- end -}}

{{- if eq .Values.workload "LeaderWorkerSet" -}}
{{- $engines := include "shannon.engines" . | fromYaml -}}
{{- if or (ne (len $engines) 1) (not .Values.config.engines) (ne (include "shannon.embeddedEngines" .) "x") -}}
{{- fail "workload: LeaderWorkerSet spreads one model over nodes: config.engines must name exactly one engine, of kind embedded" -}}
{{- end -}}
{{- range $name, $engine := $engines -}}
{{- if gt (get .args "data_parallel_size" | default 1 | int) 1 -}}
{{- fail (printf "config.engines.%s.args.data_parallel_size: over several nodes, set replicas instead" $name) -}}
{{- end -}}
{{- $world := mul (get .args "tensor_parallel_size" | default 1) (get .args "pipeline_parallel_size" | default 1) -}}
{{- if mod $world $values.multiNode.size -}}
{{- fail (printf "multiNode.size: %d nodes can't share %d GPUs evenly, which is what tensor_parallel_size and pipeline_parallel_size of config.engines.%s.args ask for" (int $values.multiNode.size) $world $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- if and .Values.download.job (not (and .Values.modelCache.enabled (or .Values.modelCache.existingClaim (ne .Values.workload "StatefulSet")))) -}}
{{- fail "download.job fills one claim for all pods: it needs modelCache.enabled, and with workload: StatefulSet a modelCache.existingClaim" -}}
{{- end -}}
{{- if and .Values.download.job (not (include "shannon.downloads" .)) -}}
{{- fail "download.job: no engine's model comes from a hub; set it to false" -}}
{{- end -}}

{{- if and (eq (include "shannon.store" .) "bundled") (gt (include "shannon.maxReplicas" . | int) 1) -}}
{{- fail "several replicas need one store: set valkey.enabled: true, or give SHANNON_REDIS_URL in secrets.env or in secrets.existingSecret" -}}
{{- end -}}
{{- if and .Values.valkey.enabled (hasKey .Values.secrets.env "SHANNON_REDIS_URL") -}}
{{- fail "secrets.env.SHANNON_REDIS_URL names a store while valkey.enabled makes one; set valkey.enabled: false" -}}
{{- end -}}
{{- if and .Values.secrets.existingSecret .Values.secrets.env -}}
{{- fail "secrets.env is for the Secret that this chart makes; with secrets.existingSecret put the variables into that one" -}}
{{- end -}}
{{- if and .Values.secrets.acceptPreviousKey (not .Values.secrets.existingSecret) (not (hasKey .Values.secrets.env "SHANNON_PREVIOUS_BOOTSTRAP_KEY")) -}}
{{- fail "secrets.acceptPreviousKey: put the old key into secrets.env.SHANNON_PREVIOUS_BOOTSTRAP_KEY" -}}
{{- end -}}

{{- if and .Values.autoscaling.type (lt (int .Values.autoscaling.maxReplicas) (int .Values.autoscaling.minReplicas)) -}}
{{- fail "autoscaling.maxReplicas: must be at least autoscaling.minReplicas" -}}
{{- end -}}
{{- if and (ne .Values.workload "StatefulSet") (eq (toString .Values.rollingUpdate.maxSurge) "0") (eq (toString .Values.rollingUpdate.maxUnavailable) "0") -}}
{{- fail "rollingUpdate: maxSurge and maxUnavailable can't both be 0" -}}
{{- end -}}
{{- if or (eq .Values.image.tag "latest") (eq .Values.valkey.image.tag "latest") -}}
{{- fail "image.tag: latest is another image every time a node pulls; name a version" -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) }}{{ fail "ingress.host: give the name that clients call" }}{{ end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) }}{{ fail "httpRoute.parentRefs: name the Gateway to attach to" }}{{ end -}}
{{- end -}}

{{/* An x for each engine in the pods. */}}
{{- define "shannon.embeddedEngines" -}}
{{- range (include "shannon.engines" . | fromYaml) }}{{ if has .kind (list "embedded" "pooling" "mock") }}x{{ end }}{{ end -}}
{{- end -}}
