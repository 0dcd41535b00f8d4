"""The command line: which commands there are, how their words are read, and what each kind of error exits with.

Tables for people go to standard output, or with ``--json`` one JSON object does; progress and logs go to standard
error. Exit codes: 0 done, 85 saved and to be continued by the same command (a signal, ``train.max_minutes`` or
``train.max_steps`` ended the run), 2 wrong input (one line says what and how to mend it), 1 a fault.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from hbp import __version__
from hbp.cli import audit, check, data, export, plan, rehearse, report, simulate, train
from hbp.cli.usage import SHELLS, Parser, check_words, completion
from hbp.errors import HbpError, RankFailed, Stopped, report_to_parent

COMMANDS = (data, check, plan, rehearse, train, simulate, export, report, audit)
"""Modules that declare commands (:mod:`hbp.cli.usage` says how), in the order in which the help lists them."""
TRAIN_MODULES = ("torch", "transformers", "tokenizers", "datasets", "safetensors")
INSTALL_TRAIN = "install with `pip install 'hierarchical-balance-packing[train]'`"
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
"""What the file system may do to a run; a line tells it, no traceback."""
STOPPED = 85
"""Exit code of a run that has saved its state and is to be continued; free of the shell's and of signals' codes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code(lambda: _run(words))


def _run(words: list[str]) -> int:
    parser, commands = make_parser()
    if not words:
        parser.print_help()
        return 0
    if words[0] == "torchrun" and words[1:]:  # its words are torchrun's own
        train.run_torchrun(words[1:])
        return 0
    check_words(words, commands)
    args = parser.parse_args(words)
    if args.completion:
        print(completion(args.completion, commands))
        return 0
    if args.command is None:
        parser.error("give a COMMAND")
    result: dict[str, Any] | None = args.run(args)
    if result is not None and args.json:
        print(_as_json(result))
    return 1 if args.command in ("check", "audit") and result and not result["holds"] else 0


def _as_json(result: dict[str, Any]) -> str:
    """One line that every JSON reader takes: what is not finite is null."""
    text = json.dumps(result, default=dataclasses.asdict)
    return json.dumps(json.loads(text, parse_constant=lambda name: None))


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of a whole command line, and that of each command by its name."""
    parser = Parser(prog="hbp", description="Hierarchical Balance Packing for long-context training")
    parser.add_argument("--version", action="version", version=f"hbp {__version__}")
    parser.add_argument("--completion", choices=SHELLS, help='print completions: eval "$(hbp --completion bash)"')
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in COMMANDS:
        module.add_parser(commands)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    return parser, dict(commands.choices)


def exit_code(command: Callable[[], int | None]) -> int:
    """Run it; what it raises for users becomes one line on standard error and its exit code."""
    try:
        return command() or 0
    except HbpError as error:
        return _fail(error, 2)
    except ModuleNotFoundError as error:
        if error.name not in TRAIN_MODULES:
            raise
        return _fail(HbpError(f"this needs {error.name}; {INSTALL_TRAIN}"), 2)
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        return _fail(HbpError(f"{error.filename}: {error.strerror}; give a folder that can be written"), 2)
    except OSError as error:
        if error.errno not in DISK:
            raise
        return _fail(RankFailed(f"{error.filename or 'a file'}: {error.strerror}; mend that and run again"), 1)
    except RankFailed as error:
        return _fail(error, 1)
    except Stopped as stop:
        if report_to_parent(stop):
            return 0
        if os.environ.get("RANK", "0") == "0":
            print(f"hbp: {stop}", file=sys.stderr)
        return STOPPED  # torchrun itself makes 1 of it, `hbp torchrun` does not
    except KeyboardInterrupt:
        print("hbp: interrupted", file=sys.stderr)
        return 130


def _fail(error: Exception, code: int) -> int:
    if not report_to_parent(error):
        print(f"hbp: error: {error}", file=sys.stderr)
    return code
