"""Kill a run of several ranks at random moments, go on with it, and hold what came out against a run left alone.

    python benchmarks/faults.py --quick --json                       # a few kills, under a minute on an idle machine
    python benchmarks/faults.py --kills 300 --out benchmarks/results/faults.json     # the long form: every mode
    python benchmarks/faults.py --modes lora,elastic --kills 40 --seed 7
    python benchmarks/faults.py --soak 120                           # one long run: memory, files, threads (soak.py)

Ranks are forked from this process, which has imported everything, so that a start costs a second. An attempt is killed
(SIGKILL to one rank, two, or all) or signalled (SIGTERM, SIGUSR1, SIGINT, SIGHUP to one rank or all) a moment after it
has entered a phase that is drawn (a micro-step, an update, a save or its end, loading, planning, evaluation, export,
the report) or at a drawn time after its start, and the same command follows, to be killed again, until the run is
finished. After a death the other ranks are ended as torchrun would, or have to notice by themselves, by turns. Then:
every sample was trained on exactly once an epoch, by plans and logs (and by `hbp audit`); and, but for `elastic`,
losses, gradient norms and exported weights equal those of the run that was left alone, bit for bit.

| mode | what differs |
|---|---|
| full | nothing: the whole model is trained |
| lora | adapters with dropout, so that random states count |
| elastic | every attempt runs on 1 to 3 ranks |
| slow-disk | saves take most of the time, so that kills land in them |
| full-disk | one save in five, and one file in a hundred, finds no space |
| torn-files | after an attempt a file of the newest checkpoint, or run.json, is cut or half zeros; half a save lies |
| read-errors | one reading of a file in twenty fails (EIO), or every one of some file: code 1, and nothing is lost |

Wrong are, too: an attempt that has not ended 120 s after its kill; one that calls a fault wrong input (code 2); and a
mode whose faults were never injected. With `--out`, runs that are in the file already are not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama
import yaml
from fault_ranks import PHASES, Attempt, one_thread, start, tear
from fault_rows import MODES, Kept, Row, about, summary
from safetensors.torch import load_file

from hbp.data.stdlib_sft import train_tokenizer
from hbp.plan import read_plan
from hbp.run.audit import audit_run
from hbp.run_log import StepRecord, read_log

INJECTING = ("slow-disk", "full-disk", "torn-files", "read-errors")
WORLDS, ELASTIC_WORLDS = (2, 1, 2), (1, 2, 3)
"""Ranks of a mode's runs, by turns."""
EPOCHS, SAMPLES, HANG_S = 2, 40, 120.0
KILLS_OF_A_RUN, MOST_TRIES = 10, 24
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
EXACT = ("step", "loss", "grad_norm", "lr", "tokens", "loss_tokens", "group")
FINISHED, TO_BE_CONTINUED, WRONG_INPUT = 0, 85, 2
WHEN = {
    "start": 6, "planning": 2, "loading": 6, "micro-step": 40, "update": 12, "saving": 14, "end of a save": 12,
    "evaluation": 4, "export": 2, "report": 2,
}  # fmt: skip
"""Kills are meant for these phases so often, relative to each other."""
LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 320, "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}  # fmt: skip


