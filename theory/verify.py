"""Check theory/README.md on random policies and on hard cases:  `python theory/verify.py`

Each row claims that a value is not negative where a hypothesis is met. It says in how many cases
the hypothesis is met by more than 1e-7, in how many of these the value is below -1e-12 (rounding),
and the lowest value. The last table has false claims. Exits with 1 if one of the others fails.
"""

import argparse

import torch

import closed_forms as cf
from entropy import log_policy, token_entropy

TINY = 1e-7


def random_policies(count):
    """Batches z `[B, V]`, w `[B, V]`, T `[B]` of 50 sizes V from 2 to 1,000."""
    for V in (2 * 500 ** torch.linspace(0, 1, 50)).round().int().tolist():
        B = 1 + int(0.09 * count / V**0.5)  # `count` in all, nearly
        z = torch.randn(B, V) * 10 ** (2 * torch.rand(B, 1) - 1)  # a spread of 0.1 to 10
        w = (torch.rand(B, V) < torch.rand(B, 1)).double()  # 0 to 100% of the tokens are rewarded
        w[:, 0] = 1.0  # one at least; which one makes no difference
        w[B // 2 :] *= torch.rand(B - B // 2, V).clamp(min=0.01)  # half with grades
        yield z.double(), w, 0.05 * 400 ** torch.rand(B).double()  # a temperature of 0.05 to 20


def hard_policies(count):
    """`random_policies` at the edges: each batch in five ways."""
    for z, w, T in random_policies(count):
        yield z / 100, w, T  # nearly uniform
        yield z.round(), w, T  # ties
        yield 10 * z, w, T  # very peaked
        yield z**3, w, T  # very peaked, with long tails
        yield z, w * torch.softmax(-z / 2, -1), T  # the rarer, the better


def statements(z, w, T):
    """What is proved: a name, what is not negative, and where the hypothesis is met."""
    # Sections 1, 3, 4 and 5.
    g, gbar = cf.sensitivity(z)
    plus = cf.dh_positive(z, w, T)
    rise = cf.dh_positive_dt(z, w, T)
    yield "gbar >= 0", gbar, T > 0
    yield "dH+ < 0  =>  dH+' >= 0", rise, plus < -TINY
    yield "E_q[g] > 0  =>  dH+' >= 0, dH-' <= 0", rise, gbar - plus > TINY
    yield "dH+ > 0  =>  dH+ >= 0 at 2 T", cf.dh_positive(z, w, 2 * T), plus > TINY
    yield "hot limit < 0  =>  dH+ <= 0", -plus, cf.dh_positive(z, w, torch.inf) < -TINY

    # Sections 6 and 8: `between` is positive if a token has u_0 < u < E_{p_T}[u].
    x = log_policy(z)
    p_T = log_policy(z, T).exp()
    dh = cf.dh_objective(z, w, T)
    slope = cf.dh_objective_dt(z, w, T)
    falls = dh < -TINY
    yield "T >= 1: dH < 0  =>  dH' >= 0", slope, falls & (T >= 1)
    below_mean = cf.expectation(p_T, x)[:, None] - x
    between, token = torch.minimum(g - gbar[:, None], below_mean).max(-1)
    yield "no token between: dH < 0  =>  dH' >= 0", slope, falls & (between < 0)
    alone = torch.nn.functional.one_hot(token, z.shape[-1])
    yield "one between, alone right: dH' <= 0", -cf.dh_objective_dt(z, alone, T), between > TINY
    wanes = cf.covariance(p_T, w, x) > TINY  # P' < 0
    yield "dH > 0, dH' >= 0, P' < 0  =>  dH+' >= 0", rise, (dh > TINY) & (slope >= 0) & wanes

    # Section 9, for right answers of random lengths: below lambda the sum is above 1.
    lengths = torch.randint(1, 20, x.shape)
    per_token = token_entropy(z) / cf.expectation(x.exp(), lengths)
    log_sum = torch.logsumexp(-per_token[:, None] * lengths, -1)
    yield "full reward: entropy a token <= lambda", log_sum, T > 0


def non_theorems(z, w, T):
    """What is false, in the form of `statements`."""
    no_pull = cf.dh_positive(z, w, T) >= cf.sensitivity(z)[1]
    yield "E_q[g] <= 0  =>  dH+' >= 0", cf.dh_positive_dt(z, w, T), no_pull
    falls = cf.dh_objective(z, w, T) < -TINY
    yield "T < 1: dH < 0  =>  dH' >= 0", cf.dh_objective_dt(z, w, T), falls & (T < 1)

    # Section 7: GRPO's advantages A change with T too, so the derivative is autograd's.
    T = T.clone().requires_grad_()
    P = cf.expectation(log_policy(z, T).exp(), w)[:, None]
    A = (w - P) / (P * (1 - P)).sqrt()
    binary = (w == w.round()).all(-1) & (P * (1 - P) > TINY)[:, 0]
    for name, weights in ("GRPO's weights", w * A), ("whole group", A):
        dh = cf.dh_objective(z, weights, T)
        (slope,) = torch.autograd.grad(dh.sum(), T, retain_graph=True)
        falls = binary & (dh < -TINY)
        yield f"{name}, T < 1: dH < 0  =>  dH' >= 0", slope, falls & (T < 1)
        yield f"{name}, T >= 1: dH < 0  =>  dH' >= 0", slope, falls & (T >= 1)


def table(title, statements, policies):
    """Print a row for each statement, and return the number of failures."""
    print(f"\n{title:<44}     cases failures   lowest")
    rows = {}
    for batch in policies:
        for name, value, applies in statements(*batch):
            rows.setdefault(name, []).append(value[applies])
    total = 0
    for name, parts in rows.items():
        values = torch.cat(parts)
        failed = len(values) - int((values > -1e-12).sum())  # a NaN fails too
        lowest = min(values.tolist(), default=0.0)
        print(f"{name:<44} {len(values):>9,} {failed:>8,} {lowest:>8.1e}")
        total += failed
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Check theory/README.md on random policies.")
    parser.add_argument("--cases", type=int, default=1_000_000, help="random policies")
    cases = parser.parse_args().cases
    torch.manual_seed(0)
    failures = table("proved (prime: d/dT)", statements, random_policies(cases))
    failures += table("proved, on hard cases", statements, hard_policies(cases // 10))
    table("not a theorem", non_theorems, random_policies(cases // 5))
    print(f"\n{cases:,} policies: {failures:,} failures of what is proved")
    raise SystemExit(failures > 0)
