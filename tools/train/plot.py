"""Draws docs/training/balance.png from the summary that `ablations.py balance` writes.

    plot.py DIR/balance.json docs/training/balance.png
"""
import argparse
import json

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend without a screen)

STYLE = {"none": ("#c0392b", "no balance losses"), "losses": ("#2471a3", "balance losses"),
         "losses+dropping": ("#1e8449", "balance losses and token dropping")}
PANELS = (("B_exp", "expert factor $B_{exp}$ (1 = even)"), ("B_dev", "device factor $B_{dev}$ (1 = even)"),
          ("device_max_over_mean", "busiest device / mean"), ("expert_max_over_mean", "busiest expert / mean"),
          ("fan_out", "devices per token (limit 3)"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summary")
    parser.add_argument("picture")
    arguments = parser.parse_args()
    with open(arguments.summary) as f:
        summary = json.load(f)
    figure, axes = plt.subplots(2, 3, figsize=(11.5, 6.2))
    axes = axes.ravel()
    for arm, s in summary.items():
        colour, label = STYLE[arm]
        axes[0].plot([p["step"] for p in s["curve"]], [p["loss"] for p in s["curve"]], color=colour, label=label)
        layers = [row["layer"] for row in s["layers"]]
        for axis, (field, title) in zip(axes[1:], PANELS):
            axis.plot(layers, [row[field] for row in s["layers"]], "o-", color=colour)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("layer", fontsize=9)
            axis.set_xticks(layers)
            if field == "fan_out":
                axis.set_ylim(2.5, 3.05)  # all arms lie close to the limit; a tight axis would magnify noise
    axes[0].set_title("validation loss, nats per character", fontsize=10)
    axes[0].set_xlabel("step", fontsize=9)
    lowest = min(p["loss"] for s in summary.values() for p in s["curve"])
    axes[0].set_ylim(lowest - 0.03, lowest + 0.5)
    axes[0].legend(fontsize=8, frameon=False)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    any_arm = next(iter(summary.values()))
    figure.suptitle(f"DeepSeekMoE balance losses, measured small: {any_arm['parameters'] / 1e6:.1f} M parameters, "
                    f"{any_arm['steps']} steps, mean of {any_arm['seeds']} seeds, on held-out text", fontsize=11)
    figure.tight_layout()
    figure.savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
