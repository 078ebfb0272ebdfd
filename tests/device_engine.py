"""The local engine and the probe on the pretend device: what they sample and score, and when they wait."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from device_kit import CPU, DEVICE, Model, changed, close, llama, measured, policy_on, qwen, refused
from engine_kit import request
from transformers import GPT2Config, GPT2LMHeadModel

from espl_train.config import EngineConfig
from espl_train.engines import decode
from espl_train.engines.base import EngineError, Request, Sample
from espl_train.engines.kv import KVSlab, TokenSlab, slab_for
from espl_train.engines.local import LocalEngine
from espl_train.engines.probe import Passage, Probe

PER_STRIDE = 2          # tokens, and their log-probabilities


def _engine_on(device: torch.device, model: Model = qwen) -> LocalEngine:
    engine = LocalEngine(policy_on(device, model), EngineConfig(slots=8), kv_bytes=2**20)
    engine.load_policy(0)
    return engine


def _ask(engine: LocalEngine, asked: Sequence[Request]) -> list[Sample]:
    async def everything() -> list[Sample]:
        return list(await asyncio.gather(*map(engine.sample, asked)))

    return asyncio.run(everything())


def _conversation() -> list[list[Request]]:
    """Turns of episodes with common and other heads, under many laws, with more requests than slots."""
    head = list(range(2, 24))
    laws: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"temperature": 0.7}, {"top_p": 0.8}, {"policy": None}]
    first = [
        request([*head, 30 + i // 2], seed=i, session=f"s{i}", max_new=3 + i, **laws[i % 5]) for i in range(10)
    ]
    return [first, [request([*r.tokens, 40, 41], seed=99, session=r.session, policy=r.policy) for r in first]]


def the_local_engine_samples_what_it_samples_on_the_cpu() -> None:
    for model in (qwen, llama):
        here, there = (_engine_on(device, model) for device in (CPU, DEVICE))
        for asked in _conversation():
            for one, other in zip(_ask(there, asked), _ask(here, asked), strict=True):
                assert one.tokens == other.tokens and one.stop == other.stop
                for a, b in zip(one.logprobs, other.logprobs, strict=True):
                    close(a, b)
            for engine in (here, there):
                engine.pause()
                engine.resume()
        for policy in (0, None):
            scores = [asyncio.run(engine.score(range(2, 12), 3, policy)) for engine in (here, there)]
            for a, b in zip(*scores, strict=True):
                close(a, b)
        for engine in (here, there):
            engine.close()


def every_slab_works_on_the_device() -> None:
    """The written step, transformers' modules on our attention, and whole sequences again for other architectures."""
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    for model, kind in ((qwen().to(DEVICE), KVSlab), (GPT2LMHeadModel(config).eval().to(DEVICE), KVSlab)):
        with torch.no_grad():
            assert type(slab_for(model)) is kind
    slab = TokenSlab(qwen().to(DEVICE))
    slab.resize(2, 16)
    with torch.no_grad():
        slab.write([0, 1], [0, 0], [[2, 3, 4], [5]])
        slab.move([0], [1], 3)
        tokens, positions = (torch.tensor([6, 7]).to(DEVICE), torch.tensor([3, 3]).to(DEVICE))
        assert slab.step(tokens, positions, 4).shape == (2, 61)


def a_stride_waits_twice_and_a_prefill_never() -> None:
    engine, strides = _engine_on(DEVICE), []
    asked = _conversation()[0]
    _ask(engine, asked[:1])                                     # the first proves the slab
    run = decode.Decoder.stride
    counted = changed(decode.Decoder, "stride", lambda self, steps: (strides.append(steps), run(self, steps))[1])
    with counted, measured() as meter:
        _ask(engine, [r for r in asked if r.policy == 0])
    engine.close()
    assert strides and meter.waited == PER_STRIDE * len(strides), (dict(meter.waits), len(strides))


def an_engine_that_leaves_a_tensor_on_the_cpu_is_noticed() -> None:
    """Mutant: what is uploaded for a stride is not."""
    engine = _engine_on(DEVICE)
    _ask(engine, _conversation()[0][:1])
    with changed(decode, "upload", lambda tensor, device: tensor):      # noqa: ARG005
        refused(lambda: _ask(engine, _conversation()[0]), EngineError, "same device")
    engine.close()


def the_probe_believes_the_engine_and_not_another() -> None:
    policy = policy_on(DEVICE)
    engine = LocalEngine(policy, EngineConfig(slots=8), kv_bytes=2**20)

    class Local:
        def look(
            self, requests: Sequence[Request], passages: Sequence[Passage], start: int
        ) -> tuple[list[Sample], list[list[float]]]:
            read = [asyncio.run(engine.score(tokens, start, version)) for tokens, version in passages]
            return _ask(engine, requests), read

    class Stale(Local):
        def look(self, *asked: Any) -> tuple[list[Sample], list[list[float]]]:
            drawn, read = super().look(*asked)
            return drawn, [values[::-1] for values in read]

    probe = Probe(policy)
    probe.begin(Local())
    engine.load_policy(0)
    probe.prove(Local(), 0)
    assert probe.distance < 1e-4
    refused(lambda: probe.prove(Stale(), 0), EngineError, "does not serve")
    engine.close()
