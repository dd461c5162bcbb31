"""One policy for sixteen instructions: does it follow them, and how good is it next to single-task policies?

    python benchmarks/tasks.py                                      # everything; a day on two cores
    python benchmarks/tasks.py --jobs 12                            # on a GPU with memory for all at once
    python benchmarks/tasks.py --seeds 0 --steps 20 --episodes 16   # quick check that it runs

`train_vfp_moe.py` with `configs/train_vfp_moe/demo_tasks.json` on the built-in task with instructions:

- index: a learned embedding of each instruction.
- text: a frozen text encoder; a small one with random weights, made here, unless --encoder names another.
- none: a policy without instructions, which is right once in sixteen times.
- single: trained and evaluated on one instruction, with as many demonstrations.

Each is evaluated on the same fresh episodes, given the right instruction and given another one. Finished runs
are not repeated and interrupted ones resume. The table is printed.
"""

import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import PositiveInt

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from methods import ROOT, call, count_parameters, refuse_other_settings

from common.checkpoint import find
from common.config import UserPath, cli, options
from common.data import default_cache_dir, demo_tasks
from common.data.demo_tasks import TASKS
from common.data.workers import cores

CONFIG = ROOT / "configs" / "train_vfp_moe" / "demo_tasks.json"
ONE = TASKS[1]
SAMPLE_STEPS = ("10", "1")


@options
class Config:
    """Train policies with and without instructions, and compare them."""

    variants: tuple[str, ...] = ("index", "text", "none", "single")
    """Policies to compare."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    steps: int | None = None
    """Training steps. Default: what the configuration says."""
    episodes: int = 320
    """Episodes of each evaluation."""
    encoder: str | None = None
    """Text encoder. Default: a small one with random weights."""
    runs: UserPath = ROOT / "runs" / "tasks"
    """Folder of the runs."""
    jobs: PositiveInt = 1
    """Runs at once."""


def main(config: Config) -> None:
    if "text" in config.variants and config.encoder is None:
        small_encoder(config.runs / "encoder")
    demo_tasks.ensure_recorded(default_cache_dir())
    wanted = [(variant, seed) for variant in config.variants for seed in config.seeds]
    threads = max(cores() // min(config.jobs, len(wanted)), 1)
    with ThreadPoolExecutor(config.jobs) as pool:
        found = dict(zip(wanted, pool.map(lambda each: run(config, *each, threads), wanted), strict=True))
    rows = [(variant, [found[variant, seed] for seed in config.seeds]) for variant in config.variants]
    print(table(rows, config))


def run(config: Config, variant: str, seed: int, threads: int) -> dict:
    """Train and evaluate one run, skipping what is finished; returns its results."""
    named = variant == "text" and config.encoder is not None
    folder = config.runs / f"{variant}{'-' + str(config.encoder).replace('/', '-') if named else ''}-{seed}"
    wanted = json.loads(CONFIG.read_text())["config"]
    steps = config.steps or wanted["optim"]["steps"]
    wanted["optim"]["steps"] = steps
    flags, acting = [], ["--execute-steps", "6"]  # of 32: hands end close to other targets and obstacles
    if variant == "text":
        flags = ["--task-encoder", config.encoder or config.runs / "encoder"]
    elif variant == "none":
        flags = ["--task-encoder", "none"]
    elif variant == "single":
        flags = ["--task", ONE]
        acting += ["--env", f"demo-tasks:{ONE}"]
    if (folder / "config.json").is_file():
        had = json.loads((folder / "config.json").read_text())["config"]
        refuse_other_settings(folder, had, {name: wanted[name] for name in wanted if name != "tasks"})
    if not (folder / "checkpoints" / f"step_{steps:07d}").is_dir():
        own = ["--config", CONFIG, "--run-dir", folder, "--seed", seed, "--steps", steps, "--resume", "auto"]
        call(["train_vfp_moe.py", *own, *flags], threads, folder)
    results = folder / "evaluation" / "results.json"
    found = json.loads(results.read_text()) if results.is_file() else {"checkpoint": None}
    last = find(folder)
    if found["checkpoint"] != last.name or found["closed_loop"]["10"]["episodes"] != config.episodes:
        own = [folder, "--sample-steps", *SAMPLE_STEPS, "--episodes", config.episodes, *acting]
        call(["evaluate.py", *own], threads, folder)
        found = json.loads(results.read_text())
    return {"closed_loop": found["closed_loop"], "parameters": count_parameters(last / "policy")}


def small_encoder(folder: Path) -> None:
    """Make a text encoder with random weights that knows the words of the instructions."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    if not (folder / "model.safetensors").is_file():
        words = sorted({word for task in TASKS for word in task.replace(",", " ,").split()})
        vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
        wrapped.save_pretrained(folder)
        torch.manual_seed(0)
        size = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
        settings = BertConfig(vocab_size=len(vocabulary), num_hidden_layers=2, initializer_range=0.2, **size)
        BertModel(settings).save_pretrained(folder)


def table(rows: list[tuple[str, list[dict]]], config: Config) -> str:
    """Markdown: a row for each variant, with means over seeds and each seed's figure, in percent."""

    def rates(runs: list[dict], what: str, name: str) -> str:
        values = [100 * run["closed_loop"][what][name] for run in runs if what in run["closed_loop"]]
        if not values:
            return ""
        return f"{statistics.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"

    lines = [
        f"Seeds {', '.join(map(str, config.seeds))}, {config.episodes} fresh episodes each, the same for "
        f"all; chance is {100 / len(TASKS):.1f}.",
        "",
        "| | success, 10 steps | 1 step | given another task | wrong target | collisions | parameters |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant, runs in rows:
        cells = [rates(runs, what, "success") for what in ("10", "1", "misled")]
        cells += [rates(runs, "10", name) for name in ("wrong_targets", "collisions")]
        lines.append(f"| {variant} | {' | '.join(cells)} | {runs[0]['parameters'] / 1e6:.2f} M |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli(main, Config)
