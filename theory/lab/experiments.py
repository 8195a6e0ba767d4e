"""Controlled comparisons on the tiny model:  `python theory/lab/experiments.py NAME [--seeds 8]`

Runs `train.py`'s own `set_up` and `train` over a table of options, one run a core (`--jobs`); seed
s starts from the warm start s mod 2. Each run ends as a row of rows.jsonl, known by its options and
its seed: what has a row is not run again, so experiments share runs. An interrupted run goes on
from its checkpoint. `python theory/lab/report.py` makes tables and figures of the rows.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import time
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import scope_rl
import train
from entropy import masked_mean

sys.path.append(str(train.TINY))  # for the warm start, a script beside the model

import countdown
import sums
import warm_start

ROWS = Path(__file__).parent / "rows.jsonl"
WORK = Path("outputs") / "experiments"


# --- The runs
def target(H0: float) -> str:
    """Options for a target in nats a token."""
    return f"--scope_target_entropy {H0}"


def constant(T: float) -> str:
    """Options for a temperature that no rule moves."""
    return f"--scope_temperature_min {T} --scope_temperature_max {T}"


def alpha(share: float, weight: float) -> str:
    """Options for the two meanings of alpha, apart."""
    return f"--scope_alpha {share} --scope_weight {weight}"


def gains(proportional: float, integral: float) -> str:
    """Options for the two gains of a rule."""
    return f"--scope_gain {proportional} --scope_integral_gain {integral}"


GRPO = "--algorithm grpo"
PUBLISHED_T = "--scope_temperature_min 0.8 --scope_temperature_max 1.2"
PUBLISHED = f"--scope_gain 1 --scope_integral_gain 0 {PUBLISHED_T}"
WIDE = "--scope_temperature_max 2 --scope_integral_band 1"
# Another task, read from JSONL files, and another architecture (see `start`).
SUMS = f"--task gsm8k --train_file {WORK}/train.jsonl --test_file {WORK}/test.jsonl --num_train_problems 128"
# Rivals of SCOPE take no auxiliary samples. As train.py asks a rule for those only, there is one, of weight 0.
ALONE = alpha(0.001, 0)
BONUS_PI = f"@bonus_pi {ALONE} --scope_temperature_min 0.8 --scope_temperature_max 1.2"  # c in [-0.2, 0.2]
RIVALS = {
    "PI on the bonus": f"{BONUS_PI} {gains(0.8, 0.02)}",
    "stepwise bonus": f"@stepwise_bonus {ALONE} --scope_gain 0.005",
    "dual ascent": f"@dual_ascent {ALONE} --scope_integral_gain 0.05",
    "EntroPIC": f"@entropic {ALONE} {gains(1, 0.01)}",
    "entropy-flow balance": f"@flow_balance {ALONE} {gains(5, 0.05)}",
    "band filter": f"@band_filter {ALONE} --scope_integral_band 0",
}
WEAK = f"--model {WORK}/weak"  # a third warm start, trained for a shorter time


def controllers(before: str, after: str) -> dict[str, str]:
    """SCOPE with integral and its rivals under the same conditions: label -> options."""
    own = {"SCOPE, with integral": "", **RIVALS}
    return {label: " ".join(f"{before} {options} {after}".split()) for label, options in own.items()}


STEPS = "--max_steps 200 --num_eval_problems 0"
SHORT = f"{target(0.4)} {STEPS}"
# An experiment is a table of label -> options. "@NAME" before them names one of VARIANTS.
EXPERIMENTS: dict[str, dict[str, str]] = {
    "control": {
        "GRPO": GRPO,
        **{f"entropy bonus {c}": f"{GRPO} --entropy_coef {c}" for c in (0.01, 0.03, 0.1)},
        "clip-higher 0.28": f"{GRPO} --epsilon_high 0.28",
        "AEPO": f"@aepo {PUBLISHED_T}",
        **{f"constant T = {T}": constant(T) for T in (1.0, 1.3)},
        "SCOPE, all published": f"{PUBLISHED} {alpha(1 / 64, 1 / 64)}",
        **{f"SCOPE, published rule, H0 {H}": f"{PUBLISHED} {target(H)}" for H in (0.3, 0.4, 0.5)},
        **{f"SCOPE, with integral, H0 {H}": target(H) for H in (0.3, 0.4, 0.5)},
    },
    "alpha": {
        "0 (GRPO)": GRPO,
        **{f"share and weight 1/{n}": alpha(1 / n, 1 / n) for n in (64, 16, 4)},
        "share and weight 1": alpha(1, 1),
        **{f"share 1/{n}, weight 1": alpha(1 / n, 1) for n in (64, 16)},
        "share 1/4, weight 1": target(0.4),
        **{f"share 1/4, weight 1/{n}": alpha(0.25, 1 / n) for n in (64, 16)},
    },
    "target": {
        "GRPO": GRPO,
        **{f"H0 = {H}": target(H) for H in (0.2, 0.3, 0.4, 0.5)},
        **{f"H0 = {H}, wide": f"{target(H)} {WIDE}" for H in (0.6, 0.8)},
        "H0 = 0.8, wide, mean over positives": f"@mean_over_positives {target(0.8)} {WIDE}",
    },
    "beyond": {f"H0 = {H}": target(H) for H in (0.5, 0.6, 0.7, 0.8)},
    "ingredients": {
        "as it is, H0 0.4": target(0.4),
        "both signs": f"@both_signs {target(0.4)}",
        "mean over positives": f"@mean_over_positives {target(0.4)}",
        "group-normalised": f"@group_normalised {target(0.4)}",
        "equal groups dropped": f"@equal_groups_dropped {target(0.4)}",
        "as it is, H0 0.5": target(0.5),
        "T in [0.8, 1.2], H0 0.5": f"{PUBLISHED_T} {target(0.5)}",
        "T in [0.5, 2], H0 0.5": f"--scope_temperature_max 2 {target(0.5)}",
        "T not clipped, H0 0.5": (f"--scope_temperature_min 0.01 --scope_temperature_max 100 {target(0.5)}"),
        "mean over positives, T in [0.5, 2], H0 0.5": (f"@mean_over_positives --scope_temperature_max 2 {target(0.5)}"),
        "T in [0.5, 2], integral everywhere, H0 0.8": f"{target(0.8)} {WIDE}",
        "mean over positives, the same, H0 0.8": f"@mean_over_positives {target(0.8)} {WIDE}",
    },
    # Tuned on tracking alone, in shorter runs without evaluation. Their time is that of 200 steps.
    "tuning": {
        "GRPO": f"{GRPO} {STEPS}",
        "SCOPE, with integral": SHORT,
        **{f"stepwise bonus, {d}": f"@stepwise_bonus {ALONE} --scope_gain {d} {SHORT}" for d in (0.001, 0.005)},
        **{f"dual ascent, {eta}": f"@dual_ascent {ALONE} --scope_integral_gain {eta} {SHORT}" for eta in (0.05, 0.2)},
        **{f"PI on the bonus, {p}, {i}": f"{BONUS_PI} {gains(p, i)} {SHORT}" for p, i in ((0.4, 0.01), (0.8, 0.02))},
        **{f"EntroPIC, {p}, {i}": f"@entropic {ALONE} {gains(p, i)} {SHORT}" for p, i in ((1, 0.01), (5, 0.05))},
        **{
            f"entropy-flow balance, {p}, {i}": f"@flow_balance {ALONE} {gains(p, i)} {SHORT}"
            for p, i in ((1, 0.01), (5, 0.05))
        },
        **{f"band filter, {w}": f"@band_filter {ALONE} --scope_integral_band {w} {SHORT}" for w in (0, 0.04)},
    },
    **{
        f"rivals-{H}": {
            **controllers("", target(H)),
            "SCOPE, published rule": f"{PUBLISHED} {target(H)}",
            "AEPO": f"@aepo {PUBLISHED_T}" + (f" {target(H)}" if H != 0.4 else ""),
            "SCOPE, never cooling": f"--scope_temperature_min 1 {target(H)}",
        }
        for H in (0.3, 0.4, 0.5)
    },
    "moving": controllers("@moving_target", target(0.5)),
    "cooling": {"GRPO": f"{SUMS} {GRPO}", **controllers("", f"{SUMS} {target(0.2)}")},  # below where GRPO ends
    "weak": {"GRPO": f"{WEAK} {GRPO}", **controllers("", f"{WEAK} {target(0.4)}")},
    "dr_grpo": {"GRPO": f"@dr_grpo {GRPO}", **controllers("@dr_grpo", target(0.4))},
    "transfer": {
        "GRPO": f"{SUMS} {GRPO}",
        **{f"H0 = {H}": f"{SUMS} {target(H)}" for H in (0.3, 0.6)},
    },
}


# --- Variants: what if the auxiliary term, or the rule that sets T, were made differently?
class Variant:
    """Takes the place of three functions of scope_rl while a run lasts; this one changes nothing. `run` is the run.

    In each step the rule is asked first and the table after, of the same object, so a rule can
    leave word for the table. What must last longer than a step belongs in `integral`, which the
    rule gets back in the next step, and which checkpoints hold.
    """

    scope_temperature = staticmethod(scope_rl.scope_temperature)
    scope_loss = staticmethod(scope_rl.scope_loss)

    def objective_table(
        self, rewards: Tensor, auxiliary_rewards: Tensor, scope_weight: float, entropy_coef: float
    ) -> scope_rl.Objective:
        table = TABLE(rewards, auxiliary_rewards, scope_weight, entropy_coef)
        self.change(table, rewards, auxiliary_rewards, scope_weight)
        return table

    def change(self, table: scope_rl.Objective, rewards: Tensor, auxiliary: Tensor, alpha: float):
        """Write into the table; rewards `[P, G]`, and `[N']` of the auxiliary samples."""


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
        deviation = groups.std(1, unbiased=False) + scope_rl.ADVANTAGE_EPSILON  # [N']
        table.advantages[rewards.numel() :] = auxiliary * (1 - groups.mean(1)) / deviation


class EqualGroupsDropped(Variant):
    """Groups of equal rewards do not count in GRPO's mean either (DAPO filters them out)."""

    def change(self, table, rewards, auxiliary, alpha):
        kept = (rewards.std(1, unbiased=False) > 0).repeat_interleave(rewards.shape[1])
        table.weights[: rewards.numel()] = kept / kept.sum().clamp(min=1)


