"""Sources → token store: pieces are tokenized side by side, each into a shard named after its content.

What was made is never made twice: a shard's name is the hash of the piece's bytes and of everything that decides what
becomes of them (tokenizer, template, fields, and our own code), so an interrupted build goes on where it stood, a file
that has grown is tokenized from where it grew, and a run shares shards with others through the cache. Memory is that of
one piece for each process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from hbp.data import record
from hbp.data.cache import clean, share, trim
from hbp.data.files import Piece, content_of, line_number, parsed, records_of
from hbp.data.record import (
    Outcome,
    Reading,
    described,
    encode_records,
    load_tokenizer,
    template_fingerprint,
    training_version,
)
from hbp.data.sources import Source, check_sources, files_of, pieces_of_source
from hbp.data.store import (
    ALONE,
    CHOSEN,
    FORMAT,
    REJECTED,
    SHARDS,
    Row,
    ShardEntry,
    ShardInfo,
    SourceEntry,
    TokenStore,
    open_store,
    read_details,
    read_shard_info,
    shard_parts,
    write_index,
    write_shard,
)
from hbp.disk import versions_of
from hbp.errors import HbpError
from hbp.progress import Counter, say

NO_READING = Reading()
LIBRARIES = ("tokenizers", "transformers", "pyarrow", "datasets")
"""Whose versions a store records."""
RECORDS = 256
"""Records that are encoded in one call."""
RECORD_BYTES = 4 << 20
"""Their text, about; so that few long ones are a call."""
BAD_KEPT = 20
"""Refused records whose place and reason are kept."""
SETTLED_S = 2.0
"""A file changed so shortly before it was looked at may change again without its time telling."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which tokens a record becomes."""

    tokenizer: str
    chat_template: str | None
    reading: Reading
    identity: str
    """Hash of it, of the tokenizer's content and of the code."""
    vocab_size: int
    """One more than the tokenizer's highest id."""
    layout: str = ""
    """Which template lays conversations out, in a line for people."""


@dataclass(frozen=True)
class Job:
    """What whoever makes a shard is given beside the piece."""

    recipe: Recipe
    folder: Path
    """Of the shards."""
    cache: Path | None
    """Of shards that others may use; None: there is none."""
    skip_bad: bool


@dataclass(frozen=True)
class Made:
    """A shard that is in its place."""

    name: str
    info: ShardInfo


MapPieces = Callable[[Iterator[Piece], Job], Iterator[tuple[Piece, Made]]]


