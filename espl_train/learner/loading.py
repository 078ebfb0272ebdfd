"""From a model's name to its weights and tokenizer: 'micro' (bundled), a folder, or a hub id.

Everything that can be wrong with a name is explained here in one sentence; nothing here trains or samples.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from espl_envs.core.errors import EsplError
from espl_train.config import ModelConfig

MAKES_A_MODEL = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
END = 1 << 20               # bytes
MICRO = Path(__file__).resolve().parents[1] / "models" / "micro"


def locate(path: str) -> str:
    """The folder or hub id behind `path`. Raises EsplError for a folder that is not there or holds no model."""
    if path == "micro":
        if not (MICRO / "config.json").is_file():
            raise EsplError("the bundled model 'micro' is missing from this installation: install espl again")
        return str(MICRO)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise EsplError(f"folder '{path}' holds no model: it has no config.json")
        return str(folder)
    if path.startswith((".", "/", "~")) or "\\" in path or path.count("/") > 1:
        raise EsplError(f"model.path is '{path}', but there is no such folder")
    return path


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EsplError(f"model.device is '{name}', but torch cannot use it: {first_line(error)}") from error
    return device


def precision(config: ModelConfig) -> Literal["float32", "bfloat16"]:
    """The dtype of the base weights. `auto` is bfloat16 for a model that comes in half precision, on a GPU that has it,
    and float32 elsewhere: most CPUs are slower in bfloat16, and the bundled model is tuned in float32.
    """
    if config.dtype != "auto":
        return config.dtype
    if pick_device(config.device).type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float32"
    from transformers import AutoConfig

    source = locate(config.path)
    settings = _explained(config, AutoConfig.from_pretrained, source, revision=config.revision).get_text_config()
    half = settings.dtype in (torch.bfloat16, torch.float16) and source != str(MICRO)
    return "bfloat16" if half else "float32"


def use_threads(count: int) -> None:
    """Give torch `count` CPU threads; 0 = OMP_NUM_THREADS where set, else the cores this process may use."""
    if not count and hasattr(os, "sched_getaffinity") and not os.environ.get("OMP_NUM_THREADS"):
        count = len(os.sched_getaffinity(0))
    if count:
        torch.set_num_threads(count)


def load_model(config: ModelConfig) -> nn.Module:
    """The causal language model itself, in the configured dtype, on the configured device, in eval mode."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source = locate(config.path)
    options = {"revision": config.revision, "dtype": getattr(torch, precision(config))}
    model: Any = _explained(config, AutoModelForCausalLM.from_pretrained, source, **options)
    model.config.espl_templates = template_set(config, model.config)
    return model.to(pick_device(config.device)).eval()


def blank_model(config: ModelConfig) -> Any:
    """The model that `load_model` would load, without weights: its tensors have shapes and no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = _explained(config, AutoConfig.from_pretrained, locate(config.path), revision=config.revision)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, precision(config)))
    model.config.espl_templates = template_set(config, model.config)
    return model.eval()


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer. Raises EsplError where it has no chat template: a policy answers conversations."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = locate(config.path)
    kind: Any = PreTrainedTokenizerFast if _is_generic(Path(source)) else AutoTokenizer
    tokenizer = _explained(config, kind.from_pretrained, source, revision=config.revision)
    if not tokenizer.chat_template:
        raise EsplError(f"model '{config.path}' has no chat template: take an instruct model, or add a template to it")
    return tokenizer


def template_set(config: ModelConfig, settings: Any) -> str:
    """The template set that a model names: `espl_templates` in its config.json (`settings`), or at the head of the card
    in its folder; models that name none read and write English.
    """
    named = getattr(settings, "espl_templates", None)
    card = Path(locate(config.path)) / "README.md"
    if named is None and card.is_file():
        head = card.read_text(encoding="utf-8").removeprefix("---\n").partition("\n---\n")[0]
        found = re.search(r"^espl_templates: *([\w-]+) *$", head, re.MULTILINE)
        named = found and found[1]
    return named or "english"


def identity(config: ModelConfig) -> dict[str, str | None]:
    """Which weights a model's name stands for today: the commit on the hub, or the fingerprint of a folder."""
    source = locate(config.path)
    known: dict[str, str | None] = {"path": config.path, "revision": config.revision, "dtype": precision(config)}
    if Path(source).is_dir():
        return {**known, "commit": None, "fingerprint": _fingerprint(Path(source))}
    from transformers import AutoConfig

    settings = _explained(config, AutoConfig.from_pretrained, source, revision=config.revision)
    return {**known, "commit": getattr(settings, "_commit_hash", None), "fingerprint": None}


def _fingerprint(folder: Path) -> str:
    """16 hex digits over what makes a model: its settings whole, of its weights the name, the size and both ends, which
    takes no longer for a hundred gigabytes than for one."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.name in MAKES_A_MODEL or p.suffix in (".safetensors", ".bin")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(END))
            file.seek(max(size - END, 0))
            digest.update(file.read(END))
    return digest.hexdigest()[:16]


def context_length(model: Any) -> int:
    """The longest sequence that the model's positions allow; models without such a limit get 2**20."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return 2**20


def first_line(error: BaseException) -> str:
    """What an exception says, without its essay."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_generic(folder: Path) -> bool:
    """Whether `tokenizer.json` is the whole tokenizer. For model types such as qwen2, AutoTokenizer (transformers 5)
    would put the architecture's own splitting rules in its place: text is then cut differently, or vanishes.
    """
    settings = folder / "tokenizer_config.json"
    if not settings.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    return json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") == "TokenizersBackend"


def _explained(config: ModelConfig, load: Any, source: str, **options: Any) -> Any:
    """`load(source, **options)`, with the many ways in which this fails said in one sentence."""
    from safetensors import SafetensorError

    try:
        return load(source, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if Path(source).is_dir():
            raise EsplError(f"the model in '{config.path}' cannot be read: {first_line(error)}") from error
        offline = any(os.environ.get(name, "0") not in ("", "0") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
        why = "the hub is switched off (HF_HUB_OFFLINE), and it is not in the cache" if offline else first_line(error)
        name = f"'{config.path}'" + (f" at revision '{config.revision}'" if config.revision else "")
        raise EsplError(f"model {name} is no folder and cannot be loaded from the hub: {why}") from error
