"""Packed rows give every architecture exactly what its sequences alone would give, or the architecture is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from learner_kit import VOCABULARY, related_groups, tiny_tokenizer

from espl_train.config import LearnerConfig
from espl_train.learner import attention, forest
from espl_train.learner.attention import Packed, arguments, install, prove
from espl_train.learner.forest import Forest, grow, heads, lexicographic
from espl_train.learner.logprobs import token_logprobs
from espl_train.learner.packing import Limits, pack
from espl_train.learner.policy import Policy
from espl_train.learner.sequences import training_sequences
from espl_train.learner.update import Learner

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "pad_token_id": 0, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 1,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
WINDOW = {**GROUPED, "head_dim": 8, "sliding_window": 5}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

PACKABLE: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**SMALL),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=8),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**GROUPED, **EXPERTS, head_dim=8, num_experts=4),
    "mistral, sliding windows": lambda: hf.MistralConfig(**WINDOW),
    "gemma2, windows and capped scores": lambda: hf.Gemma2Config(**WINDOW, attn_logit_softcapping=0.5),
    "gemma3, windows in every other layer": lambda: hf.Gemma3TextConfig(**WINDOW),
    "gpt-oss, sinks": lambda: hf.GptOssConfig(**WINDOW, num_local_experts=4, num_experts_per_tok=2, rope_scaling=None),
    "deepseek, keys wider than values": lambda: hf.DeepseekV3Config(
        **SMALL, **EXPERTS, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6,
        n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1,
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SMALL),
    "phi": lambda: hf.PhiConfig(**SMALL),
    "opt, learned positions": lambda: hf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0,
    ),
    "gpt2, learned positions": lambda: hf.GPT2Config(**GPT),
    "granite, scaled scores": lambda: hf.GraniteConfig(**SMALL, attention_multiplier=0.5),
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "bloom": (
        lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4), "cannot be replaced",
    ),
    "gptj": (lambda: hf.GPTJConfig(**GPT, rotary_dim=4), "cannot be replaced"),
    "mamba": (
        lambda: hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4),
        "it has layers of type linear_attention",
    ),
}


def model_of(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Weights so strong that attention matters, biases and sinks that are not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=None)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p * 5 if p.dim() > 1 else p + 0.2 * torch.randn(p.shape))
    return model.to(dtype).eval()


def learner_of(model: Any, **settings: Any) -> Learner:
    config = LearnerConfig(**{"mode": "full", "learning_rate": 1e-3, **settings})
    return Learner(Policy(model, tiny_tokenizer(), config), config)


def gradient(who: Learner, limits: Limits, seed: int = 0) -> dict[str, torch.Tensor]:
    """Of the whole update, in the layout that `limits` ask for."""
    with who.policy.training(), torch.enable_grad():
        who._gradient(pack(training_sequences(related_groups(seed)), limits))
    found = {n: p.grad.clone() for n, p in who.policy.trainable_parameters().items() if p.grad is not None}
    who._forget_gradients()
    return found


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two gradients, relative to the largest entry."""
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).abs().max()) for n in one) / max(float(g.abs().max()) for g in one.values())


@pytest.fixture
def llama() -> Any:
    return model_of(PACKABLE["llama"](), torch.float32)


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_gradients_are_those_of_sequences_one_by_one(name):
    experts = name in ("qwen3_moe", "gpt-oss, sinks", "deepseek, keys wider than values")     # no kernels for fp64
    who = learner_of(model_of(PACKABLE[name](), torch.float32 if experts else torch.float64))
    assert who._notes == []
    single = gradient(who, Limits(1, packed=False))
    assert len(pack(training_sequences(related_groups(0)), Limits(10**6))) == 1
    for limits in (Limits(10**6), Limits(50)):
        assert apart(single, gradient(who, limits)) < (5e-6 if experts else 1e-6)     # norms are fp32 everywhere


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_packed_is_said_and_padded(name):
    config, reason = REFUSED[name]
    who = learner_of(model_of(config(), torch.float32))
    (note,) = who._notes
    assert note.startswith("the model is trained on padded rows: ")
    assert reason in note
    (batch,) = who._micro_batches(related_groups(0))
    assert set(batch.inputs) == {"input_ids"}
    padded = gradient(who, who.limits)                # padding is seen by nobody, though no mask hides it
    assert apart(gradient(who, Limits(1, packed=False)), padded) < 1e-4
    report = who.update(related_groups(0))
    assert report.notes == (note,)
    assert report.skipped is None


def test_in_fp32_packed_and_single_agree_to_a_millionth(llama):
    who = learner_of(llama, mode="lora", rank=4)
    assert apart(gradient(who, Limits(1, packed=False)), gradient(who, Limits(10**6))) < 1e-6


