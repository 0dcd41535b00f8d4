"""Messages of a conversation, from every spelling that data sets have to one: OpenAI's, as chat templates read them.

A message's fields stay whole (``tool_calls``, ``name``, ``reasoning_content``, parts of text). What speaks of training
(``weight``, ``train``, ``loss``) is taken out and obeyed. ShareGPT's ``from`` and ``value`` become ``role`` and
``content``, OpenAI's old ``function_call`` becomes ``tool_calls``. What cannot be understood is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hbp.errors import HbpError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
SHAREGPT = {
    "system": ("system", "system_prompt"),
    "user": ("human", "user", "prompter"),
    "assistant": ("gpt", "assistant", "chatgpt", "bot", "chatbot", "model", "bing", "bard", "claude", "llm", "ai"),
    "tool": ("tool", "observation", "function_response", "tool_response", "function"),
    "call": ("function_call", "tool_call"),
}
"""Roles of ``from``, in small letters; ``call`` is an assistant whose value is the JSON of its calls."""
SPELLINGS = {spelling: role for role, spellings in SHAREGPT.items() for spelling in spellings}
TRAINED = ("weight", "train", "loss")
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template")
Message = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Chat:
    """A conversation and all that its template may read."""

    messages: list[Message]
    learnt: list[bool]
    """For every message, whether it is the assistant's and to be learnt."""
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    """``chat_template_kwargs`` of the record."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the record that have no meaning of their own; the template may read them."""
    separator: str = ""
    """Stands between prompt and answer where there is no template."""


