import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from common import flow


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.5), (2.0, 1.0), (2.0, 3.5)])
def test_beta_times_have_the_moments_of_the_distribution(a, b):
    t = flow.sample_time(200_000, "cpu", "beta", (a, b), torch.Generator().manual_seed(0))
    mean, variance = a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))
    assert t.min() >= 0
    assert t.max() <= 1
    assert t.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / len(t)))
    assert t.var().item() == pytest.approx(variance, rel=0.02)


def test_the_default_times_favour_the_noisy_end():
    t = flow.sample_time(10_000, "cpu", generator=torch.Generator().manual_seed(0))
    assert (t < 0.5).float().mean() > 0.6  # exactly 1 - 0.5^1.5 = 0.646


def test_uniform_and_logit_normal_times():
    generator = torch.Generator().manual_seed(0)
    uniform = flow.sample_time(100_000, "cpu", "uniform", generator=generator)
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.005)
    assert uniform.var().item() == pytest.approx(1 / 12, rel=0.02)
    logits = flow.sample_time(100_000, "cpu", "logit-normal", generator=generator).logit()
    assert logits.mean().item() == pytest.approx(0, abs=0.02)
    assert logits.std().item() == pytest.approx(1, rel=0.02)


def test_times_repeat_with_their_generator_and_leave_the_global_one_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for distribution, beta in (
        ("beta", (1.0, 1.5)),
        ("beta", (2.0, 3.0)),
        ("uniform", (1, 1)),
        ("logit-normal", (1, 1)),
    ):
        first, second = (
            flow.sample_time(8, "cpu", distribution, beta, torch.Generator().manual_seed(5)) for _ in range(2)
        )
        assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_the_path_runs_from_noise_to_data_at_constant_velocity():
    x_0, x_1 = torch.randn(2, 4, 5, 3)
    assert torch.equal(flow.linear_path(x_0, x_1, torch.zeros(4))[0], x_0)
    assert torch.equal(flow.linear_path(x_0, x_1, torch.ones(4))[0], x_1)
    t = torch.rand(4, dtype=torch.float64)
    x_t, velocity = flow.linear_path(x_0.double(), x_1.double(), t)
    ahead, _ = flow.linear_path(x_0.double(), x_1.double(), t + 1e-3)
    torch.testing.assert_close((ahead - x_t) / 1e-3, velocity)


def test_the_path_wants_one_time_per_sample():
    with pytest.raises(ValueError, match="one value per sample"):
        flow.linear_path(torch.zeros(4, 5, 3), torch.zeros(4, 5, 3), torch.zeros(5))


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_constant_velocity_is_integrated_exactly(method, steps):
    x_0, x_1 = torch.randn(2, 3, 5, 2, dtype=torch.float64)
    torch.testing.assert_close(flow.integrate(lambda x, t: x_1 - x_0, x_0, steps, method), x_1)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_integrators_have_their_order(method, order):
    """dx/dt = x + t has the solution (x_0 + 1) e^t - t - 1; halving the step divides the error by 2^order."""
    x_0 = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    exact = (x_0 + 1) * math.e - 2

    def error(steps):
        return (flow.integrate(lambda x, t: x + t[:, None], x_0, steps, method) - exact).abs().max().item()

    assert error(64) / error(128) == pytest.approx(2**order, rel=0.05)


def test_two_gaussians_are_carried_into_each_other():
    """Noise to N(mu, s^2): the marginal velocity is known, and integrating it gives the target's moments."""
    mu, s = 2.0, 0.5

    def velocity(x, t):
        t = t[:, None]
        variance = (1 - t) ** 2 + (t * s) ** 2
        return mu + (t * s**2 - (1 - t)) / variance * (x - t * mu)

    x = flow.integrate(
        velocity, torch.randn(50_000, 1, generator=torch.Generator().manual_seed(0)), 50, "heun"
    )
    assert x.mean().item() == pytest.approx(mu, abs=0.01)
    assert x.std().item() == pytest.approx(s, rel=0.02)


