"""The errors that users are meant to read, and how they travel from a rank to the process that started it."""

import contextlib
import difflib
import json
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

ERROR_FILE = "HBP_ERROR_FILE"
"""Environment variable: where a rank that `hbp` started leaves its message."""


class HbpError(Exception):
    """Wrong input. The message is one line: what is wrong (with the offending values) and how to mend it.

    The command line prints it without a traceback and exits with code 2; anything else that escapes is a fault
    of ours (exit code 1).
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` where one of the `known` names is near, or nothing; for the middle of a message."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def not_loaded(name: str, error: Exception) -> str:
    """Why nothing came of a folder or hub name, in a line; of what can be no hub name, that there is no such folder."""
    if not HUB_NAME.fullmatch(name) and not Path(name).exists():
        return "there is no such file or folder"
    return " ".join(str(error).split())[:200]


class RankFailed(Exception):
    """A rank ended by a signal or a fault, or training that went wrong; the message says what. Exit code 1."""


class OutOfMemory(RankFailed):
    """A step ran out of memory, and the run's state says that plans are to count on less; to be started again."""


class Stopped(Exception):
    """A signal or a limit ended the run, its state is saved; the same command goes on. Exit code 85."""


REPORTED = {"HbpError": HbpError, "RankFailed": RankFailed, "OutOfMemory": OutOfMemory, "Stopped": Stopped}


def report_to_parent(error: Exception) -> bool:
    """Leave the message for the `hbp` that started this rank, which then prints it once; False if none did.

    The first rank to report is the one that is heard: what fails after it mostly fails because of it.
    """
    if ERROR_FILE not in os.environ:
        return False
    try:
        with Path(os.environ[ERROR_FILE]).open("x") as file:
            json.dump([type(error).__name__, str(error)], file)
    except FileExistsError:
        pass
    return True


def said_by_another_rank(message: str) -> bool:
    """Whether another rank of this machine has said it already; under torchrun, all are refused for the same reason.

    torchrun gives its ranks files to report in, each in a folder of its own, and these are in one of the attempt's.
    """
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if own is None:
        return os.environ.get("RANK", "0") != "0" and "SLURM_PROCID" in os.environ
    said = Path(own).parent.parent / "hbp-said"
    try:
        with said.open("x") as file:
            file.write(message)
        return False
    except FileExistsError:
        time.sleep(0.05)  # it may be on its way
        with contextlib.suppress(OSError):
            return said.read_text() == message
        return False
    except OSError:
        return False


def reported_by_rank() -> Exception | None:
    """What the first rank to fail or stop left behind."""
    try:
        kind, message = json.loads(Path(os.environ[ERROR_FILE]).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return REPORTED[kind](message)
