"""theory/: closed forms against autograd, enumeration, real steps; the theorem, its limits, the rule on a plant."""

import itertools
import math
import os
import re
import subprocess
import sys
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
import torch

import closed_forms as cf
import verify
from entropy import entropy_temperature_derivative, log_policy, token_entropy
from scope_rl import TemperatureRule

ROOT = Path(__file__).parents[1]
README = (ROOT / "theory" / "README.md").read_text()
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


def binary(z, w, T):
    """The same policies with weights of 0 and 1, where the pass rate is neither."""
    w = (w > 0).double()
    w[:, -1] = 0.0  # something is wrong, or there is no advantage
    P = (torch.softmax(z / T[:, None], -1) * w).sum(-1)
    keep = (P > 1e-6) & (P < 1 - 1e-6)
    return z[keep], w[keep], T[keep]


def slope(f, x):
    return torch.autograd.grad(f.sum(), x)[0]


def enumerated_step(z, weights, T):
    """Mean over samples a at T of weights_a times the gradient of log p(a), summed token by token."""
    z = z.detach().requires_grad_()
    drawn = torch.softmax(z.detach() / T[:, None], -1)
    total = torch.zeros_like(z)
    for a in range(z.shape[1]):
        gradient = slope(torch.log_softmax(z, -1)[:, a], z)
        total += (drawn[:, a] * weights[:, a])[:, None] * gradient
    return total, (drawn * weights).sum(-1)


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


def test_normalised_changes_equal_grpos_own_advantage(cases):
    """Advantages (R - mean) / std of a group drawn at T: of the rewarded samples alone, and of all."""
    for z, w, T in itertools.starmap(binary, cases):
        P = (torch.softmax(z / T[:, None], -1) * w).sum(-1)[:, None]
        advantages = (w - P) / (P * (1 - P)).sqrt()
        positives, _ = enumerated_step(z, advantages * w, T)
        group, _ = enumerated_step(z, advantages, T)
        torch.testing.assert_close(cf.dh_normalised(z, w, T), entropy_change(z, positives), **CLOSE)
        torch.testing.assert_close(cf.dh_group(z, w, T), entropy_change(z, group), atol=1e-9, rtol=1e-6)
        halves = cf.dh_positive(z, w, T) + cf.dh_negative(z, 1 - w, T)
        torch.testing.assert_close(
            cf.dh_group(z, w, T), cf.reward_std(z, w, T) * halves, atol=1e-9, rtol=1e-6
        )


def normalised_dt(value, halves_dt):
    """Section 7: the derivative of sqrt(P (1 - P)) times what has the derivative `halves_dt`."""

    def derivative(z, w, T):
        p_T, x = torch.softmax(z / T[:, None], -1), torch.log_softmax(z, -1)
        P, P_dt = (p_T * w).sum(-1), -cf.covariance(p_T, w, x) / T**2
        std = (P * (1 - P)).sqrt()
        return (1 - 2 * P) * P_dt / (2 * std**2) * value(z, w, T) + std * halves_dt(z, w, T)

    return derivative


@pytest.mark.parametrize(
    ("f", "derivative"),
    [
        (lambda z, w, T: token_entropy(z, T), lambda z, w, T: entropy_temperature_derivative(z, T)),
        (cf.dh_positive, cf.dh_positive_dt),
        (cf.dh_objective, cf.dh_objective_dt),
        (cf.dh_normalised, normalised_dt(cf.dh_normalised, cf.dh_positive_dt)),
        (cf.dh_group, normalised_dt(cf.dh_group, lambda z, w, T: cf.dh_positive_dt(z, w, T) - cf.dh_positive_dt(z, 1 - w, T))),
    ],
    ids=["entropy", "positive", "objective", "normalised", "group"],
)  # fmt: skip
def test_temperature_derivatives_equal_autograd_and_finite_differences(cases, f, derivative):
    for z, w, T in itertools.starmap(binary, cases) if f in (cf.dh_normalised, cf.dh_group) else cases:
        _, by_autograd = verify.with_slope(f, z, w, T)
        torch.testing.assert_close(derivative(z, w, T), by_autograd, atol=1e-8, rtol=1e-6)
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


def test_the_step_scales_the_change_and_moves_no_crossing(cases):
    """A step alpha times as long changes the entropy alpha times as much, to first order."""
    z, w, T = cases[2]
    direction = cf.sampled(z, w, T) - torch.softmax(z, -1)
    for alpha in (1 / 64, 1.0, 4.0):
        change = entropy_change(z, alpha * direction)
        torch.testing.assert_close(change, alpha * cf.dh_positive(z, w, T), atol=1e-9, rtol=1e-6)


