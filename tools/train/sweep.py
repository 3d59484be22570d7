"""Several training runs side by side on one GPU; the models are far too small to fill it one at a time.

    sweep.py RUNS.json --corpus FILE --out DIR [--recipe FILE] [--parallel 8] [--deadline 480] [--export 1]

RUNS.json: {"name": ["section.field=value", ...], ...}, laid over the recipe. Each run is a train.py of its own in
DIR/name and goes on from its checkpoint if called again; at the deadline (seconds) the rest are stopped and what they
have reached counts. Ends with a table, and exports the best runs to DIR/export-1, export-2, ...
"""
import argparse
import json
import os
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))


def run_all(runs, corpus, out, recipe=None, parallel=8, deadline=None, say=print):
    """runs: {name: [settings]} -> {name: result.json}; runs that ended without one are left out."""
    began, waiting, active, results = time.time(), list(runs.items()), {}, {}
    environment = dict(os.environ, TORCHINDUCTOR_COMPILE_THREADS="1", OMP_NUM_THREADS="2", PYTHONUNBUFFERED="1")
    while waiting or active:
        while waiting and len(active) < parallel:
            name, settings = waiting.pop(0)
            folder = os.path.join(out, name)
            os.makedirs(folder, exist_ok=True)
            command = [sys.executable, os.path.join(HERE, "train.py"), "--corpus", corpus, "--out", folder]
            command += ["--recipe", recipe] if recipe else []
            if deadline:
                left = deadline - (time.time() - began)
                if left < 30:
                    continue
                # Leaves time for the imports before the run's own clock starts, and for its last save.
                command += ["--stop-after", str(left - 20)]
            command += [word for setting in settings for word in ("--set", setting)]
            with open(os.path.join(folder, "stdout.txt"), "a") as log:
                active[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        time.sleep(0.5)
        for name, process in list(active.items()):
            if process.poll() is None and deadline and time.time() - began > deadline + 15:
                process.kill()
                process.wait()
            if process.poll() is None:
                continue
            del active[name]
            path = os.path.join(out, name, "result.json")
            if os.path.exists(path):
                with open(path) as f:
                    results[name] = json.load(f)
                best = results[name]["best"]
                say(f"{name}: {best['loss']:.4f} at step {best['step']} of {results[name]['steps']} ({best['which']}), "
                    f"{results[name]['seconds']:.0f} s of training, {time.time() - began:.0f} s in all", flush=True)
            else:
                with open(os.path.join(out, name, "stdout.txt")) as f:
                    say(f"{name}: exit status {process.returncode}\n" + f.read()[-1500:], flush=True)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--recipe")
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--deadline", type=float)
    parser.add_argument("--export", type=int, default=1)
    arguments = parser.parse_args()
    with open(arguments.runs) as f:
        runs = json.load(f)
    results = run_all(runs, arguments.corpus, arguments.out, arguments.recipe, arguments.parallel, arguments.deadline)
    order = sorted(results, key=lambda name: results[name]["best"]["loss"])
    for name in order:
        r = results[name]
        losses = [min(v for k, v in h.items() if k != "step") for h in r["history"]]
        every = max(1, len(losses) // 8)
        print(f"{r['best']['loss']:.4f} {name:14} {r['parameters'] / 1e6:5.2f} M  " +
              " ".join(f"{loss:.3f}" for loss in losses[every - 1::every]) + "  " + " ".join(runs[name]))
    for place, name in enumerate(order[:arguments.export], 1):
        subprocess.run([sys.executable, os.path.join(HERE, "export.py"), os.path.join(arguments.out, name),
                        os.path.join(arguments.out, f"export-{place}")], check=True)


if __name__ == "__main__":
    main()
