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

from espl_train import schedule
from espl_train.compiling import compile_layers
from espl_train.config import Config, LearnerConfig
from espl_train.learner import attention, corrections, memory, schedules
from espl_train.learner.advantages import BASELINES
from espl_train.learner.logprobs import check_head, token_logprobs
from espl_train.learner.losses import LOSSES, NORMALISATIONS, PENALTIES, LossInputs, divergence
from espl_train.learner.naming import choose
from espl_train.learner.packing import Limits, MicroBatch, pack
from espl_train.learner.policy import Policy
from espl_train.learner.ranks import ALONE, Ranks, whole
from espl_train.learner.sequences import training_sequences
from espl_train.learner.tally import Tally, UpdateReport
from espl_train.profiling import span, window
from espl_train.records import Group

NO_CONTRAST = "no contrast"
NOT_FINITE = "gradient not finite"

__all__ = ["Learner", "UpdateReport"]


class Learner:
    """AdamW on the trainable weights of a policy.

    `temperature` is that of the samples; `updates` how many there will be in the whole run, for falling schedules.
    `ranks` are the processes that learn together: every one of them has a learner, that of rank 0 is the one to call.
    """

    def __init__(
        self, policy: Policy, config: LearnerConfig, temperature: float = 1.0, updates: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        if updates is None and config.schedule != "constant":
            raise ValueError(f"schedule '{config.schedule}' falls over a whole run: say of how many updates")
        self.policy = policy
        self.ranks = ranks
        self.config = config
        self.temperature = temperature
        self.updates = updates or 1
        self.loss = choose(LOSSES, config.loss, "learner.loss")
        choose(NORMALISATIONS, config.normalise, "learner.normalise")
        choose(BASELINES, config.baseline, "learner.baseline")
        policy.run(check_head, policy.name)
        unpacked = policy.run(attention.prove)
        width = policy.causal.config.get_text_config().hidden_size
        self.limits = Limits(config.micro_batch_tokens, width, packed=unpacked is None, share=ranks.size)
        if config.compile and not ranks.lockstep:
            compile_layers(policy.causal, policy.device)
        self._appetite: memory.Appetite | None = None
        self._notes = [f"{policy.name or 'the model'} is trained on padded rows: {unpacked}"] if unpacked else []
        self.steps = 0
        self.skipped: Counter[str] = Counter()
        self._weights = list(policy.trainable_parameters().values())
        self._masters = [p if p.dtype.itemsize >= 4 else p.detach().float() for p in self._weights]
        self.optimizer = torch.optim.AdamW(
            self._masters, lr=config.learning_rate, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )

    @classmethod
    def of(cls, config: Config, ranks: Ranks = ALONE) -> Learner:
        """The learner of a run, with the policy that it loads. Raises EsplError where that cannot be."""
        policy, (_, updates) = ranks.load(config), schedule.counts(config)
        with ranks.together():
            return cls(policy, config.learner, config.rollout.temperature, updates=updates, ranks=ranks)

    def update(self, groups: Sequence[Group]) -> UpdateReport:
        """Learn from one batch of groups (advantages assigned): at most one optimiser step."""
        start = time.perf_counter()
        while (report := self.learn(self.ranks.deal(self._micro_batches(groups)))) is None:
            continue
        return replace(report, seconds=time.perf_counter() - start)

    def learn(self, batches: Sequence[MicroBatch]) -> UpdateReport | None:
        """Learn from this rank's share of an update; None where memory ran out and the next attempt will need less."""
        start = time.perf_counter()
        if not any(self.ranks.exchange(len(batches))):
            return self._skip(NO_CONTRAST, start)
        with self.policy.training(), torch.enable_grad(), self.ranks.together():
            tally = self._gradient(batches)
            if tally is None:
                return None
            with span("update/optimiser"):
                norm = self._gradient_norm()
                if not math.isfinite(norm):
                    self._forget_gradients()
                    return self._skip(NOT_FINITE, start)
                rate = self._rate()
                self._step(rate)
                version = self.policy.advance()      # before the turn ends: whoever samples beside it must not find
        self.ranks.merge(tally)                      # new weights under the old version
        seconds = time.perf_counter() - start
        return tally.report(version, grad_norm=norm, rate=rate, seconds=seconds, notes=self._heard())

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-identical continuation needs, the trained weights included, on the CPU."""
        apart = any(master is not weight for master, weight in zip(self._masters, self._weights, strict=True))
        state = {
            "policy": self.policy.trainable_parameters(),
            "version": self.policy.version,
            "steps": self.steps,
            "skipped": dict(self.skipped),
            "optimizer": self.optimizer.state_dict(),
            "masters": self._masters if apart else [],
            "room": self._room(),
        }
        return self.ranks.gather(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`: weights, version, moments, counters. How many ranks made it is all the same.

        What was found to fit into memory is taken over where it was found in the same place: elsewhere there may be
        more.
        """
        state = self.ranks.spread(state)
        self.policy.load_state(state["policy"], state["version"])
        if (found := state["room"])["where"] == self._room()["where"]:
            self.limits = replace(self.limits, tokens=min(found["tokens"], self.limits.tokens))
            self.policy.checkpoint(found["checkpointing"] or self.policy.checkpointing)
        self.steps = state["steps"]
        self.skipped = Counter(state["skipped"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        with torch.no_grad():
            for master, saved in zip(self._masters, state["masters"] or self._weights, strict=True):
                master.copy_(saved)

    def _room(self) -> dict[str, Any]:
        """What fits into memory as far as it is known by now, and where."""
        where = memory.named(self.policy.device)
        return {"tokens": self.limits.tokens, "checkpointing": self.policy.checkpointing, "where": where}

    def _micro_batches(self, groups: Sequence[Group]) -> list[MicroBatch]:
        """The whole update, weights set; empty where there is nothing to learn."""
        config = self.config
        with span("update/pack"):
            return pack(training_sequences(groups, config.normalise, config.normalise_constant), self.limits)

    def _gradient(self, batches: Sequence[MicroBatch]) -> Tally | None:
        """The gradient of this rank's share; None where memory ran out on one and the next attempt will need less."""
        tally, failed, why = Tally(), (0, 0), None
        self._checkpoint_where_needed(max((batch.size for batch in batches), default=0))
        with window("update") as piece:
            for batch in batches:
                try:
                    with memory.watched():
                        self._accumulate(batch.to(self.policy.device), tally if batch.sequences else Tally())
                except memory.OutOfMemory as error:
                    if self.ranks.lockstep:
                        device, checkpointing = self.policy.device, self.policy.checkpointing
                        raise memory.explained(error, device, batch.size, checkpointing) from error
                    failed, why = (batch.size, batch.sequences), memory.OutOfMemory(str(error), error.wanted)
                    break
                piece()
        size, sequences = max(self.ranks.exchange(failed))
        if not size:
            return tally.read()
        self._forget_gradients()
        self._need_less(size, sequences, why)
        return None

    def _checkpoint_where_needed(self, ids: int) -> None:
        """Decide for gradient checkpointing where the largest micro-batch would not fit without."""
        if self.config.gradient_checkpointing != "auto" or self.policy.checkpointing or self.ranks.lockstep:
            return
        if self._appetite is None:
            self._appetite = memory.appetite(self.policy.causal)
        mine, there = self._appetite.need(ids, checkpointing=False), memory.free(self.policy.device)
        _, need, there, ids = max(self.ranks.exchange((mine / max(there, 1), mine, there, ids)))
        if need > memory.USABLE * there and self.policy.causal.supports_gradient_checkpointing:
            self.policy.checkpoint(True)
            self._notes.append(f"gradient checkpointing from now on: {memory.compared(need, there, ids)}")

    def _need_less(self, size: int, sequences: int, error: memory.OutOfMemory | None) -> None:
        """Checkpointing where it may be chosen, then smaller micro-batches: the gradient stays the same. Raises
        EsplError when there is no more to be done, on the rank whose memory it was.
        """
        possible = self.policy.causal.supports_gradient_checkpointing and not self.policy.checkpointing
        if self.config.gradient_checkpointing == "auto" and possible:
            self.policy.checkpoint(True)
            change = "gradient checkpointing"
        elif sequences > 1:
            self.limits = replace(self.limits, tokens=max(1, size // 2))
            change = f"learner.micro_batch_tokens = {self.limits.tokens}"
        elif error is not None:
            raise memory.explained(error, self.policy.device, size, self.policy.checkpointing) from error
        else:
            return
        self._notes.append(f"memory ran out with a micro-batch of {size} ids: {change} from now on")

    def _accumulate(self, batch: MicroBatch, tally: Tally) -> None:
        """Add one micro-batch's share to the gradient and to the tally."""
        with span("update/forward"):
            reference = self._reference(batch) if self.config.kl else None
            inputs, entropy = self._loss_inputs(batch)
            corrected = corrections.apply(inputs, self.config.correction, self.config.correction_bounds)
            outputs = self.loss(corrected.inputs)
            penalty = 0.0 if reference is None else self._penalty(corrected.inputs, reference, tally)
            loss = outputs.loss + penalty
        with span("update/backward"):
            loss.backward()
        tally.add(inputs, outputs, loss, entropy, batch.sequences)
        tally.sums["computed"] += batch.size
        tally.disagreement(inputs, corrected)

    def _loss_inputs(self, batch: MicroBatch) -> tuple[LossInputs, Tensor]:
        """What the losses work on, log-probabilities with their gradient; and the entropies. [K] each"""
        logp, entropy = self.policy.run(token_logprobs, batch.inputs, batch.before, batch.targets, self.temperature)
        bounds = self.config.ratio_bounds
        return LossInputs(logp, batch.behaviour, batch.advantages, batch.weights, batch.rows, bounds=bounds), entropy

    def _reference(self, batch: MicroBatch) -> Tensor:
        """Log-probabilities under the frozen base model. [K]"""
        where = batch.inputs, batch.before, batch.targets, self.temperature
        logp: Tensor = self.policy.run(token_logprobs, *where, reference=True)[0]
        return logp

    def _penalty(self, inputs: LossInputs, reference: Tensor, tally: Tally) -> Tensor:
        """What the distance to the base model costs."""
        tally.note({"reference_kl": divergence(inputs.logp.detach(), reference)})
        distance = PENALTIES[self.config.kl_estimator](inputs, reference)        # [K]
        return self.config.kl * (inputs.weights * distance).sum()

    def _rate(self) -> float:
        return schedules.rate(self.config, self.updates, self.steps, self.skipped.total())

    def _gradient_norm(self) -> float:
        """Hand the gradients to the optimiser's tensors, summed over the ranks; clip them, say how long they were."""
        for weight, master in zip(self._weights, self._masters, strict=True):
            if master is not weight and weight.grad is not None:
                master.grad = weight.grad.float()
                weight.grad = None
        self.ranks.add_up(self._masters)
        return float(whole(torch.nn.utils.clip_grad_norm_(self._masters, self.config.clip)))

    def _step(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            with memory.watched():
                self.optimizer.step()
        except memory.OutOfMemory as error:
            raise memory.unstepped(error, self.policy.device, sum(p.numel() for p in self._masters)) from error
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
