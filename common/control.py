"""A robot's control loop: it acts at its own rate while the next chunk is computed in the background.

loop = ControlLoop(policy, robot, rate=50, max_velocity=1.0)    # a RobotPolicy, or a RemotePolicy
print(loop.run(seconds=30))

Computing a chunk takes time. A policy trained with `--max-delay` is told which actions will be executed until
then, and its chunk begins with them (real-time chunking, Black et al. 2025, arXiv 2512.05964). With any other
policy the robot stops while it waits, or executes the average of all chunks (temporal ensembling, Zhao et al.
2023), which may average different ways to do a task. Nothing is ever extrapolated: without a known action,
the robot holds.
"""

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from common.errors import UserError

SAID_AFTER = 0.5  # seconds of holding
RETRY_SECONDS = 0.2
MANY_LATE = 3  # observations, after which it is said; one may be chance
LAST_SECONDS = 5.0  # that the last observation and inference may take
HIGH = 0.95  # quantile of earlier delays, expected as the next one
KEPT_DELAYS = 100
CLOSEST = 0.75  # periods between two commands
ROUNDING = 1e-6  # tolerance of times, in control steps
UNLIMITED = math.inf


class Robot(Protocol):
    """The robot to control.

    `observe` runs in its own thread while `send` continues: if both use one bus, guard it with a lock. For a
    policy that sees earlier frames it is also called between chunks.
    """

    def observe(self) -> dict:
        """Return the observation for `RobotPolicy.act`: `images`, `state`, and `task` if it knows several.

        A chunk begins at the time of the call, so return at once: have cameras read in a thread of their
        own, and take their newest frames.
        """

    def send(self, action: np.ndarray) -> None:
        """Move to an action (A,), in recorded units, within the next cycle."""

    def reset(self) -> None:
        """Move to the start of an episode."""


class ControlLoop:
    """Runs a policy on a robot; see the module."""

    def __init__(
        self,
        policy: Any,
        robot: Robot,
        rate: float,
        execute_steps: int | None = None,
        ensemble: float | None = None,
        max_velocity: float | Sequence[float] | None = None,
        max_acceleration: float | Sequence[float] | None = None,
        patience: float = 10.0,
    ):
        """
        Args:
            policy: a `RobotPolicy` or `RemotePolicy` whose actions are positions: to hold, the last one is
                repeated, and an increment or a velocity would keep the robot moving.
            rate: cycles per second. The loop interpolates between the actions of a chunk, which are
                1 / `policy.spec.fps` seconds apart.
            execute_steps: actions of a chunk after which the next is requested. Default: so many that half of
                the chunk is executed when the next one arrives.
            ensemble: average all chunks, with weight exp(-ensemble * age), instead of joining them.
            max_velocity, max_acceleration: limits of the commands, in recorded units per second (squared),
                one for all or one for each; rotations are not limited.
            patience: seconds to wait for a chunk, after which `run` ends with an error. A `RemotePolicy`
                should give up and connect again sooner: see its `timeout`.
        """
        if not 0 < rate < UNLIMITED:
            raise UserError(f"A control rate of {rate} Hz is impossible: give cycles per second.")
        most = policy.horizon - policy.spec.action_offset
        if execute_steps is not None and not 1 <= execute_steps <= most:
            raise UserError(f"execute_steps must lie in 1..{most}, got {execute_steps}.")
        self.policy, self.robot, self.rate = policy, robot, rate
        self.execute_steps, self.ensemble, self.patience = execute_steps, ensemble, patience
        self.max_velocity, self.max_acceleration = max_velocity, max_acceleration

    def run(self, seconds: float) -> "Report":
        """Reset the robot, act for this many seconds or until Ctrl-C, and report.

        Raises:
            UserError: if the first chunk fails, none arrives for `patience` seconds, or sending to the robot
                fails.
        """
        plan = Plan(self.policy, self.rate, self.execute_steps, self.ensemble)
        if plan.max_delay == 0 and self.ensemble is None:
            _say("the policy was trained without --max-delay: the robot stops while a chunk is computed")
        self.robot.reset()
        worker = Worker(self.policy, self.robot)
        worker.start()
        try:
            return _Episode(self, plan, worker).act(seconds)
        finally:
            worker.requests.put(STOP)
            # A program that ends within PyTorch's code aborts, and a second run would share the policy.
            worker.join(LAST_SECONDS)


