"""Policies with instructions: what the network gets, what a robot must send, text encoders."""

import json
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from arm_env import Arm
from hdf5_factory import make_hdf5
from lerobot_factory import make_dataset
from running import SMALL, interrupt_after, lines, train, weights
from test_scripts import SCRIPTS
from text_factory import KINDS, make_encoder

import evaluate
import train_mi
import train_naive_fm
import train_vfp_moe
from common import instructions
from common.checkpoint import PolicySpec
from common.config import parse
from common.data import ChunkDataset, DataConfig, demo, open_dataset
from common.data.demo_tasks import TasksSimulator
from common.errors import UserError
from common.inference import load_policy
from common.instructions import InstructionEmbedder, Instructions, TaskConfig, drop_some
from common.normalize import Normalizer
from common.text import TextEncoder

pytestmark = pytest.mark.usefixtures("accelerate_reset", "tiny_depth")
CAMERAS = {f"observation.images.cam_{name}": (32, 32) for name in ("head", "left", "right")}
TASKS = ("fold the towel", "open the box")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Eight short episodes, alternating between two tasks."""
    root = tmp_path_factory.mktemp("two") / "both"
    lengths = (12, 9, 15, 11, 8, 10, 9, 12)
    return make_dataset(root, lengths, CAMERAS, video=False, dims=(3, 3), names=None, tasks=TASKS)


@pytest.fixture
def told(tiny, two):
    return [*tiny, "--dataset", str(two)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("models") / "bert")


def seen(**more):
    """An observation of the small datasets."""
    images = dict.fromkeys(("head", "left", "right"), np.full((32, 32, 3), 90, np.uint8))
    return {"images": images, "state": np.array([3.0, 3.1, 3.2]), **more}


# The network


def test_learned_embeddings():
    module = InstructionEmbedder(Instructions(("a", "b", "c")), 6)
    out = module(torch.tensor([2, -1, 0]))
    assert out.shape == (3, 1, 6)
    assert torch.equal(out, torch.stack([module.table[2], module.none, module.table[0]]))


def test_vectors_of_a_text_encoder_are_centred_and_mapped():
    table = torch.randn(5, 3, 7) * 0.1 + 100 * torch.randn(7)
    one = InstructionEmbedder(Instructions(("a",), "some/model", shape=(1, 7), table=table[:1, :1]), 4)
    assert 10 < one.scale < 1000  # there is no spread, which could be the scale
    known = Instructions(tuple("abcde"), "some/model", shape=(3, 7), table=table)
    module = InstructionEmbedder(known, 4)
    mapped = (module.table - module._rows(module.centre, module.table)) / module.scale
    torch.testing.assert_close(mapped[:, -1].mean(0), torch.zeros(7), atol=1e-3, rtol=0)
    torch.testing.assert_close(mapped[:, :-1].mean((0, 1)), torch.zeros(7), atol=1e-3, rtol=0)
    assert mapped.square().mean().item() == pytest.approx(1, rel=1e-3)
    # a task's number and its vector give the same; NaN means no instruction
    rows = torch.stack([table[3], torch.full_like(table[0], torch.nan)])
    torch.testing.assert_close(module(torch.tensor([3, -1])), module(rows))
    torch.testing.assert_close(module(torch.tensor([-1]))[0], module.project(module.none)[[0, 0, 1]])
    longer = torch.randn(2, 6, 7)
    other = InstructionEmbedder(replace(known, sentences=("x", "y"), shape=(6, 7), table=longer), 4)
    other.load_state_dict(module.state_dict())  # with --init-from, sentences may be longer
    assert torch.equal(other.table, longer)
    assert torch.equal(other(rows), module(rows))


def test_a_share_of_samples_loses_its_instruction():
    task = torch.arange(20_000) % 7
    lost = drop_some(task, TaskConfig(task_dropout=0.3))
    assert (lost[lost >= 0] == task[lost >= 0]).all()
    assert (lost < 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    before = torch.get_rng_state()
    assert drop_some(None, TaskConfig()) is None
    assert drop_some(task, TaskConfig(task_dropout=0.0)) is task
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_an_encoder_nothing_differs_from_a_single_task(script, tiny, two, tmp_path):
    """The same numbers and images with one instruction, and with two that the policy does not get."""
    one = make_dataset(
        tmp_path / "one", (12, 9, 15, 11, 8, 10, 9, 12), CAMERAS, video=False, dims=(3, 3), names=None
    )
    flags = ("--steps", 2, "--eval-every", 2)
    first = train(script, [*tiny, "--dataset", str(one)], tmp_path / "a", *flags)
    second = train(script, [*tiny, "--dataset", str(two)], tmp_path / "b", *flags, "--task-encoder", "none")
    mine, reference = weights(first, 2), weights(second, 2)
    assert mine.keys() == reference.keys()
    assert all(torch.equal(mine[key], reference[key]) for key in mine)
    assert lines(first) == lines(second)
    assert lines(first, "val") == lines(second, "val")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_policy_is_told_and_resumes_exactly(script, told, tmp_path):
    flags = ("--steps", 4, "--save-every", 2, "--eval-every", 2, "--task-balance", 1)
    whole = train(script, told, tmp_path / "whole", *flags)
    part = interrupt_after(whole, 2, tmp_path / "part")
    train(script, [], None, "--resume", part)
    mine, reference = weights(part, 4), weights(whole, 4)
    assert all(torch.equal(mine[key], reference[key]) for key in reference)
    assert lines(part) == lines(whole)
    assert lines(part, "val") == lines(whole, "val")
    policy = load_policy(whole, device="cpu", seed=0)
    assert policy.spec.tasks.sentences == TASKS
    # An untrained velocity is always zero: give it nonzero weights.
    with torch.no_grad():
        decoder = policy.model.action_decoder
        torch.nn.init.normal_(decoder.velocity_out.weight)
        for block in (*getattr(decoder, "blocks", ()), *getattr(decoder, "experts", ())):
            torch.nn.init.normal_(block.modulation.weight, std=0.3)
    chunks = []
    for task in (TASKS[0], TASKS[1], " open  the box", None):
        policy.reset(0)
        chunks.append(policy.act(seen(task=task)))
    assert np.array_equal(chunks[1], chunks[2])
    different = [np.abs(chunks[i] - chunks[j]).max() for i, j in ((0, 1), (0, 3), (1, 3))]
    assert min(different) > 1e-4
    policy.reset(0)
    together = policy.act_batch([seen(task=TASKS[0]), seen(task=None)])
    assert together.shape == (2, 4, 3)


@pytest.mark.parametrize("script", [train_naive_fm, train_vfp_moe])
def test_a_policy_learns_to_do_what_it_is_told(script, told):
    """From the same observation, one instruction leads up and the other down."""
    flags = (*SMALL.get(script.__name__, "").split(), "--flow-samples", "4", "--task-dropout", "0.3")
    config = parse(script.Config, [*told, *flags], "")
    store = open_dataset(config.data)
    data = ChunkDataset(store, range(store.num_episodes), config.horizon, told=True)
    normalizer = Normalizer.fit(data)
    torch.manual_seed(0)
    policy = script.Policy(config, replace(PolicySpec.of(data), tasks=Instructions(TASKS, droppable=True)))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    task = torch.arange(8) % 2
    way = torch.where(task == 0, 1.0, -1.0)[:, None, None]  # normalized
    batch = data.__getitems__([0] * 8)
    actions = normalizer.unnormalize_actions(way.expand(batch.actions.shape), batch.proprio)
    batch = batch._replace(actions=actions, extras={"task": task})
    for _ in range(200):
        script.compute_loss(policy, batch, normalizer, config, train=True)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    seen, proprio = batch.images, normalizer.proprio(batch.proprio)
    for said, wanted in ((task, way), (1 - task, -way)):
        chunks = script.sample_actions(policy.eval(), seen, proprio, config, 4, task=said)
        assert (chunks - wanted).abs().mean() < 0.5
    unsure = torch.cat(
        [script.sample_actions(policy, seen, proprio, config, 4, task=torch.full((8,), -1)) for _ in range(8)]
    ).mean((1, 2))
    assert unsure.max() > 0.3  # without an instruction, sometimes one way, sometimes the other
    assert unsure.min() < -0.3


# A robot


@pytest.fixture(scope="module")
def run_dir(tiny, two, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "told"
    return train(train_naive_fm, [*tiny, "--dataset", str(two)], folder, "--steps", 1)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, 'the policy needs a task: it was trained on "fold the towel", "open the box"'),
        ({"task": "fold the towels"}, r'knows no task "fold the towels" \(did you mean fold the towel\?\)'),
        ({"task": "  "}, "must be a sentence"),
        ({"task": 3}, "must be a sentence"),
    ],
)
def test_what_a_robot_must_say(run_dir, more, words):
    with pytest.raises(ValueError, match=words):
        load_policy(run_dir, device="cpu").act(seen(**more))


def test_a_policy_that_never_lost_its_instruction_needs_one(told, tmp_path):
    run_dir = train(train_naive_fm, told, tmp_path / "run", "--steps", 1, "--task-dropout", 0)
    policy = load_policy(run_dir, device="cpu")
    assert policy.act(seen(task=TASKS[0])).shape == (4, 3)
    with pytest.raises(ValueError, match="the policy needs a task"):
        policy.act(seen(task=None))


def test_a_policy_of_one_task_needs_none(tiny, tmp_path):
    policy = load_policy(train(train_naive_fm, tiny, tmp_path / "run", "--steps", 1), device="cpu")
    assert policy.spec.tasks is None
    assert policy.act(seen()).shape == policy.act(seen(task="anything")).shape == (4, 3)


def test_another_task_takes_effect_at_once(run_dir):
    policy = load_policy(run_dir, device="cpu")
    said = []
    real = policy.act_batch
    policy.act_batch = lambda observations, *more: (
        said.append(observations[0]["task"]) or real(observations, *more)
    )
    for task in (TASKS[0], TASKS[1], TASKS[1], TASKS[1], TASKS[0]):
        policy.next_action(seen(task=task))
    assert said == [TASKS[0], TASKS[1], TASKS[1], TASKS[0]]  # the third was due: half a chunk is 2


def test_another_task_begins_without_earlier_states(told, tmp_path):
    """In training, an episode whose task changes is cut there."""
    folder = train(train_naive_fm, told, tmp_path / "run", "--steps", 1, "--proprio-history", 3)
    policy, states = load_policy(folder, device="cpu"), []
    real = policy.act_batch
    policy.act_batch = lambda observations, *more: (
        states.append(observations[0]["state"][:, 0].tolist()) or real(observations, *more)
    )
    for step, task in enumerate((TASKS[0], TASKS[0], TASKS[0], TASKS[1])):
        observation = seen(task=task)
        policy.next_action({**observation, "state": np.full_like(observation["state"], step)})
    assert states == [[0, 0, 0], [0, 1, 2], [3, 3, 3]]


# Text encoders


def test_frames_are_seen_with_the_instruction_in_mind(told, tmp_path):
    """Features of earlier frames are kept, and are those of the instruction that the robot has now."""
    folder = train(train_naive_fm, told, tmp_path / "run", "--steps", 1, "--image-history", 2)

    def chunk(before: str, now: str) -> np.ndarray:
        policy = load_policy(folder, device="cpu", seed=0)
        torch.manual_seed(0)
        for parameter in policy.model.parameters():  # an untrained network does not heed instructions
            torch.nn.init.normal_(parameter, std=0.1)
        policy.watch(seen(task=before, step=0))
        return policy.act(seen(task=now, step=1))

    same, other = chunk(TASKS[0], TASKS[0]), chunk(TASKS[1], TASKS[0])
    np.testing.assert_array_equal(same, other)  # the frame is the same, and seen as often
    assert not np.allclose(same, chunk(TASKS[1], TASKS[1]))
    with pytest.raises(ValueError, match="the policy needs a task"):
        load_policy(folder, device="cpu").watch({**seen(step=0)})


def test_a_backbone_fits_policies_of_one_task_and_of_several(told, tiny, tmp_path):
    one = train(train_naive_fm, tiny, tmp_path / "one", "--steps", 1)
    several = train(train_naive_fm, told, tmp_path / "several", "--steps", 1)
    flags = ("--steps", 1, "--lr", 0, "--ema-decay", 0)
    for data, source, name in ((told, one, "fine"), (tiny, several, "narrow")):
        folder = train(train_naive_fm, data, tmp_path / name, *flags, "--init-from", f"backbone={source}")
        loaded, given = (weights(run, 1) for run in (folder, source))
        names = [key for key in given if key.startswith("backbone")]
        assert names
        assert all(torch.equal(loaded[key], given[key]) for key in names)


@pytest.mark.parametrize("kind", KINDS)
def test_sentences_become_vectors(kind, tmp_path):
    encoder = TextEncoder(str(make_encoder(tmp_path / kind, kind)))
    sentences = ["fold the towel", "open the box now please", "fold"]
    pooled, words = encoder(sentences), encoder(sentences, None)
    assert pooled.shape == (3, 1, 16)
    assert words.shape == (3, 7, 16)  # five words, the end token, and the pooled sentence
    torch.testing.assert_close(words[:, -1:], pooled)
    torch.testing.assert_close(
        words[2, 2:], pooled[2].expand(5, -1)
    )  # its only tokens are "fold" and the end
    assert (words[2, 0] - words[2, 1]).abs().max() > 1e-3
    alone = encoder(["open the box now please"], 3)  # independent of the batch
    torch.testing.assert_close(alone[0, :3], words[1, :3], atol=1e-5, rtol=1e-4)
    assert (pooled[0] - pooled[1]).abs().max() > 1e-3


def test_mean_over_real_tokens_and_trained_poolers(tmp_path):
    bert = TextEncoder(str(make_encoder(tmp_path / "bert")))
    words = bert(["fold", "open the box"], None)
    torch.testing.assert_close(words[0, -1], words[0, :2].mean(0))
    clip = TextEncoder(str(make_encoder(tmp_path / "clip", "clip")))
    words = clip(["open the box"], None)
    torch.testing.assert_close(words[0, -1], words[0, -2])  # CLIP pools by taking the end token


@pytest.mark.parametrize("tokens", ["pooled", "all"])
def test_a_policy_that_reads(told, bert, tmp_path, tokens, monkeypatch, capsys):
    model = tmp_path / "bert"
    shutil.copytree(bert, model)
    flags = ("--steps", 2, "--save-every", 1, "--task-encoder", model, "--task-tokens", tokens)
    flags = (*flags, "--cache-dir", tmp_path / "cache")
    whole = train(train_vfp_moe, told, tmp_path / "run", *flags)
    # The second start finds the vectors next to the store.
    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "_load", lambda self: pytest.fail("encoded again"))
        again = train(train_vfp_moe, told, tmp_path / "again", *flags)
    assert all(torch.equal(weights(whole, 2)[key], value) for key, value in weights(again, 2).items())
    shutil.rmtree(model)
    # Neither resuming nor known sentences need the encoder.
    part = interrupt_after(whole, 1, tmp_path / "part")
    train(train_vfp_moe, [], None, "--resume", part)
    assert all(torch.equal(weights(whole, 2)[key], value) for key, value in weights(part, 2).items())
    capsys.readouterr()
    policy = load_policy(whole, device="cpu", seed=0)
    assert 'takes any instruction, and was trained on 2: "fold the towel"' in capsys.readouterr().out
    known = policy.act(seen(task=TASKS[0]))
    with pytest.raises(UserError, match=r"bert cannot be loaded .*: give its folder as text_encoder"):
        policy.act(seen(task="fold the box"))
    policy = load_policy(whole, device="cpu", seed=0, text_encoder=str(bert))
    assert np.array_equal(policy.act(seen(task=TASKS[0])), known)
    length = 1 if tokens == "pooled" else 5
    given = policy.told(["fold the box", TASKS[1], None, "fold the box"])
    assert given.shape == (4, length, 16)
    torch.testing.assert_close(given[1], policy.model.info_embedder.instruction.table[1])
    assert torch.equal(given[0], given[3])
    assert given[2].isnan().all()
    assert policy.act_batch([seen(task="fold the box"), seen(task=TASKS[1]), seen(task=None)]).shape[0] == 3
    other = make_encoder(tmp_path / "other", seed=1)
    policy = load_policy(whole, device="cpu", text_encoder=str(other))
    with pytest.raises(UserError, match="is not the text encoder that the policy was trained with"):
        policy.act(seen(task="fold the box"))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_an_encoder_is_another_one_if_any_of_its_files_differs(bert, tmp_path, file):
    copy = shutil.copytree(bert, tmp_path / "copy")
    assert TextEncoder(str(copy)).identity == TextEncoder(str(bert)).identity
    content = bytearray((copy / file).read_bytes())
    middle = len(content) // 2
    content[middle] ^= 1 if file == "model.safetensors" else 0
    (copy / file).write_bytes(content if file == "model.safetensors" else content + b"\n")
    assert TextEncoder(str(copy)).identity != TextEncoder(str(bert)).identity


def test_a_sentence_has_the_same_vectors_whatever_it_is_encoded_with(tmp_path):
    folder = make_encoder(tmp_path / "gpt", "gpt")  # pads on the left, with its end token
    encoder = TextEncoder(str(folder))
    words = encoder(["fold", "open the box now please"], None)
    torch.testing.assert_close(encoder(["fold"], 6), words[:1])


def test_an_encoder_that_loads_but_cannot_run_is_said(bert, monkeypatch):
    monkeypatch.setattr(TextEncoder, "_encode", lambda self, sentences: [][0])
    with pytest.raises(UserError, match=r"cannot be used .IndexError"):
        TextEncoder(str(bert))(["fold the towel"])


def test_the_spec_survives_its_file(two, bert, tmp_path):
    store = open_dataset(DataConfig((str(two),), cache_dir=tmp_path / "cache"))
    known = Instructions.of(store, TaskConfig(task_encoder=str(bert)))
    spec = PolicySpec(("head",), (4, 4), ("x",), ("dx",), 10.0, tasks=known)
    policy = tmp_path / "policy"
    policy.mkdir()
    settings = {"script": "x", "config": {}, "step": 0, "spec": spec.to_json()}
    (policy / "policy.json").write_text(json.dumps(settings))
    again = PolicySpec.load(tmp_path)
    assert again == spec
    # The vectors are among the weights.
    full, empty = InstructionEmbedder(known, 6), InstructionEmbedder(again.tasks, 6)
    assert not torch.equal(full.table, empty.table)
    empty.load_state_dict(full.state_dict())
    for task in (torch.tensor([1, 0, -1]), torch.randn(2, *known.shape)):
        assert torch.equal(empty(task), full(task))


def test_weights_of_policies_with_other_instructions():
    def learned(*sentences):
        return InstructionEmbedder(Instructions(sentences), 4)

    first, second = learned("fold", "open", "pour"), learned("close", "fold", "pour")
    own = second.table[0].detach().clone()
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.table, torch.stack([own, first.table[0], first.table[2]]))
    assert torch.equal(second.none, first.none)
    other = learned("fold", "open", "pour")
    other.load_state_dict(second.state_dict())  # names its own sentences, not those that it learned from
    assert torch.equal(other.table[[0, 2]], first.table[[0, 2]])
    old = {key: value for key, value in first.state_dict().items() if key != "names"}
    other.load_state_dict(old)
    assert torch.equal(other.table, first.table)

    def read(encoder, *sentences):
        given = torch.randn(len(sentences), 1, 5, generator=torch.Generator().manual_seed(len(sentences)))
        return InstructionEmbedder(Instructions(sentences, "x", True, (encoder,), (1, 5), given), 4)

    first, second = read("a", "fold", "open", "pour"), read("a", "close", "fold")
    own = second.table.clone()
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.table, own)
    sentence = torch.randn(1, 1, 5)
    assert torch.equal(second(sentence), first(sentence))  # in the coordinates of the projection
    for another in (read("b", "fold", "open", "pour"), learned("fold", "open", "pour")):
        with pytest.raises(RuntimeError, match="read by another text encoder"):
            another.load_state_dict(first.state_dict())


def test_training_further_on_one_of_several_tasks(told, tiny, tmp_path):
    several = train(train_naive_fm, told, tmp_path / "several", "--steps", 1)
    flags = ("--steps", 1, "--lr", 0, "--ema-decay", 0, "--task", TASKS[1], "--init-from", several)
    one = train(train_naive_fm, told, tmp_path / "one", *flags, "--task-encoder", "index")
    assert load_policy(one, device="cpu").spec.tasks.sentences == TASKS[1:]
    argv = [one, "--heldout-samples", 4, "--sample-steps", 1]
    evaluate.main(parse(evaluate.Config, [*map(str, argv)], "evaluate.py"))
    assert "misled" not in json.loads((one / "evaluation/results.json").read_text())["heldout"]
    table = "info_embedder.safetensors:instruction.table"
    assert torch.equal(weights(one, 1)[table], weights(several, 1)[table][1:])
    with pytest.raises(UserError, match="does not fit the component info_embedder"):
        train(train_naive_fm, told, tmp_path / "not", *flags)
    policy = load_policy(one, device="cpu", seed=0)
    alone, said = policy.act(seen()), load_policy(one, device="cpu", seed=0).act(seen(task=TASKS[1]))
    assert np.array_equal(alone, said)  # it knows one task: it need not be said


def test_the_instruction_of_rollouts_is_checked_before_training(told, tmp_path):
    flags = ("--steps", 1, "--rollout-every", 1, "--rollout-episodes", 1, "--env", "arm_env:make")
    untold = (*flags, "--task-encoder", "none", "--rollout-task", TASKS[1])
    with pytest.raises(UserError, match="--rollout-task: the policy will be told no instruction"):
        train(train_naive_fm, told, tmp_path / "run", *untold, "--max-steps", 4)
    with pytest.raises(UserError, match=r'the policy will not know "arm_env:make".*--rollout-task'):
        train(train_naive_fm, told, tmp_path / "run", *flags, "--max-steps", 4)
    assert not (tmp_path / "run").exists()
    train(train_naive_fm, told, tmp_path / "run", *flags, "--max-steps", 4, "--rollout-task", TASKS[1])
    assert [row["step"] for row in lines(tmp_path / "run", "val") if "rollout/success" in row] == [1]


def test_an_unknown_instruction_is_refused_before_anything_is_evaluated(run_dir):
    argv = [run_dir, "--env", "arm_env:make", "--max-steps", 4, "--episodes", 2]
    for said, more in (("arm_env:make", ()), ("wash up", ("--task", "wash up"))):
        with pytest.raises(UserError, match=f'--env arm_env:make: the policy knows no task "{said}"'):
            evaluate.main(parse(evaluate.Config, [*map(str, argv), *more], "evaluate.py"))
    assert not any((run_dir / "evaluation").iterdir())  # an earlier evaluation stays where it is


def test_all_first_instructions_of_an_environment_are_checked(run_dir, told, tmp_path, monkeypatch):
    said = property(lambda arm: "wash up" if arm.np_random_seed % 2 else TASKS[0])
    monkeypatch.setattr(Arm, "task_description", said, raising=False)
    acting = ["--env", "arm_env:make", "--max-steps", 4]
    argv = [run_dir, *acting, "--episodes", 2]
    with pytest.raises(UserError, match='--env arm_env:make: the policy knows no task "wash up"'):
        evaluate.main(parse(evaluate.Config, [*map(str, argv)], "evaluate.py"))
    assert not any((run_dir / "evaluation").iterdir())
    flags = ("--steps", 1, "--rollout-every", 1, "--rollout-episodes", 2, *acting)
    with pytest.raises(UserError, match=r'--rollout-every: the policy will not know "wash up"'):
        train(train_naive_fm, told, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_an_instruction_whose_episodes_are_all_held_out(told, tmp_path):
    data = make_dataset(tmp_path / "d", (9, 9, 9), CAMERAS, video=False, dims=(3, 3), names=None, tasks="abc")
    flags = (*told, "--dataset", str(data))
    with pytest.raises(UserError, match=r'every episode of "[abc]" is held out'):
        train(train_naive_fm, flags, tmp_path / "run", "--steps", 1)
    train(train_naive_fm, flags, tmp_path / "run", "--steps", 1, "--val-fraction", 0)


# Bad input


def test_what_cannot_be_told(tmp_path, monkeypatch):
    root = make_hdf5(tmp_path / "d", (4, 3, 5))
    options = {"cache_dir": tmp_path / "cache"}

    def state(number, said):
        with h5py.File(root / f"day_{number % 2}/episode_{number}.hdf5", "a") as file:
            file.attrs["task"] = said

    def known(encoder=None):
        return Instructions.of(open_dataset(DataConfig((str(root),), **options)), TaskConfig(encoder))

    assert known() is None
    with pytest.raises(UserError, match=r"--task-encoder index: .* states no instruction.*--task-key"):
        known("index")
    state(0, "fold")
    with pytest.raises(UserError, match=r"has 2 episodes without an instruction.*first is 1, which has none"):
        known()
    assert known("none") is None
    state(1, "fold")
    state(2, "fold")
    assert known() is None  # only one task
    assert known("index").sentences == ("fold",)
    state(2, np.bytes_("räume auf".encode("latin-1")))
    with pytest.raises(UserError, match='instruction "r\ufffdume auf" is not UTF-8 text'):
        known()
    state(2, "open")
    assert known().sentences == ("fold", "open")
    monkeypatch.setattr(instructions, "MOST_LEARNED", 1)
    with pytest.raises(UserError, match="has 2 different instructions, too many to learn each"):
        known()
    for encoder, why in ((tmp_path / "absent", "no such folder"), ("some/model", "there is no connection")):
        with pytest.raises(UserError, match=f"cannot be loaded .*{why}"):
            known(str(encoder))


def test_an_empty_instruction_is_named(tmp_path):
    root = make_dataset(tmp_path / "d", (4, 5, 6), video=False, tasks=("fold", "", "open"))
    store = open_dataset(DataConfig((str(root),), cache_dir=tmp_path / "cache"))
    with pytest.raises(UserError, match=r"1 episodes without .*first is 1, which has an empty one"):
        Instructions.of(store, TaskConfig())


def test_ten_thousand_sentences(tmp_path, bert, monkeypatch):
    root = make_dataset(tmp_path / "d", (4, 5), video=False)
    store = open_dataset(DataConfig((str(root),), cache_dir=tmp_path / "cache"))
    many = tuple(f"fold the towel {number}" for number in range(10_000))
    store = replace(
        store,
        episode_tasks=many,
        episode_indices=np.arange(10_000),
        episode_rows=np.zeros(10_000, np.int64),
        episode_starts=np.arange(10_001),
        state=np.zeros((10_000, 3), np.float32),
    )
    with pytest.raises(UserError, match="10000 different instructions, too many"):
        Instructions.of(store, TaskConfig())
    assert len(Instructions.of(store, TaskConfig(task_encoder=str(bert))).table) == 10_000


def test_weights_that_a_text_encoder_lacks(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_encoder(tmp_path / "bert")
    tensors = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if "attention" not in key}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"holds no weights for encoder.layer.0.attention"):
        TextEncoder(str(folder))(["fold"])


# Whole runs


def test_a_dataset_of_lerobot_goes_through_to_evaluation(tiny, tmp_path, capsys):
    root = demo.record(tmp_path / "table", demo.demonstrate(20, seed=0, kind=TasksSimulator))
    flags = ["--dataset", root, "--cache-dir", tmp_path / "cache", "--steps", 1, "--batch-size", 8]
    flags += ["--val-fraction", 0.2]
    run_dir = train(train_naive_fm, tiny, tmp_path / "run", *flags)
    argv = [run_dir, "--env", "demo-tasks", "--episodes", 4, "--sample-steps", 1, "--heldout-samples", 20]
    evaluate.main(parse(evaluate.Config, [*map(str, argv)], "evaluate.py"))
    results = json.loads((run_dir / "evaluation/results.json").read_text())
    assert set(results["closed_loop"]) == {"1", "grey", "mismatched", "misled"}
    each = results["closed_loop"]["1"]["tasks"]
    assert list(each) == sorted(TasksSimulator(4, 0).tasks)
    assert all(found["episodes"] == 1 for found in each.values())
    heldout = results["heldout"]
    total = sum(found["mae"] * found["steps"] for found in heldout["tasks"].values())
    assert sum(found["steps"] for found in heldout["tasks"].values()) == heldout["steps"] == 20
    assert total / 20 == pytest.approx(heldout["policy"]["mae"], rel=0.1)  # chunks differ in length
    assert "misled" in heldout
    said = capsys.readouterr().out
    assert f"of 1: {sorted(each)[0]}" in said
    assert "success, another task:" in said
    argv[2] = "demo"
    with pytest.raises(UserError, match=r"--env demo: the policy knows no task .*as --task or --rollout"):
        evaluate.main(parse(evaluate.Config, [*map(str, argv)], "evaluate.py"))


def test_datasets_with_different_instructions_train_together(tiny, tmp_path):
    roots = [
        make_dataset(tmp_path / name, (12, 9), CAMERAS, video=False, dims=(3, 3), names=None, tasks=(task,))
        for name, task in (("a", "fold"), ("b", "open"))
    ]
    flags = ("--dataset", *roots, "--cache-dir", tmp_path / "cache", "--steps", 1)
    run_dir = train(train_naive_fm, tiny, tmp_path / "run", *flags)
    assert load_policy(run_dir).spec.tasks.sentences == ("fold", "open")
    moved = roots[1].rename(tmp_path / "elsewhere")
    train(train_naive_fm, [], None, "--resume", run_dir, "--dataset", roots[0], moved, "--steps", 2)


def test_demonstrations_are_scored_within_their_task(tiny, two, tmp_path):
    flags = ("--dataset", two, "--steps", 1, "--backbone", "conv", "--neighbours", 1, "--best", 0.5)
    argv = [flag for flag in tiny if flag not in ("--decoder-layers", "--flow-samples", "--sample-steps")]
    argv = [*map(str, (*flags, "--cache-dir", tmp_path / "cache", "--log-every", 1, "--hang-timeout", 0))]
    argv += ["--batch-size", "4", "--d-model", "16", "--num-heads", "2"]
    run_dir = train(train_mi, argv, tmp_path / "run")
    chosen = json.loads((run_dir / "episodes_top50.json").read_text())["episodes"]
    assert len(chosen) == 4
    assert sorted(number % 2 for number in chosen) == [0, 0, 1, 1]  # half of each task
    with pytest.raises(UserError, match=r'4 episodes of ".*" are too few for 3 nearest neighbours'):
        train(train_mi, argv, tmp_path / "other", "--neighbours", 3)
