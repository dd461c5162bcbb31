"""Compare runs in one HTML file: what differs, curves, success, errors, latency, pictures, films.

    python report.py runs/vfp-20260301-101500
    python report.py runs/vfp-* runs/naive-fm-* --out comparison.html

The file contains everything it shows: it opens without a server or a network. Runs may still be
training, may lack an evaluation, and may come from different scripts. If a file is damaged, the report leaves
out its part and says so.

A hundred lines of plain JavaScript in `common/report.html` draw the curves as SVG, which can be zoomed, read
and switched off. The script of Plotly or Vega would add 1 to 5 MB to every report, and a file to keep up to
date here; matplotlib's SVG cannot be zoomed. `curves.png` is left out because it shows the same.
"""

import base64
import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain, combinations
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from jinja2 import Environment, FileSystemLoader
from PIL import Image, UnidentifiedImageError

from common.compare import Difference, compare
from common.config import UserPath, cli, options, shown
from common.errors import UserError
from common.files import completed_checkpoints, read_json, write_whole
from common.plots import read_lines

LARGEST_FILE = 32e6  # bytes: a larger picture or film is named, not embedded
MOST_POINTS = 1000  # of a curve, with six digits: with all points, reports of many runs open slowly
MOST_RESUMES = 10  # to list
MOST_NESTED = 50  # levels of JSON
# What decides which episodes an evaluation acts in, and when one counts as a success.
EPISODES = ("env", "seed", "max_steps", "env_map", "success_reward")
ABOUT_EVALUATION = (*EPISODES, "execute_steps", "task", "device")
MEDIA = {".png": "image/png", ".gif": "image/gif", ".mp4": "video/mp4"}
LOGARITHMIC = ("loss", "grad_norm", "error", "action_mae")
WORDS = {
    "closed_loop": "Success in closed loop",
    "heldout": "Held-out error of normalized actions",
    "latency_ms": "Milliseconds from observation to chunk",
    "grey": "grey pictures",
    "mismatched": "pictures of another episode",
    "misled": "told another task",
    "mean": "mean action",
    "hold": "last state held",
    "linear": "linear predictor",
    "nearest": "nearest training state",
}


@options
class Config:
    """Write one HTML file that compares runs; it opens without a server or a network."""

    runs: Annotated[tuple[UserPath, ...], tyro.conf.Positional] = ()
    """Run folders of any script, finished or still training."""
    out: UserPath = Path("report.html")
    """File to write; an earlier one is replaced."""


class Cell(NamedTuple):
    """What a table says about a run."""

    text: str
    value: float | None = None
    """The number behind the text, as it is in the file."""
    more: str = ""
    interval: tuple[float, float] | None = None
    """Ends of the 95 % interval of a share, in [0, 1]."""


class Table(NamedTuple):
    """Rows by name, with a cell for each run."""

    title: str
    rows: dict[str, list[Cell | None]]
    open: bool = True


@dataclass
class Run:
    """The content of a run folder; what cannot be read is empty, with a sentence in `trouble`."""

    folder: Path
    name: str
    trouble: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.about = read_object(self, "config.json")
        self.results = read_object(self, "evaluation/results.json")
        self.information = read_object(self, "mutual_information.json")
        self.train, self.val = read_metrics(self)
        self.options = {path[-1]: value for path, value in leaves(self.about) if path[:-1][:1] == ("config",)}


