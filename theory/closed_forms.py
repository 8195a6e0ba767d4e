"""First-order entropy changes of a tabular softmax policy, in closed form; see theory/README.md.

One state, logits z, policy p = softmax(z), x = log p, H = -sum_a p_a x_a. A gradient step of size
eta moves the logits by eta v, and to first order in eta the entropy answers with

    dH = -eta * sum_a g_a v_a,        g = p * (x + H),        gbar = sum_a p_a g_a >= 0.

Changes are in nats per unit of eta; use float64. `z` and `w` are `[..., V]` logits and non-negative
weights (1 for a rewarded token and 0 for another, or graded; not all 0). `T` is a number or `[...]`
above zero; torch.inf gives the limit of ever hotter sampling (section 4). Results are `[...]`.
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
    """-E_{p_T}[w (g - gbar)]: SCOPE's term as written, averaged over all samples (section 6)."""
    g, gbar = sensitivity(z)
    return -expectation(log_policy(z, T).exp(), w * (g - gbar[..., None]))


def dh_objective_dt(z, w, T):
    """Its temperature derivative, Cov_{p_T}(w (g - gbar), x) / T^2 (section 6)."""
    g, gbar = sensitivity(z)
    f = w * (g - gbar[..., None])
    return covariance(log_policy(z, T).exp(), f, log_policy(z)) / T**2


def reward_std(z, w, T):
    """sqrt(P (1 - P)), P = E_{p_T}[w], of rewards of 0 and 1: GRPO divides by it (section 7)."""
    P = expectation(log_policy(z, T).exp(), w)
    return (P * (1 - P)).sqrt()


def dh_normalised(z, w, T):
    """sqrt(P (1 - P)) dH+: the rewarded samples, weighted by GRPO's advantage (section 7)."""
    return reward_std(z, w, T) * dh_positive(z, w, T)


def dh_group(z, w, T):
    """-Cov_{p_T}(w, g) / sqrt(P (1 - P)): GRPO on a whole group drawn at T (section 7)."""
    g, _ = sensitivity(z)
    return -covariance(log_policy(z, T).exp(), w, g) / reward_std(z, w, T)


def crossing_temperature(z, w, low=1e-3, high=1e6):
    """Where dH+ crosses zero, by bisection; 0 if never negative, inf if always (section 4)."""
    a = torch.full(z.shape[:-1], low, dtype=z.dtype).log()
    b = torch.full_like(a, high).log()
    cold = dh_positive(z, w, a.exp()) < 0
    hot = dh_positive(z, w, b.exp()) >= 0
    for _ in range(100):
        middle = (a + b) / 2
        below = dh_positive(z, w, middle.exp()) < 0
        a = torch.where(below, middle, a)
        b = torch.where(below, b, middle)
    return torch.where(cold, torch.where(hot, b.exp(), torch.inf), 0.0)


def entropy_bound(lengths):
    """The lambda with sum_i exp(-lambda L_i) = 1, `[..., N]` lengths -> `[...]` (section 9).

    It is the most entropy a token, in nats, of a policy that gives only right answers.
    """
    bound = torch.zeros(lengths.shape[:-1], dtype=lengths.dtype)
    for _ in range(30):  # Newton's method
        log_q = torch.log_softmax(-bound[..., None] * lengths, dim=-1)
        bound = entropy_of(log_q) / expectation(log_q.exp(), lengths)
    return bound
