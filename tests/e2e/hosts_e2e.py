"""The four programs started by hand on four "hosts" (network namespaces), UCX over TCP between them."""
import http.client, json, os, subprocess, sys, threading, time, unittest
import harness
from harness import BIN, checkpoint, golden, wait_until

NAME = "mk%d" % (os.getpid() % 10000)   # interface names have at most 15 characters
HOSTS = ("gateway", "router", "attention", "expert0", "expert1")


def ip(*arguments, check=True):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if check and done.returncode != 0:
        raise AssertionError("ip %s: %s" % (" ".join(arguments), done.stderr))
    return done


def address(host):
    return "10.213.7.%d" % (HOSTS.index(host) + 1)


class Hosts(unittest.TestCase):
    serial = 0

    def setUp(self):
        # The kernel takes a namespace down in its own time: every test has names of its own.
        Hosts.serial += 1
        self.name = NAME + "abc"[Hosts.serial % 3]
        self.processes = {}
        self.addCleanup(self.clean)
        ip("link", "add", self.name + "br", "type", "bridge")
        ip("link", "set", self.name + "br", "up")
        ip("addr", "add", "10.213.7.254/24", "dev", self.name + "br")
        for i, host in enumerate(HOSTS):
            ns, outer = self.name + host, "%sv%d" % (self.name, i)
            ip("netns", "add", ns)
            ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", ns)
            ip("link", "set", outer, "master", self.name + "br", "up")
            ip("-n", ns, "addr", "add", address(host) + "/24", "dev", "eth0")
            ip("-n", ns, "link", "set", "eth0", "up")
            ip("-n", ns, "link", "set", "lo", "up")
        self.secret = os.path.join(harness._scratch, "secret")
        with open(self.secret, "w") as f:
            f.write("correct horse battery staple\n")

    def clean(self):
        for p in self.processes.values():
            p.terminate()
        for p in self.processes.values():
            try:
                p.wait(10)
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait()
        for i, host in enumerate(HOSTS):
            ip("link", "del", "%sv%d" % (self.name, i), check=False)
            ip("netns", "del", self.name + host, check=False)
        ip("link", "del", self.name + "br", check=False)

    def start(self, host, program, *flags, secret=None):
        data = [] if program == "minke-gateway" else ["--ucx-interface=eth0", "--cluster-secret-file=" + (secret or self.secret)]
        log = open(os.path.join(harness._scratch, host + ".log"), "w")
        self.processes[host] = subprocess.Popen(
            ["ip", "netns", "exec", self.name + host, os.path.join(BIN, program), "--checkpoint=" + checkpoint("v2"),
             "--precision=exact", "--listen=%s:7000" % address(host), "--advertise=" + address(host), *data, *flags],
            stdout=log, stderr=log)

    def logs(self):
        return "\n".join(h + ": " + open(os.path.join(harness._scratch, h + ".log")).read() for h in self.processes)

    def get(self, path, body=None):
        c = http.client.HTTPConnection(address("gateway"), 8000, timeout=60)
        c.request("POST" if body else "GET", path, json.dumps(body).encode() if body else None)
        r = c.getresponse()
        return r.status, json.loads(r.read())

    def metric(self, host, name):
        c = http.client.HTTPConnection(address(host), 7001, timeout=10)
        c.request("GET", "/metrics")
        return next(float(l.split()[-1]) for l in c.getresponse().read().decode().splitlines() if l.startswith(name + " "))

    def status(self):
        try:
            return self.get("/health")[0]
        except OSError:
            return None

    def healthy(self):
        return self.status() == 200

    def test_parity_over_tcp_between_hosts(self):
        router = "--router=%s:7000" % address("router")
        self.start("router", "minke-router", "--experts=2", "--metrics-listen=127.0.0.1:0")
        self.start("attention", "minke-attention", router, "--metrics-listen=%s:7001" % address("attention"))
        self.start("expert0", "minke-expert", router)
        self.start("expert1", "minke-expert", router)
        self.start("gateway", "minke-gateway", router, "--http-listen=%s:8000" % address("gateway"))
        self.assertTrue(wait_until(self.healthy, 30), self.logs())
        g = golden("v2")
        status, answer = self.get("/v1/completions", dict(prompt=g["input_ids"], max_tokens=0, echo=True, logprobs=0))
        self.assertEqual(status, 200, answer)
        got = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
        error = sum((a - b) ** 2 for a, b in zip(got, g["token_logprobs"])) / sum(b * b for b in g["token_logprobs"])
        self.assertLess(error ** 0.5, 1e-4)
        self.assertIn("transport=tcp", self.logs())
        # Experts elsewhere: steps with enough sequences go in two microbatches, and the numbers stay the same.
        prompts = [g["input_ids"]] * 40
        status, answer = self.get("/v1/completions", dict(prompt=prompts, max_tokens=2, temperature=0, ignore_eos=True,
                                                          return_token_ids=True))
        self.assertEqual(status, 200, answer)
        self.assertEqual(len({tuple(c["token_ids"]) for c in answer["choices"]}), 1)
        self.assertGreater(self.metric("attention", "minke:attention_split_steps_total"), 0)

    def test_router_that_restarts_on_its_port_rebuilds_the_table(self):
        router = "--router=%s:7000" % address("router")
        self.start("router", "minke-router", "--experts=2")
        self.start("attention", "minke-attention", router)
        self.start("expert0", "minke-expert", router)
        self.start("expert1", "minke-expert", router)
        self.start("gateway", "minke-gateway", router, "--http-listen=%s:8000" % address("gateway"))
        self.assertTrue(wait_until(self.healthy, 30), self.logs())
        body = dict(prompt=golden("v2")["greedy_prompt"], max_tokens=500, temperature=0, ignore_eos=True, return_token_ids=True)
        want = self.get("/v1/completions", body)[1]["choices"][0]["token_ids"]
        result = {}
        request = threading.Thread(target=lambda: result.update(answer=self.get("/v1/completions", body)))
        request.start()
        time.sleep(0.2)
        self.processes["router"].kill()
        self.processes["router"].wait()
        self.start("router", "minke-router", "--experts=2")
        request.join()
        status, answer = result["answer"]
        self.assertEqual(status, 200, answer)
        self.assertEqual(answer["choices"][0]["token_ids"], want)
        self.assertTrue(wait_until(self.healthy, 20), self.logs())

    def test_wrong_secret_is_refused(self):
        router = "--router=%s:7000" % address("router")
        self.start("router", "minke-router", "--experts=1")
        other = os.path.join(harness._scratch, "other-secret")
        with open(other, "w") as f:
            f.write("wrong\n")
        self.start("expert0", "minke-expert", router)
        self.start("attention", "minke-attention", router, secret=other)
        self.start("gateway", "minke-gateway", router, "--http-listen=%s:8000" % address("gateway"))
        log = lambda: open(os.path.join(harness._scratch, "attention.log")).read()
        self.assertTrue(wait_until(lambda: "PERMISSION_DENIED" in log() or "secret" in log(), 20), self.logs())
        self.assertIsNone(self.processes["attention"].poll(), "it should go on trying, not end")
        self.assertTrue(wait_until(lambda: self.status() == 503, 10))


if __name__ == "__main__":
    probe = subprocess.run(["ip", "netns", "add", NAME + "probe"], capture_output=True)
    if probe.returncode != 0:
        print("SKIPPED: network namespaces need root and CAP_SYS_ADMIN: " + probe.stderr.decode().strip())
        sys.exit(77)
    ip("netns", "del", NAME + "probe")
    harness.main()
