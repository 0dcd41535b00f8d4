"""The one error that users are meant to read, and how it travels from a rank to the process that started it."""

import os
from pathlib import Path

ERROR_FILE = "HBP_ERROR_FILE"
"""Environment variable: where a rank that `hbp` started leaves its message."""


class HbpError(Exception):
    """Wrong input. The message is one line: what is wrong (with the offending values) and how to mend it.

    The command line prints it without a traceback and exits with code 2; anything else that escapes is a fault
    of ours (exit code 1).
    """


class RankFailed(Exception):
    """A rank ended by a signal or a fault of ours; the message names it. Exit code 1."""


def report_to_parent(error: HbpError) -> bool:
    """Leave the message for the `hbp` that started this rank, which then prints it once; False if none did."""
    if ERROR_FILE not in os.environ:
        return False
    Path(os.environ[ERROR_FILE]).write_text(str(error))
    return True