# --- verify.py
def by_autograd(z, w, T):
    """E_q[g], gbar, P, all changes, and the T-derivatives of what depends on T, by softmax and autograd."""
    T, leaf = T.clone().requires_grad_(), z.clone().requires_grad_()
    g = -slope(token_entropy(leaf), leaf)
    gbar = (torch.softmax(z, -1) * g).sum(-1)
    p_T = torch.softmax(z / T[:, None], -1)
    P, pull = (p_T * w).sum(-1), (p_T * w * g).sum(-1) / (p_T * w).sum(-1)
    std, dh_plus = (P * (1 - P)).sqrt(), gbar - pull
    group = (P * (p_T * g).sum(-1) - P * pull) / std  # minus the covariance, over the standard deviation
    f = {"plus": dh_plus, "dh": P * dh_plus, "A": std * dh_plus, "group": group, "P": P, "pull": pull}
    for name, value in list(f.items()):
        f[name + "_dt"] = torch.autograd.grad(value.sum(), T, retain_graph=True)[0]
    f = {name: value.detach() for name, value in f.items()}
    inside = (g > gbar[:, None]) & (
        torch.log_softmax(z, -1) < (p_T * torch.log_softmax(z, -1)).sum(-1)[:, None]
    )
    return f | {"gbar": gbar, "std": std.detach(), "inside": inside}


def decided(*values):
    """Where no value is so near to 0 that rounding, or a threshold of 1e-7, decides its sign."""
    return torch.stack([value.abs() > 2e-6 for value in values]).all(0)


def test_rows_apply_where_their_hypothesis_holds_and_fail_where_the_derivative_does(cases):
    """verify.py's hypotheses and conclusions against autograd's, on both sides of each."""
    asked, failed = {}, {}
    for z, w, T in cases[4:]:
        f = by_autograd(z, w, T)
        cold, is_binary = T < 1, ((w == 0) | (w == 1)).all(-1) & (f["std"] ** 2 > 1e-7)
        plus, dh, knob = (
            f["plus_dt"] * T**2,
            f["dh_dt"] * T**2,
            (f["dh"] > 0) & (f["dh_dt"] >= 0) & (f["P_dt"] < 0),
        )
        lone = -f["inside"].any(-1).double()  # a token between makes dH' negative
        expected = {  # the hypothesis, what must be clear of 0 for it, and the derivative
            "gbar > 0": (f["gbar"] > 0, [f["gbar"]], f["gbar"]),
            "dH+ < 0  =>  dH+' > 0": (f["plus"] < 0, [f["plus"]], plus),
            "E_q[g] > 0  =>  dH+' > 0, dH-' < 0": (f["pull"] > 0, [f["pull"]], plus),
            "T >= 1: dH < 0  =>  dH' > 0": ((f["dh"] < 0) & ~cold, [f["dh"]], dh),
            "no token between: dH < 0  =>  dH' > 0": ((f["dh"] < 0) & ~f["inside"].any(-1), [f["dh"]], dh),
            "one between, alone right: dH < 0, dH' < 0": (f["inside"].any(-1), [], -lone),
            "dH > 0, dH' >= 0, P' < 0  =>  dH+' > 0": (knob, [f["dh"], dh, f["P_dt"] * T**2], plus),
            "* T < 1: dH < 0  =>  dH' > 0": ((f["dh"] < 0) & cold, [f["dh"]], f["dh_dt"]),
            "dH+ >= 0  =>  dH+' > 0": (f["plus"] >= 0, [f["plus"]], plus),
            "E_q[g] <= 0  =>  dH+' > 0": (f["pull"] <= 0, [f["pull"]], plus),
        }
        for name, key in ("GRPO's weights", "A"), ("whole group", "group"):
            for side, where in ("T < 1", cold), ("T >= 1", ~cold):
                row = (f[key] < 0) & where & is_binary, [f[key], f["std"] ** 2 - 1e-7], f[key + "_dt"]
                expected[f"* {name}, {side}: dH < 0  =>  dH' > 0"] = row
        for name, margin, applies in itertools.chain(
            verify.statements(z, w, T), verify.non_theorems(z, w, T)
        ):
            if name in expected:
                hypothesis, near, derivative = expected.pop(name)
                clear = decided(derivative, *near)
                if "between" in name:  # a token near the edge may be taken for either
                    clear &= applies
                assert torch.equal(applies[clear], hypothesis[clear]), name
                assert torch.equal((margin > 0)[clear & applies], (derivative > 0)[clear & applies]), name
                asked[name] = asked.get(name, 0) + int((applies & clear).sum())
                failed[name] = failed.get(name, 0) + int((applies & clear & (derivative < 0)).sum())
        assert not expected
    assert min(asked.values()) > 20, asked
    assert [count > 20 for count in failed.values()] == [False] * 7 + [True] * 7, failed


