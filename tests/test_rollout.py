"""The rollout collector: exact sequences, limits, retries in fresh environments, and the same bits in every run."""

from __future__ import annotations

import _thread
import asyncio
import math
import random
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import gymnasium
import pytest
import torch
from chat_kit import SYSTEM_LAST, byte_tokenizer, tokenizer_for
from learner_kit import tiny_model
from toy import PatientEnv, ToyEnv, call

from espl_envs.core.errors import EnvironmentFault, EsplError, UnknownTask
from espl_envs.core.messages import Message
from espl_train.chat import Chat
from espl_train.config import EngineConfig, LearnerConfig, RolloutConfig
from espl_train.engines.base import EngineError, Request, Sample
from espl_train.engines.local import LocalEngine
from espl_train.learner.policy import Policy
from espl_train.learner.sequences import training_sequences
from espl_train.learner.update import Learner
from espl_train.records import Group, Rollout, RolloutKey, StopReason
from espl_train.rollout import Collector, Job

CHAT = Chat(tokenizer_for("qwen2"))
STOP = CHAT.stop_ids[0]
Reply = str | Exception
Script = Callable[[Request], Reply]


class ScriptedEngine:
    """Answers with what `script` says, cut to the request's length; remembers everything."""

    context_length = 4000

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.callers = 0
        self.sessions: set[str] = set()

    def join(self, count: int) -> None:
        self.callers += count

    def leave(self) -> None:
        self.callers -= 1

    async def sample(self, request: Request) -> Sample:
        self.requests.append(request)
        self.sessions.add(str(request.session))
        await asyncio.sleep(0)
        reply = self.script(request)
        if isinstance(reply, Exception):
            raise reply
        ids = [*reply.encode(), STOP][: request.max_new]
        return Sample(tuple(ids), (-1.0,) * len(ids), "stop" if ids[-1] == STOP else "length", request.policy)

    def release(self, session: str) -> None:
        self.sessions.discard(session)


class Logged(PatientEnv):
    """Remembers who was made and who is open."""

    made: list[Logged]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"max_turns": 8, **settings})
        self.made.append(self)
        self.open = True

    async def aclose(self) -> None:
        self.open = False
        await super().aclose()

    async def areset(self, **arguments: Any) -> Any:
        observed = await super().areset(**arguments)
        self.open = True
        return observed


@pytest.fixture(autouse=True)
def nobody_made() -> None:
    Logged.made = []


