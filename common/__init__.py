"""What all methods share. Scripts import it before PyTorch, whose threads read the environment only once."""

import os

# Threads that spin while they wait take the cores from whoever has work: at a load of 4 on 2 cores, half the
# speed of training (benchmarks/waiting.py).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
