"""A trained policy for a robot: camera images and joint states in, actions in recorded units out.

policy = load_policy("runs/vfp-20260301-101500")    # or an exported one: a folder, or "user/name" on the hub
chunk = policy.act({"images": {"head": rgb, "left": rgb, "right": rgb}, "state": joints})    # (T, A)

A policy trained on several tasks also needs the "task", as in {"task": "fold the towel", ...}.
"""

import copy
import importlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import exported, flow, vision
from common.checkpoint import PolicySpec, find, load_components, read_settings, refuse_damaged
from common.config import from_dict
from common.console import say
from common.control import blend, will_be_wanted
from common.data.cameras import closest
from common.data.frames import resize_rgb
from common.data.source import spaced
from common.data.tasks import listed
from common.errors import UserError
from common.normalize import Normalizer, scale_offset
from common.text import TextEncoder
from common.transformer import InfoEmbedder

ROOT = Path(__file__).resolve().parents[1]
ALIKE = {"no": 0.01, "bf16": 0.1}
"""How far a compiled policy's actions may be from its own uncompiled, normalized, by precision."""
ENSEMBLE = 0.01  # decay of the weights in temporal ensembling, as in ACT
Join = Literal["blocking", "naive", "ensemble", "prefix"]
"""What the robot does while a chunk is computed, and how the chunk joins: see `Controller`."""
KEPT_SENTENCES = 1000  # new ones, whose vectors are kept
FAR = 3.0  # standard deviations outside the recorded range: the policy knows nothing about such states


class Blank(NamedTuple):
    """A policy without its weights."""

    model: nn.Module
    config: Any
    spec: PolicySpec
    script: ModuleType


def load_policy(
    run: str | Path,
    checkpoint: str = "last",
    device: str | torch.device | None = None,
    seed: int | None = None,
    compile: bool = False,
    precision: Literal["no", "bf16"] = "no",
    text_encoder: str | None = None,
) -> "RobotPolicy":
    """Load a policy, ready to act.

    Args:
        run: run folder, or what `lerobot_policy_flow.export` wrote: a folder, or its name on the hub.
        checkpoint: of a run, `last` or the number of a saved step.
        device: where to compute. Default: the accelerator if there is one, else the CPU.
        seed: makes sampled actions repeatable; None draws new noise on every start.
        compile: compile the components, and the whole integration as one graph, with torch.compile: loading
            takes minutes, and so does the first chunk of each other batch size. If compiling fails, or
            compiled code computes other actions, prints a warning and runs the policy without it.
        precision: `bf16` computes in half precision, which pays off on a processor with bf16 instructions.
        text_encoder: where the text encoder of the instructions is now, if it has moved; it is loaded only
            for sentences that the policy was not trained on.
    """
    if path := exported.find(run):
        if checkpoint != "last":
            raise UserError(f"{run} is exported, and holds a single step: leave out the checkpoint.")
        found = exported.read(path)
        settings, blank = found.settings, build(found.settings, run)
        normalizer = fill(blank, found.weights, found.statistics, path)
    else:
        path = find(Path(run), checkpoint)
        refuse_damaged(path, "policy/")
        settings = read_settings(path)
        blank = build(settings, run, PolicySpec.load(path))
        load_components(blank.model, path / "policy")
        normalizer = Normalizer.load(path / "policy" / "stats.safetensors", blank.config.normalization)
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    policy = RobotPolicy(blank.model, normalizer, *blank[1:], torch.device(device), seed)
    policy.checkpoint, policy.trained_steps, policy.precision = path, settings["step"], precision
    if compile:
        policy.compile()
    tasks = blank.spec.tasks
    if tasks is not None and tasks.encoder != "index":
        policy.text_encoder = text_encoder or policy.text_encoder
        known = listed(tasks.sentences)
        say(f"{run} takes any instruction, and was trained on {len(tasks.sentences)}: {known}")
    return policy


def build(settings: dict, source: str | Path, spec: PolicySpec | None = None) -> Blank:
    """The policy that a `policy.json` describes; `source` is what messages call it."""
    spec = spec or PolicySpec.from_json(settings["spec"])
    module = load_script(settings["script"])
    if not hasattr(module, "sample_actions"):
        raise UserError(
            f"{source} was trained by {settings['script']}, which trains no policy: it cannot act."
        )
    config = from_dict(module.Config, settings["config"])
    return Blank(module.Policy(config, spec, pretrained=False), config, spec, module)


