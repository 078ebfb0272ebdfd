"""Decoding is compiled where that is asked for and can be: same tokens, and one sentence where it cannot be.

The backend is dynamo's `eager`: all of the capture, with its guards and dynamic shapes, and no minutes of C++.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from engine_kit import ragged
from learner_kit import related_groups, tiny_model, tiny_policy, tiny_tokenizer
from test_engines_local import MODELS
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from espl_train import compiling
from espl_train.config import EngineConfig, LearnerConfig
from espl_train.engines.kv import KVSlab, slab_for
from espl_train.engines.local import LocalEngine
from espl_train.engines.written import Step
from espl_train.learner.attention import Packed
from espl_train.learner.policy import Policy
from espl_train.learner.update import Learner

CAPTURE = torch.compile


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    compiling._missing.cache_clear()
    yield
    compiling._missing.cache_clear()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("espl")]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was compiled so far."""
    made: list[Any] = []

    def capture(function: Callable[..., Any], **settings: Any) -> Any:
        made.append(function)
        return CAPTURE(function, **settings, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", capture)
    return made


def play(compile: bool) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    from engine_kit import World

    policy = tiny_policy(adapter=0.1)
    engine = LocalEngine(policy, EngineConfig(compile=compile))
    engine.load_policy(0)
    try:
        requests = ragged(9)
        return [(sample.tokens, sample.logprobs) for sample in World(engine, policy).ask(*requests)]
    finally:
        engine.close()


def test_a_compiled_step_computes_the_same(captured: list[Any]) -> None:
    """In one graph: a construct that dynamo cannot capture would fail here; so would other numbers, by the slab's own
    comparison with the plain forward pass."""
    slab = slab_for(tiny_model(num_hidden_layers=1).eval(), compile=True)
    assert isinstance(slab, KVSlab) and slab.compiles and [type(step) for step in captured] == [Step]


@pytest.mark.skipif(not os.environ.get("ESPL_FULL"), reason="capturing it for many shapes is slow: ESPL_FULL=1")
def test_a_compiled_step_samples_the_same(captured: list[Any]) -> None:
    """Rows and widths change on the way."""
    compiled = play(compile=True)
    assert captured and all(isinstance(step, Step) for step in captured)
    made = len(captured)
    assert [tokens for tokens, _ in compiled] == [tokens for tokens, _ in play(compile=False)] and len(captured) == made


def test_without_a_compiler_it_runs_as_it_is_and_says_so_once(
    captured: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nowhere() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", nowhere)
    assert play(compile=True) == play(compile=False) and not captured
    (sentence,) = said(caplog)
    assert sentence.startswith("nothing is compiled, because no C++ compiler was found (")
    assert sentence.endswith("it runs as it is, only slower")


@pytest.mark.parametrize("why", ["breaks", "is wrong"])
def test_a_compiled_step_that_is_no_good_is_not_used(
    why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(step: Any, *arguments: Any) -> torch.Tensor:
        if why == "breaks":
            raise RuntimeError("the compiler broke\nand said much")
        return step(*arguments).flip(-1)

    monkeypatch.setattr(torch, "compile", lambda step, **_: partial(broken, step))
    slab = slab_for(MODELS["llama"](), compile=True)
    assert isinstance(slab, KVSlab) and slab.written and not slab.compiles
    (sentence,) = said(caplog)
    assert sentence.startswith("decoding is not compiled: ") and "\n" not in sentence


def test_a_model_without_a_written_step_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    slab = slab_for(MODELS["gpt2"]().eval(), compile=True)
    assert isinstance(slab, KVSlab)
    assert said(caplog) == ["decoding is not compiled: GPT2LMHeadModel has no written step"]


@pytest.mark.parametrize("asked", [True, False])
def test_the_layers_that_learn_are_compiled_where_that_is_asked_for(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(compiling, "_missing", lambda _: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(type(module).__name__))
    policy = tiny_policy()
    Learner(policy, policy.config.model_copy(update={"compile": asked}))
    assert compiled == ["Qwen2DecoderLayer"] * 2 * asked
    assert Packed.attend._torchdynamo_disable        # its tables are others in every micro-batch


@pytest.mark.skipif(not os.environ.get("ESPL_FULL"), reason="capturing a backward pass is slow: ESPL_FULL=1")
def test_compiled_layers_learn_the_same_and_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other micro-batches, packed in other ways, need no other code."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: original(module, **how, backend="eager"))
    monkeypatch.setattr(compiling, "_missing", lambda _: None)
    config = LearnerConfig(rank=4, alpha=8)
    plain, layered = (Policy(tiny_model(num_hidden_layers=1), tiny_tokenizer(), config) for _ in range(2))
    learners = Learner(plain, config), Learner(layered, config.model_copy(update={"compile": True}))
    graphs: list[int] = []
    for step in range(3):
        for learner in learners:
            learner.limits = replace(learner.limits, tokens=60)
        one, other = (learner.update(related_groups(step)) for learner in learners)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5) and one.tokens == other.tokens
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2] > 0
    for name, value in plain.state().items():
        torch.testing.assert_close(value, layered.state()[name], atol=1e-5, rtol=1e-4)
