"""theory/: closed forms against autograd, enumeration, real steps; the theorem and its limits."""

import itertools
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import closed_forms as cf
import limits
import verify
from entropy import entropy_temperature_derivative, log_policy, token_entropy

ROOT = Path(__file__).parents[1]

CLOSE = {"atol": 1e-10, "rtol": 1e-9}


def policy(counts, weights):
    return torch.tensor(counts).double().log(), torch.tensor(weights).double()


@pytest.fixture(scope="module")
def cases():
    """Policies of 2 to 60 tokens, peaked and flat; from the fifth on verify.py's, of 2 to 1,000."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for V in (2, 3, 8, 60):
        z = torch.randn(200, V, generator=generator, dtype=torch.float64)
        z = z * torch.logspace(-1, 1, 200, dtype=torch.float64)[:, None]
        w = torch.randint(2, (200, V), generator=generator).double()
        w[:, 0] = 1.0
        w[100:] *= torch.rand(100, V, generator=generator, dtype=torch.float64)
        T = torch.logspace(-1, 1, 200, dtype=torch.float64)
        found.append((z, w, T[torch.randperm(200, generator=generator)]))
    torch.manual_seed(7)
    for z, w, T in verify.random_policies(10_000):
        drawn = (torch.softmax(z / T[:, None], -1) * w).sum(-1) > 1e-200  # else it is 0 / 0 below
        found.append((z[drawn], w[drawn], T[drawn]))
    return found


def slope(f, x):
    return torch.autograd.grad(f.sum(), x)[0]


def enumerated_step(z, w, T):
    """Expected gradient of log p(a) over rewarded samples at T, summed token by token."""
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
        mean = step / mass[:, None]
        torch.testing.assert_close(cf.dh_positive(z, w, T), entropy_change(z, mean), **CLOSE)
        torch.testing.assert_close(cf.dh_negative(z, w, T), entropy_change(z, -mean), **CLOSE)
        torch.testing.assert_close(cf.dh_objective(z, w, T), entropy_change(z, step), **CLOSE)
        torch.testing.assert_close(cf.sampled(z, w, T) - torch.softmax(z, -1), mean, **CLOSE)


def test_sensitivity_is_minus_the_entropys_gradient(cases):
    for z, _, _ in cases:
        z = z.clone().requires_grad_()
        gradient = slope(token_entropy(z), z)
        z = z.detach()
        g, gbar = cf.sensitivity(z)
        p = torch.softmax(z, -1)
        torch.testing.assert_close(g, -gradient, **CLOSE)
        torch.testing.assert_close(gbar, cf.covariance(p, p, torch.log_softmax(z, -1)), **CLOSE)
        # Logits shifted together change nothing.
        torch.testing.assert_close(g.sum(-1), torch.zeros_like(gbar), **CLOSE)


def binary(z, w, T):
    """The same policies with weights of 0 and 1, where the pass rate is neither."""
    w = (w > 0).double()
    w[:, -1] = 0.0  # something is wrong, or there is no advantage
    P = (torch.softmax(z / T[:, None], -1) * w).sum(-1)
    keep = (P > 1e-6) & (P < 1 - 1e-6)
    return z[keep], w[keep], T[keep]


def test_normalised_change_equals_grpos_own_advantage(cases):
    for z, w, T in itertools.starmap(binary, cases):
        step, P = enumerated_step(z, w, T)
        torch.testing.assert_close(limits.pass_rate(z, w, T), P, **CLOSE)
        advantage = (1 - P) / (P * (1 - P)).sqrt()  # (R - mean) / std at R = 1
        by_autograd = entropy_change(z, advantage[:, None] * step)
        torch.testing.assert_close(limits.dh_normalised(z, w, T), by_autograd, **CLOSE)


@pytest.mark.parametrize(
    ("f", "derivative"),
    [
        (lambda z, w, T: token_entropy(z, T), lambda z, w, T: entropy_temperature_derivative(z, T)),
        (cf.dh_positive, cf.dh_positive_dt),
        (cf.dh_objective, cf.dh_objective_dt),
        (limits.dh_normalised, limits.dh_normalised_dt),
    ],
    ids=["entropy", "positive", "objective", "normalised"],
)
def test_temperature_derivatives_equal_autograd_and_finite_differences(cases, f, derivative):
    for z, w, T in itertools.starmap(binary, cases) if f is limits.dh_normalised else cases:
        T = T.clone().requires_grad_()
        by_autograd = slope(f(z, w, T), T)
        T = T.detach()
        torch.testing.assert_close(derivative(z, w, T), by_autograd, atol=1e-9, rtol=1e-6)
        h = 1e-6 * T
        by_difference = (f(z, w, T + h) - f(z, w, T - h)) / (2 * h)
        torch.testing.assert_close(derivative(z, w, T), by_difference, atol=1e-5, rtol=1e-3)


def test_real_gradient_steps_approach_first_order_linearly(cases):
    for k, (z, w, T) in enumerate(cases):
        direction = cf.sampled(z, w, T) - torch.softmax(z, -1)
        error = []
        for eta in (1e-3, 5e-4, 2.5e-4):
            real = (token_entropy(z + eta * direction) - token_entropy(z)) / eta
            error.append(real - cf.dh_positive(z, w, T))
        sizable = error[0].abs() > 1e-6
        assert sizable.sum() > 50 or k >= 4
        for coarse, fine in itertools.pairwise(error):
            assert (coarse - 2 * fine).abs().max() < 1e-6  # half the step, half the error
            assert ((coarse / fine)[sizable] - 2).abs().max() < 0.05 or k >= 4


def test_the_theorem_and_its_consequences_on_random_policies():
    torch.manual_seed(3)
    seen = {}
    for z, w, T in verify.random_policies(20_000):
        for name, margin, applies in verify.statements(z, w, T):
            assert (margin[applies] > 0).all(), name
            seen[name] = seen.get(name, 0) + int(applies.sum())
    assert len(seen) == 7
    assert min(seen.values()) > 100, seen


def test_random_policies_are_of_the_kinds_that_verify_says():
    torch.manual_seed(0)
    batches = list(verify.random_policies(20_000))
    assert [len(z[0]) for z, _, _ in batches][::49] == [2, 1000]
    assert len(batches) == 50
    assert 20_000 <= sum(map(len, (T for _, _, T in batches))) <= 20_050
    spreads = torch.cat([z.std(-1) for z, _, _ in batches if z.shape[1] > 100])
    assert 0.08 < spreads.min() < 0.15 and 7 < spreads.max() < 12
    T = torch.cat([T for _, _, T in batches])
    assert 0.05 <= T.min() < 0.051 and 19 < T.max() <= 20
    assert (T < 1).double().mean().item() == pytest.approx(0.5, abs=0.02)  # log-uniform
    for _, w, _ in batches:
        half = len(w) // 2
        assert ((w[:half] == 0) | (w[:half] == 1)).all()
        graded = w[half:][w[half:] > 0]
        assert 0.0099 < graded.min() < 0.2 and 0.9 < graded.max() <= 1
    shares = torch.cat([(w > 0).double().mean(-1) for _, w, _ in batches if w.shape[1] > 100])
    assert shares.min() < 0.05 and shares.max() > 0.95


def by_autograd(z, w, T):
    """gbar, E_q[g], dH+, dH, dH_A, P and the last four's T-derivatives, by softmax and autograd."""
    T = T.clone().requires_grad_()
    leaf = z.clone().requires_grad_()
    minus_g = slope(token_entropy(leaf), leaf)
    gbar = -(torch.softmax(z, -1) * minus_g).sum(-1)
    rewarded = torch.softmax(z / T[:, None], -1) * w
    P = rewarded.sum(-1)
    pull = -(rewarded * minus_g).sum(-1) / P
    dh_plus = gbar - pull
    values = {"dh_plus": dh_plus, "dh": P * dh_plus, "dh_A": (P * (1 - P)).sqrt() * dh_plus, "P": P}
    f = values | {"gbar": gbar, "pull": pull}
    for name, value in values.items():
        f[name + "_dt"] = torch.autograd.grad(value.sum(), T, retain_graph=True)[0]
    return {name: value.detach() for name, value in f.items()}


