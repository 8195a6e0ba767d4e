"""First-order entropy changes of a tabular softmax policy, in closed form. Derived step by step in theory/README.md.

One state, logits z, policy p = softmax(z), x = log p, H = -sum_a p_a x_a. A gradient step of size eta moves the logits;
to first order in eta the entropy answers with

    dH = -eta * sum_a g_a v_a      along v,      g = p * (x + H),      gbar = sum_a p_a g_a >= 0.

Everything is per unit of eta (nats), batched, and in the precision of its input: use float64. Throughout, `z` and `w`
are `[..., V]` logits and non-negative weights (1 for a rewarded token and 0 for another, or graded), `T` is `[...]`,
above zero, and results are `[...]`. A token of weight 0 is never drawn; at least one weight must be above zero.
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
    """q_T(a), proportional to p_T(a) w_a: what a rewarded sample drawn at temperature T looks like (section 2)."""
    return torch.softmax(log_policy(z, T) + w.log(), dim=-1)


def sensitivity(z: Tensor) -> tuple[Tensor, Tensor]:
    """g = p (x + H), minus the entropy's gradient in the logits, `[..., V]`; and gbar = E_p[g], `[...]` (section 1)."""
    x = log_policy(z)
    g = x.exp() * (x + entropy_of(x)[..., None])
    return g, expectation(x.exp(), g)


def dh_positive(z: Tensor, w: Tensor, T: Tensor | float) -> Tensor:
    """dH+(T) = -(E_q[g] - gbar): reinforcing rewarded samples drawn at T (section 2)."""
    g, gbar = sensitivity(z)
    return gbar - expectation(sampled(z, w, T), g)


def dh_positive_dt(z: Tensor, w: Tensor, T: Tensor | float) -> Tensor:
    """d dH+ / dT = Cov_q(g, x) / T^2 (section 3)."""
    return (
        covariance(sampled(z, w, T), sensitivity(z)[0], log_policy(z))
        / torch.as_tensor(T, dtype=z.dtype) ** 2
    )


def dh_negative(z: Tensor, w: Tensor, T: Tensor | float) -> Tensor:
    """dH-(T) = E_q[g] - gbar: suppressing samples drawn at T, w marking the tokens that are *wrong* (section 5)."""
    return -dh_positive(z, w, T)


def dh_objective(z: Tensor, w: Tensor, T: Tensor | float) -> Tensor:
    """-E_{p_T}[w (g - gbar)]: SCOPE's term as written, averaged over all samples, rewarded or not (section 6)."""
    g, gbar = sensitivity(z)
    return -expectation(log_policy(z, T).exp(), w * (g - gbar[..., None]))


def dh_objective_dt(z: Tensor, w: Tensor, T: Tensor | float) -> Tensor:
    """Its temperature derivative, Cov_{p_T}(w (g - gbar), x) / T^2 (section 6)."""
    g, gbar = sensitivity(z)
    f = w * (g - gbar[..., None])
    return covariance(log_policy(z, T).exp(), f, log_policy(z)) / torch.as_tensor(T, dtype=z.dtype) ** 2


def pass_rate(z: Tensor, w: Tensor, T: Tensor | float) -> Tensor:
    """P(T) = P_{p_T}(w = 1), for weights of 0 and 1."""
    return expectation(log_policy(z, T).exp(), w)


def dh_normalised(z: Tensor, w: Tensor, T: Tensor | float) -> Tensor:
    """The objective's positives weighted by GRPO's advantage sqrt((1 - P) / P): sqrt(P (1 - P)) dH+ (section 7)."""
    P = pass_rate(z, w, T)
    return (P * (1 - P)).sqrt() * dh_positive(z, w, T)


def dh_normalised_dt(z: Tensor, w: Tensor, T: Tensor | float) -> Tensor:
    """Its temperature derivative, by the product rule; P' = -P (E_q[x] - E_{p_T}[x]) / T^2 (section 7)."""
    P, p_T, x = pass_rate(z, w, T), log_policy(z, T).exp(), log_policy(z)
    slope = (
        -P
        * (expectation(sampled(z, w, T), x) - expectation(p_T, x))
        / torch.as_tensor(T, dtype=z.dtype) ** 2
    )
    root = (P * (1 - P)).sqrt()
    return (1 - 2 * P) * slope / (2 * root) * dh_positive(z, w, T) + root * dh_positive_dt(z, w, T)


def hot_limit(z: Tensor, w: Tensor) -> Tensor:
    """dH+ as T -> infinity: gbar - sum w g / sum w. Where it is negative, no temperature raises entropy (section 4)."""
    g, gbar = sensitivity(z)
    return gbar - expectation(w / w.sum(-1, keepdim=True), g)


def crossing_temperature(z: Tensor, w: Tensor, low: float = 1e-3, high: float = 1e6) -> Tensor:
    """The temperature where dH+ crosses zero, by bisection; 0 if it is never negative, inf if always (section 4)."""
    a = torch.full(z.shape[:-1], low, dtype=z.dtype).log()
    b = torch.full_like(a, high).log()
    cold, hot = dh_positive(z, w, a.exp()) < 0, dh_positive(z, w, b.exp()) >= 0
    for _ in range(100):
        middle = (a + b) / 2
        below = dh_positive(z, w, middle.exp()) < 0
        a, b = torch.where(below, middle, a), torch.where(below, b, middle)
    return torch.where(cold, torch.where(hot, b.exp(), torch.inf), 0.0)