def recipe_of(tokenizer: str, chat_template: str | None = None, reading: Reading = NO_READING) -> Recipe:
    """Load a tokenizer and name what it, a template and a way of reading make.

    Where no template is named and the tokenizer's is a stock one that TRL trains with a version of its own, whole
    conversations are laid out by that version.

    Raises:
        HbpError: no such tokenizer or template.
    """
    loaded = load(tokenizer, chat_template)
    if chat_template is None and (trained := training_version(loaded)) is not None:
        reading = replace(reading, conversations=trained[1])
    vocabulary = loaded.get_vocab()
    backend = getattr(loaded, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(vocabulary, sort_keys=True)
    parts = [str(FORMAT), _code(), content, template_fingerprint(loaded), repr(reading), type(loaded).__name__]
    parts += [str(loaded.special_tokens_map), str(getattr(loaded, "add_bos_token", None))]
    parts += [str(getattr(loaded, "add_eos_token", None))]
    identity = hashlib.blake2b("\0".join(parts).encode(errors="surrogatepass"), digest_size=12).hexdigest()
    highest, layout = max(vocabulary.values(), default=-1), described(loaded, chat_template)
    return Recipe(tokenizer, chat_template, reading, identity, highest + 1, layout)


@functools.lru_cache(4)
def load(tokenizer: str, chat_template: str | None) -> Any:
    """The tokenizer, loaded once in a process."""
    return load_tokenizer(tokenizer, chat_template)


@functools.cache
def _code() -> str:
    """Hash of the code that makes tokens of records: what an older version made is made again."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(record.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


# One shard


def make_shard(piece: Piece, job: Job) -> Made:
    """The shard of a piece: found in its place or in the cache, or made.

    Raises:
        HbpError: a record cannot be used and bad ones are not to be skipped, or the file cannot be read; names it.
    """
    name = f"{content_of(piece)}-{job.recipe.identity}.arrow"
    path = job.folder / name
    info = read_shard_info(path)
    if info is None and job.cache is not None and read_shard_info(job.cache / name) is not None:
        with suppress(OSError):  # another run may have just taken it away
            share(job.cache / name, path)
            info = read_shard_info(path)
    if info is None:
        bad = _Bad(piece, job.skip_bad)
        info = write_shard(path, _rows(piece, job.recipe, bad), bad.said)
        if job.cache is not None:
            with suppress(OSError):  # a full or read-only cache is no reason to end
                share(path, job.cache / name)
    elif info.bad and not job.skip_bad:
        number, reason = info.bad_first[0]
        raise HbpError(f"{_place(piece, number)}{reason}")
    if job.cache is not None:
        with suppress(OSError):
            os.utime(job.cache / name)
    return Made(name, info)


@dataclass
class _Bad:
    """Counts what a piece holds that cannot be used, or says it and ends."""

    piece: Piece
    skip: bool
    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)
    lines: int = 0
    notes: Tally[str] = field(default_factory=Tally)

    def add(self, number: int, reason: str) -> None:
        if not self.skip:
            raise HbpError(f"{_place(self.piece, number)}{reason}")
        self.count += 1
        if len(self.first) < BAD_KEPT:
            self.first.append((number, reason))

    def count_lines(self, lines: int) -> None:
        self.lines = lines

    def said(self) -> dict[str, Any]:
        return {
            "lines": self.lines,
            "bad": self.count,
            "bad_first": tuple(self.first),
            "notes": tuple(sorted(self.notes.items())),
        }


def _place(piece: Piece, number: int) -> str:
    return f"{piece.file} {piece.unit} {line_number(piece, number)}"


def _rows(piece: Piece, recipe: Recipe, bad: _Bad) -> Iterator[Row]:
    tokenizer = load(recipe.tokenizer, recipe.chat_template)
    for numbers, records in _calls(piece, bad):
        for number, outcome in zip(numbers, _encode(records, tokenizer, recipe.reading), strict=True):
            bad.notes.update(outcome.notes)
            if outcome.error is not None:
                bad.add(number, f": {outcome.error}")
            elif not all(len(sample.input_ids) for sample in outcome.samples):
                bad.add(number, " has no tokens; remove it or check the chat template")
            else:
                parts = (CHOSEN, REJECTED) if outcome.pair else (ALONE,) * len(outcome.samples)
                yield from (Row(s, number, part) for s, part in zip(outcome.samples, parts, strict=True))


def _encode(records: list[Any], tokenizer: Any, reading: Reading) -> list[Outcome]:
    return encode_records(records, tokenizer, reading)


def _calls(piece: Piece, bad: _Bad) -> Iterator[tuple[list[int], list[Any]]]:
    numbers: list[int] = []
    records: list[Any] = []
    held = 0
    for number, raw in records_of(piece, bad.count_lines):
        try:
            records.append(parsed(raw))
        except HbpError as error:
            bad.add(number, f" {error}")
            continue
        numbers.append(number)
        held += len(raw) if isinstance(raw, bytes) else RECORD_BYTES // RECORDS
        if len(records) >= RECORDS or held >= RECORD_BYTES:
            yield numbers, records
            numbers, records, held = [], [], 0
    if records:
        yield numbers, records


# All of them


def build_store(
    folder: Path,
    sources: Sequence[Source],
    recipe: Recipe,
    *,
    processes: int = 1,
    skip_bad: bool = False,
    cache: Path | None = None,
    cache_bytes: float = float("inf"),
    piece_bytes: int | None = None,
    map_pieces: MapPieces | None = None,
) -> TokenStore:
    """The token store of some sources, made if its folder does not hold it already.

    Args:
        folder: of the store.
        sources: read in this order.
        recipe: of the tokens.
        processes: that tokenize; nothing depends on it but the time.
        skip_bad: leave out records that cannot be used and count them.
        cache: folder to share shards through; None: none.
        cache_bytes: it is cut to this size afterwards.
        piece_bytes: None: :func:`hbp.data.files.piece_bytes` decides.
        map_pieces: makes the shards, in order; None: this process, or `processes` others.

    Raises:
        HbpError: from finding, reading or tokenizing.
    """
    check_sources(sources)
    shards = folder / SHARDS
    clean(shards)
    states = _file_states(sources)
    made_of = {
        "recipe": recipe.identity,
        "skip_bad": skip_bad,
        "piece_bytes": piece_bytes,
        "sources": [asdict(source) for source in sources],
        "files": states,
    }
    before = read_details(folder).get("made_of")
    if before == json.loads(json.dumps(made_of)) and None not in states.values():
        try:
            return open_store(folder)
        except HbpError:  # damaged: make it again
            pass
    shards.mkdir(parents=True, exist_ok=True)
    job = Job(recipe, shards, cache / SHARDS if cache else None, skip_bad)
    map_pieces = map_pieces or (_here if processes == 1 else functools.partial(_in_processes, processes))
    entries, totals = _make_all(sources, job, map_pieces, piece_bytes)
    weighted = any(source.weight is not None for source in sources)
    kept = [
        SourceEntry(
            source.name,
            source.held_out,
            None if weighted else 1.0 if source.repeat is None else source.repeat,
            source.weight,
            **totals[number],
        )
        for number, source in enumerate(sources)
    ]
    said = json.dumps([recipe.identity, [asdict(e) for e in kept], [(e.name, e.samples, e.source) for e in entries]])
    store = write_index(
        folder,
        entries,
        kept,
        fingerprint=hashlib.blake2b(said.encode(), digest_size=20).hexdigest(),
        tokenizer=recipe.tokenizer,
        vocab_size=recipe.vocab_size,
        details={"made_of": made_of, "layout": recipe.layout, "versions": versions_of(*LIBRARIES)},
    )
    if cache is not None:
        clean(cache / SHARDS)
        trim(cache, cache_bytes)
    say(f"{len(store):,} samples, {int(store.lengths.sum(dtype='int64')):,} tokens → {folder}")
    return store


def _file_states(sources: Sequence[Source]) -> dict[str, list[int] | None]:
    """Size, time and inode of each file; None of one that changed just now."""
    states: dict[str, list[int] | None] = {}
    for source in sources:
        for file in files_of(source) or ():
            stat = file.stat()
            settled = time.time() - stat.st_mtime > SETTLED_S
            states[str(file)] = [stat.st_size, stat.st_mtime_ns, stat.st_ino] if settled else None
    return states


def _make_all(
    sources: Sequence[Source], job: Job, map_pieces: MapPieces, size: int | None
) -> tuple[list[ShardEntry], list[dict[str, Any]]]:
    """Shards in order, and of each source how much was left out."""
    entries: list[ShardEntry] = []
    totals: list[dict[str, Any]] = []
    files = [file for source in sources for file in files_of(source) or ()]
    whole, done = sum(file.stat().st_size for file in files), 0
    with Counter("tokenize", "samples") as counter:
        for number, source in enumerate(sources):
            bad, first_bad, notes, held, highest = 0, list[str](), Tally[str](), 0, 0
            lines: dict[str, int] = {}  # read so far of each file
            for piece, made in map_pieces(pieces_of_source(source, size), job):
                info = made.info
                first = lines.get(piece.file, 1) if piece.first is None else piece.first
                lines[piece.file] = first + info.lines
                room = info.samples if source.max_samples is None else source.max_samples - held
                used = _whole_pairs(job.folder / made.name, info.samples, room)
                bad, held, done = bad + info.bad, held + used, done + piece.progress
                highest = max(highest, info.highest_id)
                notes.update(dict(info.notes))
                first_bad += [f"{piece.file} {piece.unit} {first + n}{why}" for n, why in info.bad_first]
                if used:
                    entries.append(ShardEntry(made.name, used, number, piece.file, first, piece.unit))
                counter.advance(used, done / whole if whole else None)
                if held == source.max_samples:
                    break
            if not held:
                left_out = f" that can be used ({bad:,} cannot: {first_bad[0]})" if bad else ""
                raise HbpError(f"{source.path} holds no records{left_out}; give a source with at least one sample")
            said = {"bad": bad, "bad_first": tuple(first_bad[:BAD_KEPT]), "notes": tuple(sorted(notes.items()))}
            totals.append({"highest_id": highest, **said})
    return entries, totals


def _whole_pairs(shard: Path, samples: int, room: int) -> int:
    """How many of a shard's samples fit, none of them a chosen one without its rejected."""
    if room >= samples:
        return samples
    parts = shard_parts(shard)
    return room - 1 if room > 0 and parts[room - 1] == CHOSEN else max(room, 0)


def _here(pieces: Iterator[Piece], job: Job) -> Iterator[tuple[Piece, Made]]:
    for piece in pieces:
        yield piece, make_shard(piece, job)


def _in_processes(processes: int, pieces: Iterator[Piece], job: Job) -> Iterator[tuple[Piece, Made]]:
    """In order; at most two pieces a process wait, so that a stream of any size fits memory."""
    first = list(islice(pieces, 2))
    if len(first) < 2:  # nothing to share out
        yield from _here(iter(first), job)
        return
    with ProcessPoolExecutor(processes, _context(), _start_worker) as pool:
        waiting: deque[tuple[Piece, Future[Made]]] = deque()

        def next_done() -> tuple[Piece, Made]:
            piece, future = waiting.popleft()
            return piece, future.result()

        try:
            for piece in _chain(first, pieces):
                waiting.append((piece, pool.submit(make_shard, piece, job)))
                if len(waiting) >= 2 * processes:
                    yield next_done()
            while waiting:
                yield next_done()
        except BrokenProcessPool:
            raise HbpError(
                f"a process that tokenizes was killed, maybe for memory; lower data.processes (now {processes})"
            ) from None
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():  # one that is only starting would tell of what is gone
                child.kill()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _context() -> Any:
    """How processes start: forked from this one, which costs nothing, unless it has other threads or uses CUDA."""
    torch = sys.modules.get("torch")
    if sys.platform == "linux" and threading.active_count() == 1 and not (torch and torch.cuda.is_initialized()):
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hbp.data.build", "transformers.models.auto.tokenization_auto"])
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the server inherits: Ctrl-C is for this process
        forkserver.ensure_running()
        signal.signal(signal.SIGINT, before)
    return context


def _chain(first: Iterable[Piece], rest: Iterator[Piece]) -> Iterator[Piece]:
    yield from first
    yield from rest


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:  # as under nohup
            signal.signal(number, signal.SIG_DFL)  # of a whole process group's it ends without a word
