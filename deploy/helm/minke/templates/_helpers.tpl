{{- define "minke.selector" -}}
app.kubernetes.io/name: minke
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* Labels of an object; role "" for those of no pool. */ -}}
{{- define "minke.labels" -}}
{{ include "minke.selector" .root }}
{{- with .role }}
app.kubernetes.io/component: {{ . }}
{{- end }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{- define "minke.metadata" -}}
name: {{ .root.Release.Name }}-{{ .role }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "minke.labels" . | nindent 2 }}
{{- end }}

{{- define "minke.image" -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- /* Seconds until a pod is killed: a drain, what comes before it, and some more. */ -}}
{{- define "minke.grace" -}}
{{ add .Values.drainTimeoutSeconds 30 }}
{{- end }}

{{- define "minke.etcd" -}}
{{ if .Values.etcd.enabled }}{{ .Release.Name }}-etcd:2379{{ else }}{{ required "etcd.endpoints: expected HOST:PORT of an etcd when etcd.enabled is false" (join "," .Values.etcd.endpoints) }}{{ end }}
{{- end }}

{{- define "minke.cluster-settings" -}}
CHECKPOINT: /models/checkpoint
MODEL_NAME: {{ .Values.modelName | quote }}
PRECISION: {{ .Values.precision }}
CLUSTER: {{ .Values.cluster | quote }}
ETCD: {{ include "minke.etcd" . }}
UCX_TCP_PORT_RANGE: 7002-7017
{{- end }}

{{- define "minke.expert-servers-at-least" -}}
{{ if eq .Values.autoscaling.kind "none" }}{{ .Values.expert.replicas }}{{ else }}{{ .Values.autoscaling.expert.min }}{{ end }}
{{- end }}

{{- /* Whether an autoscaler has the pool's replicas: "true" or "". */ -}}
{{- define "minke.autoscaled" -}}
{{ if or (eq .root.Values.autoscaling.kind "hpa") (and (eq .root.Values.autoscaling.kind "keda") (has .role (list "attention" "expert"))) }}true{{ end }}
{{- end }}

{{- /* The pod around one container of ours: root, role, pool (its values). */ -}}
{{- define "minke.pod-settings" -}}
serviceAccountName: {{ .root.Release.Name }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ if eq .role "etcd" }}30{{ else }}{{ include "minke.grace" .root }}{{ end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pool.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $gpu := and .root.Values.gpu.enabled (has .role (list "attention" "expert")) }}
{{- if or $gpu .pool.tolerations }}
tolerations:
  {{- if $gpu }}
  - {key: {{ .root.Values.gpu.resource }}, operator: Exists, effect: NoSchedule}
  {{- end }}
  {{- with .pool.tolerations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "minke.same-role" -}}
matchLabels:
  {{- include "minke.selector" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .role }}
{{- end }}

