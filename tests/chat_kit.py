"""Chat templates in the shapes of real ones, on a byte-level tokenizer without merges: ids 0..255 are bytes."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = """\
{%- if messages[0].role != 'system' and default_system %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
{%- if tools %}<|im_start|>system
# Tools{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}
<tool_response>
{{ message.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif %}
{%- elif message.role == 'assistant' and drop_thinking and '</think>' in message.content
    and loop.index0 < last_user.index %}<|im_start|>assistant
{{ message.content.split('</think>')[-1].lstrip('\\n') }}<|im_end|>
{% else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

QWEN2 = "{% set default_system = true %}" + CHATML
QWEN3 = """\
{%- set last_user = namespace(index=0) %}
{%- for message in messages if message.role == 'user' %}{% set last_user.index = messages.index(message) %}{% endfor %}
{%- set drop_thinking = true %}""" + CHATML
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}{% set role = 'ipython' if message.role == 'tool' else message.role -%}
<|start_header_id|>{{ role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
SYSTEM_LAST = """\
{%- for message in messages %}{% if message.role == 'user' %}[INST]
{%- if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}
{% endif %}{{ message.content }}[/INST]
{%- elif message.role == 'assistant' %}{{ message.content }}</s>
{%- elif message.role == 'tool' %}[R]{{ message.content }}[/R]{% endif %}{% endfor %}"""
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHATML
NO_TOOL = "{% for m in messages if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endfor %}" + CHATML
TEMPLATES = {"qwen2": QWEN2, "qwen3": QWEN3, "llama3": LLAMA3}
SPECIAL = {
    "llama3": ("<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "chatml": ("<|endoftext|>", ["<|im_start|>", "<|im_end|>"]),
    "inst": ("</s>", ["[INST]", "[/INST]"]),
}


def byte_tokenizer(template: str | None, kind: str = "chatml") -> PreTrainedTokenizerFast:
    alphabet = bytes_in_order()
    plain = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    end, special = SPECIAL[kind]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token=end, bos_token="<|begin_of_text|>", additional_special_tokens=special,
        name_or_path=f"test/{kind}",
    )
    tokenizer.add_tokens(["<think>", "</think>", "<tool_response>", "</tool_response>"])
    tokenizer.chat_template = template
    return tokenizer


def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    return byte_tokenizer(TEMPLATES[name], "llama3" if name == "llama3" else "chatml")


def bytes_in_order() -> list[str]:
    """GPT-2's printable stand-ins for the bytes 0 to 255."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(other)) for byte in range(256)]
