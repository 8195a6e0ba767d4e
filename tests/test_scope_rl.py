"""scope_rl.py against a loop over the published formulas, sample by sample and token by token."""

import math
import statistics

import pytest
import torch

from scope_rl import group_advantages, objective_table, scope_loss, scope_temperature

P, G, A, T = 4, 6, 5, 7  # prompts, completions each, auxiliary samples, tokens


def reference_objective(logprobs, old, entropies, lengths, rewards, auxiliary_rewards, alpha, eps, eps_high, coef):
    """J of METHOD's equations in plain Python: no masks, no weights, one scalar at a time."""

    def mean_over_tokens(i, advantage):
        total = 0.0
        for t in range(lengths[i]):
            r = (logprobs[i, t] - old[i, t]).exp()
            clipped = min(max(r.item(), 1 - eps), 1 + eps_high)
            total = total + (r * advantage if r.item() * advantage <= clipped * advantage else clipped * advantage)
        return total / int(lengths[i])

    J = 0.0
    for p in range(P):
        group = rewards[p].tolist()
        for g in range(G):
            i = p * G + g
            advantage = (group[g] - statistics.mean(group)) / (statistics.pstdev(group) + 1e-4)
            J = J + mean_over_tokens(i, advantage) / (P * G)
            J = J + coef * entropies[i, : lengths[i]].mean() / (P * G)
    for a, reward in enumerate(auxiliary_rewards.tolist()):
        if reward == 1:
            J = J + alpha * mean_over_tokens(P * G + a, 1.0) / len(auxiliary_rewards)
    return J


def random_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    B = P * G + A
    old = -torch.rand(B, T, generator=generator, dtype=torch.float64) * 3
    logprobs = (old + torch.randn(B, T, generator=generator, dtype=torch.float64) * 0.3).requires_grad_()
    entropies = torch.rand(B, T, generator=generator, dtype=torch.float64).requires_grad_()
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    lengths[0], lengths[1] = 1, T  # a completion of one token, and one without padding
    rewards = torch.randint(2, (P, G), generator=generator).double()
    rewards[0] = 1.0  # all equal: no advantage
    return (
        logprobs,
        old,
        entropies,
        lengths,
        rewards,
        torch.randint(2, (A,), generator=generator).double(),
    )


def our_loss(batch, rows=None, alpha=0.3, eps=0.2, eps_high=None, coef=0.0):
    logprobs, old, entropies, lengths, rewards, auxiliary_rewards = batch
    mask = torch.arange(T) < lengths[:, None]
    objective = objective_table(rewards, auxiliary_rewards, alpha, coef)
    rows = slice(None) if rows is None else rows
    old = torch.where(mask, old, math.nan)  # whatever stands in the padding must not matter
    return scope_loss(logprobs[rows], old[rows], entropies[rows], mask[rows], objective.rows(rows), eps, eps_high)


@pytest.mark.parametrize(
    "options",
    [{}, {"eps_high": 0.28}, {"coef": 0.1}, {"alpha": 0.0}, {"alpha": 1 / 64, "eps": 0.1}],
)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_equal_the_loop(seed, options):
    batch = random_batch(seed)
    loss, _ = our_loss(batch, **options)
    ours = torch.autograd.grad(loss, batch[0], retain_graph=True)[0]
    of_entropies = torch.autograd.grad(loss, batch[2])[0]
    full = {"alpha": 0.3, "eps": 0.2, "coef": 0.0} | options
    full["eps_high"] = full.get("eps_high") or full["eps"]
    J = reference_objective(*batch, **full)
    expected = torch.autograd.grad(-J, batch[0], retain_graph=True)[0]
    if "coef" in options:
        wanted = torch.autograd.grad(-J, batch[2])[0]
        torch.testing.assert_close(of_entropies, wanted, atol=1e-14, rtol=1e-10)
    assert loss.item() == pytest.approx(-J.item(), rel=1e-12)
    torch.testing.assert_close(ours, expected, atol=1e-14, rtol=1e-10)


def test_micro_batches_add_up_to_the_batch():
    batch = random_batch(5)
    whole, whole_clipped = our_loss(batch, coef=0.1)
    rows = torch.randperm(P * G + A).split(4)
    parts = [our_loss(batch, rows=r, coef=0.1) for r in rows]
    assert sum(loss for loss, _ in parts).item() == pytest.approx(whole.item(), rel=1e-12)
    assert sum(clipped for _, clipped in parts) == whole_clipped
    gradients = [
        torch.autograd.grad(loss, batch[0], retain_graph=True)[0] for loss in (whole, sum(p[0] for p in parts))
    ]
    torch.testing.assert_close(*gradients, atol=1e-15, rtol=1e-12)


def test_clipped_tokens_are_those_without_gradient():
    batch = random_batch(1)
    loss, clipped = our_loss(batch)
    gradient = torch.autograd.grad(loss, batch[0])[0]
    mask = torch.arange(T) < batch[3][:, None]
    advantages = objective_table(batch[4], batch[5], 0.3).advantages
    assert 0 < clipped == (mask & (gradient == 0) & (advantages != 0)[:, None]).sum()


