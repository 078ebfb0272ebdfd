"""What the guard of principles costs, and whom it refuses without need: `python benchmarks/guards.py --write`.

Costs are CPU time of one process: learning made problems of some fifty words, judging a text, judging a child of 32
principles of which two are new. The advice is that of `tests/harmless_kit.py`; the problems that it may run into by
accident are all mathematical ones that `ESPL_DATA_DIR` has, behind one guard.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import gymnasium
from common import machine, write

from espl_envs import registry
from espl_envs.core.errors import EsplError
from espl_envs.core.tasks import Task
from espl_train.evolution.guards import Guard

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from harmless_kit import principles

WORDS, VOCABULARY, ADVICE = 50, 20_000, 1000
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def made(count: int) -> dict[int, Task]:
    """Problems out of made words, with answers of three to six digits; words are as uneven as in a language."""
    draw = random.Random(0)
    known = ["".join(draw.choices(LETTERS, k=draw.randint(3, 9))) for _ in range(VOCABULARY)]
    weights = [1 / rank for rank in range(1, VOCABULARY + 1)]
    tasks = {}
    for number in range(count):
        text = " ".join(draw.choices(known, weights, k=WORDS))
        tasks[number] = Task(f"made-{number}", "train", f"{text}?", str(draw.randint(100, 999_999)))
    return tasks


def mathematics() -> dict[int, Task]:
    """Every mathematical problem that is there, once."""
    found: dict[str, Task] = {}
    for env_id in registry.ids():
        if str(gymnasium.spec(env_id).entry_point).endswith(":MathEnv"):
            env: Any = registry.make(env_id).unwrapped
            for split in env.splits:
                found |= {task.question: task for task in tasks_of(env, split)}
    return dict(enumerate(found.values()))


def tasks_of(env: Any, split: str) -> Iterator[Task]:
    """Of one split; none where its data is not there."""
    try:
        source = env.family.sources[split]()
    except EsplError:
        return
    yield from (source[index] for index in range(len(source)))


def cpu(work: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=100_000, help="that the large guard knows (100000)")
    parser.add_argument("--write", action="store_true", help="keep the figures in results/guards.json")
    options = parser.parse_args()
    advice = [text for _, text in principles(0, ADVICE)]
    guard, problems = Guard(64), mathematics()
    guard.learn(problems)
    refused = sum(guard.check(text) is not None for text in advice)
    figures: dict[str, Any] = {"mathematical problems": len(problems), "principles": ADVICE, "refused": refused}
    guard, tasks = Guard(64), made(options.problems)
    figures |= {"problems": options.problems, "CPU seconds to learn them": round(cpu(lambda: guard.learn(tasks)), 1)}
    figures["megabytes of the process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    texts = [cpu(partial(guard.check, text)) for text in advice[:500]]
    prompts = [advice[start : start + 32] for start in range(20)]
    children = [cpu(partial(guard.check_prompt, prompt, prompt[-2:])) for prompt in prompts]
    figures["CPU ms for a text, median"] = round(1e3 * median(texts), 2)
    figures["CPU ms for a text, mean"] = round(1e3 * mean(texts), 2)
    figures["CPU ms for a child, mean"] = round(1e3 * mean(children), 1)
    for name, value in figures.items():
        print(f"{name:28}  {value:,}")
    if options.write:
        write("guards", {**figures, "machine": machine()})


if __name__ == "__main__":
    main()
