from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from plans import Row, plan_of
from workers import CPU, LLAMA, QWEN2, Samples, run_ranks, write_config

from hbp.config import TrainConfig
from hbp.cost.cluster import load_cluster
from hbp.cost.model_spec import spec_from_config
from hbp.cost.predict import CostModel
from hbp.parallel.mesh import make_mesh
from hbp.plan import Plan, validate
from hbp.planning.planner import make_plan
from hbp.run_log import _line
from hbp.train import loop
from hbp.train.export import export_model
from hbp.train.logs import scalars_of
from hbp.train.loop import Learner, StepLimit, StepLosses, evaluate, learning_rate, make_optimizer, train
from hbp.train.model import load_model, shard
from hbp.train.records import groups_of_steps

WORLD = 2
CONFIG = TrainConfig(lr=1e-2, warmup=0.1)


def counting_samples() -> Samples:
    """Documents that count up: every next token follows from the last, so a few steps lower the loss."""
    rng = np.random.default_rng(0)
    tokens = [((rng.integers(0, 64) + np.arange(n)) % 64).astype(np.int32) for n in rng.integers(3, 40, 60)]
    return Samples([(ids, (rng.random(len(ids)) < 0.8).astype(np.uint8)) for ids in tokens])


SAMPLES = counting_samples()


def planned() -> Plan:
    cost = CostModel(spec_from_config(LLAMA), load_cluster("cpu-local"), WORLD)
    plan = make_plan(SAMPLES.lengths, cost, strategy="hbp", max_length=64, global_batch_tokens=128)
    validate(plan)
    return plan


def rearranged(plan: Plan, world: int, degree: int) -> Plan:
    """The same samples in the same steps, one pack a micro-step over all ranks, every other layer count recomputed."""
    rows: list[Row] = []
    for step in range(plan.n_steps):
        ids = np.concatenate([plan.samples(row)[0] for row in np.flatnonzero(plan.step == step)])[::-1]
        for micro, part in enumerate(np.array_split(ids, min(3, len(ids)))):
            rows.append((step, micro, 0, degree, micro, part.tolist()))
    return plan_of(rows, SAMPLES.lengths, world)


def run_training(rank: int, world: int, plans: dict[str, Plan], config_folder: str, out: str | None):
    mesh = make_mesh(world, [1, world], "cpu")
    records, result = {}, {}
    for name, plan in plans.items():
        model = load_model(config_folder, seed=3)
        shard(model, mesh.world)
        seen: list[int] = []
        learner = Learner.of(model, mesh, CONFIG, CPU)
        records[name] = train(learner, plan, SAMPLES, lambda r, seen=seen: seen.append(r.step))
        assert seen == list(range(plan.n_steps))
        if out and name == "planned":
            result["eval"] = evaluate(learner, plan, SAMPLES)
            export_model(model, Path(out))
            result["weights"] = {n.removeprefix("lm."): p.full_tensor().clone() for n, p in model.named_parameters()}
            silent = Samples([(ids, np.zeros_like(mask)) for ids, mask in SAMPLES.documents])
            result["nothing"] = evaluate(learner, plan, silent)
            result["step"] = train(learner, plan, silent, lambda r: True)[0]
    return records, result


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    config = write_config(root / "config", LLAMA)
    plan = planned()
    two = run_ranks(run_training, 2, {"planned": plan, "sp2": rearranged(plan, 2, 2)}, config, str(root / "model"))
    one = run_ranks(run_training, 1, {"one rank": rearranged(plan, 1, 1)}, config, None)
    for mine, theirs in zip(two[0][0]["planned"], two[1][0]["planned"], strict=True):
        for name in ("loss", "grad_norm", "tokens", "loss_tokens", "rank_wall_s"):
            assert getattr(mine, name) == getattr(theirs, name)  # on all ranks alike
    return plan, {**two[0][0], **one[0][0]}, two[0][1], root / "model"


def test_loss_falls(runs):
    plan, records, _, _ = runs
    losses = [r.loss for r in records["planned"]]
    assert len(losses) == plan.n_steps >= 5
    assert losses[0] == pytest.approx(math.log(64), rel=0.05)  # a fresh model knows nothing
    assert losses[-1] < 0.8 * losses[0]


