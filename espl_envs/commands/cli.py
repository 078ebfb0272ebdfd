"""The command line of the suite. Errors are one sentence on stderr and exit code 2; Ctrl-C is 130."""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium.error

from espl_envs import registry
from espl_envs.core import commandline
from espl_envs.core.errors import EsplError

EXAMPLES = """\
  python -m espl_envs list aime                                  ids that contain a word
  python -m espl_envs card espl/HumanEval-v0                     documentation, hashes, figures measured here
  python -m espl_envs play espl/Conventions-v0 -a world=3        be the agent
  python -m espl_envs audit espl/GSM8K-v0 --against mine.jsonl   does a test problem stand in your data?
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        options = _parser().parse_args(argv)
        if not getattr(options, "download", True):
            os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")     # read when the libraries are imported
        return int(options.run(options) or 0)
    except (EsplError, gymnasium.error.Error) as problem:
        return commandline.complain("espl_envs", str(problem), 2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def _parser() -> commandline.Parser:
    parser = commandline.Parser(
        prog="python -m espl_envs", description="The environments of the suite.", epilog=EXAMPLES
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> commandline.Parser:
        made = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        made.set_defaults(run=run)
        return made

    one = command("list", _list, "all ids, with their splits and sizes where the data is there")
    one.add_argument("pattern", metavar="PATTERN", nargs="?", default="", help="only ids that contain this")
    _json(one)
    _download(one)
    one = command("card", _card, "what an environment is, with measured figures")
    _environment(one)
    one.add_argument("--episodes", metavar="N", type=_positive, default=20, help="played by each agent (20)")
    one.add_argument("--tokenizer", metavar="MODEL", help="count tokens with this model's tokenizer (extra 'train')")
    _json(one)
    one = command("play", _play, "answer in the terminal yourself")
    _environment(one)
    one.add_argument("--seed", metavar="N", type=int, help="which task is drawn; default: another one every time")
    one.add_argument("--task", metavar="N", type=int, help="index of the task in its split")
    one = command("audit", _audit, "equal and near-equal problems across splits and environments")
    one.add_argument(
        "ids", metavar="ID", nargs="*",
        help="default: every environment whose data is there, but reasoning-gym's, which are disjoint by construction",
    )
    one.add_argument("--against", metavar="FILE", action="append", default=[], help="JSONL of more problems")
    one.add_argument(
        "--overlap", metavar="SHARE", type=_share, default=0.5, help="of 13-grams, that counts as near-equal (0.5)"
    )
    one.add_argument("--limit", metavar="N", type=_positive, default=20000, help="tasks per split at most (20000)")
    one.add_argument("--strict", action="store_true", help="exit code 1 where a test problem may be trained on")
    _json(one)
    _download(one)
    return parser


def _environment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="of an environment; `python -m espl_envs list` shows all")
    parser.add_argument(
        "-a", "--arg", metavar="NAME=VALUE", action="append", default=[],
        help="argument of the environment, as in split=test; repeatable",
    )


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same as JSON on stdout")


def _download(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--download", action="store_true", help="fetch what is not here from the hub")


def _list(options: argparse.Namespace) -> None:
    from espl_envs.commands.listing import listing, table

    rows = listing(options.pattern)
    if not rows:
        registry.lookup(options.pattern)      # raises, with the nearest ids
    print(json.dumps(rows, indent=1) if options.json else table(rows))


def _card(options: argparse.Namespace) -> None:
    from espl_envs.commands.card import measure, text

    card = measure(options.id, settings(options.arg), options.episodes, options.tokenizer)
    print(json.dumps(card, indent=1, ensure_ascii=False) if options.json else text(card))


def _play(options: argparse.Namespace) -> None:
    from espl_envs.commands.play import play

    play(options.id, settings(options.arg), options.seed, options.task)


def _audit(options: argparse.Namespace) -> int:
    from espl_envs.commands.audit import audit, text

    chosen = options.ids or [env_id for env_id in registry.ids() if not env_id.startswith("espl/rg-")]
    found = audit(chosen, options.against, options.overlap, options.limit, bool(options.ids))
    print(json.dumps(found.to_dict(), indent=1, ensure_ascii=False) if options.json else text(found))
    return int(options.strict and any(pair.leaks for pair in found.pairs))


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`["max_turns=3", "split=test"]` as keyword arguments; values are Python literals, or text where they are none."""
    read: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise EsplError(f"cannot read --arg {pair!r}, expected NAME=VALUE, for example split=test")
        try:
            read[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            read[name] = value
    return read


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1")
    return value
