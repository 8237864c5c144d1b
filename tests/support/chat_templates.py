"""Chat templates of families that call tools, and a tokenizer with their special tokens."""

from __future__ import annotations

from typing import Any

from support.models import byte_tokenizer

# The parts of each family's template that matter between turns, in its own tokens.
CHATML = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{% if tools %}{% endif %}"
)
# Qwen 3 without tools, and QwQ: the thinking of an earlier turn is dropped.
THINKING = CHATML.replace(
    "{{ m.content }}{% for", "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}{% for"
)
LLAMA = (
    "{% for m in messages %}<|start|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end|>\n\n"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}{% if tools %}{% endif %}"
)
MISTRAL = (
    "{% set ns = namespace(i=0) %}{% for m in messages %}"
    "{% if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}"
    "{% if (m.role == 'user') != (ns.i % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.i = ns.i + 1 %}{% endif %}"
    "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('id') }}{% endif %}"
    "[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS]{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}</s>"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}{% if tools %}{% endif %}"
)
HARMONY = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|start|>functions.f to=assistant<|message|>{{ m.content }}<|end|>"
    "{% elif m.tool_calls %}<|start|>assistant to=functions.f<|channel|>commentary json<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% elif m.role == 'assistant' %}{% if '<|channel|>' in m.content %}{{ raise_exception('marks') }}{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}{% if tools %}{% endif %}"
)
SPECIAL = ["<|im_end|>", "<|im_start|>", "<|eot_id|>", "</s>", "<|call|>", "<|return|>", "<|end|>", "<|start|>"]
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f"}}]
HERMES_CALL = '<tool_call>\n{"name":"f","arguments":{"x":1}}\n</tool_call>'


def templated(template: str) -> Any:
    """A tokenizer, one token a byte, with all families' special tokens and one of the templates."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer
