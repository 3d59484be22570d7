"""The dashboards are what their generator writes, and what Grafana's published schema package (@grafana/schema, pinned by
package-lock.json) says a dashboard is."""
import copy, filecmp, glob, json, os, re, subprocess, sys, tempfile, unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "support"))
import npm

ROOT = os.path.dirname(os.path.dirname(HERE))
GRAFANA = os.path.join(ROOT, "monitoring", "grafana")
DASHBOARDS = sorted(glob.glob(os.path.join(GRAFANA, "dashboards", "*.json")))
# Outlives the test, so that packages are fetched once.
NPM = os.environ.get("MINKE_NPM_DIR", os.path.join(tempfile.gettempdir(), "minke-monitoring-npm-%d" % os.getuid()))


def load(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def errors_of(dashboards):
    """Complaints of tsc by name, for dashboards by name."""
    for old in glob.glob(os.path.join(NPM, "case_*.ts")):
        os.remove(old)
    for name, content in dashboards.items():
        with open(os.path.join(NPM, "case_%s.ts" % name), "w", encoding="utf-8") as f:
            f.write('import type { DashboardJson, Panels } from "./dashboard_types";\n')
            for i, panel in enumerate(content["panels"]):
                f.write("const panel%d: Panels[%s] = %s;\n" % (i, json.dumps(panel["type"]), json.dumps(panel, indent=1)))
            whole = json.dumps(dict(content, panels=[]), indent=1)[:-2] + ',\n "panels": [%s]\n}' % ", ".join(
                "panel%d" % i for i in range(len(content["panels"])))
            f.write("export const dashboard: DashboardJson = %s;\n" % re.sub(r'\n "panels": \[\],', "", whole, count=1))
    result = subprocess.run(["node", "node_modules/typescript/bin/tsc", "-p", ".", "--pretty", "false"], cwd=NPM, capture_output=True, text=True, timeout=180)
    out = {name: [] for name in dashboards}
    for line in result.stdout.splitlines():
        found = re.match(r"(\S+?)\(\d+,\d+\): error (.*)", line)
        if found is None:
            if out and not line.startswith(" "):
                raise AssertionError(result.stdout + result.stderr)
            continue
        name = re.sub(r"^case_|\.ts$", "", found.group(1))
        out.setdefault(name, []).append(found.group(2))   # of a file that is no case: the types themselves are wrong
    if result.returncode != 0 and not any(out.values()):
        raise AssertionError(result.stdout + result.stderr)
    return out


class Dashboards(unittest.TestCase):
    def test_are_what_the_generator_writes(self):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, os.path.join(GRAFANA, "make_dashboards.py"), folder], check=True, timeout=60)
            self.assertEqual(sorted(os.listdir(folder)), [os.path.basename(p) for p in DASHBOARDS])
            for path in DASHBOARDS:
                self.assertTrue(filecmp.cmp(path, os.path.join(folder, os.path.basename(path)), shallow=False),
                                "%s: run monitoring/grafana/make_dashboards.py" % os.path.basename(path))

    def test_are_four_with_names_of_their_own_and_enough_queries(self):
        loaded = [load(path) for path in DASHBOARDS]
        self.assertEqual({d["title"] for d in loaded}, {"Minke: Serving", "Minke: Expert balance", "Minke: Data plane", "Minke: Capacity and scaling"})
        self.assertEqual(len({d["uid"] for d in loaded}), 4)
        queries = [t["expr"] for d in loaded for p in d["panels"] for t in p.get("targets", [])]
        self.assertGreaterEqual(len(queries), 30)
        for d in loaded:
            variables = {v["name"] for v in d["templating"]["list"]}
            self.assertEqual(variables, {"datasource", "cluster"})
            for p in d["panels"]:
                for t in p.get("targets", []):
                    self.assertEqual(t["datasource"], {"type": "prometheus", "uid": "${datasource}"}, p["title"])
                    self.assertIn('cluster=~"$cluster"', t["expr"], p["title"])

    def test_panels_do_not_overlap(self):
        for path in DASHBOARDS:
            taken = {}
            for p in load(path)["panels"]:
                g = p["gridPos"]
                self.assertLessEqual(g["x"] + g["w"], 24, p["title"])
                for x in range(g["x"], g["x"] + g["w"]):
                    for y in range(g["y"], g["y"] + g["h"]):
                        self.assertNotIn((x, y), taken, "%s over %s" % (p["title"], taken.get((x, y))))
                        taken[x, y] = p["title"]

    def test_are_dashboards_by_grafanas_schema(self):
        npm.install(HERE, NPM, ("tsconfig.json", "dashboard_types.ts"))
        cases = {os.path.basename(path)[:-len(".json")]: load(path) for path in DASHBOARDS}
        good = set(cases)
        # What the types must find, or they prove nothing.
        def broken(name, change):
            cases[name] = copy.deepcopy(load(DASHBOARDS[-1]))
            change(cases[name], next(p for p in cases[name]["panels"] if p["type"] == "timeseries"))
        broken("no_version", lambda d, p: d.pop("schemaVersion"))
        broken("unknown_panel", lambda d, p: p.update(type="timeserie"))
        broken("unknown_option", lambda d, p: p["options"].update(legendary=True))
        broken("wrong_enum", lambda d, p: p["options"]["legend"].update(placement="middle"))
        broken("wrong_type", lambda d, p: p["fieldConfig"]["defaults"].update(unit=7))
        broken("no_query", lambda d, p: p["targets"][0].pop("expr"))
        broken("other_panels_options", lambda d, p: p.update(options=next(q for q in d["panels"] if q["type"] == "stat")["options"]))
        errors = errors_of(cases)
        for name, found in errors.items():
            if name in good or name not in cases:
                self.assertEqual(found, [], name)
            else:
                self.assertNotEqual(found, [], name)


if __name__ == "__main__":
    unittest.main(verbosity=2)
