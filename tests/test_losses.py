import math

import pytest
import torch

from common import losses


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("loss", "reference"), [(losses.masked_mse, torch.square), (losses.masked_l1, torch.abs)]
)
def test_a_loss_is_the_mean_over_real_elements(loss, reference):
    pred, target = torch.randn(2, 4, 6, 3)
    mask = torch.rand(4, 6) < 0.6
    expected = torch.stack([reference(pred[i, j] - target[i, j]) for i, j in mask.nonzero().tolist()]).mean()
    torch.testing.assert_close(loss(pred, target, mask), expected)


@pytest.mark.parametrize("loss", [losses.masked_mse, losses.masked_l1])
def test_padding_changes_neither_loss_nor_gradient(loss):
    target, mask = torch.randn(4, 6, 3), torch.arange(6).expand(4, 6) < torch.tensor([[6], [3], [1], [5]])
    clean = torch.randn(4, 6, 3)
    values, grads = [], []
    for filling in (0.0, 1e30, float("nan"), float("inf")):
        pred = torch.where(mask[..., None], clean, filling).requires_grad_()
        value = loss(pred, torch.where(mask[..., None], target, filling), mask)
        value.backward()
        values.append(value.detach())
        grads.append(pred.grad)
        assert (pred.grad[~mask] == 0).all()
    assert all(torch.equal(value, values[0]) for value in values)
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_without_a_real_step_the_loss_is_zero():
    assert (
        losses.masked_mse(torch.ones(2, 3, 1), torch.zeros(2, 3, 1), torch.zeros(2, 3, dtype=torch.bool)) == 0
    )


def test_half_precision_is_summed_in_float32():
    pred = torch.full((64, 64, 8), 0.1, dtype=torch.bfloat16)
    value = losses.masked_mse(pred, torch.zeros_like(pred), torch.ones(64, 64, dtype=torch.bool))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(pred[0, 0, 0].float().item() ** 2, rel=1e-5)


