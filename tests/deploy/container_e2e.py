"""Builds the images with deploy/container/build --prebuilt, starts deploy/compose/compose.yaml with them, and gets a completion.

As root; skipped without debootstrap, buildah, podman, podman-compose, runc, netavark and aardvark-dns. A minute, and another when Debian is
not in MINKE_CONTAINER_CACHE yet."""
import http.client, json, os, shutil, socket, ssl, subprocess, sys, tempfile, time, unittest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
BIN = os.environ.get("MINKE_BIN", os.path.join(ROOT, "build", "bin"))
TOOLS = ("debootstrap", "buildah", "podman", "podman-compose", "runc")
TAG, PROJECT, KEY = "e2e", "minke-e2e-%d" % os.getpid(), "sk-container-test"
# No systemd and no cgroups of our own needed: works on small virtual machines and in containers.
CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
[network]
network_backend = "netavark"
"""


def run(*command, timeout=300, **more):
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, **more)
    if result.returncode != 0:
        raise AssertionError("%s: %d\n%s%s" % (" ".join(command), result.returncode, result.stdout[-4000:], result.stderr[-4000:]))
    return result.stdout.strip()


class Containers(unittest.TestCase):
    FILES = ("compose.yaml",)
    tls = None   # what an https client trusts; None: http

    @classmethod
    def prepare(cls):
        pass

    @classmethod
    def setUpClass(cls):
        cls.scratch = tempfile.mkdtemp(prefix="minke-container-")
        os.chmod(cls.scratch, 0o755)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            cls.port = s.getsockname()[1]
        for name, text in (("containers.conf", CONTAINERS_CONF), ("data-plane", "correct horse battery staple\n"), ("api-keys", KEY + "\n")):
            with open(os.path.join(cls.scratch, name), "w") as f:
                f.write(text)
        os.environ.update(CONTAINERS_CONF=cls.scratch + "/containers.conf", STORAGE_DRIVER="vfs", MINKE_IMAGE="localhost/minke:" + TAG,
                          MINKE_ETCD_IMAGE="localhost/minke-etcd:" + TAG, MINKE_MODEL=os.path.join(ROOT, "models", "minke-shakespeare"),
                          MINKE_SECRETS=cls.scratch, MINKE_PORT=str(cls.port), MINKE_EXPERTS="3", MINKE_ROUTER_FLAGS="--threads=1",
                          MINKE_EXPERT_FLAGS="--threads=1", MINKE_ATTENTION_FLAGS="--threads=1")
        cls.project = PROJECT + cls.__name__.lower()
        cls.compose = ["podman-compose", "-p", cls.project]
        for file in cls.FILES:
            cls.compose += ["-f", os.path.join(ROOT, "deploy", "compose", file)]
        cls.prepare()
        began = time.monotonic()
        run(os.path.join(ROOT, "deploy", "container", "build"), "--prebuilt", BIN, "--tag", TAG, timeout=900)
        print("built in %.0f s" % (time.monotonic() - began), flush=True)
        try:
            began = time.monotonic()
            run(*cls.compose, "up", "-d")
            end = time.monotonic() + 90
            while cls.request("GET", "/health")[0] != 200:
                if time.monotonic() > end:
                    raise AssertionError("not ready: %s\n%s" % (cls.request("GET", "/health"), cls.logs()))
                time.sleep(0.2)
            print("serving after %.0f s" % (time.monotonic() - began), flush=True)
        except BaseException:
            cls.tearDownClass()
            raise

    @classmethod
    def tearDownClass(cls):
        subprocess.run([*cls.compose, "down", "-v", "-t", "5"], capture_output=True, timeout=300)
        for image in ("minke", "minke-etcd"):
            subprocess.run(["buildah", "rmi", "localhost/%s:%s" % (image, TAG)], capture_output=True, timeout=60)
        shutil.rmtree(cls.scratch, ignore_errors=True)

    @classmethod
    def request(cls, method, path, body=None, key=KEY):
        try:
            c = (http.client.HTTPSConnection("127.0.0.1", cls.port, timeout=60, context=cls.tls) if cls.tls else
                 http.client.HTTPConnection("127.0.0.1", cls.port, timeout=60))
            c.request(method, path, body and json.dumps(body), {"content-type": "application/json", **({"authorization": "Bearer " + key} if key else {})})
            r = c.getresponse()
            answer = r.status, r.read().decode()
            c.close()
            return answer
        except (OSError, http.client.HTTPException) as e:
            return None, repr(e)

    @classmethod
    def names(cls, service=""):
        """Containers by their service."""
        out = run("podman", "ps", "--format", "{{.Names}}", "--filter", "label=io.podman.compose.project=" + cls.project)
        return sorted(n for n in out.split() if "_%s" % service in n)

    @classmethod
    def logs(cls):
        last = lambda n: subprocess.run(["podman", "logs", "--tail", "10", n], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
        return "\n".join("%s: %s" % (n, last(n)) for n in cls.names())

    def completion(self):
        status, text = self.request("POST", "/v1/completions", {"prompt": "KING:", "max_tokens": 12, "temperature": 0, "ignore_eos": True})
        self.assertEqual(status, 200, text + self.logs())
        return json.loads(text)["choices"][0]["text"]

    def test_1_the_image_is_small_labelled_and_not_root(self):
        image = json.loads(run("podman", "image", "inspect", "localhost/minke:" + TAG))[0]
        self.assertEqual(image["Config"]["User"], "10001:10001")
        self.assertIn("minke-health", " ".join(image["Healthcheck"]["Test"]))
        self.assertEqual(image["Labels"]["org.opencontainers.image.version"], TAG)
        self.assertLess(image["Size"], 300e6)
        one = self.names("expert")[0]
        self.assertEqual(run("podman", "exec", one, "sh", "-c", "id -u; command -v g++ cmake git npm || echo none").split(), ["10001", "none"])
        self.assertNotEqual(subprocess.run(["podman", "exec", one, "touch", "/usr/local/bin/x"], capture_output=True).returncode, 0)

    def test_2_a_cluster_of_containers_answers(self):
        self.assertEqual([len(self.names(s)) for s in ("etcd", "gateway", "router", "attention", "expert")], [1, 1, 1, 1, 3])
        self.assertTrue(self.completion().strip())
        self.assertEqual(self.request("POST", "/v1/completions", {"prompt": "x"}, key=None)[0], 401)
        for name in self.names():
            if "_etcd_" not in name:
                run("podman", "healthcheck", "run", name)
        # Published: the gateway's HTTP port, on loopback, and nothing else.
        ports = run("podman", "ps", "--format", "{{.Ports}}", "--filter", "label=io.podman.compose.project=" + self.project)
        self.assertEqual(ports.split(), ["127.0.0.1:%d->8000/tcp" % self.port])

    def test_3_stopping_a_container_drains_it(self):
        before, leaving = self.completion(), self.names("expert")[-1]
        run("podman", "stop", "-t", "150", leaving)
        self.assertEqual(run("podman", "inspect", "--format", "{{.State.ExitCode}}", leaving), "0")   # 137: killed
        self.assertIn("draining", run("podman", "logs", leaving) + subprocess.run(["podman", "logs", leaving], capture_output=True, text=True).stderr)
        self.assertTrue(before and self.completion())


class ContainersWithTls(Containers):
    FILES = ("compose.yaml", "tls.yaml")

    @classmethod
    def prepare(cls):
        certificates = os.path.join(cls.scratch, "tls")
        run(os.path.join(ROOT, "deploy", "tls", "make_certificates"), certificates)
        run("chown", "-R", "10001", certificates)
        os.environ["MINKE_TLS"] = certificates
        cls.tls = ssl.create_default_context(cafile=os.path.join(certificates, "ca.crt"))

    def test_4_plain_http_is_refused(self):
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        c.request("GET", "/health")
        answer = c.getresponse()
        self.assertEqual(answer.status, 400)
        self.assertIn(b"expected https, found http", answer.read())
        c.close()


if __name__ == "__main__":
    missing = [t for t in TOOLS if not shutil.which(t)]
    if missing or os.getuid() != 0:
        print("expected root and %s, found no %s" % (", ".join(TOOLS), ", ".join(missing) or "root"))
        sys.exit(77)
    unittest.main(verbosity=2)
