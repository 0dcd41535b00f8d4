"""A record of any known shape → what is to be learnt from it.

===================================  ==================================================================
fields                               becomes
===================================  ==================================================================
``messages``                         :class:`Talk`, the assistant's turns learnt
``conversations``                    the same (ShareGPT)
``prompt``, ``completion``           :class:`Answer`: the completion is learnt; texts raw, messages as chat
``chosen``, ``rejected``[, prompt]   :class:`Pair` of two answers
``instruction``[, input], ``output`` :class:`Talk` (Alpaca; Dolly's ``context`` and ``response`` too)
``question``, ``answer``             :class:`Talk`
``text``                             :class:`Text`, all learnt
``input_ids``[, labels or a mask]    :class:`Tokens`
===================================  ==================================================================

A field that no shape knows is handed to the template if that reads it, passed over if it only names or scores the
record (an id, a source), and refused otherwise: see :mod:`hbp.data.record.layout`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hbp.data.record.messages import Chat, Message, chat_of, json_of, read_turns, text_of
from hbp.errors import HbpError

BESIDE = ("system", "tools", "functions", "documents", "chat_template_kwargs")
"""Fields that belong to any conversation."""
MASKS = ("labels", "loss_mask", "completion_mask", "assistant_masks")
SHAPES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("input_ids",), (*MASKS, "attention_mask", "position_ids", "token_type_ids", "special_tokens_mask")),
    (("chosen", "rejected"), ("prompt", *BESIDE)),
    (("messages",), BESIDE),
    (("conversations",), BESIDE),
    (("prompt", "completion"), BESIDE),
    (("instruction", "output"), ("input", "history", *BESIDE)),
    (("instruction", "response"), ("context", "history", *BESIDE)),
    (("question", "answer"), BESIDE),
    (("text",), ()),
)
"""Fields that tell a shape, and those that it may have besides."""


@dataclass(frozen=True)
class Reading:
    """How records are read; part of what a store of tokens is made of."""

    columns: tuple[tuple[str, str], ...] = ()
    """Our field, the record's own: ``data.columns``."""
    roles: tuple[tuple[str, str], ...] = ()
    """The record's role, ours: ``data.roles``."""
    ignore: tuple[str, ...] = ()
    """Fields of records and messages that are left out on purpose: ``data.ignore``."""
    conversations: str | None = None
    """Source of the template of whole conversations, where it is not the tokenizer's: of a stock template, the version
    that TRL trains conversations with. Prompts with completions, of which the last turn alone is learnt, keep the
    tokenizer's own, as with TRL."""


@dataclass(frozen=True, eq=False)
class Talk:
    """A conversation whose assistant is learnt."""

    chat: Chat


@dataclass(frozen=True, eq=False)
class Answer:
    """A prompt and what is learnt behind it: texts as they are, or the first ``prompt`` messages of a conversation."""

    prompt: str | int
    completion: str | Chat
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Pair:
    """Two answers to one prompt."""

    chosen: Answer
    rejected: Answer


