"""`train_mi.py`: autoencoders, estimation, and the choice of episodes for other scripts."""

import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import running
import torch
from lerobot_factory import make_dataset
from running import interrupt_after, weights
from torch import nn

import evaluate
import train_mi
from common import checkpoint
from common.checkpoint import PolicySpec, find
from common.config import parse
from common.data import ChunkDataset, DataConfig, open_dataset
from common.errors import UserError
from common.normalize import Normalizer

pytestmark = pytest.mark.usefixtures("accelerate_reset")


@pytest.fixture(scope="module")
def episodes_dataset(tmp_path_factory):
    """Enough short episodes for nearest neighbours."""
    root = tmp_path_factory.mktemp("mi") / "cloth"
    sizes = {"observation.images.cam_head": (32, 32)}
    return make_dataset(root, (6, 5, 7, 6, 5, 6, 7, 5, 6, 8), sizes, video=False, dims=(3, 3), names=None)


@pytest.fixture
def small(episodes_dataset, cache_dir):
    flags = {
        "--dataset": episodes_dataset,
        "--cache-dir": cache_dir,
        "--horizon": 4,
        "--d-model": 16,
        "--num-heads": 2,
        "--encoder-layers": 1,
        "--batch-size": 4,
        "--ingest-workers": 1,
        "--val-fraction": 0.2,
        "--log-every": 1,
        "--neighbours": 3,
    }
    return [str(part) for pair in flags.items() for part in pair]


@pytest.fixture
def prepared(small):
    """Configuration, samples, their statistics, and autoencoders."""
    config = parse(train_mi.Config, [*small, "--d-model", "32"], "train_mi.py")
    store = open_dataset(config.data)
    data = ChunkDataset(store, range(store.num_episodes), config.horizon)
    torch.manual_seed(0)
    return config, data, Normalizer.fit(data), train_mi.Autoencoders(config, PolicySpec.of(data))


def train(flags, run_dir, *more):
    return running.train(train_mi, flags, run_dir, *more)


def scores_of(run_dir):
    with (run_dir / "episode_scores.csv").open() as file:
        return {int(row["episode"]): float(row["score_nats"]) for row in csv.DictReader(file)}


@pytest.mark.real("drawing")
def test_a_run_trains_estimates_and_names_the_best_episodes(small, tmp_path, episodes_dataset, cache_dir):
    run = train(small, tmp_path / "run", "--steps", 3, "--best", 0.3, 0.5)
    report = json.loads((run / "mutual_information.json").read_text())
    assert report["episodes"] == 10
    assert report["steps"] == 61
    assert report["interval_95"][0] <= report["nats"] <= report["interval_95"][1]
    scores = scores_of(run)
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert set(scores) == set(range(10))
    best = json.loads((run / "episodes_top30.json").read_text())
    assert best["episodes"] == sorted(list(scores)[:3])
    for picture in ("episode_scores.png", "reconstructions.png", "curves.png"):
        assert (run / picture).stat().st_size > 10_000
    config = DataConfig(
        dataset=(str(episodes_dataset),), cache_dir=cache_dir, episodes_file=run / "episodes_top50.json"
    )
    assert open_dataset(config).num_episodes == 5


def test_an_episode_of_two_tasks_is_chosen_as_a_whole(tmp_path):
    store = SimpleNamespace(
        part_episodes=(6, 1),
        episode_indices=np.array([0, 1, 1, 2, 3, 3, 0]),  # 1 and 3 were cut
        episode_task_numbers=np.array([0, 0, 1, 0, 1, 0, 1]),
        episode_starts=np.array([0, 10, 11, 14, 24, 27, 28, 40]),
        instructions=("pick", "place"),
        source_fingerprint="x",
        source="data",
    )
    scores = np.array([1.0, 9.0, 0.0, 2.0, 1.0, 5.0, 7.0])
    train_mi.write_scores(store, np.arange(7), scores, (0.5,), tmp_path)
    lines = (tmp_path / "episode_scores.csv").read_text().split()[1:]
    assert lines == ["0,12,7.000000", "1,4,2.250000", "2,10,2.000000", "3,4,2.000000", "0,10,1.000000"]
    best = json.loads((tmp_path / "episodes_top50.json").read_text())["episodes"]
    assert best == [0, 1, 2]  # one of two that pick, one of two that do both, the one that only places


