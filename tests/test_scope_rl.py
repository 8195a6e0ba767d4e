"""scope_rl.py against a loop over the published formulas, sample by sample and token by token."""

import json
import math
import statistics

import pytest
import torch

from scope_rl import BOOST_RATE, TemperatureRule, group_advantages, objective_table, scope_loss

P, G, M, C = 4, 6, 5, 7  # prompts, completions of each, auxiliary samples, tokens


def reference_objective(batch, alpha=0.3, eps=0.2, eps_high=None, coef=0.0):
    """J of the published equations in plain Python: no masks, no weights, one scalar at a time."""
    eps_high = eps if eps_high is None else eps_high
    logprobs, old, entropies, lengths, rewards, auxiliary_rewards = batch

    def mean_over_tokens(i, advantage):
        total = 0.0
        for t in range(lengths[i]):
            r = (logprobs[i, t] - old[i, t]).exp()
            total = total + min(r * advantage, min(max(r.item(), 1 - eps), 1 + eps_high) * advantage)
        return total / int(lengths[i])

    J = 0.0
    for i in range(P * G):
        group = rewards[i // G].tolist()
        advantage = (group[i % G] - statistics.mean(group)) / (statistics.pstdev(group) + 1e-4)
        J = J + (mean_over_tokens(i, advantage) + coef * entropies[i, : lengths[i]].mean()) / (P * G)
    for a, reward in enumerate(auxiliary_rewards.tolist()):
        if reward == 1:
            J = J + alpha * mean_over_tokens(P * G + a, 1.0) / len(auxiliary_rewards)
    return J


def random_batch(seed=0):
    torch.manual_seed(seed)
    B = P * G + M
    old = -torch.rand(B, C, dtype=torch.float64) * 3
    logprobs = (old + torch.randn(B, C, dtype=torch.float64) * 0.3).requires_grad_()
    entropies = torch.rand(B, C, dtype=torch.float64).requires_grad_()
    lengths = torch.randint(1, C + 1, (B,))
    lengths[0], lengths[1] = 1, C  # a completion of one token, and one without padding
    rewards = torch.randint(2, (P, G)).double()
    rewards[0] = 1.0  # all equal: no advantage
    auxiliary_rewards = torch.randint(2, (M,)).double()
    return logprobs, old, entropies, lengths, rewards, auxiliary_rewards


def our_loss(batch, alpha=0.3, eps=0.2, eps_high=None, coef=0.0):
    logprobs, old, entropies, lengths, rewards, auxiliary_rewards = batch
    mask = torch.arange(C) < lengths[:, None]
    old = torch.where(mask, old, math.nan)  # whatever stands in the padding must not matter
    objective = objective_table(rewards, auxiliary_rewards, alpha, coef)
    return scope_loss(logprobs, old, entropies, mask, objective, eps, eps_high)


@pytest.mark.parametrize("options", [{}, {"eps_high": 0.28}, {"coef": 0.1}, {"alpha": 0}, {"alpha": 1 / 64, "eps": 0.1}])  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_equal_the_loop(seed, options):
    batch = random_batch(seed)
    loss, expected = our_loss(batch, **options)[0], -reference_objective(batch, **options)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    logprobs, _, entropies, *_ = batch
    gradients = [torch.autograd.grad(value, (logprobs, entropies)) for value in (loss, expected)]
    torch.testing.assert_close(*gradients, atol=1e-14, rtol=1e-10)


def test_clipped_tokens_are_those_without_gradient():
    batch = random_batch(1)
    loss, clipped = our_loss(batch)
    gradient = torch.autograd.grad(loss, batch[0])[0]
    mask = torch.arange(C) < batch[3][:, None]
    advantages = objective_table(batch[4], batch[5], 0.3).advantages
    assert 0 < clipped == (mask & (gradient == 0) & (advantages != 0)[:, None]).sum()


def test_the_auxiliary_term_divides_by_all_its_samples():
    """At r = 1 each positive auxiliary token's gradient is alpha / (M |o|), however many of the M are positive."""
    logprobs, _, entropies, lengths, rewards, _ = random_batch(2)
    for positives in (1, 3):
        auxiliary = torch.tensor([1.0] * positives + [0.0] * (M - positives), dtype=torch.float64)
        same = logprobs.detach().clone().requires_grad_()
        loss, _ = our_loss((same, same.detach(), entropies, lengths, rewards, auxiliary), alpha=0.3)
        gradient = torch.autograd.grad(-loss, same)[0][P * G :].sum(1)
        torch.testing.assert_close(gradient, 0.3 * auxiliary / M)


def test_batches_with_nothing_to_learn_from_are_zero_and_finite():
    logprobs, old, entropies, lengths, rewards, auxiliary = random_batch(3)
    for same in (torch.zeros_like(rewards), torch.ones_like(rewards)):
        loss, _ = our_loss((logprobs, old, entropies, lengths, same, torch.zeros_like(auxiliary)))
        assert loss.item() == 0.0
        assert not torch.autograd.grad(loss, logprobs)[0].any()
    # No auxiliary sample at all (plain GRPO).
    B = P * G
    grpo, _ = our_loss((logprobs[:B], old[:B], entropies[:B], lengths[:B], rewards, auxiliary[:0]))
    both, _ = our_loss((logprobs, old, entropies, lengths, rewards, auxiliary), alpha=0.0)
    assert grpo.item() == pytest.approx(both.item(), rel=1e-12)


def test_group_advantages():
    advantages = group_advantages(torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0.5, 1, 0, 0]]))
    right, wrong = math.sqrt(3), -math.sqrt(1 / 3)  # sqrt((1 - p) / p) and -sqrt(p / (1 - p)) at p = 1/4
    assert advantages[0].tolist() == pytest.approx([right, wrong, wrong, wrong], rel=1e-3)
    assert not advantages[1:3].any()  # all equal
    torch.testing.assert_close(advantages.sum(1), torch.zeros(4), atol=1e-6, rtol=0)
    grades = torch.arange(100)[:, None] / 100
    assert not group_advantages(grades.expand(-1, 10)).any()  # equal grades, which rounding must not part


