"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something the user can put right: the message names the thing and the way out, in one sentence.

    The command line (`common/config.py`) prints the message without a traceback and exits with code 1;
    code that imports this project (a robot's control loop, a test) catches it like any exception. Names from
    damaged files can hold anything; what is not printable becomes a question mark.
    """

    def __init__(self, sentence: str):
        super().__init__("".join(char if char.isprintable() else "?" for char in sentence))
