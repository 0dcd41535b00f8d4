"""Kill a run of several ranks at random moments, go on with it, and hold what came out against a run left alone.

    python benchmarks/faults.py --quick --json          # two kills, under a minute on an idle machine
    python benchmarks/faults.py --kills 300             # the long form: every mode, 300 kills in all
    python benchmarks/faults.py --modes lora,elastic --kills 40 --seed 7

Ranks are forked from this process, which has imported everything, so that a start costs a second. An attempt is killed
(SIGKILL to one rank, two, or all) or signalled (SIGTERM, SIGUSR1, SIGINT, SIGHUP to one rank or all) at a random moment
of its life, loading, planning, saving and exporting included, and the same command follows until the run is finished.
Then: every sample was trained on exactly once an epoch, by plans and logs; and, but for `elastic`, losses, gradient
norms and exported weights equal those of the run that was left alone, bit for bit.

| mode | what differs |
|---|---|
| full | nothing: the whole model is trained |
| lora | adapters with dropout, so that random states count |
| elastic | every attempt runs on 1 to 4 ranks |
| slow-disk | saves take most of the time, so that kills land in them |
| full-disk | one write of a save in five finds no space |
| torn-files | after an attempt a file of the newest checkpoint is cut or half zeros; a half-written save lies there |
| read-errors | one read of a checkpoint file in ten fails (EIO); the attempt may end with code 1, nothing may be lost |

An attempt that has not ended 120 s after its kill counts as a hang.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter

import hbp.report.page
import hbp.run.job  # noqa: F401  so too
import hbp.train.checkpoint as checkpoint
import hbp.train.loop as loop
from hbp.cli.main import main as hbp_main
from hbp.data.stdlib_sft import train_tokenizer
from hbp.plan import read_plan
from hbp.run_log import StepRecord, read_log

MODES = ("full", "lora", "elastic", "slow-disk", "full-disk", "torn-files", "read-errors")
QUICK_RANKS = 2
RANKS, EPOCHS, HANG_S, MOST_TRIES = 4, 2, 120.0, 16
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
EXACT = ("step", "loss", "grad_norm", "lr", "tokens", "loss_tokens", "group")
FINISHED, TO_BE_CONTINUED = 0, 85
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}  # fmt: skip


def write_job(folder: Path, samples: int) -> Path:
    """Data, tokenizer, weights and ``cfg.yaml`` in a folder; the configuration's path."""
    folder.mkdir(parents=True)
    rng, words = np.random.default_rng(0), ("pack", "rank", "step", "token", "plan", "group", "wait")
    with (folder / "data.jsonl").open("w") as out:
        for i in range(samples):
            said = " ".join(rng.choice(words, 120 if i % 16 == 0 else int(rng.integers(3, 25))))
            turns = [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": said}]
            out.write(json.dumps({"messages": turns}) + "\n")
    train_tokenizer(folder / "data.jsonl", folder / "tokenizer", vocab_size=320)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**LLAMA)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    sections = {
        "data": {"source": str(folder / "data.jsonl"), "tokenizer": str(folder / "tokenizer"), "eval_samples": 6},
        "model": {"path": str(folder / "model")},
        "cluster": {"profile": False},
        "plan": {"strategy": "hbp", "global_batch_tokens": 300},
        "train": {"lr": 1e-2, "epochs": EPOCHS, "save_steps": 2, "eval_steps": 3},
    }
    (folder / "cfg.yaml").write_text(yaml.safe_dump(sections))
    return folder / "cfg.yaml"


@dataclass
class Attempt:
    """Ranks that are running, and what those that have ended ended with."""

    pids: list[int]
    log: Path
    codes: dict[int, int] = field(default_factory=dict)

    def wait(self, seconds: float) -> bool:
        """Whether all have ended within this time."""
        until = time.monotonic() + seconds
        while len(self.codes) < len(self.pids):
            for pid in set(self.pids) - self.codes.keys():
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > until:
                break
            time.sleep(0.02)
        return len(self.codes) == len(self.pids)

    def send(self, number: int, ranks: Sequence[int]) -> None:
        """A signal to those of these ranks that are running."""
        for pid in {self.pids[rank] for rank in ranks} - self.codes.keys():
            os.kill(pid, number)

    def result(self) -> list[int | None]:
        """Of each rank."""
        return [self.codes.get(pid) for pid in self.pids]


