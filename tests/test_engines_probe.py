"""The identity probe against samplers that are right, and against every way of being quietly wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from learner_kit import shake, tiny_model, tiny_policy, tiny_tokenizer

from espl_train.config import LearnerConfig
from espl_train.engines import probe as probe_module
from espl_train.engines.base import EngineError, Request, Sample
from espl_train.engines.probe import TRIAL, Passage, Probe
from espl_train.learner.logprobs import sequence_logprobs
from espl_train.learner.policy import Policy


class Twin:
    """A sampler that is right: the learner's weights, copied with `load`. Its attributes make it wrong."""

    def __init__(self, policy: Policy, noise: float = 0.0) -> None:
        self.policy, self.noise = policy, noise
        self.state: Any = policy.state()
        self.drops_adapter = self.ignores_temperature = False
        self.mixes: tuple[str, ...] = ()          # where the base model is asked for and the adapter answers
        self.slips: tuple[str, ...] = ()          # where one token in a passage is wrong by `slip`
        self.slip = 1.0
        self.share = 1.0
        self.looks = 0

    def load(self) -> None:
        self.state = self.policy.state()

    def values(self, tokens: Sequence[int], start: int, policy: int | None, temperature: float = 1.0) -> list[float]:
        if policy is not None and self.drops_adapter:
            policy = None
        mine, version = self.policy.state(), self.policy.version
        self.policy.load_state({name: self.share * value for name, value in self.state.items()}, version)
        try:
            found = self.policy.run(sequence_logprobs, tokens, start, temperature, reference=policy is None)
            random = torch.Generator().manual_seed(sum(tokens))
            return (found.detach() + self.noise * torch.randn(found.shape, generator=random)).tolist()
        finally:
            self.policy.load_state(mine, version)

    def look(
        self, requests: Sequence[Request], passages: Sequence[Passage], start: int
    ) -> tuple[list[Sample], list[list[float]]]:
        self.looks += 1
        return self.draw(requests), [self.said("read", tokens, start, policy) for tokens, policy in passages]

    def draw(self, requests: Sequence[Request]) -> list[Sample]:
        samples = []
        for request in requests:
            random = torch.Generator().manual_seed(request.seed)
            tokens = tuple(torch.randint(2, 61, (request.max_new,), generator=random).tolist())
            warmth = 1.0 if self.ignores_temperature else request.temperature
            values = self.said("draw", request.tokens + tokens, len(request.tokens), request.policy, warmth)
            samples.append(Sample(tokens, tuple(values), "length", request.policy))
        return samples

    def said(self, way: str, tokens: Sequence[int], start: int, policy: int | None, warmth: float = 1.0) -> list[float]:
        """Drawing and reading are two paths through a sampler: each can be wrong alone."""
        values = self.values(tokens, start, 0 if policy is None and way in self.mixes else policy, warmth)
        return [values[0] + self.slip, *values[1:]] if way in self.slips else values


@pytest.fixture
def policy() -> Iterator[Policy]:
    yield tiny_policy(0.1)


def begun(twin: Twin, rounding: float | None = None) -> Probe:
    probe = Probe(twin.policy, rounding)
    probe.begin(twin)
    return probe


def trained(policy: Policy, size: float = 0.1) -> int:
    shake(policy, size, seed=policy.version)
    return policy.advance()


def test_a_sampler_that_is_right_is_believed_version_after_version(policy: Policy) -> None:
    twin = Twin(policy, noise=1e-6)
    probe = begun(twin)
    for _ in range(3):
        version = trained(policy)
        twin.load()
        probe.prove(twin, version)
        assert probe.distance < 1e-5
        probe.again(twin, version)


