"""Control of the entropy of a pretrained model:  `python theory/lab/pretrained.py MODEL LABEL [--seed 0]`

Runs train.py's own `set_up` and `train` with the preset `laptop` and a label's options: numbers between
two others (theory/tiny/between.py), by MODEL, which is SmolLM2-135M-Instruct. A run ends as a row of
pretrained.jsonl: the numbers of every step, the evaluations, and answers to one question before and
after. Without MODEL the tables are printed.

Rows with "positional" in their label are of the law that this project had first. Those of "sums" are
of another task (theory/tiny/arithmetic.py), with samplers and rules that the code no longer has.
"""

import argparse
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch

import experiments
import train
import variants
from experiments import GRPO, RIVALS, target
from intervals import as_code, markdown, show, welch

ROWS = Path(__file__).parent / "pretrained.jsonl"
WORK = Path("outputs") / "pretrained"
COMMON = "--preset laptop"
# More samples, smaller gradient steps, longer.
LARGER = "--generation_batch_size 128 --num_mini_batches 4 --learning_rate 5e-6 --max_steps 60"
LABELS = {  # before the colon stands the group of runs that are compared
    "12 prompts: GRPO": GRPO,
    **{f"12 prompts: SCOPE, H0 {H}": target(H) for H in (0.5, 0.8)},
    "12 prompts: stepwise bonus, H0 0.5": f"{RIVALS['stepwise bonus']} {target(0.5)}",
    "32 prompts: GRPO": f"{LARGER} {GRPO}",
    **{f"32 prompts: SCOPE, H0 {H}": f"{LARGER} {target(H)}" for H in (0.6, 0.8)},
}
KEPT = (
    "reward", "entropy", "scope_temperature", "scope_positive_frac", "completion_length", "truncated_frac",
    "grad_norm",
)  # fmt: skip
STEPS = 3  # in a part: the measures of control take means of so many


# --- Running
def one_run(model: str, label: str, seed: int) -> dict:
    """Train with a label's options, and return the row."""
    folder = WORK / f"{zlib.crc32(label.encode()):08x}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    kinds, own = experiments.kinds_and_arguments(LABELS[label])
    own += ["--model", model, "--seed", str(seed), "--output_dir", str(folder)]
    run = train.set_up(train.parse_config([*COMMON.split(), *own]))
    if kinds:
        variants.put_into(run, kinds)
    before = experiments.answers_of(run)
    train.train(run)

    # What is kept.
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    row = {"label": label, "options": LABELS[label], "seed": seed}
    row |= {"target": run.config.scope_target_entropy, "settings": settings(run.config)}
    row |= {name: [round(step[name], 4) for step in steps] for name in KEPT}
    after = experiments.answers_of(run)
    row |= {"question": [before["question"]], "texts": [before["texts"], after["texts"]]}
    return row | {"evaluations": run.evaluations}


def settings(config: train.Config) -> dict:
    """What a config says, except files and the seed: a row keeps it, as presets change."""
    left_out = ("model", "task", "output_dir", "seed")
    return {name: value for name, value in vars(config).items() if name not in left_out}


# --- Tables and the figure
def cells(group: str = "") -> dict[str, list[dict]]:
    """Label -> its rows by seed, for the labels of a group, or of both groups of prompts."""
    found: dict[str, list[dict]] = {}
    for row in map(json.loads, ROWS.read_text().splitlines()):
        if row["label"].startswith(group or ("12 prompts", "32 prompts")):
            found.setdefault(row["label"], []).append(row)
    ordered = sorted(found, key=lambda label: (label.split(":")[0], "GRPO" not in label, label))
    return {label: sorted(found[label], key=lambda row: row["seed"]) for label in ordered}