def decided(*values):
    """Where no value is so near to 0 that rounding, or a threshold of 1e-7, decides its sign."""
    return torch.stack([value.abs() > 2e-6 for value in values]).all(0)


def test_verify_applies_each_statement_where_its_hypothesis_holds_and_nowhere_else(cases):
    """Hypotheses and conclusions of verify.py against autograd's, on both sides of each."""
    asked = dict.fromkeys(range(7), 0)
    for z, w, T in cases[4:]:
        f = by_autograd(z, w, T)
        rise, dh_dt, P_dt = (f[name] * T**2 for name in ("dh_plus_dt", "dh_dt", "P_dt"))
        some = z[::20], w[::20]
        curve = [by_autograd(*some, torch.full_like(T[::20], t))["dh_plus"] for t in (0.05, 1, 1e9)]
        curve = torch.stack(curve).nan_to_num(-1.0)  # where no rewarded token can be drawn at .05
        knob = (f["dh"] > 0) & (dh_dt >= 0) & (P_dt < 0)
        expected = [  # the hypothesis, where it is clear of 0, and the conclusion's derivative
            (f["gbar"] > 0, decided(f["gbar"]), None),
            (f["dh_plus"] < 0, decided(f["dh_plus"], rise), rise),
            (f["pull"] > 0, decided(f["pull"], rise), rise),
            ((f["dh"] < 0) & (T >= 1), decided(f["dh"], dh_dt), dh_dt),
            (knob, decided(f["dh"], dh_dt, P_dt, rise), rise),
            ((curve > 0).any(0), decided(curve.amax(0)), None),
            (curve[-1] < 0, decided(curve[-1]), None),
        ]
        for k, row in enumerate(zip(verify.statements(z, w, T), expected, strict=True)):
            (name, margin, applies), (hypothesis, clear, derivative) = row
            assert torch.equal(applies[clear], hypothesis[clear]), name
            asked[k] += int((applies & clear).sum())
            if derivative is not None:  # the margin is a correlation of the derivative's sign
                assert torch.equal((margin > 0)[clear], (derivative > 0)[clear]), name
                assert (margin[clear].abs() <= 1 + 1e-9).all(), name
    assert min(asked.values()) > 20, asked