def test_a_proof_asks_the_sampler_once_and_the_learner_twice(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done after every step of training: each batch of its own would cost as much again."""
    twin, passes = Twin(policy), []
    probe = begun(twin)
    version, looks = trained(policy), twin.looks
    twin.load()
    forward = probe_module.passage_logprobs
    monkeypatch.setattr(probe_module, "passage_logprobs", lambda *given: passes.append(0) or forward(*given))
    probe.prove(twin, version)
    assert twin.looks == looks + 1 and len(passes) == 2       # the policy, and the base model beside it


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"drops_adapter": True}, "does not serve policy 1.*they are those of the base model"),
        ({"mixes": ("read",)}, "does not serve the base model.*on fixed passages"),
        ({"mixes": ("draw",)}, "does not serve the base model.*that it drew"),
        ({"slips": ("read",)}, "does not serve .*on fixed passages"),            # most tokens are right
        ({"slips": ("draw",)}, "does not serve .*that it drew"),
        ({"slips": ("read",), "slip": float("nan")}, "does not serve .*on fixed passages"),
        ({"slips": ("draw",), "slip": float("nan")}, "does not serve .*that it drew"),
        ({"ignores_temperature": True}, "drew at temperature 0.7 .*they are those of temperature 1"),
        ({"share": 0.5}, "does not serve policy 1"),
        ({"noise": 1e-2}, "does not serve"),
        ({"noise": float("nan")}, "does not serve"),
    ],
)
def test_a_sampler_that_is_wrong_is_not(policy: Policy, fault: dict[str, Any], said: str) -> None:
    twin = Twin(policy)
    probe = begun(twin)
    version = trained(policy)
    twin.load()
    for name, value in fault.items():
        setattr(twin, name, value)
    with pytest.raises(EngineError, match=said):
        probe.prove(twin, version)


def test_a_stale_version_is_named(policy: Policy) -> None:
    twin = Twin(policy)
    probe = begun(twin)
    version = trained(policy)
    twin.load()
    probe.prove(twin, version)
    with pytest.raises(EngineError, match=r"does not serve policy 2.*they are those of policy 1"):
        probe.prove(twin, trained(policy))


@pytest.mark.parametrize("size", [1e-5, 3e-6])
def test_a_step_smaller_than_the_tolerance_must_arrive_too(policy: Policy, size: float) -> None:
    twin = Twin(policy, noise=1e-7)
    probe = begun(twin)
    probe.prove(twin, 0)
    version = trained(policy, size)
    with pytest.raises(EngineError, match=r"change against policy 0 -?\d% arrived|those of policy 0"):
        probe.prove(twin, version)
    twin.load()
    probe.prove(twin, version)


def test_rounding_is_not_taken_for_a_fault(policy: Policy) -> None:
    twin = Twin(policy, noise=5e-5)
    probe = begun(twin)
    probe.prove(twin, 0)
    version = trained(policy, 1e-7)
    probe.prove(twin, version)                 # nobody could see whether this arrived


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.02), ("float16", 0.02)])
def test_what_counts_as_rounding_is_a_matter_of_the_dtype(dtype: str, bound: float) -> None:
    policy = Policy(tiny_model(dtype=getattr(torch, dtype)), tiny_tokenizer(), LearnerConfig(rank=4))
    for share, believed in ((0.8, True), (1.3, False)):
        twin = Twin(policy, noise=share * bound * (math.pi / 2) ** 0.5)       # whose mean size is share * bound
        if believed:
            assert begun(twin).distance == pytest.approx(share * bound, rel=0.2)
        else:
            with pytest.raises(EngineError, match=f"at most {bound:g} is rounding"):
                begun(twin)


def test_a_model_that_rounds_more_may_be_believed_when_asked_to(policy: Policy) -> None:
    twin = Twin(policy, noise=0.01)
    with pytest.raises(EngineError, match=r"where this model rounds more than that, raise --engine\.rounding"):
        begun(twin)
    probe = begun(twin, 0.03)
    probe.prove(twin, 0)
    with pytest.raises(EngineError, match=r"at most 0\.03 is rounding"):
        begun(Twin(policy, noise=0.1), 0.03)


def test_what_was_proven_is_proven_again_without_the_learner(policy: Policy) -> None:
    twin = Twin(policy)
    probe = begun(twin)
    probe.prove(twin, 0)
    trained(policy)
    probe.again(twin, 0)
    twin.drops_adapter = True
    with pytest.raises(EngineError, match="does not serve policy 0"):
        probe.again(twin, 0)


def test_the_trial_adapter_has_a_name(policy: Policy) -> None:
    twin = Twin(policy)
    probe = begun(twin)
    twin.drops_adapter = True
    with pytest.raises(EngineError, match="does not serve the trial adapter"):
        probe.prove(twin, TRIAL)
