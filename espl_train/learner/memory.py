"""What an update needs of memory, what there is, and which knob to turn where the one is more than the other.

What a forward pass keeps for its backward pass is measured on the model itself, by counting what autograd saves, so it
holds for any architecture. Checkpointing keeps the input of each layer and computes the rest again: less memory, about
a third more work, and the very same gradient.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espl_envs.core.errors import EsplError

GIB = 2**30
MARGIN = 1.25        # gradients on their way, copies of shared keys, fragmentation
USABLE = 0.9         # of what is free


class OutOfMemory(EsplError):
    """An allocation failed. `wanted` bytes, where the allocator said how many."""

    def __init__(self, message: str, wanted: int | None = None) -> None:
        super().__init__(message)
        self.wanted = wanted


@dataclass(frozen=True, slots=True)
class Appetite:
    """Bytes that one id of a micro-batch costs while its gradient is made."""

    kept: float              # everything that the backward pass reads
    checkpointed: float      # inputs of layers, and one layer's everything

    def need(self, ids: int, checkpointing: bool) -> float:
        """Bytes for a micro-batch of `ids`."""
        return MARGIN * ids * (self.checkpointed if checkpointing else self.kept)


def appetite(causal: Any) -> Appetite:
    """Measured with two short forward passes, checkpointing off."""
    short, long = (_saved(causal, length) for length in (16, 48))
    kept = (long - short) / 32
    config = causal.config.get_text_config()
    layers, weight = config.num_hidden_layers, next(causal.parameters())
    return Appetite(kept, min(kept, layers * config.hidden_size * weight.element_size() + kept / layers))


def free(device: torch.device) -> int:
    """Bytes that can still be had on `device`."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    found = [int(kib) * 1024 for kib in re.findall(r"MemAvailable: +(\d+)", _read("/proc/meminfo"))]
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.isdigit() and used.isdigit():
        cached = re.findall(r"^inactive_file (\d+)", _read("/sys/fs/cgroup/memory.stat"), re.MULTILINE)
        found.append(int(limit) - int(used) + sum(map(int, cached)))
    return min(found, default=2**62)


def named(device: torch.device) -> str:
    """What kind of device it is: what fits into one fits into another of the same name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def watched() -> Iterator[None]:
    """Whatever says that memory ran out becomes `OutOfMemory`."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        said = str(error)
        known = isinstance(error, torch.OutOfMemoryError | MemoryError) or "t allocate memory" in said
        if not known:
            raise
        raise OutOfMemory("memory ran out", _wanted(said)) from error


def compared(need: float, there: int, ids: int) -> str:
    """What a micro-batch is estimated to need, beside what is free."""
    return f"a micro-batch of {ids} ids needs about {_gib(need)}, {_gib(there)} are free"


def explained(error: OutOfMemory, device: torch.device, ids: int, checkpointing: bool) -> EsplError:
    """What to change where not even one sequence fits, and by how much memory it failed."""
    missing = _missing(error, device)
    knob = "" if checkpointing else "set learner.gradient_checkpointing = 'on', "
    return EsplError(
        f"the learner ran out of memory on {device} with a single sequence of {ids} ids{missing}: {knob}"
        "lower rollout.max_new_tokens or rollout.max_total_tokens, or take a smaller model. The weights are those "
        "before this update, and the run goes on from its last checkpoint"
    )


def unstepped(error: OutOfMemory, device: torch.device, weights: int) -> EsplError:
    """What to change where there is a gradient and no room for the optimiser, and by how much memory it failed."""
    return EsplError(
        f"the learner ran out of memory on {device} in the optimiser's step{_missing(error, device)}: AdamW keeps "
        f"two numbers for each of {weights:,} trained weights, {_gib(8 * weights)} in all; train an adapter "
        "(--learner.mode lora), one of a lower learner.rank, or a smaller model. The run goes on from its last "
        "checkpoint"
    )


def _missing(error: OutOfMemory, device: torch.device) -> str:
    if error.wanted is None:
        return ""
    there = free(device)
    short = f", {_gib(error.wanted - there)} too little" if error.wanted > there else ""
    return f" ({_gib(error.wanted)} more were asked for, {_gib(there)} were free{short})"


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def _wanted(said: str) -> int | None:
    units = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": GIB}
    found = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", said)
    return int(float(found[1]) * units[found[2]]) if found else None


def _saved(causal: Any, length: int) -> int:
    """Bytes that autograd keeps of a forward pass over `length` ids, weights not counted."""
    weights = {t.untyped_storage().data_ptr() for t in (*causal.parameters(), *causal.buffers())}
    kept: dict[int, Tensor] = {}      # holding them keeps addresses from being used again

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.ones(1, length, dtype=torch.long, device=next(causal.parameters()).device)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        causal.get_decoder()(input_ids=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
