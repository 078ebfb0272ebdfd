"""`report.html`: one file that shows a run, opens without a network, and runs nothing.

There is no script in it at all: filtering is CSS, charts are inline SVG, and a content security policy forbids whatever
is not this very style sheet. Everything that an agent or an environment said is escaped by the template engine, after
characters that would hide or reorder text were made visible (`plain.visible`).
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

from espl_envs.core.errors import MissingExtra
from espl_envs.evaluate import charts
from espl_envs.evaluate.config import EvalConfig
from espl_envs.evaluate.directory import RunDirectory
from espl_envs.evaluate.plain import one_line, visible
from espl_envs.evaluate.records import Episode, EpisodeKey, Outcome, TurnUsage
from espl_envs.evaluate.summary import summary_of
from espl_envs.evaluate.tables import CHANGED, interval, money, share

REPORT = "report.html"
TRANSCRIPTS = 200
LONGEST_MESSAGE = 20_000
KINDS = ("right", "partial", "wrong", "no_answer", "truncated", "agent_error", "fault")
CURVES = (("pass@k", "one"), ("maj@k", "three"), ("pass^k", "two"))
BUDGETS = {"completion_tokens": "completion tokens", "tool_calls": "tool calls"}


@dataclass(frozen=True, slots=True)
class _Line:
    """What the page needs of an episode that it may or may not show."""

    key: EpisodeKey
    task_id: str
    kind: str
    score: float | None


def write_report(
    run: Path | RunDirectory, *, transcripts: int | None = TRANSCRIPTS, allow_faults: bool = False
) -> Path:
    """Write `report.html` of a run and return its path. At most `transcripts` are in it (None: all of them), of every
    outcome as many. Raises RunError where there is no run, MissingExtra without jinja2."""
    directory = run if isinstance(run, RunDirectory) else RunDirectory.read(run)
    episodes = list(directory.episodes(transcripts=False))
    data = summary_of(directory, allow_faults, episodes)
    lines = [_Line(e.key, e.task_id, kind_of(e), e.score) for e in in_order(directory.config, episodes)]
    chosen = _chosen(lines, transcripts)
    anchors = {key: f"episode-{number}" for number, key in enumerate(chosen, 1)}
    css = files("espl_envs.evaluate").joinpath("report.css").read_text("utf-8")
    page = _template().render(
        data=data, k=str(data["k"]), changed=CHANGED, css=_markup(css), css_hash=_hash(css), whisker=charts.whisker,
        titles=[f"{env['id']} ({env['split']})" for env in data["envs"]],
        facts=_facts(data), usage=_usage(data["usage"]),
        parts=[_part(env, [line for line in lines if (line.key.env, line.key.split) == (env["id"], env["split"])],
                     anchors, directory.config.system_prompts) for env in data["envs"]],
        total=len(lines), shown=len(chosen),
        shown_by=_counted([line for line in lines if line.key in anchors]),
        episodes=(_shown(directory.episode(key), anchors[key]) for key in chosen),
    )  # fmt: skip
    return directory.write_text(REPORT, page)


def in_order(config: EvalConfig, episodes: Sequence[Episode]) -> list[Episode]:
    """Environments as the configuration has them, and their episodes by key."""
    place = {(env.id, env.split): number for number, env in enumerate(config.envs)}
    return sorted(episodes, key=lambda episode: (place[episode.key.env, episode.key.split], episode.key))


def kind_of(episode: Episode) -> str:
    """The outcome, with answers told apart by what they were worth."""
    if episode.outcome is not Outcome.ANSWERED or episode.score is None:
        return str(episode.outcome)
    return "right" if episode.score >= 1 else "wrong" if episode.score <= 0 else "partial"


def _chosen(lines: Sequence[_Line], most: int | None) -> list[EpisodeKey]:
    """Keys in order; where there are too many, kinds and environments take turns."""
    if most is None or len(lines) <= most:
        return [line.key for line in lines]
    queues: dict[tuple[str, str, str], list[EpisodeKey]] = {}
    for line in lines:
        queues.setdefault((line.kind, line.key.env, line.key.split), []).append(line.key)
    turns = (key for row in zip_longest(*queues.values()) for key in row if key is not None)
    chosen = {key for key, _ in zip(turns, range(most), strict=False)}
    return [line.key for line in lines if line.key in chosen]


def _part(
    env: Mapping[str, Any], lines: Sequence[_Line], anchors: Mapping[EpisodeKey, str], prompts: Sequence[str]
) -> dict[str, Any]:
    """One environment: its bar of outcomes, its curves, its tasks, its prompts."""
    outcomes = _counted(lines) | {"missing": env["episodes"]["missing"]}
    sensitivity = env.get("prompt_sensitivity")
    cells = _cells(env, lines, anchors)
    more = f"; the first {charts.MOST_CELLS:,} of {len(cells):,}" if len(cells) > charts.MOST_CELLS else ""
    return {
        "env": env, "outcomes": outcomes, "outcomes_chart": charts.stacked(outcomes), "charts": list(_charts(env)),
        "heat": charts.heat(cells), "heat_note": f"red 0, green 1, empty unknown, in the order of the split{more}",
        "prompts": [{"text": text, "score": score}
                    for text, score in zip(prompts, sensitivity["prompts"], strict=True)] if sensitivity else None,
    }  # fmt: skip


def _charts(env: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Curves over k and over budgets, where there is more than one point."""
    if len(env.get("pass@k", {})) > 1:
        lines = [charts.Line(name, colour, _points(env[name])) for name, colour in CURVES]
        yield {"title": "More samples", "svg": charts.curves(lines, "k"), "lines": lines}
    for unit, label in BUDGETS.items():
        points = _points((env.get("budgets") or {}).get(unit) or {})
        if len(points) > 1:
            line = charts.Line("mean score", "one", points)
            tokens = unit == "completion_tokens"
            svg = charts.curves([line], label, logarithmic=tokens, steps=not tokens)
            yield {"title": f"At a budget of {label}", "svg": svg, "lines": [line]}


