"""Control of the entropy of a pretrained model:  `python theory/lab/pretrained.py MODEL LABEL [--seed 0]`

Runs train.py's own `set_up` and `train` with a label's options and changes: on numbers between two
others (the preset `laptop`, between.py), or on sums (arithmetic.py). A run ends as a row of
pretrained.jsonl: the numbers of every step, the evaluation, and what the tabular theory says of it
(`note`). Labels with "collapsed" start from a collapsed policy, which `--save FOLDER` writes at the
end of a run. Without MODEL the tables are printed and the figure is drawn; `--noise` says how much one
step's H varies at fixed weights.

A prompt has some fifty tokens here and a completion twelve at most, and several completions share a
prompt. So scoring reads each prompt once (`score`), which halves the time; in float32 the numbers are
the same but for rounding.
"""

import argparse
import itertools
import json
import shutil
import zlib
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

import experiments
import probes
import report
import rollout
import scope_rl
import train
from entropy import entropy_of, log_policy, logprobs_and_entropies, masked_mean

FOLDER = Path(__file__).parent
ROWS = FOLDER / "pretrained.jsonl"
WORK = Path("outputs") / "pretrained"
COMMON = "--preset laptop --bf16 true --save_steps 1000 --per_device_train_batch_size 64"
SUMS = (
    f"--task {FOLDER / 'arithmetic.py'} --generation_batch_size 32 --num_generations 8 --learning_rate 2e-5"
    " --warmup_steps 10 --num_mini_batches 2 --num_eval_problems 0 --bf16 false"
)
TERM = "--scope_alpha 0.375 --scope_weight 1 --scope_integral_gain 0"
RULE = "--scope_target_entropy 0.3 --scope_temperature_min 1 --scope_temperature_max 2 --scope_gain 5"
HALF = (
    "--scope_target_entropy 0.5 --scope_alpha 0.25 --scope_weight 1 --scope_temperature_min 1 --scope_gain 2"
    " --scope_integral_gain 0"
)
# More samples, smaller gradient steps, longer; SCOPE's runs have twice the integral's gain, too.
LARGER = "--generation_batch_size 128 --num_mini_batches 4 --learning_rate 5e-6 --max_steps 60"
GROUPS = ("", "32 prompts")  # of runs on numbers between two others: 12 prompts a step, and more
SLOW = "--warmup_steps 3 --learning_rate 5e-6"
LIKELY = "@sums @top_k=5 @mean_over_positives"
# Label -> options for train.py; before them, with @, the task, top_k (see NotingSampler) and experiments.VARIANTS.
# Before a label's colon stands the group of runs it is compared in.
EXPERIMENT = {
    "GRPO": "--algorithm grpo",
    "SCOPE, all published": f"{experiments.PUBLISHED} {experiments.alpha(1 / 64, 1 / 64)}",
    **{f"SCOPE, H0 {H}": experiments.target(H) for H in (0.5, 0.8)},
    **{f"SCOPE, H0 {H}, gain 1": f"{experiments.target(H)} --scope_gain 1" for H in (0.5, 0.8)},
    "stepwise bonus, H0 0.5": f"{experiments.RIVALS['stepwise bonus']} {experiments.target(0.5)}",
    "32 prompts: GRPO": f"{LARGER} --algorithm grpo",
    **{f"32 prompts: SCOPE, H0 {H}": f"{LARGER} --scope_integral_gain 0.1 {experiments.target(H)}" for H in (0.6, 0.8)},
    "sums: GRPO": "@sums --max_steps 24 --algorithm grpo",
    "sums: SCOPE, T up to 1.5": f"@sums --max_steps 24 {HALF} --scope_temperature_max 1.5",
    "sums: SCOPE, top 20, T up to 3": f"@sums @top_k=20 --max_steps 30 {HALF} --scope_temperature_max 3",
    "sums: top 5, mean over positives, H0 0.3": f"{LIKELY} --max_steps 40 {SLOW} {TERM} {RULE}",
    "sums: top 5, mean over positives, H0 0.3, integral": (
        f"{LIKELY} --max_steps 36 {SLOW} {TERM} {RULE} --scope_temperature_max 2.5"
        " --scope_integral_gain 0.5 --scope_integral_band 1"
    ),
    "sums, collapsed: GRPO": f"@sums --max_steps 12 {SLOW} --algorithm grpo",
    "sums, collapsed: top 5, mean over positives, T = 2": (
        f"{LIKELY} --max_steps 16 {SLOW} {TERM} {experiments.constant(2)}"
    ),
    "sums, collapsed: top 5, mean over positives, T = 2, 2e-5": (
        f"{LIKELY} --max_steps 12 --warmup_steps 3 {TERM} {experiments.constant(2)}"
    ),
    "sums, collapsed: top 5, mean over positives, H0 0.3": f"{LIKELY} --max_steps 20 {SLOW} {TERM} {RULE}",
}


