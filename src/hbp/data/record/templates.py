"""The chat template: which one, what it reads, and a rendering that tells which text comes from which message.

A template is a Jinja program, so where a message's text begins and ends is known only while it runs. Every ``for`` of
the template's syntax tree is given a call at the start of its body and one behind it; the call notes how much text has
been written so far and which message the loop stands at. One rendering then yields the text, the spans that the
template marks with ``{% generation %}``, and each message's own part of the text, whatever the template does with the
messages before or behind it (stock Qwen3 takes the reasoning out of earlier turns, so no rendering of a prefix helps).

The syntax tree comes from the environment in which transformers compiles templates (sandbox, filters, functions), so
the text is that of ``apply_chat_template``; tests hold it to that.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.visitor import NodeTransformer

from hbp.errors import HbpError, not_loaded

TRAINING, OWN = "training", "own"
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning; a template reads one of them, data sets use any, transformers fills in the others."""
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TURN = "hbp_turn"
PROMPT = "add_generation_prompt"
Span = tuple[int, int]


def load_tokenizer(name_or_folder: str, chat_template: str | None = None) -> Any:
    """A Hugging Face tokenizer, with another chat template than its own where one is named.

    Args:
        name_or_folder: of the tokenizer.
        chat_template: a Jinja file; ``training``: the training version that TRL has of the tokenizer's own; the name
            of a template that TRL ships, such as ``qwen3_training``; ``own`` or none: the tokenizer's own.

    Raises:
        HbpError: there is no such tokenizer or template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = not_loaded(name_or_folder, error)
        raise HbpError(
            f"cannot load a tokenizer from {name_or_folder!r} ({reason}); give its folder or hub name"
        ) from None
    if chat_template not in (None, OWN):
        tokenizer.chat_template = _chosen(tokenizer, str(chat_template))
    return tokenizer


def _chosen(tokenizer: Any, choice: str) -> str:
    if Path(choice).is_file():
        try:
            return Path(choice).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise HbpError(f"cannot read the chat template {choice} ({error})") from None
    shipped = _shipped()
    if shipped is None:
        raise HbpError(
            f"data.chat_template {choice!r} is no file, and names of templates need TRL; give a Jinja file, or "
            "pip install trl"
        )
    if choice == TRAINING:
        return _training_version(tokenizer)
    if not (shipped / f"{choice}.jinja").is_file():
        names = ", ".join(sorted(p.stem for p in shipped.glob("*_training.jinja"))) or "none"
        raise HbpError(f"data.chat_template {choice!r} is no file and no template of TRL's; those are {names}")
    return (shipped / f"{choice}.jinja").read_text(encoding="utf-8")


def _shipped() -> Path | None:
    """TRL's folder of chat templates; none where it is not installed."""
    spec = find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "chat_templates"


def _training_version(tokenizer: Any) -> str:
    """What ``SFTTrainer`` puts in the place of the tokenizer's own template."""
    own = template_text(tokenizer)
    if own is None:
        raise HbpError("data.chat_template 'training' needs a tokenizer that has a chat template; give a Jinja file")
    if _MARK.search(own):
        return own
    if (trained := training_version(tokenizer)) is None:
        raise HbpError(
            "data.chat_template 'training': TRL has no training version of this tokenizer's chat template; give a "
            "Jinja file with {% generation %} marks, or leave the option out"
        )
    return trained[1]


def training_version(tokenizer: Any) -> tuple[str, str] | None:
    """Name and text of the training version that TRL has of a tokenizer's stock template, as ``SFTTrainer`` takes it.

    None where TRL is not installed or does not know the template, where the template has marks of its own, and where
    the tokenizer has several.
    """
    own, shipped = getattr(tokenizer, "chat_template", None), _shipped()
    if not isinstance(own, str) or shipped is None or _MARK.search(own):
        return None
    for trained in sorted(shipped.glob("*_training.jinja")):
        stock = shipped / trained.name.replace("_training", "")
        if stock.is_file() and stock.read_text(encoding="utf-8") == own:
            return trained.stem, trained.read_text(encoding="utf-8")
    return None


def described(tokenizer: Any, choice: str | None) -> str:
    """Which template lays conversations out, and what to set for another, in a line.

    Args:
        tokenizer: loaded with that choice.
        choice: ``data.chat_template``.
    """
    if choice not in (None, OWN):
        return f"chat template: data.chat_template={choice}"
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, Mapping):
        return f"chat template: the tokenizer's own ({', '.join(map(str, own))})"
    if not own:
        return "chat template: none; more than a question and its answer needs one (data.chat_template: FILE)"
    if _MARK.search(own):
        return "chat template: the tokenizer's own; its {% generation %} marks say what is learnt"
    trained = training_version(tokenizer)
    if choice is None and trained is not None:
        return (
            f"chat template: TRL's {trained[0]} for conversations, in place of the stock one, as SFTTrainer has it "
            "(data.chat_template: own keeps the tokenizer's)"
        )
    line = "chat template: the tokenizer's own; it has no {% generation %} marks, so turns are found by running it"
    if not _earlier_as_last(own, tokenizer.special_tokens_map):
        line += "; it writes earlier answers otherwise than the last (without their reasoning): "
        line += (
            f"data.chat_template={TRAINING} is TRL's version that does not"
            if trained
            else (
                "give a training version (data.chat_template: FILE"
                + (")" if _shipped() else ", or pip install trl, which has those of most families)")
            )
        )
    return line


