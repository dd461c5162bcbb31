"""Sets up Accelerate as every script needs it, and refuses environment variables that contradict the flags.

Accelerate and `accelerate launch` pass settings in environment variables, some of which override what a
script asks for. But what a run prints, saves and resumes must be what it does.
"""

import logging
import os
import warnings
from typing import get_args

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from common.config import Precision, RunConfig
from common.console import say
from common.errors import UserError
from common.files import read_json
from common.watch import patience

SHARDING = ("USE_DEEPSPEED", "USE_FSDP", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG")


def make_accelerator(config: RunConfig, grad_accumulation: int = 1) -> Accelerator:
    """Accelerate for a run; without a GPU it uses the CPU, with several processes too.

    Raises:
        UserError: if an environment variable contradicts the flags, or the device lacks the precision.
    """
    _refuse_contradictions(grad_accumulation)
    # Users of these scripts cannot act on the launcher's hints about defaults.
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
    # On CUDA, all processes compute the same buffers: batch norm is synchronized, and methods sum their
    # counts over processes. On a CPU there is no synchronized batch norm: process 0 sends its buffers.
    cuda = torch.cuda.is_available()
    ddp = DistributedDataParallelKwargs(broadcast_buffers=not cuda, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        kwargs_handlers=[InitProcessGroupKwargs(timeout=patience(config.hang_timeout)), ddp],
        mixed_precision=_precision(config),
        gradient_accumulation_steps=grad_accumulation,
        cpu=not torch.accelerator.is_available(),
        step_scheduler_with_optimizer=False,  # scripts step the scheduler themselves
    )
    precision, device = accelerator.mixed_precision, accelerator.device.type
    if precision != "no" and not accelerator.native_amp:  # Accelerate would silently train in float32
        raise UserError(f"There is no {precision} training on {device}: use --mixed-precision bf16 or no.")
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True  # image sizes do not change during a run
    elif torch.version.cuda is None and os.path.exists("/dev/nvidiactl"):  # set up on another machine
        say(
            "warning: this machine has an NVIDIA GPU, but PyTorch's CPU build is installed: to use the GPU, "
            "run `rm -r .venv; make setup` here"
        )
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # otherwise sums depend on the streams
        torch.backends.cudnn.benchmark = False  # it may choose another algorithm in the next run
        torch.use_deterministic_algorithms(True)
    return accelerator


def _refuse_contradictions(grad_accumulation: int) -> None:
    """Refuse variables that would make Accelerate do something other than the flags say."""
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(grad_accumulation))
    if steps != str(grad_accumulation):
        raise UserError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {steps} and --grad-accumulation is "
            f"{grad_accumulation}: unset the variable, and set the batches per step with the flag."
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise UserError(
            f"ACCELERATE_DYNAMO_BACKEND is {backend}, which compiles the policy whatever --compile says: "
            f"unset it, or launch with --dynamo_backend no, and use --compile."
        )
    for name in SHARDING:
        value = os.environ.get(f"ACCELERATE_{name}", "false")
        if value.lower() not in ("false", "0", "no", "off", ""):
            raise UserError(
                f"ACCELERATE_{name} is {value}, and these scripts only train and save whole policies: "
                f"unset it, or launch without --{name.lower()}."
            )


def _precision(config: RunConfig) -> str:
    """`--mixed-precision`, else the launcher's setting, else that of the resumed run.

    The launcher sets `no` if it was given none.
    """
    if config.mixed_precision is not None:
        return config.mixed_precision
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told not in get_args(Precision):
        raise UserError(
            f"ACCELERATE_MIXED_PRECISION is {told}, which these scripts do not support: give "
            f"--mixed-precision {', '.join(get_args(Precision)[:-1])} or {get_args(Precision)[-1]}."
        )
    if told == "no" and config.resume is not None:
        return read_json(config.run_dir / "config.json").get("mixed_precision", "no")
    return told
