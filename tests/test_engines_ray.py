"""Several vLLMs in Ray actors: they are one engine, and none serves what one of them does not.

What every engine keeps, these keep too: `test_engines_conformance.py`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from engine_kit import World, request
from vllm_kit import Shared, trained

from espl_envs.core.errors import EsplError
from espl_train.engines.adapters import Adapter
from espl_train.engines.base import EngineError, Sample
from espl_train.engines.routing import BEGINNING

pytestmark = pytest.mark.vllm


@pytest.fixture
def world(shared_replicas: Shared) -> World:
    return shared_replicas.world()


def pids(world: World) -> list[int]:
    return [server.do(lambda core: core.pid) for server in world.engine._servers]


def test_every_replica_is_a_process_of_its_own_and_has_work(world: World) -> None:
    assert len({os.getpid(), *pids(world)}) == 3
    taken: list[int] = []

    async def everything() -> None:
        tasks = [asyncio.create_task(world.engine.sample(request([i, *range(2, 9)], seed=i))) for i in range(2, 42)]
        await asyncio.sleep(0)
        taken.extend(server.load for server in world.engine._servers)
        await asyncio.gather(*tasks)

    asyncio.run(everything())
    assert sum(taken) == 40 and max(taken) <= 25


def test_turns_of_one_episode_go_to_one_replica_and_it_is_forgotten_when_it_ends(world: World) -> None:
    asked: list[int] = []
    for number, server in enumerate(world.engine._servers):
        ask = server.ask
        server.ask = lambda what, number=number, ask=ask: (asked.append(number), ask(what))[1]
    try:
        for turn in range(6):
            world.ask(request([2 + turn] * (BEGINNING // 2), max_new=2, session="episode"))
        assert len(set(asked)) == 1 and world.engine._router._sessions
        world.engine.release("episode")
        assert not world.engine._router._sessions
    finally:
        for server in world.engine._servers:
            del server.ask


def test_a_version_that_one_replica_lacks_is_served_by_none(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from espl_train.engines.vllm_ray import Remote

    version = trained(world.policy)
    load = Remote.load
    monkeypatch.setattr(Remote, "load", lambda self, adapter: self._number == 1 or load(self, adapter))
    with pytest.raises(EngineError, match="replica 1 of vLLM: policy 1 is not loaded"):
        world.engine.load_policy(version)
    for tokens in range(2, 12):
        with pytest.raises(EngineError, match="policy None is loaded"):
            world.ask(request([tokens] * 8, policy=version))
    monkeypatch.undo()
    world.engine.load_policy(version)
    assert world.ask(request(policy=version))[0].policy == version


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_replica_with_other_weights_is_found_out_and_named(
    world: World, wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from safetensors.torch import load, save

    from espl_train.engines.vllm_ray import Remote

    version, original = trained(world.policy), Remote.load

    def other(remote: Remote, adapter: Adapter) -> None:
        """One of them gets the weights of the base model under the new version's name."""
        if remote._number != wrong:
            original(remote, adapter)
            return
        files = dict(ray.get(remote._fleet.packed(adapter)))
        tensors = load(files["adapter_model.safetensors"])
        files["adapter_model.safetensors"] = save({name: value * 0 for name, value in tensors.items()})
        remote._ask("load", adapter.version, files)

    monkeypatch.setattr(Remote, "load", other)
    said = f"replica {wrong} of vLLM: the engine does not serve policy 1: .*those of the base model"
    with pytest.raises(EngineError, match=said):
        world.engine.load_policy(version)
    with pytest.raises(EngineError, match="policy None is loaded"):
        world.ask(request(policy=version))


def test_a_replica_that_dies_fails_its_requests_and_is_replaced_and_proven(world: World) -> None:
    asked = [request([2 + i] * 9, seed=i, max_new=50, stop_ids=()) for i in range(12)]
    before = world.ask(*asked)

    async def everything() -> list[Sample | BaseException]:
        tasks = [asyncio.create_task(world.engine.sample(one)) for one in asked]
        await asyncio.sleep(0)
        os.kill(first, signal.SIGKILL)
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second = pids(world)
    found = asyncio.run(everything())
    failed = [str(one) for one in found if isinstance(one, EngineError)]
    assert failed and all(one.startswith("replica 0 of vLLM is gone") for one in failed)
    assert all(one.tokens == was.tokens for one, was in zip(found, before, strict=True) if isinstance(one, Sample))
    assert len(failed) < len(found), "the other replica goes on"
    assert [one.tokens for one in world.ask(*asked)] == [one.tokens for one in before]
    assert pids(world)[0] != first and pids(world)[1] == second