def _earlier_as_last(text: str, special_tokens: Mapping[str, Any]) -> bool:
    """Whether a template writes the same answer alike in every place, with its reasoning or without."""
    asked, plain = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    for said in (plain, {**plain, "reasoning_content": "r"}):
        try:
            whole = render(compile_template(text), special_tokens, [asked, said, asked, said])
        except Exception:  # a template raises what its author chose
            continue
        first, last = (whole.text[slice(*whole.turns.get(number, (0, 0)))] for number in (1, 3))
        if first.rstrip() != last.rstrip():
            return False
    return True


def template_text(tokenizer: Any, tools: Any = None) -> str | None:
    """Source of the chat template in use, or none. A tokenizer may have a second one for conversations with tools."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    if isinstance(template, Mapping):
        return str(tokenizer.get_chat_template(None, tools))
    return str(template)


@dataclass(frozen=True, eq=False)
class Template:
    """A compiled chat template and what can be known of it without running it."""

    program: jinja2.Template
    marked: bool
    """It marks the assistant's text with ``{% generation %}``."""
    variables: frozenset[str]
    """What it reads besides its own: ``messages``, ``tools``, ``enable_thinking`` and so on."""
    fields: frozenset[str] | None
    """Every name that it could look up in a message; none: it may read all, since it writes messages out whole."""
    steady: bool
    """Its generation prompt is the same behind any messages."""

    def reads(self, field: str) -> bool:
        """Whether a message's field may have an effect."""
        return self.fields is None or field in self.fields


@dataclass(frozen=True, eq=False)
class Rendering:
    """Text of a conversation. Spans are ``[begin, end)`` in characters."""

    text: str
    marked: list[Span]
    """Of the template's ``{% generation %}`` marks, in order."""
    turns: dict[int, Span]
    """Message number to the part of the text that the template wrote while its loop stood at it, if one part only."""
    written: frozenset[int]
    """Messages with at least one part."""
    end: int
    """Where the last loop over messages ended."""


@lru_cache(maxsize=64)
def compile_template(text: str) -> Template:
    """Compile a template with calls that note each message's place in the text.

    Raises:
        jinja2.TemplateError: it is not a template.
    """
    # The one private name that we need: the environment is not to be had otherwise, and a copy of its sandbox rules
    # and filters would drift from the text that users get at inference. Both ends of the supported range have it.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(text).environment
    tree = environment.parse(text)
    variables = frozenset(meta.find_undeclared_variables(tree))
    fields, steady = _fields(tree), _steady(tree, variables)
    tree = _NoteTurns().visit(tree)
    tree.set_environment(environment)
    return Template(environment.from_string(tree), bool(_MARK.search(text)), variables, fields, steady)


class _NoteTurns(NodeTransformer):
    """Adds the calls to every ``for`` over single names."""

    def __init__(self) -> None:
        self.loops = 0

    def visit_For(self, node: nodes.For) -> Any:
        self.generic_visit(node)
        if not isinstance(node.target, nodes.Name):
            return node
        self.loops += 1
        note = self._note(_message_of(node), node.lineno)
        node.body = [note, *node.body]
        return [node, self._note(nodes.Const(None), node.lineno)]

    def _note(self, message: nodes.Expr, line: int) -> nodes.Output:
        call = nodes.Call(nodes.Name(_TURN, "load"), [nodes.Const(self.loops), message], [], None, None)
        output = nodes.Output([call])
        output.set_lineno(line)
        return output


def _message_of(loop: nodes.For) -> nodes.Expr:
    """What the loop stands at: its variable, or ``messages[i]`` in a loop over numbers (EXAONE 4's)."""
    variable = nodes.Name(loop.target.name, "load")  # type: ignore[attr-defined]
    if not (isinstance(loop.iter, nodes.Call) and _mentions_messages(loop.iter)):
        return variable
    for part in (item for statement in loop.body for item in statement.find_all(nodes.Getitem)):
        if part.arg == variable and isinstance(part.node, nodes.Name) and _mentions_messages(part.node):
            return nodes.Getitem(nodes.Name(part.node.name, "load"), variable, "load")
    return variable


