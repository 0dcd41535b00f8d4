"""Records → token ids and loss masks, many at a time.

Where a token meets the border of what is learnt, it is learnt if any of its characters is (as
``apply_chat_template(return_assistant_tokens_mask=True)``); behind a prompt, from the first token on that the prompt
alone does not have (as TRL's ``SFTTrainer``), so words that run over the border stay whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from hbp.data.record.fields import passed_over
from hbp.data.record.formats import Reading, Tokens, read_record
from hbp.data.record.layout import Layout, layouts
from hbp.data.record.token_bytes import byte_tokens
from hbp.errors import HbpError

CALL_CHARACTERS = 1 << 17
"""Of one call to the tokenizer; with 3 million in a call each takes a quarter longer (measured)."""
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, eq=False)
class Encoded:
    """One sample of ``T`` tokens."""

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    """1 where the token is to be learnt."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one record."""

    samples: tuple[Encoded, ...] = ()
    """One, or the chosen and the rejected of a pair; none where it was refused."""
    pair: bool = False
    error: str | None = None
    """Why it was refused, without the place where it stands."""
    notes: tuple[str, ...] = ()
    """What was passed over, in few distinct texts, to be counted."""


@dataclass(eq=False)
class _Draft:
    """A record on its way."""

    layouts: list[Layout] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    done: Outcome | None = None


def encode_records(records: Sequence[Any], tokenizer: Any, reading: Reading | None = None) -> list[Outcome]:
    """What each record becomes, in order.

    Args:
        records: objects as JSON or Arrow gives them; a few hundred at a time.
        tokenizer: with its chat template; none will do for records that are tokenized.
        reading: names of fields and roles; none: the usual ones.

    Returns:
        One outcome a record. A record's own fault is in its outcome and never raised.
    """
    drafts = [_draft(record, tokenizer, reading or Reading()) for record in records]
    waiting = [draft for draft in drafts if draft.done is None]
    ready = [layout for draft in waiting for layout in draft.layouts]
    try:
        encoded = iter(_tokenized(ready, tokenizer))
        for draft in waiting:
            _finish(draft, [next(encoded) for _ in draft.layouts])
    except Exception:  # some record's text cannot be tokenized: find out whose
        for draft in waiting:
            _finish_alone(draft, tokenizer)
    return [draft.done for draft in drafts if draft.done is not None]


def _draft(record: Any, tokenizer: Any, reading: Reading) -> _Draft:
    try:
        sample = read_record(record, reading)
        if isinstance(sample, Tokens):
            if not len(sample.ids):
                raise HbpError("has no tokens; remove it")
            notes = passed_over(sample.fields)
            return _Draft(done=Outcome((Encoded(sample.ids, sample.mask),), notes=tuple(notes)))
        if tokenizer is None:
            raise HbpError("is not tokenized yet; name a tokenizer (data.tokenizer)")
        texts, notes = layouts(sample, tokenizer, reading)
        return _Draft(texts, notes)
    except HbpError as error:
        return _Draft(done=Outcome(error=str(error)))


def _finish(draft: _Draft, samples: list[Encoded]) -> None:
    if any(not len(sample.input_ids) for sample in samples):
        draft.done = Outcome(error="has no tokens; remove it or check the chat template")
        return
    if len(samples) == 2 and all(layout.learnt is None for layout in draft.layouts):
        # Both answers begin where the first of them does: a token more in one than in the other would tell them apart.
        begin = min(int(np.argmax(sample.loss_mask)) for sample in samples)
        for sample in samples:
            sample.loss_mask[begin:] = 1
    draft.done = Outcome(tuple(samples), len(samples) == 2, notes=tuple(dict.fromkeys(draft.notes)))


def _finish_alone(draft: _Draft, tokenizer: Any) -> None:
    try:
        _finish(draft, _tokenized(draft.layouts, tokenizer))
    except HbpError as error:
        draft.done = Outcome(error=str(error))
    except Exception as error:  # tokenizers raise many kinds
        lone = next((m for one in draft.layouts if (m := _LONE_SURROGATE.search(one.text))), None)
        what = (
            f"half of a surrogate pair (\\u{ord(lone.group()):04x}) stands at character {lone.start()}"
            if lone
            else " ".join(str(error).split())[:160]
        )
        draft.done = Outcome(error=f"cannot be tokenized: {what}; mend or remove it")


