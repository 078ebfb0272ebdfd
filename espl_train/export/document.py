"""Where a prompt comes from, as strict JSON: everything that somebody needs to judge it, or to make it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from espl_train.evolution.prompts import SystemPrompt
from espl_train.runs import seal
from espl_train.runs.metrics import plain
from espl_train.snapshot import Snapshot

FORMAT = 1
RULES = {
    "validation": "the best mean validation score among the best rated",
    "lower_bound": "the best lower bound of the ratings (mu - 2 sigma)",
    "latest": "the newest child",
}


def document(run: Snapshot, which: str, island: str = "") -> dict[str, Any]:
    """The record of the prompt that `which` names (best, root or an id), with the provenance of all that it rests on.

    Raises EsplError where there is no such prompt.
    """
    from espl_train.learner.loading import identity

    prompt = run.prompt(which, island)
    births = dict(_births(run, island))
    record = {
        "format": FORMAT,
        "espl": version("espl"),
        "prompt": _prompt(run, prompt, island),
        "chosen": _chosen(run, which),
        "lineage": list(_lineage(prompt, births)),
        "quarantine": None,
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
    env = run.config.env
    met = [row for row in run.events if row["kind"] == "problems" and row.get("island", "") == island]
    parts = {row["part"]: {k: row[k] for k in ("env", "split", "problems", "content")} for row in met}
    return {"id": env.id, "args": env.args, "test_id": env.test_id, "test_args": env.test_args, "parts": parts}


def _prompt(run: Snapshot, prompt: SystemPrompt, island: str) -> dict[str, Any]:
    population = run.populations[island]
    rating = population.rating(prompt.id)
    return {
        "id": prompt.id,
        "text": run.text(prompt.principles),
        "principles": [{"id": p.id, "text": p.text, "origin": ""} for p in prompt.principles],
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
    before = f"{island}/" if island else ""
    key = f"{before}validation/{prompt}"
    for row in reversed(run.records):
        if row.get(key) is not None:
            return {
                "mean": row[key], "low": row.get(f"{key}/low"), "high": row.get(f"{key}/high"),
                "problems": row.get(f"{before}validation/count"), "step": row["step"],
            }  # fmt: skip
    return None


def _chosen(run: Snapshot, which: str) -> dict[str, str]:
    if which != "best":
        return {"rule": "asked", "why": "it was asked for by name"}
    if not run.finished:
        return {"rule": "lower_bound", "why": f"{RULES['lower_bound']}; the run is not at its end"}
    rule = run.config.evaluation.choice
    return {"rule": rule, "why": RULES[rule]}


def _births(run: Snapshot, island: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Everybody who was ever born, also those that the population has dropped since."""
    root = run.populations[island].root
    rows = [{"id": p.id, "text": p.text} for p in root.principles]
    yield root.id, {"id": root.id, "principles": rows, "operator": root.operator, "parents": [], "born": root.born}
    for row in run.events:
        if row["kind"] == "born" and row.get("island", "") == island:
            yield row["id"], row


def _lineage(prompt: SystemPrompt, births: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The prompt and its ancestors, the youngest first, each with what sets it apart from its first parent."""
    wanted = {prompt.id}
    for name in reversed(list(births)):
        if name not in wanted:
            continue
        born = births[name]
        wanted |= set(born["parents"])
        first = births.get(born["parents"][0]) if born["parents"] else None
        mine, theirs = ({p["id"]: p["text"] for p in one["principles"]} if one else {} for one in (born, first))
        yield {
            **{key: born[key] for key in ("id", "operator", "parents", "born", "principles")},
            "added": [_entry(p, mine) for p in mine if first and p not in theirs],
            "changed": [_entry(p, mine) for p in mine if first and p in theirs and mine[p] != theirs[p]],
            "removed": [_entry(p, theirs) for p in theirs if p not in mine],
        }


def _entry(principle: str, texts: Mapping[str, str]) -> dict[str, str]:
    return {"id": principle, "text": texts[principle]}
