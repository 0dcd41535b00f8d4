"""Tokenization against `datasets.map`: speed with as many processes, memory, and whether the masks are the reference's.

Data are made by this script: chats of one to four turns, some with a system prompt, from this Python's own sources, no
two alike. Sides run in turn, each in processes of its own, from the file on disk to the tokens on disk, nothing cached:

- `hbp`: :func:`hbp.data.build.build_store`.
- `datasets map`: `load_dataset("json").map(batched=True)` with the very function that `hbp` encodes with, 256 records a
  call, so that what differs is reading, moving and writing.
- `datasets map, one by one`: the same without batches over `apply_chat_template(return_assistant_tokens_mask=True)`, as
  TRL's trainer tokenizes.

Each side is timed by the clock and in processor time, its own and its processes'; the second is less troubled by what
else runs. Memory is the greatest sum over a side's processes of their resident memory, five times a second; pages that
they share count in each. Masks are compared with those of TRL's `SFTTrainer` where TRL is installed, else with
`apply_chat_template`'s and the tokenizer's: chats (template with generation marks), prompts with completions as
messages, and as texts.

    python benchmarks/data.py [--quick] [--json] [--gib SIZE] [--processes N] [--out benchmarks/results/data.json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

COMPARED = 400
"""Records whose masks are compared."""
GIB = 1 << 30
SNIPPETS, BLOCK = 4000, 250
SIDES = ("hbp", "datasets map", "datasets map, one by one")


def write_data(path: Path, size: int, seed: int = 0) -> int:
    """JSON Lines of about `size` bytes; returns the records."""
    rng, root = random.Random(seed), Path(sysconfig.get_paths()["stdlib"])
    lines = [
        line
        for file in sorted(root.glob("*.py"))
        for line in file.read_text(errors="ignore").splitlines()
        if len(line) > 20
    ]
    snippets = [
        json.dumps("\n".join(lines[at : at + int(min(rng.lognormvariate(2.0, 1.0), 200)) + 1]))[1:-1]
        for at in (rng.randrange(len(lines) - 200) for _ in range(SNIPPETS))
    ]
    n = written = 0
    with path.open("w") as out:
        while written < size:
            block = []
            for _ in range(BLOCK):
                turns = ['{"role": "system", "content": "Be brief."}'] if n % 5 == 0 else []
                for turn in range(rng.randint(1, 4)):
                    asked, said = rng.choice(snippets), rng.choice(snippets)
                    turns.append(f'{{"role": "user", "content": "{n}.{turn} {asked}"}}')
                    turns.append(f'{{"role": "assistant", "content": "{said}"}}')
                block.append('{"messages": [' + ", ".join(turns) + "]}\n")
                n += 1
            written += out.write("".join(block))
    return n


# A side, in a process of its own


def work(side: str, data: str, tokenizer: str, out: str, processes: int, piece: int | None) -> dict[str, Any]:
    from hbp.data.build import build_store, recipe_of
    from hbp.data.record import encode_records, load_tokenizer
    from hbp.data.sources import Source

    loaded = load_tokenizer(tokenizer)
    recipe = recipe_of(tokenizer)
    began, busy = time.perf_counter(), processor_s()
    if side == "hbp":
        store = build_store(Path(out), [Source(data)], recipe, processes=processes, piece_bytes=piece)
        return {
            "seconds": time.perf_counter() - began,
            "processor_s": processor_s() - busy,
            "samples": len(store),
            "tokens": int(store.lengths.sum(dtype="int64")),
        }
    import datasets

    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def batch(rows: dict[str, list[Any]]) -> dict[str, Any]:
        names = list(rows)
        records = [dict(zip(names, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        samples = [outcome.samples[0] for outcome in encode_records(records, loaded)]
        return {"input_ids": [s.input_ids for s in samples], "loss_mask": [s.loss_mask for s in samples]}

    def one(row: dict[str, Any]) -> dict[str, Any]:
        made = loaded.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": made["input_ids"], "loss_mask": made["assistant_masks"]}

    rows = datasets.load_dataset("json", data_files=data, split="train", cache_dir=out, num_proc=1)
    how: dict[str, Any] = {"batched": True, "batch_size": 256} if side == SIDES[1] else {}
    made = rows.map(batch if how else one, num_proc=processes, remove_columns=rows.column_names, **how)
    seconds, busy = time.perf_counter() - began, processor_s() - busy
    return {
        "seconds": seconds,
        "processor_s": busy,
        "samples": len(made),
        "tokens": sum(map(len, made["input_ids"])) if len(made) < 1e5 else 0,
    }


def processor_s() -> float:
    """Of this process and of those that it has seen end."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def run_side(side: str, data: Path, tokenizer: Path, processes: int, piece: int | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=data.parent) as out:
        arguments = [side, str(data), str(tokenizer), out, str(processes), str(piece or 0)]
        command = [sys.executable, __file__, "--worker", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        peak = [0]
        watching = threading.Thread(target=watch, args=(process, peak), daemon=True)
        watching.start()
        said, _ = process.communicate()
        watching.join()
        if process.returncode:
            raise SystemExit(f"{side} failed")
    return {"side": side, **json.loads(said.splitlines()[-1]), "peak_rss_gib": peak[0] / GIB}


def watch(process: subprocess.Popen[str], peak: list[int]) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    while process.poll() is None:
        total, waiting = 0, [process.pid]
        while waiting:
            pid = waiting.pop()
            try:
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
                for task in Path(f"/proc/{pid}/task").iterdir():
                    waiting += map(int, (task / "children").read_text().split())
            except OSError:  # gone meanwhile
                continue
        peak[0] = max(peak[0], total)
        time.sleep(0.2)


# Masks


def masks(data: Path, folder: Path) -> dict[str, Any]:
    """Whether token ids and what is learnt of them equal the reference's, and what that is."""
    from hbp.data.record import encode_records, load_tokenizer

    with data.open() as lines:
        chats = [json.loads(line) for _, line in zip(range(COMPARED), lines, strict=False)]
    halves = [{"prompt": c["messages"][:-1], "completion": c["messages"][-1:]} for c in chats]
    texts = [{"prompt": c["messages"][-2]["content"], "completion": c["messages"][-1]["content"]} for c in chats]
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    ours = [
        [
            (o.samples[0].input_ids.tolist(), o.samples[0].loss_mask.astype(bool).tolist())
            for o in encode_records(rows, tokenizer)
        ]
        for rows in (chats, halves, texts)
    ]
    if find_spec("trl") is None:
        reference, theirs = "apply_chat_template", _by_template(chats, halves, texts, tokenizer)
    else:
        import trl

        reference = f"TRL {trl.__version__}"
        theirs = [_by_trl(chats, tokenizer, folder, assistant_only_loss=True)]
        theirs += [_by_trl(rows, tokenizer, folder) for rows in (halves, texts)]
    equal = [a == b for a, b in zip(ours, theirs, strict=True)]
    return {
        "masks_equal": all(equal),
        "masks_equal_on": dict(zip(("messages", "prompt and completion, messages", "and texts"), equal, strict=True)),
        "reference": reference,
    }


Tokens = list[tuple[list[int], list[bool]]]


def _by_template(chats: list[Any], halves: list[Any], texts: list[Any], tokenizer: Any) -> list[Tokens]:
    made = [
        tokenizer.apply_chat_template(c["messages"], return_dict=True, return_assistant_tokens_mask=True) for c in chats
    ]
    learnt = [(m["input_ids"], [bool(x) for x in m["assistant_masks"]]) for m in made]

    def behind(prompt: list[int], whole: list[int]) -> tuple[list[int], list[bool]]:
        """What a prompt is followed by is learnt, from the first token on that differs."""
        same = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        return whole, [i >= same for i in range(len(whole))]

    def laid_out(messages: list[Any], **options: Any) -> list[int]:
        return tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]

    answers = [
        behind(laid_out(h["prompt"], add_generation_prompt=True), laid_out(h["prompt"] + h["completion"]))
        for h in halves
    ]
    raw = [
        behind(
            tokenizer(t["prompt"])["input_ids"],
            tokenizer(t["prompt"] + t["completion"] + tokenizer.eos_token)["input_ids"],
        )
        for t in texts
    ]
    return [learnt, answers, raw]


