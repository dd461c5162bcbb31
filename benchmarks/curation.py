"""Do low scores from `train_mi.py` find bad demonstrations, and does it help to leave them out?

    python benchmarks/curation.py --skip-policies      # some ten minutes on two cores
    python benchmarks/curation.py                      # also trains nine policies: an hour or two

One third of the built-in task's demonstrations are degraded in one of three ways: noise on the actions,
actions delayed by some steps, actions of another episode. The area under the ROC curve (AUROC) measures how
well the scores separate them: the probability that a good episode scores above a bad one. Then
`train_vfp.py` learns from all episodes, from the best two thirds, and from a random two thirds.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.config import cli, options
from common.data import demo
from common.files import read_json, write_json
from common.mutual_information import ksg

ROOT = Path(__file__).parents[1]
WAYS = ("noisy", "delayed", "swapped")
ESTIMATORS = ("ksg", "infonce")


@options
class Config:
    """Score degraded demonstrations, and train policies on the best."""

    runs: Path = ROOT / "runs" / "curation"
    """Folder of the dataset and the runs; finished parts are kept."""
    episodes: int = 200
    """Demonstrations; a third of them are degraded."""
    noise: float = 0.1
    """Standard deviation of the noise on noisy actions, table units; a step of the demonstrator is 0.05."""
    delay: int = 5
    """Delay of the delayed actions, in steps."""
    seed: int = 0
    """Seed of the demonstrations and of how they are degraded."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the policies."""
    rollouts: int = 200
    """Closed-loop episodes of each policy."""
    policy_steps: int = 700
    """Training steps of each policy, half of the demo's: enough to tell them apart."""
    skip_policies: bool = False
    """Only score."""


def main(config: Config) -> None:
    ways = make_dataset(config)
    run = config.runs / "mi"
    if not (run / "episode_scores.csv").is_file():
        call(
            *("train_mi.py", "--config", ROOT / "configs/train_mi/demo.json", *dataset(config)),
            *("--run-dir", run, "--resume", "auto"),
        )
    print("| estimator | nats | " + " | ".join(WAYS) + " | all |")
    print("| --- |" + " --- |" * (len(WAYS) + 2))
    scores = {}
    for estimator in reversed(ESTIMATORS):  # the first one runs last: its files choose the episodes
        call("train_mi.py", "--estimate-only", run, "--estimator", estimator, "--best", 2 / 3)
        scores[estimator] = read_scores(run)
        nats = json.loads((run / "mutual_information.json").read_text())["nats"]
        areas = [auroc(scores[estimator], ways, (way,)) for way in WAYS] + [
            auroc(scores[estimator], ways, WAYS)
        ]
        print(f"| {estimator} | {nats:.2f} | " + " | ".join(f"{area:.3f}" for area in areas) + " |")
    print(f"scoring 20,000 steps of 500 episodes by nearest neighbours: {time_scoring():.1f} s")
    if not config.skip_policies:
        compare_policies(config, run, scores["ksg"])


