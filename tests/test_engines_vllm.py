"""What vLLM as an engine keeps beyond the conformance suite: nothing is served that was not proven.

The mutants here are faults that vLLM itself does not report: it samples fluently from the wrong weights.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_kit import World, request
from learner_kit import shake
from vllm_kit import Shared, edited, trained

from espl_envs.core.errors import EsplError
from espl_train.engines import vllm_core
from espl_train.engines.adapters import Adapter, AdapterStore
from espl_train.engines.base import EngineError, Sample
from espl_train.learner.policy import Policy

pytestmark = pytest.mark.vllm
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def world(shared_vllm: Shared) -> World:
    return shared_vllm.world()


def drop_adapter(patch: pytest.MonkeyPatch) -> None:
    core, add = vllm_core.Core, vllm_core.Core.add
    patch.setattr(core, "add", lambda self, key, asked: add(self, key, replace(asked, policy=None)))


def rename_prefix(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Policy, "save_adapter", edited(
        lambda tensors: {key.replace(".model.layers.", ".decoder.layers."): value for key, value in tensors.items()}
    ))


def lose_a_layer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Policy, "save_adapter", edited(
        lambda tensors: {key: value for key, value in tensors.items() if ".layers.1." not in key}
    ))


def write_before_training(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Policy, "save_adapter", edited(
        lambda tensors: {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in tensors.items()}
    ))


def scale_wrongly(patch: pytest.MonkeyPatch) -> None:
    original = Policy.save_adapter

    def save(policy: Policy, folder: Path) -> None:
        original(policy, folder)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 16}))

    patch.setattr(Policy, "save_adapter", save)


def reuse_name_and_id(patch: pytest.MonkeyPatch) -> None:
    """What `load_inplace` is for, and what vLLM does without it: an id that it knows is not loaded again."""
    publish = AdapterStore.publish

    def same(store: AdapterStore, version: int, save: Callable[[Path], None]) -> Adapter:
        return replace(publish(store, version, save), id=1)

    patch.setattr(AdapterStore, "publish", same)
    patch.setattr(vllm_core.Core, "unload", lambda _: None)


def never_load(patch: pytest.MonkeyPatch) -> None:
    """The new version's requests go to the adapter that is there."""
    def keep(core: vllm_core.Core, adapter: Adapter) -> None:
        before = core._adapter
        core._adapter = replace(before, version=adapter.version) if before else adapter

    patch.setattr(vllm_core.Core, "load", keep)


BREAKS = [drop_adapter, rename_prefix, lose_a_layer, write_before_training, scale_wrongly]


@pytest.mark.parametrize("fault", [*BREAKS, never_load], ids=lambda fault: fault.__name__)
def test_a_version_that_does_not_arrive_is_not_served(
    world: World, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = trained(world.policy)
    fault(monkeypatch)
    with pytest.raises(EngineError, match="does not serve policy 1"):
        world.engine.load_policy(version)
    with pytest.raises(EngineError, match="policy None is loaded"):
        world.ask(request(policy=version))
    monkeypatch.undo()
    world.engine.load_policy(version)
    assert world.ask(request(policy=version))[0].policy == version


def test_an_adapter_under_a_known_name_is_found_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.engine._servers[0].do(vllm_core.Core.unload)
    reuse_name_and_id(monkeypatch)
    world.engine.load_policy(trained(world.policy))              # id 1 is new here
    with pytest.raises(EngineError, match="they are those of policy 1"):
        world.engine.load_policy(trained(world.policy, seed=2))


def test_one_small_step_that_does_not_arrive_is_found_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    version = trained(world.policy, 4e-6)                        # less than an average difference of 1e-4
    never_load(monkeypatch)
    with pytest.raises(EngineError, match=r"change against policy 0 -?\d+% arrived"):
        world.engine.load_policy(version)
    monkeypatch.undo()
    world.engine.load_policy(version)
    assert world.engine.last_sync.distance < 1e-4


def test_engine_and_learner_agree_to_rounding(world: World) -> None:
    world.engine.load_policy(trained(world.policy))
    assert world.engine.last_sync.distance < 1e-5


def test_weights_that_are_served_already_are_not_loaded_again(world: World) -> None:
    before = world.engine.last_sync
    world.engine.load_policy(0)
    assert world.engine.last_sync is before
    shake(world.policy, 0.1, seed=3)                             # other weights, same version
    world.engine.load_policy(0)
    assert world.engine.last_sync is not before
    assert world.ask(request())[0].logprobs == pytest.approx(
        world.expected(request(), world.ask(request())[0]), abs=1e-5
    )


def test_weights_do_not_change_under_requests(world: World) -> None:
    async def everything() -> Sample:
        task = asyncio.create_task(world.engine.sample(request(max_new=50, stop_ids=())))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="under way"):
            world.engine.load_policy(version)
        return await task

    version = trained(world.policy)
    assert asyncio.run(everything()).policy == 0


