"""The pods of a rendered overlay as processes of this machine: each in a network namespace with an address of its own on a common bridge, with
the command line, environment and probes that the manifest says. Stands in for kubelet, Service and kube-proxy; needs root."""
import http.client, json, os, shutil, signal, socket, ssl, struct, subprocess, sys, tempfile, threading, time

sys.path[:0] = [os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", folder) for folder in ("e2e", "fault")]
from harness import wait_until
from manifests import BIN, ROOT, command_of, find, listens, settings, workloads

MODEL = os.path.join(ROOT, "models", "minke-shakespeare")
KEY = "sk-deploy-test"


def ip(*arguments, check=True):
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if check and result.returncode != 0:
        raise AssertionError("ip %s: %s" % (" ".join(arguments), result.stderr))
    return result.stdout


def grpc_health(host, port, timeout):
    """What kubelet's grpc probe asks: grpc.health.v1.Health/Check. True: SERVING; False: anything else, or no answer in time."""
    def frame(kind, flags, stream, payload=b""):
        return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload

    headers = {":method": "POST", ":scheme": "http", ":path": "/grpc.health.v1.Health/Check", ":authority": "probe",
               "content-type": "application/grpc", "te": "trailers"}
    block = b"".join(b"\0" + bytes([len(k)]) + k.encode() + bytes([len(v)]) + v.encode() for k, v in headers.items())
    try:
        with socket.create_connection((host, port), timeout) as s:
            s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frame(1, 4, 1, block) + frame(0, 1, 1, bytes(5)))
            data = s.makefile("rb")
            while True:
                head = data.read(9)
                if len(head) < 9:
                    return False
                payload = data.read(int.from_bytes(head[:3], "big"))
                kind, flags, stream = head[3], head[4], int.from_bytes(head[5:9], "big")
                if kind == 4 and not flags & 1:
                    s.sendall(frame(4, 1, 0))   # their settings
                elif kind == 0 and stream == 1:
                    return payload[5:] == b"\x08\x01"
                elif stream == 1 and flags & 1 or kind == 7:
                    return False   # trailers only, or the server goes
    except OSError:
        return False


class Pod:
    def __init__(self, role, name, ordinal, address, namespace, process, container, ports, mounted):
        self.mounted = mounted   # a path in the pod as one of this machine
        self.role, self.name, self.ordinal, self.address, self.namespace = role, name, ordinal, address, namespace
        self.process, self.container, self.ports = process, container, ports
        self.leaving = False

    def probe(self, which):
        how = self.container[which]
        if "exec" in how:
            command = [self.mounted(a) for a in how["exec"]["command"]]
            try:
                return subprocess.run(["ip", "netns", "exec", self.namespace, os.path.join(BIN, command[0]), *command[1:]], capture_output=True,
                                      timeout=how["timeoutSeconds"]).returncode == 0
            except subprocess.TimeoutExpired:
                return False
        port = next(how[k] for k in ("httpGet", "grpc", "tcpSocket") if k in how)["port"]
        if isinstance(port, str):
            port, = [p["containerPort"] for p in self.container["ports"] if p["name"] == port]
        if "grpc" in how:
            return grpc_health(self.address, port, how["timeoutSeconds"])
        try:
            if "tcpSocket" in how:
                socket.create_connection((self.address, port), how["timeoutSeconds"]).close()
                return True
            c = http.client.HTTPConnection(self.address, port, timeout=how["timeoutSeconds"])
            if how["httpGet"].get("scheme") == "HTTPS":   # kubelet looks at no certificate
                c = http.client.HTTPSConnection(self.address, port, timeout=how["timeoutSeconds"], context=ssl._create_unverified_context())
            c.request("GET", how["httpGet"]["path"])
            status = c.getresponse().status
            c.close()
            return 200 <= status < 400
        except (OSError, http.client.HTTPException):
            return False


class Service:
    """Address of some ready pod of the gateway: another one each time it is asked, as kube-proxy would choose."""

    def __init__(self, pods):
        self.pods, self.given = pods, 0

    def __iter__(self):
        end = time.monotonic() + 30
        while time.monotonic() < end:
            ready = self.pods.endpoints
            if ready:
                self.given += 1
                return iter((ready[self.given % len(ready)], 8000))
            time.sleep(0.02)
        raise OSError("no gateway is ready")


