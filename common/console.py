"""Messages to people while something runs."""

import os
import sys
from contextlib import suppress

from tqdm import tqdm


def say(text: str) -> None:
    """Print a line above the progress bars, only on the main process of a distributed run.

    A full disk or a closed pipe cannot end a run.
    """
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
