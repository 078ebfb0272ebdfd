"""`espl-train export RUN`: what a run is worth, into a directory. The run is only read, also while it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from espl_train.settings.subcommands import Parser


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    chosen = _parser().parse_args(list(words))
    from espl_train.export.bundle import export
    from espl_train.snapshot import Snapshot

    run = Snapshot.of(chosen.run, chosen.step)
    out = chosen.out or chosen.run.with_name(f"{run.name}-export")
    export(run, out, chosen.prompt, chosen.merge)
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        print(path)
    return 0


def _parser() -> Parser:
    made = Parser(
        "export",
        "Write the best prompt of a run as markdown, as JSON with its provenance and as a ready request, and the "
        "adapter. The run is only read, also while it goes on.",
    )
    made.add_run(step=True)
    made.add_argument("--out", metavar="DIR", type=Path, help="where to; default: RUN-export. An older export there is "
                      "replaced")
    made.add_argument("--prompt", metavar="ID", default="best", help="best (default), root, or a prompt's id")
    made.add_argument("--merge", action="store_true", help="also a plain model with the adapter merged into it")
    return made
