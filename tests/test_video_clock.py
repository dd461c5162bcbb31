import numpy as np
import pytest

from common.data.video_clock import Segment, clock_faults

FPS, LENGTHS = 10, (12, 9, 15, 6)
STARTS = np.cumsum([0, *LENGTHS[:-1]])
TIMES = np.arange(sum(LENGTHS)) / FPS


def segments(begin=lambda e, start: start, finish=lambda e, end: end):
    """Correct segments, but with the given starts or ends."""
    return [
        Segment(e, n, begin(e, start / FPS), finish(e, (start + n) / FPS))
        for e, (n, start) in enumerate(zip(LENGTHS, STARTS, strict=True))
    ]


def named(times, found, fps=FPS, absent=()):
    faults = clock_faults("v.mp4", np.asarray(times), found, fps, absent)
    for episode, clause in faults.items():
        assert clause.startswith(f"Episode {episode}")
        assert "v.mp4" in clause
    return set(faults)


def test_what_agrees_is_not_named():
    assert named(TIMES, segments()) == set()
    assert named(TIMES, segments(finish=lambda e, end: None)) == set()
    assert named(np.round(TIMES * 1000 / 3) * 3 / 1000, segments()) == set()  # ticks of 3 ms
    assert named(TIMES + 0.2, segments(lambda e, s: s + 0.2, lambda e, end: end + 0.2)) == set()


def test_the_times_of_many_thousand_steps_add_up_in_floating_point():
    lengths = np.random.default_rng(0).integers(20, 400, 800)
    times, at, found = np.round(np.arange(lengths.sum()) * 512) / (512 * 30), 0.0, []
    for episode, length in enumerate(lengths):
        found.append(Segment(episode, int(length), at, at + length / 30))
        at += length / 30 + 1e-7  # a file's duration is rounded to a microsecond
    assert named(times, found, 30) == set()


@pytest.mark.parametrize("ends", [True, False], ids=["with ends", "without"])
@pytest.mark.parametrize(
    ("begin", "expected"),
    [
        (lambda e, start: 0.0 if e == 1 else start, {0, 1}),
        (lambda e, start: start - 0.1 * (e == 2), {1, 2}),
        (lambda e, start: start + 0.07 * e, {1, 2, 3}),
        (lambda e, start: start + 0.007 * e, {1, 2, 3}),
        (lambda e, start: start + 0.1 * e, {1, 2, 3}),
        (lambda e, start: start + 0.1, {0, 1, 2, 3}),
        (lambda e, start: start + 0.03, {0, 1, 2, 3}),
        (lambda e, start: start + 0.2 * (e > 1), {2, 3}),
        (lambda e, start: start + 0.3 * (e == 3), {3}),
        (lambda e, start: start * 2, {1, 2, 3}),
        (lambda e, start: start / 2, {0, 1, 2, 3}),
        (lambda e, start: 1e300 * (e == 1) + start, {1}),
        (lambda e, start: start - 0.1 * e, {0, 1, 2, 3}),
    ],
)
def test_starts_that_contradict(begin, expected, ends):
    shifted = segments(begin, (lambda e, end: end) if ends else lambda e, end: None)
    assert named(TIMES, shifted) == expected
    assert named(TIMES, [s._replace(end=s.start + s.steps / FPS) for s in shifted]) >= expected


def test_the_first_episodes_before_a_drift_stay():
    assert named(TIMES, segments(lambda e, s: s + 0.07 * max(0, e - 1))) == {2, 3}
    shift = segments(lambda e, s: s + 0.1 * (e > 1), lambda e, end: end + 0.1 * (e > 0))
    assert named(TIMES, shift) == {1, 2, 3}
    assert named(TIMES, segments(lambda e, s: s + 0.2 * (e > 1), lambda e, end: end + 0.2 * (e > 1))) == {
        2,
        3,
    }


def test_two_episodes_that_have_changed_places():
    times = np.arange(30) / FPS
    found = [Segment(0, 10, 1.0, 2.0), Segment(1, 10, 0.0, 1.0), Segment(2, 10, 2.0, 3.0)]
    assert named(times, found) >= {0, 1}


def test_ends_that_contradict():
    assert named(TIMES, segments(finish=lambda e, end: end + 0.1 * (e == 1))) == {1, 2}
    assert named(TIMES, segments(finish=lambda e, end: end - 0.1 * (e == 1))) == {1}
    assert named(TIMES, segments(finish=lambda e, end: end + 0.03 * (e == 3))) == {3}
    assert named(TIMES, segments(finish=lambda e, end: np.inf if e == 3 else end)) == {3}


@pytest.mark.parametrize("rate", [5, 9, 11, 15, 20, 30])
def test_a_file_of_another_rate_names_all_of_it(rate):
    assert named(np.arange(sum(LENGTHS)) / rate, segments()) == {0, 1, 2, 3}
    assert named(np.arange(sum(LENGTHS) * rate // FPS) / rate, segments()) == {0, 1, 2, 3}


def test_a_file_with_frames_too_many_or_too_few_names_all_of_it():
    for more in (-20, -1, 1, 20):
        assert named(np.arange(sum(LENGTHS) + more) / FPS, segments()) == {0, 1, 2, 3}
    assert named([], segments()) == {0, 1, 2, 3}


def test_a_lost_or_a_doubled_frame_names_its_episode():
    assert named(np.delete(TIMES, 14), segments()) == {1}
    assert named(np.delete(TIMES, 12), segments()) == {1}
    assert named(np.insert(TIMES, 14, TIMES[14]), segments()) == {1}
    late = TIMES.copy()
    late[25] += 0.02
    assert named(late, segments()) == {2}


def test_frames_of_episodes_that_are_absent_are_nobodys():
    whole = segments()
    for absent in range(4):
        left = [segment for segment in whole if segment.episode != absent]
        assert named(TIMES, left, absent={absent}) == set()
        assert named(TIMES, left) != set()
