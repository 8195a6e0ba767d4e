"""theory/: closed forms against autograd, enumeration, real steps; the theorem, its limits, the rule on a plant."""

import collections
import itertools
import math
import os
import re
import subprocess
import sys
from decimal import Context, Decimal, localcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from run_helpers import ROOT
from torch.testing import assert_close

import closed_forms as cf
import train
import variants
import verify
from entropy import entropy_temperature_derivative, token_entropy
from scope_rl import TemperatureRule

README = (ROOT / "theory" / "README.md").read_text()
CLOSE = {"atol": 1e-10, "rtol": 1e-9}
NEAR = {"atol": 1e-8, "rtol": 1e-6}


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def policy(counts, weights):
    return float64(*counts).log(), float64(*weights)


@pytest.fixture(scope="module")
def cases():
    """verify.py's policies, of 2 to 1,000 tokens, with something wrong, and a pass rate clear of 0 and 1."""
    torch.manual_seed(7)
    found = []
    for z, w, T in verify.random_policies(12_000):
        w[:, -1] = 0.0
        P = (torch.softmax(z / T[:, None], -1) * (w > 0)).sum(-1)
        keep = (P > 1e-6) & (P < 1 - 1e-6)
        found.append((z[keep], w[keep], T[keep]))
    return found


def slope(f, x):
    return torch.autograd.grad(f.sum(), x)[0]


def with_slope(f, *given):
    """f(..., T) and its derivative by T, by autograd."""
    T = given[-1].clone().requires_grad_()
    value = f(*given[:-1], T)
    return value.detach(), slope(value, T)


def enumerated_step(z, weights, T):
    """Mean over samples a at T of weights_a times the gradient of log p(a), summed token by token."""
    z = z.detach().requires_grad_()
    drawn = torch.softmax(z.detach() / T[:, None], -1) * weights
    total = torch.zeros_like(z)
    for a in range(z.shape[1]):
        total += drawn[:, a, None] * slope(torch.log_softmax(z, -1)[:, a], z)
    return total, drawn.sum(-1)


def entropy_change(z, step):
    """First-order change of the entropy along a step of the logits, by autograd."""
    z = z.detach().requires_grad_()
    return (slope(token_entropy(z), z) * step).sum(-1)


def test_first_order_changes_equal_enumeration_and_autograd(cases):
    for z, w, T in cases:
        step, mass = enumerated_step(z, w, T)
        mean = step / mass[:, None]
        assert_close(cf.dh_positive(z, w, T), entropy_change(z, mean), **CLOSE)
        assert_close(cf.dh_negative(z, w, T), entropy_change(z, -mean), **CLOSE)
        assert_close(cf.dh_objective(z, w, T), entropy_change(z, step), **CLOSE)
        assert_close(cf.sampled(z, w, T) - torch.softmax(z, -1), mean, **CLOSE)
        # g is minus the entropy's gradient, gbar a covariance, and logits shifted together change nothing.
        (g, gbar), p = cf.sensitivity(z), torch.softmax(z, -1)
        leaf = z.clone().requires_grad_()
        assert_close(g, -slope(token_entropy(leaf), leaf), **CLOSE)
        assert_close(gbar, cf.covariance(p, p, torch.log_softmax(z, -1)), **CLOSE)
        assert_close(g.sum(-1), torch.zeros_like(gbar), **CLOSE)


# --- Section 7: GRPO's advantages in the group drawn at T; of the rewarded samples alone (wrong = 0), or of all (1)
def pass_rate(z, w, T):
    P = (torch.softmax(z / T[..., None], -1) * w).sum(-1)
    return P, (P * (1 - P)).sqrt()


def normalised(z, w, T, wrong):
    return pass_rate(z, w, T)[1] * (cf.dh_positive(z, w, T) + wrong * cf.dh_negative(z, 1 - w, T))


def normalised_dt(z, w, T, wrong):
    p_T, x, (P, std) = torch.softmax(z / T[:, None], -1), torch.log_softmax(z, -1), pass_rate(z, w, T)
    slopes = cf.dh_positive_dt(z, w, T) - wrong * cf.dh_positive_dt(z, 1 - w, T)
    P_dt = -cf.covariance(p_T, w, x) / T**2
    return (1 - 2 * P) * P_dt / (2 * std**2) * normalised(z, w, T, wrong) + std * slopes


