"""What deploy/ says is what Kubernetes, systemd and Minke's programs understand: schemas, flags, ports, probes, policies, units."""
import copy, glob, os, re, shlex, shutil, subprocess, tempfile, unittest

import yaml

from manifests import (DEPLOY, OVERLAYS, ROLES, command_of, complaints, find, flags_of, known_flags, kustomized, listens, name_of, settings, workloads)

PRIVILEGED = ("rdma",)   # overlays that "restricted" does not let in, as their comments say


def rendered():
    return {overlay: kustomized(overlay) for overlay in OVERLAYS}


def labels_match(selector, labels):
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for e in selector.get("matchExpressions") or []:
        assert e["operator"] == "In", e
        if labels.get(e["key"]) not in e["values"]:
            return False
    return True


def pod_labels(workload):
    return workload["spec"]["template"]["metadata"]["labels"]


def container_of(workload):
    container, = workload["spec"]["template"]["spec"]["containers"]
    return container


def program_ports(objects, workload):
    return listens(command_of(objects, workload), settings(objects, workload))


def listened(ports, port):
    return any(first <= port <= last for first, last in ports)


def port_number(container, port):
    """Of a port by number or by name."""
    if isinstance(port, int):
        return port
    number, = [p["containerPort"] for p in container["ports"] if p["name"] == port]
    return number


