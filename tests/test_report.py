"""The report: its numbers are those of the files, whatever they contain; and it works in a browser."""

import base64
import io
import json
import os
import re
from html.parser import HTMLParser

import browser
import numpy as np
import pytest
import running
from PIL import Image

import report
import train_naive_fm
from common.config import cli, parse
from common.film import write_mp4


class Reader(HTMLParser):
    """Numbers and texts of the tables by title, row and column; the curves; addresses of media."""

    def __init__(self, page):
        super().__init__()
        self.values, self.texts, self.urls, self.title = {}, {}, [], None
        self.row, self.column = "", -1
        self.feed(page)
        curves = re.search(r'id="curve-data">(.*?)</script>', page, re.DOTALL).group(1)
        self.curves = json.loads(curves)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.urls += [value for key, value in attributes.items() if key in ("src", "href")]
        if tag == "table":
            self.title = attributes["data-title"]
        if tag == "tr":
            self.row, self.column = "", -1
        if tag in ("th", "td"):
            self.column += 1
        if tag == "data" and self.title:
            place = (self.title, self.row.strip(), self.column)
            self.values.setdefault(place, []).append(float(attributes["value"]))

    def handle_endtag(self, tag):
        self.title = None if tag == "table" else self.title

    def handle_data(self, text):
        if self.title and self.column == 0:
            self.row += text
        elif self.title and text.strip():
            self.texts.setdefault((self.title, self.row.strip(), self.column), []).append(text.strip())


def rates(outcomes, **more):
    found = {"success": outcomes.count("1") / len(outcomes), "low": 0.125, "high": 0.875}
    return found | {"episodes": len(outcomes), "outcomes": outcomes, "steps": 41.5} | more


