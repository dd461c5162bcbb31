import av
import numpy as np
import pytest
from lerobot_factory import FPS, draw, read, write_video

from common.data import frames
from common.data.frames import FrameError, video_frames


def test_reducing_does_not_alias(tmp_path):
    board = (np.indices((96, 128)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, -1)
    write_video(tmp_path / "board.mp4", [board] * 2)
    moving = next(video_frames(tmp_path / "board.mp4", np.array([0.0]), 0.05, (96, 128), (36, 50)))
    still = frames.resize_rgb(board, (36, 50))
    assert moving.std() < 12  # picking single pixels would give black or white, 127 off
    assert still.std() < 12


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
@pytest.mark.parametrize(("colorspace", "full"), [(1, False), (5, False), (5, True), (1, True)])
def test_marked_colours_are_decoded_as_marked(tmp_path, codec, colorspace, full):
    rgb = np.array([[[190, 40, 60]]], np.uint8).repeat(64, 0).repeat(96, 1)
    kr, kb = (0.2126, 0.0722) if colorspace == 1 else (0.299, 0.114)
    r, g, b = rgb[0, 0] / 255
    y = kr * r + (1 - kr - kb) * g + kb * b
    u, v = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
    low, luma, chroma = (0, 255, 255) if full else (16, 219, 224)
    plane = np.empty((96, 96), np.uint8)  # planar yuv420p: full luma, then quarter-size u and v
    plane[:64] = round(low + luma * y)
    plane[64:80], plane[80:] = round(128 + chroma * u), round(128 + chroma * v)
    path, marks = tmp_path / "marked.mp4", {"colorspace": colorspace, "color_range": 2 if full else 1}
    write_video(path, [plane] * 3, format="yuv420p", codec=codec, **marks)
    decoded = next(video_frames(path, np.array([0.0]), 0.05, (64, 96), (32, 48)))
    assert np.abs(decoded.mean((1, 2)) - rgb[0, 0]).max() < 4


@pytest.mark.parametrize(
    ("stored", "codec", "suffix"),
    [
        ("yuv420p10le", "libx265", "mp4"),
        ("gbrp16le", "ffv1", "mkv"),
        ("rgb48le", "ffv1", "mkv"),
        ("yuva420p", "ffv1", "mkv"),
        ("yuv444p12le", "ffv1", "mkv"),
    ],
)
def test_colours_of_any_depth_are_read(tmp_path, stored, codec, suffix):
    rgb, path = np.array([190, 40, 60], np.uint8), tmp_path / f"v.{suffix}"
    write_video(path, [np.tile(rgb, (64, 96, 1))] * 3, stored=stored, codec=codec)
    assert frames.video_size(path) == (64, 96)
    for size in ((64, 96), (32, 48)):
        frame = next(video_frames(path, np.array([0.0]), 0.005, (64, 96), size))
        assert np.abs(frame.mean((1, 2)) - rgb).max() < 4


def test_a_video_that_is_to_be_turned_is_refused(tmp_path):
    path = tmp_path / "v.mp4"
    write_video(path, [draw(i, 0, (32, 48)) for i in range(4)])
    upright = np.array([65536, 0, 0, 0, 65536, 0, 0, 0, 2**30], ">i4").tobytes()
    whole = path.read_bytes()
    place = whole.index(upright, whole.index(b"tkhd"))
    for matrix in ([0, 65536, 0, -65536, 0, 0, 32 << 16, 0, 2**30], [-65536, 0, 0, 0, 65536, 0, 0, 0, 2**30]):
        path.write_bytes(whole[:place] + np.array(matrix, ">i4").tobytes() + whole[place + 36 :])
        with pytest.raises(FrameError, match="rotated or mirrored"):
            next(video_frames(path, np.array([0.0]), 0.005, (32, 48), (32, 48)))


@pytest.mark.parametrize("gop", [1, 4, 250])
def test_times_are_read_without_decoding(tmp_path, gop):
    ticks = [0, 1000, 2000, 3500, 4000, 9000, 10000, 11000]
    write_video(tmp_path / "v.mp4", [draw(i, 0, (32, 48)) for i in range(8)], gop, ticks=ticks)
    times = frames.video_times(tmp_path / "v.mp4")
    np.testing.assert_allclose(times, np.array(ticks) / 10000, atol=1e-4)
    found = video_frames(tmp_path / "v.mp4", times, 1e-4, (32, 48), (32, 48))
    assert [read(frame)[0] for frame in found] == list(range(8))


def test_frames_before_a_cut_are_not_counted(tmp_path):
    write_video(tmp_path / "v.mp4", [draw(i, 0, (32, 48)) for i in range(12)], 12)
    with av.open(str(tmp_path / "v.mp4")) as whole, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(whole.streams.video[0]):
            if packet.dts is not None:
                shift = round(0.5 / packet.time_base)  # frames before time zero are decoded, but not shown
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                cut.mux(packet)
    times = frames.video_times(tmp_path / "cut.mp4")
    np.testing.assert_allclose(times, np.arange(6) / FPS, atol=1e-4)
    found = video_frames(tmp_path / "cut.mp4", times, 1e-3, (32, 48), (32, 48))
    assert [read(frame)[0] for frame in found] == list(range(5, 11))


def test_pixels_are_colours_of_8_bits(tmp_path):
    picture = draw(5, 0, (32, 48))
    for pixels in (picture, picture.transpose(2, 0, 1), np.concatenate([picture, picture[..., :1]], 2)):
        assert (frames.pixel_frame(pixels, (32, 48), (32, 48)) == picture.transpose(2, 0, 1)).all()
    for pixels in (
        picture[..., :1],
        picture[..., 0],
        picture.astype(np.uint16),
        picture / 255,
        picture[None],
    ):
        with pytest.raises(frames.NoColor, match=f"{pixels.dtype} instead of 8-bit colour"):
            frames.pixel_frame(pixels, (32, 48), (32, 48))
    with pytest.raises(FrameError, match="32x48 instead of 48x32"):
        frames.pixel_frame(picture, (48, 32), (32, 48))


def test_a_seek_that_overshoots_is_made_up_for(tmp_path, monkeypatch):
    write_video(tmp_path / "v.mp4", [draw(i, 0, (32, 48)) for i in range(20)])
    places, real_open = [], av.open

    class Overshooting:
        def __init__(self, container):
            self.streams, self.decode, self.container = container.streams, container.decode, container

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.container.close()

        def seek(self, place, stream):
            places.append(place)
            self.container.seek(place * 2, stream=stream)

    monkeypatch.setattr(av, "open", lambda *args, **kwargs: Overshooting(real_open(*args, **kwargs)))
    found = video_frames(tmp_path / "v.mp4", np.array([0.8, 0.9]), 0.05, (32, 48), (32, 48))
    assert [read(frame)[0] for frame in found] == [8, 9]
    assert len(places) == 2
    assert places[1] == 0


def test_damaged_bytes_are_noticed(tmp_path):
    path = tmp_path / "v.mp4"
    write_video(path, [draw(i, 0, (64, 96)) for i in range(12)])
    whole, times = path.read_bytes(), np.arange(12) / FPS
    expected = [frame.copy() for frame in video_frames(path, times, 0.05, (64, 96), (64, 96))]
    noticed, unnoticed, rng = 0, 0, np.random.default_rng(0)
    for place in rng.permutation(len(whole))[:300]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            found = [frame.copy() for frame in video_frames(path, times, 0.05, (64, 96), (64, 96))]
            unnoticed += not all(map(np.array_equal, found, expected))
        except FrameError:  # no other error
            noticed += 1
    assert noticed > 50
    assert unnoticed < 0.1 * noticed


def test_frames_are_picked_by_time(tmp_path):
    write_video(tmp_path / "v.mp4", [draw(i, 0, (32, 48)) for i in range(20)])

    def shown(times, tolerance=0.05):
        found = video_frames(tmp_path / "v.mp4", np.array(times), tolerance, (32, 48), (32, 48))
        return [read(frame)[0] for frame in found]

    assert shown([0.52, 0.58, 0.9, 1.1, 1.9]) == [5, 6, 9, 11, 19]
    assert shown([0.3, 0.3, 0.34, 0.4]) == [3, 3, 3, 4]
    with pytest.raises(FrameError, match="ends after 1 of 2"):
        shown([1.9, 2.0])
    with pytest.raises(FrameError, match=r"no frame at 0\.330 s"):
        shown([0.2, 0.33, 0.4], tolerance=0.01)
