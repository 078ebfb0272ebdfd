"""A trained adapter as PEFT's files, from its tensors alone: no base weights are read, however large they are.

What PEFT writes for the same policy is the same, tensor by tensor (`Policy.save_adapter`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from espl_train.config import LearnerConfig

TENSORS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
NAME = ".default."          # PEFT's name of the one adapter, which its files leave out


def write_adapter(folder: Path, state: Mapping[str, Tensor], config: LearnerConfig, base: str) -> None:
    """Write `state` (`Policy.state()` in LoRA mode) as a directory that `PeftModel.from_pretrained` takes.

    `base` is how the model that it belongs to is called. The directory has to be there.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    layers = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in state})
    settings = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=layers, task_type="CAUSAL_LM", inference_mode=True,
        base_model_name_or_path=base,
    )
    settings.save_pretrained(str(folder))
    written = json.loads((folder / SETTINGS).read_text("utf-8"))
    ordered = {**written, "target_modules": layers}          # PEFT keeps a set: another order in every process
    (folder / SETTINGS).write_text(json.dumps(ordered, indent=2, sort_keys=True) + "\n", "utf-8")
    tensors = {name.replace(NAME, "."): tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
