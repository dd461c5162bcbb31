"""Messages to people while something runs."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm

_thread = threading.local()


@contextmanager
def quiet() -> Iterator[None]:
    """In this block, this thread says nothing and draws no progress bars."""
    before, _thread.quiet = is_quiet(), True
    try:
        yield
    finally:
        _thread.quiet = before


def is_quiet() -> bool:
    return getattr(_thread, "quiet", False)


def say(text: str) -> None:
    """Print a line above the progress bars, only on the main process of a distributed run.

    A full disk or a closed pipe cannot end a run.
    """
    if not is_quiet() and os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
