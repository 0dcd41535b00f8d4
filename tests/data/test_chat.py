"""What is learnt is what the assistant says and its end of turn, whichever way the template tells it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbp.errors import HbpError

pytest.importorskip("transformers")

from hbp.data.chat import Encoded, encode, load_tokenizer
from hbp.data.stdlib_sft import CHAT_TEMPLATE, train_tokenizer

Talk = list[dict[str, str]]

MARKED = CHAT_TEMPLATE
UNMARKED = re.sub(r"\{% (end)?generation %\}", "", MARKED)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    message = {"role": "user", "content": "the cat sat on the mat and the assistant answered the user"}
    (root / "a.jsonl").write_text(json.dumps({"messages": [message] * 8}) + "\n")
    train_tokenizer(root / "a.jsonl", root / "tokenizer", vocab_size=300)
    return root / "tokenizer"


def tokenizer_with(folder: Path, template: Any) -> Any:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def marked(folder: Path) -> Any:
    return tokenizer_with(folder, MARKED)


@pytest.fixture(scope="module")
def unmarked(folder: Path) -> Any:
    return tokenizer_with(folder, UNMARKED)


def turns(*contents: str) -> Talk:
    """User and assistant by turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def learnt(tokenizer: Any, encoded: Encoded) -> list[str]:
    """Texts of the runs of tokens that are learnt."""
    ids, mask = encoded.input_ids, encoded.loss_mask
    edges = np.flatnonzero(np.diff([0, *mask, 0]))
    return [tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]


def refusal(tokenizer: Any, talk: Any) -> str:
    with pytest.raises(HbpError) as caught:
        encode(tokenizer, talk)
    assert "\n" not in str(caught.value)
    return str(caught.value)


contents = st.text("abc the1.,{}<|>é中😀\n ", max_size=30).map(str.strip).filter(bool)
talks = st.tuples(contents, st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), contents), max_size=6))


@given(talks)
@settings(max_examples=60, deadline=None)
def test_learns_exactly_the_assistants_text_either_way(marked: Any, unmarked: Any, drawn: Any) -> None:
    talk = [{"role": "user", "content": drawn[0]}, *({"role": r, "content": c} for r, c in drawn[1])]
    encoded = encode(marked, talk)
    said = [f"{m['content']}<|im_end|>" for m in talk if m["role"] == "assistant"]
    assert learnt(marked, encoded) == said
    assert marked.decode(encoded.input_ids) == "".join(
        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>" for m in talk
    )
    other = encode(unmarked, talk)
    np.testing.assert_array_equal(other.input_ids, encoded.input_ids)
    np.testing.assert_array_equal(other.loss_mask, encoded.loss_mask)
    for array, dtype in ((encoded.input_ids, np.int32), (other.input_ids, np.int32), (other.loss_mask, np.uint8)):
        assert array.dtype == dtype


def test_published_chatml(folder: Path) -> None:
    """Without marks, the line break that the template sets after a turn counts as part of the turn."""
    tokenizer = tokenizer_with(folder, CHATML)
    encoded = encode(tokenizer, turns("one", "two", "three", "four"))
    assert learnt(tokenizer, encoded) == ["two<|im_end|>\n", "four<|im_end|>\n"]


@pytest.mark.parametrize("dashed", [False, True])
def test_spelling_of_the_marks(folder: Path, dashed: bool) -> None:
    template = MARKED.replace("{% generation %}", "{%- generation -%}") if dashed else {"default": MARKED}
    tokenizer = tokenizer_with(folder, template)
    assert learnt(tokenizer, encode(tokenizer, turns("one", "two"))) == ["two<|im_end|>"]


def test_nothing_is_learnt_without_an_assistant(marked: Any, unmarked: Any) -> None:
    for tokenizer in (marked, unmarked):
        encoded = encode(tokenizer, turns("one"))
        assert len(encoded.input_ids) and not encoded.loss_mask.any()


def test_special_tokens_are_not_added_twice(folder: Path) -> None:
    """A tokenizer that adds its own begin token must not add it to what the template wrote."""
    from tokenizers.processors import TemplateProcessing

    talk = turns("one", "two")
    for template in (MARKED, UNMARKED):
        tokenizer = tokenizer_with(folder, template)
        plain = encode(tokenizer, talk)
        begin = tokenizer.convert_tokens_to_ids("<|im_start|>")
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)]
        )
        assert tokenizer("one")["input_ids"][0] == begin
        np.testing.assert_array_equal(encode(tokenizer, talk).input_ids, plain.input_ids)


def test_template_that_rewrites_earlier_turns_is_refused(folder: Path) -> None:
    tokenizer = tokenizer_with(folder, FORGETFUL)
    thought = "<think>x</think>y"
    assert "rewrites earlier turns" in refusal(tokenizer, turns("one", thought, "two", "three"))
    encoded = encode(tokenizer, turns("one", "plain", "two", thought))  # nothing earlier to rewrite
    assert learnt(tokenizer, encoded) == ["plain<|im_end|>", f"{thought}<|im_end|>"]


@pytest.mark.parametrize("template", ["{{ raise_exception('roles\nmust alternate') }}", "{% for %}", {"tools": MARKED}])
def test_template_that_fails_is_refused_with_the_roles(folder: Path, template: Any) -> None:
    message = refusal(tokenizer_with(folder, template), turns("one", "two"))
    assert message.startswith("the chat template refuses a conversation (")
    assert message.endswith("roles: user, assistant")


def test_prompt_and_completion_without_a_template(folder: Path) -> None:
    tokenizer = tokenizer_with(folder, None)
    encoded = encode(tokenizer, turns("the cat ", "sat 😀"))
    assert tokenizer.decode(encoded.input_ids) == "the cat sat 😀<|im_end|>"
    assert learnt(tokenizer, encoded) == ["sat 😀<|im_end|>"]
    tokenizer.eos_token = None
    assert learnt(tokenizer, encode(tokenizer, turns("the cat ", "sat"))) == ["sat"]
    message = refusal(tokenizer, turns("one", "two", "three"))
    assert "no chat template, so a conversation of user, assistant, user cannot be laid out" in message


def test_no_tokenizer_there(tmp_path: Path) -> None:
    with pytest.raises(HbpError, match="cannot load a tokenizer from") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