def test_training_resumes_exactly(small, tmp_path):
    whole = train(small, tmp_path / "whole", "--steps", 4, "--save-every", 2)
    part = interrupt_after(whole, 2, tmp_path / "part")
    train([], None, "--resume", part)
    steps = [json.loads(line)["step"] for line in (part / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 4
    assert steps.count(2) == 1  # it did not start over
    first, second = weights(whole, 4), weights(part, 4)
    for component in ("state_encoder", "state_decoder", "action_encoder", "action_decoder"):
        assert any(name.startswith(component) for name in first)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert scores_of(whole) == scores_of(part)


def test_estimation_alone_repeats_what_training_found_or_uses_another_estimator(small, tmp_path, cache_dir):
    run = train(small, tmp_path / "run", "--steps", 2)
    before = scores_of(run)
    again = ["--estimate-only", str(run), "--cache-dir", str(cache_dir)]
    train([], None, *again, "--neighbours", 3)
    assert scores_of(run) == before
    train([], None, *again, "--neighbours", 2)
    assert scores_of(run) != before
    train([], None, *again, "--estimator", "infonce", "--repeats", 1)
    assert json.loads((run / "mutual_information.json").read_text())["estimator"] == "infonce"


def test_estimation_alone_finds_data_that_have_moved(small, tmp_path, cache_dir, episodes_dataset):
    before = shutil.copytree(episodes_dataset, tmp_path / "before")
    run = train([*small, "--dataset", str(before)], tmp_path / "run", "--steps", 1)
    scores = scores_of(run)
    after = before.rename(tmp_path / "after")
    again = ("--estimate-only", run, "--cache-dir", cache_dir, "--neighbours", 3)
    with pytest.raises(UserError, match="before was not found"):
        train([], None, *again)
    train([], None, *again, "--dataset", after)
    assert scores_of(run) == scores


def test_damaged_weights_estimate_nothing(small, tmp_path, cache_dir):
    run = train(small, tmp_path / "run", "--steps", 1)
    scores = (run / "episode_scores.csv").read_bytes()
    weights = find(run) / "policy/state_encoder.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 64
    weights.write_bytes(content)
    again = ["--estimate-only", run, "--cache-dir", cache_dir]
    with pytest.raises(UserError, match="is damaged"):
        train_mi.main(parse(train_mi.Config, list(map(str, again)), "train_mi.py"))
    content[-3] ^= 64
    weights.write_bytes(content)
    (run / "config.json").unlink()
    with pytest.raises(UserError, match=r"has lost its config\.json"):
        train_mi.main(parse(train_mi.Config, list(map(str, again)), "train_mi.py"))
    assert (run / "episode_scores.csv").read_bytes() == scores


def test_embeddings_stand_out_from_their_noise(prepared):
    """Embeddings must vary by more than the unit noise: otherwise there is nothing to compare."""
    config, data, normalizer, model = prepared
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = data.__getitems__(list(range(0, 61, 2)))
    history = []
    for _ in range(150):
        loss, metrics = train_mi.compute_loss(model, batch, normalizer, config, train=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append({name: value.item() for name, value in metrics.items()})
    x, y = train_mi.embed_all(model.eval(), data, normalizer, 64)
    for name, z in (("state", x), ("action", y)):
        assert z.var(dim=0).max() > 1  # the noise has variance 1
        assert history[-1][f"error/{name}"] < 0.7 * history[0][f"error/{name}"]


def test_what_lies_past_an_episodes_end_is_not_seen(prepared):
    config, data, normalizer, model = prepared
    batch = data.__getitems__([3, 4, 5])
    assert batch.is_pad.any()
    filled = torch.where(batch.is_pad[..., None], 1e3, batch.actions)
    results = [
        train_mi.compute_loss(model, batch._replace(actions=actions), normalizer, config, train=False)[0]
        for actions in (batch.actions, filled)
    ]
    torch.testing.assert_close(*results)


def test_scores_of_another_dataset_are_refused(small, tmp_path, dataset, cache_dir):
    run = train(small, tmp_path / "run", "--steps", 1)
    config = DataConfig(
        dataset=(str(dataset),), cache_dir=cache_dir, episodes_file=run / "episodes_top80.json"
    )
    with pytest.raises(UserError, match="score this one"):
        open_dataset(config)
    chosen = json.loads((run / "episodes_top80.json").read_text())
    absent = tmp_path / "absent.json"
    absent.write_text(json.dumps({**chosen, "episodes": [3, 99]}))
    own = DataConfig(dataset=(small[1],), cache_dir=cache_dir, episodes_file=absent)
    with pytest.raises(UserError, match="has no episode 99"):
        open_dataset(own)
    absent.write_text(json.dumps({**chosen, "episodes": []}))
    with pytest.raises(UserError, match="names no episode"):
        open_dataset(own)


def test_the_best_episodes_are_the_same_with_other_cameras_and_tasks(tmp_path):
    cameras = ["observation.images.cam_high", "observation.images.cam_left"]
    root = make_dataset(tmp_path / "d", (6, 5, 7), cameras, tasks=("fold", "lift", "fold"))
    shared = {"dataset": (str(root),), "cache_dir": tmp_path / "cache", "ingest_workers": 1}
    store = open_dataset(DataConfig(**shared, cameras=("high",), task=("fold",)))
    train_mi.write_scores(store, np.arange(2), np.array([1.0, 2.0]), (0.5,), tmp_path)
    for chosen in ({}, {"cameras": ("left",)}, {"task": ("fold",)}):
        config = DataConfig(**shared, **chosen, episodes_file=tmp_path / "episodes_top50.json")
        assert open_dataset(config).episode_indices.tolist() == [2]


def test_too_few_episodes_are_refused_before_training(small, tmp_path):
    flags = [*small, "--episodes", "0-3"]
    with pytest.raises(UserError, match="4 episodes are too few for 3 nearest neighbours"):
        train(flags, tmp_path / "run", "--steps", 1)
    assert not (tmp_path / "run").exists()
    train([*flags, "--estimator", "infonce"], tmp_path / "run", "--steps", 1)
    with pytest.raises(UserError, match="2 episodes are too few: half of them"):
        train([*small, "--episodes", "0-1", "--estimator", "infonce"], tmp_path / "two", "--steps", 1)
    with pytest.raises(UserError, match="--neighbours"):
        parse(train_mi.Config, [*small, "--neighbours", "0"], "train_mi.py")


def test_a_task_with_too_few_episodes_is_named():
    store = SimpleNamespace(instructions=("fold", "idle"), episode_task_numbers=np.repeat([0, 1], [9, 2]))
    with pytest.raises(UserError, match=r'^2 episodes of "idle" are too few for 7 .* others with --task\.'):
        train_mi.refuse_few(store, train_mi.Config())
    store.episode_task_numbers -= 1  # two of "fold", nine that state none
    with pytest.raises(UserError, match=r'2 episodes of "fold" are too few: half'):
        train_mi.refuse_few(store, train_mi.Config(estimator="infonce"))


def test_a_run_of_another_script_and_a_robot_are_refused(small, tmp_path, tiny):
    run = train(small, tmp_path / "run", "--steps", 1)
    with pytest.raises(UserError, match="trains no policy"):
        evaluate.main(evaluate.Config(run))
    with pytest.raises(UserError, match="single --dataset"):
        train([*small, "--dataset", small[1], small[1]], tmp_path / "two", "--steps", 1)
    with pytest.raises(UserError, match="holds no finished checkpoint"):
        train([], None, "--estimate-only", tmp_path)


def test_encoders_can_be_taken_by_another_run(small, tmp_path):
    first = train(small, tmp_path / "first", "--steps", 1)
    flags = ("--init-from", f"action_encoder={first}", "--freeze", "action_encoder", "--seed", 5)
    second = train(small, tmp_path / "second", "--steps", 2, *flags)
    before, after = weights(first, 1), weights(second, 2)
    taken = [name for name in before if name.startswith("action_encoder")]
    assert taken
    assert all(torch.equal(before[name], after[name]) for name in taken)


def test_a_policy_can_start_from_the_backbone_of_the_state_encoder(small, prepared, tmp_path):
    run = train(small, tmp_path / "run", "--steps", 1)
    config, data, *_ = prepared
    policy = nn.ModuleDict(
        {"head_backbone": train_mi.Autoencoders(config, PolicySpec.of(data)).state_encoder.backbone}
    )
    assert checkpoint.initialise(policy, (f"head_backbone={run}",)) == {"head_backbone"}
    inside = {k: x for k, x in weights(run, 1).items() if k.startswith("state_encoder.safetensors:backbone.")}
    assert len(inside) == len(policy.state_dict()) > 10
    for name, value in policy.head_backbone.state_dict().items():
        assert torch.equal(value, inside[f"state_encoder.safetensors:backbone.{name}"])
    with pytest.raises(UserError, match="nothing to load; the source has the components action_decoder, "):
        checkpoint.initialise(nn.ModuleDict({"gate": nn.Linear(2, 2)}), (f"gate={run}",))
