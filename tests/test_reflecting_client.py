"""A reflection call passes budget, deadline, cache and books; what fails has a reason, what must end a run ends it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Message
from espl_train import disk
from espl_train.evolution.reflection import Declined, purpose
from espl_train.evolution.rejections import Reason
from espl_train.reflecting import cache as recorded
from espl_train.reflecting.cache import Cache, NotRecorded
from espl_train.reflecting.client import Client
from espl_train.reflecting.ledger import SPENDING, Ledger, Spent
from espl_train.reflecting.source import Said
from espl_train.runs.metrics import read_lines
from espl_train.settings import load

ASK = (Message("user", "What separates them?"),)


class Answers:
    """A source whose answers are a function of the seed. `most`: calls that were under way at once."""

    name, patience_s = "somebody", None

    def __init__(self, answer: Callable[[int], Any] = lambda seed: f"reply {seed}", paid: bool = False) -> None:
        self.answer_with, self.paid = answer, paid
        self.weights = "w0"
        self.asked: list[int] = []
        self.now = self.most = 0

    def identity(self) -> Mapping[str, Any]:
        return {"model": self.weights, "temperature": 0.7}

    def begin(self) -> None: ...

    async def open(self) -> None: ...

    async def answer(self, messages: Sequence[Message], seed: int) -> Said:
        assert messages
        self.asked.append(seed)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(0)
            said = self.answer_with(seed)
            text = await said if isinstance(said, Awaitable) else said
        finally:
            self.now -= 1
        return Said(text, 100, 10, 0.5)

    async def close(self) -> None: ...


def client(
    source: Answers | None = None, run: Path | None = None, folder: Path | None = None, **settings: Any
) -> Client:
    """A client in its first step; `settings` are of the section reflection."""
    if folder is not None:
        settings = {"cache": "record", "cache_dir": str(folder), **settings}
    config = load(overrides={f"reflection.{name}": value for name, value in settings.items()})
    only = config.reflection.cache == "replay_only"
    made = Client(
        source or Answers(), config, Ledger(config.reflection, run), Cache(folder, only) if folder else None
    )  # fmt: skip
    made.begin(1)
    return made


def asked(by: Client, *seeds: int, stage: str = "critique", prompt: str = "p0001") -> list[str | Reason]:
    """What each of these calls came to, all at once: a text, the reason why there is none, or an exception's name."""

    async def one(seed: int) -> str | Reason:
        with purpose(stage=stage, prompt=prompt):
            try:
                return await by.complete(ASK, seed)
            except Declined as declined:
                return declined.reason
            except NotRecorded as missing:
                return type(missing).__name__

    async def every() -> list[str | Reason]:
        return await asyncio.gather(*map(one, seeds))

    return asyncio.run(every())


def fails(_: int) -> str:
    raise ConnectionError("nobody is there")


# Budgets and books


@pytest.mark.parametrize(
    ("budget", "made"),
    [({"max_calls": 3}, 3), ({"max_tokens": 330}, 3), ({"max_seconds": 1.5}, 3), ({"max_calls": 99}, 5),
     ({"max_cost": 0.0006, "prices": (1.0, 10.0)}, 3)],
)  # fmt: skip
def test_no_call_begins_once_a_budget_is_used_up(budget: dict[str, Any], made: int) -> None:
    source = Answers()
    asking = client(source, concurrency=1, **budget)
    found = asked(asking, *range(5))
    assert len(source.asked) == made and found.count(Reason.BUDGET) == 5 - made
    assert (asking.closed() is None) == (made == 5)


def test_calls_under_way_count_as_calls() -> None:
    source = Answers()
    assert asked(client(source, max_calls=3), *range(9)).count(Reason.BUDGET) == 6
    assert source.most == 3


