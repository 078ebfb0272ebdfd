"""docs/python.md does what it says: its blocks are run one after the other, its parts of one's own are at work."""

from __future__ import annotations

import asyncio
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from espl_envs.core.errors import EsplError
from espl_train import loop
from espl_train.config import EvolutionConfig, RatingConfig
from espl_train.evolution import operators
from espl_train.evolution.edits import Limits
from espl_train.evolution.migration import Harbour
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Principle
from espl_train.evolution.rejections import Reason, Rejection
from espl_train.learner import losses
from espl_train.runs.metrics import read_lines
from espl_train.settings import ConfigError, load
from espl_train.training import train

DOCS = Path(__file__).resolve().parents[1] / "docs"
EXAMPLE = DOCS / "examples" / "own_parts.py"
BLOCKS = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text("utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def parts() -> Iterator[dict[str, Any]]:
    """The example, with what it adds to the tables; both are as before afterwards."""
    before = dict(losses.LOSSES), dict(operators.OPERATORS)
    yield runpy.run_path(str(EXAMPLE))
    for table, kept in zip((losses.LOSSES, operators.OPERATORS), before, strict=True):
        table.clear()
        table.update(kept)      # type: ignore[arg-type]


def test_a_run_is_trained_continued_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    *blocks, example = BLOCKS
    assert example == EXAMPLE.read_text("utf-8") and len(blocks) == 4
    world: dict[str, Any] = {}
    exec(blocks[0], world)
    assert world["summary"].steps == 2 and world["summary"].plot.is_file()
    said = capsys.readouterr()
    assert said.out.count("\n") == 1 and said.out.endswith("runs/mine\n") and said.err == "", "what the page prints"
    exec(blocks[1], world)
    assert "step 3/3" in capsys.readouterr().out
    exec(blocks[2], world)
    assert "p0000" in capsys.readouterr().out
    exec(blocks[3], world)
    assert any("lora" in name for name, _ in world["model"].named_parameters())
    run = tmp_path / "runs" / "mine"
    assert [record["step"] for record in read_lines(run / "metrics.jsonl")] == [0, 1, 2, 3]
    assert (run / "best_prompt.txt").is_file()
    assert 'dtype = "float32"' in (run / "config.toml").read_text("utf-8"), "what this machine chose is written down"


def test_a_run_that_cannot_begin_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise EsplError("no such luck")

    monkeypatch.setattr(loop, "Trainer", refuse)
    config = load(overrides={"out": str(tmp_path / "run")})
    for _ in range(2):
        with pytest.raises(EsplError, match="no such luck"):
            train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("wrong", "meant"), [("learner.lr", "learner.learning_rate"), ("stpes", "steps")])
def test_an_option_that_there_is_not_is_named_with_the_nearest(wrong: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"There is no option {wrong}. Did you mean {meant}?"):
        load(overrides={wrong: 1})


def test_the_loss_is_known_by_its_name_where_the_example_runs_and_nowhere_else(
    parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--learner.loss", "reinforce", "--dry-run"]
    assert parts["main"](words) == 0
    monkeypatch.delitem(losses.LOSSES, "reinforce")
    assert parts["main"](words) == 2
    assert "learner.loss is 'reinforce'" in capsys.readouterr().err


def test_the_loss_has_the_gradient_of_importance_sampling_on_policy(parts: dict[str, Any]) -> None:
    draw = torch.Generator().manual_seed(0)
    behaviour, advantages = torch.randn(9, generator=draw) - 3, torch.randn(9, generator=draw)
    weights, rows = torch.full((9,), 1 / 9), torch.arange(9) // 3
    found = []
    for loss in (parts["reinforce"], losses.importance_sampling):
        logp = behaviour.clone().requires_grad_()
        loss(losses.LossInputs(logp, behaviour, advantages, weights, rows)).loss.backward()
        found.append(logp.grad)
    assert torch.allclose(*found) and found[0].abs().sum() > 0


def scene(population: Population, best: str, **changes: Any) -> operators.Scene:
    config = EvolutionConfig(**changes)
    limits = Limits(config.max_words, config.max_principles)
    others = tuple(m.prompt for m in population.members if m.prompt.id != best)
    nobody: Any = None
    return operators.Scene(
        3, 7, population[best], population.root, others, (), (), {}, 0, {}, config, limits, nobody, None, Harbour(), [],
    )  # fmt: skip


def test_the_operator_brings_one_principle_of_another_prompt_and_says_whose_it_was(parts: dict[str, Any]) -> None:
    population = Population(EvolutionConfig(), RatingConfig(), 0)
    texts = {"p0001": ("Add first.", "Check twice."), "p0002": ("Add first.",)}
    for several in texts.values():
        principles = tuple(Principle(f"G{n}", text) for n, text in enumerate(several, 1))
        population.add([Child(principles, "mutation", ("p0000",), len(several))], 1)
    splice = parts["OPERATORS"]["splice"].breed
    assert operators.OPERATORS is parts["OPERATORS"]
    child = asyncio.run(splice(scene(population, "p0002")))
    assert isinstance(child, Child) and child == asyncio.run(splice(scene(population, "p0002")))
    assert [p.text for p in child.principles] == ["Add first.", "Check twice."]
    (born,) = population.add([child], 3)
    assert born.parents == ("p0002", "p0001") and population.lineage.principles(born.id).keys() == {"G1", "G2"}
    nothing = asyncio.run(splice(scene(population, "p0001")))
    full = asyncio.run(splice(scene(population, "p0002", max_principles=1)))
    assert isinstance(nothing, Rejection) and nothing.reason is Reason.NO_OTHER_WINNER
    assert isinstance(full, Rejection) and full.reason is Reason.TOO_MANY_PRINCIPLES
