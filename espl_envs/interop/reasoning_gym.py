"""Any reasoning-gym data set as an environment of this suite: one of your own, a composite, a family left out here.

    env = DatasetEnv(reasoning_gym.create_dataset("leg_counting", size=100, seed=42))

The data set's own order, questions and scorer, partial credit included. The suite's own families (`espl/rg-…`), whose
splits are disjoint and whose scores are 0 or 1, are in `tasks/reasoning.py`.
"""

from __future__ import annotations

import asyncio
import copy
import decimal
import threading
from typing import Any

from espl_envs.core.env import TextEnv
from espl_envs.core.family import Family
from espl_envs.core.protocol import AnswerProtocol
from espl_envs.core.tasks import Split, StaticTasks, Task
from espl_envs.grading.verdict import Verdict
from espl_envs.tasks.reasoning import BOXED


class DatasetEnv(TextEnv):
    r"""The entries of a data set, in its order.

    Observation: the question. Action: a reply; the last `\boxed{…}` of it is the answer. Reward: what the data set's
    `score_answer` gives for it. Terminated by the first reply; without a box `stop_reason` is "format", reward 0.

    Arguments
        dataset: an object with `__len__`, `__getitem__` and `score_answer(answer, entry)`, as reasoning-gym makes them.
        split: what its tasks are to be called.
        answer: how it is asked for and read.
        others: see `TextEnv`.
    """

    hidden = True

    def __init__(
        self, dataset: Any, *, split: Split = "train", answer: AnswerProtocol = BOXED, **settings: Any
    ) -> None:
        self._dataset = dataset
        self._scoring = threading.Lock()        # scorers set decimal's context and draw from shared generators
        name = getattr(dataset, "name", None) or type(dataset).__name__
        entries = [dataset[index] for index in range(len(dataset))]
        rows = StaticTasks([
            Task(f"{name}-{index}", split, str(entry["question"]).strip(), str(entry["answer"]), {"index": index})
            for index, entry in enumerate(entries)
        ])
        self._entries = entries
        super().__init__(Family(sources={split: lambda: rows}, grade=self._grade, protocol=answer), **settings)

    async def _grade(self, task: Task, answer: str) -> Verdict:
        score = await asyncio.to_thread(self._scored, self._entries[task.data["index"]], answer)
        return Verdict(score, "ok", answer, task.answer)

    def _scored(self, entry: Any, answer: str) -> float:
        with self._scoring, decimal.localcontext():
            return float(self._dataset.score_answer(answer, copy.deepcopy(entry)))
