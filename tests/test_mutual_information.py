"""Estimators against closed forms."""

import math

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.mutual_information import (
    episode_means,
    episode_sets,
    infonce,
    ksg,
    standardise,
    without_outliers,
)


def gaussians(num, dim, rho, seed=0):
    """Correlated normal variables and their mutual information."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, num, dim, generator=generator)
    return x, rho * x + math.sqrt(1 - rho**2) * noise, -dim / 2 * math.log(1 - rho**2)


@pytest.mark.parametrize(
    ("dim", "rho"), [(1, 0.0), (1, 0.3), (1, 0.9), (2, 0.0), (2, 0.6), (2, 0.9), (5, 0.0), (5, 0.25)]
)
def test_neighbours_find_the_information_of_gaussians(dim, rho):
    """Not where it is large in many dimensions, see the next test."""
    x, y, true = gaussians(10_000, dim, rho)
    estimate = ksg(x, y, memory_bytes=2e8)
    assert estimate.value == pytest.approx(true, rel=0.05, abs=0.05)
    assert estimate.pointwise.mean().item() == pytest.approx(estimate.value)


@pytest.mark.parametrize(("dim", "rho", "share"), [(5, 0.9, 0.7), (10, 0.5, 0.5)])
def test_neighbours_underestimate_much_information_in_many_dimensions(dim, rho, share):
    x, y, true = gaussians(4000, dim, rho)
    assert share * true < ksg(x, y, memory_bytes=2e8).value < true


def test_neighbours_do_not_care_for_units():
    x, y, _ = gaussians(500, 3, 0.6)
    scaled = ksg(x * torch.tensor([1e-3, 1.0, 250.0]) + 7, y * torch.tensor([9.0, 0.1, 1.0]))
    assert scaled.value == pytest.approx(ksg(x, y).value, abs=1e-3)


def test_memory_changes_nothing():
    x, y, _ = gaussians(300, 2, 0.6)
    assert torch.equal(ksg(x, y).pointwise, ksg(x, y, memory_bytes=1e5).pointwise)


def test_ties_are_counted():
    """For discrete variables it is that of their table, like a plug-in estimate."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 4, (3000, 1), generator=generator)
    y = torch.where(torch.rand(3000, 1, generator=generator) < 0.7, x, torch.randint(0, 4, x.shape))
    table = np.zeros((4, 4))
    np.add.at(table, (x[:, 0].numpy(), y[:, 0].numpy()), 1 / 3000)
    true = (table * np.log(table / np.outer(table.sum(1), table.sum(0)))).sum()
    assert ksg(x.float(), y.float()).value == pytest.approx(true, abs=0.02)
    assert ksg(x.float(), x.float()).value == pytest.approx(math.log(4), abs=0.02)


def test_neighbours_agree_with_scikit_learn():
    feature_selection = pytest.importorskip("sklearn.feature_selection")
    x, y, _ = gaussians(2000, 1, 0.7)
    theirs = feature_selection.mutual_info_regression(x.numpy(), y[:, 0].numpy(), n_neighbors=5)[0]
    assert ksg(x, y, neighbours=(5,)).value == pytest.approx(theirs, abs=0.02)


def test_smooth_episodes_that_are_independent_share_nothing():
    torch.manual_seed(0)
    x, y = torch.randn(120, 40, 2).cumsum(1), torch.randn(120, 40, 2).cumsum(1)
    episodes = torch.arange(120).repeat_interleave(40)
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    assert ksg(x, y).value > 0.5  # because of neighbours in time
    estimate = ksg(x, y, episodes)
    low, high = estimate.interval(episodes)
    assert abs(estimate.value) < 0.1
    assert low < estimate.value < high
    assert not estimate.pointwise.isnan().any()


def test_sets_hold_one_step_of_every_episode_and_leave_none_out():
    episodes = torch.tensor([4] * 3 + [9] * 5 + [2] * 2)
    sets = episode_sets(episodes, repeats=2, seed=0)
    assert sets.shape == (10, 3)
    assert (episodes[sets] == torch.tensor([2, 4, 9])).all()
    counts = torch.bincount(sets.flatten(), minlength=10)
    assert counts.min() >= 2
    assert torch.equal(episode_sets(episodes, 2, 0), sets)
    assert not torch.equal(episode_sets(episodes, 2, 1), sets)