def test_the_mean_over_processes_is_the_mean_over_all_their_elements():
    """The halves have different shares of padding; dividing by the mean count makes their average exact."""
    pred, target = torch.randn(2, 8, 6, 3)
    mask = torch.rand(8, 6) < torch.linspace(0.1, 0.9, 8)[:, None]
    count = torch.stack([mask[:4].sum(), mask[4:].sum()]).float().mean()
    halves = [losses.masked_mse(pred[h], target[h], mask[h], count) for h in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(sum(halves) / 2, losses.masked_mse(pred, target, mask))


# Transport


def gaussian_divergence(shift, a, b, epsilon):
    """Debiased entropic transport from N(0, a) to N(shift, b) in one dimension (Janati et al. 2020)."""
    s = epsilon / 2

    def d(u, v):
        return math.sqrt(4 * u * v + s * s)

    traces = d(a, a) / 2 - d(a, b) + d(b, b) / 2
    return shift**2 + traces + s / 2 * math.log((d(a, b) + s) ** 2 / ((d(a, a) + s) * (d(b, b) + s)))


@pytest.mark.parametrize("blur", [0.3, 0.5, 1.0])
def test_transport_between_gaussians_is_what_theory_says(blur):
    quantiles = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    y = torch.distributions.Normal(0, 1).icdf(quantiles)[:, None]
    transport = losses.sinkhorn_divergence(2 * y + 1, y, blur=blur, iterations=300)
    assert transport.marginal_error < 0.01
    assert transport.divergence.item() == pytest.approx(gaussian_divergence(1, 4, 1, blur**2), rel=0.01)


def test_transport_of_a_cloud_that_only_moved_is_the_square_of_the_way():
    x, way = torch.randn(40, 3), torch.tensor([0.5, -1.0, 2.0])
    transport = losses.sinkhorn_divergence(x + way, x, blur=0.5, iterations=200)
    assert transport.divergence.item() == pytest.approx(way.square().sum().item(), rel=1e-3)


def test_identical_clouds_are_at_distance_zero_and_do_not_move():
    x = torch.randn(30, 5, requires_grad=True)
    transport = losses.sinkhorn_divergence(x, x[torch.randperm(30)].detach())
    transport.divergence.backward()
    assert abs(transport.divergence.item()) < 1e-5
    assert x.grad.abs().max() < 1e-5


def test_the_order_of_points_does_not_matter():
    x, y, mass = torch.randn(20, 4), torch.randn(20, 4), torch.rand(20)
    value = losses.sinkhorn_divergence(x, y, mass).divergence
    p = torch.randperm(20)
    torch.testing.assert_close(losses.sinkhorn_divergence(x[p], y[p], mass[p]).divergence, value)
    p = torch.randperm(20)
    torch.testing.assert_close(
        losses.sinkhorn_divergence(x[p], y).divergence, losses.sinkhorn_divergence(x, y).divergence
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_that_of_finite_differences(weighted):
    x = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    y, mass = torch.randn(8, 2, dtype=torch.float64) + 1, torch.rand(8) if weighted else None

    def value(points):
        return losses.sinkhorn_divergence(points, y, mass, blur=0.7, iterations=2000).divergence

    (gradient,) = torch.autograd.grad(value(x), x)
    with torch.no_grad():
        for i in range(8):
            for d in range(2):
                step = torch.zeros_like(x)
                step[i, d] = 1e-5
                slope = (value(x + step) - value(x - step)) / 2e-5
                assert gradient[i, d].item() == pytest.approx(slope.item(), abs=1e-6)


@pytest.mark.parametrize(("share", "tolerance"), [(0.0, 0.25), (0.5, 0.001), (0.9, 0.001)])
def test_the_default_settings_are_good_enough_while_a_policy_learns(share, tolerance):
    """Point clouds of predictions that are noise, half right, nearly right: 32 chunks of 68 numbers."""
    y = losses.transport_points(torch.randn(32, 16, 4), torch.randn(32, 4))
    x = share * y + (1 - share) * losses.transport_points(torch.randn(32, 16, 4), torch.zeros(32, 4))
    x.requires_grad_()
    quick = losses.sinkhorn_divergence(x, y)
    exact = losses.sinkhorn_divergence(x.double(), y.double(), iterations=5000)
    assert quick.divergence.item() == pytest.approx(exact.divergence.item(), rel=0.002)
    (gradient,), (reference,) = (
        torch.autograd.grad(quick.divergence, x),
        torch.autograd.grad(exact.divergence, x),
    )
    assert (gradient - reference).norm() <= tolerance * reference.norm()


def test_points_without_mass_count_for_nothing():
    x, y = torch.randn(2, 12, 3)
    x.requires_grad_()
    mass = (torch.arange(12) < 7).float()
    values = []
    for filling in (0.0, 1e6, math.nan):
        real = (mass > 0)[:, None]
        transport = losses.sinkhorn_divergence(
            torch.where(real, x, 0.5 * filling), torch.where(real, y, filling), mass, blur=0.3
        )
        values.append(transport.divergence)
    alone = losses.sinkhorn_divergence(x[:7], y[:7], blur=0.3).divergence
    assert values[0] == values[1] == values[2]
    torch.testing.assert_close(values[0], alone, rtol=1e-3, atol=1e-4)
    (gradient,) = torch.autograd.grad(values[2], x)
    assert (gradient[7:] == 0).all()


def test_without_mass_the_divergence_is_zero_and_so_is_its_gradient():
    x = torch.randn(5, 2, requires_grad=True)
    transport = losses.sinkhorn_divergence(x, torch.randn(5, 2), torch.zeros(5))
    transport.divergence.backward()
    assert transport.divergence == 0
    assert transport.marginal_error == 0
    assert (x.grad == 0).all()


def test_the_cost_is_the_mean_over_dimensions_and_the_weighted_mean_over_the_state():
    chunks, states = torch.randn(3, 4, 2), torch.randn(3, 5)
    points = losses.transport_points(chunks, states, 0.2)
    for i in range(3):
        for j in range(3):
            cost = (chunks[i] - chunks[j]).square().mean() + 0.2 * (states[i] - states[j]).square().mean()
            torch.testing.assert_close((points[i] - points[j]).square().sum(), cost)


def test_a_chunk_is_a_point_with_its_state_and_without_mass_where_it_is_padded():
    pred, chunks, states = torch.randn(5, 4, 2), torch.randn(5, 4, 2), torch.randn(5, 3)
    is_pad = torch.arange(4).expand(5, 4) >= torch.tensor([4, 4, 2, 4, 0])[:, None]
    x, y = (losses.transport_points(points, states)[[0, 1, 3]] for points in (pred, chunks))
    value = losses.chunk_transport(pred, chunks, states, is_pad, blur=0.3).divergence
    torch.testing.assert_close(value, losses.sinkhorn_divergence(x, y, blur=0.3).divergence)


def test_gradient_descent_on_the_divergence_carries_one_cloud_to_the_other():
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    x, y = torch.randn(24, 2) * 0.2, corners.repeat(6, 1) + 0.1 * torch.randn(24, 2)
    x.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    divergences = []
    for _ in range(150):
        optimizer.zero_grad()
        divergences.append(losses.sinkhorn_divergence(x, y, blur=0.3).divergence)
        divergences[-1].backward()
        optimizer.step()
    assert divergences[-1] < 0.02 * divergences[0]
    assert torch.cdist(y, x.detach()).amin(dim=1).max() < 0.3  # every point of y has a near point


def test_half_precision_and_autocast_are_computed_in_float32():
    x, y = torch.randn(2, 16, 8)
    reference = losses.sinkhorn_divergence(x, y).divergence
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.sinkhorn_divergence(x, y).divergence, reference)
    assert losses.sinkhorn_divergence(x.bfloat16(), y.bfloat16()).divergence.dtype == torch.float32


def test_transport_agrees_with_geomloss():
    """`pip install --no-deps geomloss`. Its cost is |x - y|^2 / 2, with p = 2 and epsilon = blur^2."""
    geomloss = pytest.importorskip("geomloss")
    x, y = torch.randn(2, 50, 4)
    y = y + 0.5
    x.requires_grad_()
    blur = 0.5
    theirs = geomloss.SamplesLoss("sinkhorn", p=2, blur=blur / 2**0.5, scaling=0.999)(x, y)
    ours = losses.sinkhorn_divergence(x, y, blur=blur, iterations=1000).divergence
    assert ours.item() == pytest.approx(2 * theirs.item(), rel=1e-3)
    (mine,), (reference,) = torch.autograd.grad(ours, x), torch.autograd.grad(2 * theirs, x)
    torch.testing.assert_close(mine, reference, rtol=0, atol=0.01 * reference.abs().max().item())


@pytest.mark.parametrize("blur", [0.3, 1.0])
def test_transport_agrees_with_pot(blur):
    """`pip install POT`. Its regularization is the entropy of the plan, with a constant that cancels."""
    ot = pytest.importorskip("ot")
    x, y = torch.randn(2, 40, 3, dtype=torch.float64)
    y = 0.7 * y + 0.5
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)

    def cost(a, b):
        distances = torch.cdist(a, b).square()
        plan = ot.sinkhorn(
            weights, weights, distances, blur**2, method="sinkhorn_log", numItermax=20_000, stopThr=1e-12
        )
        return (plan * distances).sum() + blur**2 * (plan * (plan * 40 * 40).log()).sum()

    expected = cost(x, y) - cost(x, x) / 2 - cost(y, y) / 2
    ours = losses.sinkhorn_divergence(x, y, blur=blur, iterations=1000).divergence
    assert ours.item() == pytest.approx(expected.item(), rel=1e-3)


