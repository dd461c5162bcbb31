"""The number of kernels that a training step and a chunk launch, counted on a CPU.

    python benchmarks/launches.py                                   # every script, into docs/performance.md
    python benchmarks/launches.py --scripts train_vfp --out launches.md --batch-size 2

On a GPU, a small network's step takes as long as its launches, not its arithmetic. This counts what PyTorch
dispatches during one step of a script with its default networks on the built-in task, in float32. Views and
empty tensors launch nothing, some operations launch several kernels (`KERNELS`), and operations on lists of
tensors launch one kernel per `LIST` tensors. Copies to the device and the savings of compiling are not
included. A chunk is one observation to one chunk of actions.
"""

import importlib
import sys
import tempfile
from collections import Counter
from pathlib import Path

from pydantic import PositiveInt
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState

from benchmarks.methods import insert
from common import losses, optim
from common.config import cli, options, parse
from common.run import Run
from common.tracking import Tracker

ROOT = Path(__file__).parents[1]
VIEWS = {
    *("view", "_unsafe_view", "_reshape_alias", "as_strided", "alias", "detach", "lift", "lift_fresh"),
    *("t", "transpose", "permute", "mT", "expand", "unsqueeze", "squeeze", "unflatten", "is_same_size"),
    *("slice", "select", "split", "split_with_sizes", "unbind", "narrow", "unfold", "diagonal"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense"),
    *("_record_function_enter_new", "_record_function_exit"),
}
KERNELS = {
    "logsumexp": 9,
    "native_layer_norm_backward": 2,
    "convolution_backward": 3,
    "native_group_norm": 2,
    "native_group_norm_backward": 4,
    "index_put_": 6,
    "_index_put_impl_": 6,
    "_cdist_backward": 2,
    "one_hot": 2,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,
    "randperm": 4,
}
LIST = 60
PHASES = ("forward", "Sinkhorn", "backward", "clipping", "optimizer", "average", "metrics", "the rest")
FLAGS = {"train_vfp_depth": "--depth-weights random --depth-cache off"}


@options
class Config:
    """Count the kernel launches of training steps and of chunks."""

    scripts: tuple[str, ...] = (
        "train_naive_fm",
        "train_vfp",
        "train_vfp_depth",
        "train_cfg_vqvae",
        "train_vfp_moe",
        "train_mi",
    )
    """Training scripts, without .py."""
    flags: str = ""
    """More flags for the scripts."""
    batch_size: PositiveInt = 4
    """Samples per step; counts hardly depend on it."""
    out: Path = ROOT / "docs" / "performance.md"
    """Page to write the table to."""


class Launches(TorchDispatchMode):
    """Counts launches for the innermost open phase."""

    def __init__(self):
        super().__init__()
        self.counts, self.open, self.undo = Counter(), ["the rest"], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name not in VIEWS:
            several = name.startswith(("_foreach", "_fused"))
            num = -(-len(args[0]) // LIST) if several else KERNELS.get(name, 1)
            self.counts[self.open[-1]] += num
        return func(*args, **(kwargs or {}))

    def phase(self, owner, attribute: str, name: str) -> None:
        """Count calls of a function as a phase."""
        original = getattr(owner, attribute)

        def wrapped(*args, **kwargs):
            self.open.append(name)
            try:
                return original(*args, **kwargs)
            finally:
                self.open.pop()

        self.undo.append((owner, attribute, original))
        setattr(owner, attribute, wrapped)


class Counted(Exception):
    """Ends a run after its second step was counted."""


def count(name: str, config: Config) -> tuple[Counter, list[int]]:
    """Launches of a script's second step by phase, and of chunks with 10 steps and with 1."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script, launches = importlib.import_module(name), Launches()
    runs, batches = [], Run.micro_batches

    def micro_batches(run):
        runs.append(run)
        if run.step == 1:
            launches.__enter__()
        if run.step == 2:
            launches.__exit__(None, None, None)
            raise Counted
        yield from batches(run)

    launches.undo += [(Run, "micro_batches", batches)]
    launches.undo += [(optim.GradientClipper, "_known_good", optim.GradientClipper._known_good)]
    for owner, attribute, phase in (
        (script, "compute_loss", "forward"),
        (losses, "sinkhorn_divergence", "Sinkhorn"),
        (Run, "backward", "backward"),
        (optim.GradientClipper, "__call__", "clipping"),
        (AcceleratedOptimizer, "step", "optimizer"),
        (optim.AveragedPolicy, "update", "average"),
        *((Tracker, attribute, "metrics") for attribute in ("add", "flush", "count_skipped")),
    ):
        launches.phase(owner, attribute, phase)
    Run.micro_batches = micro_batches
    optim.GradientClipper._known_good = lambda self: False  # as on a GPU, where the value is not read
    with tempfile.TemporaryDirectory() as folder:
        argv = f"--run-dir {folder}/run --batch-size {config.batch_size} --num-workers 0 --hang-timeout 0"
        argv = f"{argv} {FLAGS.get(name, '')} {config.flags}".split()
        try:
            script.main(parse(script.Config, argv, f"{name}.py"))
        except Counted:
            runs[-1].tracker.close()
        finally:
            for owner, attribute, original in launches.undo:
                setattr(owner, attribute, original)
    return launches.counts, [chunk(script, runs[-1], steps) for steps in (10, 1)]


def chunk(script, run: Run, steps: int) -> int | None:
    """Launches of a chunk with this many integration steps; None if the script has no chunks."""
    if not hasattr(script, "sample_actions"):
        return None
    batch, launches = run.data.train.__getitems__([0]), Launches()
    policy, proprio = run.average.model, run.data.normalizer.proprio(batch.proprio)
    with launches:
        script.sample_actions(policy, batch.images, proprio, run.config, steps=steps, task=batch.task)
    return launches.counts.total()


def main(config: Config) -> None:
    lines = [
        f"| | {' | '.join(PHASES)} | **step** | chunk, 10 steps | 1 step |",
        "|---" * (len(PHASES) + 4) + "|",
    ]
    for name in config.scripts:
        counts, chunks = count(name, config)
        cells = [*(counts[phase] for phase in PHASES), f"**{counts.total()}**", *chunks]
        lines.append(
            f"| `{name}.py` | {' | '.join('' if cell in (0, None) else str(cell) for cell in cells)} |"
        )
        print(lines[-1], flush=True)
    insert(config.out, "\n".join(lines), "The training step")


if __name__ == "__main__":
    cli(main, Config)
