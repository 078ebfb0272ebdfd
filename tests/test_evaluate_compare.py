"""Comparisons are paired, find what is there, claim nothing that is not, and refuse runs about something else."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluation_kit import ENV, write_run

from espl_envs.core.errors import EsplError
from espl_envs.evaluate import missing as missing_module
from espl_envs.evaluate.compare import Incomparable, Pair, compare
from espl_envs.evaluate.directory import CONFIG, RunDirectory, write_atomically
from espl_envs.evaluate.records import Episode, Outcome
from espl_envs.evaluate.significance import holm, mcnemar, needed_samples, needed_tasks, permutation, reach

OTHER = "espl/Game24-v0"


def pair(tmp_path: Path, a: list[list[float]], b: list[list[float]], **fields: bool) -> Pair:
    runs = [write_run(tmp_path / name, {ENV: scores}, name) for name, scores in (("a", a), ("b", b))]
    return compare(runs, **fields).pairs[0]


@pytest.mark.parametrize(("wins", "losses", "p"), [
    (0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (8, 1, 0.0390625), (10, 10, 1.0), (1, 9, 0.021484375),
])
def test_mcnemar_is_the_exact_binomial_test(wins: int, losses: int, p: float) -> None:
    assert mcnemar(wins, losses) == pytest.approx(p) == mcnemar(losses, wins)


def test_mcnemar_s_test_takes_thousands_of_disagreements() -> None:
    assert mcnemar(10_050, 9_950) == pytest.approx(0.4839059304628857)
    assert mcnemar(300, 200) == 2 * sum(math.comb(500, i) for i in range(201)) / 2**500


def test_the_permutation_test_is_mcnemar_s_where_both_apply() -> None:
    for wins, losses in ((6, 0), (8, 1), (9, 4), (3, 3)):
        differences = np.array([1.0] * wins + [-1.0] * losses + [0.0] * 20)
        assert permutation([differences], "test") == pytest.approx(mcnemar(wins, losses), abs=0.015)
    assert permutation([np.zeros(5)], "test") == 1.0


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.2, 0.9]) == pytest.approx([0.4, 0.9]) and holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_single_binary_samples_are_compared_by_mcnemar(tmp_path: Path) -> None:
    """8 tasks won, 1 lost, 11 tied."""
    a = [[0.0]] * 8 + [[1.0]] * 7 + [[0.0]] * 5
    b = [[1.0]] * 8 + [[0.0]] + [[1.0]] * 6 + [[0.0]] * 5
    found = pair(tmp_path, a, b)
    assert (found.test, found.wins, found.ties, found.losses) == ("McNemar, exact", 8, 11, 1)
    assert found.p == found.p_adjusted == pytest.approx(0.0390625) and found.verdict == "better"
    assert found.difference.mean == pytest.approx(7 / 20) and found.mean_b - found.mean_a == pytest.approx(7 / 20)
    assert found.difference.low is not None and 0 < found.difference.low < 7 / 20


def test_a_comparison_turned_round_is_the_same(tmp_path: Path) -> None:
    a, b = [[0.0, 1.0], [0.0, 0.0]] * 10, [[1.0, 1.0], [0.0, 1.0]] * 10
    runs = [write_run(tmp_path / name, {ENV: scores}, name) for name, scores in (("a", a), ("b", b))]
    there, back = compare(runs).pairs[0], compare(runs[::-1]).pairs[0]
    assert there.verdict == "better" and back.verdict == "worse"
    assert there.difference.mean == pytest.approx(-back.difference.mean) and (there.wins, back.losses) == (20, 20)


def paired_worlds() -> tuple[list[list[float]], list[list[float]]]:
    """Tasks that are all hard or all easy, and one run that is a little better on each."""
    random = np.random.default_rng(0)
    base = np.repeat([0.1, 0.85], 20)
    draw = lambda chance: [list(map(float, random.random(8) < p)) for p in chance]  # noqa: E731
    return draw(base), draw(base + 0.12)


def test_pairing_decides_what_means_alone_cannot(tmp_path: Path) -> None:
    """With the tasks of one run in another order (the pairing broken on purpose) the same scores decide nothing."""
    a, b = paired_worlds()
    found = pair(tmp_path / "paired", a, b)
    assert found.verdict == "better" and found.test == "paired permutation"
    shuffled = pair(tmp_path / "broken", a, b[20:] + b[:20])
    assert shuffled.difference.mean == pytest.approx(found.difference.mean) and shuffled.verdict == "undecided"


def test_equal_runs_are_told_apart_no_more_often_than_the_level() -> None:
    random = np.random.default_rng(1)
    chances = random.random(30)
    worlds = [random.binomial(2, chances) / 2 - random.binomial(2, chances) / 2 for _ in range(60)]
    assert sum(permutation([world], str(i)) < 0.05 for i, world in enumerate(worlds)) <= 8


def test_several_runs_are_corrected_for_being_several(tmp_path: Path) -> None:
    a = [[0.0]] * 8 + [[1.0]] * 8
    b = [[1.0]] * 8 + [[0.0]] + [[1.0]] * 7
    runs = [write_run(tmp_path / name, {ENV: b if name == "b" else a}, name) for name in "abcd"]
    alone, among = compare(runs[:2]).pairs[0], compare(runs)
    assert len(among.pairs) == 6 and [p.a for p in among.pairs] == ["a", "a", "a", "b", "b", "c"]
    assert alone.verdict == "better" and among.pairs[0].verdict == "undecided"
    assert among.pairs[0].p == alone.p and among.pairs[0].p_adjusted == pytest.approx(6 * alone.p)
    assert among.pairs[0].detectable > alone.detectable


def test_nothing_seen_is_undecided_and_says_what_would_be_seen(tmp_path: Path) -> None:
    found = pair(tmp_path, [[1.0], [0.0]] * 10, [[1.0], [0.0]] * 10)
    assert found.verdict == "undecided" and found.p == 1.0 and found.needed_tasks is None
    assert found.difference.low is not None and found.difference.low < 0 and found.detectable > 0.05
    assert "no difference was seen" in str(compare([tmp_path / "a", tmp_path / "b"]))


def test_as_many_tasks_as_are_said_to_be_needed_find_the_difference() -> None:
    """Simulated: at the number that is named, 80 % of experiments decide (plus or minus a tenth)."""
    random = np.random.default_rng(2)
    gap = lambda tasks: random.binomial(1, 0.62, tasks) - random.binomial(1, 0.5, tasks)  # noqa: E731
    error = math.sqrt((0.62 * 0.38 + 0.25) / 100)
    tasks = needed_tasks(0.12, error, 100, reach())
    assert tasks is not None and 230 < tasks < 290
    decided = []
    for _ in range(150):
        found = gap(tasks).astype(float)
        decided.append(abs(found.mean()) > 1.96 * found.std(ddof=1) / math.sqrt(tasks))
    assert np.mean(decided) == pytest.approx(0.8, abs=0.1)


def test_samples_help_only_against_the_noise_within_tasks() -> None:
    noisy = [[((0.0, 1.0), (0.0, 1.0))] * 50]
    error = math.sqrt((0.5 / 2 + 0.5 / 2) / 50)
    found = needed_samples(0.15, error, noisy, reach())
    assert found is not None and found == pytest.approx(2 * 50 * (0.5 / 50) / 50 / (0.15 / reach()) ** 2, abs=1.5)
    assert needed_samples(0.15, 3 * error, noisy, reach()) is None, "most of that error is between tasks"
    assert needed_samples(0.15, error, [[((1.0,), (0.0,))]], reach()) is None, "one sample tells nothing about noise"
    assert needed_samples(0.0, error, noisy, reach()) is None


def test_other_tasks_are_refused_or_left_out_with_a_warning(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {ENV: [[1.0]] * 4, OTHER: [[1.0]] * 4}, "a")
    b = write_run(tmp_path / "b", {ENV: [[0.0]] * 4}, "b")
    with pytest.raises(Incomparable, match=r"only one has espl/Game24-v0 \(test\)"):
        compare([a, b])
    found = compare([a, b], intersect=True)
    assert found.pairs[0].tasks == 4 and "shared tasks only" in found.warnings[0] and "note: " in str(found)
    disjoint = write_run(tmp_path / "c", {OTHER: [[0.0]]}, "c")
    with pytest.raises(Incomparable, match="share no task"):
        compare([b, disjoint], intersect=True)


def test_other_data_of_the_same_name_is_refused(tmp_path: Path) -> None:
    """Even where the indices agree: tasks are matched by their content."""
    a = write_run(tmp_path / "a", {ENV: [[1.0], [1.0], [0.0]]}, "a")
    b = write_run(tmp_path / "b", {ENV: [[0.0], [1.0], [1.0]]}, "b", change=lambda one: replace(
        one, task_hash=one.task_hash if one.key.task == 1 else "new"))  # fmt: skip
    config = RunDirectory.read(b).config
    newer = replace(config, envs=(replace(config.envs[0], data_hash="newer"),))
    write_atomically(b / CONFIG, newer.to_json())
    with pytest.raises(Incomparable, match=r"not played on the same tasks of .*: data data of \S+ and newer"):
        compare([a, b])
    assert compare([a, b], intersect=True).pairs[0].tasks == 1


def test_what_is_left_out_is_counted_with_its_reasons(tmp_path: Path) -> None:
    """Faults and what was not played, by run and by task; what only one was to play is no part of the comparison."""
    a = write_run(tmp_path / "a", {ENV: [[1.0, 1.0], [1.0, 0.0], [None, None], [None, 1.0], [], [1.0, 1.0]]}, "a")
    b = write_run(tmp_path / "b", {ENV: [[1.0, 0.0], [None], [1.0, 1.0], [1.0, 1.0], []]}, "b", k=2)
    found = compare([a, b])
    missing = found.pairs[0].missing
    assert missing is not None and found.pairs[0].tasks == 2
    assert (missing.without_a, missing.without_b, missing.without_both, missing.short) == (1, 1, 1, 1)
    assert missing.planned == 5 and (missing.faults, missing.unplayed) == ((3, 1), (2, 3)) and missing.left_out == 3
    assert "a task that only one of a and b was to play" in found.warnings[0]
    assert found.warnings[1].startswith(
        "b against a: 3 of 5 pairs are left out (1 for want of a score in a, 1 for want of a score in b, 1 for want of "
        "a score in both), 1 is compared on fewer samples than planned; a lacks 3 faulted and 2 unplayed episodes, b "
        "lacks 1 faulted and 3 unplayed episodes. Whatever they would have been, the verdict stands (undecided, "
    )
    whole = compare([write_run(tmp_path / name, {ENV: [[1.0]] * 3}, name) for name in "cd"])
    assert whole.pairs[0].missing is None and not whole.warnings


def gaps(seed: int) -> tuple[list[list[float | None]], list[list[float | None]], np.random.Generator]:
    """Two runs of eleven tasks, B the better one, with two or three scores missing."""
    random = np.random.default_rng(seed)
    a: list[list[float | None]] = [[float(x)] for x in random.random(11) < 0.2]
    b: list[list[float | None]] = [[float(x)] for x in random.random(11) < 0.9]
    for _ in range(int(random.integers(2, 4))):
        (a, b)[random.integers(2)][random.integers(11)][0] = None
    return a, b, random


@pytest.mark.parametrize("seed", range(6))
def test_the_ends_hold_whatever_the_missing_would_have_been(seed: int, tmp_path: Path) -> None:
    """Every way to fill the gaps in, by brute force: no difference beyond the ends, and a verdict that is said to stand
    stands."""
    a, b, _ = gaps(seed)
    found = pair(tmp_path / "gaps", a, b)  # type: ignore[arg-type]
    assert found.missing is not None and found.missing.ends is not None
    holes = [(side, task) for side, run in enumerate((a, b)) for task, scores in enumerate(run) if scores[0] is None]
    filled = []
    for number, values in enumerate(itertools.product((0.0, 1.0), repeat=len(holes))):
        runs = [[list(scores) for scores in run] for run in (a, b)]
        for (side, task), value in zip(holes, values, strict=True):
            runs[side][task] = [value]
        filled.append(pair(tmp_path / str(number), *runs))  # type: ignore[arg-type]
    seen = [one.difference.mean for one in filled]
    assert (min(seen), max(seen)) == pytest.approx([end[0] for end in found.missing.ends])
    verdicts = {one.verdict for one in filled}
    assert found.missing.hinges == (verdicts != {found.verdict})
    assert set(found.missing.could_be or ()) <= verdicts


def test_a_verdict_that_hinges_on_what_is_missing_is_said_loudly(tmp_path: Path) -> None:
    few = write_run(tmp_path / "few", {ENV: [[0.0]] * 7 + [[1.0]] * 20}, "few")
    faulty = write_run(tmp_path / "faulty", {ENV: [[1.0]] * 7 + [[1.0]] * 12 + [[None]] * 8}, "faulty")
    found = compare([few, faulty])
    assert found.pairs[0].verdict == "better" and found.pairs[0].missing is not None and found.pairs[0].missing.hinges
    assert found.pairs[0].missing.could_be == ("undecided", "better")
    shown = str(found)
    assert "better *" in shown and "* warning: faulty against few: 8 of 27 pairs are left out" in shown
    clear = compare([write_run(tmp_path / "low", {ENV: [[0.0]] * 25}, "low"),
                     write_run(tmp_path / "high", {ENV: [[1.0]] * 24 + [[None]]}, "high")])  # fmt: skip
    assert clear.pairs[0].missing is not None and not clear.pairs[0].missing.hinges
    shown = " ".join(str(clear).split())
    assert "better *" not in shown and "note: high against low: 1 of 25 pairs is left out" in shown
    assert "the verdict stands (better, +0.960 to +1.000)" in shown


def test_an_environment_that_one_run_has_no_score_for_at_all_is_missing_too(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {ENV: [[0.0]] * 9, OTHER: [[1.0]] * 4}, "a")
    b = write_run(tmp_path / "b", {ENV: [[1.0]] * 9, OTHER: [[None]] * 4}, "b")
    found = compare([a, b]).pairs[0]
    assert found.verdict == "better" and found.missing is not None and found.missing.without_b == 4
    assert found.missing.hinges and found.missing.ends is not None and found.missing.ends[0][0] == 0.0


def test_scores_without_bounds_leave_what_is_missing_open(tmp_path: Path) -> None:
    found = compare([write_run(tmp_path / "a", {ENV: [[7.0]] * 9}, "a"),
                     write_run(tmp_path / "b", {ENV: [[9.0]] * 8 + [[None]]}, "b")])  # fmt: skip
    missing = found.pairs[0].missing
    assert missing is not None and missing.ends is None and missing.hinges
    assert "nobody knows, since the scores have no bounds" in found.warnings[0]


def test_the_mutant_that_takes_the_missing_for_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a fault were a 0 on both sides: the ends would be one."""
    test = missing_module.paired_test
    monkeypatch.setattr(missing_module, "paired_test", lambda rows, *key: test(
        [[(first, [0.0 for _ in second]) for first, second in stratum] for stratum in rows], *key))
    with pytest.raises(AssertionError):
        test_the_ends_hold_whatever_the_missing_would_have_been(1, tmp_path)


