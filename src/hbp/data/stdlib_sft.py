"""The embedded data set: supervised samples made from the Python standard library's own sources on this machine.

Nothing is shipped and nothing downloaded, yet the text is real and its lengths are as mixed as in long-context tuning:

- short samples, a function each: "signature and docstring → body", or "body → docstring";
- long samples, a module each: "source → what it is for", or "first part → the rest", drawn evenly over the logarithm of
  the length so that the few very long modules are not lost among the many small ones.

Written as chat-format JSONL, which :mod:`hbp.data.sources` then reads like any user's file. Same seed and Python give
the same bytes. Tests and idle modules of the library are left out. Licence of the text: PSF.
"""

from __future__ import annotations

import ast
import json
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hbp.errors import HbpError

SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo"}
SHORTEST_BODY = 3
SHORT_MOST_CHARS = 6000
TOKENIZER_BYTES = 4_000_000
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class _Module:
    name: str
    source: str
    tree: ast.Module


def write_dataset(
    path: Path, *, seed: int, short_samples: int, long_samples: int, longest_chars: int | None = None
) -> int:
    """Write the data set as JSONL and return how many samples it has (fewer than asked if the library has fewer).

    Args:
        path: file to write.
        seed: decides which functions and modules are taken, and the order.
        short_samples: function-sized samples.
        long_samples: module-sized samples.
        longest_chars: longest module taken, characters; None for no limit.

    Raises:
        HbpError: this Python has no sources of its library.
    """
    modules = list(_modules())
    if not modules:
        raise HbpError("this Python has no standard library sources; give data.source a file of your own")
    rng = np.random.default_rng(seed)
    short = [pair for module in modules for pair in _function_pairs(module)]
    picked = [short[i] for i in rng.permutation(len(short))[:short_samples]]
    picked += _module_pairs(modules, long_samples, longest_chars, rng)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for i in rng.permutation(len(picked)):
            user, assistant = picked[i]
            messages = [
                {"role": "user", "content": user},
                {"role": "assistant", "content": assistant},
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return len(picked)


def _modules() -> Iterator[_Module]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED & set(name.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield _Module(name.as_posix(), source, ast.parse(source))
        except (OSError, ValueError, SyntaxError):
            continue


def _function_pairs(module: _Module) -> Iterator[tuple[str, str]]:
    """User and assistant texts, one or two for each function of a module."""
    lines = module.source.splitlines(keepends=True)
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.end_lineno is None:
            continue
        statements = node.body
        docstring = ast.get_docstring(node)
        if docstring is not None:
            statements = statements[1:]
        if not statements or node.end_lineno - statements[0].lineno + 1 < SHORTEST_BODY:
            continue
        head = textwrap.dedent("".join(lines[node.lineno - 1 : statements[0].lineno - 1]))
        body = textwrap.dedent("".join(lines[statements[0].lineno - 1 : node.end_lineno]))
        if not head.strip() or len(head) + len(body) > SHORT_MOST_CHARS:
            continue
        yield f"Write the body of this function from {module.name}:\n{head}", body
        if docstring:
            yield f"Write the docstring of this function from {module.name}:\n{body}", docstring


def _module_pairs(
    modules: list[_Module], count: int, longest_chars: int | None, rng: np.random.Generator
) -> list[tuple[str, str]]:
    """Modules drawn evenly over log length, without replacement."""
    fitting = [m for m in modules if SHORT_MOST_CHARS < len(m.source) <= (longest_chars or len(m.source))]
    if not fitting or not count:
        return []
    logs = np.log([len(m.source) for m in fitting])
    free = np.ones(len(fitting), bool)
    pairs = []
    for target in np.linspace(logs.min(), logs.max(), min(count, len(fitting))):
        candidates = np.flatnonzero(free)
        nearest = candidates[np.argsort(np.abs(logs[candidates] - target), kind="stable")[:4]]
        index = int(rng.choice(nearest))
        free[index] = False
        pairs.append(_module_pair(fitting[index], rng))
    return pairs


def _module_pair(module: _Module, rng: np.random.Generator) -> tuple[str, str]:
    docstring = ast.get_docstring(module.tree)
    lines = module.source.splitlines(keepends=True)
    if docstring and rng.random() < 0.3:
        said = module.tree.body[0]
        return f"What is this module for?\n{''.join(lines[: said.lineno - 1] + lines[said.end_lineno :])}", docstring
    cut = int(len(lines) * rng.uniform(0.1, 0.4)) + 1
    return f"Continue the module {module.name}:\n{''.join(lines[:cut])}", "".join(lines[cut:])


def train_tokenizer(jsonl: Path, folder: Path, *, vocab_size: int) -> None:
    """Train a byte-level BPE on a data set's text; save it with a chat template as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(jsonl), trainer)
    pad, _, end = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=end)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def _texts(jsonl: Path) -> Iterator[str]:
    left = TOKENIZER_BYTES
    with jsonl.open(encoding="utf-8") as file:
        for line in file:
            for message in json.loads(line)["messages"]:
                yield message["content"]
            left -= len(line)
            if left < 0:
                return
