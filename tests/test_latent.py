import numpy as np
import pytest
import torch
from torch import nn

from common import checkpoint
from common.errors import UserError
from common.latent import CodebookLatent, NormalLatent, _pick
from common.optim import AveragedPolicy, OptimConfig, build_optimizer


class Policy(nn.Module):
    """The parts of a policy that `end_window` and `follow` use, with four codes in four dimensions."""

    def __init__(self):
        super().__init__()
        self.posterior, self.prior = nn.Linear(6, 4), nn.Linear(16, 4)
        self.latent = CodebookLatent(4, 4, self.posterior)

    def infer(self, x, train=True):
        return self.latent.infer(self.posterior(x), self.prior(torch.zeros(len(x), 16)), (x,), 3, train)


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return Policy()


def averaged(policy):
    return AveragedPolicy(policy, build_optimizer(policy, OptimConfig()), 0.9)


def counted(codes, error):
    """Counts as from one process."""
    return torch.tensor([*codes, error, 1.0])


def test_latents_of_codes_have_a_fixed_scale(policy):
    point, code = policy.latent.assign(100 * torch.randn(8, 4))
    torch.testing.assert_close(point.mean(1), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(point.var(1, unbiased=False), torch.ones(8), atol=1e-3, rtol=0)
    assert torch.equal(code, torch.cdist(point, policy.latent.vectors).argmin(dim=1))


def test_noise_takes_the_place_of_a_code_in_training_alone(policy):
    x = torch.randn(8, 6)
    point, code = policy.latent.assign(policy.posterior(x))
    vectors = policy.latent.vectors[code]
    still, drawn = policy.infer(x, train=False), policy.infer(x)
    assert torch.equal(still.z, vectors.repeat_interleave(3, dim=0))
    assert torch.equal(policy.latent.most_probable(policy.posterior(x)), vectors)
    torch.testing.assert_close(
        (drawn.z.unflatten(0, (8, 3)) - point[:, None]).norm(dim=2),
        (vectors - point).norm(dim=1)[:, None].expand(8, 3),
    )
    torch.testing.assert_close(drawn.commitment, (vectors - point).square().mean())


def test_one_code_tells_nothing_in_training_either():
    posterior = nn.Linear(6, 4)
    latent, x = CodebookLatent(1, 4, posterior), torch.randn(8, 6)
    inferred = latent.infer(posterior(x), torch.zeros(8, 1), (x,), 3, train=True)
    assert torch.equal(inferred.z, latent.vectors.expand(24, 4))


def test_the_prior_learns_the_codes_of_the_averaged_posterior(policy):
    x = torch.randn(50, 6)
    with torch.no_grad():
        policy.latent.posterior_average.weight.neg_()
    inferred = policy.infer(x)
    _, target = policy.latent.assign(policy.latent.posterior_average(x))
    assert not torch.equal(target, policy.latent.assign(policy.posterior(x))[1])
    logits = policy.prior(torch.zeros(50, 16))
    torch.testing.assert_close(inferred.prior_loss, -logits.log_softmax(dim=1)[range(50), target].mean())
    assert inferred.divergence.shape == (50, 0)
    (inferred.prior_loss + inferred.commitment + inferred.z.sum()).backward()
    assert all(p.grad is None for p in policy.latent.posterior_average.parameters())
    assert all(p.grad.abs().sum() > 0 for p in (policy.latent.vectors, *policy.posterior.parameters()))


def test_the_averaged_posterior_follows_fast_at_first_and_slowly_later(policy):
    average, now = policy.latent.posterior_average.weight, policy.posterior.weight
    for updates, decay in ((0, 0.1), (9, 10 / 19), (10**6, 0.999)):
        with torch.no_grad():
            now.add_(torch.randn_like(now))
        expected = torch.lerp(now.detach(), average.detach(), decay)
        policy.latent.follow(policy.posterior, updates, 0.999)
        torch.testing.assert_close(average.detach(), expected)


def test_counts_of_processes_add_up_and_their_errors_are_averaged(policy):
    first, second = policy.infer(torch.randn(8, 6)), policy.infer(torch.randn(8, 6))
    policy.latent.count(first.counted + second.counted)  # the sum over two processes
    policy.latent.count(first.counted)
    assert policy.latent.usage.counts.sum() == 24
    torch.testing.assert_close(policy.latent.error, first.commitment.detach())
    policy.latent.count(first.counted + second.counted)
    torch.testing.assert_close(policy.latent.error, (first.commitment + second.commitment).detach() / 2)


def test_unused_codes_become_copies_of_used_ones_without_memory(policy):
    latent, vectors = policy.latent, policy.latent.vectors
    average = averaged(policy)
    vectors.grad = torch.ones_like(vectors)
    average.optimizer.step()
    before = vectors.detach().clone()
    latent.count(counted([50, 50, 0, 2], 0.04))
    metrics = latent.end_window(policy.prior, average, 100, True)
    assert latent.usage.shares.tolist() == pytest.approx([50 / 102, 50 / 102, 0, 2 / 102])
    assert metrics["codes/replaced"] == 2  # codes with shares below a tenth of 1/4: 0 and 2 / 102
    assert metrics["codes/in_use"] == 2
    expected = np.exp(-2 * 50 / 102 * np.log(50 / 102) - 2 / 102 * np.log(2 / 102))
    assert metrics["codes/perplexity"].item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(vectors[:2], before[:2])
    distance, source = torch.cdist(vectors[2:], before[:2]).min(dim=1)
    assert (distance > 0).all()
    assert (distance < 5 * 0.1 * 0.2 * 2).all()  # a tenth of the distance 0.2 in each of 4 dimensions
    logits = policy.prior(torch.randn(16))
    torch.testing.assert_close(logits[2:], logits[source])  # the prior treats copy and source the same
    assert torch.equal(average.model.latent.vectors[2:], vectors[2:])
    assert (average.optimizer.state[vectors]["exp_avg"][2:] == 0).all()
    assert (average.optimizer.state[vectors]["exp_avg"][:2] != 0).all()
    assert (latent.usage.counts == 0).all()

    # late in training, and after a batch with NaN, nothing changes
    latent.count(counted([100, 0, 0, 0], float("nan")))
    kept = vectors.detach().clone()
    assert latent.end_window(policy.prior, average, 200, False)["codes/replaced"] == 0
    assert torch.equal(vectors, kept)
    latent.count(counted([100, 0, 0, 0], float("nan")))
    latent.end_window(policy.prior, average, 300, True)
    assert torch.isfinite(vectors).all()


def test_a_window_of_skipped_steps_replaces_nothing(policy):
    policy.latent.count(counted([6, 6, 0, 0], 0.1))
    policy.latent.end_window(policy.prior, averaged(policy), 0, True)
    assert policy.latent.end_window(policy.prior, averaged(policy), 1, True)["codes/replaced"] == 0
    assert policy.latent.usage.shares.tolist() == [0.5, 0.5, 0, 0]


def test_a_frozen_codebook_is_not_replaced(policy):
    checkpoint.freeze(policy, ("latent",))
    before = policy.latent.vectors.clone()
    policy.latent.count(counted([100, 0, 0, 0], 0.1))
    metrics = policy.latent.end_window(policy.prior, averaged(policy), 100, True)
    assert metrics["codes/replaced"] == 0
    assert metrics["codes/in_use"] == 1
    assert torch.equal(policy.latent.vectors, before)


def test_a_frozen_prior_keeps_its_rows(policy):
    checkpoint.freeze(policy, ("prior",))
    before = policy.prior.weight.clone()
    policy.latent.count(counted([100, 0, 0, 0], 0.1))
    assert policy.latent.end_window(policy.prior, averaged(policy), 100, True)["codes/replaced"] == 3
    assert torch.equal(policy.prior.weight, before)


def test_distances_between_codes():
    latent = CodebookLatent(3, 2, nn.Identity())
    with torch.no_grad():
        latent.vectors.copy_(torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]))
    metrics = latent.diagnostics()
    assert metrics["codes/nearest_distance"].item() == pytest.approx((3 + 3 + 4) / 3)
    assert metrics["codes/farthest_distance"].item() == pytest.approx((4 + 5 + 5) / 3)
    assert metrics["codes/perplexity"].item() == pytest.approx(3)