def packed_logprobs(model: Any, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    """Log-probabilities of the ids of each sequence but the first, all sequences in one row in this order."""
    row = grow(sequences, heads(sequences))
    before = torch.cat([place[:-1] for place in row.places])
    logp, _ = token_logprobs(model, arguments(Packed(row)), before, torch.cat([s[1:] for s in sequences]))
    return list(logp.split([len(s) - 1 for s in sequences]))


def some_sequences() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    found = [torch.randint(2, VOCABULARY, (n,), generator=random) for n in (20, 24, 9)]
    return [found[0], torch.cat([found[0][:18], found[1][:5]]), found[1], found[2]]


def test_nothing_of_one_sequence_reaches_another(llama):
    install(llama)
    sequences = some_sequences()
    before = packed_logprobs(llama, sequences)
    for changed in (2, 3):
        other = [s.clone() for s in sequences]
        other[changed][1:] = (other[changed][1:] + 7) % (VOCABULARY - 2) + 2
        after = packed_logprobs(llama, other)
        for i in range(4):
            assert torch.equal(before[i], after[i]) == (i != changed)


def test_nor_into_its_gradient(llama):
    install(llama)
    embedding = llama.get_input_embeddings().weight
    used = [set(s.tolist()) for s in some_sequences()]
    logp = packed_logprobs(llama, some_sequences())
    slope = torch.autograd.grad(logp[3].sum(), embedding)[0].abs().sum(1)
    head = llama.get_output_embeddings().weight
    assert head is not embedding
    assert set(slope.nonzero()[:, 0].tolist()) <= used[3]


def leaking(self: Packed) -> list[attention.Bucket]:
    """All sequences see all places before them in the row."""
    tables = plain_tables(self)
    total = len(self.forest.ids)
    self._origin = torch.arange(total)
    everything = attention.Bucket(torch.arange(total), torch.arange(total), torch.tensor([0]), (1, total, total))
    return [everything] if tables else []


plain_tables = Packed._tables


def forgetful(sequences: list[torch.Tensor], shared: list[int]) -> Forest:
    """Positions go on from sequence to sequence."""
    row = plain_grow(sequences, shared)
    return Forest(row.ids, torch.arange(len(row.ids)), row.places, row.shared)


plain_grow = forest.grow


def headless(self: Packed) -> list[attention.Bucket]:
    """Sequences do not see the head they share."""
    tables = plain_tables(self)
    for bucket in tables:
        hidden = torch.arange(bucket.shape[2]) < bucket.offsets[:, None, None, None]
        plain = bucket.mask(None, torch.float64)
        if plain is not None:
            bucket._masks[None, torch.float64] = plain.masked_fill(hidden, float("-inf"))
    return tables


@pytest.mark.parametrize("broken", ["leaking", "forgetful", "headless", "windowless"])
def test_the_proof_at_the_start_catches_what_is_broken(broken, monkeypatch):
    model = model_of(PACKABLE["mistral, sliding windows" if broken == "windowless" else "llama"]())
    assert prove(model) is None or install(model) is None
    assert prove(model) is None
    if broken == "forgetful":
        monkeypatch.setattr(forest, "grow", forgetful)
    elif broken == "windowless":
        attend = Packed.attend
        monkeypatch.setattr(Packed, "attend", lambda self, q, k, v, scale, *_: attend(self, q, k, v, scale, None))
    else:
        monkeypatch.setattr(Packed, "_tables", {"leaking": leaking, "headless": headless}[broken])
    assert "packed sequences do not give what single ones give" in str(prove(model))


def test_layers_that_do_not_say_how_far_they_look_back_are_refused(monkeypatch):
    model = model_of(hf.MistralConfig(**{**WINDOW, "sliding_window": 64}))
    install(model)
    assert prove(model) is None                       # wider than the probe: only what the layers say can tell
    for layer in model.get_decoder().layers:
        monkeypatch.setattr(layer.self_attn.config, "sliding_window", 64)
    witness = attention._Witness.attend
    monkeypatch.setattr(
        attention._Witness, "attend", lambda self, q, k, v, scale, _, *rest: witness(self, q, k, v, scale, None, *rest)
    )
    assert prove(model) == "its layers do not all say how far they look back"


def test_capped_scores_are_capped_in_plain_forward_passes_too():
    model = model_of(PACKABLE["gemma2, windows and capped scores"]())
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        uncapped = model(input_ids=ids).logits
        model.set_attn_implementation("eager")
        capped = model(input_ids=ids).logits
        model.set_attn_implementation("sdpa")
        install(model)
        ours = model(input_ids=ids).logits
    assert torch.equal(ours, capped)
    assert not torch.allclose(ours, uncapped)


def test_a_plain_forward_pass_is_bit_identical_with_the_packed_attention_installed():
    model, ids = model_of(PACKABLE["llama"](), torch.float32), torch.arange(2, 42).view(2, 20)
    mask = (torch.arange(20) < torch.tensor([[20], [13]])).long()
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits, model(input_ids=ids).logits
        assert install(model) is None
        after = model(input_ids=ids, attention_mask=mask).logits, model(input_ids=ids).logits
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_what_neighbours_share_stands_once():
    a, b = torch.arange(30), torch.cat([torch.arange(20), torch.arange(40, 45)])
    c, d = torch.arange(10), torch.arange(50, 70)
    assert lexicographic([d, b, a, c]) == [3, 2, 1, 0]
    assert heads([c, a, b, d]) == [0, 0, 20, 0]       # ten ids are not worth it
    row = grow([a, b, d], [0, 20, 0])
    assert row.ids.tolist() == [*range(30), *range(40, 45), *range(50, 70)]
    assert row.positions.tolist() == [*range(30), *range(20, 25), *range(20)]
    assert [p.tolist() for p in row.places] == [[*range(30)], [*range(20), *range(30, 35)], [*range(35, 55)]]


def test_the_order_is_that_of_the_ids_however_large():
    rows = [torch.tensor(x) for x in ([300], [2], [2, 70000], [2, 255], [70000])]
    assert lexicographic(rows) == [1, 3, 2, 0, 4]


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends_q: torch.Tensor, ends_k: torch.Tensor, *_: int,
          scale: float | None, window_size: tuple[int, int], enable_gqa: bool | None = None) -> torch.Tensor:
    """What `varlen_attn` computes on a GPU, by the textbook: causal, aligned at the ends. [T, H, D]"""
    assert enable_gqa in (None, q.shape[1] != k.shape[1])
    assert ends_q.dtype == ends_k.dtype == torch.int32
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    found = []
    for i in range(len(ends_q) - 1):
        rows, columns = slice(*ends_q[i : i + 2].tolist()), slice(*ends_k[i : i + 2].tolist())
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[columns]) * (scale or q.shape[-1] ** -0.5)
        asked, seen = scores.shape[1:]
        behind = torch.arange(seen - asked, seen)[:, None] - torch.arange(seen)
        hidden = (behind < 0) | ((behind > window_size[0]) & (window_size[0] >= 0))
        found.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v[columns]))
    return torch.cat(found)


