"""Run by torchrun from test_faults.py: a training run whose process 1 does not keep up.

Arguments: how, and flags for train_vfp.py. In step 5 it is `stopped`, `asleep` or `killed`; before the
first step it hangs while `starting`, or takes long to read its data (`reading`), which is allowed.
"""

import os
import signal
import sys
import time

import train_vfp
from common import optim
from common import run as run_module
from common.config import cli
from common.watch import StopRequests

how, steps = sys.argv.pop(1), [0]
is_one = os.environ["RANK"] == "1"


def agreed(requests, ready=0, original=StopRequests.agreed):
    steps[0] += 1
    if steps[0] == 5 and is_one and how in ("stopped", "asleep", "killed"):
        if how == "asleep":
            time.sleep(1000)
        os.kill(os.getpid(), signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
    return original(requests, ready)


def build_optimizer(*args, original=optim.build_optimizer):
    if is_one and how == "starting":
        time.sleep(1000)
    return original(*args)


def open_dataset(config, original=run_module.open_dataset):
    if is_one and how == "reading":
        time.sleep(30)
    return original(config)


StopRequests.agreed = agreed
optim.build_optimizer, run_module.open_dataset = build_optimizer, open_dataset

if __name__ == "__main__":
    cli(train_vfp.main, train_vfp.Config)
