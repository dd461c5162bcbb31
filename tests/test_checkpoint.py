import errno
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import train_vfp
from common import checkpoint
from common.config import parse
from common.errors import UserError
from common.inference import load_policy

pytestmark = pytest.mark.usefixtures("accelerate_reset")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run with checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    argv = [*tiny, "--run-dir", str(folder), "--steps", "3", "--save-every", "1"]
    train_vfp.main(parse(train_vfp.Config, argv, "train_vfp.py"))
    reset()
    return folder


@pytest.fixture
def run_dir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def resume(run_dir, *more):
    train_vfp.main(parse(train_vfp.Config, ["--resume", str(run_dir), *more], "train_vfp.py"))


def steps(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_checkpoints_are_found_by_name_number_and_last(run_dir):
    assert checkpoint.find(run_dir).name == "step_0000003"
    assert checkpoint.find(run_dir, "2").name == "step_0000002"
    assert checkpoint.find(run_dir, "step_0000001").name == "step_0000001"
    with pytest.raises(UserError, match="step_0000001, step_0000002, step_0000003"):
        checkpoint.find(run_dir, "99")
    with pytest.raises(UserError, match="no finished checkpoint"):
        checkpoint.find(run_dir / "nowhere")


def test_last_is_relative_so_that_a_run_can_be_moved(run_dir, tmp_path):
    moved = shutil.move(run_dir, tmp_path / "elsewhere")
    assert not os.path.isabs(os.readlink(Path(moved) / "checkpoints" / "last"))
    assert checkpoint.find(Path(moved)).name == "step_0000003"


def test_a_copy_in_which_last_is_a_folder_goes_on(run_dir, tmp_path, capsys):
    copy = shutil.copytree(run_dir, tmp_path / "copy")  # follows links, as scp does
    assert not (copy / "checkpoints" / "last").is_symlink()
    resume(copy, "--steps", "5", "--keep", "2")
    assert steps(copy) == ["last", "step_0000004", "step_0000005"]
    assert os.readlink(copy / "checkpoints" / "last") == "step_0000005"
    assert "not saved" not in capsys.readouterr().out


def test_a_disk_without_links_has_no_last(run_dir, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    resume(run_dir, "--steps", "4")
    assert "last" not in steps(run_dir)
    assert checkpoint.find(run_dir).name == "step_0000004"


def test_deleting_newer_steps_goes_back_to_an_earlier_one(run_dir):
    shutil.rmtree(run_dir / "checkpoints" / "step_0000003")
    assert checkpoint.find(run_dir).name == "step_0000002"
    resume(run_dir, "--save-every", "10")
    assert steps(run_dir) == ["last", "step_0000001", "step_0000002", "step_0000003"]
    assert checkpoint.find(run_dir).name == "step_0000003"


def test_half_a_checkpoint_is_never_used_and_is_cleared_away(run_dir):
    """The leftovers of a process that was killed while saving."""
    folder = run_dir / "checkpoints"
    shutil.copytree(folder / "step_0000003", folder / ".step_0000004.unfinished")
    assert checkpoint.find(run_dir).name == "step_0000003"
    resume(run_dir, "--steps", "4")
    assert steps(run_dir) == ["last", "step_0000002", "step_0000003", "step_0000004"]


def reset():
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_saving_failed_midway_leaves_the_earlier_checkpoint_in_place(run_dir, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="Step 4, the last, could not be saved"):
        resume(run_dir, "--steps", "4")
    assert checkpoint.find(run_dir).name == "step_0000003"
    assert steps(run_dir) == ["last", "step_0000001", "step_0000002", "step_0000003"]


FILES = [
    *("state/model.safetensors", "state/optimizer.bin", "state/trainer.json", "state/random_states_0.pkl"),
    *("state/metrics_0.json", "policy/policy.json", "policy/action_decoder.safetensors", "checksums.json"),
]


def damaged(content, how, generator):
    """A file's content, truncated or with one bit flipped, at a random place."""
    if how == "cut":
        return content[: generator.randrange(len(content))]
    where = generator.randrange(len(content))
    return content[:where] + bytes([content[where] ^ (1 << generator.randrange(8))]) + content[where + 1 :]


@pytest.mark.parametrize("how", ["cut", "flipped", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_the_checkpoint_before_it_is_used(run_dir, name, how, capsys):
    generator = random.Random(f"{name} {how}")
    assert checkpoint.damage(run_dir / "checkpoints" / "step_0000003") is None
    file = run_dir / "checkpoints" / "step_0000003" / name
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(damaged(content, how, generator))
    told = name.split("/")[-1]
    if (name, how) != ("checksums.json", "missing"):  # without that file, the checkpoint was never complete
        assert told in checkpoint.damage(run_dir / "checkpoints" / "step_0000003")
    assert checkpoint.newest_undamaged(run_dir, tell=True).name == "step_0000002"
    if name.startswith("policy/"):
        with pytest.raises(UserError, match=r"is damaged .*use another checkpoint"):
            load_policy(run_dir)
        assert load_policy(run_dir, "2").trained_steps == 2


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_run_resumed_past_damage_equals_one_without(run_dir, finished, how, capsys):
    file = run_dir / "checkpoints" / "step_0000003" / "state" / "optimizer.bin"
    file.write_bytes(damaged(file.read_bytes(), how, random.Random(0)))
    resume(run_dir)
    assert "warning: " in (printed := capsys.readouterr().out)
    assert "step_0000003 is damaged (state/optimizer.bin" in printed
    ends = [folder / "checkpoints" / "step_0000003" / "state" for folder in (run_dir, finished)]
    one, other = (load_file(end / "model.safetensors") for end in ends)
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert checkpoint.damage(ends[0].parent) is None


def test_a_run_of_which_nothing_is_whole_is_refused(run_dir):
    for folder in (run_dir / "checkpoints").glob("step_*"):
        (folder / "state" / "optimizer.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no undamaged checkpoint \(step_0000003: .*from a copy"):
        resume(run_dir, "--steps", "4")


def test_some_checkpoints_are_kept_for_good(tiny, tmp_path):
    folder = tmp_path / "run"
    argv = [*tiny, "--run-dir", str(folder), "--steps", "7", "--save-every", "1", "--keep", "2"]
    train_vfp.main(parse(train_vfp.Config, [*argv, "--keep-every", "3"], "train_vfp.py"))
    assert steps(folder) == ["last", "step_0000003", "step_0000006", "step_0000007"]


def test_a_resumed_run_takes_new_rates_from_the_flags(run_dir):
    resume(run_dir, "--steps", "8", "--schedule", "constant", "--lr", "0.5", "--warmup-steps", "0")
    state = torch.load(run_dir / "checkpoints" / "last" / "state" / "optimizer.bin", weights_only=True)
    assert {group["lr"] for group in state["param_groups"]} == {0.5}


def test_a_checkpoint_of_another_policy_is_refused(run_dir, tiny, tmp_path):
    other = tmp_path / "other"
    argv = [*tiny, "--d-model", "8", "--run-dir", str(other), "--steps", "1"]
    train_vfp.main(parse(train_vfp.Config, argv, "train_vfp.py"))
    for folder in (run_dir / "checkpoints").glob("step_*"):
        shutil.rmtree(folder)
    shutil.copytree(other / "checkpoints" / "step_0000001", run_dir / "checkpoints" / "step_0000001")
    reset()
    with pytest.raises(UserError, match="was saved by another network"):
        resume(run_dir, "--steps", "4")


def test_components_that_another_policy_lacks_are_said(run_dir, capsys):
    policy = nn.ModuleDict({"action_decoder": nn.Linear(2, 2), "gate": nn.Linear(2, 2)})
    spec = checkpoint.PolicySpec.load(checkpoint.find(run_dir))
    checkpoint.compare_origins(policy, (str(run_dir),), spec, {}, {"action_decoder"})
    assert "has no weights for gate\n" in capsys.readouterr().out
    checkpoint.compare_origins(policy, (f"action_decoder={run_dir}",), spec, {}, {"action_decoder"})
    assert "has no weights" not in capsys.readouterr().out


def test_weights_of_another_network_or_damaged_ones_are_refused_in_one_sentence(run_dir):
    folder = run_dir / "checkpoints" / "step_0000003" / "policy"
    weights = load_file(folder / "action_decoder.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("summary_in")}
    assert len(kept) == len(weights) - 2
    save_file(kept, folder / "action_decoder.safetensors")
    checkpoint.seal(folder.parent)
    with pytest.raises(UserError, match=r"into this network .*summary_in.*they were trained with") as refused:
        load_policy(run_dir)
    assert "\n" not in str(refused.value)
    (folder / "action_decoder.safetensors").write_bytes(b"broken")
    checkpoint.seal(folder.parent)
    with pytest.raises(UserError, match=r"cannot be loaded into this network .*use another checkpoint"):
        load_policy(run_dir)


def test_the_schedule_may_change_but_not_the_optimizer(run_dir):
    with pytest.raises(UserError, match=r"with AdamW and cannot continue with RAdamScheduleFree: leave out"):
        resume(run_dir, "--steps", "4", "--schedule", "schedule-free")
    reset()
    resume(run_dir, "--steps", "4", "--schedule", "constant")
    assert checkpoint.find(run_dir).name == "step_0000004"
