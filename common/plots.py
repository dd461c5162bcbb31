"""All plots: chunks, features, latents, reconstructions, scores, training curves, contents of a dataset.

All are PNG files, written whole or not at all. A full disk costs a picture, not the run.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.console import say
from common.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from common.data import Batch, EpisodeStore
    from common.normalize import Normalizer


def grid(num: int, columns: int, size: tuple[float, float], **sharing) -> tuple[Figure, np.ndarray]:
    """A figure that needs no screen, with `num` panels of `size` inches, and all its axes (rows, columns)."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = math.ceil(num / columns)
    figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="tight")
    with rc_context({"xtick.labelsize": 7, "ytick.labelsize": 7, "axes.labelsize": 8}):
        axes = figure.subplots(rows, columns, squeeze=False, **sharing)
    for unused in axes.flat[num:]:
        unused.axis("off")
    return figure, axes


def save_figure(figure: Figure, path: Path, title: str = "") -> None:
    """Write a figure as PNG; see `write_picture`."""
    figure.suptitle(title, fontsize=11)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    write_picture(path, content.getvalue())


def write_picture(path: Path, content: bytes) -> None:
    """Write a picture's file, whole or not at all; prints a warning if that fails."""
    try:
        write_whole(path, content)
    except OSError as error:
        say(f"warning: {path} was not drawn ({error.strerror or error})")


def show_images(axes: Iterable[Axes], images: np.ndarray, **options) -> None:
    """Show images (B, 3, H, W), one on each of the axes, without ticks."""
    for axis, image in zip(axes, images, strict=True):
        axis.imshow(image.transpose(1, 2, 0), **options)
        axis.set(xticks=[], yticks=[])


def principal_components(points: np.ndarray, num: int) -> tuple[np.ndarray, float]:
    """First principal components (N, num) of points (N, D), zero beyond D; their share of the variance."""
    centred = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    _, spread, directions = np.linalg.svd(centred, full_matrices=False)
    components = centred @ directions[:num].T
    share = (spread[:num] ** 2).sum() / max((spread**2).sum(), 1e-12)
    return np.pad(components, ((0, 0), (0, num - components.shape[1]))), share


def draw_chunks(
    path: Path,
    batch: Batch,
    chunks: Tensor,
    normalizer: Normalizer,
    names: Sequence[str],
    shares: Mapping[str, Tensor],
    what: str,
    most_dimensions: int = 15,
) -> None:
    """Draw chunks (K, T, A), normalized, for a batch's one observation, and how often each is used.

    Args:
        names: of the A dimensions. At most `most_dimensions` are drawn: those in which the chunks differ
            most, relative to the dimension's motion in the dataset.
        shares: one or two, named, each (K,) and summing to 1. The larger a chunk's first share, the
            stronger its line.
        what: what the K are, for the title.
    """
    from matplotlib import colormaps

    recorded = batch.actions[0][~batch.is_pad[0]].cpu().numpy()  # (T, A)
    lines = normalizer.unnormalize_actions(chunks, batch.proprio.expand(len(chunks), -1, -1)).cpu().numpy()
    parts = {name: share.cpu().numpy() for name, share in shares.items()}
    spread = np.ptp(lines, axis=0).max(axis=0) / normalizer.action_scale.cpu().numpy()
    dimensions = np.sort(np.argsort(-spread)[:most_dimensions])
    num = len(dimensions) + 1
    figure, axes = grid(num, min(5, num), (4, 2.9))
    colors = colormaps["turbo"](np.linspace(0.05, 0.95, len(lines)))
    first = next(iter(parts.values()))
    alphas = 0.25 + 0.75 * first / first.max()
    for axis, d in zip(axes.flat, dimensions, strict=False):
        for line, color, alpha in zip(lines, colors, alphas, strict=True):
            axis.plot(line[:, d], color=color, alpha=alpha, lw=1.2)
        axis.plot(recorded[:, d], color="black", lw=1.5, ls="--", label="recorded")
        axis.set_title(names[d])
    axes[0, 0].legend(fontsize=7)
    bars, places, width = axes.flat[num - 1], np.arange(len(lines)), 0.8 / len(parts)
    for n, share in enumerate(parts.values()):
        style = {"color": colors, "edgecolor": "0.3", "lw": 0.4, "hatch": "////" * (n > 0)}
        bars.bar(places + n * width, share, width, **style)
    bars.set_xticks(places + 0.4 - width / 2, map(str, places))
    bars.set_title(" (plain), ".join(parts) + (" (hatched)" if len(parts) > 1 else ""))
    figure.supxlabel("control steps", fontsize=9)
    title = f"the chunk of each of {len(lines)} {what} at the start of a held-out episode"
    save_figure(figure, path, title)


