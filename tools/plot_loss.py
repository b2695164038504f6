"""Draw the loss curves of a work dir: `python tools/plot_loss.py WORK_DIR -o curve.png` (needs matplotlib)."""

import argparse
import json
from pathlib import Path


def read(work_dir):
    """Return steps and losses of the training and validation lines, over all starts of the run."""
    curves = {"train": ([], []), "val": ([], [])}
    for path in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["mode"] in curves and "loss" in record:
                steps, losses = curves[record["mode"]]
                steps.append(record["step"])
                losses.append(record["loss"])
    return curves


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work_dir")
    parser.add_argument("-o", "--output", default="curve.png")
    parser.add_argument("--title", default="")
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), dpi=110)
    curves = read(arguments.work_dir)
    axes.plot(*curves["train"], color="#7aa6da", linewidth=1.2, label="training")
    axes.plot(*curves["val"], color="#c0392b", marker="o", markersize=4, linewidth=1.4, label="validation")
    for step, loss in zip(*curves["val"], strict=True):
        axes.annotate(f"{loss:.2f}", (step, loss), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
    axes.set(xlabel="iteration", ylabel="loss (nats per byte)", title=arguments.title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(arguments.output)


if __name__ == "__main__":
    main()
