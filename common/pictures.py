"""Pictures of action chunks."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def draw_chunks(
    path: Path,
    chunks: np.ndarray,
    recorded: np.ndarray,
    names: Sequence[str],
    scale: np.ndarray,
    shares: Mapping[str, np.ndarray],
    title: str,
    most_dimensions: int = 15,
) -> None:
    """Several chunks for one observation, overlaid, and bars of how often each is taken.

    Args:
        path: the PNG to write, whole or not at all.
        chunks: (K, T, A) in recorded units. The more a chunk has of the first share, the stronger its line.
        recorded: (T, A), what was demonstrated.
        names: of the A dimensions.
        scale: of each dimension, (A,), how far it moves in the dataset.
        shares: named, each (K,) and summing to 1.
        title: of the picture.
        most_dimensions: draw no more dimensions than this, those in which the chunks differ most by `scale`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    spread = np.ptp(chunks, axis=0).max(axis=0) / scale
    dimensions = np.sort(np.argsort(-spread)[:most_dimensions])
    columns = min(5, len(dimensions) + 1)
    rows = math.ceil((len(dimensions) + 1) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 0.6 + 2.6 * rows), squeeze=False)
    colors = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(chunks)))
    first = next(iter(shares.values()))
    alphas = 0.25 + 0.75 * first / first.max()
    for axis, d in zip(axes.flat, dimensions, strict=False):
        for chunk, color, alpha in zip(chunks, colors, alphas, strict=True):
            axis.plot(chunk[:, d], color=color, alpha=alpha, lw=1.2)
        axis.plot(recorded[:, d], color="black", lw=1.5, ls="--", label="recorded")
        axis.set_title(names[d], fontsize=9)
        axis.tick_params(labelsize=7)
    axes.flat[0].legend(fontsize=7)
    for axis in axes.flat[len(dimensions) :]:
        axis.axis("off")
    bars = axes.flat[-1]
    bars.axis("on")
    width = 0.8 / len(shares)
    for n, (name, share) in enumerate(shares.items()):
        hatch = None if n == 0 else "////"
        at = np.arange(len(chunks)) + (n - (len(shares) - 1) / 2) * width
        bars.bar(at, share, width, color=colors, edgecolor="0.3", lw=0.4, hatch=hatch, label=name)
    bars.set_xticks(np.arange(len(chunks)), [str(k) for k in range(len(chunks))], fontsize=6)
    bars.set_title(" (plain), ".join(shares) + (" (hatched)" if len(shares) > 1 else ""), fontsize=9)
    bars.tick_params(axis="y", labelsize=7)
    figure.supxlabel("control steps", fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    temporary = path.with_suffix(".new.png")
    figure.savefig(temporary, dpi=100)
    plt.close(figure)
    temporary.replace(path)
