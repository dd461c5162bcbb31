"""The robot's loop: joining chunks, bounds on commands, and what happens when no chunk arrives."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from common.control import ControlLoop, Plan, RateLimit, Report, Watchdog, Worker, blend
from common.data.rotation import Rotations
from common.errors import UserError

NAMES = ("x", "y")


def policy(horizon=16, max_delay=0, fps=50.0, offset=0, rotations=None):
    spec = SimpleNamespace(
        fps=fps,
        action_offset=offset,
        action_rotations=rotations,
        max_delay=max_delay,
        state_names=NAMES,
        action_names=NAMES,
    )
    return SimpleNamespace(horizon=horizon, spec=spec)


def chunk(start, horizon=16, slope=1.0):
    """A number that grows with a constant slope from a start value."""
    return (start + slope * np.arange(horizon, dtype=np.float32))[:, None]


def drive(plan, cycles, delay, make):
    """The actions of `cycles` cycles, None where the robot holds; chunks arrive `delay` cycles late.

    `make(time, prefix)` returns the chunk that is requested at a time.
    """
    given, coming = [], None
    for cycle in range(cycles):
        if coming is not None and cycle >= coming[0]:
            plan.join(coming[1])
            coming = None
        if plan.due:
            now = plan.now
            prefix = plan.ask()
            coming = (cycle + delay, make(now, prefix))
            if delay == 0:
                plan.join(coming[1])
                coming = None
        action = plan.next()
        given.append(None if action is None else float(action[0]))
    return given


# Joining chunks


def test_without_prefixes_the_robot_stops_while_it_waits():
    plan, starts = Plan(policy(), 50, execute_steps=4), []

    def make(now, prefix):
        assert len(prefix) == 0
        starts.append(now)
        return chunk(100 * len(starts))

    given = drive(plan, 17, 3, make)
    none = [None] * 3
    assert given == [*none, 100, 101, 102, 103, *none, 200, 201, 202, 203, *none]
    assert starts == [0, 4, 8]  # time stands still while it holds


def test_a_chunk_is_joined_where_its_prefix_ends():
    plan, prefixes = Plan(policy(max_delay=6), 50, execute_steps=8), []

    def make(now, prefix):
        prefixes.append(prefix.ravel().tolist())
        own = chunk(1000 * len(prefixes))
        own[: len(prefix), 0] = prefix.ravel()
        return own

    given = drive(plan, 40, 3, make)
    assert given[:3] == [None] * 3  # the robot rests until the first chunk
    assert None not in given[3:]  # afterwards it never stops
    # No delay is known yet: the longest prefix. Later ones have the measured three cycles.
    assert prefixes[1] == [1008, 1009, 1010, 1011, 1012, 1013]
    assert [len(prefix) for prefix in prefixes[2:]] == [3] * len(prefixes[2:])
    # Requested after eight actions; of the new chunk, the fourth action is the first to be executed.
    assert given[3:14] == [1000 + i for i in range(11)]
    assert given[14:22] == [1011, 1012, 1013, 2006, 2007, 2008, 2009, 2010]
    assert prefixes[2] == [2008, 2009, 2010]
    assert given[22] == 3003


@pytest.mark.parametrize(("fps", "rate", "delay"), [(30, 50, 4), (10, 100, 17), (50, 25, 3), (30, 30, 5)])
def test_no_jump_at_any_ratio_of_rates(fps, rate, delay):
    """The policy continues its prefix in a straight line: so must the robot, whatever the rates."""
    plan = Plan(policy(max_delay=8, fps=fps, horizon=24), rate)

    def make(now, prefix):
        begin = prefix[0, 0] if len(prefix) else now
        rows = chunk(begin, 24)
        np.testing.assert_allclose(rows[: len(prefix), 0], prefix.ravel(), rtol=1e-5)
        return rows

    given = drive(plan, 300, delay, make)
    moving = [x for x in given if x is not None]
    np.testing.assert_allclose(np.diff(moving), fps / rate, rtol=1e-3)
    assert len(moving) == 300 - delay  # it stops only for the first chunk


@pytest.mark.parametrize(
    ("rate", "delay", "rows"), [(50, 1, 1), (50, 4, 4), (100, 3, 2), (100, 4, 3), (25, 2, 3)]
)
def test_a_prefix_holds_what_is_executed_until_the_chunk_comes(rate, delay, rows):
    plan, prefixes = Plan(policy(max_delay=8), rate), []

    def make(now, prefix):
        prefixes.append(prefix)
        return np.concatenate([prefix.reshape(-1, 1), chunk(now + len(prefix), 16 - len(prefix))])

    given = drive(plan, 60, delay, make)
    assert [len(prefix) for prefix in prefixes[2:]] == [rows] * len(prefixes[2:])
    assert None not in given[delay:]


def test_a_chunk_that_is_later_than_its_prefix_makes_the_robot_hold():
    plan = Plan(policy(max_delay=2), 50, execute_steps=8)
    given = drive(plan, 24, 5, lambda now, prefix: chunk(now))
    assert given[5:15] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert given[15:18] == [None] * 3
    assert given[18:] == [10, 11, 12, 13, 14, 15]
    assert plan.needed == 5


def test_an_action_offset_gives_time_too():
    plan, prefixes = Plan(policy(max_delay=6, offset=2), 50, execute_steps=8), []

    def make(now, prefix):
        prefixes.append(len(prefix))
        return chunk(now + 2)

    given = drive(plan, 40, 5, make)
    assert given[5:8] == [2, 2, 2]  # the first action, until it is due
    assert given[8:] == [3 + i for i in range(32)]
    assert prefixes[2:] == [3] * len(prefixes[2:])


def test_delays_are_judged_by_a_high_percentile_without_the_first():
    plan = Plan(policy(max_delay=16), 50)
    assert plan.needed == 16
    for delay in (100, *[3] * 9, 7):
        plan.ask()
        plan.waited = delay
        plan.join(chunk(plan.now))
        plan.now += 1
    assert list(plan.delays) == [*[3] * 9, 7]
    assert plan.needed == 7


def test_nothing_is_extrapolated_when_no_chunk_comes():
    plan = Plan(policy(max_delay=4), 50, execute_steps=8)
    plan.ask()
    plan.join(chunk(0))
    given = [plan.next() for _ in range(8)]
    assert plan.due
    plan.ask()
    assert [float(plan.next()[0]) for _ in range(4)] == [8, 9, 10, 11]
    assert plan.next() is None  # the promised prefix has ended
    plan.fail()
    given = [plan.next() for _ in range(10)]
    assert [float(x[0]) for x in given[:4]] == [12, 13, 14, 15]
    assert given[4:] == [None] * 6
    prefix = plan.ask()  # the robot will still be there
    assert prefix.tolist() == [[15.0]]


def test_ensembling_averages_all_that_is_known_about_now():
    plan = Plan(policy(horizon=6), 50, ensemble=0.5)
    values = iter(range(100))
    given = drive(plan, 12, 2, lambda now, prefix: np.full((6, 1), float(next(values)), np.float32))
    assert given[:2] == [None, None]
    assert None not in given[2:]
    # Chunk i is observed at time 2 (i - 1); at time 4 the first (steps 0 to 5) and the second have arrived.
    weights = np.exp(-0.5 * np.arange(3))
    assert given[4] == pytest.approx((0 * weights[0] + 1 * weights[1]) / weights[:2].sum(), abs=1e-6)


@pytest.mark.parametrize(("offset", "wanted"), [(0, [0, 1, 10, 15, 15]), (2, [0, 0, 0, 1, 10])])
def test_chunks_of_different_tasks_are_not_averaged(offset, wanted):
    plan, given = Plan(policy(horizon=6, offset=offset), 50, ensemble=0.0), []
    for value, task in ((0, "fold"), (2, "fold"), (10, "open"), (20, "open")):
        plan.ask()
        plan.join(np.full((6, 1), value, np.float32), task)
        given.append(float(plan.next()[0]))
    assert [*given, float(plan.next()[0])] == wanted  # with an offset, chunks begin later


def test_a_loop_averages_only_chunks_of_its_task():
    arm, line, said = Arm(), Line(), []
    arm.observe = lambda: {**Arm.observe(arm), "task": "fold" if len(said) < 3 else "open"}
    line.act = lambda seen: np.full((16, 2), 1.0 if said.append(0) or seen["task"] == "fold" else 9.0)
    ControlLoop(line, arm, rate=50, ensemble=0.01).run(0.3)
    assert {float(command) for command in arm.sent} == {1.0, 9.0}


def test_rotations_are_blended_as_rotations():
    turn = Rotations("euler", (1,), ("x", "r", "p", "y"))
    between = blend([np.array([0, 0, 0, 3.1]), np.array([2, 0, 0, -3.1])], [0.5, 0.5], turn)
    assert between[0] == pytest.approx(1)
    assert abs(between[3]) == pytest.approx(np.pi, abs=1e-4)  # the short way round
    turn = Rotations("quaternion", (0,), tuple("xyzw"))
    first, second = np.array([0, 0, -0.6, -0.8], np.float32), np.array([0, 0, -0.8, -0.6], np.float32)
    between = blend([first, second], [0.5, 0.5], turn)
    np.testing.assert_allclose(between, [0, 0, -np.sqrt(0.5), -np.sqrt(0.5)], atol=1e-5)  # with the same sign
    several = blend(
        [np.stack([first, second, -first]), np.stack([second, -second, -first])], [0.5, 0.5], turn
    )
    np.testing.assert_allclose(several, [between, second, -first], atol=1e-5)


def test_rotations_continue_the_numbers_of_the_last_command_and_of_the_robot():
    turn = Rotations("euler", (0,), ("r", "p", "y"))
    arm, line = Arm(), Line(max_delay=0)
    arm.position, line.spec.action_rotations, rolls = np.array([3.2, 0, 0], np.float32), turn, iter(range(99))

    def act(observation):  # each chunk rolls a little further; canonical angles are negative
        return np.array([[3.2 + 0.02 * next(rolls) - 2 * np.pi, 0, 0]] * line.horizon, np.float32)

    line.act = act
    ControlLoop(line, arm, rate=50, execute_steps=2).run(0.4)
    assert arm.sent[0] == pytest.approx(3.2, abs=1e-5)
    assert arm.sent[-1] > 3.22
    assert np.abs(np.diff(arm.sent)).max() < 0.1


# Bounds


def test_a_target_within_bounds_is_followed_exactly():
    limit, t = RateLimit(2.0, 10.0, 100, 1), np.arange(200) / 100
    target = 1 - np.cos(t)[:, None]  # velocity and acceleration at most 1
    limit.begin(target[0])
    given = np.array([limit(x) for x in target])
    np.testing.assert_allclose(given[1:], target[1:], atol=1e-6)


def test_a_jump_is_bounded_and_braked_for():
    limit = RateLimit([1.0, 100.0], [4.0, 4.0], 50, 2)
    limit.begin(np.zeros(2))
    given = np.array([limit(np.ones(2)) for _ in range(200)], np.float64)
    velocity = np.diff(np.vstack([np.zeros((2, 2)), given]), axis=0) * 50
    assert np.abs(velocity[:, 0]).max() == pytest.approx(1.0, abs=1e-3)
    assert np.abs(velocity).max() < 2.1  # sqrt(a x) is the highest speed that can still brake in time
    assert np.abs(np.diff(velocity, axis=0)).max() * 50 < 4.0 + 1e-2
    assert given.max() < 1 + 4.0 / 50**2  # overshoots by no more than one cycle's braking
    np.testing.assert_allclose(given[-1], 1, atol=1e-4)


def test_holding_brakes_and_stays():
    limit = RateLimit(None, 10.0, 100, 1)
    limit.begin(np.zeros(1))
    for i in range(100):
        limit(np.array([0.01 * i]))
    held = np.array([limit.hold()[0] for _ in range(30)])
    assert (np.diff(held) >= 0).all()
    assert np.ptp(held[12:]) == 0
    free = RateLimit(None, None, 100, 1)
    free.begin(np.zeros(1))
    assert free(np.array([5.0])) == 5
    assert free.hold() == 5  # without bounds: stops at once


@pytest.mark.parametrize("wrong", [0, -1, [1, 2, 3], "fast", [1, float("nan")]])
def test_bounds_that_are_none(wrong):
    with pytest.raises(UserError, match=r"max_velocity must be a positive number, or 2 of them"):
        RateLimit(wrong, None, 50, 2)


def test_rotations_are_not_limited():
    limit = RateLimit(0.1, None, 50, 5, Rotations("quaternion", (1,), ("g", *"xyzw")))
    limit.begin(np.array([0, 0, 0, 0, 1.0]))
    np.testing.assert_allclose(limit(np.array([1, 0, 0, 0, -1.0])), [0.002, 0, 0, 0, -1], atol=1e-7)


# The loop


class Arm:
    """A robot that follows commands exactly, and records their times."""

    def __init__(self):
        self.sent, self.times, self.position, self.resets = [], [], np.zeros(2, np.float32), 0

    def observe(self):
        return {"images": {}, "state": self.position.copy()}

    def send(self, action):
        self.position = np.array(action)
        self.sent.append(self.position[0])
        self.times.append(time.perf_counter())

    def reset(self):
        self.resets += 1


class Line:
    """A policy that continues in a straight line from the robot's position, or from its prefix."""

    def __init__(self, seconds=0.03, max_delay=6, slope=0.01):
        made = policy(max_delay=max_delay)
        self.horizon, self.spec, self.seconds, self.slope = made.horizon, made.spec, seconds, slope
        self.resets, self.threads, self.prefixes = 0, set(), []

    def reset(self):
        self.resets += 1

    def act(self, observation, prefix=None):
        time.sleep(self.seconds)
        self.threads.add(threading.get_ident())
        self.prefixes.append(0 if prefix is None else len(prefix))
        first = observation["state"] if prefix is None else prefix[0]
        return first + self.slope * np.arange(self.horizon, dtype=np.float32)[:, None]


