"""Memory of one update at a vocabulary of 152 thousand tokens, ours against TRL's: same rollouts, same loss, fp32, CPU.

The model is so narrow that the output head decides: who holds `tokens × vocabulary` is seen at once. Each side has a
process of its own. Resident: the high-water mark of an update, less what was in memory when all was loaded. Tensors:
the most that the next update held, by torch's own count of its allocations. Without a GPU, TRL's chunked head takes
every position (prompts and padding too) and works with plain torch operations; with one it does neither.
Run: python -m benchmarks.trainer.memory [--threads 1] [--write]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.common import machine, write
from benchmarks.trainer.models import VOCABULARY, llama
from benchmarks.trainer.process import Meter, in_process
from benchmarks.trainer.sides import replaying, trl_trainer
from benchmarks.trainer.work import Work
from espl_train.randomness import generator
from espl_train.records import Group, Rollout, RolloutKey, StopReason, Turn

BOUND = 2.0
SYSTEM, PROBLEM, SHORTEST, LONGEST = 200, 40, 16, 128


@dataclass(frozen=True)
class Peak:
    """MiB of one update on top of the loaded model."""

    resident: float
    tensors: float


def ours(work: Work) -> Peak:
    """Our learner."""
    from espl_train.config import LearnerConfig, ModelConfig
    from espl_train.learner.policy import Policy
    from espl_train.learner.update import Learner

    longest = SYSTEM + PROBLEM + LONGEST
    config = LearnerConfig(
        rank=work.rank, alpha=work.rank, learning_rate=work.learning_rate, normalise="token_mean",
        micro_batch_tokens=work.micro_batch * longest,
    )
    policy = Policy.load(ModelConfig(path=work.model, threads=work.threads), config)
    learner = Learner(policy, config)
    meter, groups = Meter(), batch(work)
    meter.start()
    learner.update(groups)
    resident = meter.stop().memory
    return Peak(resident, _tensors(lambda: learner.update(groups)))


def theirs(work: Work) -> Peak:
    """TRL's trainer, its rollouts handed to it."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Two steps: the high-water mark of the first, torch's own count in the second."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            if state.global_step == 0:
                meter.start()
            else:
                recorder.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            if state.global_step == 1:
                peak.append(meter.stop().memory)
            else:
                recorder.__exit__(None, None, None)
                control.should_training_stop = True

    peak: list[float] = []
    rollouts = [rollout for group in batch(work) for rollout in group.rollouts]
    with trl_trainer(work, callbacks=[Watch()], **replaying(rollouts)) as trainer:
        meter, recorder = Meter(), _recorder()
        trainer.train()
    return Peak(peak[0], _peak(recorder))


def batch(work: Work) -> list[Group]:
    """Rollouts in random tokens: one system prompt, a few problems, replies of 16 to 128 tokens."""
    random = generator(0, "memory")

    def ids(count: int) -> tuple[int, ...]:
        return tuple(int(i) for i in random.integers(10, VOCABULARY, count))

    system, groups = ids(SYSTEM), []
    for task in range(work.problems):
        context, rollouts = system + ids(PROBLEM), []
        for sample in range(work.samples):
            tokens = ids(int(random.integers(SHORTEST, LONGEST + 1)))
            turn = Turn(context, tokens, tuple(-12.0 for _ in tokens))
            key = RolloutKey(0, "p0000", task, sample)
            rollouts.append(Rollout(key, f"t{task}", (turn,), (), float(sample), StopReason.ANSWER, 0))
        mean = (work.samples - 1) / 2
        groups.append(Group("p0000", task, f"t{task}", tuple(rollouts), tuple(r.reward - mean for r in rollouts)))
    return groups


def _tensors(update: Callable[[], object]) -> float:
    with _recorder() as recorder:
        update()
    return _peak(recorder)


def _recorder() -> profile:
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def _peak(recorder: profile) -> float:
    """The most MiB that were allocated at once, from when the recorder began."""
    assert recorder.profiler is not None and recorder.profiler.kineto_results is not None
    changes = [
        (event.start_ns(), event.nbytes())
        for event in recorder.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    now = most = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        now += change
        most = max(most, now)
    return most / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/trainer_memory.json")
    options = parser.parse_args()
    print(f"{'8 sequences, MiB on top':28} {'resident':>15} {'':>6} {'torch tensors':>15} {'':>6}")
    print(f"{'micro-batch':28} {'ours':>7} {'TRL':>7} {'ratio':>6} {'ours':>7} {'TRL':>7} {'ratio':>6}")
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        model = llama(
            Path(folder), vocab_size=VOCABULARY, hidden_size=64, intermediate_size=176, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4,
        )
        for size in (8, 1):
            work = Work(model, 1, 8, LONGEST, micro_batch=size, threads=options.threads)
            a, b = in_process(ours, work), in_process(theirs, work)
            figures[f"{size} at a time"] = {"ours": asdict(a), "trl": asdict(b), "ratio": b.resident / a.resident}
            print(f"{f'{size} at a time':28} {a.resident:7,.0f} {b.resident:7,.0f} {b.resident / a.resident:6.2f} "
                  f"{a.tensors:7,.0f} {b.tensors:7,.0f} {b.tensors / a.tensors:6.2f}", flush=True)
    if options.write:
        write("trainer_memory", {**machine("trl", "peft"), "vocabulary": VOCABULARY, "micro_batches": figures})
    if (least := min(row["ratio"] for row in figures.values())) < BOUND:
        raise SystemExit(f"TRL takes only {least:.2f} times our memory: the bound is {BOUND:g}")


if __name__ == "__main__":
    main()
