"""What a whole micro-batch computes and sends, counted on the engine that runs it, against the cost model's terms."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hbp.cost.cluster import CLUSTERS
from hbp.cost.memory import REDUCE_BYTES
from hbp.cost.model_spec import spec_from_config
from hbp.cost.predict import CostModel

torch = pytest.importorskip("torch")

from workers import write_config  # noqa: E402

from hbp.parallel import gather_kv  # noqa: E402
from hbp.parallel.mesh import make_mesh  # noqa: E402
from hbp.parallel.varlen import Documents  # noqa: E402
from hbp.train.batch import micro_batch_of  # noqa: E402
from hbp.train.loop import forward_backward  # noqa: E402
from hbp.train.measure.fake_world import OWN_BACKEND, fake_backend, fake_world  # noqa: E402
from hbp.train.model import CausalLMWithLoss, load_model, shard  # noqa: E402
from tests.cost.test_model_spec import CONFIGS  # noqa: E402

CPU = torch.device("cpu")
WORLD, RANK, TOKENS = 8, 0, 128


@pytest.fixture
def eight_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Eight ranks of which only this one exists."""
    if torch.distributed.is_initialized():
        pytest.skip("another test holds the process group")
    monkeypatch.setattr("hbp.parallel.ulysses.document_attention", eager_attention)
    with fake_world(WORLD, RANK):
        yield


def eager_attention(q: Any, k: Any, v: Any, documents: Documents, **_: Any) -> Any:
    """Two products that the FLOP counter sees, every pair of each document."""
    times = q.size(1) // k.size(1)
    q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)))
    lengths = list(documents.lengths)
    pieces = zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True)
    return torch.cat([(a @ b.transpose(1, 2)).softmax(-1) @ c for a, b, c in pieces], dim=1).transpose(0, 1)


def micro_batch(config: dict[str, Any], folder: Path, degree: int, gc_layers: int, run: Callable[..., Any]) -> Any:
    """`run` on the sharded model and this rank's part of a pack of two documents, ``TOKENS`` tokens a rank."""
    import numpy as np

    model = load_model(write_config(folder, config))
    mesh = make_mesh(WORLD, [1, degree], "cpu", config["num_attention_heads"])
    shard(model, mesh.world, by_layer=spec_from_config(config).sharded_by_layer)
    half = TOKENS * degree // 2
    documents = [(np.arange(half, dtype=np.int32) % 64, np.ones(half, np.uint8))] * 2
    return run(model, micro_batch_of(documents, 0, degree, RANK % degree, gc_layers, mesh, CPU))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "deepseek_v2"])
