"""The Helm chart: lints, fits the schemas, refuses values that it does not know, and renders what kustomize renders."""
import glob, json, os, re, tempfile, unittest

import yaml

import manifests
from manifests import DEPLOY, OVERLAYS, charted, command_of, complaints, find, flags_of, known_flags, kustomized, name_of, tool, workloads

CHART = os.path.join(DEPLOY, "helm", "minke")
# The values file that says what an overlay says.
VALUES = {"default": (), **{name: ("values-%s.yaml" % name,) for name in ("external-etcd", "gpu", "rdma", "autoscaling", "keda", "tls")}}


def comparable(o):
    """Without what the two tools write differently: Helm's own labels, what makes pods roll when settings change."""
    text = json.dumps(o)
    text = re.sub(r'"minke-cluster-[0-9a-z]{10}"', '"minke-cluster"', text)   # kustomize: a hash in the name; Helm: a checksum in the pods
    o = json.loads(text)
    for labels in [o["metadata"].get("labels", {})]:
        labels.pop("app.kubernetes.io/managed-by", None)
        labels.pop("helm.sh/chart", None)
        if o["kind"] == "NetworkPolicy":   # the chart names the component of every policy
            labels.pop("app.kubernetes.io/component", None)
    template = o.get("spec", {}).get("template", {})
    template.get("metadata", {}).get("annotations", {}).pop("checksum/cluster", None)
    for container in template.get("spec", {}).get("containers", []):   # the order of flags says nothing
        container["args"] = sorted(container["args"])
    return order(o)


def order(value):
    """Lists of peers in policies and selectors are sets."""
    if isinstance(value, dict):
        value = {k: order(v) for k, v in value.items()}
        if value.get("operator") == "In":
            value["values"] = sorted(value["values"])
        for key in ("policyTypes",):
            if key in value:
                value[key] = sorted(value[key])
        return value
    return [order(v) for v in value] if isinstance(value, list) else value


