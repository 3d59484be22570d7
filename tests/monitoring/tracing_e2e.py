"""Traces and logs of a real cluster: spans as OpenTelemetry's own code reads them, one tree per request through all processes; log
lines that are JSON, carry request ids and no text of anybody's; the phases of slow requests; and nothing that waits for a collector."""
import http.server, json, os, re, struct, subprocess, sys, tempfile, threading, time, unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(os.path.dirname(HERE), d) for d in ("e2e", "support")]
import harness, npm
from harness import Cluster, checkpoint, run, wait_until

NPM = os.environ.get("MINKE_NPM_DIR", os.path.join(tempfile.gettempdir(), "minke-monitoring-npm-%d" % os.getuid()))
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "xyzzyplugh"


class Collector:
    def __init__(self):
        self.bodies = bodies = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                good = self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
                if good:
                    bodies.append(body)
                self.send_response(200 if good else 404)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self):
        return "http://127.0.0.1:%d" % self.server.server_port

    def spans(self):
        data = b"".join(struct.pack("<I", len(b)) + b for b in list(self.bodies))
        done = subprocess.run(["node", os.path.join(HERE, "decode_traces.cjs"), NPM], input=data, capture_output=True, timeout=60)
        if done.returncode != 0:
            raise AssertionError(done.stderr.decode())
        return json.loads(done.stdout)

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Tracing(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        npm.install(HERE, NPM, ())
        cls.collector = Collector()
        cls.addClassCleanup(cls.collector.close)
        # --slow-request-s far below what any request takes.
        cls.cluster = Cluster(checkpoint("v2", tokenizer=True), "--experts=2", "--threads=1", "--log-format=json", "--log-level=debug",
                              "--otlp-endpoint=" + cls.collector.url, "--trace-ratio=0", "--slow-request-s=0.001")
        cls.addClassCleanup(cls.cluster.stop)

    def log_lines(self, **fields):
        lines = []
        for line in list(self.cluster.lines):
            entry = json.loads(line)
            if all(entry.get(k) == v for k, v in fields.items()):
                lines.append(entry)
        return lines

    def ask(self, request_id, traceparent=None, **body):
        headers = {"x-request-id": request_id, **({"traceparent": traceparent} if traceparent else {})}
        body = {"prompt": "tell me of " + SECRET, "max_tokens": 70, "temperature": 0, "ignore_eos": True, **body}
        status, answered, text = self.cluster.request("POST", "/v1/completions", body, headers=headers)
        self.assertEqual(status, 200, text)
        self.assertEqual(answered["x-request-id"], request_id)
        return json.loads(text)

    def test_a_traced_request_is_one_tree_through_gateway_and_attention(self):
        answer = self.ask("traced-1", "00-%s-%s-01" % (TRACE, PARENT), n=2)
        self.assertTrue(wait_until(lambda: sum(s["name"] == "decode" for s in self.trace()) == 2 and
                                   any(s["kind"] == 2 for s in self.trace()), 20), self.trace())
        spans = self.trace()
        by_id = {s["id"]: s for s in spans}
        self.assertEqual(len(by_id), len(spans))
        root, = [s for s in spans if s["parent"] == PARENT]
        self.assertEqual(root["name"], "text_completion " + self.model())
        self.assertEqual(root["service"]["service.name"], "minke-gateway")
        self.assertRegex(root["service"]["service.instance.id"], "^[0-9a-f]{16}$")
        a = root["attributes"]
        self.assertEqual(a["gen_ai.operation.name"], "text_completion")
        self.assertEqual(a["gen_ai.request.model"], self.model())
        self.assertEqual(a["gen_ai.response.id"], answer["id"])
        self.assertEqual(a["gen_ai.request.max_tokens"], 70)
        self.assertEqual(a["gen_ai.usage.input_tokens"], answer["usage"]["prompt_tokens"])
        self.assertEqual(a["gen_ai.usage.output_tokens"], answer["usage"]["completion_tokens"])
        self.assertEqual(a["gen_ai.response.finish_reasons"], ["length", "length"])
        self.assertEqual(a["minke.request_id"], "traced-1")
        self.assertEqual(a["http.response.status_code"], 200)
        self.assertGreater(a["minke.time_to_first_token"], 0)
        children = lambda span: [s for s in spans if s["parent"] == span["id"]]
        self.assertEqual(sorted(s["name"] for s in children(root)), sorted(["queue", "prefill", "decode"] * 2))
        for s in children(root):
            self.assertEqual(s["service"]["service.name"], "minke-attention")
            self.assertEqual(s["attributes"]["minke.request_id"], "traced-1")
        decodes = [s for s in spans if s["name"] == "decode"]
        for decode in decodes:
            self.assertEqual(decode["attributes"]["minke.tokens"], 70)
            self.assertGreaterEqual(decode["attributes"]["minke.steps"], 69)
        # Some steps layer by layer: every MoE layer's exchange, with a router's plan and servers' sums for each.
        steps = [s for s in spans if s["name"] == "step"]
        self.assertGreaterEqual(len(steps), 3)
        layers = self.moe_layers()
        for step in steps:
            self.assertIn(by_id[step["parent"]]["name"], ("prefill", "decode"))
            self.assertEqual(sorted(s["name"] for s in children(step)), sorted("layer %d" % l for l in layers))
            for layer in children(step):
                legs = children(layer)
                self.assertEqual({s["name"] for s in legs}, {"route", "experts"})
                self.assertTrue(all(s["kind"] == 3 for s in legs))
        # Children lie inside their parents (the clocks are one host's; a millisecond for rounding).
        slack = 1e6
        for s in spans:
            self.assertLessEqual(int(s["begin"]), int(s["end"]))
            if s["parent"] in by_id:
                parent = by_id[s["parent"]]
                self.assertGreaterEqual(int(s["begin"]), int(parent["begin"]) - slack, (s, parent))
                self.assertLessEqual(int(s["end"]), int(parent["end"]) + slack + (2e7 if parent is root else 0), (s, parent))

    def trace(self):
        return [s for s in self.collector.spans() if s["trace"] == TRACE]

    def model(self):
        return json.loads(self.cluster.request("GET", "/v1/models")[2])["data"][0]["id"]

    def moe_layers(self):
        with open(os.path.join(checkpoint("v2", tokenizer=True), "config.json")) as f:
            config = json.load(f)
        return range(config["first_k_dense_replace"], config["num_hidden_layers"])

    def test_what_is_not_sampled_is_not_traced(self):
        other = "5bf92f3577b34da6a3ce929d0e0e4737"
        self.ask("untraced-1")
        self.ask("untraced-2", "00-%s-%s-00" % (other, PARENT))
        self.ask("untraced-3", "not a traceparent")
        time.sleep(2.5)   # two batches' time
        ids = {s["attributes"].get("minke.request_id") for s in self.collector.spans()}
        self.assertFalse(any((i or "").startswith("untraced") for i in ids), ids)

    def test_a_request_id_leads_through_every_log(self):
        self.ask("logged-1")
        self.assertTrue(wait_until(lambda: self.log_lines(process="attention", request_id="logged-1"), 10))
        line, = self.log_lines(process="attention", request_id="logged-1", message="request done")
        self.assertEqual(line["generated_tokens"], 70)
        self.assertTrue(wait_until(lambda: self.log_lines(process="gateway", request_id="logged-1", message="done"), 10))
        line, = self.log_lines(process="gateway", request_id="logged-1", message="done")
        self.assertEqual((line["status"], line["completion_tokens"]), (200, 70))

    def test_a_slow_request_logs_its_phases(self):
        self.ask("slow-1")
        self.assertTrue(wait_until(lambda: self.log_lines(message="slow request", request_id="slow-1"), 10))
        line, = self.log_lines(message="slow request", request_id="slow-1")
        self.assertEqual(line["level"], "warning")
        self.assertEqual(line["route"], "/v1/completions")
        self.assertEqual(line["decode_steps"], 69)
        parts = line["read_and_tokenise_ms"] + line["queue_ms"] + line["prefill_ms"] + line["decode_ms"]
        self.assertAlmostEqual(parts, line["total_ms"], delta=0.05 * line["total_ms"] + 1)
        phases = [v for k, v in line.items() if re.match(r"decode_\w+_ms$", k)]
        self.assertGreaterEqual(len(phases), 9)
        self.assertGreater(line["decode_wait_for_experts_ms"], 0)
        # Of the steps between the first and the last token: nearly all of the time in between.
        self.assertGreater(sum(phases), 0.5 * line["decode_ms"])
        self.assertLess(sum(phases), 1.2 * line["decode_ms"] + 20)

    def test_logs_are_json_and_hold_nobodys_text(self):
        answer = self.ask("quiet-1", logprobs=1)
        self.ask("quiet-2", prompt=SECRET * 3, stream=False)
        text = answer["choices"][0]["text"]
        time.sleep(0.5)
        lines = list(self.cluster.lines)
        for line in lines:
            entry = json.loads(line)
            self.assertLessEqual({"time", "level", "tag", "message"}, set(entry), line)
            self.assertRegex(entry["time"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
            self.assertNotIn(SECRET, line)
            if len(text) > 8:
                self.assertNotIn(text[:8], line)

    def test_spans_are_counted(self):
        self.ask("counted-1", "00-%s-%s-01" % ("6" * 32, PARENT))
        sent = lambda: [float(v) for v in re.findall(r'^minke:trace_spans_total\{service="minke-gateway",result="sent"\} (\S+)$',
                                                     self.cluster.request("GET", "/metrics")[2].decode(), re.M)]
        self.assertTrue(wait_until(lambda: sent() and sent()[0] > 0, 20), sent())


class NoCollector(unittest.TestCase):
    def test_requests_do_not_wait_for_a_collector_that_is_away(self):
        with Cluster(checkpoint("v2"), "--otlp-endpoint=http://127.0.0.1:%d" % harness.free_port(), "--trace-ratio=1") as cluster:
            for _ in range(5):
                self.assertEqual(len(cluster.complete(prompt=[3, 4], max_tokens=4, ignore_eos=True, return_token_ids=True)
                                     ["choices"][0]["token_ids"]), 4)
            dropped = lambda: re.search(r'trace_spans_total\{service="minke-gateway",result="dropped"\} (\S+)',
                                        cluster.request("GET", "/metrics")[2].decode())
            self.assertTrue(wait_until(lambda: dropped() and float(dropped().group(1)) >= 5, 20))
            self.assertIn("the collector takes no spans", cluster.log())
            begin = time.time()
            self.assertEqual(cluster.stop(), 0)
            self.assertLess(time.time() - begin, 10)

    def test_a_wrong_address_is_refused(self):
        for role in ("up", "serve"):
            done = run(role, checkpoint("v2"), "--otlp-endpoint=collector:4318")
            self.assertNotEqual(done.returncode, 0)
            self.assertIn("expected http://HOST[:PORT][/PATH], found 'collector:4318'", done.stderr)


if __name__ == "__main__":
    harness.main()
