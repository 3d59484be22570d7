"""`minke bench serve` against real clusters, and against a server that behaves as badly as it is told to."""
import http.server, json, os, pty, re, select, signal, socketserver, subprocess, tempfile, threading, time, unittest
import harness
from harness import MINKE, Cluster, checkpoint, run

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}


def event(**fields):
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(t, finish=None):
    return event(choices=[{"index": 0, "text": t, "finish_reason": finish}])


DONE = b"data: [DONE]\n\n"
STREAMS = {   # by the first part of the path: what is sent, piece by piece
    "ok": [text("a"), text("b"), text("c", "length"), event(choices=[], usage=USAGE), DONE],
    "no-usage": [text("a"), text("b"), text("c", "length"), DONE],
    "no-done": [text("a"), text("b"), text("c", "length")],
    "odd": [b"\xef\xbb\xbf: hello\r\n\r\n", b"event: message\r\nid: 1\r\ndata:" + text("a")[6:-2] + b"\r\n\r\n",
            b":\n\n", text("b")[:9], text("b")[9:], b"data:{\"choices\":[{\"text\":\"c\",\r\ndata: \"finish_reason\":\"stop\"}],\r",
            b"data: \"usage\":" + json.dumps(USAGE).encode() + b"}\r\r", b"data:[DONE]"],
    "chat": [event(choices=[{"delta": {"role": "assistant", "content": ""}}]), event(choices=[{"delta": {"content": "a"}}]),
             event(choices=[{"delta": {"reasoning_content": "b"}}]), event(choices=[{"delta": {}, "finish_reason": "stop"}]),
             event(choices=[], usage=USAGE), DONE],
    "error": [text("a"), event(error={"message": "out of\nroom", "code": 500}), DONE],
    "half": [text("a"), text("b")],
    "rubbish": [b"<html>no</html>"],
    "cut": [text("a"), text("b", "length")],   # and the connection closes without the end of the body
    "not-json": [text("a"), b"data: {oops\n\n"],
}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True   # or the pieces come in lumps of 40 ms

    def log_message(self, *_):
        pass

    def whole(self, status, body):
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path.startswith("/no-models"):
            return self.whole(200, b'{"data": []}')
        if self.path.startswith("/silent-models"):
            return self.server.stopped.wait(30)
        self.whole(200, b'{"object": "list", "data": [{"id": "fake-model"}, {"id": "other"}]}')

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        kind = self.path.split("/")[1]
        with self.server.lock:
            self.server.seen.append((self.path, self.headers.get("authorization"), body))
            number = len(self.server.seen)
        if kind.isdigit():
            return self.whole(int(kind), b'{"error": {"message": "the reason", "type": "x"}}')
        if kind == "third-429" and number % 3 == 0:
            return self.whole(429, b"slow down")
        if kind == "silent":
            return self.server.stopped.wait(30)
        if kind == "serial":   # one after the other, 50 ms each
            with self.server.serial:
                time.sleep(0.05)
        pieces = STREAMS.get(kind, STREAMS["ok"])
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for piece in pieces:
            if kind in ("odd", "slow"):
                time.sleep(0.005 if kind == "odd" else 0.1)
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        if kind == "cut":
            self.close_connection = True
            return
        self.wfile.write(b"0\r\n\r\n")


class FakeServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen, self.lock, self.serial, self.stopped = [], threading.Lock(), threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()

    def url(self, kind):
        return "http://127.0.0.1:%d/%s/v1" % (self.server_address[1], kind)

    def handle_error(self, *_):   # clients that leave
        pass

    def stop(self):
        self.stopped.set()
        self.shutdown()
        self.server_close()


def bench(url, *flags, code=0, timeout=120, test=None):
    """Runs it, checks the exit code and that the counts add up; the JSON result."""
    path = os.path.join(harness._scratch, "result-%d.json" % time.monotonic_ns())
    r = run("bench", "serve", "--url", url, "--json", path, *flags, timeout=timeout)
    if r.returncode != code:
        raise AssertionError("exit code %d:\n%s%s" % (r.returncode, r.stdout, r.stderr))
    if code != 0:
        assert re.fullmatch(r"minke: [^\n]+\n", r.stderr), r.stderr
    with open(path) as f:
        result = json.load(f)
    check(result)
    result["table"] = r.stdout
    return result


