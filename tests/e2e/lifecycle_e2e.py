"""What operators rely on: start, readiness, signals, deaths, bad flags, bad checkpoints."""
import json, os, pty, select, shutil, signal, socket, subprocess, tempfile, threading, time, unittest
import harness
from harness import BIN, MINKE, Cluster, alive, checkpoint, golden, run, wait_until


class Lifecycle(unittest.TestCase):
    def test_sigterm_and_sigint_stop_everything_within_ten_seconds(self):
        for sig in (signal.SIGTERM, signal.SIGINT):
            cluster = Cluster(checkpoint("v2"), "--experts", "3")
            pids = sum((cluster.pids(role) for role in ("gateway", "router", "attention", "expert")), [])
            self.assertEqual(len(pids), 6)
            begin = time.time()
            self.assertEqual(cluster.stop(sig), 0, cluster.log())
            self.assertLess(time.time() - begin, 10)
            self.assertEqual([p for p in pids if alive(p)], [])

    def test_stops_while_streams_are_open_and_a_child_is_frozen(self):
        cluster = Cluster(checkpoint("v2"))
        stream = threading.Thread(target=self.swallow, args=(cluster,))
        stream.start()
        time.sleep(0.3)
        os.kill(cluster.pids("expert")[0], signal.SIGSTOP)
        begin = time.time()
        self.assertEqual(cluster.stop(), 0)
        self.assertLess(time.time() - begin, 10)
        stream.join()
        self.assertFalse(any(alive(p) for p in cluster.pids("expert")))

    @staticmethod
    def swallow(cluster):
        try:
            cluster.stream("/v1/completions", dict(prompt=[5, 6, 7], max_tokens=2000, ignore_eos=True))
        except Exception:
            pass

    def test_children_die_with_a_killed_parent(self):
        cluster = Cluster(checkpoint("v2"))
        pids = sum((cluster.pids(role) for role in ("gateway", "router", "attention", "expert")), [])
        cluster.process.kill()
        self.assertTrue(wait_until(lambda: not any(alive(p) for p in pids)))

    def test_clusters_run_side_by_side(self):
        with Cluster(checkpoint("v2")) as a, Cluster(checkpoint("lite")) as b:
            self.assertNotEqual(a.port, b.port)
            for cluster in (a, b):
                self.assertEqual(len(cluster.complete(prompt=[3, 4], max_tokens=2, return_token_ids=True, ignore_eos=True)
                                     ["choices"][0]["token_ids"]), 2)

    def test_killed_expert_with_replica_loses_nothing(self):
        g = golden("v2")
        request = dict(prompt=g["greedy_prompt"], max_tokens=300, temperature=0, ignore_eos=True, return_token_ids=True)
        with Cluster(checkpoint("v2"), "--precision=exact", "--experts=3", "--replicas=2") as cluster:
            want = cluster.complete(**request)["choices"][0]["token_ids"]
            result = {}
            thread = threading.Thread(target=lambda: result.update(events=cluster.stream("/v1/completions", request)))
            thread.start()
            time.sleep(0.15)
            os.kill(cluster.pids("expert")[1], signal.SIGKILL)
            thread.join()
            events, done = result["events"]
            self.assertTrue(done)
            self.assertEqual([t for e in events for c in e["choices"] for t in c["token_ids"]], want)
            self.assertTrue(wait_until(lambda: "nothing is restarted" in cluster.log()), cluster.log())
            self.assertEqual(cluster.request("GET", "/health")[0], 200, cluster.log())

    def test_health_says_what_is_missing(self):
        with Cluster(checkpoint("v2"), "--unavailable-after-s=2") as cluster:
            os.kill(cluster.pids("expert")[0], signal.SIGKILL)
            # The survivor loads what was lost; a killed attention node nobody replaces.
            self.assertTrue(wait_until(lambda: "left role=ROLE_EXPERT" in cluster.log()))
            self.assertTrue(wait_until(lambda: cluster.request("GET", "/health")[0] == 200))
            os.kill(cluster.pids("attention")[0], signal.SIGKILL)
            says = lambda: cluster.request("GET", "/health")
            self.assertTrue(wait_until(lambda: says()[0] == 503 and "attention" in json.loads(says()[2])["error"]["message"]), says())
            status, answer = cluster.post("/v1/completions", dict(prompt=[4], max_tokens=1))
            self.assertEqual(status, 503)

    def test_killed_expert_without_replica_is_loaded_by_a_survivor(self):
        g = golden("v2")
        request = dict(prompt=g["greedy_prompt"], max_tokens=300, temperature=0, ignore_eos=True, return_token_ids=True)
        with Cluster(checkpoint("v2"), "--precision=exact") as cluster:
            want = cluster.complete(**request)["choices"][0]["token_ids"]
            result = {}
            thread = threading.Thread(target=lambda: result.update(answer=cluster.complete(**request)))
            thread.start()
            time.sleep(0.15)
            os.kill(cluster.pids("expert")[0], signal.SIGKILL)
            thread.join()
            self.assertEqual(result["answer"]["choices"][0]["token_ids"], want)

    def test_killed_attention_node_hands_its_streams_to_another(self):
        g = golden("v2")
        request = dict(prompt=g["greedy_prompt"], max_tokens=400, temperature=0.9, seed=3, ignore_eos=True, return_token_ids=True,
                       frequency_penalty=0.3)
        with Cluster(checkpoint("v2"), "--precision=exact", "--attention=2") as cluster:
            want = cluster.complete(**request)["choices"][0]["token_ids"]
            streams = [{} for _ in range(4)]   # spread over both nodes
            threads = [threading.Thread(target=lambda s=s: s.update(events=cluster.stream("/v1/completions", request))) for s in streams]
            for thread in threads:
                thread.start()
            time.sleep(0.2)
            os.kill(cluster.pids("attention")[0], signal.SIGKILL)
            for thread in threads:
                thread.join()
            for stream in streams:
                events, done = stream["events"]
                self.assertTrue(done)
                self.assertEqual([t for e in events for c in e["choices"] for t in c["token_ids"]], want)

    def test_checkpoint_that_disappears_is_not_needed_any_more(self):
        directory = tempfile.mkdtemp(prefix="minke-e2e-")
        path = checkpoint("lite", directory=os.path.join(directory, "gone"))
        with Cluster(path) as cluster:
            shutil.rmtree(directory)
            self.assertEqual(len(cluster.complete(prompt=[3, 4, 5], max_tokens=4, return_token_ids=True, ignore_eos=True)
                                 ["choices"][0]["token_ids"]), 4)


