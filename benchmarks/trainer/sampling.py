"""Sampled tokens per second: the local engine, `model.generate`, and vLLM where it is installed.

Same model, same prompts (3 system prompts × 10 problems × 8 samples), every reply exactly as long, fp32 on a CPU, one
process, one side after the other in every round. `generate` gets one left-padded batch and is spared the
log-probabilities, which engines deliver. The engines are measured on the base model and under an adapter: the local one
merges it, vLLM applies it beside the base weights. Replicas are processes of their own, with as many threads each. Bare
vLLM is its own `LLM.generate` without adapters.
Run: python -m benchmarks.trainer.sampling [--model PATH] [--rounds 3] [--tokens 64] [--threads 1] [--write]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.common import machine, vllm_package, write
from espl_train.config import Config
from espl_train.engines.base import Engine, Request
from espl_train.engines.choice import engine_for
from espl_train.learner.loading import locate, precision
from espl_train.learner.policy import Policy
from espl_train.randomness import derive, generator
from espl_train.settings import load, override

PROMPTS, PROBLEMS, SAMPLES = 3, 10, 8
SYSTEM, PROBLEM = 150, 20          # tokens

Ids = tuple[int, ...]


def prompts(vocabulary: int) -> list[Ids]:
    """Every system prompt before every problem, each as often as it is sampled."""
    def draw(count: int, *key: str | int) -> Ids:
        return tuple(generator("sampling", *key).integers(5, vocabulary, count).tolist())

    heads = [draw(SYSTEM, "system", i) for i in range(PROMPTS)]
    problems = [draw(PROBLEM, "problem", i) for i in range(PROBLEMS)]
    return [head + problem for head in heads for problem in problems for _ in range(SAMPLES)]


def sampled(engine: Engine, asked: Sequence[Ids], tokens: int, policy: int | None) -> int:
    """All prompts at once through an engine; the number of tokens that came back."""

    async def everything() -> int:
        requests = (Request(ids, tokens, derive(i), (), policy=policy) for i, ids in enumerate(asked))
        return sum(len(sample.tokens) for sample in await asyncio.gather(*map(engine.sample, requests)))

    return asyncio.run(everything())


@torch.no_grad()
def generated(model: Any, asked: Sequence[Ids], tokens: int) -> int:
    """The same through `model.generate`, as one batch."""
    ids = torch.tensor(asked, device=model.device)                # all prompts are of one length
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0,
    )
    return int(out[:, ids.shape[1] :].numel())


@contextmanager
def sides(config: Config, policy: Policy, asked: Sequence[Ids], tokens: int) -> Iterator[dict[str, Callable[[], int]]]:
    """Whoever can sample here, by name; bare vLLM has a turn of its own, because one process holds one vLLM."""
    with policy.reference() as model:
        found: dict[str, Callable[[], int]] = {"model.generate": lambda: generated(model, asked, tokens)}
    kinds: dict[str, dict[str, Any]] = {"local engine": {}}
    if find_spec("vllm") is not None:       # replicas first: vLLM binds its process to cores, and all that it starts
        replicas = {"2 vLLM replicas": {"engine.kind": "vllm", "engine.replicas": 2}} if find_spec("ray") else {}
        kinds |= {**replicas, "vLLM engine": {"engine.kind": "vllm"}}
    engines = [engine_for(override(config, changes), policy) for changes in kinds.values()]
    for kind, engine in zip(kinds, engines, strict=True):
        engine.load_policy(policy.version)
        for what, version in (("", None), (", adapter", policy.version)):
            found[kind + what] = lambda engine=engine, version=version: sampled(engine, asked, tokens, version)
    try:
        yield found
    finally:
        for engine in engines:
            engine.close()


@contextmanager
def bare(config: Config, asked: Sequence[Ids], tokens: int) -> Iterator[dict[str, Callable[[], int]]]:
    """vLLM by itself; nothing where it is not installed."""
    if find_spec("vllm") is None:
        yield {}
        return
    from vllm import LLM, SamplingParams

    llm = LLM(
        locate(config.model.path), dtype=precision(config.model), skip_tokenizer_init=True, generation_config="vllm",
        max_model_len=config.engine.context, max_num_seqs=config.engine.slots, kv_cache_memory_bytes=2**30, seed=0,
        use_tqdm_on_load=False,
    )
    law = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False)

    def play() -> int:
        out = llm.generate([{"prompt_token_ids": list(ids)} for ids in asked], law, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in out)

    yield {"bare vLLM": play}
    llm.llm_engine.engine_core.shutdown()


def rates(side: dict[str, Callable[[], int]], rounds: int, expected: int) -> dict[str, float]:
    """Median tokens per second of each side, in turn, after a first round that is not counted."""
    seen: dict[str, list[float]] = {name: [] for name in side}
    for _ in range(rounds + 1):
        for name, play in side.items():
            begun = time.perf_counter()
            assert play() == expected, name
            seen[name].append(expected / (time.perf_counter() - begun))
    return {name: statistics.median(values[1:]) for name, values in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="micro", help="'micro', a folder or a hub id")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="of every reply")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/trainer_sampling.json")
    options = parser.parse_args()
    context = SYSTEM + PROBLEM + options.tokens
    config = load(overrides={
        "model.path": options.model, "model.threads": options.threads, "engine.context": context, "engine.kv_gb": 1.0,
        "engine.slots": PROMPTS * PROBLEMS * SAMPLES, "model.device": "cpu",
    })
    policy = Policy.load(config.model, config.learner)
    asked = prompts(policy.causal.get_input_embeddings().weight.shape[0])
    expected = len(asked) * options.tokens
    with sides(config, policy, asked, options.tokens) as ours:
        figures = rates(ours, options.rounds, expected)
    with bare(config, asked, options.tokens) as alone:
        figures |= rates(alone, options.rounds, expected)
    print(f"{len(asked)} replies of {options.tokens} tokens, tokens per second {'against generate':>24}")
    for name, rate in figures.items():
        print(f"{name:32} {rate:12,.0f} {rate / figures['model.generate']:18.2f}")
    if options.write:
        packages = (vllm_package(),) if "bare vLLM" in figures else ()
        write("trainer_sampling", {
            **machine(*packages), "model": options.model, "threads": options.threads, "replies": len(asked),
            "tokens": options.tokens, "tokens_per_second": figures,
            "against_generate": {name: rate / figures["model.generate"] for name, rate in figures.items()},
        })


if __name__ == "__main__":
    main()