def parts(options: str) -> tuple[experiments.Variant, int, list[str]]:
    """The variant, top_k, and the arguments for train.py."""
    names = [word[1:] for word in options.split() if word.startswith("@")]
    words = [word for word in options.split() if not word.startswith("@")]
    top_k = next((int(name[len("top_k=") :]) for name in names if name.startswith("top_k=")), 0)
    kinds = [experiments.VARIANTS[name] for name in names if name != "sums" and not name.startswith("top_k=")]
    common = COMMON.split() + SUMS.split() * ("sums" in names)
    return type("Changed", tuple(kinds) or (experiments.Variant,), {})(), top_k, common + words


def settings(config: train.Config) -> dict:
    """What a config says, but for files and the seed: a row keeps it, as presets change."""
    return {name: value for name, value in vars(config).items() if name not in ("model", "task", "output_dir", "seed")}


# --- Reading each prompt once
def score(model, samples: rollout.Rollout, rows: Tensor) -> tuple[Tensor, Tensor]:
    """rollout.score, with each distinct prompt read once, before all completions; for a CPU."""
    sequences, mask = samples.sequences[rows], samples.completion_mask[rows]  # [n, S]
    starts, counts = mask.long().argmax(1), mask.sum(1)  # where each completion begins, and its tokens  [n]
    prompts = [tuple(ids[:start].tolist()) for ids, start in zip(sequences, starts, strict=True)]
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    which = torch.tensor([distinct[prompt] for prompt in prompts])  # whose prompt  [n]

    # Prompts, padded on the left. All but their last token go into the cache; that one is read with the completions.
    P, C = max(map(len, distinct)), int(counts.max())
    ids = torch.tensor([(0,) * (P - len(prompt)) + prompt for prompt in distinct])  # [U, P]
    attention = (torch.arange(P) >= P - torch.tensor([[len(prompt)] for prompt in distinct])).long()  # [U, P]
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    before = {"attention_mask": attention[:, :-1], "position_ids": positions[:, :-1], "use_cache": True}
    cache = model.base_model(input_ids=ids[:, :-1], **before).past_key_values if P > 1 else DynamicCache()
    cache.batch_select_indices(which)

    # From there on the completions, each after its prompt.
    columns = (starts - 1)[:, None] + torch.arange(C + 1)  # [n, C + 1]
    tokens = sequences.gather(1, columns.clamp(max=sequences.shape[1] - 1))
    attention = torch.cat([attention[which], torch.ones(len(rows), C - 1, dtype=torch.long)], 1)
    behind = {"attention_mask": attention, "position_ids": columns[:, :-1], "past_key_values": cache, "use_cache": True}
    hidden = model.base_model(input_ids=tokens[:, :-1], **behind).last_hidden_state  # [n, C, D]
    kept = torch.arange(C) < counts[:, None]  # [n, C]
    head = model.get_output_embeddings()
    pair = logprobs_and_entropies(hidden[kept], head, tokens[:, 1:][kept], 256)
    logprobs, entropies = (torch.zeros(mask.shape).masked_scatter(mask, values) for values in pair)
    return logprobs, entropies


