"""How often does what is *not* a theorem fail?  `python theory/lab/limits.py`

theory/README.md proves that dH+ < 0 implies dH+' > 0 (a prime is d/dT), and the like for SCOPE's
objective at T >= 1. Nothing of the kind holds for that objective at T < 1 (section 6), for
positives weighted by GRPO's own advantage (section 7), or where dH+ >= 0 (section 3). Here is how
often, on the random policies of verify.py. Rates depend on the policies; that they are not 0 is
what counts.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # closed_forms and verify lie one folder up

import closed_forms as cf
from entropy import log_policy
from verify import TINY, random_policies, spread


def pass_rate(z: Tensor, w: Tensor, T: Tensor | float) -> Tensor:
    """P(T) = P_{p_T}(w = 1), for weights of 0 and 1, `[..., V]` -> `[...]` (section 7)."""
    return cf.expectation(log_policy(z, T).exp(), w)


def dh_normalised(z: Tensor, w: Tensor, T: Tensor | float) -> Tensor:
    """dH_A = sqrt(P (1 - P)) dH+: positives weighted by GRPO's advantage, `[...]` (section 7)."""
    P = pass_rate(z, w, T)
    return (P * (1 - P)).sqrt() * cf.dh_positive(z, w, T)


def dh_normalised_dt(z: Tensor, w: Tensor, T: Tensor | float) -> Tensor:
    """dH_A' by the product rule, with P' = -Cov_{p_T}(w, x) / T^2, `[...]` (section 7)."""
    P = pass_rate(z, w, T)
    P_dt = -cf.covariance(log_policy(z, T).exp(), w, log_policy(z)) / T**2
    root = (P * (1 - P)).sqrt()
    root_dt = (1 - 2 * P) * P_dt / (2 * root)
    return root_dt * cf.dh_positive(z, w, T) + root * cf.dh_positive_dt(z, w, T)


def non_theorems(z: Tensor, w: Tensor, T: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, whether each policy violates the statement, and whether it meets the hypothesis."""
    applies = (T < 1) & (cf.dh_objective(z, w, T) < -TINY)
    yield "as written, T < 1: dH < 0  =>  dH' > 0", cf.dh_objective_dt(z, w, T) < -TINY, applies
    P, binary = pass_rate(z, w, T), ((w == 0) | (w == 1)).all(-1)
    applies = binary & (P > TINY) & (P < 1 - TINY) & (dh_normalised(z, w, T) < -TINY)
    yield "GRPO's weights: dH_A < 0  =>  dH_A' > 0", dh_normalised_dt(z, w, T) < -TINY, applies
    varies = spread(cf.sampled(z, w, T), cf.sensitivity(z)[0], log_policy(z)) > 0
    applies = varies & (cf.dh_positive(z, w, T) >= 0)
    yield "outside: dH+ >= 0  =>  dH+' > 0", cf.dh_positive_dt(z, w, T) <= 0, applies


def main() -> None:
    """Print how many policies meet each hypothesis, and how many of these fail."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=200_000, help="random policies")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    batches = [list(non_theorems(*policies)) for policies in random_policies(args.cases)]
    print(f"{'not a theorem (prime: d/dT)':<45} {'cases':>9} {'failures':>9} {'rate':>7}")
    for rows in zip(*batches, strict=True):
        failed = torch.cat([fails[applies] for _, fails, applies in rows])
        count, rate = int(failed.sum()), failed.double().mean()
        print(f"{rows[0][0]:<45} {len(failed):>9,} {count:>9,} {rate:>7.1%}")
    print(f"\n{args.cases:,} policies, seed {args.seed}")


if __name__ == "__main__":
    main()
