"""theory/: the closed forms against autograd and real steps, the theorem and its consequences, pinned counterexamples."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import closed_forms as cf
import verify
from entropy import log_policy, token_entropy

CLOSE = {"atol": 1e-10, "rtol": 1e-9}


def policy(counts, weights):
    return torch.tensor(counts, dtype=torch.float64).log(), torch.tensor(weights, dtype=torch.float64)


@pytest.fixture(scope="module")
def cases():
    """Random policies of 2 to 60 tokens, peaked and flat, with binary and graded weights."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for V in (2, 3, 8, 60):
        z = torch.randn(200, V, generator=generator, dtype=torch.float64)
        z = z * torch.logspace(-1, 1, 200, dtype=torch.float64)[:, None]
        w = torch.randint(2, (200, V), generator=generator).double()
        w[:, 0] = 1.0
        w[100:] *= torch.rand(100, V, generator=generator, dtype=torch.float64)
        T = torch.logspace(-1, 1, 200, dtype=torch.float64)[torch.randperm(200, generator=generator)]
        found.append((z, w, T))
    return found


def slope(f, x):
    return torch.autograd.grad(f.sum(), x)[0]


def enumerated_step(z, w, T):
    """The expected gradient of log p(a) over rewarded samples at T, summed over the tokens one by one; no formula used."""
    z = z.detach().requires_grad_()
    drawn = torch.softmax(z.detach() / T[:, None], -1)
    total, mass = torch.zeros_like(z), torch.zeros(len(z), dtype=z.dtype)
    for a in range(z.shape[1]):
        gradient = slope(torch.log_softmax(z, -1)[:, a], z)
        total += (drawn[:, a] * w[:, a])[:, None] * gradient
        mass += drawn[:, a] * w[:, a]
    return total, mass


def entropy_change(z, step):
    """First-order change of the entropy along a step of the logits, by autograd."""
    z = z.detach().requires_grad_()
    return (slope(token_entropy(z), z) * step).sum(-1)


def test_first_order_changes_equal_enumeration_and_autograd(cases):
    for z, w, T in cases:
        step, mass = enumerated_step(z, w, T)
        torch.testing.assert_close(
            cf.dh_positive(z, w, T), entropy_change(z, step / mass[:, None]), **CLOSE
        )
        torch.testing.assert_close(
            cf.dh_negative(z, w, T), entropy_change(z, -step / mass[:, None]), **CLOSE
        )
        torch.testing.assert_close(cf.dh_objective(z, w, T), entropy_change(z, step), **CLOSE)
        g, gbar = cf.sensitivity(z)
        p = torch.softmax(z, -1)
        torch.testing.assert_close(gbar, cf.covariance(p, p, p.log()), **CLOSE)  # gbar = Cov_p(p, log p)
        torch.testing.assert_close(
            g.sum(-1), torch.zeros_like(gbar), **CLOSE
        )  # logits shifted together change nothing


def test_normalised_change_equals_grpos_own_advantage(cases):
    for z, w, T in cases:
        w = (w > 0).double()
        w[:, -1] = 0.0  # something is wrong, or there is no advantage
        step, P = enumerated_step(z, w, T)
        torch.testing.assert_close(cf.pass_rate(z, w, T), P, **CLOSE)
        advantage = (1 - P) / (P * (1 - P)).sqrt()  # (R - mean) / std at R = 1
        keep = (P > 1e-6) & (P < 1 - 1e-6)
        by_autograd = entropy_change(z, advantage[:, None] * step)
        torch.testing.assert_close(
            cf.dh_normalised(z, w, T)[keep], by_autograd[keep], atol=1e-9, rtol=1e-6
        )


@pytest.mark.parametrize("name", ["positive", "objective", "normalised"])
def test_temperature_derivatives_equal_autograd_and_finite_differences(cases, name):
    f, derivative = getattr(cf, f"dh_{name}"), getattr(cf, f"dh_{name}_dt")
    for z, w, T in cases:
        w = (w > 0).double() if name == "normalised" else w
        if name == "normalised":
            w[:, -1] = 0.0
            P = cf.pass_rate(z, w, T)
            keep = (P > 1e-4) & (P < 1 - 1e-4)
            z, w, T = z[keep], w[keep], T[keep]
        T = T.clone().requires_grad_()
        by_autograd = slope(f(z, w, T), T)
        T = T.detach()
        torch.testing.assert_close(derivative(z, w, T), by_autograd, atol=1e-9, rtol=1e-6)
        h = 1e-5 * T
        by_difference = (f(z, w, T + h) - f(z, w, T - h)) / (2 * h)
        torch.testing.assert_close(derivative(z, w, T), by_difference, atol=1e-5, rtol=1e-3)