# --- What the theory says of a step
class NotingSampler(rollout.Sampler):
    """Notes gbar - g_a of each token too: what its reinforcement adds to H, had each context logits of its own.

    With `top_k`, samples at another temperature than 1 take one of the k likeliest tokens each time.
    That multiplies the theory's w by a fixed 0 or 1, so the theorem and the single crossing still hold.
    """

    top_k: int = 0  # 0: all tokens
    changes: list[Tensor]  # [b] a token, of the batch last sampled

    def __init__(self, temperatures: Tensor) -> None:
        super().__init__(temperatures)
        NotingSampler.changes = []

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        allowed = logits
        if self.top_k:
            least = logits.topk(self.top_k, -1).values[:, -1:]  # [b, 1]
            allowed = logits.masked_fill((self.temperatures != 1) & (logits < least), -torch.inf)
        chosen = super().__call__(ids, allowed)  # [b, V], 0 at the token and -inf elsewhere
        x = log_policy(logits)  # [b, V]
        H, x_a = entropy_of(x), x.gather(1, chosen.argmax(1, keepdim=True))[:, 0]  # [b], [b]
        self.noted[-1] = torch.stack([x_a, H])  # of the whole policy
        gbar = ((2 * x).exp() * (x + H[:, None])).sum(-1)
        self.changes.append(gbar - x_a.exp() * (x_a + H))
        return chosen


def mean_changes(samples: rollout.Rollout) -> Tensor:
    """The mean over each completion's tokens of what the sampler noted of the batch last sampled `[B]`."""
    counts, changes = samples.completion_mask.sum(1), torch.stack(NotingSampler.changes, -1)  # [B], [B, C]
    inside = torch.arange(changes.shape[1]) < counts[:, None]
    return torch.where(inside, changes, 0.0).sum(1) / counts


def note(samples: rollout.Rollout, table: scope_rl.Objective, rewards: Tensor, prompt: Tensor, N: int) -> dict:
    """What GRPO's part of J and SCOPE's add to H, by the tabular theory to first order; shares of right samples.

    `other` ones are right, and differ from the most frequent right ordinary sample of their prompt."""
    changes, right = table.weights * table.advantages * mean_changes(samples), rewards == 1
    texts: dict[int, Counter] = {}
    for i in range(N):
        if right[i]:
            texts.setdefault(int(prompt[i]), Counter())[samples.texts[i]] += 1
    usual = {p: counter.most_common(1)[0][0] for p, counter in texts.items()}
    other = [bool(r) and usual.get(int(p), t) != t for t, p, r in zip(samples.texts, prompt, right, strict=True)]
    other = torch.tensor(other).float()
    row = {"grpo_first": changes[:N].sum().item(), "other": other[:N].mean().item()}
    if len(rewards) > N:
        row |= {"scope_first": changes[N:].sum().item(), "aux_right": right[N:].float().mean().item()}
        row |= {"aux_other": other[N:].mean().item()}
    return row