def test_a_short_turn_never_waits_for_a_long_one(world: World) -> None:
    async def everything() -> int:
        long = asyncio.create_task(world.engine.sample(request(max_new=50, stop_ids=())))
        tokens, turns = (2, 3, 4), 0
        while not long.done() and turns < 8:
            sample = await world.engine.sample(request(tokens, seed=turns, max_new=2, stop_ids=()))
            tokens, turns = tokens + sample.tokens, turns + 1
        assert not long.done()
        await long
        return turns

    assert asyncio.run(everything()) == 8


def test_a_shared_prefix_is_computed_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = world.engine._servers[0].core._engine.engine_core.engine_core.scheduler
    schedule, computed = scheduler.schedule, []
    monkeypatch.setattr(scheduler, "schedule", lambda *given: count(schedule(*given)))

    def count(output: Any) -> Any:
        computed.append(output.total_num_scheduled_tokens)
        return output

    prompt = range(2, 50)
    world.ask(request([*prompt, 3], max_new=1))
    first, computed[:] = sum(computed), []
    world.ask(request([*prompt, 4], max_new=1))
    assert first == 49 and sum(computed) == 49 - vllm_core.CPU_BLOCK
    computed.clear()
    world.ask(request([*prompt, 5], max_new=1, policy=None))      # of other weights: nothing to share
    assert sum(computed) == 49


