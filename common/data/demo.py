"""The built-in task: two arms, two obstacles, four ways to succeed. Simulated and drawn in numpy.

Each hand moves from its start at the bottom of a table, past a round obstacle, to its own coloured target at
the top, which is visible only in the images. The demonstrator passes each obstacle left or right at random:
demonstrations have 2 x 2 modes, and the average of two modes is a collision.

The table spans [-1.1, 1.1] in both directions, one step is 1 / FPS seconds. State: hand positions (left x,
left y, right x, right y). Action: where the hands should be after the step. Cameras: `cam_head` sees the
whole table, `cam_left` and `cam_right` move with their hand.

The constants define the task's difficulty and must not change: success rates are compared across versions.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import gymnasium
import numpy as np
from filelock import FileLock
from gymnasium.spaces import Box, Dict
from tqdm import tqdm

from common.data.recording import Demonstration, write_dataset

OBSTACLES = np.array([[-0.5, 0.0], [0.5, 0.0]])  # centres, one per arm
OBSTACLE_RADIUS = 0.28
SPEED_LIMIT = 0.08  # table units per step
SUCCESS_DISTANCE = 0.1  # both hands, to their targets, at the same time
MAX_STEPS = 80
START_Y, START_X_SPREAD = -0.8, 0.2  # starts: x = +-0.5 +- 0.2
TARGET_Y, TARGET_X_SPREAD, TARGET_Y_SPREAD = 0.75, 0.3, 0.1

EXPERT_RADIUS = OBSTACLE_RADIUS + 0.12  # how far from an obstacle's centre the demonstrator passes
EXPERT_SPEED = 0.05  # below the limit: a policy that falls behind its plan can catch up
EXPERT_NOISE = 0.004  # standard deviation of the demonstrated actions
EXPERT_HOLD_STEPS = 4  # steps that a demonstration rests on the targets

FPS = 10
CAMERAS = ("cam_head", "cam_left", "cam_right")
IMAGE_SIZE = 64
NAMES = ("left_x", "left_y", "right_x", "right_y")
TASK = "move both hands past the obstacles to their targets"
NUM_DEMONSTRATIONS = 200

HEAD_EXTENT, HAND_EXTENT = 1.1, 0.45  # half the width that the head camera and a hand's camera see
TABLE_COLOR = np.array([196, 186, 170], np.float32)
DISCS = {  # radius and RGB of what is drawn, bottom to top; one entry per arm
    "obstacle": (OBSTACLE_RADIUS, ((70, 70, 78), (70, 70, 78))),
    "target": (0.1, ((214, 48, 49), (39, 86, 205))),
    "hand": (0.06, ((250, 177, 60), (60, 200, 140))),
}


class Simulator:
    """Many independent copies of the task, stepped together.

    Attributes:
        hands, targets: (E, 2, 2), positions of the left and the right hand, and of their targets.
        steps: (E,), steps taken until the episode ended.
        tasks: the instruction of each episode.
        drawn: (E, T, 2), positions of all targets on the table, whose colours are `colors`.
        success: (E,), both hands were on their targets at the same time, without a collision before.
        collided: (E,), a hand touched an obstacle before success.
        sides: (E, 2), +1 or -1, the side on which a hand passed its obstacle; 0 while it has not.
    """

    colors = DISCS["target"][1]

    def __init__(self, num_envs: int, seed: int, first: int = 0):
        """Episodes `first`, ... of a seed are the same whatever num_envs is: methods face the same ones."""
        numbers = range(first, first + num_envs)
        draws = np.stack([np.random.default_rng((seed, i)).uniform(-1, 1, 6) for i in numbers])
        start_x = OBSTACLES[:, 0] + START_X_SPREAD * draws[:, :2]
        target_x = OBSTACLES[:, 0] + TARGET_X_SPREAD * draws[:, 2:4]
        self.hands = np.stack([start_x, np.full((num_envs, 2), START_Y)], -1)
        self.targets = np.stack([target_x, TARGET_Y + TARGET_Y_SPREAD * draws[:, 4:]], -1)
        self.tasks, self.drawn = [TASK] * num_envs, self.targets
        self.success, self.collided = np.zeros((2, num_envs), bool)
        self.steps, self.sides = np.zeros(num_envs, int), np.zeros((num_envs, 2), int)

    @property
    def state(self) -> np.ndarray:
        """(E, 4) float32, in the order of NAMES."""
        return self.hands.reshape(-1, 4).astype(np.float32)

    @property
    def done(self) -> np.ndarray:
        """(E,) success, collision, or out of time."""
        return self.success | self.collided | (self.steps >= MAX_STEPS)

    def step(self, actions: np.ndarray) -> None:
        """Move every hand towards its commanded position (E, 4), finite; ended episodes stand still."""
        if not np.isfinite(actions).all():
            raise ValueError("the task was given an action that is not finite")
        active = ~self.done
        move = np.asarray(actions, float).reshape(-1, 2, 2) - self.hands
        distance = np.linalg.norm(move, axis=-1, keepdims=True)
        move *= np.minimum(1, SPEED_LIMIT / np.maximum(distance, 1e-9)) * active[:, None, None]
        before, self.hands = self.hands, self.hands + move

        # The nearest point of the path just travelled, so that no speed jumps over an obstacle's edge.
        to_centre = OBSTACLES - before
        along = (to_centre * move).sum(-1) / np.maximum((move**2).sum(-1), 1e-12)
        nearest = before + np.clip(along, 0, 1)[..., None] * move
        touched = (np.linalg.norm(nearest - OBSTACLES, axis=-1) < OBSTACLE_RADIUS).any(-1)
        self.collided |= active & touched
        on_target = np.linalg.norm(self.hands - self.targets, axis=-1) < SUCCESS_DISTANCE
        self.success |= active & ~self.collided & on_target.all(-1)
        crossed = (before[..., 1] < 0) & (self.hands[..., 1] >= 0) & (self.sides == 0)
        self.sides = np.where(crossed, np.sign(nearest[..., 0] - OBSTACLES[:, 0]), self.sides).astype(int)
        self.steps += active

    def aim(self) -> np.ndarray:
        """(E, 2, 2), where the demonstrator's hands are heading."""
        return self.targets

    def images(self) -> np.ndarray:
        """(E, 3, H, W, 3) uint8, what the cameras see now."""
        return render(self.hands, self.drawn, colors=self.colors)


