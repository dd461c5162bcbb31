"""Every training script on a small dataset: it learns, resumes exactly, and refuses what it must."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lerobot_factory import make_dataset
from running import SMALL, fitting, interrupt_after, lines, reset, train, weights
from safetensors.torch import load_file

import train_cfg_vqvae
import train_naive_fm
import train_vfp
import train_vfp_depth
import train_vfp_moe
from common import checkpoint
from common.checkpoint import PolicySpec
from common.config import parse
from common.data import ChunkDataset, open_dataset
from common.errors import UserError
from common.inference import load_policy, load_script
from common.normalize import Normalizer
from common.run import _new_folder, start_run
from examples import train_mean_flow, train_regression, train_two_step

SCRIPTS = [train_vfp, train_vfp_depth, train_naive_fm, train_cfg_vqvae, train_vfp_moe]
EXAMPLES = [train_regression, train_two_step, train_mean_flow]
pytestmark = pytest.mark.usefixtures("accelerate_reset", "tiny_depth")


def prepared(script, batch, policy):
    """A batch as the script's loop passes it to `compute_loss`."""
    return script.with_depth(batch, policy) if script is train_vfp_depth else batch


@pytest.mark.parametrize("script", [*SCRIPTS, *EXAMPLES])
def test_the_loss_falls_on_one_batch(script, tiny):
    flags = [
        *SMALL.get(script.__name__, "").split(),
        *(("--camera-dropout", "0") if script in (train_vfp, train_vfp_depth) else ()),
    ]
    config = parse(script.Config, [*fitting(script, [*tiny, "--flow-samples", "4"]), *flags], "")
    store = open_dataset(config.data)
    data = ChunkDataset(store, range(store.num_episodes), config.horizon)
    normalizer = Normalizer.fit(data)
    torch.manual_seed(0)
    policy = script.Policy(config, PolicySpec.of(data))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    batch = prepared(script, data.__getitems__([0, 5, 13, 30]), policy)
    history = []
    for _ in range(150):
        loss, _ = script.compute_loss(policy, batch, normalizer, config, train=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    start, end = sum(history[:20]) / 20, sum(history[-20:]) / 20
    assert end < 0.5 * start
    generator = torch.Generator().manual_seed(0)
    samples = script.sample_actions(
        policy.eval(), batch.images, normalizer.proprio(batch.proprio), config, 10, generator
    )
    error = (samples - normalizer.actions(batch.actions, batch.proprio)).abs()[~batch.is_pad].mean()
    assert error < 0.35  # the normalized actions of the batch spread by about 1


EMA, ACCUMULATION = (), ("--grad-accumulation", "2", "--ema-decay", "0")
SCHEDULE_FREE, ONECYCLE = ("--schedule", "schedule-free"), ("--schedule", "onecycle")


@pytest.mark.parametrize(
    ("script", "options"),
    [
        *((train_vfp, options) for options in (EMA, ACCUMULATION, SCHEDULE_FREE, ONECYCLE)),
        (train_vfp_depth, EMA),
        (train_naive_fm, SCHEDULE_FREE),
        (train_cfg_vqvae, ACCUMULATION),
        (train_vfp_moe, SCHEDULE_FREE),
    ],
    ids=lambda value: getattr(value, "__name__", " ".join(value) if isinstance(value, tuple) else None),
)
def test_two_and_two_resumed_steps_equal_four_bit_for_bit(script, options, tiny, tmp_path):
    whole = train(
        script, tiny, tmp_path / "whole", "--steps", 4, "--save-every", 2, "--eval-every", 2, *options
    )
    part = interrupt_after(whole, 2, tmp_path / "part")
    train(script, [], None, "--resume", part)
    assert (part / "checkpoints" / "last").resolve().name == "step_0000004"
    mine, reference = weights(part, 4), weights(whole, 4)
    assert mine.keys() == reference.keys()
    assert all(torch.equal(mine[key], reference[key]) for key in mine)
    assert lines(part) == lines(whole)
    assert [row["step"] for row in lines(part)] == [1, 2, 3, 4]
    assert lines(part, "val") == lines(whole, "val")
    moments = "checkpoints/step_0000004/state/optimizer.bin"
    states = [torch.load(folder / moments, weights_only=True)["state"] for folder in (part, whole)]
    for key, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key][name]))


