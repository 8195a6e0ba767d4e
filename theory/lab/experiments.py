"""Controlled comparisons on the `tiny` preset:  `python theory/experiments.py NAME [--seeds 8] [--jobs 2]`.

Runs `train.py`'s own `set_up` and `train` over a grid of options, one run a core; seed s uses the warm start s mod 2.
What is in theory/results.jsonl is not run again (experiments share runs: a row is known by its options and seed), and
an interrupted run goes on from its checkpoint, so the command can be stopped at any time. It ends with tables in
Markdown and a figure, of means and 95% intervals over the seeds; `--seeds 0` does only that.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers

import report
import reward
import scope_rl
import train

RESULTS = Path(__file__).parent / "results.jsonl"
WORK = Path("outputs") / "experiments"
GRPO, PUBLISHED_T = "--algorithm grpo", "--scope_temperature_min 0.8 --scope_temperature_max 1.2"
WIDE = "--scope_temperature_max 2 --scope_integral_band 1"
PUBLISHED = f"--scope_gain 1 --scope_integral_gain 0 {PUBLISHED_T}"


def share_and_weight(share: float, weight: float) -> str:
    return f"--scope_share {share} --scope_weight {weight}"


def target(H0: float) -> str:
    return f"--scope_target_entropy {H0}"


def constant(T: float) -> str:
    return f"--scope_temperature_min {T} --scope_temperature_max {T}"


# Another task, read from JSONL files, and another architecture, with a warm start of its own (see `llama`).
SUMS = f"--task gsm8k --train_file {WORK}/train.jsonl --test_file {WORK}/test.jsonl --num_train_problems 128"
# An experiment is a table of label -> options. "@NAME" first puts a function of VARIANTS in scope_rl's place.
EXPERIMENTS: dict[str, dict[str, str]] = {
    "control": {
        "GRPO": GRPO,
        **{f"entropy bonus {c}": f"{GRPO} --entropy_coef {c}" for c in (0.01, 0.03, 0.1)},
        "clip-higher 0.28": f"{GRPO} --epsilon_high 0.28",
        "AEPO": f"--algorithm aepo --scope_share 0.117 {PUBLISHED_T}",
        **{f"constant T = {T}": constant(T) for T in (1.0, 1.3)},
        "SCOPE, all published": f"{PUBLISHED} {share_and_weight(0.015625, 0.015625)}",
        **{f"SCOPE, published rule, H0 {H}": f"{PUBLISHED} {target(H)}" for H in (0.3, 0.4, 0.5)},
        **{f"SCOPE, with integral, H0 {H}": target(H) for H in (0.3, 0.4, 0.5)},
    },
    "alpha": {
        "0 (GRPO)": GRPO,
        **{
            f"share and weight 1/{round(1 / a)}": share_and_weight(a, a) for a in (1 / 64, 1 / 16, 1 / 4)
        },
        "share and weight 1": share_and_weight(1, 1),
        **{f"share 1/{round(1 / a)}, weight 1": share_and_weight(a, 1) for a in (1 / 64, 1 / 16)},
        "share 1/4, weight 1": target(0.4),
        **{f"share 1/4, weight 1/{round(1 / a)}": share_and_weight(0.25, a) for a in (1 / 64, 1 / 16)},
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
        "truncated dropped": f"--mask_truncated_completions {target(0.4)}",
        "as it is, H0 0.5": target(0.5),
        "T in [0.8, 1.2], H0 0.5": f"{PUBLISHED_T} {target(0.5)}",
        "T in [0.5, 2], H0 0.5": f"--scope_temperature_max 2 {target(0.5)}",
        "T not clipped, H0 0.5": f"--scope_temperature_min 0.01 --scope_temperature_max 100 {target(0.5)}",
        "mean over positives, T in [0.5, 2], H0 0.5": f"@mean_over_positives --scope_temperature_max 2 {target(0.5)}",
        "T in [0.5, 2], integral everywhere, H0 0.8": f"{target(0.8)} {WIDE}",
        "mean over positives, the same, H0 0.8": f"@mean_over_positives {target(0.8)} {WIDE}",
    },
    "transfer": {
        "GRPO": f"{SUMS} {GRPO}",
        **{f"H0 = {H}": f"{SUMS} {target(H)}" for H in (0.3, 0.6)},
    },
}

# --- variants of scope_rl.advantages_and_weights: what if the auxiliary term were made differently?


def both_signs(rewards: torch.Tensor, auxiliary: torch.Tensor, alpha: float):
    """Wrong auxiliary samples count as well, with advantage -1."""
    advantages, weights = ORIGINAL(rewards, auxiliary, alpha)
    advantages[rewards.numel() :] = 2 * auxiliary - 1
    return advantages, weights


def mean_over_positives(rewards: torch.Tensor, auxiliary: torch.Tensor, alpha: float):
    """The term is divided by the number of positives, not of all auxiliary samples."""
    advantages, weights = ORIGINAL(rewards, auxiliary, alpha)
    weights[rewards.numel() :] = alpha / auxiliary.sum().clamp(min=1)
    return advantages, weights


def group_normalised(rewards: torch.Tensor, auxiliary: torch.Tensor, alpha: float):
    """Positives get the advantage they would have in their prompt's ordinary group, not 1."""
    advantages, weights = ORIGINAL(rewards, auxiliary, alpha)
    groups = rewards[
        torch.arange(len(auxiliary)) % len(rewards)
    ]  # auxiliary samples go round the prompts  [N', G]
    deviation = groups.std(1, unbiased=False) + scope_rl.ADVANTAGE_EPSILON
    advantages[rewards.numel() :] = auxiliary * (1 - groups.mean(1)) / deviation
    return advantages, weights