def test_codes_are_drawn_as_the_prior_says(policy):
    logits = torch.tensor([0.1, 0.6, 0.0001, 0.2999]).log()
    uniform = torch.cat([torch.tensor([1e-7, 1 - 2**-24]), (torch.arange(1000) + 0.5) / 1000])
    noise = torch.special.ndtri(uniform)[:, None].expand(-1, 4)
    z = policy.latent.draw(logits.expand(len(noise), 4), noise)
    assert torch.equal(z[:2], policy.latent.vectors[[0, 3]])
    counts = torch.cdist(z[2:], policy.latent.vectors).argmin(1).bincount(minlength=4)
    assert counts.tolist() == pytest.approx([100, 600, 0, 300], abs=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(policy.latent.draw(logits.expand(len(noise), 4), noise), z)
    assert torch.isfinite(policy.latent.draw(logits.expand(2, 4), torch.full((2, 4), 99.0))).all()


def test_a_code_needs_two_dimensions():
    with pytest.raises(UserError, match="needs 2 dimensions or more, not 1"):
        CodebookLatent(4, 1, nn.Identity())


@pytest.mark.parametrize("unit", [False, True])
def test_a_normal_latent_is_drawn_and_diverges_as_torchs_normals_do(unit):
    torch.manual_seed(0)
    latent, width = NormalLatent(unit), 3 if unit else 6
    posterior, prior = torch.randn(2, 5, width)

    def normal(output):
        mean, log_var = (output, torch.zeros_like(output)) if unit else output.chunk(2, dim=1)
        return torch.distributions.Normal(mean, (4 * torch.tanh(log_var / 8)).exp())

    q, p = normal(posterior), normal(prior)
    inferred = latent.infer(posterior, prior, (), 20_000, train=True)
    expected = torch.distributions.kl_divergence(q, p)
    torch.testing.assert_close(inferred.divergence, expected)
    torch.testing.assert_close(inferred.prior_loss, expected.sum(dim=1).mean())
    draws = inferred.z.unflatten(0, (5, -1))
    torch.testing.assert_close(draws.mean(dim=1), q.mean, atol=0.05, rtol=0.05)
    torch.testing.assert_close(draws.std(dim=1), q.stddev, atol=0.05, rtol=0.05)
    still = latent.infer(posterior, prior, (), 2, train=False)
    assert torch.equal(still.z, q.mean.repeat_interleave(2, dim=0))
    assert torch.equal(latent.most_probable(posterior), q.mean)
    noise = torch.randn(5, 3)
    torch.testing.assert_close(latent.draw(prior, noise), p.mean + p.stddev * noise)
    if unit:
        torch.testing.assert_close(inferred.divergence, (posterior - prior).square() / 2)


def test_posterior_and_prior_learn_from_losses_of_their_own():
    latent, outputs = NormalLatent(), torch.randn(2, 5, 6, requires_grad=True).unbind()
    inferred = latent.infer(*outputs, (), 1, train=True)
    for loss, learns, does_not in (
        (inferred.divergence.sum(), *outputs),
        (inferred.prior_loss, *reversed(outputs)),
    ):
        assert (torch.autograd.grad(loss, learns, retain_graph=True)[0] != 0).all()
        assert torch.autograd.grad(loss, does_not, allow_unused=True)[0] is None


def test_a_normal_latent_has_nothing_to_count_or_replace():
    latent, output = NormalLatent(), torch.randn(5, 6)
    inferred = latent.infer(output, output, (), 1, train=True)
    latent.count(inferred.counted)
    latent.follow(nn.Identity(), 0, 0.9)
    assert latent.end_window(None, None, 0, True) == {}
    assert inferred.commitment == 0
    assert inferred.metrics["latent/active_dims"] == 0  # posterior and prior are the same
    assert not latent.state_dict()


@pytest.mark.parametrize("shape", [(4,), (1000, 4)])
def test_what_is_picked_is_picked_as_often_as_it_is_probable(shape):
    probabilities = torch.tensor([0.2, 0.0, 0.5, 0.3])
    places = (torch.arange(1000) + 0.5)[:, None] / 1000
    picked = _pick(probabilities.expand(shape), places)
    assert picked.bincount(minlength=4).tolist() == [200, 0, 500, 300]