def test_flops_of_forward_and_backward(name: str, tmp_path: Path, eight_ranks: None) -> None:
    """Within 1 %: every layer three times, the recomputed ones most of a fourth, the head three times.

    The eager attention of this test has a backward of two forwards, and takes masked pairs too.
    """
    from torch.utils.flop_counter import FlopCounterMode

    config, gc_layers = {**CONFIGS[name], "sliding_window": None}, 2
    spec = spec_from_config(config)

    def count(model: CausalLMWithLoss, batch: Any) -> int:
        if spec.experts:  # the counter sees the products of eager experts
            model.lm.set_experts_implementation("eager")
        with FlopCounterMode(display=False) as counter:
            forward_backward(model, batch)
        return int(counter.get_total_flops())

    unit = dataclasses.replace(CLUSTERS["cpu-local"], layer_overhead_s=0.0, linear_flops_per_s=1.0)
    linear = TOKENS * CostModel(spec, unit, 1).seconds(1, gc_layers).per_token
    pairs = 2 * (TOKENS // 2) ** 2
    attention = pairs * spec.attention_flops_per_pair() * (3 + gc_layers / spec.n_layers)
    assert micro_batch(config, tmp_path, 1, gc_layers, count) == pytest.approx(linear + attention, rel=0.01)


@pytest.mark.parametrize(("name", "gc_layers"), [("llama", 0), ("llama", 3), ("qwen3", 0), ("deepseek_v2", 0)])
@pytest.mark.parametrize("degree", [2, 4, 8])
def test_bytes_of_the_all_to_alls(
    name: str, gc_layers: int, degree: int, tmp_path: Path, eight_ranks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a rank hands to them in forward, backward and recomputation."""
    config = {**CONFIGS[name], "intermediate_size": 176}
    sent = Counter[str]()
    real = torch.ops._c10d_functional.all_to_all_single

    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (real.default, torch.ops._c10d_functional_autograd.all_to_all_single.default):
                sent["bytes"] += args[0].numel() * args[0].element_size()
            return func(*args, **(kwargs or {}))

    def record(model: CausalLMWithLoss, batch: Any) -> None:
        with Recorder():
            forward_backward(model, batch)

    micro_batch(config, tmp_path, degree, gc_layers, record)
    spec = spec_from_config(config)
    passes = 2 * spec.n_layers + gc_layers
    assert sent["bytes"] == TOKENS * passes * spec.alltoall_bytes_per_token(degree, 4)


@pytest.mark.parametrize(("name", "gc_layers"), [("llama", 0), ("qwen3", 3), ("deepseek_v2", 0)])
@pytest.mark.parametrize(("heads", "kv_heads", "degree"), [(2, 1, 4), (2, 2, 8), (4, 4, 8), (2, 2, 2)])
def test_bytes_of_gathered_keys_and_values(
    name: str,
    gc_layers: int,
    heads: int,
    kv_heads: int,
    degree: int,
    tmp_path: Path,
    eight_ranks: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a rank receives of the others' in forward and recomputation, and has reduced in backward."""
    config = {**CONFIGS[name], "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    if name == "deepseek_v2":
        config["num_key_value_heads"] = heads
    moved = Counter[str]()

    def counted(kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def collective(out: Any, mine: Any, *, group: Any) -> Any:
            smaller = min(out.numel(), mine.numel())
            assert max(out.numel(), mine.numel()) == smaller * group.size()
            moved[kind] += smaller * (group.size() - 1) * mine.element_size()
            return real(out, mine, group=group)

        return collective

    for kind in ("ALL_GATHER", "REDUCE_SCATTER"):
        monkeypatch.setattr(gather_kv, kind, counted(kind, getattr(gather_kv, kind)))
    micro_batch(config, tmp_path, degree, gc_layers, forward_backward)
    spec = spec_from_config(config)
    per_pass = TOKENS * spec.gather_bytes_per_token(degree, 4)
    assert moved["ALL_GATHER"] == per_pass * (spec.n_layers + gc_layers)
    assert moved["REDUCE_SCATTER"] == per_pass * spec.n_layers
    assert (per_pass > 0) == (degree > heads)


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("name", ["llama", "deepseek_v2"])
def test_bytes_of_fsdp(
    name: str, by_layer: bool, tmp_path: Path, eight_ranks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters gathered, experts' too, once or twice; gradients reduced once in float32; no expert all-to-all."""
    if fake_backend() == OWN_BACKEND:
        pytest.skip("this torch calls our own group directly, past the operators that are recorded")
    config = CONFIGS[name]
    if by_layer:
        monkeypatch.setattr("hbp.cost.model_spec.SMALL_LAYER_PARAMETERS", 0)
    moved = Counter[str]()
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kind = func.name()
            if "all_to_all" in kind or "alltoall" in kind:
                moved["all_to_all"] += 1
            if "allgather" in kind or "all_gather_into" in kind:
                moved["gathered"] += args[0].numel() * args[0].element_size()
            if "reduce_scatter" in kind:
                moved["reduced"] += args[1].numel() * args[1].element_size()
            return func(*args, **(kwargs or {}))

    def record(model: CausalLMWithLoss, batch: Any) -> None:
        with Recorder():
            forward_backward(model, batch)

    micro_batch(config, tmp_path, 1, 0, record)
    spec = spec_from_config(config)
    assert spec.sharded_by_layer == by_layer
    padding = 0.02  # each parameter's rows are padded to a multiple of the world
    gathers = 2 if by_layer else 1
    layers = sum(spec.layer_parameters(i) for i in range(spec.n_layers))
    root = spec.parameters() - layers  # stays gathered from forward to backward
    expected = (gathers * layers + root) * 4
    assert expected <= moved["gathered"] <= expected * (1 + padding)
    assert spec.parameters() * REDUCE_BYTES <= moved["reduced"] <= spec.parameters() * REDUCE_BYTES * (1 + padding)
    assert moved["all_to_all"] == 0
    cluster = dataclasses.replace(CLUSTERS["cpu-local"], link_bytes_per_s=1.0, collective_latency_s=0.0)
    predicted = CostModel(spec, cluster, WORLD).seconds(1, 0).fsdp
    assert predicted == (expected + spec.parameters() * REDUCE_BYTES) * (WORLD - 1) / WORLD
