"""Results as a person reads them in a terminal."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from espl_envs.core.errors import MissingExtra
from espl_envs.evaluate.missing import sentence
from espl_envs.evaluate.plain import one_line

if TYPE_CHECKING:
    from espl_envs.evaluate.compare import Comparison, Pair
    from espl_envs.evaluate.leaderboard import Leaderboard
    from espl_envs.evaluate.regrade import Regrading
    from espl_envs.evaluate.summary import Summary

CHANGED = "the agent's files changed while this run was played (--same-agent): it may be a mixture of two agents"
HINGES = " *"           # a verdict that what is missing could turn
VERDICTS = {"better": "green", "worse": "red", "undecided": "yellow"}


def plain_text(result: Any, width: int = 110) -> str:
    """A result without colours."""
    console = _rich("console").Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    console.print(result)
    return str(console.file.getvalue().rstrip())


def summary_table(summary: Summary) -> Any:
    """Headline, a row per environment, and what became of the episodes."""
    data, text = summary.data, _rich("text").Text
    headline = text()
    if data["refused"]:
        headline.append("no headline: ", "bold yellow").append(one_line(data["refused"], 400))
    else:
        headline.append(interval(data), "bold").append(f"  mean of {_scope(data)}")
        if data["partial"]:
            headline.append(f"  (partial: {_masked(data['episodes'])})", "yellow")
    table = _table("", "mean", *(f"pass@{k}" for k in _ks(data)), "no answer", "truncated", "agent error", "masked")
    for env in data["envs"]:
        rates = env.get("rates")
        _row(table, 
            one_line(f"{env['id']} ({env['split']})", 60), interval(env),
            *(share(env.get("pass@k", {}).get(k)) for k in _ks(data)),
            *(share(rates and rates[name]) for name in ("no_answer", "truncated", "agent_error")),
            _masked(env["episodes"]) or "0",
        )  # fmt: skip
    usage = data["usage"]
    written, read = usage["completion_tokens"], usage["prompt_tokens"]
    facts = [f"{counted(written)} tokens written, {counted(read)} read"] if written["total"] else []
    if usage["cost"] and usage["cost"]["total"] is not None:
        facts.append(money(usage["cost"]["total"], usage["cost"]["currency"]))
    facts.append(f"{data['episodes']['scored']:,} of {data['episodes']['expected']:,} episodes")
    parts = [headline, table, text(" · ".join(facts), "dim")]
    parts += [text(f"warning: {CHANGED}", "bold yellow")] if data["agent_changed"] else []
    if damaged := data["damaged_lines"]:
        lines = "a line" if damaged == 1 else f"{damaged:,} lines"
        parts.append(text(f"warning: {lines} of episodes.jsonl cannot be read: --resume plays that again", "bold red"))
    parts += [text(f"{e['count']} × {e['outcome']}: {one_line(e['error'])}", "yellow") for e in data["errors"][:3]]
    return _rich("console").Group(*parts)


def comparison_table(comparison: Comparison) -> Any:
    """A row per pair, and what would decide the undecided."""
    text = _rich("text").Text
    table = _table("A", "B", "mean A", "mean B", "B - A", "won/tied/lost", "p", "B is")
    for pair in comparison.pairs:
        difference = f"{pair.difference.mean:+.3f}"
        if pair.difference.low is not None:
            difference += f" [{pair.difference.low:+.3f}, {pair.difference.high:+.3f}]"
        _row(table, 
            one_line(pair.a, 40), one_line(pair.b, 40), f"{pair.mean_a:.3f}", f"{pair.mean_b:.3f}", difference,
            f"{pair.wins}/{pair.ties}/{pair.losses}", f"{pair.p_adjusted:.3g}",
            text(pair.verdict, VERDICTS[pair.verdict]).append(HINGES if _hinges(pair) else "", "bold red"),
        )  # fmt: skip
    alarms = [sentence(pair.a, pair.b, pair.verdict, pair.missing)
              for pair in comparison.pairs if pair.missing is not None and pair.missing.hinges]  # fmt: skip
    notes = [text(f"{one_line(pair.b, 40)} against {one_line(pair.a, 40)}: {needed(pair)}", "dim")
             for pair in comparison.pairs if pair.verdict == "undecided"]  # fmt: skip
    tests = sorted({pair.test for pair in comparison.pairs})
    method = f"p by {' and '.join(tests)}" + (", corrected by Holm's method" if len(comparison.pairs) > 1 else "")
    warnings = [text(f"note: {one_line(said, 600)}", "yellow") for said in comparison.warnings if said not in alarms]
    loud = [text(f"{HINGES.strip()} warning: {one_line(said, 600)}", "bold red") for said in alarms]
    method = text(f"{method}; intervals of 95 % over tasks", "dim")
    return _rich("console").Group(table, *loud, method, *notes, *warnings)


def _hinges(pair: Pair) -> bool:
    return pair.missing is not None and pair.missing.hinges


def needed(pair: Pair) -> str:
    """What would decide an undecided pair, in words."""
    now = f"{pair.tasks} tasks find a difference of {pair.detectable:.3f} or more with 80 % power"
    if pair.needed_tasks is None:
        return f"no difference was seen; {now}"
    if pair.needed_tasks <= pair.tasks:
        return f"chance is not ruled out, although {now}"
    samples = f" or {pair.needed_samples:,} samples per task" if pair.needed_samples else ""
    seen = f"a difference of {abs(pair.difference.mean):.3f}"
    return f"{seen} would need about {pair.needed_tasks:,} tasks{samples}; {now}"


def leaderboard_table(board: Leaderboard) -> Any:
    """A table per board."""
    text, parts = _rich("text").Text, []
    for one in board.boards:
        table = _table("rank", "agent", "strength", "mean", "tasks")
        table.title, table.title_justify = text(one_line(one.title)), "left"
        for place, entry in enumerate(one.standings, 1):
            ranks = f"{place}" + (f" ({entry.ranks[0]}-{entry.ranks[1]})" if entry.ranks else "")
            points = "—" if entry.strength is None else f"{entry.strength:.0f} [{entry.low:.0f}, {entry.high:.0f}]"
            _row(table, ranks, one_line(entry.name, 50), points, str(entry.mean), str(entry.mean.tasks))
        parts.append(table)
    method = "strength: Bradley-Terry with ties over shared tasks; in brackets what 95 % of resamplings give"
    parts.append(text(method, "dim"))
    return _rich("console").Group(*parts, *(text(f"left out: {one_line(why)}", "yellow") for why in board.left_out))


def regrading_table(regrading: Regrading) -> Any:
    """The changes, and what could not be graded again."""
    text = _rich("text").Text
    parts = [text(f"{regrading.graded:,} episodes graded again, {len(regrading.changes):,} changed; {regrading.out}")]
    if regrading.changes:
        table = _table("episode", "answer", "was", "is")
        for change in regrading.changes[:20]:
            was, now = (f"{o}, {'no score' if s is None else f'{s:g}'}" for o, s in (change.before, change.after))
            _row(table, one_line(str(change.key), 60), one_line(change.answer or "", 40), was, now)
        parts.append(table)
    if len(regrading.changes) > 20:
        parts.append(text(f"and {len(regrading.changes) - 20} more, in regrade.json"))
    kept = regrading.kept.items()
    parts += [text(f"{count:,} kept as they were: {one_line(why, 300)}", "yellow") for why, count in kept]
    return _rich("console").Group(*parts)


def interval(values: Mapping[str, Any]) -> str:
    """`0.512 [0.480, 0.544]` of a mapping with mean, low and high; a dash where there is none."""
    if values["mean"] is None:
        return "—"
    around = f" [{values['low']:.3f}, {values['high']:.3f}]" if values["low"] is not None else ""
    return f"{values['mean']:.3f}{around}"


def share(values: Mapping[str, Any] | None) -> str:
    """The mean alone."""
    return "—" if not values or values["mean"] is None else f"{values['mean']:.3f}"


def counted(values: Mapping[str, Any]) -> str:
    """A total, as far as it is known."""
    if values["mean"] is None:
        return "unknown"
    return f"{'at least ' if values['unknown'] else ''}{values['total']:,}"


def money(amount: float, currency: str) -> str:
    """An amount with so many digits that it says something."""
    return f"{amount:,.2f} {currency}" if amount >= 0.1 or amount == 0 else f"{amount:.2g} {currency}"


def _scope(data: Mapping[str, Any]) -> str:
    """What the headline is about: n and k."""
    prompts = f", {data['prompts']} system prompts" if data["prompts"] > 1 else ""
    envs = f"{len(data['envs'])} environments, " if len(data["envs"]) > 1 else ""
    return f"{envs}{data['tasks']:,} tasks × {data['k']} sample{'s' if data['k'] > 1 else ''}{prompts}"


def _masked(episodes: Mapping[str, int]) -> str:
    return ", ".join(f"{episodes[name]:,} {name}" for name in ("faults", "missing") if episodes[name])


def _ks(data: Mapping[str, Any]) -> list[str]:
    """The k of the columns: the largest one; 1 is the mean."""
    return [str(data["k"])] if data["k"] > 1 else []


def _table(*columns: str) -> Any:
    table = _rich("table").Table(box=_rich("box").SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 1 or column in ("B", "agent", "answer") else "right")
    return table


def _row(table: Any, *cells: Any) -> None:
    """A row of texts as they stand: rich would read `[…]` in what an agent says as markup."""
    text = _rich("text").Text
    table.add_row(*(text(cell) if isinstance(cell, str) else cell for cell in cells))


def _rich(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"rich.{module}")
    except ImportError as missing:
        raise MissingExtra("eval", "printing tables (no module rich)") from missing