def _points(values: Mapping[str, Any]) -> list[tuple[float, float, float | None, float | None]]:
    return [(float(x), v["mean"], v["low"], v["high"]) for x, v in values.items() if v["mean"] is not None]


def _cells(
    env: Mapping[str, Any], lines: Sequence[_Line], anchors: Mapping[EpisodeKey, str]
) -> list[tuple[float | None, str, str | None]]:
    """A square per task: its mean score, what a pointer reads there, and its first transcript on the page."""
    by_task: dict[int, list[_Line]] = {}
    for line in sorted(lines, key=lambda line: line.key):
        by_task.setdefault(line.key.task, []).append(line)
    cells: list[tuple[float | None, str, str | None]] = []
    for task in range(env["tasks"]):
        mine = by_task.get(task, [])
        scores = [line.score for line in mine if line.score is not None]
        score = sum(scores) / len(scores) if scores else None
        name = one_line(mine[0].task_id, 60) if mine else f"task {task}"
        kinds = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in _counted(mine).items() if count)
        text = f"{name}: {'no score' if score is None else f'{score:.2f}'}" + (f" ({kinds})" if kinds else "")
        cells.append((score, text, next((anchors[line.key] for line in mine if line.key in anchors), None)))
    return cells


def _facts(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures under the headline."""
    usage, episodes = data["usage"], data["episodes"]
    k, facts = data["k"], []
    if k > 1 and not data["refused"]:
        for name in ("pass@k", "pass^k", "maj@k"):
            means = [env[name][str(k)]["mean"] for env in data["envs"]]
            if None not in means:
                facts.append({"name": name.replace("k", str(k)), "value": f"{sum(means) / len(means):.3f}", "note": ""})
    masked = episodes["faults"] + episodes["missing"]
    facts.append({
        "name": "episodes", "value": f"{episodes['scored']:,}",
        "note": f"{episodes['faults']:,} faulted, {episodes['missing']:,} missing" if masked else "all scored",
    })  # fmt: skip
    if usage["completion_tokens"]["total"]:
        written, read = usage["completion_tokens"], usage["prompt_tokens"]
        note = f"{_short(read['total'])} read" if read["mean"] is not None else ""
        note += f"; {written['unknown']:,} episodes unknown" if written["unknown"] else ""
        facts.append({"name": "tokens written", "value": _short(written["total"]), "note": note})
    if usage["cost"] and usage["cost"]["total"] is not None:
        cost, each = usage["cost"], usage["cost"]["per_right"]
        note = f"{money(each, cost['currency'])} per right answer" if each else ""
        facts.append({"name": "cost", "value": money(cost["total"], cost["currency"]), "note": note})
    seconds = usage["seconds"]["median"]
    if seconds is not None and usage["elapsed_seconds"] is not None:
        took = duration(usage["elapsed_seconds"])
        facts.append({"name": "wall clock", "value": took, "note": f"median episode {duration(seconds)}"})
    return facts


def _usage(usage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of what it took."""
    rows = []
    for name, title in (("completion_tokens", "tokens written"), ("prompt_tokens", "tokens read"),
                        ("tool_calls", "tool calls"), ("seconds", "seconds"), ("cost", "cost")):
        values = usage[name]
        if values:
            unit = f", {values['currency']}" if "currency" in values else ""
            cells = [_figure(values[column]) for column in ("mean", "median", "p95", "max", "total")]
            rows.append({"name": title + unit, "cells": [*cells, f"{values['unknown']:,}"]})
    return rows


def _shown(episode: Episode, anchor: str) -> dict[str, Any]:
    """An episode as the page shows it."""
    turns = iter(episode.turns)
    messages = [_message(m, next(turns, None) if m.role == "assistant" else None) for m in episode.messages]
    took = [duration(episode.seconds)]
    if episode.turns:
        tokens = episode.completion_tokens
        what = "turn" if tokens is None else "model call"       # an agent in Python need not say what it asked whom
        took.append(f"{len(episode.turns)} {what}{'s' if len(episode.turns) > 1 else ''}")
        took += [f"{tokens:,} tokens written"] if tokens is not None else []
        took += [f"{episode.tool_calls} tool calls"] if episode.tool_calls else []
    return {
        "episode": episode, "anchor": anchor, "kind": kind_of(episode), "messages": messages, "took": ", ".join(took)
    }  # fmt: skip


def _message(message: Any, turn: TurnUsage | None) -> dict[str, Any]:
    content, calls = message.content, message.tool_calls
    usage = ""
    if turn is not None:
        known = [f"{turn.completion_tokens:,} tokens"] if turn.completion_tokens is not None else []
        usage = ", ".join([*known, duration(turn.seconds), *([turn.finish_reason] if turn.finish_reason else [])])
    return {
        "role": message.role, "title": message.role if not message.name else f"{message.role}: {message.name}",
        "content": content[:LONGEST_MESSAGE], "cut": max(0, len(content) - LONGEST_MESSAGE), "usage": usage,
        "calls": [{"name": call.name, "arguments": call.arguments[:LONGEST_MESSAGE]} for call in calls],
        "reasoning": turn.reasoning[:LONGEST_MESSAGE] if turn is not None else "",
    }  # fmt: skip


def duration(seconds: float) -> str:
    """0.7 ms, 0.21 s, 42 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 0.01:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 10:
        return f"{seconds:.2g} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    minutes, rest = divmod(total, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _counted(lines: Sequence[_Line]) -> dict[str, int]:
    counts = Counter(line.kind for line in lines)
    return {kind: counts[kind] for kind in KINDS}


def _short(number: float) -> str:
    """1234567 → 1.23M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:,.0f}"


def _figure(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _hash(css: str) -> str:
    return base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()


def _markup(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)


def _line(value: Any, most: int = 200) -> str:
    return one_line(str(value), most)


def _text(value: Any, most: int = LONGEST_MESSAGE) -> str:
    text = str(value)
    return visible(text[:most] if len(text) <= most else f"{text[:most]}…")


def _template() -> Any:
    """The page, with autoescape, undefined names as errors, and the filters through which all foreign text goes."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as missing:
        raise MissingExtra("eval", f"{REPORT} (no module {missing.name})") from missing
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "line": _line,
        "text": _text,
        "interval": interval,
        "share": share,
    }
    return environment.from_string(files("espl_envs.evaluate").joinpath("report.html.j2").read_text("utf-8"))
