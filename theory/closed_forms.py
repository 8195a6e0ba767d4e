"""First-order entropy changes of a tabular softmax policy, in closed form; see theory/README.md.

One state, logits z, policy p = softmax(z), x = log p, H = -sum_a p_a x_a. A gradient step of size
eta moves the logits by eta v, and to first order in eta the entropy answers with

    dH = -eta * sum_a g_a v_a,        g = p * (x + H),        gbar = sum_a p_a g_a >= 0.

Changes are in nats per unit of eta; use float64. `z` and `w` are `[..., V]` logits and non-negative
weights (1 for a rewarded token and 0 for another, or graded; not all 0). `T` is a number or `[...]`
above zero; torch.inf gives the limit of ever hotter sampling (section 4). Results are `[...]`.
"""

import torch
from torch import Tensor

from entropy import entropy_of, log_policy


def expectation(q: Tensor, f: Tensor) -> Tensor:
    """E_q[f], `[..., V]` -> `[...]`."""
    return (q * f).sum(-1)


def covariance(q: Tensor, f: Tensor, h: Tensor) -> Tensor:
    """Cov_q(f, h), `[..., V]` -> `[...]`."""
    return expectation(q, (f - expectation(q, f)[..., None]) * (h - expectation(q, h)[..., None]))


def sampled(z: Tensor, w: Tensor, T: Tensor | float) -> Tensor:
    """q_T(a), proportional to p_T(a) w_a: a rewarded sample drawn at T, `[..., V]` (section 2)."""
    return torch.softmax(log_policy(z, T) + w.log(), dim=-1)


def sensitivity(z: Tensor) -> tuple[Tensor, Tensor]:
    """g = p (x + H) = -dH/dz, `[..., V]`, and gbar = E_p[g], `[...]` (section 1)."""
    x = log_policy(z)
    g = x.exp() * (x + entropy_of(x)[..., None])
    return g, expectation(x.exp(), g)


def dh_positive(z: Tensor, w: Tensor, T: Tensor | float) -> Tensor:
    """dH+(T) = -(E_q[g] - gbar): reinforcing rewarded samples drawn at T (section 2)."""
    g, gbar = sensitivity(z)
    return gbar - expectation(sampled(z, w, T), g)


def dh_positive_dt(z: Tensor, w: Tensor, T: Tensor | float) -> Tensor:
    """d dH+ / dT = Cov_q(g, x) / T^2 (section 3)."""
    return covariance(sampled(z, w, T), sensitivity(z)[0], log_policy(z)) / T**2


def dh_negative(z: Tensor, w: Tensor, T: Tensor | float) -> Tensor:
    """dH-(T) = E_q[g] - gbar: suppressing samples drawn at T; w marks the wrong (section 5)."""
    return -dh_positive(z, w, T)


def dh_objective(z: Tensor, w: Tensor, T: Tensor | float) -> Tensor:
    """-E_{p_T}[w (g - gbar)]: SCOPE's term as written, averaged over all samples (section 6)."""
    g, gbar = sensitivity(z)
    return -expectation(log_policy(z, T).exp(), w * (g - gbar[..., None]))


def dh_objective_dt(z: Tensor, w: Tensor, T: Tensor | float) -> Tensor:
    """Its temperature derivative, Cov_{p_T}(w (g - gbar), x) / T^2 (section 6)."""
    g, gbar = sensitivity(z)
    return covariance(log_policy(z, T).exp(), w * (g - gbar[..., None]), log_policy(z)) / T**2


def crossing_temperature(z: Tensor, w: Tensor, low: float = 1e-3, high: float = 1e6) -> Tensor:
    """Where dH+ crosses zero, by bisection; 0 if never negative, inf if always (section 4)."""
    a = torch.full(z.shape[:-1], low, dtype=z.dtype).log()
    b = torch.full_like(a, high).log()
    cold, hot = dh_positive(z, w, a.exp()) < 0, dh_positive(z, w, b.exp()) >= 0
    for _ in range(100):
        middle = (a + b) / 2
        below = dh_positive(z, w, middle.exp()) < 0
        a, b = torch.where(below, middle, a), torch.where(below, b, middle)
    return torch.where(cold, torch.where(hot, b.exp(), torch.inf), 0.0)
