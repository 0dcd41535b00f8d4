from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from workers import CPU, LLAMA, random_samples, run_ranks, write_config

from hbp.config import TrainConfig
from hbp.errors import HbpError
from hbp.parallel.mesh import make_mesh
from hbp.train.batch import micro_batch_of
from hbp.train.checkpoint import (
    Checkpoints,
    Position,
    _tensors_from_json,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    read_position,
)
from hbp.train.loop import forward_backward, make_optimizer
from hbp.train.model import CausalLMWithLoss, load_model, shard

DOCUMENTS = random_samples([9, 4, 12], LLAMA["vocab_size"]).documents
CONFIG = TrainConfig(lr=1e-2)


def trainer(world: int, config: str, seed: int):
    """A model, its optimizer and a function that makes a step."""
    mesh = make_mesh(world, [1], "cpu")
    model = load_model(config, seed=seed)
    shard(model, mesh.world)
    optimizer = make_optimizer(model, CONFIG)

    def step() -> None:
        forward_backward(model, micro_batch_of(DOCUMENTS, 0, 1, 0, 0, mesh, CPU), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, optimizer, step


def values(model: CausalLMWithLoss, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of all parameters and moments, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach().full_tensor().clone()
        for moment, value in optimizer.state[parameter].items():
            found[f"{name} {moment}"] = value.full_tensor().clone() if hasattr(value, "full_tensor") else value.clone()
    return found


def position(step: int, world: int) -> Position:
    return Position(part=0, step=step, run_step=step, tokens=7 * step, tokens_total=700, plan="p", world_size=world)


def save_steps(rank: int, world: int, config: str, folder: str):
    """Save after each of four steps, training on at once; returns the state after the third."""
    model, optimizer, step = trainer(world, config, seed=0)
    checkpoints = Checkpoints(Path(folder), 2, {"id": "whose"})
    kept = {}
    for number in range(1, 5):
        step()
        checkpoints.save(model, optimizer, position(number, world))
        if number == 3:
            kept = values(model, optimizer)
            draw = torch.get_rng_state()
    step()
    checkpoints.close()
    return kept, draw


def load_third(rank: int, world: int, config: str, folder: str):
    """Load into a model that started elsewhere; its state, its random state, what is newest."""
    model, optimizer, _ = trainer(world, config, seed=5)
    torch.manual_seed(99)
    load_checkpoint(Path(folder) / "step-00000003", model, optimizer, seed=0)
    return values(model, optimizer), torch.get_rng_state(), newest_checkpoint(Path(folder))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    config = write_config(root / "config", LLAMA)
    states = run_ranks(save_steps, 2, config, str(root / "saved"))
    return config, root / "saved", states


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_only_the_newest_are_kept_and_each_is_whole(saved):
    _, folder, _ = saved
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000004", "step-00000003"]
    assert not list(folder.glob("*.partial"))
    assert read_position(folder / "step-00000003") == position(3, 2)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_was_saved_is_loaded_bit_for_bit_by_any_number_of_ranks(saved, world):
    """Though training went on while it was written."""
    config, folder, states = saved
    for rank, (loaded, draw, newest) in enumerate(run_ranks(load_third, world, config, str(folder))):
        assert same(loaded, states[0][0])
        assert torch.equal(draw, states[rank][1]) == (rank < 2) if rank < 2 else True
        assert newest == (folder / "step-00000004", position(4, 2))


def newest_of(rank: int, world: int, folders: list[Path]):
    return [newest_checkpoint(folder) for folder in folders]


HARM = {
    "flip": lambda shard: shard.write_bytes(flipped(shard.read_bytes())),
    "cut": lambda shard: shard.write_bytes(shard.read_bytes()[:-1]),
    "remove": lambda shard: shard.unlink(),
    "position": lambda shard: (shard.parent / "position.json").write_text("{"),
}


def flipped(data: bytes) -> bytes:
    """One bit in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def test_damage_is_found(saved, tmp_path):
    """Of every kind, in one start of two ranks; the one before is what is left."""
    _, folder, _ = saved
    copies = [Path(shutil.copytree(folder, tmp_path / harm)) for harm in HARM]
    both = [list_checkpoints(copy) for copy in copies]
    for harm, (newest, _) in zip(HARM.values(), both, strict=True):
        harm(sorted(newest.glob("*.distcp"))[-1])
    assert run_ranks(newest_of, 2, copies) == [[(before, position(3, 2)) for _, before in both]] * 2
    for copy, (newest, before) in zip(copies, both, strict=True):
        assert list_checkpoints(copy) == [before]
        assert newest.with_suffix(".damaged").is_dir()  # kept, but out of the way


def save_where_it_cannot(rank: int, world: int, config: str, folder: str) -> str:
    model, optimizer, step = trainer(world, config, seed=0)
    step()
    checkpoints = Checkpoints(Path(folder), keep=2)
    checkpoints.save(model, optimizer, position(1, world))
    try:
        checkpoints.wait()
    except HbpError as error:
        return str(error)
    return ""


def test_a_save_that_fails_is_one_line(saved, tmp_path):
    (tmp_path / "step-00000001.partial").write_text("in the way")
    for said in run_ranks(save_where_it_cannot, 2, saved[0], str(tmp_path)):
        assert said.startswith(f"cannot save a checkpoint in {tmp_path}: ")
        assert "\n" not in said


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(HbpError, match="is not a whole checkpoint"):
        read_position(tmp_path)
    assert list_checkpoints(tmp_path / "missing") == []


def test_the_writing_thread_takes_no_cuda_context(tmp_path, monkeypatch):
    """With a device at hand and one thread, torch's writer copies ahead on device 0, from a thread of every rank."""
    from torch.distributed.checkpoint import filesystem

    from hbp.train.checkpoint import _AtomicWriter
    from hbp.train.measure.fake_world import fake_world

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", None)  # not to be called
    with fake_world(1):
        position = Position(0, 1, 1, 1, 1, "", 1)
        writer = _AtomicWriter(tmp_path / "step-1", position, 1)
        torch.distributed.checkpoint.save({"x": torch.ones(3)}, storage_writer=writer)
    assert (tmp_path / "step-1").is_dir()


def load_first(rank: int, world: int, config: str, folder: str) -> str:
    model, optimizer, _ = trainer(world, config, seed=5)
    try:
        load_checkpoint(Path(folder), model, optimizer, seed=0)
    except HbpError as error:
        return str(error)
    return ""


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_of_a_checkpoint_is_unpickled(saved, tmp_path):
    """Whoever writes a file may write its checksum too; so what is read holds no code, wherever it stands."""
    config, folder, _ = saved
    at, ran = Path(shutil.copytree(folder / "step-00000003", tmp_path / "step-00000003")), tmp_path / "ran"
    (at / ".metadata").write_bytes(pickle.dumps(Evil(ran)))  # torch's own, which torch would unpickle
    assert run_ranks(load_first, 1, config, str(at)) == [""]
    where = json.loads((at / "tensors.json").read_text())
    values = [place for place in where["places"] if place[0] in where["values"]]
    assert values  # the optimizer's options
    torch.save(Evil(ran), blob := io.BytesIO())
    (at / "evil").write_bytes(blob.getvalue())
    for place in values:
        place[3:] = ["evil", 0, len(blob.getvalue())]
    (at / "tensors.json").write_text(json.dumps(where))
    (said,) = run_ranks(load_first, 1, config, str(at))
    assert said.startswith(f"cannot load {at}: UnpicklingError")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda where: where["places"][0].__setitem__(3, "../../outside"), "is outside of the checkpoint"),
        (lambda where: next(iter(where["tensors"].values())).update(dtype="device"), "no type device"),
        (lambda where: where.pop("places"), "places"),
    ],
)
def test_a_list_of_tensors_that_is_none_is_refused(saved, tmp_path, harm, said):
    at = Path(shutil.copytree(saved[1] / "step-00000003", tmp_path / "step-00000003"))
    where = json.loads((at / "tensors.json").read_text())
    harm(where)
    with pytest.raises(ValueError if said != "places" else KeyError, match=said):
        _tensors_from_json(where)


def test_a_checkpoint_says_whose_it_is_and_under_which_versions(saved):
    data = json.loads((saved[1] / "step-00000003" / "position.json").read_text())
    assert data["run"] == {"id": "whose"}
    assert {".metadata", "tensors.json"} < set(data["files"])
