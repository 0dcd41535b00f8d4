"""``hbp check``: does a model family train here as its documents alone do?"""

from __future__ import annotations

import argparse
import os
from typing import Any

from hbp.cli.usage import Commands


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "check",
        help="hold a model family against plain transformers in tiny size: does it train here as it should?",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Build a tiny model of the family from the model's own configuration and compare its loss and\n"
        "every gradient with those of plain transformers, on four processes of this machine's CPU. No weights\n"
        "are read. Exit code 0 if every property holds, 1 if one does not.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="built-in name, folder, config.json, or hub name")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`hbp check`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from hbp.train.check.compare import check_models

    (result,) = check_models([args.model])
    if not args.json:
        from hbp.cli.tables import check_table

        check_table(result)
    return result