def _tokenized(ready: Sequence[Layout], tokenizer: Any) -> list[Encoded]:
    """Tokens and masks of layouts, in order."""
    samples: dict[int, Encoded] = {}
    for numbers in _calls(ready):
        asked = [i for i in numbers if ready[i].prompt is not None]
        texts = [ready[i].text for i in numbers] + [ready[i].prompt or "" for i in asked]  # prompts ride along
        spans = any(ready[i].learnt for i in numbers)
        ids, offsets = _encoded(texts, tokenizer, added=ready[numbers[0]].raw, spans=spans)
        prompts = dict(zip(asked, ids[len(numbers) :], strict=True))
        for place, i in enumerate(numbers):
            layout = ready[i]
            mask = np.ones(len(ids[place]), np.uint8)
            if layout.prompt is not None:
                mask[: _shared(prompts[i], ids[place])] = 0
            if layout.learnt is not None:
                mask &= _reached(layout.learnt, offsets(place)) if layout.learnt else 0
            samples[i] = Encoded(ids[place], mask)
    return [samples[i] for i in range(len(ready))]


Offsets = npt.NDArray[np.int64]  # [T, 2] first character of each token and the one behind its last


def _encoded(
    texts: list[str], tokenizer: Any, *, added: bool, spans: bool
) -> tuple[list[npt.NDArray[np.int32]], Callable[[int], Offsets]]:
    """Token ids of each text, and what tells where the tokens of one stand in it.

    The library is asked where tokens stand only where that does not follow from their lengths
    (:mod:`hbp.data.record.token_bytes`).

    Args:
        texts: to tokenize.
        tokenizer: of transformers.
        added: with the tokens that the tokenizer adds to a text.
        spans: whether it will be asked where tokens stand.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    quick = backend is not None and not (backend.truncation or backend.padding or tokenizer.split_special_tokens)
    known = byte_tokens(tokenizer) if quick and spans and not added else None
    if not quick or (spans and known is None):
        out = tokenizer(
            texts, add_special_tokens=added, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return [np.asarray(one, np.int32) for one in out["input_ids"]], lambda place: _offsets(out, place)
    ids = [np.asarray(one.ids, np.int32) for one in backend.encode_batch_fast(texts, add_special_tokens=added)]

    def offsets(place: int) -> Offsets:
        found = None if known is None else known.offsets(texts[place], ids[place])
        return _pairs(backend.encode(texts[place], add_special_tokens=added).offsets) if found is None else found

    return ids, offsets


def _calls(ready: Sequence[Layout]) -> Iterator[list[int]]:
    """Numbers of layouts that are tokenized in one call: of a kind, and about as much text as processor caches hold."""
    for raw in (True, False):
        call: list[int] = []
        held = 0
        for i, layout in enumerate(ready):
            if layout.raw is not raw:
                continue
            call.append(i)
            held += len(layout.text) + len(layout.prompt or "")
            if held >= CALL_CHARACTERS:
                yield call
                call, held = [], 0
        if call:
            yield call


def _shared(prompt: npt.NDArray[np.int32], whole: npt.NDArray[np.int32]) -> int:
    """Tokens that both begin with."""
    shortest = min(len(prompt), len(whole))
    differ = np.flatnonzero(prompt[:shortest] != whole[:shortest])
    return int(differ[0]) if len(differ) else shortest


def _offsets(out: Any, place: int) -> Offsets:
    if not out.is_fast:
        raise HbpError(
            "cannot be masked: the tokenizer does not tell where its tokens stand in the text; take one of the "
            "`tokenizers` library (a tokenizer.json)"
        )
    return _pairs(out.encodings[place].offsets)


def _pairs(offsets: Sequence[tuple[int, int]]) -> Offsets:
    return np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2)


def _reached(spans: Iterable[tuple[int, int]], offsets: Offsets) -> npt.NDArray[np.uint8]:
    """1 for every token of which a character lies in a span."""
    mask = np.zeros(len(offsets), np.uint8)
    for begin, end in spans:
        mask[(offsets[:, 0] < end) & (offsets[:, 1] > begin)] = 1
    return mask
