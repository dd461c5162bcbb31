"""A person who watches a policy act, and takes over: at a keyboard, or with a device of your own.

An `Operator` can be a pedal and a leader arm: pressing the pedal takes control, and the arm's joints are the
action. `collect.py --by module:factory` uses yours.
"""

import time
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from common.data.demo import EXPERT_SPEED
from common.envs import Environment, import_factory
from common.errors import UserError

if TYPE_CHECKING:
    from matplotlib.backend_bases import KeyEvent
    from matplotlib.figure import Figure

MOVES = {  # of the built-in task's hands: left x, left y, right x, right y
    **{"a": (-1, 0, 0, 0), "d": (1, 0, 0, 0), "s": (0, -1, 0, 0), "w": (0, 1, 0, 0)},
    **{"left": (0, 0, -1, 0), "right": (0, 0, 1, 0), "down": (0, 0, 0, -1), "up": (0, 0, 0, 1)},
}
TAKE, END = " ", "q"
HELP = "space: take over.  W A S D: left hand.  arrows: right hand.  Q: stop"


class Operator(Protocol):
    """A person and what they act with. A call of more than 120 s counts as an environment that hangs.

    Attributes:
        has_control: whether they have taken over in this episode.
        finished: whether they have had enough: this episode is the last, and over unless they have control.
    """

    has_control: bool
    finished: bool

    def begin(self, task: str) -> None:
        """An episode begins, with this instruction; nobody has taken over."""

    def show(self, picture: np.ndarray) -> None:
        """Show what happens, (H, W, 3) uint8, until the next control step is due."""

    def action(self, state: np.ndarray) -> np.ndarray:
        """The action for this control step, (A,) in recorded units, at the state (P,)."""


class Watched:
    """An environment that an operator watches; its episode also ends when they take over, or stop."""

    def __init__(self, environment: Environment, operator: Operator):
        self._environment, self._operator = environment, operator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._environment, name)

    def reset(self, seed: int, episode: int) -> None:
        self._environment.reset(seed, episode)
        self._steps, self._watching = 0, True
        self._operator.begin(self._environment.task)
        self._operator.show(self._environment.picture())

    def step(self, action: np.ndarray) -> bool:
        over = self._environment.step(action)
        self._operator.show(self._environment.picture())
        self._steps += 1
        # An episode of one step would be taken for a fault of the environment.
        ends = (self._operator.has_control or self._operator.finished) and self._watching and self._steps > 1
        self._watching &= not ends  # when they act, it ends by itself
        return over or ends


class Keyboard:
    """An `Operator` at a keyboard, for the built-in task: watches a window of matplotlib."""

    def __init__(self, figure: "Figure", fps: float):
        self.has_control = self.finished = False
        self._figure, self._period, self._due = figure, 1 / fps, 0.0
        self._closed = False
        self._held: set[str] = set()
        self._pressed: set[str] = set()  # since the last action: a short press moves, too
        axes = figure.add_axes((0, 0, 1, 0.92))
        axes.set_axis_off()
        self._image = axes.imshow(np.zeros((1, 1, 3), np.uint8))
        for event, react in (("key_press_event", self._press), ("key_release_event", self._release)):
            figure.canvas.mpl_connect(event, react)
        figure.canvas.mpl_connect("close_event", self._close)

    def begin(self, task: str) -> None:
        self.has_control, self._due = False, time.monotonic()
        self._figure.suptitle(f"{task}\n{HELP}", fontsize="small")

    def show(self, picture: np.ndarray) -> None:
        if self._closed:
            return
        self._image.set_data(picture)
        self._image.set_extent((-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5))
        self._figure.canvas.draw_idle()
        now, moment = time.monotonic(), 0.001  # which the window's events need
        self._due = max(self._due + self._period, now + moment)
        self._figure.canvas.start_event_loop(self._due - now)  # forever, if it were not above 0

    def action(self, state: np.ndarray) -> np.ndarray:
        keys, self._pressed = self._held | self._pressed, set()
        return state + EXPERT_SPEED * np.sum([MOVES[key] for key in keys], axis=0, initial=0)

    def _press(self, event: "KeyEvent") -> None:
        if event.key == TAKE:
            self.has_control = True
        elif event.key == END:
            self.finished = True
        elif event.key in MOVES:
            self._held.add(event.key)
            self._pressed.add(event.key)

    def _release(self, event: "KeyEvent") -> None:
        self._held.discard(event.key)

    def _close(self, _: Any) -> None:
        self._closed = self.finished = True


def make_operator(name: str, environment: Environment) -> Operator:
    """The operator that `--by` names; a UserError if there is none, or no window for it."""
    if name == "keyboard":
        return _keyboard(environment)
    return import_factory(name, "--by", ("expert", "keyboard", "module:factory"))()


def _keyboard(environment: Environment) -> Keyboard:
    from matplotlib import pyplot
    from matplotlib.backends import BackendFilter, backend_registry

    if not environment.name.startswith("demo"):
        raise UserError(
            f"--by keyboard moves the hands of the built-in task, not {environment.name}: write a "
            f"common.person.Operator and give it as --by module:factory."
        )
    if pyplot.get_backend().lower() in backend_registry.list_builtin(BackendFilter.NON_INTERACTIVE):
        raise UserError(
            "--by keyboard needs a window, and matplotlib finds no display: run it where there is one (over "
            "SSH with ssh -Y), with Tk or Qt installed (pip install PySide6)."
        )
    figure = pyplot.figure("collect.py", figsize=(6, 6.5))
    figure.canvas.mpl_disconnect(figure.canvas.manager.key_press_handler_id)  # its S would save, its Q close
    pyplot.show(block=False)
    return Keyboard(figure, environment.fps)
