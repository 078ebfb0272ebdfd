"""The policy: one Hugging Face causal model with a LoRA adapter (or trained whole), its tokenizer, its version.

The learner trains `policy.model`; an engine samples inside `policy.sampling_weights(version)`. In LoRA mode that hands
out a *snapshot*: a model over the very tensors of the base, but for what was trained, which is merged into storage of
its own. So the base is never written to, and a version can be sampled while the next one is made. On a base below fp32
the snapshot is a copy of the adapter, unmerged: merging would round it away. In full mode there is one set of weights,
and training and sampling take turns.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from espl_envs.core.errors import EsplError
from espl_train.config import LearnerConfig, ModelConfig
from espl_train.learner import norms
from espl_train.learner.attention import install
from espl_train.learner.loading import context_length, load_model, load_tokenizer, use_threads
from espl_train.randomness import derive

Turn = Literal["training", "sampling"]


class Policy:
    """The weights that act and learn. `version` counts the optimiser steps that made them; 0 acts like the base model.

    `model` is what is trained (a PeftModel in LoRA mode); `causal` the Hugging Face model inside it, adapter and all.
    `templates` names the template set that the model was made for.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: LearnerConfig,
        *,
        seed: int = 0,
        name: str = "",
        reload: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.name = name
        self.version = 0
        self.context_length = context_length(model)
        self.templates: str = getattr(model.config, "espl_templates", "english")
        self.device: torch.device = next(model.parameters()).device
        self._turns: dict[Turn, int] = {"training": 0, "sampling": 0}
        self._lock = threading.Lock()
        model.eval()
        _silence_dropout(model)
        install(model)
        norms.fuse(model, self.device)
        if config.mode == "lora":
            model.requires_grad_(False)
            self._base: nn.Module | None = _sharing_copy(model)
            self._mergeable = all(p.dtype == torch.float32 for p in model.parameters())
            self.causal: Any = model
            self.model: Any = _with_adapter(model, config, seed, name)
        else:
            model.requires_grad_(True)
            self._base = None
            self._mergeable = False
            self._reload = reload or partial(lambda frozen: frozen, copy.deepcopy(model))
            self.causal = self.model = model
        self._snapshot: nn.Module | None = None
        self._refresh: Callable[[], None] = lambda: None
        self._snapshot_of: tuple[int, int] | None = None
        self.checkpointing = False
        self.checkpoint(config.gradient_checkpointing == "on")

    @classmethod
    def load(cls, model_config: ModelConfig, learner_config: LearnerConfig, seed: int = 0) -> Policy:
        """The policy at version 0. Raises EsplError where the model is not there or cannot hold a conversation."""
        use_threads(model_config.threads)
        tokenizer = load_tokenizer(model_config)
        model = load_model(model_config)
        reload = partial(load_model, model_config)
        return cls(model, tokenizer, learner_config, seed=seed, name=model_config.path, reload=reload)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What the optimiser moves, by name, in the model's order."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """The trained weights (only the adapter in LoRA mode) as CPU tensors of their own."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.trainable_parameters().items()}

    def load_state(self, state: Mapping[str, Tensor], version: int | None = None) -> None:
        """Take the weights of `state()`, bit for bit, and with them their version."""
        parameters = self.trainable_parameters()
        if wrong := parameters.keys() ^ state.keys():
            raise EsplError(f"the saved weights are of another model or mode: '{min(wrong)}' is only on one side")
        with torch.no_grad():
            for name, parameter in parameters.items():
                if parameter.shape != state[name].shape:
                    shapes = f"{tuple(state[name].shape)}, expected {tuple(parameter.shape)}"
                    raise EsplError(f"the saved weights are of another model: '{name}' is {shapes}")
                parameter.copy_(state[name])
        self.advance(self.version if version is None else version)

    def advance(self, version: int | None = None) -> int:
        """The weights have changed: they are `version` now (default: the next one)."""
        self.version = self.version + 1 if version is None else version
        return self.version

    @property
    def concurrent(self) -> bool:
        """Whether a version can be sampled while training makes the next one."""
        return self.config.mode == "lora"

    @contextmanager
    def training(self) -> Iterator[Any]:
        """The turn in which weights change; yields `model`, set up for gradients."""
        with self._turn("training"):
            self.model.train(self.checkpointing)
            try:
                yield self.model
            finally:
                self.model.eval()

    def checkpoint(self, on: bool) -> None:
        """Switch gradient checkpointing. Raises EsplError where the architecture has none."""
        if on == self.checkpointing:
            return
        if not self.causal.supports_gradient_checkpointing:
            raise EsplError("learner.gradient_checkpointing is 'on', but the architecture of this model has none")
        if on:
            how = {"use_reentrant": False, "preserve_rng_state": False}      # nothing in a layer is drawn
            self.causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        else:
            self.causal.gradient_checkpointing_disable()
        self.checkpointing = on
        if self._turns["training"]:
            self.model.train(on)                 # it acts in train mode only

    def run(self, function: Callable[..., Any], *args: Any, reference: bool = False) -> Any:
        """`function(model, *args)`: what is computed with the weights, adapter and all, or (`reference`) with those of
        the base model and without gradients. The one way in that also holds where ranks share the weights.
        """
        if not reference:
            return function(self.causal, *args)
        with self.reference() as base:
            return function(base, *args)

    @contextmanager
    def sampling_weights(self, version: int | None) -> Iterator[Any]:
        """The model to call for the weights of `version` (a Hugging Face causal model, eval mode); None: the base
        model, at any time. Both may be open at once.

        `version` is the one held now, or in LoRA mode still the one that was asked for last, whatever training does
        meanwhile. Raises EsplError for others, RuntimeError where it is training's turn. Gradients are the caller's
        business: wrap forwards in `torch.no_grad()`.
        """
        if version is None:
            yield self._reference_model()
        elif self.concurrent:
            yield self._snapshot_at(version)
        else:
            with self._turn("sampling"):
                self._held(version)
                yield self.causal

    @contextmanager
    def reference(self) -> Iterator[Any]:
        """The frozen base model, without gradients; yields it."""
        with torch.no_grad():
            yield self._reference_model()

    def save_adapter(self, folder: str | Path) -> None:
        """Write what was trained: a PEFT adapter in LoRA mode, the whole model with its tokenizer in full mode."""
        if self.config.mode == "lora":
            self.model.save_pretrained(str(folder), save_embedding_layers=False)     # "auto" would ask the hub
            (Path(folder) / "README.md").unlink(missing_ok=True)                     # PEFT's card: a form, all empty
        else:
            self.save_merged(folder)

    def save_merged(self, folder: str | Path) -> None:
        """Write a plain model with the adapter merged (in fp32, then rounded to the base's dtype) and its tokenizer."""
        model: Any = self.causal
        if self.config.mode == "lora":
            model = _sharing_copy(self._reference_model())
            _merge_into(_give_own_weights(model, self.causal))
        model.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))

    def _snapshot_at(self, version: int) -> nn.Module:
        """The snapshot of `version`; it is kept until what is trained changes, by whatever hand."""
        with self._lock:
            known = self._snapshot_of and self._snapshot_of[0]
            if self._snapshot is not None and version == known and (self._turns["training"] or version != self.version):
                return self._snapshot
            self._held(version)
            if self._turns["training"]:
                raise RuntimeError(f"no snapshot was taken of version {version} before training began")
            state = (self.version, sum(p._version for p in self.trainable_parameters().values()))
            if self._snapshot is None:
                self._snapshot, self._refresh = self._copied()
            if state != self._snapshot_of:
                self._refresh()
                self._snapshot_of = state
            return self._snapshot

    def _copied(self) -> tuple[nn.Module, Callable[[], None]]:
        """A model that shares the base, and what brings it up to date with the adapter."""
        if self._mergeable:
            merged = _sharing_copy(self._reference_model())
            return merged, partial(_merge_into, _give_own_weights(merged, self.causal))
        trained = [p for p in self.causal.parameters() if p.requires_grad]
        beside = _sharing_copy(self.causal, but=trained).requires_grad_(False)
        _cast_once(beside)
        own = dict(beside.named_parameters())
        return beside, partial(_copy_into, [(p, own[n]) for n, p in self.causal.named_parameters() if p.requires_grad])

    def _held(self, version: int) -> None:
        if version != self.version:
            raise EsplError(f"weights of version {version} were asked for, the policy holds version {self.version}")

    def _reference_model(self) -> nn.Module:
        if self._base is None:
            self._base = self._reload().eval().requires_grad_(False)
            install(self._base)
            norms.fuse(self._base, self.device)
        return self._base

    @contextmanager
    def _turn(self, mine: Turn) -> Iterator[None]:
        theirs: Turn = "sampling" if mine == "training" else "training"
        with self._lock:
            if self._turns[theirs]:
                raise RuntimeError(f"{mine} was asked for while {theirs} goes on: they take turns on one policy")
            self._turns[mine] += 1
        try:
            yield
        finally:
            with self._lock:
                self._turns[mine] -= 1


