"""Control of the entropy of a pretrained model:  `python theory/lab/pretrained.py MODEL LABEL [--seed 0]`

Runs train.py's own `set_up` and `train` on sums of two small numbers (arithmetic.py), with a label's
options and changes. A run ends as a row of pretrained.jsonl: the numbers of every step, and what the
tabular theory says of it (`note`). Labels of the second half of EXPERIMENT start from a collapsed
policy, which `--save FOLDER` writes at the end of a run. Without MODEL the rows' table is printed.

A prompt has some fifty tokens here and a completion ten, and eight completions or more share a
prompt. So scoring reads each prompt once (`score`): the same numbers, in less than half of the time.
"""

import argparse
import json
import shutil
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

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
COMMON = (
    f"--preset laptop --task {FOLDER / 'arithmetic.py'} --generation_batch_size 32 --num_generations 8"
    " --max_completion_length 12 --num_mini_batches 2 --learning_rate 2e-5 --warmup_steps 10 --save_steps 1000"
    " --per_device_train_batch_size 64 --num_eval_problems 0 --logging_steps 10"
)
TERM = "--scope_alpha 0.375 --scope_weight 1"
RULE = "--scope_target_entropy 0.3 --scope_temperature_min 1 --scope_temperature_max 2 --scope_gain 5"
HALF = "--scope_target_entropy 0.5 --scope_alpha 0.25 --scope_weight 1 --scope_temperature_min 1 --scope_gain 2"
SLOW = "--warmup_steps 3 --learning_rate 5e-6"
# Label -> options for train.py; before them, after an @, the changes that `Changed` knows.
EXPERIMENT = {
    "GRPO": "--max_steps 24 --algorithm grpo",
    "SCOPE, T up to 1.5": f"--max_steps 24 {HALF} --scope_temperature_max 1.5",
    "SCOPE, top 20, T up to 3": f"@top_k=20 --max_steps 30 {HALF} --scope_temperature_max 3",
    "collapsed: GRPO": f"--max_steps 12 {SLOW} --algorithm grpo",
    "collapsed: SCOPE, T = 1.5": f"--max_steps 12 {SLOW} {TERM} {experiments.constant(1.5)}",
    "collapsed: top 5, mean over positives, T = 2": (
        f"@top_k=5,positives --max_steps 16 {SLOW} {TERM} {experiments.constant(2)}"
    ),
    "collapsed: top 5, mean over positives, T = 2, 2e-5": (
        f"@top_k=5,positives --max_steps 12 --warmup_steps 3 {TERM} {experiments.constant(2)}"
    ),
    "collapsed: top 5, mean over positives, H0 0.3": f"@top_k=5,positives --max_steps 20 {SLOW} {TERM} {RULE}",
    "GRPO, learning rate 5e-6": f"--max_steps 24 {SLOW} --algorithm grpo",
    "top 5, mean over positives, H0 0.3": f"@top_k=5,positives --max_steps 40 {SLOW} {TERM} {RULE}",
    "top 5, mean over positives, H0 0.3, integral": (
        f"@top_k=5,positives --max_steps 36 {SLOW} {TERM} {RULE} --scope_temperature_max 2.5"
        " --scope_integral_gain 0.5 --scope_integral_band 1"
    ),
}


# --- Reading each prompt once
def score(model, samples: rollout.Rollout, rows: Tensor) -> tuple[Tensor, Tensor]:
    """rollout.score, with the rows of a prompt behind one pass over it; for short completions on a CPU."""
    mask = samples.completion_mask[rows]  # [n, S]
    starts, members = mask.long().argmax(1).tolist(), {}  # where each completion begins; who shares a prompt
    for i, row in enumerate(rows.tolist()):
        members.setdefault(tuple(samples.sequences[row, : starts[i]].tolist()), []).append(i)
    head, scores = model.get_output_embeddings(), {}
    for prompt, group in members.items():
        P, longest = len(prompt), int(samples.lengths[rows[group]].max())
        ids, kept = samples.sequences[rows[group], P - 1 : longest], mask[group, P:longest]  # [m, C + 1], [m, C]
        cache = model.base_model(input_ids=torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(group))
        behind = {"past_key_values": cache, "use_cache": True}
        hidden = model.base_model(input_ids=ids[:, :-1], **behind).last_hidden_state  # [m, C, D]
        pair = logprobs_and_entropies(hidden[kept], head, ids[:, 1:][kept], 1024)
        counts = kept.sum(1).tolist()
        scores |= dict(zip(group, zip(*(x.split(counts) for x in pair), strict=True), strict=True))
    logprobs, entropies = zip(*(scores[i] for i in range(len(rows))), strict=True)
    zeros = torch.zeros(mask.shape)
    return zeros.masked_scatter(mask, torch.cat(logprobs)), zeros.masked_scatter(mask, torch.cat(entropies))


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
    """What both parts of J add to H, by the tabular theory to first order; shares of right samples.

    `other` ones are right, and differ from the most frequent right ordinary sample of their prompt."""
    parts, right = table.weights * table.advantages * mean_changes(samples), rewards == 1
    texts: dict[int, Counter] = {}
    for i in range(N):
        if right[i]:
            texts.setdefault(int(prompt[i]), Counter())[samples.texts[i]] += 1
    usual = {p: counter.most_common(1)[0][0] for p, counter in texts.items()}
    other = [bool(r) and usual.get(int(p), t) != t for t, p, r in zip(samples.texts, prompt, right, strict=True)]
    other = torch.tensor(other).float()
    row = {"grpo_first": parts[:N].sum().item(), "other": other[:N].mean().item()}
    if len(rewards) > N:
        row |= {"scope_first": parts[N:].sum().item(), "aux_right": right[N:].float().mean().item()}
        row |= {"aux_other": other[N:].mean().item()}
    return row