@pytest.mark.parametrize("script", [*SCRIPTS, *EXAMPLES])
def test_evaluating_more_often_changes_nothing(script, tiny, tmp_path):
    often = train(script, tiny, tmp_path / "often", "--steps", 3, "--eval-every", 1)
    never = train(script, tiny, tmp_path / "never", "--steps", 3, "--val-fraction", 0.25, "--eval-every", 100)
    assert lines(often) == lines(never)
    first, second = weights(often, 3), weights(never, 3)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("script", [*SCRIPTS, *EXAMPLES])
def test_the_exported_policy_acts_as_it_did_in_training(script, tiny, tmp_path):
    """A policy from load_policy reproduces the error of the last evaluation, bit for bit."""
    run_dir = train(script, tiny, tmp_path / "run", "--steps", 3)
    measured = lines(run_dir, "val")[-1]
    reset()
    policy = load_policy(run_dir, device="cpu")
    module = load_script(Path(script.__file__).name)
    config = policy.config
    run = start_run(config, script.__file__)
    data = run.load_data(config.horizon, config.normalization).val
    again = module.evaluate(policy.model, data, policy.normalizer, config, run)
    assert again == {key: measured[key] for key in again}
    # act() on raw camera frames equals the batched path, in recorded units
    policy.reset()
    policy._generator.manual_seed(0)
    batch = data.__getitems__([2])
    frames = dict(zip(policy.spec.cameras, batch.images[0].permute(0, 2, 3, 1).numpy(), strict=True))
    chunk = policy.act({"images": frames, "state": batch.proprio[0, 0].numpy()})
    proprio = policy.normalizer.proprio(batch.proprio)
    expected = module.sample_actions(
        policy.model, batch.images, proprio, config, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(
        torch.from_numpy(chunk), policy.normalizer.unnormalize_actions(expected, batch.proprio)[0]
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_components_can_be_frozen_and_taken_from_another_run(script, tiny, tmp_path):
    decoder = "action_decoder"
    first = train(script, tiny, tmp_path / "first", "--steps", 2)
    flags = (
        "--steps",
        2,
        "--init-from",
        f"{decoder}={first}",
        "--freeze",
        decoder,
        "--seed",
        1,
    )
    second = train(script, tiny, tmp_path / "second", *flags)
    folders = [folder / "checkpoints" / "step_0000002" / "policy" for folder in (first, second)]
    decoders = [load_file(folder / f"{decoder}.safetensors") for folder in folders]
    embedders = [load_file(folder / "info_embedder.safetensors") for folder in folders]
    assert all(torch.equal(decoders[0][key], decoders[1][key]) for key in decoders[0])
    assert not all(torch.equal(embedders[0][key], embedders[1][key]) for key in embedders[0])
    for flags, words in (
        (("--freeze", "wings"), "no such component"),
        (("--init-from", f"wings={first}"), "no component 'wings'"),
        (("--init-from", tmp_path / "absent"), "does not exist"),
        (("--init-from", f"info_embedder={folders[0] / decoder}.safetensors"), "does not fit"),
        (("--init-from", folders[0] / f"{decoder}.safetensors"), "component=FILE"),
    ):
        with pytest.raises(UserError, match=words):
            train(script, tiny, tmp_path / "third", "--steps", 1, *flags)
        assert not (tmp_path / "third").exists()


def test_weights_for_another_order_are_refused_and_other_differences_told(tiny, tmp_path, capsys):
    first = train(train_naive_fm, tiny, tmp_path / "first", "--steps", 1, "--horizon", 16)
    assert "--horizon 16 is longer than every training episode (at most 1" in capsys.readouterr().out
    flags = ("--init-from", first, "--steps", 1, "--horizon", 16)
    words = "another order of cameras, head, left, right: give it with --cameras"
    with pytest.raises(UserError, match=words):
        train(train_naive_fm, tiny, tmp_path / "second", *flags, "--cameras", "left", "head", "right")
    assert not (tmp_path / "second").exists()
    more = ("--normalization", "min-max", "--cameras", "head", "left", "right")  # as without the flag
    train(train_naive_fm, tiny, tmp_path / "second", *flags, *more)
    said = capsys.readouterr().out
    assert "first: trained with normalization mean-std, here min-max" in said
    assert "trained with cameras" not in said
    spec, sources = PolicySpec.load(first / "checkpoints" / "last"), (str(first),)
    checkpoint.compare_origins(
        torch.nn.Module(), sources, replace(spec, fps=25.0, cameras=("a", "b", "c")), {}, set()
    )
    said = capsys.readouterr().out
    assert "trained with fps 10.0, here 25.0" in said
    assert "trained with cameras head left right, here a b c" in said


def test_a_state_dict_of_another_project_can_be_taken_but_not_code(tiny, tmp_path):
    first = train(train_vfp, tiny, tmp_path / "first", "--steps", 1)
    state = load_file(first / "checkpoints" / "last" / "policy" / "action_decoder.safetensors")
    torch.save(state, tmp_path / "decoder.pt")
    train(
        train_vfp,
        tiny,
        tmp_path / "a",
        "--steps",
        1,
        "--init-from",
        f"action_decoder={tmp_path / 'decoder.pt'}",
    )
    torch.save({"weights": parse}, tmp_path / "code.pt")
    with pytest.raises(UserError, match="does not fit"):
        train(
            train_vfp,
            tiny,
            tmp_path / "b",
            "--steps",
            1,
            "--init-from",
            f"action_decoder={tmp_path / 'code.pt'}",
        )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_is_not_resumed_on_data_that_changed(script, tiny, cache_dir, tmp_path):
    cameras = {"observation.images.cam_head": (32, 32)}
    data = make_dataset(tmp_path / "data", (12, 9), cameras, video=False, names=None)
    run_dir = train(script, [*tiny, "--dataset", str(data)], tmp_path / "run", "--steps", 1)
    shutil.rmtree(data)
    make_dataset(data, (12, 10), cameras, video=False, names=None)
    with pytest.raises(UserError, match="changed since"):
        train(script, [], None, "--resume", run_dir, "--steps", 2)
    assert [row["step"] for row in lines(run_dir)] == [1]


def test_the_list_of_episodes_that_has_changed_is_named(tiny, tmp_path):
    best = tmp_path / "best.txt"
    best.write_text("0 1 2")
    run_dir = train(train_naive_fm, tiny, tmp_path / "run", "--steps", 1, "--episodes-file", best)
    best.write_text("0 1 3")
    with pytest.raises(UserError, match=f"changed since .*{best}"):
        train(train_naive_fm, [], None, "--resume", run_dir, "--steps", 2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_batch_larger_than_the_data_is_refused_and_leaves_nothing(script, tiny, tmp_path):
    with pytest.raises(UserError, match="batch"):
        train(script, tiny, tmp_path / "run", "--steps", 1, "--batch-size", 1000)
    assert not (tmp_path / "run").exists()


def test_a_fork_with_another_backbone_and_one_camera_runs(tiny, tmp_path):
    flags = (
        "--backbone",
        "resnet18",
        "--cameras",
        "head",
        "--image-size",
        48,
        64,
        "--steps",
        2,
        "--attention",
        "full",
    )
    run_dir = train(train_vfp, tiny, tmp_path / "run", *flags)
    assert load_policy(run_dir).spec.image_size == (48, 64)


def test_old_checkpoints_go_and_last_names_the_newest(tiny, tmp_path):
    run_dir = train(train_vfp, tiny, tmp_path / "run", "--steps", 5, "--save-every", 1, "--keep", 2)
    folders = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))
    assert folders == ["step_0000004", "step_0000005"]
    assert (run_dir / "checkpoints" / "last").resolve().name == "step_0000005"
    assert not list((run_dir / "checkpoints").glob(".*"))


def test_going_back_keeps_the_checkpoints_of_the_run_that_goes_on(tiny, tmp_path):
    run_dir = train(train_vfp, tiny, tmp_path / "run", "--steps", 8, "--save-every", 2)
    checkpoints = run_dir / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step_*")) == [f"step_000000{k}" for k in (4, 6, 8)]
    (checkpoints / "last").unlink()
    (checkpoints / "last").symlink_to("step_0000004")
    train(train_vfp, tiny, None, "--resume", run_dir, "--steps", 7, "--save-every", 1)
    names = [path.name for path in checkpoints.glob("step_*")]
    assert sorted(names) == [f"step_000000{k}" for k in (5, 6, 7, 8)]
    assert (checkpoints / "last").resolve().name == "step_0000007"


def test_accumulation_may_change_between_two_parts_of_a_run(tiny, tmp_path):
    run_dir = train(train_vfp, tiny, tmp_path / "run", "--steps", 3)
    train(train_vfp, tiny, None, "--resume", run_dir, "--steps", 5, "--grad-accumulation", 2)
    trainer = json.loads((run_dir / "checkpoints/last/state/trainer.json").read_text())
    assert (trainer["step"], trainer["samples"]) == (5, 3 * 4 + 2 * 8)


def test_jobs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path):
    folders = [_new_folder(tmp_path / "runs" / "vfp-20260101-000000") for _ in range(3)]
    assert [folder.name for folder in folders] == [f"vfp-20260101-000000{end}" for end in ("", "-2", "-3")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_half_precision_trains_and_keeps_float32_weights(script, tiny, tmp_path):
    plain = train(script, tiny, tmp_path / "plain", "--steps", 3)
    half = train(script, tiny, tmp_path / "half", "--steps", 3, "--mixed-precision", "bf16")
    assert all(value.dtype == torch.float32 for value in weights(half, 3).values())
    for mine, reference in zip(lines(half), lines(plain), strict=True):
        assert mine["loss"] == pytest.approx(reference["loss"], rel=0.02)
    # It did not run in float32; since outputs begin at zero, only the gradient shows that.
    assert lines(half)[-1]["grad_norm"] != lines(plain)[-1]["grad_norm"]
    assert load_policy(half).act(
        {
            "images": dict.fromkeys(
                ("head", "left", "right"), torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()
            ),
            "state": [0.0, 0.0, 0.0],
        }
    ).shape == (4, 3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_with_bad_numbers_is_skipped_and_counted(script, tiny, tmp_path, monkeypatch):
    """The second of three steps has a NaN loss: weights survive, and the log says so."""
    real, calls = script.compute_loss, []

    def sometimes_bad(*args, train, **more):
        loss, metrics = real(*args, train=train, **more)
        calls.append(train)
        return loss * (math.nan if train and sum(calls) == 2 else 1.0), metrics

    monkeypatch.setattr(script, "compute_loss", sometimes_bad)
    run_dir = train(script, tiny, tmp_path / "run", "--steps", 3)
    assert [row["bad_steps"] for row in lines(run_dir)] == [0, 1, 0]
    assert all(torch.isfinite(value).all() for value in weights(run_dir, 3).values())


def test_a_resumed_run_needs_neither_its_pretrained_model_nor_what_it_started_from(tiny, tmp_path):
    from test_vision import save_model

    save_model(tmp_path / "dino", "dinov2")
    first = train(train_vfp, tiny, tmp_path / "first", "--steps", 1)
    flags = ("--backbone", tmp_path / "dino", "--image-size", 56, "--init-from", f"action_decoder={first}")
    whole = train(train_vfp, tiny, tmp_path / "whole", "--steps", 4, "--save-every", 2, *flags)
    part = interrupt_after(whole, 2, tmp_path / "part")
    shutil.rmtree(tmp_path / "dino")
    shutil.rmtree(first)
    train(train_vfp, [], None, "--resume", part)
    mine, reference = weights(part, 4), weights(whole, 4)
    assert all(torch.equal(mine[key], reference[key]) for key in reference)
    assert load_policy(part).spec.backbone_config["model_type"] == "dinov2"


def test_activations_computed_again_change_nothing(tiny, tmp_path):
    """With augmented images and randomly dropped cameras."""
    flags = ("--steps", 3, "--aug-shift", 0.1, "--aug-color", 0.3, "--camera-dropout", 0.5, "--eval-every", 2)
    kept = train(train_vfp, tiny, tmp_path / "kept", *flags)
    again = train(train_vfp, tiny, tmp_path / "again", *flags, "--checkpoint-activations")
    mine, reference = weights(again, 3), weights(kept, 3)
    assert all(torch.equal(mine[key], reference[key]) for key in reference)
    assert lines(again) == lines(kept)
