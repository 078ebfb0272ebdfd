"""What two trainers are given to do: conversations, a reward, and every number that decides how much it is.

The conversations are those of the micro world (one system prompt of about 200 tokens before problems of about 15), or,
for models that do not know it, words "w17" of which each is a token. The reward is a hash of the reply, so that nearly
every group has a contrast and no group can be skipped by either side.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, get_args

import gymnasium

from espl_envs.core.env import TextEnv
from espl_envs.core.family import Family
from espl_envs.core.messages import Conversation
from espl_envs.core.protocol import WholeReply
from espl_envs.core.tasks import Split, StaticTasks, Task
from espl_envs.grading.verdict import Verdict
from espl_envs.tasks.conventions import RULES, SYMBOLS, ConventionTasks
from espl_train.randomness import generator

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
    vocabulary: int = 0      # conversations of that many different words; 0 = of the micro world
    micro_batch: int = 0     # sequences per forward pass of the learner; 0 = all
    rank: int = 32
    learning_rate: float = 1e-4
    temperature: float = 1.0
    threads: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    vllm: bool = False       # samples for both sides
    compile: bool = False    # the layers of our learner

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
        if self.vocabulary:
            rules = [_words(self.vocabulary, 2, "rule", i) for i in range(self.rules)]
        return tuple(". ".join(rules[i : i + 2]) for i in range(0, len(rules), 2))


def reward(text: str) -> float:
    """A number in [0, 1) that depends on every character and on nothing else."""
    return zlib.crc32(text.encode()) / 2**32


class HashEnv(TextEnv):
    """Problems in one reply each, rewarded by `reward`; see `Work.vocabulary`."""

    def __init__(self, vocabulary: int = 0, **settings: Any) -> None:
        sources = {split: partial(_problems, split, vocabulary) for split in get_args(Split)}
        super().__init__(Family(sources=sources, grade=_grade, protocol=WholeReply()), **settings)


async def _grade(task: Task, answer: str) -> Verdict:  # noqa: ARG001
    return Verdict(reward(answer))


@cache
def _problems(split: Split, vocabulary: int) -> StaticTasks:
    if vocabulary:
        texts = [_words(vocabulary, 15, split, i) for i in range(PROBLEMS)]
        return StaticTasks([Task(f"{split}-{i}", split, text, "") for i, text in enumerate(texts)])
    world = ConventionTasks(0, split, 1.0, 1.0)
    return StaticTasks([world[i] for i in range(PROBLEMS)])


def _words(vocabulary: int, count: int, *key: object) -> str:
    return " ".join(f"w{i}" for i in generator(0, "words", *key).integers(10, vocabulary, count))


gymnasium.register(ENV, HashEnv)


def conversations(system_prompt: str, vocabulary: int = 0) -> list[Conversation]:
    """All prompts of the training split, as messages."""
    env = HashEnv(vocabulary, split="train")
    tasks = range(PROBLEMS)
    return [env.reset(seed=0, options={"task": i, "system_prompt": system_prompt})[0] for i in tasks]
