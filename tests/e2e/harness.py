"""Starts real clusters and talks to them over HTTP. Only the standard library; paths come from the environment of ctest
(MINKE_BIN: folder of the programs)."""
import base64, http.client, json, os, random, re, shutil, signal, socket, struct, subprocess, tempfile, threading, time, unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BIN = os.environ.get("MINKE_BIN", os.path.join(ROOT, "build", "bin"))
MINKE = os.path.join(BIN, "minke")
GOLDEN = os.path.join(ROOT, "tests", "golden")

_scratch = tempfile.mkdtemp(prefix="minke-e2e-")


def cleanup():
    shutil.rmtree(_scratch, ignore_errors=True)


def checkpoint(name, tokenizer=False, dtype=None, directory=None):
    """The golden checkpoint `name`, made anew; with a byte-level tokenizer if asked for."""
    path = directory or os.path.join(_scratch, name + ("-text" if tokenizer else ""))
    if not os.path.exists(os.path.join(path, "config.json")):
        command = [MINKE, "checkpoint", "make", path, "--config", os.path.join(GOLDEN, name + ".json"), "--seed", "1",
                   "--dtype", dtype or ("f32" if name == "plain" else "bf16")]
        subprocess.run(command + (["--tokenizer"] if tokenizer else []), check=True, stdout=subprocess.DEVNULL)
    return path


