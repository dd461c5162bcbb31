"""Videos of episodes side by side: MP4 for a close look, GIF to paste anywhere."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.data.frames import resize_rgb
from common.plots import write_picture

GREEN, RED, WHITE = (46, 160, 67), (207, 34, 46), (255, 255, 255)
RIM = 4  # pixels around each episode; coloured when it ends
SIDE = 256  # pixels of an episode at most: several films of 680x680 take gigabytes of memory


def shrunk(picture: np.ndarray) -> np.ndarray:
    """A copy of a picture (H, W, 3) uint8, with at most `SIDE` pixels a side."""
    share = min(SIDE / max(picture.shape[:2]), 1)
    return np.array(resize_rgb(picture, tuple(max(round(share * side), 1) for side in picture.shape[:2])))


def side_by_side(
    films: Sequence[Sequence[np.ndarray]], outcomes: Sequence[bool], columns: int = 4, linger: int = 10
) -> np.ndarray:
    """Episodes in a grid, (F, H, W, 3) uint8; finished ones freeze with a green or red frame.

    Args:
        films: pictures (h, w, 3) uint8 of each episode, all of one size.
        outcomes: whether each one succeeded.
        linger: frames to add after the last episode ends.
    """
    height, width, _ = films[0][0].shape
    rows = -(-len(films) // columns)
    length = max(map(len, films)) + linger
    cell = (height + 2 * RIM, width + 2 * RIM)
    sheet = np.full((length, rows, columns, *cell, 3), WHITE, np.uint8)
    for n, (film, success) in enumerate(zip(films, outcomes, strict=True)):
        place = sheet[:, n // columns, n % columns]
        place[len(film) :] = GREEN if success else RED
        inner = place[:, RIM:-RIM, RIM:-RIM]
        inner[: len(film)] = film
        inner[len(film) :] = film[-1]
    return sheet.swapaxes(2, 3).reshape(length, rows * cell[0], columns * cell[1], 3)


def write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write frames (F, H, W, 3) uint8 as H.264 that browsers and slides can play."""
    import av

    height, width = (side - side % 2 for side in frames.shape[1:3])  # the codec needs even sides
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=max(round(fps), 1), options={"crf": "20"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in frames[:, :height, :width]:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            file.mux(stream.encode(picture))
        file.mux(stream.encode())


def write_gif(path: Path, frames: np.ndarray, fps: float, colors: int = 64) -> None:
    """Write frames (F, H, W, 3) uint8 as a GIF, at no more than 20 frames a second; see `write_picture`."""
    from PIL import Image

    stride = max(1, round(fps / 20))
    images = [Image.fromarray(frame).quantize(colors) for frame in frames[::stride]]
    duration = round(1000 * stride / fps)
    content = io.BytesIO()
    images[0].save(content, "gif", save_all=True, append_images=images[1:], duration=duration, loop=0)
    write_picture(path, content.getvalue())
