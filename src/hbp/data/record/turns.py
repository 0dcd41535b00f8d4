"""What the assistant itself says in a rendered conversation: each of its turns without the header, with its end.

A template with ``{% generation %}`` marks says so. In any other, a turn's part of the text is known from the rendering
(:mod:`hbp.data.record.templates`), and its header is what the template writes to have the model begin a turn there: the
generation prompt behind the messages before it. A generation prompt may go on into a think block that it opens for the
model; what is thought belongs to the turn all the same, as in TRL's training templates.

Cost: one more rendering of the messages before it for each of the assistant's turns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from hbp.data.record.messages import Chat, Message, text_of
from hbp.data.record.templates import Rendering, Span
from hbp.errors import HbpError

Draw = Callable[[Sequence[Message], bool], Rendering]
"""Renders messages, with or without a generation prompt."""
THINK = re.compile(r"<[^<>\s]*(?:think|thought|reason)[^<>]*>|\[THINK\]|<\|channel\|?>", re.IGNORECASE)


def learnt_spans(
    chat: Chat, whole: Rendering, draw: Draw, *, marked: bool, bos: str = "", first: int = 0
) -> list[Span]:
    """Spans ``[begin, end)`` of the text that are learnt, in order.

    Args:
        chat: the conversation; its ``learnt`` says which turns.
        whole: its rendering.
        draw: renders parts of it, with the same tools and variables.
        marked: the template has ``{% generation %}`` marks.
        bos: text of the begin token.
        first: message from which on turns are learnt.

    Raises:
        HbpError: the template does not let the assistant's text be told apart.
    """
    spoken = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    wanted = [i for i in spoken if chat.learnt[i] and i >= first]
    if not marked:
        return [_own_text(chat, whole, draw, i, bos) for i in wanted]
    if wanted == spoken:
        return whole.marked
    unwanted = [i for i in spoken if i not in wanted]
    if any(i not in whole.turns for i in unwanted):
        raise HbpError("has turns that are not to be learnt, and the chat template does not let turns be told apart")
    outside = [whole.turns[i] for i in unwanted]
    return [(a, b) for a, b in whole.marked if not any(begin <= a < end for begin, end in outside)]


def _own_text(chat: Chat, whole: Rendering, draw: Draw, number: int, bos: str) -> Span:
    message = chat.messages[number]
    before = _before(chat, draw, number)
    if number not in whole.turns or not _holds(whole, number, message):
        return _by_prefixes(chat, whole, draw, number, before)
    begin, end = whole.turns[number]
    if number == len(chat.messages) - 1:
        end = len(whole.text)
    turn = whole.text[begin:end]
    if before is not None and begin <= len(before.text) <= end and whole.text.startswith(before.text):
        header = turn[: len(before.text) - begin]
        return begin + _unthought(header), end
    header = _header(chat, whole, draw, number, before)
    header = header[: _unthought(header)]
    at = turn.find(header) if number == 0 else 0  # a default system prompt may stand in the first turn, too
    if at >= 0 and turn.startswith(header, at):
        begin += at + len(header)
    else:
        begin += _shared(turn, header)
    if bos and whole.text.startswith(bos, begin) and begin == 0:
        begin += len(bos)
    return begin, end


def _before(chat: Chat, draw: Draw, number: int) -> Rendering | None:
    """What the model would be given to say this turn; none where the template cannot render it."""
    if number == 0:
        return None
    try:
        return draw(chat.messages[:number], True)
    except Exception:  # raises what its author chose; the header is then found another way
        return None


def _holds(whole: Rendering, number: int, message: Message) -> bool:
    """Whether the part found for the turn holds what it says (behind its reasoning, which may be left out)."""
    begin, end = whole.turns[number]
    return text_of(message.get("content")).split("</think>")[-1].strip() in whole.text[begin:end]


def _header(chat: Chat, whole: Rendering, draw: Draw, number: int, before: Rendering | None) -> str:
    """The generation prompt alone, from a rendering that is no beginning of the whole."""
    if before is None:  # the first turn: its header is that of any other
        asked: list[Message] = [{"role": "user", "content": "a"}]
        try:
            before, whole, number = draw(asked, True), draw(asked, False), 1
        except Exception:  # as above
            return ""
    tail = before.text[before.end :]
    if number - 1 in whole.turns and number - 1 in before.turns:
        last, same = (part.text[slice(*part.turns[number - 1])] for part in (before, whole))
        if last.startswith(same):  # what the last message's own part has more of belongs to the prompt, too
            return last[len(same) :] + tail
    if tail:
        return tail
    without = draw(chat.messages[:number], False).text
    return before.text[_shared(before.text, without) :]


def _unthought(header: str) -> int:
    """Length of a header without the think block that it opens."""
    think = THINK.search(header)
    return think.start() if think else len(header)


def _shared(one: str, other: str) -> int:
    """Characters that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _by_prefixes(chat: Chat, whole: Rendering, draw: Draw, number: int, before: Rendering | None) -> Span:
    """For a template that does not write message by message: what a turn adds to the text before it."""
    after = draw(chat.messages[: number + 1], False)
    if before is None or not (whole.text.startswith(before.text) and whole.text.startswith(after.text)):
        raise HbpError(
            f"has message {number} (assistant), whose own text cannot be told apart in what the chat template makes of "
            "it; take a template with {% generation %} marks (data.chat_template)"
        )
    return len(before.text), len(after.text)