CORRELATION, CHANGE, BOUND = verify.correlation, cf.dh_positive, cf.entropy_bound
FALSE = {  # what must fail if this function were as it is here
    "gbar > 0": (cf, "sensitivity", lambda z, right=cf.sensitivity: (right(z)[0], -right(z)[1])),
    "dH+ < 0  =>  dH+' > 0": (verify, "correlation", lambda q, f, h: CORRELATION(q, -f, h)),
    "E_q[g] > 0  =>  dH+' > 0, dH-' < 0": (verify, "correlation", lambda q, f, h: (q[:, 0] * math.nan, q[:, 0] > 0)),
    "T >= 1: dH < 0  =>  dH' > 0": (verify, "correlation", lambda q, f, h: CORRELATION(q, f, -h)),
    "no token between: dH < 0  =>  dH' > 0": (cf, "sensitivity", lambda z: (-z.exp(), -z.exp().sum(-1))),
    "one between, alone right: dH < 0, dH' < 0": (verify, "correlation", lambda q, f, h: CORRELATION(q, -f, h)),
    "dH > 0, dH' >= 0, P' < 0  =>  dH+' > 0": (cf, "sampled", lambda z, w, T: torch.softmax(-z / T[:, None], -1)),
    "* dH+ crosses zero at most once, from below": (
        cf, "dh_positive", lambda z, w, T: CHANGE(z, w, T) + 0.1 * ((T > 0.2) & (T < 0.3))),
    "* hot limit < 0  =>  dH+ < 0 at every T": (cf, "dh_positive", lambda z, w, T: CHANGE(z, w, T) - 9.0 * (T > 1e6)),
    "* full reward: entropy a token <= lambda": (cf, "entropy_bound", lambda lengths: 0.9 * BOUND(lengths)),
}  # fmt: skip


@pytest.mark.parametrize("name", FALSE)
def test_verify_reports_each_statement_when_it_is_false(monkeypatch, capsys, name):
    monkeypatch.setattr(*FALSE[name])
    monkeypatch.setattr(sys, "argv", ["verify.py", "--cases", "3000"])
    assert verify.main() == 1
    *tables, _, total = capsys.readouterr().out.splitlines()
    failures = {row[:45].strip(): int(row[45:].split()[1].replace(",", "")) for row in tables[1:11]}
    assert list(failures) == list(FALSE)
    assert failures[name] > 10
    hard = sum(int(row[45:].split()[1].replace(",", "")) for row in tables[13:23])
    assert total == f"3,000 policies, seed 0: {sum(failures.values()) + hard:,} failures of what is proved"


def test_verify_as_a_command(tmp_path):
    """As a reader runs it, from some folder, with only the core on the path."""

    def output(*arguments):
        command = [sys.executable, ROOT / "theory" / "verify.py", *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
        ).stdout

    text = output("--cases", "50000", "--seed", "4")
    assert text.endswith("50,000 policies, seed 4: 0 failures of what is proved\n")
    assert output("--cases", "1000", "--seed", "5") != output("--cases", "1000", "--seed", "4")
    rows = [line for line in text.splitlines()[:-1] if line]
    assert len(rows) == 11 + 11 + 8
    for row in rows[:11] + rows[23:]:  # README shows every row, and rates that are met within chance
        shown = [line for line in README.splitlines() if line.startswith(row[:45])][0]
        rates = [float(line.split()[-2].rstrip("%")) for line in (row, shown) if line.split()[-2][-1] == "%"]
        assert not rates or rates[0] == pytest.approx(
            rates[1], abs=6.0
        )  # four standard deviations, of 1,700 cases
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in Path(__file__).read_text()