def test_records_count_what_was_trained(runs):
    plan, records, _, _ = runs
    groups = groups_of_steps(plan)
    for record in records["planned"]:
        rows = np.flatnonzero(plan.step == record.step)
        ids = np.concatenate([plan.samples(row)[0] for row in rows])
        assert record.tokens == sum(len(SAMPLES.documents[i][0]) for i in ids)
        assert record.loss_tokens == sum(int(SAMPLES.documents[i][1][1:].sum()) for i in ids)
        assert record.group == groups[record.step]
        assert record.tokens_per_s == pytest.approx(record.tokens / record.seconds)
        assert record.grad_norm > 0
        micro_steps = int(plan.micro_step[rows].max()) + 1
        walls, busy = np.array(record.rank_wall_s), np.array(record.rank_busy_s)
        assert walls.shape == busy.shape == (WORLD, micro_steps)
        assert (busy <= walls).all()
        assert (walls.sum(axis=1) <= record.seconds + 1e-4).all()
        assert record.mean_wall_s == pytest.approx(walls.sum(axis=1).mean(), abs=1e-4)
        assert record.mean_busy_s == pytest.approx(busy.sum(axis=1).mean(), abs=1e-4)
        assert busy[record.slowest_rank].sum() == pytest.approx(busy.sum(axis=1).max(), abs=1e-4)
    assert sum(r.tokens for r in records["planned"]) == plan.info.n_tokens


@pytest.mark.parametrize("other", ["sp2", "one rank"])
def test_same_samples_under_another_plan_give_the_same_losses(runs, other):
    _, records, _, _ = runs
    for name in ("loss", "grad_norm", "lr"):
        got = [getattr(r, name) for r in records[other]]
        want = [getattr(r, name) for r in records["planned"]]
        assert got == pytest.approx(want, rel=1e-4), name


def document_loss(model: torch.nn.Module, index: int) -> torch.Tensor:
    """Summed cross entropy of one document alone, from plain logits."""
    ids, mask = SAMPLES.documents[index]
    tokens = torch.from_numpy(ids).long()
    scores = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    return -scores.gather(1, tokens[1:, None])[:, 0][torch.from_numpy(mask[1:]).bool()].sum()


def test_training_equals_a_plain_loop(runs):
    """Transformers, AdamW, one document at a time: the same loss and gradient norm at every step."""
    from transformers import AutoModelForCausalLM

    plan, records, _, folder = runs
    start = load_model(str(folder.parent / "config"), seed=3).lm
    model = AutoModelForCausalLM.from_config(start.config, attn_implementation="sdpa")
    model.load_state_dict(start.state_dict())
    vectors = [p for name, p in model.named_parameters() if name.endswith(("norm.weight", ".bias"))]
    matrices = [p for name, p in model.named_parameters() if not name.endswith(("norm.weight", ".bias"))]
    groups = [{"params": matrices, "weight_decay": CONFIG.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=CONFIG.betas)
    done, total = 0, int(SAMPLES.lengths.sum())
    for record in records["planned"]:
        ids = np.concatenate([plan.samples(row)[0] for row in np.flatnonzero(plan.step == record.step)])
        tokens = int(SAMPLES.lengths[ids].sum())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(CONFIG, done, tokens, total)
        loss = sum(document_loss(model, i) for i in ids) / SAMPLES.loss_tokens[ids].sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        done += tokens
        assert (record.loss, record.grad_norm) == pytest.approx((loss.item(), norm.item()), rel=1e-4)
    assert done == total


def test_exported_model_is_the_trained_one(runs):
    from transformers import AutoModelForCausalLM

    _, _, result, folder = runs
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    assert not list(folder.parent.glob("*.partial"))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, result["weights"][name]), name
    with torch.no_grad():
        total = float(sum(document_loss(model, i) for i in range(len(SAMPLES.documents))))
    assert total / SAMPLES.loss_tokens.sum() == pytest.approx(result["eval"], rel=1e-5)


def test_a_loss_over_nothing_is_none(runs):
    _, _, result, _ = runs
    assert result["nothing"] is None
    assert (result["step"].loss, result["step"].loss_tokens) == (None, 0)
    assert "train/loss" not in scalars_of(result["step"])


