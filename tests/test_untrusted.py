"""Checkpoints and configurations from elsewhere: they cannot run code, leave their folder, exhaust memory."""

import json
import os
import pickle
import shutil
import struct

import pytest
import torch

import train_vfp
from common import checkpoint
from common.config import parse
from common.errors import UserError
from common.inference import load_policy

pytestmark = pytest.mark.usefixtures("accelerate_reset")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run with one checkpoint."""
    from accelerate.state import AcceleratorState, GradientState

    folder = tmp_path_factory.mktemp("runs") / "run"
    argv = [*tiny, "--run-dir", str(folder), "--steps", "1"]
    train_vfp.main(parse(train_vfp.Config, argv, "train_vfp.py"))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return folder


@pytest.fixture
def run_dir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


@pytest.fixture
def last(run_dir):
    return run_dir / "checkpoints" / "step_0000001"


def resume(run_dir, *more):
    train_vfp.main(parse(train_vfp.Config, ["--resume", str(run_dir), "--steps", "2", *more], "train_vfp.py"))


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickles_in_a_checkpoint_run_nothing(name, writer, run_dir, last, tmp_path):
    writer({"state": Bomb(tmp_path / "exploded")}, last / "state" / name)
    checkpoint.seal(last)  # an attacker can also write the pickle's checksum
    with pytest.raises(UserError, match="step_0000001"):
        resume(run_dir)
    assert not (tmp_path / "exploded").exists()


def test_weights_given_as_pickle_run_nothing(tiny, tmp_path):
    torch.save(Bomb(tmp_path / "exploded"), tmp_path / "evil.pt")
    flags = ["--init-from", f"action_decoder={tmp_path / 'evil.pt'}", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"evil\.pt does not fit"):
        train_vfp.main(parse(train_vfp.Config, [*tiny, *flags], "train_vfp.py"))
    assert not (tmp_path / "exploded").exists()


def test_last_names_a_checkpoint_of_its_own_run(run_dir, tmp_path):
    shutil.copytree(run_dir / "checkpoints" / "step_0000001", tmp_path / "elsewhere" / "step_0000009")
    (run_dir / "checkpoints" / "last").unlink()
    (run_dir / "checkpoints" / "last").symlink_to(tmp_path / "elsewhere" / "step_0000009")
    assert checkpoint.find(run_dir).parent == (run_dir / "checkpoints").resolve()


@pytest.mark.parametrize("where", ["config.json", "checkpoints/step_0000001/policy/policy.json"])
@pytest.mark.parametrize("content", [b"[", b'{"a":', b"\xff\xfe", b"1e999", b"null"])
def test_json_that_is_none_is_refused_in_one_sentence(where, content, run_dir, last):
    (run_dir / where).write_bytes(content)
    checkpoint.seal(last)
    with pytest.raises(UserError) as refused:
        resume(run_dir) if where == "config.json" else load_policy(run_dir)
    assert "\n" not in str(refused.value)


TERABYTES = b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**60),
        struct.pack("<Q", len(TERABYTES)) + TERABYTES,
        struct.pack("<Q", 2**33) + b"{",
    ],
)
def test_headers_of_weights_cannot_lie(header, run_dir, last):
    (last / "policy" / "action_decoder.safetensors").write_bytes(header)
    checkpoint.seal(last)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_policy(run_dir)


def test_a_configuration_does_not_choose_where_to_write(run_dir, tmp_path):
    """Options of one run only are not taken from another run's configuration."""
    values = json.loads((run_dir / "config.json").read_text())
    values["config"]["run"] |= {"run_dir": str(tmp_path / "chosen"), "resume": "auto"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = parse(train_vfp.Config, ["--config", str(tmp_path / "config.json")], "train_vfp.py")
    assert config.run.run_dir is None
    assert config.run.resume is None