def test_what_was_compiled_integrates_within_and_not_after():
    calls = []

    def run(velocity, x_0, *arguments):
        calls.append(arguments)
        return velocity(x_0, x_0)

    x_0 = torch.ones(1, 2, 3)
    with flow.compiled(run):
        assert torch.equal(flow.integrate(lambda x, t: 5 * x, x_0, 4), 5 * x_0)
    assert torch.equal(flow.integrate(lambda x, t: torch.ones_like(x), x_0, 4), 2 * x_0)
    assert calls == [(4, "euler", None)]


def test_what_cannot_be_one_graph_is_said_once_and_integrated_all_the_same(capsys, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: compile(f, **(given | {"backend": "eager"})))
    run, x_0 = flow.compile_integration(torch.device("cpu")), torch.ones(1, 2, 3)

    def velocity(x, t):
        torch._dynamo.graph_break()
        return torch.ones_like(x)

    for _ in range(2):
        assert torch.equal(run(velocity, x_0, 4, "euler", None), 2 * x_0)
    assert capsys.readouterr().out.count("actions are sampled without a compiled graph") == 1
    torch._dynamo.reset()


def test_a_thread_of_its_own_can_capture():
    from torch._inductor.cudagraph_trees import get_obj, local

    for prepared, expected in ((None, AssertionError), (flow.let_thread_capture, type(None))):
        with ThreadPoolExecutor(1, initializer=prepared) as thread:
            for name in ("tree_manager_containers", "tree_manager_locks"):
                assert type(thread.submit(get_obj, local, name).exception()) is expected
            if prepared:
                graphs = thread.submit(get_obj, local, "tree_manager_containers").result()
    assert any(kept is graphs for kept in flow._captured)  # though the thread has ended


def test_integration_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="at least 1"):
        flow.integrate(lambda x, t: x, torch.zeros(1), 0)
    with pytest.raises(ValueError, match="unknown integrator"):
        flow.integrate(lambda x, t: x, torch.zeros(1), 1, "rk45")


def test_guidance_goes_from_unconditional_through_conditional_and_beyond():
    with_latent, without = torch.randn(2, 3, 4, 2)
    assert torch.equal(flow.guide(with_latent, without, 0.0), without)
    torch.testing.assert_close(flow.guide(with_latent, without, 1.0), with_latent)
    torch.testing.assert_close(flow.guide(with_latent, without, 3.0), 3 * with_latent - 2 * without)


def test_each_observation_gets_a_draw_at_the_start():
    x_0, x_t, t = torch.randn(6, 4, 2), torch.randn(6, 4, 2), torch.rand(6)  # two observations, three draws
    start, points, times = flow.prepend_start(x_0, x_t, t, 3)
    assert torch.equal(start, x_0[[0, 3]])
    assert torch.equal(points, torch.cat([x_0[:1], x_t[:3], x_0[3:4], x_t[3:]]))
    assert torch.equal(times, torch.cat([torch.zeros(1), t[:3], torch.zeros(1), t[3:]]))


def test_prefixes_are_drawn_only_if_asked_for_and_all_lengths_are_as_probable():
    t = torch.rand(9000)
    state = torch.get_rng_state()
    assert flow.random_prefix(t, 5, flow.DelayConfig(0)) is t
    assert torch.equal(torch.get_rng_state(), state)
    times = flow.random_prefix(t, 5, flow.DelayConfig(2, 1.0))
    given = times == 1
    lengths = given.sum(dim=1)
    assert torch.equal(given, torch.arange(5) < lengths[:, None])  # at the beginning
    assert torch.equal(times.where(~given, 0), t[:, None].expand(-1, 5).where(~given, 0))
    shares = lengths.bincount(minlength=4) / 9000
    assert shares.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=0.02)
    assert torch.equal(flow.to_predict(times), ~given)
    assert flow.to_predict(t).all()
    assert flow.share_to_predict(5, flow.DelayConfig(2, 1.0)).tolist() == pytest.approx(
        [1 / 3, 2 / 3, 1, 1, 1]
    )
    assert flow.share_to_predict(5, flow.DelayConfig(0)).tolist() == [1] * 5
    assert (~given).float().mean(dim=0).tolist() == pytest.approx([1 / 3, 2 / 3, 1, 1, 1], abs=0.02)
    half = flow.DelayConfig(2, 0.5)  # the other draws are never given any
    expected = [2 / 3, 5 / 6, 1, 1, 1]
    shares = flow.to_predict(flow.random_prefix(t, 5, half)).float().mean(dim=0)
    assert shares.tolist() == pytest.approx(expected, abs=0.02)
    assert flow.share_to_predict(5, half).tolist() == pytest.approx(expected)


