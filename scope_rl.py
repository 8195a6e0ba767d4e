"""SCOPE-RL: group-relative policy optimisation whose entropy is held at a target.

GRPO samples G completions of each prompt and reinforces those that beat their group. This lets the
policy's entropy H collapse. SCOPE (arXiv 2510.08141) adds a term of a few more completions. They
are sampled at a temperature T, and only the rewarded ones count:

    J_SCOPE = J_GRPO + alpha * E_{o ~ pi_old^T}[ 1[R = 1] 1/|o| sum_t min(r_t, clip(r_t)) ]

The ratio r_t = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t) is at temperature 1, above and below the
line, and clip keeps it in [1 - epsilon, 1 + epsilon]. It is no weight for drawing at T: rewarded
samples drawn hot are made of rarer tokens, and reinforcing these raises the entropy, or lowers it
less than samples drawn cold (theory/). So T is the knob. `TemperatureRule` turns it: it heats when
H is too low, and cools when H is too high.

Each sample is a row of one table. It says how the sample counts:

                 advantage A_i                   weight w_i    entropy bonus c_i
    ordinary     (R_i - mean) / (std + small)    1 / N         entropy_coef       N of them, at 1
    auxiliary    1[R_i = 1]                      alpha / M     0                  M of them, at T

J is a sum over these rows, so any split into micro-batches adds up to the same J:

    J = sum_i w_i / |o_i| sum_t [ min(r_t A_i, clip(r_t) A_i) + c_i H_t ]
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from entropy import masked_mean

ADVANTAGE_EPSILON = 1e-4  # "small" above
BOOST_RATE = 1.5  # log alpha grows by this for each unit of wanted T above T_max


class Objective(NamedTuple):
    """The table above: three columns `[B]`, a row for each sample."""

    advantages: Tensor  # A_i
    weights: Tensor  # w_i: shares of the whole step, so that J is the sum over all its rows
    entropy_coefs: Tensor  # c_i

    def rows(self, index: Tensor) -> "Objective":
        """The table of some of the samples."""
        A, w, c = self
        return Objective(A[index], w[index], c[index])

    def has_gradient(self) -> Tensor:
        """`[B]` bool: false for samples without a weight, or with neither advantage nor bonus."""
        counts = (self.advantages != 0) | (self.entropy_coefs != 0)
        return counts & (self.weights != 0)


def group_advantages(rewards: Tensor) -> Tensor:
    """GRPO's advantages (arXiv 2402.03300): `[P, G]` -> `[P, G]`, one prompt a row.

    The standard deviation is the population's. Equal rewards give advantages of 0.
    """
    centred = rewards - rewards.mean(1, keepdim=True)  # [P, G]
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)  # [P, 1]
    centred = centred.masked_fill(equal, 0.0)  # a rounded mean would leave a small advantage
    std = rewards.std(1, keepdim=True, unbiased=False)  # [P, 1]
    return centred / (std + ADVANTAGE_EPSILON)  # A


def objective_table(
    rewards: Tensor, auxiliary_rewards: Tensor, scope_alpha: float, entropy_coef: float = 0.0
) -> Objective:
    """The table of a step: rewards `[P, G]` and `[M]` -> columns `[P * G + M]`; M may be 0.

    The auxiliary mean is over all M samples. Those that were not rewarded count as 0.
    """
    N, M = rewards.numel(), len(auxiliary_rewards)

    # Ordinary samples: GRPO's advantages, each sample with an equal share.
    ordinary_A = group_advantages(rewards).flatten()  # [N]
    ordinary_w = torch.full_like(ordinary_A, 1 / N)
    ordinary_c = torch.full_like(ordinary_A, entropy_coef)

    # Auxiliary samples: the indicator 1[R = 1], and alpha shared among them.
    auxiliary_A = (auxiliary_rewards == 1).to(ordinary_A)  # [M]
    auxiliary_w = torch.full_like(auxiliary_A, scope_alpha / max(1, M))
    auxiliary_c = torch.zeros_like(auxiliary_A)

    return Objective(
        torch.cat([ordinary_A, auxiliary_A]),
        torch.cat([ordinary_w, auxiliary_w]),
        torch.cat([ordinary_c, auxiliary_c]),
    )


def scope_loss(
    logprobs: Tensor, old_logprobs: Tensor, entropies: Tensor, mask: Tensor, objective: Objective,
    epsilon: float = 0.2, epsilon_high: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss of some samples (their part of -J), and how many tokens' gradients the clip removed.

    `[B, C]` are log pi, log pi_old, H in nats (it needs a gradient for the bonus), and the mask of
    the completions' tokens. `objective` has the rows of these samples. `epsilon_high` is the upper
    clip of DAPO's clip-higher; it is epsilon by default.
    """
    if epsilon_high is None:
        epsilon_high = epsilon
    low, high = 1 - epsilon, 1 + epsilon_high
    A = objective.advantages[:, None]  # [B, 1]
    c = objective.entropy_coefs[:, None]  # [B, 1]

    # The ratio, its clip, and the lesser of the two.
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()  # r_t  [B, C]
    surrogate = torch.minimum(ratio * A, ratio.clamp(low, high) * A)  # min(r A, clip(r) A)

    # Means over each completion's tokens, and the weighted sum over the samples.
    per_sample = masked_mean(surrogate + c * entropies, mask, dim=1)  # [B]
    J = (objective.weights * per_sample).sum()

    too_high = (A > 0) & (ratio > high)  # [B, C]
    too_low = (A < 0) & (ratio < low)
    return -J, (mask & (too_high | too_low)).sum()


