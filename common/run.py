"""Everything between a method and Accelerate: a run from its start to its last checkpoint.

A script's `main` builds its policy, writes out its loop, and calls these in this order:

    run = start_run(config, __file__)            # processes, precision, seeds
    data = run.load_data(horizon, normalization) # training and held-out samples, statistics
    optimizer, scheduler, average = run.prepare(policy, data)
    while run.step < run.total_steps and not run.stopping:
        for batch in run.micro_batches():        # all of one optimizer step
            run.backward(loss)
        run.clip_gradients()
        optimizer.step() ...                     # what happens to the weights is visible in the script
        run.end_step()
        run.log_validation(...), run.save()      # when `run.due` says so
    run.close()

Nothing here calls a script back or knows a method's options. It uses the option groups that every script has:
`data`, `optim` and `run`.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from common import checkpoint, exported, flow, losses, optim
from common.accelerator import make_accelerator
from common.checkpoint import PolicySpec
from common.config import to_dict
from common.console import say
from common.data import (
    Batch,
    ChunkDataset,
    EpisodeStore,
    SampleStream,
    evenly_spaced,
    make_loader,
    open_dataset,
    split_episodes,
)
from common.data.growth import LOG as GROWTH_LOG
from common.data.growth import POLL_SECONDS, Growth, refuse_own_episodes
from common.data.samples import Ahead
from common.data.tasks import listed
from common.errors import EXIT_STOPPED, Busy, UserError
from common.files import completed_checkpoints, hold, read_json, write_json, write_whole, writing_below
from common.instructions import Instructions, TaskConfig
from common.normalize import Normalization, Normalizer
from common.plots import read_lines
from common.rollout import require_environments
from common.tracking import Tracker
from common.vision import Backbone, VisionConfig, require_backbone
from common.watch import PREPARING, HangWatch, StopRequests, meeting

PACKAGES = ("torch", "torchvision", "accelerate", "transformers", "lerobot", "safetensors", "numpy", "av")
NO_DELAY = flow.DelayConfig()
COMPILE = {"default": {"dynamic": False}, "graphs": {"dynamic": False, "mode": "reduce-overhead"}}
"""Options of torch.compile."""


class Data(NamedTuple):
    """What a run learns from."""

    train: ChunkDataset
    val: ChunkDataset | None
    """Held-out episodes; None if none are held out."""
    normalizer: Normalizer
    """Statistics of the training episodes, on the run's device."""
    spec: PolicySpec

    @property
    def store(self) -> EpisodeStore:
        return self.train.store

    def on(self, store: EpisodeStore) -> "Data":
        """The same samples from another store of the same steps, for instance one with features."""
        return self._replace(train=self.train.on(store), val=self.val and self.val.on(store))


def start_run(config: Any, script: str) -> "Run":
    """Start the run of a script (its `__file__`) with its configuration, in each process.

    Works in a single process, under `accelerate launch` and under `torchrun`.
    """
    if config.run.push_to_hub is not None:
        exported.require_pushable(config.run.push_to_hub, Path(script).name)
    if config.run.compile == "graphs" and config.optim.grad_accumulation > 1:
        raise UserError(
            "--compile graphs keeps only one batch's gradients: use --grad-accumulation 1 with a larger "
            "--batch-size, or --compile default."
        )
    with meeting(config.run.hang_timeout):
        accelerator = make_accelerator(config.run, config.optim.grad_accumulation)
    return Run(config, Path(script), accelerator)