{{- define "minke.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      {{- include "minke.same-role" . | nindent 6 }}
{{- end }}

{{- define "minke.anti-affinity" -}}
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            {{- include "minke.same-role" . | nindent 12 }}
{{- end }}

{{- define "minke.host-network" -}}
hostNetwork: true
dnsPolicy: ClusterFirstWithHostNet
affinity:
  podAntiAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:  # ports are fixed
      - topologyKey: kubernetes.io/hostname
        labelSelector:
          matchExpressions:
            - {key: app.kubernetes.io/component, operator: In, values: [router, attention, expert]}
{{- end }}

{{- /* Flags of every role. */ -}}
{{- define "minke.common-args" -}}
- --checkpoint=$(CHECKPOINT)
- --precision=$(PRECISION)
- --registry=etcd
- --etcd=$(ETCD)
- --cluster=$(CLUSTER)
- --advertise=$(POD_IP)
- --drain-timeout-s={{ .Values.drainTimeoutSeconds }}
{{- with .Values.tls }}
{{- if .enabled }}
- --tls-cert=/etc/minke/tls/tls.crt
- --tls-key=/etc/minke/tls/tls.key
- --tls-ca=/etc/minke/tls/ca.crt
- --tls-name={{ .name }}
{{- $etcd := .etcdSecret | empty | ternary "tls" "etcd-tls" }}
- --etcd-cert=/etc/minke/{{ $etcd }}/tls.crt
- --etcd-key=/etc/minke/{{ $etcd }}/tls.key
- --etcd-ca=/etc/minke/{{ $etcd }}/ca.crt
{{- end }}
{{- end }}
{{- end }}

{{- /* Secrets with certificates, as volumes and where they are mounted: root, http (also the API's). */ -}}
{{- define "minke.tls-mounts" -}}
{{- if .root.Values.tls.enabled }}
- {name: tls, mountPath: /etc/minke/tls, readOnly: true}
{{- if .root.Values.tls.etcdSecret }}
- {name: etcd-tls, mountPath: /etc/minke/etcd-tls, readOnly: true}
{{- end }}
{{- if .http }}
- {name: http-tls, mountPath: /etc/minke/http-tls, readOnly: true}
{{- end }}
{{- end }}
{{- end }}
{{- define "minke.tls-volumes" -}}
{{- if .root.Values.tls.enabled }}
- name: tls
  secret: {secretName: {{ .root.Values.tls.secret }}, defaultMode: 288}  # 0440
{{- with .root.Values.tls.etcdSecret }}
- name: etcd-tls
  secret: {secretName: {{ . }}, defaultMode: 288}
{{- end }}
{{- if .http }}
- name: http-tls
  secret: {secretName: {{ .root.Values.tls.httpSecret }}, defaultMode: 288}
{{- end }}
{{- end }}
{{- end }}

{{- /* A pod asks itself: Kubernetes' own probes can neither show a certificate nor speak gRPC over TLS. root, what. */ -}}
{{- define "minke.health-command" -}}
- minke
- health
- {{ .what }}
- --name={{ .root.Values.tls.name }}
- --ca=/etc/minke/tls/ca.crt
- --cert=/etc/minke/tls/tls.crt
- --key=/etc/minke/tls/tls.key
{{- end }}

{{- /* Of routers, attention nodes and expert servers: that they answer at all. */ -}}
{{- define "minke.alive-probe" -}}
{{- if .Values.tls.enabled }}
exec:
  command:
    {{- include "minke.health-command" (dict "root" . "what" "--url=https://127.0.0.1:9100/metrics") | nindent 4 }}
{{- else }}
httpGet: {path: /metrics, port: metrics}
{{- end }}
{{- end }}

{{- define "minke.environment" -}}
envFrom:
  - configMapRef: {name: {{ .Release.Name }}-cluster}
env:
  - name: POD_IP
    valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- end }}

