"""Chunks that begin with a given prefix, and robots that act while a chunk is computed."""

import dataclasses

import numpy as np
import pytest
import torch
from running import SMALL, lines, train
from test_inference import observation

import train_cfg_vqvae
import train_naive_fm
import train_vfp
import train_vfp_depth
import train_vfp_moe
from common import flow
from common.checkpoint import PolicySpec
from common.config import parse
from common.data import ChunkDataset, open_dataset
from common.data.rotation import Rotations
from common.errors import UserError
from common.inference import ENSEMBLE, Controller, load_policy
from common.normalize import Normalizer
from common.rollout import Episode, velocity_changes

SCRIPTS = [train_naive_fm, train_vfp, train_vfp_depth, train_cfg_vqvae, train_vfp_moe]
DELAYED = ("--max-delay", "2")
pytestmark = pytest.mark.usefixtures("accelerate_reset", "tiny_depth")


def prepared(script, tiny, *flags):
    """Configuration, an untrained policy, a batch and a normalizer."""
    config = parse(script.Config, [*tiny, *SMALL.get(script.__name__, "").split(), *DELAYED, *flags], "")
    store = open_dataset(config.data)
    data = ChunkDataset(store, range(store.num_episodes), config.horizon)
    torch.manual_seed(0)
    policy = script.Policy(config, PolicySpec.of(data))
    batch = data.__getitems__([0, 10, 20, 33])  # the last two have padding
    batch = script.with_depth(batch, policy) if script is train_vfp_depth else batch
    return config, policy, batch, Normalizer.fit(data)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_loss_is_over_the_actions_that_are_not_given(script, tiny):
    """An untrained network predicts zero velocity, so the loss can be computed by hand."""
    config, policy, batch, normalizer = prepared(script, tiny)
    x_1 = normalizer.actions(batch.actions, batch.proprio)
    x_0 = torch.randn_like(x_1)
    delay = torch.tensor([[0], [1], [2], [3]])
    given = torch.arange(4) < delay
    t = torch.where(given, 1.0, torch.tensor([[0.1], [0.4], [0.7], [0.2]]))
    _, metrics = script.compute_loss(policy, batch, normalizer, config, train=False, x_0=x_0, t=t)
    error = (x_1 - x_0)[~given & ~batch.is_pad]
    expected = error.abs().mean() if script is train_vfp_depth else error.square().mean()
    torch.testing.assert_close(metrics["loss/velocity"], expected)
    assert batch.is_pad.any()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flags", [(), ("--attention", "full", "--sample-method", "heun")], ids=str)
def test_sampled_chunks_begin_with_their_prefix_and_follow_it(script, tiny, flags):
    config, policy, batch, normalizer = prepared(script, tiny, *flags)
    for parameter in policy.action_decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    policy.eval()
    x_0, actions = torch.randn(2, 4, 4, 3)
    given = torch.arange(4) < torch.tensor([[0], [1], [2], [3]])
    seen = batch.images, normalizer.proprio(batch.proprio), config

    def sample(prefix, config=config):
        fixed = {"generator": torch.Generator().manual_seed(0), "x_0": x_0, "prefix": prefix}
        return script.sample_actions(policy, *seen[:2], config, **fixed)

    def differ(one, other):
        """Whether chunks that have a prefix differ after it."""
        return ((one - other).abs().masked_fill(given[..., None], 0).amax(dim=(1, 2))[1:] > 1e-4).all()

    chunks = sample(flow.Prefix(actions, given))
    assert torch.equal(chunks[given], actions[given])
    free = sample(None)
    torch.testing.assert_close(chunks[0], free[0])  # the first chunk has no prefix
    assert differ(chunks, free)
    other = sample(flow.Prefix(torch.where(given[..., None], actions + 1, torch.nan), given))
    assert torch.isfinite(other).all()  # values outside the prefix do not matter
    assert differ(other, chunks)
    if script is train_cfg_vqvae:
        guided = sample(flow.Prefix(actions, given), dataclasses.replace(config, guidance=3.0))
        assert torch.equal(guided[given], actions[given])
        assert not torch.allclose(guided[~given], chunks[~given])