def main(config: Config) -> None:
    runs = read_runs(config.runs)
    all_options, all_numbers = [option_cells(run) for run in runs], [number_cells(run) for run in runs]
    rows = table("", all_options).rows.items()
    differing = {name: cells for name, cells in rows if len({cell.text for cell in cells if cell}) > 1}
    differences, not_compared = paired(runs)
    content = {
        "runs": runs,
        "made": f"{datetime.now():%Y-%m-%d %H:%M}",
        "overview": table("Runs", [overview(run) for run in runs]),
        "differing": Table("What differs", differing),
        "curves": curves(runs),
        "same_data": len({shown(held_out(run)) for run in runs}) == 1,
        "rates": result_tables(runs, "success", rate_cell),
        "differences": differences,
        "not_compared": not_compared,
        "errors": result_tables(runs, "mae", lambda found: number(found["mae"])) + per_dimension(runs),
        "latency": result_tables(runs, "median", latency_cell),
        "information": table("Mutual information", [information(run) for run in runs]),
        "scores": [episode_scores(run) for run in runs],
        "media": media(runs),
        "details": [
            table("Options", all_options, False),
            table("Numbers of the evaluation", all_numbers, False),
        ],
    }
    templates = FileSystemLoader(Path(__file__).parent / "common")
    environment = Environment(loader=templates, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html").render(content)
    try:
        write_whole(config.out, page.encode(errors="replace"))
    except OSError as error:
        raise UserError(f"{config.out} cannot be written ({why(error)}): choose another --out.") from None
    for run in runs:
        print(*(f"warning: {run.name}: {sentence}\n" for sentence in run.trouble), sep="", end="")
    print(f"report: {config.out} ({len(page) / 1e6:.1f} MB)")


# Reading


def read_runs(folders: tuple[Path, ...]) -> list[Run]:
    """All runs, each once; if folders have the same name, the run's name includes the folders above."""
    folders = tuple({folder.resolve(): folder.absolute() for folder in folders}.values())
    if not folders:
        raise UserError("There is nothing to report: give run folders, for instance report.py runs/*.")
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give run folders.")
        if not (folder / "config.json").is_file() and not (folder / "metrics.jsonl").is_file():
            raise UserError(f"{folder} holds neither config.json nor metrics.jsonl: give run folders.")
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return [Run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_object(run: Run, name: str) -> dict[str, Any]:
    """The object in one of a run's JSON files; empty if there is none."""
    if not (run.folder / name).exists():
        return {}
    try:
        level = [found := read_json(run.folder / name)]
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
        for _ in range(MOST_NESTED):
            parts = chain.from_iterable(x.values() if isinstance(x, dict) else x for x in level)
            level = [x for x in parts if isinstance(x, dict | list)]
        if level:
            raise ValueError("nested too deeply")
    except (OSError, ValueError) as error:
        run.trouble.append(f"{name} cannot be read ({why(error)}).")
        return {}
    return found


def read_metrics(run: Run) -> tuple[list[dict], list[dict]]:
    """The lines of metrics.jsonl: of training, and of held-out episodes and rollouts."""
    path = run.folder / "metrics.jsonl"
    if not path.exists():
        return [], []
    try:
        content, lines = path.read_bytes(), [line for line in read_lines(path) if is_number(line["step"])]
    except (OSError, ValueError, RecursionError) as error:
        run.trouble.append(f"metrics.jsonl cannot be read ({why(error)}).")
        return [], []
    total = len(content.splitlines())
    if total - len(lines) > (not content.endswith(b"\n")):  # the last line of a run may be half written
        run.trouble.append(
            f"{total - len(lines)} of {total} lines of metrics.jsonl are damaged and left out."
        )
    return tuple([line for line in lines if line["split"] == split] for split in ("train", "val"))


def why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__).rstrip(".")


def is_number(value: Any) -> bool:
    """Whether it is a finite number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def leaves(values: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All values in nested objects that are not objects themselves, with their paths."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def holding(values: dict, key: str, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    """All nested objects that have a number named `key`, with their paths."""
    for name, value in values.items():
        if isinstance(value, dict):
            if is_number(value.get(key)):
                yield (*path, name), value
            yield from holding(value, key, (*path, name))


# What a run is


def table(title: str, columns: list[dict[str, Cell]], open: bool = True) -> Table:
    names = dict.fromkeys(chain.from_iterable(sorted(columns, key=len, reverse=True)))
    return Table(title, {name: [column.get(name) for column in columns] for name in names}, open)


def number(value: Any, more: str = "") -> Cell:
    """A cell with a number, rounded to four digits, or with the text of anything else."""
    if not is_number(value):
        return Cell(shown(value), more=more)
    return Cell(f"{value:,}" if isinstance(value, int) else f"{value:.4g}", value, more)


def option_cells(run: Run) -> dict[str, Cell]:
    """Options, then data, code, machine and versions."""
    names = {name: value for name, value in run.options.items() if name not in ("run_dir", "resume")}
    rest = {key: value for key, value in run.about.items() if key not in ("config", "resumes")}
    return {" ".join(path): Cell(shown(value)) for path, value in [*leaves(names), *leaves(rest)]}


def number_cells(run: Run) -> dict[str, Cell]:
    found = leaves(run.results)
    return {" / ".join(path): number(value) for path, value in found if path[-1] != "outcomes"}


def overview(run: Run) -> dict[str, Cell]:
    """What a run is, how far it has come, its newest metrics, faults, resumes, checkpoints."""
    about, last, results = run.about, run.train[-1] if run.train else {}, run.results
    evaluated = ", ".join(
        f"{key} {shown(results[key])}" for key in ABOUT_EVALUATION if results.get(key) is not None
    )
    patch = "with changes, see changes.patch" if (run.folder / "changes.patch").is_file() else ""
    cells = {
        "script": Cell(shown(about.get("script", ""))),
        "state": Cell(state(run, last)),
        "step": number(last.get("step", 0), f"of {shown(run.options.get('steps'))}"),
        "hours trained": number(last["elapsed_s"] / 3600 if is_number(last.get("elapsed_s")) else ""),
        "newest loss": number(last.get("loss", "")),
    }
    for line in run.val:  # the newest of each metric wins
        known = {
            f"newest {'' if name.startswith('rollout/') else 'held-out '}{name}": value
            for name, value in line.items()
            if name not in ("step", "split")
        }
        cells |= {
            name: number(value, f"step {line['step']}") for name, value in known.items() if is_number(value)
        }
    skipped = sum(line["bad_steps"] for line in run.train if is_number(line.get("bad_steps")))
    samples = read_object(run, "bad_steps.json").get("samples")
    steps = (path.name.removeprefix("step_").lstrip("0") for path in completed_checkpoints(run.folder))
    return cells | {
        "evaluated": Cell(shown(results.get("checkpoint", "no")), more=evaluated),
        "data": Cell(shown(about.get("dataset", ""))),
        "code": Cell(shown(about.get("git_commit", ""))[:10], more=patch),
        "seed": Cell(shown(run.options.get("seed", ""))),
        "steps skipped": number(skipped, bad_samples(samples)),
        "resumed": resumed(run),
        "checkpoints": Cell(", ".join(steps) or "none"),
    }


def held_out(run: Run) -> list[Any]:
    """The values that decide which episodes a run holds out."""
    return [run.about.get("fingerprint"), run.options.get("val_fraction"), run.options.get("seed")]


def state(run: Run, last: dict[str, Any]) -> str:
    if not last:
        return "nothing logged yet"
    left, steps = last.get("eta_s"), run.options.get("steps")
    time = datetime.fromtimestamp((run.folder / "metrics.jsonl").stat().st_mtime)
    if left == 0 and not (is_number(steps) and steps > last["step"]):
        return f"finished at {time:%Y-%m-%d %H:%M}"
    words = f", {left / 60:.0f} minutes left" if is_number(left) else ""
    return f"not finished{words} at {time:%Y-%m-%d %H:%M}"


def resumed(run: Run) -> Cell:
    """How often a run was resumed, and the newest resumes, with the step each had reached before."""
    listed = run.about.get("resumes")
    found = [x for x in listed if isinstance(x, dict)] if isinstance(listed, list) else []
    if not found:
        return Cell("yes" if run.options.get("resume") else "no")
    told = [
        f"{shown(x.get('time'))} from step {shown(x.get('step'))}, having reached {shown(x.get('reached'))}"
        for x in found[-MOST_RESUMES:]
    ]
    return Cell(f"{len(found)} time{'s' * (len(found) > 1)}", len(found), "; ".join(told))


def bad_samples(listed: Any) -> str:
    """What bad_steps.json lists, in words."""
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], dict):
        return ""
    place = ", ".join(f"{key} {shown(listed[0].get(key))}" for key in ("episode", "frame"))
    return f"{len(listed)} samples in bad_steps.json, the first: {place}"


# Curves


def curves(runs: list[Run]) -> dict[str, Any]:
    """Every metric of every run, for the page's script; losses and held-out metrics first."""
    panels: dict[str, list[dict]] = {}
    every = 1
    for i, run in enumerate(runs):
        for split, lines in (("train", run.train), ("val", run.val)):
            for name in sorted({name for line in lines for name in line} - {"step", "split"}):
                known = [
                    (line["step"], float(f"{line[name]:.6g}")) for line in lines if is_number(line.get(name))
                ]
                if known:
                    stride = -(-len(known) // MOST_POINTS)
                    every = max(every, stride)
                    x, y = zip(*known[::-stride][::-1], strict=True)  # keeps the newest
                    panels.setdefault(name, []).append({"run": i, "split": split, "x": x, "y": y})
    first = {
        name for name, found in panels.items() if name == "loss" or any(s["split"] == "val" for s in found)
    }
    order = sorted(panels, key=lambda name: (name != "loss", name not in first, name))
    drawn = [
        {"name": n, "series": panels[n], "first": n in first, "log": n.split("/")[0] in LOGARITHMIC}
        for n in order
    ]
    return {"panels": drawn, "runs": [run.name for run in runs], "every": every}


# Evaluation


def words(path: tuple[str, ...]) -> str:
    """The last part of a path in results.json, in words."""
    *above, name = path
    if above in (["closed_loop"], ["latency_ms"]) and name.isdigit():
        return f"{name} sampling step{'s' * (name != '1')}"
    return WORDS.get(name, name)


def result_tables(runs: list[Run], key: str, cell: Callable[[dict], Cell]) -> list[Table]:
    """A table for each group of objects in results.json that have a number named `key`."""
    groups: dict[tuple[str, ...], list[dict[str, Cell]]] = {}
    for i, run in enumerate(runs):
        for path, found in holding(run.results, key):
            groups.setdefault(path[:-1], [{} for _ in runs])[i][words(path)] = cell(found)
    title = {group: ", ".join(words(group[: n + 1]) for n in range(len(group))) for group in groups}
    return [table(title[group], columns, open=len(group) < 3) for group, columns in groups.items()]


def rate_cell(found: dict[str, Any]) -> Cell:
    """Success with its interval, and what else is known about these episodes."""
    more = [f"{shown(found['episodes'])} episodes"] if "episodes" in found else []
    for name, value in found.items():
        if name in ("success", "low", "high", "episodes", "outcomes"):
            continue
        if isinstance(value, dict) and not any(holding(value, "success")):
            parts = [(path, x) for path, x in leaves(value) if is_number(x)]
            more += [
                f"{name} " + ", ".join(f"{' '.join(path)} {share(x, len(path) == 1)}" for path, x in parts)
            ]
        elif is_number(value):
            more.append(f"{name} {share(value, name != 'steps')}")
    ends = found.get("low"), found.get("high")
    interval = ends if all(map(is_number, ends)) else None
    return Cell(f"{100 * found['success']:.1f} %", found["success"], "; ".join(more), interval)


def share(value: float, is_share: bool) -> str:
    return f"{100 * value:.1f} %" if is_share and 0 <= value <= 1 else f"{value:.4g}"


def latency_cell(found: dict[str, Any]) -> Cell:
    return number(found["median"], f"95 %: {found['p95']:.4g}" if is_number(found.get("p95")) else "")


def per_dimension(runs: list[Run]) -> list[Table]:
    """Held-out error of the policies by action dimension, in recorded units, with the predictors' errors."""
    columns: list[dict[str, Cell]] = [{} for _ in runs]
    for column, run in zip(columns, runs, strict=True):
        others: dict[str, list[str]] = {}
        for path, error in leaves(run.results):
            if len(path) == 4 and (path[0], path[2]) == ("heldout", "per_dimension") and is_number(error):
                if path[1] == "policy":
                    column[path[3]] = number(error)
                else:
                    others.setdefault(path[3], []).append(f"{path[1]} {error:.4g}")
        column |= {name: cell._replace(more=", ".join(others.get(name, []))) for name, cell in column.items()}
    return [table("Held-out error by action dimension, recorded units", columns)] if any(columns) else []


def paired(runs: list[Run]) -> tuple[list[tuple[str, int, int, Difference]], list[str]]:
    """Differences of all pairs of runs, for each number of sampling steps that both were evaluated with.

    Returns:
        Setting, indices of both runs and their difference; sentences about pairs that cannot be compared.
    """
    found, pairs, not_compared = [], [], []
    outcomes = [own_outcomes(run) for run in runs]
    for (i, one), (j, other) in combinations(enumerate(runs), 2):
        same = all(one.results.get(key) == other.results.get(key) for key in EPISODES)
        both = [steps for steps in outcomes[i] if steps in outcomes[j] and same]
        for steps in both:
            a, b = zip(*zip(outcomes[i][steps], outcomes[j][steps], strict=False), strict=True)
            found.append((words(("closed_loop", steps)), i, j))  # both number episodes from 0
            pairs.append(("".join(a), "".join(b)))
        if outcomes[i] and outcomes[j] and not both:
            what = "number of sampling steps" if same else "environment, seed and --max-steps"
            not_compared.append(f"{one.name} and {other.name} were not evaluated with the same {what}.")
    return [(*what, difference) for what, difference in zip(found, compare(pairs), strict=True)], not_compared


def own_outcomes(run: Run) -> dict[str, str]:
    """Outcomes in closed loop by number of sampling steps."""
    found = ((path, rates.get("outcomes")) for path, rates in holding(run.results, "success"))
    own = {path[1]: text for path, text in found if len(path) == 2 and path[0] == "closed_loop"}
    return {
        name: text
        for name, text in own.items()
        if name.isdigit() and isinstance(text, str) and re.fullmatch("[01]+", text)
    }


# Mutual information, pictures, films


def information(run: Run) -> dict[str, Cell]:
    cells = {name: number(value) for name, value in run.information.items() if name != "interval_95"}
    if "nats" in cells and "interval_95" in run.information:
        cells["nats"] = cells["nats"]._replace(more=f"95 %: {shown(run.information['interval_95'])}")
    return cells


def episode_scores(run: Run) -> list[tuple[str, str, float]]:
    """Episode, steps and score in nats, best first, in a run of `train_mi.py`."""
    path = run.folder / "episode_scores.csv"
    if not path.exists():
        return []
    try:
        rows = csv.DictReader(io.StringIO(path.read_text()))
        return [(row["episode"], row["steps"], float(row["score_nats"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        run.trouble.append(f"episode_scores.csv cannot be read ({why(error)}).")
        return []


def media(runs: list[Run]) -> dict[str, list[tuple[int, str, str]]]:
    """Films and pictures by name: the number of the run, MIME type, data URL.

    Pictures of the data are where `python -m common.data.store inspect` writes them, in the working folder.
    """
    found: dict[str, list[tuple[int, str, str]]] = {}
    for i, run in enumerate(runs):
        evaluation = run.folder / "evaluation"
        films = sorted(evaluation.glob("*.mp4"))
        films += [path for path in sorted(evaluation.glob("*.gif")) if path.with_suffix(".mp4") not in films]
        films += sorted(run.folder.glob("*.gif"))  # of rollouts while training
        pictures = [path for path in sorted(run.folder.glob("*.png")) if path.name != "curves.png"]
        for path in [*films, *sorted(evaluation.glob("*.png")), *pictures]:
            if url := data_url(run, path):
                found.setdefault(str(path.relative_to(run.folder)), []).append((i, MEDIA[path.suffix], url))
        data = Path("inspection") / Path(shown(run.about.get("dataset", ""))).name
        for path in sorted(data.glob("*.png")) if data.name != "inspection" else ():
            if str(path) not in found and (url := data_url(run, path)):
                found[str(path)] = [(i, MEDIA[path.suffix], url)]
    return found


def data_url(run: Run, path: Path) -> str:
    """A picture or film to embed; empty, with a sentence in `run.trouble`, if it is damaged or too large."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"{path.stat().st_size / 1e6:.0f} MB is too large to embed")
        content = path.read_bytes()
        if path.suffix != ".mp4":
            Image.open(io.BytesIO(content)).verify()
        elif content[4:8] != b"ftyp":
            raise ValueError("it is not a film")
    # Pillow raises a SyntaxError for a damaged PNG, and takes a damaged size for a bomb.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "it is not a picture" if isinstance(error, UnidentifiedImageError) else why(error)
        run.trouble.append(f"{path} is left out ({reason}).")
        return ""
    return f"data:{MEDIA[path.suffix]};base64,{base64.b64encode(content).decode()}"


if __name__ == "__main__":
    cli(main, Config)