def measures(row: dict) -> dict[str, float]:
    """Means of a row over its last fifth, of its last evaluation, and the measures of control."""
    last = -(len(row["entropy"]) // 5)
    values = {name: float(np.mean(row[name][last:])) for name in KEPT if name in row}
    parts = np.reshape(row["entropy"][: len(row["entropy"]) // STEPS * STEPS], (-1, STEPS)).mean(1)
    values["error"] = experiments.error(list(parts), row["target"])
    values["lowest"] = experiments.lowest(list(parts), row["target"])
    return values | {"first": row["entropy"][0]} | row["evaluations"]["after"]


def comparison(positional: bool = True) -> str:
    """Means over the seeds, and what entropy and distinct right answers are beyond GRPO's of the group.

    With the rows of the positional law, or without. That difference is unpaired, since runs of one
    seed have nothing in common here that lasts.
    """
    values = {label: [measures(row) for row in rows] for label, rows in cells().items()}
    names = ("entropy", "error", "lowest", "scope_temperature", "reward", "pass@1", "distinct_correct")
    lines = []
    for label, runs in values.items():
        if "positional" in label and not positional:
            continue
        base = values[f"{label.split(':')[0]}: GRPO"]
        line = [label, len(runs), *(show([run[name] for run in runs]) for name in names)]
        if "GRPO" in label:
            line[3:5] = ["", ""]
        for name in ("entropy", "distinct_correct"):
            both = ([run[name] for run in those] for those in (runs, base))
            line.append("" if runs is base or len(runs) == 1 else welch(*both))
        lines.append(line)
    header = ["run", "seeds", "H", "error", "lowest, of H0", "T", "reward", "Pass@1", "distinct right"]
    return markdown([*header, "H minus GRPO's", "distinct right minus GRPO's"], lines)


def answers() -> str:
    """What seed 0 of each run answers to the first test question before and after."""
    first = {label: rows[0] for label, rows in cells().items() if rows[0]["seed"] == 0}
    shown = [("before", row["texts"][0]) for row in [*first.values()][:1]]
    shown += [(label, row["texts"][-1]) for label, row in first.items()]
    question = next((row["question"][0] for row in first.values()), "")  # the same in all
    return markdown(["run", f"answers to: {question}"], [[label, as_code(texts)] for label, texts in shown])


def sums_table() -> str:
    """A line a row of the sums: the entropy first, lowest and at the end; means of the last eight steps."""
    lines = []
    names = ("entropy", "scope_temperature", "reward", "other", "aux_right", "aux_other")
    for label, rows in cells("sums").items():
        for row in rows:
            H, means = (
                row["entropy"],
                [f"{np.mean(row[name][-8:]):.2f}" if name in row else "" for name in names],
            )
            lines.append([label, row["seed"], len(H), f"{H[0]:.2f}", f"{min(H):.2f}", *means])
    header = ["run", "seed", "steps", "H, first", "lowest", "last 8", "T", "reward", "other"]
    return markdown([*header, "hot, right", "hot, other"], lines)


def draw(path: Path) -> None:
    """A panel a label, except single runs of the first law: entropy, a line a seed, target, reward."""
    import matplotlib.pyplot as plt  # the extra `plot`

    shown = {label: rows for label, rows in cells().items() if len(rows) > 1 or "positional" not in label}
    size = {"figsize": (17, 3.2 * -(-len(shown) // 5)), "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(-(-len(shown) // 5), 5, **size, layout="constrained")
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, (label, rows) in zip(axes.flat, shown.items(), strict=False):
        for row in rows:
            axis.plot(row["reward"], color="silver", lw=0.8, label=None if row["seed"] else "reward")
            axis.plot(row["entropy"], color=f"C{row['seed']}", lw=1.2, label=f"entropy, seed {row['seed']}")
        if "H0" in label:
            axis.axhline(rows[0]["target"], color="black", lw=1.2, ls=":", zorder=3)
        axis.set_title(label, fontsize=9)
        axis.set(xlabel="step", ylim=(0, 3))
    axes[0, 0].set(ylabel="nats a token; reward")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    """One run, or the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help="folder of the pretrained model; without it: tables")
    parser.add_argument("label", nargs="?", choices=LABELS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.model is None:
        return print(comparison(), answers(), sums_table(), sep="\n", end="")
    if args.label is None:
        parser.error("needs a label")
    if args.seed in [row["seed"] for row in cells().get(args.label, [])]:
        parser.error("there is a row of this label and seed")
    row = one_run(args.model, args.label, args.seed)
    with open(ROWS, "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
