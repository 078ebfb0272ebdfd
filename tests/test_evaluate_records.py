"""An episode survives its line, whatever a model wrote; what is no episode is refused in one sentence."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from evaluation_kit import episode
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_envs.core.messages import Message, ToolCall
from espl_envs.evaluate.records import BadRecord, Episode, EpisodeKey, Outcome, TurnUsage

KEY = EpisodeKey("espl/GSM8K-v0", "test", 3, 1)
# Surrogates included, but no two that would make one character: those are the same text in other code units.
texts = st.text(st.characters(exclude_categories=[]), max_size=40).filter(
    lambda text: text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass") == text
)
numbers = st.floats(allow_nan=False, allow_infinity=False)
calls = st.builds(ToolCall, texts, texts, texts)
messages = st.one_of(
    st.builds(Message, st.sampled_from(["system", "user"]), texts),
    st.builds(Message, st.just("assistant"), texts, st.lists(calls, max_size=2).map(tuple)),
    st.builds(Message, st.just("tool"), texts, st.just(()), st.none() | texts, st.none() | texts),
)
counts = st.none() | st.integers(0, 10**9)
turns = st.builds(TurnUsage, counts, counts, st.integers(0, 99), numbers, st.none() | numbers, texts, texts)


@st.composite
def episodes(draw: st.DrawFn) -> Episode:
    outcome = draw(st.sampled_from(Outcome))
    return Episode(
        key=EpisodeKey(draw(texts), draw(texts), draw(counts) or 0, draw(st.integers(0, 99)), draw(st.integers(0, 9))),
        task_id=draw(texts), task_hash=draw(texts), outcome=outcome,
        score=None if outcome is Outcome.FAULT else draw(numbers), reward=draw(st.none() | numbers),
        stop_reason=draw(texts), answer=draw(st.none() | texts), reference=draw(st.none() | texts),
        info=draw(st.dictionaries(texts, st.none() | texts | numbers | st.booleans(), max_size=3)),
        messages=tuple(draw(st.lists(messages, max_size=3))), turns=tuple(draw(st.lists(turns, max_size=2))),
        error=draw(texts.filter(bool)), attempts=draw(st.integers(1, 9)), seconds=draw(numbers), started=draw(texts),
    )  # fmt: skip


@given(episodes())
@settings(max_examples=80, deadline=None)
def test_an_episode_survives_its_line(one: Episode) -> None:
    line = one.to_json()
    assert "\n" not in line and "\r" not in line
    assert Episode.from_json(line.encode("utf-8")) == one


def test_a_line_is_strict_json_in_openai_s_shape() -> None:
    one = episode(KEY, info={"score": np.float64(0.5), "turn": np.int64(2), "bad": math.nan, "huge": math.inf})
    raw = json.loads(one.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert raw["info"] == {"score": 0.5, "turn": 2, "bad": None, "huge": None}
    assert raw["messages"][1] == {"role": "assistant", "content": r"\boxed{42}"}
    key = [raw[name] for name in ("env", "split", "task", "sample", "system_prompt")]
    assert key == ["espl/GSM8K-v0", "test", 3, 1, 0]


@pytest.mark.parametrize("fields", [
    {"outcome": Outcome.FAULT, "score": 0.0, "error": "down"},
    {"outcome": Outcome.ANSWERED, "score": None},
    {"outcome": Outcome.ANSWERED, "score": math.nan},
    {"outcome": Outcome.FAULT, "score": None, "error": None},
    {"outcome": Outcome.AGENT_ERROR, "score": 0.0, "error": ""},
])
def test_a_record_that_contradicts_itself_cannot_be_made(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"outcome|score"):
        Episode(KEY, "id", "hash", **fields)


good = json.loads(episode(KEY).to_json())


@pytest.mark.parametrize("line", [
    "", "{", "null", "[]", "{}", '"text"', b"\xff\xfe", episode(KEY).to_json()[:-1],
    json.dumps({**good, "outcome": "solved"}), json.dumps({**good, "score": None}), json.dumps({**good, "turns": [{}]}),
    json.dumps({**good, "messages": [{"role": "robot", "content": ""}]}), json.dumps({**good, "messages": None}),
])
def test_what_is_no_record_is_refused(line: str | bytes) -> None:
    with pytest.raises(BadRecord, match="no record of an episode"):
        Episode.from_json(line)


def test_no_proper_prefix_of_a_line_is_a_record() -> None:
    line = episode(KEY).to_json()
    for end in range(len(line)):
        with pytest.raises(BadRecord):
            Episode.from_json(line[:end])


def test_a_total_is_unknown_where_one_call_is() -> None:
    known, unknown = TurnUsage(5, 7, 2, 0.1, 0.5), TurnUsage(5, None, 1, 0.1, None)
    both = episode(KEY, turns=(known, known))
    assert (both.prompt_tokens, both.completion_tokens, both.tool_calls, both.cost) == (10, 14, 4, 1.0)
    mixed = episode(KEY, turns=(known, unknown))
    assert (mixed.prompt_tokens, mixed.completion_tokens, mixed.tool_calls, mixed.cost) == (10, None, 3, None)
    assert episode(KEY, turns=()).completion_tokens == 0