class BadFlags(unittest.TestCase):
    def refused(self, *arguments, expect=()):
        result = run(*arguments, timeout=30)
        self.assertNotEqual(result.returncode, 0, arguments)
        self.assertGreater(result.returncode, 0, "died of a signal: %s" % (arguments,))
        errors = [l for l in result.stderr.splitlines() if l.startswith("minke")]
        self.assertEqual(len(errors), 1, result.stderr)
        for part in expect:
            self.assertIn(part, errors[0])

    def test_each_gets_one_line_and_a_non_zero_exit(self):
        path = checkpoint("v2")
        self.refused("up", path, "--replicas", "3", "--experts", "2", expect=["--replicas", "found 3"])
        self.refused("up", path, "--routers", "2", "--registry", "static", expect=["--routers", "etcd"])
        self.refused("up", path, "--registry", "static", "--etcd", "127.0.0.1:1", expect=["--etcd", "--registry"])
        self.refused("up", path, "--etcd", "http://127.0.0.1:1", expect=["--etcd", "HOST:PORT"])
        self.refused("up", path, "--registry", "zookeeper", expect=["--registry"])
        self.refused("up", path, "--experts", "0")
        self.refused("up", path, "--port", "70000", expect=["--port"])
        self.refused("up", path, "--precision=fp8", expect=["--precision"])
        self.refused("up", path, "--device=cuda", expect=["cuda"])
        self.refused("up", path, "--device=cpu", "--experts-format=fp8", expect=["--experts-format", "fp8"])
        self.refused("serve", path, "--device=cpu", "--experts-format=fp8", expect=["--experts-format", "fp8"])
        self.refused("up", path, "--experts-format=int3", expect=["--experts-format"])
        self.refused("up", path, "--nonsense", expect=["--nonsense"])
        self.refused("up")
        self.refused("frobnicate")
        self.refused("up", "/nowhere", expect=["/nowhere", "config.json"])
        self.refused("serve", "/nowhere", expect=["/nowhere"])
        self.refused("checkpoint", "make", "/tmp/x-not-made", "--config", "/nowhere.json", expect=["/nowhere.json"])
        self.refused("checkpoint", "inspect", "/nowhere")
        self.refused("tokenize", path, expect=["tokenizer.json"])

    def test_the_four_say_where_a_registry_is_missing(self):
        for program in ("minke-router", "minke-expert", "minke-attention", "minke-gateway"):
            cases = [(["--registry=etcd"], "--etcd"), (["--etcd=127.0.0.1:1"], "--registry=etcd"),
                     (["--registry=etcd", "--etcd=nonsense"], "HOST:PORT"),
                     (["--registry=etcd", "--etcd=127.0.0.1:1", "--cluster=a/b"], "--cluster")]
            if program != "minke-router":
                cases += [([], "--router"), (["--registry=etcd", "--etcd=127.0.0.1:1", "--router=127.0.0.1:1"], "--router")]
            for flags, part in cases:
                result = subprocess.run([os.path.join(BIN, program), "--checkpoint", checkpoint("v2"), *flags],
                                        capture_output=True, text=True, timeout=30)
                self.assertEqual((result.returncode, len(result.stderr.splitlines())), (1, 1), (program, flags, result.stderr))
                self.assertIn(part, result.stderr)

    def test_etcd_that_is_not_installed(self):
        result = subprocess.run([MINKE, "up", checkpoint("v2"), "--port=0", "--registry=etcd"], env=dict(os.environ, PATH="/nowhere"),
                                capture_output=True, text=True, timeout=30)
        self.assertGreater(result.returncode, 0)
        self.assertIn("etcd-server", result.stderr)

    def test_port_in_use(self):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            s.listen()
            port = str(s.getsockname()[1])
            for verb in ("up", "serve"):
                result = run(verb, checkpoint("v2"), "--port", port, timeout=60)
                self.assertGreater(result.returncode, 0)
                self.assertIn(port, result.stderr)

    def test_port_in_use_by_one_of_the_four(self):
        """Each program alone: one line that names the address, and it is gone before any deadline."""
        path = checkpoint("v2")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            s.listen()
            taken = "127.0.0.1:%d" % s.getsockname()[1]
            for program, flags in (("minke-router", ["--experts=2"]), ("minke-attention", ["--router=127.0.0.1:1"]),
                                   ("minke-expert", ["--router=127.0.0.1:1"]), ("minke-gateway", ["--router=127.0.0.1:1", "--http-listen=127.0.0.1:0"])):
                for listen in ("--listen", "--metrics-listen"):
                    result = subprocess.run([os.path.join(harness.BIN, program), "--checkpoint", path, listen, taken, *flags],
                                            capture_output=True, text=True, timeout=60)
                    self.assertGreater(result.returncode, 0, (program, listen, result.stderr))
                    self.assertIn(taken, result.stderr, (program, listen))

    def test_cpus_that_the_machine_does_not_have(self):
        for cpus, expect in (("1023", "1023"), ("3-1", "'3-1'"), ("", "--cpus")):
            result = subprocess.run([os.path.join(harness.BIN, "minke-expert"), "--checkpoint", checkpoint("v2"),
                                     "--router", "127.0.0.1:1", "--cpus", *([cpus] if cpus else [])],
                                    capture_output=True, text=True, timeout=60)
            self.assertEqual((result.returncode, len(result.stderr.splitlines())), (2, 1), result.stderr)
            self.assertIn(expect, result.stderr)

    def test_damaged_checkpoints(self):
        path = checkpoint("v2")
        for damage, parts in ((lambda d: os.truncate(d + "/model.safetensors", 5000), ["model.safetensors"]),
                              (lambda d: os.truncate(d + "/model.safetensors", os.path.getsize(d + "/model.safetensors") - 7),
                               ["model.safetensors", "tensor", "expected"]),
                              (lambda d: os.remove(d + "/model.safetensors"), ["model.safetensors"]),
                              (lambda d: open(d + "/config.json", "w").write("{}"), ["config.json", "expected"])):
            with tempfile.TemporaryDirectory() as directory:
                copy = os.path.join(directory, "c")
                shutil.copytree(path, copy)
                damage(copy)
                for verb in (["up", copy, "--port", "0"], ["serve", copy, "--port", "0"], ["checkpoint", "inspect", copy]):
                    self.refused(*verb, expect=parts)
            for program in ("minke-router", "minke-expert", "minke-attention", "minke-gateway"):
                result = subprocess.run([os.path.join(BIN, program), "--checkpoint", "/nowhere", "--router", "x:1"]
                                        if program != "minke-router" else [os.path.join(BIN, program), "--checkpoint", "/nowhere"],
                                        capture_output=True, text=True, timeout=30)
                self.assertEqual(result.returncode, 1)
                self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)


