"""Source → token store: read, tokenize, write, with a progress line; skipped when the store is already up to date."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from hbp.data.chat import Encoded, encode, load_tokenizer
from hbp.data.sources import Conversation, read_conversations, source_fingerprint
from hbp.data.store import FORMAT, TokenStore, open_store, write_store
from hbp.errors import HbpError
from hbp.progress import Counter, say

CHUNK = 256


def prepare_store(
    source: str,
    tokenizer: str,
    folder: Path,
    *,
    split: str = "train",
    subset: str | None = None,
    processes: int = 1,
) -> TokenStore:
    """The token store of a source, made if its folder does not hold it already.

    Args:
        source: as in :func:`hbp.data.sources.read_conversations`.
        tokenizer: folder or hub name.
        folder: of the store.
        split: of a `datasets` source.
        subset: of a hub data set.
        processes: that tokenize; the samples' order does not depend on it.

    Raises:
        HbpError: from reading, tokenizing or writing.
    """
    made_of = f"{FORMAT} {source_fingerprint(source, split, subset)} {source_fingerprint(tokenizer)}"
    fingerprint = hashlib.sha256(made_of.encode()).hexdigest()
    try:
        store = open_store(folder)
        if store.fingerprint == fingerprint:
            return store
    except HbpError:  # none yet, or a damaged one: make it
        pass
    loaded = load_tokenizer(tokenizer)
    conversations = read_conversations(source, split=split, subset=subset)
    store = write_store(
        folder,
        _encode_all(loaded, tokenizer, conversations, processes),
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        vocab_size=len(loaded),
    )
    say(f"{len(store):,} samples, {int(store.lengths.sum(dtype='int64')):,} tokens → {folder}")
    return store


def _encode_all(loaded: Any, name: str, conversations: Iterator[Conversation], processes: int) -> Iterator[Encoded]:
    with Counter("tokenize", "samples") as counter:
        if processes == 1:
            for conversation in conversations:
                yield encode(loaded, conversation)
                counter.advance()
            return
        with ProcessPoolExecutor(processes, initializer=_load_in_worker, initargs=(name,)) as pool:
            # A few chunks a worker at a time, so that a stream of any size fits memory.
            while window := list(islice(conversations, CHUNK * processes * 4)):
                chunks = [window[i : i + CHUNK] for i in range(0, len(window), CHUNK)]
                for encoded in pool.map(_encode_in_worker, chunks):
                    yield from encoded
                    counter.advance(len(encoded))


_worker_tokenizer: Any = None


def _load_in_worker(name: str) -> None:
    global _worker_tokenizer
    _worker_tokenizer = load_tokenizer(name)


def _encode_in_worker(conversations: list[Conversation]) -> list[Encoded]:
    return [encode(_worker_tokenizer, conversation) for conversation in conversations]
