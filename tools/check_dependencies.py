#!/usr/bin/env python3
"""Holds the layers: which folder may include what. Run from anywhere; exit code 1 and one line per offence."""
import os, re, subprocess, sys

root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIBS = {  # what a library may use, beside itself and base
    "base": [], "collective": ["kernels"], "model": [], "wire": [], "telemetry": ["http", "tls"], "tokenizer": [], "tracing": ["telemetry"],
    "kernels": ["model"], "transport": ["wire"], "gpu_rows": ["kernels", "transport"], "cluster": ["model", "transport", "wire"], "tls": [], "http": ["tls"], "rpc": ["tls"],
    "etcd": ["rpc", "tls"], "registry": ["cluster", "etcd", "rpc", "tls"],
    "node": ["cluster", "gpu_rows", "kernels", "model", "registry", "telemetry", "tls", "transport", "wire"], "cuda_model": ["collective", "kernels", "model"],
}
ROUTER_PURE = ("services/router/placement/", "services/router/gating/", "services/router/dispatch/",
               "services/router/telemetry/")
HEADERS = {  # third-party headers that stay in one place
    r"^(ucp|uct|ucs)/": ("libs/transport/ucx/",),
    r"^grpcpp/": ("libs/rpc/", "libs/etcd/channels.h", "libs/registry/static_registry.cc", "services/gateway/api/", "services/gateway/attention_client/", "services/gateway/operator_client/", "services/attention/api/",
                  "services/router/api/", "tests/", "services/gateway/gateway", "cli/operator_socket.cc", "cli/health_command.cc"),
    r"^openssl/(ssl|x509|pem)": ("libs/tls/", "libs/http/stream.h", "cli/"),
    r"^spdlog/": ("libs/base/",),
    r"^(cuda|cublas|nv)": ("libs/kernels/cuda/", "bench/gpu/"),  # CUDA's own headers
    r"^nccl": ("libs/collective/nccl/",),
    r"^libs/collective/nccl/nccl_library\.h": ("libs/collective/nccl/",),  # it shows NCCL's types
    r"^libs/kernels/cuda/(check|tensor_map|\w+_kernels)\.h|\.cuh$": ("libs/kernels/cuda/",),  # they show CUDA's types
    r"^boost/": ("libs/http/", "libs/tracing/", "cli/", "tests/"),
}


def allowed(path, include):
    if include.startswith("proto/"):
        return True
    here, there = path.split("/"), include.split("/")
    if there[0] == "libs":
        if here[0] != "libs" or there[1] in ("base", here[1]):
            return True
        return there[1] in LIBS.get(here[1], []) or ("testing" in include or path.endswith("_test.cc")) and there[1] == "model"
    if there[0] == "services":
        if here[0] in ("cli", "tests", "bench", "tools"):
            return True
        if here[0] != "services":
            return False
        return here[1] == there[1] or (here[1] == "attention" and include.startswith(ROUTER_PURE))
    if there[0] in ("cli", "tests", "bench", "tools"):
        return here[0] == there[0] or there[0] == "cli" and here[0] == "tests"
    return True


bad = 0
files = subprocess.run(["git", "-C", root, "ls-files", "-co", "--exclude-standard", "*.h", "*.cc", "*.inc", "*.cu", "*.cuh"], capture_output=True, text=True).stdout.split()
for path in files:
    if not os.path.exists(os.path.join(root, path)):
        continue
    for number, line in enumerate(open(os.path.join(root, path), encoding="utf-8"), 1):
        found = re.match(r'\s*#include ["<]([^">]+)[">]', line)
        if not found:
            continue
        include = found.group(1)
        ok = allowed(path, include)
        for pattern, homes in HEADERS.items():
            ok = ok and (not re.match(pattern, include) or path.startswith(homes) or path.endswith("_test.cc")
                         or "/testing/" in path)
        if not ok:
            print(f"{path}:{number}: may not include {include}")
            bad = 1
sys.exit(bad)
