"""The guard: what may become a principle. A principle is general advice, never a memory of the training set.

Refused are answers of known problems in every dress that numbers and words wear (`leaks`), long pieces of problems and
solutions (`passages`), the canary, characters that cannot be seen, tokens of chat templates, and orders to those who
read principles for another purpose than to follow them (`orders`). What it cannot know is said in docs/evolution.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from espl_envs.core.tasks import Task
from espl_train.evolution.guards import characters, orders
from espl_train.evolution.guards.canary import Canary
from espl_train.evolution.guards.leaks import Leaks
from espl_train.evolution.rejections import Reason, Rejection

CHARACTERS_PER_WORD = 16


class Guard:
    """Remembers the problems it was shown and judges new texts. A problem is learnt once, however often it is shown.

    `leaks` is what another guard has learnt of the same problems.
    """

    def __init__(
        self, max_words: int, special_tokens: Sequence[str] = (), canary: Canary | None = None,
        leaks: Leaks | None = None,
    ) -> None:
        self._limit = max_words * CHARACTERS_PER_WORD
        self._tokens = tuple(t for t in special_tokens if len(t) > 1)
        self._canary = canary or Canary()
        self.leaks = leaks or Leaks()
        self._known: tuple[Leaks, ...] = (self.leaks,)

    def learn(self, tasks: Mapping[int, Task]) -> None:
        """Remember problems, their answers, and what their graders know of solutions."""
        for index in sorted(tasks.keys() - self.leaks.learnt):
            self.leaks.learn(index, tasks[index])

    def heed(self, others: Iterable[Guard]) -> None:
        """Refuse from now on also what gives away the problems that these know: those of a run's other environments."""
        self._known = (self.leaks, *(other.leaks for other in others))

    def check(self, text: str) -> Rejection | None:
        """Why `text` must not become a principle, or None."""
        if len(text) > self._limit:
            return Rejection(Reason.TOO_LONG, f"{len(text)} characters, at most {self._limit} are allowed")
        if (refused := characters.refused(text, self._tokens)) is not None:
            return refused
        if self._canary.sings(text):
            return Rejection(Reason.CANARY, "the text was copied from the evidence: it holds the planted words")
        return orders.refused(text) or next((no for leaks in self._known if (no := leaks.check(text))), None)

    def check_prompt(self, texts: Sequence[str], new: Sequence[str]) -> Rejection | None:
        """Why these texts must not stand together in one prompt, or None. Only what the `new` ones bring in counts:
        each alone, and what an answer divided among two of all the texts gives away."""
        for text in new:
            if (refused := self.check(text)) is not None:
                return refused
        numbers = [i for i, text in enumerate(texts) if text in new]
        return next((no for leaks in self._known if (no := leaks.check_together(texts, numbers))), None)
