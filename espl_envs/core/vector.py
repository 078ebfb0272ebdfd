"""Many text environments at once, on one event loop: lock-step, a few of them, or each at its own pace.

    envs = gym.make_vec("espl/GSM8K-v0", num_envs=64)          # same-step autoreset: final_obs, final_info
    envs.reset(seed=0)
    obs, rewards, terminated, truncated, infos = envs.step(replies)          # all 64
    obs, rewards, terminated, truncated, infos = envs.step({3: "…"})         # one: five dicts by index

    async for i, transition in envs.run({"task": t} for t in range(1000)):   # nobody waits for the slowest
        envs.send(i, await agent(transition.obs))

All steps happen on the environments' own loop (`core.background`), so what they share (sandboxes, graders) is shared,
and the caller may be blocking code or any other loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from espl_envs.core import background
from espl_envs.core.env import Info
from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Conversation, Message

T = TypeVar("T")
Reply = str | Message
Options = Mapping[str, Any]
Batch = tuple[tuple[Conversation, ...], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]
Some = tuple[
    dict[int, Conversation], dict[int, float], dict[int, bool], dict[int, bool], dict[int, Info]
]


@dataclass(frozen=True, slots=True)
class Transition:
    """What one environment did. After the end of an episode `obs` and `info` are the next episode's first (empty where
    there is none), and `final_obs` and `final_info` what the old one ended with; None before."""

    obs: Conversation
    reward: float
    terminated: bool
    truncated: bool
    info: Info
    final_obs: Conversation | None = None
    final_info: Info | None = None

    @property
    def over(self) -> bool:
        """Whether an episode ended with this transition."""
        return self.terminated or self.truncated


class TextVectorEnv(VectorEnv[Any, Any, Any]):
    """`num_envs` environments made by `make`, which returns a `TextEnv` or a wrapper of one that can be awaited.

    Autoreset happens in the same step. Observations and actions are tuples, one entry per environment; rewards
    (num_envs,) float64; terminations and truncations (num_envs,) bool; infos in Gymnasium's form, one array and one
    mask `_key` per key, with `final_obs` and `final_info` where an episode ended.

    `step_deadline`: seconds that a step may take. One that takes longer is cancelled and truncates its episode with
    `stop_reason` deadline; the others do not notice. Faults raise or mask as the environments' `on_fault` says; through
    `gym.make_vec` the default is "mask", because one broken episode should not cost the others.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012
    envs: tuple[Any, ...] = ()      # also where the construction failed: Gymnasium closes those too

    def __init__(
        self, make: Callable[[], Any], num_envs: int = 1, *, step_deadline: float | None = None
    ) -> None:
        if num_envs < 1:
            raise EsplError(f"num_envs is {num_envs}, expected at least 1")
        if step_deadline is not None and not step_deadline > 0:
            raise EsplError(f"step_deadline is {step_deadline}, expected more than 0 seconds")
        self.num_envs = num_envs
        self.step_deadline = step_deadline
        self.envs = tuple(make() for _ in range(num_envs))
        first = self.envs[0]
        self.render_mode = first.render_mode
        self.single_observation_space = first.observation_space
        self.single_action_space = first.action_space
        self.observation_space = batch_space(first.observation_space, num_envs)
        self.action_space = batch_space(first.action_space, num_envs)
        self._infos: list[Info | None] = [None] * num_envs
        self._running: _FreeRun | None = None

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Options | Sequence[Options] | None = None
    ) -> tuple[tuple[Conversation, ...], dict[str, Any]]:
        """Start an episode everywhere. A single seed gives environment i `seed + i`; a single `options` is for all."""
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else self._each("seed", seed)
        choices = self._each("options", [options] * self.num_envs if isinstance(options, Mapping) else options)
        starts = [self._start(i, seeds[i], choices[i]) for i in range(self.num_envs)]
        begun = background.run(_together(starts))
        infos: dict[str, Any] = {}
        for i, (_, info) in enumerate(begun):
            infos = self._add_info(infos, info, i)
        return tuple(obs for obs, _ in begun), infos

    def step(self, actions: Sequence[Reply] | Mapping[int, Reply]) -> Any:
        """Play one reply everywhere, or only where the mapping says; then five dicts by index come back, and an ended
        episode's last observation and info stand in its info under `final_obs` and `final_info`.

        Raises ResetNeeded before the first reset, EsplError for a wrong number of replies or an index out of range.
        """
        chosen = actions if isinstance(actions, Mapping) else dict(enumerate(self._each("actions", actions)))
        if outside := [i for i in chosen if not 0 <= i < self.num_envs]:
            raise EsplError(f"there is no environment {outside[0]}; indices: 0..{self.num_envs - 1}")
        done = background.run(_together([self._play(i, action) for i, action in chosen.items()]))
        played = dict(zip(chosen, done, strict=True))
        return self._some(played) if isinstance(actions, Mapping) else self._batch(played)

    async def run(self, episodes: Iterable[Options] | None = None) -> AsyncIterator[tuple[int, Transition]]:
        """Every environment at its own pace: yields (index, transition) as they come, first the start of an episode
        in each. Answer with `send(index, reply)`, at once or later; an environment without an answer rests.

        `episodes` are reset options, one per episode, drawn as environments become free; an environment that finds none
        left retires (its last transition has an empty `obs`). Without it episodes follow each other for ever. The loop
        ends when nothing is under way. Leaving the loop early cancels what is.
        """
        if self._running is not None:
            raise EsplError("these environments are running already")
        self._running = run = _FreeRun(self, None if episodes is None else iter(episodes))
        try:
            for i in range(self.num_envs):
                run.begin(i)
            while run.busy:
                yield await run.next()
        finally:
            self._running = None
            await run.stop()

    def send(self, index: int, reply: Reply) -> None:
        """Answer an environment inside `run`. Raises EsplError where it is not waiting for an answer."""
        if self._running is None:
            raise EsplError("send answers inside `async for … in envs.run()`; outside it call step")
        self._running.answer(index, reply)

    def render(self) -> tuple[Any, ...]:
        """The transcript of every environment under render_mode "ansi"."""
        return tuple(env.render() for env in self.envs)

    def close_extras(self, **_: Any) -> None:
        """Close every environment. Gymnasium 1.1 calls this from `__del__`, too: on any thread, and at the very end."""
        background.finish(lambda: _together([env.aclose() for env in self.envs]))

    def _each(self, name: str, values: Sequence[T] | None) -> Sequence[Any]:
        if values is None:
            return [None] * self.num_envs
        if isinstance(values, str) or len(values) != self.num_envs:
            found = "one text" if isinstance(values, str) else str(len(values))
            raise EsplError(f"{name}: {found} for {self.num_envs} environments, expected one each")
        return values

    async def _start(self, i: int, seed: int | None, options: Options | None) -> tuple[Conversation, Info]:
        obs, info = await self.envs[i].areset(seed=seed, options=options)
        self._infos[i] = info
        return obs, info

    async def _play(self, i: int, action: Reply, ends: Callable[[], Options | None] = dict) -> Transition:
        """One step; where it ends the episode, the next one is started with what `ends` says (None: no next one)."""
        before = self._infos[i]
        if before is None:
            raise ResetNeeded("call reset before the first step")
        try:
            async with asyncio.timeout(self.step_deadline) as limit:
                obs, reward, terminated, truncated, info = await self.envs[i].astep(action)
        except TimeoutError:
            if not limit.expired():
                raise
            obs, reward, terminated, truncated = (), 0.0, False, True
            info = {**before, "stop_reason": "deadline"}
        self._infos[i] = info
        if not (terminated or truncated):
            return Transition(obs, float(reward), False, False, info)
        options = ends()
        begun: tuple[Conversation, Info] = ((), {}) if options is None else await self._start(i, None, options)
        return Transition(begun[0], float(reward), terminated, truncated, begun[1], obs, info)

    def _batch(self, played: Mapping[int, Transition]) -> Batch:
        infos: dict[str, Any] = {}
        for i, transition in played.items():
            infos = self._add_info(infos, _with_final(transition), i)
        rows = [played[i] for i in range(self.num_envs)]
        return (
            tuple(row.obs for row in rows),
            np.array([row.reward for row in rows], dtype=np.float64),
            np.array([row.terminated for row in rows], dtype=np.bool_),
            np.array([row.truncated for row in rows], dtype=np.bool_),
            infos,
        )

    def _some(self, played: Mapping[int, Transition]) -> Some:
        return (
            {i: t.obs for i, t in played.items()},
            {i: t.reward for i, t in played.items()},
            {i: t.terminated for i, t in played.items()},
            {i: t.truncated for i, t in played.items()},
            {i: _with_final(t) for i, t in played.items()},
        )


