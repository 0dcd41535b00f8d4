"""Chat templates in the manner of published model families, written for these tests, and tokenizers to try them with.

Each has ``{% generation %}`` marks around what the assistant says and its end of turn; :func:`unmarked` takes them out,
as most models are published. Lengths of rules are kept, wording is not.
"""

# ruff: noqa: E501
from __future__ import annotations

import re
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

G, E = "{% generation %}", "{% endgeneration %}"
ALTERNATE = "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
HERMES_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}"
    "{% endif %}{{ '# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}"
    "{{ '\n</tools><|im_end|>\n' }}{% elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
)
HERMES_CALLS = (
    "{% for call in message.tool_calls %}{% if call.function %}{% set call = call.function %}{% endif %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' + (call.arguments | tojson) + '
    "'}\n</tool_call>' }}"
    "{% endfor %}"
)
HERMES_ANSWERS = (
    "{% elif message.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{ '<|im_start|>user' }}{% endif %}{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
)

FAMILIES = {
    "chatml": (
        "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        + G
        + "{{ message.content + '<|im_end|>\n' }}"
        + E
        + "{% else %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # A default system prompt inside the loop's first step.
    "qwen1.5": (
        "{% for message in messages %}{% if loop.first and messages[0].role != 'system' %}"
        "{{ '<|im_start|>system\nYou are a cat.<|im_end|>\n' }}{% endif %}{% if message.role == 'assistant' %}"
        "{{ '<|im_start|>assistant\n' }}" + G + "{{ message.content + '<|im_end|>' }}" + E + "{{ '\n' }}{% else %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama2": (
        "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content %}"
        "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}"
        + ALTERNATE
        + "{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + "
        "message.content %}{% else %}{% set content = message.content %}{% endif %}{% if message.role == 'user' %}"
        "{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}{% elif message.role == 'assistant' %}"
        + G
        + "{{ ' ' + content | trim + ' ' + eos_token }}"
        + E
        + "{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{% for message in messages %}{% set head = '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' %}"
        "{% if loop.index0 == 0 %}{% set head = bos_token + head %}{% endif %}{{ head }}"
        "{% if message.role == 'assistant' %}"
        + G
        + "{{ message.content | trim + '<|eot_id|>' }}"
        + E
        + "{% else %}{{ message.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for message in rest %}"
        + ALTERNATE
        + "{% if message.role == 'user' %}{% if loop.first and system is defined %}"
        "{{ '[INST]' + system + '\n\n' + message.content + '[/INST]' }}{% else %}{{ '[INST]' + message.content + "
        "'[/INST]' }}{% endif %}{% elif message.role == 'assistant' %}"
        + G
        + "{{ message.content + eos_token }}"
        + E
        + "{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for message in messages %}" + ALTERNATE + "{% if message.role == 'assistant' %}"
        "{{ '<start_of_turn>model\n' }}" + G + "{{ message.content | trim + '<end_of_turn>\n' }}" + E + "{% else %}"
        "{{ '<start_of_turn>' + message.role + '\n' + message.content | trim + '<end_of_turn>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    # An end token behind the last turn, in place of the generation prompt.
    "phi3": (
        "{% for message in messages %}{{ '<|' + message.role + '|>\n' }}{% if message.role == 'assistant' %}"
        + G
        + "{{ message.content + '<|end|>\n' }}"
        + E
        + "{% else %}{{ message.content + '<|end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% elif messages[-1].role == 'assistant' %}"
        + G
        + "{{ eos_token }}"
        + E
        + "{% else %}{{ eos_token }}{% endif %}"
    ),
    "phi4": (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '<|im_sep|>' }}"
        "{% if message.role == 'assistant' %}"
        + G
        + "{{ message.content + '<|im_end|>' }}"
        + E
        + "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
    ),
    # The generation prompt stands inside the loop.
    "zephyr": (
        "{% for message in messages %}{{ '<|' + message.role + '|>\n' }}{% if message.role == 'assistant' %}"
        + G
        + "{{ message.content + eos_token + '\n' }}"
        + E
        + "{% else %}{{ message.content + eos_token + '\n' }}"
        "{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
    ),
    "qwen2.5": (
        HERMES_TOOLS + "{% else %}{{ '<|im_start|>system\nYou are a cat.<|im_end|>\n' }}{% endif %}"
        "{% for message in messages %}{% if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% elif message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        + G
        + "{{ message.content }}"
        + HERMES_CALLS
        + "{{ '<|im_end|>\n' }}"
        + E
        + HERMES_ANSWERS
        + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Earlier turns lose their reasoning; the last has a think block even where nothing was thought.
    "qwen3": (
        HERMES_TOOLS + "{% endif %}{% set ns = namespace(open=true, last=messages | length - 1) %}"
        "{% for message in messages[::-1] %}{% set index = (messages | length - 1) - loop.index0 %}"
        "{% if ns.open and message.role == 'user' %}{% set ns.open = false %}{% set ns.last = index %}{% endif %}"
        "{% endfor %}{% for message in messages %}"
        "{% if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% elif message.role == 'assistant' %}{% set content = message.content %}{% set thought = '' %}"
        "{% if message.reasoning_content is string %}{% set thought = message.reasoning_content %}"
        "{% elif '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
        + G
        + "{% if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' + thought.strip('\n') + "
        "'\n</think>\n\n' + content.lstrip('\n') }}{% else %}{{ content }}{% endif %}"
        + HERMES_CALLS
        + "{{ '<|im_end|>\n' }}"
        + E
        + HERMES_ANSWERS
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
    ),
    # Reasoning is cut from every turn, and the generation prompt opens a think block.
    "deepseek-r1-distill": (
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
        "{% set ns = namespace(answered=false, system='') %}{% for message in messages %}"
        "{% if message.role == 'system' %}{% set ns.system = message.content %}{% endif %}{% endfor %}"
        "{{ bos_token }}{{ ns.system }}{% for message in messages %}{% if message.role == 'user' %}"
        "{% set ns.answered = false %}{{ '<｜User｜>' + message.content }}{% elif message.role == 'assistant' %}"
        "{% if ns.answered %}{{ '<｜tool▁outputs▁end｜>' }}{% set ns.answered = false %}{% else %}"
        "{{ '<｜Assistant｜>' }}{% endif %}{% set content = message.content %}{% if '</think>' in content %}"
        "{% set content = content.split('</think>')[-1] %}{% endif %}" + G + "{{ content }}"
        "{% for call in message.tool_calls %}{{ '<｜tool▁call▁begin｜>' + call.function.name + '\n' + "
        "call.function.arguments + '<｜tool▁call▁end｜>' }}{% endfor %}{{ '<｜end▁of▁sentence｜>' }}"
        + E
        + "{% elif message.role == 'tool' %}{% set ns.answered = true %}{{ '<｜tool▁output▁begin｜>' + message.content + "
        "'<｜tool▁output▁end｜>' }}{% endif %}{% endfor %}{% if ns.answered %}{{ '<｜tool▁outputs▁end｜>' }}{% endif %}"
        "{% if add_generation_prompt and not ns.answered %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
    ),
    "vicuna": (
        "{% if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}{% else %}{{ 'A chat. ' }}{% endif %}"
        "{% for message in messages %}{% if message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}"
        "{% elif message.role == 'assistant' %}{{ 'ASSISTANT:' }}"
        + G
        + "{{ ' ' + message.content + eos_token }}"
        + E
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "command-r": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
        "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + messages[0].content + '<|END_OF_TURN_TOKEN|>' }}{% else %}"
        "{% set rest = messages %}{% endif %}{% for message in rest %}"
        + ALTERNATE
        + "{% set content = message.content %}{% if message.role == 'user' %}"
        "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
        "{% elif message.role == 'assistant' %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}"
        + G
        + "{{ content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
        + E
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
    ),
    # Another end for the last turn than for earlier ones; reasoning in a channel, of the last turn alone.
    "harmony": (
        "{{ '<|start|>system<|message|>Be a cat.<|end|>' }}{% if tools %}{{ '<|start|>developer<|message|>' }}"
        "{% for tool in tools %}{{ 'type ' + tool.function.name }}{% endfor %}{{ '<|end|>' }}{% endif %}"
        "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|start|>assistant' }}"
        + G
        + "{% if message.tool_calls %}{{ ' to=functions.' + message.tool_calls[0].function.name + "
        "'<|channel|>commentary<|message|>' + (message.tool_calls[0].function.arguments | tojson) + '<|call|>' }}"
        "{% elif loop.last and not add_generation_prompt %}{% if message.thinking %}{{ '<|channel|>analysis<|message|>' "
        "+ message.thinking + '<|end|><|start|>assistant' }}{% endif %}"
        "{{ '<|channel|>final<|message|>' + message.content + '<|return|>' }}{% else %}"
        "{{ '<|channel|>final<|message|>' + message.content + '<|end|>' }}{% endif %}"
        + E
        + "{% elif message.role == 'tool' %}{{ '<|start|>functions.' + message.name + '<|message|>' + "
        "(message.content | tojson) + '<|end|>' }}{% else %}{{ '<|start|>' + message.role + '<|message|>' + "
        "message.content + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}"
        "{% endif %}"
    ),
    # What the system says decides whether the generation prompt closes a think block.
    "smollm3": (
        "{% set ns = namespace(mode='/think') %}{% if messages[0].role == 'system' and '/no_think' in messages[0].content "
        "%}{% set ns.mode = '/no_think' %}{% endif %}{% for message in messages %}{% if message.role == 'assistant' %}"
        "{{ '<|im_start|>assistant\n' }}"
        + G
        + "{% if ns.mode == '/no_think' %}{{ '<think>\n\n</think>\n' }}{% endif %}"
        "{{ message.content.lstrip('\n') + '<|im_end|>\n' }}" + E + "{% else %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{% if ns.mode == '/think' %}{{ '<|im_start|>assistant\n' }}{% else %}"
        "{{ '<|im_start|>assistant\n<think>\n\n</think>\n' }}{% endif %}{% endif %}"
    ),
    # Written by a macro; line breaks between turns come before them.
    "granite": (
        "{% macro head(role) %}{{ '<|start_of_role|>' + role + '<|end_of_role|>' }}{% endmacro %}"
        "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}{{ head(message.role) }}"
        "{% if message.role == 'assistant' %}"
        + G
        + "{{ message.content + '<|end_of_text|>' }}"
        + E
        + "{% else %}{{ message.content + '<|end_of_text|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n' + head('assistant') }}{% endif %}"
    ),
    # Loops over numbers of messages instead of messages; reasoning alone of the last answer.
    "exaone4": (
        "{% set ns = namespace(last=0) %}{% for i in range(messages | length) %}{% if messages[i].role == 'user' %}"
        "{% set ns.last = i %}{% endif %}{% endfor %}{% for i in range(messages | length) %}{% set msg = messages[i] %}"
        "{% if msg.role == 'assistant' %}{{ '[|assistant|]\n' }}"
        + G
        + "{% set content = msg.content %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] | trim %}"
        "{% endif %}{% if msg.reasoning_content and i > ns.last %}"
        "{{ '<think>\n' + msg.reasoning_content | trim + '\n</think>\n\n' }}{% else %}{{ '<think>\n\n</think>\n\n' }}"
        "{% endif %}{{ content + '[|endofturn|]\n' }}"
        + E
        + "{% else %}{{ '[|' + msg.role + '|]\n' + msg.content + '[|endofturn|]\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]\n' }}"
        "{% if enable_thinking is defined and enable_thinking is true %}{{ '<think>\n' }}{% else %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
    ),
    # No tokens of its own at all.
    "alpaca": (
        "{% for message in messages %}{% if message.role == 'user' %}{{ '### Instruction:\n' + message.content + '\n\n' }}"
        "{% elif message.role == 'assistant' %}{{ '### Response:\n' }}"
        + G
        + "{{ message.content + eos_token }}"
        + E
        + "{{ '\n\n' }}{% else %}{{ message.content + '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '### Response:\n' }}{% endif %}"
    ),
}

TOOLS = {"qwen2.5", "qwen3", "harmony"}
"""Families whose templates read tools and calls."""
AFTER_THE_END = {"qwen1.5", "alpaca"}
"""Families whose marks leave out the line breaks behind the end token; without marks these count as the turn's."""


def unmarked(template: str) -> str:
    """The template as most models are published with."""
    return re.sub(r"\{% (end)?generation %\}", "", template)


SPECIALS = sorted(
    {"<s>", "</s>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>"}
    | set(re.findall(r"<[|｜][^<>'\s+]+[|｜]>", "".join(FAMILIES.values())))
)
CORPUS = [
    "the cat sat on the mat and the assistant answered the user\n",
    "system user assistant USER: ASSISTANT: ### Instruction:\n### Response:\n model tool question answer",
    '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call> <think>\nhm\n</think>\n\n 😀 中 é',
] * 4


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Like GPT-2's and its heirs'."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return _trained(bpe, pre_tokenizers.ByteLevel.alphabet())


@cache
def trimmed() -> PreTrainedTokenizerFast:
    """The same with offsets that leave out the space before a word, as many published ones have."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    return _trained(bpe, pre_tokenizers.ByteLevel.alphabet())


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """Like Llama 2's: spaces are part of words, unknown characters fall back to bytes, a begin token is added."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    tokenizer = _trained(bpe, [], [f"<0x{byte:02X}>" for byte in range(256)])
    begin = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    return tokenizer


def _trained(bpe: Tokenizer, alphabet: list[str], more: list[str] | None = None) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 700, special_tokens=["<unk>", *SPECIALS, *(more or [])], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


TOKENIZERS: dict[str, Any] = {"byte-level": byte_level, "trimmed": trimmed, "metaspace": metaspace}
