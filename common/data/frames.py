"""Frames from video files, encoded images and arrays, resized, as (3, H, W) uint8.

Shrinking averages over areas, so that fine texture does not alias; enlarging is bicubic. Video is converted
to RGB and resized in one pass of swscale; it uses the stream's colour matrix and range if stated.

Only colour is read: RGB or a palette, images of 8 bits a channel (16-bit RGB PNGs are rounded down), video of
any depth. Transparency is dropped; colours stay as recorded. A photo's EXIF orientation is applied.
Everything else (one channel, such as depth, CMYK, floats, a rotated video) is a FrameError.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.data.source import POINTER, is_pointer

if TYPE_CHECKING:
    import av
    from av.video.reformatter import VideoReformatter

BT601 = 5  # swscale's default matrix, assumed for an unmarked stream
UNMARKED = (0, 2, BT601, 6)  # RGB, unspecified, and the two names of BT.601
FULL_RANGE = 2
CHANNELS = (1, 3, 4)  # of an image: grey, RGB, RGB with transparency
IMAGE_MODES = ("RGB", "RGBA", "P")  # Pillow's names of the modes that can be read
GREY = {"1": "1-bit", "L": "8-bit grey", "LA": "8-bit grey", "I": "32-bit grey", "F": "32-bit float grey"}
UPRIGHT = (65536, 0, 0, 0, 65536, 0, 0, 0, 2**30)  # display matrix of a video that is not rotated


class FrameError(Exception):
    """Frames cannot be read; the message, a clause, says why and leaves the file's name to the caller."""


class NoColor(FrameError):
    """Frames exist, but are not colour pictures."""


def video_frames(
    path: Path, times: np.ndarray, tolerance: float, recorded: tuple[int, int], size: tuple[int, int]
) -> Iterator[np.ndarray]:
    """The frames nearest to `times`, decoded in one sweep by one thread; the next one overwrites the array.

    Args:
        times: ascending presentation times in seconds; a frame may lie `tolerance` seconds off.
        recorded: (H, W) that the frames must have.
        size: (H, W) of the result.

    Raises:
        FrameError: if the file is missing, damaged, too short, of another size, or not in colour.
    """
    from av.video.reformatter import VideoReformatter

    reformatter, out = VideoReformatter(), np.empty((3, *size), np.uint8)
    count, previous, previous_time = 0, None, -np.inf
    with _opened(path) as (container, stream):
        for time, frame in _decoded_from(container, stream, times[0], tolerance):
            if (frame.height, frame.width) != recorded:
                sizes = "{}x{} instead of {}x{}".format(frame.height, frame.width, *recorded)
                raise FrameError(f"frames are {sizes}")
            if frame.is_corrupt:
                raise FrameError(f"the frame at {time:.3f} s is damaged")
            _refuse_colorless(frame)
            while count < len(times) and times[count] <= time + 1e-3:
                early = times[count] - previous_time < time - times[count]
                if abs((previous_time if early else time) - times[count]) > tolerance:
                    raise FrameError(f"no frame at {times[count]:.3f} s")
                yield _to_planes(previous if early else frame, reformatter, out)
                count += 1
            if count == len(times):
                return
            previous, previous_time = frame, time
        while count < len(times) and times[count] - previous_time <= tolerance:
            yield _to_planes(previous, reformatter, out)
            count += 1
    if count < len(times):
        raise FrameError(f"the video ends after {count} of {len(times)} frames")


def video_times(path: Path) -> np.ndarray:
    """Presentation time of each frame of a video, (N,) ascending, in s; raises FrameError.

    Nothing is decoded.
    """
    with _opened(path) as (container, stream):
        shown = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        if None in shown:
            raise FrameError("a frame has no time")
        return np.sort(np.array(shown, np.int64)) * float(stream.time_base)


