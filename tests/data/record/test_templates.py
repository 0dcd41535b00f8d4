"""The rendering is that of ``apply_chat_template``, and tells which text comes from which message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from chat_families import FAMILIES, byte_level, unmarked

from hbp.data.record import load_tokenizer, template_fingerprint, templates
from hbp.data.record.templates import compile_template, described, render
from hbp.errors import HbpError

TALK = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}, {"role": "user", "content": "q2"}]


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_and_its_parts(family: str, prompted: bool) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = unmarked(FAMILIES[family])
    drawn = render(
        compile_template(tokenizer.chat_template), tokenizer.special_tokens_map, TALK, add_generation_prompt=prompted
    )
    assert drawn.text == tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=prompted)
    assert not drawn.marked and drawn.written == {0, 1, 2}
    for number, message in enumerate(TALK):
        begin, end = drawn.turns[number]
        assert message["content"] in drawn.text[begin:end]
        assert not any(m["content"] in drawn.text[begin:end] for m in TALK if m is not message)
        assert begin == drawn.turns[number - 1][1] if number else True
    assert drawn.end == drawn.turns[2][1]


SAID = "{% for m in messages %}{{ m.content }}{% endfor %}"
NAMESPACE = "{% set n = namespace(a=1) %}{% for m in messages %}{% set n.a = m.role %}{% endfor %}"
MACRO = "{% macro end() %}{% if add_generation_prompt %}A{% endif %}{% endmacro %}"


@pytest.mark.parametrize(
    ("template", "steady"),
    [
        (SAID, True),
        (SAID + "{% if add_generation_prompt %}A:{% endif %}", True),
        (SAID + "{% if add_generation_prompt %}A:{% if thinking is defined %}<think>{% endif %}{% endif %}", True),
        (SAID.replace("{% endfor", "{% if loop.last and add_generation_prompt %}A:{% endif %}{% endfor"), True),
        (SAID + "{{ 'A:' if add_generation_prompt else eos_token }}", True),
        (SAID + "{% if add_generation_prompt %}{{ messages[0].role }}{% endif %}", False),
        (NAMESPACE + "{% if add_generation_prompt and n.a %}A:{% endif %}", False),
        (SAID.replace("{% endfor", "{% if m.role %}{{ 'A' if add_generation_prompt }}{% endif %}{% endfor"), False),
        ("{% set p = add_generation_prompt %}" + SAID + "{% if p %}A{% endif %}", False),
        (SAID + "{% if add_generation_prompt and tools %}T:{% endif %}", False),
        (MACRO + SAID.replace("{% endfor", "{{ end() }}{% endfor"), False),
    ],
)
def test_whether_the_generation_prompt_looks_at_messages(template: str, steady: bool) -> None:
    assert compile_template(template).steady is steady


def test_a_message_that_is_written_in_two_places_has_no_single_part() -> None:
    template = "{% for m in messages %}{{ m.role }} {% endfor %}{% for m in messages %}{{ m.content }};{% endfor %}"
    drawn = render(compile_template(template), {}, TALK)
    assert drawn.text == "user assistant user q1;a1;q2;"
    assert not drawn.turns and drawn.written == {0, 1, 2}


def test_reasoning_under_every_usual_name() -> None:
    for field in ("reasoning_content", "thinking", "reasoning"):
        for name in ("reasoning_content", "thinking"):
            template = "{% for m in messages %}{{ m." + name + " }}{% endfor %}"
            assert render(compile_template(template), {}, [{"role": "assistant", field: "r"}]).text == "r"


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_templates_stay_in_their_sandbox(template: str) -> None:
    with pytest.raises(Exception, match=r"unsafe|not safely callable"):
        render(compile_template(template), {}, TALK)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    tokenizer: Any = byte_level()
    tokenizer.chat_template = FAMILIES["chatml"]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_another_template_from_a_file(folder: str, tmp_path: Path) -> None:
    assert load_tokenizer(folder).chat_template == FAMILIES["chatml"]
    (tmp_path / "my.jinja").write_text(FAMILIES["gemma"], encoding="utf-8")
    other = load_tokenizer(folder, str(tmp_path / "my.jinja"))
    assert other.chat_template == FAMILIES["gemma"]
    assert template_fingerprint(other) != template_fingerprint(load_tokenizer(folder))
    (tmp_path / "broken.jinja").write_bytes(b"\xff")
    with pytest.raises(HbpError, match="cannot read the chat template"):
        load_tokenizer(folder, str(tmp_path / "broken.jinja"))


def test_a_template_that_is_not_there(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hbp.data.record.templates.find_spec", lambda name: None)
    with pytest.raises(HbpError, match=r"'no.jinja' is no file, and names of templates need TRL"):
        load_tokenizer(folder, "no.jinja")


def test_names_of_templates_come_from_trl(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "trl" / "chat_templates"
    shipped.mkdir(parents=True)
    (shipped / "cat.jinja").write_text(unmarked(FAMILIES["chatml"]))
    (shipped / "cat_training.jinja").write_text(FAMILIES["chatml"] + "{# trained #}")

    class Spec:
        submodule_search_locations = (str(tmp_path / "trl"),)

    monkeypatch.setattr("hbp.data.record.templates.find_spec", lambda name: Spec)
    assert load_tokenizer(folder, "cat_training").chat_template.endswith("{# trained #}")
    with pytest.raises(HbpError, match="'dog' is no file and no template of TRL's; those are cat_training"):
        load_tokenizer(folder, "dog")
    assert load_tokenizer(folder, "training").chat_template == FAMILIES["chatml"]  # has marks already
    stock: Any = byte_level()
    stock.chat_template = unmarked(FAMILIES["chatml"])
    stock.save_pretrained(tmp_path / "stock")
    assert load_tokenizer(str(tmp_path / "stock"), "training").chat_template.endswith("{# trained #}")
    stock.chat_template = unmarked(FAMILIES["gemma"])
    stock.save_pretrained(tmp_path / "stock")
    with pytest.raises(HbpError, match="TRL has no training version of this tokenizer's chat template"):
        load_tokenizer(str(tmp_path / "stock"), "training")


def test_no_tokenizer_there(tmp_path: Path) -> None:
    with pytest.raises(HbpError, match="cannot load a tokenizer from") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(HbpError, match=r"\(there is no such file or folder\); give its folder or hub"):
        load_tokenizer("./nowhere")


def test_which_template_is_in_use_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what to set where a template that has no marks writes earlier answers otherwise than the last."""
    monkeypatch.setattr(templates, "find_spec", lambda name: None)  # TRL is not installed
    tokenizer = byte_level()

    def said(template: Any, choice: str | None = None) -> str:
        tokenizer.chat_template = template
        return described(tokenizer, choice)

    assert "{% generation %} marks say what is learnt" in said(FAMILIES["chatml"])
    plain = said(unmarked(FAMILIES["chatml"]))
    assert "found by running it" in plain and "otherwise" not in plain
    assert "earlier answers otherwise than the last" in (qwen3 := said(unmarked(FAMILIES["qwen3"])))
    assert "data.chat_template: FILE, or pip install trl" in qwen3
    assert said("", "my.jinja") == "chat template: data.chat_template=my.jinja"
    assert "none; more than a question" in said(None)
    assert said({"default": "a", "tool_use": "b"}) == "chat template: the tokenizer's own (default, tool_use)"
    assert "found by running it" in said("{% for %}")  # no template at all is said of the record that needs it
