"""Which problems are trained on, validated on and tested on: disjoint parts, and an order without repetitions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from espl_little import LETTERS

from espl_envs.core.errors import EsplError
from espl_train.config import EnvConfig
from espl_train.problems import SHARES, Deck, Problems, ProblemSets, carve, text_env


def sets(sizes: dict[str, int], **settings: Any) -> ProblemSets:
    return ProblemSets.of(EnvConfig(id=LETTERS, args={"sizes": sizes}, **settings))


def parts(found: ProblemSets) -> tuple[Problems, Problems, Problems]:
    return found.train, found.validation, found.test


def some(size: int, first: int = 0) -> Problems:
    """A part of `size` problems whose indices start at `first`."""
    whole = sets({"train": first + size, "validation": 1, "test": 1}).train
    return Problems("train", whole.env_id, whole.args, "train", range(first, first + size), whole.env)


@pytest.mark.parametrize("settings", [{}, {"holdout_from": "train"}])
def test_carved_parts_are_disjoint_and_cover_the_split(settings: dict[str, str]) -> None:
    """A set in one piece is parted without being asked to."""
    found = parts(sets({"train": 400}, **settings))
    assert [p.part for p in found] == ["train", "validation", "test"]
    ids = [{task.id for task in p.tasks.values()} for p in found]
    assert not any(a & b for a, b in combinations(ids, 2))
    assert set.union(*ids) == {f"train-{i}" for i in range(400)} and sum(map(len, found)) == 400
    assert [len(p) / 400 for p in found] == pytest.approx([0.70, 0.15, 0.15], abs=0.05)
    assert all(p.split == "train" and p.carved and "carved from" in str(p) for p in found)


def test_every_task_belongs_to_exactly_the_part_that_carve_says() -> None:
    for problems in parts(sets({"train": 60})):
        assert problems.indices == [i for i in range(60) if carve(f"train-{i}") == problems.part]
    assert [upto for _, upto in SHARES] == [70, 85, 100]


def test_carving_only_touches_the_split_that_is_named() -> None:
    found = parts(sets({"train": 9, "validation": 9, "test": 100}, holdout_from="test"))
    assert all(p.split == "test" for p in found) and sum(map(len, found)) == 100


def test_parts_order_and_subsets_are_the_same_in_every_process() -> None:
    code = (
        "import json; from test_problems import some; from espl_train.problems import carve;"
        "print(json.dumps([[carve(f't{i}') for i in range(40)], some(9).order(3, 1), some(9).sample(3, 4)]))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    folder = Path(__file__).parent
    told = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, check=True).stdout
    assert json.loads(told) == [[carve(f"t{i}") for i in range(40)], some(9).order(3, 1), some(9).sample(3, 4)]
    assert [i for i in range(30) if carve(f"t{i}") != "train"] == HELD_OUT


HELD_OUT = [1, 9, 12, 15, 17, 18, 23]


def test_declared_splits_are_used_as_declared() -> None:
    sizes = {"train": 7, "validation": 5, "test": 6}
    for problems in parts(sets(sizes)):
        assert problems.split == problems.part and not problems.carved
        assert list(problems.indices) == list(range(sizes[problems.part]))
        assert {task.split for task in problems.tasks.values()} == {problems.part}
        env = problems.make()
        _, info = env.reset(seed=0, options={"task": 2})
        assert info["task_id"] == f"{problems.part}-2" and info["split"] == problems.part
        env.close()


def test_another_environment_may_be_the_test() -> None:
    found = sets({"train": 50}, test_id="espl_parity:espl-test/Parity-v0", test_args={"system_prompt": "S"})
    assert found.test.env_id == "espl_parity:espl-test/Parity-v0" and found.test.split == "test"
    assert found.test.args == {"system_prompt": "S"} and len(found.test) == 20 and not found.test.carved
    assert found.train.env_id == found.validation.env_id == LETTERS


def test_a_set_without_a_test_split_is_refused_with_the_two_remedies() -> None:
    with pytest.raises(EsplError, match="no test split") as refused:
        sets({"train": 9, "validation": 9})
    assert "--env.test_id" in str(refused.value) and "--env.holdout_from train" in str(refused.value)
    assert len(sets({"train": 9, "validation": 9}, test_id=LETTERS).test) == 4
    assert all(p.carved for p in parts(sets({"train": 99, "validation": 9}, holdout_from="train")))


def test_an_unknown_split_to_carve_from_is_refused() -> None:
    with pytest.raises(EsplError, match="no split 'test' to carve from; it has: train"):
        sets({"train": 9, "validation": 9}, holdout_from="test")


def test_an_empty_part_is_refused() -> None:
    with pytest.raises(EsplError, match=r"has no \w+ problems .*choose a larger set"):
        sets({"train": 1})


@pytest.mark.parametrize("first", [0, 30])
@pytest.mark.parametrize(("size", "batch"), [(12, 4), (13, 4), (7, 3), (5, 5), (5, 4), (9, 1), (1, 1)])
def test_a_batch_never_holds_a_problem_twice_and_an_epoch_never_repeats(size: int, batch: int, first: int) -> None:
    deck, each = Deck(some(size, first), 5), size // batch
    for _ in range(6):
        dealt = [deck.batch(batch) for _ in range(each)]
        assert all(len(b) == len(set(b)) == batch for b in dealt)
        played = [i for b in dealt for i in b]
        assert len(set(played)) == len(played) == each * batch
        assert set(played) <= set(range(first, first + size))


def test_successive_batches_differ_and_every_problem_gets_its_turn() -> None:
    deck = Deck(some(13), 0)
    batches = [tuple(deck.batch(4)) for _ in range(30)]
    assert all(set(a).isdisjoint(b) for a, b in zip(batches[::3], batches[1::3], strict=True))
    assert {i for b in batches for i in b} == set(range(13))
    assert batches[:3] != batches[3:6]        # another epoch, another order


def test_a_batch_larger_than_the_set_is_the_whole_set() -> None:
    deck = Deck(some(5, 10), 0)
    assert all(sorted(deck.batch(8)) == [10, 11, 12, 13, 14] for _ in range(7))


@pytest.mark.parametrize("wanted", [(4, 3, 2), (4, 1), (4, 20), (4,), (1, 1, 1)])
def test_further_problems_are_others_of_the_same_epoch_until_none_is_left(wanted: tuple[int, ...]) -> None:
    deck = Deck(some(10), 0)
    for _ in range(8):
        start, first = deck.epoch, deck.batch(wanted[0])
        step = [*first, *(i for most in wanted[1:] for i in deck.more(most))]
        assert len(step) == len(set(step)) == min(sum(wanted), len(first) + 10 - (deck.dealt - len(step) + len(first)))
        assert deck.epoch in (start, start + 1) and deck.dealt <= 10
    assert deck.more(0) == []


def test_a_deck_goes_on_where_it_was_put_down() -> None:
    straight = Deck(some(11), 3)
    for size in (3, 2, 4):
        straight.batch(size), straight.more(1)
    resumed = Deck(some(11), 3, json.loads(json.dumps(straight.position)))
    for size in (4, 3, 5):
        assert (resumed.batch(size), resumed.more(2)) == (straight.batch(size), straight.more(2))


def test_another_seed_is_another_order_and_the_same_seed_the_same() -> None:
    problems = some(40)
    assert Deck(problems, 0).batch(20) == Deck(problems, 0).batch(20) != Deck(problems, 1).batch(20)
    assert problems.sample(0, 20) == problems.sample(0, 20) != problems.sample(1, 20)


def test_a_subset_is_fixed_ascending_and_within_the_part() -> None:
    carved = sets({"train": 300}).validation
    chosen = carved.sample(4, 10)
    assert chosen == carved.sample(4, 10) == sorted(set(chosen)) and len(chosen) == 10
    assert set(chosen) <= set(carved.indices) == set(carved.tasks)
    assert carved.sample(4, 10_000) == carved.sample(4, len(carved)) == list(carved.indices)


def test_the_tasks_of_a_part_are_those_that_its_environment_plays() -> None:
    test = sets({"train": 100}).test
    env = test.make()
    for index in test.sample(0, 3):
        assert env.reset(options={"task": index})[1]["task_id"] == test.tasks[index].id
    env.close()


def test_something_that_is_no_text_environment_is_refused() -> None:
    with pytest.raises(EsplError, match="not a TextEnv"):
        ProblemSets.of(EnvConfig(id="CartPole-v1"))


def test_an_argument_that_an_environment_stumbles_over_is_a_sentence() -> None:
    with pytest.raises(EsplError, match=r"cannot be made with world = 'abc': TypeError: .*'int'$"):
        text_env("espl/Conventions-v0", {"world": "abc"})
