"""vLLM as an engine: continuous feeding, adapters by version, and nothing served that was not proven.

Requests come from event loops; a `Server` (`vllm_server.py`) feeds and steps one vLLM, a token at a time: an episode's
next turn joins with the next step, whatever the others do. There is one in this process, or `engine.replicas` of them
in Ray actors (`vllm_ray.py`), each with a GPU of its own. The learner's adapter reaches them as a directory of its own
for each load (`adapters.py`); the identity probe (`probe.py`) then compares what each says with what the learner
says, and none is served before all are proven. At start-up a random adapter goes the whole way first: version 0 acts
like the base model and would prove nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from espl_train.config import EngineConfig, ModelConfig
from espl_train.engines.adapters import Adapter, AdapterStore
from espl_train.engines.base import EngineError, Request, Sample, room
from espl_train.engines.probe import GIVEN, TRIAL, Probe
from espl_train.engines.routing import Router
from espl_train.engines.vllm_core import Core, Score
from espl_train.engines.vllm_server import Lost, Sampler, Server, look, named
from espl_train.learner.loading import locate
from espl_train.learner.policy import Policy
from espl_train.randomness import derive

T = TypeVar("T")

SHAKE = 0.02      # size of the self-test's adapter: about a tenth of what a layer puts out


@dataclass(frozen=True, slots=True)
class Sync:
    """Seconds of the last `load_policy` that loaded: written, taken by vLLM, proven; and the probe's mean |Δ|, the
    largest of all replicas."""

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
        self.last_sync: Sync | None = None
        self._asleep = False
        self._adapter: Adapter | None = None               # what is served and proven
        self._state = -1                                   # of the weights that it was written from
        size = 4 * sum(p.numel() for p in policy.trainable_parameters().values())
        setup: dict[str, Any] = {
            "model": locate(model.path), "settings": model, "config": config, "rank": policy.config.rank,
            "targets": _adapted(policy), "context": self.context_length,
            "kv_bytes": int((config.kv_gb or 0) * 2**30) or kv_bytes,
        }
        self._servers: list[Server] = []
        self._router = Router(config.replicas or 1)
        self._close: list[Callable[[], None]] = []         # what goes with the engine, once the servers have
        try:
            self._adapters = AdapterStore(size=size)
            self._close.append(self._adapters.close)
            for build in self._builds(setup, size):
                steady = config.deterministic and policy.device.type == "cpu" and not config.replicas
                self._servers.append(Server(build, Probe(policy, config.rounding), steady))
            self._all(lambda _: None)                      # all are built at the same time
            for server in self._servers:
                server.probe.begin(server)
            self._try_adapter()
        except BaseException:
            self.close()
            raise

    def _builds(self, setup: Mapping[str, Any], size: int) -> list[Callable[[], Sampler]]:
        """What makes each of the samplers."""
        if not self.config.replicas:
            return [partial(Core, **setup, device=self.policy.device)]
        from espl_train.engines.vllm_ray import Fleet

        fleet = Fleet(self.config.replicas, self.policy.device, size)
        self._close.append(fleet.close)
        return [partial(fleet.replica, number, setup) for number in range(self.config.replicas)]

    @property
    def context_length(self) -> int:
        """The longest sequence that model and configuration allow."""
        return min(self.policy.context_length, self.config.context or self.policy.context_length)

    @property
    def concurrent(self) -> bool:
        """See `Engine`. vLLM has weights of its own, and need not wait unless it has to sleep meanwhile."""
        return self.policy.device.type != "cuda" or self.config.pause == "keep" or self.config.replicas > 0

    @property
    def closed(self) -> bool:
        """Whether it serves no more."""
        return any(server.callers.closed for server in self._servers)

    def join(self, count: int) -> None:
        """See `Engine`."""
        for server in self._servers:
            server.callers.join(count)

    def leave(self) -> None:
        """See `Engine`."""
        for server in self._servers:
            server.callers.leave()

    async def sample(self, request: Request) -> Sample:
        """See `Engine`. Raises EngineError where the prompt is empty or leaves no room for a token."""
        return await self._ask(replace(request, max_new=room(request, self.context_length)), request.session)

    async def score(self, tokens: Sequence[int], start: int, policy: int | None) -> list[float]:
        """See `Engine`. One prefill."""
        if not 0 < start <= len(tokens) <= self.context_length:
            raise EngineError(f"cannot score from {start} in a sequence of {len(tokens)} tokens")
        self._check(policy)
        return await self._ask(Score(tuple(tokens), start, policy)) if start < len(tokens) else []

    def release(self, session: str) -> None:
        """See `Engine`. Keys and values are found by their tokens and forgotten when room is needed."""
        self._router.release(session)

    def load_policy(self, version: int) -> None:
        """See `Engine`. Nothing is done where these very weights are served already."""
        if self.policy.version != version:
            raise EngineError(f"asked to serve policy {version}, but the learner is at {self.policy.version}")
        state = sum(p._version for p in self.policy.trainable_parameters().values())
        if self._adapter is not None and (self._adapter.version, self._state) == (version, state):
            return
        if any(server.load for server in self._servers):
            raise EngineError("weights cannot change while requests are under way")
        try:
            self._serve(version)
        except Lost:                    # a replica died meanwhile: once more, with the one that takes its place
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
        if not self._asleep and not self.concurrent and not any(server.load for server in self._servers):
            self._all(lambda core: core.sleep(self.config.pause))
            self._asleep = True

    def resume(self) -> None:
        """See `Engine`. What was served before is proven again."""
        if self._asleep:
            self._all(lambda core: core.wake())
            self._asleep = False
            if self._adapter is not None:
                for server in self._servers:
                    server.probe.again(server, self._adapter.version)

    def close(self) -> None:
        """Stop the workers; whatever still waits gets an EngineError."""
        for server in self._servers:
            server.close()
        for close in self._close:
            close()

    def _serve(self, version: int) -> None:
        """Publish the learner's weights as `version`, load and prove them, everywhere or nowhere. What was served
        before no longer is."""
        self._adapter = None
        for server in self._servers:
            server.adapter = None
        begun = time.perf_counter()
        adapter = self._adapters.publish(version, self.policy.save_adapter)
        published = time.perf_counter()
        self._all(lambda core: core.load(adapter))
        loaded = time.perf_counter()
        self._prove(version)
        proven = time.perf_counter()
        self._adapters.keep(adapter)
        self._adapter = adapter
        for server in self._servers:
            server.adapter = adapter
        distance = max(server.probe.distance for server in self._servers)
        self.last_sync = Sync(published - begun, loaded - published, proven - loaded, distance)

    def _prove(self, version: int) -> None:
        """All answer at the same time; the learner's own claims are made one after the other."""
        looks = []
        for server in self._servers:
            requests, passages = server.probe.questions(version)
            looks.append(server.submit(partial(look, requests=requests, passages=passages, start=GIVEN)))
        for number, (server, (samples, read)) in enumerate(zip(self._servers, _results(looks), strict=True)):
            try:
                server.probe.judge(version, samples, read)
            except EngineError as error:
                raise named(number, error) if self.config.replicas else error from None

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
        for server in self._servers:
            server.adapter = None

    async def _ask(self, asked: Request | Score, session: str | None = None) -> Any:
        self._check(asked.policy)
        server = self._servers[self._router.choose(asked.tokens, session, [one.load for one in self._servers])]
        return await server.ask(asked)

    def _check(self, policy: int | None) -> None:
        if self.closed:
            raise EngineError("the engine is closed")
        served = None if self._adapter is None else self._adapter.version
        if policy is not None and policy != served:
            raise EngineError(f"asked for policy {policy}, but policy {served} is loaded")

    def _all(self, job: Callable[[Sampler], T]) -> list[T]:
        """`job` with every sampler at the same time."""
        return _results([server.submit(job) for server in self._servers])


def _results(futures: Sequence[Future[T]]) -> list[T]:
    """What all came to, once all are done. Raises the first error."""
    wait(futures)
    return [future.result() for future in futures]


def _adapted(policy: Policy) -> tuple[str, ...]:
    """The last names of the layers that the policy adapts."""
    names = (name.partition(".lora_") for name in policy.trainable_parameters())
    return tuple(sorted({layer.rpartition(".")[2] for layer, found, _ in names if found}))
