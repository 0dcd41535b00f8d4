"""The samples of `quality.py`: a mix of many short tasks and few long ones made for the question, and the standard
library's text. Both in memory, as the trainer asks for samples.

Every task asks for tokens that follow from the sample alone, so that an answer is right or wrong. Short: copy, sort,
addition, associative recall. Long: one needle or several among filler, and counting marks. A short sample has eight to
forty answer tokens, a long one has one to three: what a loss that weighs by company gets wrong shows here most.

What is recalled is an *item*, a token of one of eight kinds and one of eight values, asked for by its kind: one look
back finds it, where a pair of key and value takes two. The easier form, for models that are trained for a minute.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Int = npt.NDArray[np.integer]
Sample = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]

END, COPY, SORT, ADD, RECALL, NEEDLE, SEVERAL, COUNT, ASK, PLUS, EQUALS, MARK = range(12)
DIGITS, KINDS, ITEMS, SYMBOLS, FILLER = (
    np.arange(a, b) for a, b in ((12, 22), (22, 30), (32, 96), (96, 120), (120, 128))
)
VOCAB = 128
BLOCK = 8
"""Symbols that are copied at a time."""


@dataclass(frozen=True)
class Samples:
    """What :class:`hbp.train.loop.CountedSamples` asks for, and which task each sample is of."""

    documents: Sequence[Sample]
    """Token ids and loss mask of each."""
    kind: Sequence[str]
    """Task of each."""

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each, int32 ``[N]``."""
        return np.array([len(ids) for ids, _ in self.documents], np.int32)

    @property
    def loss_tokens(self) -> npt.NDArray[np.int64]:
        """Targets of each, int64 ``[N]``."""
        return np.array([int(mask[1:].sum()) for _, mask in self.documents], np.int64)

    def sample(self, index: int) -> Sample:
        """Token ids and loss mask of one."""
        return self.documents[index]

    def take(self, ids: Int) -> Samples:
        """Some of them, in the order given."""
        return Samples([self.documents[i] for i in ids], [self.kind[i] for i in ids])


def learnt(*parts: tuple[Sequence[int] | Int, int]) -> Sample:
    """A sample of pieces, each with its loss mask."""
    ids = np.concatenate([np.asarray(tokens, np.int32) for tokens, _ in parts])
    mask = np.concatenate([np.full(len(tokens), on, np.uint8) for tokens, on in parts])
    return ids, mask