class Aepo(Variant):
    """AEPO, SCOPE's predecessor: T is hot at and below the target, and cold above it.

    Of the auxiliary samples the first 60 rewarded ones count in a batch of 2,560, half as many
    above the target; each counts like an ordinary sample.
    """

    def scope_temperature(self, entropy, integral, *, target, minimum, maximum, **rest):
        self.is_hot = entropy <= target
        return maximum if self.is_hot else minimum, integral

    def change(self, table, rewards, auxiliary, alpha):
        N = rewards.numel()
        count = round((60 if self.is_hot else 30) * N / 2560)
        counts = (auxiliary == 1) & (auxiliary.cumsum(0) <= count)
        table.advantages[N:] = counts.to(rewards.dtype)
        table.weights[N:] = 1 / N


# --- Rivals: other rules that follow a target entropy, H0
class BonusPI(Variant):
    """SCOPE's own rule, integral included, on the coefficient of an entropy bonus: c takes the place of T - 1.

    c = clip(K_p e + I, c_min, c_max),   I <- I + K_i e,   e = H0 - H
    """

    def scope_temperature(self, entropy, integral, **limits):
        T, integral = super().scope_temperature(entropy, integral, **limits)
        self.bonus = T - 1
        return 1.0, integral

    def change(self, table, rewards, auxiliary, alpha):
        table.entropy_coefs[: rewards.numel()] = self.bonus


