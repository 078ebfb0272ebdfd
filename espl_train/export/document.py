"""Where a prompt comes from, as strict JSON: everything that somebody needs to judge it, or to make it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from espl_train.evolution.lineage import Lineage, provenance
from espl_train.evolution.prompts import Principle, SystemPrompt
from espl_train.evolution.rejections import Reason
from espl_train.runs import seal
from espl_train.runs.islands import own
from espl_train.runs.metrics import plain
from espl_train.snapshot import Snapshot

FORMAT = 1
REASONS = frozenset(Reason)
RULES = {
    "validation": "the best mean validation score among the best rated",
    "lower_bound": "the best lower bound of the ratings (mu - 2 sigma)",
    "latest": "the newest child",
}


def document(run: Snapshot, prompt: SystemPrompt, island: str = "", asked: bool = False) -> dict[str, Any]:
    """The record of a prompt, with the provenance of all that it rests on. `asked`: it was not the run's choice."""
    from espl_train.learner.loading import identity

    lineage = run.populations[island].lineage
    record = {
        "format": FORMAT,
        "espl": version("espl"),
        "prompt": _prompt(run, prompt, island),
        "chosen": _chosen(run, island, asked),
        "lineage": list(_ancestry(prompt.id, lineage)),
        "guard": {
            "set_aside": run.populations[island].aside.get(prompt.id),
            "refusals": dict(sorted(_refusals(run, island).items())),
        },
        "run": {
            "name": run.name, "step": run.step, "steps": run.config.steps, "finished": run.finished,
            "mode": run.config.mode, "seed": run.config.seed,
        },
        "model": identity(run.config.model),
        "weights": {"trained": run.trained, "checkpoint": run.weights, "mode": run.config.learner.mode},
        "environment": environment(run, island),
        "test": {"openings": [{"step": one.step, "by": one.by} for one in seal.openings(run.folder)]},
        "config": run.config.model_dump(mode="json"),
    }  # fmt: skip
    strict: dict[str, Any] = plain(record)
    return strict


def environment(run: Snapshot, island: str = "") -> dict[str, Any]:
    """What the run was trained and tested on: ids, arguments, and the content hashes that it met when it began."""
    env = run.config.environments[island]
    met = [row for row in run.events if row["kind"] == "problems" and row.get("env", "") == island]
    parts = {row["part"]: {key: row[key] for key in ("id", "split", "problems", "content")} for row in met}
    return {"id": env.id, "args": env.args, "test_id": env.test_id, "test_args": env.test_args, "parts": parts}


def _prompt(run: Snapshot, prompt: SystemPrompt, island: str) -> dict[str, Any]:
    population = run.populations[island]
    rating = population.rating(prompt.id)
    return {
        "id": prompt.id,
        "text": run.text(prompt.principles),
        "principles": provenance(prompt.id, population.lineage),
        "operator": prompt.operator,
        "parents": prompt.parents,
        "born": prompt.born,
        "rating": {
            "kind": run.config.rating.kind, "mu": rating.mu, "sigma": rating.sigma, "lower": rating.lower(),
            "games": population.games(prompt.id),
        },
        "validation": _validation(run, prompt.id, island),
    }  # fmt: skip


def _validation(run: Snapshot, prompt: str, island: str) -> dict[str, Any] | None:
    """The newest validation score of a prompt; None where it was never validated."""
    key = f"validation/{prompt}"
    for row in reversed([own(record, island) for record in run.records]):
        if row.get(key) is not None:
            return {
                "mean": row[key], "low": row.get(f"{key}/low"), "high": row.get(f"{key}/high"),
                "problems": row.get("validation/count"), "step": row["step"],
            }  # fmt: skip
    return None


def _chosen(run: Snapshot, island: str, asked: bool) -> dict[str, str]:
    rule = run.config.evaluation.choice
    if asked:
        return {"rule": "asked", "why": "it was asked for by name"}
    if run.config.mode == "rl":
        return {"rule": "root", "why": "the run trains weights alone, with the root prompt"}
    if island in run.alone:
        return {"rule": rule, "why": f"{RULES[rule]}, when the schedule turned to the weights"}
    if not run.finished:
        return {"rule": "lower_bound", "why": f"{RULES['lower_bound']}; the run is not at its end"}
    return {"rule": rule, "why": RULES[rule]}


def _ancestry(prompt: str, lineage: Lineage) -> Iterator[dict[str, Any]]:
    """The prompt and its ancestors, the youngest first, each with what sets it apart from its first parent."""
    wanted = {prompt}
    for birth in reversed(lineage.births.values()):
        if birth.prompt not in wanted:
            continue
        wanted |= set(birth.parents)
        mine = _texts(lineage.principles(birth.prompt))
        theirs = _texts(lineage.principles(birth.parents[0])) if birth.parents else {}
        yield {
            "id": birth.prompt, "operator": birth.operator, "parents": birth.parents, "born": birth.step,
            "principles": [_entry(p, mine) for p in mine],
            "added": [_entry(p, mine) for p in mine if birth.parents and p not in theirs],
            "changed": [_entry(p, mine) for p in mine if p in theirs and mine[p] != theirs[p]],
            "removed": [_entry(p, theirs) for p in theirs if p not in mine],
            "against_parent": asdict(birth.duel),
        }  # fmt: skip


def _texts(principles: Mapping[str, Principle]) -> dict[str, str]:
    return {name: principle.text for name, principle in principles.items()}


def _refusals(run: Snapshot, island: str) -> Counter[str]:
    """Why operators brought no child in the steps so far, and why a person let none in: reason → how often."""
    rows = (row for row in run.events if row.get("env", "") == island and "outcome" in row)
    return Counter(str(row["outcome"]) for row in rows if row["outcome"] in REASONS)


def _entry(principle: str, texts: Mapping[str, str]) -> dict[str, str]:
    return {"id": principle, "text": texts[principle]}
