"""What one iteration is about, as flat frozen records: Turn → Rollout → Group.

Lists are flat. A group is found by its key, never by its place in a nested list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from espl_envs.core.messages import Conversation


class StopReason(StrEnum):
    """Why a rollout ended."""

    ANSWER = "answer"            # the environment terminated: an answer was given
    TRUNCATED = "truncated"      # the environment truncated: one of its own budgets ran out
    MAX_TURNS = "max_turns"      # the trainer's limits
    MAX_TOKENS = "max_tokens"
    CONTEXT = "context"
    DEADLINE = "deadline"        # seconds: masked like a fault
    FAULT = "fault"              # infrastructure failed: no reward, masked, never scored 0


@dataclass(frozen=True, slots=True)
class RolloutKey:
    """Names a rollout for ever: all of its randomness is derived from (run seed, this key)."""

    step: int
    prompt: str      # SystemPrompt.id
    task: int        # index into the train (or validation, test) split
    sample: int      # 0..samples-1
    attempt: int = 0
    split: str = "train"


@dataclass(frozen=True, slots=True)
class Turn:
    """One reply of the model: the exact ids it was given and the exact ids it sampled.

    `context` are the ids that were appended before sampling (on the first turn the whole prompt, later the template's
    suffix: tool or user messages plus the generation prompt); `tokens` the sampled ids, stop id included where it was
    sampled; `logprobs` one per sampled id, under the distribution that was really sampled from (temperature included).
    `fork`: the template changed what stood before, so `context` is not appended: it is the whole prompt anew, and a new
    training sequence begins.
    """

    context: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    fork: bool = False


@dataclass(frozen=True, slots=True)
class Rollout:
    """One played episode. The training sequence is the concatenation context₀ tokens₀ context₁ tokens₁ …, and one more
    begins at each fork."""

    key: RolloutKey
    task_id: str
    turns: tuple[Turn, ...]
    messages: Conversation
    reward: float
    stop: StopReason
    policy: int                                  # version of the weights that sampled it
    info: Mapping[str, Any] = field(default_factory=dict)   # the env's last info, flat and JSON-able
    seconds: float = 0.0

    @property
    def faulted(self) -> bool:
        """Whether it has no reward: infrastructure failed, or time ran out, which says nothing of the policy."""
        return self.stop in (StopReason.FAULT, StopReason.DEADLINE)

    @property
    def sampled_tokens(self) -> int:
        return sum(len(turn.tokens) for turn in self.turns)

    @property
    def forks(self) -> int:
        """How often the template rewrote the conversation."""
        return sum(turn.fork for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Group:
    """The rollouts of one (prompt, problem) pair, with their advantages once the baseline was applied.

    `advantages` has one entry per rollout; all zero where the group carries no contrast. None is a rollout that takes
    no part in the update: it faulted, or was cut off and such ones are filtered.
    """

    prompt: str
    task: int
    task_id: str
    rollouts: tuple[Rollout, ...]
    advantages: tuple[float | None, ...] = ()

    @property
    def rewards(self) -> tuple[float, ...]:
        """Of the rollouts that have one: faulted ones are masked."""
        return tuple(r.reward for r in self.rollouts if not r.faulted)

    @property
    def contrast(self) -> bool:
        """Whether there is something to learn: some rollout did better than another."""
        return any(self.advantages)


def grouped(rollouts: Iterable[Rollout]) -> list[Group]:
    """Rollouts by (prompt, problem), in the order in which the pairs first appear."""
    found: dict[tuple[str, int], list[Rollout]] = {}
    for rollout in rollouts:
        found.setdefault((rollout.key.prompt, rollout.key.task), []).append(rollout)
    return [Group(prompt, task, members[0].task_id, tuple(members)) for (prompt, task), members in found.items()]