@pytest.mark.parametrize("name", ["qwen2", "mistral, sliding windows", "granite, scaled scores"])
@pytest.mark.parametrize("broken", [False, True])
def test_the_tables_of_flash_attention_say_the_same(name, broken, monkeypatch):
    """The kernel itself needs a GPU; here a plain function takes its place, and the proof judges what it was told."""
    from torch.nn.attention import varlen

    told = []

    def recorded(*arguments: Any, **settings: Any) -> torch.Tensor:
        told.append(arguments)
        if broken:                        # mutant: keys end one id early
            settings["window_size"] = (settings["window_size"][0] + 1, 0)
            arguments = (*arguments[:4], (arguments[4] - 1).clamp(min=0), *arguments[5:])
        return flash(*arguments, **settings)

    model = model_of(PACKABLE[name]())
    install(model)
    monkeypatch.setattr(attention, "_flashes", lambda *_: True)
    monkeypatch.setattr(varlen, "varlen_attn", recorded)
    assert (prove(model) is None) is not broken
    if not broken:
        who = learner_of(model)
        monkeypatch.setattr(attention, "_flashes", lambda *_: False)
        single = gradient(who, Limits(1, packed=False))
        monkeypatch.setattr(attention, "_flashes", lambda *_: True)
        assert apart(single, gradient(who, Limits(10**6))) < 1e-6
    assert told


@pytest.mark.parametrize("name", ["llama", "gemma3, windows in every other layer"])
def test_half_precision_is_packed_too(name):
    assert learner_of(model_of(PACKABLE[name](), torch.bfloat16))._notes == []


def test_every_torch_is_told_what_it_knows_and_one_without_the_kernel_does_without(monkeypatch):
    """`enable_gqa` since 2.12, windows since 2.11, the kernel itself since 2.10: torch from 2.6 on is supported."""
    from torch.nn.attention import varlen

    told = []
    monkeypatch.setattr(attention, "_flashes", lambda *_: True)
    monkeypatch.setattr(varlen, "varlen_attn", lambda *a, **s: (told.append(s.keys()), flash(*a, **s))[1])
    for known in ({"scale", "window_size", "enable_gqa"}, {"scale", "window_size"}):
        monkeypatch.setattr(attention, "TOLD", known)
        model = model_of(PACKABLE["qwen2"]())
        install(model)
        assert prove(model) is None
        assert told[-1] == known
    monkeypatch.undo()
    half = torch.zeros(1, 2, 8, 64, dtype=torch.bfloat16)
    gpu = type("Gpu", (), {"is_cuda": True, "dtype": half.dtype, "shape": half.shape, "device": None})()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for known, flashes in (({"window_size"}, True), ({"is_causal"}, False), (set(), False)):
        monkeypatch.setattr(attention, "TOLD", known)
        assert attention._flashes(gpu, half) is flashes
    odd = type("Gpu", (), {"is_cuda": True, "dtype": half.dtype, "shape": (1, 2, 8, 60), "device": None})()
    monkeypatch.setattr(attention, "TOLD", {"window_size"})
    assert not attention._flashes(odd, half[..., :60])
