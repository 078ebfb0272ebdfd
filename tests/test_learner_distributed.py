"""Two ranks learn what one process learns, to rounding; what ends one of them ends all, with one sentence.

The test is rank 0. The other rank is a real process over gloo, forked from one that has imported everything.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_kit import group, random_groups, rollout, tiny_folder
from ranks_kit import Nursery, gradients
from safetensors.torch import load_file

from espl_envs.core.errors import EsplError
from espl_train.cli import main
from espl_train.config import Config
from espl_train.learner import distributed, topology
from espl_train.learner.distributed import Team, by_cost, fingerprint, in_rounds
from espl_train.learner.logprobs import sequence_logprobs
from espl_train.learner.packing import Limits, MicroBatch, pack
from espl_train.learner.ranks import ALONE, Place, RankLost
from espl_train.learner.sequences import training_sequences
from espl_train.learner.update import Learner
from espl_train.records import Group
from espl_train.runs import checkpoint
from espl_train.runs.metrics import read_lines
from espl_train.settings import ConfigError, load


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings(model: Path) -> Callable[..., Config]:
    def make(engine: str = "local", dtype: str = "float32", **learner: Any) -> Config:
        given = {"rank": 4, "alpha": 8, "learning_rate": 1e-3, "micro_batch_tokens": 40, "rank_timeout": 60, **learner}
        where = {"path": str(model), "device": "cpu", "threads": 1, "dtype": dtype}
        return Config.model_validate({"model": where, "engine": {"kind": engine}, "learner": given})

    return make


DATA = {"mode": "lora"}
WHOLE = {"mode": "full"}
SHARDED = {"engine": "vllm", "parallel": "fsdp", "kl": 0.1}
SHARDED_WHOLE = {"engine": "vllm", "parallel": "fsdp", "mode": "full"}
KINDS = [DATA, WHOLE, SHARDED, SHARDED_WHOLE]
NAMES = ["data-lora", "data-full", "fsdp-lora", "fsdp-full"]

FLAT = [group(rollout(1.0), rollout(1.0, sample=1), advantages=(0.0, 0.0))]


def poisoned() -> list[Group]:
    bad = random_groups(1)
    bad[0] = group(rollout(1.0, logprobs=[[-1.0, float("nan")]]), advantages=(1.0,))
    return bad


def agree(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> bool:
    """Whether gradients differ by less than `tolerance` of their length; `other` may be the shard of rank 0."""
    assert one.keys() == other.keys()
    mine = {name: one[name][: len(tensor)] for name, tensor in other.items()}
    gap = torch.stack([(mine[name] - other[name]).norm() for name in mine]).norm()
    return bool(gap <= tolerance * torch.stack([tensor.norm() for tensor in mine.values()]).norm())


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_two_ranks_learn_what_one_process_learns(
    kind: dict[str, Any], nursery: Nursery, settings: Callable[..., Config], tmp_path: Path
) -> None:
    """Gradients, clip norm, reports, skips, and a checkpoint that goes from one process to two and back. The last
    update is a single sequence: for one of the ranks there is nothing to do."""
    config = settings(**kind)
    one = Learner.of(config, ALONE)
    one.update(random_groups(9, count=1))
    started = one.state_dict()
    checkpoint.save(tmp_path, 1, {"learner": started}, keep=1)
    batches: list[Sequence[Group]] = [random_groups(0), FLAT, poisoned(), random_groups(2, count=1, samples=1)]
    alone = [one.update(groups) for groups in batches]
    with nursery.learner(config) as two:
        two.load_state_dict(checkpoint.load_newest(tmp_path)[1]["learner"])
        assert same_tree(learnt(two.state_dict()), learnt(started))
        together = [two.update(groups) for groups in batches]
        state = two.state_dict()
        expected, found = gradients(one, random_groups(3)), gradients(two, random_groups(3))
    assert [r.skipped for r in together] == [None, "no contrast", "gradient not finite", None]
    for ours, theirs in zip(together, alone, strict=True):
        assert (ours.version, ours.skipped, ours.tokens, ours.sequences) == (
            theirs.version, theirs.skipped, theirs.tokens, theirs.sequences
        )
        for name in ("loss", "grad_norm", "rate", "ratio_mean", "ratio_max", "entropy", "behaviour_kl", "reference_kl"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-5, abs=1e-6), name
    assert agree(expected, found, 2e-6)
    back = Learner.of(config, ALONE)
    back.load_state_dict(state)
    assert same_tree(learnt(back.state_dict()), learnt(state))
    assert back.update(random_groups(4)).loss == pytest.approx(one.update(random_groups(4)).loss, rel=1e-4)


def learnt(state: dict[str, Any]) -> dict[str, Any]:
    """All of a learner's state but what fits into memory, which is another thing where weights are sharded."""
    return {name: value for name, value in state.items() if name != "room"}