@pytest.mark.parametrize("script", [train_cfg_vqvae, train_vfp_moe])
def test_the_latent_is_drawn_knowing_the_prefix(script, tiny):
    _, policy, batch, normalizer = prepared(script, tiny)
    for parameter in policy.prior.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    policy.eval()
    actions, given = torch.randn(4, 4, 3), torch.arange(4) < torch.tensor([[0], [1], [2], [2]])
    _, observation = policy.encode(batch.images / 255, normalizer.proprio(batch.proprio))
    free, told = policy.prior(observation), policy.prior(observation, flow.Prefix(actions, given))
    torch.testing.assert_close(told[0], free[0])
    assert ((told - free).abs().amax(dim=1)[1:] > 1e-3).all()
    noise = torch.where(given[..., None], actions, torch.nan)
    torch.testing.assert_close(policy.prior(observation, flow.Prefix(noise, given)), told)
    later = flow.Prefix(torch.where(given[..., None], actions + 1, actions), given)
    assert ((policy.prior(observation, later) - told).abs().amax(dim=1)[1:] > 1e-3).all()


@pytest.mark.parametrize("script", [train_cfg_vqvae, train_vfp_moe])
def test_the_prior_learns_from_the_prefix_of_a_draw(script, tiny):
    config, policy, batch, normalizer = prepared(script, tiny)
    seen, forward = [], policy.prior.forward
    policy.prior.forward = lambda observation, prefix=None: (
        seen.append(prefix) or forward(observation, prefix)
    )
    x_1 = normalizer.actions(batch.actions, batch.proprio)
    x_0, t = torch.randn_like(x_1).repeat_interleave(2, dim=0), torch.full((8, 4), 0.3)
    t[1, :2] = t[3, :1] = t[4, :2] = 1.0  # the last draw of samples 0 and 1, the first of 2
    script.compute_loss(policy, batch, normalizer, config, train=True, x_0=x_0, t=t)
    assert seen[0].given.sum(dim=1).tolist() == [2, 1, 0, 0]
    torch.testing.assert_close(seen[0].actions, x_1)
    script.compute_loss(policy, batch, normalizer, config, train=True, x_0=x_0, t=torch.full((8,), 0.3))
    assert seen[1] is None


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_with_prefixes_reaches_every_weight_and_is_known_to_the_policy(script, tiny, tmp_path):
    config, policy, batch, normalizer = prepared(script, tiny)
    loss, _ = script.compute_loss(policy, batch, normalizer, config, train=True)
    loss.backward()
    without = [name for name, parameter in policy.named_parameters() if parameter.grad is None]
    assert all(name.startswith(("latent.posterior_average.", "depth_backbone.")) for name in without)
    run_dir = train(script, tiny, tmp_path / "run", "--steps", 2, "--eval-every", 2, *DELAYED)
    assert load_policy(run_dir).spec.max_delay == 2
    assert np.isfinite(lines(run_dir)[-1]["loss"])


def test_a_mean_over_processes_divides_by_what_is_predicted_on_average(tiny, tmp_path, monkeypatch):
    counts = []
    whole = train_naive_fm.compute_loss

    def compute_loss(policy, batch, *rest, count, **more):
        counts.append((count.item(), (~batch.is_pad).float() @ torch.tensor([5 / 6, 11 / 12, 1, 1])))
        return whole(policy, batch, *rest, count=count, **more)

    monkeypatch.setattr(train_naive_fm, "compute_loss", compute_loss)
    train(train_naive_fm, tiny, tmp_path / "run", "--steps", 3, "--val-fraction", 0, *DELAYED)
    for count, expected in counts:
        assert count == pytest.approx(expected.sum().item())
    assert len(counts) == 3