def test_an_episode_that_does_not_fit_stands_out():
    torch.manual_seed(0)
    x = torch.randn(60, 20, 2)
    y = x + 0.2 * torch.randn(60, 20, 2)
    y[7] = torch.randn(20, 2)
    episodes = torch.arange(60).repeat_interleave(20)
    for estimate in (
        ksg(x.flatten(0, 1), y.flatten(0, 1), episodes),
        infonce(x.flatten(0, 1), y.flatten(0, 1), episodes, steps=200, batch_size=30),
    ):
        assert episode_means(estimate.pointwise, episodes)[1].argmin() == 7


def test_all_episodes_are_compared_with_as_many_others():
    """The bound grows with the number compared: a smaller remainder would look worse than the rest."""
    torch.manual_seed(0)
    for num in (34, 36):  # halves of 17 and 18, in blocks of at most 16
        x = torch.randn(num, 20, 2)
        y = (x + 0.05 * torch.randn(num, 20, 2)).flatten(0, 1)
        episodes = torch.arange(num).repeat_interleave(20)
        estimate = infonce(x.flatten(0, 1), y, episodes, steps=150, batch_size=8)
        scores = episode_means(estimate.pointwise, episodes)[1]
        assert not scores.isnan().any()
        assert scores.min() > 0.6 * scores.median()


@pytest.mark.parametrize(("dim", "rho"), [(1, 0.0), (1, 0.8), (5, 0.6)])
def test_the_bound_lies_below_the_truth_and_near_it(dim, rho):
    x, y, true = gaussians(4000, dim, rho)
    estimate = infonce(x, y, steps=300, repeats=1)
    error = estimate.pointwise.std().item() / math.sqrt(len(x))
    assert estimate.value < true + 3 * error
    assert estimate.value > true - 0.25


def test_critics_leave_global_random_numbers_alone():
    x, y, _ = gaussians(50, 1, 0.5)
    before = torch.get_rng_state()
    first, again = (infonce(x, y, steps=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.value == again.value


@pytest.mark.parametrize("estimator", [ksg, infonce])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x: torch.full_like(x, 3.0), "all the same"),
        (lambda x: x.index_fill(0, torch.tensor([2]), torch.nan), "NaN"),
        (lambda x: x.index_fill(0, torch.tensor([2]), torch.inf), "infinity"),
    ],
)
def test_samples_that_say_nothing_are_refused(estimator, spoil, words):
    x, y, _ = gaussians(40, 2, 0.5)
    with pytest.raises(UserError, match=words):
        estimator(spoil(x), y)
    with pytest.raises(UserError, match=words):
        estimator(x, spoil(y))


def test_too_few_samples_are_refused():
    x, y, _ = gaussians(8, 2, 0.5)
    with pytest.raises(UserError, match="8 episodes are too few for 7"):
        ksg(x, y)
    episodes = torch.arange(8)
    with pytest.raises(UserError, match=r"8 episodes are too few for 7.*at least 9"):
        ksg(x, y, episodes)
    with pytest.raises(UserError, match="3 episodes are too few"):
        infonce(x, y, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]))


def test_a_constant_variable_among_others_is_left_out():
    x, y, _ = gaussians(300, 2, 0.6)
    with_constant = torch.cat([x, torch.full((300, 1), 5.0)], dim=1)
    assert standardise(with_constant).shape == (300, 2)
    assert ksg(with_constant, y).value == pytest.approx(ksg(x, y).value)


def test_outliers_are_those_of_a_task():
    torch.manual_seed(0)
    large, small = torch.randn(1000) * 100, torch.randn(60) * 0.01
    small[0] = torch.nan
    values, tasks = torch.cat([large, small, small[:1]]), torch.tensor([0] * 1000 + [1] * 60 + [2])
    clipped = without_outliers(values, tasks)[:1060]  # of the last task, nothing is known
    low, high = large.quantile(torch.tensor([0.01, 0.99])).tolist()
    torch.testing.assert_close(clipped[:1000], large.clamp(low, high))
    assert clipped[1000].isnan()
    assert (clipped[1001:] != small[1:]).sum() == 2  # its own lowest and highest of 59
