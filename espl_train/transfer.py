"""Copies from the CPU to a GPU that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, which is on the CPU, on `device`; itself where that is the CPU.

    An ordinary copy stops the host until the GPU has done all that it was asked before, and then the GPU waits for the
    host. A copy from pinned memory takes its place in the queue like any other work.
    """
    if device.type in ("cpu", "mps"):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
