"""Pictures of action chunks, features and latents."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.console import say


def save_figure(figure, path: Path, dpi: int = 100) -> None:
    """Write a figure as PNG, whole or not at all. A full disk costs the picture, not the run."""
    from matplotlib import pyplot as plt

    temporary = path.with_suffix(".new.png")
    try:
        figure.savefig(temporary, dpi=dpi)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        say(f"warning: {path} is not drawn ({error.strerror or error})")
    finally:
        plt.close(figure)


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
    save_figure(figure, path)


def draw_features(
    path: Path, images: np.ndarray, features: np.ndarray, grid: tuple[int, int], title: str
) -> None:
    """Images, and below each its features: their first three principal components as red, green and blue.

    What has the same colour looks the same to the network that made the features.

    Args:
        images: (B, 3, H, W) uint8.
        features: (B, L, D), L tokens row by row.
        grid: rows and columns of the tokens.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    _, _, directions = np.linalg.svd(flat, full_matrices=False)
    colors = np.zeros((len(flat), 3))
    components = flat @ directions[:3].T  # fewer than three if there are fewer tokens or features
    low, high = np.quantile(components, [0.01, 0.99], axis=0)
    colors[:, : components.shape[1]] = ((components - low) / np.maximum(high - low, 1e-9)).clip(0, 1)
    colors = colors.reshape(len(images), *grid, 3)
    figure, axes = plt.subplots(2, len(images), figsize=(2 * len(images), 4.4), squeeze=False)
    extent = (0, images.shape[-1], images.shape[-2], 0)
    for column, (image, color) in enumerate(zip(images, colors, strict=True)):
        axes[0, column].imshow(image.transpose(1, 2, 0), extent=extent)
        axes[1, column].imshow(color, extent=extent)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("camera")
    axes[1, 0].set_ylabel("features")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    save_figure(figure, path)


def draw_latents(path: Path, latents: np.ndarray, labels: Mapping[str, np.ndarray], title: str) -> None:
    """Latents in the plane of their first two principal components, once for each labelling.

    Args:
        latents: (N, D).
        labels: named, each (N,) small integers.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    centred = latents - latents.mean(axis=0)
    _, spread, directions = np.linalg.svd(centred.astype(np.float64), full_matrices=False)
    plane = np.zeros((len(latents), 2))
    plane[:, : min(2, len(directions))] = centred @ directions[:2].T
    explained = (spread**2)[:2].sum() / max((spread**2).sum(), 1e-12)
    figure, axes = plt.subplots(1, len(labels), figsize=(5 * len(labels), 4.6), squeeze=False)
    for axis, (name, values) in zip(axes[0], labels.items(), strict=True):
        for value in np.unique(values):
            chosen = plane[values == value]
            axis.scatter(*chosen.T, s=14, color=f"C{value % 10}", label=str(value), alpha=0.8)
        axis.set_title(f"by {name}", fontsize=10)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
    figure.suptitle(f"{title} ({100 * explained:.0f} % of the variance)", fontsize=10)
    figure.tight_layout()
    save_figure(figure, path)


def draw_reconstructions(
    path: Path, images: np.ndarray, decoded: np.ndarray, chunks: np.ndarray, decoded_chunks: np.ndarray
) -> None:
    """Images and action chunks, each with its reconstruction: a column for each sample.

    Args:
        images, decoded: (B, 3, H, W) in [0, 1].
        chunks, decoded_chunks: (B, T, A), normalized; NaN is not drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, len(images), figsize=(2.1 * len(images), 6.4), squeeze=False, sharey="row")
    columns = zip(axes.T, images, decoded, chunks, decoded_chunks, strict=True)
    for column, image, output, chunk, chunk_output in columns:
        column[0].imshow(image.transpose(1, 2, 0))
        column[1].imshow(output.transpose(1, 2, 0))
        for axis in column[:2]:
            axis.set(xticks=[], yticks=[])
        for d in range(chunk.shape[1]):
            # Markers, since a chunk can have a single action: at the end of an episode, or all of them.
            style = {"color": f"C{d % 10}", "lw": 1.2, "marker": ".", "ms": 3}
            column[2].plot(chunk[:, d], **style)
            column[2].plot(chunk_output[:, d], ls="--", **style)
        column[2].tick_params(labelsize=6)
    for axis, label in zip(
        axes[:, 0], ("image", "reconstruction", "actions (dashed: reconstruction)"), strict=True
    ):
        axis.set_ylabel(label, fontsize=8)
    figure.tight_layout()
    save_figure(figure, path, dpi=90)