def jobs(count: int, prompt: str = "") -> list[Job]:
    return [Job(RolloutKey(1, "p0", i % 20, i // 20), prompt) for i in range(count)]


def collector(
    script: Script | Reply, make: Callable[[], Any] = Logged, chat: Chat = CHAT, **settings: Any
) -> tuple[Collector, ScriptedEngine]:
    engine = ScriptedEngine(script if callable(script) else lambda _: script)
    return Collector(make, chat, engine, RolloutConfig(**{"max_new_tokens": 200, **settings}), 0), engine


def asked(request: Request) -> str:
    return str(CHAT.tokenizer.decode(list(request.tokens)))


def task_of(request: Request) -> int:
    return int(asked(request).split("What is ")[1].split(" ")[0])


def test_an_answer_ends_the_episode_with_its_reward() -> None:
    played, engine = collector(lambda request: f"\\boxed{{{2 * task_of(request) + task_of(request) % 2}}}")
    rollouts = played.collect(jobs(20), policy=3)
    assert [rollout.key for rollout in rollouts] == [job.key for job in jobs(20)]
    assert [rollout.reward for rollout in rollouts] == [1.0, 0.0] * 10
    assert {rollout.stop for rollout in rollouts} == {StopReason.ANSWER}
    assert {rollout.policy for rollout in rollouts} == {3}
    assert [rollout.task_id for rollout in rollouts] == [f"add-{i}" for i in range(20)]
    assert rollouts[1].info["score"] == 0.0
    assert engine.callers == 0 and not engine.sessions


def test_the_turns_are_the_sequence_that_the_engine_saw() -> None:
    played, engine = collector("I do not know")
    (rollout,) = played.collect(jobs(1, "Be brief."), policy=0)
    assert [message.role for message in rollout.messages] == ["system", "user", *["assistant", "user"] * 2, "assistant"]
    sequence: tuple[int, ...] = ()
    for turn, request in zip(rollout.turns, engine.requests, strict=True):
        sequence += turn.context
        assert request.tokens == sequence
        sequence += turn.tokens
        assert len(turn.logprobs) == len(turn.tokens)
    text = CHAT.tokenizer.decode(list(sequence))
    assert text == CHAT.tokenizer.apply_chat_template(
        [message.to_openai() for message in rollout.messages], tokenize=False
    ).removesuffix("\n")


def test_a_reply_cut_off_by_the_length_limit_is_ended_by_glue() -> None:
    played, _ = collector("I do not know", max_new_tokens=4)
    (rollout,) = played.collect(jobs(1), policy=0)
    assert rollout.messages[-1] == Message("assistant", "I do")
    assert [turn.context[0] == STOP for turn in rollout.turns] == [False, True, True]


@pytest.mark.parametrize(
    ("settings", "stop", "turns"),
    [
        ({"max_turns": 2}, StopReason.MAX_TURNS, 2),
        ({"max_total_tokens": 20}, StopReason.MAX_TOKENS, 2),
        ({}, StopReason.ANSWER, 3),
    ],
)
def test_limits_end_episodes(settings: dict[str, Any], stop: StopReason, turns: int) -> None:
    played, _ = collector("I do not know", **settings)
    (rollout,) = played.collect(jobs(1), policy=0)
    assert (rollout.stop, len(rollout.turns), rollout.reward) == (stop, turns, 0.0)
    assert rollout.sampled_tokens <= settings.get("max_total_tokens", 99)


def test_the_environment_s_own_limit_is_told_apart() -> None:
    played, _ = collector("I do not know", make=lambda: Logged(max_turns=2))
    assert played.collect(jobs(1), policy=0)[0].stop is StopReason.TRUNCATED


def test_the_context_is_never_outgrown(monkeypatch: pytest.MonkeyPatch) -> None:
    for length in range(1, 420, 7):
        monkeypatch.setattr(ScriptedEngine, "context_length", length)
        played, engine = collector("I do not know")
        (rollout,) = played.collect(jobs(1), policy=0)
        assert rollout.stop is (StopReason.CONTEXT if len(rollout.turns) < 3 else StopReason.ANSWER)
        for request in engine.requests:
            assert len(request.tokens) + request.max_new <= length and request.max_new > 0


def test_a_deadline_ends_an_episode_with_what_it_has_and_masks_it() -> None:
    played, engine = collector(
        call("add", a=77, b=0), make=lambda: ToyEnv(tools=True), deadline_s=0.05, max_fault_fraction=1.0
    )
    (rollout,) = played.collect(jobs(1), policy=0)
    assert rollout.stop is StopReason.DEADLINE and len(rollout.turns) == 1 and rollout.faulted
    assert not engine.sessions and engine.callers == 0


def test_a_fault_is_played_again_in_a_fresh_environment_under_the_next_attempt_s_key() -> None:
    class Flaky(Logged):
        async def areset(self, **arguments: Any) -> Any:
            if len(self.made) <= 2:
                raise EnvironmentFault("sandbox lost")
            return await super().areset(**arguments)

    played, engine = collector("\\boxed{0}", make=Flaky)
    (rollout,) = played.collect(jobs(1), policy=0)
    assert rollout.key.attempt == 2 and rollout.reward == 1.0
    assert len(Flaky.made) == 3 and not any(env.open for env in Flaky.made[:2])
    assert "1/p0/0/0/2" in str(engine.requests[0].session)


def test_an_engine_error_is_a_fault_too() -> None:
    failed: list[Request] = []

    def script(request: Request) -> Reply:
        if request.seed not in (r.seed for r in failed) and len(failed) < 2:
            failed.append(request)
            return EngineError("lost")
        return "\\boxed{0}"

    played, _ = collector(script)
    (rollout,) = played.collect(jobs(1), policy=0)
    assert rollout.key.attempt == 2 and rollout.stop is StopReason.ANSWER
    assert len({request.seed for request in failed}) == 2


def test_what_keeps_failing_is_masked_and_never_scored() -> None:
    def script(request: Request) -> Reply:
        return EngineError("GPU fell off") if task_of(request) == 7 else "\\boxed{0}"

    played, engine = collector(script, retries=1)
    rollouts = played.collect(jobs(20), policy=0)
    lost = rollouts[7]
    assert lost.faulted and math.isnan(lost.reward) and lost.turns == () and lost.key.attempt == 1
    assert lost.task_id == "add-7" and lost.info["error"] == "EngineError: GPU fell off"
    assert sum(rollout.faulted for rollout in rollouts) == 1 and rollouts[0].reward == 1.0
    assert sum(task_of(request) == 7 for request in engine.requests) == 2


def test_a_fault_that_the_environment_only_notes_counts_as_one() -> None:
    played, _ = collector("\\boxed{broken}", make=lambda: ToyEnv(on_fault="mask"), retries=0, max_fault_fraction=1.0)
    assert played.collect(jobs(2), policy=0)[0].faulted


def test_faults_are_counted_over_all_rounds_of_a_step() -> None:
    """A late round may be small: one fault in eight episodes says nothing, three in twenty-eight do."""
    played, _ = collector(lambda r: EngineError("lost") if task_of(r) == 7 else "\\boxed{0}", retries=0)
    with pytest.raises(EsplError, match="1 of 8 episodes"):
        played.collect(jobs(8), policy=0)
    earlier = played.collect(jobs(20), policy=0)
    assert sum(r.faulted for r in [*earlier, *played.collect(jobs(8), policy=0, earlier=earlier)]) == 2
    with pytest.raises(EsplError, match="3 of 28 episodes"):
        played.collect(jobs(8), policy=0, earlier=[*earlier[:6], *earlier[7:8] * 2, *earlier[8:20]])


def test_too_many_faults_stop_the_step_with_a_summary() -> None:
    played, engine = collector(EngineError("GPU fell off"), retries=1)
    with pytest.raises(EsplError, match=r"3 of 20 episodes have no reward.*GPU fell off"):
        played.collect(jobs(20), policy=0)
    assert engine.callers == 0 and not engine.sessions


def test_a_bug_is_raised_as_it_is_and_leaves_nothing_open() -> None:
    def script(request: Request) -> Reply:
        return KeyError("bug") if task_of(request) == 3 else "I do not know"

    played, engine = collector(script)
    with pytest.raises(KeyError, match="bug"):
        played.collect(jobs(20), policy=0)
    played.close()
    assert engine.callers == 0 and not engine.sessions and not any(env.open for env in Logged.made)
    with pytest.raises(UnknownTask):
        played.collect([Job(RolloutKey(1, "p0", 999, 0), "")], policy=0)


def test_an_environment_may_only_append() -> None:
    class Rewriting(Logged):
        async def astep(self, action: Any) -> Any:
            messages, *rest = await super().astep(action)
            return (Message("user", "other"), *messages[1:]), *rest

    played, _ = collector("I do not know", make=Rewriting)
    with pytest.raises(EsplError, match="may only append"):
        played.collect(jobs(1), policy=0)


def test_environments_are_used_again_and_closed_at_the_end() -> None:
    played, _ = collector("\\boxed{0}", concurrency=3)
    played.collect(jobs(15), policy=0)
    played.collect(jobs(15), policy=0)
    assert len(Logged.made) == 3
    played.close()
    played.close()
    assert not any(env.open for env in Logged.made)


def test_progress_counts_episodes_and_tokens() -> None:
    seen: list[tuple[int, int]] = []
    played, _ = collector("\\boxed{0}")
    rollouts = played.collect(jobs(9), policy=0, progress=lambda done, tokens: seen.append((done, tokens)))
    assert [done for done, _ in seen] == list(range(1, 10))
    assert seen[-1][1] == sum(rollout.sampled_tokens for rollout in rollouts) == 9 * 10


def test_settings_reach_the_engine_and_every_turn_has_a_seed_of_its_own() -> None:
    played, engine = collector("I do not know", temperature=0.7)
    played.collect(jobs(20), policy=0)
    assert {(r.temperature, r.top_p, r.policy) for r in engine.requests} == {(0.7, 1.0, 0)}
    assert len({request.seed for request in engine.requests}) == 60
    before = {request.seed for request in engine.requests}
    engine.requests.clear()
    played.collect(jobs(20), policy=None, temperature=0.0, top_p=0.9)
    assert {(r.temperature, r.top_p, r.policy) for r in engine.requests} == {(0.0, 0.9, None)}
    assert {request.seed for request in engine.requests} == before


def test_an_empty_prompt_is_rendered_identically_in_training_and_evaluation() -> None:
    """And there is no system message, but for the protocol's, whose place is the same."""
    for placement in ("none", "user", "system"):
        played, engine = collector("\\boxed{0}", make=lambda where=placement: Logged(protocol=where))
        (trained,) = played.collect(jobs(1), policy=4, temperature=1.0)
        (evaluated,) = played.collect(jobs(1), policy=None, temperature=0.0)
        assert trained.turns[0].context == evaluated.turns[0].context
        assert [m.role for m in trained.messages] == [*["system"] * (placement == "system"), "user", "assistant"]
        assert engine.requests[0].tokens == engine.requests[1].tokens


def test_a_synchronous_environment_is_stepped_in_a_thread() -> None:
    class Guess(gymnasium.Env[Any, Any]):
        """No areset, no astep; wrapped by Gymnasium's own wrapper, which must not be stepped over."""

        threads: set[int] = set()  # noqa: RUF012

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.said = (Message("user", f"Guess {options['task']}."),)
            return self.said, {"task_id": f"guess-{options['task']}"}

        def step(self, action: Any) -> Any:
            self.threads.add(threading.get_ident())
            self.said = (*self.said, Message("assistant", action))
            return self.said, float(action == "7"), True, False, {"task_id": "guess"}

    class Doubled(gymnasium.RewardWrapper[Any, Any]):
        def reward(self, reward: Any) -> float:
            return 2 * float(reward)

    for wrap, expected in ((lambda env: env, 1.0), (Doubled, 2.0)):
        played, _ = collector("7", make=lambda wrap=wrap: wrap(Guess()))
        assert [rollout.reward for rollout in played.collect(jobs(3), policy=0)] == [expected] * 3
        played.close()
    assert threading.get_ident() not in Guess.threads


def test_observations_must_be_messages() -> None:
    played, _ = collector("x", make=lambda: gymnasium.make("CartPole-v1"))
    with pytest.raises(EsplError, match="ndarray; training needs a tuple of messages"):
        played.collect(jobs(1), policy=0)


def test_cancellation_closes_everything() -> None:
    played, engine = collector(call("add", a=77, b=0), make=lambda: Logged(tools=True))

    async def cancelled() -> None:
        task = asyncio.create_task(played.acollect(jobs(10), policy=0))
        while len(engine.requests) < 10:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert engine.callers == 0 and not engine.sessions
    assert len(Logged.made) == 10 and not any(env.open for env in Logged.made)


class Endless(ScriptedEngine):
    """Interrupts the main thread at its tenth request, and answers nobody: however late the interrupt is noticed, all
    ten episodes are still in flight."""

    def __init__(self, interrupt: Callable[[], None]) -> None:
        super().__init__(lambda _: "")
        self.interrupt = interrupt

    async def sample(self, request: Request) -> Sample:
        self.requests.append(request)
        self.sessions.add(str(request.session))
        if len(self.requests) == 10:
            self.interrupt()
        return await asyncio.get_running_loop().create_future()


INTERRUPTS = {
    "in the wait": lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT),
    "just before it": _thread.interrupt_main,      # noted, but wakes nobody: as if it had come a moment earlier
}


@pytest.mark.parametrize("when", INTERRUPTS)
def test_ctrl_c_ends_every_episode_before_it_is_raised(when: str) -> None:
    engine = Endless(INTERRUPTS[when])
    played = Collector(lambda: Logged(tools=True), CHAT, engine, RolloutConfig(deadline_s=60), 0)
    with pytest.raises(KeyboardInterrupt):
        played.collect(jobs(10), policy=0)
    assert engine.callers == 0 and not engine.sessions
    assert len(Logged.made) == 10 and not any(env.open for env in Logged.made)


class Dawdling(Logged):
    """Takes an unpredictable number of rounds of the event loop for everything."""

    delays = random.Random(0)

    async def areset(self, **arguments: Any) -> Any:
        await self.dawdle()
        return await super().areset(**arguments)

    async def astep(self, action: Any) -> Any:
        await self.dawdle()
        return await super().astep(action)

    async def dawdle(self) -> None:
        for _ in range(self.delays.randrange(120)):
            await asyncio.sleep(0)


def really_play(seed: int, concurrency: int = 1024) -> list[Rollout]:
    Dawdling.delays = random.Random(seed)
    tokenizer = tokenizer_for("qwen2")
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512)
    policy = Policy(model, tokenizer, LearnerConfig(rank=4))
    engine = LocalEngine(policy, EngineConfig())
    engine.load_policy(0)
    played = Collector(
        Dawdling, Chat(tokenizer), engine, RolloutConfig(max_new_tokens=12, concurrency=concurrency), 0
    )
    try:
        return played.collect(jobs(30, "Be brief."), policy=0)
    finally:
        played.close()
        engine.close()


def bits(rollouts: Sequence[Rollout]) -> list[Any]:
    return [(rollout.key, rollout.turns, rollout.messages, rollout.reward) for rollout in rollouts]


def test_the_same_seed_gives_the_same_bits_however_slow_environments_are() -> None:
    torch.manual_seed(random.randrange(1000))
    expected = bits(really_play(0))
    assert len({turns for _, turns, _, _ in expected}) == 30
    for trial in (1, 2, 3):
        assert bits(really_play(trial)) == expected


def test_the_same_seed_gives_the_same_bits_with_fewer_places_than_episodes() -> None:
    assert bits(really_play(0, concurrency=7)) == bits(really_play(1, concurrency=7))


def test_a_template_that_drops_thinking_makes_the_conversation_fork() -> None:
    chat = Chat(tokenizer_for("qwen3"))
    replies = iter(["<think>\nhm\n</think>\n\nno", "still no", "\\boxed{0}"])
    played, engine = collector(lambda _: next(replies), chat=chat)
    (rollout,) = played.collect(jobs(1, "Be brief."), policy=0)
    assert [turn.fork for turn in rollout.turns] == [False, True, False]
    assert rollout.forks == 1
    forked = engine.requests[1].tokens
    assert forked == rollout.turns[1].context == tuple(chat.open(rollout.messages[:-3]))
    assert "hm" not in chat.tokenizer.decode(list(forked))
    assert engine.requests[2].tokens == (*forked, *rollout.turns[1].tokens, *rollout.turns[2].context)
    first, second = training_sequences([Group("p0", 0, "t", (rollout,), (1.0,))])
    assert (*first.ids.tolist(), STOP) == (*rollout.turns[0].context, *rollout.turns[0].tokens)
    assert len(second.targets) == len(rollout.turns[1].tokens + rollout.turns[2].tokens)


@pytest.mark.parametrize("forgotten", [False, True])
def test_what_was_sampled_after_a_fork_is_learnt_as_it_was_sampled(forgotten: bool) -> None:
    tokenizer = byte_tokenizer(SYSTEM_LAST, "inst")
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512)
    policy = Policy(model, tokenizer, LearnerConfig(rank=4))
    engine = LocalEngine(policy, EngineConfig())
    engine.load_policy(0)
    played = Collector(Logged, Chat(tokenizer), engine, RolloutConfig(max_new_tokens=6, max_turns=3), 0)
    try:
        rollouts = tuple(played.collect(jobs(6, "Be brief."), policy=0))
    finally:
        played.close()
        engine.close()
    assert {rollout.forks for rollout in rollouts} == {2}
    if forgotten:                      # mutant: the fork is not marked, so its context is taken for an appended one
        rollouts = tuple(replace(r, turns=tuple(replace(t, fork=False) for t in r.turns)) for r in rollouts)
    group = Group("p0", 0, "t", rollouts, (1.0, -1.0, 1.0, -1.0, 1.0, -1.0))
    report = Learner(policy, policy.config).update([group])
    assert report.sequences == (6 if forgotten else 18)
    assert (abs(report.ratio_mean - 1) < 1e-5 and report.behaviour_kl < 1e-8) is not forgotten


def test_the_collector_starts_long_episodes_first_and_keeps_the_order_of_results() -> None:
    todo = [replace(job, expected=10 * (i % 3)) for i, job in enumerate(jobs(6))]
    played, engine = collector("\\boxed{0}", concurrency=1)
    rollouts = played.collect(todo, policy=0)
    assert [r.key for r in rollouts] == [job.key for job in todo]
    started = [str(request.session).split("/")[3] for request in engine.requests if len(request.tokens) < 4000]
    assert list(dict.fromkeys(started)) == ["2", "5", "1", "4", "0", "3"]


def test_what_is_left_of_an_episode_shrinks_with_every_turn() -> None:
    played, engine = collector("I do not know", max_turns=3, concurrency=1)
    played.collect([replace(jobs(1)[0], expected=20)], policy=0)
    said = len("I do not know") + 1
    assert [request.expected for request in engine.requests] == [20, 20 - said, 0]


@pytest.mark.parametrize("named", [True, False])
def test_a_turn_finds_the_keys_and_values_of_the_turns_before(named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the last sampled token, exactly. The mutant asks without naming its session, and nothing is kept."""
    tokenizer = tokenizer_for("qwen2")
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512)
    engine = LocalEngine(Policy(model, tokenizer, LearnerConfig(rank=4)), EngineConfig())
    engine.load_policy(0)
    if not named:
        original = engine.sample
        monkeypatch.setattr(engine, "sample", lambda request: original(replace(request, session=None)))
    played = Collector(PatientEnv, Chat(tokenizer), engine, RolloutConfig(max_new_tokens=6, max_turns=3), 0)
    try:
        rollouts = played.collect(jobs(8, "Be brief."), policy=0)
    finally:
        played.close()
        engine.close()
    needed = kept = 0
    for rollout in rollouts:
        known = 0
        for turn in rollout.turns:
            needed, kept = needed + known + len(turn.context) - 1, kept + max(known - 1, 0)
            known += len(turn.context) + len(turn.tokens)
    counted = engine.counts()
    assert counted["kv/kept"] == (kept / needed if named else 0.0) and counted["kv/copied"] > 0.1
    assert engine.counts() == {}
