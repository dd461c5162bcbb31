"""LeRobot's plug-in: an exported policy acts in LeRobot exactly as it does here, bit for bit."""

import importlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import reset as reset_accelerate
from running import train
from text_factory import make_encoder

pytest.importorskip("lerobot.policies.pretrained")

from lerobot.configs import PreTrainedConfig
from lerobot.policies import get_policy_class, make_pre_post_processors
from lerobot.rollout.inference.rtc import supports_rtc_inference
from safetensors.torch import load_file, save_file

import lerobot_policy_flow
import train_cfg_vqvae
import train_naive_fm
import train_vfp
import train_vfp_depth
import train_vfp_moe
from common.checkpoint import PolicySpec, seal
from common.config import parse
from common.data.recording import Demonstration, write_dataset
from common.errors import UserError
from common.exported import require_carried
from common.inference import Controller, RobotPolicy, load_policy
from common.instructions import Instructions
from examples import train_regression
from lerobot_policy_flow import card, export

NAMES = ("x", "y", "quat_x", "quat_y", "quat_z", "quat_w")
CAMERAS = ("front", "wrist")
CASES = {
    "naive_fm": (train_naive_fm, ()),
    "vfp": (train_vfp, ()),
    "vfp_depth": (train_vfp_depth, ()),
    "cfg_vqvae": (train_cfg_vqvae, ()),
    "vfp_moe": (train_vfp_moe, ()),
    "everything": (
        train_vfp_depth,
        ("--proprio-history", 3, "--action-offset", 2, "--relative-actions", "--rotation", "quaternion->6d"),
    ),
    "frames": (train_vfp, ("--image-history", 2, "--image-stride", 2)),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Three episodes with two cameras, and a position and a quaternion as state and action."""
    rng, demonstrations = np.random.default_rng(0), []
    for steps in (14, 11, 13):
        values = rng.normal([0, 0, 0, 0, 0, 2], 0.5, (steps, 6)).astype(np.float32)
        values[:, 2:] /= np.linalg.norm(values[:, 2:], axis=1, keepdims=True)
        images = {camera: rng.integers(0, 256, (steps, 28, 28, 3), np.uint8) for camera in CAMERAS}
        demonstrations.append(Demonstration(values, np.roll(values, -1, axis=0), images, "fold the towel"))
    root = tmp_path_factory.mktemp("data") / "poses"
    names = {"state_names": NAMES, "action_names": NAMES}
    return write_dataset(root, demonstrations, fps=10, **names)


@pytest.fixture(scope="module")
def exported(recorded, tiny, tmp_path_factory):
    """Run folder and export folder of a named case; made when first requested."""
    from common import depth

    made = {}
    small = depth.Architecture("da3-small", 32, 4, 2, 2)

    def get(case):
        if case not in made:
            script, flags = CASES[case]
            folder = tmp_path_factory.mktemp(case)
            flags = ("--dataset", recorded, "--horizon", 8, *flags, "--steps", 2)
            train(script, tiny, folder / "run", *flags)
            reset_accelerate()
            export.export(folder / "run", folder / "export")
            made[case] = folder / "run", folder / "export"
        return made[case]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(depth.ARCHITECTURES, "small", small)
        yield get


def in_lerobot(folder, *overrides, rename_map=None):
    """Policy and processors, made as in LeRobot's commands."""
    config = PreTrainedConfig.from_pretrained(str(folder), cli_overrides=list(overrides))
    config.pretrained_path = folder
    policy = get_policy_class(config.type).from_pretrained(str(folder), config=config)
    pre, post = make_pre_post_processors(
        config,
        pretrained_path=str(folder),
        preprocessor_overrides={
            "device_processor": {"device": "cpu"},
            "rename_observations_processor": {"rename_map": rename_map or {}},
        },
    )
    return policy, pre, post


def observations(seed, size=(28, 28)):
    """A robot's observations, one per step, as `next_action` takes them."""
    rng = np.random.default_rng(seed)
    while True:
        state = rng.normal([0, 0, 0, 0, 0, 2], 0.1).astype(np.float32)
        state[2:] /= np.linalg.norm(state[2:])
        yield {"images": {c: rng.integers(0, 256, (*size, 3), np.uint8) for c in CAMERAS}, "state": state}


def batch_of(several):
    """Observations of several robots in LeRobot's form: float images, channels first."""
    batch = {"observation.state": torch.from_numpy(np.stack([o["state"] for o in several]))}
    for camera in CAMERAS:
        frames = torch.from_numpy(np.stack([o["images"][camera] for o in several]))
        batch[f"observation.images.{camera}"] = frames.permute(0, 3, 1, 2).contiguous().float() / 255
    return batch | {"task": ["fold the towel"] * len(several)}


def begin(policy, seed):
    """Start episodes with torch's generator seeded, as LeRobot does; returns the seed of their noise."""
    torch.manual_seed(seed)
    first = int(torch.randint(2**62, ()))
    torch.manual_seed(seed)
    policy.reset()
    return first


@pytest.mark.parametrize("case", CASES)
def test_every_action_is_the_run_s_to_the_bit(exported, case):
    run, folder = exported(case)
    policy, pre, post = in_lerobot(folder)
    for seed in (3, 4):  # two episodes
        own = load_policy(run, device="cpu", seed=begin(policy, seed))
        for _, seen in zip(range(11), observations(seed, (40, 56)), strict=False):
            action = post(policy.select_action(pre(batch_of([seen]))))
            assert action.dtype == torch.float32
            np.testing.assert_array_equal(action.numpy()[0], own.next_action(seen))


@pytest.mark.parametrize("case", ["vfp", "everything"])
def test_five_episodes_at_once(exported, case):
    run, folder = exported(case)
    policy, pre, post = in_lerobot(folder)
    own, seeds = load_policy(run, device="cpu"), begin(policy, 7) + np.arange(5)
    together = Controller(own, seeds.tolist())
    alone = [Controller(own, [seed]) for seed in seeds.tolist()]
    streams = [observations(seed) for seed in range(5)]
    for _ in range(9):
        seen = [next(stream) for stream in streams]
        actions = post(policy.select_action(pre(batch_of(seen)))).numpy()
        states, images = np.stack([o["state"] for o in seen]), [o["images"] for o in seen]
        expected = together.next_actions(np.arange(5), states, lambda _, images=images: images)
        np.testing.assert_array_equal(actions, expected)
        for e in range(5):
            look = lambda _, images=images, e=e: images[e : e + 1]  # noqa: E731
            one = alone[e].next_actions(np.array([0]), states[e : e + 1], look)
            np.testing.assert_allclose(actions[e], one[0], rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="There are 2 episodes where there were 5"):
        policy.select_action(pre(batch_of(seen[:2])))


def test_a_reset_forgets_and_draws_other_noise(exported):
    policy, pre, _ = in_lerobot(exported("everything")[1])
    seen = pre(batch_of([next(observations(0))]))
    begin(policy, 1)
    first = policy.select_action(seen)
    policy.select_action(seen)
    policy.reset()
    assert not torch.equal(policy.select_action(seen), first)
    begin(policy, 1)
    assert torch.equal(policy.select_action(seen), first)


def test_chunks_begin_now_and_are_the_run_s_to_the_bit(exported):
    for case, offset in (("vfp", 0), ("everything", 2)):
        run, folder = exported(case)
        policy, pre, post = in_lerobot(folder)
        own = load_policy(run, device="cpu", seed=begin(policy, 5))
        seen = next(observations(5))
        batch = batch_of([seen])
        if own.spec.proprio_history > 1:
            seen = {**seen, "state": np.stack([seen["state"]] * own.spec.proprio_history)}
            batch["observation.state"] = torch.from_numpy(seen["state"])[None]
        chunk = post(policy.predict_action_chunk(pre(batch))).numpy()
        expected = own.act(seen)
        assert chunk.shape == (1, 8 + offset, 6)
        np.testing.assert_array_equal(chunk[0, offset:], expected)
        np.testing.assert_array_equal(chunk[0, :offset], np.repeat(expected[:1], offset, axis=0))
        assert policy.config.action_delta_indices == list(range(offset, 8 + offset))


def test_chunks_of_a_policy_that_sees_earlier_frames_are_refused(exported):
    policy, pre, _ = in_lerobot(exported("frames")[1])
    assert not policy.supports_rtc()
    with pytest.raises(UserError, match="sees 2 frames of a camera, but LeRobot gives only one"):
        policy.predict_action_chunk(pre(batch_of([next(observations(0))])))


def test_lerobot_s_settings_of_acting(exported):
    run, folder = exported("vfp")
    policy, pre, _ = in_lerobot(folder, "--n_action_steps=3", "--sample_steps=1", "--clip=true")
    own = load_policy(run, device="cpu", seed=begin(policy, 5))
    for _, seen in zip(range(7), observations(5), strict=False):
        expected = own.next_action(seen, execute_steps=3, sample_steps=1, clip=True)
        np.testing.assert_array_equal(policy.select_action(pre(batch_of([seen])))[0], expected)


def test_every_byte_of_a_picture_survives():
    from lerobot_policy_flow.modeling_flow import _bytes

    values = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    assert np.array_equal(_bytes(values.float() / 255, "x"), values.permute(0, 2, 3, 1))
    assert np.array_equal(_bytes(values, "x"), values.permute(0, 2, 3, 1))
    with pytest.raises(UserError, match="images that are not normalized"):
        _bytes(values.float() / 127.5 - 1, "x")


def test_nothing_is_normalized_twice_whatever_statistics_lerobot_brings(exported):
    """With the overrides of `lerobot-train`, each of which must match a processing step."""
    folder = exported("vfp")[1]
    config = PreTrainedConfig.from_pretrained(str(folder))
    features = {**config.input_features, **config.output_features}
    stats = {key: {"mean": torch.full((1,), 7.0), "std": torch.full((1,), 3.0)} for key in features}
    shared = {"stats": stats, "norm_map": config.normalization_mapping}
    pre, post = make_pre_post_processors(
        config,
        pretrained_path=str(folder),
        preprocessor_overrides={
            "device_processor": {"device": "cpu"},
            "normalizer_processor": {"features": features, **shared},
            "rename_observations_processor": {"rename_map": {"observation.top": "observation.images.front"}},
        },
        postprocessor_overrides={"unnormalizer_processor": {"features": config.output_features, **shared}},
    )
    batch = batch_of([next(observations(0))])
    batch["observation.top"] = batch.pop("observation.images.front")
    out = pre(dict(batch))
    assert torch.equal(out["observation.images.front"], batch["observation.top"])
    assert torch.equal(out["observation.state"], batch["observation.state"])
    assert torch.equal(post(torch.ones(1, 6)), torch.ones(1, 6))


# Acting in real time


def with_prefix(policy, monkeypatch, max_delay=3):
    """Make a policy look as if trained to continue chunks; returns the list of prefixes that it gets."""
    prefixes = []

    object.__setattr__(policy._blank.spec, "max_delay", max_delay)

    def act(self, observation, sample_steps=None, clip=False, prefix=None):
        prefixes.append(prefix)
        return np.zeros((self.horizon, 6), np.float32)

    monkeypatch.setattr(RobotPolicy, "act", act)
    return prefixes


def test_a_chunk_continues_what_is_left_of_the_one_before(exported, monkeypatch, capsys):
    policy, pre, _ = in_lerobot(exported("vfp")[1])
    prefixes = with_prefix(policy, monkeypatch)
    assert supports_rtc_inference(policy)
    batch = pre(batch_of([next(observations(0))]))
    left = torch.arange(24.0).view(4, 6) + 1
    capsys.readouterr()
    policy.predict_action_chunk(batch, inference_delay=2, prev_chunk_left_over=left)
    policy.predict_action_chunk(batch, inference_delay=0, prev_chunk_left_over=left)
    policy.predict_action_chunk(batch, inference_delay=2, prev_chunk_left_over=None)
    padded = torch.cat([left[:1], torch.zeros(5, 6)])  # as LeRobot pads
    policy.predict_action_chunk(batch, inference_delay=2, prev_chunk_left_over=padded)
    assert capsys.readouterr().out == ""
    policy.predict_action_chunk(batch, inference_delay=9, prev_chunk_left_over=left)
    assert "takes 9 control steps, and the policy was trained to continue 3" in capsys.readouterr().out
    lengths = [None if prefix is None else len(prefix) for prefix in prefixes]
    assert lengths == [2, None, None, 2, 3]
    np.testing.assert_array_equal(prefixes[0], left[:2])
    np.testing.assert_array_equal(prefixes[3], left[[0, 0]])  # without a next one, it holds its last action
    object.__setattr__(policy._blank.spec, "action_offset", 1)  # chunks begin one step later
    policy.predict_action_chunk(batch, inference_delay=3, prev_chunk_left_over=left)
    np.testing.assert_array_equal(prefixes[-1], left[1:3])
    two = pre(batch_of([next(observations(e)) for e in range(2)]))
    with pytest.raises(UserError, match="A chunk of one episode can be continued, and there are 2"):
        policy.predict_action_chunk(two, inference_delay=2, prev_chunk_left_over=left)


def test_policies_that_cannot_continue_a_chunk_refuse(exported, monkeypatch):
    policy, pre, _ = in_lerobot(exported("vfp")[1])
    assert not supports_rtc_inference(policy)
    batch = pre(batch_of([next(observations(0))]))
    assert policy.predict_action_chunk(batch, inference_delay=2, prev_chunk_left_over=None).shape == (1, 8, 6)
    with pytest.raises(UserError, match=r"not trained to continue a chunk\): use --inference.type=sync"):
        policy.predict_action_chunk(batch, inference_delay=2, prev_chunk_left_over=torch.ones(4, 6))
    policy, _, _ = in_lerobot(exported("everything")[1])
    with_prefix(policy, monkeypatch)
    assert not supports_rtc_inference(policy)  # it needs earlier states, which LeRobot does not pass on


def test_an_export_knows_what_its_sentences_mean(recorded, tiny, tmp_path):
    """A robot needs the text encoder for new sentences only."""
    encoder = make_encoder(tmp_path / "bert")
    run, folder = tmp_path / "run", tmp_path / "export"
    flags = ("--dataset", recorded, "--steps", 2, "--task-encoder", encoder, "--task-tokens", "all")
    train(train_vfp, tiny, run, *flags)
    export.export(run, folder)
    moved = encoder.rename(tmp_path / "moved")
    assert str(tmp_path) not in (folder / "config.json").read_text() + (folder / "README.md").read_text()
    policy, pre, _ = in_lerobot(folder)
    first, batch = begin(policy, 3), batch_of([next(observations(0))])
    chunk = policy.predict_action_chunk(pre(batch))
    for source in (run, folder):
        direct = load_policy(source, device="cpu", seed=first)
        direct.reset(0)
        told = direct.act({**next(observations(0)), "task": "fold the towel"})
        np.testing.assert_array_equal(chunk[0].numpy(), told)
    new = pre({**batch, "task": "open the box"})
    with pytest.raises(UserError, match=r"bert cannot be loaded .*: give its folder as text_encoder"):
        policy.predict_action_chunk(new)
    policy, _, _ = in_lerobot(folder, f"--text_encoder={moved}")
    assert policy.predict_action_chunk(new).isfinite().all()


def test_a_card_lists_some_of_many_instructions():
    tasks = Instructions(tuple(f"fold towel {number}" for number in range(10_000)))
    spec = PolicySpec(("head",), (4, 4), ("x",), ("dx",), 10.0, tasks=tasks)
    about = {"config": SimpleNamespace(data=SimpleNamespace(dataset=())), "model": torch.nn.Linear(1, 1)}
    policy = SimpleNamespace(spec=spec, horizon=4, trained_steps=1, **about)
    config = SimpleNamespace(cameras={"observation.image": "head"}, action_feature_names=["dx"])
    said = card._what_it_learned_from(policy, {}, config)
    assert len(said) < 3000
    assert "and 9950 more" in said


def test_policies_of_several_tasks_hear_the_instruction(exported, monkeypatch):
    policy, pre, _ = in_lerobot(exported("vfp")[1])
    object.__setattr__(policy._blank.spec, "tasks", Instructions(("fold", "fold the towel")))
    heard, action = [], np.zeros((1, 6), np.float32)
    act = lambda self, seen, *_: heard.append(seen["task"]) or action  # noqa: E731
    next_actions = lambda self, *_, tasks: heard.append(tasks) or action  # noqa: E731
    monkeypatch.setattr(RobotPolicy, "act", act)
    monkeypatch.setattr(Controller, "next_actions", next_actions)
    batch = batch_of([next(observations(0))])
    policy.predict_action_chunk(pre(batch))
    policy.select_action(pre({**batch, "task": ""}))
    policy.select_action(pre({**batch, "task": "fold the towel"}))
    assert heard == ["fold the towel", [...], ["fold the towel"]]  # without one, it asks for one


# Exports


def main(*argv):
    export.main(parse(export.Config, list(map(str, argv)), "export.py"))


def test_pictures_go_by_the_names_that_are_asked_for(exported, tmp_path):
    run, _ = exported("vfp")
    main(run, tmp_path / "out", "--images", "observation.image=wrist")
    config = PreTrainedConfig.from_pretrained(str(tmp_path / "out"))
    assert config.cameras == {"observation.images.front": "front", "observation.image": "wrist"}
    assert config.image_features.keys() == config.cameras.keys()
    for images, words in (
        ("observation.image=roof", "the policy's cameras are front, wrist"),
        ("image=wrist", "write KEY=CAMERA"),
        ("observation.images.front=wrist", "two cameras would have the same key"),
    ):
        with pytest.raises(UserError, match=words):
            main(run, tmp_path / "wrong", "--images", images)
    with pytest.raises(UserError, match="exists already"):
        main(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_has_no_policy_is_not_exported(exported, tmp_path):
    with pytest.raises(UserError, match="holds no finished checkpoint"):
        main(tmp_path, tmp_path / "out")
    run = shutil.copytree(exported("vfp")[0], tmp_path / "run", symlinks=True)
    file = run / "checkpoints" / "last" / "policy" / "policy.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "script": "train_mi.py"}))
    seal(run / "checkpoints" / "last")
    with pytest.raises(UserError, match=r"was trained by train_mi\.py, which trains no policy"):
        main(run, tmp_path / "out")
    with pytest.raises(UserError, match="write owner/name"):
        main(run, tmp_path / "out", "--hub", "towel")
    assert not (tmp_path / "out").exists()


def test_a_script_that_the_plugin_does_not_carry_is_not_exported():
    require_carried(train_vfp)
    with pytest.raises(UserError, match=r"train_regression\.py is not next to common/: copy it there"):
        require_carried(train_regression)


def test_an_export_saved_by_lerobot_again_is_the_same(exported, tmp_path):
    run, folder = exported("everything")
    policy, _, _ = in_lerobot(folder)
    policy.save_pretrained(tmp_path / "again")
    seen = next(observations(0))
    seen["state"] = np.stack([seen["state"]] * 3)
    chunks = [
        load_policy(place, device="cpu", seed=0).act(seen) for place in (run, folder, tmp_path / "again")
    ]
    np.testing.assert_array_equal(chunks[0], chunks[1])
    np.testing.assert_array_equal(chunks[0], chunks[2])


def test_an_export_says_nothing_of_folders_here_and_names_what_was_learned(exported, recorded, cache_dir):
    _, folder = exported("vfp")
    card = (folder / "README.md").read_text()
    for text in ((folder / "config.json").read_text(), card):
        assert str(cache_dir) not in text
        assert str(recorded.parent) not in text
        assert recorded.name in text
    for words in ("fold the towel", "quat_w", "28x28", "train_vfp.py", "--horizon 8", "Not evaluated"):
        assert words in card


def test_places_of_every_kind_stay_here_and_flags_can_be_given_again():
    options = {
        "run": {"init_from": ["backbone=/home/me/runs/a", "/home/me/b.pt"], "keep": 3},
        "data": {"state_keys": ["/observations/qpos"], "grow_from": "/home/me/new", "episodes_file": None},
    }
    assert card.without_folders(options) == {
        "run": {"init_from": ["backbone=a", "b.pt"], "keep": 3},
        "data": {"state_keys": ["/observations/qpos"], "grow_from": "new", "episodes_file": None},
    }
    flags = [("task", ["fold the towel"]), ("trim-idle", True), ("background-saving", False), ("lr", 0.1)]
    said = " ".join(card._flag(name, value) for name, value in flags)
    assert said == "--task 'fold the towel' --trim-idle --no-background-saving --lr 0.1"


def test_the_card_has_results_with_intervals_and_pictures(exported, tmp_path):
    run = shutil.copytree(exported("vfp")[0], tmp_path / "run", symlinks=True)
    rate = {"success": 0.25, "low": 0.127, "high": 0.412, "episodes": 40, "steps": 61.0}
    results = {
        "checkpoint": "step_0000002",
        "seed": 1,
        "env": "pusht",
        "closed_loop": {"10": rate, "grey": rate},
    }
    results["heldout"] = {"steps": 9, "episodes": 1, "policy": {"mae": 0.5}, "mean": {"mae": 0.75}}
    (run / "evaluation").mkdir()
    (run / "evaluation" / "results.json").write_text(json.dumps(results))
    (run / "evaluation" / "rollouts.gif").write_bytes(b"GIF89a")
    export.export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 10 sampling steps | 25.0 % [12.7, 41.2] | 40 | 61 |" in card
    assert "policy 0.5000, mean 0.7500" in card
    assert "![rollouts](pictures/rollouts.gif)" in card
    assert (tmp_path / "out" / "pictures" / "rollouts.gif").read_bytes() == b"GIF89a"

    results["checkpoint"] = "step_0000001"  # the pictures are of that one, too
    (run / "evaluation" / "results.json").write_text(json.dumps(results))
    export.export(run, tmp_path / "another")
    assert "Not evaluated" in (tmp_path / "another" / "README.md").read_text()
    assert not (tmp_path / "another" / "pictures").exists()


# Bad input


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported("vfp")[1], tmp_path / "copy")


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = change(load_file(file))
    file.unlink()
    save_file(tensors, file)


def without(word):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if word not in key}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: edit(folder, version=2), "in version 2 of the format, and this code reads 1"),
        (lambda folder: edit(folder, run={"script": "train_vfp.py"}), "lacks config, spec, step of its run"),
        (lambda folder: edit_tensors(folder, without("action_in")), "do not fit their network"),
        (lambda folder: edit_tensors(folder, without("statistics.action")), "lacks the statistics 'action."),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 20), "cannot be read"),
    ],
)
def test_exports_that_cannot_be_used_say_why_in_lerobot_and_here(copy, damage, words):
    damage(copy)
    for load in (in_lerobot, load_policy):
        with pytest.raises(UserError) as raised:
            load(copy)
        assert words in str(raised.value)
        assert "\n" not in str(raised.value)