class StepwiseBonus(BonusPI):
    """Skywork-OR1 (arXiv 2505.22312), and TRL's adaptive coefficient: a bonus that moves by fixed steps.

    c <- clip(c + delta sign(H0 - H), 0, 1),   applied only while H <= H0
    """

    def scope_temperature(self, entropy, integral, *, target, gain, **rest):
        is_low = entropy <= target
        c = min(max(integral + (gain if is_low else -gain), 0.0), 1.0)
        self.bonus = c if is_low else 0.0
        return 1.0, c


class DualAscent(BonusPI):
    """SAC's temperature (arXiv 1812.05905), by plain gradient steps: a bonus that grows by a rate.

    log c <- log c + eta (H0 - H),   c = 0.03 at first
    """

    def scope_temperature(self, entropy, integral, *, target, integral_gain, **rest):
        integral += integral_gain * (target - entropy)
        self.bonus = 0.03 * math.exp(integral)
        return 1.0, integral


class EntroPic(Variant):
    """EntroPIC (arXiv 2511.15248), on-policy: positives weigh less and negatives more below the target.

    a = clip(K_p (H - H0) + K_i sum (H - H0), -1, 1),   A <- (1 + a) A if A > 0 else (1 - a) A

    The sign of a is that of the authors' code.
    """

    def scope_temperature(self, entropy, integral, *, target, gain, integral_gain, **rest):
        self.a = min(max(gain * (entropy - target) + integral, -1.0), 1.0)
        return 1.0, integral + integral_gain * (entropy - target)

    def change(self, table, rewards, auxiliary, alpha):
        A = table.advantages[: rewards.numel()]
        A *= 1 + self.a * A.sign()


