"""Seconds per training step, ours against TRL's GRPOTrainer: same model, prompts, replies, loss, optimiser; fp32, CPU.

Each side has a process of its own; they take turns, step by step. Before that they must agree on the gradient of one
batch (`agreement.py`). Settings of TRL, and why: `sides.py`. Needs TRL: pip install "espl[dev]".
Run: python -m benchmarks.trainer.step [--rounds 3] [--threads 1] [--write]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.common import machine, write
from benchmarks.trainer.agreement import agree
from benchmarks.trainer.models import MICRO, llama
from benchmarks.trainer.process import Figures, Side, in_process
from benchmarks.trainer.sides import ours, trl
from benchmarks.trainer.work import Work

BOUND = 3.0
SHAPES = ((8, 8), (2, 8))      # problems × samples


def compare(name: str, work: Work, rounds: int) -> dict[str, Any]:
    """Both sides in turn, `rounds` times after a first one that is not counted; prints and returns the figures."""
    same = in_process(agree, replace(work, problems=2, samples=4)).check()
    with Side(ours, work) as us, Side(trl, work) as them:
        us.ready()
        them.ready()
        played = [(us.step(), them.step()) for _ in range(rounds + 1)][1:]
    mine, theirs = (Median(column) for column in zip(*played, strict=True))
    ratio = statistics.median(b.seconds / a.seconds for a, b in played)
    cpu = statistics.median(b.cpu / a.cpu for a, b in played)
    shape = f"{work.problems} × {work.samples} × {work.new_tokens}"
    print(f"{name:24} {shape:>11} {mine.seconds:9.2f} {theirs.seconds:9.2f} {ratio:7.2f} {cpu:11.2f} "
          f"{work.tokens / mine.seconds:9,.0f} {work.tokens / theirs.seconds:9,.0f} "
          f"{mine.memory:8,.0f} {theirs.memory:8,.0f} {same.gradient:11.1e}", flush=True)
    return {
        **{key: value for key, value in asdict(work).items() if key != "model"},
        "ours": mine.json(), "trl": theirs.json(),
        "ratio": ratio, "ratio_by_cpu_time": cpu, "agreement": asdict(same),
    }


class Median:
    """The middle of several steps, figure by figure; of memory the most."""

    def __init__(self, steps: tuple[Figures, ...]) -> None:
        self.seconds = statistics.median(step.seconds for step in steps)
        self.cpu = statistics.median(step.cpu for step in steps)
        self.memory = max(step.memory for step in steps)
        self.rate = steps[0].tokens / self.seconds

    def json(self) -> dict[str, float]:
        return {
            "seconds_per_step": self.seconds, "cpu_seconds_per_step": self.cpu, "sampled_tokens_per_s": self.rate,
            "peak_memory_mib": self.memory,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch, for each side; they take turns")
    parser.add_argument("--model", choices=("bundled", "random"), help="only this one")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/trainer_step.json")
    options = parser.parse_args()
    print(f"{'':24} {'':>11} {'seconds per step':>19} {'times faster':>19} {'tokens per s':>19} {'MiB on top':>17}")
    print(f"{'model':24} {'work':>11} {'ours':>9} {'TRL':>9} {'':>7} {'by CPU time':>11} {'ours':>9} {'TRL':>9} "
          f"{'ours':>8} {'TRL':>8} {'gradients':>11}")
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {"bundled": ("bundled model, 0.8M", str(MICRO)), "random": ("random Llama, 6M", folder)}
        if options.model != "bundled":
            llama(Path(folder))
        for name, path in [models[options.model]] if options.model else models.values():
            for problems, samples in SHAPES:
                work = Work(path, problems, samples, options.new_tokens, threads=options.threads)
                figures[f"{name}, {problems} x {samples} x {options.new_tokens}"] = compare(name, work, options.rounds)
    if options.write:
        write("trainer_step", {**machine("trl", "peft"), "workloads": figures})
    if (least := min(row["ratio"] for row in figures.values())) < BOUND:
        raise SystemExit(f"{least:.2f} times faster at the least: the bound is {BOUND:g}")


if __name__ == "__main__":
    main()
