"""Check theory/README.md on random policies and on hard cases:  `python theory/verify.py`

Rows say how many policies meet a hypothesis, how many of these fail, and the worst margin: a
correlation, or nats where there is a *. Left out is what rounding decides: a spread or a hypothesis
below 1e-7. The last table has statements that are false. Exits with 1 if one of the others fails.
"""

import argparse

import torch

import closed_forms as cf
from entropy import entropy_of, log_policy

TINY = 1e-7


def random_policies(count):
    """Batches z `[B, V]`, w `[B, V]`, T `[B]` of 50 sizes V from 2 to 1,000, `count` in all.

    Logits spread by 0.1 to 10, 0 to 100% of the tokens rewarded (half with grades), T 0.05 to 20.
    """
    sizes = (2 * 500 ** torch.linspace(0, 1, 50)).round()
    batches = (count * sizes**-0.5 / (sizes**-0.5).sum()).ceil()  # fewer of the large
    for V, B in torch.stack([sizes, batches], 1).int().tolist():
        spread = 10 ** (2 * torch.rand(B, 1) - 1)
        w = (torch.rand(B, V) < torch.rand(B, 1)).double()
        w[:, 0] = 1.0  # one at least; which one makes no difference, as the logits are in no order
        w[B // 2 :] *= torch.rand(B - B // 2, V).clamp(min=0.01)
        yield (spread * torch.randn(B, V)).double(), w, 0.05 * 400 ** torch.rand(B).double()


def hard_policies(count):
    """`random_policies` at the edges: each batch in five ways."""
    for z, w, T in random_policies(count):
        yield z / 100, w, T  # nearly uniform
        yield z.round(), w, T  # ties
        yield 10 * z, w, T  # very peaked
        yield z**3, w, T  # very peaked, with long tails
        log_rarity = -2 * torch.rand(len(z), 1) * z
        yield z, w * (log_rarity - log_rarity.amax(-1, keepdim=True)).exp(), T  # the rarer, the better


def correlation(q, f, h):
    """Corr_q(f, h) `[B]`, and whether both f and h vary by more than rounding."""
    sd_f = cf.covariance(q, f, f).sqrt()
    sd_h = cf.covariance(q, h, h).sqrt()
    return cf.covariance(q, f, h) / (sd_f * sd_h), torch.minimum(sd_f, sd_h) > TINY


def statements(z, w, T):
    """What is proved: name, margins, where the hypothesis is met; on every 20th policy where *."""
    x, q, p_T = log_policy(z), cf.sampled(z, w, T), log_policy(z, T).exp()
    p, (g, gbar) = x.exp(), cf.sensitivity(z)

    # Sections 1, 3 and 5: Corr_q(g, x) has the sign of dH+'.
    alike, varies = correlation(p, p, x)
    yield "gbar > 0", alike * gbar.sign(), varies
    rise, varies = correlation(q, g, x)
    pull = cf.expectation(q, g)
    yield "dH+ < 0  =>  dH+' > 0", rise, varies & (pull > gbar + TINY)
    yield "E_q[g] > 0  =>  dH+' > 0, dH-' < 0", rise, varies & (pull > TINY)

    # Section 6: Corr_{p_T}(f, x) has the sign of dH', and `between` is positive for u_0 < u < E_{p_T}[u].
    above = g - gbar[:, None]
    dh = cf.dh_objective(z, w, T)
    slope, f_varies = correlation(p_T, w * above, x)
    falls = f_varies & (dh < -TINY)
    yield "T >= 1: dH < 0  =>  dH' > 0", slope, falls & (T >= 1)
    between, token = torch.minimum(above, cf.expectation(p_T, x)[:, None] - x).max(-1)
    yield "no token between: dH < 0  =>  dH' > 0", slope, falls & (between < 0)
    alone = torch.nn.functional.one_hot(token, z.shape[-1])
    slope_alone, f_varies = correlation(p_T, alone * above, x)
    yield "one between, alone right: dH < 0, dH' < 0", -slope_alone, f_varies & (between > TINY)

    # Section 8, where P' = -Cov_{p_T}(w, x) / T^2.
    applies = varies & (dh > TINY) & (slope >= 0) & (cf.covariance(p_T, w, x) > TINY)
    yield "dH > 0, dH' >= 0, P' < 0  =>  dH+' > 0", rise, applies

    # Section 4 on a grid of temperatures, and section 9 for right answers of random lengths.
    T = torch.linspace(4.5, 0, 41, dtype=z.dtype)[:, None] ** -2  # 0.05, ..., infinity
    curve = cf.dh_positive(z[::20], w[::20], T)  # [41, B / 20]
    was_above = (curve > TINY).cummax(0).values
    lowest = torch.where(was_above, curve, torch.inf).amin(0)
    yield "* dH+ crosses zero at most once, from below", lowest + TINY, was_above.any(0)
    yield "* hot limit < 0  =>  dH+ < 0 at every T", -curve.amax(0), curve[-1] < -TINY
    lengths = torch.randint(1, 20, p[::20].shape)
    per_token = entropy_of(x[::20]) / cf.expectation(p[::20], lengths)
    spare = torch.logsumexp(-per_token[:, None] * lengths, -1)  # above 0 below lambda
    yield "* full reward: entropy a token <= lambda", spare + TINY, spare == spare


def non_theorems(z, w, T):
    """What is false: as `statements`. The margins of the first five rows are derivatives."""
    q, p_T, (g, gbar) = cf.sampled(z, w, T), log_policy(z, T).exp(), cf.sensitivity(z)
    P = cf.expectation(p_T, w)
    binary = (w == w.round()).all(-1) & (P * (1 - P) > TINY)
    hot = T.clone().requires_grad_()
    A = cf.advantages(z, w, hot)
    for name, weights, applies in (
        ("T < 1", w, T < 1),
        ("GRPO's weights, T < 1", w * A, binary & (T < 1)),
        ("GRPO's weights, T >= 1", w * A, binary & (T >= 1)),
        ("whole group, T < 1", A, binary & (T < 1)),
        ("whole group, T >= 1", A, binary & (T >= 1)),
    ):
        dh = cf.dh_objective(z, weights, hot)
        (slope,) = torch.autograd.grad(dh.sum(), hot, retain_graph=True)
        yield f"* {name}: dH < 0  =>  dH' > 0", slope + TINY, applies & (dh < -TINY)
    pull = cf.expectation(q, g)
    rise, varies = correlation(q, g, log_policy(z))
    yield "dH+ >= 0  =>  dH+' > 0", rise, varies & (pull <= gbar)
    yield "E_q[g] <= 0  =>  dH+' > 0", rise, varies & (pull <= 0)


def table(title, statements, policies):
    """Print a row for each statement, and return the number of failures."""
    margins = {}
    for batch in policies:
        for name, margin, applies in statements(*batch):
            margins.setdefault(name, []).append(margin[applies])
    print(f"{title:<45} {'cases':>9} {'failures':>8} {'rate':>6} {'worst':>8}")
    total = 0
    for name, parts in margins.items():
        margin = torch.cat(parts)
        failures = len(margin) - int((margin > 0).sum())  # a NaN fails too
        worst = min(margin.tolist(), default=0.0)
        rate = failures / max(1, len(margin))
        print(f"{name:<45} {len(margin):>9,} {failures:>8,} {rate:>6.1%} {worst:>8.1e}")
        total += failures
    print()
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000, help="random policies")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the batches are too small for more
    failures = table("proved (prime: d/dT)", statements, random_policies(args.cases))
    failures += table("proved, on hard cases", statements, hard_policies(args.cases // 10))
    table("not a theorem", non_theorems, random_policies(args.cases // 5))
    print(f"{args.cases:,} policies, seed {args.seed}: {failures:,} failures of what is proved")
    raise SystemExit(failures > 0)