def test_real_gradient_steps_approach_first_order_linearly(cases):
    for z, w, T in cases:
        direction = cf.sampled(z, w, T) - torch.softmax(z, -1)
        error = []
        for eta in (1e-3, 5e-4, 2.5e-4):
            real = (token_entropy(z + eta * direction) - token_entropy(z)) / eta
            error.append((real - cf.dh_positive(z, w, T)).abs())
        sizable = error[0] > 1e-6
        assert sizable.sum() > 50
        for coarse, fine in itertools.pairwise(error):
            assert ((coarse / fine)[sizable] - 2).abs().max() < 0.05  # half the step, half the error


def test_the_theorem_and_its_consequences_on_random_policies():
    generator = torch.Generator().manual_seed(3)
    seen = {}
    for z, w, T in verify.random_policies(20_000, generator):
        for name, margin, applies in verify.theorems(z, w, T):
            assert (margin[applies] > 0).all(), name
            seen[name] = seen.get(name, 0) + int(applies.sum())
    assert len(seen) == 7
    assert min(seen.values()) > 20, seen


def test_each_hypothesis_is_needed():
    """Policies, given as counts, at which each statement that is no theorem fails."""
    # Outside the hypothesis: dH+ > 0 and it falls with T.
    z, w = policy([17, 2, 1], [0, 1, 1])
    assert cf.dh_positive(z, w, 0.25).item() == pytest.approx(0.408162, abs=1e-6)
    assert cf.dh_positive_dt(z, w, 0.25).item() == pytest.approx(-0.033501, abs=1e-6)
    # The objective as written below T = 1: dH < 0 and it falls with T.
    z, w = policy([8, 7, 3, 3], [0, 1, 0, 0])
    assert cf.dh_objective(z, w, 0.25).item() == pytest.approx(-0.007984, abs=1e-6)
    assert cf.dh_objective_dt(z, w, 0.25).item() == pytest.approx(-0.007859, abs=1e-6)
    # Weighted with GRPO's advantage: dH < 0 and it falls with T, though dH+ itself rises.
    z, w = policy([10, 4, 3, 1], [1, 0, 0, 1])
    assert cf.dh_normalised(z, w, 0.5).item() == pytest.approx(-0.068036, abs=1e-6)
    assert cf.dh_normalised_dt(z, w, 0.5).item() == pytest.approx(-0.067645, abs=1e-6)
    assert cf.dh_positive_dt(z, w, 0.5).item() > 0
    # Equality: positive tokens that are equally likely make T irrelevant.
    z, w = policy([6, 2, 2, 1], [0, 1, 1, 0])
    assert cf.dh_positive_dt(z, w, 0.7).item() == pytest.approx(0.0, abs=1e-15)


def test_crossing_temperature_is_the_only_sign_change():
    z, w = policy([60, 30, 6, 4], [1, 0, 1, 0])
    crossing = cf.crossing_temperature(z, w).item()
    assert 1 < crossing < 10
    T = torch.logspace(-2, 4, 2000, dtype=torch.float64)
    curve = cf.dh_positive(z.expand(2000, -1), w.expand(2000, -1), T)
    assert torch.equal(curve >= 0, crossing <= T)
    # Never: the hot limit is below zero. Always: the rewarded token is rarer than balance from the start.
    assert cf.crossing_temperature(*policy([60, 30, 6, 4], [1, 0, 0, 0])).item() == math.inf
    assert cf.hot_limit(*policy([60, 30, 6, 4], [1, 0, 0, 0])).item() < 0
    assert cf.crossing_temperature(*policy([60, 30, 6, 4], [0, 0, 0, 1])).item() == 0.0
    many = verify.random_policies(2000, torch.Generator().manual_seed(1))
    for z, w, _ in itertools.islice(many, 12):
        limit, crossing = cf.hot_limit(z, w), cf.crossing_temperature(z, w)
        hot = cf.dh_positive(z, w, torch.full(limit.shape, 1e7, dtype=torch.float64))
        torch.testing.assert_close(hot, limit, atol=1e-5, rtol=1e-4)
        assert (crossing[limit < -1e-6] == math.inf).all()
        assert (crossing[limit > 1e-3] < math.inf).all()


