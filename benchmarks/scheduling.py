"""What it brings that long episodes start first: the same requests with and without hints, slots for a quarter.

Lengths differ by problem: most replies are short, one problem in eight has replies ten times as long. A hint is what
the trainer has: the mean length of a problem's replies. Strides of decoding are counted too: they do not depend on the
machine. On a CPU a stride costs about what its rows cost, so the clock gains less than the count.
Run: python benchmarks/scheduling.py [--rounds 3] [--write]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import load_model, machine, write
from engine import Frozen

from espl_train.config import EngineConfig
from espl_train.engines.base import Request
from espl_train.engines.decode import Decoder
from espl_train.engines.local import LocalEngine
from espl_train.randomness import generator

PROBLEMS, SAMPLES, SLOTS = 32, 8, 64
SHORT, LONG = 24, 240


def requests(vocabulary: int, hints: bool) -> list[Request]:
    """256 of them; replies of about the length of their problem, none of which ends by itself."""
    random = generator(0, "scheduling")
    found = []
    for problem in range(PROBLEMS):
        usual = LONG if problem % 8 == 5 else SHORT
        prompt = tuple(int(t) for t in random.integers(1, vocabulary, 60))
        lengths = [int(n) for n in random.integers(usual // 2, usual * 3 // 2, SAMPLES)]
        expected = round(statistics.mean(lengths)) if hints else 0
        found += [Request(prompt, n, problem * 100 + i, (), policy=0, expected=expected) for i, n in enumerate(lengths)]
    return found


def play(engine: LocalEngine, asked: Sequence[Request]) -> tuple[float, float, int]:
    """Seconds of the clock and of the processor, and steps of decoding."""
    steps = 0
    original = Decoder.stride

    def stride(decoder: Decoder, count: int) -> list[object]:
        nonlocal steps
        steps += 1
        return original(decoder, count)

    async def everything() -> None:
        await asyncio.gather(*map(engine.sample, asked))

    Decoder.stride = stride
    wall, cpu = time.perf_counter(), time.process_time()
    asyncio.run(everything())
    Decoder.stride = original
    return time.perf_counter() - wall, time.process_time() - cpu, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/scheduling.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, name = load_model(None)
    vocabulary = model.config.get_text_config().vocab_size
    engine = LocalEngine(Frozen(model), EngineConfig(slots=SLOTS))
    engine.load_policy(0)
    blind, seeing = requests(vocabulary, False), requests(vocabulary, True)
    with torch.no_grad():
        rounds = [(play(engine, blind), play(engine, seeing)) for _ in range(options.rounds + 1)][1:]
    engine.close()
    ratios = [statistics.median(a[i] / b[i] for a, b in rounds) for i in range(3)]
    figures = dict(zip(("ratio", "ratio_by_cpu_time", "ratio_by_strides"), ratios, strict=True))
    print(f"{name}, {len(blind)} requests, {SLOTS} slots: longest first is {ratios[0]:.2f} times faster by the clock, "
          f"{ratios[1]:.2f} by processor time, {ratios[2]:.2f} by strides")
    if options.write:
        write("scheduling", {**machine(), "model": name, "requests": len(blind), "slots": SLOTS, **figures})


if __name__ == "__main__":
    main()