def test_normalised_changes_equal_grpos_own_advantage(cases):
    for z, w, T in cases:
        w = (w > 0).double()
        P, std = pass_rate(z, w, T)
        A = (w - P[:, None]) / std[:, None]
        for wrong, weights in enumerate((w * A, A)):
            change = entropy_change(z, enumerated_step(z, weights, T)[0])
            assert_close(normalised(z, w, T, wrong), change, **NEAR)
            assert_close(cf.dh_objective(z, weights, T), change, **NEAR)  # as in verify.py
        cov = cf.covariance(torch.softmax(z / T[:, None], -1), w, cf.sensitivity(z)[0])
        assert_close(normalised(z, w, T, 1), -cov / std, **NEAR)


DERIVATIVES = [  # a function, and its temperature derivative in closed form
    (token_entropy, entropy_temperature_derivative),
    (cf.dh_positive, cf.dh_positive_dt),
    (cf.dh_objective, cf.dh_objective_dt),
    (partial(normalised, wrong=0), partial(normalised_dt, wrong=0)),
    (partial(normalised, wrong=1), partial(normalised_dt, wrong=1)),
]


@pytest.mark.parametrize(("f", "derivative"), DERIVATIVES)
def test_temperature_derivatives_equal_autograd_and_finite_differences(cases, f, derivative):
    for z, w, T in cases:
        given = (z,) if f is token_entropy else (z, w)
        assert_close(derivative(*given, T), with_slope(f, *given, T)[1], **NEAR)
        h = 1e-6 * T
        by_difference = (f(*given, T + h) - f(*given, T - h)) / (2 * h)
        assert_close(derivative(*given, T), by_difference, atol=1e-5, rtol=1e-3)


def test_real_gradient_steps_approach_first_order_linearly(cases):
    """Half the step, half the error; and a step alpha times as long changes alpha times as much."""
    for z, w, T in cases:
        direction, first = cf.sampled(z, w, T) - torch.softmax(z, -1), cf.dh_positive(z, w, T)
        assert_close(entropy_change(z, 4 * direction), 4 * first, **NEAR)
        moved = [(token_entropy(z + eta * direction) - token_entropy(z)) / eta for eta in (1e-3, 5e-4)]
        coarse, fine = moved[0] - first, moved[1] - first
        assert ((coarse - 2 * fine).abs() < 1e-7 + 0.03 * fine.abs()).all()


# --- verify.py
def test_verify_finds_each_statement_false_when_it_is(monkeypatch, capsys):
    """With wrong closed forms each row fails, and a NaN is a failure."""
    sensitivity, change, entropy = cf.sensitivity, cf.dh_positive, verify.token_entropy
    monkeypatch.setattr(cf, "sensitivity", lambda z: (sensitivity(z)[0], torch.randn(len(z)).double()))
    monkeypatch.setattr(cf, "dh_positive", lambda z, w, T: (change(z, w, 1.0) + 0.1) * (2 - T))
    monkeypatch.setattr(cf, "dh_positive_dt", lambda z, w, T: torch.randn_like(T))
    monkeypatch.setattr(cf, "dh_objective_dt", lambda z, w, T: torch.randn_like(T))
    monkeypatch.setattr(verify, "token_entropy", lambda z: 1.5 * entropy(z))
    total = verify.table("title", verify.statements, verify.random_policies(3000))
    failures = [int(row.replace(",", "").split()[-2]) for row in capsys.readouterr().out.splitlines()[2:]]
    assert len(failures) == 10 and min(failures) > 10 and sum(failures) == total, failures
    assert verify.table("NaN", lambda: [("x", torch.tensor([math.nan]), torch.tensor([True]))], [()]) == 1


