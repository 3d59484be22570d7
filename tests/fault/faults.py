"""The seeded script: which fault hits whom and when, how it is taken back, and what the streams saw of it."""
import bisect, signal, subprocess, time
from collections import namedtuple

Fault = namedtuple("Fault", "role action")   # role "leader" and "router": the router that decides, another one

ACTIONS = {
    "expert": ("kill", "freeze", "cut", "drain", "add"),
    "leader": ("kill", "freeze", "cut", "drain"),
    "router": ("kill", "freeze", "cut", "drain", "add"),
    "attention": ("kill", "freeze", "cut", "drain", "add"),
    "etcd": ("kill", "freeze", "cut", "drain", "wipe"),
    "gateway": ("kill", "freeze", "cut", "drain"),
}
KINDS = [Fault(role, action) for role, actions in ACTIONS.items() for action in actions]
GAP_SLACK = 0.1   # seconds
SECONDS = (1, 2, 5)   # of freezes and cuts: shorter and longer than a lease


def script(rng, count, namespaces, only=None):
    """`count` faults in which every kind comes about equally often; (fault, seconds) each."""
    kinds = [k for k in KINDS if (namespaces or k.action != "cut") and (only is None or only(k))]
    out = []
    while len(out) < count:
        rng.shuffle(kinds)
        out += [(k, rng.choice(SECONDS)) for k in kinds]
    return out[:count]


class Record:
    def __init__(self, fault, seconds):
        self.fault, self.seconds = fault, seconds
        self.victim = ""
        self.begin = self.healed = self.end = None   # time.monotonic()
        self.in_flight = 0
        self.note = ""      # of the cut: how; of a drain: how long
        self.problems = []  # an exit code, no recovery, ...
        self.failed, self.wrong, self.broken, self.stalls = [], [], [], []
        self.worst = (0, 0)   # the longest stall, and when it began after `begin`, seconds

    def json(self, origin):
        return dict(role=self.fault.role, action=self.fault.action, victim=self.victim, seconds=self.seconds, note=self.note,
                    at_s=round(self.begin - origin, 3), healed_s=self.healed and round(self.healed - self.begin, 3),
                    recovered_s=self.end and round(self.end - self.begin, 3), in_flight=self.in_flight, failed=self.failed,
                    wrong=self.wrong, broken_by_gateway=self.broken, problems=self.problems,
                    worst_began_s=round(self.worst[1], 3),
                    stalls_ms=[round(1000 * s) for s in sorted(self.stalls)])