{{- define "minke.container-security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
{{- end }}

{{- /* The pods of routers, attention nodes and expert servers. root, role, pool, args (this role's own), startup (probes of 5 s). */ -}}
{{- define "minke.data-plane-pod" -}}
metadata:
  labels:
    {{- include "minke.selector" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
  annotations:
    prometheus.io/scrape: "true"
    prometheus.io/port: "9100"
    prometheus.io/path: /metrics
    {{- if .root.Values.tls.enabled }}
    prometheus.io/scheme: https
    {{- end }}
    checksum/cluster: {{ include "minke.cluster-settings" .root | sha256sum }}
spec:
  {{- include "minke.pod-settings" . | nindent 2 }}
  {{- if eq .role "router" }}
  {{- include "minke.spread" . | nindent 2 }}
  {{- end }}
  {{- if .root.Values.hostNetwork }}
  {{- include "minke.host-network" . | nindent 2 }}
  {{- else if ne .role "router" }}
  {{- include "minke.anti-affinity" . | nindent 2 }}
  {{- end }}
  containers:
    - name: {{ .role }}
      image: {{ include "minke.image" (dict "root" .root "image" .root.Values.image) }}
      {{- with .root.Values.image.pullPolicy }}
      imagePullPolicy: {{ . }}
      {{- end }}
      command: [minke-{{ .role }}]
      args:
        {{- include "minke.common-args" .root | nindent 8 }}
        - --listen=0.0.0.0:7000
        - --ucx-interface=$(POD_IP)
        - --ucx-port=7001
        - --metrics-listen=0.0.0.0:9100
        - --cluster-secret-file=/etc/minke/data-plane/secret
        {{- range .args }}
        - {{ . }}
        {{- end }}
        {{- $gpu := and .root.Values.gpu.enabled (ne .role "router") }}
        {{- if $gpu }}
        - --device=cuda
        {{- end }}
        {{- if .root.Values.rdma.enabled }}
        - --transport=rdma
        {{- end }}
        {{- range .pool.args }}
        - {{ . | quote }}
        {{- end }}
      {{- include "minke.environment" .root | nindent 6 }}
      ports:
        - {name: grpc, containerPort: 7000}
        - {name: data, containerPort: 7001}
        - {name: metrics, containerPort: 9100}
      startupProbe:  # answers once it listens; an attention node loads its weights before
        {{- include "minke.alive-probe" .root | nindent 8 }}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: {{ .startup }}
      readinessProbe:  # grpc.health.v1
        {{- if .root.Values.tls.enabled }}
        exec:
          command:
            {{- include "minke.health-command" (dict "root" .root "what" "--grpc=127.0.0.1:7000") | nindent 12 }}
        timeoutSeconds: 5
        {{- else }}
        grpc: {port: 7000}
        timeoutSeconds: 3
        {{- end }}
        periodSeconds: 5
        failureThreshold: 3
      livenessProbe:  # not the health service: who drains or loads is alive
        {{- include "minke.alive-probe" .root | nindent 8 }}
        periodSeconds: 20
        timeoutSeconds: 10
        failureThreshold: 6
      resources:
        {{- $resources := deepCopy .pool.resources }}
        {{- $limits := get $resources "limits" | default dict }}
        {{- if $gpu }}{{ $_ := set $limits .root.Values.gpu.resource .root.Values.gpu.count }}{{ end }}
        {{- if .root.Values.rdma.enabled }}{{ $_ := set $limits .root.Values.rdma.resource .root.Values.rdma.count }}{{ end }}
        {{- $_ := set $resources "limits" $limits }}
        {{- toYaml $resources | nindent 8 }}
      securityContext:
        {{- include "minke.container-security" . | nindent 8 }}
        capabilities:
          drop: [ALL]
          {{- if .root.Values.rdma.enabled }}
          add: [IPC_LOCK]
          {{- end }}
      volumeMounts:
        - {name: checkpoint, mountPath: /models/checkpoint, readOnly: true}
        - {name: data-plane, mountPath: /etc/minke/data-plane, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        {{- include "minke.tls-mounts" (dict "root" .root "http" false) | nindent 8 }}
  volumes:
    - name: checkpoint
      {{- toYaml .root.Values.checkpoint.volume | nindent 6 }}
    - name: data-plane
      secret: {secretName: {{ .root.Values.secrets.dataPlane }}, defaultMode: 288}  # 0440
    - name: tmp
      emptyDir: {sizeLimit: 64Mi}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: 1Gi}
    {{- include "minke.tls-volumes" (dict "root" .root "http" false) | nindent 4 }}
{{- end }}

{{- /* Headless service of a pool: names for people and Prometheus; members find each other in etcd, so also before they are ready. */ -}}
{{- define "minke.headless-service" -}}
apiVersion: v1
kind: Service
metadata:
  {{- include "minke.metadata" . | nindent 2 }}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    {{- include "minke.selector" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
  ports:
    - {name: grpc, port: 7000, targetPort: grpc}
    - {name: data, port: 7001, targetPort: data}
    - {name: metrics, port: 9100, targetPort: metrics}
{{- end }}

{{- define "minke.budget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "minke.metadata" . | nindent 2 }}
spec:
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow  # else a pod that cannot become ready keeps its node from being drained
  selector:
    {{- include "minke.same-role" . | nindent 4 }}
{{- end }}