def draw_features(
    path: Path, images: np.ndarray, features: np.ndarray, shape: tuple[int, int], title: str
) -> None:
    """Draw images (B, 3, H, W) uint8 above their features: three principal components as red, green, blue.

    Features are (B, L, D), L tokens row by row, on a grid of `shape` (rows, columns). Regions of equal colour
    look the same to the network.
    """
    components, _ = principal_components(features.reshape(-1, features.shape[-1]), 3)
    low, high = np.quantile(components, [0.01, 0.99], axis=0)
    colors = ((components - low) / np.maximum(high - low, 1e-9)).clip(0, 1)
    colors = colors.reshape(len(images), *shape, 3).transpose(0, 3, 1, 2)
    figure, axes = grid(2 * len(images), len(images), (2, 2.2))
    extent = (0, images.shape[-1], images.shape[-2], 0)
    for row, name, shown in zip(axes, ("camera", "features"), (images, colors), strict=True):
        show_images(row, shown, extent=extent)
        row[0].set_ylabel(name)
    save_figure(figure, path, title)


def draw_latents(path: Path, latents: Tensor, labels: Mapping[str, Tensor]) -> None:
    """Draw latents (N, D) of first chunks by their first two principal components, once for each labelling.

    Labels are named, each (N,) small integers.
    """
    plane, explained = principal_components(latents.cpu().numpy(), 2)
    figure, axes = grid(len(labels), len(labels), (5, 4.6))
    for axis, (name, numbers) in zip(axes[0], labels.items(), strict=True):
        for value in numbers.unique().tolist():
            chosen = plane[(numbers == value).cpu().numpy()]
            axis.scatter(*chosen.T, s=14, color=f"C{value % 10}", label=str(value), alpha=0.8)
        axis.set_title(f"by {name}")
        axis.legend(fontsize=7)
    title = f"latents of the chunks with which episodes begin\n({100 * explained:.0f} % of the variance)"
    save_figure(figure, path, title)


def draw_reconstructions(
    path: Path, images: np.ndarray, decoded: np.ndarray, chunks: np.ndarray, decoded_chunks: np.ndarray
) -> None:
    """Draw images (B, 3, H, W) in [0, 1] and chunks (B, T, A) with their reconstructions, without NaN."""
    figure, axes = grid(3 * len(images), len(images), (2.1, 2.1), sharey="row")
    show_images(axes[0], images)
    show_images(axes[1], decoded)
    for axis, *lines in zip(axes[2], chunks, decoded_chunks, strict=True):
        for line, style in zip(lines, ("-", "--"), strict=True):
            axis.set_prop_cycle(None)  # the same colours again
            # Markers, since a chunk can have a single action: at the end of an episode, or always.
            axis.plot(line, ls=style, lw=1.2, marker=".", ms=3)
    labels = ("image", "reconstruction", "actions, dashed:\nreconstruction")
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label)
    save_figure(figure, path)


def draw_scores(path: Path, pointwise: np.ndarray, scores: np.ndarray, examples: Mapping) -> None:
    """Draw steps' contributions to mutual information (N,), episodes' scores (E,), and how some begin.

    Both are in nats, without NaN; examples are first frames (3, H, W) uint8 with titles, best to worst.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(5, 3))
    steps, episodes = top.subplots(1, 2)
    steps.hist(pointwise[~np.isnan(pointwise)], bins=60, color="C0")
    steps.set_title("contributions of steps, nats", fontsize=10)
    episodes.plot(np.sort(scores)[::-1], marker=".", ms=3, color="C1")
    episodes.set_title("scores of episodes, best to worst, nats", fontsize=10)
    episodes.grid(alpha=0.3)
    axes = bottom.subplots(1, len(examples), squeeze=False)[0]
    show_images(axes, np.stack(list(examples.values())))
    for axis, title in zip(axes, examples, strict=True):
        axis.set_title(f"episode {title}", fontsize=7)
    save_figure(figure, path)


# Training curves


def read_lines(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, without one that was cut off when the process was killed."""
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and "step" in line and "split" in line:
                lines.append(line)
    return lines


