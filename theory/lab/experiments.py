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
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import scope_rl
import train

sys.path.append(str(train.TINY))  # for the warm start, a script beside the model

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


GRPO = "--algorithm grpo"
PUBLISHED_T = "--scope_temperature_min 0.8 --scope_temperature_max 1.2"
PUBLISHED = f"--scope_gain 1 --scope_integral_gain 0 {PUBLISHED_T}"
WIDE = "--scope_temperature_max 2 --scope_integral_band 1"
# Another task, read from JSONL files, and another architecture (see `start`).
SUMS = f"--task gsm8k --train_file {WORK}/train.jsonl --test_file {WORK}/test.jsonl --num_train_problems 128"
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
    "transfer": {
        "GRPO": f"{SUMS} {GRPO}",
        **{f"H0 = {H}": f"{SUMS} {target(H)}" for H in (0.3, 0.6)},
    },
}


# --- Variants: what if the auxiliary term, or the rule that sets T, were made differently?
class Variant:
    """Takes the place of two functions of scope_rl while a run lasts; this one changes nothing.

    In each step the rule is asked first and the table after, of the same object, so a rule can
    leave word for the table. What must last longer than a step belongs in `integral`, which the
    rule gets back in the next step, and which checkpoints hold.
    """

    scope_temperature = staticmethod(scope_rl.scope_temperature)

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


TABLE = scope_rl.objective_table
VARIANTS: dict[str, type[Variant]] = {
    "both_signs": BothSigns,
    "mean_over_positives": MeanOverPositives,
    "group_normalised": GroupNormalised,
    "equal_groups_dropped": EqualGroupsDropped,
    "aepo": Aepo,
}


def variant_and_arguments(options: str) -> tuple[Variant, list[str]]:
    """`@NAME --option value` -> a variant of the run's own, and the rest for train.py."""
    arguments = options.split()
    if arguments[0].startswith("@"):
        return VARIANTS[arguments[0][1:]](), arguments[1:]
    return Variant(), arguments


# --- Running
def start(options: str, seed: int) -> Path:
    """The model that a run starts from; for sums it is a Llama, made on first use.

    Its 1,400 steps end near the Pass@1 that the tiny Qwen3 has on Countdown.
    """
    if SUMS not in options:
        return train.TINY / f"start-{seed % 2}"
    folder = WORK / f"llama-{seed % 2}"
    if not folder.exists():
        unfinished, config = folder.with_suffix(".tmp"), warm_start.make_config("llama")
        warm_start.warm_start(unfinished, config, sums.example, steps=1400, seed=seed % 2)
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
    functions = {name: getattr(variant, name) for name in ("objective_table", "scope_temperature")}
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        mock.patch.multiple(scope_rl, **functions),
    ):
        run = train.set_up(train.parse_config(arguments))
        train.train(run)
    row = {"options": options, "seed": seed, "target": run.config.scope_target_entropy}
    row |= summary(folder)
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


def read_rows() -> list[dict]:
    """All rows. `error` is the root mean square of H - H0 over the last fifth, as a share of H0."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    for row in rows:
        H, H0 = row["entropy"], row["target"]
        row["error"] = math.hypot(H - H0, row["oscillation"]) / H0
    return rows


def main() -> None:
    """Run what is missing of an experiment."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = {(row["options"], row["seed"]) for row in read_rows()}
    table = EXPERIMENTS[args.name].values()
    jobs = [(options, seed) for seed in range(args.seeds) for options in table]
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
