"""What an evaluation writes down: one self-contained `Episode` per (env, split, task, sample, system prompt).

An episode is one strict JSON line that a person can read without this package: messages stand in OpenAI's shape.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Self

from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Conversation, Message


class BadRecord(EsplError):
    """A line is no record of an episode."""


class Outcome(StrEnum):
    """What became of an episode. Only a fault has no score; it is played again when the run is resumed."""

    ANSWERED = "answered"          # the environment ended the episode with an answer
    NO_ANSWER = "no_answer"        # it ended without a readable answer: score 0
    TRUNCATED = "truncated"        # a budget ran out (turns, tokens, tool calls, seconds): scored as the env scored it
    AGENT_ERROR = "agent_error"    # the agent raised, hung, or returned what is no reply: score 0, with the reason
    FAULT = "fault"                # infrastructure failed (endpoint, sandbox, grader): no score


@dataclass(frozen=True, slots=True, order=True)
class EpisodeKey:
    """Names an episode within a run. `task` is an index into the split, `system_prompt` one into the configuration's
    `system_prompts` (0: the only one, or the environment's own where none were given).
    """

    env: str
    split: str
    task: int
    sample: int
    system_prompt: int = 0

    def __str__(self) -> str:
        prompt = f" under prompt {self.system_prompt}" if self.system_prompt else ""
        return f"{self.env} {self.split}[{self.task}] sample {self.sample}{prompt}"


@dataclass(frozen=True, slots=True)
class TurnUsage:
    """What one call of the model took; None (of texts "") where nobody said. `tool_calls` are those its reply made,
    `cost` is in the currency of the price table, `finish_reason` the server's word (stop, length …), `reasoning` what
    it returned beside the message: kept, never sent back.
    """

    prompt_tokens: int | None
    completion_tokens: int | None
    tool_calls: int
    seconds: float
    cost: float | None = None
    finish_reason: str = ""
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class Episode:
    """One finished episode.

    score: what the benchmark counts, None exactly for a fault. reward: what the environment paid (may be shaped).
    stop_reason: the environment's word for how it ended. answer: what was graded; reference: the expected answer.
    info: the environment's last info, flat. messages: the whole conversation. error: one sentence, for agent errors and
    faults. attempts: how often it was started, this time included. seconds: wall-clock. started: UTC, ISO 8601.
    """

    key: EpisodeKey
    task_id: str
    task_hash: str
    outcome: Outcome
    score: float | None
    reward: float | None = None
    stop_reason: str = ""
    answer: str | None = None
    reference: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    messages: Conversation = ()
    turns: tuple[TurnUsage, ...] = ()
    error: str | None = None
    attempts: int = 1
    seconds: float = 0.0
    started: str = ""

    def __post_init__(self) -> None:
        if (self.score is None) != (self.outcome is Outcome.FAULT):
            raise ValueError(f"outcome is {self.outcome} and score is {self.score}: exactly a fault has no score")
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(f"score is {self.score}, expected a finite number")
        if self.outcome in (Outcome.AGENT_ERROR, Outcome.FAULT) and not self.error:
            raise ValueError(f"outcome is {self.outcome}, but no error says why")

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens read in all calls; None where one is unknown."""
        return _total([turn.prompt_tokens for turn in self.turns])

    @property
    def completion_tokens(self) -> int | None:
        """Tokens written in all calls; None where one is unknown."""
        return _total([turn.completion_tokens for turn in self.turns])

    @property
    def tool_calls(self) -> int:
        return sum(turn.tool_calls for turn in self.turns)

    @property
    def cost(self) -> float | None:
        """In the currency of the price table; None where one call's is unknown."""
        return _total([turn.cost for turn in self.turns])

    def to_json(self) -> str:
        """One line without its line break, always valid UTF-8: a text with lone surrogates is written in escapes.
        Values of `info` that JSON lacks become null (NaN, infinities), numbers (numpy's) or text."""
        record = {
            **asdict(self.key),
            "task_id": self.task_id,
            "task_hash": self.task_hash,
            "outcome": str(self.outcome),
            "score": self.score,
            "reward": _plain(self.reward),
            "stop_reason": self.stop_reason,
            "answer": self.answer,
            "reference": self.reference,
            "error": self.error,
            "attempts": self.attempts,
            "seconds": self.seconds,
            "started": self.started,
            "turns": [asdict(turn) for turn in self.turns],
            "info": _plain(self.info),
            "messages": [message.to_openai() for message in self.messages],
        }
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        try:
            line.encode()
        except UnicodeEncodeError:
            return json.dumps(record, ensure_ascii=True, allow_nan=False)
        return line

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """Read what `to_json` wrote. Raises BadRecord for anything else."""
        try:
            raw = json.loads(line)
            return cls(
                key=EpisodeKey(raw["env"], raw["split"], raw["task"], raw["sample"], raw["system_prompt"]),
                outcome=Outcome(raw["outcome"]),
                info=raw["info"],
                messages=tuple(Message.from_openai(message) for message in raw["messages"]),
                turns=tuple(TurnUsage(**turn) for turn in raw["turns"]),
                **{name: raw[name] for name in _VERBATIM},
            )
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise BadRecord(f"this is no record of an episode ({type(error).__name__}: {error})") from error


_VERBATIM = (
    *("task_id", "task_hash", "score", "reward", "stop_reason", "answer", "reference"),
    *("error", "attempts", "seconds", "started"),
)


def _total(values: Sequence[Any]) -> Any:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _plain(value: Any) -> Any:
    """`value` as strict JSON."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)