def make_dataset(config: Config) -> list[str]:
    """Record the demonstrations once; return how each was degraded, or "good"."""
    episodes = list(demo.demonstrate(config.episodes, config.seed))
    random = np.random.default_rng(config.seed)
    ways = ["good"] * len(episodes)
    bad = random.permutation(len(episodes))[: len(episodes) // 3]
    actions = [episode.action.copy() for episode in episodes]
    for n, e in enumerate(bad):
        ways[e] = WAYS[n % 3]
        action, length = actions[e], len(actions[e])
        if ways[e] == "noisy":
            changed = action + random.normal(0, config.noise, action.shape)
        elif ways[e] == "delayed":
            changed = action[np.maximum(np.arange(length) - config.delay, 0)]
        else:
            other = actions[(e + 1 + random.integers(len(episodes) - 1)) % len(episodes)]
            changed = other[np.minimum(np.arange(length), len(other) - 1)]
        episodes[e] = episodes[e]._replace(action=changed.astype(np.float32))
    root, labels = config.runs / "dataset", config.runs / "labels.json"
    made = {name: getattr(config, name) for name in ("episodes", "noise", "delay", "seed")} | {"ways": ways}
    if not root.exists():
        shutil.rmtree(root.with_suffix(".part"), ignore_errors=True)
        config.runs.mkdir(parents=True, exist_ok=True)
        demo.record(root.with_suffix(".part"), episodes)
        labels.write_text(json.dumps(made))
        root.with_suffix(".part").rename(root)
    if json.loads(labels.read_text()) != made:
        sys.exit(f"{root} was made with other options: choose another --runs.")
    return ways


def dataset(config: Config) -> list:
    return ["--dataset", config.runs / "dataset"]


def call(script: str, *flags) -> None:
    """Run a script of this project; if it fails, show the end of its output."""
    done = subprocess.run(
        [sys.executable, script, *map(str, flags)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{script} failed: {done.stderr.strip()[-1500:]}")


def read_scores(run: Path) -> dict[int, float]:
    lines = (run / "episode_scores.csv").read_text().splitlines()[1:]
    return {int(episode): float(score) for episode, _, score in (line.split(",") for line in lines)}


def auroc(scores: dict[int, float], ways: list[str], bad_ways: tuple[str, ...]) -> float:
    """Probability that a good episode scores above a bad one; ties count half."""
    good = np.array([score for e, score in scores.items() if ways[e] == "good"])
    bad = np.array([score for e, score in scores.items() if ways[e] in bad_ways])
    return float((good[:, None] > bad).mean() + (good[:, None] == bad).mean() / 2)


def time_scoring() -> float:
    torch.manual_seed(0)
    x, y = torch.randn(20_000, 8), torch.randn(20_000, 8)
    start = time.perf_counter()
    ksg(x, y, torch.arange(500).repeat_interleave(40))
    return time.perf_counter() - start


def compare_policies(config: Config, run: Path, scores: dict[int, float]) -> None:
    """Success of `train_vfp.py` trained on all episodes, the best, and random ones."""
    best = run / "episodes_top67.json"
    number = len(json.loads(best.read_text())["episodes"])
    drawn = np.random.default_rng((config.seed, 1)).permutation(sorted(scores))[:number]
    chosen = config.runs / "random.txt"
    chosen.write_text(" ".join(map(str, sorted(drawn.tolist()))) + "\n")
    print("| episodes | number | success, 10 steps |\n| --- | --- | --- |")
    for name, count, flags in (
        ("all", len(scores), []),
        ("best two thirds", number, ["--episodes-file", best]),
        ("random two thirds", number, ["--episodes-file", chosen]),
    ):
        rates = []
        for seed in config.seeds:
            folder = config.runs / f"vfp-{name.replace(' ', '-')}-{config.policy_steps}-{seed}"
            if not (folder / "checkpoints" / f"step_{config.policy_steps:07d}").is_dir():
                call(
                    *("train_vfp.py", "--config", ROOT / "configs/train_vfp/demo.json", *dataset(config)),
                    *("--run-dir", folder, "--seed", seed, "--steps", config.policy_steps, *flags),
                    *("--resume", "auto"),
                )
            rates.append(100 * success(folder, config.rollouts))
        shown = ", ".join(f"{rate:.1f}" for rate in rates)
        print(f"| {name} | {count} | {statistics.mean(rates):.1f} ({shown}) |", flush=True)


def success(folder: Path, rollouts: int) -> float:
    """Success rate of a policy with ten sampling steps, measured once."""
    import evaluate
    from common.envs import EnvConfig
    from common.inference import load_policy
    from common.rollout import rates

    file = folder / f"success-{rollouts}.json"
    if not file.is_file():
        settings = evaluate.Config(folder, simulator=EnvConfig(env="demo"), episodes=rollouts)
        write_json(file, rates(evaluate.act(load_policy(folder, seed=0), settings, 10))["success"])
    return read_json(file)


if __name__ == "__main__":
    cli(main, Config)
