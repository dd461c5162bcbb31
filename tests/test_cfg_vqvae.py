"""Parts specific to `train_cfg_vqvae.py`: latent dropout, guidance."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running import SMALL, train

import evaluate
import train_cfg_vqvae
import train_vfp
from common import vision
from common.checkpoint import PolicySpec
from common.config import parse
from common.data import ChunkDataset, open_dataset
from common.errors import UserError
from common.normalize import Normalizer


def prepare(tiny, *flags, script=train_cfg_vqvae):
    """A policy without zero weights, one batch, and what else the loss needs."""
    config = parse(
        script.Config, [*SMALL[script.__name__].split(), *tiny, *flags], Path(script.__file__).name
    )
    store = open_dataset(config.data)
    data = ChunkDataset(store, range(store.num_episodes), config.horizon)
    torch.manual_seed(0)
    policy = script.Policy(config, PolicySpec.of(data))
    with torch.no_grad():  # zero-initialized projections would hide most gradients
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return config, policy, data.__getitems__([0, 5, 13, 30]), Normalizer.fit(data)


def test_the_latent_is_read_off_the_chunk_but_not_off_its_padding(tiny):
    _, policy, _, _ = prepare(tiny)
    actions, tokens = torch.randn(4, 4, 3), torch.randn(4, 7, policy.backbone.token_dim)
    proprio = torch.randn(4, 1, 3)
    is_pad = torch.arange(4).expand(4, 4) >= torch.tensor([[4], [3], [2], [1]])
    z = policy.posterior(proprio, tokens, actions, is_pad)
    filled = torch.where(is_pad[..., None], 100.0, actions)
    torch.testing.assert_close(policy.posterior(proprio, tokens, filled, is_pad), z)
    assert not torch.allclose(policy.posterior(proprio, tokens, actions + 1, is_pad), z)


def test_every_component_learns_and_the_averaged_posterior_does_not(tiny):
    config, policy, batch, normalizer = prepare(tiny)
    loss, _ = train_cfg_vqvae.compute_loss(policy, batch, normalizer, config, train=True)
    loss.backward()
    for name, parameter in policy.named_parameters():  # DDP would wait forever for a missing gradient
        assert (parameter.grad is None) == name.startswith("latent.posterior_average."), name
    for name, component in policy.named_children():
        assert sum(p.grad.abs().sum() for p in component.parameters() if p.grad is not None) > 0, name


def test_codes_and_prior_do_not_train_the_encoder(tiny):
    """Backbone and encoder get gradients only from the velocity and transport losses."""
    config, policy, batch, normalizer = prepare(tiny)
    grads = []
    for parts in (("velocity", "transport"), ("velocity", "transport", "commitment", "kl")):
        torch.manual_seed(0)
        _, metrics = train_cfg_vqvae.compute_loss(policy, batch, normalizer, config, train=True)
        seeing = [*policy.backbone.parameters(), *policy.info_embedder.parameters()]
        grads.append(torch.autograd.grad(sum(metrics[f"loss/{part}"] for part in parts), seeing))
    assert any(grad.abs().sum() > 0 for grad in grads[0])
    for alone, whole in zip(*grads, strict=True):
        torch.testing.assert_close(alone, whole)


def test_the_share_of_dropped_latents_follows_its_ramp(tiny):
    flags = ("--cfg-dropout", "0.4", "--flow-samples", "500")
    config, policy, batch, normalizer = prepare(tiny, *flags)
    seen = []

    def look(x_t, t, images, proprio, actions, is_pad, train, dropped, task):
        seen.append(dropped.unflatten(0, (4, 501)))
        raise InterruptedError

    policy.forward = look
    for progress in (0.0, config.cfg_ramp / 2, config.cfg_ramp, 1.0):
        with pytest.raises(InterruptedError):
            train_cfg_vqvae.compute_loss(policy, batch, normalizer, config, progress, train=True)
    assert not any(dropped[:, 0].any() for dropped in seen)  # the one-step prediction keeps the latent
    shares = [dropped[:, 1:].float().mean().item() for dropped in seen]
    assert shares == pytest.approx([0, 0.2, 0.4, 0.4], abs=0.04)


def test_a_dropped_latent_gives_way_to_the_null_token(tiny):
    _, policy, batch, normalizer = prepare(tiny)
    chunks, proprio = normalizer.actions(batch.actions, batch.proprio), normalizer.proprio(batch.proprio)
    dropped = torch.tensor([True, False, True, False])
    observation = vision.to_float(batch.images), proprio, chunks, batch.is_pad
    _, latent = policy(chunks, torch.rand(4), *observation, train=False, dropped=dropped)
    assert torch.equal(latent.z[dropped], policy.latent.null.expand(2, -1))
    _, whole = policy(chunks, torch.rand(4), *observation, train=False)
    assert torch.equal(latent.z[~dropped], whole.z[~dropped])


def test_chunks_past_an_episodes_end_have_no_share_in_the_transport(tiny):
    config, policy, batch, normalizer = prepare(tiny)
    policy.eval()
    noise = {"x_0": torch.randn(8, 4, 3), "t": torch.rand(8)}
    batch = batch._replace(is_pad=torch.arange(4).expand(4, 4) >= torch.tensor([[4], [3], [2], [1]]))
    logged = []
    for filling in (0.0, 50.0):
        batch = batch._replace(actions=torch.where(batch.is_pad[..., None], filling, batch.actions))
        logged.append(
            train_cfg_vqvae.compute_loss(policy, batch, normalizer, config, train=False, **noise)[1]
        )
    assert logged[0]["loss/transport"] > 0
    for name, value in logged[0].items():
        torch.testing.assert_close(logged[1][name], value, msg=name)


def test_guided_sampling_is_two_velocities_in_one_call(tiny):
    """One Euler step from x_0 is x_0 + v_null + w (v_z - v_null), computed here term by term."""
    config, policy, batch, normalizer = prepare(tiny, "--guidance", "3", "--sample-steps", "1")
    policy.eval()
    images, proprio = vision.to_float(batch.images), normalizer.proprio(batch.proprio)
    x_0, noise = torch.randn(4, 4, 3), torch.randn(4, 4)
    chunks = train_cfg_vqvae.sample_actions(policy, batch.images, proprio, config, x_0=x_0, noise=noise)
    with torch.no_grad():
        _, observation = policy.encode(images, proprio)
        context, t = policy.action_decoder.context(observation), torch.zeros(4)
        z = policy.latent.draw(policy.prior(observation), noise)
        v_z = policy.action_decoder(x_0, t, context, latent=z)
        v_null = policy.action_decoder(x_0, t, context, latent=policy.latent.null.expand(4, -1))
    assert not torch.allclose(v_z, v_null)
    torch.testing.assert_close(chunks, x_0 + v_null + 3 * (v_z - v_null), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("accelerate_reset")
def test_codes_are_drawn_and_guidance_is_swept(tiny, tmp_path, capsys):
    run_dir = tmp_path / "run"
    flags = ["--steps", "4", "--lr", "0.01", "--schedule", "constant", "--warmup-steps", "0"]
    train(train_cfg_vqvae, tiny, run_dir, *flags, "--ema-decay", "0")
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


@pytest.mark.usefixtures("accelerate_reset")
def test_guidance_needs_a_decoder_that_was_trained_without_latent(tiny, tmp_path):
    flags = ("--steps", "1", "--cfg-dropout", "0")
    with pytest.raises(UserError, match="--guidance needs --cfg-dropout"):
        train(train_cfg_vqvae, tiny, tmp_path / "run", *flags, "--guidance", "2")
    run_dir = train(train_cfg_vqvae, tiny, tmp_path / "run", *flags)
    with pytest.raises(UserError, match="--guidance: the policy was trained with --cfg-dropout 0"):
        evaluate.main(parse(evaluate.Config, [str(run_dir), "--guidance", "1", "2"], "evaluate.py"))


def test_a_policy_without_guidance_says_so(monkeypatch, tmp_path):
    policy = SimpleNamespace(config=train_vfp.Config(), script=train_vfp)
    monkeypatch.setattr(evaluate, "load_policy", lambda *args, **kwargs: policy)
    with pytest.raises(UserError, match="train_vfp trains no guidance"):
        evaluate.main(evaluate.Config(run=tmp_path, guidance=(1.0,)))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-codes 0", "--num-codes is 0: it should be greater than 0"),
        ("--cfg-dropout 1.5", "--cfg-dropout is 1.5: it should be less than or equal to 1"),
        ("--transport-blur 0", "--transport-blur is 0.0: it should be greater than 0"),
        ("--commitment-weight -1", "--commitment-weight is -1.0: it should be greater than or equal to 0"),
        ("--latent-dim 1", "needs 2 dimensions or more, not 1: make the latent wider"),
    ],
)
def test_numbers_that_train_nothing_are_refused(tiny, flags, words):
    with pytest.raises(UserError, match=words):
        prepare(tiny, *flags.split())


def test_one_code_is_allowed(tiny):
    config, policy, batch, normalizer = prepare(tiny, "--num-codes", "1")
    loss, _ = train_cfg_vqvae.compute_loss(policy, batch, normalizer, config, train=True)
    assert torch.isfinite(loss)
