"""A real Prometheus (Debian's) scrapes a real cluster under load: every panel's and every alert's query has data, the documented
metrics are those that are shown, activations really travel over UCX, and members that come, go and die are followed."""
import glob, http.client, json, math, os, re, shutil, signal, subprocess, sys, tempfile, time, unittest, urllib.parse

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "e2e"))
import harness
from harness import Cluster, run, wait_until
from rules_test import PROMETHEUS, alerts, read

ROOT = harness.ROOT
MODEL = os.path.join(ROOT, "models", "minke-shakespeare")
NAME = "blue"
ROLES = ("gateway", "router", "attention", "expert")


class Prometheus:
    """With the shipped rules, at a pace of one second."""

    def __init__(self, targets_file):
        self.directory = tempfile.mkdtemp(prefix="minke-prometheus-")
        self.port = harness.free_port()
        config = read(PROMETHEUS, "prometheus.yml")
        config = re.sub(r"(scrape_interval|evaluation_interval|refresh_interval): 5s", r"\1: 1s", config)
        config = config.replace("rules/", os.path.join(PROMETHEUS, "rules") + "/")
        config = re.sub(r"files: \[.*\]", "files: [%s]" % json.dumps(targets_file), config)
        path = os.path.join(self.directory, "prometheus.yml")
        with open(path, "w") as f:
            f.write(config)
        self.log = open(os.path.join(self.directory, "log"), "w+")
        self.process = subprocess.Popen(["prometheus", "--config.file=" + path, "--storage.tsdb.path=" + self.directory + "/data",
                                         "--web.listen-address=127.0.0.1:%d" % self.port], stderr=self.log, stdout=subprocess.DEVNULL)
        if not wait_until(lambda: self.get("/-/ready") is not None, 30):
            self.log.seek(0)
            raise AssertionError("prometheus is not ready:\n" + self.log.read())

    def get(self, path, **parameters):
        try:
            c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
            c.request("GET", path + ("?" + urllib.parse.urlencode(parameters) if parameters else ""))
            r = c.getresponse()
            text = r.read()
            c.close()
        except OSError:
            return None
        if not path.startswith("/api/"):
            return text if r.status == 200 else None
        return json.loads(text)

    def query(self, expr):
        """Series of an instant query as (labels, value); AssertionError if it cannot be evaluated."""
        answer = self.get("/api/v1/query", query=expr)
        if answer is None or answer["status"] != "success":
            raise AssertionError("%s\n%s" % (expr, answer))
        return [(series["metric"], float(series["value"][1])) for series in answer["data"]["result"]]

    def has_data(self, expr):
        return any(not math.isnan(value) for _, value in self.query(expr))

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def scrape(address):
    c = http.client.HTTPConnection(address, timeout=10)
    c.request("GET", "/metrics")
    text = c.getresponse().read().decode()
    c.close()
    return text


def families(text):
    """Type and label names by family."""
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M))
    labels = {name: set() for name in types}
    for name, inside in re.findall(r"^([\w:]+)(?:\{(.*)\})? \S+$", text, re.M):
        family = name if name in types else re.sub(r"_(bucket|sum|count)$", "", name)
        labels[family] |= set(re.findall(r'(\w+)="', inside)) - {"le", "quantile"}
    return {name: (types[name], labels[name]) for name in types}


def total(text, name, **labels):
    """Sum of a metric's series that have these labels."""
    out = 0.0
    for inside, value in re.findall(r"^%s(?:\{(.*)\})? (\S+)$" % re.escape(name), text, re.M):
        if all('%s="%s"' % item in inside for item in labels.items()):
            out += float(value)
    return out