@pytest.mark.parametrize(("fps", "max_delay", "said"), [(50, 6, 1), (50, 0, 0), (2, 6, 0)])
def test_a_robot_that_observes_late_while_it_moves_is_said_once(capsys, fps, max_delay, said):
    arm, line = Arm(), Line(0.01, max_delay)
    arm.observe = lambda: time.sleep(0.1) or Arm.observe(arm)
    line.spec.fps = fps
    ControlLoop(line, arm, rate=50, execute_steps=2).run(3 if fps == 50 else 6)
    assert len(line.prefixes) > 3
    assert capsys.readouterr().out.count("have robot.observe() return the newest frames at once") == said


def test_the_robot_moves_without_a_stop_at_its_rate(capsys):
    arm, line = Arm(), Line()
    report = ControlLoop(line, arm, rate=50).run(1.5)
    assert (arm.resets, line.resets, len(line.threads)) == (1, 1, 1)
    assert report.cycles == len(arm.sent)
    assert report.cycles + report.late >= 74
    moved = np.diff(arm.sent)
    assert np.median(moved) == pytest.approx(0.01, rel=1e-3)
    assert report.held < report.cycles / 4  # 0 on an idle machine
    assert moved.max() < 0.011
    assert max(report.seams, default=0) < 0.6  # stopping and starting gives 0.5
    assert line.prefixes[0] == 0
    assert set(line.prefixes[1:]) <= set(range(1, 7))
    assert "--max-delay" not in capsys.readouterr().out
    text = str(report)
    assert "of 50 cycles a second" in text
    for words in ("observe  mean", "infer    mean", "send     mean", "late", "jump of velocity at seams"):
        assert words in text
    assert 0.03 <= np.mean(report.infer) < 0.2