def make_run(folder, outcomes="1100", steps=40, logged=40, seed=7, **options):
    """Write the files of an evaluated run."""
    (folder / "evaluation").mkdir(parents=True)
    config = {"script": "train_vfp.py", "config": {"optim": {"steps": steps, "lr": 1e-3}, **options}}
    config |= {"dataset": "me/towel", "git_commit": "0123456789abcdef", "versions": {"torch": "2.11.0"}}
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for step in range(1, logged + 1):
        line = {"step": step, "split": "train", "loss": 1 / step, "bad_steps": int(step == 3)}
        lines.append(line | {"lr/policy": 0.001, "elapsed_s": 90.0 * step, "eta_s": 60.0 * (steps - step)})
        if step % 10 == 0:
            lines.append(
                {
                    "step": step,
                    "split": "val",
                    "loss": 2 / step,
                    "action_mae": None if step == 10 else 0.1 * step,
                }
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = {"open": rates("10"), "close": rates("11")}
    closed_loop = {
        "10": rates(outcomes, collisions=0.25, modes={"left": 0.75}, tasks=tasks),
        "1": rates("0000"),
    }
    results = {"checkpoint": "step_0000040", "seed": seed, "env": "demo", "closed_loop": closed_loop}
    results["closed_loop"]["grey"] = rates("0001")
    change = {"seam": {"mean": 0.5, "p99": 1.5}}
    results["delay"] = {"2": {"prefix": rates("0111", velocity_change=change)}}
    heldout = {"policy": {"mae": 0.21, "per_dimension": {"x": 0.012345678, "y": 4.0}}}
    heldout["mean"] = {"mae": 0.87, "per_dimension": {"x": 0.5, "y": 9.0}}
    results["heldout"] = heldout | {"steps": 9, "tasks": {"open": {"mae": 0.123456789, "steps": 5}}}
    results["latency_ms"] = {"10": {"median": 12.3456789, "p95": 20.5}}
    (folder / "evaluation" / "results.json").write_text(json.dumps(results))
    Image.new("RGB", (60, 40), "teal").save(folder / "evaluation" / "heldout.png")
    Image.new("RGB", (60, 40)).save(folder / "curves.png")
    write_mp4(folder / "evaluation" / "rollouts.mp4", np.zeros((3, 32, 32, 3), np.uint8), 10)
    (folder / "evaluation" / "rollouts.gif").write_bytes(b"GIF89a, and not needed beside the film")
    return folder


def write(tmp_path, *runs):
    out = tmp_path / "out.html"
    report.main(parse(report.Config, [*map(str, runs), "--out", str(out)], "report.py"))
    return out.read_text()


def test_every_number_is_that_of_the_files(tmp_path):
    a = make_run(tmp_path / "a", "1" * 10 + "0", val_fraction=0.1)
    b = make_run(tmp_path / "b", "0" * 10 + "0", val_fraction=0.2)
    page = Reader(write(tmp_path, a, b))
    values, texts = page.values, page.texts

    loop = "Success in closed loop"
    assert values[loop, "10 sampling steps", 1] == [10 / 11, 0.125, 0.875]
    assert values[loop, "10 sampling steps", 2] == [0, 0.125, 0.875]
    assert values[loop, "1 sampling step", 1] == [0, 0.125, 0.875]
    assert values[loop, "grey pictures", 2] == [0.25, 0.125, 0.875]
    assert texts[loop, "10 sampling steps", 1][0] == "90.9 %"
    assert (
        texts[loop, "10 sampling steps", 1][-1]
        == "11 episodes; steps 41.5; collisions 25.0 %; modes left 75.0 %"
    )
    assert values[f"{loop}, 10 sampling steps, tasks", "open", 1] == [0.5, 0.125, 0.875]
    assert values["delay, 2", "prefix", 1] == [0.75, 0.125, 0.875]
    assert "velocity_change seam mean 0.5, seam p99 1.5" in texts["delay, 2", "prefix", 1][-1]

    error = "Held-out error of normalized actions"
    assert values[error, "policy", 1] == [0.21]
    assert values[error, "mean action", 2] == [0.87]
    assert values[f"{error}, tasks", "open", 1] == [0.123456789]
    dimension = "Held-out error by action dimension, recorded units"
    assert values[dimension, "x", 1] == [0.012345678]
    assert texts[dimension, "x", 1] == ["0.01235", "mean 0.5"]
    assert values["Milliseconds from observation to chunk", "10 sampling steps", 1] == [12.3456789]

    # ten episodes that only the first run solves: p = 2 * 0.5^10, doubled for two comparisons
    assert texts["differences", "10 sampling steps", 1] == ["a"]
    assert texts["differences", "10 sampling steps", 2] == ["b"]
    row = [values["differences", "10 sampling steps", column][0] for column in (3, 4, 5, 6, 7)]
    assert row == pytest.approx([1000 / 11, 11, 10, 0, 4 * 0.5**10])
    assert texts["differences", "10 sampling steps", 8] == ["distinguishable"]
    assert texts["differences", "1 sampling step", 8] == ["not distinguishable"]

    assert texts["What differs", "val_fraction", 1] == ["0.1"]
    assert texts["What differs", "val_fraction", 2] == ["0.2"]
    assert {row for title, row, _ in texts if title == "What differs"} == {"", "val_fraction"}
    assert texts["Options", "versions torch", 1] == ["2.11.0"]
    assert values["Numbers of the evaluation", "closed_loop / 10 / tasks / open / low", 1] == [0.125]
    assert values["Runs", "steps skipped", 1] == [1]
    assert values["Runs", "hours trained", 1] == [1.0]
    assert values["Runs", "newest held-out action_mae", 1] == [4.0]
    assert texts["Runs", "state", 1][0].startswith("finished")

    panels = {panel["name"]: panel for panel in page.curves["panels"]}
    assert list(panels)[:2] == ["loss", "action_mae"]
    assert page.curves["runs"] == ["a", "b"]
    train, held_out = panels["loss"]["series"][:2]
    assert train["x"] == list(range(1, 41))
    assert train["y"] == pytest.approx([1 / step for step in range(1, 41)], rel=1e-5)
    assert (held_out["run"], held_out["split"], held_out["x"]) == (0, "val", [10, 20, 30, 40])
    assert panels["action_mae"]["series"][1] == {
        "run": 1,
        "split": "val",
        "x": [20, 30, 40],
        "y": [2.0, 3.0, 4.0],
    }


def test_it_holds_all_that_it_shows(tmp_path):
    run = make_run(tmp_path / "a")
    page = Reader(write(tmp_path, run))
    assert {url[:5] for url in page.urls} <= {"data:", "#curv", "#succ", "#erro", "#late", "#pict", "#deta"}
    embedded = [base64.b64decode(url.partition("base64,")[2]) for url in page.urls if "base64," in url]
    assert embedded == [(run / "evaluation" / name).read_bytes() for name in ("rollouts.mp4", "heldout.png")]


def test_pairs_have_the_same_episodes(tmp_path):
    a, b = make_run(tmp_path / "a", "111111"), make_run(tmp_path / "b", "1000")
    c = make_run(tmp_path / "c", "1111", seed=8)
    page = write(tmp_path, a, b, c)
    values = Reader(page).values
    assert values["differences", "10 sampling steps", 4] == [4]  # episodes that both runs have
    assert values["differences", "10 sampling steps", 5] == [3]
    assert page.count("were not evaluated with the same environment, seed and --max-steps") == 2
    assert "p is corrected for 2\ncomparisons" in page
    file = b / "evaluation" / "results.json"  # with another step limit, episodes are not the same
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_steps": 500}))
    page = write(tmp_path, a, b, c)
    assert page.count("were not evaluated with the same environment, seed and --max-steps") == 3


def test_long_curves_are_thinned_and_keep_their_end(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_POINTS", 15)
    page = write(tmp_path, make_run(tmp_path / "a"))
    train = Reader(page).curves["panels"][0]["series"][0]
    assert train["x"] == list(range(1, 41, 3))
    assert train["y"][-1] == 1 / 40
    assert "one line in 3 is drawn" in page


def test_a_metric_on_every_other_line_is_not_thinned_away(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line | ({"codes": 1.0} if line["step"] % 2 else {}) for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(report, "MOST_POINTS", 20)
    panels = {panel["name"]: panel for panel in Reader(write(tmp_path, run)).curves["panels"]}
    assert panels["codes"]["series"][0]["x"] == list(range(1, 41, 2))


@pytest.mark.usefixtures("accelerate_reset")
def test_a_run_that_still_trains_is_reported(tiny, tmp_path):
    run = running.train(train_naive_fm, tiny, tmp_path / "run", "--steps", 3, "--eval-every", 2)
    (run / "bad_steps.json").write_text(json.dumps({"samples": [{"step": 3, "episode": 5, "frame": 17}]}))
    whole = (run / "metrics.jsonl").read_text()
    page = Reader(write(tmp_path, run))
    steps = [row["step"] for row in map(json.loads, whole.splitlines()) if row["split"] == "train"]
    assert page.curves["panels"][0]["series"][0]["x"] == steps == [1, 2, 3]
    assert page.texts["Runs", "state", 1][0].startswith("finished")
    assert page.texts["Runs", "checkpoints", 1] == ["3"]
    assert page.texts["Runs", "evaluated", 1] == ["no"]
    assert "episode 5, frame 17" in page.texts["Runs", "steps skipped", 1][-1]

    first, second = whole.splitlines()[:2]
    (run / "metrics.jsonl").write_text(first + "\n" + second[:20])  # its second line is being written
    text = write(tmp_path, run)
    assert "not finished, " in text
    assert "damaged" not in text
    (run / "metrics.jsonl").unlink()
    assert "nothing logged yet" in write(tmp_path, run)


def test_runs_of_train_mi_show_their_scores(tmp_path):
    run, other = tmp_path / "mi", make_run(tmp_path / "a")
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"script": "train_mi.py", "config": {"horizon": 2}}))
    found = {"nats": 2.8309138564107887, "interval_95": [2.8, 2.9], "estimator": "ksg", "neighbours": [5, 6]}
    (run / "mutual_information.json").write_text(json.dumps(found))
    scores = "".join(f"{episode},9,{3 - episode / 7:.6f}\n" for episode in range(30))
    (run / "episode_scores.csv").write_text("episode,steps,score_nats\n" + scores)
    Image.new("RGB", (60, 40)).save(run / "episode_scores.png")
    page = Reader(write(tmp_path, other, run))
    assert page.values["Mutual information", "nats", 2] == [2.8309138564107887]
    assert page.texts["Mutual information", "nats", 2] == ["2.831", "95 %: 2.8 2.9"]
    shown = {int(row): x for (title, row, _), [x, *_] in page.values.items() if title == "scores of mi"}
    assert shown == {n: round(3 - n / 7, 6) for n in (*range(10), *range(20, 30))}