def test_hard_policies_are_of_the_kinds_that_verify_says():
    torch.manual_seed(0)
    uniform, ties, peaked, tails, rarer = itertools.islice(verify.hard_policies(20_000), 200, 205)
    assert all(
        len(z) == len(w) == len(T) > 50 and z.shape == w.shape
        for z, w, T in (uniform, ties, peaked, tails, rarer)
    )
    assert torch.softmax(uniform[0], -1).std(-1).max() < 0.1 / uniform[0].shape[1]
    assert len(ties[0].unique()) < ties[0].numel() / 10
    assert (torch.softmax(peaked[0], -1).amax(-1) > 0.9).double().mean() > 0.5
    assert tails[0].amax() - tails[0].amin() > 1000
    z, w, _ = rarer
    together = [
        torch.corrcoef(torch.stack([a[b > 0], b[b > 0]]))[0, 1]
        for a, b in zip(z, w, strict=True)
        if (b > 0).sum() > 2
    ]
    assert torch.stack(together).nanmean() < -0.3
    assert (w.amax(-1) <= 1).all() and (w.amax(-1) > 0).all()


# --- Limits and examples
def test_each_hypothesis_is_needed():
    """Policies, given as counts, at which each statement that is no theorem fails."""

    def change_and_slope(f, counts, weights, T):
        z, w = policy(counts, weights)
        value, derivative = verify.with_slope(f, z, w, torch.tensor(T, dtype=torch.float64))
        return pytest.approx([value.item(), derivative.item()], abs=1e-6)

    # Outside the hypothesis, dH+ > 0, and it falls with T.
    assert [0.408162, -0.033501] == change_and_slope(cf.dh_positive, [17, 2, 1], [0, 1, 1], 0.25)
    # The objective as written below T = 1.
    assert [-0.007984, -0.007859] == change_and_slope(cf.dh_objective, [8, 7, 3, 3], [0, 1, 0, 0], 0.25)
    z, _ = policy([8, 7, 3, 3], [0, 1, 0, 0])
    drawn = [torch.softmax(z / T, -1)[1].item() for T in (0.25, 0.4, 1.0)]
    assert drawn == pytest.approx([0.361, 0.379, 0.333], abs=5e-4)
    # Weighted with GRPO's advantage, though dH+ itself rises; and a whole group, at T > 1.
    assert [-0.068036, -0.067645] == change_and_slope(cf.dh_normalised, [10, 4, 3, 1], [1, 0, 0, 1], 0.5)
    assert cf.dh_positive_dt(*policy([10, 4, 3, 1], [1, 0, 0, 1]), 0.5).item() > 0
    assert [-0.225016, -0.024589] == change_and_slope(cf.dh_group, [4, 1, 1], [1, 0, 0], 1.2)
    # Equality: positive tokens that are equally likely make T irrelevant.
    assert cf.dh_positive_dt(*policy([6, 2, 2, 1], [0, 1, 1, 0]), 0.7).item() == pytest.approx(0.0, abs=1e-15)


def test_the_failure_at_the_published_clip_in_exact_arithmetic():
    """151,936 tokens, the second right, T = .8: section 6 with 50 digits, and by closed_forms.py."""
    rest = 151_934
    with localcontext() as context:
        context.prec = 50
        p, counts = [Decimal("0.44"), Decimal("0.325"), Decimal("0.235") / rest], [1, 1, rest]
        x = [q.ln() for q in p]
        H = -sum(n * q * a for n, q, a in zip(counts, p, x, strict=True))
        g = [q * (a + H) for q, a in zip(p, x, strict=True)]
        f = g[1] - sum(n * q * b for n, q, b in zip(counts, p, g, strict=True))  # g - gbar of the right token
        exact = {}
        for T in (Decimal("0.8"), Decimal("0.85")):
            drawn = [(a / T).exp() for a in x]
            total = sum(n * b for n, b in zip(counts, drawn, strict=True))
            mean = sum(n * b * a for n, b, a in zip(counts, drawn, x, strict=True)) / total  # E_{p_T}[x]
            exact[float(T)] = float(-drawn[1] / total * f), float(drawn[1] / total * f * (x[1] - mean) / T**2)
    assert exact[0.8] == pytest.approx((-0.0048712, -0.0000870), abs=5e-8)
    assert exact[0.85][1] > 0
    z = torch.tensor([0.44, 0.325] + [0.235 / rest] * rest, dtype=torch.float64).log()
    w = torch.zeros_like(z).index_fill_(0, torch.tensor([1]), 1.0)
    for T, (change, derivative) in exact.items():
        assert cf.dh_objective(z, w, T).item() == pytest.approx(change, rel=1e-9)
        assert cf.dh_objective_dt(z, w, T).item() == pytest.approx(derivative, rel=1e-7)


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


