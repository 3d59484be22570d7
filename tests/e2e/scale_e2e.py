"""A cluster grows, shrinks and is repaired while it serves: `minke scale`, `minke up --supervise`. Clients stream all
the while; no request fails, and each text is that of an undisturbed run."""
import contextlib, os, re, shutil, signal, stat, struct, tempfile, time, unittest
import harness
from harness import Cluster, Streams, alive, run, wait_until

MODEL = os.path.join(harness.ROOT, "models", "minke-shakespeare")
FLAGS = ("--precision=exact", "--threads=1")


def socket_path(cluster):
    return re.search(r"operator socket (\S+)", cluster.log()).group(1)


class ScaleCase(unittest.TestCase):
    def scale(self, cluster, pool, count, *flags):
        result = run("scale", pool, str(count), "--port", str(cluster.port), *flags, timeout=200)
        self.assertEqual((result.returncode, result.stderr), (0, ""), cluster.log())
        return result.stdout

    def refused(self, *arguments, expect=()):
        result = run("scale", *arguments, timeout=30)
        self.assertGreater(result.returncode, 0, result.stdout)
        self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
        for part in expect:
            self.assertIn(part, result.stderr)

    def living(self, cluster, role):
        return [pid for pid in cluster.pids(role) if alive(pid)]

    def healthy(self, cluster):
        return cluster.request("GET", "/health")[0] == 200


class Scale(ScaleCase):
    def test_experts_grow_and_shrink_under_load(self):
        with Cluster(MODEL, *FLAGS, "--experts=2") as cluster, Streams(cluster, clients=3, max_tokens=50) as streams:
            streams.go_on(self, seconds=90)
            out = self.scale(cluster, "experts", 4)
            self.assertRegex(out, r"experts: 2 -> 4, started expert 2 \(pid \d+\), expert 3 \(pid \d+\)\nready after")
            self.assertEqual(len(self.living(cluster, "expert")), 4)
            # The new ones get their part of the groups.
            self.assertTrue(wait_until(lambda: len(re.findall("hosting units=", cluster.log())) >= 4, 60), cluster.log())
            streams.go_on(self, seconds=90)
            out = self.scale(cluster, "experts", 1)
            self.assertRegex(out, r"experts: 4 -> 1, draining expert 3 \(pid \d+\), expert 2 \(pid \d+\), expert 1 \(pid \d+\)\n")
            self.assertEqual(self.living(cluster, "expert"), cluster.pids("expert")[:1])
            self.assertTrue(self.healthy(cluster))
            streams.go_on(self, seconds=90)
            self.assertNotIn("nothing is restarted", cluster.log())
            self.assertIn("nothing to do", self.scale(cluster, "experts", 1))

    def test_attention_grows_and_shrinks_under_load(self):
        with Cluster(MODEL, *FLAGS) as cluster, Streams(cluster, clients=3, max_tokens=50) as streams:
            streams.go_on(self, seconds=90)
            self.scale(cluster, "attention", 3)
            # New requests go to the new ones too.
            self.assertTrue(wait_until(lambda: cluster.log().count("session opened") == 3), cluster.log())
            streams.go_on(self, seconds=90)
            self.scale(cluster, "attention", 1)   # both at once: neither hands its sequences to the other
            self.assertEqual(self.living(cluster, "attention"), cluster.pids("attention")[:1])
            self.assertTrue(self.healthy(cluster))
            streams.go_on(self, seconds=90)

    @unittest.skipUnless(shutil.which("etcd"), "needs etcd in PATH")
    def test_routers_grow_and_shrink_under_load(self):
        with Cluster(MODEL, *FLAGS, "--registry=etcd") as cluster, Streams(cluster, clients=3, max_tokens=50) as streams:
            self.scale(cluster, "routers", 3)
            streams.go_on(self, seconds=90)
            self.scale(cluster, "routers", 1)
            self.assertEqual(self.living(cluster, "router"), cluster.pids("router")[:1])
            streams.go_on(self, seconds=90)

    def test_drained_processes_are_gone_for_good_under_supervision(self):
        with Cluster(MODEL, *FLAGS, "--experts=2", "--supervise") as cluster:
            self.scale(cluster, "experts", 1)
            time.sleep(0.5)
            self.assertEqual(self.living(cluster, "expert"), cluster.pids("expert")[:1])
            self.assertNotIn("started again", cluster.log())

    def test_without_waiting(self):
        with Cluster(MODEL, *FLAGS, "--experts=1") as cluster:
            out = self.scale(cluster, "experts", 2, "--no-wait")
            self.assertNotIn("ready", out)
            self.assertTrue(wait_until(lambda: len(self.living(cluster, "expert")) == 2))

    def test_deadline_is_one_line_and_a_non_zero_exit(self):
        with Cluster(MODEL, *FLAGS, "--experts=2") as cluster:
            os.kill(cluster.pids("expert")[1], signal.SIGSTOP)   # cannot leave
            self.refused("experts", "1", "--port", str(cluster.port), "--deadline-s=1", expect=["not over after 1 s", "draining: expert 1"])
            os.kill(cluster.pids("expert")[1], signal.SIGCONT)


