"""What a transplant promises: every pair once, on the same problems with the same draws, and nothing played twice.

Runs are on a small model from a folder (`run_kit.py`). Most tests deal the rewards instead of playing; the first plays.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import espl_parity
import numpy as np
import pytest
from hub_model import hub_model
from loop_kit import dealt
from run_kit import write_run

from espl_train import cli
from espl_train.chat import Chat
from espl_train.engines.base import Request
from espl_train.learner.policy import Policy
from espl_train.records import Rollout
from espl_train.rollout import Collector, Job
from espl_train.runs import seal
from espl_train.serving.exhibit import Exhibit
from espl_train.transplant import choice, matrix, picture, store
from espl_train.transplant.matrix import Contrast

DRAW = picture.draw


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_model(tmp_path_factory.mktemp("hub") / "model", spread=0.5)


@pytest.fixture(scope="module")
def source(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on one model: `one` and `two` with prompts and weights, `rl` with weights alone, `frozen` with a prompt
    alone, `wide` with an adapter of another rank, `other` on another model."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(model, folder / "one")
    write_run(model, folder / "two", ("Be odd.",), seed=8)
    write_run(model, folder / "rl", mode="rl", seed=9)
    write_run(model, folder / "frozen", mode="evolution")
    write_run(model, folder / "wide", ("Be odd.",), seed=8, **{"learner.rank": 8})
    write_run(hub_model(folder / "model", seed=3), folder / "other")
    return folder


@pytest.fixture
def runs(source: Path) -> Path:
    """The runs, with their seals as they were when they ended."""
    for path in source.glob(f"*/{seal.FILE}"):
        path.write_text('{"step": 2, "by": "run"}\n')
    return source


class Stage:
    """What was played: (policy, text of the prompt, jobs) of every cell."""

    def __init__(self) -> None:
        self.cells: list[tuple[int | None, str, list[Job]]] = []
        self.before: Callable[[], None] = lambda: None


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Deals rewards: a problem is right where its number is below what weights and prompt are worth together."""
    made = Stage()

    def collect(
        self: Collector, jobs: Sequence[Job], policy: int | None, *_: Any, **named: Any
    ) -> list[Rollout]:
        del self, named
        made.before()
        made.cells.append((policy, jobs[0].system_prompt, list(jobs)))
        worth = (policy or 0) + 2 * bool(jobs[0].system_prompt)
        order = sorted({job.key.task for job in jobs})
        return [dealt(job, float(order.index(job.key.task) < worth), policy) for job in jobs]

    monkeypatch.setattr(Collector, "collect", collect)
    monkeypatch.setattr(picture, "draw", lambda *_: [])               # a second for each
    return made


def run(out: Path, *words: object) -> int:
    return cli.main(["transplant", *map(str, words), "--out", str(out), "--quiet"])


def result(out: Path) -> Any:
    return json.loads((out / "matrix.json").read_text("utf-8"))


def means(out: Path) -> dict[tuple[str, str], float]:
    return {(cell["weights"], cell["prompt"]): cell["mean"] for cell in result(out)["cells"]}


def says(engine: Any, chat: Chat, policy: int | None, text: str) -> list[float]:
    """The greedy reward of every test problem, asked one by one."""
    env = espl_parity.ParityEnv(split="test")

    async def reply(task: int) -> str:
        tokens = tuple(chat.open(env.opening(env.tasks[task].question, text)))
        return chat.text((await engine.sample(Request(tokens, 6, 0, chat.stop_ids, 0.0, 1.0, policy))).tokens)

    async def replies() -> list[str]:
        return await asyncio.gather(*map(reply, range(len(env.tasks))))

    rewards = []
    for task, said in enumerate(asyncio.run(replies())):
        env.reset(options={"task": task})
        rewards.append(env.step(said)[1])
    return rewards


def test_the_cells_are_played_with_the_weights_and_prompts_that_they_name(runs: Path, tmp_path: Path) -> None:
    """Greedy, for real: what each of the three weights says under each prompt, as `espl-train serve` loads them."""
    texts = {name: Exhibit.of(str(runs / name), "best", {}).offer.system_prompt for name in ("one", "two")}
    said: dict[tuple[str, str], list[float]] = {}
    for name in ("one", "two"):
        engine, chat, offer = Exhibit.of(str(runs / name), "none", {}).load()
        for prompt, text in {"none": "", **texts}.items():
            said[name, prompt] = says(engine, chat, offer.policy, text)
            said["base", prompt] = says(engine, chat, None, text)
        engine.close()
    assert run(tmp_path / "x", runs / "one", runs / "two", "--greedy", "--problems", "20") == 0
    cells = {at: store.read_cell(tmp_path / "x", *at).rewards for at in said}
    assert {at: [cell[i][0] for i in range(20)] for at, cell in cells.items()} == said
    assert len({tuple(rewards) for rewards in said.values()}) > 4, "the model says the same whoever asks"


