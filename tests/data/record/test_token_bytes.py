"""Where byte-level tokens stand, from their lengths: the library's offsets to the character, or nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

from chat_families import FAMILIES, byte_level, metaspace, trimmed
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from hbp.data.record import encode, encode_records
from hbp.data.record.token_bytes import byte_tokens


def like(tokenizer: Any) -> Any:
    """A copy to change."""
    made = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def nfc() -> Any:
    tokenizer = like(byte_level())
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


pieces = st.sampled_from(
    ["<|im_end|>", " ", "\n", "the", "cat's", "Gr\u00fc\u00dfe", "e\u0301", "\u0958", "\U0001f600", "1"]
)


@given(st.lists(pieces | st.characters(exclude_categories=["Cs"]), max_size=30))
@settings(max_examples=150, deadline=None)
def test_offsets_are_the_librarys(parts: list[str]) -> None:
    text = "".join(parts)
    for tokenizer in TOKENIZERS:
        known = byte_tokens(tokenizer)
        assert known is not None
        library = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        found = known.offsets(text, np.asarray(library.ids, np.int32))
        if found is not None:
            assert found.tolist() == [list(pair) for pair in library.offsets]
        elif tokenizer is TOKENIZERS[0]:
            assert not text


TOKENIZERS = (byte_level(), nfc())


def test_other_tokenizers_are_left_to_the_library() -> None:
    lower = like(byte_level())
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    for tokenizer in (metaspace(), trimmed(), lower):
        assert byte_tokens(tokenizer) is None


def test_a_token_that_swallows_blanks_is_left_to_the_library() -> None:
    tokenizer = like(byte_level())
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|tool|>", lstrip=True, rstrip=True)]})
    known = byte_tokens(tokenizer)
    assert known is not None
    for text, is_known in (("a<|tool|>b", True), ("a <|tool|>b", False), ("a<|tool|> b", False)):
        assert (known.offsets(text, np.asarray(tokenizer.encode(text), np.int32)) is not None) is is_known


def test_masks_are_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = nfc()
    tokenizer.chat_template = FAMILIES["chatml"]
    said = ["a", " \u00e9 ", "e\u0301", "\U0001f600\U0001f600", "<|im_end|> the", ""]
    records: list[Any] = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a in said for b in said
    ]
    records += [{"prompt": a or "q", "completion": b or "a"} for a in said for b in said]
    asked: list[int] = []
    library = encode._pairs
    monkeypatch.setattr(encode, "_pairs", lambda offsets: asked.append(1) or library(offsets))
    quick = encode_records(records, tokenizer)
    assert len(asked) == 11  # of texts that NFC changes
    monkeypatch.setattr(encode, "byte_tokens", lambda tokenizer: None)
    for one, other in zip(quick, encode_records(records, tokenizer), strict=True):
        assert one.error is None and other.error is None
        for a, b in zip(one.samples, other.samples, strict=True):
            assert a.input_ids.tolist() == b.input_ids.tolist()
            assert a.loss_mask.tolist() == b.loss_mask.tolist()