def test_scores_that_are_the_same_belong_to_their_runs(tmp_path):
    runs = [make_run(tmp_path / name) for name in "ab"]
    for run in runs:
        (run / "episode_scores.csv").write_text("episode,steps,score_nats\n0,9,0.5\n")
        found = {"nats": 2.8, "interval_95": [2.7, 2.9], "estimator": "ksg", "neighbours": [5]}
        (run / "mutual_information.json").write_text(json.dumps(found))
    page = write(tmp_path, *runs)
    assert [page.count(f"{name}, episodes by score") for name in "ab"] == [1, 1]


def test_a_film_of_a_damaged_size_costs_its_part(tmp_path):
    run, film = make_run(tmp_path / "a"), io.BytesIO()
    Image.new("L", (60, 40)).save(film, "gif")
    content = bytearray(film.getvalue())
    content[6:10] = b"\xff\xff\xff\xff"  # 65,535 x 65,535
    (run / "rollouts.gif").write_bytes(content)
    assert "rollouts.gif is left out" in write(tmp_path, run)


def test_resumes_and_rollouts_of_a_run_are_reported(tmp_path):
    run = make_run(tmp_path / "a")
    about = json.loads((run / "config.json").read_text())
    about["resumes"] = [
        {"step": n, "reached": n + 5, "time": f"2026-11-26T{n:02}:00:00"} for n in range(1, 13)
    ]
    (run / "config.json").write_text(json.dumps(about))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "split": "val", "rollout/success": 0.65, "rollout/steps": 31.5}\n')
    Image.new("P", (6, 4)).save(run / "rollouts.gif")
    text = write(tmp_path, run)
    page = Reader(text)
    assert page.values["Runs", "resumed", 1] == [12]
    assert page.texts["Runs", "resumed", 1][0] == "12 times"
    told = page.texts["Runs", "resumed", 1][1]
    assert told.startswith("2026-11-26T03:00:00 from step 3, having reached 8; 2026-11-26T04")
    assert page.values["Runs", "newest rollout/success", 1] == [0.65]
    curve = next(panel for panel in page.curves["panels"] if panel["name"] == "rollout/success")
    assert (curve["series"][0]["x"], curve["series"][0]["y"], curve["first"]) == ([40], [0.65], True)
    assert "resumes" not in " ".join(row for title, row, _ in page.texts if title == "Options")
    film = base64.b64encode((run / "rollouts.gif").read_bytes()).decode()
    assert f"data:image/gif;base64,{film}" in text


