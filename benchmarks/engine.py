"""Tokens per second of the local engine against a batched `model.generate` per turn: same model, same episodes.

The baseline is what one would write first: all episodes that go on, left-padded, one `generate` per turn, finished
rows decoded along until the longest is done. It is spared the log-probabilities, which the engine delivers. Both sides
pay for the environment and the chat template. Run: python benchmarks/engine.py [--rounds 3] [--write]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import MICRO, load_model, machine, write
from episodes import MAX_NEW, Episode, Ids, dialect, scripted, stops
from torch import nn
from transformers import AutoTokenizer

from espl_train.config import EngineConfig
from espl_train.engines.base import Request
from espl_train.engines.local import LocalEngine
from espl_train.randomness import derive


class Frozen:
    """The part of a policy that the engine needs, over a plain model."""

    version = 0
    concurrent = True

    def __init__(self, model: nn.Module) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.context_length = int(model.config.get_text_config().max_position_embeddings)

    @contextmanager
    def sampling_weights(self, version: int | None) -> Iterator[nn.Module]:  # noqa: ARG002
        yield self.model


def play_engine(engine: LocalEngine, episodes: Sequence[Episode], ends: Ids) -> int:
    """Sampled tokens of all episodes on the local engine."""

    async def play(episode: Episode, name: str) -> int:
        engine.join(1)
        tokens, sampled, turn = episode.begin(), 0, 0
        try:
            while True:
                request = Request(tokens, MAX_NEW, derive(episode.seed, turn), ends, policy=0, session=name)
                sample = await engine.sample(request)
                sampled, turn = sampled + len(sample.tokens), turn + 1
                follow_up = episode.answer(sample.tokens)
                if follow_up is None:
                    return sampled
                tokens += sample.tokens + follow_up
        finally:
            engine.release(name)
            engine.leave()

    async def everything() -> int:
        return sum(await asyncio.gather(*(play(episode, str(i)) for i, episode in enumerate(episodes))))

    return asyncio.run(everything())


def play_generate(model: nn.Module, episodes: Sequence[Episode], ends: Ids) -> int:
    """Sampled tokens of all episodes with one batched `generate` per turn."""
    tokens = {i: episode.begin() for i, episode in enumerate(episodes)}
    sampled = 0
    while tokens:
        rows = list(tokens)
        longest = max(len(tokens[i]) for i in rows)
        padding = {i: longest - len(tokens[i]) for i in rows}
        out = model.generate(
            input_ids=torch.tensor([(0,) * padding[i] + tokens[i] for i in rows]),
            attention_mask=torch.tensor([(0,) * padding[i] + (1,) * len(tokens[i]) for i in rows]),
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=MAX_NEW, eos_token_id=list(ends), pad_token_id=0,
        )[:, longest:].tolist()
        going_on = {}
        for i, reply in zip(rows, out, strict=True):
            end = next((n + 1 for n, token in enumerate(reply) if token in ends), len(reply))
            sampled += end
            follow_up = episodes[i].answer(tuple(reply[:end]))
            if follow_up is not None:
                going_on[i] = tokens[i] + tuple(reply[:end]) + follow_up
        tokens = going_on
    return sampled


@dataclass(frozen=True)
class Rate:
    """Sampled tokens per second of the clock, and of processor time (which a busy machine disturbs less)."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, play: Callable[[], int]) -> Rate:
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = play()
        return cls(tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu))


def compare(name: str, model: nn.Module, episodes: Sequence[Episode], ends: Ids, rounds: int) -> dict[str, object]:
    """Both sides in turn, `rounds` times after a first one that is not counted; prints and returns the figures."""
    engine = LocalEngine(Frozen(model), EngineConfig())
    engine.load_policy(0)

    with torch.no_grad():
        torch.manual_seed(0)
        sides = (lambda: play_engine(engine, episodes, ends)), (lambda: play_generate(model, episodes, ends))
        played = [[Rate.of(side) for side in sides] for _ in range(rounds + 1)][1:]
    engine.close()
    ours, theirs = (statistics.median(side) for side in zip(*((a.wall, b.wall) for a, b in played), strict=True))
    ratio = statistics.median(a.wall / b.wall for a, b in played)
    cpu = statistics.median(a.cpu / b.cpu for a, b in played)
    print(f"{name:42} {ours:8,.0f} {theirs:10,.0f} {ratio:7.2f} {cpu:11.2f}", flush=True)
    return {"engine_tokens_per_s": ours, "generate_tokens_per_s": theirs, "ratio": ratio, "ratio_by_cpu_time": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id, for scripted episodes only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/engine.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'240 episodes, tokens per second':42} {'engine':>8} {'generate':>10} {'ratio':>7} {'by CPU time':>11}")
    figures = {}
    if options.model is None and (MICRO / "config.json").is_file():
        model, _ = load_model(str(MICRO))
        episodes, chat = dialect(AutoTokenizer.from_pretrained(MICRO))
        name = "bundled model, espl/Conventions-v0"
        figures[name] = compare(name, model, episodes, chat.stop_ids, options.rounds)
    model, name = load_model(options.model)
    vocabulary = model.config.get_text_config().vocab_size
    figures[name] = compare(name, model, scripted(vocabulary), stops(vocabulary), options.rounds)
    if options.write:
        write("engine", {**machine(), "threads": options.threads, "workloads": figures})


if __name__ == "__main__":
    main()