def draw_scores(
    path: Path, pointwise: np.ndarray, scores: np.ndarray, examples: Mapping[str, np.ndarray]
) -> None:
    """Distribution of contributions to a mutual information, scores of episodes, and how some begin.

    Args:
        pointwise: contributions of steps, (N,), nats; NaN is left out.
        scores: of episodes, (E,), nats.
        examples: titled first frames, (3, H, W) uint8, best to worst.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(11, 5.4))
    top = figure.add_gridspec(1, 2, bottom=0.42, top=0.93, left=0.06, right=0.98)
    steps, episodes = (figure.add_subplot(top[0, n]) for n in (0, 1))
    steps.hist(pointwise[~np.isnan(pointwise)], bins=60, color="C0")
    steps.set_title("contributions of steps, nats", fontsize=10)
    episodes.plot(np.sort(scores)[::-1], marker=".", ms=3, color="C1")
    episodes.set_title("scores of episodes, best to worst, nats", fontsize=10)
    episodes.grid(alpha=0.3)
    row = figure.add_gridspec(1, len(examples), bottom=0.03, top=0.3, left=0.02, right=0.98)
    for n, (title, image) in enumerate(examples.items()):
        axis = figure.add_subplot(row[0, n])
        axis.imshow(image.transpose(1, 2, 0))
        axis.set_title(f"episode {title}", fontsize=7)
        axis.axis("off")
    save_figure(figure, path)


import json
from contextlib import suppress


def read_lines(path):
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and "step" in line and "split" in line:
                lines.append(line)
    return lines


_read = read_lines


def draw_curves(path: Path, picture: Path) -> None:
    """Draw metrics.jsonl: loss, held-out error, gradient norms, learning rates, speed.

    What a method logs besides, named `group/name`, gets a panel for each group, held-out metrics with dots.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = _read(path)
    train = [line for line in lines if line["split"] == "train"]
    val = [line for line in lines if line["split"] == "val"]
    if not train:
        return
    groups: dict[str, list[str]] = {}
    for name in sorted({key for line in lines for key in line if "/" in key}):
        groups.setdefault(name.split("/")[0], []).append(name)
    norms, rates = groups.pop("grad_norm", []), groups.pop("lr", [])
    rows = 2 + (len(groups) + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(12, 3.5 * rows), sharex=True)
    _plot(axes[0, 0], train, ["loss"], "loss", log=True)
    dots = {"marker": "o", "ms": 3}
    for name in sorted({key for line in val for key in line if "/" not in key} - {"step", "split"}):
        _plot(axes[0, 0], val, [name], "loss", log=True, label=f"held out: {name}", **dots)
    _plot(axes[0, 1], train, norms, "gradient norm", log=True)
    _plot(axes[1, 0], train, rates, "learning rate")
    _plot(axes[1, 1], train, ["samples_per_s"], "samples / s")
    axes[1, 1].set_ylim(bottom=0)
    for axis, (group, names) in zip(axes.flat[4:], groups.items(), strict=False):
        log = group in ("loss", "error")
        _plot(axis, train, names, group, log=log)
        for name in names:
            _plot(axis, val, [name], group, log=log, label=f"held out: {name.split('/')[-1]}", **dots)
    for axis in axes.flat[4 + len(groups) :]:
        axis.axis("off")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.suptitle(path.parent.name)
    figure.tight_layout()
    save_figure(figure, picture)


def _plot(axis, lines: list[dict], names: list[str], title: str, log: bool = False, **style) -> None:
    positive = False
    for name in names:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        positive |= any(value > 0 for _, value in points)
        if points:
            axis.plot(*zip(*points, strict=True), **{"lw": 1.2, "label": name.split("/")[-1], **style})
    axis.set_title(title, fontsize=10)
    if log and positive:
        axis.set_yscale("log")
