"""The numbers equal their definitions: exact fractions, every subset by brute force; intervals hold the truth."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_envs.evaluate import metrics, plurality
from espl_envs.evaluate.intervals import UNIT, Estimate, estimates, prompt_spread, replicates, scale_of
from espl_envs.evaluate.metrics import Sample, budget_grid, maj_at_k, pass_at_k, pass_hat_k, vote, within_budget
from espl_envs.evaluate.records import Outcome

Chance = Callable[[int, int, int], float]


def mistakes(rows: Sequence[dict[str, object]], formula: Chance) -> int:
    return sum(formula(*(int(str(row[name])) for name in "nck")) != row["expected"] for row in rows)


def test_pass_at_k_is_the_exact_fraction(mirror: Path) -> None:
    """To the last bit, for up to 4096 samples; the plug-in estimate 1 - (1 - c/n)^k is far off, and so is the product
    form in single steps of floats."""
    rows = [json.loads(line) for line in (mirror / "reference" / "pass_at_k_exact.jsonl").open()]
    assert len(rows) > 100 and mistakes(rows, pass_at_k) == 0

    def product(n: int, c: int, k: int) -> float:
        return 1.0 if n - c < k else float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))

    assert mistakes(rows, lambda n, c, k: 1 - (1 - c / n) ** k) > 50
    assert mistakes(rows, product) > 10


def subsets(scores: Sequence[float], k: int, value: Callable[[Sequence[float]], float]) -> Fraction:
    chosen = list(itertools.combinations(scores, k))
    return Fraction(sum(Fraction(value(one)) for one in chosen), len(chosen))


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=8), st.data())
def test_pass_at_k_and_pass_hat_k_are_means_over_all_subsets(scores: list[float], data: st.DataObject) -> None:
    n, c, k = len(scores), int(sum(scores)), data.draw(st.integers(1, len(scores)))
    assert pass_at_k(n, c, k) == float(subsets(scores, k, max))
    assert pass_hat_k(n, c, k) == float(subsets(scores, k, min))


def elected(answers: Sequence[str | None], scores: Sequence[float], k: int) -> float:
    """maj@k by asking every subset of k voters, ties shared out."""
    worth = {a: np.mean([s for x, s in zip(answers, scores, strict=True) if x == a]) for a in answers}
    results = []
    for voters in itertools.combinations(range(len(answers)), k):
        ballots = [answers[i] for i in voters if answers[i] is not None]
        most = max((ballots.count(a) for a in ballots), default=0)
        winners = {a for a in ballots if ballots.count(a) == most}
        results.append(np.mean([worth[a] for a in winners]) if winners else 0.0)
    return float(np.mean(results))


ballots = st.lists(
    st.tuples(st.sampled_from(["1", "2", "3", "4", None]), st.sampled_from([0.0, 0.25, 1.0])), min_size=1, max_size=8
)


@given(ballots, st.data())
@settings(max_examples=120, deadline=None)
def test_maj_at_k_is_the_vote_of_every_subset(cast: list[tuple[str | None, float]], data: st.DataObject) -> None:
    answers, scores = zip(*cast, strict=True)
    k = data.draw(st.integers(1, len(cast)))
    assert maj_at_k(answers, scores, k) == pytest.approx(elected(answers, scores, k), abs=1e-12)


def test_a_vote_that_lets_the_first_answer_win_ties_is_noticed() -> None:
    answers, scores = ["7", "8"], [1.0, 0.0]
    assert maj_at_k(answers, scores, 2) == 0.5 == maj_at_k(answers[::-1], scores[::-1], 2)


def drawn(parties: Sequence[plurality.Party], abstainers: int, k: int) -> Fraction:
    """maj@k by asking every way in which k ballots can fall on the parties, in exact fractions."""
    total, sizes = Fraction(0), [size for size, _ in parties]
    for votes in itertools.product(*(range(min(size, k) + 1) for size in sizes)):
        if not 0 <= k - sum(votes) <= abstainers or not any(votes):
            continue
        ways = math.comb(abstainers, k - sum(votes)) * math.prod(map(math.comb, sizes, votes))
        best = [Fraction(score) for (_, score), got in zip(parties, votes, strict=True) if got == max(votes)]
        total += ways * sum(best) / len(best)
    return total / math.comb(sum(sizes) + abstainers, k)


houses = st.lists(st.tuples(st.integers(1, 5), st.sampled_from([0.0, 0.25, 1.0])), min_size=1, max_size=4)


@given(houses, st.integers(0, 6), st.data())
@settings(max_examples=80, deadline=None)
def test_a_plurality_is_that_of_every_draw(
    parties: list[plurality.Party], abstainers: int, data: st.DataObject
) -> None:
    parties = sorted(parties)
    k = data.draw(st.integers(1, sum(size for size, _ in parties) + abstainers))
    found = plurality.plurality(tuple(parties), abstainers, k)
    assert found == pytest.approx(float(drawn(parties, abstainers, k)), abs=1e-13)


@pytest.mark.parametrize("name, mutant", [
    ("_binomial", lambda trials, chance: np.array([math.comb(trials, j) * chance**j for j in range(trials + 1)])),
    ("_all", lambda chances, _: float(chances[-1] > 0.9)),
    ("_coefficient", lambda values, *_: float(values.real.mean())),
])  # fmt: skip
def test_the_mutants_of_the_plurality_are_found(name: str, mutant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chances that forget who was not drawn, one that is taken for negligible, a coefficient of another power."""
    parties = ((1, 0.5), (2, 0.0), (2, 1.0), (4, 0.25))
    expected = pytest.approx(float(drawn(parties, 1, 5)), abs=1e-9)
    plurality.plurality.cache_clear()
    assert plurality.plurality(parties, 1, 5) == expected
    monkeypatch.setattr(plurality, name, mutant)
    plurality.plurality.cache_clear()
    assert plurality.plurality(parties, 1, 5) != expected
    plurality.plurality.cache_clear()


