"""Packing: exactly the sampled ids are learnt, and the split into micro-batches changes no number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learner_kit import group, random_groups, rollout

from espl_train.learner.losses import NORMALISATIONS
from espl_train.learner.packing import pack


def test_contexts_and_sampled_ids_alternate_and_only_sampled_ids_are_targets():
    two_turns = rollout(1.0, [((2, 3), (4, 5)), ((6, 7, 8), (9,))], [[-0.1, -0.2], [-0.3]])
    short = rollout(0.0, [((2, 3), (10,))], [[-0.4]], sample=1)
    (batch,) = pack([group(short, two_turns, advantages=(-1.0, 1.0))], budget=1000)
    assert batch.inputs["input_ids"].tolist() == [[2, 3, 4, 5, 6, 7, 8, 9], [2, 3, 10, 0, 0, 0, 0, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1] * 8, [1, 1, 1, 0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [4, 5, 9, 10]
    assert batch.before.tolist() == [1, 2, 6, 8 + 1]
    assert batch.behaviour.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4])
    assert batch.advantages.tolist() == [1.0, 1.0, 1.0, -1.0]
    assert batch.rows.tolist() == [0, 0, 0, 1]


def test_groups_without_contrast_faults_and_empty_replies_are_left_out():
    flat = group(rollout(1.0), rollout(1.0, sample=1), advantages=(0.0, 0.0))
    mixed = group(
        rollout(1.0, task=1),
        rollout(0.0, task=1, faulted=True),
        rollout(0.0, [((2, 3), ())], task=1),
        advantages=(0.5, 0.0, -0.5),
    )
    (batch,) = pack([flat, mixed], budget=1000)
    assert batch.inputs["input_ids"].shape == (1, 4)
    assert pack([flat], budget=1000) == []


def test_a_rollout_of_average_reward_still_counts_in_the_denominator():
    three = group(rollout(1.0), rollout(0.5, sample=1), rollout(0.0, sample=2), advantages=(0.5, 0.0, -0.5))
    (batch,) = pack([three], budget=1000, normalise="token_mean")
    assert batch.weights.tolist() == pytest.approx([1 / 6] * 6)


@given(st.integers(0, 10), st.integers(1, 200), st.sampled_from(list(NORMALISATIONS)))
def test_any_budget_gives_the_same_tokens_with_the_same_weights(seed, budget, normalise):
    groups = random_groups(seed)
    (whole,) = pack(groups, 10**9, normalise, 16)
    parts = pack(groups, budget, normalise, 16)
    for part in parts:
        assert part.inputs["input_ids"].numel() <= budget or part.sequences == 1
    for name in ("targets", "behaviour", "advantages", "weights"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    lengths = [int(n) for part in parts for n in part.inputs["attention_mask"].sum(1)]
    assert lengths == sorted(lengths, reverse=True)


def test_what_cannot_be_learnt_is_refused():
    with pytest.raises(ValueError, match="has no advantages"):
        pack([group(rollout(1.0))], 100)
    with pytest.raises(ValueError, match="empty context"):
        pack([group(rollout(1.0, [((), (3,))]), advantages=(1.0,))], 100)
    with pytest.raises(ValueError, match="2 tokens and 1 log-prob"):
        pack([group(rollout(1.0, logprobs=[[-1.0]]), advantages=(1.0,))], 100)