def test_a_prefix_leaves_something_to_predict(tiny, tmp_path):
    with pytest.raises(UserError, match="--max-delay 4 leaves nothing of a chunk of 4 actions"):
        train(train_vfp, tiny, tmp_path / "run", "--steps", 1, "--max-delay", 4)
    with pytest.raises(UserError, match="--max-delay without effect: with --prefix-share 0"):
        train(train_vfp, tiny, tmp_path / "run", "--steps", 1, *DELAYED, "--prefix-share", 0)
    assert not (tmp_path / "run").exists()


# Acting


@pytest.fixture(scope="module")
def run_dir(tiny, tmp_path_factory):
    return train(train_vfp, tiny, tmp_path_factory.mktemp("runs") / "run", "--steps", 2, *DELAYED)


@pytest.fixture
def policy(run_dir):
    return load_policy(run_dir, device="cpu", seed=0)


def test_a_policy_continues_what_it_is_given(policy):
    seen, rng = observation(policy), np.random.default_rng(0)
    free = policy.act(seen)
    prefixes = [rng.normal(size=(d, 3)).astype(np.float32) for d in (2, 1, 0)]
    for prefix in prefixes:
        policy.reset(0)
        chunk = policy.act(seen, prefix=prefix)
        assert np.array_equal(chunk[: len(prefix)], prefix)
        assert np.array_equal(chunk, free) == (not len(prefix))
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    together = policy.act_batch([seen] * 4, generators=generators, prefixes=[*prefixes, None])
    for seed, (chunk, prefix) in enumerate(zip(together, [*prefixes, None], strict=True)):
        one = [torch.Generator().manual_seed(seed)]
        alone = policy.act_batch([seen], generators=one, prefixes=[prefix])[0]
        np.testing.assert_allclose(chunk, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        (np.zeros((3, 3)), r"3 actions, and the policy was trained with at most 2 \(--max-delay\)"),
        (np.zeros(3), r"shape \(d, 3\), got \(3,\)"),
        (np.zeros((1, 4)), r"shape \(d, 3\), got \(1, 4\)"),
        (np.full((1, 3), np.nan), "NaN"),
    ],
)
def test_prefixes_that_the_policy_cannot_continue_are_refused(policy, prefix, words):
    with pytest.raises(ValueError, match=words):
        policy.act(observation(policy), prefix=prefix)


def test_a_policy_that_was_trained_without_takes_no_prefix(policy):
    policy.spec = dataclasses.replace(policy.spec, max_delay=0)
    with pytest.raises(ValueError, match=r"was trained with none \(train it with --max-delay\)"):
        policy.act(observation(policy), prefix=np.zeros((1, 3)))
    with pytest.raises(UserError, match=r"needs a prefix of 1 actions, .* at most 0: train .* --max-delay"):
        Controller(policy, 1, delay=1, join="prefix")


def test_a_relative_prefix_is_anchored_to_the_present_state(tiny, tmp_path, monkeypatch):
    """It gives the same actions in recorded units, whatever the state they were sampled at."""
    flags = ("--relative-actions", "--steps", 1, *DELAYED)
    policy = load_policy(train(train_vfp, tiny, tmp_path / "run", *flags), device="cpu")
    normalizer, asked, sample = policy.normalizer, [], train_vfp.sample_actions
    monkeypatch.setattr(
        train_vfp, "sample_actions", lambda *a, **more: asked.append(more["prefix"]) or sample(*a, **more)
    )
    seen = observation(policy)
    prefix = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    for state in (np.array([1, 1, 1], np.float32), np.array([-3, 0, 2], np.float32)):
        chunk = policy.act({**seen, "state": state}, prefix=prefix)
        assert np.array_equal(chunk[:2], prefix)
        scale, offset = normalizer.action_scale.numpy(), normalizer.action_offset.numpy()
        expected = (prefix - state - offset) / scale
        np.testing.assert_allclose(asked[-1].actions[0, :2], expected, rtol=1e-5, atol=1e-6)


