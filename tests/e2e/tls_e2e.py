"""A whole cluster with mutual TLS everywhere: who gets in and who does not, on every port that is listened on; certificates
replaced under running streams; secrets that nobody sees; default addresses that are loopback."""
import concurrent.futures, http.client, json, os, re, shutil, signal, socket, ssl, subprocess, tempfile, threading, time, unittest
import harness
from harness import ROOT, Cluster, checkpoint, wait_until

MAKE = os.path.join(ROOT, "deploy", "tls", "make_certificates")
MODEL = os.path.join(ROOT, "models", "minke-shakespeare")
DATA_PLANE = ("minke-router", "minke-attention", "minke-expert")   # those with UCX listeners


def make(directory, *arguments):
    subprocess.run([MAKE, directory, *arguments], check=True, stdout=subprocess.DEVNULL)


def context(ca, own=None, alpn=None):
    """As a client that believes `ca`, and shows the certificate in the folder `own`."""
    c = ssl.create_default_context(cafile=ca)
    if own:
        c.load_cert_chain(own + "/tls.crt", own + "/tls.key")
    if alpn:
        c.set_alpn_protocols([alpn])
    return c


def contexts(ca, own=None):
    return {alpn: context(ca, own, alpn) for alpn in ("h2", "http/1.1")}


def serial(port, client):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as s, client.wrap_socket(s, server_hostname="127.0.0.1") as t:
        return t.getpeercert()["serialNumber"]


