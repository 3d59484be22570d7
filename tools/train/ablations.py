"""The two comparisons of docs/training.md, each a set of short equal runs over several seeds.

    ablations.py balance   --corpus FILE --out DIR     balance losses on and off; token dropping as well
    ablations.py attention --corpus FILE --out DIR     MHA, GQA, MQA, MLA at one parameter count

Writes DIR/balance.json or DIR/attention.json, which plot.py reads, and prints a table.
"""
import argparse
import dataclasses
import json
import os
import statistics

import model as models
from sweep import run_all
from train import read_recipe

HERE = os.path.dirname(os.path.abspath(__file__))
NO_LOSSES = ["train.alpha_expert=0", "train.alpha_device=0", "train.alpha_communication=0"]
NO_DROPPING = ["regularisation.capacity_factor=null"]
BALANCE_ARMS = {"none": NO_LOSSES + NO_DROPPING, "losses": NO_DROPPING, "losses+dropping": []}
FACTORS = ("B_exp", "B_dev", "B_comm", "fan_out", "expert_max_over_mean", "device_max_over_mean",
           "received_max_over_mean", "over_budget", "experts_unused")


def attention_arms(config):
    """Settings of each variant. What an attention saves in parameters goes to the always-on FFNs of all layers, as
    width, because that is the one size of the model that can be changed in small steps."""
    variants = {}
    for name in ("mha", "gqa", "mqa", "mla"):
        fields = {"attention": name, "num_key_value_heads": max(1, config.num_attention_heads // 4), "ffn_extra": 0}
        variants[name] = dataclasses.replace(config, **fields)
    counts = {name: models.count_parameters(c) for name, c in variants.items()}
    per_width = 3 * config.hidden_size * config.num_hidden_layers
    arms = {}
    for name, c in variants.items():
        extra = round((max(counts.values()) - counts[name]) / per_width)
        arms[name] = [f"model.attention={name}", f"model.num_key_value_heads={c.num_key_value_heads}",
                      f"model.ffn_extra={extra}"]
    return arms


def summarise(results):
    """Of the runs of one arm: losses with their spread, and the last step's balance per layer, mean over seeds."""
    best = [r["best"]["loss"] for r in results]
    last = [r["history"][-1]["live"] for r in results]
    spread = lambda x: statistics.stdev(x) if len(x) > 1 else 0.0
    layers = [{"layer": rows[0]["layer"], **{f: statistics.mean(row[f] for row in rows) for f in FACTORS}}
              for rows in zip(*(r["final_balance"] for r in results))]
    curve = [{"step": points[0]["step"], "loss": statistics.mean(p["live"] for p in points)}
             for points in zip(*(r["history"] for r in results))]
    return {"seeds": len(results), "parameters": results[0]["parameters"], "steps": results[0]["steps"],
            "tokens": results[0]["tokens"], "device": results[0]["device"],
            "kv_bytes_per_token": results[0]["kv_bytes_per_token"], "best_mean": statistics.mean(best),
            "best_spread": spread(best), "last_mean": statistics.mean(last), "last_spread": spread(last),
            "layers": layers, "curve": curve}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["balance", "attention"])
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--recipe", default=os.path.join(HERE, "recipes", "shakespeare.json"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--deadline", type=float)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    a = parser.parse_args()
    config, _, _ = read_recipe(a.recipe, a.set)
    arms = BALANCE_ARMS if a.what == "balance" else attention_arms(config)
    common = a.set + [f"train.steps={a.steps}", f"train.save_every={a.steps}", "train.eval_every=50"]
    runs = {f"{arm.replace('+', '-')}-{seed}": common + settings + [f"train.seed={seed}"]
            for seed in range(1, a.seeds + 1) for arm, settings in arms.items()}
    results = run_all(runs, a.corpus, os.path.join(a.out, a.what), a.recipe, a.parallel, a.deadline)
    summary = {}
    for arm in arms:
        prefix = arm.replace("+", "-") + "-"
        whole = [r for name, r in results.items() if name.rpartition("-")[0] + "-" == prefix and r["steps"] == a.steps]
        if whole:
            summary[arm] = summarise(whole)
    with open(os.path.join(a.out, a.what + ".json"), "w") as f:
        json.dump(summary, f, indent=1)
    for arm, s in summary.items():
        mean = lambda field: statistics.mean(layer[field] for layer in s["layers"])
        print(f"{arm:16} {s['seeds']} seeds, {s['parameters']} parameters, KV {s['kv_bytes_per_token']} B/token, best "
              f"{s['best_mean']:.4f} ± {s['best_spread']:.4f}, last {s['last_mean']:.4f} ± {s['last_spread']:.4f}, " +
              ", ".join(f"{field} {mean(field):.3f}" for field in FACTORS))


if __name__ == "__main__":
    main()