# --- Running
def one_run(model: str, label: str, seed: int, save: Path | None = None) -> dict:
    """Train with a label's options, and return the row."""
    variant, top_k, words = parts(EXPERIMENT[label])
    folder, notes, last, shown = WORK / f"{zlib.crc32(label.encode()):08x}-{seed}", [], {}, []
    shutil.rmtree(folder, ignore_errors=True)
    own = ["--model", model, "--seed", str(seed), "--output_dir", str(folder)]

    def objective_table(rewards, auxiliary, *rest):
        last.update(rewards=torch.cat([rewards.flatten(), auxiliary]), N=rewards.numel())
        return variant.objective_table(rewards, auxiliary, *rest)

    def update(run, samples, prompt, table):
        notes.append(note(samples, table, last["rewards"], prompt, last["N"]))
        return UPDATE(run, samples, prompt, table)

    def sample(run, problems, temperatures):
        samples, rewards = SAMPLE(run, problems, temperatures)
        if problems[0] in run.task.test[:1]:  # in an evaluation
            shown.append(samples.texts[: run.config.num_eval_generations])
        return samples, rewards

    functions = {name: getattr(variant, name) for name in ("scope_temperature", "scope_loss")}
    with (
        mock.patch.multiple(scope_rl, objective_table=objective_table, **functions),
        mock.patch.multiple(rollout, Sampler=type("Sampler", (NotingSampler,), {"top_k": top_k}), score=score),
        mock.patch.multiple(train, update=update, sample=sample),
    ):
        run = train.set_up(train.parse_config([*words, *own]))
        variant.run = run
        train.train(run)
    if save:
        shutil.copytree(folder / "model", save)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [step | noted for step, noted in zip(steps, notes, strict=True)]
    shutil.rmtree(folder)
    row = {"label": label, "options": EXPERIMENT[label], "seed": seed, "target": run.config.scope_target_entropy}
    row["settings"] = settings(run.config)
    row |= {name: [round(step[name], 4) for step in steps] for name in KEPT if name in steps[0]}
    return row | {"evaluations": run.evaluations, "question": [p.question for p in run.task.test[:1]], "texts": shown}


UPDATE, SAMPLE = train.update, train.sample
BEYOND = ("entropy", "distinct_correct")  # what is compared with GRPO's, seed by seed
KEPT = (
    "reward", "entropy", "scope_temperature", "completion_length", "truncated_frac", "grad_norm", "other",
    "aux_right", "aux_other", "grpo_first", "scope_first",
)  # fmt: skip


# --- What a policy's gradients do to its entropy
def probe(model: str, seed: int) -> None:
    """Print, for GRPO's gradient and for that of positives drawn at T, dH / d eta on the contexts of the
    prompts sampled and on those of 8 others, and the tabular prediction; each is per unit of eta."""
    run = probes.set_up(f"{COMMON} {SUMS} --model {model}".split())
    torch.manual_seed(seed)
    own, others = run.task.train[:8], run.task.train[8:16]
    with mock.patch.multiple(rollout, Sampler=NotingSampler, score=score):
        samples, rewards = probes.draw(run, own, 64, 1.0)  # eight of each, going round
        advantages = scope_rl.group_advantages(rewards.view(8, 8).T).T.flatten()
        terms = {"GRPO": (samples, advantages / 64, mean_changes(samples))}
        slopes = [probes.entropy_gradient(run, s) for s in (samples, probes.draw(run, others, 64, 1.0)[0])]
    for k, T in ((0, 1.0), (0, 1.2), (0, 1.5), (0, 2.0), (5, 1.5), (5, 2.0), (5, 3.0)):
        sampler = type("Sampler", (NotingSampler,), {"top_k": k})
        with mock.patch.multiple(rollout, Sampler=sampler, score=score):
            samples, rewards = probes.draw(run, own, 48, T)
            right = f"T = {T}, " + (f"top {k}" if k else "all tokens") + f", {rewards.mean():.0%} right"
            terms[right] = samples, rewards / rewards.sum().clamp(min=1), mean_changes(samples)
    for name, (samples, weights, changes) in terms.items():
        rows = weights.nonzero()[:, 0]
        if len(rows) > 0:
            logprobs, _ = score(run.model, samples, rows)
            (weights[rows] * masked_mean(logprobs, samples.completion_mask[rows], dim=1)).sum().backward()
            gradient = probes.take_gradient(run)
            real = [(slope @ gradient).item() for slope in slopes]
            predicted = (weights * changes).sum()
            print(f"| {name} | {real[0]:+.2f} | {real[1]:+.2f} | {predicted:+.4f} |", flush=True)


