"""A policy whose weights are shared among the ranks: PyTorch's FSDP2.

The base weights are sharded layer by layer, and a rank holds one layer whole at a time; in full mode they are trained
as shards. An adapter is not sharded: it is a hundredth of the base, and fp32 where the base may be bf16, which one
group of FSDP cannot hold. So every rank keeps it whole, its gradients are summed once per update as in data
parallelism, and publishing it needs nobody else.

Rank 0 alone reads the model, into CPU memory; the others get each layer before it is sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from espl_envs.core.errors import EsplError
from espl_train.config import LearnerConfig, ModelConfig
from espl_train.learner import norms
from espl_train.learner.loading import blank_model, load_model, load_tokenizer, precision, use_threads
from espl_train.learner.policy import Policy, draw_adapter
from espl_train.learner.ranks import whole

if TYPE_CHECKING:
    from espl_train.learner.distributed import Team


class ShardedPolicy(Policy):
    """See the module. `model` has no weights yet (meta device); `source` are its weights, on rank 0.

    What is computed with the weights goes through `run`, which takes the other ranks along.
    """

    def __init__(
        self, model: Any, tokenizer: Any, config: LearnerConfig, settings: ModelConfig, team: Team,
        source: nn.Module | None, seed: int = 0,
    ) -> None:
        if config.mode == "full" and config.kl:
            raise EsplError(
                "learner.kl is above 0, and full training would need the base model sharded beside the trained one: "
                "use --learner.mode lora, --learner.kl 0 or --learner.parallel data"
            )
        names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        super().__init__(model, tokenizer, config, seed=seed, name=settings.path, reload=lambda: model)
        if config.gradient_checkpointing == "auto" and self.causal.supports_gradient_checkpointing:
            self.checkpoint(True)                # who shards is short of memory
        self.device = team.device
        norms.fuse(model, self.device)
        self._team, self._settings, self._base = team, settings, None
        given = {} if source is None else {**dict(source.named_parameters()), **dict(source.named_buffers())}
        mesh = init_device_mesh(team.device.type, (team.size,))
        team.mesh = mesh if config.mode == "full" else None
        kinds = self.causal._no_split_modules or ()
        self._root: Any = _Root(self.causal)
        for block in (*(m for m in self.causal.modules() if type(m).__name__ in kinds), self._root):
            _fill(block, names, given, team)
            adapter = {p for p in block.parameters() if p.requires_grad} if config.mode == "lora" else None
            fully_shard(block, mesh=mesh, ignored_params=adapter)
            assert isinstance(block, FSDPModule)
            block.set_gradient_divide_factor(1.0)
            block.set_force_sum_reduction_for_comms(True)
        if config.mode == "lora":
            draw_adapter(self.model, seed)

    @classmethod
    def on(cls, team: Team, settings: ModelConfig, config: LearnerConfig, seed: int) -> ShardedPolicy:
        """The policy at version 0. Raises EsplError where the model is not there or cannot hold a conversation."""
        use_threads(settings.threads)
        tokenizer, model = load_tokenizer(settings), blank_model(settings)
        on_cpu = settings.model_copy(update={"device": "cpu", "dtype": precision(settings)})
        source = None if team.place.rank else load_model(on_cpu)
        team.channel.exchange(None)          # reading takes as long as it takes: nobody waits in a collective meanwhile
        return cls(model, tokenizer, config, settings, team, source, seed)

    def run(self, function: Callable[..., Any], *args: Any, reference: bool = False) -> Any:
        """`function(causal, *args)` with the weights in place, on all ranks; see `Policy.run`."""
        self._team.invite(_run, function, args, reference)
        if reference:
            with torch.no_grad(), self.model.disable_adapter():
                found = self._root(function, *args)
        else:
            found = self._root(function, *args)
        if not self._turns["training"]:          # there a backward pass needs embeddings and head, and reshards them
            self._root.reshard()
        return found

    @contextmanager
    def reference(self) -> Iterator[Any]:
        """Not to be had: no rank holds the base model."""
        raise EsplError("no rank holds the sharded base model whole: use Policy.run(…, reference=True)")
        yield

    @contextmanager
    def sampling_weights(self, version: int | None) -> Iterator[Any]:
        """Not to be had: no rank holds the weights."""
        raise EsplError(f"no rank holds the sharded weights of version {version} whole: sample with --engine.kind vllm")
        yield

    def save_adapter(self, folder: str | Path) -> None:
        """Write what was trained; on rank 0, the others help."""
        if self.config.mode == "lora":
            super().save_adapter(folder)
        else:
            self.save_merged(folder)

    def save_merged(self, folder: str | Path) -> None:
        """Write a plain model with the adapter merged and its tokenizer; on rank 0, the others help."""
        self._team.invite(ShardedPolicy.gather)
        blank_model(self._settings).save_pretrained(str(folder), state_dict=self.gather())
        self.tokenizer.save_pretrained(str(folder))

    @torch.no_grad()
    def gather(self) -> dict[str, Tensor]:
        """The merged weights under the names of the plain model, on the CPU; on ranks other than 0 they are dropped."""
        from peft.tuners.lora import LoraLayer

        found: dict[str, Tensor] = {}
        layers: dict[str, Any] = {n: m for n, m in self.causal.named_modules() if isinstance(m, LoraLayer)}
        for name, parameter in self.causal.named_parameters():
            if self.config.mode == "lora" and parameter.requires_grad:
                continue
            tensor = whole(parameter.detach())
            layer = layers.get(name.removesuffix(".base_layer.weight"))
            if layer is not None and name.endswith(".base_layer.weight"):
                tensor = (tensor.float() + layer.get_delta_weight("default").float()).to(tensor.dtype)
            if not self._team.place.rank:
                found[name.replace(".base_layer.", ".")] = tensor.cpu()
        return found


class _Root(nn.Module):
    """The outermost FSDP module. It calls whatever needs the embeddings and the head whole, not just the model."""

    def __init__(self, causal: Any) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.causal, *args)


def _run(policy: ShardedPolicy, function: Callable[..., Any], args: tuple[Any, ...], reference: bool) -> None:
    """What the other ranks do where rank 0 calls `run`."""
    policy.run(function, *args, reference=reference)


def _fill(block: nn.Module, names: Mapping[int, str], given: Mapping[str, Tensor], team: Team) -> None:
    """Give the tensors of `block` that are still blank memory and rank 0's values; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for module in block.modules():
        for table in (module._parameters, module._buffers):
            for key, old in table.items():
                if old is None or not old.is_meta:
                    continue
                if id(old) not in made:
                    new = torch.empty_like(old, device=team.device)
                    if id(old) in names:             # an adapter has no values yet
                        if given:
                            new.copy_(given[names[id(old)]])
                        team.broadcast(new)
                    is_parameter = isinstance(old, nn.Parameter)
                    made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
                table[key] = made[id(old)]           # type: ignore[assignment]