class Run:
    """A training run, as one of its processes sees it.

    Attributes:
        rank, world: this process and how many there are.
        is_main: whether this process writes and prints.
        resuming: whether an earlier run is continued.
        step: the current optimizer step, from 1; between steps the last finished one, 0 at first.
        samples: number that all processes have drawn so far, which is the position in the data order.
        total_steps: of the whole run.
        stopping: whether all processes have agreed to stop after the current step.
        progress_mark: how many phases this process has entered, and the current one; for `HangWatch`.

    Set by `prepare`:
        folder: the run folder, the same on all processes.
        model: the policy to call in training, wrapped for several processes.
        average: the weights to evaluate and export.
        data, tracker: what the policy learns from, and where metrics go.
        writer: the thread that writes checkpoints; the process ends only after it has finished.
    """

    def __init__(self, config: Any, script: Path, accelerator: Accelerator):
        self.config, self.script, self.accelerator = config, script, accelerator
        self.device = accelerator.device
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.is_main = accelerator.is_main_process
        self.resuming = config.run.resume is not None
        self.global_batch = config.optim.batch_size * config.optim.grad_accumulation * self.world
        self.step = self.samples = self.total_steps = 0
        self.stopping = False
        self.progress_mark = 0, PREPARING
        self._watch = HangWatch(self, self.rank, self.world, config.run.hang_timeout)
        self._held = None
        if self.resuming and self.is_main:
            folder = config.run.run_dir
            self._held = hold(folder / ".lock", folder)
        set_seed(config.run.seed)  # all processes initialise the same weights

    @property
    def progress(self) -> Tensor:
        """Share of the training that was completed before the current step, in [0, 1); float64.

        A tensor, because torch.compile would compile again for every new number; on a GPU one there, since
        CUDA graphs hand on what the backward pass needs as tensors of the GPU.
        """
        device = self.device if self.device.type == "cuda" else None
        return torch.full((), (self.step - 1) / self.total_steps, dtype=torch.float64, device=device)

    # Data

    def load_data(
        self,
        horizon: int,
        normalization: Normalization,
        tasks: TaskConfig | None = None,
        delay: flow.DelayConfig = NO_DELAY,
        vision: VisionConfig | None = None,
    ) -> Data:
        """Open the dataset, hold episodes out, compute statistics.

        Args:
            horizon: actions in a chunk.
            tasks: how the policy is told its instruction; None: not at all.
            delay: how many actions at the start of a chunk are given.
            vision: its backbone has to take images of `--image-size`; None: it need not.

        Raises:
            UserError: if dataset or backbone cannot be used, or a resumed run was trained on other data.
        """
        if delay.max_delay >= horizon:
            raise UserError(
                f"--max-delay {delay.max_delay} leaves nothing of a chunk of {horizon} actions to predict: "
                f"choose at most {horizon - 1}, or raise --horizon."
            )
        if delay.max_delay and not delay.prefix_share:
            raise UserError("--max-delay without effect: with --prefix-share 0, no chunk has given actions.")
        options, seed = self.config.data, self.config.run.seed
        if options.grow_from is not None:
            refuse_own_episodes(options)
        if vision is not None and options.image_size and not self.resuming:  # decoding may take hours
            require_backbone(vision.backbone, (options.image_size[0], options.image_size[-1]))
        store, backbone_config, known = open_dataset(options), None, None
        if self.resuming:
            folder = self.config.run.run_dir
            saved = read_json(folder / "config.json")
            if saved.get("fingerprint") != store.fingerprint:  # their location does not matter
                chosen = f", episodes of {options.episodes_file}" if options.episodes_file else ""
                raise UserError(
                    f"{folder} was trained on data that have changed since ({saved.get('dataset')}{chosen}): "
                    f"resume with the data as they were, or start a new run with --init-from {folder}."
                )
            # The checkpoint has the backbone's architecture: the original model on the hub is not needed.
            last = checkpoint.newest_undamaged(folder, "policy/policy.json")
            saved = PolicySpec.load(last)
            backbone_config, known = saved.backbone_config, saved.tasks
            if known is not None and known.sentences != store.instructions:
                raise UserError(
                    f"{folder} was trained on datasets with other names ({listed(known.sentences)}): "
                    f"use these names again."
                )
        elif tasks is not None:
            known = Instructions.of(store, tasks)
        train_episodes, held_out = split_episodes(store, options.val_fraction, seed)
        if known is not None and known.encoder == "index":
            numbers = store.episode_task_numbers
            if len(untold := np.setdiff1d(numbers[held_out], numbers[train_episodes])):
                raise UserError(
                    f'{store.source}: every episode of "{store.instructions[untold[0]]}" is held out, so it '
                    f"cannot be learned: lower --val-fraction, or give a text encoder as --task-encoder."
                )
        shape = (horizon, options.proprio_history, options.action_offset)
        shape += (known is not None, options.image_history, options.image_stride)
        train = ChunkDataset(store, train_episodes, *shape, hold=options.hold)
        val = ChunkDataset(store, held_out, *shape) if len(held_out) else None  # errors of recorded actions
        longest = np.diff(store.episode_starts)[train_episodes].max() - options.action_offset
        if longest + options.hold < horizon:
            say(
                f"warning: --horizon {horizon} is longer than every training episode (at most {longest}): "
                f"all chunks are padded, and a transport loss, which leaves these out, is 0"
            )
        if self.resuming:  # the saved statistics, whatever this version's defaults are
            path = (
                checkpoint.newest_undamaged(folder, "policy/stats.safetensors") / "policy/stats.safetensors"
            )
            normalizer = Normalizer.load(path, normalization)
        else:
            relative = options.relative_actions, options.idle_floor, options.relative_mask
            normalizer = Normalizer.fit_once(train, normalization, *relative, options.relative_poses)
        normalizer = normalizer.to(self.device)
        spec = replace(PolicySpec.of(train, backbone_config), tasks=known, max_delay=delay.max_delay)
        self._to_predict = flow.share_to_predict(horizon, delay)
        return Data(train, val, normalizer, spec)

    # Start

    def load_weights(self, policy: nn.Module) -> None:
        """Load the weights of `--init-from` or, in a resumed run, those that its last checkpoint exported.

        Call it only if something is computed from the weights before `prepare`, which also loads them.
        """
        if self.resuming:
            last = checkpoint.newest_undamaged(self.config.run.run_dir, "policy/")
            checkpoint.load_components(policy, last / "policy")
        else:
            checkpoint.initialise(policy, self.config.run.init_from)

    def prepare(
        self, policy: nn.Module, data: Data
    ) -> tuple[AcceleratedOptimizer, LambdaLR, optim.AveragedPolicy]:
        """Make a policy ready to train, in the one order that works:

        1. `--init-from` and `--freeze`: the optimizer takes what is trainable, the average what was loaded.
        2. Batch norm over processes, then the device, before the optimizer takes the parameters.
        3. Optimizer, then the average, which must copy the policy before Accelerate patches it.
        4. Compiling, then DDP around it.
        5. A different random seed in each process; a resumed run then restores its own random state.
        6. Steps, schedule and data order, which depend on the step that the run has reached.
        7. The run folder, this late because a run that cannot start must not leave one.
        8. Episodes of `--grow-from`: their log is in the run folder.
        9. Signal handlers: until here, a signal ends the process at once.

        Returns:
            Optimizer, scheduler, and the weights to evaluate and export.
        """
        config, accelerator = self.config, self.accelerator
        if hasattr(config, "rollout"):
            require_environments(config, data, self)
        self._at("setting up the policy")
        checkpoint.require_components(policy)
        loaded = None
        if not self.resuming:
            loaded = checkpoint.initialise(policy, config.run.init_from)
            origins = config.run.init_from, data.spec, to_dict(config), loaded
            checkpoint.compare_origins(policy, *origins)
        checkpoint.freeze(policy, config.run.freeze, loaded)

        if self.world > 1 and self.device.type == "cuda":
            policy = nn.SyncBatchNorm.convert_sync_batchnorm(policy)  # pretrained backbones can have it
        policy.to(self.device)

        raw_optimizer = optim.build_optimizer(policy, config.optim)
        self.average = optim.AveragedPolicy(policy, raw_optimizer, config.optim.ema_decay)

        if config.run.checkpoint_activations:
            for backbone in (m for m in policy.modules() if isinstance(m, Backbone)):
                backbone.checkpoint_activations()
        if config.run.compile != "no":
            policy.compile(**COMPILE[config.run.compile])
        self._at("joining the processes' policies")
        # The policy is on its device: to find out, Accelerate would import what takes seconds.
        placed = [False, True]
        self.model, optimizer = accelerator.prepare(policy, raw_optimizer, device_placement=placed)
        self.model.train()
        for name in config.run.freeze:
            getattr(policy, name).eval()

        set_seed(config.run.seed, device_specific=True)
        if self.resuming:
            self._at("restoring the checkpoint")
            self.step, self.samples = checkpoint.restore(accelerator, config.run.run_dir, self.average)

        done = self.step, self.samples
        self.total_steps = optim.resolve_steps(config.optim, len(data.train), self.global_batch, *done)
        scheduler = optim.build_scheduler(raw_optimizer, policy, config.optim, self.total_steps, self.step)
        self.data = data._replace(spec=data.spec.with_backbone(policy))
        self._orders: list[tuple[int, SampleStream]] = []
        self._draw_from(data.train)

        self._at("opening the run folder")
        self.folder = self._open_folder(data.store)
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[int | None] | None = None
        self._saved_step = self.step
        self._growth = None
        if config.data.grow_from is not None:
            self._start_growth()
        self._at("starting the tracker")
        self.tracker = Tracker(accelerator, self.folder, config, self.total_steps, *done)
        self._optimizer = raw_optimizer
        self._clipper = optim.GradientClipper(policy, raw_optimizer, config.optim.grad_clip)

        self._requests = StopRequests(self.rank, self.world, config.run.max_time, config.run.hang_timeout)
        return optimizer, scheduler, self.average

    def _draw_from(self, dataset: ChunkDataset, begin: int = 0, number: int = 0) -> None:
        """Draw batches of a dataset; its order has a number, and begins at `begin` samples of the run."""
        size, seed = self.config.optim.batch_size, self.config.run.seed + (number << 32)
        options = (size, seed, self.config.data.num_workers, self.rank, self.world)
        pin = self.device.type == "cuda"
        self._loader = make_loader(dataset, *options, start=self.samples - begin, pin_memory=pin)
        self._batches = iter(self._loader)
        if pin and self._loader.num_workers == 0:  # else launches would wait while a batch is copied
            self._batches = Ahead(self._batches, partial(torch.cuda.set_device, torch.cuda.current_device()))
        self._orders = [*self._orders[-9:], (begin, self._loader.batch_sampler)]  # for `_drawn`
        self.data = self.data._replace(train=dataset)

    def _drawn(self, first: int, last: int) -> list[int]:
        """The samples from number `first` to `last` - 1 of the run; those of a dataset keep their numbers in
        the dataset with more episodes.
        """
        found, ends = [], [begin for begin, _ in self._orders[1:]] + [last]
        for (begin, order), end in zip(self._orders, ends, strict=True):
            start, stop = max(first, begin), min(last, end)
            found += order.samples(start - begin, stop - start) if start < stop else []
        return found

    def _start_growth(self) -> None:
        """Take in what is in `--grow-from` already, in a resumed run first what it had before; then look for
        more.
        """
        self._at(PREPARING)
        self._growth = Growth(self.config.data, self.data.train, self.folder / GROWTH_LOG, self.is_main)
        if self.is_main:
            self._growth.look()
            time.sleep(POLL_SECONDS)
            self._growth.look()  # which takes what has not changed in between
        self._grow(broadcast_object_list([len(self._growth.ready)])[0])
        if self.is_main:
            self._growth.start()

    def _grow(self, ready: int) -> None:
        """Learn from new episodes from the next step on, if there are any."""
        growth = self._growth
        while found := growth.due(self.step, self.samples, ready, lambda x: broadcast_object_list([x])[0]):
            dataset = growth.take(found)
            if self._loader.num_workers:  # new ones would keep the memory of the checkpoint being written
                self._finish_saving()
            self._draw_from(dataset, found["samples"], growth.repeated)
            say(
                f"step {found['step']}: {len(found['entries'])} new in {growth.folder}, now "
                f"{len(dataset.episodes)} training episodes with {len(dataset)} samples"
            )

    def _open_folder(self, store: EpisodeStore) -> Path:
        """Create the run folder with its `config.json`, or update that of a resumed run."""
        folder = self.config.run.run_dir
        if folder is None and self.is_main:
            method = self.script.stem.removeprefix("train_").replace("_", "-")
            folder = _new_folder(Path("runs") / f"{method}-{datetime.now():%Y%m%d-%H%M%S}")
        folder = Path(broadcast_object_list([str(folder)])[0])
        if self.is_main:
            with writing_below(folder, elsewhere="another --run-dir"):
                folder.mkdir(parents=True, exist_ok=True)
            if not self.resuming:
                self._at(PREPARING)  # which may take long
                self._held = hold(folder / ".lock", folder)
                if completed_checkpoints(folder):
                    raise Busy(f"{folder} was trained in meanwhile: continue with --resume {folder}.")
                (folder / GROWTH_LOG).unlink(missing_ok=True)  # of a start that ended too early
            self._write_config(folder, store)
            batches = self.config.optim.grad_accumulation
            say(
                f"{folder}: {self.total_steps} steps of {self.global_batch} samples "
                f"({self.config.optim.batch_size} x {self.world} process{'es' * (self.world > 1)} x "
                f"{batches} micro-batch{'es' * (batches > 1)}), {self.device.type}, "
                f"{self.accelerator.mixed_precision} mixed precision"
            )
        self.accelerator.wait_for_everyone()
        return folder

    def _write_config(self, folder: Path, store: EpisodeStore) -> None:
        """Write `config.json` and `changes.patch`: what is needed to repeat the run."""
        commit, changes = _git()
        values = {
            "script": self.script.name,
            "config": to_dict(self.config),
            "versions": _versions(),
            **commit,
        }
        values |= {"fingerprint": store.fingerprint, "dataset": store.source, "processes": self.world}
        values["device"] = torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type
        values["mixed_precision"] = self.accelerator.mixed_precision
        if self.resuming:
            values["resumes"] = [*read_json(folder / "config.json").get("resumes", []), self._resume()]
        write_json(folder / "config.json", values)
        if changes:
            write_whole(folder / "changes.patch", changes.encode(errors="replace"))
        elif commit:  # committed since the run began
            (folder / "changes.patch").unlink(missing_ok=True)

    def _resume(self) -> dict[str, Any]:
        """The step that this run resumes from, the step that it had reached before, and the time."""
        path = self.config.run.run_dir / "metrics.jsonl"
        reached = [line["step"] for line in read_lines(path)] if path.exists() else []
        time = datetime.now().astimezone().isoformat(timespec="seconds")
        return {"step": self.step, "reached": max(reached, default=self.step), "time": time}

    # A step

    def micro_batches(self) -> Iterator[Batch]:
        """Start the next optimizer step; yields its `--grad-accumulation` batches, on the device.

        Sets `real_actions`: the number of real actions (no padding) in a batch, averaged over these batches
        of all processes. With prefixes, it counts only the actions to predict, averaged over prefix lengths.
        If each loss divides by it, the gradient, accumulated and averaged over processes, is that of the mean
        over all real actions, whatever share of padding each batch has.
        """
        self.tracker.resume_clock()
        self._at("taking in new episodes")
        if self._growth is not None:
            self._grow(self._requests.ready)
        self.step += 1
        self._clipper.begin_step()
        self._at("loading data")
        with self.tracker.waiting():  # all of them at once: the count is needed before the first loss
            batches = [next(self._batches) for _ in range(self.accelerator.gradient_accumulation_steps)]
            count = sum((~batch.is_pad * self._to_predict).sum() for batch in batches) / len(batches)
        self.real_actions = self.mean(count.to(self.device, non_blocking=True))  # else it waits for the GPU
        for batch in batches:
            self._at("the forward pass")
            # Processes exchange gradients only after the last batch.
            with self.accelerator.accumulate(self.model):
                yield batch.to(self.device)

    def compiled(self, compute_loss: Callable) -> Callable:
        """A script's loss function, compiled as `--compile` says.

        With several processes, DDP stands between the loss and the policy: these are compiled by themselves,
        and so are Sinkhorn's iterations.
        """
        mode = self.config.run.compile
        if mode == "no":
            return compute_loss
        if self.world == 1:
            return torch.compile(compute_loss, **COMPILE[mode])

        def objective(*given, **named):
            with losses.compiled_iterations():
                return compute_loss(*given, **named)

        return objective

    def backward(self, loss: Tensor) -> None:
        """Add a batch's gradient to the step's, which is the mean over its batches; log the loss."""
        self.tracker.add({"loss": loss})
        self._at("the backward pass")
        self.accelerator.backward(optim.or_nan(loss))

    def log(self, metrics: dict[str, Tensor | float]) -> None:
        """Collect scalars, without waiting for the device; `end_step` logs their means."""
        if metrics:
            self.tracker.add(metrics)

    def clip_gradients(self) -> dict[str, Tensor]:
        """Scale the gradients to `--grad-clip`.

        If they are not finite, the optimizer's step leaves weights, moments and buffers unchanged, while step
        count, schedule and average still advance.

        Returns:
            Norms before clipping: of all gradients, and of each component's.
        """
        self._at("the optimizer's step")
        self.accelerator.unscale_gradients()  # fp16 scales them
        self._rates = optim.learning_rates(self._optimizer)
        norms = self._clipper()
        self.tracker.count_skipped(self._clipper.bad.float())
        return norms

    def end_step(self) -> dict[str, float]:
        """Write a line of metrics if one is due, and return it; agree with other processes whether to stop.

        Raises:
            UserError: if too many steps in a row had to be skipped.
        """
        self.samples += self.global_batch
        self.tracker.flush()
        logged: dict[str, float] = {}
        if self.due(self.config.run.log_every):
            logged, skipped, last = self.tracker.log(self.step, self.samples, self._rates)
            if skipped >= self.config.run.max_bad_steps:
                self._refuse_bad_steps(skipped, last)
        self.stopping = self._requests.agreed(0 if self._growth is None else len(self._growth.ready))
        self.tracker.pause_clock()
        self._at("evaluating and saving")
        return logged

    def due(self, every: int | None) -> bool:
        """Whether the step is a multiple of `every`, or the last one; never, if `every` is None."""
        return every is not None and (self.step % every == 0 or self.step == self.total_steps)

    def _at(self, phase: str) -> None:
        self.progress_mark = self.progress_mark[0] + 1, phase

    def _refuse_bad_steps(self, num: int, last: int) -> None:
        """Stop a run that no longer learns, and name the samples of the skipped steps."""
        dataset, path = self.data.train, self.folder / "bad_steps.json"
        first = max(self.samples - (self.step - last + num) * self.global_batch, 0)
        rows = dataset.rows[self._drawn(first, first + num * self.global_batch)]
        episodes = dataset.store.episode_of(rows)
        numbers = dataset.store.episode_indices[episodes]
        frames = rows - dataset.store.episode_starts[episodes]
        places = enumerate(zip(numbers.tolist(), frames.tolist(), rows.tolist(), strict=True))
        listed = [
            {"step": last - num + 1 + n // self.global_batch, "episode": e, "frame": f, "row": r}
            for n, (e, f, r) in places
        ]
        if self.is_main:
            write_json(path, {"samples": listed})
        self._finish_saving()
        self.tracker.close()
        raise UserError(
            f"In {num} steps in a row, {last - num + 1} to {last}, loss or gradient was not finite, and the "
            f"weights did not change: look at the samples listed in {path}, beginning with episode "
            f"{numbers[0]}, frame {frames[0]}; lower --lr, or continue from the last checkpoint with another "
            f"precision."
        )

    # Evaluating, saving, ending

    def evenly_spaced(self, dataset: ChunkDataset, num: int) -> Iterator[tuple[Tensor, Batch]]:
        """`num` samples spread evenly over a dataset, the same ones every time, divided among processes.

        Yields:
            Numbers of these samples among the `num`, (B,), and their batch on the device.
        """
        for rows, batch in evenly_spaced(dataset, num, self.config.optim.batch_size, self.rank, self.world):
            yield rows, batch.to(self.device)

    def autocast(self):
        """Context that gives a forward pass the run's precision."""
        return self.accelerator.autocast()

    def sum(self, x: Tensor) -> Tensor:
        """Sum over processes, on all of them."""
        return self.accelerator.reduce(x)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over processes, on all of them."""
        return self.accelerator.reduce(x, "mean")

    def log_validation(self, metrics: dict[str, float]) -> None:
        """Write metrics of held-out episodes or of rollouts, if there are any, and redraw the curves."""
        if metrics:
            self.tracker.log_validation(self.step, metrics)

    def save(self) -> None:
        """Write a checkpoint while training goes on; all processes call this at the same step.

        Waits for the previous one first. If the disk is full, this checkpoint is lost and training continues.
        """
        self._finish_saving()
        self._writing = checkpoint.save(self)
        if not self.config.run.background_saving:
            self._finish_saving()

    def _finish_saving(self) -> None:
        """Wait until the checkpoint that is being written is complete, or known to be lost."""
        self._at("writing the previous checkpoint")  # in all processes: `HangWatch` compares their counts
        if self._writing is not None:
            saved, self._writing = self._writing.result(), None
            self._saved_step = self._saved_step if saved is None else saved
        self._at("saving")

    def close(self) -> None:
        """Close all that the run has open; push its policy. Exits with code 75 if the run was stopped early.

        Raises:
            UserError: if the last checkpoint could not be written, or the hub refuses the policy.
        """
        leaving = self.stopping and self.step < self.total_steps
        self._finish_saving()
        saved_step = broadcast_object_list([self._saved_step])[0]  # the first process writes, for all
        self._at("closing the tracker")
        if self._growth is not None:
            self._growth.close()
        self.tracker.close()
        if self._held is not None:
            self._held.close()
        self._watch.close()
        self._requests.close(leaving)
        if saved_step != self.step:
            raise UserError(
                f"Step {self.step}, the last, could not be saved: free disk space, and continue from the "
                f"previous checkpoint with --resume {self.folder}."
            )
        if leaving:
            why = self._requests.reason or "another process was told to"
            say(
                f"stopped after step {self.step} of {self.total_steps} ({why}): continue with "
                f"--resume {self.folder}"
            )
            sys.exit(EXIT_STOPPED)
        say(f"all {self.total_steps} steps are done: {self.folder}")
        if self.is_main and self.config.run.push_to_hub is not None:
            from lerobot_policy_flow.export import push_run

            say(f"pushed: {push_run(self.folder, self.config.run.push_to_hub)}")


def _new_folder(path: Path) -> Path:
    """Make a folder of that name, with a number if it exists: jobs of an array start in the same second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 10_000):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise UserError(f"{path} and its numbered successors all exist: give --run-dir.")


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _git() -> tuple[dict[str, Any], str]:
    """Commit of this checkout, whether files differ from it, and how; nothing if there is no git.

    The difference includes new Python and JSON files: commit and difference together are the code that ran.
    """
    root = Path(__file__).resolve().parents[1]

    def git(*command: str, codes: tuple[int, ...] = (0,)) -> str:
        done = subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, timeout=30)
        if done.returncode not in codes:
            raise subprocess.SubprocessError(done.stderr)
        return done.stdout

    try:
        commit, changes = git("rev-parse", "HEAD").strip(), git("diff", "HEAD", "--no-color")
        for name in git("ls-files", "--others", "--exclude-standard", "--", "*.py", "*.json").splitlines():
            changes += git("diff", "--no-color", "--no-index", os.devnull, name, codes=(0, 1))
        dirty = bool(git("status", "--porcelain").strip())
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}, ""
    return {"git_commit": commit, "git_dirty": dirty}, changes
