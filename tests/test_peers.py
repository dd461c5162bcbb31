"""The comparison with LeRobot: matching of sizes, reading of logs and processes, the tables."""

import os
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_naive_fm
from benchmarks import latency, lerobot_acts, matched, methods, peers
from common.config import parse
from common.data.recording import Demonstration, write_dataset
from common.errors import UserError


def test_the_width_whose_count_is_nearest():
    widths, counted = range(2, 101, 2), []

    def count(width):
        counted.append(width)
        return width**2

    assert matched.nearest(widths, count, 50**2) == 50
    assert matched.nearest(widths, count, 51**2 - 5) == 50  # 2596 lies 96 from 50² and 108 from 52²
    assert matched.nearest(widths, count, 51**2 + 5) == 52
    assert matched.nearest(widths, count, 0) == 2
    assert matched.nearest(widths, count, 10**6) == 100
    assert len(counted) < 60  # each count builds a network


def test_arithmetic_counts_products_convolutions_and_attention():
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    assert matched.flops(lambda: F.linear(x, weight)) == 2 * 3 * 5 * 7
    assert matched.flops(lambda: F.linear(x, weight).sum().backward()) == 3 * 2 * 3 * 5 * 7
    image, kernel = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    assert matched.flops(lambda: F.conv2d(image, kernel, padding=1)) == 2 * 4 * 64 * 27
    heads = torch.randn(2, 4, 16, 8)
    assert matched.flops(lambda: F.scaled_dot_product_attention(heads, heads, heads)) == 2 * (
        2 * 2 * 4 * 16 * 16 * 8
    )


def test_a_policy_of_ours_has_its_method_and_size_and_learns():
    policy = matched.ours("train_vfp", "conv", (32, 48))
    assert policy.script.__name__.endswith("train_vfp")
    assert policy.config.d_model == 128  # of configs/train_vfp/demo.json
    assert policy.spec.image_size == (32, 48)
    matched.our_step(policy, 2)()
    assert all(p.grad is not None for p in policy.model.left_backbone.parameters())
    act = latency.our_way(policy, np.zeros((32, 48, 3), np.uint8), 2)
    assert act().shape == (matched.HORIZON, matched.DIM)


def test_clip_sees_squares_of_whole_patches_with_as_many_pixels():
    assert matched.seen("multi_task_dit", (96, 128)) == (112, 112)
    assert matched.seen("multi_task_dit", (224, 224)) == (224, 224)
    assert matched.seen("act", (96, 128)) == (96, 128)


@pytest.fixture
def act_of_lerobot(tmp_path):
    """A small ACT, as `benchmarks/simulators.py` begins one, and its dataset of two cameras."""
    pytest.importorskip("lerobot.policies")
    rng, demonstrations = np.random.default_rng(0), []
    for steps in (14, 11):
        states, actions = rng.normal(5, 2, (steps, 3)), rng.normal(-1, 3, (steps, 2))
        images = {name: rng.integers(0, 256, (steps, 32, 48, 3), np.uint8) for name in ("front", "wrist")}
        vectors = states.astype(np.float32), actions.astype(np.float32)
        demonstrations.append(Demonstration(*vectors, images, "fold"))
    names = {"state_names": ("x", "y", "z"), "action_names": ("dx", "dy")}
    data = write_dataset(tmp_path / "data", demonstrations, fps=10, **names)
    options = {"chunk_size": 4, "n_action_steps": 2, "dim_model": 32, "n_heads": 2, "dim_feedforward": 32}
    place = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    lerobot_acts.begin(data, options, 0, place, pictures=25)
    return data, tmp_path / "run", options


def test_norms_that_do_not_learn_have_statistics_of_the_demonstrations(act_of_lerobot):
    from lerobot.policies.act.modeling_act import ACTPolicy

    data, run, options = act_of_lerobot
    policy = ACTPolicy.from_pretrained(run / "checkpoints/last/pretrained_model")
    dataset, _, before, _ = lerobot_acts.make(data, options)
    batch = before(next(iter(torch.utils.data.DataLoader(dataset, batch_size=25))))
    seen = []
    norms = [m for m in policy.modules() if type(m).__name__ == "FrozenBatchNorm2d"]
    for norm in norms:
        norm.register_forward_hook(lambda _, __, out: seen.append(torch.std_mean(out, dim=(0, 2, 3))))
    policy.model.backbone(torch.cat([batch[key] for key in policy.config.image_features]))
    assert len(seen) == len(norms) == 20
    for std, mean in seen:
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-3, rtol=0)
        assert ((std - 1).abs() < 0.05).float().mean() > 0.9  # the others hardly vary