class Kubernetes(unittest.TestCase):
    def test_every_overlay_renders_and_fits_the_published_schemas(self):
        groups = rendered()
        self.assertEqual(sorted(groups), ["autoscaling", "default", "external-etcd", "gpu", "keda", "rdma", "tls"])
        # The check itself: an unknown field, a wrong type, a wrong quantity, a missing field, a wrong word are noticed.
        def broken(change):
            o = copy.deepcopy(find(groups["default"], "Deployment", "minke-gateway"))
            change(o["spec"]["template"]["spec"]["containers"][0])
            return [o]
        bad = {"unknown": broken(lambda c: c.update(readinessProb={})),
               "type": broken(lambda c: c["readinessProbe"].update(periodSeconds="2")),
               "quantity": broken(lambda c: c["resources"]["limits"].update(memory="4 Gigs")),
               "missing": broken(lambda c: c.pop("name")),
               "keda field": [dict(find(groups["keda"], "ScaledObject", "minke-expert"), specification={})]}
        found = complaints(dict(groups, **bad))
        for name in bad:
            self.assertTrue(found[name], "no complaint about: " + name)
        for name in groups:
            self.assertEqual(found[name], [], name)

    def test_no_object_twice_and_all_in_the_namespace(self):
        for overlay, objects in rendered().items():
            names = [name_of(o) for o in objects]
            self.assertEqual(sorted(names), sorted(set(names)), overlay)
            for o in objects:
                if o["kind"] != "Namespace":
                    self.assertEqual(o["metadata"]["namespace"], "minke", "%s %s" % (overlay, name_of(o)))

    def test_every_flag_is_known_to_its_program(self):
        for overlay, objects in rendered().items():
            for workload in workloads(objects):
                command = command_of(objects, workload)
                if command[0] == "etcd":
                    continue
                self.assertEqual(command[0], "minke-" + pod_labels(workload)["app.kubernetes.io/component"])
                unknown = set(flags_of(command)) - known_flags(command[0])
                self.assertEqual(unknown, set(), "%s %s" % (overlay, name_of(workload)))
                self.assertEqual([a for a in command if "$(" in a.replace("$(POD_IP)", "")], [], "%s %s: no such variable" % (overlay, name_of(workload)))
        self.assertNotIn("--no-such-flag", known_flags("minke-expert"))

    def test_probes_services_and_declared_ports_are_ports_on_which_the_program_listens(self):
        for overlay, objects in rendered().items():
            for workload in workloads(objects):
                where = "%s %s" % (overlay, name_of(workload))
                container, ports = container_of(workload), program_ports(objects, workload)
                for declared in container["ports"]:
                    self.assertTrue(listened(ports, declared["containerPort"]), "%s declares %s, listens on %s" % (where, declared, ports))
                for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                    if "exec" in container[probe]:
                        port = self.asked_by(container[probe]["exec"]["command"])[1]
                    else:
                        how = next(container[probe][k] for k in ("httpGet", "grpc", "tcpSocket") if k in container[probe])
                        port = port_number(container, how["port"])
                    self.assertTrue(listened(ports, port), "%s %s %s" % (where, probe, ports))
                annotations = workload["spec"]["template"]["metadata"].get("annotations", {})
                if "prometheus.io/port" in annotations:
                    self.assertTrue(listened(ports, int(annotations["prometheus.io/port"])), where)
            for service in (o for o in objects if o["kind"] == "Service"):
                behind = [w for w in workloads(objects) if service["spec"]["selector"].items() <= pod_labels(w).items()]
                self.assertEqual(len(behind), 1, "%s %s" % (overlay, name_of(service)))
                for port in service["spec"]["ports"]:
                    number = port_number(container_of(behind[0]), port["targetPort"])
                    self.assertTrue(listened(program_ports(objects, behind[0]), number), "%s %s %s" % (overlay, name_of(service), port))

    def asked_by(self, command):
        """(what, port) of a probe that runs `minke health`."""
        self.assertEqual(command[:2], ["minke", "health"])
        self.assertLessEqual(set(flags_of(command)), known_flags("minke", "health"))
        flags = flags_of(command)
        found = re.fullmatch(r"https://127\.0\.0\.1:(\d+)(/.*)", flags["--url"]) if "--url" in flags else None
        return (found.group(2), int(found.group(1))) if found else ("grpc", int(flags["--grpc"].split(":")[1]))

    def test_readiness_is_what_the_role_says_and_liveness_is_not(self):
        """A pod that loads or drains is not ready, but must not be killed for it."""
        for objects in rendered().values():
            for workload in workloads(objects):
                container, role = container_of(workload), pod_labels(workload)["app.kubernetes.io/component"]
                if role == "gateway":
                    self.assertEqual(container["readinessProbe"]["httpGet"]["path"], "/health")
                    self.assertEqual(container["livenessProbe"]["httpGet"]["path"], "/version")
                elif role != "etcd" and "exec" in container["readinessProbe"]:
                    self.assertEqual(self.asked_by(container["readinessProbe"]["exec"]["command"]), ("grpc", 7000))
                    self.assertEqual(self.asked_by(container["livenessProbe"]["exec"]["command"]), ("/metrics", 9100))
                elif role != "etcd":
                    self.assertEqual(container["readinessProbe"]["grpc"], {"port": 7000})
                    self.assertEqual(container["livenessProbe"]["httpGet"]["path"], "/metrics")

    def test_with_tls_every_port_has_a_certificate_that_is_mounted(self):
        objects = kustomized("tls")
        for workload in workloads(objects):
            container, role = container_of(workload), pod_labels(workload)["app.kubernetes.io/component"]
            flags = flags_of(command_of(objects, workload))
            secrets = {v["name"]: v["secret"]["secretName"] for v in workload["spec"]["template"]["spec"]["volumes"] if "secret" in v}
            mounted = {m["mountPath"]: secrets[m["name"]] for m in container["volumeMounts"] if m["name"] in secrets}
            secret_of = lambda flag, key: mounted[flags[flag][: -len(key) - 1]] if flags[flag].endswith("/" + key) else None
            if role == "etcd":
                self.assertEqual({secret_of(f, k) for f, k in (("--cert-file", "tls.crt"), ("--key-file", "tls.key"), ("--trusted-ca-file", "ca.crt"))}, {"minke-tls"})
                self.assertIn("--client-cert-auth", flags)
                self.assertTrue(flags["--listen-client-urls"].startswith("https://") and flags["--listen-peer-urls"].startswith("http://127.0.0.1:"))
                continue
            for prefix in ("--tls", "--etcd"):
                for what, key in (("-cert", "tls.crt"), ("-key", "tls.key"), ("-ca", "ca.crt")):
                    self.assertEqual(secret_of(prefix + what, key), "minke-tls", role)
            self.assertEqual(flags["--tls-name"], "minke.internal")
            self.assertEqual(workload["spec"]["template"]["metadata"]["annotations"]["prometheus.io/scheme"], "https")
            if role == "gateway":
                self.assertEqual((secret_of("--http-tls-cert", "tls.crt"), secret_of("--http-tls-key", "tls.key")), ("minke-http-tls",) * 2)
                self.assertEqual({container[p]["httpGet"]["scheme"] for p in ("startupProbe", "readinessProbe", "livenessProbe")}, {"HTTPS"})
            else:
                for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                    asks = flags_of(container[probe]["exec"]["command"])
                    self.assertEqual([asks["--name"], asks["--ca"], asks["--cert"], asks["--key"]],
                                     [flags["--tls-name"], flags["--tls-ca"], flags["--tls-cert"], flags["--tls-key"]])
        with open(os.path.join(DEPLOY, "kustomize", "components", "tls", "certificates.yaml")) as f:
            certificates = {o["spec"]["secretName"]: o["spec"] for o in yaml.safe_load_all(f) if o["kind"] == "Certificate"}
        self.assertEqual(certificates["minke-tls"]["dnsNames"], ["minke.internal", "minke-etcd"])
        self.assertLessEqual({"server auth", "client auth"}, set(certificates["minke-tls"]["usages"]))
        self.assertIn("minke-http-tls", certificates)

    def test_selectors_budgets_and_autoscalers_name_what_is_there(self):
        for overlay, objects in rendered().items():
            pools = workloads(objects)
            for workload in pools:
                self.assertTrue(labels_match(workload["spec"]["selector"], pod_labels(workload)), name_of(workload))
                if workload["kind"] == "StatefulSet":
                    find(objects, "Service", workload["spec"]["serviceName"])
                self.assertEqual(workload["spec"]["template"]["spec"]["serviceAccountName"], find(objects, "ServiceAccount", "minke")["metadata"]["name"])
            budgets = [o for o in objects if o["kind"] == "PodDisruptionBudget"]
            for role in ROLES:
                of_role = [w for w in pools if pod_labels(w)["app.kubernetes.io/component"] == role]
                self.assertEqual(len(of_role), 1)
                mine = [b for b in budgets if labels_match(b["spec"]["selector"], pod_labels(of_role[0]))]
                self.assertEqual([b["spec"]["maxUnavailable"] for b in mine], [1], "%s %s" % (overlay, role))
            scaled = [o["spec"]["scaleTargetRef"] for o in objects if o["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")]
            for target in scaled:
                self.assertNotIn("replicas", find(objects, target["kind"], target["name"])["spec"], "two masters of %s" % target)
            self.assertEqual(sorted(t["name"] for t in scaled), {"autoscaling": ["minke-attention", "minke-expert", "minke-gateway", "minke-router"],
                                                                 "keda": ["minke-attention", "minke-expert"]}.get(overlay, []))

    def test_the_first_placement_waits_for_no_more_servers_than_there_are(self):
        for overlay, objects in rendered().items():
            flags = flags_of(command_of(objects, find(objects, "Deployment", "minke-router")))
            pool = find(objects, "StatefulSet", "minke-expert")["spec"].get("replicas")
            for scaler in objects:
                if scaler["kind"] in ("HorizontalPodAutoscaler", "ScaledObject") and scaler["metadata"]["name"] == "minke-expert":
                    pool = scaler["spec"].get("minReplicas", scaler["spec"].get("minReplicaCount"))
            self.assertEqual(int(flags["--experts"]), pool, overlay)
            self.assertLess(int(flags["--replicas"]), pool, overlay)

    def test_a_pod_has_longer_to_end_than_a_drain_takes(self):
        for overlay, objects in rendered().items():
            for workload in workloads(objects):
                drain = flags_of(command_of(objects, workload)).get("--drain-timeout-s")
                if drain is None:
                    continue
                before = container_of(workload).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
                self.assertGreaterEqual(workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"], int(drain) + before + 10,
                                        "%s %s" % (overlay, name_of(workload)))

    def test_pods_are_what_restricted_namespaces_take(self):
        for overlay, objects in rendered().items():
            level = find(objects, "Namespace", "minke")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
            self.assertEqual(level, "privileged" if overlay in PRIVILEGED else "restricted")
            for workload in workloads(objects):
                where = "%s %s" % (overlay, name_of(workload))
                pod, container = workload["spec"]["template"]["spec"], container_of(workload)
                self.assertFalse(pod["automountServiceAccountToken"], where)
                self.assertTrue(pod["securityContext"]["runAsNonRoot"], where)
                self.assertEqual(pod["securityContext"]["seccompProfile"], {"type": "RuntimeDefault"}, where)
                self.assertFalse(container["securityContext"]["allowPrivilegeEscalation"], where)
                self.assertTrue(container["securityContext"]["readOnlyRootFilesystem"], where)
                self.assertEqual(container["securityContext"]["capabilities"]["drop"], ["ALL"], where)
                if overlay not in PRIVILEGED:
                    self.assertNotIn("add", container["securityContext"]["capabilities"], where)
                    self.assertNotIn("hostNetwork", pod, where)
                kinds = {k for v in pod.get("volumes", []) for k in v if k != "name"}
                self.assertLessEqual(kinds, {"secret", "emptyDir", "persistentVolumeClaim", "configMap"}, where)

    def test_secrets_are_files_and_only_for_those_who_need_them(self):
        for overlay, objects in rendered().items():
            for workload in workloads(objects):
                where, pod, container = "%s %s" % (overlay, name_of(workload)), workload["spec"]["template"]["spec"], container_of(workload)
                for e in container.get("env", []):
                    self.assertNotIn("secretKeyRef", e.get("valueFrom", {}), where)
                secrets = {v["name"]: v["secret"]["secretName"] for v in pod.get("volumes", []) if "secret" in v}
                role = pod_labels(workload)["app.kubernetes.io/component"]
                needs = {"gateway": ["minke-api"], "etcd": []}.get(role, ["minke-data-plane"])
                if overlay == "tls":
                    needs = needs + (["minke-http-tls"] if role == "gateway" else []) + ["minke-tls"]
                self.assertEqual(sorted(secrets.values()), needs, where)
                mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
                for flag, value in flags_of(command_of(objects, workload)).items():
                    if flag in ("--cluster-secret-file", "--api-key-file"):
                        self.assertTrue(any(value.startswith(mounts[name] + "/") for name in secrets), where)

    def test_accelerators_are_asked_for_where_the_overlay_says_so(self):
        for overlay, objects in rendered().items():
            for role in ("router", "attention", "expert"):
                workload = [w for w in workloads(objects) if pod_labels(w)["app.kubernetes.io/component"] == role][0]
                limits, flags = container_of(workload)["resources"]["limits"], flags_of(command_of(objects, workload))
                self.assertEqual("nvidia.com/gpu" in limits, role != "router" and overlay in ("gpu", "rdma"))
                self.assertEqual(flags.get("--device") == "cuda", "nvidia.com/gpu" in limits)
                self.assertEqual("rdma/hca" in limits, overlay == "rdma")
                self.assertEqual(flags.get("--transport") == "rdma", overlay == "rdma")


