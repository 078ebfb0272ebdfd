"""What every engine must keep, named by the promise. To test another engine, add its world to the fixture `world`."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from engine_kit import STOP, World, local_world, ragged, request
from learner_kit import shake

from espl_train.engines.base import EngineError, Request, Sample

WORLDS: dict[str, Callable[[], World]] = {
    "local": local_world,
    "local-eager": partial(local_world, deterministic=False),
}
TOLERANCE = 1e-5


SHARED = {"vllm": "shared_vllm", "vllm-replicas": "shared_replicas"}


@pytest.fixture(params=[*WORLDS, *(pytest.param(name, marks=pytest.mark.vllm) for name in SHARED)])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    if request.param in SHARED:
        yield request.getfixturevalue(SHARED[request.param]).world()
        return
    made = WORLDS[request.param]()
    yield made
    made.engine.close()


def agree(world: World, asked: Request, sample: Sample) -> None:
    assert sample.logprobs == pytest.approx(world.expected(asked, sample), abs=TOLERANCE)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_log_probabilities_are_those_of_the_distribution_sampled_from(world: World, temperature: float) -> None:
    asked = ragged(30, temperature=temperature)
    for one, sample in zip(asked, world.ask(*asked), strict=True):
        agree(world, one, sample)
        assert sample.policy == 0


def test_settings_may_differ_from_row_to_row(world: World) -> None:
    asked = [
        replace(one, temperature=(0.0, 0.5, 1.0, 2.0)[i % 4], max_new=1 + i, stop_ids=((1,), (2, 3), ())[i % 3])
        for i, one in enumerate(ragged(24))
    ]
    for one, sample in zip(asked, world.ask(*asked), strict=True):
        agree(world, one, sample)
        assert not set(sample.tokens[:-1]) & set(one.stop_ids)
        assert len(sample.tokens) <= one.max_new


def test_a_sample_does_not_depend_on_its_batch(world: World) -> None:
    asked = ragged(20)
    together = world.ask(*asked)
    for one, sample in list(zip(asked, together, strict=True))[::5]:
        (alone,) = world.ask(one)
        assert alone.tokens == sample.tokens
        assert alone.logprobs == pytest.approx(sample.logprobs, abs=TOLERANCE)


def test_the_seed_alone_decides(world: World) -> None:
    one, again, other = world.ask(request(seed=5), request(seed=5), request(seed=6))
    assert one.tokens == again.tokens != other.tokens


def test_tokens_come_as_often_as_their_probability_says(world: World) -> None:
    samples = world.ask(*(request(seed=i, max_new=1, temperature=1.3) for i in range(2000)))
    counts = Counter(sample.tokens[0] for sample in samples)
    expected = 2000 * world.oracle(request(temperature=1.3), samples[0])[0].exp()
    common = [token for token in range(len(expected)) if expected[token] >= 5]
    chi = sum(float((counts[token] - expected[token]) ** 2 / expected[token]) for token in common)
    assert len(common) > 5 and chi < len(common) + 4 * (2 * len(common)) ** 0.5


def test_greedy_takes_the_most_likely_token_whatever_the_seed(world: World) -> None:
    one, other = world.ask(request(seed=1, temperature=0.0), request(seed=2, temperature=0.0))
    whole = world.oracle(request(), one)
    assert one.tokens == other.tokens == tuple(whole.argmax(-1).tolist())
    assert one.logprobs == pytest.approx(whole.max(-1).values.tolist(), abs=TOLERANCE)


def test_nucleus_sampling_never_leaves_the_nucleus_and_renormalises(world: World) -> None:
    asked = [request(seed=i, top_p=0.6, temperature=1.3) for i in range(20)]
    for one, sample in zip(asked, world.ask(*asked), strict=True):
        chances = world.oracle(one, sample).exp()
        for row, token, logprob in zip(chances, sample.tokens, sample.logprobs, strict=True):
            ordered = row.sort(descending=True).values
            kept = ordered[: int((ordered.cumsum(0) < 0.6).sum()) + 1]
            assert row[token] >= kept[-1] - 1e-7
            assert logprob == pytest.approx(float((row[token] / kept.sum()).log()), abs=1e-4)


def test_a_stop_token_ends_the_sample_and_is_part_of_it(world: World) -> None:
    samples = world.ask(*(request(seed=i, max_new=30, stop_ids=(STOP, 7, 9, 11, 20)) for i in range(20)))
    stopped = [sample for sample in samples if sample.stop == "stop"]
    assert stopped
    for sample in stopped:
        assert sample.tokens[-1] in (STOP, 7, 9, 11, 20)


def test_a_stop_token_in_the_last_place_that_is_left_is_a_stop(world: World) -> None:
    (free,) = world.ask(request(max_new=12, stop_ids=()))
    last = next(i for i in range(3, 12) if free.tokens[i] not in free.tokens[:i])
    (stopped,) = world.ask(request(max_new=last + 1, stop_ids=(free.tokens[last],)))
    assert (stopped.tokens, stopped.stop) == (free.tokens[: last + 1], "stop")


def test_without_a_stop_token_the_sample_has_full_length(world: World) -> None:
    (sample,) = world.ask(request(max_new=9, stop_ids=()))
    assert len(sample.tokens) == len(sample.logprobs) == 9
    assert sample.stop == "length"


def test_a_sample_never_outgrows_the_context(world: World) -> None:
    room = world.engine.context_length
    (sample,) = world.ask(request([3] * (room - 4), max_new=50, stop_ids=()))
    assert len(sample.tokens) == 4 and sample.stop == "length"
    for tokens in ([], [3] * room):
        with pytest.raises(EngineError, match=f"prompt of {len(tokens)} tokens does not fit"):
            world.ask(request(tokens))


def test_a_prompt_of_one_token_is_enough(world: World) -> None:
    asked = request([5])
    agree(world, asked, world.ask(asked)[0])


def test_scores_agree_with_samples(world: World) -> None:
    asked = request(max_new=20, stop_ids=())
    (sample,) = world.ask(asked)
    tokens = asked.tokens + sample.tokens
    assert world.score(tokens, len(asked.tokens)) == pytest.approx(sample.logprobs, abs=TOLERANCE)
    assert world.score(tokens, len(tokens)) == []
    with pytest.raises(EngineError):
        world.score(tokens, 0)


def test_the_next_turn_of_a_session_is_what_it_would_be_without_one(world: World) -> None:
    first = [replace(one, session=str(i)) for i, one in enumerate(ragged(12))]
    second = [
        replace(one, tokens=one.tokens + sample.tokens + (8, 9, 10 + i), seed=100 + i)
        for i, (one, sample) in enumerate(zip(first, world.ask(*first), strict=True))
    ]
    kept = world.ask(*second)
    fresh = world.ask(*(replace(one, session=None) for one in second))
    for one, sample, plain in zip(second, kept, fresh, strict=True):
        agree(world, one, sample)
        assert sample.tokens == plain.tokens
        world.engine.release(str(one.session))


def test_a_session_that_rewrites_its_past_is_served_right(world: World) -> None:
    world.ask(request([2, 3, 4, 5, 6], session="a"))
    for tokens in ([2, 3, 9, 9, 9, 9, 9], [2, 3], [7]):
        asked = request(tokens, session="a")
        agree(world, asked, world.ask(asked)[0])
    world.engine.release("a")
    world.engine.release("never seen")


def test_no_policy_means_the_base_model(world: World) -> None:
    trained, base = request(max_new=20, stop_ids=()), request(max_new=20, stop_ids=(), policy=None)
    one, other = world.ask(trained, base)
    agree(world, trained, one)
    agree(world, base, other)
    assert one.policy == 0 and other.policy is None
    tokens = (2, 3, 4, 5, 6)
    assert world.score(tokens, 1, None) != pytest.approx(world.score(tokens, 1, 0), abs=1e-3)


def test_sessions_of_one_policy_never_serve_another(world: World) -> None:
    asked = request(range(2, 20), session="a")
    world.ask(asked)
    base = replace(asked, tokens=(*asked.tokens, 3), policy=None)
    agree(world, base, world.ask(base)[0])
    again = replace(asked, tokens=(*asked.tokens, 4))
    agree(world, again, world.ask(again)[0])


def test_what_is_kept_for_one_policy_is_no_prefix_for_another(world: World) -> None:
    """Sessions wait for their next turn while others begin with the very same tokens."""
    prompt = range(2, 40)
    for kept, other in ((0, None), (None, 0)):
        world.ask(request(prompt, session=f"kept {kept}", policy=kept))
        asked = request(prompt, session=f"other {other}", policy=other)
        agree(world, asked, world.ask(asked)[0])
        again = request([*prompt, 50], policy=kept)
        agree(world, again, world.ask(again)[0])


def test_other_weights_under_the_same_version_leave_nothing_of_the_old_ones(world: World) -> None:
    """As where one model is given the weights of several runs."""
    asked = request(range(2, 20), session="a")
    world.ask(asked)
    shake(world.policy, 0.3, seed=2)
    world.engine.load_policy(0)
    again = replace(asked, tokens=(*asked.tokens, 4))
    agree(world, again, world.ask(again)[0])


def test_another_version_than_the_loaded_one_is_refused(world: World) -> None:
    with pytest.raises(EngineError, match="policy 3"):
        world.ask(request(policy=3))
    with pytest.raises(EngineError):
        world.score((2, 3), 1, 3)
    with pytest.raises(EngineError):
        world.engine.load_policy(3)
    world.policy.advance()
    if world.engine.concurrent:
        assert world.ask(request(policy=0))[0].policy == 0
        return
    with pytest.raises(EngineError):
        world.ask(request(policy=0))


def test_new_weights_are_served_after_load_and_nothing_old_is_kept(world: World) -> None:
    asked = request(range(2, 20), session="a", max_new=20, stop_ids=())
    (old,) = world.ask(asked)
    shake(world.policy, 0.3, seed=1)
    world.engine.load_policy(world.policy.advance())
    new = replace(asked, policy=1)
    (sample,) = world.ask(new)
    agree(world, new, sample)
    assert sample.policy == 1 and sample.tokens != old.tokens


def test_joined_callers_that_leave_or_fail_hold_nobody_up(world: World) -> None:
    async def caller(number: int) -> int:
        world.engine.join(1)
        try:
            if number == 3:
                raise RuntimeError("caller broke")
            for turn in range(number % 3):
                await world.engine.sample(request(seed=number, max_new=2 + turn))
            return number
        finally:
            world.engine.leave()

    async def everything() -> list[int | BaseException]:
        return await asyncio.wait_for(asyncio.gather(*map(caller, range(9)), return_exceptions=True), 60)

    results = asyncio.run(everything())
    assert [result for result in results if isinstance(result, int)] == [0, 1, 2, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("begun", [False, True])
def test_a_cancelled_caller_disturbs_nobody(world: World, begun: bool) -> None:
    async def everything() -> list[Sample]:
        long = [asyncio.create_task(world.engine.sample(one)) for one in asked]
        await asyncio.sleep(0)
        if begun:                                          # together with this one, which ends first
            await world.engine.sample(request(seed=9, max_new=2, stop_ids=()))
        long[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await long[1]
        return [await long[0], await long[2]]

    asked = [request([2 + i, 3], seed=i, max_new=50, stop_ids=()) for i in range(3)]
    for one, sample in zip(asked[::2], asyncio.run(everything()), strict=True):
        assert len(sample.tokens) == 50
        agree(world, one, sample)
    assert world.ask(request())[0].tokens


def test_the_learner_may_train_as_soon_as_the_last_sample_is_there(world: World) -> None:
    for step in range(5):
        world.ask(*ragged(8), request(policy=None, max_new=1 + step))
        with world.policy.training() as model:
            assert not any(torch.isnan(p).any() for p in model.parameters())


def test_a_pause_between_turns_changes_no_sample(world: World) -> None:
    first = [replace(one, session=str(i)) for i, one in enumerate(ragged(8))]
    second = [
        replace(one, tokens=one.tokens + sample.tokens + (9,))
        for one, sample in zip(first, world.ask(*first), strict=True)
    ]
    world.engine.pause()
    world.engine.pause()
    with world.policy.training():
        pass
    world.engine.resume()
    world.engine.load_policy(0)
    for one, sample in zip(second, world.ask(*second), strict=True):
        agree(world, one, sample)


def test_a_pause_holds_up_nobody_who_is_under_way(world: World) -> None:
    async def everything() -> list[Sample]:
        tasks = [asyncio.create_task(world.engine.sample(one)) for one in asked]
        await asyncio.sleep(0)
        world.engine.pause()
        try:
            return await asyncio.wait_for(asyncio.gather(*tasks), 60)
        finally:
            world.engine.resume()

    asked = [request(seed=i, max_new=30, stop_ids=(), session=str(i)) for i in range(4)]
    for one, sample in zip(asked, asyncio.run(everything()), strict=True):
        agree(world, one, sample)


def test_closing_fails_who_still_waits_and_may_be_repeated(world: World) -> None:
    async def everything() -> None:
        world.engine.join(2)                               # one of whom never asks
        waiting = asyncio.create_task(world.engine.sample(request(max_new=50, stop_ids=())))
        await asyncio.sleep(0)
        await asyncio.to_thread(world.engine.close)
        if not waiting.done():
            await asyncio.wait([waiting], timeout=30)
        assert waiting.done()
        if waiting.exception() is not None:
            assert isinstance(waiting.exception(), EngineError)

    asyncio.run(everything())
    world.engine.close()
    with pytest.raises(EngineError):
        world.ask(request())
