"""Many clients at once, bad input, and clients that misbehave, against a real cluster."""
import http.client, json, os, random, socket, struct, threading, time, unittest
import harness
from harness import Cluster, checkpoint, golden, wait_until


def rss_kib(pid):
    with open("/proc/%d/status" % pid) as f:
        return next(int(l.split()[1]) for l in f if l.startswith("VmRSS"))


class Load(unittest.TestCase):
    def test_64_clients_with_random_prompts_lengths_and_disconnects(self):
        rng = random.Random(5)
        prompts = [[rng.randrange(2, 512) for _ in range(rng.randint(1, 200))] for _ in range(24)]
        lengths = [rng.randint(1, 60) for _ in prompts]
        # Room for 40 pages: some of the 64 wait, some are preempted.
        with Cluster(checkpoint("v2"), "--precision=exact", "--cache-mib", "2", "--step-tokens", "128") as cluster:
            body = lambda i: dict(prompt=prompts[i], max_tokens=lengths[i], temperature=0.8, seed=i, ignore_eos=True, return_token_ids=True)
            want = [cluster.complete(**body(i))["choices"][0]["token_ids"] for i in range(len(prompts))]
            errors, checked = [], [0]

            def client(n):
                r = random.Random(n)
                for _ in range(4):
                    i = r.randrange(len(prompts))
                    leave = r.random() < 0.3
                    try:
                        limit = r.randint(1, max(1, lengths[i] - 1)) if leave else None
                        events, done = cluster.stream("/v1/completions", body(i), limit=limit)
                        got = [t for e in events for c in e["choices"] for t in c["token_ids"]]
                        if got != want[i][:len(got)] or (limit is None and (not done or got != want[i])):
                            errors.append((i, got, want[i]))
                        checked[0] += 1
                    except Exception as e:
                        errors.append(repr(e))

            def round_of_clients():
                threads = [threading.Thread(target=client, args=(n,)) for n in range(64)]
                for t in threads:
                    t.start()
                for t in threads:
                    t.join()

            round_of_clients()
            self.assertEqual(errors, [])
            pids = {role: cluster.pids(role)[0] for role in ("gateway", "router", "attention", "expert")}
            before = {role: rss_kib(pid) for role, pid in pids.items()}
            for _ in range(2):
                round_of_clients()
            self.assertEqual(errors, [])
            self.assertEqual(checked[0], 64 * 4 * 3)
            used = lambda: cluster.metrics("attention", labels=True)[("minke:latent_cache_pages", "used")]
            self.assertTrue(wait_until(lambda: used() == 0), used())
            after = {role: rss_kib(pid) for role, pid in pids.items()}
            for role in pids:   # steady: nothing grows with the number of requests
                self.assertLess(after[role], before[role] * 1.15 + 4096, (role, before, after))

    def test_a_client_that_leaves_frees_its_pages(self):
        with Cluster(checkpoint("v2")) as cluster:
            for _ in range(5):
                events, _ = cluster.stream("/v1/completions", dict(prompt=[4] * 300, max_tokens=2000, ignore_eos=True), limit=3)
                self.assertGreaterEqual(len(events), 3)
            busy = lambda: cluster.metrics("attention")["minke:num_requests_running"]
            self.assertTrue(wait_until(lambda: busy() == 0), busy())

    def test_a_repeated_prefix_is_not_computed_again(self):
        prompt = [2 + i * 7 % 500 for i in range(1999)]
        with Cluster(checkpoint("v2"), "--precision=exact", "--attention=2") as cluster:
            body = dict(max_tokens=4, temperature=0, ignore_eos=True, return_token_ids=True, logprobs=2)

            def ask(p, **more):
                answer = cluster.complete(prompt=p, **dict(body, **more))
                return answer["choices"][0], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

            first, cached = ask(prompt)
            self.assertEqual(cached, 0)
            computed = lambda: cluster.metrics("attention")["minke:attention_computed_tokens_total"]
            before = computed()
            again, cached = ask(prompt)   # of two nodes, the one that has it
            self.assertEqual(cached, 1984)
            self.assertEqual(computed() - before, 15 + 4 - 1)   # its last page, and the new tokens but the last
            self.assertEqual({k: again[k] for k in ("text", "token_ids", "logprobs")},
                             {k: first[k] for k in ("text", "token_ids", "logprobs")})
            # On one host two microbatches would only read the weights twice.
            self.assertEqual(cluster.metrics("attention")["minke:attention_split_steps_total"], 0)
            other, cached = ask(prompt[:640] + [3] * 100)
            self.assertEqual(cached, 640)
            events, done = cluster.stream("/v1/completions", dict(body, prompt=prompt, stream_options=dict(include_usage=True)))
            self.assertEqual(events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"], 1984)
            scored, cached = ask(prompt, echo=True, max_tokens=0)   # every position is wanted
            self.assertEqual(cached, 0)
            self.assertEqual(len(scored["logprobs"]["token_logprobs"]), 1999)
        with Cluster(checkpoint("v2"), "--precision=exact", "--prefix-cache=off") as cluster:
            for _ in range(2):
                plain, cached = ask(prompt)
                self.assertEqual(cached, 0)
                self.assertEqual(plain["logprobs"], first["logprobs"])

    def test_chat_stream_and_usage(self):
        with Cluster(checkpoint("v2", tokenizer=True), "--model-name", "small") as cluster:
            body = dict(model="small", messages=[{"role": "user", "content": "Hello <｜end▁of▁sentence｜> there"}],
                        max_tokens=12, stream_options={"include_usage": True}, return_token_ids=True, ignore_eos=True)
            events, done = cluster.stream("/v1/chat/completions", body)
            self.assertTrue(done)
            self.assertEqual(sum(len(c.get("token_ids", [])) for e in events for c in e["choices"]), 12)
            self.assertEqual(events[-1]["usage"]["completion_tokens"], 12)
            prompt = next(c["prompt_token_ids"] for e in events for c in e["choices"] if "prompt_token_ids" in c)
            self.assertEqual(prompt.count(0), 1)   # one BOS
            self.assertNotIn(1, prompt)            # user text does not become an end token
            status, answer = cluster.post("/v1/completions", dict(model="other", prompt="x"))
            self.assertEqual((status, answer["error"]["code"]), (404, "model_not_found"))

    def test_api_keys_close_everything_but_health(self):
        keys = os.path.join(harness._scratch, "keys")
        with open(keys, "w") as f:
            f.write("sk-right\n")
        with Cluster(checkpoint("v2"), "--api-key-file", keys) as cluster:
            body = dict(prompt=[5], max_tokens=1)
            self.assertEqual(cluster.request("POST", "/v1/completions", body)[0], 401)
            status, _, text = cluster.request("POST", "/v1/completions", body, headers={"authorization": "Bearer sk-wrong"})
            self.assertEqual((status, json.loads(text)["error"]["code"]), (401, "invalid_api_key"))
            self.assertEqual(cluster.request("POST", "/v1/completions", body, headers={"authorization": "Bearer sk-right"})[0], 200)
            self.assertEqual(cluster.request("GET", "/health")[0], 200)

    def test_a_keys_limits_are_its_own_and_its_file_is_read_again(self):
        keys = os.path.join(harness._scratch, "limited")

        def write(text):
            with open(keys + ".new", "w") as f:
                f.write(text)
            os.rename(keys + ".new", keys)

        write("sk-few name=few requests_per_minute=2\nsk-tokens name=tokens tokens_per_minute=40\nsk-free name=free\n")
        with Cluster(checkpoint("v2"), "--api-key-file", keys) as cluster:
            def ask(key, **body):
                return cluster.request("POST", "/v1/completions", dict(dict(prompt=[5, 6], max_tokens=3, ignore_eos=True), **body),
                                       headers={"authorization": "Bearer " + key})
            status, headers, _ = ask("sk-few")
            self.assertEqual((status, headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]), (200, "2", "1"))
            self.assertEqual(ask("sk-few", stream=True)[0], 200)
            status, headers, text = ask("sk-few")
            error = json.loads(text)["error"]
            self.assertEqual((status, error["type"], error["code"]), (429, "rate_limit_error", "rate_limit_exceeded"))
            self.assertIn("2 requests per minute", error["message"])
            self.assertTrue(1 <= int(headers["retry-after"]) <= 30, headers)
            # Of prompts and generated ones: 2 + 60 are beyond 40, and known only when they have come.
            self.assertEqual(ask("sk-tokens", max_tokens=60)[0], 200)
            status, _, text = ask("sk-tokens")
            self.assertEqual(status, 429)
            self.assertIn("40 tokens per minute", json.loads(text)["error"]["message"])
            for _ in range(5):
                self.assertEqual(ask("sk-free")[0], 200)
            metrics = cluster.request("GET", "/metrics")[2].decode()
            for line in ('key_requests_total{key="few"} 2', 'key_refused_total{key="few",limit="requests"} 1',
                         'key_completion_tokens_total{key="tokens"} 60', 'key_requests_total{key="free"} 5'):
                self.assertIn("minke:" + line, metrics)
            write("sk-new name=new\n")
            self.assertTrue(wait_until(lambda: ask("sk-new")[0] == 200, 5))
            self.assertEqual(ask("sk-free")[0], 401)
            write("sk-new name=new concurrency=many\n")
            self.assertTrue(wait_until(lambda: ask("sk-new")[0] == 200 and "keys stay as they were" in cluster.log(), 5), cluster.log())
            for line in cluster.lines + [open("/proc/%d/cmdline" % pid).read() for pid in cluster.pids("gateway")]:
                self.assertNotIn("sk-", line)

    def test_values_that_are_not_finite_fail_their_own_request_only(self):
        path = checkpoint("v2", directory=os.path.join(harness._scratch, "poisoned"))
        name = path + "/model.safetensors"
        with open(name, "r+b") as f:
            size = struct.unpack("<Q", f.read(8))[0]
            header = json.loads(f.read(size))
            for expert in range(0, 160, 8):   # one expert in eight answers NaN, in the last layer
                begin, end = header["model.layers.3.mlp.experts.%d.down_proj.weight" % expert]["data_offsets"]
                f.seek(8 + size + begin)
                f.write(b"\xc0\x7f" * ((end - begin) // 2))
        with Cluster(path) as cluster:
            ask = lambda i: cluster.post("/v1/completions", dict(prompt=[i], max_tokens=0, echo=True, logprobs=0))
            answers = [ask(i) for i in range(2, 42)]
            good = [i for i, (status, _) in enumerate(answers) if status == 200]
            bad = [i for i, (status, _) in enumerate(answers) if status == 500]
            self.assertEqual(len(good) + len(bad), 40, [a for a in answers if a[0] not in (200, 500)])
            self.assertTrue(good and bad, (good, bad))
            for i in bad[:3]:
                self.assertIn("not finite", answers[i][1]["error"]["message"])
            results = [None] * 40   # all together: those in the same batch as a bad one still succeed
            threads = [threading.Thread(target=lambda i=i: results.__setitem__(i, ask(i + 2)[0])) for i in range(40)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            self.assertEqual(results, [status for status, _ in answers])


class BadInput(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(checkpoint("v2"), "--body-max-bytes", str(1 << 20))

    @classmethod
    def tearDownClass(cls):
        cls.cluster.stop()

    def tearDown(self):   # whatever was sent: it still serves
        answer = self.cluster.complete(prompt=[5, 6], max_tokens=2, return_token_ids=True, ignore_eos=True)
        self.assertEqual(len(answer["choices"][0]["token_ids"]), 2)

    def refused(self, body, status=400, param=None, path="/v1/completions"):
        got, headers, text = self.cluster.request("POST", path, body)
        self.assertEqual(got, status, (body if len(str(body)) < 200 else "long", text[:300]))
        error = json.loads(text)["error"]
        self.assertEqual(set(error), {"message", "type", "param", "code"})
        self.assertTrue(error["message"])
        self.assertIn("x-request-id", headers)
        if param:
            self.assertEqual(error["param"], param)

    def test_table(self):
        ok = dict(prompt=[5, 6], max_tokens=2)
        for change, param in [(dict(prompt=[]), "prompt"), (dict(prompt=""), "prompt"), (dict(prompt="text"), "prompt"),
                              (dict(prompt=[512]), "prompt"), (dict(prompt=[-1]), "prompt"), (dict(prompt=[1.5]), "prompt"),
                              (dict(prompt=[3] * 2559), None), (dict(prompt={}), "prompt"), (dict(max_tokens=-1), "max_tokens"),
                              (dict(max_tokens=10**30), "max_tokens"), (dict(max_tokens="2"), "max_tokens"),
                              (dict(temperature=3), "temperature"), (dict(temperature=-0.1), "temperature"),
                              (dict(top_p=0), "top_p"), (dict(top_p=1.1), "top_p"), (dict(n=0), "n"), (dict(n=-3), "n"),
                              (dict(tools=[{"type": "function"}]), "tools"),
                              (dict(response_format={"type": "json_object"}), "response_format"),
                              (dict(logit_bias={"900": 1}), "logit_bias"), (dict(stop=[1]), "stop"), (dict(logprobs=100), "logprobs")]:
            self.refused(dict(ok, **change), param=param)
        self.refused(dict(ok, max_tokens=2559))
        self.refused(dict(messages=[{"role": "user", "content": "x"}]), path="/v1/chat/completions")
        self.refused(b"{not json")
        self.refused(b"[" * 100000)
        self.refused(b"")
        self.refused(b"[1,2]")
        self.refused(b'{"prompt": [5], "max_tokens": 1e999}')
        self.refused(b'{"prompt": "\xff\xfe", "max_tokens": 1}')
        self.assertEqual(self.cluster.request("POST", "/v1/completions", dict(ok, unknown_field=[1, {"a": 2}]))[0], 200)

    def test_paths_and_methods(self):
        for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405)):
            got, _, text = self.cluster.request(method, path)
            self.assertEqual(got, status)
            self.assertIn("error", json.loads(text))

    def test_a_body_of_100_mb_gets_its_413(self):
        c = http.client.HTTPConnection(self.cluster.host, self.cluster.port, timeout=60)
        c.putrequest("POST", "/v1/completions")
        c.putheader("content-length", str(100 << 20))
        c.endheaders()
        block = b" " * (1 << 20)
        for _ in range(100):
            c.send(block)
        r = c.getresponse()
        self.assertEqual(r.status, 413)
        self.assertIn("error", json.loads(r.read()))

    def test_a_client_that_never_reads(self):
        for _ in range(20):
            s = socket.create_connection((self.cluster.host, self.cluster.port))
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            body = json.dumps(dict(prompt=[5] * 50, max_tokens=400, stream=True, ignore_eos=True, return_token_ids=True)).encode()
            s.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            self.addCleanup(s.close)

    def test_garbage_on_the_port(self):
        for data in (b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9.9\r\n\r\n", b"A" * 200000, b"\r\n\r\n\r\n"):
            with socket.create_connection((self.cluster.host, self.cluster.port), timeout=10) as s:
                try:
                    s.sendall(data)
                    s.shutdown(socket.SHUT_WR)
                    while s.recv(65536):
                        pass
                except OSError:
                    pass


if __name__ == "__main__":
    harness.main()
