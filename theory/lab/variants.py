"""What if the auxiliary term, or the rule that sets T, were made differently?

A variant is one object with four methods that a run holds, and that may be replaced there:

    __call__(H)         the rule: called with H at the end of each step, it sets T for the next one
    generate            what is sampled
    objective_table     how each completion counts; most variants only `change` the core's table
    scope_loss          what each token counts

`put_into(run, kinds)` puts it there. Of several kinds, as in "@moving_target @bonus_pi", the first is
asked first, and it asks the next by `super()`. What a variant remembers from step to step are plain
attributes, and checkpoints hold all that are numbers.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

import rollout
import scope_rl
import train


class Table(NamedTuple):
    """The core's table of a step, and which sample each row is."""

    advantages: Tensor
    weights: Tensor
    entropy_coefs: Tensor
    number: Tensor  # [B] 0 to N - 1 are ordinary samples, the others auxiliary

    has_gradient = scope_rl.Objective.has_gradient

    def rows(self, index: Tensor) -> "Table":
        """The table of some of the samples."""
        return Table(*(column[index] for column in self))


class Variant(scope_rl.TemperatureRule):
    """A rule, a sampler, a table and a loss; these are the core's."""

    def __init__(self, run: train.Run) -> None:
        config = run.config
        gains = config.scope_gain, config.scope_integral_gain
        limits = config.scope_temperature_min, config.scope_temperature_max, config.scope_max_boost
        super().__init__(config.scope_target_entropy, *gains, *limits)
        self.run = run

    def __call__(self, entropy: float) -> float:
        """T by the law, or 1 where there are no auxiliary samples."""
        return self.law(entropy) if self.run.config.num_auxiliary > 0 else 1.0

    def law(self, entropy: float) -> float:
        """The core's rule."""
        return super().__call__(entropy)

    def state_dict(self) -> dict:
        """All of its attributes that are numbers or None, for a checkpoint."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int | float | None)}

    def load_state_dict(self, state: dict) -> None:
        """Put back what `state_dict` returned."""
        vars(self).update(state)

    def generate(self, model, tokenizer, prompts, temperatures, length) -> rollout.Rollout:
        """The core's sampler."""
        return rollout.generate(model, tokenizer, prompts, temperatures, length)

    def objective_table(
        self, rewards: Tensor, auxiliary_rewards: Tensor, scope_alpha: float, entropy_coef: float
    ) -> Table:
        """The core's table with this variant's changes."""
        columns = scope_rl.objective_table(rewards, auxiliary_rewards, scope_alpha, entropy_coef)
        table = Table(*columns, torch.arange(len(columns.weights), device=rewards.device))
        self.change(table, rewards, auxiliary_rewards, scope_alpha)
        return table

    def change(self, table: Table, rewards: Tensor, auxiliary: Tensor, alpha: float) -> None:
        """Write into the table; rewards `[P, G]`, and `[M]` of the auxiliary samples."""

    def scope_loss(self, logprobs, old_logprobs, entropies, mask, objective, epsilon, epsilon_high):
        """The core's loss."""
        return scope_rl.scope_loss(logprobs, old_logprobs, entropies, mask, objective, epsilon, epsilon_high)


class TokenWise(Variant):
    """A variant in which the tokens of a completion can have advantages of their own."""

    def token_advantages(self, logprobs: Tensor, entropies: Tensor, mask: Tensor, table: Table) -> Tensor:
        """`[b, C]`, of log pi_old, H and the mask `[b, C]`, and the table's rows.

        Here all tokens of a completion have the same.
        """
        return table.advantages[:, None].expand(mask.shape)

    def is_ordinary(self, table: Table) -> Tensor:
        """`[b, 1]` bool, false for auxiliary samples."""
        return (table.number < self.run.config.generation_batch_size)[:, None]

    def scope_loss(self, logprobs, old_logprobs, entropies, mask, objective, epsilon, epsilon_high):
        """The core's loss, which is given each token as a sample of its own, of weight w_i / |o_i|."""
        A = self.token_advantages(old_logprobs, entropies.detach(), mask, objective)  # [b, C]
        w = (objective.weights / mask.sum(1))[:, None].expand(mask.shape)
        c = objective.entropy_coefs[:, None].expand(mask.shape)
        tokens = scope_rl.Objective(A[mask], w[mask], c[mask])
        columns = [values[mask][:, None] for values in (logprobs, old_logprobs, entropies, mask)]  # [n, 1]
        return scope_rl.scope_loss(*columns, tokens, epsilon, epsilon_high)


# --- Ingredients of the auxiliary term
class BothSigns(Variant):
    """Wrong auxiliary samples count as well, with advantage -1."""

    def change(self, table, rewards, auxiliary, alpha):
        table.advantages[rewards.numel() :] = 2 * auxiliary - 1


