"""Instructions of episodes: which are wanted, which episode has which, and how often each is sampled.

An episode has one instruction. If it changes, the episode is cut there, so no action chunk runs from one task
into the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.console import say
from common.data.cameras import closest, distinct
from common.errors import UserError

if TYPE_CHECKING:
    from common.data import DataConfig
    from common.data.store import EpisodeStore


def listed(tasks: Iterable[str], most: int = 8) -> str:
    """Instructions as a list for a sentence."""
    tasks = list(tasks)
    more = f" and {len(tasks) - most} more" * (len(tasks) > most)
    return ", ".join(f'"{task}"' for task in tasks[:most]) + more


def wanted_tasks(there: Sequence[str], config: DataConfig, source: str) -> list[str]:
    """The dataset's tasks that `--task` names, in its order; all if it names none.

    One of several datasets that states none may be named by its folder: see `name_tasks` and `weigh_tasks`.

    Raises:
        UserError: if one does not exist or, with several datasets, if this one has none of them.
    """
    if not config.task or (not there and len(config.dataset) > 1):
        return list(there)
    unknown = [task for task in config.task if task not in there]
    if unknown and (len(config.dataset) == 1 or len(unknown) == len(config.task)):
        raise UserError(
            f'{source} has no task "{unknown[0]}"{closest(unknown[0], there)}: it has '
            f"{listed(there) or 'none'}."
        )
    return [task for task in config.task if task in there]


def cut_at_tasks(store: EpisodeStore, wanted: Sequence[str]) -> EpisodeStore:
    """The store with episodes cut where their instruction changes, keeping the parts `wanted`, or all.

    A part of one step has no action chunk and is left out.
    """
    if all(task is None or isinstance(task, str) for task in store.episode_tasks):
        return store
    parts: list[tuple[int, int, int, str | None]] = []  # episode, first step and the one after the last, task
    cut = [e for e, task in enumerate(store.episode_tasks) if task is not None and not isinstance(task, str)]
    for e, task in enumerate(store.episode_tasks):
        begin, end = store.episode_starts[e : e + 2].tolist()
        spans = [(0, task)] if task is None or isinstance(task, str) else task
        edges = [*(begin + step for step, _ in spans), end]
        parts += [(e, *edges[i : i + 2], name) for i, (_, name) in enumerate(spans)]
    kept = [part for part in parts if part[2] - part[1] > 1 and (not wanted or part[3] in wanted)]
    if not kept:
        raise UserError(f"{store.source} has no task that lasts for two steps: choose others with --task.")
    episodes, first, last, tasks = (list(column) for column in zip(*kept, strict=True))
    number = store.episode_indices[cut[0]]
    say(
        f"{store.source}: {len(cut)} episodes (the first is {number}) change their task and are cut there: "
        f"{store.num_episodes} episodes become {len(kept)}"
    )
    made = store.cut(*(np.array(column, np.int64) for column in (episodes, first, last)))
    return replace(made, episode_tasks=tuple(tasks))


def name_tasks(stores: Sequence[EpisodeStore], datasets: Sequence[str]) -> list[EpisodeStore]:
    """The stores of several `datasets`; those that state no instruction get their own name as one."""
    both = list(zip(stores, datasets, strict=True))
    silent = list(dict.fromkeys(dataset for store, dataset in both if not store.instructions))
    paths = [Path(dataset) for dataset in silent]
    candidates = [[path.stem, f"{path.parent.name} {path.stem}", str(path)] for path in paths]
    spelled = [[name.replace("_", " ").replace("-", " ") for name in names] for names in candidates]
    taken = {task for store in stores for task in store.instructions}
    names = dict(zip(silent, distinct(spelled, taken), strict=True))
    for dataset, name in names.items():
        say(f'{dataset} states no instruction: its name is used, "{name}"')
    return [
        replace(store, episode_tasks=(names[dataset],) * store.num_episodes) if dataset in names else store
        for store, dataset in both
    ]


def weigh_tasks(store: EpisodeStore, config: DataConfig) -> EpisodeStore:
    """The store with weights between its tasks, if given.

    Raises:
        UserError: if `--task` names one that it does not have, or leaves out one of a dataset named after it.
    """
    absent = [task for task in config.task if task not in store.instructions]
    if absent:
        there = listed(store.instructions) or "none"
        raise UserError(f'{store.source}: there is no task "{absent[0]}", only {there}.')
    others = [task for task in store.instructions if config.task and task not in config.task]
    if others:
        raise UserError(f'"{others[0]}", one of the datasets, is not among --task: leave out that dataset.')
    weights = dict(zip(config.task, config.task_weights, strict=False))
    found = tuple(weights[task] for task in store.instructions) if weights else None
    return replace(store, task_weights=found, task_balance=config.task_balance)


def summary(store: EpisodeStore, most: int = 50) -> list[str]:
    """Each task with its episodes and steps, in lines for people."""
    numbers, lengths = store.episode_task_numbers, np.diff(store.episode_starts)
    names = [*store.instructions, *(["none stated"] * bool((numbers < 0).any()))]
    places = np.where(numbers < 0, len(store.instructions), numbers)
    episodes, steps = np.bincount(places), np.bincount(places, lengths).astype(int)
    if len(names) == 1:
        return [f"  task            {names[0]}"]
    lines = [f"  {len(names)} tasks".ljust(18) + "episodes    steps"]
    for name, count, length in list(zip(names, episodes, steps, strict=True))[:most]:
        lines.append(f"{'':<18}{count:>8} {length:>8}  {name}")
    return lines + [f"{'':<18}and {len(names) - most} more"] * (len(names) > most)


def draw_shares(samples: np.ndarray, wanted: np.ndarray | None, balance: float) -> np.ndarray:
    """Relative sampling frequency of each group of samples: (D, K), for K tasks in D datasets.

    Tasks get the shares that are `wanted`, or else in proportion to n^(1 - balance) for n samples: a
    balance of 0 keeps the recorded proportions, 1 makes all equal. A task's share is divided among its
    datasets as `samples` are.

    Args:
        samples: their number in each group, (D, K); with weights between datasets, frequencies.
        wanted: (K,), or None.
    """
    of_tasks = samples.sum(0)
    if wanted is None:
        wanted = np.where(of_tasks > 0, np.maximum(of_tasks, 1e-300) ** (1 - balance), 0.0)
    return samples * np.divide(wanted, of_tasks, out=np.zeros(len(of_tasks)), where=of_tasks > 0)