def not_finite_here(rank: int, world: int, plan: Plan, config_folder: str, where: str):
    """Rank 1 alone makes a loss or a gradient of step 2 infinite, in its second micro-step."""
    mesh, model = make_mesh(world, [1, world], "cpu"), load_model(config_folder, seed=3)
    shard(model, mesh.world)
    micro_steps = [len(np.unique(plan.micro_step[plan.step == step])) for step in range(plan.n_steps)]
    plain, calls, weights, seen = loop.forward_backward, 0, [], list[StepLosses]()

    def forward_backward(model, batch, scale):
        nonlocal calls
        calls += 1
        bad = rank == 1 and calls == sum(micro_steps[:2]) + 2
        if bad and where == "loss":
            batch.weights.fill_(math.inf)
        loss = plain(model, batch, scale)
        if bad and where == "gradient":
            model.lm.model.norm.weight.grad.to_local()[0] = math.inf
        return loss

    def keep(record) -> bool:
        weights.append([p.to_local().detach().clone() for p in model.parameters()])
        return record.step == 4

    learner = Learner.of(model, mesh, CONFIG, CPU)
    with mock.patch.object(loop, "forward_backward", forward_backward):
        records = train(learner, plan, SAMPLES, keep, look=seen.append)
    same = [all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(weights)]
    return records, seen, same


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(runs, where):
    _, _, _, folder = runs
    plan = plan_of([(s, m, r, 1, m, [2 * (6 * s + 2 * m + r)]) for s in range(5) for m in range(3) for r in range(2)],
                   SAMPLES.lengths, 2)  # fmt: skip
    (records, seen, same), (there, _, same_there) = run_ranks(
        not_finite_here, 2, plan, str(folder.parent / "config"), where
    )
    assert [r.skipped for r in records] == [r.skipped for r in there]
    assert [bool(r.skipped) for r in records] == [False, False, True, False, False]
    assert same == same_there == [False, True, False, False]  # step 2 changed no parameter
    assert records[2].loss is None
    assert records[2].grad_norm is None
    assert records[2].tokens > 0
    assert all(math.isfinite(r.loss) and math.isfinite(r.grad_norm) for r in records if not r.skipped)
    bad = [row for row, loss in zip(seen[2].rows, seen[2].losses, strict=True) if not math.isfinite(loss)]
    (of_rank_1,) = np.flatnonzero((plan.step == 2) & (plan.micro_step == 1) & (plan.rank_start == 1))
    assert bad == ([of_rank_1] if where == "loss" else [])
    assert "lm.model.norm.weight" in seen[2].gradients
    assert where in seen[2].problem
    for record, losses in zip(records, seen, strict=True):
        if not record.skipped:
            assert sum(losses.losses) == pytest.approx(record.loss, rel=1e-5)
            assert not losses.problem
    assert '"loss": null' in _line(records[2])


def test_norms_and_biases_do_not_decay(tmp_path):
    model = load_model(write_config(tmp_path, QWEN2), seed=3)
    decay = {id(p): g["weight_decay"] for g in make_optimizer(model, CONFIG).param_groups for p in g["params"]}
    found = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert {name for name, value in found.items() if not value} == {
        name for name in found if name.endswith(("norm.weight", ".bias"))
    }
    assert any(name.endswith(".bias") for name in found)
    assert set(found.values()) == {0.0, CONFIG.weight_decay}
    (group,) = make_optimizer(model, CONFIG.model_copy(update={"decay_all": True})).param_groups
    assert group["weight_decay"] == CONFIG.weight_decay


def test_learning_rate_follows_tokens():
    config = TrainConfig(lr=2.0, warmup=0.1, final_lr=0.25)

    def at(share: float) -> float:
        return learning_rate(config, int(share * 10_000), 0, 10_000)

    assert at(0) == 0
    assert at(0.05) == pytest.approx(1.0)
    assert at(0.1) == pytest.approx(2.0)
    assert at(0.55) == pytest.approx(2 * (0.25 + 0.75 / 2))  # half way down the cosine
    assert at(1) == pytest.approx(0.5)
    rates = [at(i / 100) for i in range(101)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(config, 400, 200, 10_000) == at(0.05)  # a step stands at its middle
    assert learning_rate(TrainConfig(lr=2.0, warmup=0), 0, 0, 10) == 2.0
    assert learning_rate(TrainConfig(lr=2.0, warmup=1), 5, 0, 10) == 1.0


def test_a_step_may_take_ten_times_what_the_slowest_before_makes_likely():
    rows: list[Row] = [(step, 0, 0, 1, 0, [step]) for step in range(3)]
    plan = plan_of(rows, np.ones(3, np.int32), 1)
    plan = dataclasses.replace(plan, predicted_s=np.array([1, 2, 400], np.float32))
    limit = StepLimit(plan, TrainConfig(hang_minutes=0.5))
    assert limit.seconds(0) == math.inf  # kernels may be compiled
    limit.learn(0, 1.5)
    limit.learn(1, 2.5)
    assert limit.seconds(1) == 30  # the least
    assert limit.seconds(2) == pytest.approx(10 * 1.5 * 400)  # a long step after short ones
    never = StepLimit(plan, TrainConfig(hang_minutes=None))
    never.learn(0, 1.5)
    assert never.seconds(1) == math.inf