# --- Running
class Changed(experiments.Variant):
    """SCOPE with changes: `top_k=K` (see NotingSampler), `positives`, the mean over positives only, and
    `ahead=N`, the rule on where H will be N steps on, by a smoothed H and its slope (Holt's)."""

    def __init__(self, changes: str) -> None:
        pairs = (change.partition("=") for change in changes.split(",") if change)
        self.changes = {name: int(value or 1) for name, _, value in pairs}

    def scope_temperature(self, entropy, integral, **limits):
        ahead = self.changes.get("ahead")
        if ahead is None:
            return super().scope_temperature(entropy, integral, **limits)
        level, slope = integral or (entropy, 0.0)  # in the integral's place, where checkpoints hold it
        smoothed = 0.5 * (level + slope) + 0.5 * entropy
        slope += 0.3 * (smoothed - level - slope)
        return super().scope_temperature(smoothed + ahead * slope, 0.0, **limits)[0], (smoothed, slope)

    def change(self, table, rewards, auxiliary, alpha):
        if "positives" in self.changes:
            experiments.MeanOverPositives().change(table, rewards, auxiliary, alpha)


def one_run(model: str, label: str, seed: int, save: Path | None = None) -> dict:
    """Train with a label's options, and return the row."""
    words = EXPERIMENT[label].split()
    variant = Changed(words.pop(0)[1:] if words[0].startswith("@") else "")
    folder, notes, last = WORK / f"{[*EXPERIMENT].index(label)}-{seed}", [], {}
    shutil.rmtree(folder, ignore_errors=True)
    own = ["--model", model, "--seed", str(seed), "--output_dir", str(folder)]

    def objective_table(rewards, auxiliary, *rest):
        last.update(rewards=torch.cat([rewards.flatten(), auxiliary]), N=rewards.numel())
        return variant.objective_table(rewards, auxiliary, *rest)

    def update(run, samples, prompt, table):
        notes.append(note(samples, table, last["rewards"], prompt, last["N"]))
        return UPDATE(run, samples, prompt, table)

    sampler = type("Sampler", (NotingSampler,), {"top_k": variant.changes.get("top_k", 0)})
    with (
        mock.patch.multiple(scope_rl, objective_table=objective_table, scope_temperature=variant.scope_temperature),
        mock.patch.multiple(rollout, Sampler=sampler, score=score),
        mock.patch.object(train, "update", update),
    ):
        run = train.set_up(train.parse_config([*COMMON.split(), *own, *words]))
        train.train(run)
    if save:
        shutil.copytree(folder / "model", save)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [step | noted for step, noted in zip(steps, notes, strict=True)]
    row = {"label": label, "options": EXPERIMENT[label], "seed": seed, "target": run.config.scope_target_entropy}
    shutil.rmtree(folder)
    return row | {name: [round(step[name], 4) for step in steps] for name in KEPT if name in steps[0]}


UPDATE = train.update
KEPT = (
    "reward", "entropy", "scope_temperature", "completion_length", "truncated_frac", "grad_norm", "other",
    "aux_right", "aux_other", "grpo_first", "scope_first",
)  # fmt: skip


# --- What a policy's gradients do to its entropy
def probe(model: str, seed: int) -> None:
    """Print, for GRPO's gradient and for that of positives drawn at T, dH / d eta on the contexts of the
    prompts sampled and on those of 8 others, and the tabular prediction; each is per unit of eta."""
    options = f"{COMMON} --model {model} --output_dir {WORK / 'none'} --per_device_train_batch_size 64"
    run = train.set_up(train.parse_config(options.split()))
    shutil.rmtree(WORK / "none")
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


def table() -> str:
    """A line a row: the entropy of the first, the lowest and the last steps, and means of the last eight."""
    lines = []
    for row in map(json.loads, ROWS.read_text().splitlines()):
        H = row["entropy"]
        names = ("entropy", "scope_temperature", "reward", "other", "aux_right", "aux_other")
        means = [f"{np.mean(row[name][-8:]):.2f}" if name in row else "" for name in names]
        lines.append([row["label"], row["seed"], len(H), f"{H[0]:.2f}", f"{min(H):.2f}", *means])
    header = ["run", "seed", "steps", "H, first", "lowest", "last 8"]
    header += ["T", "reward", "other", "hot, right", "hot, other"]
    return report.markdown(header, lines)


def main() -> None:
    """One run, or the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help="the pretrained model, or the collapsed one; none: print the table")
    parser.add_argument("label", nargs="?", choices=EXPERIMENT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="a new folder for the policy at the end")
    parser.add_argument("--probe", action="store_true", help="of the model's gradients, instead of a run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.probe:
        return probe(args.model, args.seed)
    if args.label is None:
        return print(table(), end="")
    row = one_run(args.model, args.label, args.seed, args.save)
    with open(ROWS, "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