class _Episode:
    """The state of a running loop."""

    def __init__(self, loop: ControlLoop, plan: "Plan", worker: "Worker"):
        self.loop, self.plan, self.worker = loop, plan, worker
        self.watchdog, self.report = Watchdog(loop.patience), Report(loop.rate)
        self.retry = self.sent = 0.0  # time of the next retry and of the last command
        self.lacks = False  # too slow for prefixes
        self.asked, self.lags = math.inf, 0  # time of the last request; chunks whose observation came late

    def act(self, seconds: float) -> "Report":
        self.limit = self._begin()
        period, begin = 1 / self.loop.rate, time.perf_counter()
        due = begin
        try:
            while due - begin < seconds - period / 2:
                # After a late command the next one must not follow at once: that would be a jump.
                time.sleep(max(max(due, self.sent + CLOSEST * period) - time.perf_counter(), 0))
                self._cycle(time.perf_counter())
                self.report.behind.append(self.sent - due)
                after, due = time.perf_counter(), due + period
                if after > due:  # late: missed cycles are skipped
                    missed = int((after - due) / period)
                    self.report.late += 1 + missed
                    due += missed * period
        except KeyboardInterrupt:
            _say("stopped: the robot stays at its last command")
        self.report.seconds = max(time.perf_counter(), due) - begin
        return self.report

    def _begin(self) -> "RateLimit":
        """Wait for the first chunk. Limit its first command, too, if states are positions."""
        loop, spec = self.loop, self.loop.policy.spec
        self.worker.requests.put(self.plan.ask())
        first = self.worker.answer(loop.patience)
        if first is None:
            raise UserError(f"{self.worker.doing} has not answered for {loop.patience:g} s: is it running?")
        if first.error is not None:
            raise UserError(f"The robot did not start: {first.error}.")
        self._take(first)
        velocity, acceleration = loop.max_velocity, loop.max_acceleration
        width, rotations = first.chunk.shape[1], spec.action_rotations
        limit = RateLimit(velocity, acceleration, loop.rate, width, rotations)
        if tuple(spec.state_names) == tuple(spec.action_names):
            limit.begin(first.state)
            self.plan.last = first.state
        else:
            names = ", ".join([*spec.action_names[:4], *["..."] * (len(spec.action_names) > 4)])
            _say(
                f"the actions ({names}) and the state have different names: actions must be positions, and "
                f"the first is sent without a limit"
            )
        return limit

    def _cycle(self, now: float) -> None:
        answer = self.worker.answer()
        if answer is not None and answer.error is None:
            self._take(answer)
            self.watchdog.feed(now)
        elif answer is not None:
            self.plan.fail()
            self.retry = now + RETRY_SECONDS
            self.watchdog.trouble(answer.error)
        if self.plan.due and now >= self.retry:
            self.worker.requests.put(self.plan.ask())
            self.asked = time.perf_counter()
            self.watchdog.ask(now)
            self._say_if_slow()
        elif self.plan.watches:
            self.worker.requests.put(WATCH)
        action = self.plan.next()
        if action is None:
            self.watchdog.check(now, self.worker.doing)
        command = self.limit.hold() if action is None else self.limit(action)
        self.sent = time.perf_counter()
        try:
            self.loop.robot.send(command)
        except Exception as error:  # a robot can raise anything
            raise UserError(f"robot.send() failed ({_brief(error)}): the robot gets no commands.") from error
        self.report.send.append(time.perf_counter() - self.sent)
        self.report.command(command[self.limit.plain], self.plan.source)

    def _take(self, answer: "Answer") -> None:
        self.plan.join(answer.chunk, answer.task)
        self.report.observe.append(answer.observe)
        self.report.infer.append(answer.infer)
        late = answer.seen - self.asked  # of a robot that does not wait for its chunks
        moves = self.plan.max_delay > 0 or self.loop.ensemble is not None
        self.lags += moves and late * self.loop.policy.spec.fps > 1
        if self.lags == MANY_LATE:
            self.lags = math.inf
            _say(
                f"a chunk's observation came {1000 * late:.0f} ms after it was asked for, and the robot has "
                f"moved by {late * self.loop.policy.spec.fps:.1f} actions: have robot.observe() return the "
                f"newest frames at once"
            )

    def _say_if_slow(self) -> None:
        plan = self.plan
        if plan.needed > plan.max_delay > 0 and not self.lacks and self.loop.ensemble is None:
            self.lacks = True
            _say(
                f"a chunk takes {plan.needed} actions to arrive, but the policy was trained with --max-delay "
                f"{plan.max_delay}: the robot stops for the rest"
            )


