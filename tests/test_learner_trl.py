"""The same loss values and gradients as TRL's GRPOTrainer, on the same log-probabilities, where TRL is installed."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from espl_train.learner import corrections
from espl_train.learner.losses import LOSSES, NORMALISATIONS, PENALTIES, LossInputs, Measure

pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[dev]'")

LENGTHS, WIDTH, LIMIT = (3, 6, 1, 4), 6, 10
MASK = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]                      # [B, T]


def drawn(seed: int) -> dict[str, torch.Tensor]:
    """Log-probabilities of learner, sampler and reference [B, T], and an advantage per sequence [B]."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    logp = -normal(4, WIDTH).abs() - 0.1
    return {
        "logp": logp, "old": logp + 0.4 * normal(4, WIDTH), "reference": logp + 0.5 * normal(4, WIDTH),
        "advantages": normal(4),
    }


def theirs(data: dict[str, torch.Tensor], kind: str, on_policy: bool, **changes: Any) -> tuple[float, torch.Tensor]:
    from trl.trainer.grpo_trainer import GRPOTrainer

    logp = data["logp"].clone().requires_grad_()
    args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    settings: dict[str, Any] = {
        "loss_type": kind, "epsilon_low": 0.2, "epsilon_high": 0.28, "importance_sampling_level": "token", "beta": 0.0,
        "use_vllm": False, "vllm_importance_sampling_correction": True, **changes,
    }
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None), args=args,
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, max_completion_length=LIMIT,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x), **settings,
    )
    ids = torch.zeros(4, 1, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": MASK.long(), "completion_mask": MASK.long(),
        "advantages": data["advantages"], "old_per_token_logps": None if on_policy else data["old"],
        "ref_per_token_logps": data["reference"], "num_items_in_batch": MASK.sum(),
        "importance_sampling_ratio": data.get("ratio"),
    }
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    loss.backward()
    return loss.item(), logp.grad[MASK]


def ours(
    data: dict[str, torch.Tensor], loss: str, normalise: str, bounds: tuple[float, float] | None = None,
    on_policy: bool = False, kl: float = 0.0, correction: str = "none",
) -> tuple[float, torch.Tensor]:
    logp = data["logp"][MASK].clone().requires_grad_()
    rows = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    weights = torch.tensor(NORMALISATIONS[normalise]([Measure(n, "root") for n in LENGTHS], LIMIT), dtype=torch.float64)
    behaviour = logp.detach() if on_policy else data["old"][MASK]
    x = LossInputs(logp, behaviour, data["advantages"][rows], weights[rows], rows, bounds)
    x = corrections.apply(x, correction).inputs
    value = LOSSES[loss](x).loss + kl * (x.weights * PENALTIES["k3"](x, data["reference"][MASK])).sum()
    value.backward()
    return value.item(), logp.grad


NARROW = {"importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.15}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kind", "changes", "mine"),
    [
        ("grpo", {}, {"loss": "ppo", "normalise": "sequence_mean", "bounds": (0.8, 1.28)}),
        ("dapo", {}, {"loss": "ppo", "normalise": "token_mean", "bounds": (0.8, 1.28)}),
        ("dr_grpo", {}, {"loss": "ppo", "normalise": "constant", "bounds": (0.8, 1.28)}),
        ("cispo", {"epsilon_high": 1.3}, {"loss": "cispo", "normalise": "token_mean", "bounds": (0.0, 1.3)}),
        ("grpo", NARROW, {"loss": "gspo", "normalise": "sequence_mean", "bounds": (0.9, 1.15)}),
        ("grpo", {"beta": 0.3}, {"loss": "ppo", "normalise": "sequence_mean", "on_policy": True, "kl": 0.3}),
    ],
    ids=["grpo", "dapo", "dr_grpo", "cispo", "gspo", "grpo with k3"],
)
def test_value_and_gradient_are_those_of_trl(kind: str, changes: dict, mine: dict, seed: int) -> None:
    data = drawn(seed)
    value, slope = theirs(data, kind, mine.get("on_policy", False), **changes)
    found, gradient = ours(data, **mine)
    assert found == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(gradient, slope, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("correction", [name for name in corrections.CORRECTIONS if name != "none"])
def test_corrections_are_those_of_trl(correction: str) -> None:
    data = drawn(7)
    chosen = corrections.CORRECTIONS[correction]
    gap = (data["logp"] - data["old"]) * MASK
    ratio = torch.exp(gap.sum(-1, keepdim=True) if chosen.per_sequence else gap)
    low, high = chosen.bounds
    data["ratio"] = ratio.clamp(low, high) if "truncate" in correction else ratio * ((low <= ratio) & (ratio <= high))
    value, slope = theirs(data, "dapo", on_policy=True, use_vllm=True)
    found, gradient = ours(data, "ppo", "token_mean", correction=correction)
    assert found == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(gradient, slope, atol=1e-12, rtol=1e-9)
