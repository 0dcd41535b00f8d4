"""A sample → the texts that are to be tokenized and which parts of them are learnt, before any token is made."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hbp.data.record.fields import check_nothing_left_out, check_own_words, fit_to_template, passed_over
from hbp.data.record.formats import Answer, Pair, Reading, Sample, Talk, Text, Tokens
from hbp.data.record.messages import Chat, Message, text_of
from hbp.data.record.templates import Rendering, Span, compile_template, render, template_text
from hbp.data.record.turns import Scene, generation_prompt, learnt_spans
from hbp.errors import HbpError


@dataclass(frozen=True, eq=False)
class Layout:
    """A text to tokenize."""

    text: str
    raw: bool
    """The tokenizer adds its own begin and end tokens; a chat template writes them itself."""
    learnt: tuple[Span, ...] | None = None
    """Spans of characters; a token that reaches into one is learnt. none: all tokens."""
    prompt: str | None = None
    """Tokens that this text shares with it, from the first on, are not learnt."""


def layouts(sample: Sample, tokenizer: Any, reading: Reading) -> tuple[list[Layout], list[str]]:
    """One layout of a sample, two of a pair, and notes on what was passed over.

    Args:
        sample: from :func:`hbp.data.record.formats.read_record`; not of tokens.
        tokenizer: with the chat template in use.
        reading: names the fields that are left out on purpose.

    Raises:
        HbpError: the template cannot lay it out; does not say where the record stands.
    """
    try:
        return _layouts(sample, tokenizer, reading)
    except HbpError as error:
        if reading.conversations is None or not isinstance(sample, Talk) or "chat template" not in str(error):
            raise
        raise HbpError(
            f"{error}; the template is TRL's version of the stock one, data.chat_template=own keeps that"
        ) from None
    except Exception as error:  # a template may refuse a part of a conversation of which it takes the whole
        raise HbpError(f"is refused by the chat template ({_reason(error)})") from None


def _layouts(sample: Sample, tokenizer: Any, reading: Reading) -> tuple[list[Layout], list[str]]:
    if isinstance(sample, Pair):
        chosen, notes = _answer(sample.chosen, tokenizer, reading)
        rejected, more = _answer(sample.rejected, tokenizer, reading)
        return [chosen, rejected], list(dict.fromkeys([*notes, *more]))
    if isinstance(sample, Talk):
        layout, notes = _talk(sample.chat, tokenizer, reading)
        return [layout], notes
    if isinstance(sample, Answer):
        layout, notes = _answer(sample, tokenizer, reading)
        return [layout], notes
    assert isinstance(sample, Text) and not isinstance(sample, Tokens)
    return [Layout(_ended(sample.text, tokenizer), raw=True)], passed_over(sample.fields)


def _talk(chat: Chat, tokenizer: Any, reading: Reading) -> tuple[Layout, list[str]]:
    scene = _scene(chat, tokenizer, reading, reading.conversations)
    if scene is None:
        return _without_template(chat, tokenizer)
    return Layout(scene.whole.text, raw=False, learnt=_spans(scene, tokenizer)), scene.notes


def _answer(answer: Answer, tokenizer: Any, reading: Reading) -> tuple[Layout, list[str]]:
    if isinstance(answer.completion, str):
        prompt, completion = str(answer.prompt), answer.completion
        return Layout(_ended(prompt + completion, tokenizer), raw=True, prompt=prompt), passed_over(answer.fields)
    number = int(answer.prompt)
    scene = _scene(answer.completion, tokenizer, reading)
    if scene is None:
        return _without_template(answer.completion, tokenizer)
    spans: tuple[Span, ...] | None = None
    # All that the model adds to the prompt, as TRL has it; what others say within a longer completion is not learnt.
    if len(scene.chat.messages) > number + 1 or not scene.chat.learnt[number]:
        spans = _spans(scene, tokenizer, number)
    prompt = scene.draw(scene.chat.messages[:number], True).text if number else ""
    return Layout(scene.whole.text, raw=False, learnt=spans, prompt=prompt), scene.notes


def _spans(scene: Scene, tokenizer: Any, first: int = 0) -> tuple[Span, ...]:
    """What is learnt, from a message on; notes what does not end so that the model learns to stop there."""
    spans = learnt_spans(scene, first)
    if not scene.marked:
        check_own_words(scene.chat, scene.whole, spans)
    for begin, end in spans:
        closing = _CLOSING.search(scene.whole.text, max(begin, end - 64), end)
        if closing is None or closing.group(1) not in _added_tokens(tokenizer):
            scene.notes.append("the chat template ends turns without a token of their own: no stop is learnt")
            break
    return tuple(spans)


_CLOSING = re.compile(r"([<\[][^<>\[\]\s]*[>\]])\s*\Z")


@lru_cache(maxsize=4)
def _added_tokens(tokenizer: Any) -> frozenset[str]:
    return frozenset(tokenizer.get_added_vocab())


def _scene(chat: Chat, tokenizer: Any, reading: Reading, text: str | None = None) -> Scene | None:
    """With the template given or else the tokenizer's; None where that has none."""
    try:
        text = text or template_text(tokenizer, chat.tools)
        if text is None:
            return None
        template, tokens = compile_template(text), tokenizer.special_tokens_map
    except Exception as error:  # a template that is none, or none of the tokenizer's several is the default
        raise HbpError(f"cannot be laid out: the chat template is no template ({_reason(error)})") from None
    fitted, notes = fit_to_template(chat, text, tokens, reading.ignore)

    def draw(messages: Sequence[Message], prompted: bool) -> Rendering:
        return render(
            template,
            tokens,
            messages,
            tools=fitted.tools,
            documents=fitted.documents,
            variables=fitted.variables,
            add_generation_prompt=prompted,
        )

    try:
        whole = draw(fitted.messages, False)
    except Exception as error:  # raises whatever its author chose
        raise HbpError(f"is refused by the chat template ({_reason(error)}); roles: {_roles(chat)}") from None
    notes += check_nothing_left_out(fitted, whole)
    prompt = None
    if template.steady and not template.marked:
        named = tuple(sorted((key, str(value)) for key, value in tokens.items()))
        prompt = _steady_prompt(text, named, json.dumps(fitted.variables, sort_keys=True, default=str))
    return Scene(fitted, whole, draw, template.marked, prompt, str(tokens.get("bos_token", "")), notes)


