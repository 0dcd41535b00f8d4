"""`hbp data`: what the model will see, before it is trained on."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbp.cli.usage import Commands
from hbp.errors import HbpError

if TYPE_CHECKING:
    from hbp.config import DataConfig
    from hbp.data.look import Counts, Run
    from hbp.data.store import TokenStore

SHOWN_CHARS = 4000
"""Of a stretch of text; the middle of a longer one is left out."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    data = commands.add_parser(
        "data",
        help="show what the model will see: tokens, which of them are learnt, counts, what is left out and why",
    )
    data.set_defaults(run=run_data)
    data.add_argument("source", metavar="SOURCE|CONFIG.yaml", help="file, folder, hub name, or the data of a run")
    data.add_argument("--tokenizer", metavar="NAME|DIR", help="needed unless SOURCE is a run's YAML file")
    data.add_argument("--limit", type=int, default=5, metavar="N", help="samples to show (default 5)")
    data.add_argument("--max-length", type=int, metavar="TOKENS", help="longest sample that is used")
    data.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="key=value",
        help="other options of the `data` section (`hbp train --help`), such as bad_records=skip",
    )


def run_data(args: argparse.Namespace) -> dict[str, Any]:
    """`hbp data`: tokenize, through the cache, and show."""
    from hbp.data.build import load
    from hbp.data.look import count, layout_of, runs_of, sample_json, spread, total
    from hbp.data.samples import cut_to

    if args.limit < 0:
        raise HbpError(f"--limit {args.limit}: give at least 0")
    store, config = _store(args)
    by_source = count(store, config.max_length, config.too_long)
    every = total(by_source)
    if config.max_length is not None and config.too_long != "drop":
        store = cut_to(store, config.max_length, config.too_long)
    shown = spread(store, args.limit, config.max_length)
    highest = max(source.highest_id for source in store.sources)
    if highest >= store.vocab_size:
        print(f"hbp: token ids go up to {highest}, the tokenizer's to {store.vocab_size - 1}", file=sys.stderr)
    tokenizer = load(store.tokenizer, config.chat_template) if shown else None
    if args.json:
        return {
            "samples": [sample_json(store, index, tokenizer) for index in shown],
            "counts": dataclasses.asdict(every),
            "by_source": {name: dataclasses.asdict(counts) for name, counts in by_source.items()},
            "bad_records": [place for source in store.sources for place in source.bad_first],
            "chat_template": layout_of(store),
            "notes": {note: times for source in store.sources for note, times in source.notes},
        }
    for index in shown:
        _show(f"sample {index}, {store.place(index)}", runs_of(store, index, tokenizer), store, index)
    _tables(by_source, every, store)
    return {}


def _store(args: argparse.Namespace) -> tuple[TokenStore, DataConfig]:
    from hbp.config import Config, load_config, validated
    from hbp.run.data import cached_store, prepare

    extra = [f"data.{option}" for option in args.set]
    if args.max_length is not None:
        extra.append(f"data.max_length={args.max_length}")
    if Path(args.source).suffix in (".yaml", ".yml"):
        if args.tokenizer is not None:
            extra.append(f"data.tokenizer={args.tokenizer}")
        config: Config = load_config(Path(args.source), extra)
        return prepare(config), config.data
    if args.tokenizer is None:
        raise HbpError("hbp data SOURCE needs --tokenizer NAME|DIR")
    raw = {"data": {"source": args.source, "tokenizer": args.tokenizer}, "model": {"path": args.tokenizer}}
    config = validated(raw, extra, "the options of `hbp data`")
    return cached_store(config.data, args.tokenizer), config.data


def _show(title: str, runs: list[Run], store: TokenStore, index: int) -> None:
    from rich.text import Text

    from hbp.cli.tables import Output

    console = Output(highlight=False, soft_wrap=True)
    learnt = int(store.loss_tokens[index])
    console.print(Text(f"── {title}: {int(store.lengths[index]):,} tokens, {learnt:,} learnt", "bold"))
    text = Text()
    for run in runs:
        shown = CONTROL.sub(lambda found: repr(found[0])[1:-1], _short(run.text))
        if console.is_terminal and console.color_system is not None:
            text.append(shown, "bold green" if run.learnt else "dim")
        else:
            text.append(f"⟦{shown}⟧" if run.learnt else shown)
    console.print(text)
    print()


def _short(text: str) -> str:
    if len(text) <= SHOWN_CHARS:
        return text
    half = SHOWN_CHARS // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def _tables(by_source: dict[str, Counts], every: Counts, store: TokenStore) -> None:
    from hbp.cli.tables import table
    from hbp.data.look import layout_of

    rows = [(name, *_cells(counts)) for name, counts in by_source.items()]
    if len(rows) > 1:
        rows.append(("all", *_cells(every)))
    columns = ("source", "samples", "tokens", "learnt", "without any", "dropped", "their tokens", "longest", "at")
    table("what the model will see", columns, rows)
    if layout := layout_of(store):
        print(layout)
    if every.truncated:
        print(f"{every.truncated:,} samples truncated; their ends are counted among the dropped tokens")
    for source in store.sources:
        for place in source.bad_first:
            print(f"{source.name}: cannot be used: {place}")
        for note, times in source.notes:
            print(f"{source.name}: {note} ({times:,} records)")
    if not every.loss_tokens:
        print("hbp: no token is learnt: look at the roles and at the chat template", file=sys.stderr)


def _cells(counts: Counts) -> tuple[str, ...]:
    return (
        f"{counts.samples:,}",
        f"{counts.tokens:,}",
        f"{counts.loss_tokens / max(counts.tokens, 1):.1%}",
        f"{counts.without_loss:,}",
        f"{counts.dropped:,}",
        f"{counts.dropped_share:.1%}",
        f"{counts.longest:,}",
        counts.longest_at,
    )
