"""Proof that a sampler serves the learner's weights: the same tokens, the log-probabilities of both, compared.

Samplers that go on serving old weights, or the base model, raise no error and sample plausible text; training on it
looks like training. So after each load the engine must show log-probabilities that only the right weights give: over
fixed passages, and of tokens that it draws at two temperatures. Where the change of the weights is smaller than the
rounding of their dtype, its direction over all tokens is still compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from espl_train.engines.base import EngineError, Request, Sample
from espl_train.learner.logprobs import passage_logprobs
from espl_train.learner.policy import Policy
from espl_train.randomness import derive, generator

ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.02}      # mean |Δ| over the tokens of a probe; other dtypes: as bf16
TEMPERATURES = (1.0, 0.7)
PASSAGES, GIVEN, DRAWN = 3, 8, 32          # passages, tokens that each begins with, tokens drawn after them
ANSWER = 16                                # tokens drawn at each temperature after a load
CLEAR = 20.0                               # a change this many times the rounding must be seen
TRIAL = -1                                 # the version of an adapter that is there for a test only

Values = list[float]
Passage = tuple[tuple[int, ...], int | None]      # tokens, policy


class Witness(Protocol):
    """A sampler on trial, asked while nothing else is under way."""

    def look(
        self, requests: Sequence[Request], passages: Sequence[Passage], start: int
    ) -> tuple[list[Sample], list[Values]]:
        """A sample for every request; and log-probabilities (T=1) of every passage's tokens from `start` on, each under
        its policy. All at once."""
        ...


@dataclass(frozen=True, slots=True)
class Seen:
    """What learner and engine said of the fixed passages under one policy (None: the base model), token by token."""

    policy: int | None
    claimed: Values
    served: Values


class Probe:
    """The identity probe of one engine. `begin` once, `prove` after every load; both raise EngineError."""

    def __init__(self, policy: Policy, rounding: float | None = None) -> None:
        self.policy = policy
        self.tolerance = rounding or ROUNDING.get(next(policy.causal.parameters()).dtype, ROUNDING[torch.bfloat16])
        self.distance = math.nan           # mean |Δ| of the last proof
        self._passages: list[tuple[int, ...]] = []
        self._base: Seen | None = None
        self._last: Seen | None = None

    def begin(self, witness: Witness) -> None:
        """Draw the passages from the base model and prove the base model."""
        vocabulary = self.policy.causal.get_input_embeddings().weight.shape[0]
        heads = [tuple(generator("probe", i).integers(0, vocabulary, GIVEN).tolist()) for i in range(PASSAGES)]
        requests = [Request(head, DRAWN, derive("probe", i), ()) for i, head in enumerate(heads)]
        drawn, _ = witness.look(requests, [], GIVEN)
        self._passages = [head + sample.tokens for head, sample in zip(heads, drawn, strict=True)]
        claimed = _flat(self._claims([(passage, 1.0) for passage in self._passages], None))
        _, read = witness.look([], self._asked(None), GIVEN)
        self._base = self._last = Seen(None, claimed, self._agree(read, {None: claimed}))

    def prove(self, witness: Witness, version: int) -> None:
        """The engine serves `version`, which the learner holds now, and beside it still the base model: over the fixed
        passages, and in what it samples (decoding, temperature in the log-probabilities, the base model beside it).
        """
        self.judge(version, *witness.look(*self.questions(version), GIVEN))

    def questions(self, version: int) -> tuple[list[Request], list[Passage]]:
        """What `prove` asks the witness: samples, and readings from GIVEN on."""
        laws = [*((version, temperature) for temperature in TEMPERATURES), (None, 1.0)]
        requests = [
            Request(passage[:GIVEN], ANSWER, derive("probe", version, i), (), temperature, policy=policy)
            for i, (passage, (policy, temperature)) in enumerate(zip(self._passages, laws, strict=True))
        ]
        return requests, self._asked(None, version)

    def judge(self, version: int, samples: Sequence[Sample], read: Sequence[Values]) -> None:
        """The other half of `prove`: whether these are answers of `version`, which the learner holds now."""
        requests, _ = self.questions(version)
        drawn = [(r.tokens + s.tokens, r.temperature) for r, s in zip(requests, samples, strict=True)]
        fixed = [(passage, 1.0) for passage in self._passages]
        claims = self._claims([*fixed, *drawn[:-1]], version)
        answers = [*claims[PASSAGES:], *self._claims(drawn[-1:], None)]
        claimed = _flat(claims[:PASSAGES])
        seen = Seen(version, claimed, self._agree(read, {None: self._known, version: claimed}))
        self._moved(seen)
        for request, sample, answer in zip(requests, samples, answers, strict=True):
            self._answered(request, sample, answer)
        self._last = seen

    def again(self, witness: Witness, version: int) -> None:
        """The engine still serves `version`, the last that was proven, whatever the learner holds by now."""
        assert self._last is not None and self._last.policy == version
        _, read = witness.look([], self._asked(None, version), GIVEN)
        self._agree(read, {None: self._known, version: self._last.claimed})

    @property
    def _known(self) -> Values:
        """What the learner says of the fixed passages under the base model."""
        assert self._base is not None
        return self._base.claimed

    def _asked(self, *policies: int | None) -> list[Passage]:
        """The fixed passages under all of these, in one batch: they must not mix."""
        return [(passage, policy) for policy in policies for passage in self._passages]

    def _agree(self, read: Sequence[Values], expected: Mapping[int | None, Values]) -> Values:
        """What the engine said of the fixed passages, policy after policy, is what was expected; the last of it."""
        served: Values = []
        for i, (policy, claims) in enumerate(expected.items()):
            served = _flat(read[i * PASSAGES : (i + 1) * PASSAGES])
            self.distance = _mean(claims, served)
            if not self.distance <= self.tolerance:
                raise self._error(policy, self.distance, "on fixed passages", self._guess(claims, served))
        return served

    def _claims(self, passages: Sequence[tuple[Sequence[int], float]], version: int | None) -> list[Values]:
        """The learner's own log-probabilities of (tokens, temperature), by the code that it trains with."""
        return self.policy.run(_logprobs, passages, reference=version is None)

    def _answered(self, request: Request, sample: Sample, claimed: Values) -> None:
        """The log-probabilities that a sample came with are the learner's."""
        distance = _mean(claimed, sample.logprobs)
        if distance <= self.tolerance:
            return
        plain = _mean(self._claims([(request.tokens + sample.tokens, 1.0)], request.policy)[0], sample.logprobs)
        why = "; they are those of temperature 1" if plain <= self.tolerance else ""
        where = f"of tokens that it drew at temperature {request.temperature:g}"
        raise self._error(request.policy, distance, where, why)

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
        why = why or "; where this model rounds more than that, raise --engine.rounding"
        return EngineError(
            f"the engine does not serve {_name(policy)}: its log-probabilities {where} are {distance:.2g} from the "
            f"learner's on average, at most {self.tolerance:g} is rounding{why}"
        )


@torch.no_grad()
def _logprobs(causal: Any, passages: Sequence[tuple[Sequence[int], float]]) -> list[Values]:
    return [found.tolist() for found in passage_logprobs(causal, passages, GIVEN)]


def _name(policy: int | None) -> str:
    return "the base model" if policy is None else "the trial adapter" if policy == TRIAL else f"policy {policy}"


def _flat(values: Sequence[Values]) -> Values:
    return [value for passage in values for value in passage]


def _mean(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(abs(x - y) for x, y in zip(a, b, strict=True)) / max(len(a), 1)
