"""Files of rows that are read by number: raw, or JPEG where raw pixels would outgrow the disk.

Raw rows are stored in order. JPEG frames are appended in any order; next to them, `.index` says for each row
where its N frames begin and end, (R, N, 2) int64.
"""

from __future__ import annotations

import io
import itertools
import math
import mmap
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from common.data.source import reason

Storage = Literal["raw", "jpeg"]
QUALITY = 95
MEMORY_SPEED = 2e9  # bytes per second: slower reads have waited for a disk
FETCH_AHEAD = 50  # after a read that has waited, this many ask for their rows before they copy


class RawRows:
    """Rows copied out of a memory-mapped file."""

    ahead = 0  # how many reads will still ask for their rows first

    def __init__(self, path: Path, row_shape: Sequence[int], dtype: type = np.uint8):
        self.path, values = path, math.prod(row_shape)
        with path.open("rb") as file:
            self.file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.row_bytes = values * np.dtype(dtype).itemsize
        count = len(self.file) // self.row_bytes
        # A plain array over the map: indexing a np.memmap costs several times more per row.
        self.rows = np.frombuffer(self.file, dtype, count * values).reshape(count, *row_shape)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, places: np.ndarray, out: np.ndarray, slots: np.ndarray) -> None:
        """Copy the rows `places` to `out[slots]`; slots ascend.

        One thread copies: on a busy machine several threads wait for each other and are far slower. A read
        that had to wait for the disk makes the next ones ask for all their rows before they copy, which is
        many times faster than loading missing pages one by one; if none is missing, it only costs time.
        """
        began = time.perf_counter()
        if self.ahead and hasattr(mmap, "MADV_WILLNEED"):  # not on every system
            for first, last in self.spans(np.sort(places)).tolist():
                start = first - first % mmap.PAGESIZE
                self.file.madvise(mmap.MADV_WILLNEED, start, last - start)
        self._copy(places, out, slots)
        waited = len(slots) * out[0].nbytes / (time.perf_counter() - began) < MEMORY_SPEED
        self.ahead = FETCH_AHEAD if waited else max(self.ahead - 1, 0)

    def spans(self, places: np.ndarray) -> np.ndarray:
        """The first byte of each of these rows, and the one after the last: (B, 2) int64."""
        return (places[:, None] + np.arange(2)) * self.row_bytes

    def checksum(self, row: int, count: int) -> int | None:
        """CRC-32 of consecutive rows as they were written; None if the file is too short for them."""
        if row + count > len(self):
            return None
        (first, _), (_, last) = self.spans(np.array([row, row + count - 1])).tolist()
        return zlib.crc32(memoryview(self.file)[first:last])

    def _copy(self, places: np.ndarray, out: np.ndarray, slots: np.ndarray) -> None:
        if len(slots) == len(out):  # all of them, since slots ascend
            np.take(self.rows, places, axis=0, out=out, mode="clip")  # other modes buffer the output
            return
        for place, slot in zip(places.tolist(), slots.tolist(), strict=True):
            out[slot] = self.rows[place]  # indexing with arrays would copy twice

    @staticmethod
    def files(path: Path) -> list[Path]:
        """All files that rows at `path` consist of."""
        return [path]

    @staticmethod
    def make_room(path: Path, rows: int, row_shape: Sequence[int], itemsize: int = 1) -> None:
        """Extend the file to at least `rows` rows; sparse, it takes no space until they are written."""
        with path.open("ab") as file:
            file.truncate(max(file.tell(), rows * math.prod(row_shape) * itemsize))


class JpegRows(RawRows):
    """Rows (N, 3, H, W) of frames that are decoded as they are read."""

    def __init__(self, path: Path, row_shape: Sequence[int]):
        super().__init__(path, ())
        self.index = RawRows(_index(path), (row_shape[0], 2), np.int64)

    def __len__(self) -> int:
        return len(self.index)

    def spans(self, places: np.ndarray) -> np.ndarray:
        return self.index.rows[places][:, [0, -1], [0, 1]]

    def checksum(self, row: int, count: int) -> int | None:
        places = self.index.checksum(row, count)
        return None if places is None else places ^ super().checksum(row, count)

    def _copy(self, places: np.ndarray, out: np.ndarray, slots: np.ndarray) -> None:
        for place, slot in zip(places.tolist(), slots.tolist(), strict=True):
            for camera, (first, last) in enumerate(self.index.rows[place].tolist()):
                decode_jpeg(self.rows[first:last], out[slot, camera], self.path)

    @staticmethod
    def files(path: Path) -> list[Path]:
        return [path, _index(path)]

    @staticmethod
    def make_room(path: Path, rows: int, row_shape: Sequence[int]) -> None:
        path.touch()
        RawRows.make_room(_index(path), rows, (row_shape[0], 2), 8)

    @staticmethod
    def append(path: Path, row: int, cameras: Sequence[Sequence[bytes]]) -> None:
        """Write the encoded frames of each camera as the rows from `row` on."""
        frames = list(itertools.chain.from_iterable(zip(*cameras, strict=True)))
        with path.open("ab") as file:
            edges = np.cumsum([file.tell(), *map(len, frames)], dtype=np.int64)
            file.writelines(frames)
        with _index(path).open("r+b") as file:
            file.seek(row * len(cameras) * 16)
            file.write(np.stack([edges[:-1], edges[1:]], axis=1).tobytes())


ROWS = {"raw": RawRows, "jpeg": JpegRows}


def _index(path: Path) -> Path:
    return path.with_suffix(".index")


def encode_jpeg(frame: np.ndarray) -> bytes:
    """(3, H, W) uint8 to JPEG, colour at half the resolution, as in video: decodes twice as fast."""
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
    """A frame (3, H, W) as a JPEG store returns it."""
    out = np.empty_like(frame)
    decode_jpeg(np.frombuffer(encode_jpeg(frame), np.uint8), out, "the frame")
    return out
