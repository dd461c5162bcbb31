import random

import pytest

from common.data.cameras import distinct, known_name, named_cameras, select_cameras, short_name
from common.errors import UserError

ALL = (
    "observations/images/cam_high",
    "observations/images/high_rgb",
    "observations/images/HIGH",
    "obs/a.b",
    "obs/a_b",
    "obs_a_b",
    "obs/A_b",
    "a_b",
    "front",
    "images/front",
    "sensor_data/base/rgb",
    "sensor_data/hand/rgb",
    "next_obs/front",
)


def cameras(*keys):
    return named_cameras(dict.fromkeys(keys, (4, 6)), keys)


def shorts(*keys):
    return [camera.short for camera in cameras(*keys)]


def test_short_names():
    assert short_name("observations/images/cam_high") == "high"
    assert short_name("observation.images.cam_high") == "high"
    assert short_name("obs/high_image") == "high"
    assert short_name("obs/sensor_data/base_camera/rgb") == "base_camera"
    assert short_name("rgb") == "rgb"
    assert short_name("cam_") == "cam_"


def test_no_two_cameras_have_one_name():
    assert shorts("images/cam_high", "images/left") == ["high", "left"]
    assert shorts("images/cam_high", "images/high_rgb") == ["images_cam_high", "images_high_rgb"]
    front, other = shorts("images/Front", "images/front")  # one file on some file systems
    assert front.startswith("images_Front_")
    assert other.startswith("images_front_")
    assert shorts("front", "images/front") == ["front", "images_front"]
    assert shorts("a/x_y", "a.x/y") == ["x_y", "y"]


@pytest.mark.parametrize("seed", range(30))
def test_names_are_distinct_valid_and_do_not_depend_on_the_order(seed):
    keys = random.Random(seed).sample(ALL, 2 + seed % 9)
    names = dict(zip(keys, shorts(*keys), strict=True))
    assert len({name.casefold() for name in names.values()}) == len(keys)
    assert all(name.isidentifier() for name in names.values())
    assert dict(zip(sorted(keys), shorts(*sorted(keys)), strict=True)) == names
    for camera in cameras(*keys):  # both names find this camera and no other
        for name in camera[:2]:
            if name == camera.key or name not in keys:
                assert select_cameras(cameras(*keys), [name], "d") == (camera,)


def test_a_short_name_that_could_be_two_cameras_is_refused():
    both = cameras("images/cam_high", "images/high_rgb", "images/left")
    with pytest.raises(UserError, match="--cameras high could be images/cam_high and images/high_rgb of d"):
        select_cameras(both, ["high"], "d")
    assert select_cameras(both, ["images/high_rgb", "left"], "d") == (both[1], both[2])
    with pytest.raises(UserError, match=r"has no camera lefd \(did you mean left\?\)"):
        select_cameras(both, ["lefd"], "d")
    with pytest.raises(UserError, match="names a camera twice"):
        select_cameras(both, ["left", "images/left"], "d")


def test_cameras_that_are_not_plain_take_no_name_away():
    plain = cameras("obs/front")
    keys = dict.fromkeys(("next_obs/front", "obs/depth"), (4, 6))
    others = named_cameras(keys, [], plain)
    assert [camera.short for camera in others] == ["next_obs_front", "obs_depth"]
    (alone,) = named_cameras({"depth": (4, 6)}, [])  # also the name of a network's component
    assert alone.short.startswith("depth_")
    assert select_cameras(plain, ["front"], "d", others) == tuple(plain)
    assert select_cameras(plain, ["next_obs/front"], "d", others) == (others[0],)
    assert select_cameras(plain, [], "d", others) == tuple(plain)


def test_known_names():
    assert known_name("observations/images/cam_high", ("high",)) == "high"
    assert known_name("images/cam_high", ("images_cam_high", "images_high_rgb")) == "images_cam_high"
    assert known_name("left", ("left",)) == "left"


def test_distinct():
    assert distinct([["a", "b"], ["a", "c"], ["d"]]) == ["b", "c", "d"]
    assert distinct([["a", "b"], ["b", "c"]]) == ["a", "b"]
    assert distinct([["a", "b"]], taken=["a"]) == ["b"]
    with pytest.raises(UserError, match="both be called a"):
        distinct([["a"], ["a"]])
