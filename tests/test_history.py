"""Policies that see earlier frames (`--image-history`), in training and in an episode."""

import threading
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import train
from test_inference import observation

import train_cfg_vqvae
import train_mi
import train_naive_fm
import train_vfp
import train_vfp_depth
import train_vfp_moe
from common import vision
from common.checkpoint import PolicySpec
from common.config import parse
from common.control import ControlLoop, Plan, will_be_wanted
from common.data import Batch, DataConfig
from common.errors import UserError
from common.inference import Controller, Frames, load_policy
from common.vision import VisionConfig

SCRIPTS = [train_naive_fm, train_vfp, train_cfg_vqvae, train_vfp_moe]
HISTORY = ("--image-history", "2", "--image-stride", "2")
FRAMES, STRIDE = 2, 2
pytestmark = pytest.mark.usefixtures("accelerate_reset")


@pytest.fixture(scope="module")
def run_dir(tiny, tmp_path_factory):
    return train(train_vfp, tiny, tmp_path_factory.mktemp("history") / "run", *HISTORY, "--steps", 1)


@pytest.fixture
def policy(run_dir):
    policy = load_policy(run_dir, device="cpu", seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # an untrained decoder ignores the observation
        for parameter in policy.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


def looks(policy):
    """Counts the frames that each backbone encodes."""
    seen = {name: [] for name, child in policy.model.named_children() if name.endswith("_backbone")}
    for name, numbers in seen.items():
        hook = lambda _, images, out, numbers=numbers: numbers.append(len(images[0]))  # noqa: E731
        getattr(policy.model, name).register_forward_hook(hook)
    return seen


# Input of backbones


@pytest.mark.parametrize("alone", [True, False], ids=["one for all", "one each"])
def test_views_are_ordered_and_the_same_from_features(alone):
    torch.manual_seed(0)
    backbones = [vision.ConvBackbone((16, 16)) for _ in range(1 if alone else 2)]
    images = torch.rand(3, 2, 4, 3, 16, 16)  # (B, N, F, ...)
    views = vision.look(backbones, images)
    for number, (camera, frame) in enumerate([(n, f) for n in range(2) for f in (3, 2, 1, 0)]):
        expected = backbones[0 if alone else camera](images[:, camera, frame])
        torch.testing.assert_close(views[number], expected)
    kept = torch.stack([vision.features(backbones, images[:, :, f]) for f in range(4)], dim=2)
    for view, same in zip(views, vision.look(backbones, kept), strict=True):
        torch.testing.assert_close(view, same)
    torch.testing.assert_close(vision.look(backbones, images[:, :, 3])[1], views[4])  # without a history


def test_all_frames_of_a_camera_are_augmented_alike():
    config = VisionConfig(aug_shift=0.2, aug_rotate=5, aug_color=0.4, aug_blur=1)
    frames = torch.randint(256, (2, 2, 1, 3, 16, 16), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    several = vision.augment(frames.expand(-1, -1, 3, -1, -1, -1), config, generator)
    assert torch.equal(several, several[:, :, :1].expand_as(several))
    generator.manual_seed(0)
    assert torch.equal(several[:, :, 0], vision.augment(frames[:, :, 0], config, generator))
    same = frames[:1, :1].expand(2, 2, -1, -1, -1, -1)
    assert not torch.equal(*vision.augment(same, config)[:, 0, 0])


# Frames kept during an episode


def kept(steps, history, stride):
    """Frames whose value is the number of their step."""
    frames = Frames(SimpleNamespace(image_history=history, image_stride=stride))
    for step in steps:
        frames.keep(step, torch.full((1, 1), float(step)))
    return frames


@pytest.mark.parametrize(
    ("steps", "stride", "expected"),
    [
        ([0], 2, [0, 0, 0]),  # repeats the first frame
        ([0, 1], 2, [0, 0, 1]),
        (range(6), 2, [1, 3, 5]),
        ([0, 4, 8, 12], 4, [4, 8, 12]),
        ([0, 3.9, 8.2, 12], 4, [3.9, 8.2, 12]),  # measured times
        ([0, 1, 2, 3, 3, 4], 1, [2, 3, 4]),  # a repeated step
        ([0, 7, 8, 15, 16, 17], 8, [0, 8, 17]),  # the nearest to 1 and 9
    ],
)
def test_the_frame_nearest_to_each_time_is_seen(steps, stride, expected):
    assert kept(steps, 3, stride).recall().flatten().tolist() == pytest.approx(expected)


def test_frames_that_nobody_gave_are_said_once():
    frames = kept([0, 8], 2, 1)
    with pytest.warns(UserWarning, match="1 control steps apart, and the nearest given one is 1 steps"):
        assert frames.recall().flatten().tolist() == [8, 8]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames.recall()
        kept([0, 4, 8], 2, 8).recall()


def test_no_more_is_kept_than_can_be_wanted():
    assert [step for step, _ in kept(range(100), 3, 4).kept] == list(range(91, 100))
    with pytest.raises(ValueError, match="step 3 comes after step 4: reset"):
        kept([4, 3], 2, 1)


@pytest.mark.parametrize("period", [1, 3, 8])
@pytest.mark.parametrize("stride", [1, 2, 5, 8, 12])
def test_what_later_chunks_want_is_known_ahead(stride, period):
    chunks = range(0, 100, period)
    for now in range(1, 40):
        ahead = min(chunk for chunk in chunks if chunk > now) - now
        expected = any(chunk - stride * back == now for chunk in chunks for back in (1, 2) if chunk > now)
        assert will_be_wanted(3, stride, ahead, period) == expected
        assert not will_be_wanted(1, stride, ahead, period)


# Acting


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_kept_features_give_the_chunk_of_all_frames(tiny, tmp_path, script):
    """Each frame is encoded only once."""
    run = train(script, tiny, tmp_path / "run", *HISTORY, "--steps", 2, "--eval-every", 2)
    policy = load_policy(run, device="cpu", seed=0)
    seen = [observation(policy, seed=step) for step in range(4)]
    for step in range(3):
        policy.watch(seen[step] | {"step": step})
    chunk = policy.act(seen[3] | {"step": 3})
    images = torch.stack([policy._images(seen[step]["images"]) for step in (1, 3)], dim=1)[None]
    policy.reset(0)
    whole = policy.sample(images, torch.from_numpy(seen[3]["state"])[None, None])[0]
    torch.testing.assert_close(torch.from_numpy(chunk), whole, rtol=1e-4, atol=1e-4)


def test_each_frame_is_looked_at_once(policy):
    seen = looks(policy)
    for step in (0, 2, 4):
        policy.act(observation(policy, seed=step) | {"step": step})
    assert list(seen.values()) == [[1, 1, 1]] * 3


def test_a_reset_forgets_what_was_seen_and_earlier_frames_matter(policy):
    first, second = (observation(policy, seed=seed) for seed in (1, 2))
    alone = policy.act(second | {"step": 0})
    policy.reset(0)
    policy.act(second | {"step": 7})
    policy.reset(0)
    np.testing.assert_array_equal(policy.act(second | {"step": 0}), alone)
    policy.reset(0)
    policy.watch(first | {"step": 0})
    assert np.abs(policy.act(second | {"step": 2}) - alone).max() > 1e-3
    other = policy.fork()
    other.reset(0)
    np.testing.assert_array_equal(other.act(second | {"step": 0}), alone)


@pytest.mark.parametrize("step", [{}, {"step": None}, {"step": "3"}, {"step": np.nan}])
def test_a_policy_with_a_history_needs_the_step(policy, step):
    with pytest.raises(
        ValueError, match="sees 2 frames of each camera, 2 control steps apart: give the step"
    ):
        policy.act(observation(policy) | step)


@pytest.mark.parametrize(("execute", "expected"), [(3, [0, 1, 3, 4, 6]), (2, [0, 2, 4, 6])])
def test_pictures_are_taken_when_a_chunk_will_need_them(policy, execute, expected):
    steps = []
    for step in range(8):

        def images(step=step):
            steps.append(step)
            return observation(policy, seed=step)["images"]

        policy.next_action({"images": images, "state": np.zeros(3)}, execute_steps=execute)
    assert steps == [*expected, 7][: len(expected) + (execute == 3)]


def test_episodes_that_act_together_keep_their_own_frames(policy):
    """Also when one of them has ended, and when the robot waits for its chunk."""
    for options in ({"execute_steps": 3}, {"delay": 1, "join": "blocking"}):
        together, alone = Controller(policy, [5, 6, 7], **options), [Controller(policy, [7], **options)]
        for step in range(9):
            which = np.arange(3) if step < 4 else np.array([1, 2])
            look = lambda which, step=step: [  # noqa: E731
                observation(policy, seed=100 * e + step)["images"] for e in which
            ]
            actions = together.next_actions(which, np.zeros((len(which), 3), np.float32), look)
            one = alone[0].next_actions(
                np.array([0]), np.zeros((1, 3), np.float32), lambda _, look=look: look([2])
            )
            np.testing.assert_allclose(actions[-1], one[0], rtol=1e-3, atol=1e-4)


def test_a_client_has_the_server_watch(policy, run_dir):
    for name in ("msgpack", "websockets"):
        pytest.importorskip(name)
    import serve

    server = serve.Server(policy, serve.Config(run_dir))
    first, second = (observation(policy, seed=seed) for seed in (1, 2))
    policy.watch(first | {"step": 0})
    expected = policy.act(second | {"step": 2})
    policy.reset(0)
    pack = serve.wire.pack
    assert server.infer(pack(first | {"step": 0, "watch": True}), policy) == {"watched": True}
    np.testing.assert_array_equal(server.infer(pack(second | {"step": 2}), policy)["actions"], expected)
    for wrong in ({"watch": 1}, {"step": "x"}, {"step": [2]}, {"step": -1}):
        with pytest.raises(ValueError, match=r"watch is true|give the step|comes after"):
            server.infer(pack(second | wrong), policy)
    assert "the step and the state" in server.in_words()


ABOUT = {"fps": 20, "action_offset": 0, "action_rotations": None, "max_delay": 0}
NAMES = {"state_names": ("x", "y"), "action_names": ("x", "y")}


@pytest.mark.parametrize("rate", [20, 50])
@pytest.mark.parametrize(("stride", "expected"), [(1, [3, 7, 11]), (3, [1, 5, 9]), (4, []), (6, [2, 6, 10])])
def test_a_loop_knows_which_frames_its_next_chunks_want(rate, stride, expected):
    """Chunks at 0, 4, 8 and 12 control steps."""
    spec = SimpleNamespace(**ABOUT, **NAMES, image_history=2, image_stride=stride)
    plan = Plan(SimpleNamespace(horizon=16, spec=spec), rate, execute_steps=4)
    asked, watched = [], []
    for _ in range(round(13 * rate / 20)):
        if plan.due:
            asked.append(plan.now)
            plan.ask()
            plan.join(np.zeros((16, 2)))
        elif plan.watches:
            watched.append(plan.now)
        plan.next()
    period = 20 / rate
    assert asked == pytest.approx([0, 4, 8, 12])
    assert len(watched) == len(expected)
    assert all(0 <= now - wanted < period for now, wanted in zip(watched, expected, strict=True))


def test_a_loop_gives_the_step_of_what_it_sees():
    steps = {"act": [], "watch": []}

    def act(observation, prefix=None):
        steps["act"].append(observation["step"])
        return np.zeros((16, 2), np.float32)

    spec = SimpleNamespace(**ABOUT, **NAMES, image_history=2, image_stride=1)
    watch = lambda observation: steps["watch"].append(observation["step"])  # noqa: E731
    policy = SimpleNamespace(spec=spec, horizon=16, act=act, reset=lambda: None, watch=watch)
    nothing = lambda *_: None  # noqa: E731
    robot = SimpleNamespace(observe=lambda: {"images": {}, "state": np.zeros(2)}, send=nothing, reset=nothing)
    start = time.perf_counter()
    ControlLoop(policy, robot, rate=20, execute_steps=4).run(1)
    assert 0 <= steps["act"][0] < 20 * (time.perf_counter() - start)
    assert len(steps["act"]) >= 2
    assert steps["watch"]
    seen = sorted(steps["act"] + steps["watch"])
    assert seen[-1] > seen[0]


def test_a_policy_that_hangs_while_it_watches_is_blamed_not_the_robot():
    release, act = threading.Event(), lambda observation, prefix=None: np.zeros((16, 2), np.float32)
    spec = SimpleNamespace(**ABOUT, **NAMES, image_history=2, image_stride=1)
    nothing, watch = lambda *_: None, lambda observation: release.wait(2)
    policy = SimpleNamespace(spec=spec, horizon=16, act=act, reset=nothing, watch=watch)
    robot = SimpleNamespace(observe=lambda: {"images": {}, "state": np.zeros(2)}, send=nothing, reset=nothing)
    with pytest.raises(UserError, match="the policy has not answered for"):
        ControlLoop(policy, robot, rate=20, execute_steps=4, patience=0.7).run(5)
    release.set()


# Training


def test_without_a_history_the_network_and_its_draws_are_what_they_were(tiny):
    """Weights from a seed; by hand: an embedding and two projections for each camera."""
    config = parse(train_naive_fm.Config, tiny, "")
    spec = PolicySpec(("head", "left"), (32, 32), ("x", "y"), ("x", "y"), 10.0)
    shapes = {
        name: p.shape for name, p in train_naive_fm.Policy(config, spec).info_embedder.named_parameters()
    }
    assert shapes["camera_embedding"] == (2, 16)
    assert not any(name.startswith("tokens_in.2") for name in shapes)
    longer = PolicySpec(("head", "left"), (32, 32), ("x", "y"), ("x", "y"), 10.0, image_history=3)
    assert train_naive_fm.Policy(config, longer).info_embedder.camera_embedding.shape == (6, 16)


@pytest.mark.parametrize("frames", [1, 2])
def test_motion_can_be_seen_in_two_frames_alone(tiny, frames):
    """A bar moves right or left through the same places: one frame alone does not show the direction."""
    torch.manual_seed(0)
    flags = ["--horizon", "1", "--flow-samples", "4", "--sample-steps", "2", "--camera-dropout", "0"]
    config = parse(train_vfp.Config, [*tiny, *flags], "")
    spec = PolicySpec(("head",), (16, 16), ("x",), ("x",), 10.0, image_history=frames)
    policy = train_vfp.Policy(config, spec)
    places, way = torch.arange(4, 12).repeat(2), torch.tensor([-1, 1]).repeat_interleave(8)
    images = torch.zeros(16, 1, 2, 3, 16, 16, dtype=torch.uint8)
    for clip, (place, direction) in enumerate(zip(places.tolist(), way.tolist(), strict=True)):
        images[clip, 0, 0, :, :, place - 2 * direction] = 255
        images[clip, 0, 1, :, :, place] = 255
    images = images if frames == 2 else images[:, :, 1]
    zeros, never = torch.zeros(16, 1, 1), torch.zeros(16, 1, dtype=torch.bool)
    batch = Batch(images, zeros, way.view(16, 1, 1).float(), never, torch.arange(16))
    plain = SimpleNamespace(actions=lambda actions, _: actions, proprio=lambda proprio: proprio)
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    for _ in range(120):
        loss, _ = train_vfp.compute_loss(policy, batch, plain, config, train=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = torch.randn(8, 1, 1).repeat(2, 1, 1)
    chunk = train_vfp.sample_actions(policy.eval(), images, zeros, config, x_0=noise)
    right = (chunk.flatten().sign() == way).float().mean().item()
    assert right == 1.0 if frames == 2 else right == 0.5


def test_a_script_that_sees_one_frame_says_so(tiny, tmp_path, tiny_depth):
    with pytest.raises(UserError, match=r"train_vfp_depth.py sees one frame.*leave out --image-history"):
        train(train_vfp_depth, tiny, tmp_path / "run", *HISTORY, "--steps", 1)
    with pytest.raises(UserError, match=r"train_mi.py looks at single frames: leave out --image-history"):
        train_mi.main(train_mi.Config(data=DataConfig(image_history=2)))
    with pytest.raises(UserError, match="--image-stride needs --image-history"):
        DataConfig(image_stride=2)