def test_a_replica_that_dies_while_weights_are_loaded_is_replaced(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from espl_train.engines.vllm_ray import Remote

    version, original, killed = trained(world.policy), Remote.load, [0]

    def die(remote: Remote, adapter: Adapter) -> None:
        if remote._number == 1 and len(killed) <= deaths:
            killed.append(remote.pid)
            os.kill(remote.pid, signal.SIGKILL)
        original(remote, adapter)

    monkeypatch.setattr(Remote, "load", die)
    deaths = 1
    world.engine.load_policy(version)
    assert len(killed) == 2 and killed[1] not in pids(world)
    samples = world.ask(*(request([2 + i] * 8, policy=version) for i in range(8)))
    assert {sample.policy for sample in samples} == {version}
    deaths = 3
    with pytest.raises(EngineError, match="replica 1 of vLLM is gone"):
        world.engine.load_policy(trained(world.policy))
    monkeypatch.undo()
    world.engine.load_policy(world.policy.version)


def listening() -> set[str]:
    """Local addresses that are listened at, as the kernel writes them."""
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1] for row in rows if row[3] == "0A"}


class TestAlone:
    """Fleets of their own, one at a time."""

    @pytest.fixture(autouse=True)
    def shared(self, shared_replicas: Shared) -> Shared:
        shared_replicas.close()
        return shared_replicas

    def test_it_listens_on_loopback_only_leaves_signals_alone_and_nothing_behind(self, shared: Shared) -> None:
        folders, before = set(Path(tempfile.gettempdir()).glob("espl-ray-*")), listening()
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        engine = shared.start()
        try:
            new = listening() - before
            assert new and {address.rpartition(":")[0] for address in new} <= {
                "0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000",
            }
            assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
            (folder,) = set(Path(tempfile.gettempdir()).glob("espl-ray-*")) - folders
            assert folder.stat().st_mode & 0o777 == 0o700
            workers = [server.do(lambda core: core.pid) for server in engine._servers]
        finally:
            engine.close()
        assert not folder.exists() and not (Path.home() / ".ray" / "auth_token").exists()
        assert not any(alive(pid) for pid in workers)

    def test_what_cannot_be_set_up_is_one_sentence(self, shared: Shared) -> None:
        with pytest.raises(EsplError, match=r"vLLM cannot be set up for .* engine.kv_gb and engine.context decide"):
            shared.start(kv_gb=1e-6)
        shared.replicas = 10_000
        try:
            with pytest.raises(EsplError, match=r"engine\.replicas is 10000, but Ray has"):
                shared.start()
        finally:
            shared.replicas = 2

    def test_all_of_it_ends_with_an_owner_that_is_killed(self) -> None:
        with subprocess.Popen([sys.executable, "-c", OWNER, str(Path(__file__).parent)], stdout=subprocess.PIPE,
                              text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as owner:
            assert owner.stdout is not None
            processes = [int(word) for word in owner.stdout.readline().split()]
            assert len(processes) == 2 and all(map(alive, processes))
            owner.kill()
        until = time.monotonic() + 60
        while any(map(alive, processes)) and time.monotonic() < until:
            os.sched_yield()
        assert not any(map(alive, processes))

    def test_a_run_is_trained_and_continued(self, tmp_path: Path) -> None:
        from test_engines_vllm import RUN

        run = str(tmp_path / "run")
        settings = {**RUN, "steps": 2, "out": run, "engine.kind": "vllm", "engine.replicas": 2}
        for words in ([f"--{key}={value}" for key, value in settings.items()], ["--resume", run, "--steps=3"]):
            done = subprocess.run([sys.executable, "-m", "espl_train", *words], check=False, capture_output=True,
                                  text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=400)
            assert done.returncode == 0, done.stderr
            assert done.stderr == ""
        assert "step 3/3" in done.stdout


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


OWNER = """
import sys, tempfile, time
from pathlib import Path
if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    from vllm_kit import Shared
    with tempfile.TemporaryDirectory() as folder:
        engine = Shared(Path(folder), replicas=2).start()
        print(*(server.do(lambda core: core.pid) for server in engine._servers), flush=True)
        time.sleep(600)
"""