@pytest.mark.parametrize(("resumes", "said"), [(None, "no"), ("x", "no"), ([1, {}], "1 time")])
def test_resumes_that_are_damaged_do_no_harm(resumes, said, tmp_path):
    run = make_run(tmp_path / "a")
    about = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(about | {"resumes": resumes}))
    assert Reader(write(tmp_path, run)).texts["Runs", "resumed", 1][0] == said


DAMAGE = {
    "config.json": b'{"script": ',
    "metrics.jsonl": b'{"step": "x", "split": "train"}\nnonsense\n{"step": 1, "split": "train"}\n',
    "evaluation/results.json": b'{"closed_loop": ' + b'{"a": ' * 200 + b"1" + b"}" * 201,
    "evaluation/heldout.png": b"\x89PNG\r\n\x1a\n, cut off",
    "evaluation/rollouts.mp4": b"nothing",
    "episode_scores.csv": b"episode,score\n1,2\n",
    "mutual_information.json": b"[]",
    "bad_steps.json": b"\xff\xfe",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_costs_its_part_and_one_sentence(name, tmp_path, capsys):
    run = make_run(tmp_path / "a")
    (run / name).write_bytes(DAMAGE[name])
    page = write(tmp_path, run)
    trouble = re.findall(r'<p class="trouble">(.*)</p>', page)
    sentence = next(line for line in trouble if name.split("/")[-1] in line)
    assert len(trouble) == 2 - (sentence == trouble[-1])  # the noscript line is one of them
    assert sentence.endswith(".")
    assert "warning: a: " in capsys.readouterr().out


WRONG = {
    "closed_loop": {
        "10": {"success": "all"},
        "1": {"success": 1.0, "low": None, "outcomes": 11},
        "2": [1],
        "": 3,
    },
    "heldout": {"policy": {"mae": True, "per_dimension": [1, 2]}, "mean": {"mae": float("nan")}},
    "latency_ms": {"10": {"median": 10**400}, "1": {"median": 3}},
    "env": "demo",
    "</script><script>alert(1)</script>": {"success": 0.5},
    "\ud800": "\ud800",
}


def test_values_of_the_wrong_type_do_no_harm(tmp_path):
    run = make_run(tmp_path / "<q>&")
    (run / "evaluation" / "results.json").write_text(json.dumps(WRONG))
    (run / "config.json").write_text(
        json.dumps({"config": [1], "dataset": None, "versions": "new", "git_commit": 5})
    )
    line = {"step": 1, "split": "train", "loss": "low", "</script>": 1.5, "eta_s": "soon", "bad_steps": None}
    (run / "metrics.jsonl").write_text(
        json.dumps(line) + "\n" + json.dumps({"step": 1, "split": ["val"]}) + "\n"
    )
    write(tmp_path, run, make_run(tmp_path / "a", seed=None))
    text = write(tmp_path, run)
    page = Reader(text)
    assert page.values["Success in closed loop", "1 sampling step", 1] == [1.0]
    assert page.curves["panels"] == [
        {
            "name": "</script>",
            "first": False,
            "log": False,
            "series": [{"run": 0, "split": "train", "x": [1], "y": [1.5]}],
        }
    ]
    assert "<script>alert" not in text
    assert "<q>&" not in text


def test_what_cannot_be_reported_is_said_in_a_sentence(tmp_path, capsys):
    run = make_run(tmp_path / "a")

    def refusal(*argv):
        with pytest.raises(SystemExit) as caught:
            cli(report.main, report.Config, [str(part) for part in argv])
        assert caught.value.code == 1
        return capsys.readouterr().err

    assert (
        refusal() == "error: There is nothing to report: give run folders, for instance report.py runs/*.\n"
    )
    assert "holds neither config.json nor metrics.jsonl" in refusal(tmp_path)
    assert "nowhere is not a folder" in refusal(tmp_path / "nowhere")
    assert "config.json is not a folder" in refusal(run / "config.json")
    assert "is not a folder" in refusal(run, run, tmp_path / "b")
    for out in (tmp_path / "no" / "r.html", run, run / "config.json" / "r.html"):
        assert f"{out} cannot be written (" in refusal(run, "--out", out)
    assert not list(tmp_path.rglob("*.part"))


def test_names_of_runs_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("x/run", "y/run", "y/other")]
    page = Reader(write(tmp_path, *runs, runs[0], os.path.relpath(runs[1])))
    assert page.curves["runs"] == ["x/run", "y/run", "y/other"]


