"""Do both trainers learn the same from the same rollouts? Compared before anything is timed: a ratio of two speeds
means nothing where the work is not the same.

Our trainer plays one batch with an adapter that is not zero and learns from it; TRL's gets the very same token ids,
rewards and adapter. Prompts must be equal token by token, entropies and gradients up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.trainer.sides import our_trainer, replaying, system_prompt, trl_trainer
from benchmarks.trainer.work import Work, conversations
from espl_train.records import Rollout

BOUND = 1e-4      # the ratios of ours are e^(±rounding), those of TRL are 1


@dataclass(frozen=True)
class Agreement:
    """Relative distance of the gradients (norm of the difference over norm) and of the mean entropies."""

    gradient: float
    entropy: float

    def check(self) -> Agreement:
        """Itself. Raises SystemExit where the two trainers do not do the same."""
        if max(self.gradient, self.entropy) > BOUND:
            raise SystemExit(f"ours and TRL disagree: {self}")
        return self


def agree(work: Work) -> Agreement:
    """Let both learn from one batch."""
    with our_trainer(work) as trainer:
        adapter = _shake(trainer.policy)
        seen = _listen(trainer.policy.trainable_parameters())
        done = trainer.iterate()
    rollouts = done.rollouts
    theirs, entropy = _theirs(work, adapter, rollouts)
    return Agreement(_distance(seen, theirs), abs(done.update.entropy / entropy - 1))


def _theirs(work: Work, adapter: Mapping[str, Tensor], rollouts: list[Rollout]) -> tuple[dict[str, Tensor], float]:
    """Gradient and mean entropy by TRL's trainer."""
    from transformers import TrainerCallback

    class Once(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            control.should_training_stop = True

    with trl_trainer(work, callbacks=[Once()], **replaying(rollouts)) as trainer:
        _same_prompts(work, trainer.processing_class, rollouts)
        parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, value in adapter.items():
                parameters[name].copy_(value)
        seen = _listen(parameters)
        trainer.train()
        return seen, trainer.state.log_history[-1]["entropy"]


def _same_prompts(work: Work, tokenizer: Any, rollouts: list[Rollout]) -> None:
    asked = conversations(system_prompt(work), work.vocabulary)
    for rollout in rollouts:
        messages = [m.to_openai() for m in asked[rollout.key.task]]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if tuple(ids) != rollout.turns[0].context:
            raise SystemExit(f"ours and TRL give the model different prompts for task {rollout.key.task}")


def _shake(policy: Any) -> dict[str, Tensor]:
    """Move the adapter away from zero; the adapter."""
    random = torch.Generator().manual_seed(1)
    state = {k: v + 0.02 * torch.randn(v.shape, generator=random) for k, v in policy.state().items()}
    policy.load_state(state)
    return state


def _listen(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Sums of the gradients that will reach each parameter, before anything clips them."""
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.register_hook(partial(_add, sums[name]))
    return sums


def _add(total: Tensor, gradient: Tensor) -> None:
    total += gradient


def _distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    apart = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ours)
    return (apart / sum(float(value.double().square().sum()) for value in theirs.values())) ** 0.5