def golden(name):
    with open(os.path.join(GOLDEN, name + ".safetensors"), "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        data = f.read()
    out = {}
    for key, t in header.items():
        begin, end = t["data_offsets"]
        code = {"F32": "f", "I32": "i"}[t["dtype"]]
        out[key] = list(struct.unpack("<%d%s" % ((end - begin) // 4, code), data[begin:end]))
    return out


class Cluster:
    """`minke up` (or serve) as a child process; ready when constructed."""

    def __init__(self, path, *flags, verb="up", timeout=60, wait=True, port=0):
        self.lines = []
        self.url = None
        self.process = subprocess.Popen([MINKE, verb, path, "--port", str(port), *flags], stderr=subprocess.PIPE,
                                        stdout=subprocess.DEVNULL, text=True, errors="replace")
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if wait:
            if not self._ready.wait(timeout):
                self.stop()
                raise AssertionError("cluster not ready:\n" + "\n".join(self.lines))
            if self.url is None:
                raise AssertionError("cluster ended:\n" + "\n".join(self.lines))

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            found = re.search(r"ready (http://\S+) after", line)
            if found:
                self.url = found.group(1)
                self.host, self.port = self.url[7:].split(":")
                self.port = int(self.port)
                self._ready.set()
        self._ready.set()

    def log(self):
        return "\n".join(self.lines)

    def pids(self, name):
        """Process ids of children whose name begins so: 'expert', 'attention', 'router', 'gateway'."""
        return [int(m.group(2)) for m in (re.search(r"started (\S+).* pid=(\d+)", l) for l in self.lines)
                if m and m.group(1) == name]

    def metrics(self, process, labels=False):
        """Sum of each metric over the processes of one role; by (name, values of its labels) if `labels`."""
        out = {}
        for line in list(self.lines):
            found = re.search(r" %s \[metrics\] serving http://([^:]+):(\d+)/metrics" % process, line)
            if not found:
                continue
            try:
                c = http.client.HTTPConnection(found.group(1), int(found.group(2)), timeout=10)
                c.request("GET", "/metrics")
                text = c.getresponse().read().decode()
            except OSError:
                continue
            for sample in text.splitlines():
                m = re.match(r"([\w:]+)(\{.*\})? (\S+)$", sample)
                if m:
                    values = ",".join(re.findall(r'="([^"]*)"', m.group(2) or ""))
                    key = (m.group(1), values) if labels else m.group(1)
                    out[key] = out.get(key, 0) + float(m.group(3))
        return out

    def request(self, method, path, body=None, headers=None, timeout=60):
        c = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        c.request(method, path, data, {"content-type": "application/json", **(headers or {})})
        r = c.getresponse()
        text = r.read()
        c.close()
        return r.status, dict((k.lower(), v) for k, v in r.getheaders()), text

    def post(self, path, body, **more):
        status, headers, text = self.request("POST", path, body, **more)
        return status, json.loads(text)

    def complete(self, **body):
        status, answer = self.post("/v1/completions", body)
        if status != 200:
            raise AssertionError("%d %s\n%s" % (status, answer, self.log()))
        return answer

    def stream(self, path, body, limit=None, timeout=60):
        """Events of a stream; leaves after `limit` events by closing the connection."""
        c = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        c.request("POST", path, json.dumps(dict(body, stream=True)).encode(), {"content-type": "application/json"})
        r = c.getresponse()
        if r.status != 200:
            raise AssertionError("%d %s" % (r.status, r.read()))
        events = []
        for line in r:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                c.close()
                return events, True
            events.append(json.loads(line[6:]))
            if limit is not None and len(events) >= limit:
                break
        c.close()
        return events, False

    def stop(self, sig=signal.SIGTERM, timeout=15):
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Etcd:
    """A real etcd (Debian's etcd-server) that can be frozen, killed, and started again with or without its data."""

    def __init__(self):
        self.directory = tempfile.mkdtemp(prefix="minke-etcd-")
        self.port, self.peer_port = free_port(), free_port()
        self.address = "127.0.0.1:%d" % self.port
        self.process = None
        self.start()

    def start(self, with_data=True):
        if not with_data:
            shutil.rmtree(self.directory + "/data", ignore_errors=True)
        client, peer = "http://" + self.address, "http://127.0.0.1:%d" % self.peer_port
        self.process = subprocess.Popen(
            ["etcd", "--name=e2e", "--data-dir=" + self.directory + "/data", "--listen-client-urls=" + client,
             "--advertise-client-urls=" + client, "--listen-peer-urls=" + peer, "--initial-advertise-peer-urls=" + peer,
             "--initial-cluster=e2e=" + peer, "--logger=zap", "--log-level=error"], stderr=subprocess.DEVNULL)
        if not wait_until(lambda: etcd_get(self.address, "/") is not None, 30):
            raise AssertionError("etcd does not answer")

    def signal(self, sig):
        self.process.send_signal(sig)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


def etcd_get(address, key):
    """Value of a key, by etcd's JSON gateway: b"" if there is none, None if nobody answers."""
    try:
        c = http.client.HTTPConnection(address, timeout=2)
        c.request("POST", "/v3/kv/range", json.dumps({"key": base64.b64encode(key.encode()).decode()}))
        answer = json.loads(c.getresponse().read())
        c.close()
    except (OSError, ValueError, http.client.HTTPException):
        return None
    if "header" not in answer:
        return None
    return base64.b64decode(answer["kvs"][0]["value"]) if answer.get("kvs") else b""


def listener(pids, port):
    """Which of the processes listens on the port."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):   # gRPC's IPv4 sockets are among the latter
        with open(table) as f:
            for line in f.readlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].split(":")[1], 16) == port:
                    inodes.add("socket:[%s]" % fields[9])
    for pid in pids:
        try:
            for fd in os.listdir("/proc/%d/fd" % pid):
                if os.readlink("/proc/%d/fd/%s" % (pid, fd)) in inodes:
                    return pid
        except OSError:
            pass
    return None


def alive(pid):
    try:
        with open("/proc/%d/stat" % pid) as f:
            return f.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition, seconds=10):
    end = time.time() + seconds
    while time.time() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


class Streams:
    """Clients that stream all the time, each answer compared with that of an undisturbed run. While `reconnects`, a client
    whose gateway dies begins its request again; any answer but a whole one is still a failure."""

    def __init__(self, cluster, clients=4, max_tokens=60):
        self.cluster, self.reconnects = cluster, False
        self.bodies = [dict(prompt="Scene %d. Enter a KING and %d lords.\n" % (i, i + 2), max_tokens=max_tokens, temperature=0.8,
                            seed=i, ignore_eos=True) for i in range(4)]
        self.want = [cluster.complete(**body)["choices"][0]["text"] for body in self.bodies]
        self.errors, self.finished, self.stopping = [], [0] * clients, False
        self.threads = [threading.Thread(target=self._client, args=(n,)) for n in range(clients)]

    def _client(self, n):
        rng = random.Random(n)
        while not self.stopping:
            i = rng.randrange(len(self.bodies))
            try:
                events, done = self._stream(self.bodies[i])
                text = "".join(c["text"] for e in events for c in e.get("choices", []))
                if not done or text != self.want[i]:
                    self.errors.append((i, done, events[-1:], text))
            except Exception as e:
                self.errors.append(repr(e))
                time.sleep(0.1)
            self.finished[n] += 1

    def _stream(self, body):
        while True:
            try:
                events, done = self.cluster.stream("/v1/completions", body)
                if done or not self.reconnects:
                    return events, done
            except (OSError, http.client.HTTPException):
                if not self.reconnects:
                    raise
            except AssertionError as e:   # the new gateway does not know the cluster yet, and says so
                if not self.reconnects or not str(e).startswith("503 "):
                    raise
            time.sleep(0.05)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopping = True
        for thread in self.threads:
            thread.join()

    def go_on(self, test, more=2, seconds=60):
        """Waits until every client has had so many more whole answers: the last of them began after this call."""
        want = [n + more for n in self.finished]
        enough = lambda: self.errors or all(now >= then for now, then in zip(self.finished, want))
        test.assertTrue(wait_until(enough, seconds), self.cluster.log())
        test.assertEqual(self.errors, [], self.cluster.log())


def run(*arguments, timeout=60, stdin=None):
    return subprocess.run([MINKE, *arguments], capture_output=True, text=True, timeout=timeout, input=stdin)


def main():
    try:
        unittest.main(verbosity=2, warnings="ignore")
    finally:
        cleanup()
