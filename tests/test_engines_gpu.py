"""What the engines do on a GPU only, as far as it can be told without one: the order in which memory is handed over."""

from __future__ import annotations

import weakref
from dataclasses import fields
from typing import Any

import pytest
import torch

from espl_train.config import Config, EngineConfig
from espl_train.engines import choice, vllm_core
from espl_train.engines.vllm_core import Core
from espl_train.engines.vllm_server import let_go


class Recorder:
    """Stands where vLLM's engine does, and notes what is asked of it."""

    def __init__(self, said: list[Any], ahead: int = 0) -> None:
        self.said = said
        self.engine_core = self.core = type("Client", (), {})()
        self.core.engine_core = type("EngineCore", (), {"batch_queue": [None] * ahead})()
        self.core.shutdown = lambda: said.append("shutdown")
        self.asleep = False

    def step(self) -> None:
        self.core.engine_core.batch_queue.pop()
        self.said.append("step")

    def sleep(self, level: int) -> None:
        self.said.append(f"sleep {level}")
        self.asleep = True

    def release_kv_cache_memory(self) -> None:
        assert self.asleep and not self.core.engine_core.batch_queue, "vLLM refuses"
        self.said.append("release")

    def is_sleeping(self) -> bool:
        return self.asleep

    def wake_up(self) -> None:
        self.said.append("wake")
        self.asleep = False


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append("empty"))
    return found


def core(said: list[Any], device: str = "cuda", ahead: int = 1) -> Core:
    made = object.__new__(Core)
    made.device, made._adapter, made._engine = torch.device(device), None, Recorder(said, ahead)
    return made


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("sleep", ["step", "sleep 1", "empty", "wake"]),
        ("kv", ["step", "sleep 0", "release", "empty", "wake"]),
        ("keep", []),
    ],
)
def test_the_gpu_is_handed_over_when_nothing_is_under_way_and_taken_back_when_what_was_freed_is_free(
    how: Any, expected: list[str], said: list[Any]
) -> None:
    one = core(said)
    one.sleep(how)
    one.wake()
    assert said == expected


def test_the_memory_of_a_closed_engine_is_given_back_before_another_is_built(said: list[Any]) -> None:
    one = core(said)
    engine = weakref.ref(one._engine)
    one.close()
    one.close()
    assert said == ["shutdown", "empty"]
    assert engine() is None


def test_on_a_cpu_nothing_is_handed_over(said: list[Any]) -> None:
    one = core(said, "cpu")
    one.sleep("sleep")
    one.wake()
    assert said == []


def test_an_error_does_not_keep_what_its_frames_held() -> None:
    class Weights:
        pass

    def step() -> None:
        weights = Weights()
        known.append(weakref.ref(weights))
        raise ValueError("inside")

    def outer() -> None:
        try:
            step()
        except ValueError as error:
            raise RuntimeError("outside") from error

    known: list[Any] = []
    with pytest.raises(RuntimeError) as caught:
        outer()
    assert known[0]() is not None              # the error is kept by whoever waited, and the weights with it
    let_go(caught.value)
    assert known[0]() is None


def test_who_gets_what_of_a_gpu_stands_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "pick_device", lambda _: torch.device("cuda", 0))
    card = type("Card", (), {"total_memory": 80 * 2**30})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    for pause, words in (("sleep", "all of it"), ("kv", "all but its weights"), ("keep", "none of it")):
        config = Config(engine=EngineConfig(kind="vllm", pause=pause, gpu_memory=0.25))
        said = f"; 20.0 GiB of the GPU's 80.0, {words} given back while the learner works"
        assert choice._share(config) == said
    assert choice._share(Config()) == ""


@pytest.mark.vllm
@pytest.mark.usefixtures("shared_vllm")
def test_vllm_has_what_only_a_gpu_asks_it_for() -> None:
    from vllm import EngineArgs, LLMEngine

    assert vllm_core._on_gpu(EngineConfig()).keys() <= {field.name for field in fields(EngineArgs)}
    for name in ("sleep", "wake_up", "is_sleeping", "release_kv_cache_memory"):
        assert callable(getattr(LLMEngine, name))