def test_the_published_temperature_rule():
    """T = clip(1 + H0 - H, 0.8, 1.2), whatever came before."""
    rule = TemperatureRule(target=0.5)
    assert rule.temperature == 1.0  # of the first step, before any entropy is known
    temperatures = {0.5: 1.0, 0.4: 1.1, 0.1: 1.2, 0.0: 1.2, 0.65: 0.85, 0.9: 0.8, 3.0: 0.8, 0.3: 1.2}
    for H, T in temperatures.items():
        assert rule(H) == rule.temperature == pytest.approx(T)


LAW = {"target": 0.4, "gain": 2.0, "integral_gain": 0.3, "minimum": 0.5, "maximum": 1.5}


def positional(entropies, top):
    """The same law by its other formula: an offset and an integral, which is put back where T is clipped."""
    integral, temperatures = 0.0, []
    for H in entropies:
        integral += LAW["integral_gain"] * (LAW["target"] - H)
        proportional = 1 + LAW["gain"] * (entropies[0] - H)
        temperatures.append(min(max(proportional + integral, LAW["minimum"]), top))
        integral = temperatures[-1] - proportional
    return temperatures


@pytest.mark.parametrize("max_boost", [1.0, 2.0])
@pytest.mark.parametrize("spread", [0.05, 1.0])
def test_the_velocity_form_is_the_positional_form_and_beyond_its_clip_a_boost(spread, max_boost):
    entropies = (0.4 + spread * (torch.rand(200, dtype=torch.float64) - 0.4)).tolist()
    rule, got = TemperatureRule(**LAW, max_boost=max_boost), []
    for H in entropies:
        assert rule(H) == rule.temperature
        got.append([rule.temperature, rule.boost])
    wanted = positional(entropies, top=1.5 + math.log(max_boost) / BOOST_RATE)
    by_formula = [[min(T, 1.5), math.exp(BOOST_RATE * max(0.0, T - 1.5))] for T in wanted]
    torch.testing.assert_close(*torch.tensor([got, by_formula], dtype=torch.float64), atol=1e-12, rtol=0)
    assert any(T in (0.5, 1.5) for T, _ in got) == (spread == 1.0)  # clipped in one of the cases
    assert max(boost for _, boost in got) == pytest.approx(max_boost if spread == 1.0 else 1.0)


@pytest.mark.parametrize("integral_gain", [0.0, 0.3])
def test_a_rule_goes_on_from_its_state(integral_gain):
    law = LAW | {"integral_gain": integral_gain, "max_boost": 2.0}
    first, second = TemperatureRule(**law), TemperatureRule(**law)
    for H in (0.45, 0.0):
        first(H)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second == first
    assert [second(H) for H in (0.31, 0.36)] == [first(H) for H in (0.31, 0.36)]


def test_the_table_says_what_each_sample_weighs():
    """The table of the module's docstring, with and without a bonus; and which rows J depends on."""
    rewards, auxiliary = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([1.0, 0.0, 0.5])
    table = objective_table(rewards, auxiliary, scope_alpha=0.6)
    assert table.advantages.tolist() == pytest.approx([1, -1, 0, 0, 1, 0, 0], abs=1e-3)
    assert table.weights.tolist() == pytest.approx([1 / 4] * 4 + [0.6 / 3] * 3)
    assert table.entropy_coefs.tolist() == [0.0] * 7
    assert table.has_gradient().tolist() == [True, True, False, False, True, False, False]
    with_bonus = objective_table(rewards, auxiliary, scope_alpha=0.6, entropy_coef=0.3)
    assert with_bonus.entropy_coefs.tolist() == pytest.approx([0.3] * 4 + [0.0] * 3)  # ordinary samples only
    assert with_bonus.has_gradient().tolist() == [True] * 4 + [True, False, False]
    assert not objective_table(rewards, auxiliary, scope_alpha=0.0).has_gradient()[4:].any()
    A, w, c = with_bonus.rows(torch.tensor([5, 0]))
    assert [A[1], w[0], c[1]] == pytest.approx([1, 0.2, 0.3], abs=1e-3)
