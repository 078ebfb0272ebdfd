"""From the learner's step to a sampler that is proven to serve it: seconds by stage, and how closely the two agree.

Publish: the adapter written whole to a directory of its own. Load: taken by vLLM in place of the one before. Prove: the
identity probe, mostly forward passes. Each round changes every adapted weight first. The agreement is over
replies that vLLM samples under a non-zero adapter: its log-probabilities against the learner's, per token.
Models: the bundled one, and a random one of the shapes of Qwen2.5 (--shape); one bundled model only with --quick.
Run where vLLM is installed (make vllm): python -m benchmarks.trainer.sync [--shape Qwen2.5-1.5B] [--quick] [--write]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.common import machine, vllm_package, write
from benchmarks.trainer.models import SHAPES, shaped
from espl_train.config import Config
from espl_train.engines.base import Request, Sample
from espl_train.engines.choice import engine_for
from espl_train.engines.vllm import VllmEngine
from espl_train.learner.loading import precision
from espl_train.learner.logprobs import sequence_logprobs
from espl_train.learner.policy import Policy
from espl_train.randomness import derive, generator
from espl_train.settings import load

TEMPERATURES = (0.7, 1.0, 1.3)
REPLIES, GIVEN, SAMPLED = 24, 32, 64      # at each temperature; tokens of a prompt and of a reply
STEP = 1e-3                               # how far a round moves every adapted weight


def shake(policy: Policy, round: int) -> int:
    """Other weights, as after an optimiser step; returns their version."""
    random = torch.Generator(policy.device).manual_seed(round)
    with torch.no_grad():
        for weight in policy.trainable_parameters().values():
            weight.add_(STEP * torch.randn(weight.shape, generator=random, device=weight.device))
    return policy.advance()


def stages(engine: VllmEngine, policy: Policy, rounds: int) -> dict[str, Any]:
    """Median seconds of each stage, after a first round that is not counted."""
    syncs = []
    for round in range(rounds + 1):
        engine.load_policy(shake(policy, round))
        assert engine.last_sync is not None
        syncs.append({**asdict(engine.last_sync), "total": engine.last_sync.total})
    return {stage: statistics.median(sync[stage] for sync in syncs[1:]) for stage in syncs[0]}


def agreement(engine: VllmEngine, policy: Policy) -> dict[str, dict[str, float]]:
    """|Δ| of the log-probabilities of sampled tokens, by temperature: mean and worst."""
    vocabulary = policy.causal.get_input_embeddings().weight.shape[0]
    figures = {}
    for temperature in TEMPERATURES:
        requests = [
            Request(tuple(generator(i).integers(0, vocabulary, GIVEN).tolist()), SAMPLED, derive(i, temperature), (),
                    temperature, policy=policy.version)
            for i in range(REPLIES)
        ]
        distances: list[float] = []
        for request, sample in zip(requests, asyncio.run(_all(engine, requests)), strict=True):
            with torch.no_grad():
                own = sequence_logprobs(policy.causal, request.tokens + sample.tokens, GIVEN, temperature)
            distances += (own.cpu() - torch.tensor(sample.logprobs)).abs().tolist()
        figures[f"{temperature:g}"] = {"mean": statistics.fmean(distances), "worst": max(distances)}
    return figures


async def _all(engine: VllmEngine, requests: Sequence[Request]) -> list[Sample]:
    return list(await asyncio.gather(*map(engine.sample, requests)))


def measured(name: str, config: Config, rounds: int) -> dict[str, Any]:
    """One model: prints and returns its figures."""
    policy = Policy.load(config.model, config.learner)
    engine = engine_for(config, policy)
    assert isinstance(engine, VllmEngine)
    try:
        adapted = sum(p.numel() for p in policy.trainable_parameters().values())
        seconds = stages(engine, policy, rounds)
        agree = agreement(engine, policy)
    finally:
        engine.close()
    worst = max(figures["mean"] for figures in agree.values())
    print(f"{name:28} {adapted / 1e6:8.1f} {seconds['publish']:9.3f} {seconds['load']:9.3f} {seconds['prove']:9.3f} "
          f"{seconds['total']:9.3f} {worst:12.2g}", flush=True)
    return {"adapted_parameters": adapted, "rank": config.learner.rank, "dtype": precision(config.model),
            "device": str(policy.device), "seconds": seconds, "mean_and_worst_difference_by_temperature": agree}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="Qwen2.5-1.5B")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the random model")
    parser.add_argument("--quick", action="store_true", help="the bundled model only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/trainer_sync.json")
    options = parser.parse_args()
    print(f"{'seconds':28} {'M params':>8} {'publish':>9} {'load':>9} {'prove':>9} {'total':>9} {'mean |Δ|':>12}")
    base = {"engine.kind": "vllm", "engine.context": 1024, "engine.kv_gb": 0.5, "engine.slots": 64}
    figures = {"bundled model": measured("bundled model", load(overrides=base), options.rounds)}
    if not options.quick:
        with tempfile.TemporaryDirectory() as folder:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            path = shaped(folder, options.shape, getattr(torch, options.dtype), device)
            overrides = {**base, "model.path": path, "model.dtype": options.dtype}
            figures[options.shape] = measured(options.shape, load(overrides=overrides), options.rounds)
    if options.write:
        write("trainer_sync", {**machine(vllm_package(), "peft"), "models": figures})


if __name__ == "__main__":
    main()
