"""A cluster of separate processes whose members can be killed, frozen, drained, added and partitioned one by one.

As root every member lives on a "host" of its own, a network namespace with one address on a common bridge, so the data
plane is UCX over TCP between hosts and any host can be cut off. Without root all share 127.0.0.1 (no partitions)."""
import base64, http.client, json, os, re, shutil, signal, subprocess, sys, tempfile, threading, time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "e2e"))
from harness import BIN, ROOT, etcd_get, free_port, wait_until

MODEL = os.path.join(ROOT, "models", "minke-shakespeare")
CLUSTER = "fault"
SPARES = 2   # hosts per pool beyond its size, for members that are added or stand in


def etcd_range(address, prefix):
    """{key: value} under a prefix; None if nobody answers."""
    end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
    encode = lambda s: base64.b64encode(s.encode()).decode()
    try:
        c = http.client.HTTPConnection(address, timeout=2)
        c.request("POST", "/v3/kv/range", json.dumps({"key": encode(prefix), "range_end": encode(end)}))
        answer = json.loads(c.getresponse().read())
        c.close()
    except (OSError, ValueError, http.client.HTTPException):
        return None
    if "header" not in answer:
        return None
    return {base64.b64decode(kv["key"]).decode(): base64.b64decode(kv["value"]) for kv in answer.get("kvs", ())}


