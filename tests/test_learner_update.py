"""One update: which tokens learn, what is skipped, that the split changes nothing, that a resume is bit-identical."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from learner_kit import group, random_groups, related_groups, rollout, tiny_model, tiny_policy, tiny_tokenizer

from espl_envs.core.errors import EsplError
from espl_train.config import LearnerConfig
from espl_train.learner import memory
from espl_train.learner import update as update_module
from espl_train.learner.advantages import assign
from espl_train.learner.logprobs import sequence_logprobs
from espl_train.learner.losses import LOSSES
from espl_train.learner.packing import pack
from espl_train.learner.policy import Policy
from espl_train.learner.update import Learner, UpdateReport
from espl_train.records import Group
from espl_train.runs import checkpoint


def learner(adapter: float = 0.1, temperature: float = 1.0, **settings) -> Learner:
    settings = {"rank": 4, "alpha": 8, "learning_rate": 1e-2, **settings}
    return Learner(tiny_policy(adapter, **settings), LearnerConfig(**settings), temperature)


def on_policy(who: Learner, groups: list[Group]) -> list[Group]:
    """The groups with the log-probabilities that the learner itself gives them."""

    def played(r):
        ids, turns = [], []
        for turn in r.turns:
            ids += [*turn.context, *turn.tokens]
            start = len(ids) - len(turn.tokens)
            logp = sequence_logprobs(who.policy.causal, ids, start, who.temperature).tolist()
            turns.append(replace(turn, logprobs=tuple(logp)))
        return replace(r, turns=tuple(turns))

    return [replace(g, rollouts=tuple(map(played, g.rollouts))) for g in groups]


def gradients(who: Learner, groups: list[Group]) -> dict[str, torch.Tensor]:
    """The gradient of the update that `who` would make, before clipping."""
    found = {}

    def look():
        found.update({n: p.grad.clone() for n, p in who.policy.trainable_parameters().items() if p.grad is not None})
        return float("nan")     # so that nothing is stepped

    who._gradient_norm = look
    who.update(groups)
    return found


def moments(who: Learner) -> list[torch.Tensor]:
    return [t.clone() for s in who.optimizer.state.values() for t in s.values()]


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_on_policy_the_gradient_is_the_policy_gradient(loss, mode):
    who = learner(loss=loss, mode=mode)
    groups = on_policy(who, random_groups(1))
    ours = gradients(who, groups)
    total = torch.zeros(())
    for g in groups:
        for r, advantage in zip(g.rollouts, g.advantages, strict=True):
            ids = [i for t in r.turns for i in (*t.context, *t.tokens)]
            mask = [m for t in r.turns for m in [0] * len(t.context) + [1] * len(t.tokens)]
            table = torch.log_softmax(who.policy.causal(input_ids=torch.tensor([ids])).logits[0], -1)
            total = total - advantage * sum(table[i - 1, ids[i]] for i in range(len(ids)) if mask[i])
    parameters = who.policy.trainable_parameters()
    theirs = torch.autograd.grad(total, list(parameters.values()))
    for name, expected in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(ours[name], expected, atol=1e-4, rtol=1e-4)


def slopes_at_positions(groups: list[Group], packed: bool, monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    """d loss / d hidden states under the head, and which of them predict a sampled id, for one micro-batch. [cells]"""
    who = learner()
    who.limits = replace(who.limits, packed=packed)
    who._appetite = memory.Appetite(0, 0)
    kept: list[torch.Tensor] = []
    rows: list[dict] = []
    decoder = type(who.policy.causal.get_decoder())
    forward = decoder.forward

    def keep(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.last_hidden_state.retain_grad()
        kept.append(out.last_hidden_state)
        rows.append(kwargs)
        return out

    monkeypatch.setattr(decoder, "forward", keep)
    who.update(groups)
    ids, cells = rows[0]["input_ids"], torch.arange(rows[0]["input_ids"].numel())
    paths = rows[0]["packed"].forest.places if packed else cells.view_as(ids)
    wanted = set()
    for r in (r for g in groups for r in g.rollouts):
        said: tuple[int, ...] = ()
        for turn in r.turns:
            said += turn.context
            wanted |= {(*said, *turn.tokens[:i]) for i in range(len(turn.tokens))}
            said += turn.tokens
    predicts = torch.zeros(len(cells), dtype=torch.bool)
    for path in paths:
        for i in range(len(path)):
            predicts[path[i]] |= tuple(ids.flatten()[path[: i + 1]].tolist()) in wanted
    return kept[0].grad.abs().sum(-1).flatten(), predicts


@pytest.mark.parametrize("packed", [True, False])
def test_positions_that_predict_no_sampled_token_have_exactly_zero_gradient(packed, monkeypatch):
    slope, predicts = slopes_at_positions(related_groups(3), packed, monkeypatch)
    assert bool((slope[~predicts] == 0).all())
    assert bool((slope[predicts] > 0).all())
    assert 0 < int(predicts.sum()) < len(predicts)


@pytest.mark.parametrize("packed", [True, False])
def test_a_mask_that_is_off_by_one_is_caught(packed, monkeypatch):
    def shifted(*args):
        return [replace(b, before=(b.before + 1) % b.size) for b in pack(*args)]

    monkeypatch.setattr(update_module, "pack", shifted)
    slope, predicts = slopes_at_positions(related_groups(3), packed, monkeypatch)
    assert bool((slope[~predicts] > 0).any())
    assert bool((slope[predicts] == 0).any())


def test_a_stop_token_that_was_sampled_is_learnt_and_one_that_was_appended_is_not():
    who, stop = learner(), 1
    sampled = rollout(1.0, [((2, 3), (4, stop))])
    appended = rollout(1.0, [((2, 3), (4,)), ((stop, 5), (6,))])
    for played, targets in ((sampled, [4, stop]), (appended, [4, 6])):
        (batch,) = who._micro_batches([group(played, advantages=(1.0,))])
        assert batch.targets.tolist() == targets


def test_a_batch_without_contrast_steps_nothing():
    who = learner()
    who.update(random_groups(0))
    weights, before = list(who.policy.state().values()), moments(who)
    flat = assign([group(rollout(1.0), rollout(1.0, sample=1)), group(rollout(1.0, task=1, faulted=True))])
    report = who.update(flat)
    assert report == UpdateReport(version=1, skipped="no contrast", seconds=report.seconds)
    assert same(weights, list(who.policy.state().values()))
    assert same(before, moments(who))
    assert (who.steps, who.policy.version, dict(who.skipped)) == (1, 1, {"no contrast": 1})


@pytest.mark.parametrize("poison", [float("-inf"), float("nan")])
def test_a_gradient_that_is_not_finite_steps_nothing_and_is_counted(poison):
    who = learner()
    who.update(random_groups(0))
    weights, before = list(who.policy.state().values()), moments(who)
    bad = random_groups(1)
    bad[0] = group(rollout(1.0, logprobs=[[-1.0, poison]]), advantages=(1.0,))
    assert who.update(bad).skipped == "gradient not finite"
    assert (who.steps, who.policy.version, dict(who.skipped)) == (1, 1, {"gradient not finite": 1})
    assert same(weights, list(who.policy.state().values()))
    assert same(before, moments(who))
    assert all(p.grad is None for p in who.policy.trainable_parameters().values())
    assert who.update(random_groups(2)).skipped is None


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_resume_is_bit_identical_over_three_updates(mode, tmp_path):
    straight = learner(mode=mode, warmup=4, weight_decay=0.1)
    for step in range(2):
        straight.update(random_groups(step))
    checkpoint.save(tmp_path, 2, {"learner": straight.state_dict()}, keep=1)
    resumed = learner(adapter=0.0, mode=mode, warmup=4, weight_decay=0.1)
    _, payloads = checkpoint.load_newest(tmp_path)
    resumed.load_state_dict(payloads["learner"])
    for step in range(2, 5):
        one, two = straight.update(random_groups(step)), resumed.update(random_groups(step))
        assert replace(one, seconds=0) == replace(two, seconds=0)
    assert same(list(straight.policy.state().values()), list(resumed.policy.state().values()))
    assert same(moments(straight), moments(resumed))
    assert straight.policy.version == resumed.policy.version == 5


def test_a_saved_state_does_not_change_with_later_updates():
    who = learner()
    who.update(random_groups(0))
    state = who.state_dict()
    copied = [t.clone() for s in state["optimizer"]["state"].values() for t in s.values()]
    who.update(random_groups(1))
    assert same(copied, [t for s in state["optimizer"]["state"].values() for t in s.values()])


def test_bf16_weights_learn_through_fp32_masters_and_resume():
    def fresh() -> Learner:
        config = LearnerConfig(mode="full", learning_rate=1e-5)
        return Learner(Policy(tiny_model(dtype=torch.bfloat16), tiny_tokenizer(), config), config)

    straight, resumed = fresh(), fresh()
    before = straight._masters[0].clone()
    straight.update(random_groups(0))
    foreign = {**straight.state_dict(), "masters": []}                        # as fp32 weights have it
    resumed.load_state_dict(foreign)
    assert same(resumed._masters, [w.float() for w in straight._weights])
    assert 0 < float((straight._masters[0] - before).abs().max()) < 1e-4      # below bf16's resolution at most weights
    resumed.load_state_dict(straight.state_dict())
    for step in (1, 2):
        straight.update(random_groups(step))
        resumed.update(random_groups(step))
    assert same(straight._masters, resumed._masters)
    assert same(straight._weights, [master.bfloat16() for master in straight._masters])
    assert same(list(straight.policy.state().values()), list(resumed.policy.state().values()))


def test_who_samples_beside_an_update_never_finds_new_weights_under_the_old_version(monkeypatch):
    """Not even between the step and its report, where several ranks wait for each other."""
    who, seen = learner(), []

    def weights(version):
        with who.policy.sampling_weights(version) as model:
            return [p.detach().clone() for p in model.parameters()]

    before, merge = weights(0), type(who.ranks).merge
    monkeypatch.setattr(type(who.ranks), "merge", lambda self, tally: (seen.extend(weights(0)), merge(self, tally)))
    assert who.update(random_groups(0)).skipped is None
    assert same(seen, before) and not same(weights(1), before)


def test_an_optimiser_without_room_names_its_share_and_the_knobs(monkeypatch):
    who = learner(mode="full")

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(who.optimizer, "step", full)
    with pytest.raises(EsplError, match=r"optimiser's step \(2\.00 GiB more were .*--learner\.mode lora"):
        who.update(random_groups(0))


def test_warm_up_raises_the_rate_linearly_and_skipped_updates_do_not_count():
    who = learner(warmup=4, learning_rate=0.4)
    flat = assign([group(rollout(1.0), rollout(1.0, sample=1))])
    rates = []
    for step in range(5):
        who.update(flat)
        rates.append(who.update(random_groups(step)).rate)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


def test_gradients_are_clipped_to_the_configured_norm(monkeypatch):
    who = learner(clip=1e-3)
    norms = []

    def look() -> None:
        norms.append(torch.stack([p.grad.norm() for p in who.policy.trainable_parameters().values()]).norm().item())

    monkeypatch.setattr(who.optimizer, "step", look)
    assert who.update(random_groups(0)).grad_norm > 1e-3
    assert norms == pytest.approx([1e-3], rel=1e-3)


def test_a_step_is_that_of_adamw_with_the_configured_numbers(monkeypatch):
    """Loshchilov & Hutter 2019, algorithm 2, over three steps of a warm-up; none of the numbers is a default."""
    settings = {"learning_rate": 0.3, "warmup": 4, "betas": (0.6, 0.8), "eps": 0.05, "weight_decay": 0.2, "clip": 0.5}
    who, slopes = learner(**settings), []
    step = who.optimizer.step
    monkeypatch.setattr(who.optimizer, "step", lambda: (slopes.append([p.grad.double() for p in who._weights]), step()))
    expected = [p.detach().double() for p in who._weights]
    first, second = ([torch.zeros_like(p) for p in expected] for _ in range(2))
    for t in range(1, 4):
        report, rate = who.update(random_groups(t)), 0.3 * t / 4
        assert report.rate == pytest.approx(rate)
        for weight, m, v, slope in zip(expected, first, second, slopes[-1], strict=True):
            m.copy_(0.6 * m + 0.4 * slope)
            v.copy_(0.8 * v + 0.2 * slope**2)
            move = m / (1 - 0.6**t) / ((v / (1 - 0.8**t)).sqrt() + 0.05)
            weight.copy_(weight - rate * (move + 0.2 * weight))
        for weight, p in zip(expected, who._weights, strict=True):
            torch.testing.assert_close(p.detach().double(), weight, atol=1e-5, rtol=1e-5)


def test_the_bounds_of_the_ratio_are_the_configured_ones():
    def clipped(*bounds: float) -> float:
        return learner(loss="ppo", ratio_bounds=bounds).update(groups).clip_fraction

    groups = random_groups(0)
    assert 0 == clipped(0.0, 1e9) < clipped(0.0, 1.28) < clipped(0.8, 1.28) < clipped(1.0, 1.0) < 1


def test_a_constant_denominator_is_the_configured_one():
    """Of a token: the constant times the number of sequences (arXiv 2503.20783, equation 3, its G and a constant)."""
    groups = random_groups(0)
    losses = [learner(normalise="constant", normalise_constant=n).update(groups).loss for n in (1, 500)]
    total = learner().update(groups).loss
    assert losses == pytest.approx([total / 12, total / 6000], rel=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_an_on_policy_batch_reports_ratios_of_one_and_no_divergence(temperature):
    who = learner(temperature=temperature)
    groups = on_policy(who, random_groups(4))
    report = who.update(groups)
    assert report.ratio_mean == pytest.approx(1.0, abs=1e-5)
    assert report.ratio_max == pytest.approx(1.0, abs=1e-4)
    assert report.behaviour_kl == pytest.approx(0.0, abs=1e-8)
    assert 0 < report.entropy < 4.2
    assert report.tokens == sum(r.sampled_tokens for g in groups for r in g.rollouts)
    assert report.sequences == 12
    assert (report.version, report.skipped, report.clip_fraction) == (1, None, 0.0)


def test_the_penalty_pulls_back_to_the_base_model():
    far, free = learner(adapter=0.2, kl=1e3), learner(adapter=0.2)
    groups = random_groups(5)
    report, first = far.update(groups), free.update(groups)
    assert report.reference_kl > 0
    assert first.reference_kl == 0
    for _ in range(15):
        last = far.update(groups)
    assert last.reference_kl < report.reference_kl / 2


@pytest.mark.parametrize(("estimator", "correction"), [("k1", "none"), ("k2", "none"), ("k3", "token_truncate")])
def test_the_penalty_is_the_estimators_at_the_temperature_of_the_samples(estimator, correction):
    """Its share of the loss, and both divergences of the report, from log-probabilities of whole sequences."""
    settings = {"normalise": "token_mean", "correction": correction, "kl_estimator": estimator, "temperature": 0.7}
    groups = random_groups(5)
    who = learner(adapter=0.2, kl=0.5, **settings)
    now, base, sampled = [], [], []
    for r in (r for g in groups for r in g.rollouts):
        ids = []
        for turn in r.turns:
            start = len(ids) + len(turn.context)
            ids += [*turn.context, *turn.tokens]
            now += who.policy.run(sequence_logprobs, ids, start, 0.7).tolist()
            base += who.policy.run(sequence_logprobs, ids, start, 0.7, reference=True).tolist()
            sampled += turn.logprobs
    logp, reference, behaviour = (torch.tensor(values, dtype=torch.float64) for values in (now, base, sampled))
    ratio, gap = (logp - behaviour).exp(), reference - logp
    penalty = {"k1": -ratio * gap, "k2": ratio * gap**2 / 2, "k3": ratio.clamp(max=2) * (gap.exp() - 1 - gap)}
    assert correction == "none" or bool((ratio > 2).any())
    report = who.update(groups)
    without = learner(adapter=0.2, **settings).update(groups)
    assert report.loss - without.loss == pytest.approx(0.5 * float(penalty[estimator].mean()), rel=1e-4)
    assert report.reference_kl == pytest.approx(float((gap.exp() - 1 - gap).mean()), rel=1e-4)
    assert report.behaviour_kl == pytest.approx(float((ratio - 1 - ratio.log()).mean()), rel=1e-4)


def test_the_penalty_is_nothing_while_the_adapter_is_the_base():
    groups = random_groups(6)
    plain, with_penalty = gradients(learner(adapter=0.0), groups), gradients(learner(adapter=0.0, kl=5.0), groups)
    for name in plain:
        torch.testing.assert_close(plain[name], with_penalty[name], atol=1e-4, rtol=1e-4)


def test_an_update_makes_better_rollouts_likelier_in_the_sampled_weights():
    who = learner(adapter=0.0)
    good, bad = rollout(1.0, [((2, 3), (4,))]), rollout(0.0, [((2, 3), (5,))], sample=1)

    def chance(token: int) -> float:
        with who.policy.sampling_weights(who.policy.version) as model, torch.no_grad():
            return torch.softmax(model(input_ids=torch.tensor([[2, 3]])).logits[0, -1], -1)[token].item()

    before = chance(4), chance(5)
    for _ in range(5):
        who.update(on_policy(who, assign([group(good, bad)])))
    assert chance(4) > before[0]
    assert chance(5) < before[1]


def test_a_model_whose_logits_would_be_others_is_refused_before_anything_is_sampled(monkeypatch):
    policy = tiny_policy(mode="full")
    monkeypatch.setattr(policy.causal.config, "final_logit_softcapping", 0.5, raising=False)      # which it ignores
    with pytest.raises(EsplError, match="finishes its logits in a way the learner does not know"):
        Learner(policy, policy.config)


@pytest.mark.parametrize(("key", "value"), [("loss", "pp0"), ("normalise", "summ"), ("baseline", "marginals")])
def test_unknown_names_fail_before_anything_is_sampled(key, value):
    with pytest.raises(EsplError, match=f"learner.{key} is '{value}'; did you mean"):
        learner(**{key: value})


def test_two_runs_on_the_cpu_are_bit_identical():
    one, two = learner(), learner()
    for groups in map(random_groups, range(3)):
        assert replace(one.update(groups), seconds=0) == replace(two.update(groups), seconds=0)
    assert same(list(one.policy.state().values()), list(two.policy.state().values()))
