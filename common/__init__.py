"""What all methods share. Scripts import it before PyTorch, whose threads read the environment only once."""

import os
import sys

# Threads that spin for long while they wait take cores from threads with work; those that sleep at once have
# to be woken for every operation. So they spin for some 30 microseconds (benchmarks/waiting.py).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # of GNU's OpenMP, which PyTorch for Linux comes with

# Progress bars that go to a file, as on a cluster, are written every ten seconds, not ten times a second.
if sys.stderr is None or not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")
