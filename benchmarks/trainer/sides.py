"""The two trainers, each in a process of its own, each doing one step when it is told to.

Ours is `espl_train.loop.Trainer` with evolution off: environment, chat template, engine, learner, nothing left out but
files. TRL's is `GRPOTrainer` with transformers' `generate` (its other sampler without a GPU, continuous batching, is
slower), all sequences in one forward pass, and what only costs time switched off.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.trainer.process import Meter, told
from benchmarks.trainer.work import ENV, Work, conversations, reward
from espl_train.records import Rollout

NEVER = 2**31 - 1   # ends a sequence, and is no token
CONTEXT = 2048      # tokens of the longest sequence: what engines reserve memory for


def ours(work: Work, pipe: Connection) -> None:
    """Serve steps of our trainer."""
    with our_trainer(work) as trainer:
        meter = Meter(work.device)
        pipe.send("ready")
        while told(pipe) == "step":
            meter.start()
            done = trainer.iterate()
            assert done.update is not None and done.update.skipped is None
            if done.update.tokens != work.tokens:
                raise SystemExit(f"ours trained on {done.update.tokens} tokens, not on {work.tokens}")
            meter.add(sum(r.sampled_tokens for r in done.rollouts))
            pipe.send(meter.stop())


@contextmanager
def our_trainer(work: Work) -> Iterator[Any]:
    """Our trainer, which writes no files while it iterates."""
    from espl_train.loop import Trainer
    from espl_train.runs.console import Console
    from espl_train.runs.directory import RunDirectory
    from espl_train.settings import load

    with tempfile.TemporaryDirectory() as folder:
        config = load(overrides={
            "mode": "rl", "steps": 10**6, "out": f"{folder}/run", "tensorboard": False, "env.id": ENV,
            "env.args.vocabulary": work.vocabulary, "model.path": work.model, "model.threads": work.threads,
            "model.dtype": work.dtype, "model.device": work.device, "model.templates": "micro",
            "engine.kind": "vllm" if work.vllm else "local", "engine.context": CONTEXT,
            "rollout.prompts": 1, "rollout.problems": work.problems, "rollout.samples": work.samples,
            "rollout.max_new_tokens": work.new_tokens, "rollout.max_total_tokens": work.new_tokens,
            "rollout.temperature": work.temperature, "evolution.root": work.principles,
            "evolution.max_principles": max(len(work.principles), 1), "learner.rank": work.rank,
            "learner.alpha": work.rank, "learner.learning_rate": work.learning_rate, "learner.normalise": "token_mean",
            "learner.compile": work.compile,
            "evaluation.every": 0,
        })
        with RunDirectory.create(config) as run:
            trainer = Trainer(config, run, Console(quiet=True))
            trainer.chat.stop_ids = ()                     # replies of equal length on both sides
            try:
                yield trainer
            finally:
                trainer.close()


def trl(work: Work, pipe: Connection) -> None:
    """Serve steps of TRL's trainer, from inside its own loop."""
    from transformers import TrainerCallback

    class OnDemand(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            pipe.send("ready")
            self.wait(control)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            if meter.tokens != work.tokens:
                raise SystemExit(f"TRL trained on {meter.tokens} tokens, not on {work.tokens}")
            pipe.send(meter.stop())
            self.wait(control)

        def wait(self, control: Any) -> None:
            if told(pipe) == "step":
                meter.start()
            else:
                control.should_training_stop = True

    def rewards(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        meter.add(sum(map(len, completion_ids)))
        return [reward(completion[0]["content"]) for completion in completions]

    with trl_trainer(work, rewards, callbacks=[OnDemand()]) as trainer:
        meter = Meter(work.device)
        trainer.train()


def replaying(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Arguments of `trl_trainer` that give it these rollouts (one turn each) and their rewards, whatever is asked."""

    def replay(prompts: list[Any], trainer: Any) -> dict[str, Any]:  # noqa: ARG001
        turns = [rollout.turns[0] for rollout in rollouts]
        return {
            "prompt_ids": [list(turn.context) for turn in turns],
            "completion_ids": [list(turn.tokens) for turn in turns],
            "logprobs": [list(turn.logprobs) for turn in turns],
            "given": [rollout.reward for rollout in rollouts],
        }

    return {"rewards": lambda given, **_: given, "rollout_func": replay}


@contextmanager
def trl_trainer(work: Work, rewards: Callable[..., list[float]], **options: Any) -> Iterator[Any]:
    """TRL's trainer, set up for the same work."""
    import torch
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from transformers.utils import logging

    disable_progress_bar()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"           # of `rollout_func`
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(work.threads)
    prompts = [[m.to_openai() for m in c] for c in conversations(system_prompt(work), work.vocabulary)]
    lora = LoraConfig(r=work.rank, lora_alpha=work.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=getattr(torch, work.dtype))
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model, rewards, GRPOConfig(folder, **_same_work(work), **_spared(work)),
            train_dataset=Dataset.from_dict({"prompt": prompts}), peft_config=lora,
            processing_class=AutoTokenizer.from_pretrained(work.model), **options,
        )
        trainer.eos_token_ids = []                         # replies of equal length on both sides
        trainer.remove_callback(PrinterCallback)
        yield trainer


def _same_work(work: Work) -> dict[str, Any]:
    """What decides how much is to be done, and what is learnt. `dapo` with one iteration per batch is the policy
    gradient with ratio 1, a mean over all tokens: `importance_sampling` with `token_mean` on our side."""
    size = work.micro_batch or work.sequences
    return {
        "per_device_train_batch_size": size, "gradient_accumulation_steps": work.sequences // size,
        "num_generations": work.samples, "max_completion_length": work.new_tokens, "temperature": work.temperature,
        "loss_type": "dapo", "scale_rewards": "none", "beta": 0.0, "num_iterations": 1, "max_grad_norm": 1.0,
        "learning_rate": work.learning_rate, "lr_scheduler_type": "constant", "adam_beta1": 0.9, "adam_beta2": 0.95,
        "adam_epsilon": 1e-8, "weight_decay": 0.0, "max_steps": 10**6, "use_cpu": work.device == "cpu",
    }


def _spared(work: Work) -> dict[str, Any]:
    """What costs TRL time by default and is not part of a step, or slows a CPU down: off."""
    vllm = {
        "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3, "vllm_max_model_length": CONTEXT,
        "vllm_importance_sampling_correction": False,      # on by default: one more forward pass
    }
    return {
        "gradient_checkpointing": False,                   # on by default: a second forward pass
        "bf16": work.dtype == "bfloat16",                  # on by default: autocast, slow on most CPUs
        "generation_kwargs": {"ignore_eos": True} if work.vllm else {"eos_token_id": NEVER},
        "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False, **(vllm if work.vllm else {}),
    }


def system_prompt(work: Work) -> str:
    """The text of the system message, as our trainer renders it."""
    from espl_train.evolution.prompts import Principle
    from espl_train.evolution.templates import TemplateSet

    principles = [Principle(f"G{i}", text) for i, text in enumerate(work.principles, 1)]
    return TemplateSet.load("micro").system(principles)