@dataclass(frozen=True, eq=False)
class Text:
    """All of it is learnt."""

    text: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Already tokenized: ``T`` ids and 1 where learnt."""

    ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.uint8]
    fields: dict[str, Any] = field(default_factory=dict)


Sample = Talk | Answer | Pair | Text | Tokens


def read_record(record: Any, reading: Reading) -> Sample:
    """What a record says.

    Args:
        record: an object as JSON or Arrow gives it.
        reading: names of its fields and roles.

    Raises:
        HbpError: it has no known shape, two of them, or a field that cannot be what its name says. The error does not
            say where the record stands.
    """
    if not isinstance(record, Mapping):
        raise HbpError("is not an object; write one JSON object a line")
    fields = _fields(record, reading)
    null = [key for key in MASKS if key in record and record[key] is None and key not in reading.ignore]
    if null and "input_ids" in fields and not any(key in fields for key in MASKS):
        raise HbpError(f"has `{null[0]}` that is null, so what is to be learnt is not known; leave it out to learn all")
    for needed, besides in SHAPES:
        if all(key in fields for key in needed):
            known = {key: fields.pop(key) for key in (*needed, *besides) if key in fields}
            sample = _READERS[needed[0]](known, dict(reading.roles))
            return _with_fields(sample, _not_said_before(sample, known, fields))
    names = ", ".join(fields) or "none"
    raise HbpError(
        f"has fields {names}; it needs `messages`, `conversations`, `prompt` and `completion`, `chosen` and "
        "`rejected`, `instruction` and `output`, `question` and `answer`, `text`, or `input_ids` (data.columns names "
        "others)"
    )


def _fields(record: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    """The record's fields under our names, without empty ones and those left out on purpose."""
    ours = {theirs: name for name, theirs in reading.columns}
    missing = [theirs for theirs in ours if theirs not in record]
    if missing and not any(theirs in record for theirs in ours):
        raise HbpError(f"has no field `{missing[0]}`, which data.columns names; it has {', '.join(map(str, record))}")
    fields: dict[str, Any] = {}
    for key, value in record.items():
        if value is None or (key in reading.ignore and key not in ours):
            continue
        name = ours.get(key, key)
        if name in _TURNS and isinstance(value, str) and _TURNS_AS_TEXT.match(value):
            value = json_of(value, str(key))
        if key not in ours and key in dict(reading.columns):
            continue  # another field has been given its name
        fields[str(name)] = value
    return fields


_TURNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
_TURNS_AS_TEXT = re.compile(r'\s*\[\s*\{\s*"(role|from|content|value)"\s*:')
"""JSON text of messages, as tables have it where a column takes text only; it is not what anybody wants learnt."""


