"""The torch engine: one model, one device, shared with the learner. The oracle that other engines are tested against.

Requests come from an asyncio loop; one worker thread decodes them (`decode.py`). Weights are borrowed only while
something is undelivered: once every awaited sample is there, the learner may train. Where the policy hands out
snapshots, it may train at any time.

Deterministic mode: requests are admitted between strides, at moments (`callers.py`) and in an order that only the
requests decide. Batches, and so every bit, are then the same in every run.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from espl_train.config import EngineConfig
from espl_train.engines.base import EngineError, Request, Sample, room
from espl_train.engines.callers import Callers, Waiter, waiter
from espl_train.engines.decode import Decoder, Reuse
from espl_train.engines.kv import Slab, slab_for
from espl_train.engines.slots import Row
from espl_train.profiling import window


class Weights(Protocol):
    """The part of the learner's policy that sampling needs."""

    version: int
    context_length: int
    device: torch.device

    @property
    def concurrent(self) -> bool:
        """Whether a version can be sampled while training makes the next one."""
        ...

    def sampling_weights(self, version: int | None) -> AbstractContextManager[nn.Module]:
        """The model to call for the weights of `version` (None: the base model)."""
        ...


@dataclass(slots=True, eq=False)
class _Call:
    """A request somebody awaits: a row to decode, or tokens to score."""

    policy: int | None
    waiter: Waiter
    row: Row | None = None
    tokens: tuple[int, ...] = ()
    start: int = 0
    result: Any = field(default=None)

    @property
    def order(self) -> tuple[Any, ...]:
        if self.row is None:
            return (0, self.tokens, self.start)
        asked = self.row.request
        law = (asked.temperature, asked.top_p, asked.stop_ids)
        return (1, asked.tokens, asked.seed, asked.max_new, *law, asked.session or "")


