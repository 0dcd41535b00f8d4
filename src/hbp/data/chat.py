"""Conversation → token ids and loss mask: the model learns what the assistant says, its end-of-turn token included.

Where the chat template marks assistant text with ``{% generation %}``, the tokenizer returns the mask. Where it does
not (most published templates), the conversation is rendered turn by turn, and what an assistant turn adds to the
rendering of the turns before it, past the generation prompt, is what is learnt. This needs a template that renders a
prefix of a conversation as a prefix of its rendering, which is checked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hbp.data.sources import Conversation
from hbp.errors import HbpError


@dataclass(frozen=True, eq=False)
class Encoded:
    """One sample of ``T`` tokens."""

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    """1 where the token is to be learnt."""


def load_tokenizer(name_or_folder: str) -> Any:
    """A Hugging Face tokenizer.

    Raises:
        HbpError: there is none by that name.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name_or_folder)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise HbpError(
            f"cannot load a tokenizer from {name_or_folder!r} ({reason}); give its folder or hub name"
        ) from None


def encode(tokenizer: Any, conversation: Conversation) -> Encoded:
    """Tokens of a whole conversation by the tokenizer's chat template, and which of them are learnt.

    Raises:
        HbpError: the template refuses the conversation, or there is none and it is not a prompt with its completion.
    """
    if not tokenizer.chat_template:
        return _without_template(tokenizer, conversation)
    try:
        if re.search(r"\{%-?\s*generation\b", _template(tokenizer)):
            out = tokenizer.apply_chat_template(
                conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return _encoded(out["input_ids"], out["assistant_masks"])
        return _turn_by_turn(tokenizer, conversation)
    except HbpError:
        raise
    except Exception as error:  # templates raise whatever their authors chose
        reason = " ".join(str(error).split())[:160]
        raise HbpError(f"the chat template refuses a conversation ({reason}); roles: {_roles(conversation)}") from None


def _template(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    return template if isinstance(template, str) else str(template.get("default", ""))


def _roles(conversation: Conversation) -> str:
    return ", ".join(message["role"] for message in conversation[:8])


def _turn_by_turn(tokenizer: Any, conversation: Conversation) -> Encoded:
    """Character spans of what is learnt, by rendering prefixes; then tokens by their offsets."""
    whole = tokenizer.apply_chat_template(conversation, tokenize=False)
    spans = []
    for turn, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        before = (
            tokenizer.apply_chat_template(conversation[:turn], tokenize=False, add_generation_prompt=True)
            if turn
            else ""
        )
        after = tokenizer.apply_chat_template(conversation[: turn + 1], tokenize=False)
        if not (whole.startswith(before) and whole.startswith(after)):
            raise HbpError(
                "the chat template rewrites earlier turns, so what the assistant said cannot be told apart; "
                "use a tokenizer whose template has {% generation %} marks"
            )
        spans.append((len(before), len(after)))
    out = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    begin = np.array([a for a, _ in out["offset_mapping"]])
    end = np.array([b for _, b in out["offset_mapping"]])
    mask = np.zeros(len(begin), np.uint8)
    for first, last in spans:
        mask[(begin >= first) & (end <= last) & (end > begin)] = 1
    return _encoded(out["input_ids"], mask)


def _without_template(tokenizer: Any, conversation: Conversation) -> Encoded:
    if [message["role"] for message in conversation] != ["user", "assistant"]:
        raise HbpError(
            f"the tokenizer has no chat template, so a conversation of {_roles(conversation)} cannot be laid out; "
            "give a tokenizer with one (data.tokenizer)"
        )
    prompt, completion = (tokenizer(m["content"], add_special_tokens=False)["input_ids"] for m in conversation)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    learnt = [*completion, *end]
    return _encoded([*prompt, *learnt], [0] * len(prompt) + [1] * len(learnt))


def _encoded(ids: Any, mask: Any) -> Encoded:
    return Encoded(np.asarray(ids, np.int32), np.asarray(mask, np.uint8))
