"""What a CUDA machine makes of it, at the shapes of Qwen2.5-0.5B, 1.5B and Qwen3-4B with random weights, in bf16.

Sampled tokens per second (our engines, bare vLLM with the same adapter and without), seconds from new weights to the
first token sampled from them, trained tokens per second and MFU (as it is, and with compiled layers), and seconds per
whole step against TRL with vLLM.
Every measurement has a process of its own, so that all of the GPU is its own. Without vLLM (or TRL) what needs it is
left out and said; what fails or takes too long says why, and the next is measured. MFU is counted on sequences that
share nothing, over the floating-point operations of LoRA training

    4·P·s + 6·A·s + 6·s²·d·L + 4·V·H·n    per sequence of s tokens, n of them sampled

(P weights of linear layers without head, A of the adapter; frozen weights have no gradient, so 4 and not 6; attention
of width d in L layers is causal; recomputation by checkpointing is not counted), over the GPU's dense bf16 peak.
Figures are written after every measurement, into what is there of the same work: a machine that is lent for minutes is
used shape by shape, and measurement by measurement.
Run: python -m benchmarks.trainer.gpu [--shapes Qwen2.5-1.5B …] [--only learning …] [--write [FILE]]; --tiny rehearses
every line on a CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, machine, vllm_package
from benchmarks.trainer.models import SHAPES, shaped
from benchmarks.trainer.process import Failed, Figures, Meter, Side, in_process
from benchmarks.trainer.sides import CONTEXT, our_trainer, ours, trl
from benchmarks.trainer.work import Work, conversations
from espl_train.compiling import missing
from espl_train.engines.base import Request, Sample
from espl_train.learner.logprobs import sequence_logprobs
from espl_train.randomness import derive, generator
from espl_train.records import Group, Rollout, RolloutKey, StopReason, Turn

ROUNDS = 3
COMPARED = 4           # samples whose log-probabilities are compared with the learner's
LIMIT = 240.0          # seconds that one measurement may take
NAMES = (
    "sampling, local engine", "sampling, vllm engine", "sampling, bare vLLM", "learning", "learning, compiled",
    "step, ours", "step, TRL",
)
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}      # dense bf16, SXM

Row = dict[str, float]


def sampling(work: Work) -> Row:
    """Our engine: tokens per second, seconds from new weights to a token of theirs, and how far its log-probabilities
    are from the learner's, on average."""
    with our_trainer(work) as trainer:
        engine, policy = trainer.engine, trainer.policy
        prompts = _prompts(work, trainer)

        async def play(count: int, new: int) -> list[Sample]:
            asked = [
                Request(prompt, new, derive(0, i), (), policy=policy.version)
                for i, prompt in enumerate(prompts[:count])
            ]
            return list(await asyncio.gather(*map(engine.sample, asked)))

        def fresh() -> object:
            policy.advance()
            engine.load_policy(policy.version)
            return asyncio.run(play(1, 1))

        engine.load_policy(policy.version)
        rate = _rate(lambda: sum(len(sample.tokens) for sample in asyncio.run(play(len(prompts), work.new_tokens))))
        return {
            "tokens_per_s": rate, "sync_s": statistics.median(_seconds(fresh) for _ in range(ROUNDS)),
            "mismatch": _mismatch(policy, prompts, asyncio.run(play(COMPARED, work.new_tokens))),
        }


def bare_vllm(work: Work) -> Row:
    """vLLM alone: the same prompts, lengths and log-probabilities, with an adapter and without."""
    if work.device == "cpu":
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    with tempfile.TemporaryDirectory() as folder:
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in _saved_adapter(work, folder)]
        llm = LLM(
            model=work.model, dtype=work.dtype, max_model_len=CONTEXT, enable_lora=True, max_lora_rank=work.rank,
            gpu_memory_utilization=0.5, logprobs_mode="processed_logprobs",
        )
        how = SamplingParams(temperature=1.0, max_tokens=work.new_tokens, ignore_eos=True, logprobs=0)

        def play(lora: LoRARequest | None) -> int:
            replies = llm.generate(prompts, how, lora_request=lora, use_tqdm=False)
            return sum(len(reply.outputs[0].token_ids) for reply in replies)

        adapted = _rate(lambda: play(LoRARequest("adapter", 1, folder)))
        return {"tokens_per_s": adapted, "tokens_per_s_without_adapter": _rate(lambda: play(None))}


