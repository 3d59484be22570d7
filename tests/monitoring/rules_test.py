"""Prometheus' configuration, recording rules and alerts, by Prometheus' own tools."""
import os, re, subprocess, tempfile, unittest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
PROMETHEUS = os.path.join(ROOT, "monitoring", "prometheus")


def read(*path):
    with open(os.path.join(*path), encoding="utf-8") as f:
        return f.read()


def alerts():
    """Text of each alert's entry by name."""
    parts = re.split(r"^ +- alert: (\w+)$", read(PROMETHEUS, "rules", "alerts.yml"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


class Rules(unittest.TestCase):
    def promtool(self, *arguments):
        result = subprocess.run(["promtool", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        return result.stdout

    def test_configuration_and_rules_are_valid(self):
        self.promtool("check", "config", os.path.join(PROMETHEUS, "prometheus.yml"))
        for name in ("recording.yml", "alerts.yml"):
            self.promtool("check", "rules", os.path.join(PROMETHEUS, "rules", name))

    def test_alerts_fire_where_they_should_and_only_there(self):
        files = [os.path.join(HERE, name) for name in ("alerts_test.yml", "error_budget_test.yml")]
        self.promtool("test", "rules", *files)
        cases = [case for path in files for case in re.split(r"^  - name: ", read(path), flags=re.M)[1:]]
        for alert in alerts():
            mine = [case for case in cases if "alertname: %s\n" % alert in case]
            self.assertTrue(any("exp_labels" in case for case in mine), "no test makes %s fire" % alert)
            self.assertTrue(any("exp_alerts: []" in case for case in mine), "no test has %s silent" % alert)

    def test_a_wrong_threshold_would_be_found(self):
        """The unit tests tell rules apart: with every threshold a hundred times as high nothing fires."""
        with tempfile.TemporaryDirectory() as folder:
            for name in ("recording.yml", "alerts.yml"):
                text = read(PROMETHEUS, "rules", name)
                if name == "alerts.yml":
                    text = re.sub(r"(expr: .*> )([\d.]+)", lambda m: m.group(1) + str(float(m.group(2)) * 100 + 100), text)
                with open(os.path.join(folder, name), "w") as f:
                    f.write(text)
            with open(os.path.join(folder, "test.yml"), "w") as f:
                head, *cases = re.split(r"^(?=  # .*\n  - name: )", read(HERE, "alerts_test.yml"), flags=re.M)
                some = [case for case in cases if re.search("name: \"Minke(HotGroup|GatewayNearlyFull) ", case)]
                self.assertEqual(len(some), 4)
                f.write(head.replace("../../monitoring/prometheus/rules/", folder + "/") + "".join(some))
            result = subprocess.run(["promtool", "test", "rules", os.path.join(folder, "test.yml")], capture_output=True, text=True, timeout=120)
            self.assertNotEqual(result.returncode, 0)
            for alert in ("MinkeHotGroup", "MinkeGatewayNearlyFull"):
                self.assertIn("name: %s fires" % alert, result.stdout + result.stderr)

    def test_every_alert_has_a_section_in_a_runbook(self):
        sections = set()
        for alert, text in alerts().items():
            path, anchor = re.search(r"runbook_url: (\S+)#(\S+)", text).groups()
            self.assertEqual(anchor, alert.lower())
            runbook = read(ROOT, path)
            found = re.search(r"^## %s\n(.*?)(?=^## |\Z)" % alert, runbook, re.M | re.S)
            self.assertIsNotNone(found, "%s has no section %s" % (path, alert))
            for part in ("**Means.**", "**Look at.**", "**Do.**"):
                self.assertIn(part, found.group(1), alert)
            sections.add(alert)
        folder = os.path.join(ROOT, "docs", "runbooks")
        written = {name for file in os.listdir(folder) if file != "README.md"
                   for name in re.findall(r"^## (\w+)$", read(folder, file), re.M)}
        self.assertEqual(written, sections, "sections of alerts that are not there")


if __name__ == "__main__":
    unittest.main(verbosity=2)
