"""Every known shape of a record says what it says; anything else is refused by name."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from hbp.data.record.formats import Answer, Pair, Reading, Talk, Text, Tokens, read_record
from hbp.data.record.messages import Chat
from hbp.errors import HbpError

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}


def read(record: Any, **reading: Any) -> Any:
    return read_record(record, Reading(**reading))


def chat(sample: Any) -> Chat:
    assert isinstance(sample, Talk)
    return sample.chat


def refusal(record: Any, **reading: Any) -> str:
    with pytest.raises(HbpError) as caught:
        read(record, **reading)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [U, A]}, [U, A]),
        ({"messages": [U, A], "prompt": None, "text": ""}, [U, A]),
        ({"messages": [U, A], "prompt": "q"}, [U, A]),  # UltraChat repeats the first question
        ({"messages": [U, A], "text": "<user> q <assistant> a"}, [U, A]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [U, A]),
        ({"conversations": [U, A]}, [U, A]),
        ({"messages": [{"from": "User", "value": "q"}, {"from": "ChatGPT", "value": "a"}]}, [U, A]),
        ({"conversations": [{"from": "human", "value": "q"}, A], "system": "s"}, [S, U, A]),
        ({"messages": [U, A], "system": "s"}, [S, U, A]),
        ({"messages": [S, U, A], "system": "s"}, [S, U, A]),
        ({"instruction": "q", "output": "a"}, [U, A]),
        ({"instruction": "q", "input": "", "output": "a"}, [U, A]),
        ({"instruction": "q", "input": "i", "output": "a"}, [{"role": "user", "content": "q\ni"}, A]),
        ({"instruction": "q", "context": "c", "response": "a"}, [{"role": "user", "content": "q\nc"}, A]),
        ({"instruction": "q", "output": "a", "text": "Below: q ### a"}, [U, A]),
        ({"instruction": "q", "output": "a", "system": "s", "history": [["x", "y"]]},
         [S, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, U, A]),
        ({"question": "q", "answer": "a"}, [U, A]),
        ({"question": "q", "answer": "a", "system": "s"}, [S, U, A]),
    ],
)  # fmt: skip
def test_conversations(record: Any, messages: Any) -> None:
    said = chat(read(record))
    assert said.messages == messages
    assert said.learnt == [m["role"] == "assistant" for m in messages]
    assert not said.fields and said.tools is None


def test_messages_as_their_json_text() -> None:
    """As columns of tables have them; it used to be learnt as it stood, brackets and all."""
    b = {**A, "content": "b"}
    for record in (
        {"messages": [U, A]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": [U], "completion": [A]},
        {"prompt": [U], "chosen": [A], "rejected": [b]},
    ):
        wanted, said = read(record), read({key: json.dumps(value, indent=1) for key, value in record.items()})
        for one in ("completion", "chosen", "chat"):
            if hasattr(wanted, one):
                a, b = getattr(wanted, one), getattr(said, one)
                a, b = (a.completion, b.completion) if isinstance(a, Answer) else (a, b)
                assert (a.messages, a.learnt) == (b.messages, b.learnt)
    assert "`messages` is text that is not JSON" in refusal({"messages": '[{"role": '})
    assert read({"prompt": "[a]", "completion": "[{}]"}).completion == "[{}]"


def test_prompt_and_completion() -> None:
    raw = read({"prompt": "p ", "completion": "c"})
    assert isinstance(raw, Answer) and (raw.prompt, raw.completion) == ("p ", "c")
    for record in (
        {"prompt": [S, U], "completion": [A]},
        {"prompt": [S, U], "completion": "a"},
        {"prompt": "q", "completion": [A], "system": "s"},
    ):
        said = read(record)
        assert isinstance(said, Answer) and isinstance(said.completion, Chat)
        assert (said.prompt, said.completion.messages) == (2, [S, U, A])
        assert said.completion.learnt == [False, False, True]


def test_an_assistant_in_the_prompt_is_not_learnt() -> None:
    said = read({"prompt": [S, U, A, U], "completion": [A]})
    assert isinstance(said, Answer) and isinstance(said.completion, Chat)
    assert said.completion.learnt == [False, False, False, False, True]


@pytest.mark.parametrize(
    ("record", "number", "messages"),
    [
        ({"prompt": [U], "chosen": [A], "rejected": [{**A, "content": "b"}]}, 1, [U, A]),
        ({"chosen": [U, A], "rejected": [U, {**A, "content": "b"}]}, 1, [U, A]),
        # UltraFeedback: the prompt again as text, the chosen again as messages
        ({"prompt": "q", "chosen": [U, A], "rejected": [U, {**A, "content": "b"}], "messages": [U, A]}, 1, [U, A]),
        ({"prompt": "q", "chosen": [A], "rejected": [{**A, "content": "b"}]}, 1, [U, A]),
        ({"system": "s", "prompt": [U], "chosen": "a", "rejected": "b"}, 2, [S, U, A]),
    ],
)
def test_pairs_of_messages(record: Any, number: int, messages: Any) -> None:
    pair = read(record)
    assert isinstance(pair, Pair) and isinstance(pair.chosen.completion, Chat)
    assert isinstance(pair.rejected.completion, Chat)
    assert pair.chosen.prompt == pair.rejected.prompt == number
    assert pair.chosen.completion.messages == messages
    assert pair.rejected.completion.messages == [*messages[:-1], {**A, "content": "b"}]


def test_pairs_of_texts() -> None:
    for record in (
        {"prompt": "Human: hi. Bot:", "chosen": " hello", "rejected": " go"},
        {"chosen": "Human: hi. Bot: hello", "rejected": "Human: hi. Bot: go"},
    ):
        pair = read(record)
        assert isinstance(pair, Pair)
        for answer, said in ((pair.chosen, " hello"), (pair.rejected, " go")):
            assert (answer.prompt, answer.completion) == ("Human: hi. Bot:", said)
    assert "are the same" in refusal({"prompt": "p", "chosen": "a", "rejected": "a"})
    assert "nothing of its own" in refusal({"chosen": "ab", "rejected": "a"})
    assert "not both text" in refusal({"prompt": "p", "chosen": "a", "rejected": [A]})
    assert "not in the turns" in refusal({"prompt": "x", "chosen": [U, A], "rejected": [U, {**A, "content": "b"}]})


def test_text() -> None:
    said = read({"text": "once"})
    assert isinstance(said, Text) and said.text == "once"
    assert "empty `text`" in refusal({"text": ""})
    assert "`text` that is not text" in refusal({"text": 1})


@pytest.mark.parametrize(
    ("record", "ids", "mask"),
    [
        ({"input_ids": [5, 6, 7]}, [5, 6, 7], [1, 1, 1]),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, [5, 6, 7], [0, 1, 1]),
        ({"input_ids": [5, 6, 7], "loss_mask": [0, 0, 1]}, [5, 6, 7], [0, 0, 1]),
        ({"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]}, [5, 6, 7], [0, 1, 0]),
        ({"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "labels": [-100, 6, -100]}, [5, 6], [0, 1]),
        ({"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1], "position_ids": [0, 0, 1]}, [5, 6], [1, 1]),
        ({"input_ids": np.array([5, 6]), "loss_mask": [False, True]}, [5, 6], [0, 1]),
        ({"input_ids": [5, 6], "loss_mask": [0, 1], "labels": None}, [5, 6], [0, 1]),
    ],
)
def test_tokens(record: Any, ids: list[int], mask: list[int]) -> None:
    said = read(record)
    assert isinstance(said, Tokens)
    assert (said.ids.tolist(), said.mask.tolist()) == (ids, mask)
    assert (said.ids.dtype, said.mask.dtype) == (np.int32, np.uint8)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"input_ids": [5, 6], "labels": [5]}, "`labels` has 1 entries where `input_ids` has 2"),
        ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, "they are shifted by one"),
        ({"input_ids": [5, 6, 7], "labels": [5, 6, 9]}, "`labels[2]` 9 where `input_ids` has 7; a label is the token"),
        ({"input_ids": [5, 6], "loss_mask": [0, 2]}, "`loss_mask` has 2; it runs from 0 to 1"),
        ({"input_ids": [5, -6]}, "`input_ids` has -6"),
        ({"input_ids": [5.5]}, "not a flat list of whole numbers"),
        ({"input_ids": [5.0, 6.0]}, "not a flat list of whole numbers"),
        ({"input_ids": [True, False]}, "not a flat list of whole numbers"),
        ({"input_ids": [5, float("nan")]}, "not a flat list of whole numbers"),
        ({"input_ids": [5, 2**31]}, "`input_ids` has 2147483648"),
        ({"input_ids": [5, 10**30]}, "not a flat list of whole numbers"),
        ({"input_ids": [5, 6], "labels": None}, "has `labels` that is null, so what is to be learnt is not known"),
        ({"input_ids": [[5], [6, 7]]}, "not a flat list of whole numbers"),
        ({"input_ids": "5 6"}, "not a flat list of whole numbers"),
        ({"input_ids": [5, 6, 7], "position_ids": [0, 1, 0]}, "`position_ids` of several documents"),
    ],
)
def test_tokens_that_cannot_be(record: Any, why: str) -> None:
    assert why in refusal(record)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (["a"], "is not an object"),
        ({}, "has fields none; it needs `messages`"),
        ({"dialogue": [U, A]}, "has fields dialogue; it needs `messages`"),
        ({"messages": [], "id": 1}, "`messages` is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "has fields prompt, chosen; it needs"),
        ({"messages": [U, A], "chosen": [U, {**A, "content": "b"}]}, "has `chosen` beside `messages` and they differ"),
        ({"messages": "hi"}, "`messages` is text; write a list of messages"),
        ({"messages": [U, A], "prompt": "other"}, "has `prompt` beside `messages` and they differ"),
        ({"messages": [U, A], "text": "other"}, "has `text` beside `messages` and they differ"),
        ({"prompt": "p", "completion": ""}, "empty `completion`"),
        ({"prompt": "p", "completion": []}, "`completion` is empty"),
        ({"prompt": "p", "completion": "c", "tools": [{"name": "x"}]}, "has `tools` beside a `prompt` that is text"),
        ({"prompt": "p", "completion": 3}, "has a `completion` that is not text"),
        ({"question": "q", "answer": "a", "context": "c"}, "has `context` beside `question` and they differ"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "`history[0]` is not a pair of texts"),
        ({"messages": [S, U, A], "system": "other"}, "has `system` and a system message in `messages` that differ"),
        ({"messages": [U, A], "system": ["s"]}, "`system` is a list; write it as text"),
        ({"messages": [U, A], "tools": "{not json"}, "`tools` is text that is not JSON"),
        ({"messages": [U, A], "tools": {"name": "x"}}, "`tools` is an object; write a list of objects"),
        ({"messages": [U, A], "tools": [1]}, "`tools[0]` is a number"),
        ({"messages": [U, A], "chat_template_kwargs": [1]}, "`chat_template_kwargs` is a list"),
        ({"messages": [U, A], "chat_template_kwargs": {"tools": []}}, "`chat_template_kwargs` sets `tools`"),
    ],
)
def test_refused_by_name(record: Any, why: str) -> None:
    assert why in refusal(record)


def test_tools_in_every_spelling() -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    for record in ({"tools": [tool]}, {"tools": json.dumps([tool])}, {"tools": [json.dumps(tool)]},
                   {"functions": [tool["function"]]}):  # fmt: skip
        assert chat(read({"messages": [U, A], **record})).tools == [tool]
    for none in (None, [], "", "[]"):
        assert chat(read({"messages": [U, A], "tools": none})).tools is None


def test_other_names_of_fields() -> None:
    record = {"dialog": [U, A], "messages": "something else"}
    assert chat(read(record, columns=(("messages", "dialog"),))).messages == [U, A]
    record = {"query": "q", "response": "a"}
    assert chat(read(record, columns=(("question", "query"), ("answer", "response")))).messages == [U, A]
    assert "has no field `dialog`, which data.columns names; it has query, response" in refusal(
        record, columns=(("messages", "dialog"),)
    )


def test_fields_left_out_on_purpose() -> None:
    record = {"messages": [U, A], "prompt": "other", "label": True}
    assert chat(read(record, ignore=("prompt",))).fields == {"label": True}
    assert not chat(read(record, ignore=("prompt", "label"))).fields


def test_what_is_left_over_goes_on_with_the_sample() -> None:
    for record in ({"messages": [U, A]}, {"prompt": [U], "completion": [A]}, {"text": "t"}, {"input_ids": [1]},
                   {"prompt": "p", "completion": "c"}):  # fmt: skip
        sample = read({**record, "more": 1})
        if isinstance(sample, Talk):
            assert sample.chat.fields == {"more": 1}
        elif isinstance(sample, Answer) and isinstance(sample.completion, Chat):
            assert sample.completion.fields == {"more": 1}
        else:
            assert sample.fields == {"more": 1}