def test_degenerate_policies_are_finite_and_right():
    flat, one = torch.zeros(5, dtype=torch.float64), torch.tensor([0.0, 1, 0, 0, 0], dtype=torch.float64)
    every = torch.ones(5, dtype=torch.float64)
    for T in (1e-3, 1.0, 1e6):
        assert cf.dh_positive(flat, one, T).item() == pytest.approx(
            0.0, abs=1e-15
        )  # a uniform policy is at its peak
        assert cf.dh_positive_dt(flat, one, T).item() == 0.0
    z = torch.tensor([3.0, 2.0, 1.0, 0.5, -1.0], dtype=torch.float64)
    assert cf.dh_positive(z, every, 1.0).item() == pytest.approx(0.0, abs=1e-15)  # all right at T = 1: q = p
    changes = cf.dh_positive, cf.dh_positive_dt, cf.dh_objective, cf.dh_objective_dt, cf.dh_negative
    for logits in (z, z * 1e3, torch.tensor([1e3, -1e3, 0.0, 1.0, 2.0], dtype=torch.float64)):
        for w, T, f in itertools.product((one, every), (1e-3, 1.0, 1e6), changes):
            assert math.isfinite(f(logits, w, T).item())
    assert cf.sampled(z, every, 1e-3)[0].item() == pytest.approx(1.0)  # cold: the likeliest
    hot = cf.sampled(z, one + every, 1e9)
    torch.testing.assert_close(hot, (one + every) / 6, atol=1e-6, rtol=0)  # hot: the weights
    assert torch.isfinite(log_policy(z * 1e3)).all()


# --- Section 9
def entropy_per_token(answers, p):
    """Expected sum of token entropies over the expected length, of a tree of answers, and the former."""
    total = length = 0.0
    for prefix in {a[:i] for a in answers for i in range(len(a) + 1)}:
        following = sorted({(a + "$")[len(prefix)] for a in answers if a.startswith(prefix)})
        chance = [
            sum(q for a, q in zip(answers, p, strict=True) if f"{a}$".startswith(prefix + c))
            for c in following
        ]
        mass = torch.stack(chance).sum()
        total += (mass * token_entropy((torch.stack(chance) / mass).log())).item()
        length += mass.item()  # a token is drawn after every prefix, the end token included
    return total / length, total


def test_full_reward_bounds_the_entropy_a_token():
    """Trees of right answers, one of them the beginning of another: sum of token entropies <= lambda length."""
    generator = torch.Generator().manual_seed(0)
    answers = ["11", "12", "133", "1344", "2", "3411", "3412", "342", "1"]
    lengths = torch.tensor([len(a) + 1.0 for a in answers], dtype=torch.float64)
    bound = cf.entropy_bound(lengths)
    best = (-bound * lengths).exp()
    assert best.sum().item() == pytest.approx(1, abs=1e-12)
    assert entropy_per_token(answers, best)[0] == pytest.approx(bound.item(), abs=1e-12)
    for trial in range(50):
        p = torch.rand(len(answers), generator=generator, dtype=torch.float64)
        p = p**3 if trial else torch.ones_like(p)
        p = p / p.sum()
        rate, total = entropy_per_token(answers, p)
        assert total == pytest.approx(-(p * p.log()).sum().item(), abs=1e-12)
        assert total <= math.log(len(answers)) + 1e-12
        assert rate < bound.item()
    # One length: log N / L. One answer: 0. A table of questions: a bound each.
    several = torch.tensor([[4.0, 4, 4], [1, 2, 3]], dtype=torch.float64)
    golden = cf.entropy_bound(several)
    assert golden[0].item() == pytest.approx(math.log(3) / 4)
    assert (-golden[1] * several[1]).exp().sum().item() == pytest.approx(1)
    assert cf.entropy_bound(several[:, :1]).tolist() == [0, 0]
    # Both questions asked equally often: no policies are above the lambda of section 9, and rho is at it.
    low, high = 0.0, 5.0
    for _ in range(60):
        rate = (low + high) / 2
        low, high = (rate, high) if torch.logsumexp(-rate * several, -1).sum() > 0 else (low, rate)
    rho = torch.softmax(-low * several, -1)
    p = torch.cat([rho[None], torch.rand(200, 2, 3, generator=generator, dtype=torch.float64) ** 2])
    p = p / p.sum(-1, keepdim=True)
    rates = -(p * p.log()).sum((-1, -2)) / (p * several).sum((-1, -2))
    assert rates[0].item() == pytest.approx(low) and (rates[1:] < low).all()


