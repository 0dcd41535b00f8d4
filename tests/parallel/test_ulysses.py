from __future__ import annotations

from unittest import mock

import pytest
import torch
from workers import CPU

from hbp.errors import HbpError
from hbp.parallel.gather_kv import Gather
from hbp.parallel.ulysses import ATTENTION_NAMES, PackLayout, register_attention, ulysses_attention
from hbp.parallel.varlen import KERNELS, make_documents


def test_degree_that_does_not_divide_the_heads():
    layout = PackLayout(make_documents((6,), CPU), 3, mock.sentinel.group)
    q, k = torch.zeros(2, 4, 8), torch.zeros(2, 2, 8)
    with pytest.raises(HbpError, match="degree 3 does not divide the model's 4 attention heads"):
        ulysses_attention(q, k, k, layout)


def test_degree_is_split_between_heads_and_gathered_keys():
    documents = make_documents((8,), CPU)
    assert PackLayout(documents, 4, mock.sentinel.group).ulysses_degree == 4
    assert PackLayout(documents, 4, mock.sentinel.group, Gather(2, mock.sentinel.across, (), ())).ulysses_degree == 2


def test_kernels_are_registered_by_name():
    from transformers import AttentionInterface

    assert set(ATTENTION_NAMES) == {"auto", "eager", *KERNELS}
    for kernel in ("auto", "sdpa"):
        assert register_attention(kernel) in AttentionInterface().valid_keys()
    with pytest.raises(HbpError, match="no attention kernel 'ring': give auto, eager, varlen, sdpa"):
        register_attention("ring")