def test_given_actions_lie_at_the_end_of_their_path():
    x_0, x_1 = torch.randn(2, 3, 5, 2)
    t = torch.tensor([[1, 1, 0.3, 0.3, 0.3], [0.6] * 5, [1] * 5])
    x_t, velocity = flow.linear_path(x_0, x_1, t)
    assert torch.equal(x_t[0, :2], x_1[0, :2])
    assert torch.equal(x_t[2], x_1[2])
    alone, _ = flow.linear_path(x_0, x_1, torch.tensor([0.3, 0.6, 0.0]))
    assert torch.equal(x_t[0, 2:], alone[0, 2:])
    assert torch.equal(x_t[1], alone[1])
    assert torch.equal(velocity, x_1 - x_0)
    times, given = flow.levels(t)
    assert torch.equal(times, torch.tensor([[0.3, 1], [0.6, 1], [1, 1]]))
    assert torch.equal(given, t == 1)
    times = t[:, 4]
    assert flow.levels(times)[0] is times
    assert flow.levels(times)[1] is None


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
def test_a_prefix_is_left_as_it_is_by_integration(method):
    x_0, actions = torch.randn(2, 3, 5, 2)
    given = torch.arange(5) < torch.tensor([[0], [2], [5]])
    asked = []

    def velocity(x, t):
        asked.append((x, t))
        return 1 + 0 * x

    x = flow.integrate(velocity, x_0, 4, method, flow.Prefix(actions, given))
    assert torch.equal(x[given], actions[given])
    torch.testing.assert_close(x[~given], x_0[~given] + 1)
    for seen, t in asked:
        assert torch.equal(seen[given], actions[given])
        assert t.shape == (3, 5)
        assert (t[given] == 1).all()
        assert (t[0] == t[0, 0]).all()
    assert asked[0][1][0, 0] == 0
    unchanged = flow.integrate(velocity, x_0, 4, method, flow.Prefix(actions, torch.zeros_like(given)))
    assert torch.equal(unchanged, flow.integrate(velocity, x_0, 4, method))


def test_noise_of_an_episode_lasts_until_its_generator_is_seeded_again():
    one, two = torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)
    first = flow.episode_noise((1, 8), "cpu", one)
    fresh = flow.noise((1, 8), "cpu", one)
    assert not torch.isclose(first, fresh).any()  # independent
    assert torch.equal(flow.episode_noise((1, 8), "cpu", one), first)
    both = flow.episode_noise((2, 8), "cpu", [two, one])
    assert torch.equal(both[1:], first)
    assert not torch.isclose(both[0], both[1]).any()
    one.manual_seed(7)
    assert not torch.isclose(flow.episode_noise((1, 8), "cpu", one), first).any()
    one.manual_seed(5)
    assert torch.equal(flow.noise((1, 8), "cpu", one), fresh)  # nothing is taken from the generator
    assert torch.equal(flow.episode_noise((1, 8), "cpu", one), first)
    one.seed()  # any 64 bits
    assert flow.episode_noise((1, 8), "cpu", one).isfinite().all()
    many = flow.episode_noise((10_000,), "cpu", two)
    assert abs(many.mean()) < 0.05
    assert abs(many.std() - 1) < 0.05


def test_the_draw_at_the_start_has_no_prefix():
    x_0, x_t, t = torch.randn(6, 4, 2), torch.randn(6, 4, 2), torch.rand(6, 4)
    start, points, times = flow.prepend_start(x_0, x_t, t, 3)
    assert torch.equal(start, x_0[[0, 3]])
    assert torch.equal(points[[1, 2, 3, 5, 6, 7]], x_t)
    assert torch.equal(times, torch.cat([torch.zeros(1, 4), t[:3], torch.zeros(1, 4), t[3:]]))