def equal_groups_dropped(rewards: torch.Tensor, auxiliary: torch.Tensor, alpha: float):
    """Groups whose rewards are all equal do not count in GRPO's mean either (DAPO filters them out)."""
    advantages, weights = ORIGINAL(rewards, auxiliary, alpha)
    kept = (rewards.std(1, unbiased=False) > 0).repeat_interleave(rewards.shape[1])
    weights[: rewards.numel()] = kept / kept.sum().clamp(min=1)
    return advantages, weights


ORIGINAL = scope_rl.advantages_and_weights
VARIANTS: dict[str, Callable] = {
    f.__name__: f
    for f in (ORIGINAL, both_signs, mean_over_positives, group_normalised, equal_groups_dropped)
}


# --- running


def sums_example(rng: random.Random, split: str = "train") -> tuple[reward.Problem, str]:
    """A sum, and a right answer to it: any other sum of the same value, with that value. `12+30=` -> `25+17=42`."""
    while True:
        a, b = rng.randint(1, 49), rng.randint(1, 49)
        x = rng.randint(0, a + b)
        if ((7 * a + b) % 8 == 0) == (split == "test"):
            return reward.Problem(f"{a}+{b}=", str(a + b)), f"{x}+{a + b - x}={a + b}"


def warm_start(options: str, seed: int) -> str:
    """The folder of the model that a run starts from."""
    return llama(seed % 2) if SUMS in options else train.warm_started_model(seed % 2)


def llama(seed: int) -> str:
    """The folder of a small Llama, warm-started on sums as the tiny Qwen3 is on Countdown, made on first use."""
    folder = WORK / f"llama-{seed}"
    if not folder.exists():
        classes = {
            "Qwen3Config": transformers.LlamaConfig,
            "Qwen3ForCausalLM": transformers.LlamaForCausalLM,
        }
        example = mock.patch.object(reward, "countdown_example", sums_example)
        with mock.patch.multiple(transformers, **classes), example:
            train.warm_start(
                folder.with_suffix(".tmp"), steps=1400, seed=seed
            )  # Pass@1 near 0.45, as for Countdown
        folder.with_suffix(".tmp").rename(folder)
    return str(folder)


def write_sums() -> None:
    """The questions of `transfer` as JSONL files, the same every time."""
    WORK.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 512), ("test", 128)):
        rng = random.Random(split)
        problems = [sums_example(rng, split)[0] for _ in range(count)]
        text = "".join(json.dumps(problem._asdict()) + "\n" for problem in problems)
        train.write_whole(WORK / f"{split}.jsonl", lambda path, text=text: path.write_text(text))


def one_run(job: tuple[str, int]) -> dict:
    """Train one cell of the grid, quietly, and return its row of results."""
    options, seed = job
    torch.set_num_threads(1)
    folder = WORK / f"{zlib.crc32(options.encode()):08x}-{seed}"
    variant, arguments = ORIGINAL.__name__, options.split()
    if arguments[0].startswith("@"):
        variant = arguments.pop(0)[1:]
    common = [
        "--preset",
        "tiny",
        "--model",
        warm_start(options, seed),
        "--seed",
        str(seed),
        "--logging_steps",
        "0",
    ]
    arguments = [*common, "--output_dir", str(folder), *arguments]
    if (folder / "config.json").exists():
        arguments.append("--resume")
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        stack.enter_context(mock.patch.object(scope_rl, ORIGINAL.__name__, VARIANTS[variant]))
        run = train.set_up(train.parse_config(arguments))
        train.train(run)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = steps[-len(steps) // 5 :]
    row = {"options": options, "seed": seed, "target": run.config.scope_target_entropy}
    row |= {
        name: float(np.mean([step[name] for step in last]))
        for name in ("reward", "entropy", "scope_temperature")
    }
    row |= {"oscillation": float(np.std([step["entropy"] for step in last]))}
    row |= json.loads((folder / "eval.json").read_text())["after"]
    parts = np.array_split([step["entropy"] for step in steps], 35)
    row["entropies"] = [round(float(part.mean()), 4) for part in parts]
    shutil.rmtree(folder)
    return row


def read_results() -> list[dict]:
    """All rows that are known; `error` is the root mean square of H - H0 over the last fifth, as a share of H0."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for row in rows:
        row["error"] = math.hypot(row["entropy"] - row["target"], row["oscillation"]) / row["target"]
    return rows


def cells(experiment: str) -> dict[str, dict[int, dict]]:
    """Label -> seed -> row, of an experiment's labels that have a row."""
    rows = read_results()
    table = {
        label: {row["seed"]: row for row in rows if row["options"] == options}
        for label, options in EXPERIMENTS[experiment].items()
    }
    return {label: cell for label, cell in table.items() if cell}


def main() -> None:
    """Run what is missing of an experiment, then print the tables and draw the figure of all that is known of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    known = {(row["options"], row["seed"]) for row in read_results()}
    grid = [(options, seed) for seed in range(args.seeds) for options in EXPERIMENTS[args.name].values()]
    jobs = [job for job in grid if job not in known]
    write_sums()
    for options, seed in jobs:
        warm_start(options, seed)  # before the runs, so that no two of them make the same
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for done, row in enumerate(pool.imap_unordered(one_run, jobs), start=1):
            with open(RESULTS, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                "{} of {}: {options}, seed {seed}, entropy {entropy:.3f}".format(done, len(jobs), **row),
                flush=True,
            )
    table = cells(args.name)
    print(report.tables(args.name, table))
    if args.name == "control":
        print(report.offsets(table))
    report.draw(RESULTS.with_name(f"{args.name}.png"), table)


if __name__ == "__main__":
    main()
