"""A family of text tasks in one file: `capitals:examples/Capitals-v0`, wherever this file can be imported."""

from __future__ import annotations

import re
from functools import cache, partial
from typing import Any

import gymnasium

from espl_envs.core.env import TextEnv
from espl_envs.core.family import Family
from espl_envs.core.protocol import BoxedAnswer
from espl_envs.core.tasks import Split, StaticTasks, Task
from espl_envs.grading.verdict import Verdict

CAPITALS = {
    "train": {"France": "Paris", "Japan": "Tokyo", "Kenya": "Nairobi", "Peru": "Lima", "Norway": "Oslo"},
    "test": {"Egypt": "Cairo", "Canada": "Ottawa", "Bolivia": "Sucre|La Paz", "Iceland": "Reykjavík|Reykjavik"},
}


@cache
def load(split: Split) -> StaticTasks:
    """The tasks of a split. Cached, because every environment of the process shares them."""
    return StaticTasks([
        Task(f"capitals-{split}-{country.lower()}", split, f"What is the capital of {country}?", capital)
        for country, capital in CAPITALS[split].items()
    ])


async def grade(task: Task, answer: str) -> Verdict:
    """1.0 for one of the accepted names, whatever its case; `answer` is what the protocol found in the reply."""
    said = re.sub(r"\s+", " ", answer).strip(" .").casefold()
    right = said in {name.casefold() for name in task.answer.split("|")}
    return Verdict(float(right), "ok", answer, task.answer)


class CapitalsEnv(TextEnv):
    r"""Name the capital of a country.

    Observation: "What is the capital of Peru?" Action: a reply; the last `\boxed{…}` of it is the answer. Reward: 1.0
    for an accepted name, else 0.0. Terminated by the first reply; without a box `stop_reason` is "format".

    Splits: train 5, test 4; no country is in both.

    Arguments
        others: see `TextEnv`.

    Source: general knowledge. Versions: v0, the first one.
    """

    def __init__(self, **settings: Any) -> None:
        splits: tuple[Split, ...] = ("train", "test")
        sources = {split: partial(load, split) for split in splits}
        super().__init__(Family(sources=sources, grade=grade, protocol=BoxedAnswer()), **settings)

    def solve(self, episode: Any) -> str:
        """What an agent that knows everything says: the first accepted name."""
        return self.family.protocol.compose(episode.task.answer.split("|")[0])


if "examples/Capitals-v0" not in gymnasium.registry:
    gymnasium.register("examples/Capitals-v0", "capitals:CapitalsEnv")