def same_tree(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_tree(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_tree, one, other))
    return bool(one == other)


@pytest.mark.parametrize("kind", [{**SHARDED, "gradient_checkpointing": "off"}, SHARDED_WHOLE], ids=NAMES[2:])
def test_rank_0_looks_at_sharded_weights_and_writes_them_out(
    kind: dict[str, Any], nursery: Nursery, settings: Callable[..., Config], tmp_path: Path
) -> None:
    lora = "mode" not in kind
    config, passage = settings(**kind, dtype="bfloat16" if lora else "float32"), range(2, 20)
    one = Learner.of(config)
    with nursery.learner(config) as two:
        for step in range(2):
            for learner in (one, two):
                learner.update(random_groups(step))
            two.policy.trainable_parameters()            # what rank 0 alone does is no matter for the others
            for reference in (False, True)[: 1 + lora]:
                ours, theirs = (
                    who.policy.run(sequence_logprobs, passage, 4, reference=reference).detach() for who in (two, one)
                )
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        for name, who in (("one", one), ("two", two)):
            who.policy.save_adapter(tmp_path / name / "adapter")
            who.policy.save_merged(tmp_path / name / "merged")
        with pytest.raises(EsplError, match="sample with --engine"), two.policy.sampling_weights(two.policy.version):
            pass
    for kept in ("adapter", "merged"):
        files = sorted(path.name for path in (tmp_path / "one" / kept).iterdir())
        assert files == sorted(path.name for path in (tmp_path / "two" / kept).iterdir())
        for file in (file for file in files if file.endswith(".safetensors")):
            mine, other = (load_file(tmp_path / name / kept / file) for name in ("two", "one"))
            assert mine.keys() == other.keys()
            for key in mine:
                bounds = {"atol": 5e-5, "rtol": 1e-2} if lora else {"atol": 1e-5, "rtol": 1e-4}
                torch.testing.assert_close(mine[key], other[key], **bounds)


def average(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Team.add_up

    def wrong(self: Team, tensors: Sequence[torch.Tensor]) -> None:
        right(self, tensors)
        for tensor in tensors:
            if tensor.grad is not None:
                tensor.grad.div_(self.size)

    monkeypatch.setattr(Team, "add_up", wrong)


def drop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "by_cost", lambda batches, size: [*by_cost(batches, size)[:-1], []])


@pytest.mark.parametrize("mutant", [average, drop])
def test_an_averaged_gradient_and_a_share_that_is_dropped_are_noticed(
    mutant: Callable[[pytest.MonkeyPatch], None], nursery: Nursery, settings: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = gradients(Learner.of(settings()), random_groups(0))
    mutant(monkeypatch)
    with nursery.learner(settings()) as two:
        assert not agree(expected, gradients(two, random_groups(0)), 2e-6)


def test_weights_that_drift_apart_are_noticed_at_the_next_checkpoint(
    nursery: Nursery, settings: Callable[..., Config]
) -> None:
    with nursery.learner(settings()) as two:
        two.update(random_groups(0))
        weight = next(iter(two.policy.trainable_parameters().values()))
        with torch.no_grad():
            weight.view(-1)[5] = torch.nextafter(weight.view(-1)[5], torch.tensor(9.0))
        with pytest.raises(EsplError, match="rank 1 holds other weights than rank 0"):
            two.state_dict()


def test_a_rank_that_is_killed_ends_the_run_with_a_sentence(nursery: Nursery, settings: Callable[..., Config]) -> None:
    with nursery.team() as (team, (pid,)):
        team.check(settings())
        two = Learner.of(settings(), team)
        two.update(random_groups(0))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RankLost, match=rf"rank 1 \(.*, process {pid}\) died without a word"):
            while True:                                  # wherever rank 0 is: waiting for an answer, or in a collective
                two.update(random_groups(1))
    assert nursery.ended(pid) == -signal.SIGKILL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_what_goes_wrong_on_another_rank_is_said_on_rank_0(nursery: Nursery, settings: Callable[..., Config]) -> None:
    with nursery.team() as (team, (pid,)):
        team.check(settings())
        two = Learner.of(settings(), team)
        team.channel.order("no such order")
        with pytest.raises(RankLost, match=r"rank 1 .* failed: AttributeError") as lost:
            two.update(random_groups(0))
    assert "Traceback" in lost.value.details and nursery.ended(pid) == 1
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_exception_on_rank_0_ends_the_others_silently(nursery: Nursery, settings: Callable[..., Config]) -> None:
    with pytest.raises(ZeroDivisionError), nursery.team() as (team, (pid,)):
        team.check(settings())
        Learner.of(settings(), team).update(random_groups(0))
        os.kill(pid, signal.SIGTERM)                     # torchrun stops all ranks; only rank 0 decides
        1 / 0                                            # noqa: B018
    assert nursery.ended(pid) == 0