def copy(rng: np.random.Generator, length: int) -> Sample:
    """Blocks of symbols, each followed by the same again."""
    parts: list[tuple[Sequence[int] | Int, int]] = [([COPY], 0)]
    for symbols in rng.choice(SYMBOLS, (max(1, (length - 1) // (2 * BLOCK + 1)), BLOCK)):
        parts += [(symbols, 0), ([ASK], 0), (symbols, 1)]
    return learnt(*parts)


def sort(rng: np.random.Generator, length: int) -> Sample:
    """Different symbols, and the same in order."""
    symbols = rng.permutation(SYMBOLS)[: min(len(SYMBOLS), max(2, (length - 3) // 2))]
    return learnt(([SORT], 0), (symbols, 0), ([ASK], 0), (np.sort(symbols), 1), ([END], 1))


def add(rng: np.random.Generator, length: int) -> Sample:
    """Sums of two digits, each with its two-digit answer."""
    parts: list[tuple[Sequence[int] | Int, int]] = [([ADD], 0)]
    for a, b in rng.integers(0, 10, (max(1, (length - 1) // 6), 2)):
        parts += [([DIGITS[a], PLUS, DIGITS[b], EQUALS], 0), (DIGITS[list(divmod(int(a + b), 10))], 1)]
    return learnt(*parts)


def _hidden(rng: np.random.Generator, length: int, task: int, items: int, questions: int) -> Sample:
    """Items of different kinds at random places among filler; then some kinds, each with the item of that kind."""
    kinds = rng.permutation(len(KINDS))[:items]
    hidden = ITEMS[len(KINDS) * kinds + rng.integers(0, len(ITEMS) // len(KINDS), items)]
    filler = rng.choice(FILLER, max(1, length - 2 - items - 2 * questions))
    body = np.insert(filler, rng.integers(0, len(filler) + 1, items), hidden)
    asked = rng.permutation(items)[:questions]
    answers = [part for i in asked for part in ((KINDS[kinds[i : i + 1]], 0), (hidden[i : i + 1], 1))]
    return learnt(([task], 0), (body, 0), ([ASK], 0), *answers)


def recall(rng: np.random.Generator, length: int) -> Sample:
    """As many items as the length allows, at most eight, and all of them asked for."""
    items = max(1, min(len(KINDS), (length - 3) // 3))
    return _hidden(rng, length, RECALL, items, items)


def needle(rng: np.random.Generator, length: int) -> Sample:
    """One item among filler, one question."""
    return _hidden(rng, length, NEEDLE, 1, 1)


def several(rng: np.random.Generator, length: int) -> Sample:
    """Eight items among filler, three questions."""
    return _hidden(rng, length, SEVERAL, 8, 3)


def count(rng: np.random.Generator, length: int) -> Sample:
    """How many of one to four marks stand among filler."""
    marks = int(rng.integers(1, 5))
    filler = rng.choice(FILLER, max(marks, length - 3 - marks))
    body = np.insert(filler, rng.permutation(len(filler))[:marks], MARK)
    return learnt(([COUNT], 0), (body, 0), ([ASK], 0), (DIGITS[[marks]], 1))


Task = Callable[[np.random.Generator, int], Sample]
SHORT: Mapping[str, Task] = {"copy": copy, "sort": sort, "add": add, "recall": recall}
LONG: Mapping[str, Task] = {"needle": needle, "several": several, "count": count}
TASKS: Mapping[str, Task] = {**SHORT, **LONG}


@dataclass(frozen=True)
class Mix:
    """How many samples, of which tasks and lengths."""

    short: int
    long: int
    short_lengths: tuple[int, int] = (24, 96)
    long_lengths: tuple[int, int] = (1024, 4096)
    """Log-uniform, in tokens."""
    short_tasks: tuple[str, ...] = tuple(SHORT)
    long_tasks: tuple[str, ...] = tuple(LONG)


def make_mix(mix: Mix, seed: int) -> Samples:
    """The samples in random order; equal seeds give equal samples."""
    rng = np.random.default_rng(seed)
    kinds = [mix.short_tasks[i % len(mix.short_tasks)] for i in range(mix.short)]
    kinds += [mix.long_tasks[i % len(mix.long_tasks)] for i in range(mix.long)]
    documents = []
    for name in kinds:
        low, high = mix.short_lengths if name in mix.short_tasks else mix.long_lengths
        documents.append(TASKS[name](rng, round(float(np.exp(rng.uniform(np.log(low), np.log(high)))))))
    order = rng.permutation(len(kinds))
    return Samples([documents[i] for i in order], [kinds[i] for i in order])


def make_stdlib(folder: Path, short: int, long: int, longest: int, vocab: int) -> Samples:
    """The standard library's functions and modules, in tokens of a vocabulary trained on them.

    Args:
        folder: for the text and the tokenizer.
        short: function-sized samples.
        long: module-sized samples.
        longest: tokens; longer samples are cut off.
        vocab: of the tokenizer.
    """
    from transformers import AutoTokenizer

    from hbp.data.stdlib_sft import train_tokenizer, write_dataset

    text = folder / "stdlib.jsonl"
    write_dataset(text, seed=0, short_samples=short, long_samples=long, longest_chars=16 * longest)
    train_tokenizer(text, folder / "tokenizer", vocab_size=vocab)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    documents, kinds = [], []
    for line in text.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        got = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        ids = np.array(got["input_ids"][:longest], np.int32)
        mask = np.array(got["assistant_masks"][:longest], np.uint8)
        if mask[1:].any():
            documents.append((ids, mask))
            kinds.append("module" if len(ids) > longest // 4 else "function")
    return Samples(documents, kinds)


def save(samples: Samples, file: Path) -> None:
    """Into one file, for :func:`load`."""
    ids, masks = (np.concatenate([document[i] for document in samples.documents]) for i in (0, 1))
    np.savez_compressed(file, ids=ids, masks=masks, lengths=samples.lengths, kind=np.array(samples.kind))


def load(file: Path) -> Samples:
    """What :func:`save` left."""
    with np.load(file) as kept:
        cuts = np.cumsum(kept["lengths"])[:-1]
        pieces = (np.split(kept[name], cuts) for name in ("ids", "masks"))
        return Samples(list(zip(*pieces, strict=True)), kept["kind"].tolist())
