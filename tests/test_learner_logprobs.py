"""The chunked head against the plain formula: values, gradients, temperature, and architectures."""

from __future__ import annotations

import pytest
import torch
from learner_kit import VOCABULARY, tiny_model, tiny_policy
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig

from espl_envs.core.errors import EsplError
from espl_train.learner import logprobs
from espl_train.learner.logprobs import (
    Head,
    check_head,
    chunked_logprobs,
    head_of,
    passage_logprobs,
    sequence_logprobs,
    token_logprobs,
)


def parts(seed: int = 0, rows: int = 7, cap: float | None = None, bias: bool = False):
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 8, generator=random, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(VOCABULARY, 8, generator=random).requires_grad_()
    shift = torch.randn(VOCABULARY, generator=random).requires_grad_() if bias else None
    targets = torch.randint(VOCABULARY, (rows,), generator=random)
    return Head(weight, shift, 0.7 if cap else 1.0, cap), hidden, targets


def plain(head: Head, hidden: torch.Tensor, targets: torch.Tensor, temperature: float):
    logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    logits = logits * head.scale
    if head.cap:
        logits = torch.tanh(logits / head.cap) * head.cap
    table = torch.log_softmax(logits / temperature, -1)
    return table.gather(1, targets[:, None])[:, 0], -(table.exp() * table).sum(1)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize(("cap", "bias"), [(None, False), (None, True), (3.0, False)])
def test_chunked_head_is_the_full_log_softmax_in_value_and_gradient(temperature, chunk, cap, bias):
    head, hidden, targets = parts(cap=cap, bias=bias)
    leaves = [t for t in (hidden, head.weight, head.bias) if t is not None]
    pull = torch.randn(len(targets), generator=torch.Generator().manual_seed(1))
    ours, entropy = chunked_logprobs(head, hidden, targets, temperature, chunk)
    theirs, plain_entropy = plain(head, hidden, targets, temperature)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, plain_entropy, atol=1e-5, rtol=1e-5)
    slopes, plain_slopes = (torch.autograd.grad((x * pull).sum(), leaves) for x in (ours, theirs))
    torch.testing.assert_close(slopes, plain_slopes, atol=2e-5, rtol=1e-4)


def test_a_frozen_head_gets_no_gradient_and_nothing_wider_than_a_chunk_is_kept():
    head, hidden, targets = parts(rows=64)
    head = Head(head.weight.detach(), None)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        chunked_logprobs(head, hidden, targets, chunk=4)[0].sum().backward()
    assert max(kept) < 64 * VOCABULARY
    assert hidden.grad is not None


@pytest.mark.parametrize(("bound", "rows"), [(100 * VOCABULARY, 100), (VOCABULARY, 64)])
def test_no_more_logits_exist_at_once_than_a_chunk_holds(bound, rows, monkeypatch):
    """As the learner calls it; a chunk is never so short that reading the head is most of the work."""
    monkeypatch.setitem(logprobs.CHUNK, "cpu", bound)
    made: list[int] = []
    logits = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, hidden: (made.append(len(hidden)), logits(self, hidden))[1])
    head, hidden, targets = parts(rows=250)
    chunked_logprobs(head, hidden, targets)
    assert (max(made), sum(made)) == (rows, 250)


def test_only_the_requested_positions_come_back():
    model = tiny_model()
    ids = torch.randint(2, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    before = torch.tensor([3, 4, 9 + 6])
    logp, entropy = token_logprobs(model, {"input_ids": ids}, before, ids.flatten()[before + 1], 0.7)
    table = torch.log_softmax(model(input_ids=ids).logits / 0.7, -1).flatten(0, 1)[before]
    torch.testing.assert_close(logp, table.gather(1, ids.flatten()[before + 1, None])[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_training_and_cached_sampling_agree_to_1e_5_with_a_live_adapter(temperature):
    policy = tiny_policy(adapter=0.1)
    ids = torch.randint(2, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(3))
    with policy.sampling_weights(policy.version) as model, torch.no_grad():
        first = model(input_ids=ids[:, :10], use_cache=True)
        rows, cache = [first.logits[:, -1]], first.past_key_values
        for i in range(10, 23):
            step = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            rows, cache = [*rows, step.logits[:, -1]], step.past_key_values
        sampled = torch.log_softmax(torch.cat(rows) / temperature, -1).gather(1, ids[0, 10:, None])[:, 0]
        base = sequence_logprobs(policy.causal, ids[0].tolist(), 10, temperature * 1.01)
    learnt = sequence_logprobs(policy.causal, ids[0].tolist(), 10, temperature)
    assert (sampled - learnt).abs().max().item() < 1e-5
    assert (sampled - base).abs().max().item() > 1e-3


SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "pad_token_id": 0,
}
ARCHITECTURES = {
    "llama": LlamaConfig(**SMALL),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=2, final_logit_softcapping=0.5),
    "granite": GraniteConfig(**SMALL, logits_scaling=3.0),
    "cohere": CohereConfig(**SMALL, logit_scale=0.1),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_head_of_other_architectures_is_known(name):
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval()
    check_head(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    ids = torch.arange(2, 12)[None]
    table = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
    expected = table.gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(sequence_logprobs(model, ids[0].tolist(), 1), expected, atol=1e-5, rtol=0)


def test_a_model_that_finishes_its_logits_otherwise_is_refused():
    model = tiny_model()
    forward = model.forward

    def halved(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits / 2
        return out

    model.forward = halved
    with pytest.raises(EsplError, match="finishes its logits"):
        check_head(model, "odd")


def test_bf16_heads_are_computed_as_the_model_computes_them():
    model = tiny_model(dtype=torch.bfloat16)
    check_head(model)
    assert head_of(model).weight.dtype == torch.bfloat16
    ids = list(range(2, 20))
    ours = sequence_logprobs(model, ids, 1)
    table = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, :-1].float(), -1)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, table.gather(1, torch.tensor(ids)[1:, None])[:, 0], atol=1e-5, rtol=0)


def test_passages_together_are_what_each_is_alone():
    causal, random = tiny_policy(adapter=0.1).causal, torch.Generator().manual_seed(3)
    passages = [
        (torch.randint(VOCABULARY, (length,), generator=random).tolist(), temperature)
        for length, temperature in ((20, 1.0), (9, 0.7), (31, 1.0), (20, 1.3))
    ]
    with torch.no_grad():
        together = passage_logprobs(causal, passages, 8)
        alone = [sequence_logprobs(causal, tokens, 8, temperature) for tokens, temperature in passages]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other.double(), atol=2e-6, rtol=0)
