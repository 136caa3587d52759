"""Draw the alignment of every layer over a run: python examples/plot_history.py HISTORY.jsonl [FIGURE.png]

Needs matplotlib: pip install '.[report]'
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def plot(history: Path, figure: Path) -> None:
    """Draw a heat map of alignment: layers from left to right, measurements from top to bottom."""
    rows = [json.loads(line) for line in history.read_text("utf-8").splitlines()]
    layers = list(rows[0]["layers"])
    values = np.array(
        [[np.nan if row["layers"][layer]["alignment"] is None else row["layers"][layer]["alignment"] for layer in layers] for row in rows]
    )
    fig, axes = plt.subplots(figsize=(max(6.4, 0.6 * len(layers) + 1.6), 0.3 * len(rows) + 1.8), layout="constrained")
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(layers)), layers, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["step"] for row in rows])
    axes.set_ylabel("optimizer steps")
    for (step, layer), value in np.ndenumerate(values):
        dark = value < np.nanmean(values)
        axes.text(layer, step, f"{value:.3f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
    fig.colorbar(image, label="alignment")
    fig.savefig(figure, dpi=160)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".png")
    plot(source, target)
    print(target)
