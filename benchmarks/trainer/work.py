"""What two trainers are given to do: a model, conversations, a reward, and every number that decides how much it is.

The conversations are those of the micro world: one system prompt of about 200 tokens before problems of about 15. The
reward is a hash of the reply, so that nearly every group has a contrast and no group can be skipped by either side.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import gymnasium

from espl_envs.core.env import TextEnv
from espl_envs.core.family import Family
from espl_envs.core.messages import Conversation
from espl_envs.core.protocol import WholeReply
from espl_envs.core.tasks import Split, StaticTasks, Task
from espl_envs.grading.verdict import Verdict
from espl_envs.tasks.conventions import RULES, SYMBOLS, ConventionTasks

MICRO = Path(__file__).parents[2] / "espl_train" / "models" / "micro"
ENV = "bench/Hash-v0"
PROBLEMS = 64


@dataclass(frozen=True)
class Work:
    """One training step: `problems` × `samples` replies of exactly `new_tokens` tokens, then one optimiser step."""

    model: str               # folder
    problems: int = 8
    samples: int = 8
    new_tokens: int = 64
    rules: int = 64          # sentences of the system prompt, about three tokens each; 0 = no system prompt
    micro_batch: int = 0     # sequences per forward pass of the learner; 0 = all
    rank: int = 32
    learning_rate: float = 1e-4
    temperature: float = 1.0
    threads: int = 1

    @property
    def sequences(self) -> int:
        return self.problems * self.samples

    @property
    def tokens(self) -> int:
        """Sampled ones, per step."""
        return self.sequences * self.new_tokens

    @property
    def principles(self) -> tuple[str, ...]:
        """The system prompt as principles of two rules each."""
        words = list(RULES)
        rules = [f"{SYMBOLS[i % len(SYMBOLS)]} {words[i % len(words)]}" for i in range(self.rules)]
        return tuple(". ".join(rules[i : i + 2]) for i in range(0, len(rules), 2))


def reward(text: str) -> float:
    """A number in [0, 1) that depends on every character and on nothing else."""
    return zlib.crc32(text.encode()) / 2**32


class HashEnv(TextEnv):
    """Problems of the micro world, one reply each, rewarded by `reward`."""

    def __init__(self, **settings: Any) -> None:
        sources = {split: partial(_problems, split) for split in get_args(Split)}
        super().__init__(Family(sources=sources, grade=_grade, protocol=WholeReply()), **settings)


async def _grade(task: Task, answer: str) -> Verdict:  # noqa: ARG001
    return Verdict(reward(answer))


@cache
def _problems(split: Split) -> StaticTasks:
    world = ConventionTasks(0, split, 1.0, 1.0)
    return StaticTasks([world[i] for i in range(PROBLEMS)])


gymnasium.register(ENV, HashEnv)


def conversations(system_prompt: str, count: int) -> list[Conversation]:
    """The first `count` prompts of the training split, as messages."""
    env = HashEnv(split="train")
    return [env.reset(seed=0, options={"task": i, "system_prompt": system_prompt})[0] for i in range(count)]


def random_llama(folder: Path, **shape: Any) -> str:
    """Save a random Llama with the bundled model's tokenizer; about 6 million parameters unless `shape` says else."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 7,
        "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**settings, **shape})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