class Monitoring(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="minke-targets-")
        cls.targets_file = os.path.join(cls.folder, "targets.json")
        cls.key_file = os.path.join(cls.folder, "keys")
        with open(cls.key_file, "w") as f:
            f.write("sk-of-the-test name=team-a concurrency=100\n")
        # Later starts under load: this host may be busy. A lost heartbeat is another test's business.
        cls.cluster = Cluster(MODEL, "--experts=3", "--threads=1", "--metrics-vllm-names", "--targets-file", cls.targets_file,
                              "--cluster", NAME, "--heartbeat-ms=2000", "--trace-ratio=0", "--api-key-file", cls.key_file,
                              "--otlp-endpoint=http://127.0.0.1:%d" % harness.free_port())   # nobody is there: the counters are what counts
        cls.addClassCleanup(shutil.rmtree, cls.folder, True)
        cls.addClassCleanup(cls.cluster.stop)
        # Before there is any load: what is counted then stands still.
        for _ in range(5):
            cls.before = cls.pages()
            cls.bench("--requests=30", "--concurrency=6").wait(60)
            wait_until(lambda: cls.moved() == 0)
            cls.after = cls.pages()
            if cls.placement(cls.before) == cls.placement(cls.after):   # a unit that moves takes its series along
                break
        else:
            raise AssertionError("units move all the time\n" + cls.cluster.log())
        cls.prometheus = Prometheus(cls.targets_file)
        cls.addClassCleanup(cls.prometheus.close)
        cls.load = cls.bench("--duration=300", "--concurrency=4")
        cls.addClassCleanup(cls.end_load)
        # Rates need a few scrapes, and requests that have ended.
        enough = lambda: cls.prometheus.has_data("cluster:minke_tokens_slow:ratio_rate10m") and \
            cls.prometheus.has_data("layer_server:minke_expert_rows:rate1m") and \
            cls.prometheus.has_data("rate(minke:e2e_request_latency_seconds_count[8s]) > 0")
        if not wait_until(enough, 40):
            raise AssertionError("no rates\n" + cls.cluster.log())

    @classmethod
    def bench(cls, *flags):
        return subprocess.Popen([harness.MINKE, "bench", "serve", "--url", cls.cluster.url, "--prompt-tokens=40", "--output-tokens=12",
                                 "--api-key-file", cls.key_file, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @classmethod
    def end_load(cls):
        cls.load.kill()
        cls.load.wait()

    @classmethod
    def targets(cls):
        """(member, job, address) of the targets file."""
        return [(g["labels"]["member"], g["labels"]["job"], g["targets"][0]) for g in json.loads(read(cls.targets_file))]

    @classmethod
    def pages(cls):
        """Texts of /metrics by role."""
        out = {role: [] for role in ROLES}
        for _, job, address in cls.targets():
            out[job[len("minke-"):]].append(scrape(address))
        return out

    @staticmethod
    def placement(pages):
        """What changes when units move: replicas published and withdrawn, and what each expert server shows."""
        router = pages["router"][0]
        return ([total(router, "minke:replica_moves_total", kind=kind) for kind in ("add", "drop")],
                [sorted(re.findall(r"^minke:expert_rows_total\{.*\}", page, re.M)) for page in pages["expert"]])

    @classmethod
    def moved(cls):
        before = cls.pages()
        time.sleep(0.2)
        after = cls.pages()
        return sum(total(b, "minke:dispatched_rows_total") - total(a, "minke:dispatched_rows_total")
                   for a, b in zip(before["attention"], after["attention"]))

    def node(self, role):
        """Its node id, of a role with one process."""
        return re.search(r'^minke:build_info\{.*node="(\w+)"\} 1$', self.after[role][0], re.M).group(1)

    def grown(self, role, name, **labels):
        return sum(total(b, name, **labels) - total(a, name, **labels) for a, b in zip(self.before[role], self.after[role]))

    def test_bytes_over_ucx_are_rows_times_their_size(self):
        with open(os.path.join(MODEL, "config.json")) as f:
            row_bytes = json.load(f)["hidden_size"] * 2   # bf16
        # What goes along: a header of 64 bytes per frame, and per row its place, experts and weights.
        dispatched = self.grown("attention", "minke:dispatched_rows_total") * row_bytes
        received = self.grown("router", "minke:ucx_bytes_total", direction="received", peer=self.node("attention"))
        self.assertGreater(dispatched, 1 << 20)
        self.assertGreaterEqual(received, dispatched)
        self.assertLess(received, 1.3 * dispatched)
        # Each row once to every server that has one of its groups; a sum comes back per (row, group).
        routed = self.grown("router", "minke:server_rows_total") * row_bytes
        got = self.grown("expert", "minke:ucx_bytes_total", direction="received", peer=self.node("router"))
        self.assertGreater(routed, dispatched)
        self.assertGreaterEqual(got, routed)
        self.assertLess(got, 1.3 * routed)
        sums = self.grown("expert", "minke:expert_rows_total") * row_bytes
        sent = self.grown("expert", "minke:ucx_bytes_total", direction="sent", peer=self.node("attention"))
        self.assertGreater(sums, routed)
        self.assertGreaterEqual(sent, sums)
        self.assertLess(sent, 1.3 * sums)
        # What one end sent the other one got.
        attention_sent = self.grown("attention", "minke:ucx_bytes_total", direction="sent", peer=self.node("router"))
        self.assertAlmostEqual(attention_sent / received, 1, 2)   # but heartbeats under way
        transports = set(re.findall(r'^minke:ucx_bytes_total\{.*transport="(\w+)"', self.after["attention"][0], re.M))
        self.assertTrue(transports <= {"posix", "sysv", "cma", "tcp"} and transports, transports)

    def test_counts_of_rows_agree_along_their_way(self):
        rows = self.grown("attention", "minke:dispatched_rows_total")
        self.assertEqual(self.grown("router", "minke:router_rows_total"), rows)
        self.assertEqual(self.grown("router", "minke:fan_out_servers_count"), rows)
        self.assertEqual(self.grown("router", "minke:fan_out_servers_sum"), self.grown("router", "minke:server_rows_total"))
        self.assertEqual(self.grown("expert", "minke:expert_rows_total"), self.grown("router", "minke:group_rows_total"))
        self.assertEqual(self.grown("expert", "minke:expert_rows_received_total"), self.grown("router", "minke:server_rows_total"))
        with open(os.path.join(MODEL, "config.json")) as f:
            config = json.load(f)
        self.assertEqual(self.grown("router", "minke:expert_selections_total"), rows * config["num_experts_per_tok"])
        self.assertEqual(self.grown("gateway", "minke:generation_tokens_total"), self.grown("attention", "minke:attention_generated_tokens_total"))
        # F <= M.
        router = self.after["router"][0]
        self.assertEqual(total(router, "minke:fan_out_limit"), config["topk_group"])
        self.assertEqual(total(router, "minke:fan_out_servers_bucket", le=str(config["topk_group"])), total(router, "minke:fan_out_servers_count"))
        self.assertEqual(total(router, "minke:fan_out_violations_total"), 0)

    def test_balance_is_what_the_counters_say(self):
        """The router's gauges against the same formulas over its counters: all of its life lies in the window."""
        router = self.after["router"][0]
        with open(os.path.join(MODEL, "config.json")) as f:
            config = json.load(f)
        experts, k = config["n_routed_experts"], config["num_experts_per_tok"]
        for layer in range(config["first_k_dense_replace"], config["num_hidden_layers"]):
            rows = total(router, "minke:fan_out_servers_count", layer=layer)
            f = [experts / (k * rows) * float(v) for v in
                 re.findall(r'^minke:expert_selections_total\{layer="%d",.*\} (\S+)$' % layer, router, re.M)]
            self.assertEqual(len(f), experts)
            self.assertAlmostEqual(total(router, "minke:expert_load_max", layer=layer), max(f), 6)
            balance = {kind: total(router, "minke:balance_factor", layer=layer, kind=kind) for kind in ("expert", "device", "communication")}
            # sum of f_i P_i, between the smallest and the largest f_i, as the P_i add up to 1.
            self.assertGreater(balance["expert"], min(f))
            self.assertLess(balance["expert"], max(f))
            per_server = [float(v) for v in re.findall(r'^minke:server_rows_total\{layer="%d",.*\} (\S+)$' % layer, router, re.M)]
            self.assertEqual(len(per_server), 3)
            weight = 3 / (config["topk_group"] * rows)
            self.assertGreaterEqual(balance["communication"], weight * min(per_server) - 1e-9)
            self.assertLessEqual(balance["communication"], weight * max(per_server) + 1e-9)
            self.assertLessEqual(balance["device"], total(router, "minke:device_load_max", layer=layer) + 1e-9)
            self.assertLess(total(router, "minke:over_budget_fraction", layer=layer), total(router, "minke:device_load_max", layer=layer) / 3)

    def test_documented_metrics_are_those_that_are_shown(self):
        documented = {}
        text = read(ROOT, "docs", "metrics.md")
        for name, kind, labels, roles in re.findall(r"^\| `([\w:]+)` \| (\w+) \| ([^|]*) \| [^|]* \| ([^|]*) \|", text, re.M):
            roles = ROLES if roles == "all" else roles.split(", ")
            self.assertNotIn(name, documented)
            documented[name] = (kind, set() if labels == "–" else set(labels.split(", ")), set(roles))
        shown = {}
        for role, texts in self.pages().items():
            for page in texts:
                for name, (kind, labels) in families(page).items():
                    if name.startswith("vllm:"):
                        continue
                    _, all_labels, roles = shown.setdefault(name, (kind, set(), set()))
                    all_labels |= labels
                    roles.add(role)
        self.assertEqual({n: v for n, v in shown.items() if documented.get(n) != v},
                         {n: v for n, v in documented.items() if shown.get(n) != v})
        vllm = {name for name in families(self.pages()["gateway"][0]) if name.startswith("vllm:")}
        self.assertEqual(vllm, set(re.findall(r"`(vllm:\w+)`", text)))

    def test_vllm_names_have_the_same_values(self):
        page = scrape(self.cluster.url[len("http://"):])
        for family, (kind, labels) in families(page).items():
            if not family.startswith("vllm:"):
                continue
            self.assertIn("engine", labels)
            ours = "minke:" + family[len("vllm:"):]
            if "# TYPE %s " % ours not in page:
                continue
            for suffix in ("_count", "_sum", "_bucket") if kind == "histogram" else ("",):
                mine = re.findall(r"^%s%s\{(.*)\} (\S+)$" % (ours, suffix), page, re.M)
                theirs = re.findall(r"^%s%s\{(.*)\} (\S+)$" % (family, suffix), page, re.M)
                self.assertEqual(mine, [(labels.replace(',engine="0"', ""), value) for labels, value in theirs], family)
        self.assertGreater(total(page, "vllm:request_success_total", finished_reason="length"), 0)
        self.assertGreater(total(page, "vllm:prefix_cache_queries_total"), 0)

    def test_every_panel_has_data(self):
        queries = [(d["title"], p["title"], t["expr"]) for path in glob.glob(os.path.join(ROOT, "monitoring", "grafana", "dashboards", "*.json"))
                   for d in [json.loads(read(path))] for p in d["panels"] for t in p.get("targets", [])]
        self.assertGreaterEqual(len(queries), 30)
        asked = lambda expr: expr.replace("$cluster", NAME).replace("$__rate_interval", "10s")
        empty = lambda: [q for q in queries if not self.prometheus.has_data(asked(q[2]))]
        # Prompts come one after the other: a window of ten seconds may have none of a kind, the next one does.
        self.assertTrue(wait_until(lambda: not empty(), 15), "\n".join("%s: %s: %s" % q for q in empty()))
        # And of another cluster none: every query looks at the chosen one only.
        for dashboard, panel, expr in queries:
            if not re.fullmatch(r"\(?time\(\).*", expr):
                self.assertFalse(self.prometheus.query(asked(expr).replace('"%s"' % NAME, '"green"')), "%s: %s: %s" % (dashboard, panel, expr))

    def test_every_alert_and_rule_can_be_evaluated(self):
        groups = self.prometheus.get("/api/v1/rules")["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        self.assertEqual({r["name"] for r in rules if r["type"] == "alerting"}, set(alerts()))
        for rule in rules:
            self.assertEqual((rule["health"], rule.get("lastError", "")), ("ok", ""), rule["name"])
            expr = rule["query"]
            if rule["type"] == "recording":
                self.assertTrue(wait_until(lambda: self.prometheus.has_data(rule["name"]), 15), rule["name"])
                continue
            # With every threshold out of the way the alert has data: nothing it looks at is missing.
            always, thresholds = re.subn(r"(==|>) [\d.]+( \* [\d.]+)?", ">= -1", expr)
            self.assertGreater(thresholds, 0, expr)
            self.assertTrue(wait_until(lambda: self.prometheus.has_data(always), 15), "%s: %s" % (rule["name"], always))

    def test_heat_maps_show_every_layer_and_server(self):
        with open(os.path.join(MODEL, "config.json")) as f:
            config = json.load(f)
        layers = {str(layer) for layer in range(config["first_k_dense_replace"], config["num_hidden_layers"])}
        query = "sum by (layer, address) (layer_server:minke_expert_rows:rate1m)"
        # Servers are scraped one after the other: the last one's rates come last.
        wait_until(lambda: len(self.prometheus.query(query)) == 3 * len(layers), 15)
        series = self.prometheus.query(query)
        self.assertEqual({labels["layer"] for labels, _ in series}, layers)
        self.assertEqual(len({labels["address"] for labels, _ in series}), 3)
        self.assertEqual(len(series), 3 * len(layers))
        self.assertTrue(all(value > 0 for _, value in series))
        groups = self.prometheus.query("layer_group:minke_rows:rate1m")
        self.assertEqual(len(groups), config["n_group"] * len(layers))

    def up(self):
        return {labels["member"]: value for labels, value in self.prometheus.query('up{cluster="%s"}' % NAME)}

    def test_z_members_that_come_go_and_die_are_followed(self):
        """Last: it changes the cluster."""
        everybody = {"router", "expert 0", "expert 1", "expert 2", "attention 0", "gateway"}
        self.assertEqual(self.up(), dict.fromkeys(everybody, 1.0))
        scaled = run("scale", "attention", "2", "--port", str(self.cluster.port), timeout=100)
        self.assertEqual(scaled.returncode, 0, scaled.stderr)
        self.assertIn("attention 1", [member for member, _, _ in self.targets()])
        self.assertTrue(wait_until(lambda: self.up().get("attention 1") == 1, 15), self.up())
        scaled = run("scale", "attention", "1", "--port", str(self.cluster.port), timeout=100)
        self.assertEqual(scaled.returncode, 0, scaled.stderr)
        self.assertTrue(wait_until(lambda: "attention 1" not in [member for member, _, _ in self.targets()], 10), self.targets())
        self.assertTrue(wait_until(lambda: "attention 1" not in self.up(), 15), self.up())
        # A member that dies stays, down, and its alert begins; its peers count the lost connection, and what they took over.
        victim = self.cluster.pids("expert")[2]
        os.kill(victim, signal.SIGSTOP)   # so that it surely has rows
        time.sleep(0.5)
        os.kill(victim, signal.SIGKILL)
        self.assertTrue(wait_until(lambda: self.up().get("expert 2") == 0, 15), self.up())
        pending = 'ALERTS{alertname="MinkeProcessDown", member="expert 2"}'
        self.assertTrue(wait_until(lambda: self.prometheus.query(pending), 10))
        lost = lambda: [v for _, v in self.prometheus.query('sum(minke:ucx_errors_total{job="minke-attention"})')]
        self.assertTrue(wait_until(lambda: lost()[0] >= 1, 15), lost())
        for query in ('minke:failovers_total{kind="expert"} >= 1', "minke:redispatched_rows_total >= 1"):
            self.assertTrue(wait_until(lambda: self.prometheus.query(query), 10), query)
        # Its series by unit go to those who take over.
        three = "count(count by (server) (minke:expert_rows_total)) == 2"
        self.assertTrue(wait_until(lambda: self.prometheus.query(three), 20))


class DefaultTargetsFile(unittest.TestCase):
    def test_is_there_while_the_cluster_is(self):
        with Cluster(MODEL, "--threads=1", "--experts=1", "--supervise") as cluster:
            path = re.search(r"targets file (\S+)", cluster.log()).group(1)
            self.assertEqual(path, os.path.join(tempfile.gettempdir(), "minke-up-%d-%d.targets.json" % (os.getuid(), cluster.port)))
            address = lambda: {g["labels"]["member"]: g["targets"][0] for g in json.loads(read(path))}
            before = address()
            self.assertEqual(set(before), {"router", "expert 0", "attention 0", "gateway"})
            self.assertNotIn("vllm:", scrape(before["gateway"]))
            # A new life has a new port.
            os.kill(cluster.pids("expert")[0], 9)
            self.assertTrue(wait_until(lambda: address()["expert 0"] != before["expert 0"], 20), cluster.log())
            self.assertIn("minke:expert_rows_received_total", scrape(address()["expert 0"]))
        self.assertFalse(os.path.exists(path))

    def test_that_cannot_be_written_is_one_clear_error(self):
        result = run("up", MODEL, "--port", "0", "--threads=1", "--targets-file", "/nowhere/targets.json", timeout=60)
        self.assertGreater(result.returncode, 0)
        self.assertRegex(result.stderr.splitlines()[-1], r"--targets-file: cannot write /nowhere/targets.json: No such file or directory")


class OneProcess(unittest.TestCase):
    def test_minke_serve_shows_all_its_roles(self):
        with Cluster(MODEL, "--threads=1", verb="serve") as cluster:
            cluster.complete(prompt="ROMEO:", max_tokens=8, ignore_eos=True)
            page = scrape(cluster.url[len("http://"):])
        shown = families(page)
        for name in ("minke:time_to_first_token_seconds", "minke:step_seconds", "minke:fan_out_servers", "minke:expert_rows_total"):
            self.assertIn(name, shown)
        self.assertNotIn("minke:ucx_bytes_total", shown)
        self.assertEqual(total(page, "minke:generation_tokens_total"), 8)
        self.assertGreater(total(page, "minke:expert_rows_total"), 0)
        samples = re.findall(r"^([\w:]+(?:\{.*\})?) \S+$", page, re.M)
        self.assertEqual(len(samples), len(set(samples)), "series that are there twice")

    def test_an_attention_node_that_gates_by_itself_counts_where_rows_go(self):
        with Cluster(MODEL, "--threads=1", "--routing=local", verb="serve") as cluster:
            cluster.complete(prompt="ROMEO:", max_tokens=8, ignore_eos=True)
            page = scrape(cluster.url[len("http://"):])
        rows = total(page, "minke:dispatched_rows_total")
        self.assertGreater(rows, 0)
        self.assertEqual(total(page, "minke:router_rows_total"), 0)
        self.assertEqual(total(page, "minke:fan_out_servers_count"), rows)
        self.assertEqual(total(page, "minke:group_rows_total"), total(page, "minke:expert_rows_total"))
        with open(os.path.join(MODEL, "config.json")) as f:
            self.assertEqual(total(page, "minke:expert_selections_total"), rows * json.load(f)["num_experts_per_tok"])
        self.assertIn('minke:balance_factor{layer="1",kind="expert"}', page)


if __name__ == "__main__":
    harness.main()