def test_nothing_is_computed_after_the_end():
    before = set(threading.enumerate())  # other tests leave threads that are blocked
    ControlLoop(Line(seconds=0.3), Arm(), rate=50).run(0.4)  # ends while a chunk is computed
    assert not any(isinstance(thread, Worker) for thread in set(threading.enumerate()) - before)


def test_actions_that_may_be_increments_are_pointed_out(capsys):
    line = Line()
    ControlLoop(line, Arm(), rate=50).run(0.1)
    assert "positions" not in capsys.readouterr().out
    line.spec.action_names = ("dx", "dy")
    ControlLoop(line, Arm(), rate=50).run(0.1)
    assert "the actions (dx, dy) and the state have different names" in capsys.readouterr().out


def test_a_policy_without_prefixes_stops_and_says_so(capsys):
    arm, line = Arm(), Line(max_delay=0)
    report = ControlLoop(line, arm, rate=50).run(1.0)
    assert "trained without --max-delay: the robot stops" in capsys.readouterr().out
    assert set(line.prefixes) == {0}
    assert report.held >= 2  # cycles while it waits for each chunk
    report = ControlLoop(line, Arm(), rate=50, ensemble=0.1).run(1.0)
    assert report.held < report.cycles / 4
    assert len(report.infer) > 5  # as often as it can
    assert "stops" not in capsys.readouterr().out


