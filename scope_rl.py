"""SCOPE-RL: group-relative policy optimisation whose entropy is held at a target.

GRPO samples G completions of each prompt and reinforces those that beat their group, which lets the
policy's entropy H collapse. SCOPE (arXiv 2510.08141) adds a term of a few more completions, sampled
at a temperature T, of which only the rewarded count,

    J_SCOPE = J_GRPO + alpha * E_{o ~ pi_old^T}[ 1[R = 1] 1/|o| sum_t min(r_t, clip(r_t)) ]
    T       = clip(1 + H0 - H(pi_old), T_min, T_max)

with r_t = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t), both at temperature 1, clipped to 1 -+ epsilon.
Rewarded samples drawn hot are rarer tokens that turned out right, and reinforcing them raises the
entropy; drawn cold they lower it (theory/). So T is its knob: below H0 the rule heats, above it cools.

Everything here is a pure function. A sample's place in the objective is a row of one table,

                 advantage A_i                   weight w_i    entropy bonus c_i
    ordinary     (R_i - mean) / (std + small)    1 / N         entropy_coef       N of them, at 1
    auxiliary    1[R_i = 1]                      alpha / N'    0                  N' of them, at T

and J is a sum over its rows, so any split into micro-batches adds up to the same J:

    J = sum_i w_i / |o_i| sum_t [ min(r_t A_i, clip(r_t) A_i) + c_i H_t ]
"""

from typing import NamedTuple

import torch
from torch import Tensor

from entropy import masked_mean

ADVANTAGE_EPSILON = 1e-4  # "small" above


class Objective(NamedTuple):
    """The table above: three columns `[B]`, a row a sample."""

    advantages: Tensor  # A_i
    weights: Tensor  # w_i
    entropy_coefs: Tensor  # c_i

    def rows(self, index: Tensor) -> "Objective":
        """The table of some of the samples."""
        return Objective(*(column[index] for column in self))

    def has_gradient(self) -> Tensor:
        """`[B]` bool, false for samples that J does not depend on: no advantage and no bonus."""
        return (self.weights != 0) & ((self.advantages != 0) | (self.entropy_coefs != 0))


def group_advantages(rewards: Tensor) -> Tensor:
    """GRPO's (arXiv 2402.03300), of rewards `[P, G]`, a row a prompt; std is the population's."""
    centred = rewards - rewards.mean(1, keepdim=True)  # [P, G]
    return centred / (rewards.std(1, keepdim=True, unbiased=False) + ADVANTAGE_EPSILON)  # A


def objective_table(rewards: Tensor, auxiliary: Tensor, scope_weight: float, entropy_coef: float = 0.0) -> Objective:
    """The table of a batch, of its rewards `[P, G]` and `[N']`, maybe none; `scope_weight` is alpha."""
    ordinary = group_advantages(rewards).flatten()  # [N]
    N, M = len(ordinary), len(auxiliary)  # M is N', with those that earned nothing
    return Objective(
        torch.cat([ordinary, (auxiliary == 1).to(ordinary.dtype)]),  # A, 1[R = 1]
        ordinary.new_tensor([1 / N] * N + [scope_weight / max(1, M)] * M),  # w
        ordinary.new_tensor([entropy_coef] * N + [0.0] * M),  # c
    )


def scope_loss(
    logprobs: Tensor, old_logprobs: Tensor, entropies: Tensor, mask: Tensor, objective: Objective,
    epsilon: float = 0.2, epsilon_high: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-J of some samples, a summand of the batch's loss; and how many tokens the clip cut off.
    `[B, S]` are log pi, log pi_old, H (nats; differentiable for a bonus) and the completions' bool
    mask; `objective` has these samples' rows. `epsilon_high` is DAPO's clip-higher, else epsilon."""
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()  # r_t  [B, S]
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    A = objective.advantages[:, None]  # [B, 1]
    surrogate = torch.minimum(ratio * A, ratio.clamp(low, high) * A)  # min(r A, clip(r) A)  [B, S]
    bonus = objective.entropy_coefs[:, None] * entropies  # c_i H_t  [B, S]
    J = (objective.weights * masked_mean(surrogate + bonus, mask, dim=1)).sum()
    clipped = mask & (((A > 0) & (ratio > high)) | ((A < 0) & (ratio < low)))  # [B, S]
    return -J, clipped.sum()


def scope_temperature(
    entropy: float, integral: float, *, target: float, minimum: float = 0.8, maximum: float = 1.2,
    gain: float = 1.0, integral_gain: float = 0.0, integral_band: float = 0.1,
) -> tuple[float, float]:  # fmt: skip
    """T, and I for the next step, from the previous step's H, nats a token, and I, 0 at first.

        T = clip(1 + gain (H0 - H) + I, T_min, T_max),     I <- I + integral_gain (H0 - H)

    The paper's rule, gain 1 without I, rests where T balances GRPO's pull, (T - 1) / gain below H0.
    I removes that offset (EntroPIC, arXiv 2511.15248, has such terms too, on the advantages). It is
    frozen while T is clipped or H further than `integral_band` from H0, or it would wind up."""
    error = target - entropy  # H0 - H
    wanted = 1 + gain * error + integral
    temperature = min(max(wanted, minimum), maximum)
    if temperature == wanted and abs(error) <= integral_band:
        integral += integral_gain * error
    return temperature, integral
