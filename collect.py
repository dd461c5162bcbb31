"""Let a policy act, and record what it should learn from next: corrections, its successes, or all of it.

    python collect.py runs/vfp-20260301-101500 new/ --episodes 50
    python train_vfp.py --dataset demo --grow-from new/ ...

A correction begins some steps before an episode failed: there the environment's expert takes over, and what
it does is a demonstration. The result is a LeRobot dataset in the folder that `--grow-from` watches; it
appears there complete. The same policy, seed and device give the same episodes.
"""

import common  # isort: skip  # noqa: F401  (before PyTorch, whose threads it sets up)
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import field
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from pydantic import NonNegativeInt, PositiveInt
from tqdm import tqdm

from common.checkpoint import PolicySpec
from common.config import Flat, UserPath, cli, options
from common.console import is_quiet, say
from common.data.lerobot_meta import COLLECTED
from common.data.recording import Demonstration, write_dataset
from common.data.source import spaced
from common.data.tasks import listed
from common.envs import EnvConfig, Environment, answering
from common.envs.record import perform
from common.errors import UserError
from common.files import sync, sync_one, writing_below
from common.inference import RobotPolicy, load_policy
from common.person import Operator, Watched, make_operator
from common.rollout import Episode, make_environments, roll_out


@options
class Config:
    """Record episodes of a policy, or an expert's corrections of them."""

    run: Annotated[UserPath, tyro.conf.Positional]
    """Run folder; it may still be training."""
    out: Annotated[UserPath, tyro.conf.Positional]
    """Folder for the new dataset, which is named after run, step and seed: that of --grow-from. Corrections
    by a person become a dataset each."""
    keep: Literal["corrections", "successes", "all"] = "corrections"
    """What to record: how an expert would have gone on where the policy failed; episodes in which the policy
    succeeded; or all of its episodes."""
    episodes: PositiveInt = 20
    """Episodes in which the policy acts."""
    budget: PositiveInt | None = None
    """Record at most this many steps, in whole episodes."""
    by: str = "expert"
    """Who corrects: `expert`, the environment's own; `keyboard`, a person who watches the policy in a window
    (built-in task); or `module:factory`, a function of yours that returns a `common.person.Operator`."""
    rewind: PositiveInt = 10
    """Steps before the end of a failed episode at which the expert takes over. If it fails, too, it tries
    again from twice as many steps before, and so on."""
    hold: NonNegativeInt = 4
    """Steps that the expert continues after success."""
    simulator: Flat[EnvConfig] = field(default_factory=EnvConfig)
    checkpoint: str = "last"
    """`last`, or the number of a saved step."""
    sample_steps: PositiveInt | None = None
    """Integration steps (default: the number that the run was configured with)."""
    parallel: PositiveInt = 20
    """Episodes that run at once, in one forward pass."""
    seed: NonNegativeInt = 3_000_000
    """Seed of episodes and noise: another one for each round, higher by `--episodes`, since environments may
    add an episode's number to it. `evaluate.py` uses 1,000,000."""


def main(config: Config) -> None:
    policy = load_policy(config.run, config.checkpoint, seed=config.seed)
    left = config.budget

    def granted(steps: int) -> bool:
        nonlocal left
        if left is not None and steps > left:
            return False
        left = None if left is None else left - steps
        return True

    collect(policy, config, granted)