# Vector quantization


def test_the_nearest_code_is_found():
    codes = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    z = torch.tensor([[0.2, 0.1], [1.6, 0.3], [-0.2, 5.0]])
    assert losses.nearest_code(z, codes).tolist() == [0, 1, 2]


def test_noise_takes_the_place_of_the_quantization_error():
    z, code = torch.randn(2, 5000, 4)
    out = losses.noise_substitution(z, code, torch.randn(5000, 4))
    torch.testing.assert_close((out - z).norm(dim=1), (z - code).norm(dim=1))
    direction = torch.nn.functional.normalize(out - z, dim=1)
    assert direction.mean(0).abs().max() < 0.05  # no direction is preferred
    torch.testing.assert_close(losses.noise_substitution(z, z, torch.randn(5000, 4)), z, atol=1e-5, rtol=0)


def test_gradients_reach_encoder_and_codebook():
    z, code = torch.randn(2, 6, 3, dtype=torch.float64).requires_grad_().unbind()
    noise = torch.randn(6, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: losses.noise_substitution(a, b, noise), (z, code))
    at_code = torch.zeros(2, 3, requires_grad=True)
    losses.noise_substitution(at_code, torch.zeros(2, 3), torch.randn(2, 3)).sum().backward()
    assert torch.isfinite(at_code.grad).all()