class Injector:
    def __init__(self, members, load, rng, recover_s=40):
        self.members, self.load, self.rng, self.recover_s = members, load, rng, recover_s
        self.records = []
        self.last_attention_fault = 0.0

    def victim(self, role):
        if role not in ("leader", "router"):
            return self.rng.choice(self.members.of(role))
        for _ in range(100):   # a whole cluster has both, but the lead may change hands just now
            leader = self.members.leader()
            other = next((m for m in self.members.of("router") if m is not leader), None)
            if leader and other:
                return leader if role == "leader" else other
            time.sleep(0.1)
        raise RuntimeError("for 10 s no router led, or there was only one")

    def run(self, fault, seconds):
        """One fault, until the cluster is whole again."""
        record = Record(fault, seconds)
        self.begin(record)
        self.finish(record)
        return record

    def quiet(self, seconds):
        """The same measurement without a fault."""
        record = Record(Fault("none", ""), seconds)
        record.begin = time.monotonic()
        record.in_flight = len(self.load.in_flight())
        self.records.append(record)
        time.sleep(seconds)
        record.healed = record.end = time.monotonic()
        return record

    def begin(self, record):
        role, action = record.fault
        if role == "attention" and action != "add":
            # A stream that was aboard two lost nodes is refused by design: none may meet two of these faults.
            self.load.wait_for_older(self.last_attention_fault)
        time.sleep(self.rng.uniform(0.2, 0.7))
        member = None if action == "add" else self.victim(role)
        record.victim = member.name if member else ""
        record.in_flight = len(self.load.in_flight())
        record.begin = time.monotonic()
        self.records.append(record)
        pool = "router" if role == "leader" else role
        if action == "add":
            record.victim = self.members.start(pool).name
        elif action in ("kill", "wipe"):
            member.signal(signal.SIGKILL)
            member.process.wait()
            self.members.forget(member)
            time.sleep(self.rng.uniform(0.3, 1.5))
            self.replace(pool, member, keep_data=action != "wipe")
        elif action == "freeze":
            member.signal(signal.SIGSTOP)
            time.sleep(record.seconds)
            member.signal(signal.SIGCONT)
        elif action == "cut":
            unplugged = self.rng.random() < 0.5
            record.note = "unplugged" if unplugged else "silent"
            self.members.cut(member.host, unplugged)
            time.sleep(record.seconds)
            self.members.heal(member.host)
        elif action == "drain":
            member.signal(signal.SIGTERM)
            try:
                code = member.process.wait(30)
                if code != 0 and pool != "etcd":
                    record.problems.append("exit code %d" % code)
            except subprocess.TimeoutExpired:
                record.problems.append("still there 30 s after SIGTERM")
                member.process.kill()
                member.process.wait()
            record.note = "ended after %.1f s" % (time.monotonic() - record.begin)
            self.members.forget(member)
            self.replace(pool, member)
        record.healed = time.monotonic()
        if role == "attention":
            self.last_attention_fault = record.healed

    def replace(self, pool, member, keep_data=True):
        """A pool that is larger than it should be (a member was added) shrinks; else a new member starts."""
        if len(self.members.of(pool)) < self.members.size[pool]:
            host = member.host if pool in ("etcd", "gateway") else self.rng.choice(self.members.free_hosts(pool))
            self.members.start(pool, host, keep_data)

    def finish(self, record):
        end = time.monotonic() + self.recover_s
        missing = self.members.missing()
        while missing and time.monotonic() < end:
            for member in list(self.members.members):
                if member.ended():   # nobody asked it to
                    record.problems.append("%s ended by itself, exit code %s" % (member.name, member.process.returncode))
                    self.members.forget(member)
                    self.members.start(member.role, member.host)
            time.sleep(0.1)
            missing = self.members.missing()
        if missing:
            record.problems.append("not whole after %d s: %s" % (self.recover_s, missing))
        record.end = time.monotonic()

    def room(self, fault):
        pool = "router" if fault.role == "leader" else fault.role
        return fault.action != "add" or len(self.members.of(pool)) <= self.members.size[pool]

    def judge(self):
        """Gives every record what the streams saw of it: call when all streams have ended."""
        faults = sorted((r for r in self.records if r.begin is not None), key=lambda r: r.begin)
        for r in faults:
            r.end = r.end or time.monotonic()   # the run was broken off
        begins = [r.begin for r in faults]
        for s in self.load.streams:
            longest = {}
            for a, b in s.gaps():
                # A gap belongs to the last fault before it: the last event may have come just before that.
                n = bisect.bisect(begins, a + GAP_SLACK) - 1
                if n >= 0:
                    longest[n] = max(longest.get(n, (0, 0)), (b - a, a))
            for n, (gap, a) in longest.items():
                faults[n].stalls.append(gap)
                faults[n].worst = max(faults[n].worst, (gap, a - faults[n].begin))
        for s in self.load.streams:
            if s.outcome == "ok":
                continue
            before = [r for r in faults if r.begin <= (s.end or time.monotonic())]
            record = before[-1] if before else faults[0]
            words = "%s (began %+.2f s, ended %+.2f s)" % (s.detail, s.begin - record.begin, (s.end or 0) - record.begin)
            if s.outcome == "wrong":
                record.wrong.append(words)
            elif s.outcome == "broken":
                # The connection itself: only the gateway's own end may do that; its clients come again.
                own = [r for r in before[-3:] if r.fault.role == "gateway" and r.fault.action in ("kill", "drain")
                       and s.begin < r.end and (s.end or 0) <= r.end + 1]
                (own[-1].broken if own else record.failed).append(words)
            else:
                own = [r for r in before[-2:] if r.fault.role == "gateway" and r.fault.action in ("kill", "drain") and
                       s.begin < r.end and s.detail.startswith("503")]
                (own[-1].broken if own else record.failed).append(words)


def percentile(values, p):
    values = sorted(values)
    return values[min(len(values) - 1, int(p * len(values)))] if values else float("nan")


NAMES = {"kill": "killed (-9)", "freeze": "frozen", "cut": "cut off", "drain": "drained (SIGTERM)", "add": "added",
         "wipe": "killed, back empty"}
ROLES = {"expert": "expert server", "leader": "router that leads", "router": "router that does not", "attention": "attention node",
         "etcd": "etcd", "gateway": "gateway", "none": "none"}


def table(records):
    """Markdown; a row per kind of fault. A stall is the longest gap between two events (or before the first one) of one stream."""
    lines = ["| fault | times | streams in flight | failed | wrong | cut off with their gateway | longest stall of each stream, ms: p50 | p99 | max | whole again after, s: p50 | max |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    groups = {}
    for r in records:
        groups.setdefault(r.fault, []).append(r)
    order = [Fault("none", "")] + KINDS
    for fault in sorted(groups, key=order.index):
        rs = groups[fault]
        stalls = [s for r in rs for s in r.stalls]
        name = ("no fault" if fault.role == "none" else "%s %s" % (ROLES[fault.role], NAMES[fault.action]))
        lines.append("| %s | %d | %d | %d | %d | %s | %.0f | %.0f | %.0f | %.1f | %.1f |" % (
            name, len(rs), sum(r.in_flight for r in rs), sum(len(r.failed) for r in rs), sum(len(r.wrong) for r in rs),
            sum(len(r.broken) for r in rs) or ("0" if fault.role == "gateway" else ""), 1000 * percentile(stalls, 0.5),
            1000 * percentile(stalls, 0.99), 1000 * max(stalls, default=float("nan")),
            percentile([r.end - r.begin for r in rs], 0.5), max(r.end - r.begin for r in rs)))
    real = [r for r in records if r.fault.role != "none"]
    lines.append("| **all** | %d | %d | %d | %d | %d | | | | | |" % (
        len(real), sum(r.in_flight for r in real), sum(len(r.failed) for r in records), sum(len(r.wrong) for r in records),
        sum(len(r.broken) for r in real)))
    return "\n".join(lines)
