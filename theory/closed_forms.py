"""Entropy of a softmax policy after a gradient step, in closed form: see theory/README.md.

With p = softmax(z), x = log p and H = -sum_a p_a x_a, a step eta v of the logits gives

    dH = -eta * sum_a g_a v_a,        g = p * (x + H),        gbar = sum_a p_a g_a >= 0

to first order. Results are `[...]`, in nats per unit of eta. z and w are `[..., V]`: float64
logits, and weights (1 if rewarded, 0 if not, or graded). T > 0 is a number, inf or `[...]`.
"""

import torch

from entropy import entropy_of, log_policy


def expectation(q, f):
    """E_q[f], `[..., V]` -> `[...]`."""
    return (q * f).sum(-1)


def covariance(q, f, h):
    """Cov_q(f, h), `[..., V]` -> `[...]`."""
    f = f - expectation(q, f)[..., None]
    h = h - expectation(q, h)[..., None]
    return expectation(q, f * h)


def sampled(z, w, T):
    """q_T(a), proportional to p_T(a) w_a: a rewarded sample drawn at T, `[..., V]` (section 2)."""
    return torch.softmax(log_policy(z, T) + w.log(), dim=-1)


def sensitivity(z):
    """g = p (x + H) = -dH/dz, `[..., V]`, and gbar = E_p[g], `[...]` (section 1)."""
    x = log_policy(z)
    p = x.exp()
    g = p * (x + entropy_of(x)[..., None])
    return g, expectation(p, g)


def dh_positive(z, w, T):
    """dH+(T) = -(E_q[g] - gbar): reinforcing rewarded samples drawn at T (section 2)."""
    g, gbar = sensitivity(z)
    return gbar - expectation(sampled(z, w, T), g)


def dh_positive_dt(z, w, T):
    """d dH+ / dT = Cov_q(g, x) / T^2 (section 3)."""
    g, _ = sensitivity(z)
    return covariance(sampled(z, w, T), g, log_policy(z)) / T**2


def dh_negative(z, w, T):
    """dH-(T) = E_q[g] - gbar: suppressing samples drawn at T; w marks the wrong (section 5)."""
    return -dh_positive(z, w, T)


def dh_objective(z, w, T):
    """dH(T) = -E_{p_T}[w (g - gbar)]: all samples drawn at T, each weighted by w (section 6)."""
    g, gbar = sensitivity(z)
    return -expectation(log_policy(z, T).exp(), w * (g - gbar[..., None]))


def dh_objective_dt(z, w, T):
    """d dH / dT = Cov_{p_T}(w (g - gbar), x) / T^2 for a w without T in it (section 6)."""
    g, gbar = sensitivity(z)
    f = w * (g - gbar[..., None])
    return covariance(log_policy(z, T).exp(), f, log_policy(z)) / T**2


def crossing_temperature(z, w):
    """Where dH+ crosses zero, by bisection; 0 if never negative, inf if always (section 4)."""
    low = torch.full(z.shape[:-1], 1e-3, dtype=z.dtype)
    high = torch.full_like(low, 1e6)
    for _ in range(100):
        middle = (low * high).sqrt()
        negative = dh_positive(z, w, middle) < 0
        low = torch.where(negative, middle, low)
        high = torch.where(negative, high, middle)
    high = torch.where(high == 1e6, torch.inf, high)
    return torch.where(low == 1e-3, 0.0, high)
