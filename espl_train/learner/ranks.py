"""Which process of how many this one is, and what a learner asks of the others.

`Alone` is the whole answer for a run that is one process: it does nothing, so nothing is paid. `distributed.py` has
the answer for a run under torchrun. No torch at import: the command line looks here before anything else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from espl_envs.core.errors import EsplError

if TYPE_CHECKING:
    from torch import Tensor

    from espl_train.config import Config
    from espl_train.learner.packing import MicroBatch
    from espl_train.learner.policy import Policy
    from espl_train.learner.tally import Tally

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OTHERS = ("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE")
AGENT = "TORCHELASTIC_"


class RankLost(KeyboardInterrupt):
    """Another process of the run ended before the run did; `details` is its traceback, where it had time for one.

    A KeyboardInterrupt, because it has to get through whatever rank 0 is doing just then.
    """

    def __init__(self, sentence: str, details: str = "") -> None:
        super().__init__(sentence)
        self.details = details


@dataclass(frozen=True, slots=True)
class Place:
    """Where torchrun put this process."""

    rank: int
    size: int
    local_rank: int      # on its machine
    local_size: int
    host: str            # of the key-value store in which the ranks find each other
    port: int
    hosted: bool         # whether torchrun runs that store; else rank 0 does

    @property
    def one_machine(self) -> bool:
        return self.local_size == self.size

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Place | None:
        """Read what torchrun says and remove it, so that no process started from here takes itself for a rank.

        None where the run is one process. Raises EsplError where there are more, and the rest is not said.
        """
        if environ.get("WORLD_SIZE", "1") == "1":
            place = None
        elif missing := [name for name in NEEDED if name not in environ]:
            raise EsplError(
                f"WORLD_SIZE is {environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: start several processes "
                "with torchrun --nproc-per-node N -m espl_train …"
            )
        else:
            rank, size, local_rank, local_size = (int(environ[name]) for name in NEEDED[:4])
            hosted = environ.get(f"{AGENT}USE_AGENT_STORE") == "True"
            where = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
            place = cls(rank, size, local_rank, local_size, *where, hosted)
        for name in [n for n in environ if n in (*NEEDED, *OTHERS) or n.startswith(AGENT)]:
            del environ[name]
        return place


class Ranks(Protocol):
    """What a learner asks of the processes that learn with it. Rank 0 runs the loop; the others follow its orders.

    All of it is collective: what rank 0 calls, the others call as well, told by rank 0.
    """

    @property
    def size(self) -> int: ...

    @property
    def lockstep(self) -> bool:
        """Whether the ranks need one another in every layer, so that none can try again by itself."""
        ...

    def check(self, config: Config) -> tuple[tuple[str, str], ...]:
        """What this many ranks come to under `config`, as (what, in words). Raises EsplError where it cannot work."""
        ...

    def load(self, config: Config) -> Policy:
        """The policy that this rank holds: whole, or its shard. Raises EsplError where ranks read different weights."""
        ...

    def deal(self, batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """This rank's share of an update; the others get theirs. Those of weight zero hold no sequence: padding."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """Around the work in which ranks wait for each other: what goes wrong in there is explained."""
        ...

    def exchange(self, value: Any) -> list[Any]:
        """The value of every rank, by rank, on every rank."""
        ...

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """The gradients of `tensors`, summed over the ranks, on every rank. Summed: their weights carry the global
        denominator."""
        ...

    def merge(self, tally: Tally) -> None:
        """What all ranks counted, on every rank."""
        ...

    def gather(self, state: Any) -> Any:
        """A copy of a tree on the CPU of rank 0, its tensors whole. Raises EsplError where ranks hold other weights."""
        ...

    def spread(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A tree of rank 0 on every rank, each tensor as the rank holds it."""
        ...

    def cause(self, stop: KeyboardInterrupt) -> KeyboardInterrupt:
        """What really ended the run: a rank that died, if one did."""
        ...


class Alone:
    """One process."""

    size = 1
    lockstep = False

    def check(self, config: Config) -> tuple[tuple[str, str], ...]:
        del config
        return ()

    def load(self, config: Config) -> Policy:
        from espl_train.learner.policy import Policy

        return Policy.load(config.model, config.learner, config.seed)

    def deal(self, batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        return batches

    def together(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def exchange(self, value: Any) -> list[Any]:
        return [value]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        pass

    def merge(self, tally: Tally) -> None:
        pass

    def gather(self, state: Any) -> Any:
        return mapped(lambda tensor: tensor.detach().to("cpu", copy=True), state)

    def spread(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return state

    def cause(self, stop: KeyboardInterrupt) -> KeyboardInterrupt:
        return stop


ALONE = Alone()


def mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """`tree` (dicts and lists) with every tensor in it replaced, in the tree's order."""
    if isinstance(tree, Mapping):
        return {key: mapped(function, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(mapped(function, value) for value in tree)
    return function(tree) if hasattr(tree, "untyped_storage") else tree


def whole(tensor: Any) -> Any:
    """The tensor itself, or all of a sharded one (collective)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
