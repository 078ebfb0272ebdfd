"""Memory: what is estimated, what is decided from it, and what is done and said when it runs out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from learner_kit import group, related_groups, rollout, tiny_model, tiny_policy

from espl_envs.core.errors import EsplError
from espl_train.config import LearnerConfig
from espl_train.learner import memory
from espl_train.learner.memory import GIB, MARGIN, OutOfMemory, appetite, free, watched
from espl_train.learner.packing import MicroBatch
from espl_train.learner.update import Learner

CUDA = "CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has a total capacity of 79.11 GiB."


def learner(**settings: Any) -> Learner:
    settings = {"rank": 4, "alpha": 8, "learning_rate": 1e-2, **settings}
    return Learner(tiny_policy(0.1, **settings), LearnerConfig(**settings))


def starve(who: Learner, monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> list[int]:
    """Micro-batches of more than `most` ids fail, as an allocator does; without checkpointing all of them. Returns the
    sizes that were tried."""
    tried: list[int] = []
    accumulate = who._accumulate

    def scarce(batch: MicroBatch, *rest: Any) -> None:
        tried.append(batch.size)
        if batch.size > most or not who.policy.checkpointing:
            raise error
        accumulate(batch, *rest)

    monkeypatch.setattr(who, "_accumulate", scarce)
    return tried


def bytes_of(width: int, layers: int, **changes: Any) -> memory.Appetite:
    return appetite(tiny_model(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, **changes,
    ))


def test_what_a_forward_pass_keeps_grows_with_width_and_depth():
    base, wide, deep = bytes_of(32, 2), bytes_of(64, 2), bytes_of(32, 4)
    assert wide.kept == pytest.approx(2 * base.kept, rel=0.1)
    assert deep.kept == pytest.approx(2 * base.kept, rel=0.1)
    # by hand, in floats per id: a layer of width 32 keeps its norms' inputs, queries, keys, values, the attention's
    # result, gate, up and their product, each once or twice
    assert 2 * 4 * 10 * 32 < base.kept < 2 * 4 * 60 * 32


def test_it_is_what_autograd_really_holds():
    model = tiny_model(num_hidden_layers=4)
    estimate = appetite(model)
    ids = torch.randint(2, 60, (1, 60), generator=torch.Generator().manual_seed(0))
    held: dict[int, torch.Tensor] = {}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        return held.setdefault(tensor.untyped_storage().data_ptr(), tensor)

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        model.get_decoder()(input_ids=ids, use_cache=False)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    real = sum(t.untyped_storage().nbytes() for at, t in held.items() if at not in weights)
    assert estimate.need(60, checkpointing=False) / MARGIN == pytest.approx(real, rel=0.1)
    assert estimate.need(60, checkpointing=True) < estimate.need(60, checkpointing=False) / 2


def test_a_base_that_is_half_as_wide_keeps_less():
    full, half = appetite(tiny_model()), appetite(tiny_model(dtype=torch.bfloat16))
    assert half.kept < 0.8 * full.kept


def test_free_memory_is_read_from_the_machine(monkeypatch):
    assert 2**20 < free(torch.device("cpu")) < 2**50
    files = {
        "/proc/meminfo": "MemTotal: 99 kB\nMemAvailable:       4096 kB", "/sys/fs/cgroup/memory.max": "3000000",
        "/sys/fs/cgroup/memory.current": "2500000", "/sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 400000",
    }
    monkeypatch.setattr(memory, "_read", lambda path: files.get(path, ""))
    assert free(torch.device("cpu")) == 900_000
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert free(torch.device("cpu")) == 4096 * 1024


@pytest.mark.parametrize(("there", "on"), [(2**50, False), (2**12, True)])
def test_auto_checkpoints_where_a_micro_batch_would_not_fit(there, on, monkeypatch):
    monkeypatch.setattr(memory, "free", lambda _: there)
    who, never = learner(), learner(gradient_checkpointing="off")
    report, other = who.update(related_groups(0)), never.update(related_groups(0))
    assert who.policy.checkpointing is on
    assert never.policy.checkpointing is False
    assert [note.partition(":")[0] for note in report.notes] == ["gradient checkpointing from now on"] * on
    assert other.notes == ()
    assert report.grad_norm == other.grad_norm
    assert who.update(related_groups(1)).notes == ()           # said once


def test_the_largest_micro_batch_decides(monkeypatch):
    who = learner(micro_batch_tokens=60)
    sizes = sorted(batch.size for batch in who._micro_batches(related_groups(0)))
    need = appetite(who.policy.causal).need(sizes[-1], checkpointing=False)
    for there, on in ((need * 1.01, False), (need * 0.99, True)):
        monkeypatch.setattr(memory, "free", lambda _, there=there: int(there / memory.USABLE))
        assert who.update(related_groups(0)).skipped is None and who.policy.checkpointing is on
    assert sizes[0] < 0.9 * sizes[-1]


def test_checkpointing_computes_every_layer_a_second_time(monkeypatch):
    """From the start, after memory ran out, and from the moment on that it is expected to."""
    def passes(who: Learner) -> list[int]:
        counts = [0] * len(who.policy.causal.model.layers)
        for i, layer in enumerate(who.policy.causal.model.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
        assert who.update(related_groups(0)).skipped is None
        return counts

    who = learner()
    who._appetite = memory.Appetite(0, 0)
    assert passes(who) == [1, 1] and passes(learner(gradient_checkpointing="on")) == [2, 2]
    who = learner()
    who._appetite = memory.Appetite(0, 0)
    starve(who, monkeypatch, 10**6, MemoryError())
    assert passes(who) == [2, 2]
    who = learner()
    who._appetite = memory.Appetite(2**60, 0)
    assert passes(who) == [2, 2]


def test_checkpointing_that_the_architecture_does_not_have_is_refused(monkeypatch):
    monkeypatch.setattr(type(tiny_model()), "supports_gradient_checkpointing", False)
    with pytest.raises(EsplError, match="architecture of this model has none"):
        learner(gradient_checkpointing="on")
    monkeypatch.setattr(memory, "free", lambda _: 2**12)
    assert learner().update(related_groups(0)).notes == ()
    who = learner()
    starve(who, monkeypatch, 0, MemoryError())
    with pytest.raises(EsplError, match="ran out of memory"):
        who.update(related_groups(0))


def test_an_update_that_runs_out_of_memory_asks_for_less_and_learns_the_same(monkeypatch):
    plain, who = learner(gradient_checkpointing="off"), learner()
    tried = starve(who, monkeypatch, 60, torch.OutOfMemoryError(CUDA))
    report, expected = who.update(related_groups(0)), plain.update(related_groups(0))
    assert tried[0] == tried[1] > 60                           # with checkpointing first, then in halves
    assert max(tried[2:]) <= 60
    assert len(report.notes) == 2
    assert "gradient checkpointing from now on" in report.notes[0]
    assert "learner.micro_batch_tokens = " in report.notes[1]
    assert report.tokens == expected.tokens
    assert report.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert who.update(related_groups(1)).notes == ()           # what was learnt about memory stays


def test_a_resumed_run_knows_what_did_not_fit_and_learns_the_same(monkeypatch):
    straight = learner()
    starve(straight, monkeypatch, 60, MemoryError())
    straight.update(related_groups(0))
    saved = straight.state_dict()
    again = learner()
    again.load_state_dict(saved)
    tried = starve(again, monkeypatch, 60, MemoryError())
    ours, theirs = again.update(related_groups(1)), straight.update(related_groups(1))
    assert max(tried) <= 60 and ours.notes == ()               # nothing fails for a second time
    assert ours.grad_norm == theirs.grad_norm
    assert all(torch.equal(p, straight.policy.state()[n]) for n, p in again.policy.state().items())
    modest = learner(micro_batch_tokens=10)
    modest.load_state_dict(saved)
    assert modest.limits.tokens == 10                          # less is configured than would fit
    elsewhere = learner()
    monkeypatch.setattr(memory, "named", lambda _: "a larger machine")
    elsewhere.load_state_dict(saved)
    assert elsewhere.limits == learner().limits and not elsewhere.policy.checkpointing


def test_what_was_learnt_before_memory_ran_out_is_not_learnt_twice(monkeypatch):
    who, plain = learner(micro_batch_tokens=60), learner(micro_batch_tokens=60)
    accumulate, sizes = who._accumulate, []

    def once(batch: MicroBatch, *rest: Any) -> None:
        sizes.append(batch.size)
        if len(sizes) == 2:
            raise torch.OutOfMemoryError(CUDA)
        accumulate(batch, *rest)

    monkeypatch.setattr(who, "_accumulate", once)
    report, expected = who.update(related_groups(0)), plain.update(related_groups(0))
    assert len(sizes) > 3
    assert (report.grad_norm, report.loss, report.tokens) == (expected.grad_norm, expected.loss, expected.tokens)


def test_where_not_even_one_sequence_fits_the_knobs_are_named_and_nothing_has_changed(monkeypatch):
    who = learner()
    before = who.policy.state()
    starve(who, monkeypatch, 0, torch.OutOfMemoryError(CUDA))
    monkeypatch.setattr(memory, "free", lambda _: int(1.25 * GIB))
    lone = [group(rollout(1.0, [(range(2, 30), range(2, 8))]), advantages=(1.0,))]
    with pytest.raises(EsplError) as caught:
        who.update(lone)
    said = str(caught.value)
    assert "ran out of memory on cpu with a single sequence of 33 ids" in said
    assert "3.50 GiB more were asked for, 1.25 GiB were free, 2.25 GiB too little" in said
    assert "rollout.max_new_tokens" in said
    assert "the run goes on from its last checkpoint" in said
    assert all(torch.equal(before[n], p) for n, p in who.policy.state().items())
    assert all(p.grad is None for p in who.policy.trainable_parameters().values())
    with who.policy.sampling_weights(0):                       # the turn is over
        pass


def test_checkpointing_is_among_the_knobs_where_it_was_switched_off(monkeypatch):
    who = learner(gradient_checkpointing="off", micro_batch_tokens=1)
    starve(who, monkeypatch, 0, MemoryError())
    with pytest.raises(EsplError, match=r"set learner\.gradient_checkpointing = 'on'"):
        who.update(related_groups(0))


def test_allocators_of_all_kinds_are_understood():
    with pytest.raises(OutOfMemory) as real, watched():
        torch.empty(2**50)                                     # the host's own
    assert real.value.wanted == 2**52
    for error, wanted in ((torch.OutOfMemoryError(CUDA), 3.5 * GIB), (MemoryError(), None)):
        with pytest.raises(OutOfMemory) as caught, watched():
            raise error
        assert caught.value.wanted == wanted
    with pytest.raises(RuntimeError, match="shapes"), watched():
        raise RuntimeError("shapes do not match")
