"""inspect_ai, the real package: the same replies get the same score under `inspect eval` as in the environment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import toy

from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Message, ToolCall

inspect_ai = pytest.importorskip("inspect_ai", reason="the extra 'inspect' is not installed")

from inspect_ai.model import ModelOutput, ModelUsage, get_model  # noqa: E402
from inspect_ai.solver import generate  # noqa: E402

from espl_envs.interop import inspect_tasks  # noqa: E402

SCRIPTS: dict[str, list[str | Message]] = {
    "right": [r"\boxed{56}"],
    "wrong": [r"\boxed{57}"],
    "no answer": ["I do not know."],
    "native tools": [Message("assistant", "", (ToolCall("c1", "add", '{"a": 28, "b": 28}'),)), r"\boxed{56}"],
    "a tool's error": [Message("assistant", "", (ToolCall("c1", "add", '{"a": "x"}'),)), r"\boxed{56}"],
    "tools in the text": [toy.call("add", a=28, b=28), r"\boxed{56}"],
    "submitted": [Message("assistant", "", (ToolCall("c1", "submit", '{"answer": "56"}'),))],
    "too long": [toy.call("add", a=1, b=1)] * 3,
}


def said(reply: str | Message) -> ModelOutput:
    message = Message("assistant", reply) if isinstance(reply, str) else reply
    output = ModelOutput.from_content("mockllm/model", message.content)
    if message.tool_calls:
        one = message.tool_calls[0]
        output = ModelOutput.for_tool_call("mockllm/model", one.name, one.parsed(), tool_call_id=one.id, content="")
    output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    return output


def evaluated(task: Any, replies: Sequence[str | Message], folder: Path, **settings: Any) -> Any:
    model = get_model("mockllm/model", custom_outputs=[said(reply) for reply in replies], memoize=False)
    settings = {"max_samples": 1, "display": "none", "log_dir": str(folder), **settings}
    return inspect_ai.eval(task, model=model, **settings)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inspect")


def test_an_episode_under_inspect_is_the_episode(folder: Path) -> None:
    replies = [reply for script in SCRIPTS.values() for reply in script]
    task = inspect_tasks.environment("toy:toy/AddTools-v0", split="test", system_prompt="Be brief.", max_turns=3)
    one = [sample for sample in task.dataset if sample.id == "add-28"]
    task.dataset = type(task.dataset)([one[0].model_copy(update={"id": name}) for name in SCRIPTS])
    log = evaluated(task, replies, folder)
    assert log.status == "success", log.error
    env = gymnasium.make("toy/AddTools-v0", split="test", max_turns=3, tool_syntax="native").unwrapped
    for sample in log.samples:
        env.reset(options={"task": 3, "system_prompt": "Be brief."})
        for reply in SCRIPTS[sample.id]:
            messages, reward, *_, info = env.step(reply)
        score = sample.scores["episode_score"]
        assert (score.value, score.metadata) == (reward, info), sample.id
        assert sample.messages[0].text == messages[0].content
        assert [m.role for m in sample.messages if m.role == "assistant"] == ["assistant"] * len(SCRIPTS[sample.id])
    wanted = {"right", "native tools", "a tool's error", "tools in the text", "submitted"}
    assert {s.id for s in log.samples if s.scores["episode_score"].value == 1.0} == wanted


def test_a_conversation_survives_both_ways() -> None:
    conversation = (
        Message("system", "Be brief."), Message("user", "?"),
        Message("assistant", "Hm.", (ToolCall("c1", "add", '{"a": 1}'), ToolCall("c2", "add", "no json"))),
        Message("tool", "Error", tool_call_id="c1", name="add"), Message("tool", "2", tool_call_id="c2", name="add"),
    )  # fmt: skip
    chat = inspect_tasks.to_chat(conversation)
    assert [message.role for message in chat] == ["system", "user", "assistant", "tool", "tool"]
    assert [call.arguments for call in chat[2].tool_calls] == [{"a": 1}, {"malformed": "no json"}]
    back = inspect_tasks.from_chat(chat[2])
    assert back.content == "Hm." and [call.name for call in back.tool_calls] == ["add", "add"]


def test_arguments_that_inspect_could_not_read_stay_wrong() -> None:
    from inspect_ai.model import ChatMessageAssistant
    from inspect_ai.tool import ToolCall as Theirs

    broken = Theirs(id="c1", function="add", arguments={}, parse_error="not JSON: {")
    (call,) = inspect_tasks.from_chat(ChatMessageAssistant(content="", tool_calls=[broken])).tool_calls
    with pytest.raises(ValueError):
        call.parsed()


def test_another_solver_is_scored_by_its_last_completion(folder: Path) -> None:
    task = inspect_tasks.environment("toy:toy/Add-v0", split="test", limit=2)
    task.solver = generate()
    log = evaluated(task, [r"\boxed{50}", r"\boxed{50}"], folder)
    assert [sample.scores["episode_score"].value for sample in log.samples] == [1.0, 0.0]


def test_a_fault_has_no_score(folder: Path) -> None:
    task = inspect_tasks.environment("toy:toy/Add-v0", split="test", limit=2)
    log = evaluated(task, [r"\boxed{broken}", r"\boxed{52}"], folder, fail_on_error=False)
    assert [sample.error is not None for sample in log.samples] == [True, False]
    assert not log.samples[0].scores and log.samples[1].scores["episode_score"].value == 1.0


def test_inspect_finds_the_task_by_its_entry_point_and_by_its_file(folder: Path) -> None:
    from importlib.metadata import entry_points

    (ours,) = (point for point in entry_points(group="inspect_ai") if point.name == "espl_envs")
    assert ours.load() is inspect_tasks
    log = evaluated("espl_envs/environment", [r"\boxed{50}"], folder, task_args={"env": "toy:toy/Add-v0", "limit": 1})
    assert (log.status, log.eval.task, log.results.scores[0].metrics["mean"].value) == ("success", "toy/Add-v0", 1.0)


def test_an_unknown_environment_is_a_sentence() -> None:
    with pytest.raises(EsplError, match="did you mean espl/GSM8K-v0"):
        inspect_tasks.environment("espl/GSM8-v0")


def test_a_score_that_changes_on_the_way_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = inspect_tasks.Score
    monkeypatch.setattr(inspect_tasks, "Score", lambda **given: original(**{**given, "value": 0.5}))
    with pytest.raises(AssertionError):
        test_an_episode_under_inspect_is_the_episode(folder)
