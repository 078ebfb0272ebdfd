"""Which processes on which machines make up a run, and whether they can do what a configuration asks of them.

Every rank says what it is (`card`); rank 0 looks at all cards before anything is loaded or written (`layout`).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from espl_envs.core.errors import EsplError
from espl_train.config import Config
from espl_train.learner.ranks import Place

Cards = Mapping[int, Mapping[str, Any]]

ROOM = 0.5      # share of a GPU that whole base weights may fill; above it `auto` shards them


@dataclass(frozen=True, slots=True)
class Layout:
    """How the ranks of a run work together."""

    device: str          # cuda or cpu: every rank takes its own of that kind
    sharded: bool        # whether they share the weights, too
    ranks: int
    machines: int

    def rows(self) -> tuple[tuple[str, str], ...]:
        """As (what, in words)."""
        machines = "1 machine" if self.machines == 1 else f"{self.machines} machines"
        how = "base weights sharded (FSDP2)" if self.sharded else "data parallel"
        backend = "nccl" if self.device == "cuda" else "gloo"
        idle = "others" if self.ranks > 2 else "other one"
        text = f"{self.ranks} on {machines}, {how} over {backend}; rank 0 samples, the {idle} idle until the update"
        return (("ranks", text),)


def card(place: Place) -> dict[str, Any]:
    """What this process is."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mine = torch.cuda.get_device_properties(place.local_rank) if place.local_rank < gpus else None
    return {
        "rank": place.rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "ranks": place.local_size,
        "gpus": gpus,
        "gpu": mine and mine.name,
        "memory": mine and mine.total_memory,
        "torch": torch.__version__,
        "espl": version("espl"),
    }


def layout(config: Config, cards: Cards) -> Layout:
    """How the ranks with these cards work under `config`. Raises EsplError, one sentence, where they cannot."""
    if config.mode == "evolution":
        raise EsplError(f"mode is evolution, which trains no weights: {len(cards)} ranks have nothing to share")
    _alike(cards, "torch", "torch {}")
    _alike(cards, "espl", "espl {}")
    device = _kind(config, cards)
    if device == "cuda":
        _enough(cards)
        _alike(cards, "gpu", "a {}")
    may = config.learner.parallel == "auto" and config.engine.kind == "vllm" and device == "cuda"
    sharded = config.learner.parallel == "fsdp" or (may and _large(config, cards))
    return Layout(device, sharded, len(cards), len({card["host"] for card in cards.values()}))


def _kind(config: Config, cards: Cards) -> str:
    asked = config.model.device
    if re.fullmatch(r"cuda:\d+|mps", asked):
        raise EsplError(
            f"model.device is '{asked}', one device for {len(cards)} ranks: leave it at 'auto', each takes its own"
        )
    if asked == "auto":
        having = [rank for rank, card in cards.items() if card["gpus"]]
        if having and len(having) < len(cards):
            lacking = cards[min(cards.keys() - set(having))]["host"]
            raise EsplError(
                f"{cards[having[0]]['host']} has GPUs and {lacking} has none: use machines of one kind, or the CPUs of "
                "all with --model.device cpu"
            )
        return "cuda" if having else "cpu"
    return asked


def _enough(cards: Cards) -> None:
    for card in cards.values():
        if card["gpus"] < card["ranks"]:
            count = f"{card['gpus']} GPU{'s' * (card['gpus'] != 1)}"
            raise EsplError(
                f"{card['host']} has {count} for {card['ranks']} ranks: one GPU is needed for each; use torchrun "
                f"--nproc-per-node {max(card['gpus'], 1)}, or --model.device cpu"
            )


def _alike(cards: Cards, what: str, wording: str) -> None:
    """Other arithmetic on one rank would let its weights drift away from those of the rest."""
    first = cards[0]
    for rank, card in sorted(cards.items()):
        if card[what] != first[what]:
            one, other = wording.format(first[what]), wording.format(card[what])
            raise EsplError(
                f"rank 0 ({first['host']}) has {one} and rank {rank} ({card['host']}) has {other}: ranks must be "
                "alike, or their weights would drift apart"
            )


def _large(config: Config, cards: Cards) -> bool:
    """Whether the base weights would fill more than `ROOM` of the smallest GPU."""
    from espl_train.learner.loading import blank_model

    weights = sum(p.numel() * p.element_size() for p in blank_model(config.model).parameters())
    return weights > ROOM * min(card["memory"] for card in cards.values())
