"""Shared fixtures: where the real task data lies, a Docker daemon with our images, a fixed environment for every test.

What a machine lacks is a skip with a reason; named in ESPL_REQUIRE (data, docker, vllm, ray, browser; commas between),
a failure.
"""

from __future__ import annotations

import asyncio
import os
import signal
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import docker_kit
import pytest

from espl_envs.core.errors import EsplError
from espl_envs.sandbox import engine, images
from espl_envs.sandbox.base import SandboxUnavailable
from espl_envs.sandbox.bubblewrap import Bubblewrap, BubblewrapWarning
from espl_envs.sandbox.docker import Docker

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ESPL_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "espl"))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:      # begun in the background of a shell: let Ctrl-C be tested
    signal.signal(signal.SIGINT, signal.default_int_handler)

MIRROR = Path(os.environ.get("ESPL_DATA_DIR") or Path(__file__).resolve().parents[2] / "shared" / "data")


def lacking(requirement: str, why: str) -> NoReturn:
    """Skip, or fail where the requirement is named in ESPL_REQUIRE."""
    if requirement in os.environ.get("ESPL_REQUIRE", "").split(","):
        pytest.fail(f"ESPL_REQUIRE names {requirement}, but {why}")
    pytest.skip(why)


@pytest.fixture(scope="session")
def mirror() -> Path:
    """The local mirror of real task data; tests that need it skip where there is none."""
    if not (MIRROR / "math").is_dir():
        lacking("data", f"there is no task data in {MIRROR}: set ESPL_DATA_DIR to a local mirror")
    return MIRROR


@pytest.fixture
def data_dir(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The mirror, and ESPL_DATA_DIR pointing at it."""
    monkeypatch.setenv("ESPL_DATA_DIR", str(mirror))
    return mirror


@pytest.fixture
def tables_anew() -> Iterator[None]:
    """Tables are read once per process; for tests that move the mirror."""
    from espl_envs.tasks.datasets import forget_tables

    forget_tables()
    yield
    forget_tables()


@pytest.fixture(scope="session")
def shared_vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """vLLM over a tiny model, see `vllm_kit.Shared`."""
    if find_spec("vllm") is None:
        lacking("vllm", "vLLM is not installed here: `make vllm` sets up an environment that has it")
    import vllm_kit

    shared = vllm_kit.Shared(tmp_path_factory.mktemp("vllm") / "model")
    yield shared
    shared.close()


@pytest.fixture(scope="session")
def shared_replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two replicas of vLLM in Ray actors, see `vllm_kit.Shared`."""
    if find_spec("vllm") is None or find_spec("ray") is None:
        lacking("ray", "vLLM and Ray are not installed here: `make vllm` sets up an environment that has them")
    import vllm_kit

    shared = vllm_kit.Shared(tmp_path_factory.mktemp("replicas") / "model", replicas=2)
    yield shared
    shared.close()


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[Any]:
    """docker-py's client of a daemon that has the images of the boxes; they are built where they are missing."""
    try:
        client = engine.client(timeout=1800)
        images.build_all(client=client)
    except EsplError as error:
        lacking("docker", str(error))
    yield client
    client.close()


@pytest.fixture
def docker_provider(docker_engine: Any) -> Docker:
    """The provider `docker`, ready to make boxes of the images `python` and `terminal`."""
    docker_kit.begin(docker_engine)
    return Docker()


@pytest.fixture(scope="session")
def bubblewrap_provider() -> Bubblewrap:
    """The provider `bubblewrap`, probed. Where Docker may not be missing, neither may this."""
    provider = Bubblewrap()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BubblewrapWarning)
            asyncio.run(provider.probe())
    except SandboxUnavailable as error:
        lacking("docker", str(error))
    return provider
