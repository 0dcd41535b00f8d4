"""How the words of a command line are read: one line for what is wrong with them, and the nearest word that is right.

A command is declared in one module of this folder, named in :data:`hbp.cli.main.COMMANDS`. Its ``add_parser(commands)``
adds a parser with ``run`` as a default, and imports nothing that takes long. ``run(args)`` gives the result for
``--json`` (dataclasses in it are written as objects), None on a rank that has nothing to say; without ``--json`` it
prints the same for people.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TypeAlias

from hbp.errors import HbpError, did_you_mean

SHELLS = ("bash", "zsh")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other wrong input is told."""

    late_epilog: Callable[[], str] | None = None
    """An epilog that takes long to make, of the help alone."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        raise HbpError(f"{message}; see `{self.prog} --help`")

    def format_help(self) -> str:
        """The help, its epilog included."""
        if self.late_epilog is not None:
            self.epilog = self.late_epilog()
        return super().format_help()

    def options(self) -> list[str]:
        """Every option that this parser knows."""
        return [flag for flag in self._option_string_actions if flag.startswith("--")]


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""Where a command's module adds its parser."""


def check_words(words: Sequence[str], commands: dict[str, Parser]) -> None:
    """Refuse a mistyped command or option by the nearest one, before argparse tells what is missing instead.

    Raises:
        HbpError: names what is unknown and the nearest that is known.
    """
    if words[0].startswith("-"):
        return
    if words[0] not in commands:
        hint = did_you_mean(words[0], commands)
        raise HbpError(f"no command {words[0]!r}{hint}: give one of {', '.join(commands)}; see `hbp --help`")
    known = commands[words[0]].options()
    for word in words[1:]:
        if word == "--":
            return
        option = word.partition("=")[0]
        if option.startswith("--") and not any(name.startswith(option) for name in known):
            hint = did_you_mean(option, known)
            raise HbpError(f"`hbp {words[0]}` has no option {option}{hint}; see `hbp {words[0]} --help`")


def check_numbers(args: argparse.Namespace, least: Mapping[str, int]) -> None:
    """Refuse options below a least value, by name; options that are not given are left to their default.

    Raises:
        HbpError: names the option and its value.
    """
    for name, value in least.items():
        given = getattr(args, name)
        if given is not None and given < value:
            raise HbpError(f"--{name.replace('_', '-')} {given}: give at least {value}")


def check_out(folder: Path, mark: str) -> None:
    """Refuse to write into a folder that holds something else than what this command writes.

    Args:
        folder: of ``--out``.
        mark: a file that is there if the command wrote what is there.

    Raises:
        HbpError: it does, or is no folder.
    """
    if folder.is_dir() and not (folder / mark).exists() and (other := next(folder.iterdir(), None)):
        raise HbpError(f"--out {folder} holds something else ({other.name}); give a new or empty folder")
    if folder.exists() and not folder.is_dir():
        raise HbpError(f"--out {folder} is a file; give a new or empty folder")


def parse_counts(text: str) -> list[int]:
    """Numbers of devices: ``8,24,32``, or ``8..256`` for doublings from the first up to the last.

    Raises:
        HbpError: neither of these, or a number below 1.
    """
    try:
        if ".." in text:
            first, last = (int(end) for end in text.split(".."))
            counts = [first << i for i in range(max(0, last.bit_length())) if first << i <= last]
        else:
            counts = [int(count) for count in text.split(",") if count.strip()]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise HbpError(f"--gpus {text}: give numbers from 1 up, such as 8,24,32, or doublings such as 8..256")
    return counts


def parse_span(option: str, text: str | None, end: int) -> range:
    """What ``A..B`` (or ``A`` alone) names of 0 to end − 1, both ends included; all where it is not given.

    Raises:
        HbpError: not such a span, or beyond the end.
    """
    if text is None:
        return range(end)
    first, dots, last = text.partition("..")
    last = last if dots else first
    span = range(int(first), int(last) + 1) if first.isdecimal() and last.isdecimal() else range(0)
    if not span or span.stop > end:
        raise HbpError(f"{option} {text}: give A..B within 0..{end - 1}")
    return span


COMPLETION = """_hbp() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} words=""
  if [ "$COMP_CWORD" = 1 ]; then words="{commands} --help --version"; else
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
  fi
  case $word in
    -*) COMPREPLY=($(compgen -W "$words" -- "$word"));;
    *) if [ "$COMP_CWORD" = 1 ]; then COMPREPLY=($(compgen -W "$words" -- "$word"))
       else COMPREPLY=($(compgen -f -- "$word")); fi;;
  esac
}}
complete -o filenames -F _hbp hbp"""
"""Commands first, then options after a dash and files otherwise."""


def completion(shell: str, commands: dict[str, Parser]) -> str:
    """A script that completes `hbp` in a shell of :data:`SHELLS`: ``eval "$(hbp --completion bash)"``."""
    cases = "\n".join(f'      {name}) words="{" ".join(parser.options())}";;' for name, parser in commands.items())
    script = COMPLETION.format(commands=" ".join(commands), cases=cases)
    return f"autoload -U +X bashcompinit && bashcompinit\n{script}" if shell == "zsh" else script
