"""Check the theorem of theory/README.md on random policies:  `python theory/verify.py`

Prints for each statement how many policies meet its hypothesis, how many of these violate it, and
by what margin it holds at least: a correlation for a derivative, else nats per unit of the step.
Exits with 1 on a violation. Left out is what rounding decides: a spread or hypothesis below 1e-7.
"""

import argparse
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import closed_forms as cf
from entropy import log_policy

TINY = 1e-7


def random_policies(count: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches z `[B, V]`, w `[B, V]`, T `[B]` of 50 sizes V from 2 to 1,000, `count` in all.

    Logits spread by 0.1 to 10, 0 to 100% of the tokens rewarded (half with grades), T 0.05 to 20.
    """
    sizes = (2 * 500 ** torch.linspace(0, 1, 50)).round()
    counts = count * sizes**-0.5 / (sizes**-0.5).sum()  # fewer of the large
    for V, B in zip(sizes.int().tolist(), counts.ceil().int().tolist(), strict=True):
        z = torch.randn(B, V) * 10 ** (2 * torch.rand(B, 1) - 1)
        w = (torch.rand(B, V) < torch.rand(B, 1)).double()
        w[:, 0] = 1.0  # one at least; which one makes no difference, as the logits are in no order
        w[B // 2 :] *= torch.rand(B - B // 2, V).clamp(min=0.01)
        yield z.double(), w, 0.05 * 400 ** torch.rand(B).double()


def spread(q: Tensor, f: Tensor, h: Tensor) -> Tensor:
    """sd_q(f) sd_q(h) `[B]`, the most that |Cov_q(f, h)| can be; 0 if either is only rounding."""
    sd_f, sd_h = cf.covariance(q, f, f).sqrt(), cf.covariance(q, h, h).sqrt()
    return torch.where((sd_f > TINY) & (sd_h > TINY), sd_f * sd_h, 0.0)


def statements(z: Tensor, w: Tensor, T: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, margins, and where the hypothesis is met; the last two on every 20th policy."""
    x, (g, gbar), q = log_policy(z), cf.sensitivity(z), cf.sampled(z, w, T)
    size = spread(x.exp(), x.exp(), x)
    yield "gbar >= 0", gbar / size, size > 0  # gbar = Cov_p(p, x)
    size = spread(q, g, x)
    rise = cf.dh_positive_dt(z, w, T) * T**2 / size  # Corr_q(g, x)
    yield "dH+ < 0  =>  dH+' > 0", rise, (size > 0) & (cf.dh_positive(z, w, T) < -TINY)
    yield "E_q[g] > 0  =>  dH+' > 0, dH-' < 0", rise, (size > 0) & (cf.expectation(q, g) > TINY)

    dh, dh_dt, p_T = cf.dh_objective(z, w, T), cf.dh_objective_dt(z, w, T), log_policy(z, T).exp()
    size_T = spread(p_T, w * (g - gbar[:, None]), x)
    applies = (size_T > 0) & (dh < -TINY) & (T >= 1)
    yield "as written, T >= 1: dH < 0  =>  dH' > 0", dh_dt * T**2 / size_T, applies
    applies = (size > 0) & (dh > TINY) & (dh_dt >= 0) & (cf.covariance(p_T, w, x) > TINY)
    yield "dH > 0, dH' >= 0, P' < 0  =>  dH+' > 0", rise, applies  # P' = -Cov_{p_T}(w, x) / T^2

    grid = torch.linspace(4.5, 0, 41, dtype=z.dtype)[:, None] ** -2  # T: 0.05, ..., infinity
    curve = cf.dh_positive(z[::20], w[::20], grid)  # [41, B / 20]
    was_above = (curve > TINY).cummax(0).values
    lowest = torch.where(was_above, curve, torch.inf).amin(0)
    yield "dH+ crosses zero at most once, from below", lowest + TINY, was_above.any(0)
    yield "hot limit < 0  =>  dH+ < 0 at every T", -curve.amax(0), curve[-1] < -TINY


def main() -> int:
    """Check everything and print the table; 1 if anything is violated."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=1_000_000, help="random policies")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    batches = [list(statements(*policies)) for policies in random_policies(args.cases)]
    total = 0
    print(f"{'proved (prime: d/dT)':<45} {'cases':>9} {'violations':>10} {'margin':>8}")
    for rows in zip(*batches, strict=True):  # one statement, batch by batch
        margin = torch.cat([margin[applies] for _, margin, applies in rows])
        violations = int((~(margin > 0)).sum())  # a NaN is one too
        total += violations
        print(f"{rows[0][0]:<45} {len(margin):>9,} {violations:>10,} {margin.min():>8.1e}")
    print(f"\n{args.cases:,} policies, seed {args.seed}: {total:,} violations")
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