def chat_of(
    turns: Any, record: Mapping[str, Any], roles: Mapping[str, str], *, what: str = "messages", sharegpt: bool = False
) -> Chat:
    """A conversation from a list of turns and the fields of a record that go with any conversation.

    Args:
        turns: messages in any spelling.
        record: its ``system``, ``tools``, ``functions``, ``documents``, ``chat_template_kwargs`` are read.
        roles: further spellings of roles, from ``data.roles``.
        what: field that the turns stand in, for errors.
        sharegpt: also read the value of ``role`` as ShareGPT's spellings.

    Raises:
        HbpError: a turn is not a message.
    """
    messages, learnt = read_turns(turns, roles, what=what, sharegpt=sharegpt)
    system = record.get("system")
    if system is not None and system != "":
        if not isinstance(system, str):
            raise HbpError(f"`system` is {_kind(system)}; write it as text")
        if not (messages and messages[0]["role"] == "system" and messages[0].get("content") == system):
            if any(message["role"] in ("system", "developer") for message in messages):
                raise HbpError(f"has `system` and a system message in `{what}` that differ; keep one of them")
            messages, learnt = [{"role": "system", "content": system}, *messages], [False, *learnt]
    variables = json_of(record.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    if not isinstance(variables, Mapping):
        raise HbpError(f"`chat_template_kwargs` is {_kind(variables)}; write an object")
    variables = {key: value for key, value in variables.items() if value is not None}
    if reserved := [key for key in variables if key in RESERVED]:
        raise HbpError(f"`chat_template_kwargs` sets `{reserved[0]}`, which is ours to set; give it as a field")
    return Chat(messages, learnt, read_tools(record), _list(record, "documents"), variables)


def read_tools(record: Mapping[str, Any]) -> list[Any] | None:
    """``tools`` (a list, or its JSON text) or OpenAI's old ``functions``; none where there are none."""
    tools = _list(record, "tools")
    functions = _list(record, "functions")
    if tools and functions:
        raise HbpError("has `tools` and `functions`; keep one of them")
    if functions:
        tools = [{"type": "function", "function": function} for function in functions]
    return tools


def _list(record: Mapping[str, Any], key: str) -> list[Any] | None:
    value = json_of(record.get(key), key)
    if not value:  # an empty list means none: some templates would write their frame for tools around nothing
        return None
    if not isinstance(value, list):
        raise HbpError(f"`{key}` is {_kind(value)}; write a list of objects")
    value = [json_of(one, f"{key}[{i}]") for i, one in enumerate(value)]
    for i, one in enumerate(value):
        if not isinstance(one, Mapping):
            raise HbpError(f"`{key}[{i}]` is {_kind(one)}; write an object")
    return value


def json_of(value: Any, what: str) -> Any:
    """The value, or what its JSON text says."""
    if not isinstance(value, str) or not value.strip():
        return None if value == "" else value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise HbpError(f"`{what}` is text that is not JSON ({error.msg} at column {error.colno})") from None


def read_turns(
    turns: Any, roles: Mapping[str, str], *, what: str, sharegpt: bool = False
) -> tuple[list[Message], list[bool]]:
    """Messages and whether each is learnt.

    Raises:
        HbpError: naming the turn's number, from 0, and what is wrong with it.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise HbpError(f"`{what}` is {_kind(turns)}; write a list of messages")
    if not turns:
        raise HbpError(f"`{what}` is empty; remove the record")
    messages, learnt = [], []
    for number, turn in enumerate(turns):
        try:
            message, flag = _message(turn, roles, sharegpt)
        except HbpError as error:
            raise HbpError(f"`{what}[{number}]` {error}") from None
        messages.append(message)
        learnt.append(flag)
    return messages, learnt


def _message(turn: Any, roles: Mapping[str, str], sharegpt: bool) -> tuple[Message, bool]:
    if not isinstance(turn, Mapping):
        raise HbpError(f"is {_kind(turn)}; write an object with `role` and `content`")
    message = {key: value for key, value in turn.items() if value is not None or key == "content"}
    spelled = "from" in message and "role" not in message
    if spelled:
        message["role"] = message.pop("from")
    if "value" in message and "content" not in message:
        message["content"] = message.pop("value")
    if not isinstance(message.get("role"), str):
        raise HbpError(f"has no `role`: {str(dict(turn))[:80]!r}")
    role = _role(message["role"], roles, spelled or sharegpt)
    learnt = _learnt(message, role)
    if role == "call":
        role = "assistant"
        message = {"content": "", **message, "tool_calls": _calls(message.get("content"))}
        message["content"] = ""
    message = {"role": role, **{key: value for key, value in message.items() if key != "role"}}
    _tool_calls(message)
    message["content"] = _content(message)
    if message["content"] is None:
        del message["content"]
    return message, learnt


def _role(name: str, roles: Mapping[str, str], spelled: bool) -> str:
    if name in roles:
        if roles[name] not in ROLES:
            raise HbpError(
                f"has the role {name!r}, which data.roles calls {roles[name]!r}; known are {', '.join(ROLES)}"
            )
        return roles[name]
    if spelled and name.lower() in SPELLINGS:
        return SPELLINGS[name.lower()]
    if name in ROLES:
        return name
    known = ", ".join(SPELLINGS if spelled else ROLES)
    raise HbpError(f"has the unknown role {name!r}; known are {known}; data.roles={{{name}: assistant}} names another")


def _learnt(message: Message, role: str) -> bool:
    """Takes ``weight``, ``train`` and ``loss`` out of the message: whether it is learnt."""
    learnt = role in ("assistant", "call")
    for key in TRAINED:
        if key not in message:
            continue
        value = message.pop(key)
        if value not in (0, 1):  # also True, False, 0.0 and 1.0
            raise HbpError(f"has `{key}` {value!r}; 0 and 1 (false and true) are known")
        if value and role not in ("assistant", "call") and key != "weight":
            raise HbpError(f"has `{key}` {value!r} but is the {role}'s; only what the assistant says is learnt")
        learnt = learnt and bool(value)
    return learnt


def _calls(value: Any) -> list[Any]:
    calls = json_of(value, "value")
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, Mapping) or "name" not in call:
            raise HbpError("is a function call whose value is not JSON with `name` and `arguments`")
    return [{"type": "function", "function": dict(call)} for call in calls]


def _tool_calls(message: Message) -> None:
    if "function_call" in message:
        if "tool_calls" in message:
            raise HbpError("has `function_call` and `tool_calls`; keep one of them")
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    if "tool_calls" not in message:
        return
    calls = json_of(message["tool_calls"], "tool_calls")
    if not calls:
        del message["tool_calls"]
        return
    if message["role"] != "assistant":
        raise HbpError(f"has `tool_calls` but is the {message['role']}'s; only the assistant calls tools")
    if not isinstance(calls, list):
        raise HbpError(f"has `tool_calls` that are {_kind(calls)}; write a list of objects")
    calls = [json_of(call, f"tool_calls[{number}]") for number, call in enumerate(calls)]
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise HbpError(f"has a `tool_calls[{number}]` without the `name` of a function")
    message["tool_calls"] = calls


def _content(message: Message) -> Any:
    """Text, or parts of text; none where a call or reasoning is all that there is."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        if any(key in message for key in ("tool_calls", "reasoning_content", "thinking", "reasoning")):
            return None
        raise HbpError(f"has no `content`: {str(message)[:80]!r}")
    if not isinstance(content, list):
        raise HbpError(f"has a `content` that is {_kind(content)}; write text")
    return [_part(part, number) for number, part in enumerate(content)]


def _part(part: Any, number: int) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise HbpError(f"has a `content[{number}]` that is {_kind(part)}; write parts of text")
    known = {key: value for key, value in part.items() if value is not None}
    kind = known.pop("type", "text")
    text = known.pop("text", None)
    if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
        raise HbpError(f"has a `content[{number}]` of type {kind!r}; text alone is trained on")
    if known:
        raise HbpError(f"has `{next(iter(known))}` in `content[{number}]`, which no template reads; remove it")
    return {"type": "text", "text": text}


def text_of(content: Any) -> str:
    """Text of a message's content, its parts joined."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())


def _kind(value: Any) -> str:
    kinds = {type(None): "null", str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return kinds.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)