def fields(data):
    """(number, value) of each field of a protocol buffer message: enough to read membership without a compiler."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or varint()
        value = data[at:at + size]
        at += size
        yield key >> 3, int.from_bytes(value, "little") if kind in (1, 5) else value


def can_have_namespaces():
    name = "mkprobe%d" % os.getpid()
    if not shutil.which("ip") or subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode != 0:
        return False
    subprocess.run(["ip", "netns", "del", name])
    return True


def ip(*arguments, check=True):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if check and done.returncode != 0:
        raise AssertionError("ip %s: %s" % (" ".join(arguments), done.stderr))


class Member:
    def __init__(self, role, host, process, log):
        self.role, self.host, self.process, self.log = role, host, process, log
        self.name = host
        self.stale = set()   # node ids of those who had its address before

    @property
    def pid(self):
        return self.process.pid

    def signal(self, sig):
        self.process.send_signal(sig)

    def ended(self):
        return self.process.poll() is not None


class Members:
    """etcd, routers, expert servers, attention nodes and a gateway; ready when constructed."""

    def __init__(self, routers=2, experts=3, attention=2, namespaces=None, heartbeat_ms=250, keep_logs="", flags=None):
        self.namespaces = can_have_namespaces() if namespaces is None else namespaces
        self.heartbeat_ms = heartbeat_ms
        self.keep_logs = keep_logs   # folder for the logs of all hosts
        self.flags = flags or {}   # more flags by role
        self.size = dict(etcd=1, router=routers, expert=experts, attention=attention, gateway=1)
        self.lock = threading.RLock()
        self.members = []
        self.last_members = {}   # as the registry said last
        self.scratch = tempfile.mkdtemp(prefix="minke-fault-")
        self.prefix = "mf%d" % (os.getpid() % 100000)   # interface names have at most 15 characters
        self.net = "10.%d.%d" % (214 + os.getpid() // 256 % 32, os.getpid() % 256)   # clusters side by side
        self.hosts = [role + str(i) for role, n in self.size.items()
                      for i in range(n + (SPARES if role in ("router", "expert", "attention") else 0))]
        self.ports = {}
        self.secret = os.path.join(self.scratch, "secret")
        with open(self.secret, "w") as f:
            f.write("correct horse battery staple\n")
        try:
            if self.namespaces:
                self._make_hosts()
            self.start("etcd")
            if not wait_until(lambda: etcd_get(self.etcd, "/") is not None, 30):
                raise AssertionError("etcd does not answer\n" + self.logs())
            for role in ("router", "expert", "attention", "gateway"):
                for _ in range(self.size[role]):
                    self.start(role)
            if not wait_until(self.whole, 60):
                raise AssertionError("cluster not ready: %s\n%s" % (self.missing(), self.logs()))
        except BaseException:
            self.stop()
            raise

    # Hosts.

    def address(self, host):
        return "%s.%d" % (self.net, self.hosts.index(host) + 1) if self.namespaces else "127.0.0.1"

    def port(self, host, what, fixed):
        if self.namespaces:
            return fixed
        if (host, what) not in self.ports:
            self.ports[host, what] = free_port()
        return self.ports[host, what]

    def _outer(self, host):
        return "%sv%d" % (self.prefix, self.hosts.index(host))

    def _make_hosts(self):
        bridge = self.prefix + "br"
        ip("link", "add", bridge, "type", "bridge")
        # Its own address: else it takes its lowest port's, and whoever cuts that port off cuts the clients off too.
        ip("link", "set", bridge, "address", "02:6d:6b:00:00:fe")
        ip("link", "set", bridge, "up")
        ip("addr", "add", self.net + ".254/24", "dev", bridge)
        for host in self.hosts:
            ns, outer = self.prefix + host, self._outer(host)
            ip("netns", "add", ns)
            ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", ns)
            ip("link", "set", outer, "master", bridge, "up")
            ip("-n", ns, "addr", "add", self.address(host) + "/24", "dev", "eth0")
            ip("-n", ns, "link", "set", "eth0", "up")
            ip("-n", ns, "link", "set", "lo", "up")

    def cut(self, host, unplugged):
        """Nothing reaches the host any more: its cable is pulled (it can tell), or the switch is silent (it cannot)."""
        if unplugged:
            ip("link", "set", self._outer(host), "down")
        else:
            ip("link", "set", self._outer(host), "nomaster")

    def heal(self, host):
        ip("link", "set", self._outer(host), "master", self.prefix + "br")
        ip("link", "set", self._outer(host), "up")

    # Processes.

    @property
    def etcd(self):
        return "%s:%d" % (self.address("etcd0"), self.port("etcd0", "client", 2379))

    @property
    def http(self):
        return self.address("gateway0"), self.port("gateway0", "http", 8000)

    def of(self, role):
        with self.lock:
            return [m for m in self.members if m.role == role]

    def free_hosts(self, role):
        with self.lock:
            taken = {m.host for m in self.members}
            return [h for h in self.hosts if re.sub(r"\d+$", "", h) == role and h not in taken]

    def start(self, role, host=None, keep_data=True):
        host = host or self.free_hosts(role)[0]
        at = self.address(host)
        if role == "etcd":
            data = os.path.join(self.scratch, "etcd-data")
            if not keep_data:
                shutil.rmtree(data, ignore_errors=True)
            client = "http://" + self.etcd
            peer = "http://%s:%d" % (at, self.port(host, "peer", 2380))
            command = ["etcd", "--name=fault", "--data-dir=" + data, "--listen-client-urls=" + client, "--unsafe-no-fsync",
                       "--advertise-client-urls=" + client, "--listen-peer-urls=" + peer, "--initial-advertise-peer-urls=" + peer,
                       "--initial-cluster=fault=" + peer, "--logger=zap", "--log-level=error"]
        else:
            command = [os.path.join(BIN, "minke-" + role), "--checkpoint=" + MODEL, "--precision=exact", "--registry=etcd",
                       "--etcd=" + self.etcd, "--cluster=" + CLUSTER, "--advertise=" + at,
                       "--listen=%s:%d" % (at, self.port(host, "rpc", 7000))]
            if role == "gateway":
                command.append("--http-listen=%s:%d" % self.http)
            else:
                command += ["--threads=1", "--heartbeat-ms=%d" % self.heartbeat_ms]
                if self.namespaces:
                    command += ["--ucx-interface=eth0", "--cluster-secret-file=" + self.secret]
            if role == "router":
                command += ["--experts=%d" % self.size["expert"], "--replicas=2"]
            if role == "attention":
                command += ["--cache-mib=64", "--sequences=64"]
            command += self.flags.get(role, [])
        if self.namespaces:
            command = ["ip", "netns", "exec", self.prefix + host, *command]
        log = os.path.join(self.scratch, host + ".log")
        with open(log, "a") as f:
            member = Member(role, host, subprocess.Popen(command, stdout=f, stderr=f), log)
        # A gateway registers no address, and there is one only.
        member.stale = {node for node, m in self.last_members.items()
                        if (m[0] == 1 if role == "gateway" else m[1] == self.rpc_address(host))}
        with self.lock:
            self.members.append(member)
        return member

    def rpc_address(self, host):
        return "%s:%d" % (self.address(host), self.port(host, "rpc", 7000))

    def forget(self, member):
        with self.lock:
            self.members = [m for m in self.members if m is not member]

    def logs(self):
        out = []
        for name in sorted(os.listdir(self.scratch)):
            if name.endswith(".log"):
                with open(os.path.join(self.scratch, name), errors="replace") as f:
                    out += ["%s: %s" % (name[:-4], line.rstrip()) for line in f.readlines()[-60:]]
        return "\n".join(out)

    # What the registry says.

    def view(self):
        """(members by node id: (role number, rpc address, ready, draining), leader's node id, replicas of each unit)."""
        entries = etcd_range(self.etcd, "/minke/%s/" % CLUSTER)
        if entries is None:
            return None
        members, leader, units = {}, None, []
        for key, value in entries.items():
            name = key.split("/")[3]
            if name == "members":
                member = dict(fields(dict(fields(value))[1]))
                members[member[1]] = (member.get(2, 0), member.get(3, b"").decode(), bool(member.get(5)), bool(member.get(7)))
            elif name == "leader":
                leader = int(value.decode(), 16)
            elif name == "placement":
                for number, unit in fields(value):
                    if number == 2:
                        nodes = []
                        for n, v in fields(unit):
                            if n == 2:   # packed, or not
                                nodes += [v] if isinstance(v, int) else [int.from_bytes(v[i:i + 8], "little") for i in range(0, len(v), 8)]
                        units.append(nodes)
        self.last_members = members
        return members, leader, units

    def leader(self):
        view = self.view()
        entry = view and view[0].get(view[1])
        return next((m for m in self.of("router") if entry and entry[1] == self.rpc_address(m.host)), None)

    def missing(self):
        """What the cluster lacks to be whole, in words; "" if nothing."""
        ended = [m.name for m in list(self.members) if m.ended()]
        if ended:
            return "processes that ended: %s" % ended
        view = self.view()
        if view is None:
            return "etcd does not answer"
        members, leader, units = view
        for number, role in ((1, "gateway"), (2, "router"), (3, "attention"), (4, "expert")):
            found = {node: m for node, m in members.items() if m[0] == number}
            if role == "gateway":   # it registers no address
                there = len(found) == 1 and not set(found) & self.of(role)[0].stale
            else:
                addresses = [self.rpc_address(m.host) for m in self.of(role)]
                there = sorted(m[1] for m in found.values()) == sorted(addresses) and not any(
                    set(found) & m.stale for m in self.of(role))
            if not there or not all(ready and not draining for _, _, ready, draining in found.values()):
                return "%s: %d processes, registered %s" % (role, len(self.of(role)), sorted(found.values()))
        if leader not in members:
            return "no router leads"
        if not units or any(len([n for n in nodes if n in members]) < 2 or any(n not in members for n in nodes) for nodes in units):
            return "units without two living replicas: %d of %d" % (
                sum(len([n for n in nodes if n in members]) < 2 for nodes in units), len(units))
        try:
            c = http.client.HTTPConnection(*self.http, timeout=2)
            c.request("GET", "/health")
            r = c.getresponse()
            text = r.read()
            return "" if r.status == 200 else "health: %s" % text
        except (OSError, http.client.HTTPException) as e:
            return "health: %r" % e

    def whole(self):
        return self.missing() == ""

    def stop(self):
        for member in self.members:
            if not member.ended():
                member.signal(signal.SIGCONT)
                member.signal(signal.SIGINT)
        end = time.time() + 10
        for member in self.members:
            try:
                member.process.wait(max(0.1, end - time.time()))
            except subprocess.TimeoutExpired:
                member.process.kill()
                member.process.wait()
        if self.namespaces:
            for host in self.hosts:
                ip("link", "del", self._outer(host), check=False)
                ip("netns", "del", self.prefix + host, check=False)
            ip("link", "del", self.prefix + "br", check=False)
        if self.keep_logs:
            for name in os.listdir(self.scratch):
                if name.endswith(".log"):
                    shutil.copy(os.path.join(self.scratch, name), self.keep_logs)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
