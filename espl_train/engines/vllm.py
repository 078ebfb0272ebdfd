"""vLLM as an engine: continuous feeding, adapters by version, and nothing served that was not proven.

Requests come from event loops; one worker thread feeds and steps vLLM (`vllm_core.py`), a token at a time: an episode's
next turn joins with the next step, whatever the others do. The learner's adapter reaches vLLM as a directory of its own
for each load (`adapters.py`); the identity probe (`probe.py`) then compares what it says with what the learner says. At
start-up a random adapter goes the whole way first: version 0 acts like the base model and would prove nothing.

On a CPU requests are admitted at reproducible moments where the configuration asks for it, as in the local engine; on
a GPU vLLM's own arithmetic depends on the batch, so nothing waits for that.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from espl_train.config import EngineConfig, ModelConfig
from espl_train.engines.adapters import Adapter, AdapterStore
from espl_train.engines.base import EngineError, Request, Sample, room
from espl_train.engines.callers import Callers, Waiter, waiter
from espl_train.engines.probe import TRIAL, Passage, Probe
from espl_train.engines.vllm_core import Core, Score, result
from espl_train.learner.loading import locate
from espl_train.learner.policy import Policy
from espl_train.randomness import derive

T = TypeVar("T")

SHAKE = 0.02      # size of the self-test's adapter: about a tenth of what a layer puts out
LIVES = 2         # times in a row that a vLLM which broke is built again


@dataclass(slots=True, eq=False)
class _Call:
    """A request somebody awaits."""

    asked: Request | Score
    waiter: Waiter
    cancelled: bool = False

    @property
    def order(self) -> tuple[Any, ...]:
        asked = self.asked
        policy = -1 if asked.policy is None else asked.policy
        if isinstance(asked, Score):
            return (0, policy, asked.tokens, asked.start)
        law = (asked.temperature, asked.top_p, asked.stop_ids)
        return (1, policy, -asked.expected, asked.tokens, asked.seed, asked.max_new, *law, asked.session or "")


@dataclass(frozen=True, slots=True)
class Sync:
    """Seconds of the last `load_policy` that loaded: written, taken by vLLM, proven; and the probe's mean |Δ|."""

    publish: float
    load: float
    prove: float
    distance: float

    @property
    def total(self) -> float:
        return self.publish + self.load + self.prove