class MeanOverPositives(Variant):
    """The term is divided by the number of rewarded samples, not of all auxiliary ones."""

    def change(self, table, rewards, auxiliary, alpha):
        table.weights[rewards.numel() :] = alpha / auxiliary.sum().clamp(min=1)


class GroupNormalised(Variant):
    """Positives get the advantage they would have in their prompt's ordinary group, not 1."""

    def change(self, table, rewards, auxiliary, alpha):
        groups = rewards[torch.arange(len(auxiliary)) % len(rewards)]  # they go round the prompts
        deviation = groups.std(1, unbiased=False) + scope_rl.ADVANTAGE_EPSILON  # [M]
        table.advantages[rewards.numel() :] = auxiliary * (1 - groups.mean(1)) / deviation


class EqualGroupsDropped(Variant):
    """Groups of equal rewards do not count in GRPO's mean either (DAPO filters them out)."""

    def change(self, table, rewards, auxiliary, alpha):
        kept = (rewards.std(1, unbiased=False) > 0).repeat_interleave(rewards.shape[1])
        table.weights[: rewards.numel()] = kept / kept.sum().clamp(min=1)


# --- Other laws for T
class Positional(Variant):
    """The PI law in its usual form, with an integral I that must be frozen or it winds up.

    T = clip(1 + gain e + I, T_min, T_max),   e = H0 - H
    I <- I + integral_gain e,   unless T is clipped or H is further than `band` from H0
    """

    integral = 0.0
    band = 0.1

    def law(self, entropy):
        error = self.target - entropy
        wanted = 1 + self.gain * error + self.integral
        self.temperature = min(max(wanted, self.minimum), self.maximum)
        if self.temperature == wanted and abs(error) <= self.band:
            self.integral += self.integral_gain * error
        return self.temperature


class PositionalEverywhere(Positional):
    """The same with an integral that runs wherever H is."""

    band = 1.0


class Aepo(Variant):
    """AEPO, SCOPE's predecessor: T is hot at and below the target, and cold above it.

    Of the auxiliary samples the first 60 rewarded ones count in a batch of 2,560, half as many
    above the target; each counts like an ordinary sample.
    """

    is_hot = True

    def __call__(self, entropy):
        self.is_hot = entropy <= self.target
        self.temperature = self.maximum if self.is_hot else self.minimum
        return self.temperature

    def change(self, table, rewards, auxiliary, alpha):
        N = rewards.numel()
        count = round((60 if self.is_hot else 30) * N / 2560)
        counts = (auxiliary == 1) & (auxiliary.cumsum(0) <= count)
        table.advantages[N:] = counts.to(rewards.dtype)
        table.weights[N:] = 1 / N


# --- Rivals: other rules that follow a target entropy H0. They draw no auxiliary samples, and T stays 1.
class BonusPI(Variant):
    """SCOPE's own law on the coefficient c of an entropy bonus, which takes the place of T - 1.

    c <- clip(c + gain (H_before - H) + integral_gain (H0 - H), c_min, c_max)
    """

    c = 0.0

    def __call__(self, entropy):
        self.c = self.law(entropy) - 1
        self.temperature = 1.0
        return self.temperature

    def change(self, table, rewards, auxiliary, alpha):
        super().change(table, rewards, auxiliary, alpha)
        table.entropy_coefs[: rewards.numel()] = self.c


class StepwiseBonus(BonusPI):
    """Skywork-OR1 (arXiv 2505.22312), and TRL's adaptive coefficient: a bonus that moves by fixed steps.

    k <- clip(k + gain sign(H0 - H), 0, 1),   c = k while H <= H0, else 0
    """

    k = 0.0

    def __call__(self, entropy):
        is_low = entropy <= self.target
        self.k += self.gain if is_low else -self.gain
        self.k = min(max(self.k, 0.0), 1.0)
        self.c = self.k if is_low else 0.0
        return self.temperature


class DualAscent(BonusPI):
    """SAC's temperature (arXiv 1812.05905), by plain gradient steps: a bonus that grows by a rate.

    log c <- log c + integral_gain (H0 - H),   c = 0.03 at first
    """

    c = 0.03

    def __call__(self, entropy):
        self.c *= math.exp(self.integral_gain * (self.target - entropy))
        return self.temperature


class EntroPic(Variant):
    """EntroPIC (arXiv 2511.15248), on-policy: positives weigh less and negatives more below the target.

    a = clip(gain e + integral_gain sum of earlier e, -1, 1),   e = H - H0
    A <- (1 + a) A if A > 0 else (1 - a) A

    The sign of a is that of the authors' code.
    """

    a = 0.0
    sum_of_errors = 0.0

    def __call__(self, entropy):
        error = entropy - self.target
        wanted = self.gain * error + self.integral_gain * self.sum_of_errors
        self.a = min(max(wanted, -1.0), 1.0)
        self.sum_of_errors += error
        return self.temperature

    def change(self, table, rewards, auxiliary, alpha):
        super().change(table, rewards, auxiliary, alpha)
        A = table.advantages[: rewards.numel()]
        A *= 1 + self.a * A.sign()


