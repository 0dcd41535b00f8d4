"""Records to tokens and masks: what is shared by all shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

from chat_families import FAMILIES, byte_level, metaspace, trimmed, unmarked
from hypothesis import given, settings
from hypothesis import strategies as st

from hbp.data.record import Encoded, encode_records
from hbp.data.record.formats import SHAPES

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def bare(tokenizer: Any) -> Any:
    tokenizer.chat_template = None
    return tokenizer


def one(tokenizer: Any, record: Any) -> Encoded:
    (outcome,) = encode_records([record], tokenizer)
    assert outcome.error is None
    (sample,) = outcome.samples
    assert (sample.input_ids.dtype, sample.loss_mask.dtype) == (np.int32, np.uint8)
    return sample


def tokens(tokenizer: Any, sample: Encoded) -> tuple[list[str], list[str]]:
    """Tokens that are not learnt, and those that are."""
    names = np.array(tokenizer.convert_ids_to_tokens(sample.input_ids.tolist()))
    return names[sample.loss_mask == 0].tolist(), names[sample.loss_mask == 1].tolist()


def test_without_a_template_the_tokenizer_decides() -> None:
    """Its begin token, one tokenization of the whole, and the end token; a word over the border is learnt whole."""
    tokenizer = bare(metaspace())
    sample = one(tokenizer, {"prompt": "the c", "completion": "at sat"})
    whole = tokenizer("the cat sat</s>")["input_ids"]
    assert sample.input_ids.tolist() == whole
    prompt, learnt = tokens(tokenizer, sample)
    assert prompt[0] == "<s>" and learnt[-1] == "</s>"
    assert "".join(learnt) == "▁cat▁sat</s>"


@pytest.mark.parametrize("make", [byte_level, trimmed, metaspace])
def test_a_prompt_that_ends_in_a_space(make: Any) -> None:
    tokenizer = bare(make())
    sample = one(tokenizer, {"prompt": "the cat ", "completion": "sat"})
    assert sample.input_ids.tolist() == tokenizer("the cat sat</s>")["input_ids"]
    assert tokenizer.decode(sample.input_ids[sample.loss_mask == 1]).strip() == "sat</s>"


def test_the_end_token_is_not_added_twice() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = bare(byte_level())
    for record in ({"prompt": "a", "completion": "b</s>"}, {"text": "b</s>"}):
        assert one(tokenizer, record).input_ids.tolist().count(tokenizer.eos_token_id) == 1
    tokenizer = bare(metaspace())
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    before = tokenizer.backend_tokenizer.post_processor
    try:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)]
        )
        from hbp.data.record.layout import adds_end

        adds_end.cache_clear()
        sample = one(tokenizer, {"prompt": "the cat", "completion": " sat"})
        assert sample.input_ids.tolist()[-1] == end and sample.input_ids.tolist().count(end) == 1
        assert sample.loss_mask[-1] == 1
    finally:
        tokenizer.backend_tokenizer.post_processor = before
        adds_end.cache_clear()


def test_a_tokenizer_without_an_end_token() -> None:
    tokenizer = bare(byte_level())
    try:
        tokenizer.eos_token = None
        assert tokens(tokenizer, one(tokenizer, {"prompt": "the cat ", "completion": "sat"}))[1][-1] != "</s>"
    finally:
        tokenizer.eos_token = "</s>"


def test_text_is_learnt_whole() -> None:
    tokenizer = metaspace()
    tokenizer.chat_template = FAMILIES["chatml"]  # has nothing to do with plain text
    sample = one(tokenizer, {"text": "the cat"})
    assert sample.input_ids.tolist() == tokenizer("the cat</s>")["input_ids"]
    assert sample.loss_mask.all()


def test_one_question_and_its_answer_need_no_template() -> None:
    tokenizer = bare(byte_level())
    sample = one(tokenizer, {"messages": [{**U, "content": "the cat "}, {**A, "content": "sat"}]})
    assert tokenizer.decode(sample.input_ids) == "the cat sat</s>"
    for record in ({"question": "q?", "answer": "a"}, {"instruction": "q?", "output": "a"}):
        sample = one(tokenizer, record)
        assert tokenizer.decode(sample.input_ids) == "q?\na</s>"
        assert tokenizer.decode(sample.input_ids[sample.loss_mask == 1]) == "a</s>"
    sample = one(tokenizer, {"messages": [U, {**A, "weight": 0}]})
    assert not sample.loss_mask.any()
    for talk, more in (([U, A, U, A], {}), ([{"role": "system", "content": "s"}, U, A], {}), ([U, A], {"tools": [{}]})):
        (outcome,) = encode_records([{"messages": talk, **more}], tokenizer)
        assert outcome.error is not None and "the tokenizer has no chat template" in outcome.error


def test_special_tokens_are_not_added_to_what_the_template_wrote() -> None:
    tokenizer = metaspace()  # adds <s> to plain text
    tokenizer.chat_template = FAMILIES["llama3"]
    ids = one(tokenizer, {"messages": [U, A]}).input_ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("marked", [True, False])
def test_prompt_and_completion_as_messages(marked: bool) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = FAMILIES["chatml"] if marked else unmarked(FAMILIES["chatml"])
    prompt = [{"role": "system", "content": "S"}, U, {**A, "content": "earlier"}, U]
    sample = one(tokenizer, {"prompt": prompt, "completion": [A]})
    assert tokenizer.decode(sample.input_ids[sample.loss_mask == 1]) == "a<|im_end|>\n"
    several = [A, {"role": "user", "content": "more"}, {**A, "content": "b"}, {**A, "content": "no", "weight": 0}]
    sample = one(tokenizer, {"prompt": prompt, "completion": several})
    assert tokenizer.decode(sample.input_ids[sample.loss_mask == 1]) == "a<|im_end|>\nb<|im_end|>\n"


def test_a_pair_is_two_samples_that_part_at_one_place() -> None:
    tokenizer = bare(byte_level())
    (outcome,) = encode_records([{"prompt": "the c", "chosen": "at sat", "rejected": "ow"}], tokenizer)
    assert outcome.pair and outcome.error is None
    chosen, rejected = outcome.samples
    begins = {int(np.argmax(sample.loss_mask)) for sample in outcome.samples}
    assert len(begins) == 1
    (begin,) = begins
    np.testing.assert_array_equal(chosen.input_ids[:begin], rejected.input_ids[:begin])
    assert all(sample.loss_mask[begin:].all() for sample in outcome.samples)


def test_one_bad_record_does_not_spoil_the_others() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = FAMILIES["chatml"]
    good = {"messages": [U, A]}
    lone = {"messages": [{**U, "content": "cat \ud83d"}, A]}
    records = [good, lone, {"messages": [A, {"role": "alien", "content": "x"}]}, {"text": "t"}, ["no object"], good]
    outcomes = encode_records(records, tokenizer)
    assert [o.error is None for o in outcomes] == [True, False, False, True, False, True]
    assert "half of a surrogate pair (\\ud83d) stands at character" in str(outcomes[1].error)
    np.testing.assert_array_equal(outcomes[0].samples[0].input_ids, outcomes[5].samples[0].input_ids)
    tokenizer.chat_template = None
    (outcome,) = encode_records([lone], tokenizer)
    assert "half of a surrogate pair" in str(outcome.error)


def test_many_at_once_are_the_same_as_one_by_one() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = unmarked(FAMILIES["qwen3"])
    records = [
        {"messages": [U, A]}, {"text": "the cat"}, {"prompt": "p ", "completion": "c"}, {"input_ids": [1, 2]},
        {"prompt": [U], "chosen": [A], "rejected": [U | {"role": "assistant"}]}, {"question": "q", "answer": "a"},
    ]  # fmt: skip
    alone = [encode_records([record], tokenizer)[0] for record in records]
    for one, other in zip(encode_records(records, tokenizer), alone, strict=True):
        assert (one.error, one.pair, one.notes) == (other.error, other.pair, other.notes)
        for a, b in zip(one.samples, other.samples, strict=True):
            np.testing.assert_array_equal(a.input_ids, b.input_ids)
            np.testing.assert_array_equal(a.loss_mask, b.loss_mask)


def test_tokens_need_no_tokenizer() -> None:
    assert one(None, {"input_ids": [1, 2], "labels": [-100, 2]}).loss_mask.tolist() == [0, 1]
    for record, why in (({"text": "t"}, "is not tokenized yet"), ({"input_ids": []}, "has no tokens")):
        (outcome,) = encode_records([record], None)
        assert why in str(outcome.error)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('roles\nmust alternate') }}", "refused by the chat template (roles must alternate);"),
        ("{{ messages[7].content }}", "is refused by the chat template"),
        ("{% for %}", "the chat template is no template"),
        ({"tools": FAMILIES["chatml"]}, "the chat template is no template"),
    ],
)  # fmt: skip
def test_a_template_that_fails(template: Any, why: str) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    (outcome,) = encode_records([{"messages": [U, A]}], tokenizer)
    assert why in str(outcome.error) and "\n" not in str(outcome.error)


def test_a_template_that_fails_on_a_part_alone() -> None:
    """Here on prompts that do not end with the assistant, which is all that there are."""
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if messages[-1].role != 'assistant' %}{{ raise_exception('the last must answer') }}{% endif %}"
    )
    (outcome,) = encode_records([{"prompt": [U], "completion": [A]}], tokenizer)
    assert outcome.error == "is refused by the chat template (the last must answer)"


scalars = st.none() | st.booleans() | st.integers(-2, 9) | st.floats(0, 1) | st.sampled_from(["", "a", "{}", "user"])
keys = st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls", "function", "name", "weight"])
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=4), max_leaves=8)
FIELDS = sorted({key for needed, besides in SHAPES for key in (*needed, *besides)} | {"id", "label"})


@given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_record_is_encoded_or_refused(record: Any) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = FAMILIES["qwen2.5"]
    (outcome,) = encode_records([record], tokenizer)
    assert (outcome.error is None) == bool(outcome.samples)


def test_a_second_template_for_tools() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": FAMILIES["chatml"], "tool_use": FAMILIES["qwen2.5"]}
    tool = {"type": "function", "function": {"name": "get"}}
    assert "get" in tokenizer.decode(one(tokenizer, {"messages": [U, A], "tools": [tool]}).input_ids)
    assert "You are a cat" not in tokenizer.decode(one(tokenizer, {"messages": [U, A]}).input_ids)


def test_a_tokenizer_that_does_not_tell_where_its_tokens_stand() -> None:
    class Slow:
        chat_template, eos_token, special_tokens_map = FAMILIES["chatml"], None, {"eos_token": "</s>"}

        def get_added_vocab(self) -> dict[str, int]:
            return {}

        def __call__(self, texts: Any, **options: Any) -> Any:
            out = byte_level()(texts, add_special_tokens=options["add_special_tokens"])
            out._encodings = None
            return out

    (outcome,) = encode_records([{"messages": [U, A]}], Slow())
    assert "does not tell where its tokens stand" in str(outcome.error)