def test_lerobots_policy_sees_and_does_in_our_loop_what_it_would_in_its_own(act_of_lerobot):
    data, run, options = act_of_lerobot
    ours = lerobot_acts.LeRobotPolicy(run, (str(data),))
    assert (ours.horizon, ours.execute_steps) == (4, 2)
    dataset, _, before, after = lerobot_acts.make(data, options)
    item = dataset[16]
    own = after(ours.model.predict_action_chunk(before({key: item[key] for key in item})))
    images = {
        key: (item[key].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        for key in ours.spec.camera_keys
    }
    seen = {"images": images, "state": item["observation.state"].numpy()[None]}
    chunks = ours.act_batch([seen, seen])
    assert chunks.shape == (2, 4, 2)
    torch.testing.assert_close(torch.from_numpy(chunks[0]), own[0], atol=1e-4, rtol=1e-4)
    low, high = (dataset.meta.stats["action"][name] for name in ("min", "max"))
    assert (np.abs(chunks - (low + high) / 2) < 3 * (high - low)).all()  # in recorded units


def test_what_lerobot_logs_is_read():
    logging_utils = pytest.importorskip("lerobot.utils.logging_utils")
    names = {"loss": ":.3f", "update_s": "updt_s:.3f", "dataloading_s": "data_s:.3f", "samples_per_s": ":.0f"}
    meters = {
        key: logging_utils.AverageMeter(name.split(":")[0] or key, ":" + name.split(":")[1])
        for key, name in names.items()
    }
    tracker = logging_utils.MetricsTracker(8, 1200, 8, meters)
    tracker.loss, tracker.update_s, tracker.dataloading_s, tracker.samples_per_s = 0.5, 0.25, 0.05, 27
    for _ in range(1500):  # enough that steps are written as 2K
        tracker.step()
    line = f"INFO 2026-11-26 12:00:00 ot_train.py:650 {tracker}"
    assert peers.step_ended(line)
    assert not peers.step_ended("INFO 2026-11-26 12:00:00 ot_train.py:500 cfg.steps=60 (60)")
    assert not peers.step_ended("Training:  10%|#         | 6/60 [00:03<00:27,  1.9step/s]")
    [(seconds, waited)] = peers.read_lerobot(["Creating dataset", line])
    assert (seconds, waited) == pytest.approx((0.3, 0.05))


def test_what_our_runs_log_is_read():
    assert peers.step_ended("step 12/60  loss 0.5123  lr 1.0e-03  8 samples/s  1.2 min left")
    assert not peers.step_ended("step 12  held out: loss 0.5")
    lines = '{"step": 1, "split": "train", "steps_per_s": 4.0, "data_wait_share": 0.1}\n'
    lines += '{"step": 1, "split": "val", "loss": 1.0}\n'
    assert peers.read_ours(lines) == [pytest.approx((0.25, 0.025))]


TRAINING = """
import subprocess, sys, time
block = b"x" * 50_000_000
child = "import time; block = b'x' * 150_000_000; print('loaded', flush=True); time.sleep(2)"
loader = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
loader.stdout.readline()
for step in (1, 2):
    time.sleep(0.5)
    print(f"step:{step} smpl:8 loss:0.1 updt_s:0.400 data_s:0.100 smp/s:16", file=sys.stderr)
loader.wait()
"""


def test_a_training_is_watched_with_its_loading_processes(tmp_path):
    turn = peers.watch([sys.executable, "-c", TRAINING], tmp_path, dict(os.environ), 2)
    assert 0.5 <= turn.first < turn.last - 0.4
    assert turn.steps == [pytest.approx((0.5, 0.1))] * 2
    assert 0.14 < turn.largest_gib < 0.19  # the child, including Python
    assert 0.18 < turn.all_gib < 0.24


def test_a_training_that_fails_is_no_measurement(tmp_path):
    words = [sys.executable, "-c", "raise SystemExit('no disk')"]
    with pytest.raises(UserError, match="failed after 0 steps: no disk"):
        peers.watch(words, tmp_path, dict(os.environ), 2)


def test_trainings_are_started_as_a_user_would(tmp_path):
    config = peers.Config(runs=tmp_path, batch_size=4)
    data, run = tmp_path / "data", tmp_path / "run"
    words = list(map(str, peers.command("resnet18", "train_naive_fm", {}, data, run, 7, config)))
    found = parse(train_naive_fm.Config, words[2:], words[1])
    assert (found.data.dataset, found.data.image_size) == ((str(data),), (96, 128))
    assert (found.optim.steps, found.optim.batch_size, found.run.log_every) == (7, 4, 1)
    assert (found.vision.backbone, found.d_model) == ("resnet18", 144)
    chosen = matched.widened("diffusion", 64, (96, 128), tmp_path, separate=True)
    words = list(map(str, peers.command("resnet18", "diffusion", chosen, data, run, 7, config)))
    assert words[0].endswith("lerobot-train")
    for flag in ("steps=7", "policy.type=diffusion", "policy.down_dims=[64, 128, 256]", "log_freq=1"):
        assert f"--{flag}" in words
    assert "--policy.use_separate_rgb_encoder_per_camera=true" in words
    assert "--policy.pretrained_backbone_weights=null" in words
    assert '"size": [96, 128]' in next(word for word in words if "tfs=" in word)


def test_rounds_are_compared_with_the_best_peer_of_the_round():
    config = peers.Config(peers=("act", "diffusion"), methods=("train_vfp",), rounds=3, groups=("conv",))

    def measured(speeds, warm):
        turn = {"with_start": 3.0, "cold": 20.0, "waits": 0.015, "largest_gib": 1.0, "all_gib": 1.5}
        turns = {
            setting: turn | {"samples_per_s": speed, "warm": warm}
            for setting, speed in zip(peers.settings(config), speeds, strict=True)
        }
        return {"parameters": 2_500_000, "flops": 2.5e9, "turns": turns}

    results = {
        "conv:act": measured([10.0, 2.0, 10.0], 8.0),
        "conv:diffusion": measured([5.0, 8.0, 5.0], 16.0),
        "conv:train_vfp": measured([60.0, 16.0, 50.0], 4.0),  # 6, 2, and 5 times the best
    }
    lines = peers.report(results, config).splitlines()
    start = "| `train_vfp.py` | 2.5 M | 2.5 | 50.0 | 5.00 | 3.0 | 20.0 s | 4.0 s | 0.50 | 1.5% |"
    assert f"{start} 1.00 GiB | 1.50 GiB |" in lines
    assert any(line.startswith("| LeRobot ACT | 2.5 M | 2.5 | 10.0 | 1.00 |") for line in lines)


def test_chunks_take_turns():
    assert not parse(latency.Config, ["--no-compile"], "latency.py").compile
    order = []
    ways = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = latency.by_turns(ways, rounds=2, least=0.0)
    assert order == list("ababab")  # the first round is a warm-up
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}


