"""The command line of `espl-eval` as data: the parser, and what its words mean."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from espl_envs.core.commandline import Parser
from espl_envs.core.errors import EsplError
from espl_envs.evaluate.config import Prices
from espl_envs.evaluate.credentials import VARIABLE, Secret
from espl_envs.evaluate.doors import Wanted
from espl_envs.evaluate.endpoint import Sampling
from espl_envs.evaluate.plan import splits
from espl_envs.evaluate.proxy import Budget

RESERVED = frozenset({"model", "messages", "tools", "stream", "seed", "n"})
EXAMPLES = """\
  espl-eval --env espl/GSM8K-v0 --agent oracle --out runs/oracle
  espl-eval --env espl/GSM8K-v0 --agent my_agent.py:agent --limit 50 --out runs/mine
  espl-eval --env espl/AIME25-v0 --base-url http://localhost:8000/v1 --model NAME -k 8 --out runs/name
  espl-eval --env espl/AIME25-v0 --base-url URL --model NAME -k 8 --out runs/name --resume
  espl-eval --env espl/AIME25-v0 --env.args tools=python max_turns=6 --model path/to/model --out runs/local

commands
  espl-eval report RUN                the table again, and report.html
  espl-eval regrade RUN               grade the transcripts anew, offline
  espl-eval compare RUN RUN …         paired: which is better, and by how much
  espl-eval leaderboard DIR           all runs below DIR
  espl-eval serve --env ID            the environment behind HTTP (OpenEnv)

exit codes
  0 done · 1 something unexpected · 2 something that you can put right · 3 no headline: faults, or stopped early ·
  130 and 143 stopped by Ctrl-C and SIGTERM; what was played is kept, and --resume goes on