def noise(model: str, steps: int = 16) -> None:
    """Print, for 12 and for 32 prompts a step, the mean of H over steps at the very same weights, and how far
    one step's lies from it on average: no rule brings the mean of |H - H0| far below that."""
    run = probes.set_up(f"{COMMON} --model {model}".split())
    torch.manual_seed(0)
    print("| prompts | mean of H | mean distance |")
    for prompts in (12, 32):
        problems = itertools.cycle(run.task.train)
        H = []
        for _ in range(steps):
            batch = list(itertools.islice(problems, prompts))
            samples, _ = probes.draw(run, batch, prompts * run.config.num_generations, 1.0)
            H.append(masked_mean(samples.entropies, samples.completion_mask).item())
        print(f"| {prompts} | {np.mean(H):.3f} | {np.abs(np.array(H) - np.mean(H)).mean():.3f} |", flush=True)


# --- Tables and the figure
def read_rows() -> list[dict]:
    """The rows of both tasks."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()]


def cells(group: str = "") -> dict[str, list[dict]]:
    """Label without its group -> its rows by seed; no group: numbers between two others, 12 prompts a step."""
    rows = sorted(read_rows(), key=lambda row: row["seed"])
    known = {}
    for label in EXPERIMENT:
        prefix, _, name = label.rpartition(": ")
        if prefix == group:
            known[name] = [row for row in rows if row["label"] == label]
    return {name: cell for name, cell in known.items() if cell}


def last_fifth(row: dict) -> dict[str, float]:
    """Means of a row over its last fifth, and of its evaluations; `distance` is the mean of |H - H0|."""
    last = -(len(row["entropy"]) // 5)
    values = {name: float(np.mean(row[name][last:])) for name in KEPT if name in row}
    values["distance"] = float(np.mean(np.abs(np.array(row["entropy"][last:]) - row["target"])))
    values |= {"first": row["entropy"][0], "first reward": row["reward"][0]}
    return values | row["evaluations"]["after"]


def comparison(group: str = "") -> str:
    """The controllers on numbers between two others: means over the seeds, the entropy of each seed, and
    what it and the distinct right answers are beyond GRPO's of the same seed."""
    names = ("scope_temperature", "first reward", "reward", "pass@1", "distinct_correct")
    lines, values = [], {label: {row["seed"]: last_fifth(row) for row in rows} for label, rows in cells(group).items()}
    base = values.get("GRPO", {})
    for label, cell in values.items():
        H = [v["entropy"] for v in cell.values()]
        line = [report.show([v["first"] for v in cell.values()]), ", ".join(f"{x:.2f}" for x in H), report.show(H)]
        gains = [[v[name] - base[seed][name] for seed, v in cell.items() if seed in base] for name in BEYOND]
        line += [report.show([v["distance"] for v in cell.values()]), *(report.show(gain, "+") for gain in gains)]
        if label == "GRPO":
            line[-3:] = ["", "", ""]
        lines.append([label, *line, *(report.show([v[name] for v in cell.values()]) for name in names)])
    header = ["run", "H, first", "last fifth, of each seed", "mean", "mean of abs(H - H0)", "H minus GRPO's"]
    header += ["distinct right minus GRPO's", "T", "reward, first", "last fifth", "Pass@1", "distinct right"]
    return report.markdown(header, lines)


def hot_samples() -> str:
    """How many auxiliary samples are right at a temperature, over SCOPE's runs from step 15 on."""
    rows = [row for label, rows in cells().items() if label.startswith("SCOPE, H0") for row in rows]
    columns = ("scope_temperature", "aux_right", "aux_other")
    T, right, other = (np.concatenate([row[name][14:] for row in rows] or [[]]) for name in columns)
    lines, edges = [], (0.9, 1.05, 1.3, 1.55, 1.74, 1.76)
    for low, high in itertools.pairwise(edges):
        steps = (low <= T) & (high > T)
        shares = [f"{share[steps].mean():.2f}" if steps.any() else "" for share in (right, other)]
        lines.append([f"{low} to {high}" if high < 1.75 else "1.75", steps.sum(), *shares])
    return report.markdown(["T", "steps", "right", "right, and not the usual answer"], lines)


