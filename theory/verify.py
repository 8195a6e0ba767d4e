"""Check every statement of theory/README.md on random policies:  `python theory/verify.py [--cases N] [--seed 0]`.

Prints a table: the statement, how many random cases met its hypothesis, how many of them violate it, and the smallest
margin by which it held. The statements that are *not* theorems follow, with the rate at which each fails. Exits with
status 1 if anything claimed as proved is violated.

A random policy has 2 to 1,000 tokens, Gaussian logits with a spread from 0.1 to 10 (log-uniform), weights that are
binary (half of the cases) or graded, each token rewarded with a chance from 0 to 1, and T from 0.05 to 20. Margins are
free of scale where a covariance is claimed to be positive: correlations. Differences from autograd are relative.
Cases that rounding decides (a spread or a hypothesis below 1e-7) are left out and not counted.
"""

import argparse
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

import closed_forms as cf
from entropy import entropy_temperature_derivative, log_policy, token_entropy

TINY = 1e-7


def random_policies(count: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches z `[B, V]`, w `[B, V]` and T `[B]` of random cases, `count` in all, of 50 sizes V, fewer of the large."""

    def log_uniform(low: float, high: float, *shape: int) -> Tensor:
        uniform = torch.rand(*shape, generator=generator, dtype=torch.float64)
        return (math.log(low) + uniform * (math.log(high) - math.log(low))).exp()

    sizes = [2, 3, *log_uniform(2, 1000, 48).round().int().tolist()]
    share = torch.tensor(sizes, dtype=torch.float64) ** -0.5
    for V, B in zip(sizes, (count * share / share.sum()).ceil().int().tolist(), strict=True):
        z = torch.randn(B, V, generator=generator, dtype=torch.float64) * log_uniform(0.1, 10, B, 1)
        uniform = torch.rand(B, V, generator=generator, dtype=torch.float64)
        w = (uniform < torch.rand(B, 1, generator=generator, dtype=torch.float64)).double()
        w[torch.arange(B), torch.randint(V, (B,), generator=generator)] = (
            1.0  # one rewarded token at least
        )
        w[B // 2 :] *= torch.rand(B - B // 2, V, generator=generator, dtype=torch.float64).clamp(
            min=0.01
        )  # graded
        yield z, w, log_uniform(0.05, 20, B)


def correlation(q: Tensor, f: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Corr_q(f, h), and whether the spread of both is more than rounding."""
    f, h = f - cf.expectation(q, f)[:, None], h - cf.expectation(q, h)[:, None]
    spread_f, spread_h = cf.expectation(q, f * f).sqrt(), cf.expectation(q, h * h).sqrt()
    return cf.expectation(q, f * h) / (spread_f * spread_h), (spread_f > TINY) & (spread_h > TINY)


def theorems(z: Tensor, w: Tensor, T: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Statements with the margin of each case that meets the hypothesis; a margin below 0 is a violation."""
    x, (g, gbar), q = log_policy(z), cf.sensitivity(z), cf.sampled(z, w, T)
    rises, real = correlation(q, g, x)
    pull = cf.expectation(q, g)
    yield "gbar >= 0", gbar + 1e-15, gbar > -1
    yield "dH+ < 0  =>  d dH+/dT > 0", rises, real & (pull - gbar > TINY)
    yield "E_q[g] > 0  =>  d dH+/dT > 0, d dH-/dT < 0", rises, real & (pull > TINY)
    z, w, T, x, f = z[::10], w[::10], T[::10], x[::10], (w * (g - gbar[:, None]))[::10]
    p_T = log_policy(z, T).exp()
    rises, real = correlation(p_T, f, x)
    applies = real & (cf.expectation(p_T, f) > TINY) & (T >= 1)
    yield "as written, T >= 1: dH < 0  =>  d dH/dT > 0", rises, applies
    before_peak = (cf.expectation(p_T, f) < -TINY) & (rises >= 0) & (cf.covariance(p_T, w, x) > TINY)
    rises, real = correlation(cf.sampled(z, w, T), cf.sensitivity(z)[0], x)
    yield "dH > 0, d dH/dT >= 0, P' < 0  =>  d dH+/dT > 0", rises, real & before_peak
    grid = torch.logspace(-1.3, 1.3, 40, dtype=z.dtype)[:, None]  # [40, 1]
    z, w = z[::10], w[::10]
    curve = cf.dh_positive(z[None], w[None], grid.expand(-1, len(z)))  # dH+ over the grid  [40, B / 100]
    was_above = (curve > TINY).double().cummax(0).values > 0
    later = torch.where(was_above, curve, torch.inf).amin(0)
    yield "dH+ crosses zero at most once, from below", later + TINY, was_above.any(0)
    yield "hot limit < 0  =>  dH+ < 0 at every T", -curve.amax(0), cf.hot_limit(z, w) < -TINY


def derivatives(z: Tensor, w: Tensor, T: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Closed forms with their difference from autograd, relative to the size they could have."""
    T = T.clone().requires_grad_()
    z = z.clone().requires_grad_()

    def slope(f: Tensor, of: Tensor) -> Tensor:
        return torch.autograd.grad(f.sum(), of, retain_graph=True)[0].detach()

    def relative(ours: Tensor, theirs: Tensor, size: Tensor) -> Tensor:
        return ((ours - theirs).abs() / size.abs().clamp(min=1e-3)).detach()

    g, _ = cf.sensitivity(z)
    size = g.abs().amax(-1) * z.abs().amax(-1) / T**2
    direct = slope(token_entropy(z, T), T)
    yield (
        "dH/dT = Var(z) / T^3",
        relative(entropy_temperature_derivative(z, T), direct, z.var(-1) / T**3),
    )
    yield "dH/dz = -g", relative(g, -slope(token_entropy(z), z), g).amax(-1)
    q = cf.sampled(z, w, T).detach()
    step = slope(cf.expectation(q, log_policy(z)), z)  # of the expected log p(a), a ~ q: q - p
    along = (slope(token_entropy(z), z) * step).sum(-1)
    yield (
        "dH+ = <dH/dz, d E_q[log p]/dz>",
        relative(cf.dh_positive(z, w, T), along, g.abs().amax(-1)),
    )
    yield "d dH+/dT", relative(cf.dh_positive_dt(z, w, T), slope(cf.dh_positive(z, w, T), T), size)
    yield (
        "d dH/dT as written",
        relative(cf.dh_objective_dt(z, w, T), slope(cf.dh_objective(z, w, T), T), size),
    )
    eta, moved = 1e-3, []
    for h in (eta, eta / 2):  # a real step: what first order leaves out halves with the step
        moved.append((token_entropy(z + h * step) - token_entropy(z)) / h - cf.dh_positive(z, w, T))
    yield "finite steps approach dH+ linearly", relative(moved[0], 2 * moved[1], 1 + 0 * size) / eta


def non_theorems(z: Tensor, w: Tensor, T: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Statements that fail somewhere: whether each case fails, and which cases meet the hypothesis."""
    binary = ((w == 0) | (w == 1)).all(-1)
    drop = cf.dh_objective(z, w, T) < -TINY
    yield (
        "as written, T < 1: dH < 0  =>  d dH/dT > 0",
        cf.dh_objective_dt(z, w, T) < -TINY,
        drop & (T < 1),
    )
    P = cf.pass_rate(z, w, T)
    inside = binary & (P > TINY) & (P < 1 - TINY)
    drop = cf.dh_normalised(z, w, T) < -TINY
    yield (
        "weighted by sqrt((1 - P) / P): the theorem",
        cf.dh_normalised_dt(z, w, T) < -TINY,
        inside & drop,
    )
    outside, real = (
        cf.dh_positive(z, w, T) >= 0,
        correlation(cf.sampled(z, w, T), cf.sensitivity(z)[0], log_policy(z))[1],
    )
    yield "dH+ >= 0  =>  d dH+/dT > 0 (outside)", cf.dh_positive_dt(z, w, T) <= 0, outside & real


def main() -> int:
    """Check everything, print the three tables; 1 if anything proved or exact is violated."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=3_000_000, help="random policies")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start, generator = time.perf_counter(), torch.Generator().manual_seed(args.seed)
    proved, exact, refuted = defaultdict(list), defaultdict(list), defaultdict(list)
    for z, w, T in random_policies(args.cases, generator):
        for name, margin, applies in theorems(z, w, T):
            proved[name].append(margin[applies])
        for name, fails, applies in non_theorems(z[::5], w[::5], T[::5]):
            refuted[name].append(fails[applies])
        for name, error in derivatives(z[::100], w[::100], T[::100]):
            exact[name].append(error)

    violations = 0
    print(f"{'proved':<52} {'cases':>9} {'violations':>10} {'margin':>9}")
    for name, margins in proved.items():
        margin = torch.cat(margins)
        violations += (bad := int((~(margin > 0)).sum()))
        print(f"{name:<52} {len(margin):>9,} {bad:>10} {margin.min():>9.1e}")
    print(f"\n{'closed form against autograd':<52} {'cases':>9} {'violations':>10} {'largest':>9}")
    for name, errors in exact.items():
        error = torch.cat(errors)
        violations += (bad := int((~(error < (0.1 if "finite" in name else 1e-6))).sum()))
        print(f"{name:<52} {len(error):>9,} {bad:>10} {error.max():>9.1e}")
    print(f"\n{'not a theorem':<52} {'cases':>9} {'failures':>10} {'rate':>9}")
    for name, failures in refuted.items():
        failed = torch.cat(failures)
        print(f"{name:<52} {len(failed):>9,} {int(failed.sum()):>10,} {failed.double().mean():>9.2%}")
    print(
        f"\n{args.cases:,} policies, seed {args.seed}, {time.perf_counter() - start:.0f} s: {violations} violations"
    )
    return int(violations > 0)


if __name__ == "__main__":
    sys.exit(main())