def test_an_export_has_one_checkpoint(copy):
    with pytest.raises(UserError, match="leave out the checkpoint"):
        load_policy(copy, checkpoint="2")


def test_other_cameras_states_and_actions_are_refused(copy):
    policy, pre, _ = in_lerobot(copy)
    batch = batch_of([next(observations(0))])
    one = {key: value for key, value in batch.items() if not key.endswith("wrist")}
    with pytest.raises(UserError, match=r"has no observation.images.wrist, .* with --rename_map"):
        policy.select_action(pre(one))
    with pytest.raises(UserError, match=r"has no observation\.state, which"):
        policy.select_action({key: value for key, value in batch.items() if "state" not in key})
    with pytest.raises(UserError, match=r"has 3 numbers, and the policy was trained on 6 \(x, y, quat_x"):
        policy.select_action(pre({**batch, "observation.state": torch.zeros(1, 3)}))
    features = json.loads((copy / "config.json").read_text())
    three = features["input_features"] | {
        "observation.images.third": {"type": "VISUAL", "shape": [3, 28, 28]}
    }
    edit(copy, input_features=three)
    with pytest.raises(UserError, match="but its policy sees front, wrist: export it again with --images"):
        in_lerobot(copy)
    edit(copy, **{**features, "output_features": {"action": {"type": "ACTION", "shape": [7]}}})
    with pytest.raises(UserError, match=r"gives 6 actions .* but 7 are expected here"):
        in_lerobot(copy)


def test_lerobot_does_not_train_these_policies(copy):
    policy, _, _ = in_lerobot(copy)
    for call in (policy.get_optim_params, policy.config.get_optimizer_preset, lambda: policy.forward({})):
        with pytest.raises(UserError, match=r"python train_vfp\.py --init-from EXPORT does"):
            call()
    config = PreTrainedConfig.get_choice_class("flow")(device="cpu")
    with pytest.raises(UserError, match=r"give --policy\.path"):
        get_policy_class("flow")(config)


def test_an_older_lerobot_is_named(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.5.1")
    with pytest.raises(ImportError, match=r"needs lerobot 0.6.1 or newer and finds 0.5.1"):
        importlib.reload(lerobot_policy_flow)
