"""The placebo writer: children whose new principles are random sentences, whatever the evidence says.

It is the control for everything about a child but its content: that there is more text, that something changed, that
the better of two was kept. The same reflection calls are made, so that tokens and refusals are those of the real thing.
Of what they wrote two things are left: how many of the parent's principles stayed, and how many words each of the
others has. Which ones stay is drawn too: that a rule was taken back is knowledge.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from espl_train.evolution.edits import fingerprint, last_id
from espl_train.evolution.prompts import Child, Principle, SystemPrompt

ALIKE = 8      # sentences of about the right length to draw from, at least


def placebo(child: Child, parent: SystemPrompt, pool: Sequence[str], random: np.random.Generator) -> Child:
    """`child` with its new words replaced by sentences of `pool`, none of which comes twice in a prompt.

    A pool that is smaller than the child needs gives a shorter child.
    """
    before = {(p.id, p.text) for p in parent.principles}
    lengths = [len(p.text.split()) for p in child.principles if (p.id, p.text) not in before]
    stay = random.choice(len(before), size=len(child.principles) - len(lengths), replace=False)
    principles = [parent.principles[int(i)] for i in sorted(stay)]
    number = last_id(parent.principles, parent.last_id)
    for words in lengths:
        taken = {fingerprint(p.text) for p in principles}
        unused = [text for text in pool if fingerprint(text) not in taken]
        if unused:
            number += 1
            principles.append(Principle(f"G{number}", _drawn(unused, words, random)))
    return Child(tuple(principles), child.operator, child.parents, number)


def _drawn(texts: Sequence[str], words: int, random: np.random.Generator) -> str:
    """One of the texts whose length is closest to `words`; all that are as close as the last of them take part."""
    off = [abs(len(text.split()) - words) for text in texts]
    limit = sorted(off)[:ALIKE][-1]
    alike = [text for text, distance in zip(texts, off, strict=True) if distance <= limit]
    return alike[int(random.integers(len(alike)))]
