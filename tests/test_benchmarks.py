"""The benchmarks: what they read from runs, and what they write."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import train_vfp_moe
from benchmarks import scale, simulators, simulators_report, start
from common.data import DataConfig, open_dataset
from common.errors import UserError


def benchmark(name):
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def methods():
    return benchmark("methods")


def finished_run(folder, success, codes=False):
    """Write the files of a trained and evaluated run."""
    policy = folder / "checkpoints" / "step_0000020" / "policy"
    policy.mkdir(parents=True)
    (policy / "policy.json").write_text("{}")
    (policy.parent / "checksums.json").write_text("{}")
    save_file({"weight": torch.zeros(1000, 250)}, policy / "action_decoder.safetensors")
    save_file({"posterior_average.weight": torch.zeros(1000, 250)}, policy / "latent.safetensors")
    save_file({"state_offset": torch.zeros(3)}, policy / "stats.safetensors")
    more = {"codes/in_use": 15, "codes/perplexity": 12.5} if codes else {}
    lines = [{"step": step, "split": "train", **more} for step in (10, 15, 20)]
    lines.append({"step": 20, "split": "val", "loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "evaluation").mkdir()
    modes = {"left-left": 0.4, "left-right": 0.3, "right-left": 0.2, "right-right": 0.1}
    rates = {"success": success, "collisions": 1 - success, "modes": modes, "episodes": 200}
    results = {"checkpoint": "step_0000020", "closed_loop": dict.fromkeys(("10", "2", "1"), rates)}
    (folder / "evaluation" / "results.json").write_text(json.dumps(results))


def test_every_method_that_is_compared_has_a_configuration(methods):
    for method in (*methods.Config().methods, *methods.Config().ablations):
        script = methods.script_of(method)
        assert json.loads(methods.config_file(method).read_text())["script"] == script
        assert (methods.ROOT / script).is_file()


def test_runs_of_other_settings_are_not_compared(methods, tmp_path):
    had = {"optim": {"lr": 1e-3, "steps": 10, "beta2": 0.9}, "d_model": 128}
    methods.refuse_other_settings(tmp_path, had, {"optim": {"lr": 1e-3}, "d_model": 128})
    with pytest.raises(UserError, match=r"made with lr 0\.001, now it is 0\.002"):
        methods.refuse_other_settings(tmp_path, had, {"optim": {"lr": 2e-3}})


def test_runs_are_compared_and_what_people_wrote_stays(methods, tmp_path):
    finished_run(tmp_path / "a-0", 0.9)
    finished_run(tmp_path / "a-1", 0.8)
    finished_run(tmp_path / "b-0", 1.0, codes=True)
    finished_run(tmp_path / "b-1", 1.0, codes=True)
    results = {name: [methods.collect(tmp_path / f"{name}-{seed}") for seed in (0, 1)] for name in "ab"}
    assert results["a"][0]["parameters"] == 250_000
    text = methods.table(results, {"a": 0.25, "b": 0.5}, (0, 1))
    assert "| `a.py` | 85.0 (90.0, 80.0) |" in text
    assert "| `b.py` | 10 % / 10 % / 10 % | 0.25 M | 0.500 | 2.00 | 20 | 0.2 min | 15, 15 |" in text
    ablated = {"a:less": [methods.collect(tmp_path / "a-1")]}
    assert "| `a.py`, less | 80.0 | 80.0 | 80.0 | 10 % |" in methods.ablation_table(results, ablated, 0)
    path = tmp_path / "methods.md"
    path.write_text(f"# Title\n\nbefore\n\n{methods.BEGIN}\nold\n{methods.END}\n\nafter\n")
    methods.insert(path, text)
    methods.insert(path, text)
    written = path.read_text()
    assert written.startswith("# Title\n\nbefore\n")
    assert written.endswith("\n\nafter\n")
    assert written.count("| `a.py` | 85.0") == 1
    assert "old" not in written
    methods.draw(results, tmp_path / "methods.png")
    with Image.open(tmp_path / "methods.png") as picture:
        assert picture.width > 1000


def delayed_run(folder, joins, success):
    """Write the files of a run measured with delays of 0 and 4."""
    found = {"checkpoint": "step_0000020", "episodes": 50}
    for delay in ("0", "4"):
        ways = {join if delay == "4" or join == "ensemble" else "naive" for join in joins}
        change = {"seam": {"mean": 0.3, "p99": 0.9}, "inside": {"mean": 0.2, "p99": 0.6}}
        ensembled = {"seam": change["seam"], "inside": {"mean": None, "p99": None}}
        found[delay] = {
            join: {
                "success": success - 0.1 * (delay == "4" and join != "prefix"),
                "collisions": 0.05,
                "velocity_change": ensembled if join == "ensemble" else change,
            }
            for join in ways
        }
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "delay.json").write_text(json.dumps(found))


def test_ways_of_joining_are_put_side_by_side(tmp_path):
    from benchmarks import realtime

    config = realtime.Config(methods=("train_a",), seeds=(0, 1), delays=(0, 4), episodes=50, runs=tmp_path)
    for seed in config.seeds:
        delayed_run(tmp_path / f"train_a-{seed}", realtime.joins_of("train_a"), 0.9 - 0.1 * seed)
        delayed_run(tmp_path / f"train_a-delay-{seed}", realtime.joins_of("train_a:delay"), 0.8 - 0.1 * seed)
    results = {"train_a": realtime.collect("train_a", config)}
    text = realtime.tables(results, config)
    assert "| blocking | 85.0 (90.0, 80.0) | 75.0 (80.0, 70.0) |" in text
    assert "| prefix | 75.0 (80.0, 70.0) | 75.0 (80.0, 70.0) |" in text
    assert "| trained for prefixes, naive overlap | 75.0 (80.0, 70.0) | 65.0 (70.0, 60.0) |" in text
    assert "| naive overlap | 0.30 / 0.90 (1.50 / 1.50) | 0.30 / 0.90 (1.50 / 1.50) |" in text
    assert "| temporal ensembling | 0.30 / 0.90 | 0.30 / 0.90 |" in text
    realtime.draw(results, config.delays, tmp_path / "realtime.png")
    with Image.open(tmp_path / "realtime.png") as picture:
        assert picture.width > 1000


def test_runs_with_and_without_prefixes_are_trained_alike():
    from benchmarks import methods, realtime

    for method in realtime.Config().methods:
        plain, delayed = (
            json.loads(methods.config_file(method + trained).read_text())
            for trained in ("", realtime.TRAINED)
        )
        assert delayed["config"].pop("delay") == {"max_delay": max(realtime.Config().delays)}
        assert delayed == plain


# Simulators


def outcomes(runs):
    """Results in the form of `benchmarks/simulators.py`: outcomes by sampling steps."""
    return {
        "steps": 5000,
        "seconds_a_step": 0.24,
        "parameters": 2_500_000,
        "closed_loop": {
            name: {"outcomes": text, "success": text.count("1") / len(text)} for name, text in runs.items()
        },
    }


def test_every_run_of_the_plan_can_be_made():
    jobs = simulators.plan()
    assert len(jobs) == len(set(jobs)) == 50
    for job in jobs:
        command = list(map(str, simulators.train_command(job, Path("runs"), Path("run"), 10)))
        if job.method in simulators.LEROBOT:
            continue
        script, config = command[1], command[3]
        assert json.loads((simulators.ROOT / config).read_text())["script"] == Path(script).name
        assert (simulators.ROOT / script).is_file()
    assert [job.seed for job in jobs if simulators.is_part("push:act", job)] == [0, 1, 2]
    assert not [job for job in jobs if simulators.is_part("push:a", job)]
    aloha = [job for job in jobs if job.task == "transfer-cube"]  # equal chunks there, too
    assert "64" in simulators.train_command(aloha[0], Path("runs"), Path("run"), 10)
    assert simulators.settings(aloha[-1], Path("absent"))["config"]["chunk_size"] == 64


def test_a_report_of_some_of_the_runs(tmp_path, capsys):
    good, bad, grey = "1" * 45 + "0" * 5, "1" * 10 + "0" * 40, "0" * 50
    blind = {"grey": grey, "mismatched": grey}
    results = {
        "pick-place:train_vfp_moe:0": outcomes({"10": good, "2": good, "1": good, **blind}),
        "pick-place:train_vfp_moe:1": outcomes({"10": bad, "2": bad, "1": bad, **blind}),
        "pick-place:act:0": outcomes({"1": bad, **blind}),
        "push:train_vfp_moe:0": outcomes({"10": good, "grey": bad, "mismatched": grey}),
        "push:act:0": outcomes({"1": bad, **blind}),
    }
    (tmp_path / "benchmarks.md").write_text("# Mine\n")
    simulators_report.write_report({"runs": results}, simulators.plan(), tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    assert text.startswith("# Mine\n")
    assert "5 of 50 planned runs" in text
    # 55 of 100 episodes of both seeds, with the interval of Clopper and Pearson
    assert "| pick-place | `train_vfp_moe.py` | 55.0 [45, 65] (90, 20) |" in text
    assert (
        "| pick-place | LeRobot ACT, chunk as ours |  |  | 20.0 [10, 34] | 0 | 0 | 1 | 2.5 M | 5000 | 0.24 |"
        in text
    )
    # only seed 0 is in both: 35 more successes, none fewer
    assert "| +70.0 | 5.8e-11 | distinguishable |" in text
    assert "push does not count: a policy that sees nothing succeeds in more than 10 %." in text
    assert "| push | `train_vfp_moe.py`, 10 | LeRobot" not in text
    assert Image.open(tmp_path / "benchmarks.png").width > 300


def test_policies_that_are_told_are_compared_with_one_that_is_not():
    tasks = benchmark("tasks")
    assert json.loads(tasks.CONFIG.read_text())["script"] == "train_vfp_moe.py"

    def found(success, **more):
        rates = {"success": success, "wrong_targets": 0.25, "collisions": 0.05}
        return {"closed_loop": {"10": rates, "1": rates, **more}, "parameters": 2_500_000}

    rows = [("index", [found(0.9, misled={"success": 0.05}), found(0.8, misled={"success": 0.07})])]
    rows.append(("none", [found(0.0625), found(0.0625)]))
    text = tasks.table(rows, tasks.Config(seeds=(0, 1)))
    assert "chance is 6.2" in text
    assert "| index | 85.0 (90.0, 80.0) | 85.0 (90.0, 80.0) | 6.0 (5.0, 7.0) | 25.0 (25.0, 25.0) |" in text
    assert "| none | 6.2 (6.2, 6.2) | 6.2 (6.2, 6.2) |  |" in text


def test_corrections_are_as_many_steps_as_the_demonstrations_they_replace(tmp_path, monkeypatch):
    corrections = benchmark("corrections")
    monkeypatch.setattr(
        corrections, "lengths_of", lambda path: {"demos": [9, 11, 10, 10]}.get(path.name, [8])
    )
    commands = []

    def call(command, threads, folder):
        commands.append([str(word) for word in command])
        if command[0] == "collect.py":
            (command[2] / f"round-{len(commands)}").mkdir()
        else:
            steps = int(commands[-1][commands[-1].index("--steps") + 1])
            (folder / "checkpoints" / f"step_{steps:07d}").mkdir(parents=True)
            new = Path(commands[-1][commands[-1].index("--grow-from") + 1])
            entries = [{"name": path.name} for path in corrections.collected(new)][:learns]
            (folder / "growth.json").write_text(json.dumps([{"entries": entries}]))

    learns = 2
    monkeypatch.setattr(corrections, "call", call)
    config = corrections.Config(demonstrations=4, steps=100, moments=(0.25, 0.45))
    for _ in range(2):  # a second time, nothing is left to do
        assert corrections.correct(config, tmp_path / "run", 0, tmp_path / "demos", 20) == 16
    trained = [c[c.index("--steps") + 1] for c in commands if c[0].startswith("train")]
    assert trained == ["25", "45", "100"]
    assert all(c[c.index("--episodes") + 1] == "0-1" for c in commands if c[0].startswith("train"))
    budgets = [c[c.index("--budget") + 1] for c in commands if c[0] == "collect.py"]
    assert budgets == ["10", "12"]  # what the first round left over is for the second one
    learns = 1
    with pytest.raises(UserError, match="has not learned from all of"):
        corrections.correct(config, tmp_path / "other", 0, tmp_path / "demos", 20)

    runs = {"demonstrations": [0.5, 0.6], "corrections": [0.7, 0.6]}
    results = {
        way: [{"labels": 40, "10": {"success": x}, "1": {"success": 0.25}} for x in values]
        for way, values in runs.items()
    }
    *_, plain, better, gain = corrections.table(results, corrections.Config(seeds=(0, 1))).splitlines()
    assert plain == "| demonstrations | 40 | 55.0 (50.0, 60.0) | 25.0 (25.0, 25.0) |"
    assert better.startswith("| corrections | 40 | 65.0 (70.0, 60.0) |")
    assert gain == "| difference, ± its standard error | | +10.0 ± 10.0 | +0.0 ± 0.0 |"


def test_a_made_up_dataset_has_its_store(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    path = start.make_up(tmp_path / "dataset", tmp_path, 60, 20, size=8, cameras=2)
    store = open_dataset(DataConfig((str(tmp_path / "dataset"),), cache_dir=tmp_path))
    assert store.path == path
    assert (store.num_steps, store.num_episodes, store.cameras) == (60, 3, ("0", "1"))
    assert store.images(np.array([0, 59])).shape == (2, 2, 3, 8, 8)
    assert 0.04 < (store.state - store.action).std() < 0.06


def test_exponents_are_those_of_the_largest_sizes():
    assert scale.slope((1, 10, 100), [5, 3, 300]) == pytest.approx(2)
    line = scale.table("episodes", (10, 1_000), {"a cost": [2.0, 20.0]}, ", ms").splitlines()[-1]
    assert line == "| a cost, ms | 2 | 20 | 0.50 |"


def test_launches_are_counted_by_phase(tiny, tmp_path, accelerate_reset):
    module = benchmark("launches")
    flags = list(tiny)
    at = flags.index("--batch-size")
    flags = " ".join(flags[:at] + flags[at + 2 :])
    wanted, original = ("train_naive_fm", "train_vfp_moe"), train_vfp_moe.compute_loss
    module.main(module.Config(scripts=wanted, flags=flags, out=tmp_path / "table.md"))
    rows = [line.split("|")[1:-1] for line in (tmp_path / "table.md").read_text().splitlines() if "`" in line]
    assert len(rows) == 2
    for name, *cells in rows:
        *phases, step, ten, one = (int(cell.strip(" *") or 0) for cell in cells)
        assert step == sum(phases)
        assert phases[2] > phases[0] > 50  # backward, forward
        assert (phases[1] > 40 * 20) == ("moe" in name)  # Sinkhorn
        assert (ten - one) % 9 == 0  # from nine more steps
    assert train_vfp_moe.compute_loss is original  # patches are undone


def test_the_cost_of_a_new_method_is_measured_beside_a_known_one(tmp_path, monkeypatch):
    monkeypatch.setattr(simulators, "RESULTS", tmp_path / "results.json")
    (tmp_path / "results.json").write_text(
        json.dumps({"seconds": {"aloha:act": 2.0, "aloha:x": 4.0}, "runs": {}})
    )
    monkeypatch.setattr(simulators, "record", lambda *given: None)
    monkeypatch.setattr(simulators, "training_steps", lambda method, *flags: method)
    monkeypatch.setattr(simulators.lerobot_acts, "training_steps", lambda *given: "act")
    found = {"aloha:act": 3.0, "aloha:train_vfp": 6.0, "aloha:x": 3.0}
    monkeypatch.setattr(simulators, "measure_steps", lambda loops: {kind: found[kind] for kind in loops})
    simulators.measure(["aloha:act", "aloha:train_vfp"], tmp_path)  # this machine is slower than that one
    assert simulators.read()["seconds"] == {"aloha:act": 2.0, "aloha:x": 4.0, "aloha:train_vfp": 4.0}
    simulators.measure(["aloha:act"], tmp_path, again=True)
    assert simulators.read()["seconds"] == found


def test_the_policies_of_curated_data_are_rated_again_for_another_number_of_rollouts(tmp_path, monkeypatch):
    curation = benchmark("curation")
    monkeypatch.setattr("common.inference.load_policy", lambda *given, **named: None)
    monkeypatch.setattr("evaluate.act", lambda policy, settings, steps: settings.episodes)
    monkeypatch.setattr("common.rollout.rates", lambda episodes: {"success": episodes / 100})
    assert [curation.success(tmp_path, rollouts) for rollouts in (50, 20, 50)] == [0.5, 0.2, 0.5]