class Policies(unittest.TestCase):
    """Who may open which port, read from the policies: what is not allowed by both ends is closed."""

    PEERS = {("attention", "router"), ("router", "attention"), ("router", "expert"), ("expert", "router"), ("attention", "expert"),
             ("expert", "attention"), ("attention", "attention"), ("expert", "expert")}

    @staticmethod
    def allowed(objects):
        """{(from, to, first port, last port)} of roles; from "anyone" and "monitoring" too, to "outside"."""
        pods = {pod_labels(w)["app.kubernetes.io/component"]: pod_labels(w) for w in workloads(objects)}
        policies = [o for o in objects if o["kind"] == "NetworkPolicy"]
        ingress, egress = set(), set()

        def peers(entries):
            if entries is None:
                return {"anyone"} | set(pods)
            out = set()
            for peer in entries:
                if "namespaceSelector" in peer:
                    out.add(peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"])
                elif "ipBlock" in peer:
                    out.add("outside")
                else:
                    out |= {role for role, labels in pods.items() if labels_match(peer["podSelector"], labels)}
            return out

        for policy in policies:
            for role, labels in pods.items():
                if not labels_match(policy["spec"]["podSelector"], labels):
                    continue
                for rules, key, out in ((policy["spec"].get("ingress", []), "from", ingress), (policy["spec"].get("egress", []), "to", egress)):
                    for rule in rules:
                        for port in rule["ports"]:
                            span = (port["port"], port.get("endPort", port["port"]))
                            for peer in peers(rule.get(key)):
                                out.add((peer, role, *span) if key == "from" else (role, peer, *span))
        return (ingress & egress) | {e for e in ingress if e[0] in ("anyone", "monitoring")} | {e for e in egress if e[1] in ("outside", "kube-system")}

    def test_everything_is_closed_but_what_peers_need(self):
        for overlay, objects in rendered().items():
            deny = find(objects, "NetworkPolicy", "minke-default-deny")["spec"]
            self.assertEqual((deny["podSelector"], sorted(deny["policyTypes"])), ({}, ["Egress", "Ingress"]))
            roles = {pod_labels(w)["app.kubernetes.io/component"] for w in workloads(objects)}
            want = {("anyone", "gateway", 8000, 8000), ("gateway", "attention", 7000, 7000)}
            want |= {(a, b, *span) for a, b in self.PEERS for span in ((7001, 7001), (7002, 7017))}
            want |= {("monitoring", role, 9100, 9100) for role in ROLES if role != "gateway"}
            want |= {(role, "etcd" if "etcd" in roles else "outside", 2379, 2379) for role in ROLES}
            want |= {(role, "kube-system", 53, 53) for role in roles}
            self.assertEqual(self.allowed(objects), want, overlay)

    def test_every_open_port_is_listened_on(self):
        for overlay, objects in rendered().items():
            ports = {pod_labels(w)["app.kubernetes.io/component"]: program_ports(objects, w) for w in workloads(objects)}
            for _, to, first, last in self.allowed(objects):
                if to in ports:
                    self.assertIn((first, last), ports[to], overlay)


class Systemd(unittest.TestCase):
    UNITS = sorted(os.path.basename(p) for p in glob.glob(os.path.join(DEPLOY, "systemd", "*.service")))

    @staticmethod
    def environment(name="minke.env"):
        out = {}
        with open(os.path.join(DEPLOY, "systemd", "env", name)) as f:
            for line in f:
                if line.strip() and not line.startswith("#"):
                    key, value = line.rstrip("\n").split("=", 1)
                    out[key] = value
        return out

    @classmethod
    def command(cls, unit, instance="0", environment=None):
        """ExecStart as systemd would split it: ${X} is one word, $X as many as it has."""
        with open(os.path.join(DEPLOY, "systemd", unit)) as f:
            line = re.search(r"^ExecStart=((?:.*\\\n)*.*)$", f.read(), re.M).group(1).replace("\\\n", " ")
        values = dict(cls.environment(), **(environment or {}))
        line = line.replace("%i", instance).replace("%d", "/run/credentials/unit")
        words = []
        for word in shlex.split(line):
            whole = re.fullmatch(r"\$(\w+)", word)
            words += values[whole.group(1)].split() if whole else [re.sub(r"\$\{(\w+)\}", lambda m: values[m.group(1)], word)]
        return words

    def setUp(self):
        self.directory = tempfile.mkdtemp(prefix="minke-units-")
        self.addCleanup(shutil.rmtree, self.directory)
        shutil.copytree(os.path.join(DEPLOY, "systemd"), self.directory, dirs_exist_ok=True)
        # Where a package would put the programs and the settings.
        for unit in self.UNITS:
            path = os.path.join(self.directory, unit)
            with open(path) as f:
                text = f.read()
            with open(path, "w") as f:
                f.write(text.replace("/usr/local/bin/", os.environ.get("MINKE_BIN", os.path.join(os.path.dirname(DEPLOY), "build", "bin")) + "/"))

    def analyze(self, *arguments):
        return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60,
                              env=dict(os.environ, SYSTEMD_UNIT_PATH=self.directory + ":"))

    def names(self):
        return ["minke.target"] + [u.replace("@.", "@3.") for u in self.UNITS]

    def test_units_are_sound(self):
        self.assertEqual(self.UNITS, ["minke-attention@.service", "minke-expert@.service", "minke-gateway.service", "minke-router.service"])
        result = self.analyze("verify", "--man=no", *self.names())
        ours = [line for line in (result.stdout + result.stderr).splitlines() if "minke" in line]
        self.assertEqual((result.returncode, ours), (0, []))
        with open(os.path.join(self.directory, "minke-router.service"), "a") as f:
            f.write("\n[Service]\nNoNewPriviledges=yes\n")
        result = self.analyze("verify", "--man=no", "minke-router.service")
        self.assertIn("NoNewPriviledges", result.stderr, "verify notices nothing")

    def test_services_are_confined(self):
        for unit in self.names()[1:]:
            result = self.analyze("security", "--offline=true", "--no-pager", "--threshold=25", unit)   # 2.5 of 10
            self.assertEqual(result.returncode, 0, result.stdout[-400:] + result.stderr)

    def test_what_services_need_is_not_taken_from_them(self):
        with open(os.path.join(self.directory, "minke-.service.d", "common.conf")) as f:
            lines = [line.strip() for line in f if not line.startswith("#")]
        self.assertIn("LimitMEMLOCK=infinity", lines)                    # registered memory, huge pages
        for taken in ("PrivateIPC=yes", "MemoryDenyWriteExecute=yes", "PrivateDevices=yes", "DynamicUser=yes", "RemoveIPC=yes", "PrivateNetwork=yes"):
            self.assertNotIn(taken, lines)
        stop, = [int(line.split("=")[1]) for line in lines if line.startswith("TimeoutStopSec=")]
        for unit in self.UNITS:
            self.assertGreater(stop, int(flags_of(self.command(unit))["--drain-timeout-s"]), unit)

    def test_every_flag_is_known_and_secrets_are_credentials(self):
        etcd = {"MINKE_ROUTER_REGISTRY": "--registry=etcd --etcd=10.0.0.6:2379", "MINKE_MEMBER_REGISTRY": "--registry=etcd --etcd=10.0.0.6:2379"}
        for unit in self.UNITS:
            with open(os.path.join(self.directory, "env", "minke.env")) as f:
                tls = dict(line[1:].strip().split("=", 1) for line in f if re.match("#MINKE_(HTTP_)?TLS=", line))
            self.assertEqual(sorted(tls), ["MINKE_HTTP_TLS", "MINKE_TLS"])
            for more in ({}, etcd, tls, self.environment("expert-1.env") if "expert" in unit else {}):
                command = self.command(unit, environment=more)
                unknown = set(flags_of(command)) - known_flags(os.path.basename(command[0]))
                self.assertEqual(unknown, set(), unit)
            with open(os.path.join(self.directory, unit)) as f:
                text = f.read()
            for name in re.findall(r"%d/(\S+)", text):
                self.assertIn("LoadCredential=%s:" % name, text, unit)

    def test_services_of_one_host_share_no_port(self):
        used = []
        for unit in self.UNITS:
            for instance in ("0", "9") if "@" in unit else ("0",):
                flags = flags_of(self.command(unit, instance))
                used += [flags[f].rsplit(":", 1)[-1] for f in ("--listen", "--http-listen", "--metrics-listen", "--ucx-port") if f in flags]
        self.assertEqual(len(used), len(set(used)), sorted(used))
        self.assertFalse([p for p in used if 7300 <= int(p) <= 7399], "in UCX_TCP_PORT_RANGE")


