"""What the assistant itself says in a rendered conversation: each of its turns without the header, with its end.

A template with ``{% generation %}`` marks says so. In any other, a turn's part of the text is known from the rendering
(:mod:`hbp.data.record.templates`), and its header is what the template writes to have the model begin a turn there: the
generation prompt behind the messages before it. A generation prompt may go on into a think block that it opens for the
model; what is thought belongs to the turn all the same, as in TRL's training templates.

Cost: one more rendering of the messages before it for each of the assistant's turns, unless the template's generation
prompt looks at no message (most do not): then one in all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hbp.data.record.messages import Chat, Message, text_of
from hbp.data.record.templates import Rendering, Span
from hbp.errors import HbpError

Draw = Callable[[Sequence[Message], bool], Rendering]
"""Renders messages, with or without a generation prompt."""
THINK = re.compile(r"<[^<>\s]*(?:think|thought|reason)[^<>]*>|\[THINK\]|<\|channel\|?>", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Scene:
    """A conversation fitted to its template, and its rendering."""

    chat: Chat
    whole: Rendering
    draw: Draw
    """Renders a part of the conversation, with its tools and variables."""
    marked: bool
    """The template has ``{% generation %}`` marks."""
    prompt: str | None
    """The generation prompt, where it is the same behind any messages."""
    bos: str
    """Text of the begin token."""
    notes: list[str]


def learnt_spans(scene: Scene, first: int = 0) -> list[Span]:
    """Spans ``[begin, end)`` of the text that are learnt, in order.

    Args:
        scene: its chat's ``learnt`` says which turns.
        first: message from which on turns are learnt.

    Raises:
        HbpError: the template does not let the assistant's text be told apart.
    """
    chat, whole = scene.chat, scene.whole
    spoken = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    wanted = [i for i in spoken if chat.learnt[i] and i >= first]
    if not scene.marked:
        return [_own_text(scene, i) for i in wanted]
    if wanted == spoken:
        return whole.marked
    unwanted = [i for i in spoken if i not in wanted]
    if any(i not in whole.turns for i in unwanted):
        raise HbpError("has turns that are not to be learnt, and the chat template does not let turns be told apart")
    outside = [whole.turns[i] for i in unwanted]
    return [(a, b) for a, b in whole.marked if not any(begin <= a < end for begin, end in outside)]


def generation_prompt(draw: Draw) -> str | None:
    """What the template adds behind a question for the model to go on; none where it can render no question alone."""
    asked: list[Message] = [{"role": "user", "content": "a"}]
    try:
        before, whole = draw(asked, True), draw(asked, False)
    except Exception:  # a template raises what its author chose
        return None
    return _more(before, whole, 0)


def _own_text(scene: Scene, number: int) -> Span:
    whole = scene.whole
    if number not in whole.turns or not _holds(whole, number, scene.chat.messages[number]):
        return _by_prefixes(scene, number)
    begin, end = whole.turns[number]
    if number == len(scene.chat.messages) - 1:
        end = len(whole.text)
    turn = whole.text[begin:end]
    header = scene.prompt
    if header is None or not turn.startswith(header):
        header = _header(scene, number, begin, end)
    header = header[: _unthought(header)]
    if number == 0 and not turn.startswith(header):
        # A default system prompt may stand in the first turn, too, and no line break before it.
        header = header if header in turn else header.lstrip()
        begin += turn.find(header) + len(header) if header in turn else 0
    else:
        begin += _shared(turn, header)
    if begin == 0 and whole.text.startswith(scene.bos):
        begin = len(scene.bos)
    return begin, end


def _holds(whole: Rendering, number: int, message: Message) -> bool:
    """Whether the part found for the turn holds what it says (behind its reasoning, which may be left out)."""
    begin, end = whole.turns[number]
    return text_of(message.get("content")).split("</think>")[-1].strip() in whole.text[begin:end]


def _header(scene: Scene, number: int, begin: int, end: int) -> str:
    """What the template writes to have the model say this turn."""
    whole = scene.whole
    before = _before(scene, number)
    if before is None:  # the first turn: its header is that of any other
        return generation_prompt(scene.draw) or ""
    if whole.text.startswith(before.text) and begin <= len(before.text) <= end:
        return whole.text[begin : len(before.text)]
    more = _more(before, whole, number - 1)
    if more is not None:
        return more
    without = scene.draw(scene.chat.messages[:number], False).text
    return before.text[_shared(before.text, without) :]


def _before(scene: Scene, number: int) -> Rendering | None:
    """What the model would be given to say this turn; none where the template cannot render it."""
    if number == 0:
        return None
    try:
        return scene.draw(scene.chat.messages[:number], True)
    except Exception:  # raises what its author chose; the header is then found another way
        return None


def _more(before: Rendering, whole: Rendering, last: int) -> str | None:
    """What a rendering with generation prompt has behind its last message, and that message's part has more of."""
    tail = before.text[before.end :]
    if last in whole.turns and last in before.turns:
        prompted, plain = (part.text[slice(*part.turns[last])] for part in (before, whole))
        if prompted.startswith(plain):
            return prompted[len(plain) :] + tail
    return tail or None


def _unthought(header: str) -> int:
    """Length of a header without the think block that it opens."""
    think = THINK.search(header)
    return think.start() if think else len(header)


def _shared(one: str, other: str) -> int:
    """Characters that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _by_prefixes(scene: Scene, number: int) -> Span:
    """For a template that does not write message by message: what a turn adds to the text before it."""
    before, text = _before(scene, number), scene.whole.text
    after = scene.draw(scene.chat.messages[: number + 1], False).text
    if before is None or not (text.startswith(before.text) and text.startswith(after)):
        raise HbpError(
            f"has message {number} (assistant), whose own text cannot be told apart in what the chat template makes of "
            "it; take a template with {% generation %} marks (data.chat_template)"
        )
    return len(before.text), len(after)
