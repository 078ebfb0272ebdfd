"""torch.compile, where it is asked for and can be had: for long runs, because compiling takes a minute or more.

What is compiled computes the same up to rounding. Where no compiler is found, things run as they are, and one sentence
says so.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

log = logging.getLogger(__name__)


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`function`, compiled for shapes that change; itself where that cannot be."""
    return function if _missing(device.type) else torch.compile(function, dynamic=True)


def compile_layers(model: Any, device: torch.device) -> None:
    """Compile the layers of a transformers model in place, each by itself: one compilation serves them all."""
    if not _missing(device.type):
        for layer in (m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())):
            layer.compile(dynamic=True)


@cache
def _missing(device: str) -> str | None:
    """What keeps code for `device` from being compiled, said once; None if nothing does."""
    reason = missing(device)
    if reason is not None:
        log.warning("nothing is compiled, %s: it runs as it is, only slower", reason)
    return reason


def missing(device: str) -> str | None:
    """What keeps code for `device` from being compiled, in words; None if nothing does."""
    if device == "cuda":
        return None if importlib.util.find_spec("triton") else "because the package triton is not installed"
    from torch._inductor import config, cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        return f"because no C++ compiler was found ({' or '.join(filter(None, config.cpp.cxx))})"
    return None
