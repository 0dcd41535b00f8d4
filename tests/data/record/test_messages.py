"""Messages in every spelling; whole, and whether each is learnt."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hbp.data.record.messages import SHAREGPT, read_turns
from hbp.errors import HbpError

A = {"role": "assistant", "content": "a"}


def one(turn: Any, **options: Any) -> tuple[dict[str, Any], bool]:
    (message,), (learnt,) = read_turns([turn], options.pop("roles", {}), what="messages", **options)
    return message, learnt


def refusal(turn: Any, **options: Any) -> str:
    with pytest.raises(HbpError) as caught:
        one(turn, **options)
    assert str(caught.value).startswith("`messages[0]` ")
    return str(caught.value)


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_sharegpt_roles_in_all_spellings(role: str) -> None:
    for spelling in SHAREGPT[role]:
        for name in (spelling, spelling.upper(), spelling.title()):
            assert one({"from": name, "value": "x"}) == ({"role": role, "content": "x"}, role == "assistant")


def test_a_sharegpt_call_becomes_a_tool_call() -> None:
    call = {"name": "add", "arguments": {"a": 2}}
    for spelling in SHAREGPT["call"]:
        message, learnt = one({"from": spelling, "value": json.dumps(call)})
        assert learnt and message == {
            "role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}],
        }  # fmt: skip
    message, _ = one({"from": "function_call", "value": json.dumps([call, call])})
    assert len(message["tool_calls"]) == 2
    assert "is a function call whose value is not JSON with `name`" in refusal({"from": "function_call", "value": "{}"})


@pytest.mark.parametrize("turn", [{"role": "model", "content": "x"}, {"from": "alien", "value": "x"},
                                  {"role": "User", "content": "x"}, {"role": "human", "content": "x"}])  # fmt: skip
def test_unknown_roles_are_refused_and_can_be_named(turn: Any) -> None:
    name = turn.get("role", turn.get("from"))
    assert f"has the unknown role {name!r}; known are" in refusal(turn)
    assert "which data.roles calls 'asistant'; known are system" in refusal(turn, roles={name: "asistant"})
    assert one(turn, roles={name: "assistant"}) == ({"role": "assistant", "content": "x"}, True)


def test_roles_of_openai_and_of_templates() -> None:
    for role in ("developer", "function", "ipython"):
        assert one({"role": role, "content": "x"}) == ({"role": role, "content": "x"}, False)


@pytest.mark.parametrize(
    ("flag", "learnt"),
    [({"weight": 0}, False), ({"weight": 1}, True), ({"weight": 0.0}, False), ({"train": False}, False),
     ({"train": True}, True), ({"loss": False}, False), ({"weight": None}, True), ({"weight": 1, "train": 0}, False)],
)  # fmt: skip
def test_whether_a_turn_is_learnt(flag: Any, learnt: bool) -> None:
    assert one({**A, **flag}) == (A, learnt)


def test_flags_that_cannot_be_obeyed() -> None:
    assert "has `weight` 0.5; 0 and 1" in refusal({**A, "weight": 0.5})
    assert "has `train` 'yes'" in refusal({**A, "train": "yes"})
    assert "has `train` True but is the user's" in refusal({"role": "user", "content": "x", "train": True})
    assert one({"role": "user", "content": "x", "train": False, "weight": 1})[1] is False


def test_fields_stay_whole() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}]
    whole = {**A, "name": "cat", "reasoning_content": "r", "tool_calls": calls, "refusal": "none of it"}
    assert one(whole) == (whole, True)
    assert one({**A, "tool_calls": [], "name": None}) == (A, True)
    assert one({**A, "tool_calls": json.dumps(calls)})[0]["tool_calls"] == calls
    assert one({**A, "tool_calls": [json.dumps(call) for call in calls]})[0]["tool_calls"] == calls
    old = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}}
    assert one(old)[0] == {
        "role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": "{}"}}],
    }  # fmt: skip


def test_parts_of_text() -> None:
    part = {"type": "text", "text": "a"}
    assert one({**A, "content": [part, "b"]})[0]["content"] == [part, {"type": "text", "text": "b"}]
    assert one({**A, "content": [{"text": "a", "image_url": None}]})[0]["content"] == [part]
    picture = {"type": "image_url", "image_url": {"url": "x"}}
    assert "`content[1]` of type 'image_url'; text alone is trained on" in refusal({**A, "content": [part, picture]})
    assert "has `cache_control` in `content[0]`" in refusal({**A, "content": [{**part, "cache_control": {}}]})


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        ("hi", "is text; write an object with `role` and `content`"),
        ({"content": "x"}, "has no `role`"),
        ({"role": 3, "content": "x"}, "has no `role`"),
        ({"role": "user"}, "has no `content`"),
        ({"role": "assistant", "content": None}, "has no `content`"),
        ({"role": "user", "content": {"a": 1}}, "has a `content` that is an object; write text"),
        ({"role": "user", "content": 3}, "has a `content` that is a number"),
        ({"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}, "has `tool_calls` but is the user's"),
        ({**A, "tool_calls": [{"function": {}}]}, "has a `tool_calls[0]` without the `name` of a function"),
        ({**A, "tool_calls": "[{"}, "`tool_calls` is text that is not JSON"),
        ({**A, "tool_calls": ["get(1)"]}, "`tool_calls[0]` is text that is not JSON"),
        ({**A, "tool_calls": [3]}, "has a `tool_calls[0]` without the `name` of a function"),
        ({**A, "weight": float("nan")}, "has `weight` nan; 0 and 1"),
        ({**A, "weight": "0"}, "has `weight` '0'; 0 and 1"),
        ({**A, "tool_calls": [{"name": "f"}], "function_call": {"name": "f"}}, "has `function_call` and `tool_calls`"),
    ],
)
def test_refused_by_name(turn: Any, why: str) -> None:
    assert why in refusal(turn)
