"""Starting a run: processes and precision, the run folder."""

import logging
import os
import warnings
from datetime import datetime, timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from common.config import RunConfig, write_run_config
from common.errors import UserError
from common.files import read_json


def make_accelerator(config: RunConfig, grad_accumulation: int = 1) -> Accelerator:
    """Accelerate set up as every script needs it; works alone, under `accelerate launch` and `torchrun`.

    Without an accelerator on the machine it runs on the CPU, with several processes too (gloo).
    """
    # The launcher's own hints about defaults say nothing that a user of these scripts can act on.
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
    # Longer than the watch's (`faults.Guard`), which can say what hangs; NCCL gives up after 10 minutes else.
    patience = timedelta(seconds=2 * config.hang_timeout or 10**7)
    accelerator = Accelerator(
        kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)],
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=grad_accumulation,
        cpu=not torch.accelerator.is_available(),
        step_scheduler_with_optimizer=False,  # otherwise a prepared scheduler steps once per process
    )
    if accelerator.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True  # image sizes do not change during a run
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # its sums else depend on the streams
        torch.backends.cudnn.benchmark = False  # it may choose another algorithm the next time
        torch.use_deterministic_algorithms(True)
    return accelerator


def check_same_data(config: RunConfig, store) -> None:
    """Refuse to resume a run on other data than it was trained on.

    Args:
        store: the episode store; where it lies does not matter, its fingerprint does.

    Raises:
        UserError: if the content of the dataset has changed.
    """
    if not config.resume:
        return
    saved = read_json(config.run_dir / "config.json")
    if saved.get("fingerprint") != store.fingerprint:
        raise UserError(
            f"{config.run_dir} was trained on data that have changed since ({saved.get('dataset')}): resume "
            f"with the data as they were, or start a new run with --init-from {config.run_dir}."
        )


def create_run_dir(
    accelerator: Accelerator, config, script: str, store, global_batch: int, steps: int
) -> Path:
    """Create the run folder with its `config.json`, or bring that of a resumed run up to date.

    Comes last before training: a run that cannot start leaves no folder.

    Args:
        config: the script's configuration.
        script: the script's path; its name without `train_` starts the name of a new folder.
        store: the episode store that is trained on.
        global_batch: samples per optimizer step over all processes, printed.
        steps: optimizer steps of the whole run, printed.

    Returns:
        The run folder, the same on every process.
    """
    method = Path(script).stem.removeprefix("train_").replace("_", "-")
    default = Path("runs") / f"{method}-{datetime.now():%Y%m%d-%H%M%S}"
    run_dir = config.run.run_dir
    if run_dir is None and accelerator.is_main_process:
        run_dir = _new_folder(default)
    run_dir = Path(broadcast_object_list([str(run_dir)])[0])
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        settings = {"fingerprint": store.fingerprint, "dataset": store.source}
        settings |= {"processes": accelerator.num_processes, "device": _device(accelerator)}
        settings["mixed_precision"] = accelerator.mixed_precision
        write_run_config(run_dir, Path(script).name, config, settings)
        batch = config.optim.batch_size
        print(
            f"{run_dir}: {steps} steps of {global_batch} samples ({batch} per process x "
            f"{accelerator.num_processes} processes x {config.optim.grad_accumulation} accumulated), "
            f"{accelerator.device.type}, {accelerator.mixed_precision} mixed precision"
        )
    accelerator.wait_for_everyone()
    return run_dir


def _device(accelerator: Accelerator) -> str:
    """The processor that computes, by its name where it has one."""
    kind = accelerator.device.type
    return torch.cuda.get_device_name() if kind == "cuda" else kind


def _new_folder(path: Path) -> Path:
    """Make a folder of that name, numbered if there is one: jobs of an array start in the same second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 10_000):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise UserError(f"{path} and its numbered successors all exist: give --run-dir.")