class Compose(unittest.TestCase):
    def setUp(self):
        with open(os.path.join(DEPLOY, "compose", "compose.yaml")) as f:
            self.file = yaml.safe_load(f)
        with open(os.path.join(DEPLOY, "compose", "tls.yaml")) as f:
            self.tls = yaml.safe_load(f)

    def words(self, service, tls=False):
        over = self.tls["services"][service] if tls else {}
        command = over.get("command", self.file["services"][service]["command"])
        if command[0] != "sh":
            return command
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", command[2]).removeprefix("exec ").replace("$$(hostname -i)", "ADDRESS")
        for name, value in {**self.file["services"][service]["environment"], **over.get("environment", {})}.items():
            text = text.replace("$$" + name, value)
        return shlex.split(text)

    def test_every_flag_is_known_to_its_program(self):
        self.assertEqual(sorted(self.file["services"]), sorted((*ROLES, "etcd")))
        for role in ROLES:
            command = self.words(role)
            self.assertEqual(command[0], "minke-" + role)
            self.assertEqual(set(flags_of(command)) - known_flags(command[0]), set(), role)
            self.assertEqual([a for a in command if "$" in a], [], role)

    def test_with_tls_every_certificate_is_mounted(self):
        self.assertEqual(sorted(self.tls["services"]), sorted(self.file["services"]))
        for name, service in self.tls["services"].items():
            command = self.words(name, tls=True)
            mounted = [v.split(":")[-2] for v in service["volumes"]]
            settings = service["environment"] if name == "etcd" else flags_of(command)
            files = {f: v for f, v in settings.items() if v.startswith("/etc/minke/tls/")}
            self.assertEqual(len(files), {"etcd": 3, "gateway": 8}.get(name, 6), name)
            for value in files.values():
                self.assertIn(os.path.dirname(value), mounted, name)
            if name == "etcd":
                self.assertEqual(settings["ETCD_CLIENT_CERT_AUTH"], "true")
                self.assertEqual({k: v.replace("https:", "http:") for k, v in settings.items() if "_URLS" in k}, self.file["services"]["etcd"]["environment"])
            else:
                self.assertEqual(set(flags_of(command)) - known_flags(command[0]), set(), name)
                self.assertEqual([a for a in command if a not in self.words(name) and not a.startswith(("--tls-", "--etcd-", "--http-tls-"))], [], name)

    def test_only_the_gateway_is_published_and_on_loopback(self):
        for name, service in self.file["services"].items():
            if name == "gateway":
                self.assertEqual(service["ports"], ["127.0.0.1:${MINKE_PORT:-8000}:8000"])
                self.assertIn((8000, 8000), listens(self.words(name), {}))
            else:
                self.assertNotIn("ports", service)

    def test_containers_have_longer_to_end_than_a_drain_takes(self):
        for role in ROLES:
            grace = int(self.file["services"][role]["stop_grace_period"].removesuffix("s"))
            self.assertGreater(grace, int(flags_of(self.words(role))["--drain-timeout-s"]))

    def test_volumes_and_secrets_are_declared(self):
        for name, service in self.file["services"].items():
            for secret in service.get("secrets", []):
                self.assertIn(secret, self.file["secrets"])
            files = [v for f, v in flags_of(self.words(name)).items() if f.endswith("-file")]
            self.assertEqual(files, ["/run/secrets/" + s for s in service.get("secrets", [])], name)
        self.assertEqual(self.file["services"]["expert"]["deploy"]["replicas"], "${MINKE_EXPERTS:-%s}" % flags_of(self.words("router"))["--experts"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