def test_margins_of_derivatives_are_correlations(cases):
    def correlation(q, f, x):
        cov = torch.cov(torch.stack([f, x]), correction=0, aweights=q)
        return (cov[0, 1] / (cov[0, 0] * cov[1, 1]).sqrt()).item()

    compared = 0
    for z, w, T in cases[:4] + cases[8::10]:
        margins = [margin for _, margin, _ in verify.statements(z, w, T)]
        f = by_autograd(z, w, T)
        p, p_T = torch.softmax(z, -1), torch.softmax(z / T[:, None], -1)
        (g, gbar), x = cf.sensitivity(z), torch.log_softmax(z, -1)
        q, tilted = p_T * w / f["P"][:, None], w * (g - gbar[:, None])
        clear = decided(f["gbar"], f["dh_plus_dt"] * T**2, f["dh_dt"] * T**2)
        for i in clear.nonzero()[:10, 0].tolist():
            for k, pair in enumerate([(p, p), (q, g), (q, g), (p_T, tilted), (q, g)]):
                expected = correlation(pair[0][i], pair[1][i], x[i])
                assert margins[k][i].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
                compared += 1
    assert compared > 200


def broken(name, change):
    """closed_forms with one function changed."""
    right = getattr(cf, name)
    return name, lambda *arguments: change(right(*arguments), *arguments)


FALSE = {  # what must be violated if this function were as it is here
    "gbar >= 0": broken("sensitivity", lambda value, z: (value[0], -value[1])),
    "dH+ < 0  =>  dH+' > 0": broken("dh_positive_dt", lambda value, z, w, T: -value),
    "E_q[g] > 0  =>  dH+' > 0, dH-' < 0": broken("dh_positive_dt", lambda value, *_: value / 0 * 0),
    "as written, T >= 1: dH < 0  =>  dH' > 0": broken("dh_objective_dt", lambda value, *_: -value),
    "dH > 0, dH' >= 0, P' < 0  =>  dH+' > 0": broken("dh_positive_dt", lambda value, *_: -value),
    "dH+ crosses zero at most once, from below": broken(
        "dh_positive", lambda value, z, w, T: value + 0.1 * ((T > 0.2) & (T < 0.3))
    ),
    "hot limit < 0  =>  dH+ < 0 at every T": broken(
        "dh_positive", lambda value, z, w, T: value - 9.0 * (torch.as_tensor(T) > 1e6)
    ),
}


