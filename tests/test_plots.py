import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import plots
from common.data import Batch
from common.film import write_gif
from common.normalize import Normalizer, fit_statistics
from common.plots import draw_chunks, draw_features, draw_latents, draw_reconstructions, draw_scores


def assert_drawn(path, width=150):
    """There is a picture that shows more than axes, and no other file."""
    with Image.open(path) as picture:
        assert picture.width > width
        assert len(picture.convert("RGB").resize((200, 100)).getcolors(20_000)) > 20
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("dims", [1, 4, 30])
def test_chunks_are_drawn_for_any_number_of_dimensions(dims, tmp_path):
    chunks, recorded = torch.randn(5, 8, dims), torch.zeros(1, 8, dims)
    is_pad = torch.arange(8)[None] >= 6
    batch = Batch(torch.zeros(1, 1, 3, 4, 4), torch.zeros(1, 1, dims), recorded, is_pad, torch.zeros(1))
    statistics = fit_statistics(np.random.default_rng(0).normal(size=(50, dims)))
    normalizer = Normalizer(statistics, statistics, torch.zeros(2, dims))
    shares = {"prior": torch.tensor([0.9, 0.1, 0, 0, 0]), "usage": torch.full((5,), 0.2)}
    names = [f"joint {d}" for d in range(dims)]
    draw_chunks(tmp_path / "a.png", batch, chunks, normalizer, names, shares, "codes")
    assert_drawn(tmp_path / "a.png", width=500)


@pytest.mark.parametrize("num", [1, 3])
def test_pictures_are_drawn_of_little(num, tmp_path):
    """A single sample, fewer dimensions than are drawn, a chunk of a single action."""
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (num, 3, 32, 48), np.uint8)
    chunks, half = random.normal(size=(2, num, 1, 2)), images[..., ::2] / 255
    drawings = {
        "features": lambda path: draw_features(path, images, random.normal(size=(num, 6, 2)), (2, 3), "two"),
        "latents": lambda path: draw_latents(path, torch.randn(num, 1), {"code": torch.arange(num)}),
        "reconstructions": lambda path: draw_reconstructions(path, images / 255, half, *chunks),
        "scores": lambda path: draw_scores(
            path, np.array([0.1, np.nan]), np.arange(num), {str(n): image for n, image in enumerate(images)}
        ),
    }
    for name, draw in drawings.items():
        (tmp_path / name).mkdir()
        draw(tmp_path / name / "a.png")
        assert_drawn(tmp_path / name / "a.png")


def test_success_in_closed_loop_has_a_curve_of_its_own(tmp_path, monkeypatch):
    """On the axis of the number of steps it would be a flat line at zero."""
    lines = [{"step": step, "split": "train", "loss": 1.0} for step in (1, 2, 3)]
    for step, success in ((1, 0.25), (3, 0.75)):
        lines.append({"step": step, "split": "val", "rollout/success": success, "rollout/steps": 90.0})
        lines.append({"step": step, "split": "val", "loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *_: figures.append(figure))
    plots.draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    drawn = {
        axis.get_title(): {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
        for axis in figures[0].axes
    }
    assert drawn["success in closed loop"] == {"success": [[1, 0.25], [3, 0.75]]}
    limits = {axis.get_title(): axis.get_ylim() for axis in figures[0].axes}
    assert limits["success in closed loop"] == (-0.02, 1.02)  # the full range of a share, whatever the values
    assert drawn["rollout"] == {"steps": [[1, 90], [3, 90]]}
    assert drawn["loss"].keys() == {"loss", "held out: loss"}


@pytest.mark.parametrize(
    ("loss", "terms"), [(0.5, ("velocity",)), (0.7, ("velocity", "kl")), (0.7, ("extra",))]
)
def test_the_loss_is_drawn_once_and_not_with_errors(tmp_path, monkeypatch, loss, terms):
    each = {f"loss/{term}": 0.5 for term in terms}
    lines = [{"step": 1, "split": "train", "loss": loss, **each}]
    lines.append({"step": 1, "split": "val", "action_mae": 0.2, **each})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *_: figures.append(figure))
    plots.draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    drawn = {axis.get_title(): [line.get_label() for line in axis.lines] for axis in figures[0].axes}
    panels = [axis for axis in figures[0].axes if axis.get_title()]
    assert all(axis.xaxis.get_tick_params()["labelbottom"] for axis in panels[-2:])
    assert drawn["held-out error"] == ["held out: action_mae"]
    both = [f"{held_out}{term}" for term in sorted(terms) for held_out in ("", "held out: ")]
    assert drawn["loss"] == (both if loss == 0.5 else ["loss"])
    assert drawn.get("terms of the loss") == (None if loss == 0.5 else both)


def test_principal_components_are_the_directions_of_largest_variance():
    points = np.random.default_rng(0).normal(size=(500, 3)) * [1, 10, 3] + 100
    components, share = plots.principal_components(points, 2)
    assert np.abs(np.corrcoef(components[:, 0], points[:, 1])[0, 1]) > 0.99
    assert np.abs(np.corrcoef(components[:, 1], points[:, 2])[0, 1]) > 0.99
    assert share == pytest.approx(109 / 110, abs=0.01)
    padded, share = plots.principal_components(points[:, :1], 3)
    assert padded.shape == (500, 3)
    assert (padded[:, 1:] == 0).all()
    assert share == 1


def test_a_full_disk_costs_the_picture_and_leaves_the_one_before(tmp_path, monkeypatch, capsys):
    def full(path, content):
        raise OSError(28, "No space left on device")

    (tmp_path / "a.png").write_bytes(b"before")
    monkeypatch.setattr(plots, "write_whole", full)
    draw_latents(tmp_path / "a.png", torch.eye(3), {"code": torch.arange(3)})
    assert "a.png was not drawn (No space left on device)" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes() == b"before"
    write_gif(tmp_path / "a.gif", np.zeros((2, 8, 8, 3), np.uint8), fps=10)
    assert "a.gif was not drawn (No space left on device)" in capsys.readouterr().out
    assert not (tmp_path / "a.gif").exists()


def test_a_joint_at_rest_has_a_histogram(tmp_path):
    jitter = np.resize(np.array([1e6, 1e6 + 0.0625], np.float32), (40, 1))
    store = SimpleNamespace(episode_starts=np.array([0, 20, 40]), state_names=["x"], action_names=["x"])
    store.state = store.action = jitter
    plots.draw_histograms(store, tmp_path / "a.png")
    assert_drawn(tmp_path / "a.png")