def _sharing_copy(model: nn.Module, but: Sequence[Tensor] = ()) -> nn.Module:
    """The same architecture over the very same tensors, `but` some: a second set of modules, not of weights."""
    own = {id(tensor) for tensor in but}
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors if id(tensor) not in own})


def _silence_dropout(model: nn.Module) -> None:
    """Train mode (which gradient checkpointing needs) must give the very distribution that was sampled from."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _with_adapter(model: Any, config: LearnerConfig, seed: int, name: str) -> Any:
    """A PeftModel around `model`: fp32 LoRA on all linear layers but the head, drawn by name from `seed`."""
    from peft import LoraConfig, get_peft_model

    from espl_train.learner.lora import fuse

    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):      # PEFT draws on the CPU; by default every GPU there is would be woken
        wrapped: Any = get_peft_model(model, lora)
    wrapped.peft_config["default"].base_model_name_or_path = name
    draw_adapter(wrapped, seed)
    fuse(wrapped)
    return wrapped.eval()


@torch.no_grad()
def draw_adapter(wrapped: nn.Module, seed: int) -> None:
    """The adapter of version 0: as PEFT draws it, but by name from `seed`, whatever the global random state is."""
    for key, parameter in wrapped.named_parameters():
        if "lora_A" in key:                                                       # [rank, in], kaiming uniform
            random = torch.Generator().manual_seed(derive(seed, "adapter", key))
            bound = parameter.shape[1] ** -0.5
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=random))
        elif "lora_B" in key:
            parameter.zero_()


def _give_own_weights(plain: nn.Module, adapted: nn.Module) -> list[tuple[Any, nn.Parameter]]:
    """Cut the adapted layers of `plain` loose from the base; returns (LoRA layer, own weight) pairs."""
    from peft.tuners.lora import LoraLayer

    pairs: list[tuple[Any, nn.Parameter]] = []
    for name, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer):
            base: Any = layer.get_base_layer()
            own = nn.Parameter(torch.empty_like(base.weight), requires_grad=False)
            plain.get_submodule(name).weight = own
            pairs.append((layer, own))
    return pairs


def _cast_once(adapted: nn.Module) -> None:
    """Keep the adapter of a copy in the dtype that it computes in: nothing is cast at every token."""
    from espl_train.learner.lora import AdaptedLinear

    for layer in (m for m in adapted.modules() if isinstance(m, AdaptedLinear)):
        base: Any = layer.get_base_layer()
        for weights in (layer.lora_A, layer.lora_B):
            weights.to(base.weight.dtype)


def _copy_into(pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    with torch.no_grad():
        for trained, own in pairs:
            own.copy_(trained)


def _merge_into(pairs: list[tuple[Any, nn.Parameter]]) -> None:
    with torch.no_grad():
        for layer, own in pairs:
            own.copy_(layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float())
