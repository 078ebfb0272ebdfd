"""Whole runs whose reflector is a server that never says the same twice: recorded, replayed, out of budget, gone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluate_kit import MODEL, Server, completion, error, serving
from hub_model import hub_model
from loop_kit import breed_simply, config, deal, resume, run

from espl_envs.core.errors import EsplError
from espl_train import cli
from espl_train.config import Config
from espl_train.evolution.rejections import Reason, Rejection
from espl_train.reflecting.command import main as review
from espl_train.reflecting.queue import Verdict
from espl_train.reflecting.review import Desk
from espl_train.runs import checkpoint
from espl_train.runs.metrics import read_lines
from espl_train.settings import to_toml

WORDS = ("apples", "bears", "cars", "doors", "eggs", "foxes", "goats", "hats", "inks", "jars", "keys", "lamps")


def reply(body: dict[str, Any], number: int) -> Any:
    """Words for a summary, an edit for a critique; both depend on how many requests there were."""
    asked = body["messages"][-1]["content"]
    if "# Candidates" in asked:
        return completion("[]")
    if "# Evidence" in asked:
        word = WORDS[number % len(WORDS)]
        return completion(json.dumps([{"op": "add", "text": f"Count the {word} before {number} others do."}]))
    return completion(f"It was attempt number {number}.")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_model(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(reply) as found:
        yield found


@pytest.fixture(autouse=True)
def dealt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a-secret-of-this-test")
    deal(monkeypatch)


def settings(model: Path, out: Path, url: str, **reflection: Any) -> Config:
    named = {f"reflection.{name}": value for name, value in {"base_url": url, "model": MODEL, **reflection}.items()}
    return config(model, out, mode="evolution", **{"evolution.reflector": "endpoint", **named})


def state(out: Path) -> Any:
    return checkpoint.load_newest(out / "checkpoints")[1]["state"]["islands"][""]


def metrics(out: Path) -> list[dict[str, Any]]:
    """Without seconds, and without who was asked and who was not."""
    timed = ("seconds", "replayed")
    return [{k: v for k, v in row.items() if not k.endswith(timed)} for row in read_lines(out / "metrics.jsonl")]


def outcomes(out: Path, kind: str) -> list[str]:
    return [row["outcome"] for row in read_lines(out / "events.jsonl") if row["kind"] == kind]


def test_a_recorded_run_is_replayed_bit_for_bit_without_a_server(model: Path, tmp_path: Path, server: Server) -> None:
    first, _ = run(settings(model, tmp_path / "one", server.url, cache="record"))
    assert len(first.islands[0].population) > 1
    asked = len(server.requests)
    replies = {"cache": "replay_only", "cache_dir": str(tmp_path / "one" / "reflections")}
    second, _ = run(settings(model, tmp_path / "two", "http://127.0.0.1:9/v1", **replies))
    assert len(server.requests) == asked
    assert state(tmp_path / "one") == state(tmp_path / "two") and metrics(tmp_path / "one") == metrics(tmp_path / "two")
    spent = second.client.ledger.total
    assert spent.replayed == spent.calls == first.client.ledger.total.calls > 0
    third, _ = run(settings(model, tmp_path / "three", server.url))
    assert third.islands[0].population.to_json() != first.islands[0].population.to_json()      # it is not the seed


def test_a_replay_stops_at_the_first_call_that_nobody_recorded_and_goes_on_with_a_server(
    model: Path, tmp_path: Path, server: Server
) -> None:
    run(settings(model, tmp_path / "one", server.url, cache="record"))
    replies = {"cache": "replay_only", "cache_dir": str(tmp_path / "one" / "reflections")}
    longer = settings(model, tmp_path / "two", server.url, **replies).model_copy(update={"steps": 3})
    with pytest.raises(EsplError, match=r"replay_only, and .* has no reply to a call"):
        run(longer)
    assert checkpoint.steps(tmp_path / "two" / "checkpoints")[-1] == 2
    trainer, _ = resume(tmp_path / "two", **{"reflection.cache": "replay"})
    assert trainer.step == 3


def test_out_of_budget_a_run_goes_on_and_nothing_is_asked(model: Path, tmp_path: Path, server: Server) -> None:
    trainer, summary = run(settings(model, tmp_path / "run", server.url, max_calls=2))
    assert trainer.client.ledger.total.calls == 2 and len(server.requests) == 3         # and the first short one
    assert outcomes(tmp_path / "run", "mutation")[-1] == "budget"
    assert any("reflection.max_calls of 2 is used up" in note for note in summary.notes)


def test_a_run_that_nobody_answers_is_saved_and_stops_and_goes_on_elsewhere(
    model: Path, tmp_path: Path, server: Server
) -> None:
    with (
        serving(lambda _, number: completion("Hi") if number == 1 else error(403, "not you")) as closed,
        pytest.raises(EsplError, match=r"no reply for 1 iteration in a row(?s:.*)HTTP 403"),
    ):
        run(settings(model, tmp_path / "run", closed.url, max_failures=1, cache="record"))
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == 1
    trainer, _ = resume(tmp_path / "run", **{"reflection.base_url": server.url})
    assert trainer.step == 2 and trainer.client.ledger.total.calls > trainer.client.ledger.total.failed > 0
    everything = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"sk-a-secret" not in everything


def test_children_wait_for_a_person_across_a_resume(model: Path, tmp_path: Path, server: Server) -> None:
    out = tmp_path / "run"
    trainer, summary = run(settings(model, out, server.url, review=True))
    waiting = [c.id for c in Desk(out).all()]
    assert len(trainer.islands[0].population) == 1 and waiting
    assert any(f"wait for a person: {len(waiting)}" in note for note in summary.notes)
    review([str(out), "accept", waiting[0]])
    trainer, _ = resume(out, steps=3)
    newest = [m.prompt for m in trainer.islands[0].population.members][1:]
    assert [(p.id, p.born) for p in newest] == [("p0001", 1)] and "accepted" in outcomes(out, "review")


def test_what_a_person_refused_outlives_an_empty_queue_and_a_run_without_review(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breed_simply(monkeypatch)
    trainer, _ = run(config(model, tmp_path / "run", steps=1, **{"reflection.review": True}))
    (island,), refused = trainer.islands, Rejection(Reason.REVIEW, "no")
    assert island.queue is not None
    for candidate in list(island.queue._waiting.values()):
        island.queue.settle(Verdict(candidate, refused), "refused")
    state = island.state()
    assert state["queue"] == {"waiting": [], "refused": [["rule of step 1"]]}
    island.queue = None
    island.restore(state)
    assert island.state()["queue"] == state["queue"]


def test_ctrl_c_during_a_call_that_hangs_ends_the_run_at_once_and_it_goes_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real SIGINT, while a server holds a call and would do so for an hour."""
    hung: list[bool] = []

    async def hang() -> Any:
        if not hung:
            os.kill(os.getpid(), signal.SIGINT)
        hung.append(True)
        await asyncio.sleep(3600)

    out, words = tmp_path / "run", tmp_path / "run.toml"
    with serving(lambda body, n: hang() if n > 2 else reply(body, n)) as server:        # who is there is asked twice
        words.write_text(to_toml(settings(model, out, server.url)))
        assert cli.main(["--config", str(words), "--quiet"]) == 130
    said = capsys.readouterr().err
    assert f"0 of 2 steps are saved in {out}; continue with: espl-train --resume {out}" in said and "Trace" not in said
    assert hung and [row["step"] for row in read_lines(out / "metrics.jsonl")] == [0]
    with serving(reply, url=server.url) as back:
        assert cli.main(["--resume", str(out), "--quiet", "--reflection.base_url", back.url]) == 0
    assert [row["step"] for row in read_lines(out / "metrics.jsonl")] == [0, 1, 2] and len(back.requests) > 2