@lru_cache(maxsize=64)
def _steady_prompt(text: str, tokens: tuple[tuple[str, str], ...], variables: str) -> str | None:
    def draw(messages: Sequence[Message], prompted: bool) -> Rendering:
        given = json.loads(variables)
        return render(compile_template(text), dict(tokens), messages, variables=given, add_generation_prompt=prompted)

    return generation_prompt(draw)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _roles(chat: Chat) -> str:
    return ", ".join(message["role"] for message in chat.messages[:8])


def _without_template(chat: Chat, tokenizer: Any) -> tuple[Layout, list[str]]:
    """One question and its answer, as they are."""
    fields = {key for message in chat.messages for key in message} - {"role", "content"}
    beside = [key for key in ("tools", "documents", "variables") if getattr(chat, key)]
    if [message["role"] for message in chat.messages] != ["user", "assistant"] or fields or beside:
        more = f" with {', '.join([*sorted(fields), *beside])}" if fields or beside else ""
        raise HbpError(
            f"is a conversation of {_roles(chat)}{more}, and the tokenizer has no chat template to lay it out; name "
            "one (data.chat_template)"
        )
    asked, said = (text_of(message["content"]) for message in chat.messages)
    prompt = asked + chat.separator
    learnt = None if chat.learnt[1] else ()
    return Layout(_ended(prompt + said, tokenizer), raw=True, learnt=learnt, prompt=prompt), passed_over(chat.fields)


def _ended(text: str, tokenizer: Any) -> str:
    """With the end token, unless it is there or the tokenizer adds it."""
    end = tokenizer.eos_token
    if end is None or text.endswith(end) or adds_end(tokenizer):
        return text
    return text + str(end)


@lru_cache(maxsize=4)
def adds_end(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts its end token behind every text."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[-1] == tokenizer.eos_token_id
