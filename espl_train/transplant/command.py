"""`espl-train transplant RUN …`: from words to a matrix of scores. The same words again go on where they stopped."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from espl_envs.core import commandline
from espl_envs.core.errors import EsplError
from espl_train.settings.subcommands import Parser

if TYPE_CHECKING:
    from espl_train.transplant.matrix import Matrix
    from espl_train.transplant.plan import Plan
    from espl_train.transplant.store import Store

MATRIX = "matrix.json"


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    chosen, rest = _parser().parse_known_args(list(words))
    from espl_train.settings import parse
    from espl_train.transplant import choice
    from espl_train.transplant.store import Store

    plan = choice.plan(chosen, parse(rest).overrides)
    store = Store(chosen.out or _folder(plan), plan)
    try:
        _transplant(plan, store, chosen.quiet)
    except KeyboardInterrupt as stop:
        return commandline.stopped("espl-train", stop, f"{store.standing()}; the same command goes on.")
    except EsplError as error:
        raise EsplError(f"{error}\n{store.standing()}; the same command goes on.") from error
    return 0


def _transplant(plan: Plan, store: Store, quiet: bool) -> None:
    from transformers.utils import logging

    from espl_train.runs.console import Console
    from espl_train.transplant import picture
    from espl_train.transplant.matrix import Matrix
    from espl_train.transplant.play import play
    from espl_train.transplant.table import show

    logging.disable_progress_bar()
    title = f"{len(plan.weights)} weights × {len(plan.prompts)} prompts on {plan.problems.env_id}"
    looks = tuple(_opened(plan))
    with Console(0, title, quiet, noun="cell") as console:
        for note in plan.notes:
            console.note(note)
        play(plan, store, console)
    cells = [cell for weights, prompt in plan.cells if (cell := store.cell(weights.name, prompt.name))]
    matrix = Matrix.of(plan, cells)
    written = [store.write(MATRIX, matrix.to_json())]
    with contextlib.suppress(ImportError):          # matplotlib is a courtesy, here as for a run
        written += picture.draw(matrix, store.path, f"{title}, {_sampling(plan)}")
    show(matrix, (_sampling(plan), *looks, *_masked(matrix)), written)


def _opened(plan: Plan) -> Iterator[str]:
    """Break the seals of the runs whose own test this is, and say which were broken before."""
    from espl_train.runs import seal

    for run in plan.runs:
        if plan.own_test(run):
            before = seal.open_seal(run.folder, seal.Opening(run.step, f"transplant {plan.digest}"))
            yield from seal.told(before, run.folder)


def _sampling(plan: Plan) -> str:
    how = f"sampled at temperature {plan.temperature:g}" if plan.temperature else "greedy decoding"
    samples = f"{plan.samples} sample{'s' * (plan.samples > 1)} per problem"
    return f"{len(plan.indices)} {plan.problems.part} problems, {how}, {samples}, 95 % intervals"


def _masked(matrix: Matrix) -> Iterator[str]:
    if faulted := sum(cell.faulted for cell in matrix.cells.values()):
        yield f"{faulted:,} episodes have no reward and are left out"


def _folder(plan: Plan) -> Path:
    """Beside the first run; the same plan finds the same folder."""
    first = plan.runs[0]
    return first.folder.with_name(f"transplant-{'-'.join(run.name for run in plan.runs)[:60]}-{plan.digest}")


def _parser() -> Parser:
    made = Parser(
        "transplant",
        "Play every combination of weights and prompts of some runs on the same problems, with the same random draws: "
        "which of the two carries what was learnt, and does one run's prompt help another's weights?",
        "Further options as of espl-train: --engine, --model.device, limits of episodes (--rollout.max_new_tokens …), "
        "--env.args.NAME of --env. Without --out, the same command goes on where it stopped.",
    )
    made.add_argument("runs", metavar="RUN", type=Path, nargs="*", help="run directories, of one model")
    made.add_argument("--weights", metavar="NAME=RUN", action="append", default=[],
                      help="a row; default: every RUN's. The base weights are always there")
    made.add_argument("--prompts", metavar="NAME=SOURCE", action="append", default=[],
                      help="a column; SOURCE is RUN (its best prompt), RUN:ID, a text file, a prompt.json of an "
                      "export; default: every RUN's best, and root prompts. No prompt (none) is always there")
    made.add_argument("--env", metavar="ID", help="what is played, where not what all runs were trained on")
    made.add_argument("--split", choices=("test", "validation"), default="test",
                      help="test (default) counts as a look at the sealed test split of the runs")
    made.add_argument("--problems", metavar="N", type=_positive, help="at most; default: as the first run is tested")
    made.add_argument("-k", "--samples", metavar="K", type=_positive, help="per problem; default: as in the first run")
    made.add_argument("--temperature", metavar="T", type=_amount, help="default: that of the first run's evaluations")
    made.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    made.add_argument("--seed", metavar="N", type=int, help="of problems and random draws; default: the first run's")
    made.add_argument("--out", metavar="DIR", type=Path, help="results; default: beside the first run")
    made.add_argument("--quiet", action="store_true", help="the table only")
    return made


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return value
