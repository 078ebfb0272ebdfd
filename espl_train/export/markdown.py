"""The export as a page for people. What a model wrote stands in code spans and fences that it cannot leave.

Inside of them nothing is read as markdown or HTML; their delimiters are longer than any run of backticks in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espl_envs.evaluate.plain import visible
from espl_train.evolution.prompts import WORDS

Document = Mapping[str, Any]
BACKTICKS = re.compile("`+")


def span(text: str) -> str:
    """`text` as inline code, on one line, whatever it contains."""
    line = " ".join(visible(text).split())
    ticks = "`" * (_longest(line) + 1)
    gap = " " * (line[:1] == "`" or line[-1:] == "`")
    return f"{ticks}{gap}{line}{gap}{ticks}" if line else "*(empty)*"


def fence(text: str, language: str = "") -> str:
    """`text` as a block of code, whatever it contains."""
    ticks = "`" * max(_longest(text) + 1, 3)
    return f"{ticks}{language}\n{visible(text)}\n{ticks}"


def page(document: Document, commands: Sequence[tuple[str, str]]) -> str:
    """The whole page. `commands` are (what it does, the command) pairs."""
    prompt, run = document["prompt"], document["run"]
    parts = [
        f"# System prompt {span(prompt['id'])} of the run {span(run['name'])}",
        "\n".join(_facts(document)),
        "## The prompt, as the model reads it",
        fence(prompt["text"], "text") if prompt["text"] else "It has no principles: there is no system message for it.",
        *(["## Principles", "\n".join(_principles(prompt["principles"]))] if prompt["principles"] else []),
        "## Lineage",
        "\n".join(_lineage(document["lineage"])),
        "## How to use it",
        "\n\n".join(f"{what}:\n\n{fence(command, 'sh')}" for what, command in commands),
        "What everything here comes from (configuration, hashes, ratings, test openings) is in `prompt.json`.",
    ]
    return "\n\n".join(parts) + "\n"


def score(found: Mapping[str, Any]) -> str:
    """A validation score in words."""
    interval = f" [{found['low']:.3f}, {found['high']:.3f}]" if found.get("low") is not None else ""
    return f"{found['mean']:.3f}{interval}, {found['problems']} problems, step {found['step']}"


def _facts(document: Document) -> Iterator[str]:
    prompt, run, test = document["prompt"], document["run"], document["test"]
    rating, validation = prompt["rating"], prompt["validation"]
    state = "finished" if run["finished"] else "not finished"
    yield f"- **run**: step {run['step']} of {run['steps']} ({state}), mode {run['mode']}, seed {run['seed']}"
    yield f"- **model**: {span(document['model']['path'])}"
    yield f"- **environment**: {span(document['environment']['id'])}"
    yield f"- **chosen**: {document['chosen']['why']}"
    yield f"- **rating**: {rating['mu']:.1f} ± {2 * rating['sigma']:.1f} ({rating['kind']}, {rating['games']} games)"
    yield f"- **validation**: {score(validation) if validation else 'never'}"
    yield f"- **test split**: {_opened(test['openings'])}"
    if why := document["guard"]["set_aside"]:
        yield f"- **set aside**: {span(why)}"


def _opened(openings: Sequence[Mapping[str, Any]]) -> str:
    if not openings:
        return "not opened"
    looks = "; ".join(f"step {one['step']}, {one['by']}" for one in openings)
    return f"opened {len(openings)} time{'s' * (len(openings) > 1)} ({looks})"


def _principles(principles: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for number, principle in enumerate(principles, 1):
        yield f"{number}. {span(principle['text'])}"
        for written in (principle["written"], *principle["ancestors"]):
            yield f"   - {_written(written)}"


def _written(written: Mapping[str, Any]) -> str:
    name = f"{written['prompt']}.{written['id']}"
    if written["op"] == "root":
        return f"{name}: there from the start"
    sources = f" of {' and '.join(written['sources'])}" if written["sources"] else ""
    because = f", because {span(written['evidence'])}" if written["evidence"] else ""
    return f"{name}: {written['op']}{sources} by {WORDS[written['operator']]}, step {written['step']}{because}"


def _lineage(lineage: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for one in lineage:
        if not one["parents"]:
            how = "is the root prompt" if one["operator"] == "root" else f"has no parents ({WORDS[one['operator']]})"
            yield f"- {one['id']} {how}, with {_count(len(one['principles']))}."
            continue
        duel = one["against_parent"]
        met = f"{duel['gain']:+.3f} ± {duel['error']:.3f} over {duel['problems']} problems" if duel["problems"] else ""
        against = f"; mean reward against {one['parents'][0]}: {met}" if met else ""
        how = f"by {WORDS[one['operator']]} of {' and '.join(one['parents'])}"
        yield f"- {one['id']}, step {one['born']}, {how}{against}"
        changes = [(word, entry) for word in ("added", "changed", "removed") for entry in one[word]]
        yield from (f"  - {word} {entry['id']}: {span(entry['text'])}" for word, entry in changes)


def _count(principles: int) -> str:
    return "no principles" if not principles else f"{principles} principle{'s' * (principles > 1)}"


def _longest(text: str) -> int:
    return max(map(len, BACKTICKS.findall(text)), default=0)
