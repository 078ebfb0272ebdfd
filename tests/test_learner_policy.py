"""The policy: what is trained, what is sampled, and that neither disturbs the other."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from learner_kit import VOCABULARY, random_groups, shake, tiny_folder, tiny_model, tiny_policy, tiny_tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM

from espl_envs.core.errors import EsplError
from espl_train.config import LearnerConfig, ModelConfig
from espl_train.learner import policy as policy_module
from espl_train.learner.policy import Policy
from espl_train.learner.update import Learner

IDS = torch.arange(2, 22).view(2, 10)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def sampled(policy: Policy, version: int | None) -> torch.Tensor:
    with policy.sampling_weights(version) as model:
        return logits(model)


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.causal.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_adapter_is_on_every_linear_layer_but_the_head_and_starts_as_the_base():
    policy = tiny_policy()
    layers = {name.rsplit(".lora_", 1)[0].rsplit(".", 1)[1] for name in policy.trainable_parameters()}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert torch.equal(logits(policy.model), logits(tiny_model()))
    assert torch.equal(sampled(policy, 0), logits(tiny_model()))


def test_the_adapter_is_drawn_from_the_seed_alone():
    first, again, other = tiny_policy(seed=3), tiny_policy(seed=3), tiny_policy(seed=4)
    assert same(first.state(), again.state())
    assert not same(first.state(), other.state())
    before = torch.random.get_rng_state()
    tiny_policy(seed=5)
    assert torch.equal(before, torch.random.get_rng_state())


def test_merged_sampling_is_the_adapter_and_leaves_every_weight_bit_equal():
    policy = tiny_policy(adapter=0.1)
    before = weights(policy)
    merged = sampled(policy, policy.version)
    torch.testing.assert_close(merged, logits(policy.model), atol=1e-5, rtol=1e-5)
    assert float((merged - sampled(policy, None)).abs().max()) > 0.1
    assert same(before, weights(policy))


def test_none_and_reference_are_the_base_model_bit_for_bit():
    policy = tiny_policy(adapter=0.1)
    sampled(policy, policy.version)
    assert torch.equal(sampled(policy, None), logits(tiny_model()))
    with policy.reference() as base:
        assert torch.equal(base(input_ids=IDS).logits, logits(tiny_model()))
        assert not base(input_ids=IDS).logits.requires_grad


def test_merged_weights_follow_the_adapter_however_it_changed():
    policy = tiny_policy(adapter=0.1)
    first = sampled(policy, 0)
    shake(policy, 0.1, seed=8)
    second = sampled(policy, 0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.add_(0.05)
    third = sampled(policy, 0)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    torch.testing.assert_close(third, logits(policy.model), atol=1e-4, rtol=1e-4)


def test_the_adapter_is_merged_once_per_version(monkeypatch):
    merged = []
    merge = policy_module._merge_into
    monkeypatch.setattr(policy_module, "_merge_into", lambda pairs: merged.append(merge(pairs)))
    policy = tiny_policy()
    for version in (0, 0, 0, None, 0):
        sampled(policy, version)
    assert len(merged) == 1
    policy.advance()
    sampled(policy, 1)
    assert len(merged) == 2


def test_sampling_models_are_plain_and_share_the_base():
    policy = tiny_policy()
    with policy.sampling_weights(0) as model:
        assert type(model) is type(tiny_model())
        assert model.get_input_embeddings().weight is policy.causal.get_input_embeddings().weight
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert not any(p.requires_grad for p in model.parameters())


def test_a_version_that_is_not_held_is_refused():
    with pytest.raises(EsplError, match="weights of version 4 were asked for, the policy holds version 0"):
        sampled(tiny_policy(), 4)


def test_training_and_sampling_take_turns_where_there_is_one_set_of_weights():
    policy = tiny_policy(mode="full")
    assert not policy.concurrent
    with policy.sampling_weights(0), policy.sampling_weights(None):
        expected = pytest.raises(RuntimeError, match="training was asked for while sampling goes on")
        with expected, policy.training():
            pass
    with policy.training():
        with policy.reference(), policy.sampling_weights(None):
            pass
        with pytest.raises(RuntimeError, match="take turns"), policy.sampling_weights(0):
            pass
    with policy.training():
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_version_is_sampled_as_it_was_while_training_makes_the_next(dtype):
    """A mutant that samples the trained weights themselves, or merges anew, shows in every one of the comparisons."""
    policy = Policy(tiny_model().to(dtype), tiny_tokenizer(), LearnerConfig(rank=4, alpha=8))
    shake(policy, 0.1)
    base, before = sampled(policy, None), sampled(policy, 0)
    assert not torch.equal(base, before)
    with policy.training():
        shake(policy, 0.1, seed=9)                       # the optimiser has stepped, the version is still 0
        assert torch.equal(sampled(policy, 0), before) and torch.equal(sampled(policy, None), base)
    policy.advance()
    assert torch.equal(sampled(policy, 0), before)       # asked again, until the next version is asked for
    after = sampled(policy, 1)
    assert not torch.equal(after, before) and torch.equal(sampled(policy, None), base)
    with pytest.raises(EsplError, match="weights of version 0 were asked for, the policy holds version 1"):
        sampled(policy, 0)


def test_what_was_not_kept_before_training_cannot_be_sampled_during_it():
    policy = tiny_policy(adapter=0.1)
    with policy.training(), pytest.raises(RuntimeError, match="no snapshot was taken of version 0"):
        sampled(policy, 0)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_state_is_a_copy_on_the_cpu_and_comes_back_bit_for_bit(mode):
    policy = tiny_policy(adapter=0.1, mode=mode)
    saved, before = policy.state(), logits(policy.model)
    shake(policy, 0.1, seed=9)
    assert not torch.equal(logits(policy.model), before)
    policy.load_state(saved, version=7)
    assert policy.version == 7
    assert torch.equal(logits(policy.model), before)
    assert same(saved, policy.state())


def test_state_of_another_model_is_refused():
    state = tiny_policy().state()
    with pytest.raises(EsplError, match="of another model or mode"):
        tiny_policy(mode="full").load_state(state)
    with pytest.raises(EsplError, match=r"'.*lora_A.*' is \(4, 32\), expected \(2, 32\)"):
        tiny_policy(rank=2).load_state(state)


def test_full_mode_keeps_a_frozen_reference():
    policy = tiny_policy(mode="full")
    shake(policy, 0.05)
    assert torch.equal(sampled(policy, None), logits(tiny_model()))
    assert torch.equal(sampled(policy, 0), logits(policy.model))
    assert not torch.equal(sampled(policy, 0), sampled(policy, None))


def test_full_mode_reads_its_reference_again_only_when_it_is_asked_for():
    calls = []
    reload = partial(lambda: calls.append(1) or tiny_model())
    policy = Policy(tiny_model(), tiny_tokenizer(), LearnerConfig(mode="full"), reload=reload)
    sampled(policy, 0)
    assert calls == []
    for _ in range(2):
        sampled(policy, None)
    assert calls == [1]


def test_a_bf16_base_keeps_its_adapter_in_fp32_and_unmerged():
    policy = Policy(tiny_model(dtype=torch.bfloat16), tiny_tokenizer(), LearnerConfig(rank=4))
    assert {p.dtype for p in policy.trainable_parameters().values()} == {torch.float32}
    shake(policy, 0.1)
    assert torch.equal(sampled(policy, 0), logits(policy.model))
    assert torch.equal(sampled(policy, None), logits(tiny_model(dtype=torch.bfloat16)))


def test_dropout_of_the_architecture_is_silent_in_training_too():
    policy = Policy(
        tiny_model(attention_dropout=0.5), tiny_tokenizer(), LearnerConfig(rank=4, gradient_checkpointing="on")
    )
    with policy.training() as model:
        assert model.training
        assert torch.equal(logits(model), logits(tiny_model()))
    assert not policy.model.training


def test_gradient_checkpointing_changes_no_gradient():
    plain, checkpointed = tiny_policy(adapter=0.1), tiny_policy(adapter=0.1, gradient_checkpointing="on")
    for policy in (plain, checkpointed):
        assert Learner(policy, policy.config).update(random_groups(0)).grad_norm > 0
    assert same(plain.state(), checkpointed.state())


def test_an_exported_adapter_loads_with_peft_and_acts_the_same(tmp_path):
    policy = tiny_policy(adapter=0.1)
    policy.save_adapter(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    assert torch.equal(logits(loaded), logits(policy.model))


def test_an_exported_adapter_names_its_base_as_the_user_did(tmp_path):
    tiny_folder(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    Policy(model, tiny_tokenizer(), LearnerConfig(rank=4), name="micro").save_adapter(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "micro"


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_merged_export_is_a_plain_model_that_acts_the_same(tmp_path, mode):
    policy = tiny_policy(adapter=0.05, mode=mode)
    before = weights(policy)
    policy.save_merged(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), sampled(policy, 0))
    assert same(before, weights(policy))
    assert Policy.load(ModelConfig(path=str(tmp_path)), LearnerConfig()).tokenizer.chat_template


def test_a_full_export_holds_model_and_tokenizer(tmp_path):
    policy = tiny_policy(adapter=0.05, mode="full")
    policy.save_adapter(tmp_path)
    again = Policy.load(ModelConfig(path=str(tmp_path)), LearnerConfig(mode="full"))
    assert torch.equal(logits(again.model), logits(policy.model))


def test_load_reads_a_folder(tmp_path):
    policy = Policy.load(ModelConfig(path=str(tiny_folder(tmp_path))), LearnerConfig(rank=4), seed=1)
    assert (policy.version, policy.context_length, policy.device.type) == (0, 64, "cpu")
    assert policy.causal.config.vocab_size == VOCABULARY
    assert policy.tokenizer("w5 w6")["input_ids"] == [5, 6]