class FlowBalance(EntroPic):
    """After OPEFO (arXiv 2605.11491), known to us by its abstract: each token weighs by what it does to the entropy.

    weight 1 + a if A (x + H) > 0 else 1 - a,   a as in EntroPIC,   x = log p of the token, H of its context

    To first order a step on the token changes H by -A (g - gbar), g = p (x + H) (theory, section 2); gbar, for
    which all of p is needed, is left out.
    """

    def change(self, table, rewards, auxiliary, alpha):
        """The table is GRPO's."""

    def scope_loss(self, logprobs, old_logprobs, entropies, mask, objective, epsilon, epsilon_high):
        loss, clipped = super().scope_loss(logprobs, old_logprobs, entropies, mask, objective, epsilon, epsilon_high)
        A = objective.advantages[:, None]  # [B, 1]
        ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()  # [B, S]
        surrogate = torch.minimum(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A)
        lowers = (A * (old_logprobs + entropies.detach())).sign()  # 1 or -1
        extra = masked_mean(self.a * lowers * surrogate, mask, dim=1)  # [B]
        return loss - (objective.weights * extra).sum(), clipped


class BandFilter(Variant):
    """Entrocraft (arXiv 2604.26326): outside a band of the entropy only samples of one sign are kept.

    m = 1[H > H0 + width] - 1[H < H0 - width];   kept: m A >= 0;   the mean is over a prompt's kept samples
    """

    def scope_temperature(self, entropy, integral, *, target, integral_band, **rest):
        self.m = (entropy > target + integral_band) - (entropy < target - integral_band)
        return 1.0, integral

    def change(self, table, rewards, auxiliary, alpha):
        N, (prompts, G) = rewards.numel(), rewards.shape
        kept = (self.m * table.advantages[:N] >= 0).view(prompts, G)
        table.weights[:N] = (kept / kept.sum(1, keepdim=True).clamp(min=1) / prompts).flatten()


# --- Other conditions; they go before a rival: "@moving_target @bonus_pi"
class MovingTarget(Variant):
    """The target is 0.2 lower from 3/7 to 5/7 of the run, and then what it was."""

    def scope_temperature(self, entropy, integral, *, target, **rest):
        is_low = 3 <= 7 * self.run.step / self.run.config.max_steps < 5
        return super().scope_temperature(entropy, integral, target=target - 0.2 * is_low, **rest)


class DrGrpo(Variant):
    """Dr. GRPO (arXiv 2503.20783): advantages are not divided by the group's standard deviation."""

    def change(self, table, rewards, auxiliary, alpha):
        table.advantages[: rewards.numel()] = (rewards - rewards.mean(1, keepdim=True)).flatten()
        super().change(table, rewards, auxiliary, alpha)


TABLE = scope_rl.objective_table
VARIANTS: dict[str, type[Variant]] = {
    "both_signs": BothSigns,
    "mean_over_positives": MeanOverPositives,
    "group_normalised": GroupNormalised,
    "equal_groups_dropped": EqualGroupsDropped,
    "aepo": Aepo,
    "bonus_pi": BonusPI,
    "stepwise_bonus": StepwiseBonus,
    "dual_ascent": DualAscent,
    "entropic": EntroPic,
    "flow_balance": FlowBalance,
    "band_filter": BandFilter,
    "moving_target": MovingTarget,
    "dr_grpo": DrGrpo,
}


def variant_and_arguments(options: str) -> tuple[Variant, list[str]]:
    """`@NAME ... --option value` -> a variant of the run's own, and the rest for train.py.

    Of several names the first is asked first, and asks the next by `super()`.
    """
    arguments = options.split()
    names = [argument[1:] for argument in arguments if argument.startswith("@")]
    variant = type("+".join(names), tuple(VARIANTS[name] for name in names) or (Variant,), {})
    return variant(), arguments[len(names) :]


