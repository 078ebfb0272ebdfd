"""What rows have in common is read once, and nothing but time tells it from reading it for every row."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import World, local_world, request
from test_engines_local import play

from espl_train.engines import kv, shared
from espl_train.engines.cache import Kept, Plan, SlabCache
from espl_train.engines.kv import KVSlab
from espl_train.engines.shared import NOTHING, Group, Shared, attend, find

CPU = torch.device("cpu")


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> list[Shared]:
    """Groups cost nothing, so that short prompts are shared, too; yields what steps had in common."""
    monkeypatch.setattr(kv, "PRICE", 1)
    monkeypatch.setattr(shared, "STEP", 1)
    seen: list[Shared] = []
    step = KVSlab.step

    def watched(self: KVSlab, tokens: Any, positions: Any, width: int, common: Shared = NOTHING) -> Any:
        seen.append(common)
        return step(self, tokens, positions, width, common)

    monkeypatch.setattr(KVSlab, "step", watched)
    return seen


@pytest.fixture
def world() -> Iterator[World]:
    made = local_world()
    yield made
    made.engine.close()


def alike(common: int, groups: list[list[int]], heads: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys and values (7, heads, 20, 5) whose first `common` positions are the same within a group."""
    keys, values = torch.randn(2, 7, heads, 20, 5, generator=torch.Generator().manual_seed(0))
    for rows in groups:
        for kept in (keys, values):
            kept[rows, :, :common] = kept[rows[-1], :, :common].clone()
    return keys, values


GROUPS = [[0, 1, 2, 3, 4, 5, 6]], [[0, 1, 2], [3, 4, 5, 6]], [[0, 3, 6], [1, 2], [4], [5]]