def fill(
    blank: Blank, weights: dict[str, Tensor], statistics: dict[str, Tensor], source: str | Path
) -> Normalizer:
    """Load an exported policy's weights, whose names and shapes must match; returns its statistics."""
    try:
        blank.model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"The weights in {source} do not fit their network ({reason}): export the run again, with the "
            f"script that trained it."
        ) from None
    try:
        return Normalizer.of_tensors(statistics, blank.config.normalization)
    except KeyError as error:
        raise UserError(f"{source} lacks the statistics {error}: export the run again.") from None


def load_script(name: str) -> ModuleType:
    """Import the script that a checkpoint names: a `train_*.py` next to `common/` or in `examples/`."""
    scripts = {path.name: path.relative_to(ROOT) for path in ROOT.glob("examples/train_*.py")}
    scripts |= {path.name: path.relative_to(ROOT) for path in ROOT.glob("train_*.py")}
    if name not in scripts:
        there = ", ".join(sorted(scripts))
        raise UserError(f"The policy was trained by {name!r}, which is not in {ROOT}; there are {there}.")
    # Import it from where `common` is: a distribution has both inside a package.
    place = ".".join(scripts[name].with_suffix("").parts)
    return importlib.import_module(f"{__package__.removesuffix('common')}{place}")


@cache  # loading it takes seconds
def _text_encoder(name: str) -> TextEncoder:
    """The text encoder for new instructions; by the name that training knew, unless that is replaced."""
    return TextEncoder(name, "give its folder as text_encoder, or an instruction of the policy's training")


class Frames:
    """Features of one episode's frames, kept as long as an observation may need them.

    An observation needs frames that are `image_stride` control steps apart, the current one last. For each,
    it gets the kept frame that is nearest in time; before an episode's first frame, that first frame.
    """

    def __init__(self, spec: PolicySpec):
        self.back = [spec.image_stride * i for i in reversed(range(spec.image_history))]  # control steps
        self.kept: list[tuple[float, Tensor]] = []  # control step, and (N, W)
        self.task: object = ...
        self._said = False

    def keep(self, step: float, features: Tensor, task: object = ...) -> None:
        """Keep the frame of a control step, (N, W); forget those that were seen under another instruction."""
        if task != self.task:
            self.kept, self.task = [], task
        if self.kept and step < self.kept[-1][0]:
            raise ValueError(
                f"step {step:g} comes after step {self.kept[-1][0]:g}: reset the policy at an episode's start"
            )
        before = [part for part in self.kept if part[0] < step]
        old = sum(part[0] <= step - self.back[0] for part in before)
        self.kept = [*before[max(old - 1, 0) :], (step, features)]

    def recall(self) -> Tensor:
        """The frames of an observation at the newest one, (N, F, W)."""
        (first, _), (now, _) = self.kept[0], self.kept[-1]
        wanted = [max(now - back, first) for back in self.back]
        near = [min(self.kept, key=lambda part: abs(part[0] - step)) for step in wanted]
        away = max(abs(part[0] - step) for part, step in zip(near, wanted, strict=True))
        if len(self.back) > 1 and away > self.back[-2] / 2 and not self._said:
            self._said = True
            warnings.warn(
                f"the policy sees frames that are {self.back[-2]} control steps apart, and the nearest given "
                f"one is {away:g} steps off: call watch() in between (docs/robots.md)",
                stacklevel=5,
            )
        return torch.stack([features for _, features in near], dim=1)


