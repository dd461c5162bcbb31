"""What only `train_vfp_moe.py` has: normal latent, gate, experts."""

import json

import numpy as np
import pytest
import torch

import evaluate
import train_vfp_moe
from common import checkpoint, flow
from common.config import parse
from common.data import ChunkDataset, demo, open_dataset
from common.errors import UserError
from common.normalize import Normalizer

SMALL = ("--num-experts", "3", "--latent-dim", "4", "--posterior-layers", "1")


def prepare(tiny, *flags):
    """A policy whose every weight has a value, one batch, and what else the loss needs."""
    config = parse(train_vfp_moe.Config, [*SMALL, *tiny, *flags], "train_vfp_moe.py")
    store = open_dataset(config.data)
    data = ChunkDataset(store, range(store.num_episodes), config.horizon)
    torch.manual_seed(0)
    policy = train_vfp_moe.Policy(config, checkpoint.PolicySpec.of(data))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return config, policy.train(), data.__getitems__([0, 5, 13, 30]), Normalizer.fit(data)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--variances", "unit"),
        ("--latent", "vq", "--num-codes", "4"),
        ("--top-k", "1"),
        ("--decoder-layers", "3", "--expert-layers", "1"),
    ],
    ids=str,
)
def test_every_weight_gets_a_gradient(tiny, flags):
    """So that several processes need not look for unused parameters, with fewer experts at a time either."""
    config, policy, batch, normalizer = prepare(tiny, *flags)
    train_vfp_moe.compute_loss(policy, batch, normalizer, config).total.backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is None) == name.startswith("posterior_average."), name


def test_the_chosen_expert_alone_gives_what_all_give_with_a_one_hot_gate(tiny):
    config, policy, batch, normalizer = prepare(tiny)
    policy.eval()
    images, proprio = batch.images / 255, normalizer.proprio(batch.proprio)
    _, observation = policy.encode(images, proprio)
    z, x_0 = torch.randn(4, 4), torch.randn(4, 4, 3)
    experts = torch.tensor([2, 0, 2, 1])
    mine = train_vfp_moe.integrate_experts(policy, observation, z, experts, x_0, config, steps=3)
    decoder = policy.moe_action_decoder
    context = decoder.context(observation)
    one_hot = torch.nn.functional.one_hot(experts, 3).float()

    def velocity(x, t):
        return torch.einsum("be,ebta->bta", one_hot, decoder(x, t, context, z))

    with torch.no_grad():
        dense = flow.integrate(velocity, x_0, 3, "euler")
    torch.testing.assert_close(mine, dense, atol=1e-5, rtol=1e-4)


def test_other_experts_are_not_touched_when_acting(tiny):
    config, policy, batch, normalizer = prepare(tiny)
    policy.eval()
    proprio = normalizer.proprio(batch.proprio)
    options = {"x_0": torch.randn(4, 4, 3), "noise": torch.randn(4, 4)}
    with torch.no_grad():
        policy.gate.logits.bias.copy_(torch.tensor([0.0, 1e4, 0.0]))  # always the second
        before = train_vfp_moe.sample_actions(policy, batch.images, proprio, config, **options)
        for name, parameter in policy.moe_action_decoder.named_parameters():
            if parameter.shape[0] == 3 and ("experts" in name or "velocity_out" in name):
                parameter[0], parameter[2] = float("nan"), float("nan")
        after = train_vfp_moe.sample_actions(policy, batch.images, proprio, config, **options)
    assert torch.equal(before, after)
    assert torch.isfinite(after).all()


def test_the_latent_reaches_gate_and_chunk(tiny):
    gate = train_vfp_moe.Gate(4, 3)
    assert not torch.allclose(gate(torch.zeros(1, 4)), gate(torch.ones(1, 4)))
    config, policy, batch, normalizer = prepare(tiny)
    policy.eval()
    proprio, x_0 = normalizer.proprio(batch.proprio), torch.randn(4, 4, 3)
    chunks = [
        train_vfp_moe.sample_actions(policy, batch.images, proprio, config, x_0=x_0, noise=noise)
        for noise in (torch.zeros(4, 4), torch.ones(4, 4))
    ]
    assert not torch.allclose(*chunks)


def test_posterior_and_prior_do_not_train_the_encoder(tiny):
    config, policy, batch, normalizer = prepare(tiny, "--transport-weight", "0")
    loss = train_vfp_moe.compute_loss(policy, batch, normalizer, config).metrics["loss/kl"]
    grads = torch.autograd.grad(loss, list(policy.backbone.parameters()), allow_unused=True)
    assert all(grad is None for grad in grads)


def test_unit_variances_make_the_divergence_half_a_squared_distance(tiny):
    _config, policy, batch, normalizer = prepare(tiny, "--variances", "unit")
    policy.eval()
    chunks, proprio = normalizer.actions(batch.actions, batch.proprio), normalizer.proprio(batch.proprio)
    images = batch.images / 255
    prediction = policy(chunks, torch.rand(4), images, proprio, chunks, batch.is_pad)
    _, observation = policy.encode(images, proprio)
    expected = (prediction.latent - policy.prior(observation)).square() / 2
    torch.testing.assert_close(prediction.divergence, expected)