def test_a_policy_that_is_slower_than_its_prefixes_is_said(capsys):
    ControlLoop(Line(seconds=0.15, max_delay=3), Arm(), rate=50).run(1.2)
    out = capsys.readouterr().out
    assert "actions to arrive, but the policy was trained with --max-delay 3" in out
    assert out.count("--max-delay 3") == 1


def failing(arm, line, after, error, until=99):
    """Let a policy raise errors between two chunks."""
    calls, act = iter(range(100)), line.act

    def sometimes(observation, prefix=None):
        if after <= next(calls) < until:
            raise error
        return act(observation, prefix)

    line.act = sometimes
    return arm, line


def test_a_server_that_is_gone_makes_the_robot_hold_until_it_is_back(capsys):
    arm, line = failing(Arm(), Line(), 2, UserError("ws://gpu:8000 is gone."), until=5)
    report = ControlLoop(line, arm, rate=50).run(2.0)
    out = capsys.readouterr().out
    assert out.count("the policy failed (ws://gpu:8000 is gone): the robot will hold") == 1
    assert "the robot moves again" in out
    assert report.held > 5
    assert np.diff(arm.sent).max() < 0.011  # no jump when it moves again
    assert np.diff(arm.sent).min() >= 0


def test_a_server_that_stays_away_ends_the_loop():
    arm, line = failing(Arm(), Line(), 2, ConnectionError("gone"))
    with pytest.raises(
        UserError, match=r"No chunk arrived for 0\.8 s \(the policy failed \(ConnectionError: gone"
    ):
        ControlLoop(line, arm, rate=50, patience=0.8).run(5)
    held = [x for x in arm.sent if x == arm.sent[-1]]
    assert len(held) > 10


