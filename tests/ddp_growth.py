"""Run by torchrun from test_launch.py: trains while an episode appears, and notes what each process sees.

Arguments: where to write, then the flags of train_naive_fm.py. The first process moves `OUT/late` into the
folder of `--grow-from` after the third step.
"""

import json
import os
import sys
from pathlib import Path

import train_naive_fm
from common.config import parse
from common.run import Run


def main(out: str, *flags: str) -> None:
    seen, batches = [], Run.micro_batches

    def noted(run):
        if run.step == 3 and run.is_main:
            (Path(out) / "late").rename(run.config.data.grow_from / "late")
        for batch in batches(run):
            seen.append((run.step, len(run.data.train), batch.index.tolist()))
            yield batch
        if run.step > 3 and run.step + 20 > run.total_steps and len(run.data.train) == seen[0][1]:
            run.total_steps += 1  # it has not been found yet

    Run.micro_batches = noted
    config = parse(train_naive_fm.Config, list(flags), "train_naive_fm.py")
    train_naive_fm.main(config)
    (Path(out) / f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