class LocalEngine:
    """Samples from the learner's own policy. `stride` tokens are decoded between two moments of admission and delivery;
    `kv_bytes` bounds the memory for keys and values (default: as configured, else a quarter of the device's)."""

    def __init__(
        self, policy: Weights, config: EngineConfig | None = None, *, stride: int | None = None,
        kv_bytes: int | None = None,
    ) -> None:
        self.policy, self.config = policy, config or EngineConfig()
        self.device = policy.device
        self.stride = stride or (8 if self.device.type == "cpu" else 16)
        self._kv_bytes = kv_bytes or int((self.config.kv_gb or 0) * 2**30) or _quarter(self.device)
        self._decoder: Decoder | None = None
        self._reuse = Reuse()
        self._version: int | None = None
        self.callers = Callers(self.config.deterministic)
        self._changed = self.callers.changed
        self._queue: list[_Call] = []
        self._running: dict[Row, _Call] = {}
        self._released: list[str] = []
        self._forgetting = False
        self._thread: threading.Thread | None = None

    @property
    def context_length(self) -> int:
        """The longest sequence that the model takes."""
        return min(self.policy.context_length, self.config.context or self.policy.context_length)

    @property
    def concurrent(self) -> bool:
        """See `Engine`. The policy says whether it hands out snapshots or the weights in training."""
        return self.policy.concurrent

    def join(self, count: int) -> None:
        """See `Engine`."""
        self.callers.join(count)

    def leave(self) -> None:
        """See `Engine`."""
        self.callers.leave()

    async def sample(self, request: Request) -> Sample:
        """See `Engine`. Raises EngineError where the prompt is empty or leaves no room for a token."""
        row = Row(request, room(request, self.context_length))
        call = _Call(request.policy, waiter(), row)
        try:
            return await self._ask(call)
        except asyncio.CancelledError:
            row.cancelled = True
            raise

    async def score(self, tokens: Sequence[int], start: int, policy: int | None) -> list[float]:
        """See `Engine`. One plain forward pass, independent of the decoder."""
        if not 0 < start <= len(tokens):
            raise EngineError(f"cannot score from {start} in a sequence of {len(tokens)} tokens")
        return await self._ask(_Call(policy, waiter(), None, tuple(tokens), start))

    def release(self, session: str) -> None:
        """See `Engine`."""
        with self._changed:
            self._released.append(session)

    def load_policy(self, version: int) -> None:
        """See `Engine`. The model is the learner's own, so the proof is that the learner has this version."""
        if self.policy.version != version:
            raise EngineError(f"asked to serve policy {version}, but the learner is at {self.policy.version}")
        with self._changed:
            if self._queue or self._running:
                raise EngineError("weights cannot change while requests are under way")
            if self._decoder is not None:
                self._decoder.memory.forget()
            with self.policy.sampling_weights(version):
                self._version = version

    def counts(self) -> Mapping[str, float]:
        """See `Engine`. How much of the prompts was there already: `Reuse`."""
        counted = self._reuse.metrics()
        self._reuse.needed = self._reuse.kept = self._reuse.copied = 0
        return counted

    def pause(self) -> None:
        """See `Engine`. Keys and values of episodes between two turns are forgotten; idle, the whole slab is."""
        with self._changed:
            if self._queue or self._running:
                self._forgetting = True                    # by the worker, at the next admission: it is at work there
            elif self._decoder is not None:
                self._decoder.slab.drop()
                self._decoder = self._decoder_over(self._decoder.slab)

    def resume(self) -> None:
        """See `Engine`. The slab grows again with the first request."""

    def close(self) -> None:
        """Stop the worker; whatever still waits gets an EngineError."""
        self.callers.close()
        if self._thread is not None:
            self._thread.join()
        self._fail([*self._queue, *self._running.values()], EngineError("the engine was closed"))

    async def _ask(self, call: _Call) -> Any:
        self._check(call.policy)
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="espl-engine", daemon=True)
                self._thread.start()
            self._queue.append(call)
            self.callers.asked(call.waiter[0])
        return await call.waiter[1]

    def _check(self, policy: int | None) -> None:
        if self.callers.closed:
            raise EngineError("the engine is closed")
        if policy is not None and policy != self._version:
            raise EngineError(f"asked for policy {policy}, but policy {self._version} is loaded")
        if policy is not None and policy != self.policy.version and not self.concurrent:
            raise EngineError(f"policy {policy} is loaded, but the learner has moved on to {self.policy.version}")

    def _work(self) -> None:
        """The worker: bursts of work under one policy each."""
        while self._settled():
            with self._changed:
                policy = min((call.policy for call in self._queue), key=lambda p: -1 if p is None else p)
            try:
                with torch.no_grad(), self.policy.sampling_weights(policy) as model:
                    done = self._burst(model, policy)
            except Exception as error:
                self._break(policy, error)
            else:
                self._deliver(done)

    def _settled(self) -> bool:
        """Wait for work, and in deterministic mode for every caller; False once the engine is closed."""
        return self.callers.wait(lambda: len(self._queue) + len(self._running))

    def _burst(self, model: nn.Module, policy: int | None) -> list[_Call]:
        """Serve `policy` until nothing of it is left; the calls that ended last are returned, all others delivered."""
        if self._decoder is None:
            self._decoder = self._decoder_over(slab_for(model, compile=self.config.compile))
        self._decoder.slab.model = model
        with window("sampling") as piece:
            while True:
                done = self._admit(self._decoder, model, policy)
                if self._decoder.active:
                    done += [self._finish(row) for row in self._decoder.stride(self.stride)]
                piece()
                if not self._running and not any(call.policy == policy for call in self._queue):
                    return done
                self._deliver(done)
                if not self._settled():
                    return []

    def _decoder_over(self, slab: Slab) -> Decoder:
        return Decoder(slab, self.device, self.config.slots, self._kv_bytes, self._reuse)

    def _admit(self, decoder: Decoder, model: nn.Module, policy: int | None) -> list[_Call]:
        """Take what fits from the queue; scores are computed at once and returned."""
        with self._changed:
            for session in self._released:
                decoder.memory.release(session)
            self._released.clear()
            if self._forgetting:
                decoder.memory.forget()
                self._forgetting = False
            self._queue = [call for call in self._queue if call.row is None or not call.row.cancelled]
            ours = sorted((call for call in self._queue if call.policy == policy), key=lambda call: call.order)
        scores = [call for call in ours if call.row is None]
        calls = {call.row: call for call in ours if call.row is not None}
        for call in scores:
            call.result = _score(model, call.tokens, call.start)
        admitted = decoder.admit(list(calls), policy)
        taken = {id(call) for call in scores} | {id(calls[row]) for row in admitted}
        with self._changed:
            self._queue = [call for call in self._queue if id(call) not in taken]
            self._running.update((row, calls[row]) for row in admitted)
        return scores

    def _finish(self, row: Row) -> _Call:
        with self._changed:
            call = self._running.pop(row)
        stop = row.stop or "length"
        call.result = Sample(tuple(row.tokens), tuple(row.logprobs), stop, call.policy)
        return call

    def _deliver(self, calls: list[_Call]) -> None:
        self.callers.deliver([(call.waiter, call.result, None) for call in calls])

    def _fail(self, calls: list[_Call], error: Exception) -> None:
        self.callers.deliver([(call.waiter, None, error) for call in calls])

    def _break(self, policy: int | None, error: Exception) -> None:
        """The model failed: everybody who waits for this policy is told, and the memory starts afresh."""
        with self._changed:
            failed = [*self._running.values(), *(call for call in self._queue if call.policy == policy)]
            self._queue = [call for call in self._queue if call.policy != policy]
            self._running.clear()
            self._decoder = None
        broken = EngineError(f"{type(error).__name__} while sampling: {error}")
        broken.__cause__ = error
        self._fail(failed, broken)


def _score(model: nn.Module, tokens: tuple[int, ...], start: int) -> list[float]:
    ids = torch.tensor([tokens], device=next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(tokens) - start + 1).logits[0, :-1]
    logp = logits.float().log_softmax(-1)                                      # (scored, vocab)
    return logp.gather(1, ids[0, start:, None])[:, 0].double().tolist()


def _quarter(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 4
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
