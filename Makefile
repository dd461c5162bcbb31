# make demo       set up, record demonstrations, train train_vfp.py on them, evaluate (about ten minutes on two cores)
# make setup      set up; with CUDA=1 for GPUs of other machines
# make test       set up, lint, test
# make sim        install simulators for `evaluate.py --env`, and try them
# make ray        install Ray for `launch_ray.py` and `collect_ray.py`, and try them on virtual machines
# make plugin     install LeRobot and our plug-ins in a separate environment, and try LeRobot's commands in it
# make lowest     try the lower bounds of requirements.txt
# make test-all   make test, and the slow tests: several processes, processes that hang, files mutated at random

RUN ?= runs/demo
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
# Any Python 3 that starts: a version manager's `python3` on the PATH may not.
PYTHON = $(shell for p in python3 /usr/bin/python3 python $(HOME)/.pyenv/versions/3*/bin/python; do \
	"$$p" -c 'f""' 2>/dev/null && echo "$$p" && break; done)

.PHONY: setup tools sim ray plan demo plugin lowest test test-all lint format

setup: .venv/.installed

# An installation that was interrupted leaves .unfinished, and is finished first.
.venv/.installed: requirements.txt tools/setup.py $(wildcard .venv/.unfinished)
	@$(or $(PYTHON),$(error no Python 3 starts here: install one)) tools/setup.py
	@touch $@

tools: .venv/.installed-tools

.venv/.installed-tools: .venv/.installed requirements-test.txt requirements-zarr.txt requirements-sim.txt requirements-robot.txt
	@$(or $(PYTHON),$(error no Python 3 starts here: install one)) tools/setup.py requirements-test.txt
	@touch $@

# Simulators to act in, see docs/simulators.md; draws a picture of each to see whether that works here.
sim: .venv/.installed-sim

.venv/.installed-sim: .venv/.installed requirements-sim.txt
	@$(or $(PYTHON),$(error no Python 3 starts here: install one)) tools/setup.py requirements-sim.txt
	.venv/bin/python -m common.envs
	@touch $@

# Groups of processes, and collectors, that Ray places and restarts, see docs/clusters.md.
ray: tools .venv/.installed-ray
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/test_ray.py tests/test_collect_ray.py

.venv/.installed-ray: .venv/.installed requirements-ray.txt
	@$(or $(PYTHON),$(error no Python 3 starts here: install one)) tools/setup.py requirements-ray.txt
	@touch $@

plan:
	@echo "make demo takes about ten minutes on two CPU cores. It"
	@echo "  1. installs Python packages into .venv, once: some minutes, 2 GB for CPUs only or 6 GB with CUDA libraries"
	@echo "  2. records 200 demonstrations of the built-in task, once: 0.5 GB below $${XDG_CACHE_HOME:-~/.cache}/flow-policies"
	@echo "  3. trains train_vfp.py on them for 1,400 steps: 0.1 GB in $(RUN)"
	@echo "  4. evaluates it in 200 fresh episodes: errors, pictures, films and results.json in $(RUN)/evaluation"
	@echo "Stop it at any time with Ctrl-C: make demo resumes."

# An interrupted demo resumes, a finished one is only evaluated again; make demo RUN=runs/other
# starts another. The launcher would leave cores idle if it were not told how many there are.
demo: plan setup
	OMP_NUM_THREADS=$(CORES) .venv/bin/accelerate launch --num_processes 1 --num_machines 1 \
		--mixed_precision no --dynamo_backend no \
		train_vfp.py --config configs/train_vfp/demo.json --run-dir $(RUN) --resume auto
	.venv/bin/python evaluate.py $(RUN)

# One process per core, with one thread each, since threads that share a core wait for each other.
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(CORES)

test: tools lint
	$(PYTEST) -m "not slow"

# Each of these starts processes itself, so they run one at a time. What fails on a busy machine is tried once more.
SLOW = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m slow

test-all: test
	$(SLOW) || $(SLOW) --last-failed

# What `pip install ./lerobot_policy_flow` gives a user, see docs/lerobot.md: nothing of this checkout is on its path.
plugin: tools
	.venv/bin/python tools/plugin.py
	PLUGIN_PYTHON=$(CURDIR)/.venv-plugin/bin/python OMP_NUM_THREADS=$(CORES) \
		.venv/bin/python -m pytest -m slow tests/test_installed.py

# The oldest versions that requirements.txt allows, in a separate environment, and the tests that depend on them.
LOWEST = tests/test_config.py tests/test_inference.py tests/test_optim.py tests/test_vision.py

lowest: tools
	.venv/bin/python tools/plugin.py lowest
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -m "not slow" $(LOWEST)

lint: tools
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: tools
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
