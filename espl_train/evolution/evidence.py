"""Evidence: what reflection looks at, contrasts between right and wrong attempts at the same problem.

The buffer keeps attempts of all prompts over the last iterations, because a wrong principle silences the exploration
that would refute it. With a window of 0 only the last batch of the mutating prompt is looked at, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from espl_envs.core.messages import Conversation
from espl_envs.core.tasks import Task
from espl_train.config import EvolutionConfig
from espl_train.randomness import generator
from espl_train.records import Group, Rollout, RolloutKey

Verdict = Literal["right", "wrong", "unknown"]
Visibility = Literal["none", "verdict", "full"]
RIGHT = 0.5     # a reward of at least this is right, where a problem has rewards on both sides of it


@dataclass(slots=True)
class Trace:
    """One attempt as the buffer keeps it. `summary` is filled in by the first reflection that summarises it."""

    step: int
    prompt: str
    reward: float
    replies: tuple[str, ...]
    transcript: str
    summary: str | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt as a template sees it. Without verdicts (`answer_visibility = "none"`) the reward is hidden too.

    `own` says whether it was made with the very principles that are to be edited, `age` how many iterations ago.
    """

    verdict: Verdict
    reward: float
    replies: tuple[str, ...]
    transcript: str
    summary: str | None = None
    own: bool = True
    age: int = 0


@dataclass(frozen=True, slots=True)
class Case:
    """One problem with right and wrong attempts. `answer` only where the configuration lets reflection see it."""

    question: str
    answer: str | None
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True, slots=True)
class Contrast:
    """A case before it is shown: the traces behind it, right ones first, and which of them are right. `step` is now."""

    step: int
    task: int
    question: str
    answer: str
    traces: tuple[Trace, ...]
    right: tuple[bool, ...]

    def attempts(self, visibility: Visibility, prompt: str) -> list[Attempt]:
        """The attempts in the order of the traces, as much of them as a reflection on `prompt` may see."""
        found, hidden = [], visibility == "none"
        for t, good in zip(self.traces, self.right, strict=True):
            verdict: Verdict = "unknown" if hidden else "right" if good else "wrong"
            reward, own, age = 0.0 if hidden else t.reward, t.prompt == prompt, self.step - t.step
            found.append(Attempt(verdict, reward, t.replies, t.transcript, t.summary, own, age))
        return found

    def shown(self, visibility: Visibility, prompt: str) -> Case:
        """What a critique of `prompt` sees of it. Without verdicts the order must not tell either: attempts come by
        text."""
        attempts = self.attempts(visibility, prompt)
        if visibility == "none":
            attempts.sort(key=lambda a: a.transcript)
        return Case(self.question, self.answer if visibility == "full" else None, tuple(attempts))