def video_size(path: Path) -> tuple[int, int]:
    """(H, W) of a video's first frame; raises NoColor or FrameError."""
    with _opened(path) as (container, stream):
        for frame in container.decode(stream):
            _refuse_colorless(frame)
            return frame.height, frame.width
    raise FrameError("it has no frames")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open a video file and its first video stream, for one thread; errors inside become FrameErrors."""
    import av

    try:
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise FrameError("it has no video")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise FrameError("its codec is unknown")
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            yield container, stream
    except (av.FFmpegError, ValueError, ArithmeticError) as error:  # damaged headers give all of these
        if is_pointer(path):
            raise FrameError(f"it {POINTER}") from None
        raise FrameError(getattr(error, "strerror", None) or str(error)) from error


def _refuse_colorless(frame: av.VideoFrame) -> None:
    """Raise NoColor for a frame with fewer than three channels, a FrameError for a rotated one."""
    kind = frame.format
    if len(kind.components) < 3 and not kind.has_palette:
        raise NoColor(f"its pictures are {kind.name}, which is not colour")
    for extra in frame.side_data:
        if extra.type.name == "DISPLAYMATRIX" and tuple(np.frombuffer(extra, np.int32)) != UPRIGHT:
            raise FrameError("it is marked as rotated or mirrored: encode it again upright")


def _decoded_from(
    container: av.container.InputContainer, stream: av.VideoStream, start: float, tolerance: float
):
    """(time, frame) pairs of a video stream, starting at a key frame at or before `start`."""
    for begin in (max(0.0, start - tolerance), 0.0):
        if begin > 0:
            container.seek(int(begin / stream.time_base), stream=stream)
        late = False
        for number, frame in enumerate(container.decode(stream)):
            if frame.pts is None:
                raise FrameError("a frame has no time")
            time = float(frame.pts * stream.time_base)
            late = number == 0 and begin > 0 and time > start + tolerance
            if late:  # a broken index makes the seek overshoot: read from the beginning
                container.seek(0, stream=stream)
                break
            yield time, frame
        if not late:
            return


def _to_planes(frame: av.VideoFrame, reformatter: VideoReformatter, out: np.ndarray) -> np.ndarray:
    """Write a decoded frame to the array `out`, (3, H, W) uint8."""
    _, height, width = out.shape
    shrinks = height <= frame.height and width <= frame.width
    colors = {}
    if frame.colorspace not in UNMARKED or frame.color_range == FULL_RANGE:
        colors = {"src_colorspace": frame.colorspace, "dst_colorspace": BT601}
        colors["src_color_range"] = frame.color_range
    method = "AREA" if shrinks else "BICUBIC"
    planar = reformatter.reformat(frame, width, height, "gbrp", interpolation=method, **colors)
    for target, plane in zip((1, 2, 0), planar.planes, strict=True):  # green, blue, red
        out[target] = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:height, :width]
    return out


def image_frame(encoded: bytes, recorded: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """A PNG or JPEG as (3, H, W) uint8; a FrameError if damaged, not colour, or not `recorded` in size."""
    return pixel_frame(decode_image(encoded), recorded, size)


def decode_image(encoded: bytes) -> np.ndarray:
    """An encoded image as (H, W, 3) uint8; raises NoColor or FrameError."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.mode not in IMAGE_MODES:
                kind = "16-bit grey" if image.mode.startswith("I;16") else image.mode
                raise NoColor(f"an image is {GREY.get(kind, kind)} instead of 8-bit colour")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FrameError(f"an image is damaged: {error}") from error


def pixel_frame(pixels: np.ndarray, recorded: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """An array (H, W, C) or (C, H, W) uint8, C of 3 or 4, as (3, H, W); its size must be `recorded`."""
    rgb = rgb_pixels(pixels)
    if rgb.shape[:2] != recorded:
        sizes = "{}x{} instead of {}x{}".format(*rgb.shape[:2], *recorded)
        raise FrameError(f"an image is {sizes}")
    return np.ascontiguousarray(resize_rgb(rgb, size).transpose(2, 0, 1))


def rgb_pixels(pixels: np.ndarray) -> np.ndarray:
    """An array (H, W, C) or (C, H, W) uint8, C of 3 or 4, as (H, W, 3); anything else raises NoColor."""
    if pixels.ndim == 3 and pixels.shape[2] not in CHANNELS:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
        shape = "x".join(map(str, pixels.shape))
        raise NoColor(f"an image is {shape} {pixels.dtype} instead of 8-bit colour")
    return pixels[:, :, :3]


def resize_rgb(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 at another size: shrinking averages areas, to avoid aliasing."""
    from PIL import Image

    if frame.shape[:2] == size:
        return frame
    height, width = size
    shrinks = height <= frame.shape[0] and width <= frame.shape[1]
    method = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize((width, height), method))


def as_rgb(frame: np.ndarray, color_order: str) -> np.ndarray:
    """A (3, H, W) frame whose colours were recorded as `rgb` or `bgr`."""
    return frame if color_order == "rgb" else np.ascontiguousarray(frame[::-1])
