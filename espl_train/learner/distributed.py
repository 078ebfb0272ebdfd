"""One learner on many ranks: rank 0 runs the loop, the others wait for its orders and learn with it.

Data parallel: every rank holds the whole policy and gets micro-batches of equal cost; gradients are summed. Sharded
(`sharding.py`): the ranks share the weights as well. Either way an update is that of one process: the token weights
carry the denominator of the whole update, the clip norm is that of the summed gradient, and every decision follows from
numbers that are the same on all ranks. That what they hold stays equal to the last bit is checked, not believed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from multiprocessing import AuthenticationError
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from espl_envs.core.errors import EsplError
from espl_train.config import Config
from espl_train.learner import topology
from espl_train.learner.channel import Follower, Leader, store_of
from espl_train.learner.packing import MicroBatch
from espl_train.learner.policy import Policy
from espl_train.learner.ranks import Place, mapped, whole
from espl_train.learner.tally import Tally
from espl_train.learner.topology import Layout
from espl_train.learner.update import Learner

BUCKET = 2**26      # elements that are summed in one collective
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Team:
    """The ranks of a run, seen from one of them. See `Ranks`; `channel` is the line to the others."""

    def __init__(self, place: Place) -> None:
        self.place, self.size = place, place.size
        self._store = store_of(place)
        line = self._store, topology.card(place)
        self.channel: Leader | Follower = Follower(*line) if place.rank else Leader(place, *line)
        self._layout: Layout | None = None
        self._group: Any = None
        self.device = torch.device("cpu")
        self.mesh: DeviceMesh | None = None      # over which trained weights are sharded
        self._timeout = 0.0
        self._joint = False                      # whether all ranks are at the same work

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Rank 0 hangs up, and the others end."""
        assert isinstance(self.channel, Leader)
        self.channel.close()
        if self._group is not None:
            self._group.abort()
        if self.lockstep and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def lockstep(self) -> bool:
        """See `Ranks`."""
        return self._layout is not None and self._layout.sharded

    def check(self, config: Config) -> tuple[tuple[str, str], ...]:
        """See `Ranks`; on rank 0."""
        assert isinstance(self.channel, Leader)
        self._layout = topology.layout(config, self.channel.arrived())
        return self._layout.rows()

    def load(self, config: Config) -> Policy:
        """See `Ranks`; on rank 0 after `check`."""
        layout = self._layout
        assert layout is not None
        self.channel.order("load", [(config, layout)] * self.size)
        if layout.device == "cuda":
            torch.cuda.set_device(self.place.local_rank)
            self.device = torch.device("cuda", self.place.local_rank)
        self._timeout = config.learner.rank_timeout
        with self.together():
            self._group = self._connected(layout.sharded)
            if isinstance(self.channel, Leader):
                self.channel.abort = self._group.abort
            policy = self._policy(config, layout.sharded)
        self._same((*policy.model.parameters(), *policy.model.buffers()), f"read other weights from '{policy.name}'")
        return policy

    def deal(self, batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """See `Ranks`."""
        shares = (in_rounds if self.lockstep else by_cost)(batches, self.size)
        self.channel.order("learn", shares)
        return shares[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """See `Ranks`."""
        before, self._joint = self._joint, True
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.channel.explain(error)
            raise
        finally:
            self._joint = before

    def exchange(self, value: Any) -> list[Any]:
        """See `Ranks`."""
        return self.channel.exchange(value, self._timeout)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """See `Ranks`. A tensor that got no gradient on any rank has none afterwards, as in one process."""
        mine = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]     # FSDP has summed the others
        had = self.exchange([tensor.grad is not None for tensor in mine])
        found = [tensor for tensor, on_ranks in zip(mine, zip(*had, strict=True), strict=True) if any(on_ranks)]
        for tensor in found:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        for bucket in _buckets([tensor.grad for tensor in found if tensor.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            self._group.allreduce([flat]).wait()
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def merge(self, tally: Tally) -> None:
        """See `Ranks`. Added in the order of the ranks, so that all come to the same."""
        counted = self.exchange((dict(tally.sums), dict(tally.peaks)))
        tally.sums.clear()
        tally.peaks.clear()
        for sums, peaks in counted:
            for name, value in sums.items():
                tally.sums[name] += value
            for name, value in peaks.items():
                tally.peaks[name] = max(value, tally.peaks.get(name, value))

    def gather(self, state: Any) -> Any:
        """See `Ranks`."""
        self.channel.order("state_dict")
        self._same(_leaves(state), "holds other weights than rank 0 after an update")
        with self.together():
            return mapped(self._to_rank_0, state)

    def spread(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `Ranks`."""
        self.channel.order("load_state_dict", [mapped(lambda tensor: tensor.to("meta"), state)] * self.size)
        with self.together():
            return mapped(self._from_rank_0, state)

    def follow(self) -> None:
        """Do what rank 0 says; ends by an exception alone."""
        assert isinstance(self.channel, Follower)
        self._joint = True
        learner: Any = None
        for name, value in self.channel.orders():
            if name == "load":
                config, self._layout = value
                learner = Learner.of(config, self)
            elif name == "call":
                function, args = value
                function(learner.policy, *args)
            else:
                getattr(learner, name)(*(() if value is None else (value,)))

    def cause(self, stop: KeyboardInterrupt) -> KeyboardInterrupt:
        """See `Ranks`."""
        return self.channel.cause(stop) if isinstance(self.channel, Leader) else stop

    def invite(self, function: Callable[..., Any], *args: Any) -> None:
        """Rank 0 is about to call `function` of its policy by itself: the others do it, too."""
        if not self._joint:
            self.channel.order("call", [(function, args)] * self.size)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Fill `tensor` with what rank 0 has in it."""
        self._group.broadcast([tensor], dist.BroadcastOptions()).wait()
        return tensor

    def _connected(self, sharded: bool) -> Any:
        """The process group. Sharding needs torch's default one; otherwise that is left to whoever else may need it,
        such as an engine in rank 0's process."""
        store, timeout = dist.PrefixStore("espl", self._store), timedelta(seconds=self._timeout)
        rank, cuda = self.place.rank, self.device.type == "cuda"
        if not cuda and self.place.one_machine:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        if sharded:
            dist.init_process_group(
                "nccl" if cuda else "gloo", store=store, rank=rank, world_size=self.size, timeout=timeout,
                device_id=self.device if cuda else None,
            )
            return dist.group.WORLD
        if not cuda:
            return dist.ProcessGroupGloo(store, rank, self.size, timeout)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, self.size, options)

    def _policy(self, config: Config, sharded: bool) -> Policy:
        model = config.model.model_copy(update={"device": str(self.device)})
        if sharded:
            from espl_train.learner.sharding import ShardedPolicy

            return ShardedPolicy.on(self, model, config.learner, config.seed)
        return Policy.load(model, config.learner, config.seed)

    def _same(self, tensors: Iterable[Tensor], complaint: str) -> None:
        """Raises EsplError on rank 0 where another one holds other bits in `tensors` (those that all hold whole)."""
        prints = self.channel.exchange(fingerprint(t for t in tensors if not isinstance(t, DTensor)))
        for rank, other in enumerate(prints):
            if other != prints[0] and not self.place.rank:
                raise EsplError(f"rank {rank} {complaint}: what ranks share must be the same to the last bit")

    def _to_rank_0(self, tensor: Tensor) -> Tensor | None:
        tensor = whole(tensor.detach())
        return None if self.place.rank else tensor.to("cpu", copy=True)

    def _from_rank_0(self, tensor: Tensor) -> Tensor:
        """A tensor of the tree that is spread: on rank 0 with its values, elsewhere on the meta device."""
        here = torch.empty_like(tensor, device=self.device) if tensor.is_meta else tensor.to(self.device)
        if self.mesh is not None and tensor.dim():
            return distribute_tensor(here, self.mesh, [Shard(0)], src_data_rank=0)
        self.broadcast(here)
        return here if tensor.dim() else here.cpu()          # the optimiser counts its steps on the CPU


def by_cost(batches: Sequence[MicroBatch], size: int) -> list[list[MicroBatch]]:
    """Shares of equal cost: the dearest first, each to whom has least."""
    shares: list[list[MicroBatch]] = [[] for _ in range(size)]
    spent = [0.0] * size
    for batch in sorted(batches, key=lambda b: -b.cost):
        rank = spent.index(min(spent))
        shares[rank].append(batch)
        spent[rank] += batch.cost
    return shares


def in_rounds(batches: Sequence[MicroBatch], size: int) -> list[list[MicroBatch]]:
    """Shares of equal length for ranks that go through every layer together: rounds of similar cost, and in the last
    one padding of weight zero."""
    ordered = sorted(batches, key=lambda b: -b.cost)
    for last in ordered[-1:]:
        padding = replace(last, weights=torch.zeros_like(last.weights), sequences=0)
        ordered += [padding] * (-len(ordered) % size)
    return [ordered[rank::size] for rank in range(size)]


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """64 bits over the bits of all elements and their places, the same on every device; not meant against malice."""
    factors = torch.randint(2**62, (2**20,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    total = 0
    for tensor in tensors:
        factors = factors.to(tensor.device)
        words = tensor.detach().reshape(-1).view(WORDS[tensor.element_size()])
        for part in words.split(len(factors)):
            total = (total * 0x9E3779B97F4A7C15 + int((part.long() * factors[: len(part)]).sum()) + 1) % 2**64
    return total


def serve(place: Place) -> NoReturn:
    """The whole life of a rank that is not the first: it follows, and ends when rank 0 does.

    What stops a run is rank 0's to hear: Ctrl-C and SIGTERM are ignored here. A failure is told to rank 0, and then
    this process ends at once, for in its sockets another rank may wait for it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        team = Team(place)
    except (OSError, RuntimeError, EOFError, AuthenticationError) as error:
        print(f"espl-train: rank {place.rank} cannot reach rank 0: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    assert isinstance(team.channel, Follower)
    try:
        team.follow()
    except Exception as error:
        team.channel.failed(error)
    os._exit(1)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, together at most BUCKET elements (a larger one stands alone)."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (bucket[0].dtype != tensor.dtype or sum(t.numel() for t in (*bucket, tensor)) > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _leaves(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(found.append, tree)
    return found