"""


def parser() -> Parser:
    """The options of an evaluation."""
    made = Parser(
        prog="espl-eval", description="Benchmark any agent on any environment, and believe the number.",
        usage="espl-eval --env ID [--env ID …] AGENT [options] --out DIR", epilog=EXAMPLES,
    )
    what = made.add_argument_group("what is played")
    what.add_argument("--env", metavar="ID", action="append", default=[], help="an environment; may be repeated")
    what.add_argument("--env.args", dest="env_args", metavar="NAME=VALUE", nargs="+", action="extend", default=[],
                      help="arguments of the environments; ID:NAME=VALUE for one of several")
    what.add_argument("--split", choices=splits(), help="default: test where there is one, else validation, else train")
    what.add_argument("--limit", metavar="N", type=_positive, help="the first N tasks of each environment")
    what.add_argument("-k", "--samples", metavar="N", type=_positive, default=1, help="samples per task (1)")
    what.add_argument("--system-prompt", metavar="FILE", type=Path, action="append", default=[],
                      help="system prompt; several: every task under each (prompt sensitivity)")
    what.add_argument("--seed", metavar="N", type=int,
                      help="of tasks and random draws (0); given, servers are sent one seed per turn, too")
    who = made.add_argument_group("AGENT: one of")
    who.add_argument("--agent", metavar="NAME",
                     help="a callable, package.module:name or file.py:name; or oracle, silent, random")
    who.add_argument("--base-url", metavar="URL",
                     help="an OpenAI-compatible server, as in http://localhost:8000/v1; with --model")
    who.add_argument("--model", metavar="NAME", help="the server's model; without --base-url a folder or hub id")
    who.add_argument("--command", metavar="WORDS", help="a program; {task_file} stands for the file with its task")
    who.add_argument("--run", metavar="DIR", help="a run of espl-train: its adapter and its chosen prompt")
    who.add_argument("--prompt", metavar="WHICH", help="of a run: best (default), root, none, or a prompt's id; "
                     "NAME/best where it has several environments")
    how = made.add_argument_group("models")
    how.add_argument("--api-key-env", metavar="VARIABLE", help=f"environment variable with the key ({VARIABLE})")
    how.add_argument("--temperature", type=_amount, metavar="T", help="0: greedy; default: the server's or the run's")
    how.add_argument("--max-tokens", type=_positive, metavar="N", help="of one reply")
    how.add_argument("--request", metavar="NAME=VALUE", nargs="+", action="extend", default=[],
                     help="more fields of every request, as in top_p=0.95 reasoning_effort=high")
    how.add_argument("--tool-syntax", choices=("native", "text"),
                     help="tools offered by the server, or explained in the messages (native for servers)")
    how.add_argument("--price", metavar="IN,OUT", type=_prices, help="money per million tokens")
    limits = made.add_argument_group("limits")
    limits.add_argument("--concurrency", metavar="N", type=_positive, help="episodes at once (256 on a server)")
    limits.add_argument("--timeout", metavar="S", type=_seconds, default=600.0, help="seconds for one reply (600)")
    limits.add_argument("--retry", metavar="S", type=_seconds, default=300.0,
                        help="seconds for which a request that fails is tried again (300)")
    limits.add_argument("--max-cost", metavar="X", type=_amount, help="of the whole run directory; needs --price")
    limits.add_argument("--episode-calls", metavar="N", type=_positive, help="model calls of a --command per episode")
    limits.add_argument("--episode-tokens", metavar="N", type=_positive, help="tokens of a --command per episode")
    limits.add_argument("--episode-cost", metavar="X", type=_amount, help="money of a --command per episode")
    limits.add_argument("--allow-faults", action="store_true", help="a headline also with more than 1 %% of faults")
    out = made.add_argument_group("results")
    out.add_argument("--out", metavar="DIR", type=Path, help="the run directory")
    out.add_argument("--resume", action="store_true", help="play what is missing or faulted in --out")
    out.add_argument("--same-agent", action="store_true",
                     help="with --resume: go on although the agent's files have changed (the results will say so)")
    out.add_argument("--json", action="store_true", help="summary.json on stdout")
    out.add_argument("--quiet", action="store_true", help="no progress")
    return made


def wanted(options: argparse.Namespace) -> Wanted:
    """The agent that the options name. Raises EsplError."""
    more = arguments(options.request, "--request")
    if reserved := sorted(RESERVED & set(more)):
        raise EsplError(f"--request cannot set {reserved[0]!r}: espl-eval does that itself")
    return Wanted(
        options.agent, options.base_url, options.model, options.command, options.run, options.prompt,
        sampling=Sampling(options.temperature, options.max_tokens, options.seed is not None, more),
        secret=Secret.from_variable(options.api_key_env),
        prices=options.price,
        timeout=options.timeout,
        retry=options.retry,
        concurrency=options.concurrency,
        budget=Budget(options.episode_calls, options.episode_tokens, options.episode_cost),
        out=options.out,
    )  # fmt: skip


def env_arguments(pairs: Sequence[str], env_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The keyword arguments of every environment: NAME=VALUE is for all, ID:NAME=VALUE for one. Raises EsplError."""
    found: dict[str, dict[str, Any]] = {env_id: {} for env_id in env_ids}
    for pair in pairs:
        env_id, colon, own = pair.partition("=")[0].rpartition(":")
        if not colon:
            for known in found.values():
                known.update(arguments([pair], "--env.args"))
        elif env_id in found:
            found[env_id].update(arguments([own + pair[len(env_id) + 1 + len(own) :]], "--env.args"))
        else:
            raise EsplError(f"--env.args {pair!r} is for {env_id!r}, which no --env names")
    return found


def arguments(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """`["max_turns=3", "split=test"]` as keyword arguments; values are Python literals, or text where they are none."""
    read: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise EsplError(f"cannot read {option} {pair!r}, expected NAME=VALUE")
        try:
            read[name] = ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(value, value))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            read[name] = value
    return read


def prompts(files: Sequence[Path]) -> tuple[str, ...]:
    """The texts of the files, without line breaks at their ends. Raises EsplError."""
    texts = []
    for file in files:
        try:
            texts.append(file.read_text("utf-8").rstrip("\r\n"))
        except (OSError, UnicodeDecodeError) as problem:
            raise EsplError(f"--system-prompt: cannot read {file}: {problem}") from None
    return tuple(texts)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 upwards")
    return value


def _seconds(text: str) -> float:
    value = _amount(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds")
    return value


def _prices(text: str) -> Prices:
    parts = text.split(",")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not IN,OUT: two prices per million tokens, as in 0.15,0.60")
    return Prices(_amount(parts[0].strip()), _amount(parts[1].strip()))
