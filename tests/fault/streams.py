"""Clients that stream all the time, each answer compared token by token with that of an undisturbed run."""
import http.client, json, random, threading, time

OPENINGS = ("Enter a KING and %d lords.\n", "HAMLET:\nWhat, %d times?\n", "Scene %d. A street in Verona.\n",
            "FIRST WITCH:\nWhen shall we %d meet again\n", "And %d more sonnets on the sea:\n")


def make_bodies(rng, count=12, tokens=(24, 240)):
    """Greedy and seeded requests, some with penalties, some with long prompts."""
    bodies = []
    for i in range(count):
        prompt = "".join(rng.choice(OPENINGS) % rng.randrange(2, 90) for _ in range(rng.choice((1, 1, 2, 12))))
        body = dict(prompt=prompt, max_tokens=rng.randrange(*tokens), ignore_eos=True, return_token_ids=True, stream=True,
                    temperature=rng.choice((0, 0.8, 1.0)), seed=rng.randrange(1 << 30), stream_options=dict(include_usage=True))
        if rng.random() < 0.3:
            body["frequency_penalty"] = 0.4
        bodies.append(body)
    return bodies


class Stream:
    def __init__(self, body):
        self.body = body             # index
        self.begin = time.monotonic()
        self.times = []              # of events with tokens
        self.end = None
        self.outcome = None          # "ok", "wrong", "failed", "broken" (its connection)
        self.detail = ""

    def gaps(self):
        """(begin, end) of the times without an event, the wait for the first one among them."""
        points = [self.begin, *self.times, self.end if self.end is not None else time.monotonic()]
        return zip(points, points[1:])


def run_stream(address, body, stream, timeout, headers=None):
    """Fills in the stream; returns (tokens, text, finish reason, usage). `address`: (host, port), or what gives another one each time."""
    tokens, text, finish, usage, done = [], [], None, None, False
    while True:
        try:
            c = http.client.HTTPConnection(*address, timeout=timeout)
            c.connect()
            break
        except OSError as e:   # no gateway: the same stream tries again
            if time.monotonic() - stream.begin > timeout:
                stream.outcome, stream.detail = "failed", "no gateway: %r" % e
                return None
            time.sleep(0.05)
    try:
        c.request("POST", "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json", **(headers or {})})
        r = c.getresponse()
        if r.status != 200:
            stream.outcome, stream.detail = "failed", "%d %s" % (r.status, r.read().decode(errors="replace"))
            return None
        for line in r:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                done = True
                break
            event = json.loads(line[6:])
            if "error" in event:
                stream.outcome, stream.detail = "failed", json.dumps(event["error"])
                return None
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                if choice.get("token_ids"):
                    stream.times.append(time.monotonic())
                    tokens += choice["token_ids"]
                text.append(choice["text"])
                finish = choice.get("finish_reason") or finish
    except TimeoutError:
        stream.outcome, stream.detail = "failed", "no event in %d s, after %d tokens" % (timeout, len(tokens))
        return None
    except (OSError, http.client.HTTPException, ValueError) as e:
        stream.outcome, stream.detail = "broken", "%r after %d tokens" % (e, len(tokens))
        return None
    finally:
        c.close()
    if not done:
        stream.outcome, stream.detail = "broken", "ended after %d tokens without [DONE]" % len(tokens)
        return None
    usage = usage and {k: usage.get(k) for k in ("prompt_tokens", "completion_tokens")}   # cached ones may differ
    return tokens, "".join(text), finish, usage


class Load:
    """`clients` threads in a closed loop; stops at __exit__, when every stream has ended."""

    def __init__(self, address, seed, clients=6, timeout=90, headers=None, **bodies):
        self.address, self.timeout, self.seed, self.headers = address, timeout, seed, headers
        self.bodies = make_bodies(random.Random(seed), **bodies)
        self.lock = threading.Lock()
        self.streams = []
        self.stopping = False
        self.want = []
        for i, body in enumerate(self.bodies):   # the undisturbed run
            answers = []
            for _ in range(2):
                stream = Stream(i)
                answers.append(run_stream(address, body, stream, timeout, headers))
                if answers[-1] is None:
                    raise AssertionError("undisturbed: " + stream.detail)
            if answers[0] != answers[1]:
                raise AssertionError("two undisturbed answers differ: %s" % (answers,))
            self.want.append(answers[0])
        self.threads = [threading.Thread(target=self._client, args=(n,), daemon=True) for n in range(clients)]

    def _client(self, n):
        rng = random.Random(self.seed * 1000 + n)
        while not self.stopping:
            i = rng.randrange(len(self.bodies))
            stream = Stream(i)
            with self.lock:
                self.streams.append(stream)
            got = run_stream(self.address, self.bodies[i], stream, self.timeout, self.headers)
            if got is not None:
                self.check(stream, got)
            stream.end = time.monotonic()
            if stream.outcome != "ok":
                time.sleep(0.2)

    def check(self, stream, got):
        want = self.want[stream.body]
        stream.outcome = "ok" if got == want else "wrong"
        if got != want:
            at = next((k for k, (a, b) in enumerate(zip(got[0], want[0])) if a != b), min(len(got[0]), len(want[0])))
            stream.detail = "body %d: differs from token %d on; %d tokens, expected %d; %s %s, expected %s %s" % (
                stream.body, at, len(got[0]), len(want[0]), *got[2:], *want[2:])

    def in_flight(self):
        with self.lock:
            return [s for s in self.streams if s.end is None]

    def wait_for_older(self, moment, seconds=60):
        """Until no stream that began before the moment is under way."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(s.begin < moment for s in self.in_flight()):
            time.sleep(0.02)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopping = True
        for thread in self.threads:
            thread.join(self.timeout + 10)