def _by_trl(rows: list[Any], tokenizer: Any, folder: Path, **options: Any) -> Tokens:
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes))
    config = SFTConfig(
        str(folder / "trl"), max_length=None, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, **options
    )
    trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in trainer.train_dataset]


def measure(
    gib: float, processes: int, rounds: int, sides: list[str], scratch: Path, piece: int | None
) -> dict[str, Any]:
    from hbp.data.stdlib_sft import train_tokenizer

    data, tokenizer = scratch / "data.jsonl", scratch / "tokenizer"
    began = time.perf_counter()
    records = write_data(data, int(gib * GIB))
    print(
        f"made {data.stat().st_size / GIB:.3f} GiB, {records:,} records, {time.perf_counter() - began:.0f} s",
        file=sys.stderr,
    )
    train_tokenizer(data, tokenizer, vocab_size=8192)
    runs = []
    for _ in range(rounds):
        for side in sides:
            runs.append(run_side(side, data, tokenizer, processes, piece))
            print(json.dumps(runs[-1]), file=sys.stderr)

    def median(side: str, clock: str = "seconds") -> float:
        return statistics.median([run["samples"] / run[clock] for run in runs if run["side"] == side])

    ours = median("hbp")
    ratios = {side: ours / median(side) for side in sides[1:]}
    busy = {side: median("hbp", "processor_s") / median(side, "processor_s") for side in sides[1:]}
    return {
        "samples_per_s": ours,
        "ratio_to_datasets_map": ratios.get(SIDES[1]),
        "ratio_in_processor_time": busy.get(SIDES[1]),
        "ratio_to_datasets_map_one_by_one": ratios.get(SIDES[2]),
        **masks(data, scratch),
        "peak_rss_gib": max(run["peak_rss_gib"] for run in runs if run["side"] == "hbp"),
        "mib_per_s": ours * data.stat().st_size / records / (1 << 20),
        "gib": data.stat().st_size / GIB,
        "processes": processes,
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 MiB, one round, under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--gib", type=float, help="size of the data (default 1)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sides", type=int, default=3, help="how many of the sides, ours first")
    parser.add_argument("--piece-mib", type=int, help="of our pieces (default: by the file's size)")
    parser.add_argument("--scratch", type=Path, help="folder for data and tokens (default: the system's)")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        *paths, processes, piece = args.worker
        print(json.dumps(work(*paths, int(processes), int(piece) or None)))
        return
    piece = args.piece_mib and args.piece_mib << 20
    gib = args.gib or (4 / 1024 if args.quick else 1.0)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        result = measure(gib, args.processes, args.rounds, list(SIDES[: args.sides]), Path(scratch), piece)
    result |= {
        "device": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/data.py " + " ".join(sys.argv[1:]),
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        if key != "runs":
            print(f"{key:<34}{value}")


if __name__ == "__main__":
    main()
