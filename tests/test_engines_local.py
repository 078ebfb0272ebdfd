"""The local engine from inside: the same bits in every run, bounded memory, work done once, any causal model."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import World, local_world, ragged, request
from learner_kit import VOCABULARY, tiny_model, tiny_policy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from espl_train.config import EngineConfig, LearnerConfig
from espl_train.engines import decode
from espl_train.engines.base import EngineError, Sample
from espl_train.engines.kv import KVSlab, TokenSlab, slab_for
from espl_train.engines.local import LocalEngine
from espl_train.engines.sampling import Law, draw
from espl_train.learner.policy import Policy
from espl_train.randomness import uniforms

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "intermediate_size": 48,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "mistral, sliding window": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=6)),
    "qwen, mixed windows": lambda: Qwen2ForCausalLM(Qwen2Config(
        **SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)),
}


@pytest.fixture
def world() -> Iterator[World]:
    made = local_world()
    yield made
    made.engine.close()


def play(world: World, order: Sequence[int], delays: random.Random, turns: int = 3) -> list[list[Sample]]:
    """Episodes of several turns by joined callers, started in `order`, with delays between turns."""
    prompts = ragged(len(order), max_new=10)
    played: dict[int, list[Sample]] = {}

    async def caller(number: int) -> None:
        asked, played[number] = replace(prompts[number], session=f"{number}"), []
        world.engine.join(1)
        try:
            for turn in range(turns - number % 2):
                for _ in range(delays.randrange(100) * (1 if number else 9)):      # one keeps all others waiting
                    await asyncio.sleep(0)
                sample = await world.engine.sample(asked)
                played[number].append(sample)
                asked = replace(asked, tokens=asked.tokens + sample.tokens + (3, 4), seed=number + 1000 * (turn + 1))
        finally:
            world.engine.release(f"{number}")
            world.engine.leave()

    async def everything() -> None:
        await asyncio.gather(*(caller(number) for number in order))

    asyncio.run(everything())
    return [played[number] for number in range(len(order))]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """Who is decoded together, stride by stride: seeds and lengths. Small models hardly show it in their bits."""
    seen: list[list[tuple[int, int]]] = []
    stride = decode.Decoder.stride

    def watched(self: decode.Decoder, steps: int) -> Any:
        seen.append(sorted((row.request.seed, row.known) for row in self.active))
        return stride(self, steps)

    monkeypatch.setattr(decode.Decoder, "stride", watched)
    return seen


def test_the_same_bits_however_callers_are_delayed_and_ordered(
    world: World, batches: list[list[tuple[int, int]]]
) -> None:
    expected, together = play(world, range(16), random.Random(0)), [*batches]
    for trial in range(1, 5):
        batches.clear()
        shuffled = random.Random(trial).sample(range(16), 16)
        assert play(world, shuffled, random.Random(trial)) == expected and batches == together


def test_the_same_bits_whatever_the_engine_served_before() -> None:
    used, fresh = local_world(context=512), local_world(context=512)
    used.ask(*ragged(40, max_new=25, stop_ids=()), request(max_new=300, stop_ids=()), *ragged(5, policy=None))
    assert play(used, range(16), random.Random(0)) == play(fresh, range(16), random.Random(1))
    for world in (used, fresh):
        world.engine.close()


def test_the_same_bits_for_callers_that_never_join(world: World, batches: list[list[tuple[int, int]]]) -> None:
    """Reflection calls follow each other without a caller that stays joined."""

    async def chain(number: int, order: random.Random) -> list[Sample]:
        for _ in range(order.randrange(4)):
            await asyncio.sleep(0)
        first = await world.engine.sample(request(seed=number, max_new=4 + number, stop_ids=()))
        for _ in range(order.randrange(8)):
            await asyncio.sleep(0)
        second = await world.engine.sample(request((*first.tokens, number + 2), seed=number))
        return [first, second]

    async def everything(trial: int) -> list[list[Sample]]:
        order = random.Random(trial)
        return await asyncio.gather(*(chain(number, order) for number in range(10)))

    expected, together = asyncio.run(everything(0)), [*batches]
    for trial in range(1, 5):
        batches.clear()
        assert asyncio.run(everything(trial)) == expected and batches == together


def test_a_prompt_is_prefilled_once_and_a_turn_only_for_its_suffix(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write = KVSlab.write

    def counted(self: KVSlab, rows: Any, starts: Any, pieces: Sequence[Sequence[int]]) -> None:
        written.append(sum(map(len, pieces)))
        write(self, rows, starts, pieces)

    monkeypatch.setattr(KVSlab, "write", counted)
    world = local_world()
    world.ask(request())
    written.clear()
    system = list(range(2, 22))
    names = [(p, n) for p in range(3) for n in range(8)]
    asked = [request([*system, 30 + p, 31, 32], seed=10 * p + n, session=f"{p}/{n}") for p, n in names]
    samples = world.ask(*asked)
    assert sum(written) == 22 + 2 * 2                # one whole prompt, two suffixes; all 24 rows got theirs copied
    written.clear()
    world.ask(*(replace(one, tokens=one.tokens + sample.tokens + (40, 41))
                for one, sample in zip(asked, samples, strict=True)))
    assert sum(written) == 24 * 2                    # the last sampled token and all but the last of what was appended
    world.engine.close()


def test_every_token_is_drawn_by_a_number_of_its_own(world: World) -> None:
    """The number belongs to seed and place, so no draw repeats another, however many strides a reply takes."""
    asked = ragged(12, max_new=3 * world.engine.stride, stop_ids=(), temperature=1.3)
    for one, sample in zip(asked, world.ask(*asked), strict=True):
        ends = world.oracle(one, sample).exp().double().cumsum(-1)               # (sampled, vocab)
        places, tokens = np.arange(len(sample.tokens)), torch.tensor(sample.tokens)
        number = torch.from_numpy(uniforms(np.full(len(tokens), one.seed, np.uint64), places))
        end = ends[places, tokens]
        begin = torch.where(tokens > 0, ends[places, tokens - 1], 0.0)
        assert bool(((begin - 1e-4 <= number) & (number <= end + 1e-4)).all())


def test_draws_are_exact_in_a_large_vocabulary_and_never_of_what_has_no_chance() -> None:
    count, rows = 150_000, torch.arange(16)
    wanted = 7 + (count - 20) * (rows + 1) // 17
    chances = torch.ones(16, count)
    chances[:, :7] = chances[:, -13:] = chances[rows, wanted - 1] = 0
    number = (wanted - 7 - 1 + 0.5) / float(chances[0].sum())                   # the middle of the share of each
    law = Law.of([1.0] * 16, [1.0] * 16, torch.device("cpu"))
    logp = (chances / chances.sum(1, keepdim=True)).log()
    assert draw(logp, law, number.double())[0].tolist() == wanted.tolist()
    ends = torch.tensor([1e-15, 1 - 2**-48] * 8, dtype=torch.float64)
    assert draw(logp, law, ends)[0].tolist() == [7, count - 14] * 8


def test_what_nobody_needs_any_more_is_given_back(world: World) -> None:
    async def cancelled() -> None:
        long = asyncio.create_task(world.engine.sample(request(max_new=50, stop_ids=(), session="long")))
        await world.engine.sample(request(seed=1, max_new=2))
        long.cancel()
        await world.engine.sample(request(seed=2, max_new=20, stop_ids=()))

    asyncio.run(cancelled())
    memory = world.engine._decoder.memory
    assert all(held.free for held in memory.held)
    asked = [replace(one, session=str(i)) for i, one in enumerate(ragged(6))]
    world.ask(*asked)
    assert sum(not held.free for held in memory.held) == 6
    for i in range(5):
        world.engine.release(str(i))
    world.ask(request())
    assert [held.session for held in memory.held if not held.free] == ["5"]
    assert world.engine._decoder.slab.cache.slabs
    world.engine.pause()
    assert not world.engine._decoder.slab.cache.slabs and not world.engine._decoder.memory.held


def test_what_a_row_left_behind_is_no_prefix_once_another_stands_there(world: World) -> None:
    """Rows move up when others end; the memory of those is what it happens to be."""

    async def everything() -> Sample:
        long = asyncio.create_task(world.engine.sample(request([60], max_new=50, stop_ids=())))
        await asyncio.gather(*(world.engine.sample(request(prompt, seed=i, max_new=1)) for i in range(2)))
        late = await world.engine.sample(after)
        await long
        return late

    prompt = range(2, 40)
    after = request([*prompt, 50])
    for sample in (asyncio.run(everything()), world.ask(after)[0]):
        assert sample.logprobs == pytest.approx(world.expected(after, sample), abs=1e-5)


def test_the_limits_of_memory_are_the_configured_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    world, decoded = local_world(), []
    world.engine = LocalEngine(world.policy, EngineConfig(context=24, slots=2, kv_gb=0.25))
    world.engine.load_policy(0)
    stride = decode.Decoder.stride
    monkeypatch.setattr(
        decode.Decoder, "stride", lambda self, steps: (decoded.append(len(self.active)), stride(self, steps))[1]
    )
    asked = [request([2, 3, 4 + i], seed=i, max_new=60, stop_ids=()) for i in range(5)]
    assert [len(sample.tokens) for sample in world.ask(*asked)] == [21] * 5
    assert max(decoded) == 2 and world.engine._decoder.memory.budget == 2**28
    world.engine.close()


@pytest.mark.parametrize("slots", [1, 3, 7])
def test_more_requests_than_slots_are_served_in_turn(slots: int) -> None:
    roomy, tight = local_world(), local_world()
    tight.engine = LocalEngine(tight.policy, EngineConfig(slots=slots))
    tight.engine.load_policy(0)
    asked = ragged(20)
    expected = roomy.ask(*asked)
    for one, other in zip(expected, tight.ask(*asked), strict=True):
        assert one.tokens == other.tokens
    roomy.engine.close()
    tight.engine.close()


def test_memory_is_bounded_and_evicted_sessions_are_prefilled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    resize = KVSlab.resize

    def measured(self: KVSlab, rows: int, width: int, *cut: int) -> None:
        sizes.append(rows * width * self.bytes_per_token)
        resize(self, rows, width, *cut)

    monkeypatch.setattr(KVSlab, "resize", measured)
    per_token = 2 * 2 * 2 * 8 * 4                    # layers, keys and values, heads, dimension, bytes
    budget = 6 * 64 * per_token
    bounded, roomy = local_world(kv_bytes=budget), local_world()
    assert [[s.tokens for s in e] for e in play(bounded, range(16), random.Random(0))] == [
        [s.tokens for s in e] for e in play(roomy, range(16), random.Random(0))
    ]
    assert any(size > budget for size in sizes)      # the roomy one
    sizes.clear()
    play(bounded, range(16), random.Random(3))
    assert all(size <= budget for size in sizes)
    bounded.engine.close()
    roomy.engine.close()


def test_a_wider_request_makes_room_by_narrowing_the_batch() -> None:
    per_token = 2 * 2 * 2 * 8 * 4
    model = tiny_model(max_position_embeddings=512)
    policy = Policy(model, tiny_policy().tokenizer, LearnerConfig(rank=4))
    engine = LocalEngine(policy, EngineConfig(), kv_bytes=8 * 64 * per_token)
    engine.load_policy(0)
    world = World(engine, policy)
    world.ask(*(replace(one, session=str(one.seed)) for one in ragged(8)))
    long = [request([2 + i % 50 for i in range(200)], seed=3), *ragged(4), request([7] * 600)]
    for one in long[:-1]:
        assert world.ask(one)[0].logprobs == pytest.approx(world.expected(one, world.ask(one)[0]), abs=1e-5)
    for one, sample in zip(long[:-1], world.ask(*long[:-1]), strict=True):
        assert sample.logprobs == pytest.approx(world.expected(one, sample), abs=1e-5)
    with pytest.raises(EngineError):
        world.ask(long[-1])
    engine.close()


@pytest.mark.parametrize("name", MODELS)
def test_any_causal_model_is_served_by_its_own_forward_pass(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        slab = slab_for(model)
    assert isinstance(slab, TokenSlab if name == "mamba" else KVSlab)
    policy = Policy(model, tiny_policy().tokenizer, LearnerConfig(mode="full"))
    world = World(LocalEngine(policy, EngineConfig()), policy)
    world.engine.load_policy(0)
    asked = [replace(one, session=str(one.seed)) for one in ragged(8, max_new=14)]
    samples = world.ask(*asked)
    again = [replace(a, tokens=a.tokens + s.tokens + (5, 6)) for a, s in zip(asked, samples, strict=True)]
    for one, sample in zip((*asked, *again), (*samples, *world.ask(*again)), strict=True):
        assert sample.logprobs == pytest.approx(world.expected(one, sample), abs=2e-5)
    world.engine.close()


def test_long_prompts_are_prefilled_in_pieces(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "PREFILL_PIECE", 7)
    monkeypatch.setattr(decode, "PREFILL_TOKENS", 20)
    asked = ragged(12)
    for one, sample in zip(asked, world.ask(*asked), strict=True):
        assert sample.logprobs == pytest.approx(world.expected(one, sample), abs=1e-5)


def test_a_broken_forward_pass_is_an_engine_error_and_the_next_request_works(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = KVSlab.step
    monkeypatch.setattr(KVSlab, "step", lambda *_: 1 / 0)
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        world.ask(*ragged(3))
    monkeypatch.setattr(KVSlab, "step", step)
    assert world.ask(request())[0].tokens


def test_requests_from_several_event_loops_are_served(world: World) -> None:
    results: dict[int, Sample] = {}

    def other(number: int) -> None:
        results[number] = world.ask(request(seed=number))[0]

    threads = [threading.Thread(target=other, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [results[i].tokens for i in range(4)] == [world.ask(request(seed=i))[0].tokens for i in range(4)]


def test_weights_do_not_change_under_requests(world: World) -> None:
    async def everything() -> None:
        waiting = asyncio.create_task(world.engine.sample(request(max_new=40, stop_ids=())))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="under way"):
            world.engine.load_policy(0)
        await waiting

    asyncio.run(everything())
