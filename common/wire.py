"""Messages between a robot and a policy server: msgpack with numpy arrays, in the format of openpi's client.

An array is the map {b"__ndarray__": true, b"data": bytes, b"dtype": "<f4", b"shape": [2, 3]}, a numpy number
{b"__npgeneric__": true, b"data": 1.5, b"dtype": "<f4"}: the format of the package openpi-client 0.1. Reading
a message cannot run code: arrays hold plain numbers only.
"""

import math
from typing import Any

import msgpack
import numpy as np

EPISODE = "Policy-Episode"  # header of a client that continues its episode if it has to connect again
NUMBERS = "biuf"  # allowed kinds of dtypes
MOST_VALUES = 100_000  # in a message's lists and maps: each takes far more memory than its bytes
TOO_MANY = f"the message has more than {MOST_VALUES:,} values: send arrays"


def pack(message: Any) -> bytes:
    """Encode a message as bytes; ValueError for an array of objects, records, text or complex numbers."""
    return msgpack.packb(message, default=_from_numpy)


def unpack(data: bytes) -> Any:
    """Decode a message.

    Its arrays are read-only views of the bytes.

    Raises:
        ValueError: if it is not a valid message; the sentence says why.
    """
    left = MOST_VALUES

    def count(values: list | dict) -> list | dict:
        nonlocal left
        left -= len(values)
        if left < 0:
            raise WrongMessage(TOO_MANY)
        return values

    try:
        return msgpack.unpackb(
            data,
            object_hook=lambda value: _to_numpy(count(value)),
            list_hook=count,
            max_array_len=MOST_VALUES,
            max_map_len=MOST_VALUES,
        )
    except WrongMessage:
        raise
    # Garbage may look like anything: broken text, deep nesting, invalid keys, a date in the year 10^9.
    except Exception as error:
        if "exceeds max_" in str(error):
            raise WrongMessage(TOO_MANY) from None
        kind = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ValueError(f"the message is not msgpack ({kind[:100]})") from None


class WrongMessage(ValueError):
    """The message is msgpack, but holds something it must not."""


def _from_numpy(value: Any) -> dict:
    if not isinstance(value, np.ndarray | np.generic):
        raise ValueError(f"a message cannot hold a {type(value).__name__}")
    if value.dtype.kind not in NUMBERS:
        raise ValueError(f"a message cannot hold an array of {value.dtype}: give numbers")
    dtype = value.dtype.str
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": dtype}
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": dtype, b"shape": value.shape}


def _to_numpy(value: dict) -> Any:
    if b"__ndarray__" in value:
        dtype, data, shape = _dtype(value), value.get(b"data"), value.get(b"shape")
        sides = isinstance(shape, list) and all(type(side) is int and side >= 0 for side in shape)
        if not sides or not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
            raise WrongMessage("an array's data do not fit its shape and dtype")
        if len(shape) > 8:
            raise WrongMessage(f"an array has {len(shape)} dimensions")
        return np.frombuffer(data, dtype).reshape(shape)
    if b"__npgeneric__" in value:
        dtype, number = _dtype(value), value.get(b"data")
        if not isinstance(number, bool | int | float):
            raise WrongMessage(f"a number of {dtype} is a {type(number).__name__}")
        try:
            return dtype.type(number)
        except (OverflowError, ValueError):
            raise WrongMessage(f"a number does not fit its dtype {dtype}") from None
    return value


def _dtype(value: dict) -> np.dtype:
    """The dtype of an array or number; refuses anything but plain numbers before numpy interprets it."""
    name = value.get(b"dtype")
    plain = isinstance(name, str) and len(name) <= 4 and name.lstrip("<>|=")[:1] in tuple(NUMBERS)
    try:
        dtype = np.dtype(name) if plain else None
    except (TypeError, ValueError):
        dtype = None
    if dtype is None or dtype.kind not in NUMBERS:
        raise WrongMessage(f"an array's dtype is {str(name)[:30]!r}: it may hold only plain numbers")
    return dtype
