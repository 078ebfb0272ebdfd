"""What an update saw and did: sums over its micro-batches, and the report that they come to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from espl_train.learner.corrections import Corrected
from espl_train.learner.losses import LossInputs, LossOutputs, divergence

EMPTY: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What one update saw and did. Means are over the sampled tokens of the sequences that were trained on."""

    version: int                  # of the weights after the update
    skipped: str | None           # why nothing was stepped
    loss: float = 0.0
    grad_norm: float = 0.0        # before clipping
    rate: float = 0.0
    tokens: int = 0               # sampled ones
    sequences: int = 0
    ratio_mean: float = 1.0
    ratio_max: float = 1.0
    clip_fraction: float = 0.0
    entropy: float = 0.0          # of the distribution that was sampled from
    behaviour_kl: float = 0.0     # KL(behaviour ‖ policy): how far off-policy the batch is
    reference_kl: float = 0.0     # KL(policy ‖ base model); measured where `kl` > 0
    mismatch_mean: float = 0.0    # |log-probability of the learner - of the sampler|
    mismatch_max: float = 0.0
    corrected: float = 0.0        # share of tokens that passed a bound of the correction
    effective: float = 1.0        # share of tokens left effective by their importance weights w: (Σw)² / (K·Σw²)
    computed: int = 0             # ids that went through the model, contexts and padding included
    seconds: float = 0.0
    notes: tuple[str, ...] = ()   # what a person should hear: layouts, memory


@dataclass(slots=True)
class Tally:
    """Plain numbers over micro-batches: `sums` add up, `peaks` are maxima. Neither depends on how a batch was split.

    What a device computes stays there until `read`: to ask for each number would stop the host every time.
    """

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    peaks: dict[str, float] = field(default_factory=dict)
    _unread: list[tuple[list[str], list[str], Tensor]] = field(default_factory=list)

    def add(self, inputs: LossInputs, outputs: LossOutputs, loss: Tensor, entropy: Tensor, sequences: int) -> None:
        """Count one micro-batch in."""
        self.sums["tokens"] += len(inputs.logp)
        self.sums["sequences"] += sequences
        sums = {
            "loss": loss.detach(), "ratio": outputs.ratio, "clipped": outputs.clipped, "entropy": entropy,
            "behaviour_kl": divergence(inputs.behaviour, inputs.logp.detach()),
        }
        self.note(sums, {"ratio": outputs.ratio})

    def disagreement(self, inputs: LossInputs, corrected: Corrected) -> None:
        """Count in how far sampler and learner were apart, and what was done about it."""
        gap = (inputs.logp.detach() - inputs.behaviour).abs()
        sums = {
            "mismatch": gap, "corrected": corrected.bounded, "weight": corrected.weights,
            "weight_squared": corrected.weights.square(),
        }
        self.note(sums, {"mismatch": gap})

    def note(self, sums: Mapping[str, Tensor], peaks: Mapping[str, Tensor] = EMPTY) -> None:
        """Count in the sums and the maxima of tensors, all on one device; nobody waits for them."""
        parts = [*(value.sum() for value in sums.values()), *(value.max() for value in peaks.values())]
        wide = torch.promote_types(parts[0].dtype, torch.float32)
        self._unread.append(([*sums], [*peaks], torch.stack([part.to(wide) for part in parts])))

    def read(self) -> Tally:
        """Itself, with all that was noted in `sums` and `peaks`."""
        unread, self._unread = self._unread, []
        values = iter(torch.cat([part for _, _, part in unread]).tolist() if unread else ())
        for sums, peaks, _ in unread:
            for name in sums:
                self.sums[name] += next(values)
            for name in peaks:
                self.peaks[name] = max(self.peaks.get(name, 0.0), next(values))
        return self

    def report(
        self, version: int, *, grad_norm: float, rate: float, seconds: float, notes: tuple[str, ...] = ()
    ) -> UpdateReport:
        """The report of an update that was stepped."""
        sums, tokens = self.sums, self.sums["tokens"]
        return UpdateReport(
            version,
            skipped=None,
            loss=sums["loss"],
            grad_norm=grad_norm,
            rate=rate,
            tokens=int(tokens),
            sequences=int(sums["sequences"]),
            ratio_mean=sums["ratio"] / tokens,
            ratio_max=self.peaks["ratio"],
            clip_fraction=sums["clipped"] / tokens,
            entropy=sums["entropy"] / tokens,
            behaviour_kl=sums["behaviour_kl"] / tokens,
            reference_kl=sums["reference_kl"] / tokens,
            mismatch_mean=sums["mismatch"] / tokens,
            mismatch_max=self.peaks["mismatch"],
            corrected=sums["corrected"] / tokens,
            effective=sums["weight"] ** 2 / (tokens * sums["weight_squared"]) if sums["weight_squared"] else 0.0,
            computed=int(sums["computed"]),
            seconds=seconds,
            notes=notes,
        )