class Checkpoints(unittest.TestCase):
    def test_inspect_prints_shapes_and_sizes(self):
        out = run("checkpoint", "inspect", checkpoint("v2")).stdout
        for part in ("160 routed", "attention", "router", "experts", "total"):
            self.assertIn(part, out)

    def test_tokenize_round_trip(self):
        path = checkpoint("v2", tokenizer=True)
        text = "Call me Ishmael. Größe 鯨\n\nlines\n"
        ids = run("tokenize", path, stdin=text).stdout
        self.assertEqual(run("tokenize", path, "--decode", stdin=ids).stdout, text)
        lines = run("tokenize", path, "--lines", stdin="a\nbc\n").stdout.splitlines()
        self.assertEqual(len(lines), 2)


class Trace(unittest.TestCase):
    def test_first_steps_are_written_for_perfetto(self):
        path = os.path.join(harness._scratch, "trace.json")
        here = set(os.listdir("."))
        with Cluster(checkpoint("v2"), "--trace-file", path, "--trace-steps=5") as cluster:
            for _ in range(4):
                cluster.complete(prompt=[5, 6, 7], max_tokens=8, ignore_eos=True)
            self.assertTrue(wait_until(lambda: os.path.exists(path)))
            phases = cluster.metrics("attention", labels=True)
            self.assertGreater(phases[("minke:step_phase_seconds_total", "attention")], 0)
        with open(path) as f:
            events = json.load(f)["traceEvents"]
        self.assertEqual({e["args"]["layer"] for e in events if e["name"] == "wait"}, {1, 2, 3})   # the MoE layers
        self.assertLess({"attention", "dispatch", "shared_experts", "combine", "head", "sampling"}, {e["name"] for e in events})
        self.assertEqual(set(os.listdir(".")), here, "wrote a file nobody asked for")