def collect(policy: RobotPolicy, config: Config, granted: Callable[[int], bool]) -> None:
    """Let the policy act, and record what `--keep` asks for.

    Args:
        granted: whether a demonstration of this many steps may be recorded; if not, it is the end.
    """
    simulator = config.simulator.in_place_of_demo(policy.config.data.dataset)
    if simulator.env is None:
        raise UserError("--env is missing: name the environment to act in, such as aloha:transfer-cube.")
    if config.by != "expert" and config.keep != "corrections":
        raise UserError(f"--by {config.by} records corrections: leave out --keep {config.keep}.")
    name = f"{config.run.resolve().name}-{policy.checkpoint.name}-seed-"
    seeds = range(config.seed, config.seed + (1 if config.by == "expert" else config.episodes))
    paths = {seed: config.out / f"{name}{seed}" for seed in seeds}
    if there := [path for path in paths.values() if path.exists()]:
        raise UserError(f"{there[0]} already exists: give each round its own --seed.")
    at_once = min(config.parallel, config.episodes) if config.by == "expert" else 1
    environments = make_environments(simulator, policy.spec.image_size, at_once)
    refuse_other_rate(environments[0], policy.spec)
    refuse_in_vain(environments[0], policy, config)
    with writing_below(config.out, elsewhere="another folder"):  # before minutes of acting
        config.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=config.out).close()
    if config.by != "expert":
        operator = make_operator(config.by, environments[0])
        for number, found in taken_over(operator, environments[0], policy, config, granted):
            path = paths[config.seed + number]
            try:  # at once: whatever fails later, this is kept
                write(path, policy.spec, iter([found]))
            except KeyboardInterrupt:  # it is finished, too
                if not path.exists():
                    write(path, policy.spec, iter([found]))
                break
        return
    with tqdm(total=config.episodes, desc="episodes", unit="episode", disable=is_quiet()) as bar:
        progress = lambda done: bar.update(done - bar.n)  # noqa: E731
        numbers, steps = range(config.episodes), config.sample_steps
        episodes = roll_out(policy, environments, numbers, config.seed, steps, progress=progress)
    successes = sum(episode.success for episode in episodes)
    say(f"{policy.checkpoint.name}: {successes} of {len(episodes)} episodes succeeded")
    write(paths[config.seed], policy.spec, demonstrations(environments[0], episodes, config, granted))


def refuse_other_rate(environment: Environment, spec: PolicySpec) -> None:
    """Refuse to record steps of another length than those that the policy was trained on."""
    if spec.fps != round(spec.fps):
        raise UserError(f"Datasets of LeRobot have whole rates, and the policy's is {spec.fps:g} Hz.")
    if abs(environment.fps / spec.fps - 1) > 0.01:
        raise UserError(
            f"{environment.name} runs at {environment.fps:g} Hz, the policy learned from {spec.fps:g} Hz: "
            f"what it does there does not belong to its demonstrations."
        )


def refuse_in_vain(environment: Environment, policy: RobotPolicy, config: Config) -> None:
    """Refuse, before any episode, what could not be corrected or acted in; warn of what could not be used."""
    with answering(environment.name, "its first reset"):
        environment.reset(config.seed, 0)
        helpless = config.keep == "corrections" and config.by == "expert" and environment.expert() is None
    if helpless:
        raise UserError(
            f"{environment.name} has no expert to correct the policy: give --keep successes or all."
        )
    tasks, task = policy.spec.tasks, spaced(environment.task)
    known = policy.config.data.task if tasks is None else tasks.sentences
    if not known or task in known:
        return
    if tasks is not None and tasks.encoder == "index":
        raise UserError(
            f'--env {environment.name} gives the instruction "{task}", and the policy knows only '
            f"{listed(known)}: act in an environment that gives one of these."
        )
    say(f'warning: {config.run} has no demonstration of "{task}", and will not learn from such episodes')