@pytest.mark.parametrize("name", FALSE)
def test_verify_reports_each_statement_when_it_is_false(monkeypatch, capsys, name):
    monkeypatch.setattr(cf, *FALSE[name])
    monkeypatch.setattr(sys, "argv", ["verify.py", "--cases", "3000"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(verify.__file__, run_name="__main__")
    assert end.value.code == 1
    *rows, _, total = capsys.readouterr().out.splitlines()[1:]
    violations = {row[:45].strip(): int(row[45:].split()[1].replace(",", "")) for row in rows}
    assert list(violations) == list(FALSE)
    assert violations[name] > 10
    assert total == f"3,000 policies, seed 0: {sum(violations.values()):,} violations"


def test_limits_finds_the_failures_that_autograd_finds(cases):
    found = dict.fromkeys(range(3), 0)
    for z, w, T in cases[4:]:
        f = by_autograd(z, w, T)
        is_binary = ((w == 0) | (w == 1)).all(-1) & (f["P"] > 1e-7) & (f["P"] < 1 - 1e-7)
        expected = [
            ((f["dh"] < 0) & (T < 1), f["dh"], f["dh_dt"]),
            ((f["dh_A"] < 0) & is_binary, f["dh_A"], f["dh_A_dt"]),
            (f["dh_plus"] >= 0, f["dh_plus"], f["dh_plus_dt"]),
        ]
        for k, row in enumerate(zip(limits.non_theorems(z, w, T), expected, strict=True)):
            (name, fails, applies), (hypothesis, value, derivative) = row
            clear = decided(value, derivative, derivative * T**2)
            assert torch.equal(applies[clear], hypothesis[clear]), name
            assert torch.equal(fails[clear & applies], (derivative < 0)[clear & applies]), name
            found[k] += int((fails & applies & clear).sum())
    assert min(found.values()) > 20, found


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
    drawn = [torch.softmax(z / T, -1)[1].item() for T in (0.25, 0.4, 1.0)]
    assert drawn == pytest.approx([0.361, 0.379, 0.333], abs=5e-4)
    # Weighted with GRPO's advantage: dH < 0 and it falls with T, though dH+ itself rises.
    z, w = policy([10, 4, 3, 1], [1, 0, 0, 1])
    assert limits.dh_normalised(z, w, 0.5).item() == pytest.approx(-0.068036, abs=1e-6)
    assert limits.dh_normalised_dt(z, w, 0.5).item() == pytest.approx(-0.067645, abs=1e-6)
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
    # Never: the hot limit is below zero. Always: the rewarded token is rare from the start.
    assert cf.crossing_temperature(*policy([60, 30, 6, 4], [1, 0, 0, 0])).item() == math.inf
    assert cf.dh_positive(*policy([60, 30, 6, 4], [1, 0, 0, 0]), math.inf).item() < 0
    assert cf.crossing_temperature(*policy([60, 30, 6, 4], [0, 0, 0, 1])).item() == 0.0
    torch.manual_seed(1)
    for z, w, _ in itertools.islice(verify.random_policies(2000), 12):
        g, gbar = cf.sensitivity(z)
        limit, crossing = gbar - (w * g).sum(-1) / w.sum(-1), cf.crossing_temperature(z, w)
        torch.testing.assert_close(cf.dh_positive(z, w, math.inf), limit, **CLOSE)
        hot = cf.dh_positive(z, w, torch.full(limit.shape, 1e7, dtype=torch.float64))
        torch.testing.assert_close(hot, limit, atol=1e-5, rtol=1e-4)
        assert (crossing[limit < -1e-6] == math.inf).all()
        assert (crossing[limit > 1e-3] < math.inf).all()


def test_the_crossing_over_the_simplex():
    """Three tokens, the last one wrong: what theory/README.md says of the picture (section 4)."""
    first, second = torch.meshgrid(*[(torch.arange(300).double() + 0.5) / 300] * 2, indexing="xy")
    p = torch.stack([first, second, 1 - first - second], -1)[first + second < 1 - 1e-9]
    w = torch.tensor([1.0, 1, 0], dtype=torch.float64).expand_as(p)
    crossing = cf.crossing_temperature(p.log(), w)
    g, _ = cf.sensitivity(p.log())
    right = (p * g)[:, :2].sum(-1) / p[:, :2].sum(-1)
    at_one = p[:, 2] * (g[:, 2] - right)
    torch.testing.assert_close(cf.dh_positive(p.log(), w, 1.0), at_one, **CLOSE)
    assert torch.equal(crossing < 1, at_one > 0)
    assert (crossing[g[:, 2] < 0] > 1).all() and (crossing[p[:, 2] > p[:, :2].amax(-1)] < 1).all()
    assert (crossing < 1).double().mean().item() == pytest.approx(0.36, abs=0.005)
    assert (crossing == 0).double().mean().item() == pytest.approx(0.31, abs=0.005)
    e = torch.tensor([0.1, 0.3, 0.4, 0.5], dtype=torch.float64)
    line = torch.stack([0.8 * (1 - e), 0.2 * (1 - e), e], -1)
    along = cf.crossing_temperature(line.log(), w[:4])
    assert along.tolist() == pytest.approx([1.4, 2.9, 1.4, 0.0], abs=0.05)


def test_the_step_scales_the_change_and_moves_no_crossing(cases):
    """A step alpha times as long changes the entropy alpha times as much, to first order."""
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
    """Trees of N right answers: sum of token entropies = entropy of the sequence <= log N."""
    generator = torch.Generator().manual_seed(0)
    answers = ["11", "12", "133", "1344", "2", "3411", "3412", "342"]
    for trial in range(50):
        p = torch.rand(len(answers), generator=generator, dtype=torch.float64)
        p = p**3 if trial else torch.ones_like(p)
        p = p / p.sum()
        total, length = 0.0, 0.0
        for prefix in {a[:i] for a in answers for i in range(len(a) + 1)}:
            below = torch.tensor([a.startswith(prefix) for a in answers])
            following = sorted({(a + "$")[len(prefix)] for a in answers if a.startswith(prefix)})
            chance = [
                sum(q for a, q in zip(answers, p, strict=True) if f"{a}$".startswith(prefix + c)) for c in following
            ]
            mass = p[below].sum()
            total += (mass * token_entropy((torch.stack(chance) / mass).log())).item()
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
        assert cf.dh_positive(flat, one, T).item() == pytest.approx(0.0, abs=1e-15)  # a uniform policy is at its peak
        assert cf.dh_positive_dt(flat, one, T).item() == 0.0
    z = torch.tensor([3.0, 2.0, 1.0, 0.5, -1.0], dtype=torch.float64)
    assert cf.dh_positive(z, every, 1.0).item() == pytest.approx(0.0, abs=1e-15)  # all right at T = 1: q = p
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


def command(script, *arguments, folder):
    """Run a script as a reader does, from some folder; only the core is on the path."""
    return subprocess.run(
        [sys.executable, ROOT / "theory" / script, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_verify_as_a_command(tmp_path):
    result = command("verify.py", "--cases", "5000", "--seed", "4", folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    other = command("verify.py", "--cases", "5000", "--seed", "5", folder=tmp_path)
    assert other.stdout.splitlines()[:8] != result.stdout.splitlines()[:8]
    assert result.stdout.endswith("5,000 policies, seed 4: 0 violations\n")
    assert len(result.stdout.splitlines()) == 10


def test_limits_as_a_command(tmp_path):
    result = command("lab/limits.py", "--cases", "20000", folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    readme = (ROOT / "theory" / "README.md").read_text().splitlines()
    for row in result.stdout.splitlines()[1:4]:
        (shown,) = [line for line in readme if line.startswith(row[:45])]
        rates = [float(line.split()[-1].rstrip("%")) for line in (row, shown)]
        assert rates[0] == pytest.approx(rates[1], abs=2.0)  # four standard deviations


def test_the_readme_shows_every_statement_and_names_tests_that_exist(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["verify.py", "--cases", "3000"])
    assert verify.main() == 0
    readme = (ROOT / "theory" / "README.md").read_text()
    for row in capsys.readouterr().out.splitlines()[:8]:
        assert row[:45] in readme
    defined = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", readme):
        assert f"def {name}(" in defined
