import random
import re

import pytest

from common.data.numbering import explain, number_names, read_name

EPISODES = [f"episode_{number}.hdf5" for number in (0, 1, 3, 10)]


def numbers(*places):
    """The number of each file, or of each (file, group)."""
    places = [place if isinstance(place, tuple) else (place, "") for place in places]
    files = [file for file, _ in places]
    return number_names([read_name(file, group, files.count(file) == 1) for file, group in places])


def demos(file, count, word="data/demo_"):
    return [(file, f"{word}{number}/") for number in range(count)]


def test_the_numbers_are_those_in_the_names():
    assert numbers(*EPISODES) == [0, 1, 3, 10]
    assert numbers(*demos("a.hdf5", 3)) == [0, 1, 2]
    assert numbers(("a.hdf5", "data/demo_3/"), ("a.hdf5", "data/demo_7/")) == [3, 7]
    assert numbers("day_1/episode_4.h5", "day_2/episode_5.h5") == [4, 5]
    assert numbers("0007.h5", "0012.h5") == [7, 12]
    assert numbers("run2_trial5.h5", "run2_trial6.h5") == [5, 6]
    assert numbers("episode_3_20240501.h5", "episode_4_20240501.h5") == [3, 4]
    assert numbers("2024-05-01_episode_3.h5", "2024-05-02_episode_4.h5") == [3, 4]
    assert numbers("episode_3/data.h5", "episode_4/data.h5") == [3, 4]
    assert numbers("Episode 3.HDF5", "Episode 4.HDF5") == [3, 4]
    assert numbers(("episode_7.h5", "data/demo_0/"), ("episode_9.h5", "data/demo_0/")) == [7, 9]
    assert numbers(("a.h5", "data/demo_0/")) == [0]
    assert numbers("log.h5") == [0]


@pytest.mark.parametrize(
    "foreign",
    [
        "calibration_3.h5",
        "stats.hdf5",
        "episode_3 copy.hdf5",
        "episode_3_backup.hdf5",
        "old_episode_3.hdf5",
        "3.h5",
        "logs/2024.h5",
    ],
)
def test_what_lies_beside_takes_no_number_away(foreign):
    for places in ([*EPISODES, foreign], [foreign, *EPISODES]):
        found = dict(zip(places, numbers(*places), strict=True))
        assert [found[name] for name in EPISODES] == [0, 1, 3, 10]
        assert found[foreign] >= 10**8
    found = numbers(*demos("demos.hdf5", 4), foreign)
    assert found[:4] == [0, 1, 2, 3]
    assert found[4] >= 10**8


def test_series_with_the_same_numbers_keep_theirs_whatever_is_added():
    a, b, c = demos("a.hdf5", 3), demos("b.hdf5", 4), demos("aa.hdf5", 9)
    before, after = numbers(*a, *b), numbers(*a, *c, *b)
    assert before == after[:3] + after[-4:]
    assert len(set(after)) == len(after)
    assert [number - before[0] for number in before[:3]] == [0, 1, 2]
    assert before[0] % 10_000 == 0
    broken = numbers(*a, "aa.hdf5", *b)  # a broken file in the middle, with unknown content
    assert before == broken[:3] + broken[-4:]
    assert min(before) >= 10**8


@pytest.mark.parametrize(
    "places",
    [
        ["day_0/episode_0.h5", "day_1/episode_0.h5"],
        ["episode_3.h5", "episode_03.h5"],
        ["run1_ep3.h5", "run2_ep3.h5"],
        ["episode_3.h5", "episode_3.hdf5"],
        ["first.h5", "second.h5"],
        ["day_1/first.h5", "day_1/second.h5"],
        ["20240501_102233.h5", "20240502_102233.h5"],
        [("a.h5", "data/demo_1/"), ("a.h5", "test/demo_1/")],
        [("a.h5", "episode_0/demo_0/"), ("a.h5", "episode_1/demo_0/")],
        [("a.h5", "data/demo_0_1/"), ("a.h5", "data/demo_1_1/")],
    ],
)
def test_numbers_that_cannot_say_which_are_not_used(places):
    found = numbers(*places)
    assert len(set(found)) == 2
    assert min(found) >= 10**8
    assert numbers(*places[::-1]) == found[::-1]
    assert numbers(*places, "zzz.h5")[:2] == found


@pytest.mark.parametrize("seed", range(20))
def test_any_mixture_has_distinct_numbers_of_at_most_nine_digits(seed):
    rng, files = random.Random(seed), []
    for number in range(30):
        name = rng.choice(["episode_{}", "{}", "run{}_x", "x", "d_{}/data", "demo{}", "a_{}_b"])
        files.append(
            f"{rng.choice('abc')}/{name.format(rng.randrange(12))}.h5" if number else "9" * 12 + ".h5"
        )
    files = list(dict.fromkeys(files))
    found = numbers(*files)
    assert len(set(found)) == len(files)
    assert max(found) < 10**9
    shuffled = rng.sample(files, len(files))
    assert dict(zip(shuffled, numbers(*shuffled), strict=True)) == dict(zip(files, found, strict=True))


def test_what_is_not_plain_is_said():
    def said(*places):
        names = [read_name(file, group, alone=False) for file, group in places]
        return list(explain(names, number_names(names)))

    assert said(*demos("a.hdf5", 3)) == []
    assert said(*((name, "") for name in EPISODES)) == []
    assert said(("run_1.h5", ""), ("run_2.h5", "")) == ["episode N: run_N.h5"]
    lines = said(*demos("a.hdf5", 3), *demos("b.hdf5", 3))
    assert [re.sub(r"\d{9}", "#", line) for line in lines] == [
        "episode # + N: a.hdf5, data/demo_N",
        "episode # + N: b.hdf5, data/demo_N",
    ]
    assert re.fullmatch(r"episode \d{9}: stats.h5", said(("episode_1.h5", ""), ("stats.h5", ""))[0])