class FlowBalance(EntroPic, TokenWise):
    """OPEFO's split of the tokens (neighbours.py) under EntroPIC's law, so that there is a target.

    A token weighs 1 + a if its update lowers the entropy, A (x + H) > 0, and else 1 - a. Here a is
    EntroPIC's, x is log p of the token, and H is the entropy of its distribution.

    To first order the update changes H by -A (g - gbar), g = p (x + H) (theory, section 2). gbar, for
    which all of p is needed, is left out.
    """

    def change(self, table, rewards, auxiliary, alpha):
        """EntroPIC's change of the table is left out, but not that of other variants."""
        super(EntroPic, self).change(table, rewards, auxiliary, alpha)

    def balance(self, flow: Tensor) -> Tensor | float:
        """a; `flow` is -A g of each token of the ordinary samples, which raises H where it is positive."""
        return self.a

    def token_advantages(self, logprobs, entropies, mask, table):
        A = super().token_advantages(logprobs, entropies, mask, table)  # [b, C]
        flow = -A * logprobs.exp() * (logprobs + entropies)
        balanced = mask & self.is_ordinary(table)
        a = self.balance(flow[balanced])
        return torch.where(balanced, A * (1 - a * flow.sign()), A)


class BandFilter(Variant):
    """Entrocraft (arXiv 2604.26326): outside a band of the entropy only samples of one sign are kept.

    m = 1[H > H0 + width] - 1[H < H0 - width],   kept: m A >= 0
    The mean is over a prompt's kept samples.
    """

    m = 0
    width = 0.0

    def __call__(self, entropy):
        self.m = (entropy > self.target + self.width) - (entropy < self.target - self.width)
        return self.temperature

    def change(self, table, rewards, auxiliary, alpha):
        super().change(table, rewards, auxiliary, alpha)
        N, (prompts, G) = rewards.numel(), rewards.shape
        kept = (self.m * table.advantages[:N] >= 0).view(prompts, G)
        table.weights[:N] = (kept / kept.sum(1, keepdim=True).clamp(min=1) / prompts).flatten()


class WideBandFilter(BandFilter):
    """The same with a band that ends 0.04 nats from the target."""

    width = 0.04


# --- Other conditions; they go before a rival: "@moving_target @bonus_pi"
class MovingTarget(Variant):
    """The target is 0.2 lower from 3/7 to 5/7 of the run, and then what it was."""

    def __call__(self, entropy):
        usual, next_step = self.target, self.run.step + 1  # T is that of the next step
        if 3 <= 7 * next_step / self.run.config.max_steps < 5:
            self.target = usual - 0.2
        T = super().__call__(entropy)
        self.target = usual
        return T


class DrGrpo(Variant):
    """Dr. GRPO (arXiv 2503.20783): advantages are not divided by the group's standard deviation."""

    def change(self, table, rewards, auxiliary, alpha):
        table.advantages[: rewards.numel()] = (rewards - rewards.mean(1, keepdim=True)).flatten()
        super().change(table, rewards, auxiliary, alpha)


VARIANTS: dict[str, type[Variant]] = {
    "both_signs": BothSigns,
    "mean_over_positives": MeanOverPositives,
    "group_normalised": GroupNormalised,
    "equal_groups_dropped": EqualGroupsDropped,
    "positional": Positional,
    "positional_everywhere": PositionalEverywhere,
    "aepo": Aepo,
    "bonus_pi": BonusPI,
    "stepwise_bonus": StepwiseBonus,
    "dual_ascent": DualAscent,
    "entropic": EntroPic,
    "flow_balance": FlowBalance,
    "band_filter": BandFilter,
    "wide_band_filter": WideBandFilter,
    "moving_target": MovingTarget,
    "dr_grpo": DrGrpo,
}


def put_into(run: train.Run, kinds: list[type[Variant]]) -> None:
    """Replace rule, sampler, table and loss of a run that was set up by those of a variant of these kinds.

    A resumed run's variant goes on with what its checkpoint holds.
    """
    name = "+".join(kind.__name__ for kind in kinds)
    variant = type(name, tuple(kinds) or (Variant,), {})(run)
    if run.step > 0:
        checkpoint = torch.load(run.output / "checkpoint.pt", map_location="cpu", weights_only=True)
        variant.load_state_dict(checkpoint["rule"])
    run.rule, run.generate = variant, variant.generate
    run.objective_table, run.scope_loss = variant.objective_table, variant.scope_loss