def test_majorities_of_thousands_of_samples_are_exact() -> None:
    """Subsets are not enumerated: there are 10^300 of them. Half right, and wrong answers that never agree: all are
    right but for those in which no right answer comes up, or one does and ties with the others. Two answers: the tail
    of the hypergeometric distribution."""
    for n, k in ((64, 32), (2000, 12), (2000, 500)):
        half, lone = n // 2, 0 if k > n // 2 else math.comb(n // 2, k)
        answers = ["42"] * half + [str(100 + i) for i in range(n - half)]
        scores = [1.0] * half + [0.0] * (n - half)
        one = half * math.comb(n - half, k - 1)
        expected = 1 - float(Fraction(lone + one * Fraction(k - 1, k), math.comb(n, k)))
        assert maj_at_k(answers, scores, k) == pytest.approx(expected, abs=1e-12)
    n, k, right = 3000, 1000, 1530
    ways = [math.comb(right, j) * math.comb(n - right, k - j) for j in range(k + 1)]
    tail = ways[k // 2] + 2 * sum(ways[k // 2 + 1 :])
    found = maj_at_k(["1"] * right + ["2"] * (n - right), [1.0] * right + [0.0] * (n - right), k)
    assert found == pytest.approx(float(Fraction(tail, 2 * math.comb(n, k))), abs=1e-12) and 0.7 < found < 0.8


@pytest.mark.parametrize(("one", "other", "same"), [
    ("1/2", "0.5", True), (r"\frac12", "0.50", True), ("1,000", "1000", True), ("$5$", "5", True),
    ("Paris", " paris. ", True), ("x^2 + 1", "x^2+1", True), ("yes", "YES", True),
    ("5", "-5", False), ("12", "1 and 2", False), ("(1,2)", "(2,1)", False), ("Paris", "Lyon", False), ("", "0", False),
])
def test_answers_are_one_vote_where_they_mean_one_thing(one: str, other: str, same: bool) -> None:
    assert (vote(one) == vote(other)) is same


@given(st.text(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_text_can_be_voted_for(answer: str) -> None:
    assert hash(vote(answer)) == hash(vote(answer))


@pytest.mark.parametrize("call", [
    lambda: pass_at_k(3, 4, 1), lambda: pass_at_k(3, 1, 4), lambda: pass_hat_k(3, -1, 1), lambda: pass_at_k(0, 0, 0),
    lambda: maj_at_k(["1"], [1.0], 2),
])  # fmt: skip
def test_impossible_counts_are_refused(call: Callable[[], float]) -> None:
    with pytest.raises(ValueError, match="expected 1 <= k <= n"):
        call()


def sample(score: float, tokens: int = 0, calls: int = 0) -> Sample:
    return Sample(score, None, Outcome.ANSWERED, tokens, calls)


def test_a_budget_counts_what_fits_in_and_ends_at_the_mean() -> None:
    samples = [sample(1, 10, 0), sample(0, 20, 1), sample(1, 30, 2), sample(0.5, 40, 3)]
    assert [within_budget("completion_tokens", b, samples) for b in (9, 10, 29, 30, 40)] == [0, 0.25, 0.25, 0.5, 0.625]
    assert [within_budget("tool_calls", b, samples) for b in (0, 1, 2, 3)] == [0.25, 0.25, 0.5, 0.625]
    assert metrics.mean_score(samples) == 0.625


@given(st.integers(0, 10**7), st.integers(0, 10**7))
def test_budgets_begin_where_something_fits_and_end_where_all_does(one: int, other: int) -> None:
    least, most = sorted((one, other))
    grid = budget_grid(least, most)
    assert grid == sorted(set(grid)) and grid[0] <= least and grid[-1] >= most and len(grid) < 50


def interval_of(values: Sequence[float], bounds: tuple[float, float] | None = UNIT) -> Estimate:
    column = np.array(values, float)[:, None]
    found = estimates(column, replicates(column, bounds, "test"), bounds)[0]
    assert found is not None
    return found


def beta_below(x: float, a: float, b: float) -> float:
    """The share of Beta(a, b) below x, by the midpoint rule."""
    grid = (np.arange(200_000) + 0.5) / 200_000
    density = grid ** (a - 1) * (1 - grid) ** (b - 1)
    return float(density[grid < x].sum() / density.sum())


@pytest.mark.parametrize(("right", "tasks"), [(18, 30), (1, 30), (3, 10), (97, 100)])
def test_with_one_sample_per_task_the_interval_is_jeffreys(right: int, tasks: int) -> None:
    found = interval_of([1.0] * right + [0.0] * (tasks - right))
    assert found.low is not None and found.high is not None
    assert beta_below(found.low, right + 0.5, tasks - right + 0.5) == pytest.approx(0.025, abs=0.008)
    assert beta_below(found.high, right + 0.5, tasks - right + 0.5) == pytest.approx(0.975, abs=0.008)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("tasks", [1, 2, 30])
def test_an_interval_is_never_a_point(value: float, tasks: int) -> None:
    found = interval_of([value] * tasks)
    assert found.low is not None and found.high is not None
    assert found.low <= value <= found.high and found.mean == value
    assert found.high - found.low > 0.05, "all tasks alike say little about the next one"
    assert found.low >= 0 and found.high <= 1


def test_unbounded_scores_have_an_interval_but_for_a_single_task() -> None:
    assert scale_of([0.0, 7.5]) is None and scale_of([0.0, 1.0]) == UNIT
    assert interval_of([3.0], None) == Estimate(3.0, None, None, 1)
    found = interval_of([3.0, 5.0, 4.0], None)
    assert found.low is not None and found.high is not None and 3 < found.low < 4 < found.high < 5


def test_intervals_are_keyed() -> None:
    values = np.array([[0.0], [1.0], [1.0]])
    assert np.array_equal(replicates(values, UNIT, "a"), replicates(values, UNIT, "a"))
    assert not np.array_equal(replicates(values, UNIT, "a"), replicates(values, UNIT, "b"))


def test_a_task_without_a_value_is_left_out_and_not_a_zero() -> None:
    values = np.array([[1.0, 1.0], [1.0, math.nan], [1.0, math.nan]])
    both = estimates(values, replicates(values, UNIT, "nan"), UNIT)
    assert both[0] and both[1] and both[1].mean == 1.0 and both[1].tasks == 1
    assert (both[1].low or 0) < (both[0].low or 0)
    nothing = np.full((2, 1), math.nan)
    assert estimates(nothing, replicates(nothing, None, "nan"), None) == [None]


def test_intervals_hold_the_truth_where_the_usual_bootstrap_does_not() -> None:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "intervals.py"
    spec = importlib.util.spec_from_file_location("intervals_benchmark", path)
    assert spec and spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    near_the_top = benchmark.coverage(tasks=20, samples=1, mean=0.97, spread=10, rounds=80)
    assert near_the_top["ours"][0] >= 0.9 and near_the_top["BCa"][0] < 0.7 and near_the_top["percentile"][0] < 0.7
    middle = benchmark.coverage(tasks=20, samples=4, mean=0.5, spread=1, rounds=80)
    assert middle["ours"][0] >= 0.88 and middle["ours"][1] < 1.1 * middle["percentile"][1], "not bought by width"


def test_the_spread_of_prompts_is_corrected_for_sampling() -> None:
    """Two samples per task make equal prompts look 0.04 apart; a true spread is found."""
    random = np.random.default_rng(5)
    difficulty = random.random(60)
    equal = random.binomial(2, difficulty, (4, 60)) / 2
    spread = prompt_spread(equal, "equal")
    assert spread["sd_observed"] and spread["sd"] is not None and spread["p"] is not None
    assert spread["sd"] < 0.02 < spread["sd_observed"] and spread["p"] > 0.05
    better = np.clip(difficulty[None, :] * 0.8 + np.array([0.0, 0.1, 0.2])[:, None], 0, 1)
    apart = prompt_spread(random.binomial(8, better) / 8, "apart")
    assert apart["sd"] == pytest.approx(0.1, abs=0.03) and apart["p"] is not None and apart["p"] < 0.01
    assert (apart["min"], apart["max"]) == (pytest.approx(0.4, abs=0.06), pytest.approx(0.6, abs=0.06))
    assert prompt_spread(equal[:1], "one")["sd"] is None and prompt_spread(equal[:, :1], "task")["sd"] is None