class Refused(ScaleCase):
    def test_what_cannot_be_had(self):
        with Cluster(MODEL, *FLAGS, "--replicas=2") as cluster:
            port = ("--port", str(cluster.port))
            self.refused("experts", "0", *port, expect=["at least 1", "found 0"])
            self.refused("experts", "-1", *port)
            self.refused("experts", "1", *port, expect=["--replicas (2)", "found 1"])
            self.refused("attention", "1000", *port, expect=["at most 256"])
            self.refused("routers", "2", *port, expect=["--registry=etcd"])
            self.refused("gateway", "2", *port, expect=["gateway: cannot be scaled"])
            self.refused("lords", "2", *port, expect=["found 'lords'"])
            self.assertEqual([len(cluster.pids(r)) for r in ("expert", "attention", "router", "gateway")], [2, 1, 1, 1])

    def test_no_such_cluster(self):
        port = str(harness.free_port())
        self.refused("experts", "2", "--port", port, expect=["serves port " + port, "minke-up-"])

    def test_another_cluster_is_untouched_and_sockets_are_private_and_replaced(self):
        folder = tempfile.mkdtemp(prefix="minke-e2e-")
        before = os.environ.get("XDG_RUNTIME_DIR")
        os.environ["XDG_RUNTIME_DIR"] = folder
        try:
            with Cluster(MODEL, *FLAGS) as a, Cluster(MODEL, *FLAGS) as b:
                path = socket_path(a)
                self.assertEqual(path, "%s/minke-up-%d-%d.sock" % (folder, os.getuid(), a.port))
                mode = os.stat(path).st_mode
                self.assertTrue(stat.S_ISSOCK(mode))
                self.assertEqual(stat.S_IMODE(mode), 0o600)
                self.scale(a, "experts", 1)
                self.assertEqual((len(self.living(a, "expert")), len(self.living(b, "expert"))), (1, 2))
                a.process.kill()   # leaves its socket behind
                a.process.wait()
                self.refused("experts", "2", "--port", str(a.port), expect=["serves port %d" % a.port])
                self.assertTrue(os.path.exists(path))
                self.assertTrue(wait_until(lambda: not any(alive(p) for p in a.pids("gateway"))))
                with Cluster(MODEL, *FLAGS, port=a.port) as again:
                    self.scale(again, "experts", 3)
                self.assertFalse(os.path.exists(path))
                self.assertEqual(len(self.living(b, "expert")), 2)
        finally:
            os.environ.pop("XDG_RUNTIME_DIR")
            if before is not None:
                os.environ["XDG_RUNTIME_DIR"] = before
            shutil.rmtree(folder)