def check(result):
    q = result["requests"]
    assert q["started"] == q["completed"] + q["failed"] + q["interrupted"], q
    assert sum(e["count"] for e in result["errors"]) == q["failed"], result["errors"]
    t = result["tokens"]
    for side in ("prompt", "output"):
        assert sum(t[side + "_counted_by"].values()) == q["completed"], t
    s, rates = result["elapsed_s"], result["throughput"]
    for rate, count in (("requests_per_s", q["completed"]), ("prompt_tokens_per_s", t["prompt"]),
                        ("output_tokens_per_s", t["output"]), ("tokens_per_s", t["prompt"] + t["output"])):
        assert abs(rates[rate] * s - count) < 1e-6 * count + 1e-6, (rate, rates, s, count)
    assert result["e2e_ms"]["count"] == q["completed"]
    assert result["ttft_ms"]["count"] == q["completed"] - q["without_output"]
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        m = result[name]
        if m["count"]:
            assert 0 <= m["p50"] <= m["p90"] <= m["p99"] <= m["max"] and 0 <= m["mean"] <= m["max"], m
    if result["ttft_ms"]["count"]:
        assert result["ttft_ms"]["mean"] <= result["e2e_ms"]["mean"], result
    c = result["client"]
    assert c["cpu_user_s"] >= 0 and c["cpu_system_s"] >= 0 and c["connections_opened"] >= 0
    assert result["tool"] == "minke bench serve" and result["schema"] == 1 and result["version"]


class RealCluster(unittest.TestCase):
    def test_closed_loop_counts_every_token(self):
        with Cluster(checkpoint("v2"), "--model-name", "small") as cluster:
            r = bench(cluster.url, "--requests", "40", "--concurrency", "8", "--prompt-source", "random-ids", "--token-ids", "2:500",
                      "--prompt-tokens", "30", "--output-tokens", "20", "--ignore-eos", "--warmup", "3", "--fail-on-error")
            self.assertEqual(r["model"], "small")
            self.assertEqual(r["requests"]["completed"], 40)
            self.assertEqual((r["tokens"]["prompt"], r["tokens"]["output"]), (1200, 800))
            self.assertEqual(r["tokens"]["output_counted_by"], {"usage": 40})
            self.assertEqual(r["tokens"]["cached_prompt"], 0)
            self.assertEqual(r["concurrency"]["max"], 8)
            self.assertLessEqual(r["client"]["connections_opened"], 8)   # used again
            self.assertEqual(r["ttft_ms"]["count"], 40)
            self.assertIn("40 completed, 0 failed", r["table"])
            served = cluster.metrics("attention")["minke:attention_computed_tokens_total"]
            self.assertEqual(served, 43 * (30 + 20 - 1))   # with the warm-up; the last token is not computed with
            # Without usage and without text (this model has no tokenizer) the events count, or the ids.
            r = bench(cluster.url, "--requests", "5", "--prompt-source", "random-ids", "--token-ids", "2:500", "--seed", "1",
                      "--output-tokens", "9", "--ignore-eos", "--no-stream-usage", "--return-token-ids")
            self.assertEqual(r["tokens"]["output_counted_by"], {"token_ids": 5})
            self.assertEqual((r["tokens"]["prompt"], r["tokens"]["output"]), (5 * 128, 45))
            self.assertEqual(r["tokens"]["prompt_counted_by"], {"request": 5})

    def test_open_loop_chat_and_shared_prefix(self):
        with Cluster(checkpoint("v2", tokenizer=True)) as cluster:
            r = bench(cluster.url, "--endpoint", "chat", "--rate", "40", "--duration", "2", "--prompt-tokens", "20:60",
                      "--output-tokens", "normal:8:2:4:12", "--chars-per-token", "1", "--ignore-eos", "--fail-on-error", "--seed", "3")
            self.assertAlmostEqual(r["requests"]["completed"], 80, delta=40)   # 80 +- 4.5 standard deviations
            self.assertEqual(r["flags"]["rate"], 40)
            self.assertEqual(r["send_delay_ms"]["count"], r["requests"]["completed"])
            r = bench(cluster.url, "--requests", "10", "--shared-prefix-tokens", "256", "--prompt-tokens", "16", "--output-tokens",
                      "4", "--chars-per-token", "1", "--ignore-eos", "--warmup", "1")
            self.assertGreaterEqual(r["tokens"]["cached_prompt"], 10 * 192)   # all but the page that the prefix shares
            self.assertEqual(r["tokens"]["output"], 40)

    def test_a_gateway_killed_in_mid_run(self):
        with Cluster(checkpoint("v2")) as cluster:
            def kill():
                time.sleep(1)
                os.kill(cluster.pids("gateway")[0], signal.SIGKILL)
            threading.Thread(target=kill).start()
            r = bench(cluster.url, "--duration", "2", "--concurrency", "8", "--prompt-source", "random-ids", "--token-ids", "2:500",
                      "--output-tokens", "40", "--ignore-eos", "--fail-on-error", code=1)
            self.assertGreater(r["requests"]["completed"], 0)
            kinds = {e["kind"]: e["count"] for e in r["errors"]}
            self.assertEqual(set(kinds), {"broken_stream", "connection_refused"})
            self.assertGreaterEqual(kinds["broken_stream"], 8)
            self.assertLess(kinds["broken_stream"], 24)
            # Eight workers that rest 20 ms after each failure: no storm on a server that is gone.
            self.assertLess(kinds["connection_refused"], 8 * 1.5 / 0.02)
            r = bench(cluster.url, "--requests", "3", "--model", "m", code=1)
            self.assertEqual(r["errors"], [{"kind": "connection_refused", "count": 3, "example": "Connection refused"}])