def template_fails(test, values):
    """What helm says about values that it must not take."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as f:
        yaml.safe_dump(values, f)
        f.flush()
        try:
            tool("helm", "template", "minke", CHART, "--namespace", "minke", "--values", f.name)
        except AssertionError as e:
            return str(e)
    test.fail("taken: %s" % values)


class Chart(unittest.TestCase):
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        manifests.install()

    def test_lint(self):
        for files in VALUES.values():
            out = tool("helm", "lint", "--strict", CHART, *[f for v in files for f in ("--values", os.path.join(CHART, v))])
            self.assertIn("0 chart(s) failed", out)
        self.assertEqual(sorted(os.path.basename(p) for p in glob.glob(CHART + "/values-*.yaml")), sorted(v for files in VALUES.values() for v in files))

    def test_renders_what_kustomize_renders(self):
        self.assertEqual(sorted(VALUES), OVERLAYS)
        for overlay, files in VALUES.items():
            ours = {name_of(o): o for o in map(comparable, kustomized(overlay)) if o["kind"] != "Namespace"}
            chart = {name_of(o): o for o in map(comparable, charted(*files))}
            self.assertEqual(sorted(chart), sorted(ours), overlay)
            for name in ours:
                self.assertEqual(chart[name], ours[name], "%s: %s" % (overlay, name))
        # The comparison itself: another overlay is another cluster.
        gpu, plain = (comparable(find(charted(*VALUES[o]), "StatefulSet", "minke-expert")) for o in ("gpu", "default"))
        self.assertNotEqual(gpu, plain)

    def test_fits_the_published_schemas_also_with_other_values(self):
        other = {"image": {"repository": "registry.example/minke", "tag": "1", "pullPolicy": "Always", "pullSecrets": [{"name": "pull"}]},
                 "gateway": {"args": ["--metrics-vllm-names"], "nodeSelector": {"kubernetes.io/arch": "amd64"},
                             "tolerations": [{"key": "spot", "operator": "Exists"}], "service": {"type": "LoadBalancer"},
                             "ingress": {"enabled": True, "className": "nginx", "host": "minke.example", "tlsSecret": "minke-tls"}},
                 "expert": {"replicas": 6, "args": ["--slots=40"], "tolerations": [{"key": "spot", "operator": "Exists"}]},
                 "checkpoint": {"volume": {"nfs": {"server": "10.0.0.9", "path": "/models/v2", "readOnly": True}}},
                 "etcd": {"storageClassName": "fast"}, "gpu": {"enabled": True, "count": 2}, "drainTimeoutSeconds": 600,
                 "tls": {"enabled": True, "name": "llm.internal", "etcdSecret": "etcd-client"}, "podMonitor": {"enabled": True}}
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as f:
            yaml.safe_dump(other, f)
            f.flush()
            objects = manifests.objects(tool("helm", "template", "blue", CHART, "--namespace", "llm", "--values", f.name))
        found = complaints({"other": objects, **{overlay: charted(*files) for overlay, files in VALUES.items()}})
        self.assertEqual({name: c for name, c in found.items() if c}, {})
        for o in objects:
            self.assertTrue(o["metadata"]["name"].startswith("blue"), name_of(o))
            self.assertEqual(o["metadata"]["namespace"], "llm")
        for workload in workloads(objects):
            command = command_of(objects, workload)
            if command[0] != "etcd":
                self.assertLessEqual(set(flags_of(command)), known_flags(command[0]))
                self.assertEqual(flags_of(command)["--etcd"], "blue-etcd:2379")
                self.assertEqual(workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"], 630)
                self.assertEqual((flags_of(command)["--tls-name"], flags_of(command)["--etcd-ca"]), ("llm.internal", "/etc/minke/etcd-tls/ca.crt"))
        monitor = find(objects, "PodMonitor", "blue-expert")["spec"]["podMetricsEndpoints"][0]
        self.assertEqual((monitor["scheme"], monitor["tlsConfig"]["serverName"]), ("https", "llm.internal"))
        router = flags_of(command_of(objects, find(objects, "Deployment", "blue-router")))
        self.assertEqual(router["--experts"], "6")
        expert = find(objects, "StatefulSet", "blue-expert")["spec"]["template"]["spec"]
        self.assertEqual(expert["containers"][0]["resources"]["limits"]["nvidia.com/gpu"], 2)
        self.assertEqual(len(expert["tolerations"]), 2)
        self.assertIn("--metrics-vllm-names", flags_of(command_of(objects, find(objects, "Deployment", "blue-gateway"))))

    def test_bad_values_are_one_clear_error(self):
        for values, expected in (({"expert": {"replica": 3}}, "replica"), ({"expert": {"replicas": "many"}}, "integer"),
                                 ({"autoscaling": {"kind": "magic"}}, "kind"), ({"precision": "fp8"}, "precision"),
                                 ({"gateway": {"args": ["threads=2"]}}, "pattern"), ({"etcd": {"enabled": False}}, "etcd.endpoints: expected"),
                                 ({"etcd": {"enabled": False, "endpoints": ["10.0.0.1:2379"]}}, "etcd.cidrs: expected"),
                                 ({"gateway": {"ingress": {"enabled": True}}}, "gateway.ingress.host: expected"), ({"tls": {"name": "Not A Name"}}, "pattern")):
            self.assertIn(expected, template_fails(self, values))

    def test_notes_say_what_is_missing(self):
        # `helm install --dry-run=client` shows them without a cluster.
        out = tool("helm", "install", "minke", CHART, "--namespace", "minke", "--dry-run=client")
        notes = out.split("NOTES:")[1]
        for word in ("minke-data-plane", "minke-api", "/health", "svc/minke-gateway 8000:80", "TLS"):
            self.assertIn(word, notes)


if __name__ == "__main__":
    unittest.main(verbosity=2)
