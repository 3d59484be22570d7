"""Several routers share a cluster through etcd: any may die, etcd may freeze, die, and come back empty; streams notice
nothing."""
import os, re, shutil, signal, time, unittest
import harness
from harness import Cluster, Etcd, Streams, alive, etcd_get, listener, wait_until

MODEL = os.path.join(harness.ROOT, "models", "minke-shakespeare")
FLAGS = ("--precision=exact", "--experts=2", "--replicas=2", "--threads=1", "--cluster=e2e")


def leader(cluster, etcd):
    """Process id of the router that decides; None while there is none."""
    node = etcd_get(etcd, "/minke/e2e/leader")
    report = etcd_get(etcd, "/minke/e2e/members/" + node.decode()) if node else None
    address = re.search(rb"127\.0\.0\.1:(\d+)", report or b"")
    return listener(cluster.pids("router"), int(address.group(1))) if address else None


class Registry(unittest.TestCase):
    def test_leader_dies_and_the_other_router_decides(self):
        with Cluster(MODEL, *FLAGS, "--routers=2") as cluster, Streams(cluster) as streams:
            with open("/proc/%d/cmdline" % cluster.pids("etcd")[0]) as f:
                etcd = re.search(r"--listen-client-urls=http://([\d.:]+)", f.read()).group(1)
            streams.go_on(self)
            first = leader(cluster, etcd)
            self.assertIn(first, cluster.pids("router"))
            os.kill(first, signal.SIGKILL)
            streams.go_on(self)
            self.assertTrue(wait_until(lambda: leader(cluster, etcd) not in (None, first)), cluster.log())
            streams.go_on(self)
            # It decides: an expert server dies, and leaves the placement.
            dead = cluster.pids("expert")[0]
            os.kill(dead, signal.SIGKILL)
            self.assertTrue(wait_until(lambda: "left role=ROLE_EXPERT" in cluster.log()), cluster.log())
            streams.go_on(self)
            self.assertEqual(cluster.request("GET", "/health")[0], 200, cluster.log())

    def test_router_that_does_not_lead_dies_or_leaves(self):
        for sig in (signal.SIGKILL, signal.SIGTERM):
            with Etcd() as etcd, Cluster(MODEL, *FLAGS, "--routers=2", "--etcd=" + etcd.address) as cluster, Streams(cluster) as streams:
                streams.go_on(self)
                leads = leader(cluster, etcd.address)
                other = [pid for pid in cluster.pids("router") if pid != leads]
                self.assertEqual(len(other), 1)
                os.kill(other[0], sig)
                streams.go_on(self)
                self.assertTrue(wait_until(lambda: not alive(other[0])))
                self.assertTrue(wait_until(lambda: "left role=ROLE_ROUTER" in cluster.log()), cluster.log())
                streams.go_on(self)
                self.assertEqual(leader(cluster, etcd.address), leads)
                self.assertEqual(cluster.request("GET", "/health")[0], 200, cluster.log())

    def test_etcd_freezes_dies_and_comes_back_empty(self):
        with Etcd() as etcd, Cluster(MODEL, *FLAGS, "--routers=2", "--etcd=" + etcd.address) as cluster, Streams(cluster) as streams:
            healthy = lambda: cluster.request("GET", "/health")[0] == 200
            streams.go_on(self)
            etcd.signal(signal.SIGSTOP)
            time.sleep(5)   # longer than the leases
            streams.go_on(self)
            self.assertTrue(healthy(), cluster.log())
            etcd.signal(signal.SIGCONT)
            self.assertTrue(wait_until(lambda: leader(cluster, etcd.address) is not None), cluster.log())
            streams.go_on(self)
            for with_data in (True, False):
                etcd.kill()
                streams.go_on(self)
                etcd.start(with_data)
                self.assertTrue(wait_until(lambda: leader(cluster, etcd.address) is not None), cluster.log())
                end = time.time() + 4   # members are kept for a lease; then nobody must be missing
                while time.time() < end:
                    self.assertTrue(healthy(), cluster.log())
                    time.sleep(0.05)
                streams.go_on(self)
            self.assertNotIn("left role=", cluster.log())
            self.assertEqual(len(cluster.pids("router")), 2)

    def test_another_model_is_refused(self):
        with Etcd() as etcd, Cluster(MODEL, *FLAGS, "--etcd=" + etcd.address):
            result = harness.run("up", harness.checkpoint("v2"), "--port=0", "--etcd=" + etcd.address, "--cluster=e2e", "--precision=exact")
            self.assertGreater(result.returncode, 0)
            self.assertIn("fingerprint", result.stderr)


if __name__ == "__main__":
    if not shutil.which("etcd"):
        print("needs etcd in PATH (Debian's etcd-server)")
        raise SystemExit(1)
    harness.main()