def test_a_ledger_that_forgets_what_is_under_way_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant of the test above: without counting what is under way, all nine go out at once."""
    source = Answers()
    asking = client(source, max_calls=3)
    monkeypatch.setattr(type(asking.ledger), "call", lambda _: purpose())
    asked(asking, *range(9))
    assert source.most == 9


def test_an_exhausted_budget_is_said_once_and_again_where_it_was_raised() -> None:
    asking = client(max_calls=1)
    assert asking.notes() == []
    asked(asking, 1)
    (note,) = asking.notes()
    assert "reflection.max_calls of 1 is used up" in note and asking.notes() == []
    again = client(max_calls=1)
    again.restore(asking.state())
    assert again.notes() == [] and again.closed()
    richer = client(max_calls=2)
    richer.restore(asking.state())
    assert asked(richer, 2, 3) == ["reply 2", Reason.BUDGET] and len(richer.notes()) == 1


def test_no_more_calls_at_once_than_allowed() -> None:
    source = Answers()
    asked(client(source, concurrency=2), *range(7))
    assert source.most == 2 and len(source.asked) == 7


def test_the_books_equal_an_independent_count() -> None:
    source = Answers(lambda seed: "" if seed == 7 else fails(seed) if seed == 8 else "yes")
    asking = client(source, prices=(2.0, 10.0))
    asked(asking, 1, 2, 3)
    asked(asking, 7, stage="revision")
    asked(asking, 8, stage="critique", prompt="p0002")
    total = asking.ledger.total
    assert (total.calls, total.failed, total.replayed) == (5, 2, 0) and len(source.asked) == 5
    assert (total.prompt_tokens, total.completion_tokens) == (400, 40)
    assert total.cost == pytest.approx((400 * 2 + 40 * 10) / 1e6)
    record = asking.ledger.metrics()
    assert record["reflection/calls"] == 5 and record["reflection/critique/calls"] == 4
    assert record["reflection/for/p0001/prompt_tokens"] == 400 and record["reflection/for/p0002/calls"] == 1
    assert sum(row["calls"] for row in asking.ledger.events()) == 5
    table = "\n".join(asking.ledger.table())
    assert "for p0001" in table and "USD" in table
    asking.begin(2)
    assert asking.ledger.metrics() == {} and asking.ledger.total == total


def test_books_go_on_after_a_resume_and_what_was_paid_in_between_counts(tmp_path: Path) -> None:
    first = client(Answers(paid=True), tmp_path, max_calls=4)
    asked(first, 1, 2)
    saved = json.loads(json.dumps(first.state()))
    asked(first, 3)                                     # paid for, and lost with the step
    first.ledger.close()
    second = client(Answers(paid=True), tmp_path, max_calls=4)
    second.restore(saved)
    assert second.ledger.total.calls == 2
    assert asked(second, 3, 4) == ["reply 3", Reason.BUDGET]
    assert [row["step"] for row in read_lines(tmp_path / SPENDING)] == [1, 1, 1, 1]
    assert any("1 calls in steps that were interrupted" in line for line in second.ledger.table())


# Deadlines


def test_what_is_late_is_given_up_and_counted() -> None:
    async def for_ever() -> str:
        await asyncio.Event().wait()
        return ""

    source = Answers(lambda seed: for_ever() if seed == 1 else "yes")
    asking = client(source, deadline_s=0.02)
    assert asked(asking, 1, 2) == [Reason.DEADLINE, "yes"]
    assert asking.ledger.total.failed == 1 and source.now == 0


def test_when_the_step_is_over_nothing_is_asked_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Answers()
    asking = client(source, step_deadline_s=30.0)
    assert asked(asking, 1) == ["reply 1"]
    monkeypatch.setattr("espl_train.reflecting.client.time.monotonic", lambda now=asking._until: now + 1)
    assert asked(asking, 2) == [Reason.DEADLINE] and source.asked == [1]


def test_a_source_that_raises_a_timeout_of_its_own_is_no_deadline() -> None:
    def late(_: int) -> str:
        raise TimeoutError("the engine")

    assert asked(client(Answers(late), deadline_s=9.0), 1) == [Reason.COMPLETION_FAILED]


def test_a_cancelled_call_leaves_its_place_and_is_in_no_book() -> None:
    async def main() -> None:
        begun = asyncio.Event()

        async def wait() -> str:
            begun.set()
            await asyncio.Event().wait()
            return ""

        source = Answers(lambda seed: wait() if seed == 1 else "yes")
        asking = client(source, concurrency=1, max_calls=1)
        task = asyncio.create_task(asking.complete(ASK, 1))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asking.complete(ASK, 2) == "yes" and asking.ledger.total.calls == 1

    asyncio.run(main())


# Recording and replaying


def test_a_replay_asks_nobody_and_says_the_same(tmp_path: Path) -> None:
    said = asked(client(folder=tmp_path), 1, 2, 3)
    nobody = Answers(fails)
    replay = client(nobody, folder=tmp_path, cache="replay_only")
    assert asked(replay, 1, 2, 3) == said and nobody.asked == []
    total = replay.ledger.total
    assert (total.calls, total.replayed, total.prompt_tokens, total.seconds) == (3, 3, 300, 1.5)


def test_a_replay_calls_for_the_rest_and_keeps_it(tmp_path: Path) -> None:
    asked(client(folder=tmp_path), 1)
    source = Answers()
    assert len(asked(client(source, folder=tmp_path, cache="replay"), 1, 2)) == 2 and source.asked == [2]
    assert asked(client(Answers(fails), folder=tmp_path, cache="replay_only"), 2) == ["reply 2"]


@pytest.mark.parametrize("other", ["seed", "text", "weights", "temperature"])
def test_another_question_is_another_key(other: str, tmp_path: Path) -> None:
    asked(client(folder=tmp_path), 1)
    source = Answers()
    source.weights = "w1" if other == "weights" else "w0"
    if other == "temperature":
        source.identity = lambda: {"model": "w0", "temperature": 0.8}  # type: ignore[method-assign]
    replay = client(source, folder=tmp_path, cache="replay_only")
    if other == "text":
        with pytest.raises(NotRecorded):
            asyncio.run(replay.complete((Message("user", "Other."),), 1))
    else:
        assert asked(replay, 2 if other == "seed" else 1) == ["NotRecorded"]
    with pytest.raises(NotRecorded, match="has no reply to a call"):
        replay.end()


def test_a_key_without_the_seed_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = recorded.question
    monkeypatch.setattr("espl_train.reflecting.client.question", lambda *asked: original(*asked[:2], 0))
    asked(client(folder=tmp_path), 1)
    assert asked(client(Answers(fails), folder=tmp_path, cache="replay_only"), 2) == ["reply 1"]


def test_a_replay_fails_where_the_recorded_run_failed(tmp_path: Path) -> None:
    recording = client(Answers(fails), folder=tmp_path)
    assert asked(recording, 1) == [Reason.COMPLETION_FAILED]
    replay = client(folder=tmp_path, cache="replay_only")
    assert asked(replay, 1) == [Reason.COMPLETION_FAILED] and replay.ledger.total.failed == 1
    assert asked(client(folder=tmp_path, cache="replay"), 1) == ["reply 1"]      # it asks again


def test_a_replay_spends_the_budget_of_the_recorded_run(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"folder": tmp_path, "max_tokens": 220, "concurrency": 1}
    said = asked(client(**settings), 1, 2, 3)
    assert said[2] is Reason.BUDGET
    assert asked(client(Answers(fails), **{**settings, "cache": "replay_only"}), 1, 2, 3) == said


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"format": 1, "key": "other", "reply": {}}', b"\xff\xfe"])
def test_a_damaged_reply_is_asked_for_again_and_never_played(damage: bytes, tmp_path: Path) -> None:
    asked(client(folder=tmp_path), 1)
    (path,) = tmp_path.rglob("*.json")
    path.write_bytes(damage)
    assert asked(client(Answers(fails), folder=tmp_path, cache="replay_only"), 1) == ["NotRecorded"]
    source = Answers()
    assert asked(client(source, folder=tmp_path, cache="replay"), 1) == ["reply 1"]
    assert source.asked == [1]
    assert asked(client(Answers(fails), folder=tmp_path, cache="replay_only"), 1) == ["reply 1"]


def test_a_reply_that_cannot_be_recorded_is_booked_and_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "put", full)
    asking = client(Answers(paid=True), run=tmp_path, folder=tmp_path / "replies")
    assert asked(asking, 1) == ["reply 1"]
    assert [row["calls"] for row in read_lines(tmp_path / SPENDING)] == [1]
    with pytest.raises(EsplError, match=r"recorded \(reflection.cache\): .*replies.* cannot be written: No space left"):
        asking.end()


def test_two_runs_may_write_the_same_folder_at_once(tmp_path: Path) -> None:
    async def both() -> None:
        one, two = client(folder=tmp_path), client(folder=tmp_path)
        await asyncio.gather(*(by.complete(ASK, seed) for seed in range(20) for by in (one, two)))

    asyncio.run(both())
    assert len(list(tmp_path.rglob("*.json"))) == 20 and not list(tmp_path.rglob(".writing-*"))
    assert len(asked(client(Answers(fails), folder=tmp_path, cache="replay_only"), *range(20))) == 20


# Nobody answers


def steps(asking: Client, *answers: Callable[[int], Any] | None) -> str:
    """Steps with one call each (None: without any); whether the run should stop after them."""
    for number, answer in enumerate(answers, 2):
        asking.begin(number)
        if answer is not None:
            asking.source.answer_with = answer  # type: ignore[attr-defined]
            asked(asking, number)
        asking.end()
    return asking.failing()


def test_a_run_stops_after_so_many_steps_without_any_reply_and_says_why() -> None:
    def empty(_: int) -> str:
        return " \n"

    asking = client(max_failures=3)
    assert steps(asking, fails, None, empty) == ""
    said = steps(asking, fails)
    assert "somebody has brought no reply for 3 iterations" in said
    assert "2 × ConnectionError: nobody is there" in said and "1 × the reply is empty" in said


def test_a_reply_and_a_resume_begin_the_count_anew_and_a_step_without_calls_does_not() -> None:
    def good(_: int) -> str:
        return "nonsense, but a reply"

    asking = client(max_failures=2)
    assert steps(asking, fails, good, fails, None) == ""
    resumed = client(max_failures=2)
    resumed.restore(asking.state())
    assert steps(resumed, fails) != ""
    stopped = client(max_failures=2)
    stopped.restore(resumed.state())
    assert stopped.failing() == "" and steps(stopped, fails) == ""
    assert steps(client(max_failures=0), *[fails] * 30) == ""


def test_spent_is_a_sum() -> None:
    assert Spent(1, 0, 0, 10, 2, 0.5, 1.0) + Spent(2, 1) - Spent(1, 1) == Spent(2, 0, 0, 10, 2, 0.5, 1.0)