def test_the_auxiliary_term_divides_by_all_its_samples():
    """At r = 1 each positive auxiliary token's gradient is alpha / (N' |o|), however many of the N' are positive."""
    logprobs, _, entropies, lengths, rewards, _ = random_batch(2)
    for positives in (1, 3):
        auxiliary = torch.tensor([1.0] * positives + [0.0] * (A - positives), dtype=torch.float64)
        same = logprobs.detach().clone().requires_grad_()
        loss, _ = our_loss((same, same.detach(), entropies, lengths, rewards, auxiliary), alpha=0.3)
        gradient = torch.autograd.grad(-loss, same)[0][P * G :].sum(1)
        torch.testing.assert_close(gradient, 0.3 * auxiliary / A)


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
    assert math.isfinite(grpo.item())
    assert grpo.item() == pytest.approx(both.item(), rel=1e-12)


def test_group_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.5, 1.0, 0.0, 0.0]])
    advantages = group_advantages(rewards)
    assert advantages[0, 0].item() == pytest.approx(math.sqrt(3), rel=1e-3)  # sqrt((1 - p) / p) at p = 1/4
    assert advantages[0, 1].item() == pytest.approx(-math.sqrt(1 / 3), rel=1e-3)
    assert not advantages[1:3].any()  # all equal
    torch.testing.assert_close(advantages.sum(1), torch.zeros(4), atol=1e-6, rtol=0)
    assert not group_advantages(torch.ones(3, 1)).any()  # groups of one


@pytest.mark.parametrize(
    ("entropy", "expected"),
    [(0.5, 1.0), (0.4, 1.1), (0.1, 1.2), (0.0, 1.2), (0.65, 0.85), (0.9, 0.8), (3.0, 0.8)],
)
def test_the_published_temperature_rule(entropy, expected):
    temperature, integral = scope_temperature(entropy, 0.0, target=0.5)
    assert temperature == pytest.approx(expected)
    assert integral == 0.0


def settle(gain, integral_gain, balance, start=0.9, target=0.4, steps=3000):
    """A toy plant whose entropy falls where T is below `balance` and rises above it, under the rule."""
    H, integral = start, 0.0
    for _ in range(steps):
        T, integral = scope_temperature(
            H,
            integral,
            target=target,
            minimum=0.5,
            maximum=1.5,
            gain=gain,
            integral_gain=integral_gain,
        )
        H = max(0.0, H + 0.02 * (T - balance))
    return H


@pytest.mark.parametrize(("gain", "balance"), [(2.0, 1.1), (2.0, 1.3), (4.0, 1.3), (1.0, 0.95)])
def test_the_rule_rests_at_the_predicted_offset_and_the_integral_removes_it(gain, balance):
    assert settle(gain, 0.0, balance) == pytest.approx(0.4 - (balance - 1) / gain, abs=1e-3)  # H0 - (T* - 1) / gain
    if abs(balance - 1) / gain < 0.1:  # the offset lies within the band where the integral runs
        assert settle(gain, 0.05, balance) == pytest.approx(0.4, abs=1e-3)


def test_the_integral_is_frozen_while_clipped_and_far_from_the_target():
    options = {"target": 0.5, "minimum": 0.8, "maximum": 1.2, "integral_gain": 0.1}
    assert scope_temperature(0.45, 0.0, **options)[1] == pytest.approx(0.005)
    assert scope_temperature(0.45, 0.0, **options, gain=2.0)[1] == pytest.approx(0.005)  # the two gains are apart
    assert scope_temperature(0.45, 0.3, **options) == (1.2, 0.3)  # clipped
    assert scope_temperature(0.55, -0.3, **options) == (0.8, -0.3)  # on the other side too
    assert scope_temperature(0.35, 0.0, **options)[1] == 0.0  # 0.15 nats away
    assert scope_temperature(0.35, 0.0, **options, integral_band=0.2)[1] == pytest.approx(0.015)
    assert scope_temperature(0.375, 0.0, **options, integral_band=0.125)[1] == pytest.approx(0.0125)  # at it


def test_the_table_says_what_each_sample_weighs():
    """The table of the module's docstring, with and without a bonus; and which rows J depends on."""
    rewards, auxiliary = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([1.0, 0.0, 0.5])
    table = objective_table(rewards, auxiliary, scope_weight=0.6)
    assert table.advantages.tolist() == pytest.approx([1, -1, 0, 0, 1, 0, 0], abs=1e-3)
    assert table.weights.tolist() == pytest.approx([1 / 4] * 4 + [0.6 / 3] * 3)
    assert table.entropy_coefs.tolist() == [0.0] * 7
    assert table.has_gradient().tolist() == [True, True, False, False, True, False, False]
    with_bonus = objective_table(rewards, auxiliary, scope_weight=0.6, entropy_coef=0.3)
    assert with_bonus.entropy_coefs.tolist() == pytest.approx([0.3] * 4 + [0.0] * 3)  # ordinary samples only
    assert with_bonus.has_gradient().tolist() == [True] * 4 + [True, False, False]
    assert not objective_table(rewards, auxiliary, scope_weight=0.0).has_gradient()[4:].any()
    some = with_bonus.rows(torch.tensor([5, 0]))
    assert [some.advantages[1], some.weights[0], some.entropy_coefs[1]] == pytest.approx([1, 0.2, 0.3], abs=1e-3)