# --- Section 8, on a simulated plant: H changes by a (T - T*) a step, with a T that is felt with a delay
def simulate(rule, a, delay, balance=lambda H: 1 + 0.87 * (H - 0.13), H=0.8, steps=1500):
    curve, felt = [H], 1.0
    for _ in range(steps):
        felt += (rule(H) - felt) / delay
        H = max(0.0, H + a * (felt - balance(H)))
        curve.append(H)
    return curve


def positional(target, gain, integral_gain, minimum, maximum):
    """The same gains in positional form; the integral is frozen while T is clipped."""
    integral = 0.0

    def rule(H):
        nonlocal integral
        wanted = 1 + gain * (target - H) + integral
        if minimum <= wanted <= maximum:
            integral += integral_gain * (target - H)
        return min(max(wanted, minimum), maximum)

    return rule


def settling(curve, target):
    return max(step for step, H in enumerate(curve) if abs(H - target) > target / 10) + 1


def test_the_rules_rest_where_predicted():
    """The proportional rule below its target by (T* - 1) / gain, unless the clip is below T*; the others at it."""
    for gain, rest in itertools.product((1.0, 2.0, 8.0), (0.9, 1.1, 1.19)):
        curve = simulate(TemperatureRule(0.4, gain), 0.02, 1, balance=lambda H, rest=rest: rest)
        assert curve[-1] == pytest.approx(0.4 - (rest - 1) / gain, abs=1e-6)
        with_integral = TemperatureRule(0.4, gain, 0.05)
        curve = simulate(with_integral, 0.02, 1, balance=lambda H, rest=rest: rest, steps=4000)
        assert curve[-1] == pytest.approx(0.4, abs=1e-6)
        assert with_integral.temperature == pytest.approx(rest)
    curve = simulate(TemperatureRule(0.4, 1.0), 0.02, 1, balance=lambda H: 1.3)
    assert curve[-1] == 0.0  # it falls as long as the plant lets it


def test_the_velocity_form_falls_less_far_below_the_target():
    measured = {}
    gains, plants = (
        ((2, 0.05), (4, 0.2), (8, 0.4)),
        itertools.product((0.008, 0.016, 0.032), (1, 2.5), (0.3, 0.4, 0.5)),
    )
    for (gain, integral_gain), (a, delay, target) in itertools.product(gains, plants):
        settings = target, gain, integral_gain, 0.5, 1.5
        curves = [simulate(rule(*settings), a, delay) for rule in (positional, TemperatureRule)]
        assert min(curves[1]) > min(curves[0])
        assert all(curve[-1] == pytest.approx(target, abs=1e-6) for curve in curves)  # no offset
        measured[gain, a, delay, target] = [
            (settling(curve, target), round(min(curve), 3)) for curve in curves
        ]
        if gain < 8 and a == 0.016:
            assert measured[gain, a, delay, target][1][0] < 0.75 * measured[gain, a, delay, target][0][0]
    assert len(measured) == 54
    shown = re.findall(r"^\| (\d), \.\d+ \| (\d+), (\.\d+) \| (\d+), (\.\d+) \|$", README, re.M)
    table = {int(row[0]): [(int(row[1]), float(row[2])), (int(row[3]), float(row[4]))] for row in shown}
    assert table == {gain: measured[gain, 0.016, 2.5, 0.4] for gain in (2, 4, 8)}


def test_nothing_winds_up():
    """However long T was clipped, it moves as soon as a change points inwards; without a clip the sums are PI's."""
    after = set()
    for steps in (5, 1000):
        rule = TemperatureRule(0.4, 8.0, 0.4, 0.5, 1.5)
        for _ in range(steps):
            assert rule(0.1) == 1.5 or steps == 5 or rule.temperature < 1.5
        assert rule.temperature == 1.5
        after.add((rule(0.2), rule(0.3)))
    assert len(after) == 1 and after.pop()[0] < 0.9
    # It heats above the target when that is less than gain / integral_gain = 20 steps away.
    for distance, heats in ((19, True), (21, False)):
        rule = TemperatureRule(0.4, 8.0, 0.4, 0.0, 9.0)
        before = rule(0.4 + 0.01 * (distance + 1))
        assert (rule(0.4 + 0.01 * distance) > before) == heats
    rule, curve = TemperatureRule(0.4, 8.0, 0.4, -99.0, 99.0), [0.8, 0.6, 0.7, 0.3]
    for H in curve:
        T = rule(H)
    assert T == pytest.approx(1 + 8 * (0.8 - 0.3) + 0.4 * sum(0.4 - H for H in curve))
