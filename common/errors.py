"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something the user can put right: the message names the thing and the way out, in one sentence.

    The command line (`common/config.py`) prints the message without a traceback and exits with code 1;
    code that imports this project (a robot's control loop, a test) catches it like any exception.
    """
