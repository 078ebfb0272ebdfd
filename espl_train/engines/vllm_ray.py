"""Samplers in Ray actors: one vLLM each, with a GPU of its own, on this machine or on those of a cluster.

Where RAY_ADDRESS names a cluster, it is used as it is; else a Ray of our own is started on this machine, for loopback
alone, with the GPUs that no learner has, and it ends with us. What an actor does is `vllm_core.Core`'s work; who gets
which request, which version is served and whether to believe it stays with the engine (`vllm.py`).
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import torch
from ray._private import ray_constants
from ray.exceptions import RayActorError, RayError, RayTaskError

from espl_envs.core.errors import EsplError
from espl_train.engines.adapters import Adapter, AdapterStore
from espl_train.engines.base import EngineError, Request
from espl_train.engines.scratch import Scratch
from espl_train.engines.vllm_core import Core, Pause, Score, free_gpus
from espl_train.engines.vllm_server import Lost, named
from espl_train.learner.loading import precision

STRIDE = 0.02           # seconds of decoding for one call: a token takes about as long as a call does
STORE = 1 << 28         # bytes of Ray's memory for objects, beside room for a few adapters
HANDLED = (signal.SIGINT, signal.SIGTERM)


class Replica:
    """What an actor does. One thread runs all of it."""

    core: Core | None = None

    def start(self, setup: Mapping[str, Any], device: str, size: int) -> int:
        """Build vLLM; returns the process id. Raises EsplError where it cannot be set up."""
        if device == "cpu":             # else all replicas of a machine take the very same cores
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        self._adapters = AdapterStore(size=size)
        self.core = Core(**setup, device=torch.device(device))
        return os.getpid()

    def step(self, fresh: Sequence[tuple[str, Request | Score]], gone: Sequence[str]) -> list[tuple[str, Any]]:
        """See `Core.step`; until a request has ended, or for STRIDE seconds."""
        assert self.core is not None
        ended, until = self.core.step(fresh, gone), time.monotonic() + STRIDE
        while not ended and self.core.busy and time.monotonic() < until:
            ended = self.core.step()
        return ended

    def load(self, version: int, files: Mapping[str, bytes]) -> None:
        """See `Core.load`; the files of an adapter."""

        def save(folder: Path) -> None:
            for name, content in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)

        assert self.core is not None
        adapter = self._adapters.publish(version, save)
        self.core.load(adapter)
        self._adapters.keep(adapter)

    def call(self, name: str, *given: Any) -> Any:
        """A method of the core."""
        return getattr(self.core, name)(*given)

    def close(self) -> None:
        if self.core is not None:
            self.core.close()
        self._adapters.close()


class Remote:
    """The core of an actor, as `vllm_server.Sampler`. Raises Lost where the actor is gone, else what the core raises.
    """

    def __init__(self, fleet: Fleet, number: int, actor: Any) -> None:
        self._fleet, self._number, self._actor = fleet, number, actor
        self.pid = 0

    def start(self, setup: Mapping[str, Any], device: str, size: int) -> None:
        """See `Replica.start`."""
        self.pid = self._ask("start", setup, device, size)

    def step(self, fresh: Sequence[tuple[str, Request | Score]], gone: Sequence[str]) -> list[tuple[str, Any]]:
        return list(self._ask("step", fresh, gone))

    def complete(self, asked: Sequence[Request | Score]) -> list[Any]:
        return list(self._ask("call", "complete", asked))

    def load(self, adapter: Adapter) -> None:
        self._ask("load", adapter.version, self._fleet.packed(adapter))

    def unload(self) -> None:
        self._ask("call", "unload")

    def sleep(self, how: Pause) -> None:
        self._ask("call", "sleep", how)

    def wake(self) -> None:
        self._ask("call", "wake")

    def close(self) -> None:
        """In good order where the actor still can, and in any case."""
        with suppress(Lost, RayError, RuntimeError):
            self._ask("close")
        with suppress(RayError):
            ray.kill(self._actor)

    def _ask(self, method: str, *given: Any) -> Any:
        try:
            return ray.get(getattr(self._actor, method).remote(*given))
        except RayTaskError as error:
            cause: Exception = error.cause
            raise named(self._number, cause) if isinstance(cause, EngineError) else cause from None
        except RayActorError as error:
            reason = str(error).strip().splitlines()[0]
            raise Lost(f"replica {self._number} of vLLM is gone: {reason}") from None


class Fleet:
    """Ray, and the actors in it. Raises EsplError where there is no place for `count` of them."""

    def __init__(self, count: int, device: torch.device, size: int) -> None:
        self._kind, self._size = device.type, size
        self._scratch: Scratch | None = None
        self._packed: tuple[str, Any] = ("", None)
        self._packing = threading.Lock()
        self._mine = not ray.is_initialized()
        try:
            if self._mine:
                with _quietly():
                    self._join() if os.environ.get("RAY_ADDRESS") else self._begin()
            kind = "GPU" if self._kind == "cuda" else "CPU"
            if (there := int(ray.cluster_resources().get(kind, 0))) < count:
                raise EsplError(
                    f"engine.replicas is {count}, but Ray has {there} {kind}s; lower it, or let Ray have more"
                )
        except BaseException:
            self.close()
            raise

    def replica(self, number: int, setup: Mapping[str, Any]) -> Remote:
        """A new actor that has built its vLLM. Raises EsplError where it cannot."""
        options = {"num_cpus": 1, "num_gpus": int(self._kind == "cuda"), "max_restarts": 0}
        made = Remote(self, number, ray.remote(Replica).options(**options).remote())
        settings = setup["settings"]
        fixed = {"dtype": precision(settings), "device": self._kind}
        try:
            made.start({**setup, "settings": settings.model_copy(update=fixed)}, self._kind, self._size)
        except BaseException:
            made.close()
            raise
        return made

    def packed(self, adapter: Adapter) -> Any:
        """The files of an adapter in Ray's store, where every replica finds them."""
        with self._packing:
            if self._packed[0] != adapter.name:
                found = (path for path in adapter.path.rglob("*") if path.is_file())
                files = {str(path.relative_to(adapter.path)): path.read_bytes() for path in found}
                self._packed = (adapter.name, ray.put(files))
            return self._packed[1]

    def close(self) -> None:
        """End what was begun here. May be repeated."""
        self._packed = ("", None)
        if self._mine:
            ray.shutdown()
        if self._scratch is not None:
            self._scratch.close()

    def _join(self) -> None:
        address = os.environ["RAY_ADDRESS"]
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError, RayError) as error:
            reason = str(error).strip().splitlines()[0]
            raise EsplError(f"RAY_ADDRESS is {address!r}, but its Ray cannot be joined: {reason}") from error

    def _begin(self) -> None:
        self._scratch = Scratch("espl-ray-", Path(tempfile.gettempdir()))
        free = free_gpus() if self._kind == "cuda" else []
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))          # it obeys whoever knows this
        with _loopback(), _environment({"CUDA_VISIBLE_DEVICES": ",".join(free)} if free else {}):
            ray.init(
                address="local", num_cpus=os.cpu_count(), num_gpus=len(free), include_dashboard=False,
                object_store_memory=STORE + 4 * self._size, log_to_driver=False, logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1", _temp_dir=str(self._scratch.folder / "ray"),
            )


@contextmanager
def _loopback() -> Iterator[None]:
    """A Ray that begins in here listens on loopback alone: else it takes 127.0.0.1 for the machine's own address. Its
    processes read the variable when they begin; this one read it when Ray was imported, which vLLM does, too."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _quietly() -> Iterator[None]:
    """Ray sends no statistics, and leaves the signals to the one whose program this is."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in HANDLED} if main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