class Chat(unittest.TestCase):
    """`minke chat`: a prompt for a person at a terminal, plain text for a pipe."""

    def test_terminal_and_pipe(self):
        with Cluster(checkpoint("v2", tokenizer=True)) as cluster:
            command = [MINKE, "chat", "--url", f"http://127.0.0.1:{cluster.port}", "--max-tokens", "8"]
            master, slave = pty.openpty()
            process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
            os.close(slave)
            screen = b""

            def read_until(end):  # what the terminal shows, up to where the program waits for the person again
                nonlocal screen
                deadline = time.time() + 30
                while not screen.endswith(end):
                    self.assertLess(time.time(), deadline, screen)
                    if select.select([master], [], [], 1)[0]:
                        screen += os.read(master, 4096)
                text, screen = screen, b""
                return text

            self.assertIn(b"Ctrl-D ends", read_until(b"\r\n> "))
            for _ in range(2):
                os.write(master, b"hello\n")
                self.assertIn(b"hello\r\n", read_until(b"\r\n> "))
            os.write(master, b"\x04")
            self.assertEqual(process.wait(10), 0)
            os.close(master)

            piped = subprocess.run(command, input="hello\n", capture_output=True, text=True, timeout=30, errors="replace")
            self.assertEqual((piped.returncode, piped.stderr), (0, ""))
            self.assertNotIn("> ", piped.stdout[:2])
            self.assertTrue(piped.stdout.endswith("\n"))

    def test_nobody_listens(self):
        with socket.socket() as closed:  # bound, never listening: refuses
            closed.bind(("127.0.0.1", 0))
            result = subprocess.run([MINKE, "chat", "--url", f"http://127.0.0.1:{closed.getsockname()[1]}"],
                                    input="hello\n", capture_output=True, text=True, timeout=30)
        self.assertNotEqual(result.returncode, 0)
        self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)


if __name__ == "__main__":
    harness.main()