def both(groups: list[list[int]], leaders: list[int], heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of 7 rows and 4 heads, with and without a cut, some of what is before it masked."""
    common = 9
    keys, values = alike(common, groups, heads)
    query = torch.randn(7, 4, 5, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(7, 1, 20)
    mask[2, :, :4] = mask[:, :, 17:] = mask[5, :, 12:] = torch.finfo().min
    chosen = [slice(r[0], r[-1] + 1) if r[-1] - r[0] < len(r) else torch.tensor(r) for r in groups]
    common_rows = Shared(common, tuple(Group(i, rows) for i, rows in zip(leaders, chosen, strict=True)))
    cut = Kept(keys[:, :, :common], keys[:, :, common:]), Kept(values[:, :, :common], values[:, :, common:])
    plain = attend(query, Kept.uncut(keys), Kept.uncut(values), mask, 0.4)
    return attend(query, *cut, mask, 0.4, common_rows), plain


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_of_groups_is_attention(groups: list[list[int]], heads: int) -> None:
    found, plain = both(groups, [rows[0] for rows in groups], heads)
    torch.testing.assert_close(found, plain, atol=1e-6, rtol=1e-5)
    mistaken, _ = both(GROUPS[2], [1, 0, 4, 5], heads)          # leaders of two groups exchanged
    assert (mistaken - both(GROUPS[2], [0, 1, 4, 5], heads)[1]).abs().max() > 1e-2


def test_uncut_attention_is_torchs() -> None:
    keys, values = alike(0, [], 4)
    query = torch.randn(7, 4, 5)
    found = attend(query, Kept.uncut(keys), Kept.uncut(values), torch.zeros(7, 1, 20), 0.4)
    plain = torch.nn.functional.scaled_dot_product_attention(query[:, :, None], keys, values, scale=0.4)[:, :, 0]
    torch.testing.assert_close(found, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_found_spares_most_and_is_the_same_in_any_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "STEP", 1)
    draw = random.Random(seed)
    count, price = draw.randrange(2, 9), draw.choice([0.5, 3, 12])
    ids = np.array([[1] * 3 + [draw.randrange(2) for _ in range(12)] for _ in range(count)])
    lengths = [draw.randrange(4, 16) for _ in range(count)]

    def spared(length: int) -> float:
        groups = len({tuple(row[:length]) for row in ids})
        return (count - groups) * length - groups * price

    held = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    found = find(held, range(count), price, CPU)
    assert found.length <= min(lengths)
    most = max(spared(length) for length in range(1, min(lengths) + 1))
    assert spared(found.length) == most if most > 0 else found == NOTHING
    rows = [np.arange(count)[group.rows].tolist() for group in found.groups]
    assert not found.length or sorted(i for members in rows for i in members) == list(range(count))
    for group, members in zip(found.groups, rows, strict=True):
        assert group.leader == min(members) and len({tuple(ids[i, : found.length]) for i in members}) == 1
    turned = find(held, range(count)[::-1], price, CPU)
    assert turned.length == found.length
    assert sorted(count - 1 - group.leader for group in turned.groups) == sorted(g.leader for g in found.groups)
    assert find(held, range(count), math.inf, CPU) == NOTHING


def test_wherever_it_is_cut_the_cache_holds_what_was_written() -> None:
    draw, cache = random.Random(0), SlabCache()
    expected = torch.full((5, 2, 40, 3), torch.nan)      # of what nobody wrote
    cache.resize(5, 40, 0)
    for trial in range(60):
        width, cut = draw.randrange(24, 41), draw.randrange(24)
        cache.resize(5, width, cut)
        expected[:, :, width:] = torch.nan
        if draw.random() < 0.3 and trial:
            rows = draw.sample(range(5), 4)
            source, target, length = torch.tensor(rows[:2]), torch.tensor(rows[1:3]), draw.randrange(1, width)
            cache.move(source, target, length)
            expected[target, :, :length] = expected[source, :, :length]
        else:
            rows = torch.tensor(draw.sample(range(5), 2))
            start, count = draw.randrange(width - 8), 8
            new = torch.randn(2, 2, count, 3)
            batch, column = torch.ones(2, count).nonzero(as_tuple=True)
            targets = cache.targets(rows[batch], start + column, batch, column, torch.device("cpu"))
            cache.plan = Plan(slice(0, 5), width, targets)
            cache.update(new, -new, 0)
            expected[rows, :, start : start + count] = new
        for kept, sign in zip(cache.slabs[0], (1, -1), strict=True):
            found, written = kept.read(slice(0, 5), width), ~expected[:, :, :width].isnan()
            assert found.isfinite().all() and bool((found == sign * expected[:, :, :width])[written].all())
    assert written.any()


def test_samples_are_those_of_the_model_when_prompts_are_shared(world: World, cheap: list[Shared]) -> None:
    system = list(range(2, 22))
    asked = [request([*system[: 20 - 3 * (p % 2)], 30 + p, 31, 32], seed=10 * p + n, max_new=6 + 3 * n, stop_ids=())
             for p in range(3) for n in range(4)]
    for one, sample in zip(asked, world.ask(*asked), strict=True):
        assert sample.logprobs == pytest.approx(world.expected(one, sample), abs=1e-5)
    assert len({common.length for common in cheap}) > 1 and max(len(common.groups) for common in cheap) > 1


def test_a_head_that_is_not_the_rows_own_is_noticed(
    world: World, cheap: list[Shared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    common = shared._common
    monkeypatch.setattr(shared, "_common", lambda ranked: common(ranked) + 2)
    asked = [request([*range(2, 12), 30 + n, 40 + n, 50], seed=n, stop_ids=()) for n in range(4)]
    wrong = [max(abs(a - b) for a, b in zip(sample.logprobs, world.expected(one, sample), strict=True))
             for one, sample in zip(asked, world.ask(*asked), strict=True)]
    assert cheap[-1].length > 10 and max(wrong) > 1e-3


def test_sharing_leaves_the_same_bits_however_callers_are_ordered(world: World, cheap: list[Shared]) -> None:
    expected = play(world, range(16), random.Random(0))
    shuffled = random.Random(1).sample(range(16), 16)
    assert play(world, shuffled, random.Random(1)) == expected
    assert any(common.length for common in cheap)
