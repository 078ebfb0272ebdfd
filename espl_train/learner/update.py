"""One optimiser step per iteration: from groups with advantages to new weights, and a report of what happened.

Memory is that of one micro-batch; the denominators are those of the whole update. Nothing is stepped, and no moment of
the optimiser moves, where no group carries a contrast or where the gradient is not finite.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from espl_train.config import LearnerConfig
from espl_train.learner import attention, corrections, memory, schedules
from espl_train.learner.advantages import BASELINES
from espl_train.learner.logprobs import check_head, token_logprobs
from espl_train.learner.losses import LOSSES, NORMALISATIONS, PENALTIES, LossInputs, divergence
from espl_train.learner.naming import choose
from espl_train.learner.packing import Limits, MicroBatch, pack
from espl_train.learner.policy import Policy
from espl_train.learner.sequences import training_sequences
from espl_train.learner.tally import Tally, UpdateReport
from espl_train.records import Group

NO_CONTRAST = "no contrast"
NOT_FINITE = "gradient not finite"

__all__ = ["Learner", "UpdateReport"]


class Learner:
    """AdamW on the trainable weights of a policy.

    `temperature` is that of the samples; `updates` how many there will be in the whole run, for falling schedules.
    """

    def __init__(
        self, policy: Policy, config: LearnerConfig, temperature: float = 1.0, updates: int | None = None
    ) -> None:
        if updates is None and config.schedule != "constant":
            raise ValueError(f"schedule '{config.schedule}' falls over a whole run: say of how many updates")
        self.policy = policy
        self.config = config
        self.temperature = temperature
        self.updates = updates or 1
        self.loss = choose(LOSSES, config.loss, "learner.loss")
        choose(NORMALISATIONS, config.normalise, "learner.normalise")
        choose(BASELINES, config.baseline, "learner.baseline")
        check_head(policy.causal, policy.name)
        unpacked = attention.prove(policy.causal)
        width = policy.causal.config.get_text_config().hidden_size
        self.limits = Limits(config.micro_batch_tokens, width, packed=unpacked is None)
        self._appetite: memory.Appetite | None = None
        self._notes = [f"{policy.name or 'the model'} is trained on padded rows: {unpacked}"] if unpacked else []
        self.steps = 0
        self.skipped: Counter[str] = Counter()
        self._weights = list(policy.trainable_parameters().values())
        self._masters = [p if p.dtype.itemsize >= 4 else p.detach().float() for p in self._weights]
        self.optimizer = torch.optim.AdamW(
            self._masters, lr=config.learning_rate, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )

    def update(self, groups: Sequence[Group]) -> UpdateReport:
        """Learn from one batch of groups (advantages assigned): at most one optimiser step."""
        start = time.perf_counter()
        batches = self._micro_batches(groups)
        if not batches:
            return self._skip(NO_CONTRAST, start)
        with self.policy.training(), torch.enable_grad():
            while (tally := self._gradient(batches)) is None:
                batches = self._micro_batches(groups)
            norm = self._gradient_norm()
            if not math.isfinite(norm):
                self._forget_gradients()
                return self._skip(NOT_FINITE, start)
            rate = self._rate()
            self._step(rate)
        version = self.policy.advance()
        seconds = time.perf_counter() - start
        return tally.report(version, grad_norm=norm, rate=rate, seconds=seconds, notes=self._heard())

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-identical continuation needs, the trained weights included, on the CPU."""
        masters = [] if self._masters[0] is self._weights[0] else self._masters
        state = {
            "policy": self.policy.state(),
            "version": self.policy.version,
            "steps": self.steps,
            "skipped": dict(self.skipped),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "masters": [m.detach().clone() for m in masters],
        }
        return _on_cpu(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`: weights, version, moments, counters."""
        self.policy.load_state(state["policy"], state["version"])
        self.steps = state["steps"]
        self.skipped = Counter(state["skipped"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        with torch.no_grad():
            for master, saved in zip(self._masters, state["masters"], strict=False):
                master.copy_(saved)

    def _micro_batches(self, groups: Sequence[Group]) -> list[MicroBatch]:
        """The whole update, weights set; empty where there is nothing to learn."""
        config = self.config
        return pack(training_sequences(groups, config.normalise, config.normalise_constant), self.limits)

    def _gradient(self, batches: Sequence[MicroBatch]) -> Tally | None:
        """The gradient of the whole update; None where memory ran out and the next attempt will need less."""
        tally = Tally()
        self._checkpoint_where_needed(max(batch.size for batch in batches))
        for batch in batches:
            try:
                with memory.watched():
                    self._accumulate(batch.to(self.policy.device), tally)
            except memory.OutOfMemory as error:
                self._forget_gradients()
                self._need_less(batch, error)
                return None
        return tally

    def _checkpoint_where_needed(self, ids: int) -> None:
        """Decide for gradient checkpointing where the largest micro-batch would not fit without."""
        if self.config.gradient_checkpointing != "auto" or self.policy.checkpointing:
            return
        if self._appetite is None:
            self._appetite = memory.appetite(self.policy.causal)
        need, there = self._appetite.need(ids, checkpointing=False), memory.free(self.policy.device)
        if need > memory.USABLE * there and self.policy.causal.supports_gradient_checkpointing:
            self.policy.checkpoint(True)
            self._notes.append(f"gradient checkpointing from now on: {memory.compared(need, there, ids)}")

    def _need_less(self, batch: MicroBatch, error: memory.OutOfMemory) -> None:
        """Checkpointing where it may be chosen, then smaller micro-batches: the gradient stays the same. Raises
        EsplError when there is no more to be done.
        """
        if self.config.gradient_checkpointing == "auto" and not self.policy.checkpointing:
            self.policy.checkpoint(True)
            change = "gradient checkpointing"
        elif batch.sequences > 1:
            self.limits = replace(self.limits, tokens=max(1, batch.size // 2))
            change = f"learner.micro_batch_tokens = {self.limits.tokens}"
        else:
            raise memory.explained(error, self.policy.device, batch.size, self.policy.checkpointing) from error
        self._notes.append(f"memory ran out with a micro-batch of {batch.size} ids: {change} from now on")

    def _accumulate(self, batch: MicroBatch, tally: Tally) -> None:
        """Add one micro-batch's share to the gradient and to the tally."""
        reference = self._reference(batch) if self.config.kl else None
        inputs, entropy = self._loss_inputs(batch)
        corrected = corrections.apply(inputs, self.config.correction, self.config.correction_bounds)
        outputs = self.loss(corrected.inputs)
        loss = outputs.loss if reference is None else outputs.loss + self._penalty(corrected.inputs, reference, tally)
        loss.backward()
        tally.add(inputs, outputs, loss, entropy, batch.sequences)
        tally.sums["computed"] += batch.size
        tally.disagreement(inputs, corrected)

    def _loss_inputs(self, batch: MicroBatch) -> tuple[LossInputs, Tensor]:
        """What the losses work on, log-probabilities with their gradient; and the entropies. [K] each"""
        logp, entropy = token_logprobs(
            self.policy.causal, batch.inputs, batch.before, batch.targets, self.temperature
        )
        bounds = self.config.ratio_bounds
        return LossInputs(logp, batch.behaviour, batch.advantages, batch.weights, batch.rows, bounds=bounds), entropy

    def _reference(self, batch: MicroBatch) -> Tensor:
        """Log-probabilities under the frozen base model. [K]"""
        with self.policy.reference() as base:
            return token_logprobs(base, batch.inputs, batch.before, batch.targets, self.temperature)[0]

    def _penalty(self, inputs: LossInputs, reference: Tensor, tally: Tally) -> Tensor:
        """What the distance to the base model costs."""
        tally.sums["reference_kl"] += float(divergence(inputs.logp.detach(), reference).sum())
        distance = PENALTIES[self.config.kl_estimator](inputs, reference)        # [K]
        return self.config.kl * (inputs.weights * distance).sum()

    def _rate(self) -> float:
        return schedules.rate(self.config, self.updates, self.steps, self.skipped.total())

    def _gradient_norm(self) -> float:
        """Hand the gradients to the optimiser's tensors, clip them, and say how long they were before."""
        for weight, master in zip(self._weights, self._masters, strict=True):
            if master is not weight and weight.grad is not None:
                master.grad = weight.grad.float()
                weight.grad = None
        return float(torch.nn.utils.clip_grad_norm_(self._masters, self.config.clip))

    def _step(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._forget_gradients()
        self.steps += 1
        with torch.no_grad():
            for weight, master in zip(self._weights, self._masters, strict=True):
                if master is not weight:
                    weight.copy_(master)

    def _forget_gradients(self) -> None:
        for tensor in (*self._weights, *self._masters):
            tensor.grad = None

    def _skip(self, reason: str, start: float) -> UpdateReport:
        self.skipped[reason] += 1
        return UpdateReport(self.policy.version, reason, seconds=time.perf_counter() - start, notes=self._heard())

    def _heard(self) -> tuple[str, ...]:
        notes, self._notes = tuple(self._notes), []
        return notes


def _on_cpu(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    return [_on_cpu(value) for value in state] if isinstance(state, list) else state
