"""What an evaluation is about: environments, agent, samples, prompts, prices. Everything that decides its numbers.

`config.json` of a run directory is an `EvalConfig`. It names the data of every environment by hash, so that results
are never compared across different tasks unawares, and it never holds a credential.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

from espl_envs.core.errors import EsplError
from espl_envs.evaluate.records import EpisodeKey

FORMAT = 1
MOST_EPISODES = 5_000_000       # their keys are held in memory


@dataclass(frozen=True, slots=True)
class EnvConfig:
    """One environment of a run: the first `tasks` tasks of a split that has `size` of them and this content hash."""

    id: str
    split: str
    tasks: int
    size: int
    data_hash: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """Who plays. kind: "callable", "endpoint", "command", "run", "model", "builtin". name: what tables call it.
    settings: whatever else decides its behaviour (temperature, max_tokens, the command), JSON-able, no credentials.
    files: what it is made of, with digests (`fingerprint`). changed: it was played with other files before, and the
    user said that it is the same agent."""

    kind: str
    name: str
    model: str | None = None
    base_url: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    changed: bool = False

    def __post_init__(self) -> None:
        if self.base_url is not None:
            object.__setattr__(self, "base_url", without_credentials(self.base_url))


@dataclass(frozen=True, slots=True)
class Prices:
    """Money per million tokens."""

    prompt: float
    completion: float
    currency: str = "USD"

    def cost(self, prompt_tokens: int | None, completion_tokens: int | None) -> float | None:
        """Of one call; None where a count is unknown."""
        if prompt_tokens is None or completion_tokens is None:
            return None
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """A whole evaluation.

    k: samples per task. limit: what the user asked for (`EnvConfig.tasks` says what came of it). system_prompts: full
    texts; empty means the environments' own. suite: the version of this package. started: UTC, ISO 8601.
    """

    envs: tuple[EnvConfig, ...]
    agent: AgentConfig
    k: int = 1
    limit: int | None = None
    system_prompts: tuple[str, ...] = ()
    seed: int = 0
    prices: Prices | None = None
    suite: str = ""
    started: str = ""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise EsplError(f"k is {self.k}, expected at least 1 sample per task")
        pairs = [(env.id, env.split) for env in self.envs]
        if twice := sorted({pair for pair in pairs if pairs.count(pair) > 1}):
            raise EsplError(f"{twice[0][0]} ({twice[0][1]}) is named twice: a run evaluates an environment once")
        if self.expected() > MOST_EPISODES:
            raise EsplError(f"that makes {self.expected():,} episodes, a run holds {MOST_EPISODES:,} at most: fewer "
                            "samples (-k), tasks (--limit) or system prompts")

    def keys(self, env: EnvConfig | None = None) -> Iterator[EpisodeKey]:
        """Every episode that belongs to the run (or to one of its environments), samples of a task together."""
        for one in self.envs if env is None else (env,):
            for prompt in range(max(1, len(self.system_prompts))):
                for task in range(one.tasks):
                    for sample in range(self.k):
                        yield EpisodeKey(one.id, one.split, task, sample, prompt)

    def expected(self, env: EnvConfig | None = None) -> int:
        """How many keys there are."""
        tasks = sum(one.tasks for one in self.envs) if env is None else env.tasks
        return tasks * self.k * max(1, len(self.system_prompts))

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """Read what `to_json` wrote; `where` names the file in errors. Raises EsplError for anything else."""
        try:
            raw = json.loads(text)
            version = raw.pop("format")
            if version != FORMAT:
                raise EsplError(f"{where} has format {version}, this version reads {FORMAT}: evaluate anew or update")
            raw["envs"] = tuple(EnvConfig(**env) for env in raw["envs"])
            raw["agent"] = AgentConfig(**raw["agent"])
            raw["system_prompts"] = tuple(raw["system_prompts"])
            raw["prices"] = raw["prices"] and Prices(**raw["prices"])
            return cls(**raw)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise EsplError(f"{where} is no configuration of espl-eval ({type(error).__name__}: {error})") from error

    def differences(self, other: EvalConfig) -> dict[str, tuple[Any, Any]]:
        """What decides the numbers and is not the same: dotted field → (here, there), None where it is absent. Of
        environments that only one of them has, the names."""
        here, there = _decisive(self), _decisive(other)
        shared = here["envs"].keys() & there["envs"].keys()
        for one in (here, there):
            one["environments"] = ", ".join(sorted(one["envs"]))
            one["envs"] = {name: env for name, env in one["envs"].items() if name in shared}
        here, there = _flat(here), _flat(there)
        names = dict.fromkeys([*here, *there])
        return {name: (here.get(name), there.get(name)) for name in names if here.get(name) != there.get(name)}

    def pardoned(self, other: EvalConfig) -> EvalConfig:
        """This evaluation with the agent's files as `other` has them, and a note that they were others before."""
        if self.agent.files == other.agent.files:
            return self
        return replace(self, agent=replace(self.agent, files=other.agent.files, changed=True))

    def grows_into(self, other: EvalConfig) -> bool:
        """Whether `other` is this evaluation with more samples or more tasks: what is there already stays valid."""
        if set(self.differences(other)) - {"k", "limit"} - {f"envs.{env.id} ({env.split}).tasks" for env in self.envs}:
            return False
        theirs = {(env.id, env.split): env.tasks for env in other.envs}
        return other.k >= self.k and all(env.tasks <= theirs[env.id, env.split] for env in self.envs)


def without_credentials(url: str) -> str:
    """A URL without user, password, query and fragment: all the places where a key may stand."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _decisive(config: EvalConfig) -> dict[str, Any]:
    """Without what changes no number, the environments by name."""
    raw = json.loads(config.to_json())
    for name in ("format", "started", "prices"):
        del raw[name]
    del raw["agent"]["changed"]
    raw["envs"] = {f"{env.pop('id')} ({env['split']})": env for env in raw["envs"]}
    raw["system_prompts"] = dict(enumerate(raw["system_prompts"]))
    return raw


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or (name and not value):
        return {name: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}.{key}" if name else str(key)).items()}
