"""TextArena's games for one player as environments of this suite (extra `games`).

    env = gym.make("espl_envs.interop.textarena:espl/TextArena-v0", game="Mastermind-v0")

TextArena draws from Python's process-global generator, which others use, too. Here every game has a state of its own
that is put in place while the game moves, one game at a time, and taken out again.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import threading
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import gymnasium

from espl_envs.core.env import TextEnv
from espl_envs.core.errors import EsplError, MissingData, MissingExtra
from espl_envs.core.family import Episode, Family
from espl_envs.core.protocol import WholeReply
from espl_envs.core.tasks import Split, Task, TaskSource
from espl_envs.grading.verdict import Verdict
from espl_envs.tasks.generated import SPLITS, Draft, DrawnTasks, split_of

LONGEST_MOVE = 4000

_MOVING = threading.RLock()


class Play:
    """One play of a game. `game` is TextArena's id without the `-raw` behind it."""

    def __init__(self, game: str, seed: int) -> None:
        self._chance = random.Random(seed).getstate()
        with self._in_place():
            self._game = _made(game)
            try:
                self._game.reset(num_players=1, seed=seed % 2**32)
            except AssertionError as refusal:
                raise EsplError(f"{game} is no game for one player: {refusal}") from refusal
            except LookupError as missing:
                raise _needs_words(game) from missing
        self.over = False
        self.reward = 0.0
        self.problem = ""

    def heard(self) -> str:
        """What the game has said since it was last asked; not the player's own words."""
        with self._in_place():
            _, said = self._game.get_observation()
        return "\n\n".join(text for speaker, text, _ in said if speaker == -1).strip()

    def move(self, text: str) -> None:
        """Play one move. A game that breaks over it is lost: its state cannot be trusted any more."""
        with self._in_place():
            try:
                self.over, _ = self._game.step(text)
            except Exception as problem:
                self.over, self.problem = True, f"{type(problem).__name__}: {problem}"
                return
            if self.over:
                rewards, _ = self._game.close()
                reward = (rewards or {}).get(0)
                self.reward = float(reward) if isinstance(reward, int | float) else 0.0

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        with _MOVING:
            outside = random.getstate()
            random.setstate(self._chance)
            try:
                yield
            finally:
                self._chance = random.getstate()
                random.setstate(outside)


class TextArenaEnv(TextEnv):
    """A game of TextArena for one player: Mastermind, Minesweeper, Sudoku, TowerOfHanoi, FrozenLake, 2048 …

    Observation: the game's rules, then what it says after every move. Action: a reply; the game reads its move out of
    the last 4000 visible characters of it (mostly something in square brackets, as its rules say). Reward: 1.0 at the
    end if the game gives its full reward, else 0.0; `info["reward/game"]` is the game's own reward, which may be
    negative or partial. Illegal moves are answered by the game, which allows one at a time and ends at the second in a
    row. A move over which the game's code breaks loses it; `diagnostics["game_problem"]` says how. Terminated when the
    game ends, truncated after `max_turns` replies.

    Splits: train 2000, validation 500, test 500 seeds, no seed in two of them; a game with few positions may well have
    the same one behind two seeds.

    Arguments
        game: TextArena's id, for example "Sudoku-v0-easy"; without the wrappers that it adds by itself.
        binary: whether only the full reward counts; else the score is the game's reward between 0 and 1.
        others: see `TextEnv`. 200 turns by default.

    Not every game of the package works everywhere: those of words need a corpus of NLTK (`python -m nltk.downloader
    words averaged_perceptron_tagger_eng`), GuessWho and TwentyQuestions the key of a paid service, Klondike and
    UltimateTexasHoldem Python 3.12. There is no oracle.

    Source: TextArena 0.7 (extra `games`), MIT. Versions: v0, the first one.
    """

    hidden = True

    def __init__(self, game: str = "Mastermind-v0", *, binary: bool = True, **settings: Any) -> None:
        self.game = game
        self._binary = binary
        family = Family(
            sources={split: partial(_tasks, game, split) for split in SPLITS},
            grade=_grade,
            protocol=WholeReply(),
            parts=("game",),
            max_turns=200,
        )
        super().__init__(family, **settings)

    async def follow_up(self, episode: Episode) -> str | None:
        """Play the reply; what the game says to it, None at the end of the game."""
        play: Play | None = episode.context.state.get("play")
        if play is None:
            play = await asyncio.to_thread(_opened, self.game, episode.task.data["seed"])
            episode.context.state["play"] = play
        reply = self.family.protocol.extract(episode.messages[-1].content)
        await asyncio.to_thread(play.move, (reply or "")[-LONGEST_MOVE:])
        if play.problem:
            episode.diagnostics["game_problem"] = play.problem
        return None if play.over else play.heard() or "Go on."

    async def judge(self, episode: Episode, answer: str) -> Verdict:
        """The game's reward, whole or none."""
        reward = episode.context.state["play"].reward
        score = float(reward >= 1.0) if self._binary else min(1.0, max(0.0, reward))
        return Verdict(score, "ok", answer, episode.task.answer, {"game": reward})


def _opened(game: str, seed: int) -> Play:
    play = Play(game, seed)
    play.heard()
    return play


@cache
def _tasks(game: str, split: Split) -> TaskSource:
    from importlib.metadata import version

    def draw(seed: int) -> Draft | None:
        key = str(seed)
        return Draft(key, Play(game, seed).heard(), "", {"seed": seed}) if split_of(key) == split else None

    _library()
    return DrawnTasks(f"textarena-{game}", split, draw, [version("textarena")], slow=True)


@cache
def _library() -> Any:
    try:
        import textarena
    except ImportError as missing:
        raise MissingExtra("games", f"TextArena (no module {missing.name})") from missing
    return textarena


def _made(game: str) -> Any:
    library = _library()
    registry = library.envs.registration.ENV_REGISTRY
    if f"{game}-raw" not in registry:
        raise EsplError(f"TextArena has no game {game!r}; its README lists them")
    try:
        made = library.make(f"{game}-raw")
    except LookupError as missing:
        raise _needs_words(game) from missing
    except Exception as problem:
        raise EsplError(f"TextArena cannot make {game}: {type(problem).__name__}: {problem}") from problem
    for name, module in sys.modules.copy().items():      # in one go: others import meanwhile
        if name.startswith("textarena.envs."):
            vars(module)["print"] = _say_nothing  # some games print while they are drawn
    return made


def _say_nothing(*_: Any, **__: Any) -> None:
    pass


def _needs_words(game: str) -> MissingData:
    corpora = "words averaged_perceptron_tagger_eng"
    return MissingData(f"{game} needs a corpus of NLTK that is not here: python -m nltk.downloader {corpora}")


async def _grade(task: Task, answer: str) -> Verdict:
    raise EsplError(f"games are judged by how they end: {task.id}, {answer[:20]!r}")


if "espl/TextArena-v0" not in gymnasium.registry:
    gymnasium.register(
        "espl/TextArena-v0",
        f"{__name__}:TextArenaEnv",
        vector_entry_point=f"espl_envs.registry:{__name__}.TextArenaEnv",
    )
