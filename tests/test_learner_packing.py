"""Packing: exactly the sampled ids are learnt, and neither layout nor split changes what an update is about."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from learner_kit import group, related_groups, rollout

from espl_train.learner import packing
from espl_train.learner.losses import NORMALISATIONS
from espl_train.learner.packing import Limits, MicroBatch, pack
from espl_train.learner.sequences import training_sequences
from espl_train.records import Group, Turn

PADDED = Limits(10**9, packed=False)


def sampled(batches: list[MicroBatch]) -> list[tuple[float, ...]]:
    """Every sampled token with what it is learnt with, in an order that no layout knows of."""
    names = ("targets", "behaviour", "advantages", "weights")
    return sorted(tuple(float(getattr(b, n)[i]) for n in names) for b in batches for i in range(len(b.targets)))


def test_contexts_and_sampled_ids_alternate_and_only_sampled_ids_are_targets():
    two_turns = rollout(1.0, [((2, 3), (4, 5)), ((6, 7, 8), (9,))], [[-0.1, -0.2], [-0.3]])
    short = rollout(0.0, [((2, 3), (10,))], [[-0.4]], sample=1)
    (batch,) = pack(training_sequences([group(short, two_turns, advantages=(-1.0, 1.0))]), PADDED)
    assert batch.inputs["input_ids"].tolist() == [[2, 3, 4, 5, 6, 7, 8], [2, 3, 0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [4, 5, 9, 10]
    assert batch.before.tolist() == [1, 2, 6, 7 + 1]
    assert batch.behaviour.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4])
    assert batch.advantages.tolist() == [1.0, 1.0, 1.0, -1.0]
    assert batch.rows.tolist() == [0, 0, 0, 1]


def test_in_a_packed_row_a_shared_head_stands_once_and_predicts_for_all():
    prompt = tuple(range(2, 22))
    one = rollout(1.0, [(prompt, (30, 31, 32))], [[-0.1, -0.2, -0.3]])
    other = rollout(0.0, [(prompt, (30, 41))], [[-0.4, -0.5]], sample=1)
    (batch,) = pack(training_sequences([group(one, other, advantages=(1.0, -1.0))]), Limits(1000))
    assert batch.inputs["input_ids"].tolist() == [[*prompt, 30, 31]]       # what ends a sequence predicts nothing
    assert batch.inputs["position_ids"].tolist() == [list(range(22))]
    assert batch.targets.tolist() == [30, 41, 30, 31, 32]
    assert batch.before.tolist() == [19, 20, 19, 20, 21]
    assert batch.advantages.tolist() == [-1.0, -1.0, 1.0, 1.0, 1.0]
    assert batch.size == 22


def test_positions_begin_anew_with_every_sequence():
    apart = [rollout(0.0, [(tuple(range(i, i + 20)), (1, 2))], sample=i) for i in (2, 30)]
    (batch,) = pack(training_sequences([group(*apart, advantages=(1.0, -1.0))]), Limits(1000, packed=True))
    (packed,) = pack(training_sequences([group(*apart, *apart, advantages=(1.0, -1.0, 2.0, -2.0))]), Limits(1000))
    assert "position_ids" not in batch.inputs                              # nothing is shared: rows are cheaper
    assert packed.inputs["position_ids"].tolist() == [[*range(21), *range(21)]]


def test_groups_without_contrast_faults_filtered_ones_and_empty_replies_are_left_out():
    flat = group(rollout(1.0), rollout(1.0, sample=1), advantages=(0.0, 0.0))
    mixed = group(
        rollout(1.0, task=1),
        rollout(0.0, task=1, faulted=True),
        rollout(0.0, task=1),
        rollout(0.0, [((2, 3), ())], task=1),
        advantages=(0.5, 0.0, None, -0.5),
    )
    (batch,) = pack(training_sequences([flat, mixed]), PADDED)
    assert batch.inputs["input_ids"].shape == (1, 3)
    assert pack(training_sequences([flat]), PADDED) == []


def test_a_rollout_of_average_reward_still_counts_in_the_denominator():
    three = group(rollout(1.0), rollout(0.5, sample=1), rollout(0.0, sample=2), advantages=(0.5, 0.0, -0.5))
    (batch,) = pack(training_sequences([three], "token_mean"), PADDED)
    assert batch.weights.tolist() == pytest.approx([1 / 6] * 6)


@given(st.integers(0, 10), st.integers(1, 200), st.sampled_from(list(NORMALISATIONS)), st.booleans())
def test_any_budget_and_layout_gives_the_same_tokens_with_the_same_weights(seed, budget, normalise, packed):
    sequences = training_sequences(related_groups(seed), normalise, 16)
    parts = pack(sequences, Limits(budget, packed=packed))
    for part in parts:
        assert part.size <= budget or part.sequences == 1
    assert sampled(parts) == sampled(pack(sequences, PADDED))
    assert sum(part.sequences for part in parts) == len(sequences)


@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_are_few_and_cost_about_the_same(packed):
    sequences = training_sequences(related_groups(0, count=12))
    largest = max(len(s.ids) for s in sequences)
    parts = pack(sequences, Limits(8 * largest, packed=packed))
    whole = pack(sequences, Limits(10**9, packed=packed))
    assert len(parts) <= 2 + whole[0].size // (8 * largest - largest)
    assert max(p.cost for p in parts) <= sum(p.cost for p in parts) / len(parts) + 1.5 * largest
    again = pack(sequences, Limits(8 * largest, packed=packed))
    assert [(p.before.tolist(), p.size) for p in parts] == [(p.before.tolist(), p.size) for p in again]


def test_a_cut_that_is_only_greedy_is_less_even(monkeypatch):
    sequences = training_sequences(related_groups(0, count=12))
    budget = Limits(int(0.4 * pack(sequences, Limits(10**9))[0].size))
    even = pack(sequences, budget)
    monkeypatch.setattr(packing._Layout, "_even", lambda *_: math.inf)
    greedy = pack(sequences, budget)
    assert len(even) == len(greedy) > 1
    assert max(p.cost for p in even) < max(p.cost for p in greedy)


def test_a_fork_begins_a_new_sequence_and_its_tokens_weigh_the_same():
    straight = rollout(1.0, [((2, 3), (4, 5)), ((6,), (7,))])
    turns = (straight.turns[0], Turn((2, 3, 5, 6), (7,), (-1.0,), fork=True))
    forked = replace(straight, turns=turns)
    poor = rollout(0.0, sample=1)
    for normalise in NORMALISATIONS:
        one, two = (
            training_sequences([group(r, poor, advantages=(1.0, -1.0))], normalise, 16) for r in (straight, forked)
        )
        assert [s.ids.tolist() for s in one] == [[2, 3, 4, 5, 6], [2, 3, 4]]
        assert [s.ids.tolist() for s in two] == [[2, 3, 4], [2, 3, 5, 6], [2, 3, 4]]
        assert [t for s in two for t in s.targets.tolist()] == [4, 5, 7, 4, 5]
        assert {s.weight for s in two[:2]} == {one[0].weight}
    assert (straight.forks, forked.forks) == (0, 1)


def test_prompts_are_balanced_over_all_their_problems():
    def two(prompt: str, task: int, tokens: int) -> Group:
        words = [((2, 3), (5,) * tokens)]
        return group(*(rollout(r, words, prompt=prompt, task=task) for r in (1.0, 0.0)), advantages=(0.5, -0.5))

    groups = [two("a", 0, 1), two("a", 1, 3), two("b", 0, 2), two("b", 1, 2), two("b", 2, 8)]
    weights = [s.weight for s in training_sequences(groups, "prompt_balanced")]
    assert weights == pytest.approx([1 / 16] * 4 + [1 / 48] * 6)             # 8 and 24 tokens


def test_what_cannot_be_learnt_is_refused():
    with pytest.raises(ValueError, match="has no advantages"):
        training_sequences([group(rollout(1.0))])
    with pytest.raises(ValueError, match="empty context"):
        training_sequences([group(rollout(1.0, [((), (3,))]), advantages=(1.0,))])
    with pytest.raises(ValueError, match="2 tokens and 1 log-prob"):
        training_sequences([group(rollout(1.0, logprobs=[[-1.0]]), advantages=(1.0,))])
