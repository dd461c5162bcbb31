"""Parts specific to `train_vfp_moe.py`: normal latent, gate, experts."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from running import train
from test_cfg_vqvae import prepare as prepare_script

import evaluate
import train_vfp_moe
from benchmarks import experts
from common import flow
from common.data import ChunkDataset, demo, open_dataset
from common.errors import UserError
from common.latent import first_latents
from common.transformer import take_expert


def prepare(tiny, *flags):
    return prepare_script(tiny, "--num-experts", "3", *flags, script=train_vfp_moe)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--variances", "unit"),
        ("--latent", "vq", "--num-codes", "4"),
        ("--decoder-layers", "3", "--expert-layers", "1"),
    ],
    ids=str,
)
def test_every_weight_gets_a_gradient(tiny, flags):
    """Otherwise, several processes would have to look for unused parameters."""
    config, policy, batch, normalizer = prepare(tiny, *flags)
    loss, _ = train_vfp_moe.compute_loss(policy, batch, normalizer, config, train=True)
    loss.backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is None) == name.startswith("latent.posterior_average."), name


def test_the_chosen_expert_alone_gives_what_all_give_with_a_one_hot_gate(tiny):
    config, policy, batch, normalizer = prepare(tiny, "--decoder-layers", "2", "--expert-layers", "1")
    policy.eval()
    images, proprio = batch.images / 255, normalizer.proprio(batch.proprio)
    _, observation = policy.encode(images, proprio)
    z, x_0 = torch.randn(4, 4), torch.randn(4, 4, 3)
    experts = torch.tensor([2, 0, 2, 1])
    mine = train_vfp_moe.integrate(policy, observation, z, x_0, config, 3, experts)
    decoder = policy.action_decoder
    context = decoder.context(observation)
    one_hot = torch.nn.functional.one_hot(experts, 3).float()

    def velocity(x, t):
        return torch.einsum("be,ebta->bta", one_hot, decoder(x, t, context, None, z))

    with torch.no_grad():
        dense = flow.integrate(velocity, x_0, 3, "euler")
    torch.testing.assert_close(mine, dense, atol=1e-5, rtol=1e-4)


def test_an_expert_is_found_by_its_number_on_the_device(tiny):
    _, policy, batch, normalizer = prepare(tiny, "--decoder-layers", "2", "--expert-layers", "1")
    policy.eval()
    _, observation = policy.encode(batch.images / 255, normalizer.proprio(batch.proprio))
    x, t, z = torch.randn(4, 4, 3), torch.rand(4), torch.randn(4, 4)
    given = []
    for which in (1, torch.tensor([1])):
        decoder = take_expert(policy.action_decoder, which)
        given.append(decoder(x, t, decoder.context(observation), None, z))
    assert torch.equal(*given)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nobody waits for a CPU")
def test_nobody_waits_for_the_expert_of_one_observation(tiny):
    config, policy, batch, normalizer = prepare(tiny)
    policy, batch, normalizer = policy.cuda().eval(), batch.to("cuda"), normalizer.to("cuda")
    _, observation = policy.encode(batch.images[:1] / 255, normalizer.proprio(batch.proprio[:1]))
    z, x_0 = torch.randn(1, 4, device="cuda"), torch.randn(1, 4, 3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        chunk = train_vfp_moe.integrate(policy, observation, z, x_0, config, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    pair = [part.repeat(2, *[1] * (part.ndim - 1)) for part in (*observation, z, x_0)]
    both = train_vfp_moe.integrate(policy, type(observation)(*pair[:2]), pair[2], pair[3], config, 3)
    torch.testing.assert_close(both[:1], chunk, atol=1e-4, rtol=1e-4)


def test_other_experts_are_not_touched_when_acting(tiny):
    config, policy, batch, normalizer = prepare(tiny)
    policy.eval()
    proprio = normalizer.proprio(batch.proprio)
    options = {"x_0": torch.randn(4, 4, 3), "noise": torch.randn(4, 4)}
    with torch.no_grad():
        policy.gate.logits.bias.copy_(torch.tensor([0.0, 1e4, 0.0]))  # always chooses the second
        before = train_vfp_moe.sample_actions(policy, batch.images, proprio, config, **options)
        for name, parameter in policy.action_decoder.named_parameters():
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


@pytest.mark.parametrize("latent", ["gaussian", "vq"])
def test_the_prior_trains_the_encoder_and_the_posterior_does_not(tiny, latent):
    _, policy, batch, normalizer = prepare(tiny, "--latent", latent)
    proprio, chunks = normalizer.proprio(batch.proprio), normalizer.actions(batch.actions, batch.proprio)
    x_t, t = torch.randn(4, 4, 3), torch.rand(4)
    _, _, found = policy(x_t, t, batch.images / 255, proprio, chunks, batch.is_pad, train=True)
    backbone = list(policy.backbone.parameters())
    posteriors = found.z.square().sum() + found.divergence.sum() + found.commitment
    assert not any_gradient(posteriors, backbone)
    assert any_gradient(posteriors, policy.posterior.parameters())
    assert any_gradient(found.prior_loss, backbone)
    assert not any_gradient(found.prior_loss, policy.posterior.parameters())


def any_gradient(loss, parameters):
    """Whether any of the parameters learns from the loss."""
    grads = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
    return any(grad is not None and grad.any() for grad in grads)


def test_the_priors_loss_has_a_weight(tiny):
    config, policy, batch, normalizer = prepare(tiny)
    policy.eval()
    noise, found = {"x_0": torch.randn(4, 4, 3), "t": torch.rand(4)}, []
    for weight in (1, 3):
        config = replace(config, prior_weight=weight)
        found.append(train_vfp_moe.compute_loss(policy, batch, normalizer, config, train=False, **noise))
    (one, _), (three, metrics) = found
    torch.testing.assert_close(three - one, 2 * metrics["loss/kl"])


def test_the_divergence_is_warmed_up_and_free_within_its_bits(tiny):
    flags = ("--kl-weight", "5", "--gate-warmup", "0")
    config, policy, batch, normalizer = prepare(tiny, *flags, "--kl-warmup", "0.5")
    policy.eval()
    noise = {"x_0": torch.randn(4, 4, 3), "t": torch.rand(4)}

    def total(progress, config=config):
        loss, metrics = train_vfp_moe.compute_loss(
            policy, batch, normalizer, config, progress, train=False, **noise
        )
        return loss.item(), metrics["loss/kl"].item()

    (start, _), (middle, _), (end, kl) = total(1e-7), total(0.25), total(1.0)
    assert end - start == pytest.approx(5 * kl, rel=1e-4)
    assert middle - start == pytest.approx(2.5 * kl, rel=1e-4)
    free, *_ = prepare(tiny, *flags, "--free-bits", "100")
    assert total(1.0, free)[0] == pytest.approx(start + 5 * 100 * 4, rel=1e-4)


def test_the_most_probable_experts_are_counted_and_learn(tiny):
    config, policy, batch, normalizer = prepare(tiny, "--gate-noise", "0")
    with torch.no_grad():
        policy.gate.logits.bias.copy_(torch.tensor([0.0, 200.0, 0.0]))
    loss, metrics = train_vfp_moe.compute_loss(policy, batch, normalizer, config, train=True)
    assert metrics["experts"].tolist() == [
        0,
        4 * 3,
        0,
    ]  # two draws per sample, and one at t = 0, of four samples
    loss.backward()
    grad = policy.action_decoder.velocity_out.weight.grad
    assert (grad[1] != 0).any()
    assert (grad[[0, 2]] == 0).all()


def test_all_experts_learn_alike_at_first(tiny):
    config, policy, batch, normalizer = prepare(tiny, "--gate-warmup", "0.5", "--transport-weight", "0")
    with torch.no_grad():
        policy.gate.logits.bias.copy_(torch.tensor([0.0, 50.0, 0.0]))
    weight, noise = (
        policy.action_decoder.velocity_out.weight,
        {"x_0": torch.ones(4, 4, 3), "t": torch.full((4,), 0.3)},
    )
    policy.eval()
    for progress, share in ((0.0, 1 / 3), (0.25, 1 / 6), (0.5, 0.0)):
        loss, _ = train_vfp_moe.compute_loss(
            policy, batch, normalizer, config, progress, train=False, **noise
        )
        grad = torch.autograd.grad(loss, weight)[0].norm(dim=(1, 2))
        if progress == 0:
            whole = grad * 3
        torch.testing.assert_close(grad[0], whole[0] * share, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(grad[1], whole[1] * (1 - 2 * share), atol=1e-6, rtol=1e-3)


def test_more_layers_of_experts_than_there_are_layers_are_refused(tiny):
    with pytest.raises(UserError, match="--expert-layers must be at most --decoder-layers, 1"):
        prepare(tiny, "--expert-layers", "2")


def test_usage_is_counted_between_lines_of_the_log():
    gate = train_vfp_moe.Gate(4, 4)
    gate.usage.counts += torch.tensor([50.0, 30.0, 20.0, 0.0])
    metrics = {name: value.item() for name, value in gate.end_window().items()}
    shares = np.array([0.5, 0.3, 0.2])
    assert [metrics[f"experts/use_{e}"] for e in range(4)] == pytest.approx([0.5, 0.3, 0.2, 0.0])
    assert metrics["experts/usage_entropy"] == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-5)
    assert (metrics["experts/most_used"], metrics["experts/least_used"]) == (0.5, 0.0)
    assert gate.usage.counts.sum() == 0


def test_idle_experts_are_reported(capsys):
    train_vfp_moe.report_idle_experts(50, {f"experts/use_{e}": 0.25 for e in range(4)}, 4)
    train_vfp_moe.report_idle_experts(51, {}, 4)  # no line is due
    assert capsys.readouterr().out == ""
    train_vfp_moe.report_idle_experts(50, {"experts/use_0": 0.99, "experts/use_1": 0.005}, 2)
    assert "step 50  experts 1 of 2 are hardly used" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [(), ("--latent", "vq", "--num-codes", "4")], ids=str)
def test_latents_of_episodes_are_the_most_probable_of_their_first_chunks(tiny, flags):
    config, policy, _, normalizer = prepare(tiny, *flags)
    store = open_dataset(config.data)
    data = ChunkDataset(store, [0, 2, 3], config.horizon)
    policy.eval()
    z, steps = first_latents(policy, data, normalizer, most=2, batch_size=1)
    assert steps.tolist() == [store.episode_starts[0], store.episode_starts[3]]
    batch = data.__getitems__(np.flatnonzero(np.isin(data.rows, steps)))
    chunks, proprio = normalizer.actions(batch.actions, batch.proprio), normalizer.proprio(batch.proprio)
    _, _, latent = policy(
        chunks, torch.rand(2), batch.images / 255, proprio, chunks, batch.is_pad, train=False
    )
    torch.testing.assert_close(z, latent.z)


def test_a_run_draws_its_experts_and_so_does_its_evaluation(tiny, tmp_path, accelerate_reset):
    run = train(train_vfp_moe, tiny, tmp_path / "run", "--steps", "2")
    evaluate.main(evaluate.Config(run, sample_steps=(1,)))
    for picture in ("alternatives.png", "latents.png", "evaluation/alternatives.png"):
        assert (run / picture).stat().st_size > 10_000
    assert json.loads((run / "evaluation" / "results.json").read_text())["heldout"]["policy"]["mae"] > 0


def test_modes_of_demonstrations_are_read_off_their_states():
    episodes = list(demo.demonstrate(24, seed=3))
    modes = experts.modes([episode.state for episode in episodes])
    sides = np.random.default_rng((3, 24, 1)).choice([-1, 1], (24, 2))  # as drawn by the demonstrator
    assert (modes == (sides > 0) @ [2, 1]).all()
    assert len(set(modes.tolist())) == 4