def start(config: Path, world: int, overrides: Sequence[str], log: Path, interfere: Callable[[int], None]) -> Attempt:
    """One attempt at a run, its ranks forked from here; they meet as those of torchrun do."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            os.setpgid(0, 0)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            meet = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_PORT": port}
            os.environ.update({"MASTER_ADDR": "localhost", **{name: str(value) for name, value in meet.items()}})
            interfere(rank)
            code = hbp_main(["train", str(config), *overrides])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return Attempt(pids, log)


def interference(mode: str, seed: int) -> Callable[[int], None]:
    """What a mode does to each rank of an attempt, before it begins."""

    def interfere(rank: int) -> None:
        chance, plain = random.Random(seed * 10 + rank), loop.forward_backward

        def slowly(*arguments: Any) -> Any:
            time.sleep(0.03)
            return plain(*arguments)

        loop.forward_backward = slowly  # type: ignore[assignment]
        write = FileSystemWriter.write_data

        def write_data(writer: Any, *arguments: Any) -> Any:
            if mode == "full-disk" and chance.random() < 0.2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(writer.path))
            time.sleep(chance.uniform(0, 0.6) if mode == "slow-disk" else 0.0)
            return write(writer, *arguments)

        FileSystemWriter.write_data = write_data  # type: ignore[method-assign]
        checksum = checkpoint._crc32

        def read(path: Path) -> int:
            if mode == "read-errors" and chance.random() < 0.1:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return checksum(path)

        checkpoint._crc32 = read

    return interfere


def tear(checkpoints: Path, chance: random.Random) -> None:
    """Damage the newest checkpoint as a power cut may, or leave a half-written one; never the only one."""
    whole = checkpoint.list_checkpoints(checkpoints)
    if whole:
        shutil.copytree(whole[0], checkpoints / "step-00009999.partial", dirs_exist_ok=True)
    if len(whole) < 2:
        return
    file = chance.choice([path for path in sorted(whole[0].rglob("*")) if path.is_file()])
    data = file.read_bytes()
    at = len(data) // 2
    file.write_bytes(chance.choice([data[:at], b"", data[:at] + bytes(len(data) - at)]))


def parts_of(run: Path) -> list[Path]:
    """The folders of a run's parts in their order."""
    folder = run / "hbp"
    return [folder, *sorted(folder.glob("part-*"), key=lambda part: int(part.name[5:]))]