def _fields(tree: nodes.Template) -> frozenset[str] | None:
    """Attribute names and constant strings; none where a loop's message is written out or walked through whole."""
    turns = {
        loop.target.name
        for loop in tree.find_all(nodes.For)
        if isinstance(loop.target, nodes.Name) and _mentions_messages(loop.iter)
    }
    turns |= {
        given.target.name
        for given in tree.find_all(nodes.Assign)
        if isinstance(given.target, nodes.Name)
        and isinstance(given.node, nodes.Getitem)
        and not isinstance(given.node.arg, nodes.Slice)
        and _mentions_messages(given.node)
    }
    whole = [f.node for f in tree.find_all(nodes.Filter) if f.name in ("tojson", "items", "string", "dictsort")]
    whole += [g.node for g in tree.find_all(nodes.Getattr) if g.attr in ("items", "values")]
    if any(isinstance(node, nodes.Name) and node.name in turns for node in whole):
        return None
    names = {node.attr for node in tree.find_all(nodes.Getattr)}
    return frozenset(names | {c.value for c in tree.find_all(nodes.Const) if isinstance(c.value, str)})


def _mentions_messages(node: nodes.Node) -> bool:
    return any("messages" in n.name for n in (node, *node.find_all(nodes.Name)) if isinstance(n, nodes.Name))


def _steady(tree: nodes.Template, variables: frozenset[str]) -> bool:
    """Whether every mention of ``add_generation_prompt`` stands in a condition that looks at no message.

    Such a condition stands at the top of the template or right in a loop there (``loop.last``), and it and what hangs
    on it name only what the template is given besides messages, tools and documents.
    """
    harmless = variables - {"messages", "tools", "documents"} | {"loop", PROMPT}
    top = [node for part in tree.body for node in ([part, *part.body] if isinstance(part, nodes.For) else [part])]
    conditions = [
        node
        for node in top
        if isinstance(node, (nodes.If, nodes.Output)) and any(name.name == PROMPT for name in node.find_all(nodes.Name))
    ]
    apart = {id(name) for node in conditions for name in node.find_all(nodes.Name)}
    if any(n.name == PROMPT and id(n) not in apart for n in tree.find_all(nodes.Name)):
        return False
    return all(name.name in harmless for node in conditions for name in node.find_all(nodes.Name))


def render(
    template: Template,
    special_tokens: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = False,
) -> Rendering:
    """Render a conversation, noting what came from which message.

    Args:
        template: from :func:`compile_template`.
        special_tokens: ``tokenizer.special_tokens_map``.
        messages: as the data has them.
        tools: JSON schemas of functions.
        documents: for retrieval templates.
        variables: further ones of the template, ``chat_template_kwargs``.
        add_generation_prompt: end with what the assistant's next turn begins with.

    Raises:
        Exception: whatever the template raises.
    """
    seen = [_plain(message) for message in messages]
    number = {id(message): i for i, message in enumerate(seen)}
    notes: list[tuple[int, int | None, int]] = []
    blocks: list[str] = []
    length = 0

    def note(loop: int, message: Any) -> str:
        notes.append((loop, None if message is None else number.get(id(message), -1), length))
        return ""

    marked: list[Span] = []
    given = {**special_tokens, **(variables or {}), _TURN: note, PROMPT: add_generation_prompt}
    environment: Any = template.program.environment
    with environment.activate_tracker(blocks, marked):
        for block in template.program.generate(messages=seen, tools=tools, documents=documents, **given):
            blocks.append(block)
            length += len(block)
    parts, end = _parts(notes, length)
    turns = {message: spans[0] for message, spans in parts.items() if len(spans) == 1}
    return Rendering("".join(blocks), marked, turns, frozenset(parts), end)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers hands it to a template: without empty fields, its reasoning under every usual name."""
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in REASONING if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _parts(notes: list[tuple[int, int | None, int]], length: int) -> tuple[dict[int, list[Span]], int]:
    """Each message's parts of the text, from the outermost loops over messages; ``-1`` stands for anything else."""
    parts: dict[int, list[Span]] = {}
    end = length
    for message, begin, stop, last in _steps(notes):
        if message >= 0 and stop > begin:
            parts.setdefault(message, []).append((begin, stop))
        if last:
            end = stop
    return parts, end


def _steps(notes: list[tuple[int, int | None, int]]) -> Iterator[tuple[int, int, int, bool]]:
    """Message, begin, end, and whether the loop ended there. Loops inside a turn's own step do not count."""
    active, current, begin = 0, -1, 0
    for loop, message, position in notes:
        if not active:
            if message is not None and message >= 0:
                active, current, begin = loop, message, position
        elif loop == active:
            yield current, begin, position, message is None
            if message is None:
                active = 0
            else:
                current, begin = message, position


def template_fingerprint(tokenizer: Any) -> str:
    """Changes when a tokenizer's chat templates do; for what is made with them."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()