def test_the_divergence_of_normals_and_its_gradient_are_those_of_torch():
    from torch.distributions import Normal, kl_divergence

    torch.manual_seed(0)
    parameters = [torch.randn(6, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    mean, log_var, prior_mean, prior_log_var = parameters
    mine = losses.gaussian_kl(*parameters)
    theirs = kl_divergence(
        Normal(mean, (0.5 * log_var).exp()), Normal(prior_mean, (0.5 * prior_log_var).exp())
    )
    torch.testing.assert_close(mine, theirs)
    weights = torch.rand(6, 3, dtype=torch.float64)
    gradients = [torch.autograd.grad((weights * kl).sum(), parameters) for kl in (mine, theirs)]
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)
    assert losses.gaussian_kl(mean, log_var, mean, log_var).abs().max() < 1e-12


def test_experts_are_balanced_at_uniform_use():
    uniform = torch.eye(4).repeat(5, 1) * 0.4 + 0.15  # each expert is the top choice equally often
    assert losses.load_balance(uniform).item() == pytest.approx(1.0)
    torch.manual_seed(0)
    for _ in range(20):
        assert losses.load_balance(torch.softmax(3 * torch.randn(400, 4), dim=1)) > 0.99
    collapsed = torch.tensor([[0.97, 0.01, 0.01, 0.01]]).repeat(8, 1)
    assert losses.load_balance(collapsed).item() == pytest.approx(4 * 0.97)


def test_the_balancing_gradient_takes_from_those_who_have():
    logits = torch.zeros(8, 4)
    logits[:, 0], logits[0, 1] = 1.0, 2.0
    logits.requires_grad_()
    losses.load_balance(logits.softmax(dim=1)).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 2:] < 0).all()


def test_the_router_loss_is_least_at_small_logits():
    assert losses.router_z_loss(torch.full((5, 4), -math.log(4))).item() == pytest.approx(0, abs=1e-6)
    logits = torch.randn(5, 4)
    expected = logits.exp().sum(dim=1).log().square().mean()
    assert losses.router_z_loss(logits).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_error_of_experts_is_weighted_by_their_gates():
    torch.manual_seed(0)
    pred, target, mask = torch.randn(3, 5, 4, 2), torch.randn(5, 4, 2), torch.rand(5, 4) < 0.7
    for e in range(3):
        gates = torch.eye(3)[e].expand(5, 3)
        torch.testing.assert_close(
            losses.expert_mse(pred, target, mask, gates), losses.masked_mse(pred[e], target, mask)
        )
    gates = torch.rand(5, 3).softmax(dim=1)
    squared = ((pred - target) ** 2).mean(-1)  # (E, B, T)
    expected = torch.einsum("ebt,be,bt->", squared, gates, mask.float()) / mask.sum()
    torch.testing.assert_close(losses.expert_mse(pred, target, mask, gates), expected)
    doubled = losses.expert_mse(pred, target, mask, gates, count=2 * mask.sum())
    torch.testing.assert_close(doubled, expected / 2)


def test_sinkhorn_in_a_compiled_loss_is_the_same_to_the_bit(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: compile(f, **(given | {"backend": "eager"})))
    losses._compiled_steps.cache_clear()
    x, y = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    mass = torch.tensor([1.0, 0, 1, 1, 2, 1])
    eager = losses.sinkhorn_divergence(x, y, mass, iterations=19)
    compiled = torch.compile(losses.sinkhorn_divergence, fullgraph=True)(x, y, mass, iterations=19)
    assert torch.equal(eager.divergence, compiled.divergence)
    assert torch.equal(eager.marginal_error, compiled.marginal_error)
    grads = [torch.autograd.grad(found.divergence, x)[0] for found in (eager, compiled)]
    assert torch.equal(*grads)
    losses._compiled_steps.cache_clear()
    torch._dynamo.reset()


def test_where_only_the_policy_is_compiled_so_are_the_iterations(monkeypatch):
    ran = []
    monkeypatch.setattr(losses, "_compiled_steps", lambda: ran.append(1) or losses.sinkhorn_steps)
    x, y = torch.randn(6, 5), torch.randn(6, 5)
    eager = losses.sinkhorn_divergence(x, y, iterations=19)
    assert not ran
    with losses.compiled_iterations():
        found = losses.sinkhorn_divergence(x, y, iterations=19)
    assert ran
    assert torch.equal(found.divergence, eager.divergence)
    assert losses.sinkhorn_divergence(x, y, iterations=19) is not None
    assert len(ran) == 1


@pytest.mark.slow
def test_machine_code_of_sinkhorn_computes_the_same():
    torch._dynamo.reset()
    losses._compiled_steps.cache_clear()
    torch.manual_seed(0)
    x, y = torch.randn(32, 16, requires_grad=True), torch.randn(32, 16)
    found = []
    for run in (losses.sinkhorn_divergence, torch.compile(losses.sinkhorn_divergence, dynamic=False)):
        transport = run(x, y)
        found.append((*transport, torch.autograd.grad(transport.divergence, x)[0]))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)
    losses._compiled_steps.cache_clear()
    torch._dynamo.reset()


@pytest.mark.slow
def test_sinkhorn_as_one_operation_keeps_to_the_rules_of_operations():
    costs, weight = torch.rand(3, 6, 6), torch.full((6,), 1 / 6).log()
    torch.library.opcheck(torch.ops.common.sinkhorn.default, (costs, weight, 0.3, 9))
