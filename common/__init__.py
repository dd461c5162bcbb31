"""What all methods share. Scripts import it before PyTorch, whose threads read the environment only once."""

import os

# Threads that spin for long while they wait take cores from threads with work; those that sleep at once have
# to be woken for every operation. So they spin for some 30 microseconds (benchmarks/waiting.py).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # of GNU's OpenMP, which PyTorch for Linux comes with
