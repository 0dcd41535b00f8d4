"""One process as any rank of a large world: the real engine runs, on torch's fake backend and on ours."""

from __future__ import annotations

import builtins

import pytest
import torch
import torch.distributed as dist
from plans import plan_of
from workers import CPU, LLAMA, random_samples, write_config

from hbp.errors import HbpError
from hbp.parallel.mesh import make_mesh
from hbp.train.batch import make_micro_batch
from hbp.train.loop import forward_backward
from hbp.train.measure import fake_world as module
from hbp.train.measure.fake_world import OWN_BACKEND, fake_backend, fake_world
from hbp.train.model import load_model, local_parameter_bytes, shard

WORLD = 32


@pytest.fixture(params=["fake", OWN_BACKEND])
def backend(request):
    if request.param == "fake" and fake_backend() != "fake":
        pytest.skip("torch's own leaves what it should fill, so it is not used")  # torch 2.11
    return request.param


def test_what_is_received_is_the_own_part(backend):
    with fake_world(8, 5, backend):
        assert (dist.get_rank(), dist.get_world_size()) == (5, 8)
        assert module._copies_own_part()
        values = [None] * 8
        dist.all_gather_object(values, {"rank": 5})
        assert values == [{"rank": 5}] * 8
    assert not dist.is_initialized()


@pytest.mark.parametrize("by_layer", [True, False])
def test_a_rank_of_many_runs_the_real_engine(tmp_path, backend, by_layer):
    """Shards of the true size; every degree, gathered keys and values included; finite losses and gradients."""
    folder = write_config(tmp_path, {**LLAMA, "num_key_value_heads": 2})
    samples = random_samples([40, 7, 9, 120, 3], LLAMA["vocab_size"])
    rows = [(0, 0, 0, 8, 2, [3, 4]), (0, 0, 8, 2, 0, [0]), (0, 0, 10, 1, 3, [1]), (0, 0, 11, 1, 0, [2])]
    plan = plan_of(rows, samples.lengths, WORLD)
    losses = {}
    for rank in (0, 5, 9, 11):
        with fake_world(WORLD, rank, backend):
            mesh = make_mesh(WORLD, [1, 2, 8], "cpu", heads=LLAMA["num_attention_heads"])
            model = load_model(folder)
            whole = local_parameter_bytes(model)
            shard(model, mesh.world, by_layer=by_layer)
            assert whole / WORLD <= local_parameter_bytes(model) < 2.5 * whole / WORLD  # tiny matrices divide badly
            row = next(i for i, r in enumerate(rows) if r[2] <= rank < r[2] + r[3])
            batch = make_micro_batch(plan, row, samples, mesh, rank, CPU)
            losses[rank] = float(forward_backward(model, batch))
            gradients = [p.grad.to_local() for p in model.parameters()]
            assert all(torch.isfinite(g).all() for g in gradients)
            assert sum(float(g.abs().sum()) for g in gradients) > 0
    for rank, loss in losses.items():
        assert 1 < loss < 500, (rank, loss)


def test_rank_0_can_play_another(tmp_path):
    """Documents and tokens of a rank follow from its number, whatever rank the groups were made for."""
    samples = random_samples([64, 9], LLAMA["vocab_size"])
    plan = plan_of([(0, 0, 0, 4, 0, [0, 1])], samples.lengths, 4)
    slices = []
    with fake_world(4):
        mesh = make_mesh(4, [4], "cpu", heads=4)
        for rank in range(4):
            slices += make_micro_batch(plan, 0, samples, mesh, rank, CPU).input_ids[0].tolist()
    assert slices[:73] == [int(t) for i in (0, 1) for t in samples.sample(i)[0]]


def test_ours_where_torch_has_none(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.endswith("fake_pg"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    fake_backend.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    assert fake_backend() == OWN_BACKEND
    monkeypatch.setattr(builtins, "__import__", real)

    fake_backend.cache_clear()
    monkeypatch.setattr(module, "_copies_own_part", lambda: False)  # a torch that has changed it
    assert fake_backend() == OWN_BACKEND
    fake_backend.cache_clear()


def test_only_one_world_at_a_time():
    with fake_world(2), pytest.raises(HbpError, match="a rank of a real job"), fake_world(2):
        pass
    with pytest.raises(HbpError, match="no rank 4 in a world of 4"), fake_world(4, 4):
        pass
