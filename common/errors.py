"""Errors meant for users, and the exit codes of the scripts."""

import errno
import re

EXIT_HUNG, EXIT_OUT_OF_MEMORY, EXIT_STOPPED = 70, 71, 75
OUT_OF_MEMORY = r"DefaultCPUAllocator: can|out of memory|CU\w+_STATUS_ALLOC_FAILED"
LOST = (
    r"Connection (closed|reset) by peer|Connection refused|Broken pipe|Socket closed|ncclRemoteError|"
    r"NCCL communicator was aborted|Timed out waiting"
)


class UserError(Exception):
    """An error that the user can fix: the message says in one sentence what is wrong and how to fix it.

    The command line (`common/config.py`) prints the message without a traceback and exits with code 1;
    code that imports this project (a robot's control loop, a test) can catch it like any exception. Names
    from damaged files can hold anything: unprintable characters become question marks.
    """

    def __init__(self, sentence: str):
        super().__init__("".join(char if char.isprintable() else "?" for char in sentence))


class Busy(UserError):
    """Another process uses what this one needs; exits with code 70, since a later start may succeed."""


def explain(error: Exception) -> tuple[str, int] | None:
    """Message for the user and exit code for an error caused by the machine; None for any other error."""
    if isinstance(error, UserError):
        return str(error), EXIT_HUNG if isinstance(error, Busy) else 1
    text = " ".join(str(error).split())
    runtime = isinstance(error, RuntimeError)
    if isinstance(error, MemoryError) or (runtime and re.search(OUT_OF_MEMORY, text)):
        return (
            f"Out of memory ({text[:150]}): lower --batch-size and raise --grad-accumulation by the same "
            f"factor, lower --flow-samples or --image-size, or use --mixed-precision bf16."
        ), EXIT_OUT_OF_MEMORY
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"The disk is full ({error.filename or text}): free disk space and start again.", 1
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return f"Too many files are open ({error.filename or text}): allow more with `ulimit -n`.", 1
    # The pipe from a data loading process can break before anyone notices that it died.
    broken = isinstance(error, ConnectionResetError | ConnectionRefusedError | EOFError)
    if broken or (runtime and re.search(r"DataLoader worker \(pid", text)):
        return (
            f"A process that loads data has died ({text[:200]}), which happens when memory is short: lower "
            f"--num-workers and continue with --resume."
        ), EXIT_HUNG
    if runtime and "does not have a deterministic implementation" in text:
        return f"--deterministic: {text[:200]}: leave out the flag, or the part that needs this.", 1
    if runtime and re.search(LOST, text):
        return (
            f"The connection to another process was lost ({text[:150]}): its own message says why; continue "
            f"from the last checkpoint with --resume."
        ), EXIT_HUNG
    return None
