"""The learner against another implementation: the same rollouts give the gradient that TRL's GRPOTrainer computes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from espl_train.learner import losses

pytest.importorskip("trl", reason="TRL is a development dependency: pip install 'espl[dev]'")

from benchmarks.trainer.agreement import agree
from benchmarks.trainer.models import MICRO
from benchmarks.trainer.work import Work

WORK = Work(str(MICRO), problems=2, samples=4, new_tokens=12, rules=8)


def test_gradient_and_entropy_are_those_of_trl() -> None:
    agree(WORK).check()


def test_a_loss_that_is_a_thousandth_off_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = losses.LOSSES["importance_sampling"]

    def wrong(inputs: losses.LossInputs) -> losses.LossOutputs:
        outputs = right(inputs)
        return replace(outputs, loss=outputs.loss * 1.001)

    monkeypatch.setitem(losses.LOSSES, "importance_sampling", wrong)
    with pytest.raises(SystemExit, match="disagree"):
        agree(WORK).check()