def render(
    hands: np.ndarray, targets: np.ndarray, size: int = IMAGE_SIZE, colors: Sequence = DISCS["target"][1]
) -> np.ndarray:
    """What the cameras see of hands (E, 2, 2) and targets (E, T, 2): (E, 3, size, size, 3) uint8, y up."""
    num_envs = len(hands)
    centres = np.concatenate([np.zeros((num_envs, 1, 2)), hands], 1).astype(np.float32)  # (E, 3 cameras, 2)
    extents = np.array([HEAD_EXTENT, HAND_EXTENT, HAND_EXTENT], np.float32)
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    x = centres[..., :1] + extents[:, None] * pixels  # (E, 3, W)
    y = centres[..., 1:] - extents[:, None] * pixels  # (E, 3, H)
    pixel_width = 2 * extents[:, None, None] / size
    canvas = np.empty((num_envs, 3, size, size, 3), np.float32)
    canvas[:] = TABLE_COLOR
    positions = {"obstacle": np.broadcast_to(OBSTACLES, hands.shape), "target": targets, "hand": hands}
    for kind, (radius, usual) in DISCS.items():
        for arm, color in enumerate(colors if kind == "target" else usual):
            centre = positions[kind][:, arm].astype(np.float32)  # (E, 2)
            dx2 = (x - centre[:, None, :1]) ** 2
            dy2 = (y - centre[:, None, 1:]) ** 2
            distance = np.sqrt(dy2[..., :, None] + dx2[..., None, :])  # (E, 3, H, W)
            coverage = np.clip((radius - distance) / pixel_width + 0.5, 0, 1)  # soft edge of one pixel
            canvas += coverage[..., None] * (np.array(color, np.float32) - canvas)
    return (canvas + 0.5).astype(np.uint8)