class Evidence:
    """The buffer: problem → its traces, oldest first."""

    def __init__(self, config: EvolutionConfig) -> None:
        self._config = config
        self._traces: dict[int, list[Trace]] = {}
        self._tasks: dict[int, tuple[str, str]] = {}

    def record(self, step: int, groups: Sequence[Group], tasks: Mapping[int, Task]) -> None:
        """Take in the rollouts of a step, and forget what has left the window."""
        for group in groups:
            task = tasks[group.task]
            self._tasks[group.task] = (task.question, task.answer)
            traces = self._traces.setdefault(group.task, [])
            traces += [self._trace(step, r) for r in group.rollouts if not r.faulted]
        oldest = step - max(self._config.evidence_window, 1) + 1
        for problem in list(self._traces):
            kept = self._capped([t for t in self._traces[problem] if t.step >= oldest], step)
            if kept:
                self._traces[problem] = kept
            else:
                del self._traces[problem], self._tasks[problem]

    def contrasts(self, step: int, parent: str) -> list[Contrast]:
        """Problems with right and wrong attempts, each once, newest first; `cases` × `critiques` of them at most.

        A contrast is as old as the older side of it: what the weights could not do twenty iterations ago and can do now
        says less about principles than what they did both ways just now.
        """
        found = []
        for problem, traces in self._traces.items():
            if not self._config.evidence_window:
                traces = [t for t in traces if t.prompt == parent and t.step == step]
            rewards = [t.reward for t in traces]
            if traces and min(rewards) < max(rewards):
                middle = right_from(rewards)
                sides = (max(t.step for t in traces if (t.reward >= middle) is good) for good in (True, False))
                found.append((min(sides), problem))
        newest = sorted(found, key=lambda f: (-f[0], f[1]))[: self._config.cases * self._config.critiques]
        return [self._contrast(problem, step, parent) for _, problem in newest]

    def to_json(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {
            str(p): {"question": self._tasks[p][0], "answer": self._tasks[p][1], "traces": [asdict(t) for t in traces]}
            for p, traces in self._traces.items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], config: EvolutionConfig) -> Evidence:
        """The buffer that `to_json` wrote down."""
        evidence = cls(config)
        for problem, row in data.items():
            evidence._tasks[int(problem)] = (row["question"], row["answer"])
            evidence._traces[int(problem)] = [Trace(**{**t, "replies": tuple(t["replies"])}) for t in row["traces"]]
        return evidence

    def _contrast(self, problem: int, step: int, parent: str) -> Contrast:
        traces = self._traces[problem]
        if not self._config.evidence_window:
            traces = [t for t in traces if t.prompt == parent and t.step == step]
        threshold = right_from([t.reward for t in traces])
        chosen = sorted(_chosen(traces, threshold, self._config.attempts), key=lambda t: t.reward < threshold)
        question, answer = self._tasks[problem]
        return Contrast(step, problem, question, answer, tuple(chosen), tuple(t.reward >= threshold for t in chosen))

    def _capped(self, traces: list[Trace], step: int) -> list[Trace]:
        """The traces that can still be shown: a bound on memory that never drops a contrast."""
        past = [t for t in traces if t.step < step]
        chosen = _chosen(past, right_from([t.reward for t in past]), 2 * self._config.attempts) if past else []
        return [t for t in past if any(t is c for c in chosen)] + [t for t in traces if t.step == step]

    def _trace(self, step: int, rollout: Rollout) -> Trace:
        limit = self._config.attempt_characters
        replies = tuple(clip(m.content, limit) for m in rollout.messages if m.role == "assistant")
        return Trace(step, rollout.key.prompt, rollout.reward, replies, clip(transcript(rollout.messages), limit))


def shuffled(groups: Sequence[Group], seed: int, step: int) -> list[Group]:
    """A batch as the shuffled control sees it: the rewards of every problem are dealt anew to those who attempted it.

    Each problem keeps its rewards, so as many attempts count as right and the same problems have a contrast; which
    attempt has which reward is chance, across prompts too. What faulted has no reward and stays as it is. An
    environment that says in so many words whether an answer was right is not made to lie.
    """
    dealt: dict[RolloutKey, float] = {}
    for task in dict.fromkeys(group.task for group in groups):
        scored = [r for group in groups if group.task == task for r in group.rollouts if not r.faulted]
        order = generator(seed, "shuffled", step, task).permutation(len(scored))
        dealt |= {r.key: scored[int(other)].reward for r, other in zip(scored, order, strict=True)}
    return [
        replace(g, rollouts=tuple(replace(r, reward=dealt.get(r.key, r.reward)) for r in g.rollouts)) for g in groups
    ]


def right_from(rewards: Sequence[float]) -> float:
    """The reward from which an attempt counts as right: one half, or the middle where all lie on one side of it."""
    low, high = min(rewards), max(rewards)
    return RIGHT if low < RIGHT <= high or low == high else (low + high) / 2


def transcript(messages: Conversation) -> str:
    """What happened after the problem was asked; system prompt and question are left out."""
    first = next((i for i, m in enumerate(messages) if m.role == "user"), -1)
    return "\n".join(f"{m.role}: {m.content}" for m in messages[first + 1 :] if m.role != "system")


def clip(text: str, limit: int) -> str:
    """The text, or its beginning and end with the middle left out."""
    if len(text) <= limit:
        return text
    note = f"\n[… {len(text) - limit} characters left out …]\n"
    return text[: limit // 2] + note + text[-(limit - limit // 2) :]


def _chosen(traces: Sequence[Trace], threshold: float, limit: int) -> list[Trace]:
    """At most `limit` traces of different texts, newest first, half of them right where there are enough."""
    right = _different([t for t in traces if t.reward >= threshold])
    wrong = _different([t for t in traces if t.reward < threshold])
    limit = max(limit, 2)
    count = max(min(len(right), limit // 2), limit - len(wrong))
    return right[:count] + wrong[: limit - min(count, len(right))]


def _different(traces: Sequence[Trace]) -> list[Trace]:
    unique: dict[str, Trace] = {}
    for trace in reversed(traces):
        unique.setdefault(trace.transcript, trace)
    return list(unique.values())