def learning(work: Work) -> Row:
    """Our learner on sequences without a common prefix: tokens per second (prompts included), MFU, peak memory."""
    with our_trainer(work) as trainer:
        groups, meter = _distinct(work), Meter(work.device)
        played: list[Figures] = []
        for _ in range(ROUNDS + 1):
            meter.start()
            done = trainer.learner.update(groups)
            assert done.skipped is None, done.skipped
            played.append(meter.stop())
        lengths = [len(r.turns[0].context) + len(r.turns[0].tokens) for group in groups for r in group.rollouts]
        seconds = statistics.median(figures.seconds for figures in played[1:])
        speed = _operations(trainer.policy, lengths, work) / seconds
        row = {
            "tokens_per_s": sum(lengths) / seconds, "tflops": speed / 1e12,
            "peak_memory_gib": max(figures.memory for figures in played) / 1024,
        }
        peak = _peak()
        return {**row, "mfu": speed / peak} if peak else row


def whole_step(run: Callable[..., None], work: Work, limit: float) -> Row:
    """A whole training step of one of the two sides."""
    with Side(run, work, limit) as side:
        side.ready()
        played = [side.step() for _ in range(ROUNDS + 1)][1:]
    seconds = statistics.median(figures.seconds for figures in played)
    memory = max(figures.memory for figures in played) / 1024
    return {"seconds_per_step": seconds, "sampled_tokens_per_s": work.tokens / seconds, "peak_memory_gib": memory}


@torch.no_grad()
def _mismatch(policy: Any, prompts: list[tuple[int, ...]], samples: list[Sample]) -> float:
    """Mean |log-probability by the learner - by the sampler|."""
    gaps: list[float] = []
    for prompt, sample in zip(prompts, samples, strict=False):
        mine = policy.run(sequence_logprobs, prompt + sample.tokens, len(prompt)).tolist()
        gaps += [abs(a - b) for a, b in zip(mine, sample.logprobs, strict=True)]
    return statistics.fmean(gaps)


def _prompts(work: Work, trainer: Any) -> list[tuple[int, ...]]:
    """Of one step: every problem as often as there are samples."""
    (island,) = trainer.islands
    asked = conversations(island.text(island.population.root.id), work.vocabulary)[: work.problems]
    return [tuple(trainer.chat.open(messages)) for messages in asked for _ in range(work.samples)]


def _saved_adapter(work: Work, folder: str) -> list[tuple[int, ...]]:
    """Write an adapter that is not zero; the prompts of one step."""
    with our_trainer(replace(work, vllm=False, device="cpu")) as trainer:
        random = torch.Generator().manual_seed(1)
        policy = trainer.policy
        policy.load_state({k: v + 0.02 * torch.randn(v.shape, generator=random) for k, v in policy.state().items()})
        policy.save_adapter(folder)
        return _prompts(work, trainer)


def _distinct(work: Work) -> list[Group]:
    """As many sequences as in a step, of the same lengths, every one with a prompt of its own."""
    random = generator(0, "distinct")

    def ids(count: int) -> tuple[int, ...]:
        return tuple(int(i) for i in random.integers(10, work.vocabulary, count))

    rollouts = []
    for sample in range(work.sequences):
        turn = Turn(ids(3 * work.rules + 20), ids(work.new_tokens), (-12.0,) * work.new_tokens)
        key = RolloutKey(0, "p0000", 0, sample)
        rollouts.append(Rollout(key, "t", (turn,), (), float(sample % 2), StopReason.ANSWER, 0))
    return [Group("p0000", 0, "t", tuple(rollouts), tuple(r.reward - 0.5 for r in rollouts))]


def _operations(policy: Any, lengths: list[int], work: Work) -> float:
    """Floating-point operations of one update, by the formula above."""
    config = policy.causal.config.get_text_config()
    adapter = sum(p.numel() for p in policy.trainable_parameters().values())
    linear = sum(p.numel() for name, p in policy.model.named_parameters() if "base_layer.weight" in name)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    head = 4 * config.vocab_size * config.hidden_size * work.new_tokens
    return float(sum(
        4 * linear * s + 6 * adapter * s + 6 * s * s * width * config.num_hidden_layers + head for s in lengths
    ))


