"""Controlled comparisons on the tiny model:  `python theory/lab/experiments.py NAME [--seeds 8]`

Runs `train.py`'s own `set_up` and `train` over a table of options, one run a core (`--jobs`); seed
s starts from the warm start s mod 2. Each run ends as a row of rows.jsonl, known by its options and
its seed: what has a row is not run again, so experiments share runs. Of two rows the later counts.
An interrupted run goes on from its checkpoint. `python theory/lab/report.py` makes tables and
figures of the rows.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import neighbours
import rollout
import train
import variants

sys.path.append(str(train.THEORY / "tiny"))  # for the warm start, and the tasks beside it

import countdown
import sums
import warm_start

ROWS = Path(__file__).parent / "rows.jsonl"
WORK = Path("outputs") / "experiments"
VARIANTS = variants.VARIANTS | neighbours.NEIGHBOURS
PARTS = 35  # of a run; a row keeps the mean entropy of each. Ten steps of 350.


# --- Options
def target(H0: float) -> str:
    """Options for a target in nats a token."""
    return f"--scope_target_entropy {H0}"


def constant(T: float) -> str:
    """Options for a temperature that no rule moves."""
    return f"--scope_temperature_min {T} --scope_temperature_max {T}"


def term(share: float, alpha: float) -> str:
    """Options for the auxiliary samples: how many there are for each ordinary one, and their weight."""
    return f"--scope_share {share} --scope_alpha {alpha}"


def gains(proportional: float, integral: float) -> str:
    """Options for the two gains of a rule."""
    return f"--scope_gain {proportional} --scope_integral_gain {integral}"


GRPO = "--algorithm grpo"
SCOPE = gains(8, 0.4)  # the preset's, written out, so that a row says what ran
POSITIONAL = f"@positional {gains(2, 0.05)}"  # the law that this project had first
PUBLISHED_T = "--scope_temperature_min 0.8 --scope_temperature_max 1.2"
PUBLISHED = f"--scope_gain 1 --scope_integral_gain 0 {PUBLISHED_T}"
EVERYWHERE = f"@positional_everywhere {gains(2, 0.05)}"
WIDE = "--scope_temperature_max 2"
# Another task, read from JSONL files, and another architecture (see `start`).
SUMS = f"--task gsm8k --train_file {WORK}/train.jsonl --test_file {WORK}/test.jsonl"
WEAK = f"--model {WORK}/weak"  # a third warm start, trained for a shorter time
STEPS = "--max_steps 200 --num_eval_problems 0"
SHORT = f"{target(0.4)} {STEPS}"
TARGETS = (0.3, 0.4, 0.5)

ALONE = "--scope_share 0"  # rivals of SCOPE take no auxiliary samples
BONUS_PI = f"@bonus_pi {ALONE} --scope_temperature_min 0.8 --scope_temperature_max 1.2"  # c in [-0.2, 0.2]
POSITIONAL_BONUS_PI = f"@bonus_pi @positional {BONUS_PI.removeprefix('@bonus_pi ')}"
RIVALS = {
    "PI on the bonus": f"{BONUS_PI} {gains(3.2, 0.16)}",
    "stepwise bonus": f"@stepwise_bonus {ALONE} --scope_gain 0.005",
    "dual ascent": f"@dual_ascent {ALONE} --scope_integral_gain 0.05",
    "EntroPIC": f"@entropic {ALONE} {gains(1, 0.01)}",
    "entropy-flow balance": f"@flow_balance {ALONE} {gains(5, 0.05)}",
    "band filter": f"@band_filter {ALONE}",
}
NEIGHBOURS = {
    "opefo": "OPEFO",
    "avspo": "AVSPO",
    "s2l_po": "S2L-PO",
    "dcpo": "DCPO",
    "stare": "STARE",
    "all_at_t": "E3-RL4LLMs",
}
FIRST = {  # the first law in its two uses
    "SCOPE, positional": POSITIONAL,
    "PI on the bonus, positional": f"{POSITIONAL_BONUS_PI} {gains(0.8, 0.02)}",
}


def controllers(before: str, after: str, *names: str) -> dict[str, str]:
    """SCOPE and rivals under the same conditions: label -> options. By default those that hold a target."""
    rules = {"SCOPE": SCOPE, **RIVALS, **FIRST}
    names = names or ("SCOPE", "PI on the bonus", "stepwise bonus", "entropy-flow balance", *FIRST)
    return {name: " ".join(f"{before} {rules[name]} {after}".split()) for name in names}


# --- Experiments: tables of label -> options. "@NAME" before them names one of VARIANTS.
EXPERIMENTS: dict[str, dict[str, str]] = {
    "control": {
        "GRPO": GRPO,
        "GRPO, 640 samples": f"{GRPO} --generation_batch_size 640",  # as many as SCOPE draws
        **{f"entropy bonus {c}": f"{GRPO} --entropy_coef {c}" for c in (0.01, 0.03, 0.1)},
        "clip-higher 0.28": f"{GRPO} --epsilon_high 0.28",
        "AEPO": f"@aepo {PUBLISHED_T}",
        **{f"constant T = {T}": constant(T) for T in (1.0, 1.3)},
        "SCOPE, all published": f"{PUBLISHED} {term(1 / 64, 1 / 64)}",
        **{f"SCOPE, published rule, H0 {H}": f"{PUBLISHED} {target(H)}" for H in TARGETS},
        **{f"SCOPE, H0 {H}": f"{SCOPE} {target(H)}" for H in TARGETS},
        **{f"SCOPE, positional, H0 {H}": f"{POSITIONAL} {target(H)}" for H in TARGETS},
    },
    "gains": {  # two seeds that are not reported elsewhere, and shorter runs without evaluation
        **{f"{g}, {i}": f"{gains(g, i)} {SHORT}" for g in (1, 2, 4, 8) for i in (0.05, 0.1, 0.2, 0.4)},
        **{
            f"{g}, {i}, H0 {H}": f"{gains(g, i)} {target(H)} {STEPS}"
            for H in (0.3, 0.5)
            for g, i in ((4, 0.1), (4, 0.2), (8, 0.2), (8, 0.4))
        },
        **{
            f"{g}, {i}, never cooling": f"{gains(g, i)} {SHORT} --scope_temperature_min 1"
            for g, i in ((4, 0.1), (4, 0.2), (8, 0.2))
        },
    },
    "alpha": {  # the positional law, as the next ones
        "0 (GRPO)": GRPO,
        **{f"share and weight 1/{n}": f"{POSITIONAL} {term(1 / n, 1 / n)}" for n in (64, 16, 4)},
        "share and weight 1": f"{POSITIONAL} {term(1, 1)}",
        **{f"share 1/{n}, weight 1": f"{POSITIONAL} {term(1 / n, 1)}" for n in (64, 16)},
        "share 1/4, weight 1": f"{POSITIONAL} {target(0.4)}",
        **{f"share 1/4, weight 1/{n}": f"{POSITIONAL} {term(0.25, 1 / n)}" for n in (64, 16)},
    },
    "target": {
        "GRPO": GRPO,
        **{f"H0 = {H}": f"{POSITIONAL} {target(H)}" for H in (0.2, 0.3, 0.4, 0.5)},
        **{f"H0 = {H}, wide": f"{EVERYWHERE} {target(H)} {WIDE}" for H in (0.6, 0.8)},
        "H0 = 0.8, wide, mean over positives": f"@mean_over_positives {EVERYWHERE} {target(0.8)} {WIDE}",
    },
    "beyond": {f"H0 = {H}": f"{POSITIONAL} {target(H)}" for H in (0.5, 0.6, 0.7, 0.8)},
    "ingredients": {
        "as it is, H0 0.4": f"{POSITIONAL} {target(0.4)}",
        "both signs": f"@both_signs {POSITIONAL} {target(0.4)}",
        "mean over positives": f"@mean_over_positives {POSITIONAL} {target(0.4)}",
        "group-normalised": f"@group_normalised {POSITIONAL} {target(0.4)}",
        "equal groups dropped": f"@equal_groups_dropped {POSITIONAL} {target(0.4)}",
        "as it is, H0 0.5": f"{POSITIONAL} {target(0.5)}",
        "T in [0.8, 1.2], H0 0.5": f"{POSITIONAL} {PUBLISHED_T} {target(0.5)}",
        "T in [0.5, 2], H0 0.5": f"{POSITIONAL} {WIDE} {target(0.5)}",
        "T not clipped, H0 0.5": (
            f"{POSITIONAL} --scope_temperature_min 0.01 --scope_temperature_max 100 {target(0.5)}"
        ),
        "mean over positives, T in [0.5, 2], H0 0.5": (
            f"@mean_over_positives {POSITIONAL} {WIDE} {target(0.5)}"
        ),
        "T in [0.5, 2], integral everywhere, H0 0.8": f"{EVERYWHERE} {target(0.8)} {WIDE}",
        "mean over positives, the same, H0 0.8": f"@mean_over_positives {EVERYWHERE} {target(0.8)} {WIDE}",
    },
    # Tuned on tracking alone. SCOPE's settings are those of `gains`.
    "tuning": {
        "GRPO": f"{GRPO} {STEPS}",
        "SCOPE, 8, 0.4": f"{SCOPE} {SHORT}",
        "SCOPE, positional": f"{POSITIONAL} {SHORT}",
        **{
            f"PI on the bonus, {p}, {i}": f"{BONUS_PI} {gains(p, i)} {SHORT}"
            for p, i in ((1.6, 0.08), (3.2, 0.16), (6.4, 0.32))
        },
        **{
            f"PI on the bonus, positional, {p}, {i}": f"{POSITIONAL_BONUS_PI} {gains(p, i)} {SHORT}"
            for p, i in ((0.4, 0.01), (0.8, 0.02))
        },
        **{
            f"stepwise bonus, {d}": f"@stepwise_bonus {ALONE} --scope_gain {d} {SHORT}"
            for d in (0.001, 0.005)
        },
        **{
            f"dual ascent, {eta}": f"@dual_ascent {ALONE} --scope_integral_gain {eta} {SHORT}"
            for eta in (0.05, 0.2)
        },
        **{
            f"EntroPIC, {p}, {i}": f"@entropic {ALONE} {gains(p, i)} {SHORT}"
            for p, i in ((1, 0.01), (5, 0.05))
        },
        **{
            f"entropy-flow balance, {p}, {i}": f"@flow_balance {ALONE} {gains(p, i)} {SHORT}"
            for p, i in ((1, 0.01), (5, 0.05))
        },
        "band filter, 0": f"@band_filter {ALONE} {SHORT}",
        "band filter, 0.04": f"@wide_band_filter {ALONE} {SHORT}",
    },
    **{
        f"rivals-{H}": {
            **controllers("", target(H), "SCOPE", *RIVALS, *FIRST),
            "SCOPE, published rule": f"{PUBLISHED} {target(H)}",
            "AEPO": f"@aepo {PUBLISHED_T}" + (f" {target(H)}" if H != 0.4 else ""),
            "SCOPE, never cooling": f"{SCOPE} --scope_temperature_min 1 {target(H)}",
            "SCOPE, positional, never cooling": f"{POSITIONAL} --scope_temperature_min 1 {target(H)}",
        }
        for H in TARGETS
    },
    "moving": controllers("@moving_target", target(0.5)),
    "cooling": {
        "GRPO": f"{SUMS} {GRPO}",
        **controllers("", f"{SUMS} {target(0.2)}"),
    },  # below where GRPO ends
    "weak": {"GRPO": f"{WEAK} {GRPO}", **controllers("", f"{WEAK} {target(0.4)}")},
    "dr_grpo": {"GRPO": f"@dr_grpo {GRPO}", **controllers("@dr_grpo", target(0.4))},
    # Where T is at its clip, a boost of the term's weight goes on: with and without.
    "split": {
        f"{name}, {label}": f"{boost} {SCOPE} {after}".strip()
        for label, after in (
            ("weak", f"{WEAK} {target(0.4)}"),
            *((f"H0 {H}", target(H)) for H in (0.5, 0.6, 0.7)),
        )
        for name, boost in (("SCOPE", ""), ("split range", "--scope_max_boost 8"))
    }
    | {
        "SCOPE, moving": f"@moving_target {SCOPE} {target(0.5)}",
        "split range, moving": f"@moving_target {SCOPE} --scope_max_boost 8 {target(0.5)}",
    },
    "neighbours": {
        "GRPO": GRPO,
        "SCOPE": f"{SCOPE} {target(0.4)}",
        **{
            f"{label}{beside}": f"@{name} {options} {target(0.4)}"
            for name, label in NEIGHBOURS.items()
            for beside, options in ((" alone", ALONE), (" beside SCOPE", SCOPE))
        },
    },
    "transfer": {
        "GRPO": f"{SUMS} {GRPO}",
        **{f"H0 = {H}": f"{POSITIONAL} {SUMS} {target(H)}" for H in (0.3, 0.4, 0.6)},
    },
}


# --- Running
def kinds_and_arguments(options: str) -> tuple[list[type[variants.Variant]], list[str]]:
    """`@NAME ... --option value` -> kinds of variants, and the rest for train.py. Raises KeyError."""
    words = options.split()
    kinds = [VARIANTS[word[1:]] for word in words if word.startswith("@")]
    return kinds, [word for word in words if not word.startswith("@")]


def start(options: str, seed: int) -> Path:
    """The model that a run starts from. For sums it is a Llama.

    The Llamas, the weak model and S2L-PO's smaller ones are made on first use. A Llama's 1,400 steps end
    near the Pass@1 that the tiny Qwen3 has on Countdown after 3,500.
    """
    number, qwen3 = seed % 2, warm_start.make_config("qwen3")
    if "@s2l_po" in options:
        half = {
            "hidden_size": 32,
            "intermediate_size": 96,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
        smaller = type(qwen3).from_dict(qwen3.to_dict() | half)
        make(neighbours.EXPLORERS / f"smaller-{number}", smaller, countdown.example, 3500, number)
    if SUMS in options:
        llama = warm_start.make_config("llama")
        return make(WORK / f"llama-{number}", llama, sums.example, 1400, number)
    if WEAK in options:
        return make(WORK / "weak", qwen3, countdown.example, 1750, 2)
    return train.THEORY / "tiny" / f"start-{number}"


def make(folder: Path, config, example: Callable, steps: int, seed: int) -> Path:
    """Warm-start a model in this folder, unless that was done before."""
    if not folder.exists():
        unfinished = folder.with_suffix(".tmp")
        warm_start.warm_start(unfinished, config, example, steps=steps, seed=seed)
        unfinished.rename(folder)
    return folder


def write_sums() -> None:
    """The questions of `transfer` as JSONL files, 128 to train and 128 to evaluate, the same every time."""
    WORK.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rng, answers = random.Random(split), {}  # by question
        while len(answers) < 128:
            problem, _ = sums.example(rng, split)
            answers[problem.question] = problem.answer
        lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in answers.items()]
        (WORK / f"{split}.jsonl").write_text("".join(lines))


def one_run(job: tuple[str, int]) -> dict:
    """Train with these options and seed, quietly, and return the row."""
    options, seed = job
    torch.set_num_threads(1)
    folder = WORK / f"{zlib.crc32(options.encode()):08x}-{seed}"
    kinds, own = kinds_and_arguments(options)
    arguments = ["--preset", "tiny", "--model", str(start(options, seed)), "--seed", str(seed)]
    arguments += ["--output_dir", str(folder), *own]
    if (folder / "config.json").exists():
        arguments.append("--resume")
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        run, before = train.set_up(train.parse_config(arguments)), time.process_time()
        if kinds:
            variants.put_into(run, kinds)
        train.train(run)
    row = {"options": options, "seed": seed, "target": run.config.scope_target_entropy}
    row |= summary(folder) | {"cpu_seconds": round(time.process_time() - before, 1)}
    if run.task.test:
        row["answers"] = answers_of(run)
    shutil.rmtree(folder)
    return row


def answers_of(run: train.Run, count: int = 8) -> dict:
    """Answers to the first test question, which has the same random numbers every time; rewards."""
    length, asked = run.config.max_completion_length, run.task.test[:1] * count
    prompts, T = [run.prompts[problem.question] for problem in asked], torch.ones(count)
    uniforms = torch.rand(count, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    samples = rollout.generate(run.model.eval(), run.tokenizer, prompts, T, length, uniforms)
    rewards = train.grade(run.task, asked, samples).tolist()
    return {"question": asked[0].question, "texts": samples.texts, "rewards": rewards}


def summary(folder: Path) -> dict:
    """What a row keeps of a run: its last fifth, its evaluation, its entropy's course."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = steps[-len(steps) // 5 :]
    row = {"steps": len(steps)}
    for name in ("reward", "entropy", "scope_temperature"):
        row[name] = float(np.mean([step[name] for step in last]))
    evaluations = folder / "eval.json"
    if evaluations.exists():
        before, after = (json.loads(evaluations.read_text())[name] for name in ("before", "after"))
        row |= after | {f"{name} before": before[name] for name in ("pass@1", "distinct_correct")}
    parts = np.array_split([step["entropy"] for step in steps], PARTS)
    return row | {"entropies": [round(float(part.mean()), 4) for part in parts]}


