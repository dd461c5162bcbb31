"""What all methods share. Scripts import it before PyTorch, whose threads read the environment only once."""

import os

# Threads that spin while they wait take cores from threads with work: at a load of 4 on 2 cores, training
# ran at half the speed (benchmarks/waiting.py).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