def test_the_divergence_is_warmed_up_and_free_within_its_bits(tiny):
    flags = ("--kl-weight", "5", "--gate-warmup", "0")
    config, policy, batch, normalizer = prepare(tiny, *flags, "--kl-warmup", "0.5")
    policy.eval()
    draws = torch.randn(4, 4, 3), torch.rand(4)

    def total(progress, config=config):
        return train_vfp_moe.compute_loss(policy, batch, normalizer, config, progress, draws)

    start, middle, end = total(1e-7), total(0.25), total(1.0)
    assert (end.total - start.total).item() == pytest.approx(5 * end.metrics["loss/kl"].item(), rel=1e-4)
    assert (middle.total - start.total).item() == pytest.approx(2.5 * end.metrics["loss/kl"].item(), rel=1e-4)
    free, *_ = prepare(tiny, *flags, "--free-bits", "100")
    assert total(1.0, free).total.item() == pytest.approx(start.total.item() + 5 * 100 * 4, rel=1e-4)


def test_only_the_most_probable_experts_learn_if_asked(tiny):
    config, policy, batch, normalizer = prepare(tiny, "--top-k", "1", "--gate-noise", "0")
    with torch.no_grad():
        policy.gate.logits.bias.copy_(torch.tensor([0.0, 50.0, 0.0]))
    loss = train_vfp_moe.compute_loss(policy, batch, normalizer, config)
    assert loss.experts.tolist() == [0, 4 * 3, 0]  # of the draws of four samples, two and the one at t = 0
    loss.total.backward()
    grad = policy.moe_action_decoder.velocity_out.weight.grad
    assert (grad[1] != 0).any()
    assert (grad[[0, 2]] == 0).all()
    with pytest.raises(UserError, match="--top-k 4: there are 3 experts"):
        prepare(tiny, "--top-k", "4")


def test_usage_is_counted_between_lines_of_the_log():
    gate = train_vfp_moe.Gate(4, 4)
    gate.counts += torch.tensor([50.0, 30.0, 20.0, 0.0])
    metrics = {name: value.item() for name, value in gate.end_window().items()}
    shares = np.array([0.5, 0.3, 0.2])
    assert [metrics[f"experts/use_{e}"] for e in range(4)] == pytest.approx([0.5, 0.3, 0.2, 0.0])
    assert metrics["experts/usage_entropy"] == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-5)
    assert (metrics["experts/most_used"], metrics["experts/least_used"]) == (0.5, 0.0)
    assert gate.counts.sum() == 0


def test_idle_experts_are_reported(capsys):
    train_vfp_moe.report_experts(50, {f"experts/use_{e}": 0.25 for e in range(4)}, 4)
    assert capsys.readouterr().out == ""
    train_vfp_moe.report_experts(50, {"experts/use_0": 0.99, "experts/use_1": 0.005}, 2)
    assert "experts 1 of 2 are hardly used" in capsys.readouterr().out


def test_alternatives_are_drawn_for_each_expert(tiny, tmp_path):
    config, policy, _, normalizer = prepare(tiny)
    store = open_dataset(config.data)
    data = ChunkDataset(store, range(store.num_episodes), config.horizon)
    policy.eval()
    train_vfp_moe.draw_alternatives(policy, data, normalizer, config, tmp_path / "alternatives.png")
    assert (tmp_path / "alternatives.png").stat().st_size > 10_000
    assert train_vfp_moe.draw_experts(policy, data, normalizer, config, tmp_path / "latents.png") == {}
    assert (tmp_path / "latents.png").stat().st_size > 10_000


def test_evaluate_draws_experts(tiny, tmp_path, accelerate_reset):
    flags = [*SMALL, *tiny, "--run-dir", str(tmp_path / "run"), "--steps", "2"]
    train_vfp_moe.main(parse(train_vfp_moe.Config, flags, "train_vfp_moe.py"))
    evaluate.main(evaluate.Config(tmp_path / "run", sample_steps=(1,)))
    folder = tmp_path / "run" / "evaluation"
    assert (folder / "alternatives.png").is_file()
    assert json.loads((folder / "results.json").read_text())["heldout"]["policy"]["mae"] > 0


def test_modes_of_demonstrations_are_read_off_their_states():
    episodes = demo.demonstrate(24, seed=3)
    modes = demo.modes([episode["state"] for episode in episodes])
    sides = np.random.default_rng((3, 24, 1)).choice([-1, 1], (24, 2))  # as the demonstrator drew them
    assert (modes == (sides > 0) @ [2, 1]).all()
    assert len(set(modes.tolist())) == 4


def test_all_experts_learn_alike_at_first(tiny):
    config, policy, batch, normalizer = prepare(tiny, "--gate-warmup", "0.5", "--transport-weight", "0")
    with torch.no_grad():
        policy.gate.logits.bias.copy_(torch.tensor([0.0, 50.0, 0.0]))
    weight = policy.moe_action_decoder.velocity_out.weight
    for progress, share in ((0.0, 1 / 3), (0.25, 1 / 6), (0.5, 0.0)):
        policy.eval()  # the same noise each time
        draws = torch.ones(4, 4, 3), torch.full((4,), 0.3)
        loss = train_vfp_moe.compute_loss(policy, batch, normalizer, config, progress, draws)
        grad = torch.autograd.grad(loss.total, weight)[0].norm(dim=(1, 2))
        if progress == 0:
            whole = grad * 3
        torch.testing.assert_close(grad[0], whole[0] * share, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(grad[1], whole[1] * (1 - 2 * share), atol=1e-6, rtol=1e-3)