class Fake(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = FakeServer()

    @classmethod
    def tearDownClass(cls):
        cls.server.stop()

    def setUp(self):
        self.server.seen.clear()

    def errors(self, kind, *flags, code=1):
        r = bench(self.server.url(kind), "--requests", "4", "--concurrency", "2", *flags, code=code)
        return {e["kind"]: e["count"] for e in r["errors"]}, r["errors"][0]["example"]

    def test_odd_streams(self):
        for kind, flags, output, by in (("ok", [], 3, "usage"), ("odd", [], 3, "usage"), ("no-usage", [], 3, "events"),
                                        ("no-done", [], 3, "events"), ("chat", ["--endpoint", "chat"], 3, "usage")):
            r = bench(self.server.url(kind), "--requests", "4", "--concurrency", "2", "--prompt-tokens", "9", *flags)
            self.assertEqual(r["requests"]["completed"], 4, kind)
            self.assertEqual(r["tokens"]["output"], 4 * output, kind)
            self.assertEqual(r["tokens"]["output_counted_by"], {by: 4}, kind)
            told = by == "usage"
            self.assertEqual(r["tokens"]["prompt"], 4 * (7 if told else 9), kind)
            self.assertEqual(r["tokens"]["prompt_counted_by"], {"usage" if told else "request": 4}, kind)
            self.assertEqual(r["tokens"]["cached_prompt"], 8 if told else None, kind)
            self.assertEqual(r["model"], "fake-model")
            self.assertEqual(r["itl_ms"]["count"], 4 if kind == "chat" else 8)
        r = bench(self.server.url("odd"), "--requests", "2")
        self.assertGreaterEqual(r["itl_ms"]["p50"], 5)   # the times are those of the pieces
        self.assertGreaterEqual(r["ttft_ms"]["p50"], 5)

    def test_failures_by_kind(self):
        self.assertEqual(self.errors("429"), ({"http_429": 4}, "the reason"))
        self.assertEqual(self.errors("500"), ({"http_500": 4}, "the reason"))
        self.assertEqual(self.errors("error"), ({"error_event": 4}, "out of room"))
        for kind in ("half", "rubbish", "not-json", "cut"):
            self.assertEqual(self.errors(kind)[0], {"broken_stream": 4}, kind)
        begin = time.time()
        self.assertEqual(self.errors("silent", "--timeout", "0.2"), ({"timeout": 4}, "no answer within 0.2 s"))
        self.assertLess(time.time() - begin, 10)
        self.assertEqual(self.errors("slow", "--timeout", "0.25"), ({"timeout": 4}, "no end of the answer within 0.25 s"))

    def test_some_failures_fail_only_if_asked_to(self):
        for flags, code in (([], 0), (["--fail-on-error"], 1)):
            self.server.seen.clear()
            r = bench(self.server.url("third-429"), "--requests", "9", *flags, code=code)
            self.assertEqual((r["requests"]["completed"], r["requests"]["failed"]), (6, 3))
            self.assertEqual(r["errors"], [{"kind": "http_429", "count": 3, "example": "slow down"}])
            self.assertEqual(r["tokens"]["output"], 18)   # of whole answers only

    def test_the_seed_decides_what_is_sent(self):
        def sent(*flags):
            self.server.seen.clear()
            bench(self.server.url("ok"), "--requests", "12", "--prompt-tokens", "4:40", "--output-tokens", "zipf:1.1:1:50", *flags)
            return [body for _, _, body in self.server.seen]
        one = sent("--seed", "1")
        self.assertEqual(len(set(one)), 12)
        self.assertEqual(sent("--seed", "1"), one)
        self.assertEqual(sorted(sent("--seed", "1", "--concurrency", "4")), sorted(one))
        self.assertFalse(set(sent("--seed", "2")) & set(one))
        warm = sent("--seed", "1", "--warmup", "3")
        self.assertEqual(len(warm), 15)
        self.assertFalse(set(warm[:3]) & set(one))
        self.assertEqual(warm[3:], one)

    def test_recorded_requests_and_text(self):
        with tempfile.TemporaryDirectory() as folder:
            recorded, book = os.path.join(folder, "r.jsonl"), os.path.join(folder, "book.txt")
            with open(recorded, "w") as f:
                f.write('{"prompt": "one", "max_tokens": 5}\n{"messages": [{"role": "user", "content": "two"}], "top_p": 0.5}\n')
            with open(book, "w") as f:
                f.write("A whale, größer als ein Haus. " * 50)
            bench(self.server.url("ok"), "--prompt-source", "jsonl", "--prompt-file", recorded, "--requests", "4", "--output-tokens", "6")
            paths = [path for path, _, _ in self.server.seen]
            self.assertEqual(paths, ["/ok/v1/completions", "/ok/v1/chat/completions"] * 2)
            bodies = [json.loads(body) for _, _, body in self.server.seen]
            self.assertEqual((bodies[0]["prompt"], bodies[0]["max_tokens"]), ("one", 5))
            self.assertEqual((bodies[1]["top_p"], bodies[1]["max_tokens"], bodies[1]["model"]), (0.5, 6, "fake-model"))
            self.server.seen.clear()
            bench(self.server.url("ok"), "--prompt-source", "text", "--prompt-file", book, "--requests", "3", "--prompt-tokens", "10")
            for _, _, body in self.server.seen:
                prompt = json.loads(body)["prompt"]
                self.assertTrue(40 <= len(prompt.encode()) <= 43 and prompt[:20] in "A whale, größer als ein Haus. " * 3, prompt)

    def test_the_key_is_sent_and_shown_nowhere(self):
        with tempfile.NamedTemporaryFile("w") as f:
            f.write("sk-secret \n")
            f.flush()
            r = bench(self.server.url("ok"), "--requests", "1", "--api-key-file", f.name)
        self.assertEqual(self.server.seen[0][1], "Bearer sk-secret")
        self.assertNotIn("sk-secret", json.dumps(r))

    def test_open_loop_latency_counts_from_when_a_request_was_due(self):
        # 40 a second at a server that manages 20: the k-th answer (from 0) comes 50 ms * (k + 1) after the begin, and was due
        # at 25 ms * k. Waiting inside the tool or at the server is the same to a user.
        for flags in ([], ["--concurrency-max", "2"]):
            r = bench(self.server.url("serial"), "--requests", "30", "--rate", "40", "--arrival", "uniform", *flags)
            self.assertGreaterEqual(r["e2e_ms"]["max"], 50 * 30 - 25 * 29)
            self.assertGreaterEqual(r["e2e_ms"]["p50"], 50 * 15 - 25 * 14)
        self.assertEqual(r["concurrency"]["max"], 2)
        self.assertGreater(r["send_delay_ms"]["max"], 300)
        r = bench(self.server.url("serial"), "--duration", "1", "--rate", "40", "--arrival", "uniform", "--concurrency-max", "1")
        self.assertGreater(r["requests"]["not_sent"], 10)
        self.assertEqual(r["requests"]["not_sent"] + r["requests"]["started"], 40)
        self.assertIn("NOT SENT", r["table"])

    def test_ctrl_c_reports_what_was_finished(self):
        path = os.path.join(harness._scratch, "interrupted.json")
        for kind, flags, completed in (("slow", ["--concurrency", "4"], True), ("slow", ["--rate", "20"], True),
                                       ("silent", ["--concurrency", "3"], False)):
            p = subprocess.Popen([MINKE, "bench", "serve", "--url", self.server.url(kind), "--requests", "100000", "--json", path, *flags],
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            time.sleep(2)
            begin = time.time()
            p.send_signal(signal.SIGINT)
            out, err = p.communicate(timeout=10)
            self.assertLess(time.time() - begin, 3)
            self.assertEqual(p.returncode, 0 if completed else 1, err)
            self.assertIn("INTERRUPTED", out)
            with open(path) as f:
                result = json.load(f)
            check(result)
            self.assertTrue(result["interrupted"])
            self.assertGreater(result["requests"]["interrupted"], 0)
            self.assertEqual(result["requests"]["completed"] > 0, completed)

    def test_progress_on_a_terminal_only(self):
        flags = ["bench", "serve", "--url", self.server.url("slow"), "--requests", "5"]
        self.assertEqual(run(*flags).stderr, "")
        master, slave = pty.openpty()
        p = subprocess.Popen([MINKE, *flags], stdout=subprocess.DEVNULL, stderr=slave)
        os.close(slave)
        shown = b""
        while select.select([master], [], [], 20)[0]:
            try:
                data = os.read(master, 4096)
            except OSError:   # the other end is closed
                break
            shown += data
        os.close(master)
        self.assertEqual(p.wait(10), 0)
        self.assertRegex(shown.decode(), r"run 1 s: \d of 5 completed, 0 failed, 1 under way, \d+ output events/s")
        self.assertTrue(shown.endswith(b"\r\x1b[K"))

    def test_json_on_standard_output(self):
        r = run("bench", "serve", "--url", self.server.url("ok"), "--requests", "2", "--json", "-")
        check(json.loads(r.stdout))
        self.assertIn("2 completed", r.stderr)

    def test_mistakes_get_one_line(self):
        ok = self.server.url("ok")
        missing = os.path.join(harness._scratch, "missing")
        empty = os.path.join(harness._scratch, "empty")
        open(empty, "w").close()
        for flags, says in ((["--url", "localhost:80"], "--url"), (["--url", "ftp://x"], "--url"), (["--url", "http://x:99999"], "--url"),
                            (["--url", "http://no-such-host.invalid"], "no-such-host.invalid"),
                            (["--url", "http://127.0.0.1:1"], "cannot reach http://127.0.0.1:1/v1/models: Connection refused"),
                            (["--url", self.server.url("no-models")], "--model"), (["--nonsense"], "nonsense"),
                            (["--requests", "0"], "--requests"), (["--requests", "x"], "--requests"), (["--concurrency", "0"], "--concurrency"),
                            (["--rate", "-1"], "--rate"), (["--rate", "1", "--concurrency", "2"], "--rate"), (["--arrival", "uniform"], "--rate"),
                            (["--rate", "1", "--arrival", "x"], "--arrival"), (["--endpoint", "x"], "--endpoint"),
                            (["--prompt-tokens", "5:2"], "--prompt-tokens"), (["--output-tokens", "file:" + missing], "--output-tokens"),
                            (["--prompt-source", "text"], "--prompt-file"), (["--prompt-source", "jsonl", "--prompt-file", missing], "--prompt-file"),
                            (["--prompt-source", "random-ids", "--endpoint", "chat"], "--prompt-source"),
                            (["--prompt-source", "random-ids", "--token-ids", "5"], "--token-ids"), (["--api-key-file", missing], "--api-key-file"),
                            (["--api-key-file", empty], "--api-key-file"), (["--json", missing + "/x.json"], "--json"),
                            (["--extra-body", "{"], "--extra-body"), (["--timeout", "0"], "--timeout")):
            r = run("bench", "serve", *([] if "--url" in flags else ["--url", ok]), "--requests" if "--requests" not in flags else "--seed", "1", *flags)
            self.assertIn(r.returncode, (1, 2), flags)
            self.assertEqual(r.stdout, "", flags)
            self.assertRegex(r.stderr, r"\Aminke: [^\n]+\n\Z", flags)
            self.assertIn(says, r.stderr, flags)
        self.assertEqual(self.server.seen, [])

    def test_a_failing_warm_up_ends_it(self):
        r = run("bench", "serve", "--url", self.server.url("500"), "--warmup", "2")
        self.assertEqual((r.returncode, r.stdout), (1, ""))
        self.assertEqual(r.stderr, "minke: all 2 requests of the warm-up failed: http_500: the reason\n")


if __name__ == "__main__":
    harness.main()
