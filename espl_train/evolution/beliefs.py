"""The kinds of ratings by name: where beliefs begin, and how a checkpoint brings them back.

A new kind is a class with the methods of `ratings.Beliefs` and its line here; its name stands in `config.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from espl_envs.core.errors import EsplError
from espl_train.config import RatingConfig
from espl_train.evolution.item_response import ItemResponse
from espl_train.evolution.ladders import PACKAGES, Ladder
from espl_train.evolution.prompts import Rating
from espl_train.evolution.ratings import Beliefs

Start = Callable[[RatingConfig, str], Beliefs]
Restore = Callable[[Mapping[str, Any], Mapping[str, Rating], RatingConfig, str], Beliefs]


def start(config: RatingConfig, root: str) -> Beliefs:
    """What is believed before the first batch, of the root alone. Raises MissingExtra where the kind needs a package
    that is not installed."""
    return KINDS[config.kind][0](config, root)


def restore(
    state: Mapping[str, Any] | None, ratings: Mapping[str, Rating], config: RatingConfig, root: str
) -> Beliefs:
    """The beliefs of a checkpoint: `state` as `save` wrote it (None: from before there were kinds), `ratings` as they
    were. Raises EsplError where they are of another kind."""
    kind = state["kind"] if state else "trueskill"
    if kind != config.kind:
        raise EsplError(
            f"the ratings of this run are of kind {kind} and cannot go on as {config.kind}: leave rating.kind as it "
            "was, or start a new run"
        )
    return KINDS[kind][1](state["state"] if state else {}, ratings, config, root)


def save(beliefs: Beliefs, config: RatingConfig) -> dict[str, Any]:
    """Plain data for `restore`."""
    return {"kind": config.kind, "state": beliefs.to_json()}


def _first_rung(config: RatingConfig, root: str) -> Ladder:
    PACKAGES[config.kind]()
    return Ladder(config, {root: Rating(config.mu, config.sigma)})


def _ladder_again(_: Mapping[str, Any], ratings: Mapping[str, Rating], config: RatingConfig, root: str) -> Ladder:
    del root
    PACKAGES[config.kind]()
    return Ladder(config, dict(ratings))


def _responses_again(
    state: Mapping[str, Any], ratings: Mapping[str, Rating], config: RatingConfig, root: str
) -> ItemResponse:
    del ratings
    return ItemResponse.from_json(state, config, root)


KINDS: dict[str, tuple[Start, Restore]] = {
    "trueskill": (_first_rung, _ladder_again),
    "openskill": (_first_rung, _ladder_again),
    "item_response": (ItemResponse.start, _responses_again),
}
