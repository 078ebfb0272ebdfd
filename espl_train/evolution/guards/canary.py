"""The canary: words that exist nowhere but in what reflection reads. A principle that holds them was copied from there.

Evidence is read to be understood, not to be quoted. Template sets that print `canary` put it behind every recorded
attempt and every reference answer; whoever copies a passage copies it too, or at least shows that such copies happen.
A set that never mentions it (micro) has none.
"""

from __future__ import annotations

from dataclasses import dataclass

from espl_train.evolution.guards import disguises
from espl_train.evolution.guards.writing import words
from espl_train.randomness import generator

CONSONANTS, VOWELS = "bdfgklmnprtvz", "aiou"
SYLLABLES = 4


@dataclass(frozen=True, slots=True)
class Canary:
    """Two invented words, e.g. "vukomira dalunofi". `text` is empty where there is no canary."""

    text: str = ""

    @classmethod
    def of(cls, seed: int) -> Canary:
        """The canary of a run: always the same one for its seed."""
        draw = generator(seed, "canary")
        syllables = [str(draw.choice(list(CONSONANTS))) + str(draw.choice(list(VOWELS))) for _ in range(2 * SYLLABLES)]
        return cls("".join(syllables[:SYLLABLES]) + " " + "".join(syllables[SYLLABLES:]))

    def sings(self, text: str) -> bool:
        """Whether a text holds one of the words, however it is spaced or disguised."""
        if not self.text:
            return False
        return any(
            word in "".join(words(reading))
            for reading in (text, *disguises.decoded(text), *disguises.disguised(text))
            for word in self.text.split()
        )