def draw_curves(path: Path, picture: Path) -> None:
    """Draw metrics.jsonl: loss, held-out error, gradient norms, learning rates, speed, success of rollouts.

    A method's further metrics, named `group/name`, get a panel for each group.
    """
    lines = read_lines(path)
    if all(line["split"] != "train" for line in lines):
        return
    groups: dict[str, list[str]] = {}
    for name in sorted({key for line in lines for key in line if "/" in key}):
        groups.setdefault(name.split("/")[0], []).append(name)
    if "rollout/success" in groups.get("rollout", ()):  # next to numbers of steps it would look flat
        groups["rollout"].remove("rollout/success")
        groups["success in closed loop"] = ["rollout/success"]
    held_out = {key for line in lines if line["split"] == "val" for key in line if "/" not in key}
    terms, trained = groups.pop("loss", []), [line for line in lines if line["split"] == "train"]
    same = [term for term in terms if all(line.get(term) == line.get("loss") for line in trained)]
    drawn = [
        ("loss", same[:1] or ["loss"]),  # of a loss with one term, held-out lines have only the term
        ("terms of the loss", [term for term in terms if term not in same]),
        ("held-out error", sorted(held_out - {"loss", "step", "split"})),
        ("gradient norm", groups.pop("grad_norm", [])),
        ("learning rate", groups.pop("lr", [])),
        ("samples / s", ["samples_per_s"]),
        *groups.items(),
    ]
    drawn = [(title, names) for title, names in drawn if names]
    figure, axes = grid(len(drawn), 2, (6, 3.5), sharex=True)
    for axis, (title, names) in zip(axes.flat, drawn, strict=False):
        for name in names:
            _plot(axis, lines, name, log=title in ("loss", "held-out error", "gradient norm"))
        axis.set_title(title)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
        if names == ["rollout/success"]:
            axis.set_ylim(-0.02, 1.02)
        if title == "samples / s":
            axis.set_ylim(bottom=0)
    for axis in axes.flat[: len(drawn)][-2:]:  # the lowest panel of a column may have none below it
        axis.tick_params(labelbottom=True)
    figure.supxlabel("step", fontsize=9)
    save_figure(figure, picture, path.parent.name)


def _plot(axis: Axes, lines: list[dict], name: str, log: bool) -> None:
    """Draw a metric against steps, held out with dots; log scale if `log` and anything is positive."""
    evaluated = "" if name.startswith("rollout/") else "held out: "
    for split, label, style in (("train", "", {}), ("val", evaluated, {"marker": "o", "ms": 3})):
        known = [line for line in lines if line["split"] == split and line.get(name) is not None]
        values = {line["step"]: line[name] for line in known}
        if values:
            axis.plot(values.keys(), values.values(), lw=1.2, label=label + name.split("/")[-1], **style)
        if log and any(value > 0 for value in values.values()):
            axis.set_yscale("log")


# What a dataset holds


def draw_sheet(store: EpisodeStore, path: Path, most_episodes: int = 6, moments: int = 5) -> None:
    """Draw frames of some episodes: a row for each episode and camera, from start to end."""
    episodes = np.unique(np.linspace(0, store.num_episodes - 1, most_episodes).astype(int))
    cameras, aspect = len(store.cameras), store.image_size[0] / store.image_size[1]
    figure, axes = grid(len(episodes) * cameras * moments, moments, (2, 2 * aspect + 0.1))
    figure.set_layout_engine("tight", pad=0.4)
    for rows, episode in zip(axes.reshape(-1, cameras, moments), episodes, strict=True):
        first, last = store.episode_starts[episode], store.episode_starts[episode + 1] - 1
        steps = np.linspace(first, last, moments).astype(int)
        images = store.images(steps).numpy()  # (moments, N, 3, H, W)
        for camera, (row, name) in enumerate(zip(rows, store.cameras, strict=True)):
            show_images(row, images[:, camera])
            for axis, step in zip(row, steps, strict=True):
                axis.set_title(f"{store.timestamps[step]:.1f} s", fontsize=6, pad=2)
            row[0].set_ylabel(f"{store.episode_indices[episode]} {name}", fontsize=7)
    save_figure(figure, path)


def draw_histograms(store: EpisodeStore, path: Path) -> None:
    """Draw the distribution of each dimension of state and action, and of the episodes' lengths."""
    drawn = [("episode length (steps)", np.diff(store.episode_starts), "0.4")]
    for color, what, names, values in (
        ("tab:blue", "state", store.state_names, store.state),
        ("tab:orange", "action", store.action_names, store.action),
    ):
        drawn += [(f"{what}: {name}", values[:, d], color) for d, name in enumerate(names)]
    figure, axes = grid(len(drawn), min(7, len(drawn)), (2.2, 1.6))
    for axis, (title, values, color) in zip(axes.flat, drawn, strict=False):
        axis.hist(values.astype(np.float64), bins=50, color=color)  # float32 can have fewer values than bins
        axis.set_title(title, fontsize=7)
        axis.set_yticks([])
    save_figure(figure, path)
