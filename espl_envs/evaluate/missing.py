"""What a comparison lacks, and what that could change.

Tasks that one of two runs has no score for are left out of a paired comparison, and they are seldom a random part of
all: long conversations fault more often, and so do hard tasks. So what is left out is counted, with its reasons, and
the worst is assumed both ways: that everything that is missing would have been as bad for B as it can be, and as good.
A verdict that stands at both ends stands (Manski 1990, "Nonparametric Bounds on Treatment Effects").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from espl_envs.evaluate.intervals import scale_of
from espl_envs.evaluate.scores import EnvName, Part
from espl_envs.evaluate.significance import Row, paired_test

Ends = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Missing:
    """Of the tasks that both runs were to play (`planned`), some are left out: those `without_a` have no score in A,
    those `without_b` none in B, those `without_both` in neither. `short` are compared on fewer samples than planned.
    faults, unplayed: episodes without a score, in A and in B.

    ends: the difference and its p with everything missing as bad for B as it can be, and as good; None where nobody
    knows how bad that is (scores without bounds). could_be: the verdicts then. hinges: whether the verdict could be
    another one.
    """

    planned: int
    without_a: int
    without_b: int
    without_both: int
    short: int
    faults: tuple[int, int]
    unplayed: tuple[int, int]
    ends: Ends | None
    could_be: tuple[str, str] | None = None
    hinges: bool = True

    @property
    def left_out(self) -> int:
        return self.without_a + self.without_b + self.without_both

    def judged(self, verdict: str, judge: Callable[[float, float], str]) -> Missing:
        """With the verdicts that `judge` passes on differences and their p; `verdict`: that on what is there."""
        if self.ends is None:
            return self
        could_be = judge(*self.ends[0]), judge(*self.ends[1])
        return replace(self, could_be=could_be, hinges={*could_be} != {verdict})


def lacking(parts: Mapping[EnvName, tuple[Part, Part]], *key: str) -> Missing | None:
    """What two runs lack on environments with the same data; None where each has a score for every episode of every
    task that both were to play."""
    kinds: Counter[str] = Counter()
    planned, faults, unplayed, strata = 0, [0, 0], [0, 0], []
    for pair in parts.values():
        tasks = range(min(part.env.tasks for part in pair))
        planned += len(tasks)
        rows: list[tuple[Row, Row]] = []
        for task in tasks:
            mine = [list(part.scores.get(task, ())) for part in pair]
            lacks = [part.each - len(scores) for part, scores in zip(pair, mine, strict=True)]
            for side, part in enumerate(pair):
                faults[side] += part.faults[task]
                unplayed[side] += lacks[side] - part.faults[task]
            kinds[_kind(bool(mine[0]), bool(mine[1]), any(lacks))] += 1
            rows.append(((mine[0] + [1.0] * lacks[0], mine[1] + [0.0] * lacks[1]),
                         (mine[0] + [0.0] * lacks[0], mine[1] + [1.0] * lacks[1])))  # fmt: skip
        strata.append(rows)
    if not any((*faults, *unplayed)):
        return None
    known = [score for pair in parts.values() for part in pair for scores in part.scores.values() for score in scores]
    ends = None
    if scale_of(known) is not None:
        worst, best = ([[row[end] for row in rows] for rows in strata if rows] for end in (0, 1))
        ends = paired_test(worst, *key)[1:], paired_test(best, *key)[1:]
    return Missing(
        planned, kinds["without_a"], kinds["without_b"], kinds["without_both"], kinds["short"],
        (faults[0], faults[1]), (unplayed[0], unplayed[1]), ends,
    )  # fmt: skip


def _kind(in_a: bool, in_b: bool, lacking: bool) -> str:
    """How a task is counted; empty for one that is there as planned."""
    if in_a and in_b:
        return "short" if lacking else ""
    return "without_b" if in_a else "without_a" if in_b else "without_both"


def sentence(a: str, b: str, verdict: str, missing: Missing) -> str:
    """What is left out of comparing B with A, why, and whether it matters."""
    why = [f"{count:,} for want of a score in {where}" for count, where in
           ((missing.without_a, a), (missing.without_b, b), (missing.without_both, "both")) if count]  # fmt: skip
    left_out = f"{missing.left_out:,} of {missing.planned:,} pairs {'is' if missing.left_out == 1 else 'are'} left out"
    parts = [left_out + (f" ({', '.join(why)})" if why else "")]
    verb = "is" if missing.short == 1 else "are"
    parts += [f"{missing.short:,} {verb} compared on fewer samples than planned"] if missing.short else []
    episodes = [f"{name} lacks {_counted(missing.faults[side], missing.unplayed[side])}"
                for side, name in enumerate((a, b)) if missing.faults[side] or missing.unplayed[side]]  # fmt: skip
    return f"{b} against {a}: {', '.join(parts)}; {', '.join(episodes)}. {_weight(b, verdict, missing)}"


def _counted(faults: int, unplayed: int) -> str:
    kinds = ((faults, "faulted"), (unplayed, "unplayed"))
    named = " and ".join(f"{count:,} {kind}" for count, kind in kinds if count)
    return f"{named} episode{'' if faults + unplayed == 1 else 's'}"


def _weight(b: str, verdict: str, missing: Missing) -> str:
    if missing.ends is None or missing.could_be is None:
        return "What that could change nobody knows, since the scores have no bounds: resume the runs"
    (low, _), (high, _) = missing.ends
    if not missing.hinges:
        return f"Whatever they would have been, the verdict stands ({verdict}, {low:+.3f} to {high:+.3f})"
    worst, best = missing.could_be
    return (f"They could turn the verdict: had they gone as badly for {b} as they can, it would be {worst} "
            f"({low:+.3f}), and as well, {best} ({high:+.3f}). Resume the runs before you believe it")