def test_a_first_chunk_that_cannot_be_had_is_an_error_at_once():
    arm, line = failing(Arm(), Line(), 0, ValueError("the policy needs the cameras head; got tail"))
    with pytest.raises(UserError, match=r"did not start: the policy failed .*needs the cameras head"):
        ControlLoop(line, arm, rate=50).run(5)
    assert arm.sent == []


@pytest.mark.parametrize("wrong", [np.full((16, 2), np.nan), np.zeros((15, 2)), np.zeros(16)])
def test_a_chunk_of_no_use_is_not_executed(wrong, capsys):
    arm, line = Arm(), Line()
    good, calls = line.act, iter(range(100))
    line.act = lambda observation, prefix=None: wrong if next(calls) == 2 else good(observation, prefix)
    ControlLoop(line, arm, rate=50).run(1.0)
    assert "numbers that are no chunk" in capsys.readouterr().out
    assert np.isfinite(arm.sent).all()
    assert np.diff(arm.sent).max() < 0.011


def test_an_observation_that_fails_is_said_and_tried_again(capsys):
    arm, calls = Arm(), iter(range(100))
    observe = arm.observe

    def unplugged():
        if next(calls) in (2, 3):
            raise OSError("camera 1 is gone")
        return observe()

    arm.observe = unplugged
    report = ControlLoop(Line(), arm, rate=50).run(1.5)
    out = capsys.readouterr().out
    assert out.count("robot.observe() failed (OSError: camera 1 is gone): the robot will hold") == 1
    assert "moves again" in out
    assert report.cycles > 20


def test_an_observation_that_blocks_is_said_and_the_robot_holds(capsys):
    arm, calls, release = Arm(), iter(range(100)), threading.Event()
    observe = arm.observe

    def block():
        if next(calls) == 2:
            release.wait(20)
        return observe()

    arm.observe = block
    with pytest.raises(UserError, match=r"No chunk arrived for 1\.2 s \(robot.observe\(\) has not answered"):
        ControlLoop(Line(), arm, rate=50, patience=1.2).run(10)
    release.set()
    assert "robot.observe() has not answered for 0." in capsys.readouterr().out
    assert len(arm.sent) > 20  # commands continued
    assert len(set(arm.sent[-10:])) == 1


@pytest.mark.parametrize("observation", [None, {}, {"images": {}}, [1]])
def test_an_observation_of_no_use(observation):
    arm = Arm()
    arm.observe = lambda: observation
    with pytest.raises(
        UserError, match=r"robot.observe\(\) failed \(ValueError: it gave no images and state"
    ):
        ControlLoop(Line(), arm, rate=50).run(1)


def test_a_robot_that_cannot_be_sent_to_ends_the_loop():
    arm = Arm()

    def send(action):
        raise OSError("no bus")

    arm.send = send
    with pytest.raises(UserError, match=r"robot.send\(\) failed \(OSError: no bus\)"):
        ControlLoop(Line(), arm, rate=50).run(1)


