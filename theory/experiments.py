"""Controlled comparisons on the `tiny` preset:  `python theory/experiments.py NAME [--seeds 8] [--jobs 2]`.

Runs `train.py`'s own `set_up` and `train` over a grid of options, one run a core; seed s uses the warm start s mod 2.
What is in theory/results.jsonl is not run again, and an interrupted run goes on from its checkpoint, so the command can
be stopped at any time. It ends with a table and a figure: means and 95% intervals over the seeds (`--seeds 0`: just
these).
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import torch

import train

RESULTS = Path(__file__).parent / "results.jsonl"
PUBLISHED = "--scope_gain 1 --scope_integral_gain 0 --scope_temperature_min 0.8 --scope_temperature_max 1.2"
EXPERIMENTS: dict[str, dict[str, str]] = {
    "control": {
        "GRPO": "--algorithm grpo",
        **{f"entropy bonus {c}": f"--algorithm grpo --entropy_coef {c}" for c in (0.01, 0.03, 0.1)},
        "clip-higher 0.28": "--algorithm grpo --epsilon_high 0.28",
        "AEPO": "--algorithm aepo --scope_share 0.117 --scope_temperature_min 0.8 --scope_temperature_max 1.2",
        **{f"constant T = {T}": f"--scope_temperature_min {T} --scope_temperature_max {T}" for T in (1.0, 1.3)},
        "SCOPE, all published": f"{PUBLISHED} --scope_share 0.015625 --scope_weight 0.015625",
        **{f"SCOPE, published rule, H0 {H}": f"{PUBLISHED} --scope_target_entropy {H}" for H in (0.3, 0.4, 0.5)},
        **{f"SCOPE, with integral, H0 {H}": f"--scope_target_entropy {H}" for H in (0.3, 0.4, 0.5)},
    },
}
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36}  # Student's t by degrees of freedom


def one_run(job: tuple[str, str, str, int]) -> dict:
    """Train one cell of the grid, quietly, and return its row of results."""
    experiment, label, options, seed = job
    torch.set_num_threads(1)
    folder = Path("outputs") / "experiments" / experiment / f"{label.replace(' ', '_')}-{seed}"
    model = train.warm_started_model(seed % 2)
    arguments = f"--preset tiny --model {model} --seed {seed} --logging_steps 0 --output_dir {folder} {options}".split()
    if (folder / "config.json").exists():
        arguments.append("--resume")
    with open("/dev/null", "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        run = train.set_up(train.parse_config(arguments))
        train.train(run)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = steps[-len(steps) // 5 :]
    entropy = np.array([step["entropy"] for step in last])
    row = {"experiment": experiment, "label": label, "seed": seed, "target": run.config.scope_target_entropy}
    row |= {name: float(np.mean([step[name] for step in last])) for name in ("reward", "entropy", "scope_temperature")}
    row |= {"oscillation": float(entropy.std()), **json.loads((folder / "eval.json").read_text())["after"]}
    row["entropies"] = [
        round(float(np.mean([s["entropy"] for s in steps[i : i + 10]])), 4) for i in range(0, len(steps), 10)
    ]
    shutil.rmtree(folder)
    return row


def read_results(experiment: str) -> list[dict]:
    """The rows of an experiment that are already known."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [row for row in map(json.loads, lines) if row["experiment"] == experiment]


def summarise(rows: list[dict]) -> None:
    """Print mean and half of the 95% interval over the seeds of each label."""
    columns = (
        "reward",
        "entropy",
        "error",
        "oscillation",
        "scope_temperature",
        "pass@1",
        "pass@64",
        "distinct_correct",
    )
    print(f"{'':<32}" + "".join(f"{name:>18}" for name in ("seeds", *columns)))
    for label in dict.fromkeys(row["label"] for row in rows):
        cell = [row | {"error": abs(row["entropy"] - row["target"])} for row in rows if row["label"] == label]
        intervals = [interval([row[name] for row in cell]) for name in columns]
        print(f"{label:<32}{len(cell):>18}" + "".join(f"{mean:>9.3f} ± {half:<6.3f}" for mean, half in intervals))


def draw(experiment: str, rows: list[dict]) -> None:
    """theory/EXPERIMENT.png: entropy over the steps, and Pass@1 against distinct right answers, with 95% intervals."""
    import matplotlib.pyplot as plt  # the extra `plot`

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for i, label in enumerate(dict.fromkeys(row["label"] for row in rows)):
        cell = [row for row in rows if row["label"] == label]
        style = {"color": plt.cm.tab20(i % 20), "linestyle": "--" if label.startswith("SCOPE") else "-"}
        curves = np.array([row["entropies"] for row in cell])  # [seeds, steps / 10]
        axes[0].plot(10 * np.arange(curves.shape[1]) + 5, curves.mean(0), label=label, **style)
        (x, dx), (y, dy) = (interval([row[name] for row in cell]) for name in ("distinct_correct", "pass@1"))
        axes[1].errorbar(x, y, dy, dx, fmt="o", color=style["color"], lw=1)
    axes[0].set(xlabel="step", ylabel="entropy, nats a token")
    axes[1].set(xlabel="distinct right answers of 64 samples", ylabel="Pass@1")
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(RESULTS.with_name(f"{experiment}.png"), dpi=100)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95% interval (Student's t; NaN for one value)."""
    n = len(values)
    half = T_95.get(n - 1, 2.0) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), float(half)


def main() -> None:
    """Run what is missing of an experiment, then summarise and draw all that is known of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    known = {(row["label"], row["seed"]) for row in read_results(args.name)}
    grid = [
        (args.name, label, options, seed)
        for seed in range(args.seeds)
        for label, options in EXPERIMENTS[args.name].items()
    ]
    jobs = [job for job in grid if (job[1], job[3]) not in known]
    for seed in (0, 1)[: args.seeds]:
        train.warm_started_model(seed)
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for done, row in enumerate(pool.imap_unordered(one_run, jobs), start=1):
            with open(RESULTS, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{done} of {len(jobs)}: {row['label']}, seed {row['seed']}, entropy {row['entropy']:.3f}", flush=True
            )
    summarise(read_results(args.name))
    draw(args.name, read_results(args.name))


if __name__ == "__main__":
    main()
