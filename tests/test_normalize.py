from dataclasses import replace

import numpy as np
import pytest
import torch
from lerobot_factory import make_dataset

from common.data import ChunkDataset, DataConfig, open_dataset
from common.errors import UserError
from common.normalize import Normalizer, fit_statistics

MODES = ["mean-std", "min-max", "quantile"]


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    data = rng.normal([0, 1e4, 5, -3, 0], [1, 1e-2, 0, 200, 0], (5000, 5)).astype(np.float32)
    data[:, 4] = 0.25  # constant
    data[7:20, 4] = 1.0  # except for 13 of 5000 steps: not constant, but its quantiles are equal
    return data


def normalizer(values, mode):
    state, action = fit_statistics(values), fit_statistics(values)
    return Normalizer(state, action, torch.stack([action["min"], action["max"]]), mode)


def test_statistics_are_those_of_the_data(values):
    statistics = fit_statistics(values)
    exact = values.astype(np.float64)
    np.testing.assert_allclose(statistics["mean"], exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics["std"], exact.std(0), rtol=1e-6)
    assert (statistics["min"].numpy() == values.min(0)).all()
    assert (statistics["max"].numpy() == values.max(0)).all()
    for name, share in (("q01", 0.01), ("q99", 0.99)):
        ordered = np.sort(exact, axis=0)
        place = share * (len(ordered) - 1)
        low, high = ordered[int(place)], ordered[int(place) + 1]
        np.testing.assert_allclose(statistics[name], low + (place - int(place)) * (high - low), rtol=1e-6)


def test_a_spike_does_not_set_the_scale_of_quantiles(tmp_path, capsys):
    root = make_dataset(tmp_path / "d", (200, 200), ["head"], video=False, dims=(3, 3))
    store = open_dataset(DataConfig((str(root),), cache_dir=tmp_path))
    steps = np.arange(400, dtype=np.float32)
    state = np.stack([np.sin(steps), np.where(steps == 50, 1, 0), np.sin(steps)], axis=1)
    state[:, 2] = np.where(np.isin(steps, (60, 61)), 1, 0)  # hardly ever moves
    state[30, 0] = state[40, 2] = 1e4
    store = replace(store, state=state.astype(np.float32))
    fitted = Normalizer.fit(ChunkDataset(store, [0, 1], 4), "quantile")
    assert fitted.state_scale[0] == pytest.approx(1, rel=0.1)
    assert fitted.state_scale[1] == pytest.approx(0.5, rel=1e-3)  # moves once: its whole range
    again = Normalizer.of_tensors(fitted.tensors(), "quantile")
    assert torch.equal(again.state_scale, fitted.state_scale)
    said = capsys.readouterr().out
    assert "a few extreme steps" in said
    assert "--normalization quantile" not in said


@pytest.mark.parametrize("mode", MODES)
def test_inverting_gives_back_the_data(values, mode):
    actions = torch.from_numpy(values)
    fitted = normalizer(values, mode)
    torch.testing.assert_close(
        fitted.unnormalize_actions(fitted.actions(actions, actions), actions), actions, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("mode", MODES)
def test_normalized_data_have_the_promised_range(values, mode):
    normalized = normalizer(values, mode).proprio(torch.from_numpy(values))
    assert torch.isfinite(normalized).all()
    moving = normalized[:, [0, 3]]
    if mode == "mean-std":
        torch.testing.assert_close(moving.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
        torch.testing.assert_close(moving.std(0), torch.ones(2), atol=1e-3, rtol=0)
    elif mode == "min-max":
        torch.testing.assert_close(moving.amin(0), -torch.ones(2))
        torch.testing.assert_close(moving.amax(0), torch.ones(2))
    else:
        inside = ((moving >= -1) & (moving <= 1)).float().mean(0)
        torch.testing.assert_close(inside, torch.full((2,), 0.98), atol=1e-3, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_a_constant_dimension_neither_explodes_nor_is_lost(values, mode):
    fitted = normalizer(values, mode)
    row = torch.from_numpy(values[:1])
    assert fitted.actions(row, row)[0, 2] == 0
    assert fitted.unnormalize_actions(torch.zeros(1, 5), row)[0, 2] == 5
    off = row + 1e-3  # a sensor that never moved in training, slightly off on the robot
    assert fitted.proprio(off)[0, 2].abs() < 0.01


def test_a_dimension_that_hardly_ever_moves_is_not_taken_for_constant(values):
    fitted = normalizer(values, "quantile")
    normalized = fitted.actions(torch.from_numpy(values), torch.from_numpy(values))[:, 4]
    assert normalized[0] == -1
    assert normalized[10] == 1


def test_normalization_stays_in_float32_for_half_precision_input(values):
    fitted = normalizer(values, "mean-std")
    assert fitted.actions(*[torch.zeros(1, 1, 5, dtype=torch.bfloat16)] * 2).dtype == torch.float32


def test_statistics_survive_saving(values, tmp_path):
    fitted = normalizer(values, "quantile")
    fitted.save(tmp_path / "stats.safetensors")
    for mode in MODES:
        loaded = Normalizer.load(tmp_path / "stats.safetensors", mode)
        expected = normalizer(values, mode)
        assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), expected.buffers(), strict=True))


def test_damaged_statistics_are_named(tmp_path):
    (tmp_path / "stats.safetensors").write_bytes(b"nothing")
    for name in ("stats.safetensors", "absent.safetensors"):
        with pytest.raises(UserError, match=name):
            Normalizer.load(tmp_path / name, "mean-std")
