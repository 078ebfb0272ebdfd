"""The engine protocol: token ids in, token ids and log-probabilities out.

An engine never sees text, prompts or rewards. Every engine passes `tests/test_engines_conformance.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to sample. `tokens` is the whole sequence so far; `seed` alone decides the random draws.

    `temperature` 0 is greedy. `policy=None` asks for the base model (adapter off: the reference policy). `session`
    names an episode: an engine may keep its KV cache between the turns of one session until `release(session)`.
    `expected` tokens will about be sampled in the rest of the episode (0: unknown): where not all requests can start at
    once, the longest do. It decides nothing else.
    """

    tokens: tuple[int, ...]
    max_new: int
    seed: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    policy: int | None = None
    session: str | None = None
    expected: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """Sampled ids (the stop id included where one was sampled) and the log-probability of each under the distribution
    that was sampled from: after temperature, and after truncation where top_p < 1. Greedy: log-probabilities at T=1.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: Literal["stop", "length"]
    policy: int | None


class EngineError(RuntimeError):
    """The engine broke or could not prove what it serves. Infrastructure: never a reward."""


def room(request: Request, context_length: int) -> int:
    """Tokens that `request` may sample. Raises EngineError where its prompt is empty or leaves no room for one."""
    limit = min(request.max_new, context_length - len(request.tokens))
    if not request.tokens or limit < 1:
        raise EngineError(f"a prompt of {len(request.tokens)} tokens does not fit 1..{context_length - 1}")
    return limit


class Engine(Protocol):
    """A sampler of one base model under at most one adapter at a time (or the base model alone)."""

    @property
    def context_length(self) -> int:
        """The longest sequence (prompt and completion together) that the model takes."""
        ...

    @property
    def concurrent(self) -> bool:
        """Whether this engine may go on sampling the loaded version while the learner makes the next one."""
        ...

    def join(self, count: int) -> None:
        """`count` more callers (episodes, reflection calls) now feed this engine; see `leave`."""
        ...

    def leave(self) -> None:
        """One caller is done and will not ask again. Between `join` and `leave` a caller is either waiting for a
        sample or about to ask for one: that lets a deterministic engine admit requests at reproducible moments."""
        ...

    async def sample(self, request: Request) -> Sample: ...

    async def score(self, tokens: Sequence[int], start: int, policy: int | None) -> list[float]:
        """Log-probabilities (T=1) of tokens[start:], each given all before it."""
        ...

    def release(self, session: str) -> None:
        """Forget what is kept for `session`; unknown sessions are fine."""
        ...

    def load_policy(self, version: int) -> None:
        """From now on serve this version of the weights. Raises EngineError if it cannot prove that it does."""
        ...

    def counts(self) -> Mapping[str, float]:
        """What was counted since the last call, by the names of metrics."""
        ...

    def pause(self) -> None:
        """The learner is about to work: free the memory that nothing under way needs. May be repeated."""
        ...

    def resume(self) -> None:
        """The learner has finished: what `pause` freed is taken back when it is needed. May be repeated."""
        ...

    def close(self) -> None: ...