class RobotPolicy:
    """Samples action chunks from a robot's observations.

    Attributes:
        spec: what it knows about its data; a chunk's actions are 1 / `spec.fps` seconds apart.
        horizon: T, actions in a chunk.
        checkpoint, trained_steps: where the weights come from.
        precision: `no`, which leaves autocast to the caller, or `bf16`.
    """

    precision: Literal["no", "bf16"] = "no"
    _integration: Callable[..., Tensor] | None = None  # compiled
    _thread: ThreadPoolExecutor | None = None  # captured graphs belong to it: it samples all chunks

    def __init__(self, model, normalizer: Normalizer, config, spec: PolicySpec, script, device, seed=None):
        self.model = model.to(device).eval()
        self.normalizer = normalizer.to(device)
        self.config, self.spec, self.script, self.device = config, spec, script, device
        self.horizon = config.horizon
        statistics = self.normalizer.statistics["state"]
        scale, _ = scale_offset(statistics, "mean-std")
        self.text_encoder = spec.tasks.encoder if spec.tasks else None
        self._vectors: dict[str, Tensor] = {}  # of new sentences, (L, D)
        known = spec.tasks.sentences if spec.tasks else ()
        self._places = {spaced(sentence): place for place, sentence in enumerate(known)}
        self._known_range = [x.cpu().numpy() for x in (statistics["min"], statistics["max"], scale)]
        self._generator, self._seed, self._episode = torch.Generator(device), seed, -1
        self.reset()

    def reset(self, episode: int | None = None) -> None:
        """Start an episode, the next one by default: forget the chunks being executed, and draw new noise for
        latents, which stays for the episode.

        With a seed, each episode has its own noise, always the same: `reset(0)` repeats the first episode.
        """
        self._episode = self._episode + 1 if episode is None else episode
        self._said: set[int] = set()  # state dimensions that a warning has named
        if self._seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self._seed + self._episode)
        self._controller: Controller | None = None
        self._last: np.ndarray | None = None  # an action of the last chunk
        self._frames: list[Frames] = []  # of each observation in a batch

    def fork(self) -> "RobotPolicy":
        """A policy with the same weights, but its own noise and episodes; for another robot."""
        other = copy.copy(self)
        other._generator, other._episode = torch.Generator(self.device), -1
        other.reset()
        return other

    def compile(self) -> None:
        """Compile everything that samples a chunk, with and without a prefix; see `load_policy`."""
        expected = self._chunks_to_compare()
        for component in self.model.children():
            component.compile(dynamic=False)
        self._integration = flow.compile_integration(self.device)
        if self.device.type == "cuda":
            self._thread = ThreadPoolExecutor(1, "sampling", initializer=flow.let_thread_capture)
        try:
            away = np.abs(self._chunks_to_compare() - expected).max()
            if not away < ALIKE[self.precision]:
                raise ValueError(f"its actions would be wrong, by up to {away:.2g} after normalization")
        except Exception as error:  # compilers fail in many ways
            self._integration = self._thread = None
            for component in self.model.children():
                component._compiled_call_impl = None
            say(f"warning: the policy runs without being compiled ({vision.brief(error)})")

    def _chunks_to_compare(self) -> np.ndarray:
        """Chunks, always with the same noise, for frames of noise and the mean state, normalized but for an
        offset; with and without a prefix.
        """
        robot, draw = self.fork(), np.random.default_rng(0)
        robot._seed, chunks = 0, []
        observation = robot.blank_observation()
        for camera, frame in observation["images"].items():
            observation["images"][camera] = draw.integers(0, 256, frame.shape, np.uint8)
        for _ in range(1 + (self.spec.max_delay > 0)):
            robot.reset(0)
            prefix = chunks[0][:1] if chunks else None  # which is valid, whatever an action is
            chunks.append(robot.act(observation, prefix=prefix))
        rotations = self.spec.action_rotations
        chunks = rotations.encode(np.stack(chunks)) if rotations else np.stack(chunks)
        return chunks / self.normalizer.action_scale.cpu().numpy()

    def blank_observation(self) -> dict:
        """Black frames and the mean state, to measure latency with."""
        frame = np.zeros((*self.spec.image_size, 3), np.uint8)
        state = self.normalizer.state_offset.cpu().numpy()
        if self.spec.state_rotations:
            state = self.spec.state_rotations.decode(state)
        state = np.stack([state] * self.spec.proprio_history)
        more = {} if self.spec.tasks is None else {"task": self.spec.tasks.sentences[0]}
        more |= {} if self.spec.image_history == 1 else {"step": 0}
        return {"images": dict.fromkeys(self.spec.cameras, frame), "state": state, **more}

    def act(
        self,
        observation: Mapping,
        sample_steps: int | None = None,
        clip: bool = False,
        prefix: np.ndarray | None = None,
    ) -> np.ndarray:
        """Sample one chunk of actions for the robot's current observation.

        Args:
            observation: `images`, a mapping from camera name (short, or the dataset's full key) to an RGB
                frame (H, W, 3) uint8 of any size; and `state`, (P,) in recorded units and order. A policy
                that sees K states needs (K, P), the current one last. A policy trained on several tasks
                needs the `task`, a sentence; None lets it do any of them, if it was trained to. A policy that
                sees earlier frames (`spec.image_history`) needs the `step`: control steps since the episode
                began, which may be a fraction. The policy remembers frames itself, see `watch`.
            sample_steps: integration steps, instead of the configured number.
            clip: keep every action within the range recorded in training.
            prefix: (d, A) in recorded units, the actions that the chunk begins with, because the robot
                executes them while the chunk is computed; at most `spec.max_delay`. If the robot has nothing
                left to execute, repeat its last action.

        Returns:
            (T, A) float32 in recorded units, the prefix first; row i is for i / fps seconds from now. With an
            action offset, it is for that many steps later. Rotations continue the numbers of the prefix, or
            else of the last chunk.

        Raises:
            ValueError: for a missing or unknown camera, a wrong shape or dtype, a state or prefix that is not
                finite, a prefix longer than any in training, a missing or unknown instruction, a step that is
                missing or goes back.
            UserError: if the text encoder of a new sentence cannot be loaded.

        Warns once an episode of a state more than three standard deviations outside the recorded range.
        """
        chunk = self.act_batch([observation], sample_steps, clip, prefixes=[prefix])[0]
        if self.spec.action_rotations:
            if prefix is None or not len(prefix):
                self.spec.action_rotations.follow(chunk, self._last)
            self._last = chunk[len(chunk) // 2].copy()  # usually, the next chunk begins near it
        return chunk

    def act_batch(
        self,
        observations: Sequence[Mapping],
        sample_steps: int | None = None,
        clip: bool = False,
        generators: Sequence[torch.Generator] | None = None,
        prefixes: Sequence[np.ndarray | None] | None = None,
        frames: Sequence[Frames] | None = None,
    ) -> np.ndarray:
        """A chunk for each of several observations, in one forward pass; see `act`.

        Args:
            generators: source of each observation's noise; by default all share the policy's own.
            prefixes: one for each observation; lengths may differ.
            frames: the frames of each one's episode; by default the i-th observation is of the i-th episode.

        Returns:
            (B, T, A) float32.
        """
        if self.spec.image_history == 1:
            images = torch.stack([self._images(observation["images"]) for observation in observations])
        else:
            images = torch.stack([seen.recall() for seen in self.watch_batch(observations, frames)])
        states = np.stack([self._state(observation["state"]) for observation in observations])
        given = [self._given(prefix) for prefix in prefixes or [None] * len(observations)]
        self._warn_of_far_states(states[:, -1])
        told = self.told([observation.get("task", ...) for observation in observations])
        options = (sample_steps, clip, generators, self._prefix(given), told)
        chunks = self.sample(images, torch.from_numpy(states), *options).cpu().numpy()
        rotations = self.spec.action_rotations
        chunks = rotations.decode(chunks) if rotations else chunks
        for chunk, actions in zip(chunks, given, strict=True):
            chunk[: len(actions)] = actions
            if rotations:
                rotations.follow(chunk[max(len(actions) - 1, 0) :])
        return chunks

    def watch(self, observation: Mapping) -> None:
        """Remember the frames of an observation for later ones: `images`, `step` and `task`, see `act`.

        Only a policy that sees earlier frames needs this, for frames between two calls of `act`. The backbone
        runs once for each frame.
        """
        if self.spec.image_history > 1:
            self.watch_batch([observation])

    def watch_batch(
        self, observations: Sequence[Mapping], frames: Sequence[Frames] | None = None
    ) -> Sequence[Frames]:
        """Remember the frames of several observations, see `act_batch`; returns the episodes' frames."""
        images = torch.stack([self._images(observation["images"]) for observation in observations])
        steps = [self._step(observation.get("step")) for observation in observations]
        tasks = [observation.get("task", ...) for observation in observations]
        told = self.told(tasks)
        with self._precision():
            told = None if told is None else told.to(self.device)
            embedders = [child for child in self.model.children() if isinstance(child, InfoEmbedder)]
            film = [x for embedder in embedders for x in embedder.film(told)]
            images = vision.to_float(images.to(self.device))
            seen = vision.features(vision.backbones_of(self.model), images, film)
        if frames is None:
            missing = len(observations) - len(self._frames)
            self._frames += [Frames(self.spec) for _ in range(missing)]
            frames = self._frames[: len(observations)]
        for one, step, features, task in zip(frames, steps, seen, tasks, strict=True):
            one.keep(step, features, task)
        return frames

    def _step(self, given) -> float:
        if not isinstance(given, int | float | np.number) or not math.isfinite(given):
            raise ValueError(
                f"the policy sees {self.spec.image_history} frames of each camera, {self.spec.image_stride} "
                f"control steps apart: give the step of an observation, a number"
            )
        return float(given)

    def _precision(self) -> AbstractContextManager:
        half = self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext()

    def _given(self, prefix) -> np.ndarray:
        """A prefix as `act` takes it -> (d, A) float32."""
        most = self.spec.max_delay
        prefix = np.asarray(np.empty((0, self.action_dim)) if prefix is None else prefix, np.float32)
        if prefix.ndim != 2 or prefix.shape[1] != self.action_dim:
            raise ValueError(f"a prefix must have shape (d, {self.action_dim}), got {prefix.shape}")
        if len(prefix) > most:
            trained = f"at most {most} (--max-delay)" if most else "none (train it with --max-delay)"
            raise ValueError(
                f"the prefix has {len(prefix)} actions, and the policy was trained with {trained}"
            )
        if not np.isfinite(prefix).all():
            raise ValueError("the prefix holds NaN or infinity: give the actions that the robot executes")
        return prefix

    def _prefix(self, given: Sequence[np.ndarray]) -> flow.Prefix | None:
        """Prefixes (d, A) of several observations, as `sample` takes them; None if there is no action."""
        if not any(map(len, given)):
            return None
        rotations = self.spec.action_rotations
        actions = torch.zeros(len(given), self.horizon, self.spec.action_dim)
        for row, recorded in zip(actions, given, strict=True):
            if len(recorded):
                row[: len(recorded)] = torch.from_numpy(rotations.encode(recorded) if rotations else recorded)
        lengths = torch.tensor([[len(recorded)] for recorded in given])
        return flow.Prefix(actions, torch.arange(self.horizon) < lengths)

    def _state(self, given) -> np.ndarray:
        """A state as `act` takes it -> (K, P) as the policy was trained."""
        given, history = np.asarray(given, np.float32), self.spec.proprio_history
        state = given[None] if given.ndim == 1 and history == 1 else given
        if state.shape != (history, self.state_dim):
            wanted = f"({self.state_dim},)" if history == 1 else f"{(history, self.state_dim)}, oldest first"
            raise ValueError(f"state must have shape {wanted}, got {given.shape}")
        if not np.isfinite(state).all():
            raise ValueError("the state holds NaN or infinity: check the robot's sensors before acting on it")
        return self.spec.state_rotations.encode(state) if self.spec.state_rotations else state

    def told(self, sentences: Sequence) -> Tensor | None:
        """Instructions in the form that `sample` takes; None for a policy that is not told any.

        Each is a sentence, None for any task, or ... if none was given: a policy that knows one needs none.
        Raises the same errors as `act`.
        """
        known = self.spec.tasks
        if known is None:
            return None
        spoken = [self._sentence(sentence) for sentence in sentences]
        new = [s for s in dict.fromkeys(spoken) if s is not None and s not in self._places]
        if not new:
            return torch.tensor([self._places.get(sentence, -1) for sentence in spoken])
        unread = [s for s in dict.fromkeys(spoken) if s is not None and s not in self._vectors]
        if unread:
            encoder = _text_encoder(self.text_encoder)
            if encoder.identity != known.identity:
                raise UserError(
                    f"{self.text_encoder} is not the text encoder that the policy was trained with: pass "
                    f"that one as text_encoder."
                )
            self._vectors |= zip(unread, encoder(unread, known.shape[0] - 1), strict=True)
        rows = [torch.full(known.shape, torch.nan) if s is None else self._vectors[s] for s in spoken]
        while len(self._vectors) > KEPT_SENTENCES:
            del self._vectors[next(iter(self._vectors))]  # the oldest
        return torch.stack(rows)

    def _sentence(self, given) -> str | None:
        """An instruction with single spaces, or None for any task; raises ValueError."""
        known = self.spec.tasks
        there = f"it was trained on {listed(known.sentences)}"
        if given is ... and len(known.sentences) == 1:
            return known.sentences[0]
        if given is ... or (given is None and not known.droppable):
            raise ValueError(f"the policy needs a task: {there}")
        if given is None:
            return None
        if not isinstance(given, str) or not given.strip():
            raise ValueError(f"the task must be a sentence, not {given!r}: {there}")
        if spaced(given) not in self._places and known.encoder == "index":
            raise ValueError(f'the policy knows no task "{given}"{closest(given, self._places)}: {there}')
        return spaced(given)

    def _warn_of_far_states(self, states: np.ndarray) -> None:
        """Warn, once an episode, of each dimension of (B, P) states far outside what was recorded."""
        low, high, scale = self._known_range
        away = (np.maximum(low - states, states - high) / scale).max(axis=0)
        for i in set(np.flatnonzero(away > FAR).tolist()) - self._said:
            self._said.add(i)
            warnings.warn(
                f"{self.spec.state_names[i]} is {away[i]:.0f} standard deviations outside the range "
                f"{low[i]:.4g} to {high[i]:.4g} that the policy was trained on: check sensor and units",
                stacklevel=4,
            )

    @property
    def state_dim(self) -> int:
        """P of the robot's state."""
        rotations = self.spec.state_rotations
        return len(rotations.recorded) if rotations else self.spec.state_dim

    @property
    def action_dim(self) -> int:
        """A of the robot's actions."""
        rotations = self.spec.action_rotations
        return len(rotations.recorded) if rotations else self.spec.action_dim

    def sample(
        self,
        images: Tensor,
        proprio: Tensor,
        sample_steps: int | None = None,
        clip: bool = False,
        generators: Sequence[torch.Generator] | None = None,
        prefix: flow.Prefix | None = None,
        task: Tensor | None = None,
    ) -> Tensor:
        """A chunk for each of B observations from an episode store: (B, T, A) in recorded units.

        Args:
            images: (B, N, 3, H, W) uint8, in the order of `spec.cameras`, already of `spec.image_size`. With
                earlier frames (B, N, F, 3, H, W), or the features of all, see `vision.look`.
            proprio: (B, K, P) in recorded units; rotations re-expressed if they were in training.
            generators: see `act_batch`.
            prefix: actions that the chunks begin with, in the units of the returned ones. Normalizing makes
                them relative to the current state, whatever state they were sampled at.
            task: what `told` returns, or `Batch.task`.
        """
        images, proprio = images.to(self.device), proprio.to(self.device)
        seen, more = self.normalizer.proprio(proprio), {}
        noise = generators or self._generator
        if prefix is not None:
            prefix = flow.Prefix(*(part.to(self.device) for part in prefix))
            more["prefix"] = prefix._replace(actions=self.normalizer.actions(prefix.actions, proprio))
        if self.spec.tasks is not None:  # a script forked before there were instructions takes none
            more["task"] = task.to(self.device)

        def sampled() -> Tensor:
            with self._precision(), flow.compiled(self._integration):
                return self.script.sample_actions(
                    self.model, images, seen, self.config, sample_steps, noise, **more
                )

        actions = sampled() if self._thread is None else self._thread.submit(sampled).result()
        actions = self.normalizer.unnormalize_actions(actions, proprio)
        return torch.clamp(actions, *self.normalizer.action_range) if clip else actions

    def next_action(
        self,
        observation: Mapping,
        execute_steps: int | None = None,
        ensemble: float | None = None,
        sample_steps: int | None = None,
        clip: bool = False,
    ) -> np.ndarray:
        """The action for this control step; call once every 1 / fps seconds.

        Args:
            observation: see `act`, with only the current state: the policy remembers earlier ones. `images`
                can be a function that returns them: it is called only when a chunk is due. A new `task` takes
                effect at once.
            execute_steps, ensemble: see `Controller`.

        Returns:
            (A,) float32 in recorded units. With an action offset, the first action until it is due.
        """
        state = np.asarray(observation["state"], np.float32)
        if state.shape != (self.state_dim,):
            raise ValueError(f"state must have shape ({self.state_dim},), got {state.shape}")
        if self._controller is None:
            self._controller = Controller(self, 1)
        control, images = self._controller, observation["images"]
        control.configure(execute_steps, ensemble, sample_steps, clip)
        look = images if callable(images) else lambda: images
        tasks = [observation["task"]] if "task" in observation else None
        return control.next_actions(np.array([0]), state[None], lambda which: [look()], tasks)[0]

    def _images(self, images: Mapping) -> Tensor:
        """Frames by camera -> (N, 3, H, W) uint8 in the policy's order and size."""
        known = self.spec.cameras
        frames = {self.spec.camera(key): frame for key, frame in images.items()}
        if set(frames) != set(known) or len(frames) < len(images):  # two keys may mean one camera
            raise ValueError(f"the policy needs the cameras {', '.join(known)}; got {', '.join(images)}")
        return torch.stack([self._resize(name, np.asarray(frames[name])) for name in known])

    def _resize(self, name: str, frame: np.ndarray) -> Tensor:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
            raise ValueError(f"camera {name} must be (H, W, 3) uint8, got {frame.shape} {frame.dtype}")
        if not frame.size:
            raise ValueError(f"camera {name} gave a frame without pixels, {frame.shape}")
        frame = resize_rgb(frame, self.spec.image_size)  # as the training frames were
        return torch.from_numpy(frame.transpose(2, 0, 1).copy())


class _Chunk(NamedTuple):
    number: int
    sampled: int
    """Step of its observation."""
    arrives: int
    """First step at which it can be executed."""
    actions: np.ndarray
    """(E, T, A)."""


class Controller:
    """Executes chunks in E episodes that advance together: samples new ones when they are due.

    With a `delay`, a chunk arrives that many control steps after its observation. An episode begins when its
    first chunk has arrived; `join` says how the others join:

    - blocking: the robot repeats its last action until the chunk arrives.
    - naive: it executes the previous chunk, and drops the new one's actions for the steps that have passed.
    - prefix: like naive, but the new chunk is sampled as the continuation of what is executed meanwhile.
    - ensemble: a new chunk is sampled as soon as the last one arrives, and all predictions for the current
      step are averaged with weight exp(-ensemble * age), oldest first at age 0 (temporal ensembling, Zhao et
      al. 2023). This also averages chunks of different modes: if that does harm, execute chunks instead.

    Args:
        seeds: of each episode, for its noise; or the number of episodes, which share the policy's own noise.
        execute_steps: actions of a chunk to execute before the next is sampled. Default: so many that half of
            it has been executed when the next arrives, but no fewer than the delay.
        ensemble: join by ensembling, with this decay.
        sample_steps, clip: see `RobotPolicy.act`.

    Attributes:
        source: number of the (newest) chunk that the last actions came from; None if the robot waited.

    Raises:
        UserError: if chunks are too short for the delay, or the policy was not trained for such a prefix.
    """

    def __init__(
        self,
        policy: RobotPolicy,
        seeds: Sequence[int] | int,
        execute_steps: int | None = None,
        ensemble: float | None = None,
        sample_steps: int | None = None,
        clip: bool = False,
        delay: int = 0,
        join: Join = "naive",
    ):
        self.policy, self.generators, self.delay, self.join = policy, None, delay, join
        self.num = seeds if isinstance(seeds, int) else len(seeds)
        if not isinstance(seeds, int):
            self.generators = [torch.Generator(policy.device).manual_seed(seed) for seed in seeds]
        self.step = 0
        self.now = 0  # control steps, including those in which the robot waits
        self.frames = [Frames(policy.spec) for _ in range(self.num)]
        self.states: list[np.ndarray] = []  # the last K, each (E, P)
        self.chunks: list[_Chunk] = []
        self.tasks: list[str | None] | None = None
        self.last: np.ndarray | None = None  # actions, (E, A)
        self.wait = 0  # steps for which the robot repeats its last action
        self.source: int | None = None
        needed, most = delay - policy.spec.action_offset, policy.spec.max_delay
        if join == "prefix" and needed > most:
            raise UserError(
                f"A delay of {delay} steps needs a prefix of {needed} actions, but the policy was trained "
                f"with at most {most}: train it with --max-delay {needed}, or choose another --join."
            )
        if join == "ensemble" and ensemble is None:
            ensemble = ENSEMBLE
        self.configure(execute_steps, ensemble, sample_steps, clip)

    def configure(
        self, execute_steps: int | None, ensemble: float | None, sample_steps: int | None, clip: bool
    ) -> None:
        """Change how to act from now on; raises ValueError if a chunk has too few actions to execute."""
        horizon, offset = self.policy.horizon, self.policy.spec.action_offset
        overlap = 0 if self.join == "blocking" else self.delay  # for so long, the previous chunk is executed
        least, most = max(overlap, 1), horizon - max(offset, overlap)
        if most < least:
            raise UserError(
                f"Chunks of {horizon} actions are too short for a delay of {self.delay} steps: choose a "
                f"smaller --delay, --join blocking, or train with a larger --horizon."
            )
        if execute_steps is None:
            execute_steps = max(min(horizon // 2 - overlap, most), least)
        if not least <= execute_steps <= most:
            raise ValueError(f"execute_steps must lie in {least}..{most}, got {execute_steps}")
        self.execute_steps, self.ensemble = execute_steps, ensemble
        self.sample_steps, self.clip = sample_steps, clip

    @property
    def ahead(self) -> int:
        """Control steps until chunks are sampled; 0: in the next step, which needs images."""
        left = self.chunks[-1].sampled + self._every - self.step if self.chunks else 0
        return self.wait + max(left, 0)

    @property
    def _every(self) -> int:
        return self.execute_steps if self.ensemble is None else max(self.delay, 1)

    def next_actions(
        self,
        which: np.ndarray,
        states: np.ndarray,
        look: Callable[[np.ndarray], Sequence[Mapping]],
        tasks: list[str | None] | None = None,
    ) -> np.ndarray:
        """The actions of this control step.

        Args:
            which: (R,), the episodes that are running; those that are over do not come back.
            states: (R, P), their current states.
            look: returns the images of given episodes; called only if a chunk needs them, now or later.
            tasks: their instructions, if the policy is told any.

        Returns:
            (R, A) float32 in recorded units.
        """
        present = np.zeros((self.num, states.shape[1]), np.float32)
        present[which] = states
        if self.num == 1 and tasks != self.tasks:
            self.chunks, self.states = [], []  # in training, another task begins another episode
        self.tasks = tasks
        # An episode has no states before its first: repeat that one.
        spec = self.policy.spec
        self.states = [*(self.states or [present] * spec.proprio_history), present]
        self.states = self.states[-spec.proprio_history :]
        period = self._every + (self.delay if self.join == "blocking" else 0)
        if not self.ahead:
            self.wait = self.delay if self.chunks and self.join == "blocking" else 0
            self._sample(which, look)
        elif will_be_wanted(spec.image_history, spec.image_stride, self.ahead, period):
            self.policy.watch_batch(self._seen(which, look), [self.frames[e] for e in which])
        self.now += 1
        if self.wait:
            self.wait, self.source = self.wait - 1, None
            return self.last[which]
        offset = spec.action_offset
        ages = [self.step - chunk.sampled - offset for chunk in self.chunks]  # rows for this step
        self.chunks = [c for c, age in zip(self.chunks, ages, strict=True) if age < self.policy.horizon]
        here = [c for c in self.chunks if c.arrives <= self.step and c.sampled + offset <= self.step]
        self.source = here[-1].number if here else None
        due = [chunk.actions[which, self.step - chunk.sampled - offset] for chunk in here]
        due = due or [self.chunks[0].actions[which, 0]]
        actions, rotations = due[-1], spec.action_rotations
        if self.ensemble is not None:
            weights = np.exp(-self.ensemble * np.arange(len(due)))
            actions = blend(due, weights, rotations)
        if rotations and self.last is not None:
            actions = rotations.nearest(actions, self.last[which])
        self.step += 1
        actions = actions.astype(np.float32)
        self.last = np.zeros((self.num, actions.shape[1]), np.float32)
        self.last[which] = actions
        return actions

    def _sample(self, which: np.ndarray, look: Callable[[np.ndarray], Sequence[Mapping]]) -> None:
        """Sample a chunk for each of the episodes."""
        observations = self._seen(which, look)
        generators = self.generators and [self.generators[e] for e in which]
        more = {"prefixes": self._prefixes(which)} if self.chunks and self.join == "prefix" else {}
        if self.policy.spec.image_history > 1:
            more["frames"] = [self.frames[e] for e in which]
        sampled = self.policy.act_batch(observations, self.sample_steps, self.clip, generators, **more)
        actions = np.zeros((self.num, *sampled.shape[1:]), np.float32)
        actions[which] = sampled
        number = self.chunks[-1].number + 1 if self.chunks else 0
        late = self.delay if self.chunks and self.join != "blocking" else 0
        self.chunks.append(_Chunk(number, self.step, self.step + late, actions))

    def _seen(self, which: np.ndarray, look: Callable[[np.ndarray], Sequence[Mapping]]) -> list[dict]:
        """The episodes' current observations."""
        states = np.stack(self.states, axis=1)[which]
        observations = [
            {"images": images, "state": state, "step": self.now}
            for images, state in zip(look(which), states, strict=True)
        ]
        for observation, task in zip(observations, self.tasks or (), strict=self.tasks is not None):
            observation["task"] = task
        return observations

    def _prefixes(self, which: np.ndarray) -> list[np.ndarray]:
        """The actions (d, A) that each episode executes in its next chunk's place until that arrives."""
        chunk, offset = self.chunks[-1], self.policy.spec.action_offset
        age = self.step - chunk.sampled  # `configure` makes sure that the chunk is long enough
        return list(chunk.actions[which, age : age + max(self.delay - offset, 0)])