def write_job(folder: Path, samples: int = SAMPLES, **train: Any) -> Path:
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
        "data": {"source": str(folder / "data.jsonl"), "tokenizer": str(folder / "tokenizer"), "eval_samples": 4},
        "model": {"path": str(folder / "model")},
        "cluster": {"profile": False},
        "plan": {"strategy": "hbp", "global_batch_tokens": 300},
        "train": {"lr": 1e-2, "epochs": EPOCHS, "save_steps": 2, "eval_steps": 5, "hang_minutes": 1, **train},
    }
    (folder / "cfg.yaml").write_text(yaml.safe_dump(sections))
    return folder / "cfg.yaml"


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
    assert all(epoch.holds and not epoch.under_way for epoch in audit_run(run)), "hbp audit finds it wrong"
    return [[[getattr(r, name) for name in EXACT] for r in read_log(part, StepRecord)] for part in parts_of(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """What was exported."""
    (file,) = (run / "hbp" / "model").glob("*.safetensors")
    return load_file(file)


@dataclass(frozen=True)
class Alone:
    """A run that was left alone."""

    run: Path
    steps: list[list[list[Any]]]
    begins_s: float
    """Until its first micro-step."""


class Bench:
    """The folder in which everything happens, and the runs that were left alone in it."""

    def __init__(self, root: Path, samples: int) -> None:
        self.root, self.config = root, write_job(root / "job", samples)
        self.alone: dict[tuple[bool, int], Alone] = {}

    def arguments(self, run: Path, mode: str) -> list[str]:
        """Of the command line."""
        adapters = ["lora.rank=4", "lora.dropout=0.3"] if mode == "lora" else []
        return ["train", str(self.config), f"run_dir={run}", *adapters]

    def left_alone(self, mode: str, world: int) -> Alone:
        """The run that this mode's are held against, which enters every phase but loading."""
        kind = (mode == "lora", world)
        if kind not in self.alone:
            run, log = self.root / f"alone-{mode}-{world}", self.root / f"alone-{mode}-{world}.txt"
            began = time.monotonic()
            attempt = start(self.arguments(run, mode), world, log, "full", 0, run)
            attempt.wait(HANG_S, lambda: attempt.entered("micro-step") > 0)
            begins_s = time.monotonic() - began
            assert attempt.wait(5 * HANG_S), "the run that was left alone hangs"
            assert set(attempt.result()) == {FINISHED}, log.read_text()[-3000:]
            missed = [phase for phase in PHASES if not attempt.entered(phase) and phase != "loading"]
            assert not missed, f"no rank entered {missed}: are the hooks where they were?"
            self.alone[kind] = Alone(run, audit(run), begins_s)
        return self.alone[kind]


def disturb(attempt: Attempt, chance: random.Random) -> str:
    """Kill or signal it; what was done, for people."""
    world = len(attempt.pids)
    one = chance.randrange(world)
    kind = chance.choice(["kill one", "kill two", "kill all", "signal one", "signal all"])
    ranks = {"one": [one], "two": list({one, chance.randrange(world)}), "all": list(range(world))}[kind.split()[1]]
    number = signal.SIGKILL if kind.startswith("kill") else chance.choice(SIGNALS)
    attempt.send(number, ranks)
    return f"{signal.Signals(number).name} to {kind.split()[1] if world > 1 else 'the only one'}"


def wait_for_moment(attempt: Attempt, phase: str, chance: random.Random, begins_s: float) -> bool:
    """Whether the moment to kill came before the attempt ended."""
    if phase == "start":
        return not attempt.wait(chance.uniform(0, 1.2 * begins_s))
    if phase == "loading":
        times = 1
    else:
        times = chance.randint(1, {"micro-step": 8, "update": 5, "saving": 2, "end of a save": 2}.get(phase, 1))
    ended = attempt.wait(HANG_S, lambda: attempt.entered(phase) >= times)
    return not ended and not attempt.wait(chance.choice([0.0, chance.uniform(0, 0.05)]))


def kill_and_go_on(bench: Bench, mode: str, number: int, seed: int, kills: int) -> Row:
    """One run, disturbed up to so many times, gone on with to its end, and held against one that was left alone."""
    chance = random.Random(f"{mode} {seed} {number}")
    world = WORLDS[number % len(WORLDS)]
    row = Row(mode, number, seed, "1–3" if mode == "elastic" else str(world))
    alone = bench.left_alone(mode, world)
    run, began = bench.root / f"{mode}-{seed}-{number}", time.monotonic()
    for row.attempts in range(1, MOST_TRIES + 1):
        ranks = chance.choice(ELASTIC_WORLDS) if mode == "elastic" else world
        log = run.with_name(f"{run.name}-{row.attempts}.txt")
        attempt = start(bench.arguments(run, mode), ranks, log, mode, chance.randrange(2**31), run)
        attempt.launcher = chance.random() < 0.5
        phase = chance.choices(list(WHEN), list(WHEN.values()))[0]
        if phase == "loading" and not (run / "hbp" / "checkpoints").is_dir():
            phase = "micro-step"  # nothing will be loaded
        if row.kills < kills and wait_for_moment(attempt, phase, chance, alone.begins_s):
            row.kills, disturbed = row.kills + 1, time.monotonic()
            row.by[disturb(attempt, chance)] += 1
            row.phases[phase] += 1
            hangs = not attempt.wait(HANG_S)
            row.slowest_end_s = max(row.slowest_end_s, round(time.monotonic() - disturbed, 1))
        else:
            hangs = not attempt.wait(2 * HANG_S)
        codes = attempt.result()
        row.codes[" ".join(sorted(map(str, codes)))] += 1
        row.injected += attempt.injected()
        if hangs or WRONG_INPUT in codes:
            row.hangs += hangs
            row.bad.append(f"{log.name}: {'hangs' if hangs else 'wrong input'}: {end_of(log)}")
            attempt.send(signal.SIGKILL, range(ranks))
            attempt.wait(10)
        if set(codes) == {FINISHED}:
            row.bad += compare(run, alone, mode)
            break
        row.injected += tear(run, chance) if mode == "torn-files" else 0
    else:
        row.bad.append(f"{run.name}: not finished after {MOST_TRIES} attempts: {end_of(log)}")
    row.seconds = round(time.monotonic() - began, 1)
    if not row.bad:
        shutil.rmtree(run, ignore_errors=True)
    return row


def end_of(log: Path) -> str:
    """What an attempt said last, without the place of this checkout."""
    return log.read_text()[-2000:].replace(str(Path(__file__).resolve().parent.parent), ".")


def compare(run: Path, alone: Alone, mode: str) -> list[str]:
    """What is wrong with a finished run."""
    try:
        got = audit(run)
        if mode != "elastic":
            assert got == alone.steps, "steps differ from those of the run that was left alone"
            mine, theirs = weights(run), weights(alone.run)
            same = mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
            assert same, "weights differ from those of the run that was left alone"
        damaged = list((run / "hbp" / "checkpoints").glob("*.damaged*"))
        assert mode == "torn-files" or not damaged, f"{damaged} are called damaged"
    except (AssertionError, OSError, ValueError) as wrong:
        return [f"{run.name}: {wrong}"]
    return []


def run_modes(modes: Sequence[str], kills: int, args: argparse.Namespace) -> Kept:
    """Runs of the modes by turns, until each has seen so many kills."""
    kept = Kept(args.out)
    with tempfile.TemporaryDirectory(prefix="hbp-faults-") as root, one_thread():
        bench, number = Bench(Path(root), SAMPLES), 0
        while True:
            mine = [row for row in kept.rows() if row["seed"] == args.seed]
            done = {(row["mode"], row["number"]) for row in mine}
            missing = {mode: kills - sum(row["kills"] for row in mine if row["mode"] == mode) for mode in modes}
            if all(left <= 0 for left in missing.values()):
                return kept
            for mode in [mode for mode in modes if missing[mode] > 0 and (mode, number) not in done]:
                row = kill_and_go_on(bench, mode, number, args.seed, min(missing[mode], KILLS_OF_A_RUN))
                kept.add(row)
                said = f"{mode} {number}: {row.kills} kills in {row.seconds:.0f} s, {len(row.bad)} wrong"
                print("\n".join([said, *row.bad]), file=sys.stderr, flush=True)
            number += 1


def main() -> None:
    """Run the modes; a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="four kills, in two modes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--modes", default=",".join(MODES), help="of " + ", ".join(MODES))
    parser.add_argument("--kills", type=int, default=300, help="in all modes together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="add each run to this JSON file, and leave out those that are in it")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="instead: one run for so long (soak.py)")
    args = parser.parse_args()
    if args.soak is not None:
        import soak

        soak.run(args.soak, args.out)
        return
    modes = ["full", "read-errors"] if args.quick else args.modes.split(",")
    if unknown := set(modes) - set(MODES):
        parser.error(f"no mode {unknown.pop()!r}: give some of {', '.join(MODES)}")
    began = time.monotonic()
    rows = run_modes(modes, 2 if args.quick else -(-args.kills // len(modes)), args).rows()
    table = summary(rows)
    idle = [row["mode"] for row in table if row["mode"] in INJECTING and not row["injected"]]
    result = {
        "command": "python benchmarks/faults.py" + (" --quick" if args.quick else ""),
        **about(),
        "kills": sum(row["kills"] for row in table),
        "hangs": sum(row["hangs"] for row in table),
        "wrong": sum(row["wrong"] for row in table) + len(idle),
        "without_a_fault": idle,
        "seconds": round(time.monotonic() - began, 1),
        "rows": table,
    }
    if args.json:
        print(json.dumps(result))
    else:
        print("| mode | runs | kills | faults injected | hangs | wrong | slowest end, s |\n|---|" + "--:|" * 6)
        for row in table:
            cells = [row[name] for name in ("mode", "runs", "kills", "injected", "hangs", "wrong", "slowest_end_s")]
            print("| " + " | ".join(map(str, cells)) + " |")
    sys.exit(1 if result["wrong"] or result["hangs"] else 0)


if __name__ == "__main__":
    main()