def answers(group: str = "") -> str:
    """What seed 0 of each run answers to the first test question before and after."""
    first = {label: row for label, cell in cells(group).items() for row in cell if row["seed"] == 0}
    shown = [("before", row["texts"][0]) for row in [*first.values()][:1]]
    shown += [(label, row["texts"][-1]) for label, row in first.items()]
    lines = [
        [label, " ".join(f"`{' '.join(text.replace('|', '/').replace('`', ' ').split())}`" for text in texts)]
        for label, texts in shown
    ]
    question = next((row["question"][0] for row in first.values()), "")  # the same in all
    return report.markdown(["run", f"answers to: {question}"], lines)


def sums_table() -> str:
    """A line a row of the sums: the entropy first, lowest and at the end; means of the last eight steps."""
    lines = []
    for row in (row for row in read_rows() if row["label"].startswith("sums")):
        H = row["entropy"]
        names = ("entropy", "scope_temperature", "reward", "other", "aux_right", "aux_other")
        means = [f"{np.mean(row[name][-8:]):.2f}" if name in row else "" for name in names]
        label = row["label"].removeprefix("sums: ").removeprefix("sums, ")
        lines.append([label, row["seed"], len(H), f"{H[0]:.2f}", f"{min(H):.2f}", *means])
    header = ["run", "seed", "steps", "H, first", "lowest", "last 8"]
    header += ["T", "reward", "other", "hot, right", "hot, other"]
    return report.markdown(header, lines)


def draw(path: Path) -> None:
    """A panel a label: the entropy, a line a seed, and its target, dotted; the reward in grey."""
    import matplotlib.pyplot as plt  # the extra `plot`

    panels = [[cell for cell in cells(group).items() if len(cell[1]) > 1] for group in GROUPS]
    panels = [shown for shown in panels if shown]
    columns = max(map(len, panels))
    size = {"figsize": (3.4 * columns, 3.2 * len(panels)), "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(len(panels), columns, **size, layout="constrained")
    for row_of_axes, shown in zip(axes, panels, strict=True):
        settings_of = shown[0][1][0]["settings"]
        prompts = settings_of["generation_batch_size"] // settings_of["num_generations"]
        row_of_axes[0].set(ylabel=f"{prompts} prompts: nats a token; reward")
        for axis in row_of_axes[len(shown) :]:
            axis.axis("off")
        for axis, (label, rows) in zip(row_of_axes, shown, strict=False):
            for row in rows:
                axis.plot(row["reward"], color="silver", lw=0.8, label=None if row["seed"] else "reward")
                axis.plot(row["entropy"], color=f"C{row['seed']}", lw=1.2, label=f"entropy, seed {row['seed']}")
            if "H0" in label:
                axis.axhline(rows[0]["target"], color="black", lw=1.2, ls=":", zorder=3)
            axis.set(title=label, xlabel="step", ylim=(0, 3))
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    """One run, or the tables and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help="the pretrained model, or the collapsed one; none: tables and figure")
    parser.add_argument("label", nargs="?", choices=EXPERIMENT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="a new folder for the policy at the end")
    parser.add_argument("--probe", action="store_true", help="of the model's gradients, instead of a run")
    parser.add_argument("--noise", action="store_true", help="of one step's H at the model's weights, instead of a run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.model is None:
        tables = [comparison(), hot_samples(), answers(), comparison(GROUPS[1]), answers(GROUPS[1]), sums_table()]
        print(*tables, sep="\n", end="")
        return draw(FOLDER / "figures" / "pretrained.png")
    if args.probe:
        return probe(args.model, args.seed)
    if args.noise:
        return noise(args.model)
    known = [(row["label"], row["seed"]) for row in read_rows()]
    if args.label is None or (args.label, args.seed) in known or (args.save and args.save.exists()):
        parser.error("needs a label with a seed that has no row yet, and for --save a folder that does not exist")
    row = one_run(args.model, args.label, args.seed, args.save)
    with open(ROWS, "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
