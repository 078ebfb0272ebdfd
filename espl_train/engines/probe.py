"""Proof that a sampler serves the learner's weights: the same tokens, the log-probabilities of both, compared.

Samplers that go on serving old weights, or the base model, raise no error and sample plausible text; training on it
looks like training. So after each load the engine must show log-probabilities that only the right weights give: over
fixed passages, and of tokens that it draws at two temperatures. Where the change of the weights is smaller than the
rounding of their dtype, its direction over all tokens is still compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from espl_train.engines.base import EngineError, Request, Sample
from espl_train.learner.logprobs import sequence_logprobs
from espl_train.learner.policy import Policy
from espl_train.randomness import derive, generator

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}      # mean over the tokens of a probe
TEMPERATURES = (1.0, 0.7)
PASSAGES, GIVEN, DRAWN = 3, 8, 32          # passages, tokens that each begins with, tokens drawn after them
ANSWER = 16                                # tokens drawn at each temperature after a load
CLEAR = 20.0                               # a change this many times the rounding must be seen
TRIAL = -1                                 # the version of an adapter that is there for a test only

Values = list[float]
Passage = tuple[tuple[int, ...], int | None]      # tokens, policy


class Witness(Protocol):
    """A sampler on trial, asked while nothing else is under way."""

    def draw(self, requests: Sequence[Request]) -> list[Sample]: ...

    def read(self, passages: Sequence[Passage], start: int) -> list[Values]:
        """Log-probabilities (T=1) of every passage's tokens from `start` on, each under its policy."""
        ...


@dataclass(frozen=True, slots=True)
class Seen:
    """What learner and engine said of the fixed passages under one policy (None: the base model), token by token."""

    policy: int | None
    claimed: Values
    served: Values


class Probe:
    """The identity probe of one engine. `begin` once, `prove` after every load; both raise EngineError."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.tolerance = TOLERANCE.get(next(policy.causal.parameters()).dtype, 0.05)
        self.distance = math.nan           # mean |Δ| of the last proof
        self._passages: list[tuple[int, ...]] = []
        self._base: Seen | None = None
        self._last: Seen | None = None

    def begin(self, witness: Witness) -> None:
        """Draw the passages from the base model and prove the base model."""
        vocabulary = self.policy.causal.get_input_embeddings().weight.shape[0]
        heads = [tuple(generator("probe", i).integers(0, vocabulary, GIVEN).tolist()) for i in range(PASSAGES)]
        drawn = witness.draw([Request(head, DRAWN, derive("probe", i), ()) for i, head in enumerate(heads)])
        self._passages = [head + sample.tokens for head, sample in zip(heads, drawn, strict=True)]
        self._base = self._last = self._see(witness, None)

    def prove(self, witness: Witness, version: int) -> None:
        """The engine serves `version`, which the learner holds now, and beside it still the base model."""
        seen = self._see(witness, version)
        self._moved(seen)
        self._answers(witness, version)
        self._last = seen

    def again(self, witness: Witness, version: int) -> None:
        """The engine still serves `version`, the last that was proven, whatever the learner holds by now."""
        assert self._last is not None and self._last.policy == version
        self._read(witness, version, self._last.claimed)

    def _see(self, witness: Witness, version: int | None) -> Seen:
        claimed = _flat(self._claims(self._passages, version))
        return Seen(version, claimed, self._read(witness, version, claimed))

    def _read(self, witness: Witness, version: int | None, claimed: Values) -> Values:
        """What the engine says under `version`, and in the same batch under the base model: they must not mix."""
        expected = {None: self._base.claimed if self._base else claimed, version: claimed}
        read = witness.read([(passage, policy) for policy in expected for passage in self._passages], GIVEN)
        served: Values = []
        for i, (policy, claims) in enumerate(expected.items()):
            served = _flat(read[i * PASSAGES : (i + 1) * PASSAGES])
            self.distance = _mean(claims, served)
            if not self.distance <= self.tolerance:
                raise self._error(policy, self.distance, "on fixed passages", self._guess(claims, served))
        return served

    def _claims(self, passages: Sequence[Sequence[int]], version: int | None, temperature: float = 1.0) -> list[Values]:
        """The learner's own log-probabilities, by the code that it trains with."""
        return self.policy.run(_logprobs, passages, temperature, reference=version is None)

    def _answers(self, witness: Witness, version: int) -> None:
        """Sampling itself: decoding, temperature in the log-probabilities, the base model in the same batch."""
        laws = (*((version, temperature) for temperature in TEMPERATURES), (None, 1.0))
        requests = [
            Request(passage[:GIVEN], ANSWER, derive("probe", version, i), (), temperature, policy=policy)
            for i, (passage, (policy, temperature)) in enumerate(zip(self._passages, laws, strict=True))
        ]
        for request, sample in zip(requests, witness.draw(requests), strict=True):
            passage, policy, temperature = request.tokens + sample.tokens, request.policy, request.temperature
            distance = _mean(self._claims([passage], policy, temperature)[0], sample.logprobs)
            if not distance <= self.tolerance:
                plain = _mean(self._claims([passage], policy)[0], sample.logprobs)
                why = "; they are those of temperature 1" if plain <= self.tolerance else ""
                raise self._error(policy, distance, f"of tokens that it drew at temperature {temperature:g}", why)

    def _moved(self, seen: Seen) -> None:
        """What the learner says has changed since the base model, and since the version before, has changed here."""
        assert self._base is not None
        noise = math.dist(self._base.claimed, self._base.served)
        for before in (self._base, self._last or self._base):
            change = math.dist(seen.claimed, before.claimed)
            if change < CLEAR * noise or change == 0:
                continue
            there = (a - b for a, b in zip(seen.served, before.served, strict=True))
            here = (a - b for a, b in zip(seen.claimed, before.claimed, strict=True))
            share = sum(a * b for a, b in zip(there, here, strict=True)) / change**2
            if not 0.5 < share < 1.5:
                raise EngineError(
                    f"the engine does not serve {_name(seen.policy)}: of its change against {_name(before.policy)} "
                    f"{share:.0%} arrived; the run is stopped before it trains on samples of other weights"
                )

    def _guess(self, claimed: Values, served: Sequence[float]) -> str:
        for known in (self._base, self._last):
            if known is not None and known.claimed != claimed and _mean(known.claimed, served) <= self.tolerance:
                return f"; they are those of {_name(known.policy)}"
        return ""

    def _error(self, policy: int | None, distance: float, where: str, why: str) -> EngineError:
        return EngineError(
            f"the engine does not serve {_name(policy)}: its log-probabilities {where} are {distance:.2g} from the "
            f"learner's on average, at most {self.tolerance:g} is rounding{why}"
        )


@torch.no_grad()
def _logprobs(causal: Any, passages: Sequence[Sequence[int]], temperature: float) -> list[Values]:
    return [sequence_logprobs(causal, passage, GIVEN, temperature).double().tolist() for passage in passages]


def _name(policy: int | None) -> str:
    return "the base model" if policy is None else "the trial adapter" if policy == TRIAL else f"policy {policy}"


def _flat(values: Sequence[Values]) -> Values:
    return [value for passage in values for value in passage]


def _mean(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(abs(x - y) for x, y in zip(a, b, strict=True)) / max(len(a), 1)
