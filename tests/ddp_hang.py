"""Run by torchrun from test_faults.py: a training run whose process 1 stops, sleeps or dies in step 5.

Arguments: stopped, asleep or killed; the flags of train_vfp.py.
"""

import os
import signal
import sys
import time

import train_vfp
from common.config import cli
from common.watch import StopRequests

how, steps = sys.argv.pop(1), [0]


def agreed(requests, original=StopRequests.agreed):
    steps[0] += 1
    if steps[0] == 5 and os.environ["RANK"] == "1":
        if how == "asleep":
            time.sleep(1000)
        os.kill(os.getpid(), signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
    return original(requests)


StopRequests.agreed = agreed

if __name__ == "__main__":
    cli(train_vfp.main, train_vfp.Config)