def _peak() -> float | None:
    """Of this GPU, in operations per second; None where that is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def _rate(play: Callable[[], int]) -> float:
    """Tokens per second, the middle of some rounds after one that is not counted."""
    play()
    rates = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        rates.append(play() / (time.perf_counter() - begun))
    return statistics.median(rates)


def _seconds(act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def measurements(work: Work, vllm: bool, with_trl: bool, limit: float) -> Iterator[tuple[str, Callable[[], Row]]]:
    """What can be measured here, by name."""
    local, both = replace(work, vllm=False), replace(work, vllm=vllm)
    everything: tuple[tuple[bool, Callable[[], Row]], ...] = (
        (True, lambda: in_process(sampling, local, limit=limit)),
        (vllm, lambda: in_process(sampling, both, limit=limit)),
        (vllm, lambda: in_process(bare_vllm, work, limit=limit)),
        (True, lambda: in_process(learning, local, limit=limit)),
        (missing(work.device) is None, lambda: in_process(learning, replace(local, compile=True), limit=limit)),
        (True, lambda: whole_step(ours, both, limit)),
        (with_trl, lambda: whole_step(trl, both, limit)),
    )
    yield from ((name, measure) for name, (possible, measure) in zip(NAMES, everything, strict=True) if possible)


def measured(measure: Callable[[], Row]) -> dict[str, Any]:
    """Its figures, or why there are none; and how long that took."""
    begun = time.perf_counter()
    try:
        row: dict[str, Any] = dict(measure())
    except Failed as error:
        row = {"error": str(error)}
    return {**row, "took_s": round(time.perf_counter() - begun, 1)}


class Results:
    """The file of figures, if one is wanted: by shape and measurement, those of other work replaced."""

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        self.path, self.head = path, head
        known = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self.shapes: dict[str, Any] = known.get("shapes", {}) if known.get("gpu") == head["gpu"] else {}

    def begin(self, shape: str, work: dict[str, Any]) -> None:
        if self.shapes.get(shape, {}).get("work") != work:
            self.shapes[shape] = {"work": work}

    def add(self, shape: str, name: str, row: dict[str, Any]) -> None:
        self.shapes[shape][name] = row
        if self.path is not None:
            aside = self.path.with_suffix(".aside")
            aside.write_text(json.dumps({**self.head, "shapes": self.shapes}, indent=1) + "\n")
            aside.rename(self.path)


@contextmanager
def _work(name: str, options: argparse.Namespace) -> Iterator[Work]:
    dtype, device = ("float32", "cpu") if options.tiny else ("bfloat16", "cuda")
    with tempfile.TemporaryDirectory() as folder:
        model = in_process(shaped, Path(folder), name, getattr(torch, dtype), device)      # which lets go of the GPU
        yield Work(
            model, options.problems, options.samples, options.new_tokens, vocabulary=SHAPES[name].vocab_size,
            micro_batch=options.micro_batch, dtype=dtype, device=device, learning_rate=1e-5,
        )


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def _options() -> argparse.Namespace:
    shapes = [name for name in SHAPES if name != "tiny"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=shapes)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="; ".join(NAMES))
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences per forward pass of TRL's learner")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that one measurement may take")
    parser.add_argument("--tiny", action="store_true", help="a model of nothing on a CPU: does every line run?")
    parser.add_argument("--write", nargs="?", type=Path, const=RESULTS / "trainer_gpu.json", metavar="FILE",
                        help="add the figures to FILE, benchmarks/results/trainer_gpu.json by default")
    options = parser.parse_args()
    if options.tiny:
        options.problems, options.samples, options.new_tokens, options.micro_batch = 2, 2, 8, 4
        options.shapes = ["tiny"]
    elif not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here: run on a GPU machine, or rehearse with --tiny")
    return options


def main() -> None:
    options = _options()
    here = {name: importlib.util.find_spec(name) is not None for name in ("vllm", "trl")}
    for name in (name for name, found in here.items() if not found):
        print(f"{name} is not installed: what needs it is left out")
    packages = [vllm_package()] * here["vllm"] + ["trl"] * here["trl"]
    results = Results(options.write, {**machine("peft", *packages), "gpu": in_process(_gpu)})
    failed = 0
    for name in options.shapes:
        with _work(name, options) as work:
            results.begin(name, {key: value for key, value in asdict(work).items() if key != "model"})
            for label, measure in measurements(work, here["vllm"], here["trl"], options.limit):
                if label not in options.only:
                    continue
                row = measured(measure)
                results.add(name, label, row)
                failed += "error" in row
                told = (f"{key} {value if isinstance(value, str) else f'{value:,.3g}'}" for key, value in row.items())
                print(f"{name:14} {label:24} {', '.join(told)}", flush=True)
    if failed:
        raise SystemExit(f"{failed} measurements failed")


if __name__ == "__main__":
    main()
