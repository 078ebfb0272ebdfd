"""What an update saw and did: sums over its micro-batches, and the report that they come to."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch import Tensor

from espl_train.learner.corrections import Corrected
from espl_train.learner.losses import LossInputs, LossOutputs, divergence


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
    """Plain numbers over micro-batches: `sums` add up, `peaks` are maxima. Neither depends on how a batch was split."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    peaks: dict[str, float] = field(default_factory=dict)

    def add(self, inputs: LossInputs, outputs: LossOutputs, loss: Tensor, entropy: Tensor, sequences: int) -> None:
        """Count one micro-batch in."""
        self.sums["loss"] += float(loss.detach())
        self.sums["ratio"] += float(outputs.ratio.sum())
        self.sums["clipped"] += float(outputs.clipped.sum())
        self.sums["entropy"] += float(entropy.sum())
        self.sums["behaviour_kl"] += float(divergence(inputs.behaviour, inputs.logp.detach()).sum())
        self.sums["tokens"] += len(inputs.logp)
        self.sums["sequences"] += sequences
        self.peaks["ratio"] = max(self.peaks.get("ratio", 0.0), float(outputs.ratio.max()))

    def disagreement(self, inputs: LossInputs, corrected: Corrected) -> None:
        """Count in how far sampler and learner were apart, and what was done about it."""
        gap = (inputs.logp.detach() - inputs.behaviour).abs()
        self.sums["mismatch"] += float(gap.sum())
        self.sums["corrected"] += float(corrected.bounded.sum())
        self.sums["weight"] += float(corrected.weights.sum())
        self.sums["weight_squared"] += float(corrected.weights.square().sum())
        self.peaks["mismatch"] = max(self.peaks.get("mismatch", 0.0), float(gap.max()))

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