def test_rotations_continue_the_numbers_of_the_prefix(policy, monkeypatch):
    rotations = Rotations("euler", (0,), ("roll", "pitch", "yaw"))
    roll = np.linspace(2.9, 3.3, policy.horizon)[:, None].astype(np.float32)
    chunk = np.concatenate([roll, 0 * roll, 0 * roll], 1)
    monkeypatch.setattr(policy, "spec", dataclasses.replace(policy.spec, action_rotations=rotations))
    monkeypatch.setattr(policy, "_prefix", lambda given: None)
    monkeypatch.setattr(policy, "sample", lambda *_: torch.from_numpy(rotations.encode(chunk))[None])
    turn = np.array([2 * np.pi, 0, 0], np.float32)
    for prefix in (chunk[:2], chunk[:2] - turn):
        expected = chunk + (prefix[0] - chunk[0])
        np.testing.assert_allclose(policy.act(observation(policy), prefix=prefix), expected, atol=1e-5)


# Acting while a chunk is computed


class Numbered:
    """Returns chunks whose actions encode the number of the chunk and of the action."""

    horizon, state_dim, device = 8, 1, torch.device("cpu")

    def __init__(self, offset=0, max_delay=0):
        self.spec = PolicySpec(("top",), (4, 4), ("x",), ("a",), 10.0, action_offset=offset)
        self.spec = dataclasses.replace(self.spec, max_delay=max_delay)
        self.sampled, self.prefixes = [], []

    def act_batch(self, observations, sample_steps, clip, generators, prefixes=None):
        chunk = 100 * len(self.sampled) + np.arange(8, dtype=np.float32)
        self.sampled.append([o["state"][-1, 0] for o in observations])
        self.prefixes.append(prefixes)
        return np.tile(chunk[:, None], (len(observations), 1, 1))


def acted(policy, steps, **options):
    """Actions of an episode whose state counts steps, the chunk of each, and the states of the chunks."""
    control = Controller(policy, [0], **options)
    actions, sources = [], []
    for step in range(steps):
        state = np.array([[step]], np.float32)
        actions.append(control.next_actions(np.array([0]), state, lambda which: [{}])[0, 0].item())
        sources.append(control.source)
    return actions, sources, [states[0] for states in policy.sampled]


def test_without_a_delay_all_ways_of_joining_are_the_same():
    expected = [0, 1, 2, 3, 100, 101, 102, 103, 200]
    for join in ("blocking", "naive", "prefix"):
        actions, sources, sampled = acted(Numbered(), 9, join=join)
        assert actions == expected
        assert sources == [0] * 4 + [1] * 4 + [2]
        assert sampled == [0, 4, 8]


def test_a_robot_that_blocks_holds_its_last_action():
    actions, sources, sampled = acted(Numbered(), 14, delay=2, join="blocking")
    assert actions == [0, 1, 2, 3, 3, 3, 100, 101, 102, 103, 103, 103, 200, 201]
    assert sources == [0, 0, 0, 0, None, None, 1, 1, 1, 1, None, None, 2, 2]
    assert sampled == [0, 4, 10]


def test_a_chunk_that_arrives_late_is_joined_where_it_stands():
    policy = Numbered()
    actions, sources, sampled = acted(policy, 14, delay=2, join="naive", execute_steps=4)
    assert actions == [0, 1, 2, 3, 4, 5, 102, 103, 104, 105, 202, 203, 204, 205]
    assert sources == [0] * 6 + [1] * 4 + [2] * 4
    assert sampled == [0, 4, 8, 12]
    assert policy.prefixes == [None] * 4


def test_a_chunk_is_told_what_is_executed_until_it_arrives():
    policy = Numbered(max_delay=3)
    actions, _, sampled = acted(policy, 12, delay=3, join="prefix", execute_steps=4)
    assert actions == [0, 1, 2, 3, 4, 5, 6, 103, 104, 105, 106, 203]
    assert sampled == [0, 4, 8]
    assert policy.prefixes[0] is None
    assert policy.prefixes[1][0].tolist() == [[4], [5], [6]]
    assert policy.prefixes[2][0].tolist() == [[104], [105], [106]]