def test_every_pair_on_the_same_problems_with_the_same_draws(
    runs: Path, tmp_path: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    load = Policy.load
    monkeypatch.setattr(Policy, "load", lambda *a, **k: reads.append("model") or load(*a, **k))
    assert run(tmp_path / "x", runs / "one", runs / "rl", "-k", "3", "--temperature", "1") == 0
    assert [(policy, bool(text)) for policy, text, _ in stage.cells] == [
        (None, False), (None, True), (1, False), (1, True), (2, False), (2, True)
    ]  # fmt: skip
    played = [[job.key for job in jobs] for _, _, jobs in stage.cells]
    assert all(keys == played[0] for keys in played) and len(set(played[0])) == 4 * 3
    assert reads == ["model"], "adapters follow each other on one model"


@pytest.mark.usefixtures("stage")
def test_means_and_paired_differences(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worth: base 0, one 1, rl 2, and 2 more with the prompt, of 4 problems."""
    monkeypatch.setattr(picture, "draw", DRAW)
    run(tmp_path / "x", runs / "one", runs / "rl")
    assert means(tmp_path / "x") == {
        ("base", "none"): 0.0, ("base", "one"): 0.5, ("one", "none"): 0.25, ("one", "one"): 0.75, ("rl", "none"): 0.5,
        ("rl", "one"): 1.0,
    }  # fmt: skip
    found = {one["formula"]: one for one in result(tmp_path / "x")["contrasts"]}
    assert {formula: one["mean"] for formula, one in found.items()} == {
        "one × one − base × none": 0.75, "one × none − one × one": -0.5, "one × none − base × none": 0.25,
        "one × one − one × none − base × one + base × none": 0.0, "rl × none − base × none": 0.5,
        "base × one − base × none": 0.5, "one × one − rl × none": 0.25, "rl × one − rl × none": 0.5,
    }  # fmt: skip
    assert all(one["low"] <= one["mean"] <= one["high"] for one in found.values())
    assert [(tmp_path / "x" / name).stat().st_size > 1000 for name in ("matrix.svg", "matrix.png")] == [True, True]


def test_hard_and_easy_problems_cancel_out_of_differences() -> None:
    """Two cells that agree on every problem differ by nothing for sure; with other problems they would not."""
    hard = np.tile([0.0, 1.0], 50)
    contrast = Contrast("", {("a", "p"): 1, ("b", "p"): -1})
    paired = matrix.difference(contrast, {("a", "p"): hard, ("b", "p"): hard}, (0.0, 1.0))
    crossed = matrix.difference(contrast, {("a", "p"): hard, ("b", "p"): hard[::-1]}, (0.0, 1.0))
    assert paired and crossed and paired.mean == crossed.mean == 0.0
    width, other = (found.high - found.low for found in (paired, crossed))        # type: ignore[operator]
    assert width < 0.05 < 0.3 < other


def test_the_validation_split_is_no_look_at_the_test(runs: Path, tmp_path: Path, stage: Stage) -> None:
    run(tmp_path / "x", runs / "one", "--split", "validation")
    assert stage.cells[0][2][0].key.split == "validation" and len(stage.cells[0][2]) == 3
    assert seal.openings(runs / "one") == (seal.Opening(2),)


def test_what_was_played_is_kept_and_goes_on(
    runs: Path, tmp_path: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        if len(stage.cells) == 3:
            raise KeyboardInterrupt

    stage.before = interrupt
    assert run(tmp_path / "x", runs / "one", runs / "two") == 130
    assert "3 of 9 cells are kept in" in capsys.readouterr().err
    stage.before = lambda: None
    assert run(tmp_path / "x", runs / "one", runs / "two") == 0
    assert len(stage.cells) == 9
    assert run(tmp_path / "y", runs / "one", runs / "two") == 0
    assert (tmp_path / "x" / "matrix.json").read_bytes() == (tmp_path / "y" / "matrix.json").read_bytes()
    assert run(tmp_path / "x", runs / "one", runs / "two") == 0 and len(stage.cells) == 18
    assert run(tmp_path / "x", runs / "one") == 2
    assert "holds another transplant (it differs in: weights, prompts)" in capsys.readouterr().err


DAMAGE: list[tuple[Any, str]] = [
    (b"", "is damaged (no JSON)"), (b"\xff", "is damaged (no JSON)"), (b"[1]", "is damaged (no object)"),
    (b"{}", "is no cell of a transplant"), ({"prompt": "two"}, "is the cell of 'one' and 'two'"),
    ({"rewards": {"0": "x"}}, "is no cell of a transplant"), ({"rewards": {"0": [math.nan]}}, "has a reward that is"),
    ({"rewards": {}}, "has rewards of other problems than the plan"), (None, "cannot be read (Is a directory)"),
]  # fmt: skip


def test_a_damaged_cell_is_named_before_anything_is_played_and_can_be_played_again(
    runs: Path, tmp_path: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "x", runs / "one") == 0
    whole, looks = (tmp_path / "x" / "matrix.json").read_bytes(), seal.openings(runs / "one")
    cell = tmp_path / "x" / "cells" / "one--one.json"
    data = json.loads(cell.read_text())
    stage.cells.clear()
    for damage, said in DAMAGE:
        cell.unlink()
        if damage is None:
            cell.mkdir()
        else:
            cell.write_bytes(json.dumps({**data, **damage}).encode() if isinstance(damage, dict) else damage)
        assert run(tmp_path / "x", runs / "one") == 2
        err = capsys.readouterr().err
        assert f"espl-train: {cell} {said}" in err and "delete it, and that cell is played again" in err
    assert stage.cells == [] and seal.openings(runs / "one") == looks
    cell.rmdir()
    assert run(tmp_path / "x", runs / "one") == 0 and len(stage.cells) == 1
    assert (tmp_path / "x" / "matrix.json").read_bytes() == whole


def test_cells_without_a_readable_plan_are_nobodys(
    runs: Path, tmp_path: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "x", runs / "one")
    (tmp_path / "x" / "plan.json").write_bytes(b"{")
    stage.cells.clear()
    assert run(tmp_path / "x", runs / "one") == 2
    assert f"delete the folder {tmp_path / 'x'}, and all of it is played again" in capsys.readouterr().err
    for name in ("plan.json", "matrix.json"):
        (tmp_path / "x" / name).unlink()
    assert run(tmp_path / "x", runs / "one") == 2, "the cells may be of anything"
    assert "is no transplant (it has no plan.json)" in capsys.readouterr().err and stage.cells == []


@pytest.mark.usefixtures("stage")
def test_a_start_that_was_killed_is_no_obstacle(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "x" / "cells").mkdir(parents=True)
    (tmp_path / "x" / ".writing-0000-plan.json").write_text("{")
    assert run(tmp_path / "x", runs / "one") == 0


def test_every_look_at_a_test_split_is_counted_before_it_is_taken(
    runs: Path, tmp_path: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    counted: list[int] = []
    stage.before = lambda: counted.append(len(seal.openings(runs / "one")))
    run(tmp_path / "x", runs / "one")
    run(tmp_path / "x", runs / "one")
    assert set(counted) == {2} and len(seal.openings(runs / "one")) == 2
    assert f"the test split of {runs / 'one'} was opened before, at step 2: no first look" in " ".join(
        capsys.readouterr().out.split()
    )
    run(tmp_path / "y", runs / "one", "--seed", "5")
    assert len(seal.openings(runs / "one")) == 3, "other draws are another look"
    run(tmp_path / "z", runs / "one", "--env", "espl/Conventions-v0", "--env.args.world", "3", "--problems", "4")
    assert len(seal.openings(runs / "one")) == 3, "another environment is not this run's test"


@pytest.mark.usefixtures("stage")
def test_other_ranks_are_read_as_what_they_are(runs: Path, tmp_path: Path) -> None:
    """A second model is read for them; nothing is refused, nothing is padded."""
    assert run(tmp_path / "x", runs / "one", runs / "wide") == 0
    assert len(means(tmp_path / "x")) == 9 and ("wide", "wide") in means(tmp_path / "x")


@pytest.mark.usefixtures("stage")
def test_rows_and_columns_by_name(runs: Path, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("  Be brief.\n")
    words = ["--weights", f"mine={runs / 'one'}", "--prompts", f"root={runs / 'one'}:root", "--prompts", f"n={note}"]
    assert run(tmp_path / "x", *words, "--prompts", f"best={runs / 'frozen'}") == 0
    assert {weights for weights, _ in means(tmp_path / "x")} == {"base", "mine"}
    texts = {prompt["name"]: prompt["text"] for prompt in result(tmp_path / "x")["prompts"]}
    assert list(texts) == ["none", "root", "n", "best"] and texts["n"] == "Be brief." and "two words" in texts["best"]


def test_ids_of_prompts_may_have_colons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a:run").mkdir()
    asked: list[tuple[Path, str]] = []
    monkeypatch.setattr(choice.Snapshot, "of", lambda folder: folder)
    monkeypatch.setattr(choice, "_of_run", lambda *words: asked.append(words[1:3]))
    for spec in ("a:run", "a:run:best", "a:run:math/math:p0003", "a:run:math:p0003"):
        choice._prompt(f"x={tmp_path}/{spec}", "math")
    wanted = ["best", "best", "math/math:p0003", "math:p0003"]
    assert asked == [(tmp_path / "a:run", which) for which in wanted]


WRONG: list[tuple[list[str], str]] = [
    ([], "name at least one run"),
    (["{runs}"], "is no run directory: it has no config.toml"),
    (["{runs}/nowhere"], "There is no run directory"),
    (["{runs}/empty"], "There is no checkpoint in"),
    (["{runs}/one", "{runs}/one"], "is named twice"),
    (["{runs}/one", "{runs}/other"], "have no base in common"),
    (["{runs}/one", "--prompts", "x={runs}/one:p9"], "has no prompt 'p9'; choose best, root, or an id such as p0000"),
    (["{runs}/one", "--prompts", "x={runs}/nothing.txt"], "there is no run and no file"),
    (["{runs}/one", "--prompts", "joint"], "is not of the form --prompts NAME=RUN"),
    (["{runs}/one", "--weights", "base={runs}/one"], "'base' are the weights that the runs began with"),
    (["{runs}/one", "--weights", "x={runs}/frozen"], "trained no weights (mode evolution)"),
    (["{runs}/one", "--greedy", "-k", "3"], "greedy samples are all the same"),
    (["{runs}/one", "--env", "espl/Conventoins-v0"], "espl/Conventions-v0"),
    (["{runs}/one", "--learner.rank", "3"], "--learner.rank changes nothing when weights and prompts are transplanted"),
    (["{runs}/one", "--problems", "0"], "'0' is no whole number above 0"),
    (["{runs}/one", "--prompts", "long={runs}/long.txt"], "tokens, and the model reads 2048 in all"),
    (["{runs}/one", "--prompts", "x={runs}/deep.json"], "deep.json is no prompt.json of espl-train export"),
    (["{runs}/one", "--prompts", "x={runs}/five.json"], "five.json is no prompt.json of espl-train export"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "sentence"), WRONG)
def test_wrong_words_are_a_sentence(
    words: list[str], sentence: str, runs: Path, tmp_path: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "empty").mkdir(exist_ok=True)
    (runs / "empty" / "config.toml").write_text((runs / "one" / "config.toml").read_text())
    (runs / "long.txt").write_text("Be brief. " * 3000)
    (runs / "deep.json").write_text("[" * 100_000)
    (runs / "five.json").write_text('{"prompt": {"text": 5}}')
    assert run(tmp_path / "x", *(word.format(runs=runs) for word in words)) == 2
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said and stage.cells == []


@pytest.mark.usefixtures("stage")
def test_a_run_without_weights_of_its_own_gives_a_prompt_only(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["transplant", str(runs / "frozen"), str(runs / "rl"), "--out", str(tmp_path / "x")]
    assert cli.main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "frozen trained no weights (mode evolution): its row would be that of the base" in said
    assert set(means(tmp_path / "x")) == {(w, p) for w in ("base", "rl") for p in ("none", "frozen")}


def test_a_formula_reads_as_it_is_computed() -> None:
    terms = {("a", "p"): 1, ("a", "none"): -1, ("base", "p"): -1, ("base", "none"): 1}
    assert str(Contrast("", terms)) == "a × p − a × none − base × p + base × none"


@pytest.mark.usefixtures("stage")
def test_a_picture_is_a_courtesy(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr(picture, "draw", missing)
    assert run(tmp_path / "x", runs / "one") == 0 and (tmp_path / "x" / "matrix.json").is_file()