@dataclass
class TemperatureRule:
    """Sets the temperature T of the auxiliary samples by the entropy H, in nats a token.

    The paper's rule has no integral_gain. It is proportional to the distance from the target H0:

        T = clip(1 + gain (H0 - H), T_min, T_max)

    It rests where T balances GRPO's pull, so H stays (T - 1) / gain below H0. With an integral_gain
    T moves by a law that has no such offset, a PI controller in velocity form:

        T <- clip(T + gain (H_before - H) + integral_gain (H0 - H), T_min, T_max)

    The first part answers to the change of H since the last step: it heats while H still falls, and
    brakes before the target is reached. The second part moves T until H is H0. Nothing winds up,
    because the clipped T is all that is kept (theory/README.md, section 8).

    With a max_boost above 1 the wanted T may pass T_max. Samples are then drawn at T_max, and alpha
    is multiplied by exp(BOOST_RATE (wanted - T_max)) instead, by max_boost at most.
    """

    target: float  # H0
    gain: float = 1.0
    integral_gain: float = 0.0
    minimum: float = 0.8  # T_min
    maximum: float = 1.2  # T_max
    max_boost: float = 1.0  # the largest factor of alpha
    wanted: float = 1.0  # T before T_max cuts it off, which is kept
    temperature: float = 1.0  # of the next step; 1 in the first
    boost: float = 1.0  # what alpha is multiplied by in the next step
    last_entropy: float | None = None  # H_before

    def __call__(self, entropy: float) -> float:
        """Take the entropy of a step. Return the temperature of the next, which is kept as well."""
        error = self.target - entropy  # H0 - H
        if self.integral_gain == 0:
            wanted = 1 + self.gain * error
        else:
            fall = 0.0 if self.last_entropy is None else self.last_entropy - entropy
            wanted = self.wanted + self.gain * fall + self.integral_gain * error
        limit = self.maximum + math.log(self.max_boost) / BOOST_RATE
        self.wanted = min(max(wanted, self.minimum), limit)
        self.temperature = min(self.wanted, self.maximum)
        self.boost = math.exp(BOOST_RATE * (self.wanted - self.temperature))
        self.last_entropy = entropy
        return self.temperature

    def state_dict(self) -> dict:
        """What the next step depends on, for a checkpoint."""
        names = "wanted", "temperature", "boost", "last_entropy"
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        """Put back what `state_dict` returned. Raises KeyError if something is missing."""
        for name in self.state_dict():
            setattr(self, name, state[name])