def test_a_robot_that_never_observes_at_the_start():
    arm, release = Arm(), threading.Event()
    arm.observe = lambda: release.wait(20)
    with pytest.raises(UserError, match=r"robot.observe\(\) has not answered for 0\.3 s"):
        ControlLoop(Line(), arm, rate=50, patience=0.3).run(1)
    release.set()


def test_the_first_command_is_limited_from_where_the_robot_is():
    arm, line = Arm(), Line(max_delay=0)
    line.act = lambda observation, prefix=None: np.full((16, 2), 5.0, np.float32)
    ControlLoop(line, arm, rate=50, max_velocity=1.0).run(0.5)
    assert arm.sent[0] == pytest.approx(0.02)
    assert np.diff(arm.sent).max() < 0.0201


def test_late_cycles_are_counted_and_not_made_up_for():
    arm, calls = Arm(), iter(range(1000))
    send = arm.send

    def slow(action):
        send(action)
        if next(calls) == 10:
            time.sleep(0.07)

    arm.send = slow
    report = ControlLoop(Line(), arm, rate=50).run(1.0)
    assert report.late >= 3
    assert np.diff(arm.times[12:]).min() > 0.01  # no burst afterwards
    assert np.diff(arm.sent).max() < 0.011


def test_settings_that_cannot_be():
    for rate in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="control rate"):
            ControlLoop(Line(), Arm(), rate=rate)
    with pytest.raises(UserError, match=r"execute_steps must lie in 1..16, got 17"):
        ControlLoop(Line(), Arm(), rate=50, execute_steps=17)


def test_a_report_tells_seams_from_the_rest():
    report = Report(rate=10)
    for position, source in [
        *[(0, 1), (1, 1), (2, 1)],
        *[(5, 2), (6, 2), (9, 2)],
        *[(9, None), (9, None), (9, None)],
        *[(10, 3), (11, 3), (12, 3)],
    ]:
        report.command(np.array([position], float), source)
    # From 1 to 3 per cycle, and back; the stop; the start.
    assert report.seams == [20, 20, 30, 0, 10, 0]
    assert report.inside == [0, 20, 0]
    assert report.held == 3


@pytest.mark.parametrize(("rate", "delay"), [(50, 5), (50, 3), (30, 4), (125, 9)])
def test_a_seam_is_where_a_prefix_ends(rate, delay):
    """Every chunk continues its prefix, and then jumps: wherever it arrives, the jump is at a seam."""
    plan, report, coming, jump = Plan(policy(max_delay=6), rate), Report(rate), None, 5.0
    for cycle in range(400):
        late = delay - (cycle % 3)  # so that most chunks arrive while rows of their prefix are left
        if coming is not None and cycle >= coming[0] + late:
            plan.join(coming[1])
            coming = None
        if plan.due:
            prefix = plan.ask().reshape(-1, 1)
            own = np.full((16 - len(prefix), 1), (prefix[-1, 0] if len(prefix) else 0) + jump, np.float32)
            coming = (cycle, np.concatenate([prefix, own]) if len(prefix) else own)
        action = plan.next()
        if action is not None:
            report.command(action, plan.source)
    assert max(report.inside) < 1e-3
    assert max(report.seams) > jump
    assert len(report.inside) > 100


def test_a_watchdog_says_things_once(capsys):
    dog = Watchdog(5)
    dog.ask(0.0)
    dog.check(0.4, "the policy")
    assert capsys.readouterr().out == ""
    dog.check(0.6, "the policy")
    dog.check(0.7, "the policy")
    assert capsys.readouterr().out.count("the policy has not answered for 0.6 s") == 1
    dog.feed(1.0)
    assert "a chunk arrived after 1.0 s" in capsys.readouterr().out
    dog.ask(2.0)  # what was executed until then does not count
    dog.check(2.4, "the policy")
    dog.check(6.9, "the policy")
    dog.ask(6.9)  # after a failure: tried again
    with pytest.raises(UserError, match="No chunk arrived for 5 s"):
        dog.check(7.1, "the policy")


@pytest.mark.parametrize("patience", [10, 0.6])
def test_a_robot_that_executes_a_long_chunk_is_not_waiting(patience, capsys):
    line = Line(max_delay=0)
    line.spec.fps = 10.0
    report = ControlLoop(line, Arm(), rate=50, patience=patience).run(3.0)
    assert len(report.infer) >= 3
    assert "has not answered" not in capsys.readouterr().out