def test_of_chunks_that_begin_later_less_is_given():
    """With an action offset of 1, the chunk covers only two of the three steps until it arrives."""
    policy = Numbered(offset=1, max_delay=2)
    actions, sources, sampled = acted(policy, 12, delay=3, join="prefix", execute_steps=4)
    assert actions == [0, 0, 1, 2, 3, 4, 5, 102, 103, 104, 105, 202]
    assert sources == [None] + [0] * 6 + [1] * 4 + [2]
    assert sampled == [0, 4, 8]
    assert policy.prefixes[1][0].tolist() == [[4], [5]]
    policy = Numbered(offset=3)
    acted(policy, 12, delay=2, join="prefix", execute_steps=4)
    assert [p and len(p[0]) for p in policy.prefixes] == [None, 0, 0]


def test_ensembles_take_in_what_has_arrived():
    actions, sources, sampled = acted(Numbered(), 6, delay=2, join="ensemble")
    assert sampled == [0, 2, 4]
    assert sources == [0, 0, 0, 0, 1, 1]
    weights = np.exp(-ENSEMBLE * np.arange(2))
    mean = [np.average([4 + i, 102 + i], weights=weights) for i in range(2)]
    assert actions == pytest.approx([0, 1, 2, 3, *mean])


@pytest.mark.parametrize(
    ("delay", "asked"), [(0, [0, 4, 8]), (1, [0, 3, 6, 9]), (2, [0, 2, 4, 6, 8]), (3, [0, 3, 6, 9])]
)
def test_by_default_half_of_a_chunk_is_executed_with_what_the_delay_takes(delay, asked):
    for join in ("naive", "prefix"):
        assert acted(Numbered(max_delay=3), 10, delay=delay, join=join)[2] == asked


@pytest.mark.parametrize("join", ["naive", "ensemble", "prefix"])
def test_chunks_must_last_until_the_next_arrives(join):
    actions, _, sampled = acted(Numbered(max_delay=4), 13, delay=4, join=join)
    assert sampled == [0, 4, 8, 12]
    assert actions[:8] == list(range(8))
    with pytest.raises(UserError, match="Chunks of 8 actions are too short for a delay of 5 steps"):
        acted(Numbered(max_delay=5), 1, delay=5, join=join)
    with pytest.raises(ValueError, match=r"execute_steps must lie in 3..5, got 2"):
        acted(Numbered(max_delay=4), 1, delay=3, join=join, execute_steps=2)
    acted(Numbered(), 20, delay=9, join="blocking")  # the robot waits


def test_velocity_changes_where_chunks_join_and_inside_them():
    """Velocity 1 in the first chunk, a jump by 5, then velocity 2: in units of 2, in one of two axes."""
    actions = [[0, 7], [2, 7], [4, 7], [14, 7], [18, 7], [22, 7], [26, 7]]
    episode = Episode(0, 10.0, steps=7, actions=[np.array(a, np.float32) for a in actions])
    episode.sources = [0, 0, 0, 1, 1, 1, 1]
    found = velocity_changes([episode, Episode(1, 10.0, steps=1)], np.array([2, 1]))
    assert found["seam"]["mean"] == pytest.approx((4 + 3) / 2 / 2**0.5)
    assert found["inside"] == {"mean": 0, "p99": 0}
    # A waiting robot: stops and starts count as seams, the wait between them does not.
    actions = [[0], [1], [2], [2], [2], [2], [3], [4]]
    waits = Episode(0, 10.0, steps=8, actions=[np.array(a, np.float32) for a in actions])
    waits.sources = [0, 0, 0, None, None, None, 1, 1]
    found = velocity_changes([waits], np.array([1]))
    assert found["seam"]["mean"] == pytest.approx((1 + 0 + 1 + 0) / 4)
    assert found["inside"]["mean"] == 0
    waits.sources = [0, 1, 2, 3, 4, 5, 6, 7]
    assert velocity_changes([waits], np.array([1]))["inside"] == {"mean": None, "p99": None}