def test_latencies_are_compared_round_by_round():
    ours = [f"`train_vfp.py`, {steps}" for steps in latency.OUR_STEPS]
    peers_of = {"LeRobot ACT": [10.0, 20.0], "LeRobot diffusion, DDPM 100": [100.0, 200.0]}
    peers_of |= {"LeRobot diffusion, DDIM 10": [20.0, 40.0]}
    times = {ours[0]: [5.0, 10.0], ours[1]: [5.0, 10.0], ours[2]: [25.0, 50.0], **peers_of}
    times |= {"LeRobot ACT, compiled": [8.0, 8.0]}
    counts = {"`train_vfp.py`": 2_500_000, **dict.fromkeys(peers_of, 11_000_000)}
    lines = latency.table(counts, times).splitlines()
    assert "| `train_vfp.py` | 2.5 M | 7.5 / 7.5 / 37.5 |  | 0.50 | 0.25 | 0.25 | 1.25 |" in lines
    assert "| LeRobot ACT | 11.0 M | 15.0 | 8.0 |  |  |  |  |" in lines


def test_sections_of_a_page_keep_what_was_measured_in_the_others(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(
        "# Speed\n\n## One\n\nwords\n\n<!-- measured: begin -->\nold\n<!-- measured: end -->\n\nmore\n"
    )
    methods.insert(page, "of two", "Two")
    methods.insert(page, "of one", "One")
    methods.insert(page, "of two, again", "Two")
    text = page.read_text()
    one, two = text.split("## Two")
    assert one.startswith("# Speed\n\n## One\n\nwords\n")
    assert "of one" in one
    assert "more\n" in one
    assert "old" not in text
    assert two.count("of two") == 1
    assert "of two, again" in two