# --- Running
def start(options: str, seed: int) -> Path:
    """The model that a run starts from; for sums it is a Llama, which is made on first use, as the weak one is.

    The Llama's 1,400 steps end near the Pass@1 that the tiny Qwen3 has on Countdown after 3,500.
    """
    if SUMS in options:
        folder, recipe = WORK / f"llama-{seed % 2}", ("llama", sums.example, 1400, seed % 2)
    elif WEAK in options:
        folder, recipe = WORK / "weak", ("qwen3", countdown.example, 1750, 2)
    else:
        return train.TINY / f"start-{seed % 2}"
    if not folder.exists():
        architecture, example, steps, number = recipe
        unfinished, config = folder.with_suffix(".tmp"), warm_start.make_config(architecture)
        warm_start.warm_start(unfinished, config, example, steps=steps, seed=number)
        unfinished.rename(folder)
    return folder


def write_sums() -> None:
    """The questions of `transfer` as JSONL files, the same every time."""
    WORK.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 512), ("test", 128)):
        rng = random.Random(split)
        problems = [sums.example(rng, split)[0] for _ in range(count)]
        lines = [json.dumps(problem._asdict()) + "\n" for problem in problems]
        (WORK / f"{split}.jsonl").write_text("".join(lines))


def one_run(job: tuple[str, int]) -> dict:
    """Train with these options and seed, quietly, and return the row."""
    options, seed = job
    torch.set_num_threads(1)
    folder = WORK / f"{zlib.crc32(options.encode()):08x}-{seed}"
    variant, own = variant_and_arguments(options)
    arguments = ["--preset", "tiny", "--model", str(start(options, seed)), "--seed", str(seed)]
    arguments += ["--output_dir", str(folder), "--logging_steps", "0", *own]
    if (folder / "config.json").exists():
        arguments.append("--resume")
    functions = {name: getattr(variant, name) for name in ("objective_table", "scope_temperature", "scope_loss")}
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        mock.patch.multiple(scope_rl, **functions),
    ):
        run, before = train.set_up(train.parse_config(arguments)), time.process_time()
        variant.run = run
        train.train(run)
    row = {"options": options, "seed": seed, "target": run.config.scope_target_entropy}
    row |= summary(folder) | {"cpu_seconds": round(time.process_time() - before, 1)}
    shutil.rmtree(folder)
    return row


def summary(folder: Path) -> dict:
    """What a row keeps of a run: its last fifth, its evaluation, its entropy's course."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = steps[-len(steps) // 5 :]
    names = ("reward", "entropy", "scope_temperature")
    row = {name: float(np.mean([step[name] for step in last])) for name in names}
    row["oscillation"] = float(np.std([step["entropy"] for step in last]))
    row |= json.loads((folder / "eval.json").read_text())["after"]
    parts = np.array_split([step["entropy"] for step in steps], 35)
    return row | {"entropies": [round(float(part.mean()), 4) for part in parts]}


def settling(entropies: list[float], H0: float) -> int:
    """The steps after which each mean of ten steps, which `entropies` are, lies within a tenth of H0."""
    outside = [i for i, H in enumerate(entropies) if abs(H - H0) > 0.1 * H0]
    return 10 * (outside[-1] + 1) if outside else 0


def read_rows() -> list[dict]:
    """All rows. `error` is the root mean square of H - H0 over the last fifth, as a share of H0."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    for row in rows:
        H, H0 = row["entropy"], row["target"]
        row["error"] = math.hypot(H - H0, row["oscillation"]) / H0
        row["settling"] = settling(row["entropies"], H0)
    return rows


def main() -> None:
    """Run what is missing of an experiment."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=8, help="how many")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="these of its labels; default: all")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = {(row["options"], row["seed"]) for row in read_rows()}
    table, seeds = EXPERIMENTS[args.name], range(args.first_seed, args.first_seed + args.seeds)
    jobs = [(table[label], seed) for seed in seeds for label in args.only or table]
    jobs = [job for job in jobs if job not in known]
    write_sums()
    for options, seed in jobs:
        start(options, seed)  # before the runs, so that no two of them make the same
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for done, row in enumerate(pool.imap_unordered(one_run, jobs), start=1):
            with open(ROWS, "a") as file:
                file.write(json.dumps(row) + "\n")
            what = f"{row['options']}, seed {row['seed']}, entropy {row['entropy']:.3f}"
            print(f"{done} of {len(jobs)}: {what}", flush=True)


if __name__ == "__main__":
    main()
