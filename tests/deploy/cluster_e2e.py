"""A cluster that runs by the rendered manifests: its probes answer, its connections are those that the policies allow, what autoscalers ask
for is measured, and every pod is replaced under streaming load without a failed or a wrong answer."""
import http.client, json, math, os, re, shutil, signal, socket, ssl, subprocess, sys, tempfile, time, unittest

import yaml

from manifests import BIN, DEPLOY, ROLES, kustomized
import manifests_test
from pods import KEY, MODEL, Pods, Service, ip
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "fault"))
from harness import free_port, wait_until
from members import can_have_namespaces
from streams import Load

# As the manifests have it, but for the machine: small threads and caches, fewer expert servers, numbers that can be compared to the bit.
REPLICAS = {"expert": 3}
ARGUMENTS = {"--cache-mib": "64", "--experts": "3"}
PATIENT = ["--heartbeat-ms=1000"]   # more processes than cores, and who is slow is not to be taken for dead
HEADERS = {"authorization": "Bearer " + KEY}


def scrape(pod):
    c = http.client.HTTPConnection(pod.address, 8000 if pod.role == "gateway" else 9100, timeout=10)
    c.request("GET", "/metrics")
    text = c.getresponse().read().decode()
    c.close()
    return set(re.findall(r"^([a-zA-Z_:][\w:]*)[ {]", text, re.M))


