"""vLLM's engine in a process of its own, which ends with the one that asked for it, however that ends.

vLLM stops its engine when its owner says so or exits in an orderly way. Of an owner that is killed the engine hears
nothing: it would live on and keep its memory. So the kernel is asked to end it; its workers watch it and follow.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.engine.core import EngineCoreProc

from espl_envs.sandbox.worker.kernel import PR_SET_PDEATHSIG, prctl

vllm_runs = EngineCoreProc.run_engine_core      # read before it is ever replaced, in a spawned process too


def run(*args: Any, **kwargs: Any) -> None:
    """What the new process runs."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)     # from now on; it may have happened before
    owner = multiprocessing.parent_process()
    if owner is not None and os.getppid() == owner.pid:
        vllm_runs(*args, **kwargs)


@contextmanager
def mortal() -> Iterator[None]:
    """Engines that are made in here die with the calling thread, which has to outlive them."""
    EngineCoreProc.run_engine_core = staticmethod(run)
    try:
        yield
    finally:
        EngineCoreProc.run_engine_core = staticmethod(vllm_runs)
