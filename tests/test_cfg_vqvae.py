"""What only `train_cfg_vqvae.py` has: codebook, prior, guidance."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common.codebook import Codebook, end_window
from common.schedules import AveragedPolicy, build_optimizer, move_average

import evaluate
import train_cfg_vqvae
import train_vfp
from common import checkpoint
from common.config import parse
from common.data import ChunkDataset, open_dataset
from common.errors import UserError
from common.normalize import Normalizer

CODES = ("--num-codes", "4", "--latent-dim", "4", "--posterior-layers", "1")


def prepare(tiny, *flags):
    """A policy whose every weight has a value, one batch, and what else the loss needs."""
    config = parse(train_cfg_vqvae.Config, [*CODES, *tiny, *flags], "train_cfg_vqvae.py")
    store = open_dataset(config.data)
    data = ChunkDataset(store, range(store.num_episodes), config.horizon)
    torch.manual_seed(0)
    policy = train_cfg_vqvae.Policy(config, checkpoint.PolicySpec.of(data))
    with torch.no_grad():  # zero-initialised projections would hide most gradients
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return config, policy, data.__getitems__([0, 5, 13, 30]), Normalizer.fit(data)


def test_the_code_is_read_off_the_chunk_but_not_off_its_padding(tiny):
    _, policy, _, _ = prepare(tiny)
    actions, tokens = torch.randn(4, 4, 3), torch.randn(4, 7, policy.backbone.token_dim)
    proprio = torch.randn(4, 1, 3)
    is_pad = torch.arange(4).expand(4, 4) >= torch.tensor([[4], [3], [2], [1]])
    z = policy.posterior(proprio, tokens, actions, is_pad)
    filled = torch.where(is_pad[..., None], 100.0, actions)
    torch.testing.assert_close(policy.posterior(proprio, tokens, filled, is_pad), z)
    assert not torch.allclose(policy.posterior(proprio, tokens, actions + 1, is_pad), z)


def test_latents_have_a_fixed_scale(tiny):
    _config, policy, batch, normalizer = prepare(tiny)
    chunks = normalizer.actions(batch.actions, batch.proprio)
    proprio = normalizer.proprio(batch.proprio)
    z = policy(chunks, torch.rand(4), batch.images / 255, proprio, chunks, batch.is_pad).latent
    torch.testing.assert_close(z.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(1, unbiased=False), torch.ones(4), atol=1e-3, rtol=0)


@pytest.mark.parametrize("prior", ["categorical", "regression"])
def test_every_component_learns_and_the_averaged_posterior_does_not(tiny, prior):
    config, policy, batch, normalizer = prepare(tiny, "--prior", prior)
    train_cfg_vqvae.compute_loss(policy, batch, normalizer, config).total.backward()
    for name, component in policy.named_children():
        grads = [p.grad for p in component.parameters()]
        if name == "posterior_average":
            assert all(grad is None for grad in grads)
        else:
            assert all(grad is not None for grad in grads), (
                name
            )  # DDP would wait for the missing one for ever
            assert sum(grad.abs().sum() for grad in grads) > 0


def test_codes_and_prior_do_not_train_the_encoder(tiny):
    """Backbone and encoder have the gradient of the velocity and transport losses alone."""
    config, policy, batch, normalizer = prepare(tiny)
    grads = []
    for parts in (("velocity", "transport"), ("velocity", "transport", "commitment", "prior")):
        torch.manual_seed(0)
        metrics = train_cfg_vqvae.compute_loss(policy, batch, normalizer, config).metrics
        seeing = [*policy.backbone.parameters(), *policy.info_embedder.parameters()]
        grads.append(torch.autograd.grad(sum(metrics[f"loss/{part}"] for part in parts), seeing))
    assert any(grad.abs().sum() > 0 for grad in grads[0])
    for alone, whole in zip(*grads, strict=True):
        torch.testing.assert_close(alone, whole)


def test_the_share_of_dropped_latents_follows_its_ramp(tiny):
    flags = ("--cfg-dropout", "0.4", "--flow-samples", "500")
    config, policy, batch, normalizer = prepare(tiny, *flags)
    seen = []

    def look(x_t, t, images, proprio, actions, is_pad, dropped):
        seen.append(dropped.unflatten(0, (4, 501)))
        raise InterruptedError

    policy.forward = look
    for progress in (0.0, config.cfg_ramp / 2, config.cfg_ramp, 1.0):
        with pytest.raises(InterruptedError):
            train_cfg_vqvae.compute_loss(policy, batch, normalizer, config, progress)
    assert not any(dropped[:, 0].any() for dropped in seen)  # the one-step prediction is with the latent
    shares = [dropped[:, 1:].float().mean().item() for dropped in seen]
    assert shares == pytest.approx([0, 0.2, 0.4, 0.4], abs=0.04)


def test_chunks_past_an_episodes_end_have_no_share_in_the_transport(tiny):
    config, policy, batch, normalizer = prepare(tiny)
    policy.eval()
    draws = torch.randn(8, 4, 3), torch.rand(8)
    batch = batch._replace(is_pad=torch.arange(4).expand(4, 4) >= torch.tensor([[4], [3], [2], [1]]))
    losses = []
    for filling in (0.0, 50.0):
        actions = torch.where(batch.is_pad[..., None], filling, batch.actions)
        batch = batch._replace(actions=actions)
        losses.append(train_cfg_vqvae.compute_loss(policy, batch, normalizer, config, draws=draws))
    assert losses[0].metrics["loss/transport"] > 0
    for name, value in losses[0].metrics.items():
        torch.testing.assert_close(losses[1].metrics[name], value, msg=name)


def test_unused_codes_become_copies_of_used_ones_without_memory(tiny):
    config, policy, _, _ = prepare(tiny)
    codebook = policy.codebook
    optimizer = build_optimizer(policy, config.optim)
    averaged = AveragedPolicy(policy, optimizer, 0.9)
    codebook.vectors.grad = torch.ones_like(codebook.vectors)
    optimizer.step()
    before = codebook.vectors.detach().clone()
    codebook.count(torch.tensor([50.0, 50.0, 0.0, 2.0]), torch.tensor(0.04))
    metrics = end_window(policy.codebook, policy.prior.out, averaged, 100, True)
    assert codebook.usage.tolist() == pytest.approx([50 / 102, 50 / 102, 0, 2 / 102])
    assert metrics["codes/replaced"] == 2  # 2 / 102 is below a tenth of a quarter
    assert metrics["codes/in_use"] == 2
    expected = np.exp(-2 * 50 / 102 * np.log(50 / 102) - 2 / 102 * np.log(2 / 102))
    assert metrics["codes/perplexity"].item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(codebook.vectors[:2], before[:2])
    distance, source = torch.cdist(codebook.vectors[2:], before[:2]).min(dim=1)
    assert (distance > 0).all()
    assert (distance < 5 * 0.1 * 0.2 * 2).all()  # a tenth of the distance 0.2 in each of 4 dimensions
    logits = policy.prior.out(torch.randn(16))
    torch.testing.assert_close(logits[2:], logits[source])  # the prior takes copy and source for the same
    assert torch.equal(averaged.model.codebook.vectors[2:], codebook.vectors[2:])
    assert (optimizer.state[codebook.vectors]["exp_avg"][2:] == 0).all()
    assert (optimizer.state[codebook.vectors]["exp_avg"][:2] != 0).all()
    assert (codebook.counts == 0).all()

    # the same step draws the same; late in training, and after a batch with bad numbers, nothing is spoilt
    codebook.count(torch.tensor([100.0, 0.0, 0.0, 0.0]), torch.tensor(float("nan")))
    kept = codebook.vectors.detach().clone()
    assert end_window(policy.codebook, policy.prior.out, averaged, 200, False)["codes/replaced"] == 0
    assert torch.equal(codebook.vectors, kept)
    codebook.count(torch.tensor([100.0, 0.0, 0.0, 0.0]), torch.tensor(float("nan")))
    end_window(policy.codebook, policy.prior.out, averaged, 300, True)
    assert torch.isfinite(codebook.vectors).all()


def test_distances_between_codes():
    codebook = Codebook(3, 2)
    with torch.no_grad():
        codebook.vectors.copy_(torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]))
    metrics = codebook.diagnostics()
    assert metrics["codes/nearest_distance"].item() == pytest.approx((3 + 3 + 4) / 3)
    assert metrics["codes/farthest_distance"].item() == pytest.approx((4 + 5 + 5) / 3)
    assert metrics["codes/perplexity"].item() == pytest.approx(3)


def test_codes_are_drawn_as_the_prior_says(tiny):
    _, policy, _, _ = prepare(tiny)
    logits = torch.tensor([0.1, 0.6, 0.0001, 0.2999]).log()
    policy.prior.forward = lambda observation: logits.expand(len(observation), 4)
    uniform = (torch.arange(1000) + 0.5) / 1000
    z = policy.draw_latent(torch.zeros(1000, 1, 1), uniform)
    counts = torch.cdist(z, policy.codebook.vectors).argmin(1).bincount(minlength=4)
    assert counts.tolist() == pytest.approx([100, 600, 0, 300], abs=1)
    edges = policy.draw_latent(torch.zeros(2, 1, 1), torch.tensor([0.0, 1 - 2**-24]))
    assert torch.equal(edges, policy.codebook.vectors[[0, 3]])


def test_guided_sampling_is_two_velocities_in_one_call(tiny):
    """One Euler step from x_0 is x_0 + v_null + w (v_z - v_null), computed here one by one."""
    config, policy, batch, normalizer = prepare(tiny, "--guidance", "3", "--sample-steps", "1")
    policy.eval()
    images, proprio = train_cfg_vqvae.vision.to_float(batch.images), normalizer.proprio(batch.proprio)
    x_0, uniform = torch.randn(4, 4, 3), torch.rand(4)
    chunks = train_cfg_vqvae.sample_actions(policy, batch.images, proprio, config, x_0=x_0, uniform=uniform)
    with torch.no_grad():
        _, observation = policy.encode(images, proprio)
        context, t = policy.action_decoder.context(observation), torch.zeros(4)
        z = policy.draw_latent(observation, uniform)
        v_z = policy.action_decoder(x_0, t, context, latent=z)
        v_null = policy.action_decoder(x_0, t, context, latent=policy.codebook.null.expand(4, -1))
    assert not torch.allclose(v_z, v_null)
    torch.testing.assert_close(chunks, x_0 + v_null + 3 * (v_z - v_null), rtol=1e-4, atol=1e-5)


def test_the_averaged_posterior_follows_fast_at_first_and_slowly_later(tiny):
    _, policy, _, _ = prepare(tiny)
    name = next(n for n, _ in policy.posterior.named_parameters())
    average, now = policy.posterior_average.get_parameter(name), policy.posterior.get_parameter(name)
    for step, decay in ((0, 0.1), (9, 10 / 19), (10**6, 0.999)):
        expected = torch.lerp(now.detach(), average.detach(), decay)
        move_average(policy.posterior_average.parameters(), policy.posterior.parameters(), step, 0.999)
        torch.testing.assert_close(average.detach(), expected)


@pytest.mark.usefixtures("accelerate_reset")
def test_codes_are_drawn_and_guidance_is_swept(tiny, tmp_path, capsys):
    run_dir = tmp_path / "run"
    flags = [*tiny, *CODES, "--run-dir", str(run_dir), "--steps", "4", "--code-window", "1"]
    flags += ["--lr", "0.01", "--schedule", "constant", "--warmup-steps", "0", "--ema-decay", "0"]
    train_cfg_vqvae.main(parse(train_cfg_vqvae.Config, flags, "train_cfg_vqvae.py"))
    assert (run_dir / "alternatives.png").stat().st_size > 10_000
    options = [str(run_dir), "--sample-steps", "2", "--guidance", "0", "1", "2.5"]
    evaluate.main(parse(evaluate.Config, options, "evaluate.py"))
    results = json.loads((run_dir / "evaluation" / "results.json").read_text())
    assert list(results["guidance"]) == ["0", "1", "2.5"]
    errors = [result["mae"] for result in results["guidance"].values()]
    assert errors[1] == results["heldout"]["policy"]["mae"]
    assert len(set(errors)) == 3
    folder = run_dir / "evaluation"
    assert {p.name for p in folder.glob("*.png")} == {"alternatives.png", "guidance.png", "heldout.png"}
    assert "guidance  2.5" in capsys.readouterr().out


def test_a_policy_without_guidance_says_so(monkeypatch, tmp_path):
    policy = SimpleNamespace(config=train_vfp.Config(), script=train_vfp)
    monkeypatch.setattr(evaluate, "load_policy", lambda *args, **kwargs: policy)
    with pytest.raises(UserError, match="train_vfp trains no guidance"):
        evaluate.main(evaluate.Config(run=tmp_path, guidance=(1.0,)))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-codes 0", "--num-codes is 0: it must be at least 1"),
        ("--cfg-dropout 1.5", "--cfg-dropout is 1.5: it must lie between 0 and 1"),
        ("--transport-blur 0", "--transport-blur is 0.0: it must be positive"),
        ("--commitment-weight -1", "--commitment-weight is -1.0: it must not be negative"),
        ("--latent-dim 1", "--latent-dim must be at least 2"),
    ],
)
def test_numbers_that_train_nothing_are_refused(tiny, flags, words):
    with pytest.raises(UserError, match=words):
        prepare([*tiny, *flags.split()])


def test_one_code_is_allowed(tiny):
    config, policy, batch, normalizer = prepare(tiny, "--num-codes", "1")
    loss = train_cfg_vqvae.compute_loss(policy, batch, normalizer, config)
    assert torch.isfinite(loss.total)


def test_a_frozen_codebook_is_not_replaced(tiny):
    config, policy, _, _ = prepare(tiny)
    checkpoint.freeze(policy, ("codebook",))
    averaged = AveragedPolicy(policy, build_optimizer(policy, config.optim), 0.9)
    before = policy.codebook.vectors.clone()
    policy.codebook.count(torch.tensor([100.0, 0.0, 0.0, 0.0]), torch.tensor(0.1))
    metrics = end_window(policy.codebook, policy.prior.out, averaged, 100, True)
    assert metrics["codes/replaced"] == 0
    assert metrics["codes/in_use"] == 1
    assert torch.equal(policy.codebook.vectors, before)


def test_a_frozen_prior_keeps_its_rows(tiny):
    config, policy, _, _ = prepare(tiny)
    checkpoint.freeze(policy, ("prior",))
    averaged = AveragedPolicy(policy, build_optimizer(policy, config.optim), 0.9)
    before = policy.prior.out.weight.clone()
    policy.codebook.count(torch.tensor([100.0, 0.0, 0.0, 0.0]), torch.tensor(0.1))
    assert end_window(policy.codebook, policy.prior.out, averaged, 100, True)["codes/replaced"] == 3
    assert torch.equal(policy.prior.out.weight, before)
