"""`espl-train lineage RUN [WHICH]`: where principles come from, for a person or as JSON. The run is only read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from espl_envs.core.errors import EsplError
from espl_envs.evaluate.plain import visible
from espl_train.settings.subcommands import Parser

if TYPE_CHECKING:
    from espl_train.evolution.lineage import Lineage
    from espl_train.snapshot import Snapshot

WHICH = re.compile(r"(?:(?P<prompt>.+)\.)?(?P<principle>[A-Z]+\d+)|(?P<whole>.+)")


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    chosen = _parser().parse_args(list(words))
    from espl_train.evolution.lineage import provenance, told
    from espl_train.snapshot import Snapshot

    lineage, prompt, principle = find(Snapshot.of(chosen.run, chosen.step), chosen.which)
    if chosen.json:
        rows = [row for row in provenance(prompt, lineage) if principle in ("", row["id"])]
        print(json.dumps(rows, ensure_ascii=False, indent=1).encode("utf-8", "backslashreplace").decode())
        return 0
    for line in told(prompt, lineage, principle):
        print(visible(line))
    if not lineage.births[prompt].ids:
        print(f"{prompt} has no principles")
    return 0


def find(run: Snapshot, which: str) -> tuple[Lineage, str, str]:
    """The book, the prompt and the principle ("": all) that `which` names. Prompts that the run dropped are found, too.

    Raises EsplError with what there is.
    """
    books = [population.lineage for population in run.populations.values()]
    born = {prompt: book for book in books for prompt in book.births}
    match = WHICH.fullmatch(which)
    if which in born or match is None or match["whole"]:
        prompt, principle = which, ""
    else:
        prompt, principle = match["prompt"] or "best", match["principle"]
    if prompt not in born:
        prompt = run.find_one(prompt)[1].id
    ids = born[prompt].births[prompt].ids
    if principle and principle not in ids:
        raise EsplError(f"{prompt} has no principle {principle}; it has {', '.join(ids) or 'none'}")
    return born[prompt], prompt, principle


def _parser() -> Parser:
    made = Parser(
        "lineage",
        "Who wrote each principle of a prompt, when, from which others and why, and how the prompts that brought it in "
        "or dropped it fared against their parents.",
    )
    made.add_run(step=True)
    made.add_argument(
        "which", metavar="WHICH", nargs="?", default="best",
        help="best (default), root, a prompt's id, also of one that was dropped, or one principle: p0007.G3, or G3 of "
        "the best prompt",
    )  # fmt: skip
    made.add_argument("--json", action="store_true", help="as plain data")
    return made