def expert_action(hands: np.ndarray, targets: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Next commanded positions of the demonstrator, (E, 4), without noise, for positions (E, 2, 2).

    The shortest path to the target that keeps EXPERT_RADIUS from the obstacle's centre: straight to the
    circle's tangent point, along the circle, straight to the target. `sides` (E, 2) are +1 to pass on the
    right (larger x), -1 on the left.
    """
    # In polar coordinates about the obstacle, measured so that the hand travels towards growing angles:
    # counter-clockwise when it passes on the right, mirrored otherwise.
    mirror = np.stack([sides, np.ones_like(sides)], -1)
    hand, target = (hands - OBSTACLES) * mirror, (targets - OBSTACLES) * mirror
    radius, target_radius = np.linalg.norm(hand, axis=-1), np.linalg.norm(target, axis=-1)
    angle = np.arctan2(hand[..., 1], hand[..., 0])
    ahead = np.mod(np.arctan2(target[..., 1], target[..., 0]) - angle, 2 * np.pi)  # angle yet to travel
    off_circle = np.arccos(np.clip(EXPERT_RADIUS / radius, -1, 1))  # from the hand to its tangent point
    off_target = np.arccos(np.clip(EXPERT_RADIUS / target_radius, -1, 1))
    sees_target = (ahead <= off_circle + off_target) | (ahead > 1.5 * np.pi)  # the latter: already past it
    on_circle = radius < EXPERT_RADIUS + 1e-3
    tangent_angle = angle + np.where(on_circle, EXPERT_SPEED / EXPERT_RADIUS, off_circle)
    tangent = EXPERT_RADIUS * np.stack([np.cos(tangent_angle), np.sin(tangent_angle)], -1)
    goal = np.where(sees_target[..., None], target, tangent)
    move = goal - hand
    distance = np.linalg.norm(move, axis=-1, keepdims=True)
    move *= np.minimum(1, EXPERT_SPEED / np.maximum(distance, 1e-9))
    return ((hand + move) * mirror + OBSTACLES).reshape(-1, 4)


class BimanualEnv(gymnasium.Env):
    """One copy of the task behind the gymnasium interface; the reward is 1 on success, else 0."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012 (gymnasium's own convention)
    action_space = Box(-HEAD_EXTENT, HEAD_EXTENT, (4,), np.float32)
    observation_space = Dict(
        images=Dict({camera: Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8) for camera in CAMERAS}),
        state=Box(-np.inf, np.inf, (4,), np.float32),
    )

    def __init__(self, render_mode: str = "rgb_array"):
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.simulator = Simulator(1, seed=int(self.np_random.integers(2**31)))
        return self._observation(), self._info()

    def step(self, action: np.ndarray):
        self.simulator.step(np.asarray(action)[None])
        info = self._info()
        terminated = info["success"] or info["collided"]
        truncated = bool(self.simulator.done[0]) and not terminated
        return self._observation(), float(info["success"]), terminated, truncated, info

    def render(self) -> np.ndarray:
        return render(self.simulator.hands, self.simulator.targets, 4 * IMAGE_SIZE)[0, 0]

    def _observation(self) -> dict:
        images = dict(zip(CAMERAS, self.simulator.images()[0], strict=True))
        return {"images": images, "state": self.simulator.state[0]}

    def _info(self) -> dict:
        success, collided, sides = self.simulator.success, self.simulator.collided, self.simulator.sides
        return {"success": bool(success[0]), "collided": bool(collided[0]), "sides": sides[0].copy()}


def demonstrate(num_episodes: int, seed: int, kind: type[Simulator] = Simulator) -> Iterator[Demonstration]:
    """Demonstrations by the expert, each passing its obstacles on random sides; rendered one at a time."""
    simulator = kind(num_episodes, seed)
    rng = np.random.default_rng((seed, num_episodes, 1))
    sides = rng.choice([-1, 1], (num_episodes, 2))
    hands, actions = [], []
    resting, length = np.zeros((2, num_episodes), int)
    while (resting < EXPERT_HOLD_STEPS).any():
        action = expert_action(simulator.hands, simulator.aim(), sides)
        action = action + rng.normal(0, EXPERT_NOISE, action.shape)
        hands.append(simulator.hands.copy())
        actions.append(action)
        length[resting < EXPERT_HOLD_STEPS] = len(hands)
        resting += np.linalg.norm(simulator.hands - simulator.targets, axis=-1).max(-1) < 0.02
        simulator.success[:] = False  # a demonstration continues to the target's centre and rests there
        simulator.step(action)
    hands, actions = np.stack(hands, 1), np.stack(actions, 1)  # (E, L, 2, 2), (E, L, 4)
    for i, n in enumerate(length):
        targets = np.broadcast_to(simulator.drawn[i], (n, *simulator.drawn[i].shape))
        state = hands[i, :n].reshape(n, 4).astype(np.float32)
        action = actions[i, :n].astype(np.float32)
        views = render(hands[i, :n], targets, colors=simulator.colors).swapaxes(0, 1)
        images = dict(zip(CAMERAS, views, strict=True))
        yield Demonstration(state, action, images, simulator.tasks[i])


def record(root: Path, demonstrations: Iterable[Demonstration], total: int | None = None) -> Path:
    """Write demonstrations, `total` for the progress bar, as a LeRobot v3 dataset at `root`, a new folder."""
    shown = tqdm(demonstrations, desc="recording demonstrations", unit="episode", total=total)
    return write_dataset(root, shown, fps=FPS, state_names=NAMES, action_names=NAMES)


def ensure_recorded(
    cache_dir: Path, name: str = "demo", number: int = NUM_DEMONSTRATIONS, kind: type[Simulator] = Simulator
) -> Path:
    """The recorded demonstrations below `cache_dir`, made on first use, by one process only."""
    root = Path(cache_dir).expanduser() / f"{name}-{number}"
    if root.exists():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_suffix(".lock")):
        if not root.exists():
            unfinished = root.with_suffix(".recording")
            shutil.rmtree(unfinished, ignore_errors=True)
            record(unfinished, demonstrate(number, seed=0, kind=kind), number)
            unfinished.rename(root)
    return root