def test_the_step_scales_the_change_and_moves_no_crossing(cases):
    """Independence of alpha: a step alpha times as long changes entropy alpha times as much, to first order."""
    z, w, T = cases[2]
    direction = cf.sampled(z, w, T) - torch.softmax(z, -1)
    for alpha in (1 / 64, 1.0, 4.0):
        torch.testing.assert_close(
            entropy_change(z, alpha * direction),
            alpha * cf.dh_positive(z, w, T),
            atol=1e-9,
            rtol=1e-6,
        )


def test_full_reward_bounds_the_entropy_a_token():
    """Trees of right answers, enumerated: sum of token entropies = entropy of the sequence <= log(number of answers)."""
    generator = torch.Generator().manual_seed(0)
    answers = ["11", "12", "133", "1344", "2", "3411", "3412", "342"]
    for trial in range(50):
        p = torch.rand(len(answers), generator=generator, dtype=torch.float64) ** (3 if trial else 0)
        p = p / p.sum()
        total, length = 0.0, 0.0
        for prefix in {a[:i] for a in answers for i in range(len(a) + 1)}:
            below = torch.tensor([a.startswith(prefix) for a in answers])
            following = sorted({(a + "$")[len(prefix)] for a in answers if a.startswith(prefix)})
            chance = torch.stack(
                [
                    sum(q for a, q in zip(answers, p, strict=True) if (a + "$").startswith(prefix + c))
                    for c in following
                ]
            )
            mass = p[below].sum()
            total += (mass * token_entropy((chance / mass).log())).item()
            length += mass.item()  # a token is drawn after every prefix, the end token included
        entropy = -(p * p.log()).sum().item()
        assert total == pytest.approx(entropy, abs=1e-12)
        assert total / length <= math.log(len(answers)) / length + 1e-12


def test_degenerate_policies_are_finite_and_right():
    flat, one = (
        torch.zeros(5, dtype=torch.float64),
        torch.tensor([0.0, 1, 0, 0, 0], dtype=torch.float64),
    )
    every = torch.ones(5, dtype=torch.float64)
    for T in (1e-3, 1.0, 1e6):
        assert cf.dh_positive(flat, one, T).item() == pytest.approx(
            0.0, abs=1e-15
        )  # a uniform policy is at its peak
        assert cf.dh_positive_dt(flat, one, T).item() == 0.0
    z = torch.tensor([3.0, 2.0, 1.0, 0.5, -1.0], dtype=torch.float64)
    assert cf.dh_positive(z, every, 1.0).item() == pytest.approx(
        0.0, abs=1e-15
    )  # all right at T = 1: q = p
    for logits in (z, z * 1e3, torch.tensor([1e3, -1e3, 0.0, 1.0, 2.0], dtype=torch.float64)):
        for w, T in itertools.product((one, every), (1e-3, 1.0, 1e6)):
            for f in (
                cf.dh_positive,
                cf.dh_positive_dt,
                cf.dh_objective,
                cf.dh_objective_dt,
                cf.dh_negative,
            ):
                assert math.isfinite(f(logits, w, T).item())
    assert cf.sampled(z, every, 1e-3)[0].item() == pytest.approx(1.0)  # cold: the likeliest
    torch.testing.assert_close(
        cf.sampled(z, one + every, 1e9), (one + every) / 6, atol=1e-6, rtol=0
    )  # hot: the weights
    log_p = log_policy(z * 1e3)
    assert torch.isfinite(log_p).all()


def test_verify_as_a_command():
    command = [
        sys.executable,
        Path(__file__).parents[1] / "theory" / "verify.py",
        "--cases",
        "5000",
        "--seed",
        "4",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "5,000 policies, seed 4" in result.stdout
    assert "0 violations" in result.stdout


def test_verify_reports_a_broken_formula(monkeypatch, capsys):
    right = cf.dh_positive_dt
    monkeypatch.setattr(cf, "dh_positive_dt", lambda z, w, T: 1.01 * right(z, w, T))
    monkeypatch.setattr(sys, "argv", ["verify.py", "--cases", "3000"])
    assert verify.main() == 1
    assert not capsys.readouterr().out.rstrip().endswith(": 0 violations")