# --- Measures of control. They take means of parts of a run, such as ten steps, and not single steps.
def error(entropies: list[float], H0: float, parts: int | None = None) -> float:
    """The mean distance from the target over the last parts, by default a fifth, as a share of H0."""
    last = np.array(entropies[-(parts or len(entropies) // 5) :])
    return float(np.abs(last - H0).mean() / H0)


def lowest(entropies: list[float], H0: float) -> float:
    """The lowest part, as a share of H0."""
    return min(entropies) / H0


def settling(entropies: list[float], H0: float, steps: int) -> int:
    """The steps after which each part lies within a tenth of H0, of so many in all, which stand for never."""
    outside = [i for i, H in enumerate(entropies) if abs(H - H0) > 0.1 * H0]
    return round(steps * (outside[-1] + 1) / len(entropies)) if outside else 0


def read_rows() -> list[dict]:
    """All rows, with the measures of control."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    for row in rows:
        course, H0 = row["entropies"], row["target"]
        row["error"], row["lowest"] = error(course, H0), lowest(course, H0)
        row["settling"] = settling(course, H0, row["steps"])
    return rows


def is_new(row: dict) -> bool:
    """Whether the present program made a row: it keeps how many answers to each problem were right."""
    return "num_right" in row


def main() -> None:
    """Run what is missing of an experiment."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=8, help="how many")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="these of its labels; default: all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="also where the only row is of an older program")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table, seeds = EXPERIMENTS[args.name], range(args.first_seed, args.first_seed + args.seeds)
    if args.only and not set(args.only) <= set(table):
        parser.error(f"{args.name} has the labels: {'; '.join(table)}")
    known = {(row["options"], row["seed"]) for row in read_rows() if is_new(row) or not args.again}
    jobs = [(table[label], seed) for seed in seeds for label in args.only or table]
    jobs = [job for job in dict.fromkeys(jobs) if job not in known]
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