def accepts(port, clients):
    """Whether a TLS client gets as far as an answer: with TLS 1.3 the server's refusal comes after the client's handshake.
    A gRPC server answers with its settings, an HTTP server a request."""
    for alpn, hello in (("h2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"), ("http/1.1", b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as s, clients[alpn].wrap_socket(s, server_hostname="127.0.0.1") as t:
                t.settimeout(5)
                t.sendall(hello)
                if t.recv(9):
                    return True
        except (OSError, ssl.SSLError):
            pass
    return False


def plaintext_is_served(port):
    """Whether anything but a refusal comes back to clients without TLS."""
    for hello, wanted in ((b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", rb"^\x00\x00.\x04"),
                          (b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", rb"^HTTP/1.1 (?!400 )")):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as s:
                s.sendall(hello)
                answer = s.recv(65536)
        except OSError:
            continue
        if re.match(wanted, answer, re.S):
            return True
    return False


def children(pid):
    found = [pid]
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open("/proc/%s/stat" % name) as f:
                    if int(f.read().rsplit(")", 1)[1].split()[1]) == pid:
                        found += children(int(name))
            except OSError:
                pass
    return found


def program(pid):
    with open("/proc/%d/cmdline" % pid) as f:
        return os.path.basename(f.read().split("\0")[0])


def listeners(pids):
    """(pid, address, port) of every TCP socket that the processes listen on."""
    owner = {}
    for pid in pids:
        for fd in os.listdir("/proc/%d/fd" % pid):
            try:
                found = re.match(r"socket:\[(\d+)\]", os.readlink("/proc/%d/fd/%s" % (pid, fd)))
            except OSError:
                continue
            if found:
                owner[found.group(1)] = pid
    out = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as f:
            for line in f.readlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in owner:
                    address, port = fields[1].split(":")
                    out.append((owner[fields[9]], address, int(port, 16)))
    return out


LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


class SecureCluster(Cluster):
    """Speaks https with its own certificate."""

    def __init__(self, *arguments, client, **more):
        self.client = client
        super().__init__(*arguments, **more)

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            found = re.search(r"ready https://([^:]+):(\d+) after", line)
            if found:
                self.host, self.port, self.url = found.group(1), int(found.group(2)), "https://%s:%s" % found.groups()
                self._ready.set()
        self._ready.set()

    def connection(self, timeout=60):
        return http.client.HTTPSConnection(self.host, self.port, timeout=timeout, context=self.client)

    def request(self, method, path, body=None, headers=None, timeout=60):
        c = self.connection(timeout)
        c.request(method, path, None if body is None else json.dumps(body).encode(), {"content-type": "application/json", **(headers or {})})
        r = c.getresponse()
        text = r.read()
        c.close()
        return r.status, dict((k.lower(), v) for k, v in r.getheaders()), text

    def stream(self, path, body, limit=None, timeout=60):
        c = self.connection(timeout)
        c.request("POST", path, json.dumps(dict(body, stream=True)).encode(), {"content-type": "application/json"})
        r = c.getresponse()
        if r.status != 200:
            raise AssertionError("%d %s" % (r.status, r.read()))
        events = []
        for line in r:
            if line.strip() == b"data: [DONE]":
                c.close()
                return events, True
            if line.startswith(b"data: "):
                events.append(json.loads(line[6:]))
        c.close()
        return events, False


class Tls(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.dir = tempfile.mkdtemp(prefix="minke-tls-e2e-")
        make(cls.dir)
        make(cls.dir + "/other")
        cls.ca = cls.dir + "/ca.crt"

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.dir, ignore_errors=True)

    def folder(self, who):
        return os.path.join(self.dir, who)

    def flags(self, who="gateway"):
        own, public = self.folder(who), self.folder("http")
        return ["--tls-cert=" + own + "/tls.crt", "--tls-key=" + own + "/tls.key", "--tls-ca=" + own + "/ca.crt",
                "--http-tls-cert=" + public + "/tls.crt", "--http-tls-key=" + public + "/tls.key", "--http-tls-client-ca=" + self.ca]

    def cli(self):
        own = self.folder("client")
        return ["--ca=" + self.ca, "--cert=" + own + "/tls.crt", "--key=" + own + "/tls.key"]

    def test_every_port_wants_a_certificate_of_the_ca(self):
        us, nobody, stranger = contexts(self.ca, self.folder("client")), contexts(self.ca), contexts(self.ca, self.dir + "/other/client")
        keys, tokens = self.dir + "/keys", self.dir + "/tokens"
        for path, secret in ((keys, "sk-do-not-show"), (tokens, "op-do-not-show")):
            with open(path, "w") as f:
                f.write(secret + "\n")
        with SecureCluster(checkpoint("v2"), *self.flags(), "--routers=2", "--experts=2", "--api-key-file=" + keys,
                           "--operator-token-file=" + tokens, "--metrics-vllm-names", client=us["http/1.1"]) as cluster:
            key = {"authorization": "Bearer sk-do-not-show"}
            status, _, text = cluster.request("POST", "/v1/completions", dict(prompt=[4, 5], max_tokens=3, ignore_eos=True), headers=key)
            self.assertEqual((status, json.loads(text)["usage"]["completion_tokens"]), (200, 3), cluster.log())
            self.assertEqual(cluster.request("POST", "/v1/completions", dict(prompt=[4], max_tokens=1))[0], 401)

            pids = children(cluster.process.pid)
            programs = {pid: program(pid) for pid in pids}
            self.assertEqual(sorted(programs.values()).count("minke-expert"), 2)
            self.assertIn("etcd", programs.values())
            found = listeners(pids)
            with concurrent.futures.ThreadPoolExecutor(8) as pool:   # the data plane keeps strangers waiting
                ask = lambda question: list(pool.map(question, [port for _, _, port in found]))
                plain, ours, nobodys, strangers = (ask(plaintext_is_served), ask(lambda port: accepts(port, us)), ask(lambda port: accepts(port, nobody)),
                                                   ask(lambda port: accepts(port, stranger)))
            tls, data = [], []
            for i, (pid, address, port) in enumerate(found):
                where = "%s listens on %s:%d" % (programs[pid], address, port)
                self.assertIn(address, LOOPBACK, where)
                self.assertFalse(plain[i], where + " and serves plaintext")
                self.assertFalse(nobodys[i], where + " and takes clients without a certificate")
                self.assertFalse(strangers[i], where + " and takes certificates of another CA")
                if not ours[i]:   # neither TLS nor served without: the data plane, whose own handshake keeps strangers out
                    self.assertIn(programs[pid], DATA_PLANE, where)
                (tls if ours[i] else data).append(programs[pid])
            # gRPC and /metrics of each member; HTTP and gRPC of the gateway; clients' and peers' side of etcd.
            members = ["minke-router"] * 2 + ["minke-expert"] * 2 + ["minke-attention"]
            self.assertEqual(sorted(tls), sorted(members * 2 + ["minke-gateway"] * 2 + ["etcd"] * 2), cluster.log())
            self.assertLessEqual(set(members), set(data))
            self.assertFalse(any(re.search(r"\bhttp://127", line) for line in cluster.lines), cluster.log())

            # What is secret is in files only.
            secrets = ["do-not-show", "PRIVATE KEY"]
            command = open("/proc/%d/cmdline" % cluster.pids("expert")[0]).read()
            secrets.append(open(re.search(r"--cluster-secret-file=([^\0]+)", command).group(1)).read().strip())   # the data plane's
            for secret in secrets:
                self.assertTrue(secret)
                for pid in pids:
                    self.assertNotIn(secret, open("/proc/%d/cmdline" % pid).read())
                self.assertNotIn(secret, cluster.log())

    def test_commands_speak_https(self):
        with SecureCluster(checkpoint("v2", tokenizer=True), *self.flags(), client=context(self.ca, self.folder("client"))) as cluster:
            top = harness.run("top", "--once", "--url", cluster.url, *self.cli())
            self.assertEqual(top.returncode, 0, top.stderr)
            self.assertIn("expert", top.stdout)
            bench = harness.run("bench", "serve", "--url", cluster.url, *self.cli(), "--requests=4", "--concurrency=2", "--prompt-source=random-ids",
                                "--token-ids=1:100", "--prompt-tokens=8", "--output-tokens=4", "--fail-on-error", "--json=-")
            self.assertEqual(bench.returncode, 0, bench.stderr)
            chat = harness.run("chat", "--url", cluster.url, *self.cli(), "--max-tokens=4", stdin="hello\n")
            self.assertTrue(chat.returncode == 0 or "chat template" in chat.stderr, chat.stderr)   # an answer over TLS either way
            members = re.findall(r"serving rpc=(127\.0\.0\.1:\d+)", cluster.log())
            self.assertEqual(len(members), 2)   # router, attention node
            for where in [["--url", cluster.url], ["--url", cluster.url + "/version"]] + [["--grpc", m] for m in members]:
                health = harness.run("health", *where, *self.cli())
                self.assertEqual((health.returncode, health.stderr), (0, ""))
                self.assertEqual(harness.run("health", *where).returncode, 1)
            pinned = ["--pin=" + self.folder("http") + "/tls.crt", *self.cli()[1:]]
            self.assertEqual(harness.run("health", "--url", cluster.url.replace("127.0.0.1", "localhost"), *pinned).returncode, 0)
            pinned[0] = "--pin=" + self.folder("gateway") + "/tls.crt"
            self.assertIn("the server's certificate is not accepted", harness.run("health", "--url", cluster.url, *pinned).stderr)
            scale = harness.run("scale", "experts", "3", "--port", str(cluster.port), timeout=120)
            self.assertEqual(scale.returncode, 0, scale.stderr + cluster.log())
            # One line says what is wrong.
            for arguments, says in ((["--ca=" + self.dir + "/other/ca.crt"], "the server's certificate is not accepted"),
                                    (["--ca=" + self.ca], "certificate required|handshake failure|stopped answering"),
                                    ([], "the server's certificate is not accepted"),
                                    (["--cert=" + self.folder("client") + "/tls.crt"], "--cert: expected --key beside it, found none")):
                result = harness.run("top", "--once", "--url", cluster.url, *arguments)
                self.assertEqual(result.returncode, 1)
                self.assertRegex(result.stderr, says)
                self.assertEqual(result.stderr.count("\n"), 1, result.stderr)
            result = harness.run("top", "--once", "--url", cluster.url.replace("https", "http"))
            self.assertRegex(result.stderr, "400 expected https, found http")
            result = harness.run("top", "--once", "--url", cluster.url.replace("127.0.0.1", "127.0.0.2"), *self.cli())
            self.assertEqual(result.returncode, 1)

    def test_prometheus_scrapes_with_a_certificate(self):
        port, targets = harness.free_port(), self.dir + "/targets.json"
        own = self.folder("client")
        with open(self.dir + "/prometheus.json", "w") as f:   # JSON is YAML
            json.dump({"scrape_configs": [{"job_name": "minke", "scrape_interval": "1s", "file_sd_configs": [{"files": [targets]}],
                                           "tls_config": {"ca_file": self.ca, "cert_file": own + "/tls.crt", "key_file": own + "/tls.key"}}]}, f)
        with SecureCluster(checkpoint("v2"), *self.flags(), "--targets-file=" + targets, client=context(self.ca, own)) as cluster:
            prometheus = subprocess.Popen(["prometheus", "--config.file=" + self.dir + "/prometheus.json", "--storage.tsdb.path=" + self.dir + "/tsdb",
                                           "--web.listen-address=127.0.0.1:%d" % port], stderr=subprocess.DEVNULL)
            def up():
                try:
                    c = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                    c.request("GET", "/api/v1/query?query=up")
                    return sorted((r["metric"]["job"], r["value"][1]) for r in json.loads(c.getresponse().read())["data"]["result"])
                except (OSError, ValueError, http.client.HTTPException):
                    return None
            try:
                wanted = sorted((job, "1") for job in ("minke-gateway", "minke-router", "minke-attention", "minke-expert", "minke-expert"))
                self.assertTrue(wait_until(lambda: up() == wanted, 60), up())
            finally:
                prometheus.kill()
                prometheus.wait()

    def test_one_process_serves_https_too(self):
        with SecureCluster(checkpoint("v2"), *self.flags(), verb="serve", client=context(self.ca, self.folder("client"))) as cluster:
            status, _, text = cluster.request("POST", "/v1/completions", dict(prompt=[4, 5], max_tokens=3, ignore_eos=True))
            self.assertEqual((status, json.loads(text)["usage"]["completion_tokens"]), (200, 3), cluster.log())
            for _, _, port in listeners([cluster.process.pid]):
                self.assertFalse(plaintext_is_served(port))
                self.assertFalse(accepts(port, contexts(self.ca)))

    def test_without_a_client_ca_the_api_asks_for_no_certificate(self):
        with SecureCluster(checkpoint("v2"), *self.flags()[:-1], verb="serve", client=context(self.ca)) as cluster:
            status, _, text = cluster.request("POST", "/v1/completions", dict(prompt=[4, 5], max_tokens=3, ignore_eos=True))
            self.assertEqual((status, json.loads(text)["usage"]["completion_tokens"]), (200, 3), cluster.log())
            found = [port for _, _, port in listeners([cluster.process.pid])]
            anybody = [port for port in found if accepts(port, contexts(self.ca))]
            self.assertEqual(len(anybody), 2)   # HTTP and gRPC
            self.assertIn(cluster.port, anybody)
            self.assertGreater(len(found), 2)
            self.assertFalse(any(plaintext_is_served(port) for port in found))

    def test_an_etcd_of_another_ca(self):
        own, port, peer = self.dir + "/other/etcd", harness.free_port(), harness.free_port()
        client, peers = "https://127.0.0.1:%d" % port, "http://127.0.0.1:%d" % peer
        data = tempfile.mkdtemp(prefix="minke-etcd-")
        etcd = subprocess.Popen(["etcd", "--name=e2e", "--data-dir=" + data, "--listen-client-urls=" + client, "--advertise-client-urls=" + client,
                                 "--listen-peer-urls=" + peers, "--initial-advertise-peer-urls=" + peers, "--initial-cluster=e2e=" + peers, "--logger=zap",
                                 "--log-level=error", "--cert-file=" + own + "/tls.crt", "--key-file=" + own + "/tls.key",
                                 "--trusted-ca-file=" + own + "/ca.crt", "--client-cert-auth"], stderr=subprocess.DEVNULL)
        try:
            theirs = self.dir + "/other/client"
            files = ["--etcd-ca=" + theirs + "/ca.crt", "--etcd-cert=" + theirs + "/tls.crt", "--etcd-key=" + theirs + "/tls.key"]
            with Cluster(checkpoint("v2"), "--etcd=127.0.0.1:%d" % port, "--routers=2", *files) as cluster:
                self.assertEqual(len(cluster.complete(prompt=[4], max_tokens=2, ignore_eos=True, return_token_ids=True)["choices"][0]["token_ids"]), 2)
            stranger = self.dir + "/client"
            for wrong in ([], files[:1], files[:1] + ["--etcd-cert=" + stranger + "/tls.crt", "--etcd-key=" + stranger + "/tls.key"]):
                with Cluster(checkpoint("v2"), "--etcd=127.0.0.1:%d" % port, "--routers=2", *wrong, wait=False) as cluster:
                    self.assertTrue(wait_until(lambda: "etcd=127.0.0.1:%d" % port in cluster.log(), 30), cluster.log())   # cannot be reached
                    self.assertIsNone(cluster.url, cluster.log())
        finally:
            etcd.kill()
            etcd.wait()
            shutil.rmtree(data, ignore_errors=True)

    def test_certificates_are_replaced_under_streams(self):
        us = context(self.ca, self.folder("client"))
        exact = ("--precision=exact", "--experts=2", "--replicas=2", "--attention=2", "--threads=1", "--supervise")
        with SecureCluster(MODEL, *self.flags(), *exact, client=us) as cluster, harness.Streams(cluster, max_tokens=40) as streams:
            streams.go_on(self)
            ports = [port for _, _, port in listeners(children(cluster.process.pid)) if accepts(port, contexts(self.ca, self.folder("client")))]
            before = {port: serial(port, us) for port in ports}
            self.assertGreaterEqual(len(before), 8)
            # Half a pair, then garbage, for longer than it takes to be noticed: nobody uses either.
            key = open(self.folder("gateway") + "/tls.key").read()
            make(self.dir + "/half", "gateway")
            shutil.copy(self.dir + "/half/gateway/tls.key", self.folder("gateway") + "/tls.key")
            with open(self.folder("http") + "/tls.crt", "w") as f:
                f.write("-----BEGIN CERTIFICATE-----\nMIIB")
            self.assertTrue(wait_until(lambda: cluster.log().count("what was there before stays in use") >= 4), cluster.log())
            self.assertEqual({port: serial(port, us) for port in ports}, before)
            streams.go_on(self)
            with open(self.folder("gateway") + "/tls.key", "w") as f:
                f.write(key)
            make(self.dir, "gateway", "http")
            self.assertTrue(wait_until(lambda: all(serial(port, us) != old for port, old in before.items()), 30), cluster.log())
            streams.go_on(self)
            # New members and connections of old ones use them too.
            os.kill(cluster.pids("attention")[0], signal.SIGKILL)
            os.kill(cluster.pids("expert")[0], signal.SIGKILL)
            self.assertTrue(wait_until(lambda: cluster.log().count("restarted ") >= 2), cluster.log())
            streams.go_on(self)

    def test_bad_flags_are_one_line(self):
        good = self.flags()
        other = self.dir + "/other/gateway"
        for flags, says in ((["--tls-cert=" + self.folder("gateway") + "/tls.crt"], "--tls-cert: expected --tls-key beside it, found none"),
                            (good[:2], "--tls-cert: expected --tls-ca beside it, found none"),
                            (good[:1] + ["--tls-key=" + other + "/tls.key"] + good[2:3], "--tls-key .*: expected the key of the certificate in --tls-cert .*, found another one"),
                            (["--tls-cert=/none"] + good[1:3], "--tls-cert /none: expected a readable file, found: No such file or directory"),
                            (good[3:], "--http-tls-client-ca: expected --tls-cert beside it"),
                            (["--tls-name=x"], "--tls-name: expected --tls-cert beside it"),
                            (["--etcd-ca=" + self.ca], "--etcd-ca: expected --registry=etcd beside it")):
            for verb in ("up", "serve"):
                if verb == "serve" and "--etcd" in flags[0]:
                    continue
                result = harness.run(verb, checkpoint("v2"), "--port=0", *flags)
                self.assertEqual(result.returncode, 1, result.stderr)
                self.assertRegex(result.stderr, says)
                self.assertEqual(result.stderr.strip().count("\n"), 0, result.stderr)

    def test_members_without_tls_and_of_another_ca_are_not_let_in(self):
        own = self.folder("router")
        router = subprocess.Popen([harness.BIN + "/minke-router", "--checkpoint=" + checkpoint("v2"), "--threads=1", "--tls-cert=" + own + "/tls.crt",
                                   "--tls-key=" + own + "/tls.key", "--tls-ca=" + own + "/ca.crt"], stderr=subprocess.PIPE, text=True)
        lines = []
        threading.Thread(target=lambda: lines.extend(router.stderr), daemon=True).start()
        try:
            says = lambda: re.search(r"serving rpc=(127\.0\.0\.1:\d+)", "".join(lines))
            self.assertTrue(wait_until(says, 30), lines)
            address = says().group(1)
            other = self.dir + "/other/expert"
            for flags in ([], ["--tls-cert=" + other + "/tls.crt", "--tls-key=" + other + "/tls.key", "--tls-ca=" + self.ca],
                          ["--tls-cert=" + other + "/tls.crt", "--tls-key=" + other + "/tls.key", "--tls-ca=" + self.dir + "/other/ca.crt"]):
                expert = subprocess.Popen([harness.BIN + "/minke-expert", "--checkpoint=" + checkpoint("v2"), "--threads=1", "--router=" + address, *flags],
                                          stderr=subprocess.PIPE, text=True)
                try:
                    output = []
                    threading.Thread(target=lambda: output.extend(expert.stderr), daemon=True).start()
                    self.assertTrue(wait_until(lambda: any("not reachable" in line for line in output), 20), output)
                    self.assertFalse(any("joined role=ROLE_EXPERT" in line for line in lines), lines)
                finally:
                    expert.kill()
                    expert.wait()
        finally:
            router.kill()
            router.wait()

    def test_default_addresses_are_loopback(self):
        with Cluster(checkpoint("v2"), "--routers=2") as cluster:
            found = listeners(children(cluster.process.pid))
            self.assertGreaterEqual(len(found), 10)
            self.assertEqual([l for l in found if l[1] not in LOOPBACK], [])
        for name in ("minke-gateway", "minke-router", "minke-attention", "minke-expert"):   # each alone, as its help says
            text = subprocess.run([os.path.join(harness.BIN, name), "--help"], capture_output=True, text=True).stdout
            for flag in re.findall(r"(--\S*listen) TEXT \[([^\]]*)\]", text):
                self.assertRegex(flag[1], r"^127\.0\.0\.1:", name)


if __name__ == "__main__":
    harness.main()