def test_ranks_that_do_not_meet_in_time_are_named(nursery: Nursery, settings: Callable[..., Config]) -> None:
    with nursery.team() as (team, (pid,)):
        team.check(settings())
        two = Learner.of(settings(rank_timeout=0.5), team)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(EsplError, match=rf"rank 1 \(.*, process {pid}\) did not answer within 0.5 s"):
            two.update(random_groups(0))
        os.kill(pid, signal.SIGCONT)
    assert nursery.ended(pid) == 0


def fake(cost: float) -> MicroBatch:
    one = torch.ones(1)
    return MicroBatch({}, 2, cost, *(one,) * 6)


def test_shares_are_of_equal_cost_and_lose_nothing() -> None:
    batches = [fake(cost) for cost in (7.0, 5.0, 4.0, 3.0, 1.0)]
    shares = by_cost(batches, 2)
    assert [sum(b.cost for b in share) for share in shares] == [10.0, 10.0]
    assert sorted(b.cost for share in shares for b in share) == [1.0, 3.0, 4.0, 5.0, 7.0]
    assert by_cost(batches[:1], 3)[1:] == [[], []] and by_cost([], 2) == [[], []]


@pytest.mark.parametrize("packed", [False, True])
def test_an_update_is_cut_so_that_every_rank_has_as_much_to_do(packed: bool) -> None:
    sequences = training_sequences(random_groups(0, count=6, samples=8))
    whole = pack(sequences, Limits(10**6, packed=packed))
    for ranks in (2, 3, 4):
        batches = pack(sequences, Limits(10**6, packed=packed, share=ranks))
        spent = [sum(b.cost for b in share) for share in by_cost(batches, ranks)]
        assert (len(whole), len(batches)) == (1, ranks) and max(spent) < 1.2 * sum(spent) / ranks
        assert sum(len(b.targets) for b in batches) == len(whole[0].targets)
    assert len(pack(sequences[:1], Limits(10**6, packed=packed, share=4))) == 1


def test_rounds_are_as_long_on_every_rank_and_padding_weighs_nothing() -> None:
    shares = in_rounds([fake(cost) for cost in (7.0, 5.0, 4.0)], 2)
    assert [[b.cost for b in share] for share in shares] == [[7.0, 4.0], [5.0, 4.0]]
    assert [[b.sequences for b in share] for share in shares] == [[2, 2], [2, 0]]
    assert float(shares[1][1].weights.sum()) == 0 and in_rounds([], 2) == [[], []]


def test_a_fingerprint_sees_every_bit_and_every_place() -> None:
    tensors = [torch.randn(7, 3), torch.randn(5).bfloat16(), torch.arange(4), torch.tensor([True, False])]
    first = fingerprint(tensors)
    assert fingerprint([t.clone() for t in tensors]) == first
    changed = [tensors[0].clone(), *tensors[1:]]
    changed[0][2, 1] = torch.nextafter(changed[0][2, 1], torch.tensor(9.0))
    swapped = [tensors[0].clone(), *tensors[1:]]
    swapped[0][0], swapped[0][1] = tensors[0][1], tensors[0][0]
    assert first not in (fingerprint(changed), fingerprint(swapped), fingerprint(tensors[::-1]))


SAID = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "here",
    "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x", "ROLE_NAME": "d",
}  # fmt: skip