def test_verify_as_a_command(tmp_path):
    """As a reader runs it, from some folder, with only the core on the path. README names tests that exist."""
    command = [sys.executable, ROOT / "theory" / "verify.py", "--cases", "20000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    text = subprocess.check_output(command, text=True, cwd=tmp_path, env=environment)
    *_, false, last = text.split("\n\n")
    assert last == "20,000 policies: 0 failures of what is proved\n"
    for row in false.splitlines()[1:]:
        cases, failures, lowest = (float(number.replace(",", "")) for number in row.split()[-3:])
        assert failures > 0.03 * cases > 3 and lowest < -0.001
    assert all(name in globals() for name in re.findall(r"`(test_\w+)`", README))


# --- Limits and examples
def test_each_hypothesis_is_needed():
    """Policies, given as counts, at which each statement that is no theorem fails: the change and its derivative."""
    for f, counts, weights, T, expected in (
        (cf.dh_positive, [17, 2, 1], [0, 1, 1], 0.25, [0.408162, -0.033501]),
        (cf.dh_objective, [8, 7, 3, 3], [0, 1, 0, 0], 0.25, [-0.007984, -0.007859]),
        (partial(normalised, wrong=0), [10, 4, 3, 1], [1, 0, 0, 1], 0.5, [-0.068036, -0.067645]),
        (partial(normalised, wrong=1), [4, 1, 1], [1, 0, 0], 1.2, [-0.225016, -0.024589]),
    ):
        pair = with_slope(f, *policy(counts, weights), torch.tensor(T, dtype=torch.float64))
        assert [value.item() for value in pair] == pytest.approx(expected, abs=1e-6)
    assert cf.dh_positive_dt(*policy([10, 4, 3, 1], [1, 0, 0, 1]), 0.5).item() > 0  # dH+ itself rises
    drawn = [round((float64(8, 7, 3, 3).log() / T).softmax(-1)[1].item(), 3) for T in (0.25, 0.4, 1.0)]
    assert drawn == [0.361, 0.379, 0.333]
    assert abs(cf.dh_positive_dt(*policy([6, 2, 2, 1], [0, 1, 1, 0]), 0.7).item()) < 1e-15  # equally likely


@pytest.mark.parametrize(
    ("T", "change", "slope"), [("0.8", -0.0048712, -8.70e-5), ("0.85", -0.0048378, None)]
)
def test_the_failure_at_the_published_clip_in_exact_arithmetic(T, change, slope):
    """151,936 tokens, the second right: section 6 with 50 digits, and by closed_forms.py."""
    n = [1, 1, 151_934]
    with localcontext(Context(prec=50)):
        p = [Decimal("0.44"), Decimal("0.325"), Decimal("0.235") / n[2]]
        x = [q.ln() for q in p]
        H = -sum(n[a] * p[a] * x[a] for a in range(3))
        g = [p[a] * (x[a] + H) for a in range(3)]
        f = g[1] - sum(n[a] * p[a] * g[a] for a in range(3))  # g - gbar of the right token
        heated = [(x[a] / Decimal(T)).exp() for a in range(3)]
        p_T = [q / sum(n[b] * heated[b] for b in range(3)) for q in heated]
        mean = sum(n[a] * p_T[a] * x[a] for a in range(3))
        exact = [float(-p_T[1] * f), float(p_T[1] * f * (x[1] - mean) / Decimal(T) ** 2)]
    assert exact[0] == pytest.approx(change, abs=5e-8)
    assert exact[1] == pytest.approx(slope, abs=5e-8) if slope else exact[1] > 0
    z, w = policy([0.44, 0.325] + [0.235 / n[2]] * n[2], [0, 1] + [0] * n[2])
    assert [f(z, w, float(T)).item() for f in (cf.dh_objective, cf.dh_objective_dt)] == pytest.approx(
        exact, rel=1e-7
    )


def test_crossing_temperature_is_the_only_sign_change():
    z, w = policy([60, 30, 6, 4], [1, 0, 1, 0])
    crossing = cf.crossing_temperature(z, w).item()
    assert 1 < crossing < 10
    T = torch.logspace(-2, 4, 2000, dtype=torch.float64)
    assert torch.equal(cf.dh_positive(z.expand(2000, -1), w.expand(2000, -1), T) >= 0, crossing <= T)
    # Never: the hot limit is below zero. Always: the rewarded token is rare from the start.
    assert cf.crossing_temperature(*policy([60, 30, 6, 4], [1, 0, 0, 0])).item() == math.inf
    assert cf.crossing_temperature(*policy([60, 30, 6, 4], [0, 0, 0, 1])).item() == 0.0
    torch.manual_seed(1)
    for z, w, _ in itertools.islice(verify.random_policies(2000), 12):
        (g, gbar), crossing = cf.sensitivity(z), cf.crossing_temperature(z, w)
        limit = gbar - (w * g).sum(-1) / w.sum(-1)
        assert_close(cf.dh_positive(z, w, math.inf), limit, **CLOSE)
        assert_close(cf.dh_positive(z, w, 1e7), limit, atol=1e-5, rtol=1e-4)
        assert (crossing[limit < -1e-6] == math.inf).all() and (crossing[limit > 1e-3] < math.inf).all()


def test_the_crossing_over_the_simplex():
    """Three tokens, the last one wrong: what theory/README.md says of the picture (section 4)."""
    first, second = torch.meshgrid(*[(torch.arange(300).double() + 0.5) / 300] * 2, indexing="xy")
    p = torch.stack([first, second, 1 - first - second], -1)[first + second < 1 - 1e-9]
    w = float64(1, 1, 0).expand_as(p)
    crossing = cf.crossing_temperature(p.log(), w)
    g, _ = cf.sensitivity(p.log())
    at_one = p[:, 2] * (g[:, 2] - (p * g)[:, :2].sum(-1) / p[:, :2].sum(-1))
    assert_close(cf.dh_positive(p.log(), w, 1.0), at_one, **CLOSE)
    assert torch.equal(crossing < 1, at_one > 0)
    assert (crossing[g[:, 2] < 0] > 1).all() and (crossing[p[:, 2] > p[:, :2].amax(-1)] < 1).all()
    assert (crossing < 1).double().mean().item() == pytest.approx(0.36, abs=0.005)
    assert (crossing == 0).double().mean().item() == pytest.approx(0.31, abs=0.005)
    e = float64(0.1, 0.3, 0.4, 0.5)
    along = cf.crossing_temperature(torch.stack([0.8 * (1 - e), 0.2 * (1 - e), e], -1).log(), w[:4])
    assert along.tolist() == pytest.approx([1.4, 2.9, 1.4, 0.0], abs=0.05)


def test_degenerate_policies_are_finite_and_right():
    z, one, every = float64(3, 2, 1, 0.5, -1), float64(0, 1, 0, 0, 0), torch.ones(5).double()
    changes = cf.dh_positive, cf.dh_positive_dt, cf.dh_objective, cf.dh_objective_dt
    extremes = z, z * 1e3, float64(1e3, -1e3, 0, 1, 2), 0 * z
    for T, logits, w in itertools.product((1e-3, 1.0, 1e6), extremes, (one, every)):
        values = torch.stack([f(logits, w, T) for f in changes])
        assert values.isfinite().all()
        assert logits.any() or values.abs().max() < 1e-12  # a uniform policy is at its peak
    assert abs(cf.dh_positive(z, every, 1.0).item()) < 1e-15  # all right at T = 1: q = p
    assert cf.sampled(z, every, 1e-3)[0].item() == pytest.approx(1.0)  # cold: the likeliest
    assert_close(cf.sampled(z, one + every, 1e9), (one + every) / 6)  # hot: the weights


# --- Section 9
def entropy_and_length(chances):
    """Expected sum of token entropies, and expected length, of answers with these chances, by their tree."""
    total = length = 0.0
    for prefix in {answer[:i] for answer in chances for i in range(len(answer) + 1)}:
        following = collections.Counter()  # the next token, $ at the end -> its probability
        for answer in (answer for answer in chances if answer.startswith(prefix)):
            following[(answer + "$")[len(prefix)]] += chances[answer]
        mass = following.total()
        total += mass * token_entropy((float64(*following.values()) / mass).log()).item()
        length += mass  # a token is drawn after every prefix, the end token included
    return total, length


def test_full_reward_bounds_the_entropy_a_token():
    """A tree of right answers, one of them the beginning of others: entropy a token is at most lambda."""
    answers = ["11", "12", "133", "1344", "2", "3411", "3412", "342", "1"]
    lengths = float64(*[len(answer) + 1 for answer in answers])
    bound = 0.0
    for _ in range(30):  # Newton's method, for a sum of 1
        best = torch.exp(-bound * lengths)
        bound += (best.sum().log() * best.sum() / (best * lengths).sum()).item()
    assert best.sum().item() == pytest.approx(1, abs=1e-12)
    for p in [best, torch.ones(9).double(), *torch.rand(50, 9).double() ** 3]:
        total, length = entropy_and_length(dict(zip(answers, (p / p.sum()).tolist(), strict=True)))
        assert total == pytest.approx(torch.distributions.Categorical(p).entropy().item(), abs=1e-12)
        assert total <= math.log(9) + 1e-12
        assert total / length == pytest.approx(bound, abs=1e-12) if p is best else total / length < bound
    # Two questions: lengths 4, 4, 4 and 1, 2, 3. At the lambda of the page the logs of the sums add up to 0.
    lengths, bound = torch.stack([float64(4, 4, 4), float64(1, 2, 3)]), 0.373881
    assert torch.logsumexp(-bound * lengths, -1).sum().item() == pytest.approx(0, abs=1e-4)
    for p in [torch.softmax(-bound * lengths, -1), *torch.softmax(3 * torch.randn(500, 2, 3).double(), -1)]:
        assert -(p * p.log()).sum() / (p * lengths).sum() < bound + 1e-5


# --- Section 8, on a simulated plant: H changes by a (T - T*) a step, with a T that is felt with a delay
def simulate(rule, a, delay=1, balance=lambda H: 1 + 0.87 * (H - 0.13)):
    H, felt, curve = 0.8, 1.0, []
    for _ in range(2000):
        felt += (rule(H) - felt) / delay
        H = max(0.0, H + a * (felt - balance(H)))
        curve.append(H)
    return curve


def test_the_rules_rest_where_predicted():
    """The proportional rule (T* - 1) / gain below its target, unless T* is clipped; the velocity form at it."""
    for gain, rest in itertools.product((1.0, 2.0, 8.0), (0.9, 1.1, 1.19)):
        for integral_gain, H in ((0.0, 0.4 - (rest - 1) / gain), (0.1, 0.4)):
            rule = TemperatureRule(0.4, gain, integral_gain)
            curve = simulate(rule, 0.02, balance=lambda H, rest=rest: rest)
            assert (curve[-1], rule.temperature) == pytest.approx((H, rest), abs=1e-6)
    assert simulate(TemperatureRule(0.4, 1.0), 0.02, balance=lambda H: 1.3)[-1] == 0.0  # it falls to the end


@pytest.mark.parametrize(("gain", "integral_gain"), [(2, 0.05), (4, 0.2), (8, 0.4)])
def test_the_velocity_form_falls_less_far_below_the_target(gain, integral_gain):
    for a, delay, target in itertools.product((0.008, 0.016, 0.032), (1, 2.5), (0.3, 0.4, 0.5)):
        gains = {"scope_gain": gain, "scope_integral_gain": integral_gain}
        limits = {"scope_temperature_min": 0.5, "scope_temperature_max": 1.5}
        config = train.Config(output_dir="x", scope_target_entropy=target, **gains, **limits)
        found = []
        for rule in (variants.PositionalEverywhere(SimpleNamespace(config=config)), train.rule_of(config)):
            curve = simulate(rule, a, delay)
            assert curve[-1] == pytest.approx(target, abs=1e-6)  # no offset
            outside = [step for step, H in enumerate(curve, 1) if abs(H - target) > target / 10]
            found += [outside[-1] + 1, round(min(curve), 3)]
        assert found[3] > found[1]
        if (a, delay, target) == (0.016, 2.5, 0.4):
            (row,) = re.findall(rf"^\| {gain}, \.\d+ \| (\d+), (\.\d+) \| (\d+), (\.\d+) \|$", README, re.M)
            assert found == [float(number) for number in row]


def test_nothing_winds_up():
    """However long T was at one of its clips, it moves as soon as a change points inwards."""
    for steps, (far, near, clip) in itertools.product((5, 5000), ((0.1, 0.15, 1.5), (0.7, 0.65, 0.5))):
        rule = TemperatureRule(0.4, 8.0, 0.4, 0.5, 1.5)
        assert [rule(far) for _ in range(steps)][-1] == clip
        assert rule(near) == pytest.approx(clip + 8 * (far - near) + 0.4 * (0.4 - near))
    # Falling by .01 a step it heats fewer than gain / integral_gain = 20 steps above the target, not before.
    rule = TemperatureRule(0.4, 8.0, 0.4, 0.0, 9.0)
    T = [rule(0.4 + 0.01 * distance) for distance in (22, 21, 19, 18)]
    assert T[0] > T[1] and T[2] < T[3]
