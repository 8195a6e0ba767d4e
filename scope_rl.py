"""SCOPE-RL: group-relative policy optimisation whose entropy is held at a target.  (arXiv 2510.08141)

GRPO samples G completions of each prompt and reinforces those that beat their group. Doing so lets the policy's entropy
H collapse. SCOPE adds one term: a few more completions, sampled at temperature T, of which only the rewarded count,

    J_SCOPE = J_GRPO + alpha * E_{o ~ pi_old^T}[ 1[R = 1] * 1/|o| sum_t min(r_t, clip(r_t, 1 - eps, 1 + eps)) ]
    T       = clip(1 + H0 - H(pi_old), T_min, T_max)

with r_t = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t), at temperature 1 on both sides. Rewarded samples drawn hot are
rarer tokens that turned out right, and reinforcing them raises the entropy; drawn cold they lower it (theory/). So T is
a knob for the entropy, and the rule above turns it: below the target it heats, above it cools.

Everything here is a pure function. A sample's place in the objective is two numbers, its advantage and its weight:

                     advantage A_i                       weight w_i
    ordinary         (R_i - mean) / (std + small)        1 / N            N samples at temperature 1
    auxiliary        1[R_i = 1]                          alpha / N'       N' samples at temperature T

and J = sum_i w_i * 1/|o_i| sum_t min(r_t A_i, clip(r_t) A_i), so any split into micro-batches adds up to the same J.
"""

import torch
from torch import Tensor

from entropy import masked_mean

ADVANTAGE_EPSILON = 1e-4  # "small" above


def group_advantages(rewards: Tensor) -> Tensor:
    """(R - group mean) / (group std + small): rewards `[P, G]`, a row a prompt, to advantages `[P, G]`.

    std is the population's (divided by G): with binary rewards and pass rate p, a right answer's advantage is then
    sqrt((1 - p) / p). Equal rewards, and a group of one, have advantage 0.  (GRPO, arXiv 2402.03300)
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True, unbiased=False) + ADVANTAGE_EPSILON)


def advantages_and_weights(rewards: Tensor, auxiliary_rewards: Tensor, scope_weight: float) -> tuple[Tensor, Tensor]:
    """The table in the module's docstring, for the whole batch: ordinary samples first, auxiliary ones after.

    The auxiliary mean is over all N' samples, rewarded or not (dividing by the positives would be another objective).

    Args:
        rewards: `[P, G]` of the ordinary samples.
        auxiliary_rewards: `[N']`; may be empty.
        scope_weight: alpha, the weight of the auxiliary term.

    Returns:
        advantages `[P * G + N']` and weights `[P * G + N']`.
    """
    advantages = group_advantages(rewards).flatten()  # [N]
    positive = (auxiliary_rewards == 1).to(advantages.dtype)  # 1[R = 1]  [N']
    weights = torch.full_like(advantages, 1 / len(advantages))
    auxiliary_weights = torch.full_like(positive, scope_weight / max(1, len(positive)))
    return torch.cat([advantages, positive]), torch.cat([weights, auxiliary_weights])


def scope_loss(
    logprobs: Tensor, old_logprobs: Tensor, entropies: Tensor, mask: Tensor, advantages: Tensor, weights: Tensor,
    bonus_weights: Tensor, epsilon: float = 0.2, epsilon_high: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-J of the given samples: their share of the batch's loss, so that the shares of micro-batches add up.

    Args:
        logprobs, old_logprobs: `[B, T]` under the policy being updated and the one that sampled, both at temperature 1.
        entropies: `[B, T]` nats, differentiable, used by the entropy bonus only.
        mask: `[B, T]` bool, true on the completions' tokens.
        advantages, weights: `[B]`, from `advantages_and_weights`.
        bonus_weights: `[B]`, the coefficient of each sample's mean entropy in J (an entropy bonus; 0 for none).
        epsilon: the ratio is clipped below 1 - epsilon,
        epsilon_high: and above 1 + epsilon_high (DAPO's clip-higher; epsilon if None).

    Returns:
        the loss, a scalar, and the number of tokens whose gradient the clip removed, a scalar.
    """
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()  # r_t  [B, T]
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    A = advantages[:, None]  # [B, 1]
    surrogate = torch.minimum(ratio * A, ratio.clamp(low, high) * A)  # min(r A, clip(r) A)  [B, T]
    objective = weights * masked_mean(surrogate, mask, dim=1)  # w_i / |o_i| sum_t  [B]
    objective = objective + bonus_weights * masked_mean(entropies, mask, dim=1)
    clipped = mask & (((A > 0) & (ratio > high)) | ((A < 0) & (ratio < low)))  # the minimum is the constant  [B, T]
    return -objective.sum(), clipped.sum()


def scope_temperature(
    entropy: float, integral: float, *, target: float, minimum: float = 0.8, maximum: float = 1.2,
    gain: float = 1.0, integral_gain: float = 0.0, integral_band: float = 0.1,
) -> tuple[float, float]:  # fmt: skip
    """T = clip(1 + H0 - H, 0.8, 1.2), the paper's rule, with two options that are ours: a gain and an integral.

        T = clip(1 + gain * (H0 - H) + I, T_min, T_max),     I <- I + integral_gain * (H0 - H)

    The rule alone is a proportional controller: it rests where T balances GRPO's pull on the entropy, an offset of
    (T - 1) / gain below H0. The integral removes the offset. It is frozen while T is clipped and while H is further
    than `integral_band` from H0, or it would wind up on the way there.

    Args:
        entropy: H, mean token entropy of the policy in nats, from the previous step.
        integral: I, from the previous step; 0 at first.
        target: H0, nats.

    Returns:
        T, and I for the next step.
    """
    error = target - entropy  # H0 - H
    wanted = 1 + gain * error + integral
    temperature = min(max(wanted, minimum), maximum)
    if temperature == wanted and abs(error) <= integral_band:
        integral += integral_gain * error
    return temperature, integral


def aepo_temperature(
    entropy: float, *, target: float, minimum: float = 0.8, maximum: float = 1.2
) -> tuple[float, float]:
    """AEPO, SCOPE's predecessor: hot where the entropy is at or below the target, cold and half as many above it.

    Its auxiliary positives have advantage 1 and count like ordinary samples, which is SCOPE's objective with the weight
    equal to the share (theirs: about 60 of a batch of 512).

    Returns:
        T, and the factor on the auxiliary share.
    """
    return (maximum, 1.0) if entropy <= target else (minimum, 0.5)