def test_what_torchrun_says_is_taken_out_of_the_environment() -> None:
    environ = {**SAID, "HOME": "/root"}
    assert Place.take(environ) == Place(1, 2, 1, 2, "here", 29500, True)
    assert environ == {"HOME": "/root"}
    alone = {**SAID, "WORLD_SIZE": "1"}
    assert Place.take(alone) is None and alone == {} and Place.take({}) is None
    with pytest.raises(EsplError, match="WORLD_SIZE is 2, but LOCAL_RANK is not set: start several"):
        Place.take({key: value for key, value in SAID.items() if key != "LOCAL_RANK"})


def card(rank: int, **changes: Any) -> dict[str, Any]:
    usual = {"rank": rank, "host": "a", "pid": rank, "ranks": 2, "gpus": 2, "gpu": "H100", "memory": 80 * 2**30}
    return {**usual, "torch": "2.13.0", "espl": "0.1.0", **changes}


@pytest.mark.parametrize(
    ("changes", "overrides", "sentence"),
    [
        ({"gpus": 1, "host": "b"}, {}, "b has 1 GPU for 2 ranks"),
        ({"gpus": 0, "host": "b"}, {}, "a has GPUs and b has none"),
        ({"gpu": "A100"}, {}, "has a H100 and rank 1 .a. has a A100"),
        ({"torch": "2.12.0"}, {}, "torch 2.13.0 and rank 1 .a. has torch 2.12.0"),
        ({"espl": "0.0.9"}, {}, "has espl 0.1.0 and rank 1"),
        ({}, {"model.device": "cuda:1"}, "one device for 2 ranks"),
        ({}, {"mode": "evolution"}, "2 ranks have nothing to share"),
    ],
)
def test_machines_that_do_not_fit_are_told_apart(
    changes: dict[str, Any], overrides: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(EsplError, match=sentence):
        topology.layout(load(overrides=overrides), {0: card(0), 1: card(1, **changes)})


def test_large_weights_are_sharded_where_they_may_be(settings: Callable[..., Config]) -> None:
    cards = {0: card(0), 1: card(1)}
    small = {rank: {**c, "memory": 2**15} for rank, c in cards.items()}
    auto = settings(engine="vllm").model_copy(update={"model": settings().model.model_copy(update={"device": "auto"})})
    assert not topology.layout(auto, cards).sharded and topology.layout(auto, small).sharded
    local = auto.model_copy(update={"engine": settings().engine})
    assert not topology.layout(local, small).sharded
    assert topology.layout(auto, small).rows()[0][1].startswith("2 on 1 machine, base weights sharded (FSDP2) over nc")


def test_the_local_engine_needs_whole_weights() -> None:
    with pytest.raises(ConfigError, match=r"learner\.parallel is fsdp, but engine\.kind is local"):
        load(overrides={"learner.parallel": "fsdp"})


SMALL = {
    "tensorboard": "no", "rollout.problems": "4", "rollout.samples": "4", "rollout.prompts": "2",
    "evaluation.every": "0", "evaluation.problems": "2", "evaluation.test_problems": "2",
    "learner.micro_batch_tokens": "256", "model.device": "cpu",
}  # fmt: skip
FIGURES = ("reward/mean", "loss", "grad_norm", "tokens", "version", "entropy")


def train(*words: str) -> None:
    assert main(["--quiet", *words]) == 0


def test_torchrun_trains_what_one_process_trains_and_one_process_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [f"--{key}={value}" for key, value in SMALL.items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "espl_train", *small, "--steps", "2", "--out", str(tmp_path / "two"), "--quiet"],
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )  # fmt: skip
    assert done.returncode == 0 and "best system prompt" in done.stdout, done.stderr
    train(*small, "--steps", "2", "--out", str(tmp_path / "one"))
    ours, theirs = (list(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("two", "one"))
    assert [r["step"] for r in ours] == [0, 1, 2]
    for mine, other in zip(ours, theirs, strict=True):
        shared = {key: value for key, value in other.items() if key.rpartition("/")[2] in FIGURES}
        assert {key: mine[key] for key in shared} == pytest.approx(shared, rel=1e-4, abs=1e-6)
    train("--resume", str(tmp_path / "two"), "--steps", "3")
    assert [r["step"] for r in read_lines(tmp_path / "two" / "metrics.jsonl")] == [0, 1, 2, 3]
    assert "best system prompt" in capsys.readouterr().out
