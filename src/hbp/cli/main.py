"""The command line: which commands there are, how their words are read, and what each kind of error exits with.

Tables for people go to standard output, or with ``--json`` one JSON object does; progress and logs go to standard
error. Exit codes: 0 done, 85 saved and to be continued by the same command (a signal, ``train.max_minutes`` or
``train.max_steps`` ended the run), 2 wrong input (one line says what and how to mend it), 1 a fault, 130 interrupted
before there was anything to save, 141 nobody reads the output any more.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from hbp import __version__
from hbp.cli import audit, check, data, export, plan, rehearse, report, simulate, train
from hbp.cli.usage import SHELLS, Parser, check_words, completion
from hbp.disk import FAULTS, at_home, is_disk_fault
from hbp.errors import ERROR_FILE, HbpError, RankFailed, Stopped, report_to_parent, said_by_another_rank

COMMANDS = (data, check, plan, rehearse, train, simulate, export, report, audit)
"""Modules that declare commands (:mod:`hbp.cli.usage` says how), in the order in which the help lists them."""
TRAIN_MODULES = ("torch", "transformers", "tokenizers", "datasets", "safetensors")
INSTALL_TRAIN = "install with `pip install 'hierarchical-balance-packing[train]'`"
NOBODY_READS = 141
"""Exit code where output goes to a program that has ended, as a shell counts a death by SIGPIPE."""
STOPPED = 85
"""Exit code of a run that has saved its state and is to be continued; free of the shell's and of signals' codes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _interrupts_noted():
            return exit_code(lambda: _flushed(_run(words)))
    finally:
        _let_go_of_output()


class _Interrupted:
    """Whether Ctrl-C came: a compiler (numba) may make another error of it, or lose it in a callback."""

    noted = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """A signal handler."""
        self.noted = True
        raise KeyboardInterrupt

    def lost(self, what: sys.UnraisableHookArgs) -> None:
        """For ``sys.unraisablehook``: an interrupt that came where nothing can be raised comes again."""
        if issubclass(what.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
        else:
            sys.__unraisablehook__(what)


INTERRUPTED = _Interrupted()


@contextmanager
def _interrupts_noted() -> Iterator[None]:
    """While the body runs Ctrl-C is noted beside being raised; nothing changes where somebody handles it already."""
    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    hook = sys.unraisablehook
    if ours:
        signal.signal(signal.SIGINT, INTERRUPTED.note)
        sys.unraisablehook = INTERRUPTED.lost
    try:
        yield
    finally:
        INTERRUPTED.noted = False
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.unraisablehook = hook


def _flushed(code: int) -> int:
    """After all that was printed is written."""
    sys.stdout.flush()
    return code


def _let_go_of_output() -> None:
    """Where nobody reads what is printed any more (``| head``), nothing is said about that when Python ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError, ValueError):  # not a file
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(words: list[str]) -> int:
    parser, commands = make_parser()
    if not words:
        parser.print_help()
        return 0
    if words[0] == "torchrun" and words[1:]:  # its words are torchrun's own
        train.run_torchrun(words[1:])
        return 0
    words = ["=".join(map(at_home, word.split("=", 1))) for word in words]
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
    except Exception as error:
        return _interrupted() if INTERRUPTED.noted else _code_of(error)
    except KeyboardInterrupt:
        return _interrupted()


def _interrupted() -> int:
    if ERROR_FILE not in os.environ:  # else whoever started this rank says it
        print("hbp: interrupted", file=sys.stderr)
    return 130


def _code_of(error: Exception) -> int:
    """Says an error; raises it again where it is nobody's but ours."""
    try:
        raise error
    except HbpError as error:
        return _fail(RankFailed(str(error)), 1) if is_disk_fault(error) else _fail(error, 2)
    except ModuleNotFoundError as error:
        if error.name not in TRAIN_MODULES:
            raise
        return _fail(HbpError(f"this needs {error.name}; {INSTALL_TRAIN}"), 2)
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        return _fail(HbpError(f"{error.filename}: {error.strerror}; give a folder that can be written"), 2)
    except OSError as error:
        if error.errno == errno.EPIPE:
            return NOBODY_READS
        if error.errno not in FAULTS:
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


def _fail(error: Exception, code: int) -> int:
    refused = isinstance(error, HbpError)
    if not report_to_parent(error) and not (refused and said_by_another_rank(str(error))):
        print(f"hbp: error: {error}", file=sys.stderr)
    return code