class Pods:
    def __init__(self, objects, replicas=None, arguments=None, environment=None):
        """`replicas`: instead of the manifest's, by role; `arguments`: {"--flag": value} instead of the manifest's, where a role has the
        flag; `environment`: the same for settings."""
        self.objects, self.arguments, self.environment = objects, arguments or {}, environment or {}
        self.scratch = tempfile.mkdtemp(prefix="minke-pods-")
        self.prefix = "mp%d" % (os.getpid() % 100000)   # interface names have at most 15 characters
        self.net = "10.%d.%d" % (182 + os.getpid() // 256 % 32, os.getpid() % 256)
        self.count, self.lock, self.pods, self.endpoints, self.closing = 0, threading.RLock(), [], [], False
        self.workloads = {w["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: w for w in workloads(objects)}
        self.replicas = {role: (replicas or {}).get(role, w["spec"].get("replicas")) for role, w in self.workloads.items()}
        for name, text in (("secret", "correct horse battery staple\n"), ("keys", KEY + "\n")):
            with open(os.path.join(self.scratch, name), "w") as f:
                f.write(text)
        try:
            bridge = self.prefix + "br"
            ip("link", "add", bridge, "type", "bridge")
            ip("link", "set", bridge, "up")
            ip("addr", "add", self.net + ".254/24", "dev", bridge)
            threading.Thread(target=self._watch, daemon=True).start()
        except BaseException:
            self.stop()
            raise

    def _watch(self):
        """The Service's endpoints follow readiness, in the pace of the fastest probe here; a pod that is being deleted is none."""
        while not self.closing:
            with self.lock:
                gateways = [p for p in self.pods if p.role == "gateway" and not p.leaving]
            ready = [p.address for p in gateways if p.probe("readinessProbe")]
            with self.lock:
                self.endpoints = [a for a in ready if any(p.address == a and not p.leaving for p in self.pods)]
            time.sleep(0.1)

    def start(self, role, ordinal):
        workload = self.workloads[role]
        with self.lock:
            self.count += 1
            number = self.count
        address, namespace, outer = "%s.%d" % (self.net, number), "%sn%d" % (self.prefix, number), "%sv%d" % (self.prefix, number)
        ip("netns", "add", namespace)
        ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        ip("link", "set", outer, "master", self.prefix + "br", "up")
        ip("-n", namespace, "addr", "add", address + "/24", "dev", "eth0")
        ip("-n", namespace, "link", "set", "eth0", "up")
        ip("-n", namespace, "link", "set", "lo", "up")
        # A moment passes until the kernel calls it running, and UCX does not see an interface that was not when it began.
        if not wait_until(lambda: "state UP" in ip("-n", namespace, "link", "show", "eth0"), 10):
            raise AssertionError("eth0 of %s is not up: %s" % (namespace, ip("-n", namespace, "link", "show", "eth0")))
        environment = settings(self.objects, workload)
        # What the cluster's DNS and volumes would give.
        environment.update({k: v for k, v in self.environment.items() if k in environment})
        if role != "etcd":
            environment.update(CHECKPOINT=MODEL, ETCD="%s:2379" % self.of("etcd")[0].address)
        command = command_of(self.objects, workload, POD_IP=address, **{k: v for k, v in environment.items()})
        command = [self.mounted(a) for a in command]
        command = ["%s=%s" % (a.split("=")[0], self.arguments[a.split("=")[0]]) if a.split("=")[0] in self.arguments else a for a in command]
        program = shutil.which(command[0]) if role == "etcd" else os.path.join(BIN, command[0])
        container, = workload["spec"]["template"]["spec"]["containers"]
        name = "%s-%s" % (workload["metadata"]["name"], ordinal)
        with open(os.path.join(self.scratch, "%03d-%s.log" % (number, name)), "w") as log:
            process = subprocess.Popen(["ip", "netns", "exec", namespace, program, *command[1:]], stdout=log, stderr=log,
                                       env=dict(environment, PATH=os.environ["PATH"], POD_IP=address))
        pod = Pod(role, name, ordinal, address, namespace, process, container, listens(command, environment), self.mounted)
        with self.lock:
            self.pods.append(pod)
        return pod

    def mounted(self, argument):
        """A command line's word with the paths of volumes as those of this machine."""
        for path, here in (("/etc/minke/data-plane/", ""), ("/etc/minke/api/", ""), ("/etc/minke/tls/", "tls/"), ("/etc/minke/http-tls/", "http-tls/"), ("/var/lib/etcd/", "")):
            argument = argument.replace(path, os.path.join(self.scratch, here))
        return argument

    def start_all(self):
        for role in ("etcd", "router", "expert", "attention", "gateway"):
            pods = [self.start(role, i) for i in range(self.replicas[role])]
            if role == "etcd":
                self.wait_ready(pods)

    def of(self, role):
        with self.lock:
            return [p for p in self.pods if p.role == role and not p.leaving]

    def wait_ready(self, pods, seconds=60):
        for pod in pods:
            if not wait_until(lambda: pod.process.poll() is not None or pod.probe("startupProbe") and pod.probe("readinessProbe"), seconds):
                raise AssertionError("%s is not ready after %d s\n%s" % (pod.name, seconds, self.logs()))
            if pod.process.poll() is not None:
                raise AssertionError("%s ended\n%s" % (pod.name, self.logs()))

    def delete(self, pod, seconds):
        """As kubelet: out of the Service, preStop, SIGTERM; the exit code, or AssertionError after terminationGracePeriodSeconds (here
        `seconds`, because nobody wants to wait so long)."""
        with self.lock:
            pod.leaving = True
            self.endpoints = [a for a in self.endpoints if a != pod.address]
        if "preStop" in pod.container.get("lifecycle", {}):
            time.sleep(min(1, pod.container["lifecycle"]["preStop"]["sleep"]["seconds"]))
        pod.process.send_signal(signal.SIGTERM)
        try:
            code = pod.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError("%s has not ended %d s after SIGTERM\n%s" % (pod.name, seconds, self.logs()))
        with self.lock:
            self.pods.remove(pod)
        ip("netns", "del", pod.namespace, check=False)
        return code

    def roll(self, role, seconds=60):
        """Replaces every pod of a pool as its controller would: a Deployment with maxSurge 1 and maxUnavailable 0 starts a new pod first, a
        StatefulSet ends the highest one first. Returns exit codes."""
        codes = []
        workload = self.workloads[role]
        surge = workload["kind"] == "Deployment" and workload["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
        for old in sorted(self.of(role), key=lambda p: -p.ordinal):
            if surge:
                self.wait_ready([self.start(role, old.ordinal + 100)], seconds)
                codes.append(self.delete(old, seconds))
            else:
                codes.append(self.delete(old, seconds))
                self.wait_ready([self.start(role, old.ordinal)], seconds)
            time.sleep(workload["spec"].get("minReadySeconds", 0) / 10)
        return codes

    def connections(self):
        """Established TCP connections inside the cluster: {(role that opened it, role, port)}."""
        with self.lock:
            pods = {p.address: p for p in self.pods}
        out = set()
        for pod in pods.values():
            text = subprocess.run(["ip", "netns", "exec", pod.namespace, "ss", "-tnH", "state", "established"], capture_output=True, text=True).stdout
            for line in text.splitlines():
                local, remote = [a.replace("[::ffff:", "").replace("]", "").rsplit(":", 1) for a in line.split()[2:4]]
                other = pods.get(remote[0])
                if other is not None and other is not pod and any(a <= int(remote[1]) <= b for a, b in other.ports) and not any(
                        a <= int(local[1]) <= b for a, b in pod.ports):
                    out.add((pod.role, other.role, int(remote[1])))
        return out

    def logs(self):
        out = []
        for name in sorted(os.listdir(self.scratch)):
            if name.endswith(".log"):
                with open(os.path.join(self.scratch, name), errors="replace") as f:
                    out += ["%s: %s" % (name[:-4], line.rstrip()) for line in f.readlines()[-25:]]
        return "\n".join(out)

    def stop(self):
        self.closing = True
        for pod in self.pods:
            if pod.process.poll() is None:
                pod.process.send_signal(signal.SIGINT)
        end = time.time() + 10
        for pod in self.pods:
            try:
                pod.process.wait(max(0.1, end - time.time()))
            except subprocess.TimeoutExpired:
                pod.process.kill()
                pod.process.wait()
        for number in range(1, self.count + 1):
            ip("netns", "del", "%sn%d" % (self.prefix, number), check=False)
        ip("link", "del", self.prefix + "br", check=False)
        shutil.rmtree(self.scratch, ignore_errors=True)