class Prometheus:
    """Scrapes the pods with the labels that Kubernetes' discovery gives."""

    def __init__(self, pods):
        self.directory = tempfile.mkdtemp(prefix="minke-prometheus-")
        self.port = free_port()
        targets = [{"targets": ["%s:%d" % (p.address, 8000 if p.role == "gateway" else 9100)],
                    "labels": {"namespace": "minke", "pod": p.name}} for p in pods]
        config = {"global": {"scrape_interval": "1s"}, "scrape_configs": [{"job_name": "pods", "static_configs": targets}]}
        with open(self.directory + "/prometheus.yml", "w") as f:
            yaml.safe_dump(config, f)
        self.process = subprocess.Popen(["prometheus", "--config.file=%s/prometheus.yml" % self.directory, "--storage.tsdb.path=%s/data" % self.directory,
                                         "--web.listen-address=127.0.0.1:%d" % self.port], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def query(self, text):
        """Series as (labels, value); [] also while nobody answers yet."""
        try:
            c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
            c.request("POST", "/api/v1/query", "query=" + "".join("%%%02X" % b for b in text.encode()), {"content-type": "application/x-www-form-urlencoded"})
            answer = json.loads(c.getresponse().read())
            c.close()
        except (OSError, ValueError, http.client.HTTPException):
            return []
        if answer["status"] != "success":
            raise AssertionError("%s: %s" % (text, answer))
        return [(s["metric"], float(s["value"][1])) for s in answer["data"]["result"] if not math.isnan(float(s["value"][1]))]

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


class WithTls(unittest.TestCase):
    """The overlay tls: pods that know each other by one name, whatever their address; probes that show certificates; a secret renewed."""

    def context(self, own=None):
        c = ssl.create_default_context(cafile=self.secrets + "/ca.crt")
        c.set_alpn_protocols(["h2", "http/1.1"])
        if own:
            c.load_cert_chain(own + "/tls.crt", own + "/tls.key")
        return c

    def serial(self, pod, port):
        c = self.context(self.secrets + "/tls")
        with socket.create_connection((pod.address, port), timeout=10) as s, c.wrap_socket(s, server_hostname="minke.internal") as t:
            return t.getpeercert()["serialNumber"]

    def make(self, *arguments):
        subprocess.run([os.path.join(DEPLOY, "tls", "make_certificates"), self.secrets, *arguments], check=True, stdout=subprocess.DEVNULL)

    def test_pods_that_know_each_other_by_name(self):
        pods = Pods(kustomized("tls"), {"gateway": 1, "router": 1, "attention": 1, "expert": 2}, {"--cache-mib": "64", "--experts": "2"}, {"PRECISION": "exact"})
        try:
            self.secrets = pods.scratch
            self.make("--san", "IP:%s.1" % pods.net, "tls", "http-tls")   # etcd, the first pod, has no name here
            for role, workload in pods.workloads.items():
                if role != "etcd":
                    workload["spec"]["template"]["spec"]["containers"][0]["args"] += PATIENT + (["--threads=1"] if role != "gateway" else [])
            pods.start_all()
            everybody = sum((pods.of(role) for role in ROLES), [])
            pods.wait_ready(everybody)
            for pod in everybody + pods.of("etcd"):
                for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                    self.assertTrue(pod.probe(probe), "%s %s" % (pod.name, probe))
            gateway, = pods.of("gateway")

            def complete():
                c = http.client.HTTPSConnection(gateway.address, 8000, timeout=60, context=ssl._create_unverified_context())
                c.request("POST", "/v1/completions", json.dumps(dict(prompt="ROMEO:", max_tokens=8, ignore_eos=True)), dict(HEADERS, **{"content-type": "application/json"}))
                status = c.getresponse().status
                c.close()
                return status
            self.assertEqual(complete(), 200, pods.logs())
            ports = [(p, port) for p in everybody if p.role != "gateway" for port in (7000, 9100)] + [(gateway, 8000), (pods.of("etcd")[0], 2379)]
            before = {(p.name, port): self.serial(p, port) for p, port in ports}
            self.assertEqual(len(set(before.values())), 2)
            for pod, port in ports:
                if pod is not gateway:   # nobody gets an answer without a certificate
                    with self.assertRaises((OSError, ssl.SSLError), msg="%s:%d" % (pod.name, port)):
                        with socket.create_connection((pod.address, port), timeout=10) as s, self.context().wrap_socket(s, server_hostname="minke.internal") as t:
                            t.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
                            if not t.recv(1):
                                raise ConnectionResetError
            self.make("--san", "IP:%s.1" % pods.net, "tls", "http-tls")
            self.assertTrue(wait_until(lambda: all(self.serial(p, port) != before[p.name, port] for p, port in ports), 30))
            # Who comes later, and connections made anew, too.
            expert = pods.of("expert")[-1]
            self.assertEqual(pods.delete(expert, 60), 0, pods.logs())
            pods.wait_ready([pods.start("expert", expert.ordinal)])
            self.assertTrue(wait_until(lambda: gateway.probe("readinessProbe"), 30), pods.logs())
            self.assertEqual(complete(), 200, pods.logs())
        finally:
            pods.stop()


class ByTheManifests(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.objects = kustomized("default")
        cls.pods = Pods(cls.objects, REPLICAS, ARGUMENTS, {"PRECISION": "exact"})
        try:
            for role, workload in cls.pods.workloads.items():
                if role != "etcd":
                    workload["spec"]["template"]["spec"]["containers"][0]["args"] += PATIENT + (["--threads=1"] if role != "gateway" else [])
            cls.pods.start_all()
            cls.unready = [p.name for role in ("gateway", "expert") for p in cls.pods.of(role) if not p.probe("readinessProbe")]
            cls.pods.wait_ready(sum((cls.pods.of(role) for role in ROLES), []))
            if not wait_until(lambda: len(cls.pods.endpoints) == 2, 30):
                raise AssertionError("gateways: ready %s\n%s" % (cls.pods.endpoints, cls.pods.logs()))
            cls.load = Load(Service(cls.pods), seed=8, clients=4, count=6, tokens=(24, 120), headers=HEADERS)
        except BaseException:
            cls.pods.stop()
            raise

    @classmethod
    def tearDownClass(cls):
        cls.pods.stop()

    def test_1_probes(self):
        self.assertTrue(self.unready, "all were ready before anything had loaded")
        for role in ROLES:
            for pod in self.pods.of(role):
                for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                    self.assertTrue(pod.probe(probe), "%s %s" % (pod.name, probe))
        # Without a key nobody computes here; the gateway's gRPC API is not on the network.
        gateway = self.pods.of("gateway")[0]
        c = http.client.HTTPConnection(gateway.address, 8000, timeout=10)
        c.request("POST", "/v1/completions", b"{}", {"content-type": "application/json"})
        self.assertEqual(c.getresponse().status, 401)
        with self.assertRaises(OSError):
            http.client.HTTPConnection(gateway.address, 7000, timeout=2).connect()

    def test_2_what_autoscalers_ask_for_is_measured(self):
        with open(os.path.join(DEPLOY, "kustomize", "components", "autoscaling", "prometheus-adapter.yaml")) as f:
            rules = {r["name"]["as"]: r for r in yaml.safe_load(f)["rules"]["custom"]}
        metrics = {role: scrape(self.pods.of(role)[0]) for role in ROLES}
        self.assertNotIn("minke:no_such_metric", metrics["expert"])
        prometheus = Prometheus(sum((self.pods.of(role) for role in ROLES), []))
        used = set()
        try:
            self.assertTrue(wait_until(lambda: prometheus.query("minke:expert_busy_seconds_total"), 20))
            with Load(Service(self.pods), seed=9, clients=2, count=3, tokens=(24, 60), headers=HEADERS):
                for hpa in (o for o in kustomized("autoscaling") if o["kind"] == "HorizontalPodAutoscaler"):
                    role = hpa["spec"]["scaleTargetRef"]["name"].removeprefix("minke-")
                    for metric in hpa["spec"]["metrics"]:
                        if metric["type"] == "Resource":
                            self.assertIn(role, ("gateway", "router"))   # metrics-server's
                            continue
                        name = metric["pods"]["metric"]["name"]
                        self.assertIn(name, rules, "no adapter rule makes it")
                        used.add(name)
                        series = re.search(r'__name__="([^"]+)"', rules[name]["seriesQuery"]).group(1)
                        self.assertRegex(series, rules[name]["name"]["matches"])
                        self.assertIn(series, metrics[role], "not in a scrape of a pod of " + role)
                        names = [p.name for p in self.pods.of(role)]
                        query = rules[name]["metricsQuery"].replace("<<.Series>>", series).replace("<<.GroupBy>>", "pod").replace(
                            "<<.LabelMatchers>>", 'namespace="minke",pod=~"%s"' % "|".join(names))
                        self.assertTrue(wait_until(lambda: sorted(labels["pod"] for labels, _ in prometheus.query(query)) == sorted(names), 20),
                                        "%s: %s" % (query, prometheus.query(query)))
                self.assertEqual(used, set(rules), "rules that no autoscaler uses")
                for scaled in (o for o in kustomized("keda") if o["kind"] == "ScaledObject"):
                    role = scaled["spec"]["scaleTargetRef"]["name"].removeprefix("minke-")
                    for trigger in scaled["spec"]["triggers"]:
                        query = trigger["metadata"]["query"]
                        for series in re.findall(r"minke:\w+", query):
                            self.assertIn(series, metrics[role], "not in a scrape of a pod of " + role)
                        self.assertTrue(wait_until(lambda: len(prometheus.query(query)) == 1, 20), query)
                busy = lambda: [v for _, v in prometheus.query('rate(minke:expert_busy_seconds_total{namespace="minke"}[1m])')]
                self.assertTrue(wait_until(lambda: busy() and all(0 < v <= 1.1 for v in busy()), 20), "busy shares: %s" % busy())
        finally:
            prometheus.close()

    def test_3_every_pod_is_replaced_under_load_and_nothing_fails(self):
        seen, service = set(), self.load.address
        before, given = {p.process.pid for p in self.pods.pods}, service.given
        with self.load:
            for role in ("router", "attention", "expert", "gateway"):
                began = time.monotonic()
                codes = self.pods.roll(role)
                self.assertEqual(codes, [0] * len(codes), self.pods.logs())
                self.assertEqual(len(codes), {"expert": 3}.get(role, 2))
                seen |= self.pods.connections()
                print("%s: %d replaced in %.1f s" % (role, len(codes), time.monotonic() - began), flush=True)
            self.load.wait_for_older(time.monotonic())
        self.assertEqual([p.role for p in self.pods.pods if p.process.pid in before], ["etcd"])
        outcomes = [(s.outcome, s.detail) for s in self.load.streams if s.outcome != "ok"]
        self.assertEqual(outcomes, [], self.pods.logs())
        self.assertGreater(len(self.load.streams), 10)
        self.assertEqual(service.given - given, len(self.load.streams), "a gateway in the Service refused a connection")
        print("%d streams, all whole and right" % len(self.load.streams), flush=True)

        # Connections: none that the policies forbid, and of every pair of pools some.
        allowed = manifests_test.Policies.allowed(self.objects)
        for source, to, port in seen:
            self.assertTrue(any((source, to) == (a, b) and first <= port <= last for a, b, first, last in allowed),
                            "%s opened port %d of %s, which no policy allows" % (source, port, to))
        pairs = {(a, b) for a, b, _ in seen}
        self.assertLessEqual({("gateway", "attention"), ("attention", "router"), ("router", "expert"), ("attention", "expert"), ("expert", "attention"),
                              *((role, "etcd") for role in ROLES)}, pairs)


class ByTheUnits(unittest.TestCase):
    """The services' command lines with the example environment, on one host: no two share a port, and they answer."""

    def test_the_services_of_one_host_serve(self):
        scratch = tempfile.mkdtemp(prefix="minke-units-")
        self.addCleanup(shutil.rmtree, scratch)
        for name, text in (("cluster-secret", "correct horse battery staple\n"), ("api-keys", KEY + "\n")):
            with open(os.path.join(scratch, name), "w") as f:
                f.write(text)
        http_port = free_port()
        environment = {"MINKE_CHECKPOINT": MODEL, "MINKE_ADDRESS": "127.0.0.1", "MINKE_HTTP": "127.0.0.1:%d" % http_port,
                       "MINKE_MEMBER_REGISTRY": "--router=127.0.0.1:7000", "MINKE_ATTENTION_FLAGS": "--cache-mib=64 --threads=1 " + PATIENT[0],
                       "MINKE_EXPERT_FLAGS": "--threads=1 " + PATIENT[0]}
        # A host of its own, so that the units' fixed ports are free.
        host = "mu%d" % os.getpid()
        ip("netns", "add", host)
        self.addCleanup(ip, "netns", "del", host, check=False)
        ip("-n", host, "link", "set", "lo", "up")
        with open(os.path.join(DEPLOY, "systemd", "minke-.service.d", "common.conf")) as f:
            ports = re.search(r"^Environment=(UCX_TCP_PORT_RANGE)=(\S+)$", f.read(), re.M)
        processes, log = {}, open(os.path.join(scratch, "log"), "w+")
        self.addCleanup(log.close)
        try:
            for unit, instance in (("router", ""), ("expert@", "0"), ("expert@", "1"), ("attention@", "0"), ("gateway", "")):
                command = manifests_test.Systemd.command("minke-%s.service" % unit, instance, environment)
                command = [a.replace("/run/credentials/unit", scratch).replace("/usr/local/bin", BIN) for a in command]
                processes[unit + instance] = subprocess.Popen(["ip", "netns", "exec", host, *command], stdout=log, stderr=log,
                                                              env={"PATH": os.environ["PATH"], ports.group(1): ports.group(2)})

            def ask(method, path, body=""):
                """By a client on that host."""
                return subprocess.run(["ip", "netns", "exec", host, sys.executable, "-c", CLIENT, str(http_port), method, path, body, KEY],
                                      capture_output=True, text=True, timeout=60).stdout

            def log_text():
                log.seek(0)
                return log.read()

            self.assertTrue(wait_until(lambda: ask("GET", "/health").startswith("200"), 60), log_text())
            answer = ask("POST", "/v1/completions", json.dumps({"prompt": "KING:", "max_tokens": 8, "ignore_eos": True}))
            self.assertTrue(answer.startswith("200"), answer + log_text())
            listening = subprocess.run(["ip", "netns", "exec", host, "ss", "-tlnH"], capture_output=True, text=True).stdout
            used = sorted(int(line.split()[3].rsplit(":", 1)[1]) for line in listening.splitlines())
            want = [7000, 7001, 7002, 7100, 7110, 7200, 7201, 7210, 7211, 9100, 9110, 9120, 9121, http_port]
            self.assertEqual(sorted(p for p in used if not 7300 <= p <= 7399), sorted(want))
            # As `systemctl stop minke.target` does it: in the reverse of Before= and After=. Nobody can take over, so nobody waits for that.
            for stage in (("gateway",), ("attention@0", "expert@0", "expert@1"), ("router",)):
                for name in stage:
                    processes[name].send_signal(signal.SIGTERM)
                self.assertEqual([processes[name].wait(20) for name in stage], [0] * len(stage), log_text())
        finally:
            for process in processes.values():
                if process.poll() is None:
                    process.kill()
                    process.wait()


# status and body of an answer: port, method, path, body, key
CLIENT = """
import http.client, sys
try:
    c = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=30)
    c.request(sys.argv[2], sys.argv[3], sys.argv[4], {"content-type": "application/json", "authorization": "Bearer " + sys.argv[5]})
    r = c.getresponse()
    print(r.status, r.read().decode())
except OSError as e:
    print("none", e)
"""

if __name__ == "__main__":
    if not can_have_namespaces():
        print("network namespaces need root")
        sys.exit(77)
    unittest.main(verbosity=2)