class VllmEngine:
    """Samples from the policy's base model and, under `load_policy`, its adapter. Raises EsplError where vLLM cannot be
    set up, EngineError where it cannot prove what it serves.
    """

    def __init__(
        self, policy: Policy, config: EngineConfig, model: ModelConfig, *, kv_bytes: int | None = None
    ) -> None:
        self.policy, self.config = policy, config
        self.callers = Callers(config.deterministic and policy.device.type == "cpu")
        self.last_sync: Sync | None = None
        self._build = partial(
            Core, locate(model.path), model, config, rank=policy.config.rank, targets=_adapted(policy),
            context=self.context_length, device=policy.device,
            kv_bytes=int((config.kv_gb or 0) * 2**30) or kv_bytes,
        )
        self._changed = self.callers.changed
        self._queue: list[_Call] = []
        self._running: dict[str, _Call] = {}
        self._jobs: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._asked = 0
        self._core: Core | None = None
        self._deaths = 0
        self._asleep = False
        self._adapter: Adapter | None = None               # what is served and proven
        self._state = -1                                   # of the weights that it was written from
        self._adapters = AdapterStore(size=4 * sum(p.numel() for p in policy.trainable_parameters().values()))
        self._probe = Probe(policy, config.rounding)
        self._witness = _Witness(self._do_with_core)
        self._thread = threading.Thread(target=self._work, name="espl-vllm", daemon=True)
        self._thread.start()
        try:
            self._do(self._live)
            self._probe.begin(self._witness)
            self._try_adapter()
        except BaseException:
            self.close()
            raise

    @property
    def context_length(self) -> int:
        """The longest sequence that model and configuration allow."""
        return min(self.policy.context_length, self.config.context or self.policy.context_length)

    @property
    def concurrent(self) -> bool:
        """See `Engine`. vLLM has weights of its own, and need not wait unless it has to sleep meanwhile."""
        return self.policy.device.type != "cuda" or self.config.pause == "keep"

    def join(self, count: int) -> None:
        """See `Engine`."""
        self.callers.join(count)

    def leave(self) -> None:
        """See `Engine`."""
        self.callers.leave()

    async def sample(self, request: Request) -> Sample:
        """See `Engine`. Raises EngineError where the prompt is empty or leaves no room for a token."""
        return await self._ask(replace(request, max_new=room(request, self.context_length)))

    async def score(self, tokens: Sequence[int], start: int, policy: int | None) -> list[float]:
        """See `Engine`. One prefill."""
        if not 0 < start <= len(tokens) <= self.context_length:
            raise EngineError(f"cannot score from {start} in a sequence of {len(tokens)} tokens")
        self._check(policy)
        return await self._ask(Score(tuple(tokens), start, policy)) if start < len(tokens) else []

    def release(self, session: str) -> None:
        """See `Engine`. Keys and values are found by their tokens and forgotten when room is needed."""

    def load_policy(self, version: int) -> None:
        """See `Engine`. Nothing is done where these very weights are served already."""
        if self.policy.version != version:
            raise EngineError(f"asked to serve policy {version}, but the learner is at {self.policy.version}")
        state = sum(p._version for p in self.policy.trainable_parameters().values())
        if self._adapter is not None and (self._adapter.version, self._state) == (version, state):
            return
        with self._changed:
            if self._queue or self._running:
                raise EngineError("weights cannot change while requests are under way")
        self._serve(version)
        self._state = state

    def counts(self) -> Mapping[str, float]:
        """See `Engine`. Where the seconds of the last load went."""
        sync = self.last_sync
        if sync is None:
            return {}
        return {"sync/publish_seconds": sync.publish, "sync/load_seconds": sync.load, "sync/prove_seconds": sync.prove}

    def pause(self) -> None:
        """See `Engine`. Only on a GPU there is something to give back, and only where nothing is under way."""
        with self._changed:
            idle = not (self._queue or self._running)
        if idle and not self._asleep and not self.concurrent:
            self._do_with_core(lambda core: core.sleep(self.config.pause))
            self._asleep = True

    def resume(self) -> None:
        """See `Engine`. What was served before is proven again."""
        if self._asleep:
            self._do_with_core(Core.wake)
            self._asleep = False
            if self._adapter is not None:
                self._probe.again(self._witness, self._adapter.version)

    def close(self) -> None:
        """Stop the worker; whatever still waits gets an EngineError."""
        self.callers.close()
        self._thread.join()
        self._fail([*self._queue, *self._running.values()], EngineError("the engine was closed"))
        self._adapters.close()

    def _serve(self, version: int) -> None:
        """Publish the learner's weights as `version`, load them, prove them. What was served before no longer is."""
        self._adapter = None
        begun = time.perf_counter()
        adapter = self._adapters.publish(version, self.policy.save_adapter)
        published = time.perf_counter()
        self._do_with_core(lambda core: core.load(adapter))
        loaded = time.perf_counter()
        self._probe.prove(self._witness, version)
        proven = time.perf_counter()
        self._adapters.keep(adapter)
        self._adapter = adapter
        self.last_sync = Sync(published - begun, loaded - published, proven - loaded, self._probe.distance)

    def _try_adapter(self) -> None:
        """The start-up self-test: a random adapter, far from zero, is served like any other, then taken away."""
        state, version = self.policy.state(), self.policy.version
        random = torch.Generator().manual_seed(derive("self-test"))
        self.policy.load_state({
            name: (value + SHAKE * torch.randn(value.shape, generator=random)).to(value.dtype)
            for name, value in state.items()
        })
        try:
            self._serve(TRIAL)
        finally:
            self.policy.load_state(state, version)
        self._adapter = None

    async def _ask(self, asked: Request | Score) -> Any:
        self._check(asked.policy)
        call = _Call(asked, waiter())
        with self._changed:
            self._queue.append(call)
            self.callers.asked(call.waiter[0])
        try:
            return await call.waiter[1]
        except asyncio.CancelledError:
            call.cancelled = True
            raise

    def _check(self, policy: int | None) -> None:
        if self.callers.closed:
            raise EngineError("the engine is closed")
        served = None if self._adapter is None else self._adapter.version
        if policy is not None and policy != served:
            raise EngineError(f"asked for policy {policy}, but policy {served} is loaded")

    def _do(self, job: Callable[[], T]) -> T:
        """Run `job` on the worker's thread, between two steps, and wait for it."""
        future: Future[T] = Future()
        with self._changed:
            if self.callers.closed:
                raise EngineError("the engine is closed")
            self._jobs.append((job, future))
            self._changed.notify_all()
        return future.result()

    def _do_with_core(self, job: Callable[[Core], T]) -> T:
        return self._do(lambda: job(self._live()))

    def _work(self) -> None:
        """The worker: jobs, then requests, then a step, for as long as anybody waits."""
        while self.callers.wait(lambda: len(self._queue) + len(self._running), lambda: bool(self._jobs)):
            self._run_jobs()
            try:
                self._admit()
                if self._running:
                    self._deliver(self._live().step())
            except Exception as error:
                self._break(error)
        if self._core is not None:
            self._core.close()
        for _, future in self._jobs:
            future.set_exception(EngineError("the engine was closed"))

    def _run_jobs(self) -> None:
        with self._changed:
            jobs, self._jobs = self._jobs, []
        for job, future in jobs:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

    def _live(self) -> Core:
        """The core; one that broke is built again, with what it served, and proven. On the worker's thread."""
        if self._core is None:
            if self._deaths > LIVES:
                raise EngineError(f"vLLM broke {self._deaths} times in a row and is not started again")
            self._core = self._build()
            if self._adapter is not None:
                core = self._core
                core.load(self._adapter)
                self._probe.again(_Witness(lambda job: job(core)), self._adapter.version)
        return self._core

    def _admit(self) -> None:
        """Hand what is queued to vLLM, in an order that only the requests decide, and take back what was cancelled."""
        with self._changed:
            fresh, self._queue = [call for call in self._queue if not call.cancelled], []
            gone = [key for key, call in self._running.items() if call.cancelled]
            for key in gone:
                del self._running[key]
            calls = {f"{self._asked + i}": call for i, call in enumerate(sorted(fresh, key=lambda call: call.order))}
            self._asked += len(calls)
            self._running |= calls
        core = self._live() if gone or calls else None
        if core is None:
            return
        core.abort(gone)
        for key, call in calls.items():
            try:
                core.add(key, call.asked)
            except ValueError as error:                   # vLLM does not take this request: the engine is fine
                with self._changed:
                    del self._running[key]
                self._fail([call], EngineError(f"vLLM refuses the request: {error}"))

    def _deliver(self, ended: Sequence[tuple[str, Any]]) -> None:
        with self._changed:
            calls = [(self._running.pop(key), out) for key, out in ended if key in self._running]
        if calls:
            self._deaths = 0
            self.callers.deliver([(call.waiter, result(call.asked, out), None) for call, out in calls])

    def _fail(self, calls: Sequence[_Call], error: Exception) -> None:
        self.callers.deliver([(call.waiter, None, error) for call in calls])

    def _break(self, error: Exception) -> None:
        """vLLM failed: everybody who waits is told, and the next request finds a new one."""
        with self._changed:
            failed = [*self._running.values(), *self._queue]
            self._queue = []
            self._running.clear()
        core, self._core = self._core, None
        self._deaths += 1
        let_go(error)
        if core is not None:
            with suppress(Exception):                     # it is broken already, and the reason is told
                core.close()
        broken = error
        if not isinstance(error, EngineError):
            broken = EngineError(f"vLLM broke: {type(error).__name__}: {error}")
            broken.__cause__ = error
        self._fail(failed, broken)


def let_go(error: BaseException | None) -> None:
    """Forget what the frames below an error hold. Whoever keeps the error would keep vLLM with it, and on a GPU all of
    its memory, which the next one needs."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _adapted(policy: Policy) -> tuple[str, ...]:
    """The last names of the layers that the policy adapts."""
    names = (name.partition(".lora_") for name in policy.trainable_parameters())
    return tuple(sorted({layer.rpartition(".")[2] for layer, found, _ in names if found}))


class _Witness:
    """The engine as the probe asks it: everything at once, while nothing else is under way."""

    def __init__(self, do: Callable[[Callable[[Core], Any]], Any]) -> None:
        self._do = do

    def look(
        self, requests: Sequence[Request], passages: Sequence[Passage], start: int
    ) -> tuple[list[Sample], list[list[float]]]:
        asked: list[Request | Score] = [*requests, *(Score(tokens, start, policy) for tokens, policy in passages)]
        found = self._do(lambda core: core.complete(asked))
        return found[: len(requests)], found[len(requests) :]