# In a browser


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A report of two runs, one of them unfinished."""
    folder = tmp_path_factory.mktemp("report")
    runs = [make_run(folder / "first", "111100"), make_run(folder / "second", "101010", logged=30, lr=0.5)]
    report.main(report.Config(runs=tuple(runs), out=folder / "out.html"))
    return folder / "out.html"


@pytest.fixture(scope="module")
def page():
    if browser.CHROMIUM is None:
        pytest.skip("no Chromium here")
    page = browser.Page()
    yield page
    page.close()


CAPTION = "document.querySelector('[data-name=loss] figcaption').innerText"
LABELS = (
    "[...document.querySelectorAll('[data-name=loss] text[text-anchor=middle]')].map(x => +x.textContent)"
)
LINES = "document.querySelectorAll('[data-name=loss] path').length"


@pytest.mark.parametrize("width", [400, 1600])
def test_the_page_fits_a_phone_and_a_wide_screen_in_dark_and_light(page, two_runs, width):
    shades = {}
    for scheme in ("dark", "light"):
        page.open(two_runs, width, scheme)
        assert page.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        page.run("document.querySelectorAll('details').forEach(one => one.open = true)")
        page.run("new Promise(done => setTimeout(done, 100))")
        assert page.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert page.run("[...document.querySelectorAll('.chart')].every(one => one.querySelector('path'))")
        assert page.run("[...document.images].every(image => image.naturalWidth > 0)")
        colours = page.run(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        shades[scheme] = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]
    assert page.complaints == []  # neither errors nor requests
    assert shades["dark"][0] > shades["dark"][1] + 300
    assert shades["light"][1] > shades["light"][0] + 300


def test_curves_are_read_zoomed_and_switched_by_keyboard(page, two_runs):
    page.open(two_runs)
    assert "first: 0.025 at 40" in page.run(CAPTION)
    reached = set()
    for _ in range(60):
        page.press("Tab", code="Tab", windowsVirtualKeyCode=9)
        focused = page.run("document.activeElement.dataset.name ?? document.activeElement.dataset.run")
        reached.add(focused)
        if focused == "1":  # the second run's box
            assert page.run(LINES) == 4
            page.press(" ", code="Space", windowsVirtualKeyCode=32)
            assert page.run(LINES) == 2
            page.press(" ", code="Space", windowsVirtualKeyCode=32)
        if focused == "loss":
            break
    assert {"0", "1", "loss"} <= reached
    for _ in range(3):
        page.press("ArrowLeft")
    assert "first: 0.02703 at 37" in page.run(CAPTION)  # 1 / 37
    assert "second: 0.03333 at 30" in page.run(CAPTION)  # its last step
    whole = page.run(LABELS)
    page.press("+")
    assert min(page.run(LABELS)) > 20
    page.press("Home")
    assert "at 27" in page.run(CAPTION)  # the first visible step, a quarter of the range before the cursor
    page.press("0")
    assert page.run(LABELS) == whole
    assert page.complaints == []


def test_curves_are_zoomed_with_the_mouse(page, two_runs):
    page.open(two_runs)
    x, y, width = page.run(
        "(({x, y, width}) => [x, y, width])"
        "(document.querySelector('[data-name=loss] svg').getBoundingClientRect())"
    )
    page.run(f"scrollTo(0, {y - 200})")
    y = 300
    whole = page.run(LABELS)
    page.mouse("Moved", x + width / 2, y)
    assert "at 20" in page.run(CAPTION) or "at 19" in page.run(CAPTION)
    page.mouse("Pressed", x + width / 2, y, button="left", clickCount=1)
    page.mouse("Moved", x + 0.75 * width, y, button="left")
    page.mouse("Released", x + 0.75 * width, y, button="left", clickCount=1)
    assert min(page.run(LABELS)) >= 15
    assert max(page.run(LABELS)) <= 32
    page.run("document.getElementById('whole').click()")
    assert page.run(LABELS) == whole
    assert page.complaints == []


def test_all_of_it_is_printed(page, two_runs):
    page.open(two_runs)
    closed = page.run("document.querySelectorAll('details:not([open])').length")
    assert closed > 0
    page.run(
        "addEventListener('beforeprint', () => "
        "window.left = document.querySelectorAll('details:not([open])').length)"
    )
    pdf = base64.b64decode(page("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF")
    assert page.run("window.left") == 0
    assert page.run("document.querySelectorAll('details:not([open])').length") == closed