def write(path: Path, spec: PolicySpec, found: Iterator[Demonstration]) -> None:
    """Write demonstrations, if there are any, as a dataset, which appears when it is complete."""
    first = next(found, None)
    if first is None:
        return say("nothing to record")
    unfinished = path.with_name(f".{path.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    state, action = spec.recorded_names  # the dataset's, whatever the environment calls them
    names = {"state_names": state, "action_names": action}
    try:
        seen = (as_seen(demonstration, spec) for demonstration in chain([first], found))
        write_dataset(unfinished, seen, fps=round(spec.fps), **names, camera_info=COLLECTED)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync(unfinished)
    unfinished.rename(path)
    sync_one(path.parent)
    say(f"recorded: {path}")


def as_seen(demonstration: Demonstration, spec: PolicySpec) -> Demonstration:
    """A demonstration with the policy's cameras only, under its names for them and in its order."""
    # Of two names for a camera, the policy saw the one that is the same.
    names = sorted(demonstration.images, key=lambda name: name in spec.cameras)
    seen = {spec.camera(name): demonstration.images[name] for name in names}
    return demonstration._replace(images={camera: seen[camera] for camera in spec.cameras})


def taken_over(
    operator: Operator,
    environment: Environment,
    policy: RobotPolicy,
    config: Config,
    granted: Callable[[int], bool],
) -> Iterator[tuple[int, Demonstration]]:
    """What a person does who watches the policy and takes over, where it leads to success; by episode."""
    watched, count, steps = Watched(environment, operator), 0, 0
    with suppress(KeyboardInterrupt):  # what is finished is recorded
        for number in range(config.episodes):
            (episode,) = roll_out(policy, [watched], [number], config.seed, config.sample_steps)
            left = environment.max_steps - episode.steps
            if operator.has_control and left and not episode.success:
                found = perform(watched, lambda: operator.action(environment.state()), left, config.hold)
                if environment.success():
                    if not granted(len(found.state)):
                        say("the last correction is left out: it exceeds --budget")
                        break
                    count, steps = count + 1, steps + len(found.state)
                    yield number, found
            if operator.finished:
                break
    say(f"{count} corrections, {steps} steps")


def demonstrations(
    environment: Environment, episodes: Sequence[Episode], config: Config, granted: Callable[[int], bool]
) -> Iterator[Demonstration]:
    """What `--keep` asks for, as long as it is granted; at the end, prints how much that was."""
    count = steps = helpless = 0
    for episode in tqdm(episodes, desc="recording", unit="episode", disable=is_quiet()):
        if config.keep == "corrections":
            found = None if episode.success else correct(environment, episode, config)
            helpless += found is None and not episode.success
        elif episode.success or config.keep == "all":
            replay(environment, episode, 0, config.seed)
            actions = iter(episode.actions)
            found = perform(environment, lambda given=actions: next(given), episode.steps)
            same = len(found.state) == episode.steps and environment.success() == episode.success
            refuse_other(environment, same and np.allclose(found.state, episode.states[:-1], atol=1e-4))
        else:
            found = None
        if found is not None:
            if not granted(len(found.state)):
                break
            count, steps = count + 1, steps + len(found.state)
            yield found
    what = "episodes" if config.keep == "all" else config.keep
    say(f"{count} {what}, {steps} steps")
    if helpless:
        say(f"in {helpless} episodes the expert failed, too, even from their start")


def correct(environment: Environment, episode: Episode, config: Config) -> Demonstration | None:
    """What the expert does from shortly before the episode failed; None if it fails even from the start."""
    back = config.rewind
    while True:
        begin = max(episode.steps - back, 0)
        replay(environment, episode, begin, config.seed)
        with answering(environment.name, f"the expert's correction of episode {episode.number}"):
            found = perform(environment, environment.expert(), environment.max_steps - begin, config.hold)
        if environment.success():
            return found
        if not begin:
            return None
        back *= 2


def replay(environment: Environment, episode: Episode, steps: int, seed: int) -> None:
    """Bring the environment to where it was after some steps of an episode."""
    with answering(environment.name, f"repeating episode {episode.number}"):
        environment.reset(seed, episode.number)
        for action in episode.actions[:steps]:
            environment.step(action)
    refuse_other(environment, np.allclose(environment.state(), episode.states[steps], atol=1e-4))


def refuse_other(environment: Environment, same: bool) -> None:
    """Refuse an environment in which an episode is not the same when it is repeated."""
    if not same:
        raise UserError(
            f"{environment.name} does not repeat an episode from its seed and actions: what happened in it "
            f"cannot be recorded."
        )


if __name__ == "__main__":
    cli(main, Config)