class _FreeRun:
    """The state of one `run`: a task per environment that is busy, and a queue of what they did, on the shared loop."""

    def __init__(self, envs: TextVectorEnv, episodes: Any) -> None:
        self.envs, self.episodes = envs, episodes
        self.busy = 0                                   # steps that are under way or not yet handed out
        self._waiting: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._done: asyncio.Queue[tuple[int, Transition | BaseException]] = asyncio.Queue()

    def options(self) -> Options | None:
        """The next episode's reset options; None when there is none left."""
        return {} if self.episodes is None else next(self.episodes, None)

    def begin(self, i: int) -> None:
        options = self.options()
        if options is not None:
            self._launch(i, self._first(i, options))

    def answer(self, i: int, reply: Reply) -> None:
        if i not in self._waiting:
            raise EsplError(f"environment {i} is not waiting for a reply")
        self._waiting.discard(i)
        self._launch(i, self.envs._play(i, reply, self.options))

    async def next(self) -> tuple[int, Transition]:
        i, outcome = await _from_here(self._done.get())
        self.busy -= 1
        if isinstance(outcome, BaseException):
            raise outcome
        if not outcome.over or outcome.obs:
            self._waiting.add(i)
        return i, outcome

    async def stop(self) -> None:
        await _from_here(self._cancel())

    async def _first(self, i: int, options: Options) -> Transition:
        obs, info = await self.envs._start(i, None, options)
        return Transition(obs, 0.0, False, False, info)

    def _launch(self, i: int, work: Coroutine[Any, Any, Transition]) -> None:
        self.busy += 1
        background.loop().call_soon_threadsafe(self._spawn, i, work)

    def _spawn(self, i: int, work: Coroutine[Any, Any, Transition]) -> None:
        task = asyncio.get_running_loop().create_task(self._finish(i, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(self, i: int, work: Coroutine[Any, Any, Transition]) -> None:
        try:
            self._done.put_nowait((i, await work))
        except Exception as problem:
            self._done.put_nowait((i, problem))

    async def _cancel(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def vector_of(env_class: Callable[..., Any]) -> Callable[..., TextVectorEnv]:
    """The vector entry point of an environment class: takes `num_envs`, `step_deadline` and the class's arguments."""

    def make(num_envs: int = 1, step_deadline: float | None = None, **settings: Any) -> TextVectorEnv:
        settings = {"on_fault": "mask", **settings}
        return TextVectorEnv(lambda: env_class(**settings), num_envs, step_deadline=step_deadline)

    return make


def _with_final(transition: Transition) -> Info:
    if transition.final_info is None:
        return transition.info
    return {**transition.info, "final_obs": transition.final_obs, "final_info": transition.final_info}


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All of it, also where a part fails; then the first failure is raised, so that no environment is left mid-step."""
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]


async def _from_here(work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, which belongs on the environments' loop, from whatever loop this is."""
    loop = background.loop()
    if asyncio.get_running_loop() is loop:
        return await work
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))
