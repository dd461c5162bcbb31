"""Several processes on one machine, as `torchrun` and `accelerate launch` start them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import weights
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def launch(processes, *command):
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={processes}",
        "--standalone",
    ]
    done = subprocess.run(
        [*torchrun, *map(str, command)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_give_the_gradients_of_one_with_the_same_global_batch(dataset, cache_dir, tmp_path):
    for processes in (1, 2):
        launch(processes, "tests/ddp_worker.py", dataset, cache_dir, tmp_path / f"{processes}.safetensors")
    one, two = (load_file(tmp_path / f"{processes}.safetensors") for processes in (1, 2))
    assert one.keys() == two.keys()
    assert len(one) > 100
    assert sum(grad.abs().max() > 1e-6 for grad in one.values()) > 0.9 * len(one)
    for name, grad in one.items():
        torch.testing.assert_close(
            two[name], grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_run_of_two_processes_trains_saves_and_resumes(tiny, tmp_path):
    run_dir = tmp_path / "run"
    printed = launch(2, "train_vfp.py", *tiny, "--run-dir", run_dir, "--steps", 2, "--save-every", 2)
    assert "2 processes" in printed
    assert "8 samples" in printed
    launch(2, "train_vfp.py", "--resume", run_dir, "--steps", 3)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3]
    state = json.loads((run_dir / "checkpoints" / "last" / "state" / "trainer.json").read_text())
    assert state == {"step": 3, "samples": 24, "updates": 3, "processes": 2, "optimizer": "AdamW"}
    # another number of processes continues at the same place, and says that it is not exact
    printed = launch(1, "train_vfp.py", "--resume", run_dir, "--steps", 4)
    assert "saved by 2 processes" in printed
    state = json.loads((run_dir / "checkpoints" / "last" / "state" / "trainer.json").read_text())
    assert state["samples"] == 28


def test_new_episodes_are_taken_in_by_all_processes_at_the_same_step(tiny, dataset, tmp_path):
    folder, run_dir = tmp_path / "new", tmp_path / "run"
    folder.mkdir()
    shutil.copytree(dataset, folder / "first")
    shutil.copytree(dataset, tmp_path / "late")
    flags = [*tiny, "--run-dir", run_dir, "--steps", 30, "--save-every", 1000, "--grow-from", folder]
    launch(2, "tests/ddp_growth.py", tmp_path, *flags)
    both = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    sizes = [[(step, size) for step, size, _ in seen] for seen in both]
    assert sizes[0] == sizes[1]
    assert len({size for _, size in sizes[0]}) == 2
    log = json.loads((run_dir / "growth.json").read_text())
    assert [[entry["name"] for entry in time["entries"]] for time in log] == [["first"], ["late"]]
    assert next(step for step, size in sizes[0] if size != sizes[0][0][1]) == log[1]["step"] + 1


def test_codes_are_replaced_alike_in_all_processes(tiny, tmp_path):
    flags = ["--num-codes", 8, "--latent-dim", 4, "--code-window", 1, "--replace-until", 1, "--steps", 5]
    printed = launch(2, "tests/ddp_codebook.py", *tiny, *flags, "--run-dir", tmp_path / "run")
    assert int(printed.split("replaced ")[1].split()[0]) > 5


def test_expert_statistics_are_those_of_all_processes(tiny, tmp_path):
    flags = ["--num-experts", 3, "--latent-dim", 4, "--posterior-layers", 1, "--steps", 3]
    printed = launch(2, "tests/ddp_experts.py", *tiny, *flags, "--run-dir", tmp_path / "run")
    assert int(printed.split("samples ")[-1].split()[0]) == 3 * 2 * 4 * (1 + 2)  # draws and the start of each
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in (row for row in rows if row["split"] == "train"):
        assert abs(sum(row[f"experts/use_{e}"] for e in range(3)) - 1) < 1e-6


def test_activations_computed_again_change_nothing_with_two_processes(tiny, tmp_path):
    flags = [*tiny, "--steps", 3, "--aug-shift", 0.1]
    launch(2, "train_vfp.py", *flags, "--run-dir", tmp_path / "kept")
    launch(2, "train_vfp.py", *flags, "--run-dir", tmp_path / "again", "--checkpoint-activations")
    mine, reference = weights(tmp_path / "again", 3), weights(tmp_path / "kept", 3)
    assert all(torch.equal(mine[key], reference[key]) for key in reference)