class Supervise(ScaleCase):
    def kill(self, cluster, role, index=-1):
        """Kills one process of the role and waits for the one that takes its place."""
        before = cluster.pids(role)
        os.kill(before[index], signal.SIGKILL)
        self.assertTrue(wait_until(lambda: len(cluster.pids(role)) == len(before) + 1, 20), cluster.log())

    def test_killed_router_is_back_at_its_address(self):
        with Cluster(MODEL, *FLAGS, "--supervise") as cluster, Streams(cluster, clients=3, max_tokens=50) as streams:
            for _ in range(2):
                streams.go_on(self, seconds=90)
                self.kill(cluster, "router")
                streams.go_on(self, seconds=90)
            self.assertTrue(wait_until(lambda: self.healthy(cluster)), cluster.log())
            self.assertEqual(len(set(re.findall(r"router \[router\] serving rpc=(\S+)", cluster.log()))), 1, cluster.log())

    def test_killed_expert_is_replaced(self):
        with Cluster(MODEL, *FLAGS, "--supervise") as cluster, Streams(cluster, clients=3, max_tokens=50) as streams:
            streams.go_on(self, seconds=90)
            self.kill(cluster, "expert", 0)
            streams.go_on(self, seconds=90)
            self.assertTrue(wait_until(lambda: self.healthy(cluster)), cluster.log())
            self.assertEqual(len(self.living(cluster, "expert")), 2)
            # It counts as one of the two.
            self.assertIn("nothing to do", self.scale(cluster, "experts", 2))

    def test_every_role_dies_once(self):
        registry = ("--registry=etcd",) if shutil.which("etcd") else ()
        with Cluster(MODEL, *FLAGS, *registry, "--supervise") as cluster, Streams(cluster, clients=3, max_tokens=50) as streams:
            for role in ("expert", "router", "attention", "gateway") + (("etcd",) if registry else ()):
                streams.go_on(self, seconds=90)
                streams.reconnects = role == "gateway"
                self.kill(cluster, role)
                self.assertTrue(wait_until(lambda: self.answers(cluster), 30), cluster.log())
                streams.go_on(self, seconds=90)
            # A killed process may take another's hearing along (docs/reliability.md), which then ends and starts again too.
            self.assertGreaterEqual(cluster.log().count("restarts=1"), 4 + len(registry), cluster.log())

    def test_one_that_cannot_be_reached_any_more_starts_again(self):
        """A hole in a receive queue, as a process leaves it that is killed between taking a place there and filling it."""
        with Cluster(MODEL, *FLAGS, "--supervise") as cluster, Streams(cluster, clients=3, max_tokens=50) as streams:
            streams.go_on(self, seconds=90)
            deaf = cluster.pids("expert")[0]
            others = [pid for role in ("router", "attention", "gateway", "expert") for pid in cluster.pids(role) if pid != deaf]
            with self.frozen(others):   # a place that one of them takes meanwhile would be overwritten
                self.take_a_place_in_the_receive_queue(deaf)
            self.assertTrue(wait_until(lambda: "nobody can reach this process any more" in cluster.log(), 60), cluster.log())
            self.assertTrue(wait_until(lambda: not alive(deaf) and self.answers(cluster), 30), cluster.log())
            streams.go_on(self, seconds=90)
            self.assertTrue(wait_until(lambda: len(self.living(cluster, "expert")) == 2, 10), cluster.log())

    @contextlib.contextmanager
    def frozen(self, pids):
        """While none of their threads runs."""
        def states(pid):
            for thread in os.listdir("/proc/%d/task" % pid):
                with open("/proc/%d/task/%s/stat" % (pid, thread)) as f:
                    yield f.read().rsplit(")", 1)[1].split()[0]
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            self.assertTrue(wait_until(lambda: all(state == "T" for pid in pids for state in states(pid))))
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    @staticmethod
    def take_a_place_in_the_receive_queue(pid):
        """Of UCX's posix transport: its memory begins with the queue's head."""
        folder = "/proc/%d/fd/" % pid
        queues = [folder + fd for fd in os.listdir(folder) if "ucx_shm_posix" in os.readlink(folder + fd)]
        queue = min(queues, key=lambda path: os.stat(path).st_size)   # the other holds what does not fit into the queue
        with open(queue, "r+b", buffering=0) as f:
            head, = struct.unpack("<Q", f.read(8))
            f.seek(0)
            f.write(struct.pack("<Q", head + 1))

    def answers(self, cluster):
        try:
            return self.healthy(cluster)
        except OSError:
            return False

    def test_pauses_get_longer(self):
        with Cluster(MODEL, *FLAGS, "--supervise") as cluster:
            for _ in range(3):
                self.kill(cluster, "expert")
            self.assertEqual(re.findall(r"expert 1 .* started again in (\S+) s", cluster.log()), ["0.2", "0.4", "0.8"])

    def test_death_before_it_was_ready_ends_the_command(self):
        result = run("up", MODEL, "--port", "0", "--supervise", "--api-key-file=/nowhere", timeout=60)
        self.assertGreater(result.returncode, 0)
        self.assertNotIn("started again", result.stderr)


if __name__ == "__main__":
    harness.main()