def _not_said_before(sample: Sample, known: Mapping[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """Fields left over, without those that only repeat what the sample holds."""
    left = {key: value for key, value in rest.items() if value not in ("", [], {})}
    if not left:
        return left
    said = _texts(sample)
    for key, value in list(left.items()):
        if isinstance(value, str):
            again = value in said or (len(said) > 1 and all(text in value for text in said))
        else:
            again = value in list(known.values()) or _messages_again(value, known)
        if again and key in _TELLING:
            del left[key]
        elif key in _TELLING:
            raise HbpError(
                f"has `{key}` beside `{next(iter(known))}` and they differ; name the one to leave out in data.ignore"
            )
    return left


_TELLING = {key for needed, _ in SHAPES for key in needed} | {"input", "context", "history"}


def _messages_again(value: Any, known: Mapping[str, Any]) -> bool:
    prompt = known.get("prompt")
    both = [known[key] for key in ("chosen", "rejected", "completion") if isinstance(known.get(key), list)]
    return any(value == (prompt + one if isinstance(prompt, list) else one) for one in both)


def _texts(sample: Sample) -> list[str]:
    if isinstance(sample, Talk):
        return [text_of(m.get("content")) for m in sample.chat.messages]
    if isinstance(sample, Answer):
        if isinstance(sample.completion, Chat):
            return [text_of(m.get("content")) for m in sample.completion.messages]
        return [str(sample.prompt), sample.completion]
    if isinstance(sample, Pair):
        return _texts(sample.chosen)
    return [sample.text] if isinstance(sample, Text) else []


def _with_fields(sample: Sample, left: dict[str, Any]) -> Sample:
    if not left:
        return sample
    if isinstance(sample, Talk):
        return Talk(replace(sample.chat, fields=left))
    if isinstance(sample, Pair):
        chosen, rejected = _with_fields(sample.chosen, left), _with_fields(sample.rejected, left)
        assert isinstance(chosen, Answer) and isinstance(rejected, Answer)
        return Pair(chosen, rejected)
    if isinstance(sample, Answer) and isinstance(sample.completion, Chat):
        return replace(sample, completion=replace(sample.completion, fields=left))
    return replace(sample, fields=left)


def _tokens(known: Mapping[str, Any], roles: Mapping[str, str]) -> Sample:
    ids = _numbers(known, "input_ids", low=0, kinds="iu")
    keep = np.ones(len(ids), bool)
    if "attention_mask" in known:  # 0 is padding
        keep = _numbers(known, "attention_mask", len(ids), 0, 1).astype(bool)
    for key in ("position_ids", "token_type_ids"):
        if key in known:
            values = _numbers(known, key, len(ids))[keep]
            if not np.array_equal(values, np.arange(len(values)) if key == "position_ids" else np.zeros(len(values))):
                raise HbpError(f"has `{key}` of several documents; give one sample a record, packing is ours")
    given = [key for key in MASKS if key in known]
    mask = np.ones(len(ids), np.uint8)
    for key in given:
        if key != "labels":
            mask &= _numbers(known, key, len(ids), 0, 1).astype(np.uint8)
            continue
        labels = _numbers(known, key, len(ids), kinds="iu")
        learnt = labels != -100
        if (labels[learnt] != ids[learnt]).any():
            shifted = learnt[:-1] & (labels[:-1] == ids[1:])
            how = (
                "they are shifted by one: give them as `input_ids` with -100"
                if (shifted.sum() == learnt[:-1].sum() and not learnt[-1:].any())
                else "a label is the token itself, or -100"
            )
            at = int(np.flatnonzero(learnt & (labels != ids))[0])
            raise HbpError(f"has `labels[{at}]` {labels[at]} where `input_ids` has {ids[at]}; {how}")
        mask &= learnt.astype(np.uint8)
    return Tokens(ids[keep].astype(np.int32), mask[keep])


def _numbers(
    known: Mapping[str, Any],
    key: str,
    length: int | None = None,
    low: int = -(2**31),
    high: int = 2**31 - 1,
    kinds: str = "iub",
) -> npt.NDArray[np.int64]:
    try:
        values = np.asarray(known[key])
    except ValueError:
        values = np.empty((0, 0))
    if values.ndim != 1 or (len(values) and values.dtype.kind not in kinds):
        raise HbpError(f"`{key}` is not a flat list of whole numbers")
    if length is not None and len(values) != length:
        raise HbpError(f"`{key}` has {len(values)} entries where `input_ids` has {length}")
    if len(values) and (values.min() < low or values.max() > high):
        raise HbpError(f"`{key}` has {values[(values < low) | (values > high)][0]}; it runs from {low} to {high}")
    return values.astype(np.int64)


def _messages(known: Mapping[str, Any], roles: Mapping[str, str]) -> Sample:
    return Talk(chat_of(known["messages"], known, roles))


def _conversations(known: Mapping[str, Any], roles: Mapping[str, str]) -> Sample:
    return Talk(chat_of(known["conversations"], known, roles, what="conversations", sharegpt=True))


def _instruction(known: Mapping[str, Any], roles: Mapping[str, str]) -> Sample:
    """As LLaMA-Factory reads Alpaca: instruction, a line break, the input; earlier turns in ``history``."""
    answer = "output" if "output" in known else "response"
    asked = [_text(known, "instruction")]
    asked += [_text(known, key) for key in ("input", "context") if known.get(key) not in (None, "")]
    turns: list[Message] = []
    for number, turn in enumerate(known.get("history") or []):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise HbpError(f"`history[{number}]` is not a pair of texts, what was asked and answered")
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    turns += [{"role": "user", "content": "\n".join(text for text in asked if text)}]
    return _asked_and_answered(turns, _text(known, answer), known)


def _question(known: Mapping[str, Any], roles: Mapping[str, str]) -> Sample:
    return _asked_and_answered([{"role": "user", "content": _text(known, "question")}], _text(known, "answer"), known)


def _asked_and_answered(asked: list[Message], answer: str, known: Mapping[str, Any]) -> Sample:
    chat = chat_of([*asked, {"role": "assistant", "content": answer}], known, {})
    return Talk(replace(chat, separator="\n"))


def _text(known: Mapping[str, Any], key: str) -> str:
    if not isinstance(known[key], str):
        raise HbpError(f"has a `{key}` that is not text")
    return str(known[key])


def _plain_text(known: Mapping[str, Any], roles: Mapping[str, str]) -> Sample:
    text = _text(known, "text")
    if not text:
        raise HbpError("has an empty `text`; remove the record")
    return Text(text)


def _answer(known: Mapping[str, Any], roles: Mapping[str, str], key: str = "completion") -> Answer:
    """Two texts stay texts; where one is a list of messages, the other becomes a message."""
    prompt, completion = known["prompt"], known[key]
    if isinstance(prompt, str) and isinstance(completion, str):
        if beside := [name for name in BESIDE if known.get(name)]:
            raise HbpError(f"has `{beside[0]}` beside a `prompt` that is text; write the prompt as messages")
        if not completion:
            raise HbpError(f"has an empty `{key}`; remove the record")
        return Answer(prompt, completion)
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": _text(known, "prompt")}]
    said = completion if isinstance(completion, list) else [{"role": "assistant", "content": _text(known, key)}]
    if not said:
        raise HbpError(f"`{key}` is empty; remove the record")
    chat = chat_of(asked, known, roles, what="prompt") if asked else chat_of(said, known, roles, what=key)
    if not asked:
        return Answer(len(chat.messages) - len(said), chat)
    more, learnt = read_turns(said, roles, what=key)
    number = len(chat.messages)
    chat = replace(chat, messages=[*chat.messages, *more], learnt=[*([False] * number), *learnt])
    return Answer(number, chat)


def _prompt(known: Mapping[str, Any], roles: Mapping[str, str]) -> Sample:
    return _answer(known, roles)


def _pair(known: Mapping[str, Any], roles: Mapping[str, str]) -> Sample:
    chosen, rejected = known["chosen"], known["rejected"]
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        raise HbpError("has `chosen` and `rejected` that are not both text or both lists of messages")
    if chosen == rejected:
        raise HbpError("has `chosen` and `rejected` that are the same; remove the record")
    known = dict(known)
    prompt = known.get("prompt")
    if prompt is None or (isinstance(prompt, str) and isinstance(chosen, list)):
        shared = _shared(chosen, rejected)
        if isinstance(prompt, str) and not any(prompt in (m.get("content"), m.get("value")) for m in _dicts(shared)):
            if shared:
                raise HbpError("has a `prompt` that is not in the turns that `chosen` and `rejected` share")
            shared = [{"role": "user", "content": prompt}]
            known |= {"prompt": shared}
        else:
            known |= {"prompt": shared, "chosen": chosen[len(shared) :], "rejected": rejected[len(shared) :]}
    if not known["chosen"] or not known["rejected"]:
        raise HbpError("has a `chosen` or `rejected` with nothing of its own; remove the record")
    return Pair(_answer(known, roles, "chosen"), _answer(known, roles, "rejected"))


def _dicts(messages: Any) -> list[Mapping[str, Any]]:
    return [m for m in messages if isinstance(m, Mapping)] if isinstance(messages, list) else []


def _shared(chosen: Any, rejected: Any) -> Any:
    """The prompt that both begin with; a space before the difference belongs to the answers, as in TRL."""
    shortest = min(len(chosen), len(rejected))
    at = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    if isinstance(chosen, str) and at and chosen[at - 1] == " ":
        at -= 1
    return chosen[:at]


_READERS = {
    "input_ids": _tokens,
    "chosen": _pair,
    "messages": _messages,
    "conversations": _conversations,
    "prompt": _prompt,
    "instruction": _instruction,
    "question": _question,
    "text": _plain_text,
}
