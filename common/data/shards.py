"""Files of frames: raw pixels, or JPEG where raw pixels would outgrow the disk.

A raw shard is rows (N, 3, H, W) uint8, one after the other. A JPEG shard begins with the int64 offsets of its
N frames a row (and of the end), row by row; the encoded frames follow.
"""

from __future__ import annotations

import io
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from common.data.source import reason

Storage = Literal["raw", "jpeg"]
QUALITY = 95


class RawShard:
    """Rows copied out of a memory-mapped file."""

    def __init__(self, path: Path, row_shape: tuple[int, ...], dtype: type = np.uint8):
        self.file = _map(path)
        # A plain array over the map: indexing a np.memmap costs several times more a row.
        self.frames = np.frombuffer(self.file, dtype).reshape(-1, *row_shape)

    def fetch(self, places: np.ndarray) -> None:
        """Have the system read the rows `places` from the disk, without waiting for it."""
        size = self.frames[0].nbytes
        for place in places.tolist():
            _will_need(self.file, place * size, (place + 1) * size)

    def read(self, places: np.ndarray, out: np.ndarray, slots: np.ndarray) -> None:
        """Copy the rows `places` to `out[slots]`."""
        if len(slots) == len(out):
            np.take(self.frames, places, axis=0, out=out, mode="clip")  # other modes buffer the output
            return
        for place, slot in zip(places.tolist(), slots.tolist(), strict=True):
            out[slot] = self.frames[place]


class JpegShard:
    """Frames decoded as they are read."""

    def __init__(self, path: Path, row_shape: tuple[int, ...]):
        self.path, self.cameras = path, row_shape[0]
        self.file = _map(path)
        self.bytes = np.frombuffer(self.file, np.uint8)
        # Where frames begin, and the last one ends; the first follows the offsets.
        self.offsets = self.bytes[: int(self.bytes[:8].view(np.int64)[0])].view(np.int64)

    def fetch(self, places: np.ndarray) -> None:
        """Have the system read the rows `places` from the disk, without waiting for it."""
        for place in places.tolist():
            edges = self.offsets[place * self.cameras :][: self.cameras + 1]
            _will_need(self.file, int(edges[0]), int(edges[-1]))

    def read(self, places: np.ndarray, out: np.ndarray, slots: np.ndarray) -> None:
        """Decode the rows `places` into `out[slots]`."""
        for place, slot in zip(places.tolist(), slots.tolist(), strict=True):
            for camera in range(self.cameras):
                first, last = self.offsets[place * self.cameras + camera :][:2]
                decode_jpeg(self.bytes[first:last], out[slot, camera], self.path)


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _will_need(file: mmap.mmap, first: int, last: int) -> None:
    if hasattr(mmap, "MADV_WILLNEED"):  # not on every system
        start = first - first % mmap.PAGESIZE
        file.madvise(mmap.MADV_WILLNEED, start, last - start)


SHARDS = {"raw": RawShard, "jpeg": JpegShard}


def encode_jpeg(frame: np.ndarray) -> bytes:
    """(3, H, W) uint8 to JPEG, colour at half the resolution, as video has it: decodes twice as fast."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame.transpose(1, 2, 0)).save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return file.getvalue()


def decode_jpeg(encoded: np.ndarray, out: np.ndarray, path: Path | str) -> None:
    """Decode into (3, H, W) uint8; an OSError if the bytes are no longer what was written."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg  # three times as fast as Pillow

    try:
        # A copy, since a tensor over the file's read-only memory would be writable.
        out[:] = decode_jpeg(torch.from_numpy(encoded.copy()), ImageReadMode.RGB).numpy()
    except (RuntimeError, ValueError) as error:
        raise OSError(
            f"{path} is damaged ({reason(error)}): run `python -m common.data.store verify`."
        ) from error


def as_jpeg(frame: np.ndarray) -> np.ndarray:
    """What a JPEG shard gives back of a frame (3, H, W)."""
    out = np.empty_like(frame)
    decode_jpeg(np.frombuffer(encode_jpeg(frame), np.uint8), out, "the frame")
    return out


def write_jpeg(frames: Sequence[bytes | None], target: Path) -> None:
    """Write encoded frames, None for those that are missing, as a shard."""
    lengths = [0 if frame is None else len(frame) for frame in frames]
    offsets = 8 * (len(frames) + 1) + np.cumsum([0, *lengths], dtype=np.int64)
    with target.open("wb") as file:
        file.write(offsets.tobytes())
        for frame in frames:
            if frame is not None:
                file.write(frame)
