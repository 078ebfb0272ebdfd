"""Models with random weights, in folders: throughput does not depend on what the weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

MICRO = Path(__file__).parents[2] / "espl_train" / "models" / "micro"
VOCABULARY = 151_936      # of Qwen2.5 and Qwen3
TEMPLATE = "{% for m in messages %}w2 {{ m.content }} w3 {% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
COMMON = {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}


def _qwen(
    kind: type[PretrainedConfig], hidden: int, inner: int, layers: int, heads: int, **more: Any
) -> PretrainedConfig:
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 32_768, **more}
    return kind(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, **sizes,
        **COMMON,
    )


SHAPES: dict[str, PretrainedConfig] = {
    "Qwen2.5-0.5B": _qwen(Qwen2Config, 896, 4864, 24, 14, num_key_value_heads=2),
    "Qwen2.5-1.5B": _qwen(Qwen2Config, 1536, 8960, 28, 12, num_key_value_heads=2),
    "Qwen3-4B": _qwen(Qwen3Config, 2560, 9728, 36, 32, num_key_value_heads=8, head_dim=128),
    "tiny": _qwen(Qwen2Config, 128, 192, 2, 4, num_key_value_heads=2, vocab_size=1000),
}


def llama(folder: Path, **changes: Any) -> str:
    """A Llama of about 6 million parameters, `changes` apart, with the bundled model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 7,
        "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
    }
    return _save(folder, LlamaConfig(**{**settings, **changes}), tokenizer, torch.float32, "cpu")


def shaped(folder: Path, name: str, dtype: torch.dtype, device: str) -> str:
    """A model of one of the `SHAPES`, with a tokenizer in which "w17" is the token 17."""
    config = SHAPES[name]
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w5"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0")
    tokenizer.chat_template = TEMPLATE
    return _save(folder, config, tokenizer, dtype, device)


def _save(folder: Path, config: PretrainedConfig, tokenizer: Any, dtype: torch.dtype, device: str) -> str:
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