def audit(run: Path) -> list[list[list[Any]]]:
    """What each step did, part by part, after it was seen that every sample was trained on once an epoch."""
    trained: dict[int, list[int]] = {}
    for part in parts_of(run):
        plan, ids = read_plan(part / "plan"), np.load(part / "samples.npy")
        log = read_log(part, StepRecord)
        assert [record.step for record in log] == list(range(len(log))), f"{part}: steps {[r.step for r in log]}"
        done = plan.sample_ids[: plan.sample_offsets[np.searchsorted(plan.step, len(log))]]
        trained.setdefault(json.loads((part / "part.json").read_text())["epoch"], []).extend(ids[done].tolist())
    every = np.load(run / "hbp" / "samples.npy").tolist()
    assert sorted(trained) == list(range(EPOCHS)), f"epochs {sorted(trained)}"
    for epoch, got in trained.items():
        assert sorted(got) == every, f"epoch {epoch}: {len(got)} of {len(every)} samples"
    return [[[getattr(r, name) for name in EXACT] for r in read_log(part, StepRecord)] for part in parts_of(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """What was exported."""
    (file,) = (run / "hbp" / "model").glob("*.safetensors")
    return load_file(file)


@dataclass
class Tally:
    """What became of a mode's runs."""

    mode: str
    kills: int = 0
    by: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    hangs: int = 0
    slowest_end_s: float = 0.0
    codes: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)


def disturb(attempt: Attempt, chance: random.Random, world: int) -> str:
    """Kill or signal it; what was done, for people."""
    one = chance.randrange(world)
    kind = chance.choice(["kill one", "kill two", "kill all", "signal one", "signal all"])
    ranks = {"one": [one], "two": list({one, chance.randrange(world)}), "all": list(range(world))}[kind.split()[1]]
    number = signal.SIGKILL if kind.startswith("kill") else chance.choice(SIGNALS)
    attempt.send(number, ranks)
    return f"{signal.Signals(number).name} to {kind.split()[1]}"


def kill_and_go_on(mode: str, kills: int, seed: int, root: Path, samples: int, ranks: int) -> Tally:
    """Runs of one mode, disturbed until there were so many kills, each gone on with to its end."""
    chance, tally = random.Random(f"{mode} {seed}"), Tally(mode)
    config = write_job(root / mode / "job", samples)
    options = ["lora.rank=4", "lora.dropout=0.3"] if mode == "lora" else []
    reference, began = root / mode / "left-alone", time.monotonic()
    alone = start(config, ranks, [f"run_dir={reference}", *options], root / mode / "alone.txt", interference("full", 0))
    assert alone.wait(600), "the run that was left alone hangs"
    assert set(alone.result()) == {FINISHED}, alone.log.read_text()[-3000:]
    whole_s, want = time.monotonic() - began, audit(reference)
    while tally.kills < kills:
        run, tally.runs = root / mode / f"run-{tally.runs}", tally.runs + 1
        for number in range(MOST_TRIES + 1):
            world = chance.choice([1, 2, 3, 4]) if mode == "elastic" else ranks
            log = run.with_name(f"{run.name}-{number}.txt")
            attempt = start(
                config, world, [f"run_dir={run}", *options], log, interference(mode, chance.randrange(2**31))
            )
            disturbed = tally.kills < kills and number < MOST_TRIES - 2
            if disturbed and not attempt.wait(chance.uniform(0.2, 1.05 * whole_s)):
                tally.kills += 1
                tally.by[disturb(attempt, chance, world)] += 1
                ended = time.monotonic()
                hangs = not attempt.wait(HANG_S)
                tally.slowest_end_s = max(tally.slowest_end_s, time.monotonic() - ended)
            else:
                hangs = not attempt.wait(HANG_S + 3 * whole_s)
            if hangs:
                tally.hangs += 1
                tally.bad.append(f"{log.name}: hangs")
                attempt.send(signal.SIGKILL, range(world))
                attempt.wait(10)
            codes = attempt.result()
            tally.codes[" ".join(sorted({str(code) for code in codes}))] += 1
            if set(codes) == {FINISHED}:
                break
            if mode == "torn-files":
                tear(run / "hbp" / "checkpoints", chance)
        else:
            tally.bad.append(f"{run.name}: not finished after {MOST_TRIES} attempts")
            continue
        tally.bad += compare(run, reference, want, mode)
        print(f"{mode}: {run.name} finished, {tally.kills} kills, {len(tally.bad)} bad", file=sys.stderr, flush=True)
        shutil.rmtree(run, ignore_errors=True)
    return tally


def compare(run: Path, reference: Path, want: list[list[list[Any]]], mode: str) -> list[str]:
    """What is wrong with a finished run."""
    try:
        got = audit(run)
        if mode != "elastic":
            assert got == want, "steps differ from those of the run that was left alone"
            mine, theirs = weights(run), weights(reference)
            same = mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
            assert same, "weights differ from those of the run that was left alone"
    except (AssertionError, OSError, ValueError) as wrong:
        return [f"{run.name}: {wrong}"]
    return []


def main() -> None:
    """Run the modes; a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two kills of a small run")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--modes", default=",".join(MODES), help="of " + ", ".join(MODES))
    parser.add_argument("--kills", type=int, default=300, help="in all modes together")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    modes = ["full"] if args.quick else args.modes.split(",")
    if unknown := set(modes) - set(MODES):
        parser.error(f"no mode {unknown.pop()!r}: give some of {', '.join(MODES)}")
    kills = 2 if args.quick else -(-args.kills // len(modes))
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        size = (50, QUICK_RANKS) if args.quick else (110, RANKS)
        tallies = [kill_and_go_on(mode, kills, args.seed, Path(root), *size) for mode in modes]
    rows = [{**vars(tally), "by": dict(tally.by), "codes": dict(tally.codes)} for tally in tallies]
    result = {
        "kills": sum(tally.kills for tally in tallies),
        "hangs": sum(tally.hangs for tally in tallies),
        "bad": sum(len(tally.bad) for tally in tallies),
        "seconds": round(time.monotonic() - began, 1),
        "rows": rows,
    }
    if args.json:
        print(json.dumps(result))
    else:
        print("| mode | kills | runs | hangs | wrong | slowest end, s |\n|---|--:|--:|--:|--:|--:|")
        for tally in tallies:
            ended = f"{tally.slowest_end_s:.1f}"
            print(f"| {tally.mode} | {tally.kills} | {tally.runs} | {tally.hangs} | {len(tally.bad)} | {ended} |")
    sys.exit(1 if result["bad"] else 0)


if __name__ == "__main__":
    main()
