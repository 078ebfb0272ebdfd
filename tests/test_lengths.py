"""Long episodes start first: what is expected of an episode, and that engine and collector act on it and only so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from engine_kit import local_world, request
from loop_kit import dealt

from espl_train.engines.base import Request, Sample
from espl_train.engines.decode import Decoder
from espl_train.lengths import PROMPTS, Lengths
from espl_train.records import Rollout, RolloutKey, StopReason, Turn
from espl_train.rollout import Job


def rollout(prompt: str, task: int, tokens: int, split: str = "train", stop: StopReason = StopReason.ANSWER) -> Rollout:
    turn = Turn((3,), (5,) * tokens, (-1.0,) * tokens)
    played = dealt(Job(RolloutKey(1, prompt, task, 0, split=split), ""), 1.0, 0)
    return replace(played, turns=(turn,), stop=stop)


def test_a_problem_that_took_long_and_a_prompt_that_says_much_are_expected_to_again() -> None:
    lengths = Lengths()
    key = RolloutKey(2, "p0", 0, 0)
    assert lengths.expected(key) == 0
    lengths.learn([rollout("p0", 0, 10), rollout("p0", 1, 30), rollout("p1", 0, 30), rollout("p1", 1, 90)])
    assert [lengths.expected(replace(key, prompt=p, task=t)) for p in ("p0", "p1") for t in (0, 1)] == [10, 30, 30, 90]
    assert lengths.expected(replace(key, prompt="p9", task=9)) == 40                  # unknown ones: the usual length
    assert lengths.expected(replace(key, split="test")) == 0                          # another split: nothing is known
    lengths.learn([rollout("p0", 0, 50), rollout("p0", 1, 50)])                       # the last time counts
    assert lengths.expected(key) == lengths.expected(replace(key, task=1)) == 50


def test_what_faulted_says_nothing_of_lengths_and_what_ran_out_of_time_does() -> None:
    lengths = Lengths()
    lengths.learn([rollout("p0", 0, 0, stop=StopReason.FAULT)])
    assert lengths == Lengths()
    lengths.learn([rollout("p0", 0, 90, stop=StopReason.DEADLINE), rollout("p0", 1, 10)])
    assert lengths.expected(RolloutKey(2, "p0", 0, 0)) == 90


def test_what_is_known_survives_a_checkpoint_and_stays_bounded() -> None:
    lengths = Lengths()
    for prompt in range(PROMPTS + 50):
        lengths.learn([rollout(f"p{prompt}", prompt % 7, 1 + prompt % 5), rollout("root", 3, 9)])
    assert len(lengths.prompts) == PROMPTS and {"root", f"p{PROMPTS + 49}"} < lengths.prompts.keys()
    assert Lengths.from_json(lengths.to_json()) == lengths


def strides(expect: Callable[[int], int]) -> tuple[int, list[Sample]]:
    """Four slots, twelve requests of 4 tokens and two of 48, which come last: moments of decoding, and the samples."""
    world = local_world(context=64)
    world.engine.config = world.engine.config.model_copy(update={"slots": 4})
    counted = []

    def stride(self: Decoder, steps: int) -> list[Request]:
        counted.append(len(self.active))
        return original(self, steps)

    original = Decoder.stride
    lengths = [4] * 12 + [48] * 2
    asked = [request((2, 3, 4 + i), i, n, stop_ids=(), expected=expect(n)) for i, n in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "stride", stride)
        samples = world.ask(*asked)
    world.engine.close()
    return len(counted), samples


def test_the_longest_start_first_and_no_straggler_decodes_alone() -> None:
    """Six strides are the least that 48 tokens take; those who come last make nine. Reversed hints are no better."""
    blind, plain = strides(lambda _: 0)
    seeing, ordered = strides(lambda length: length)
    wrong, _ = strides(lambda length: 99 - length)
    assert seeing == 6 and blind == 9 and wrong >= blind
    assert [sample.tokens for sample in plain] == [sample.tokens for sample in ordered]