def test_more_prompts_than_one_step_takes_are_sampled_all_the_same(world: World) -> None:
    prompts = [[2 + i % 50, 2 + i // 50, *range(5, 58)] for i in range(100)]
    asked = [request(tokens, seed=i, max_new=4, stop_ids=()) for i, tokens in enumerate(prompts)]
    assert sum(map(len, prompts)) > vllm_core.CPU_PREFILL
    for one, sample in zip(asked[::9], world.ask(*asked)[::9], strict=True):
        assert sample.logprobs == pytest.approx(world.expected(one, sample), abs=1e-5)
        assert world.ask(one)[0].tokens == sample.tokens


def test_a_request_that_vllm_refuses_harms_no_other(world: World) -> None:
    async def everything() -> list[Sample | BaseException]:
        asked = [request(seed=1), request([2, 10**6]), request(seed=2)]
        return await asyncio.gather(*map(world.engine.sample, asked), return_exceptions=True)

    one, refused, other = asyncio.run(everything())
    assert isinstance(refused, EngineError) and "vLLM refuses" in str(refused)
    assert isinstance(one, Sample) and isinstance(other, Sample)


def test_cancelled_requests_are_aborted(world: World) -> None:
    async def everything() -> None:
        tasks = [asyncio.create_task(world.engine.sample(request(max_new=60, stop_ids=(), seed=i))) for i in range(4)]
        await world.engine.sample(request(max_new=2, stop_ids=()))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await world.engine.sample(request(max_new=1))
        assert not world.engine._servers[0]._running

    asyncio.run(everything())
    assert not world.engine._servers[0].core._engine.has_unfinished_requests()


def test_an_engine_that_breaks_is_built_again_and_proven(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(max_new=8, stop_ids=())
    (before,) = world.ask(asked)
    broken = world.engine._servers[0].core

    def step(*_: Any) -> None:
        raise RuntimeError("CUDA error: out of luck")

    monkeypatch.setattr(broken, "step", step)
    with pytest.raises(EngineError, match="out of luck"):
        world.ask(asked)
    assert world.ask(asked)[0].tokens == before.tokens
    assert world.engine._servers[0].core is not broken


def test_what_was_put_to_sleep_is_proven_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleep itself needs a GPU; that a sleeper which comes back damaged is found out does not."""
    slept: list[str] = []
    monkeypatch.setattr(type(world.engine), "concurrent", False)
    monkeypatch.setattr(vllm_core.Core, "sleep", lambda _, how: slept.append(how))
    world.engine.pause()
    world.engine.pause()
    trained(world.policy)                                        # the learner has moved on meanwhile
    world.engine.resume()
    world.engine.resume()
    assert slept == ["sleep"]
    assert world.ask(request())[0].policy == 0
    world.engine.pause()
    drop_adapter(monkeypatch)
    with pytest.raises(EngineError, match="does not serve policy 0"):
        world.engine.resume()


def test_only_what_is_served_is_kept_on_disk(world: World) -> None:
    for seed in range(3):
        world.engine.load_policy(trained(world.policy, seed=seed))
    folder = world.engine._adapters.folder
    assert [path.name for path in folder.iterdir() if path.is_dir()] == [world.engine._adapter.name]
    assert "policy-000003" in world.engine._adapter.name


class TestAlone:
    """Engines of their own, one at a time: vLLM's distributed state is the process's."""

    @pytest.fixture(autouse=True)
    def shared(self, shared_vllm: Shared) -> Shared:
        shared_vllm.close()
        return shared_vllm

    @pytest.mark.parametrize("fault", BREAKS, ids=lambda fault: fault.__name__)
    def test_the_start_up_test_needs_no_training_to_find_a_fault(
        self, shared: Shared, fault: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fault(monkeypatch)
        state = shared.policy.state()
        with pytest.raises(EngineError, match="does not serve the trial adapter"):
            shared.start()
        assert all(torch.equal(value, state[name]) for name, value in shared.policy.state().items())

    def test_log_probabilities_without_the_temperature_are_found_out(
        self, shared: Shared, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(vllm_core, "LOGPROBS", "raw_logprobs")
        with pytest.raises(EngineError, match=r"at temperature 0\.7 .* those of temperature 1"):
            shared.start()

    def test_an_adapter_that_reaches_the_base_model_is_found_out(
        self, shared: Shared, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rooms = vllm_core._lora
        monkeypatch.setattr(vllm_core, "_lora", lambda *given: {**rooms(*given), "max_loras": 1})
        with pytest.raises(EngineError, match="does not serve the base model"):
            shared.start()

    def test_other_base_weights_than_the_learners_are_found_out(self, shared: Shared, tmp_path: Path) -> None:
        other = Shared(tmp_path / "other", seed=1)
        with pytest.raises(EngineError, match="does not serve the base model"):
            shared.start(other.model)

    def test_memory_too_small_for_one_sequence_is_a_sentence(self, shared: Shared) -> None:
        with pytest.raises(EsplError, match=r"vLLM cannot be set up for .* engine.kv_gb and engine.context decide"):
            shared.start(kv_gb=1e-6)

    def test_bfloat16_agrees_within_its_rounding(self, tmp_path: Path) -> None:
        half = Shared(tmp_path / "half", dtype="bfloat16", initializer_range=0.01)
        engine = half.start()
        try:
            engine.load_policy(trained(half.policy, 0.02))
            assert engine.last_sync.distance < 0.02
        finally:
            engine.close()
        assert not engine._adapters.folder.exists()

    def test_a_run_that_was_killed_ends_as_the_one_that_was_not(self, tmp_path: Path) -> None:
        from test_loop_resume import contents, play, same

        from espl_train.runs.console import Console
        from espl_train.runs.directory import RunDirectory
        from espl_train.settings import load

        settings = {**RUN, "engine.kind": "vllm"}
        whole, broken = tmp_path / "whole", tmp_path / "broken"
        play(RunDirectory.create(load(overrides={**settings, "out": str(whole)})), Console(quiet=True))
        command = [f"--{key}={value}" for key, value in {**RUN, "out": broken}.items()]
        died = subprocess.run([sys.executable, "-c", KILLED, "--engine", "vllm", *command], check=False,
                              capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert died.returncode == -signal.SIGKILL, died.stderr
        play(RunDirectory.open(broken), Console(quiet=True))
        ends = contents(whole), contents(broken)
        assert ends[0]["step"] == 3 and ends[0].keys() == ends[1].keys()
        for name in ends[0]:
            assert same(ends[0][name], ends[1][name]), name

    def test_an_engine_in_its_own_process_dies_with_an_owner_that_is_killed(self) -> None:
        """It goes first, its worker follows; none of them is left with init for a parent."""
        with subprocess.Popen([sys.executable, "-c", OWNER, str(Path(__file__).parent)], stdout=subprocess.PIPE,
                              text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as owner:
            assert owner.stdout is not None
            engine = int(owner.stdout.readline())
            watched = os.pidfd_open(engine)
            assert Path(f"/proc/{engine}").exists()
            owner.kill()
            assert select.select([watched], [], [], 60)[0]
            os.close(watched)


OWNER = """
import sys, tempfile, time
from pathlib import Path
if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import torch
    from vllm_kit import Shared
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        engine = Shared(Path(folder)).start()
    (process,) = engine._servers[0].core._engine.engine_core.resources.engine_manager.processes
    print(process.pid, flush=True)
    time.sleep(600)
"""
RUN = {
    "steps": 3, "tensorboard": "false", "rollout.problems": 4, "rollout.samples": 4, "rollout.prompts": 2,
    "evaluation.every": 2, "evaluation.problems": 4, "evaluation.test_problems": 4, "learner.learning_rate": 1e-3,
    "engine.kv_gb": 0.1, "keep_checkpoints": 9,
}
KILLED = """
import os, signal, sys
from espl_train import cli, loop
checkpoint = loop.Trainer._checkpoint
def once(trainer):
    checkpoint(trainer)
    if trainer.step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
loop.Trainer._checkpoint = once
sys.exit(cli.main(sys.argv[1:]))
"""