class Chunk(NamedTuple):
    """A chunk that has arrived.

    Attributes:
        start: time of its first action.
        rows: (T, A).
        number: how many had arrived, with this one.
        given: how many of its actions were given, and are those of the chunk before.
        task: the instruction that it was sampled for.
    """

    start: float
    rows: np.ndarray
    number: int
    given: int
    task: Any = None

    def source(self, time: float) -> float:
        """Number of the chunk that the action at a time comes from; between two of them, half a number."""
        left = self.start + self.given - time  # until its first action of its own
        if not self.given or left <= ROUNDING:
            return self.number
        return self.number - (0.5 if left < 1 - ROUNDING else 1)


class Plan:
    """Decides the next action from a policy's chunks, joined one to the next. Knows neither clock nor thread.

    Time is counted in the policy's control steps from the first observation; it stands still while the robot
    holds. A chunk requested at time n begins at n + `action_offset`. Its first actions, as many as will be
    executed before it arrives, are given: they come from the previous chunk.

    Attributes:
        due: whether to request a chunk now.
        watches: whether a later chunk needs the frames of now.
        needed: actions that must be given, judging by the delays of earlier chunks.
        source: number of the chunk that the last action came from, 0 for an average; None if the robot held.
        last: the last action, (A,); at first None, or the robot's position.
    """

    def __init__(
        self, policy: Any, rate: float, execute_steps: int | None = None, ensemble: float | None = None
    ):
        spec = self.spec = policy.spec
        self.horizon, self.offset, self.rotations = policy.horizon, spec.action_offset, spec.action_rotations
        self.max_delay = 0 if ensemble is not None else getattr(spec, "max_delay", 0)
        self.execute_steps = execute_steps
        self.step, self.ensemble = spec.fps / rate, ensemble
        self.now = 0.0
        self.chunks: list[Chunk] = []  # oldest first
        self.source: float | None = None
        self.last: np.ndarray | None = None
        self.asked: float | None = None  # when the pending chunk was requested
        self.given = 0  # actions that were given with it
        self.until = UNLIMITED  # no later action is executed before it arrives
        self.waited = self.answers = 0  # cycles since the request; chunks that arrived
        self.delays: deque[int] = deque(maxlen=KEPT_DELAYS)

    @property
    def due(self) -> bool:
        if self.asked is not None:
            return False
        if not self.chunks or self.ensemble is not None:
            return True
        return self.now >= self.chunks[-1].start - self.offset + self._period - ROUNDING

    @property
    def watches(self) -> bool:
        history, ahead = getattr(self.spec, "image_history", 1), 0.0
        if history == 1 or self.asked is not None or not self.chunks or self.due:
            return False
        ahead = self.chunks[-1].start - self.offset + self._period - self.now
        return will_be_wanted(history, self.spec.image_stride, ahead, self._period, self.step)

    @property
    def _period(self) -> float:
        """Control steps from an observation to the next."""
        lead = min(self.needed, self.max_delay)
        steps = self.execute_steps or max(self.horizon // 2 - lead, 1)
        return min(steps, self.horizon - self.offset - lead)

    @property
    def needed(self) -> int:
        if not self.delays:  # the longest, until one is known
            return self.max_delay
        cycles = np.quantile(self.delays, HIGH, method="higher")
        # The last of these cycles executes the action of its time, which may lie between two others.
        return max(math.ceil((cycles - 1) * self.step - ROUNDING) + 1 - self.offset, 0)

    def ask(self) -> np.ndarray:
        """Request a chunk now; returns the actions (d, A) that will be executed before it arrives."""
        start, prefix = self.now + self.offset, np.zeros((0, 0), np.float32)
        if self.chunks and self.max_delay:
            left = math.floor(self._end - start + ROUNDING) + 1
            # A robot that holds stays where it is.
            count = max(min(self.needed, self.max_delay, left), 1)
            prefix = np.stack([self._at(start + i) for i in range(count)])
        self.asked, self.given, self.waited = self.now, len(prefix), 0
        self.until = UNLIMITED if self.ensemble is not None else start + len(prefix) - 1
        return prefix

    def join(self, chunk: np.ndarray, task: Any = None) -> None:
        """Take the chunk that was requested, which is for this instruction."""
        if self.answers:  # the first inference is slower than any other
            self.delays.append(self.waited)
        self.answers += 1
        self.chunks.append(Chunk(self.asked + self.offset, chunk, self.answers, self.given, task))
        self.fail()
        if self.ensemble is None:  # an earlier one is needed until the new one begins
            begun = [i for i, part in enumerate(self.chunks) if part.start <= self.now + ROUNDING]
            self.chunks = self.chunks[begun[-1] if begun else 0 :]
        else:
            self.chunks = [part for part in self.chunks if part.start + self.horizon > self.now]

    def fail(self) -> None:
        """Cancel the pending request."""
        self.asked, self.until = None, UNLIMITED

    def next(self) -> np.ndarray | None:
        """The action (A,) of this cycle; None: hold."""
        self.waited += 1
        if not self.chunks or self.now > min(self.until, self._end) + ROUNDING:
            self.source = None
            return None
        action, self.source = self._at(self.now), 0
        if self.ensemble is None:
            self.source = self._begun(self.now)[-1].source(self.now)
        self.now += self.step
        if self.rotations is not None and self.last is not None:
            action = self.rotations.nearest(action, self.last)
        self.last = action
        return action

    @property
    def _end(self) -> float:
        """When the last known action is due."""
        return self.chunks[-1].start + self.horizon - 1

    def _begun(self, time: float) -> list[Chunk]:
        return [part for part in self.chunks if part.start <= time + ROUNDING] or self.chunks[:1]

    def _at(self, time: float) -> np.ndarray:
        """The action at a time, interpolated within a chunk and clamped to its first and last."""
        begun = self._begun(time)
        if self.ensemble is None:
            return self._within(begun[-1], time)
        begun = [part for part in begun if time <= part.start + self.horizon - 1 + ROUNDING] or begun[-1:]
        begun = [part for part in begun if part.task == begun[-1].task]  # no average of two tasks
        weights = np.exp(-self.ensemble * np.arange(len(begun)))
        return blend([self._within(part, time) for part in begun], weights, self.rotations)

    def _within(self, chunk: Chunk, time: float) -> np.ndarray:
        rows = chunk.rows
        place = min(max(time - chunk.start, 0.0), len(rows) - 1.0)
        low = round(place) if abs(place - round(place)) < ROUNDING else math.floor(place)
        share = max(place - low, 0.0) if place > low + ROUNDING else 0.0
        return rows[low] if not share else blend(rows[low : low + 2], [1 - share, share], self.rotations)


def will_be_wanted(history: int, stride: int, ahead: float, period: float, within: float = 1.0) -> bool:
    """Whether a policy that sees so many frames, `stride` control steps apart, will need those of now.

    Its next chunk is sampled in `ahead` control steps, and others every `period` steps after that. Each frame
    is taken at the first of moments that are `within` steps apart.
    """
    backs = (stride * i for i in range(1, history))
    return any(back > ahead - ROUNDING and (back - ahead + ROUNDING) % period < within for back in backs)


def blend(actions: Sequence[np.ndarray], weights: Sequence[float], rotations: Any = None) -> np.ndarray:
    """The weighted mean (..., A) of some actions (..., A); of rotations, that of their first two columns.

    Args:
        rotations: if there are any, see `common/data/rotation.py`.
    """
    shares = np.asarray(weights) / np.sum(weights)
    mean = np.tensordot(shares, np.stack(actions), 1).astype(np.float32)
    if rotations is None or not rotations.starts:
        return mean
    turned = rotations.decode(np.tensordot(shares, rotations.encode(np.stack(actions)), 1))
    return rotations.nearest(turned, actions[0])


class RateLimit:
    """Makes commands follow targets with bounded velocity and acceleration.

    A target whose own motion is within bounds is followed exactly. After a jump the command catches up and
    brakes in time.

    Attributes:
        plain: mask of an action's numbers that are not rotations: only these are limited.
    """

    def __init__(self, velocity, acceleration, rate: float, width: int, rotations: Any = None):
        """Bounds are one number for all, or (A,), or None; in recorded units per second (squared)."""
        self.plain = np.ones(width, bool)
        if rotations is not None and rotations.starts:
            size = {"axis-angle": 3, "euler": 3}.get(rotations.kind, 4)
            for start in rotations.starts:
                self.plain[start : start + size] = False
        self.period = 1 / rate
        self.velocity = self._bound("max_velocity", velocity, width)
        self.acceleration = self._bound("max_acceleration", acceleration, width)
        self.position: np.ndarray | None = None

    def _bound(self, name: str, given, width: int) -> np.ndarray:
        try:
            bound = np.broadcast_to(np.asarray(UNLIMITED if given is None else given, np.float64), width)
        except (TypeError, ValueError):
            bound = np.zeros(1)
        if not (bound > 0).all():
            raise UserError(f"{name} must be a positive number, or {width} of them, got {given}.")
        return np.where(self.plain, bound, UNLIMITED)

    def begin(self, position: np.ndarray) -> None:
        """Start from the robot's position, at rest."""
        self.position, self.target = np.array(position, np.float64), np.array(position, np.float64)
        self.speed = np.zeros_like(self.position)

    def __call__(self, target: np.ndarray) -> np.ndarray:
        """The command (A,) for the next target (A,)."""
        if self.position is None:
            self.begin(target)
        gap, dt, bound = self.target - self.position, self.period, self.acceleration
        moves = (target - self.target) / dt  # the target's own velocity
        self.target = np.array(target, np.float64)
        # The speed that closes the gap when every cycle brakes by the bound: v^2 / 2a + v dt / 2.
        with np.errstate(invalid="ignore", over="ignore"):
            braking = bound * dt * (np.sqrt(0.25 + 2 * np.abs(gap) / (bound * dt**2)) - 0.5)
        catches_up = np.minimum(np.abs(gap) / dt, np.where(np.isfinite(bound), braking, UNLIMITED))
        return self._move(moves + np.sign(gap) * catches_up)

    def hold(self) -> np.ndarray:
        """The command (A,) that stops as soon as the bounds allow."""
        command = self._move(np.zeros_like(self.position))
        self.target = self.position.copy()
        return command

    def _move(self, speed: np.ndarray) -> np.ndarray:
        change = self.acceleration * self.period
        self.speed = np.clip(
            np.clip(speed, -self.velocity, self.velocity), self.speed - change, self.speed + change
        )
        self.position = self.position + self.speed * self.period
        return self.position.astype(np.float32)


@dataclass
class Answer:
    """The result of a request: the chunk (T, A), and the state and instruction it is for, or an error.

    `observe` and `infer` are durations in seconds, `seen` is when the observation was complete.
    """

    chunk: np.ndarray | None = None
    state: np.ndarray | None = None
    error: str | None = None
    observe: float = 0.0
    infer: float = 0.0
    seen: float = -math.inf
    task: Any = None


STOP, WATCH = object(), object()


class Worker(threading.Thread):
    """Observes and queries the policy, one chunk at a time, in a thread that may block without harm."""

    def __init__(self, policy: Any, robot: Robot):
        super().__init__(daemon=True)
        self.policy, self.robot = policy, robot
        self.requests: queue.SimpleQueue = queue.SimpleQueue()
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        self.doing = "policy.reset()"
        self._shape: tuple[int, ...] | None = None
        self._fresh = True

    def answer(self, timeout: float = 0.0) -> Answer | None:
        """The answer to the last request, if it has arrived."""
        try:
            return self._answers.get(block=timeout > 0, timeout=timeout or None)
        except queue.Empty:
            return None

    def run(self) -> None:
        while (prefix := self.requests.get()) is not STOP:
            try:
                if prefix is WATCH:
                    observation, self.doing = self._observe(), "the policy"
                    self.policy.watch(observation)
                    continue
                answer = self._ask(prefix)
            except Exception as error:  # a robot, a policy and a network can raise anything
                said = f"{error}".rstrip(".") if isinstance(error, UserError) else _brief(error)
                answer = Answer(error=f"{self.doing} failed ({said})")
            if prefix is not WATCH:  # else the next chunk says what is wrong
                self._answers.put(answer)

    def _observe(self) -> Mapping:
        """What the robot sees; for a policy that sees earlier frames, with its time in control steps."""
        self.doing, now = "robot.observe()", time.perf_counter()
        observation = self.robot.observe()
        if not isinstance(observation, Mapping) or "state" not in observation:
            raise ValueError("it gave no images and state")
        spec = self.policy.spec
        step = {"step": (now - self._began) * spec.fps} if getattr(spec, "image_history", 1) > 1 else {}
        return {**observation, **step}

    def _ask(self, prefix: np.ndarray) -> Answer:
        if self._fresh:
            self.doing = "policy.reset()"
            self.policy.reset()
            self._fresh, self._began = False, time.perf_counter()
        start, observation = time.perf_counter(), self._observe()
        self.doing, seen = "the policy", time.perf_counter()
        chunk = np.asarray(self.policy.act(observation, **({"prefix": prefix} if len(prefix) else {})))
        done = time.perf_counter()
        if chunk.ndim != 2 or chunk.shape != (self._shape or chunk.shape) or not np.isfinite(chunk).all():
            raise ValueError(f"it gave {chunk.shape} numbers that are no chunk")
        self._shape = chunk.shape
        state = np.asarray(observation["state"], np.float32)
        state = state.reshape(-1, state.shape[-1])[-1]
        return Answer(chunk, state, None, seen - start, done - seen, seen, observation.get("task"))


class Watchdog:
    """Reports why a robot holds, and ends the loop if that lasts."""

    def __init__(self, patience: float):
        self.patience, self.since = patience, 0.0  # time of the request that no chunk has answered yet
        self.reason: str | None = None

    def ask(self, now: float) -> None:
        """Note that a chunk was requested; after a failure, the first request counts."""
        if self.reason is None:
            self.since = now

    def trouble(self, reason: str) -> None:
        """Print once why no chunk arrived."""
        if reason != self.reason:
            _say(f"{reason}: the robot will hold, and the loop tries again")
        self.reason = reason

    def check(self, now: float, doing: str) -> None:
        """Check whether the robot has been holding for too long."""
        waited = now - self.since
        if waited > SAID_AFTER and self.reason is None:
            self.trouble(f"{doing} has not answered for {waited:.1f} s")
        if waited > self.patience:
            raise UserError(f"No chunk arrived for {self.patience:g} s ({self.reason}): the robot holds.")

    def feed(self, now: float) -> None:
        """Note that a chunk arrived."""
        if self.reason is not None:
            _say(f"a chunk arrived after {now - self.since:.1f} s: the robot moves again")
        self.since, self.reason = now, None


@dataclass
class Report:
    """Statistics of a loop. Times are in seconds, velocities in recorded units per second.

    Attributes:
        rate: wanted cycles per second.
        late: cycles that ended too late or were missed.
        held: cycles in which the robot held.
        observe, infer, send: time of each observation, chunk and command.
        behind: how long after its cycle began each command was sent.
        seams, inside: largest change of velocity from one cycle to the next, over all numbers except
            rotations. It is inside a chunk if the three commands that make it come from the same one, and at
            a seam where chunks join, and where the robot stops and starts.
    """

    rate: float
    seconds: float = 0.0
    late: int = 0
    held: int = 0
    observe: list[float] = field(default_factory=list)
    infer: list[float] = field(default_factory=list)
    send: list[float] = field(default_factory=list)
    behind: list[float] = field(default_factory=list)
    seams: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    _last: deque = field(default_factory=lambda: deque(maxlen=3), repr=False)

    @property
    def cycles(self) -> int:
        return len(self.send)

    @property
    def reached(self) -> float:
        """Cycles per second."""
        return self.cycles / self.seconds if self.seconds else 0.0

    def command(self, command: np.ndarray, source: float | None) -> None:
        """Record a command, and the chunk that it comes from; None: the robot holds."""
        self._last.append((command, source))
        self.held += source is None
        commands, sources = zip(*self._last, strict=True)
        if len(commands) == 3 and any(chunk is not None for chunk in sources):
            change = np.abs(np.diff(np.stack(commands), n=2, axis=0)).max(initial=0) * self.rate
            (self.inside if len(set(sources)) == 1 else self.seams).append(float(change))

    def __str__(self) -> str:
        lines = [
            f"{self.reached:.1f} of {self.rate:g} cycles a second for {self.seconds:.1f} s, "
            f"{len(self.infer)} chunks; late {_share(self.late, self.cycles)}, "
            f"held {_share(self.held, self.cycles)}"
        ]
        for name in ("observe", "infer", "send", "behind"):
            times = 1000 * np.array(getattr(self, name) or [math.nan])
            lines.append(
                f"{name:<8} mean {times.mean():6.1f} ms, p95 {np.quantile(times, 0.95):6.1f}, worst "
                f"{times.max():6.1f}"
            )
        for name, changes in (("at seams", self.seams), ("inside", self.inside)):
            changes = np.array(changes or [math.nan])
            lines.append(f"jump of velocity {name:<8} mean {changes.mean():.3g}, worst {changes.max():.3g}")
        return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / max(whole, 1):.2%})"


def _brief(error: Exception) -> str:
    """An error in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")


def _say(sentence: str) -> None:
    print(sentence, flush=True)