def test_an_agent_that_failed_before_its_task_was_known_still_lost_it(tmp_path: Path) -> None:
    def change(one: Episode) -> Episode:
        failed = {"outcome": Outcome.AGENT_ERROR, "score": 0.0, "task_hash": "", "error": "It raised."}
        return replace(one, **failed) if one.key.sample == 0 else one

    a = write_run(tmp_path / "a", {ENV: [[1.0, 1.0]] * 5}, "a")
    b = write_run(tmp_path / "b", {ENV: [[1.0, 1.0]] * 5}, "b", change=change)
    found = compare([a, b]).pairs[0]
    assert found.tasks == 5 and found.mean_b == 0.5


def test_runs_of_one_agent_are_told_apart_by_their_place(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / where / "run", {ENV: [[1.0]]}, "same") for where in ("x", "y")]
    found = compare(runs)
    assert found.runs == tuple(f"same ({run})" for run in runs)


def test_a_comparison_needs_two_runs_that_exist(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", {ENV: [[1.0]]})
    with pytest.raises(EsplError, match="at least two"):
        compare([run])
    with pytest.raises(EsplError, match="named twice"):
        compare([run, run.parent / "." / run.name])
    with pytest.raises(EsplError, match="no run directory"):
        compare([run, tmp_path / "absent"])


def test_environments_are_compared_with_equal_weight(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {ENV: [[0.0]] * 30, OTHER: [[1.0]] * 2}, "a")
    b = write_run(tmp_path / "b", {ENV: [[1.0]] * 30, OTHER: [[0.0]] * 2}, "b")
    found = compare([a, b]).pairs[0]
    assert found.difference.mean == 0.0 and found.verdict == "undecided" and found.test == "paired permutation"
