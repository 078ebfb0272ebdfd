"""The learner on the pretend device: every mode, layout and loss, its state, what it saves, and when it waits."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from device_kit import (
    CPU,
    DEVICE,
    PLAIN,
    both,
    changed,
    groups,
    is_there,
    learner_on,
    llama,
    measured,
    policy_on,
    refused,
    same_report,
    same_tensors,
)
from learner_kit import shake
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from espl_train.config import LearnerConfig
from espl_train.learner import norms, packing
from espl_train.learner.corrections import CORRECTIONS
from espl_train.learner.losses import LOSSES, PENALTIES
from espl_train.learner.packing import Limits

PER_UPDATE = 2          # the tally, and the norm of the gradient


def updates_packed_padded_and_one_by_one() -> None:
    for limits in (Limits(10**6), Limits(10**6, packed=False), Limits(40)):
        both(limits, updates=2)


def updates_in_every_mode() -> None:
    both(gradient_checkpointing="auto", updates=2)
    for device in (CPU, DEVICE):
        kinds = {type(m) for m in policy_on(device).causal.modules() if type(m).__name__ == "Qwen2RMSNorm"}
        assert [kind.__module__ == norms.__name__ for kind in kinds] == [device == DEVICE], "norms are one kernel there"
    both(mode="full", gradient_checkpointing="on", kl=0.1, learning_rate=1e-4)
    both(model=llama)
    both(dtype=torch.bfloat16, kl=0.1, bound=0.1)
    both(mode="full", dtype=torch.bfloat16, bound=0.1, learning_rate=1e-4)


def updates_with_every_loss_penalty_and_correction() -> None:
    here, there = learner_on(CPU), learner_on(DEVICE)
    settings: list[dict[str, Any]] = [{"loss": name} for name in LOSSES]
    settings += [{"kl": 0.1, "kl_estimator": name} for name in PENALTIES]
    settings += [{"correction": name} for name in CORRECTIONS]
    for setting in settings:
        for learner in (here, there):
            learner.config = LearnerConfig(**{**PLAIN, "learning_rate": 1e-12, **setting})
            learner.loss = LOSSES[learner.config.loss]
        same_report(there.update(groups(0)), here.update(groups(0)))


def an_update_waits_twice_however_many_micro_batches() -> None:
    for limits in (Limits(10**6), Limits(40), Limits(40, packed=False)):
        learner = learner_on(DEVICE, limits, kl=0.1, loss="gspo", correction="sequence_mask")
        learner.update(groups(0))
        batches = learner._micro_batches(groups(1))
        assert len(batches) > 1 or limits.tokens > 40
        with measured() as meter:
            learner.learn(batches)
        looks = 0 if limits.packed else 2 * len(batches)       # transformers asks whether padded rows are packed ones
        assert meter.waited == PER_UPDATE + looks, dict(meter.waits)


def a_number_that_is_asked_for_in_every_micro_batch_is_noticed() -> None:
    """Mutant: the tally as it would be written first."""
    learner, plain = learner_on(DEVICE, Limits(40)), learner_on(DEVICE).loss
    learner.update(groups(0))
    learner.loss = lambda inputs: (float(inputs.logp.detach().sum()), plain(inputs))[1]
    with measured() as meter:
        learner.update(groups(1))
    assert meter.waited > PER_UPDATE


def a_tensor_of_the_micro_batch_that_stays_on_the_cpu_is_noticed() -> None:
    """Mutants: each of them in turn is not moved."""
    whole, moved = packing.MicroBatch.to, set()
    for name in ("targets", "behaviour", "advantages", "weights", "input_ids"):      # `before`, an index, may be there

        def to(batch: Any, device: torch.device, left: str = name) -> Any:
            there = whole(batch, device)
            if left == "input_ids":
                there.inputs[left] = batch.inputs[left]
            else:
                object.__setattr__(there, left, getattr(batch, left))
            moved.add(left)
            return there

        learner = learner_on(DEVICE)
        with changed(packing.MicroBatch, "to", to):
            refused(lambda learner=learner: learner.update(groups(0)), RuntimeError, "same device")
    assert len(moved) == 5


def state_goes_round_by_the_cpu() -> None:
    """Two updates, or one, a checkpoint, another learner, and one more: bit for bit, but for what a GPU adds up in an
    order of its own."""
    bound = 1e-5 if DEVICE.type == "cuda" else 0.0
    for mode, rate in (("lora", 1e-3), ("full", 1e-4)):
        straight, first, second = (learner_on(DEVICE, mode=mode, learning_rate=rate) for _ in range(3))
        for step in range(2):
            straight.update(groups(step))
        first.update(groups(0))
        state = first.state_dict()
        assert not any(isinstance(leaf, Tensor) and is_there(leaf) for leaf in tree_leaves(state))
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state, f"{folder}/state.pt")
            second.load_state_dict(torch.load(f"{folder}/state.pt"))
        second.update(groups(1))
        same_tensors(second.policy.state(), straight.policy.state(), bound)


def what_is_saved_is_what_the_cpu_saves() -> None:
    with tempfile.TemporaryDirectory() as name:
        for device, folder in ((CPU, Path(name, "cpu")), (DEVICE, Path(name, "device"))):
            for mode in ("lora", "full"):
                policy = policy_on(device, mode=mode)
                policy.save_adapter(folder / mode)
                policy.save_merged(folder / f"{mode}-merged")
        files = [path.relative_to(Path(name, "cpu")) for path in Path(name, "cpu").rglob("*.safetensors")]
        assert len(files) == 4
        for file in files:
            same_tensors(load_file(Path(name, "device", file)), load_file(Path(name, "cpu", file)), 1e-6)


def snapshots_follow_training_on_the_device() -> None:
    ids = torch.arange(2, 12)[None]
    for dtype in (torch.float32, torch.bfloat16):
        logits = []
        for device in (CPU, DEVICE):
            policy = policy_on(device, dtype=dtype)
            with torch.no_grad():
                for version in (policy.version, None):
                    with policy.sampling_weights(version) as model:
                        logits.append(model(input_ids=ids.to(device)).logits.to(CPU).float())
                shake(policy, 0.2, seed=3)
                with policy.sampling_weights(policy.version) as model:
                    assert all(p.device == device for p in model.parameters())
                    logits.append(model(input_ids=ids.to(device)).logits.to(CPU).float())
        for here, there in zip(logits[:3], logits[3:], strict=True):
            assert (here - there).abs().max() <= (1e-4 if dtype == torch.float32 else 0.2)
        assert (logits[3] - logits[5]).abs().max() > 0.1
