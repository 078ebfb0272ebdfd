"""What an export promises: whole, true to the run, safe to look at, and the run is only read.

Runs are on a small model from a folder; what the trainer would have computed is dealt (`run_kit.py`).
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import loop_kit
import pytest
import torch
from hub_model import hub_model
from loop_kit import breed_simply, config, deal, run
from markdown_it import MarkdownIt
from peft import PeftModel
from run_kit import write_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import espl_envs
from espl_envs.core.errors import EsplError
from espl_envs.evaluate.plain import visible
from espl_train import cli, snapshot
from espl_train.config import Config
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Principle
from espl_train.export import bundle, markdown
from espl_train.export.bundle import export
from espl_train.export.document import document
from espl_train.export.request import QUESTION
from espl_train.learner.adapter import write_adapter
from espl_train.learner.policy import Policy
from espl_train.problems import ProblemSets
from espl_train.serving import wire
from espl_train.snapshot import Snapshot
from espl_train.totals import Totals

HOSTILE = (
    "`code` and ``more`` of it```", "</code></pre><script>alert(1)</script>", "[a link](javascript:alert(1))",
    "![x](http://127.0.0.1/x.png)", "two\n\n# lines", "~~~\n```sh\nrm -rf /\n```", "www.example.com and a@b.example",
    "\x1b[31mred\u202eder", "    indented", "- a list\n- of two", "|a|b|\n|-|-|", "$x$ &amp; <!-- x", "`", "\ud800",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_model(tmp_path_factory.mktemp("hub") / "model")


class Made(NamedTuple):
    """A finished run, and what it was made of."""

    out: Path
    config: Config
    policy: Policy
    population: Population


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    out = tmp_path_factory.mktemp("runs") / "a run"
    return Made(out, *write_run(model, out))


def read(folder: Path, name: str = bundle.PROMPT) -> Any:
    return json.loads((folder / name).read_text("utf-8"))


def test_the_adapter_is_the_policy_and_merged_it_acts_the_same(
    made: Made, model: Path, tmp_path: Path
) -> None:
    folder = export(Snapshot.of(made.out), tmp_path / "x", merge=True)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(folder / "adapter"))
    merged, base = (AutoModelForCausalLM.from_pretrained(place) for place in (folder / "model", model))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        theirs, ours, plain, bare = (m(ids).logits for m in (loaded, made.policy.model, merged, base))
    assert torch.equal(theirs, ours)
    assert torch.allclose(plain, ours, atol=1e-5) and not torch.allclose(bare, ours, atol=1e-3)


def test_the_adapter_is_written_as_peft_would(made: Made, tmp_path: Path) -> None:
    export(Snapshot.of(made.out), tmp_path / "x")
    ours, theirs = tmp_path / "x" / "adapter", made.out / "policy"
    mine, peft = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    assert mine.keys() == peft.keys() and all(torch.equal(mine[name], peft[name]) for name in mine)
    settings, wanted = (json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, theirs))
    layers = {module.rpartition(".")[2] for module in wanted["target_modules"]}      # PEFT may name each by its path
    assert settings == {**wanted, "target_modules": sorted(layers)}
    again = tmp_path / "again"
    again.mkdir()
    write_adapter(again, made.policy.state(), made.config.learner, made.config.model.path)
    assert [(ours / f.name).read_bytes() == f.read_bytes() for f in again.iterdir()] == [True, True]


def test_the_record_says_where_a_prompt_comes_from(made: Made, tmp_path: Path) -> None:
    record = read(export(Snapshot.of(made.out), tmp_path / "x"))
    prompt, text = record["prompt"], Snapshot.of(made.out).text(made.population["p0001"].principles)
    assert record["run"] == {
        "name": "a run", "step": 2, "steps": 2, "finished": True, "mode": "evolution_rl", "seed": made.config.seed
    }  # fmt: skip
    assert prompt["id"] == "p0001" and record["chosen"]["rule"] == "validation"
    assert prompt["text"] == text and [p["text"] for p in prompt["principles"]] == ["Write two words."]
    rating = made.population.rating("p0001")
    assert (prompt["rating"]["mu"], prompt["rating"]["sigma"]) == (rating.mu, rating.sigma)
    assert prompt["validation"]["mean"] == 0.75 and prompt["validation"]["problems"] == 3
    assert [one["id"] for one in record["lineage"]] == ["p0001", "p0000"]
    assert record["lineage"][0]["added"] == [{"id": "G1", "text": "Write two words."}]
    assert record["test"]["openings"] == [{"step": 2, "by": "run"}]
    assert {part: row["content"] for part, row in record["environment"]["parts"].items()} == {
        problems.part: problems.env.tasks.hash for problems in ProblemSets.of(made.config.env)
    }
    assert Config.model_validate(record["config"]) == made.config
    assert len(record["model"]["fingerprint"]) == 16


def test_the_fingerprint_is_that_of_the_weights(model: Path, tmp_path: Path) -> None:
    from espl_train.config import ModelConfig
    from espl_train.learner.loading import identity

    other = hub_model(tmp_path / "other", seed=1)
    prints = [identity(ModelConfig(path=str(path)))["fingerprint"] for path in (model, other, model)]
    assert prints[0] == prints[2] != prints[1]


def test_the_request_asks_as_an_episode_does(made: Made, tmp_path: Path) -> None:
    body = read(export(Snapshot.of(made.out), tmp_path / "x"), "request.json")
    text = Snapshot.of(made.out).text(made.population["p0001"].principles)
    env = espl_envs.make(made.config.env.id, split="train").unwrapped
    messages, _ = env.reset(options={"task": 3, "system_prompt": text})
    question = env.task.question
    asked = [{**m.to_openai(), "content": m.content.replace(question, QUESTION)} for m in messages]
    assert body["messages"] == asked and asked[0]["role"] == "system"
    assert wire.messages(wire.read(wire.ChatRequest, json.dumps(body).encode())), "our own server takes it"
    root = read(export(Snapshot.of(made.out), tmp_path / "root", "root"), "request.json")
    assert [message["role"] for message in root["messages"]] == ["user"], "no principles, no system message"


def test_a_run_leaves_the_same_behind_by_itself(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breed_simply(monkeypatch)
    deal(monkeypatch)
    out = tmp_path / "run"
    run(config(model, out, steps=1))
    folder = export(Snapshot.of(out), tmp_path / "x")
    for name in (bundle.PROMPT, "request.json"):
        assert (out / "export" / name).read_bytes() == (folder / name).read_bytes()
    assert read(folder)["test"]["openings"] == [{"step": 1, "by": "run"}]
    assert "=../policy" in (out / "export" / bundle.PAGE).read_text()


def test_several_environments_have_a_folder_each(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    breed_simply(monkeypatch)
    deal(monkeypatch, lambda key, _: float(key.sample % 2))
    monkeypatch.setattr(loop_kit, "SMALL", {k: v for k, v in loop_kit.SMALL.items() if k != "env.id"})
    parity = {"id": "espl_parity:espl-test/Parity-v0"}
    run(config(model, tmp_path / "run", steps=1, envs={"a": parity, "b": {**parity, "args": {"max_turns": 2}}}))
    assert cli.main(["export", str(tmp_path / "run")]) == 0
    records = (tmp_path / "run-export").rglob(bundle.PROMPT)
    assert sorted(path.parent.name for path in records) == ["a", "b"]
    assert len(capsys.readouterr().out.splitlines()) == 8, "three files for each, and two of the adapter"
    assert cli.main(["export", str(tmp_path / "run"), "--prompt", "b/root", "--out", str(tmp_path / "x")]) == 0
    assert [path.name for path in (tmp_path / "x" / "envs").iterdir()] == ["b"]


def test_nothing_of_the_run_is_changed(made: Made, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (made.out, *made.out.rglob("*"))}
    export(Snapshot.of(made.out), tmp_path / "x")
    assert {path: path.stat().st_mtime_ns for path in (made.out, *made.out.rglob("*"))} == before


def test_an_earlier_step_is_exported_as_it_was(made: Made, tmp_path: Path) -> None:
    """An unfinished run: its newest checkpoint is of step 1, and nobody was chosen yet."""
    record = read(export(Snapshot.of(made.out, 1), tmp_path / "x"))
    assert record["run"]["step"] == 1 and not record["run"]["finished"] and record["prompt"]["id"] == "p0000"
    assert record["chosen"]["rule"] == "lower_bound" and "not at its end" in record["chosen"]["why"]
    assert {one["step"] for one in [record["prompt"]["validation"]]} == {0}


def test_a_failed_export_leaves_the_older_one(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(Snapshot.of(made.out), tmp_path / "x")
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").rglob("*") if path.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle, "_write_adapter", full)
    with pytest.raises(EsplError, match="x cannot be written: No space left on device"):
        export(Snapshot.of(made.out), tmp_path / "x", "root")
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_only_an_export_is_ever_replaced(made: Made, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(made.out, runs / "one")
    export(Snapshot.of(made.out), runs / "one" / "export")               # as a run leaves its own
    for out in (runs, runs / "one"):
        with pytest.raises(EsplError, match="is no export"):
            export(Snapshot.of(runs / "one"), out)
    export(Snapshot.of(made.out), tmp_path / "x")
    (tmp_path / "x" / "notes.txt").write_text("mine")
    with pytest.raises(EsplError, match=r"holds more than an export \(notes.txt\)"):
        export(Snapshot.of(made.out), tmp_path / "x")
    assert (runs / "one" / "config.toml").is_file() and (tmp_path / "x" / "notes.txt").is_file()


@pytest.mark.parametrize(("changes", "alone", "rule", "why"), [
    ({}, {}, "validation", "among the best rated"),
    ({"mode": "rl"}, {}, "root", "with the root prompt"),
    ({"steps": 9}, {}, "lower_bound", "the run is not at its end"),
    ({"steps": 9, "budget_rollouts": 5}, {}, "validation", "among the best rated"),
    ({"schedule": "sequential"}, {"": "p0001"}, "validation", "when the schedule turned to the weights"),
])  # fmt: skip
def test_the_record_says_how_the_prompt_was_chosen(
    changes: dict[str, Any], alone: dict[str, str], rule: str, why: str, made: Made
) -> None:
    config = made.config.model_copy(update=changes)
    over = config.steps <= 2 or Totals(rollouts=4, trial_rollouts=1).exhausts(config.budget_rollouts)
    run = replace(Snapshot.of(made.out), config=config, alone=alone, finished=over)
    chosen = document(run, made.population["p0001"])["chosen"]
    assert chosen["rule"] == rule and chosen["why"].endswith(why)


def test_a_run_whose_budget_is_used_up_is_finished(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def finished(**changes: Any) -> bool:
        monkeypatch.setattr(snapshot, "read_config", lambda _: made.config.model_copy(update=changes))
        return Snapshot.of(made.out).finished

    assert finished() and not finished(steps=9) and not finished(steps=9, budget_rollouts=5)
    monkeypatch.setattr(snapshot, "Totals", lambda **_: Totals(rollouts=4, trial_rollouts=1))
    assert finished(steps=9, budget_rollouts=5) and not finished(steps=9, budget_rollouts=6)


def test_children_that_wait_or_are_let_in_are_no_refusals(made: Made) -> None:
    run = Snapshot.of(made.out)
    outcomes = ("child", "waiting", "accepted", "edited", "review", "canary", "not_drawn")
    run.__dict__["events"] = [*run.events, *({"kind": "review", "step": 1, "outcome": o} for o in outcomes)]
    assert document(run, made.population["p0001"])["guard"]["refusals"] == {"canary": 1, "not_drawn": 1, "review": 1}


def shown(text: str) -> list[tuple[str, str]]:
    """What a page makes of a text, as GitHub reads it: kind and content of everything that is no plain text."""
    tokens = MarkdownIt("gfm-like").parse(text)
    flat = [t for token in tokens for t in (token, *(token.children or ()))]
    return [(t.type, t.content) for t in flat if t.type.startswith(("html", "link", "image", "code", "fence", "table"))]


def breakouts() -> list[str]:
    """The hostile texts that mean something to a page, alone in a list or a block."""
    found = []
    for text in HOSTILE:
        flat = " ".join(visible(text).split())
        spans = shown(f"1. {markdown.span(text)} (G1)\n")
        blocks = shown(f"{markdown.fence(text, 'text')}\n")
        if spans != [("code_inline", flat)] or blocks != [("fence", f"{visible(text)}\n")]:
            found.append(text)
    return found


def test_what_a_model_wrote_cannot_leave_its_place_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    assert breakouts() == []
    monkeypatch.setattr(markdown, "_longest", lambda _: 0)                 # a fence that is always as long
    assert breakouts(), "the texts would not have noticed"


def test_hostile_principles_make_a_page_with_nothing_but_code(made: Made, tmp_path: Path) -> None:
    run = Snapshot.of(made.out)
    principles = tuple(Principle(f"G{i}", text) for i, text in enumerate(HOSTILE, 1))
    (child,) = run.populations[""].add([Child(principles, "mutation", ("p0001",))], 2)
    folder = export(run, tmp_path / "x", child.id)
    found = shown((folder / bundle.PAGE).read_text("utf-8"))
    assert {kind for kind, _ in found} == {"code_inline", "fence"}
    flat = [" ".join(visible(text).split()) for text in HOSTILE]
    kept = Counter(content for _, content in found if content in flat)
    assert kept == Counter([*flat, *flat]), "each once as a principle, once as what was new"
    assert [p["text"] for p in read(folder)["prompt"]["principles"]][:-1] == list(HOSTILE[:-1])


@pytest.mark.parametrize(("words", "sentence"), [
    (["{run}", "--prompt", "p9"], "no prompt 'p9'; choose best, root, or an id such as p0000, p0001"),
    (["{run}", "--prompt", "x/best"], "no environment 'x'"),
    (["{run}", "--step", "7"], "no checkpoint of step 7 in"),
    (["{run}", "--out", "{model}"], "is not empty and is no export"),
    (["{run}", "--stepp", "7"], "Did you mean --step?"),
    (["{model}"], "is no run directory: it has no config.toml"),
    (["{empty}"], "There is no checkpoint in"),
    ([], "required: RUN. espl-train export --help lists all options."),
])  # fmt: skip
def test_wrong_words_are_one_sentence(
    words: list[str], sentence: str, made: Made, model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.toml").write_text((made.out / "config.toml").read_text())
    places = {"run": made.out, "model": model, "empty": empty}
    assert cli.main(["export", *(word.format(**places) for word in words)]) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and said.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_full_weights_are_exported_as_a_model(model: Path, tmp_path: Path) -> None:
    _, policy, _ = write_run(model, tmp_path / "run", steps=1, **{"learner.mode": "full"})
    folder = export(Snapshot.of(tmp_path / "run"), tmp_path / "x")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder / "model")(ids).logits
        assert torch.equal(theirs, policy.model(ids).logits)
    assert not (folder / "adapter").exists() and "vllm serve ./model" in (folder / bundle.PAGE).read_text()


def test_a_run_that_trains_no_weights_has_none_to_export(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(model, tmp_path / "run", steps=1, mode="evolution")
    monkeypatch.setattr(Policy, "load", lambda *_: pytest.fail("no weights are read"))
    folder = export(Snapshot.of(tmp_path / "run"), tmp_path / "x", merge=True)
    assert sorted(path.name for path in folder.iterdir()) == ["prompt.json", "prompt.md", "request.json"]
