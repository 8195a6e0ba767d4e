"""Two looks at what moves the entropy of a transformer.

    python theory/lab/probes.py asymmetry [--save POLICY] [train.py's options]
    python theory/lab/probes.py signs           of the rows kept: the table; is measured = k predicted?
    python theory/lab/probes.py closed_loop OUTPUT_DIR [--steps 60] [--label LABEL] [train.py's options]
    python theory/lab/probes.py loops           of the steps kept: the table

**asymmetry.** The theorem is about one softmax with free logits. Here a policy, a real network,
takes one small gradient step on a batch of its own samples, drawn at T, with one sign:

    positive:  theta + eta * grad  1/N sum_{i: R_i = 1} 1/|o_i| sum_t log pi(o_t)
    negative:  theta - eta * grad  1/N sum_{i: R_i = 0} 1/|o_i| sum_t log pi(o_t)

and its exact token entropy is measured before and after on fixed contexts: of held-out problems,
and of the problems trained on. Set beside it is what the tabular theory predicts, -+(g_a - gbar) of
each token sampled, with the same weights: exact if each context had logits of its own. As contexts
share weights, its scale means nothing, but its sign and its order can be compared.

**closed_loop.** Goes on with a run of train.py from its checkpoint (in a copy), and takes apart
what each step does to the mean token entropy H. With theta the weights, Delta the step's real
change of them (all its gradient steps, AdamW, momentum), and H(theta) on contexts that the policy
visits before the step,

    first       <dH/dtheta, Delta>                     what a vanishingly small step would do
    curvature   [H(theta + Delta) + H(theta - Delta)] / 2 - H(theta)     the even orders
    fixed       H(theta + Delta) - H(theta)            first, curvature, and the odd rest
    visiting    H of the new policy on contexts it visits itself, minus H(theta), minus fixed

`visiting` weighs the old samples by pi_new(o) / pi_old(o), so all columns are paired and their
noise is small. Steps of a run resemble their neighbours, so errors are Newey and West's. With --save
it also writes the policy of the *mean* weights over those steps, a model for `asymmetry`: it is where
the run is without the jitter of its last steps.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

import rollout
import train
from entropy import masked_mean
from intervals import markdown, newey_west
from reward import Problem

sys.path.append(str(train.THEORY))  # for the closed forms, beside the theory

import closed_forms as cf

SIGNS = Path(__file__).parent / "signs.jsonl"
LOOPS = Path(__file__).parent / "loops.jsonl"
TEMPERATURES = (0.6, 0.8, 1.0, 1.2, 1.4)
SAMPLES = 2048  # of the policy, for each step looked at


# --- What both need
def set_up(rest: list[str], resumed: Path | None = None, algorithm: str | None = None) -> train.Run:
    """A run of train.py with these options, in a temporary folder.

    A copy of `resumed` goes on, maybe with another algorithm, which train.py itself would refuse.
    """
    with tempfile.TemporaryDirectory() as folder:
        if resumed is not None:
            for name in ("checkpoint.pt", "metrics.jsonl"):
                shutil.copy(resumed / name, folder)
            config = json.loads((resumed / "config.json").read_text())
            config["algorithm"] = algorithm or config["algorithm"]
            (Path(folder) / "config.json").write_text(json.dumps(config))
            rest = ["--resume", *rest]
        run = train.set_up(train.parse_config([*rest, "--output_dir", folder]))
    if run.config.num_auxiliary == 0:
        run.rule.temperature = 1.0  # and not that of the run before
    return run


def draw(run: train.Run, problems: list[Problem], count: int, T: float) -> tuple[rollout.Rollout, Tensor]:
    """`count` samples at temperature T, going round the problems, and their rewards."""
    asked = [problems[i % len(problems)] for i in range(count)]
    prompts, temperatures = [run.prompts[problem.question] for problem in asked], torch.full((count,), T)
    length = run.config.max_completion_length
    samples = rollout.generate(run.model.eval(), run.tokenizer, prompts, temperatures, length)
    return samples, train.grade(run.task, asked, samples)


def weights_of(run: train.Run) -> Tensor:
    """All parameters in a row, a copy."""
    return parameters_to_vector(run.model.parameters()).detach().clone()


def take_gradient(run: train.Run) -> Tensor:
    """What is in .grad, in a row; leaves nothing there."""
    gradient = torch.cat([p.grad.flatten() for p in run.model.parameters()])
    run.optimizer.zero_grad()
    return gradient


def two_errors(values: np.ndarray) -> np.ndarray:
    """Two standard errors of the mean over rows, which are independent draws."""
    return 2 * values.std(0, ddof=min(1, len(values) - 1)) / len(values) ** 0.5


@torch.no_grad()
def score_all(run: train.Run, samples: rollout.Rollout) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies `[B, C]` of all samples under the present policy."""
    rows = torch.arange(len(samples.texts), device=run.model.device)
    micro_batches = rows.split(run.config.per_device_train_batch_size)
    scores = [rollout.score(run.model.eval(), samples, micro) for micro in micro_batches]
    logprobs, entropies = zip(*scores, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


# --- asymmetry
def mean_entropy(run: train.Run, samples: rollout.Rollout) -> float:
    """Mean token entropy in nats of the present policy on the contexts of given samples."""
    entropies = score_all(run, samples)[1]
    return masked_mean(entropies.double(), samples.completion_mask).item()


def direction(run: train.Run, samples: rollout.Rollout, weights: Tensor) -> tuple[Tensor, float]:
    """Gradient of sum_i w_i 1/|o_i| sum_t log pi(o_t), w `[B]`; and the tabular prediction."""
    predicted = 0.0
    for rows in weights.nonzero()[:, 0].split(run.config.per_device_train_batch_size):
        mask = samples.completion_mask[rows]  # [n, C]
        logprobs, _ = rollout.score(run.model, samples, rows)
        (weights[rows] * masked_mean(logprobs, mask, dim=1)).sum().backward()

        # The tabular theory's -(g_a - gbar) of each token a, from its logits.
        with torch.no_grad():
            states = rollout.states_of_whole_rows(run.model, samples, rows)  # [tokens, D]
            logits = run.model.get_output_embeddings()(states)  # [tokens, V]
        g, gbar = cf.sensitivity(logits.double())
        tokens = samples.completions[rows][mask]
        changes = gbar - g.gather(-1, tokens[:, None])[:, 0]  # [tokens]
        changes = torch.zeros(mask.shape, dtype=changes.dtype).masked_scatter(mask.cpu(), changes.cpu())
        predicted += (weights[rows].cpu() * masked_mean(changes, mask.cpu(), dim=1)).sum().item()
    return take_gradient(run), predicted


def measure(run: train.Run, seed: int, batch: int, norm: float) -> list[dict]:
    """A row a temperature and sign: measured and predicted entropy change, per unit of eta."""
    torch.manual_seed(seed)
    parameters, theta, rows = list(run.model.parameters()), weights_of(run), []
    contexts = {
        "held_out": draw(run, run.task.test, batch // 2, 1.0)[0],
        "training": draw(run, run.task.train, batch // 2, 1.0)[0],
    }
    for T in TEMPERATURES:
        samples, rewards = draw(run, run.task.train, batch, T)
        for sign, factor, chosen in (("positive", 1, rewards == 1), ("negative", -1, rewards == 0)):
            if not chosen.any():
                continue  # a policy that is always right at this temperature
            gradient, predicted = direction(run, samples, factor * chosen / batch)
            eta = norm / max(gradient.norm().item(), 1e-12)  # steps of one length
            ends = []
            for side in (1, -1):  # a central difference
                vector_to_parameters(theta + side * eta * gradient, parameters)
                ends.append([mean_entropy(run, samples) for samples in contexts.values()])
            vector_to_parameters(theta, parameters)
            changes = (np.array(ends[0]) - ends[1]) / (2 * eta)
            row = {"seed": seed, "temperature": T, "sign": sign}
            row["share"] = chosen.float().mean().item()
            row |= dict(zip(contexts, changes, strict=True))
            rows.append(row | {"predicted": predicted})
    return rows


def asymmetry(args: argparse.Namespace, rest: list[str]) -> None:
    """Measure with every seed, print the table."""
    run = set_up(rest)
    rows = [row for seed in range(args.seeds) for row in measure(run, seed, args.batch, args.norm)]
    if args.save:
        with open(SIGNS, "a") as file:
            file.writelines(json.dumps({"policy": args.save} | row) + "\n" for row in rows)
    print(f"dH / d eta, nats: mean ± 2 standard errors over {args.seeds} seeds, and the theory's")
    columns = ("share", "held_out", "training", "predicted")
    print("sign       T" + "".join(f"{name:>19}" for name in columns))
    kinds = {(row["sign"], row["temperature"]) for row in rows}
    for sign, T in sorted(kinds, key=lambda kind: (kind[0] == "negative", kind[1])):
        cell = [row for row in rows if (row["sign"], row["temperature"]) == (sign, T)]
        values = np.array([[row[name] for name in columns] for row in cell])  # [seeds, columns]
        pairs = zip(values.mean(0), two_errors(values), strict=True)
        print(f"{sign:<9} {T}" + "".join(f"{mean:>+10.4f} ± {error:.4f}" for mean, error in pairs))


def one_factor(rows: list[dict], column: str) -> tuple[float, float, int]:
    """The factor k that fits measured = k predicted best over the cells of a policy.

    A cell is a sign and a temperature. Also chi^2, the squared misses over their squared standard
    errors, and its degrees of freedom. Cells of fewer than eight draws, whose errors are hardly known,
    do not count.
    """
    cells: dict[tuple, list] = {}
    for row in rows:
        cells.setdefault((row["sign"], row["temperature"]), []).append((row[column], row["predicted"]))
    values = [np.array(cell) for cell in cells.values() if len(cell) >= 8]  # [draws, 2] each
    measured, predicted = np.array([cell.mean(0) for cell in values]).T  # [cells] each
    weight = 4 / np.array([two_errors(cell[:, 0]) for cell in values]) ** 2
    k = (weight * measured * predicted).sum() / (weight * predicted**2).sum()
    return k, (weight * (measured - k * predicted) ** 2).sum(), len(values) - 1


def read_signs() -> dict[str, list[dict]]:
    """The rows of signs.jsonl by policy."""
    policies: dict[str, list[dict]] = {}
    for row in map(json.loads, SIGNS.read_text().splitlines()):
        policies.setdefault(row["policy"], []).append(row)
    return policies


def contexts_shown(policy: str) -> str:
    """Where the change is shown: a policy that was trained has lost its entropy on the training problems."""
    return "held_out" if policy == "warm-start" else "training"


def factor_table() -> str:
    """The fit of each policy of signs.jsonl."""
    lines = []
    for policy, rows in read_signs().items():
        k, chi2, freedom = one_factor(rows, contexts_shown(policy))
        lines.append([policy, f"{k:.1f}", f"{chi2:.0f}", freedom])
    return markdown(["policy", "measured / predicted", "chi^2", "degrees of freedom"], lines)


def sign_table() -> str:
    """dH / d eta in nats: measured, mean ± 2 standard errors over eight draws, and predicted."""
    policies = read_signs()
    lines = []
    for sign in ("positive", "negative"):
        for T in TEMPERATURES:
            line = [f"{sign}, {T}"]
            for policy, rows in policies.items():
                cell = [row for row in rows if (row["sign"], row["temperature"]) == (sign, T)]
                if len(cell) < 8:
                    line.append(f"({len(cell)} of 8 draws)")
                    continue
                measured = np.array([row[contexts_shown(policy)] for row in cell])
                predicted = np.mean([row["predicted"] for row in cell])
                line.append(f"{measured.mean():+.3f} ± {two_errors(measured):.3f}, {predicted:+.4f}")
            lines.append(line)
    return markdown(["sign, T", *policies], lines)


# --- closed_loop
@torch.no_grad()
def entropies(run: train.Run, samples: rollout.Rollout, old: Tensor | None) -> tuple[Tensor, np.ndarray]:
    """Log-probabilities of whole completions `[B]`; H on their contexts and on the policy's own.

    `old` is what they were for the policy that sampled; None if it still is that.
    """
    logprobs, token_entropies = (x.double() for x in score_all(run, samples))  # [B, C]
    total, length = token_entropies.sum(1), samples.completion_mask.sum(1)  # [B]
    ratio = torch.ones_like(total) if old is None else (logprobs.sum(1) - old).exp()  # [B]
    fixed = total.sum() / length.sum()
    visited = (ratio * total).sum() / (ratio * length).sum()
    return logprobs.sum(1), np.array([fixed.item(), visited.item()])


def entropy_gradient(run: train.Run, samples: rollout.Rollout) -> Tensor:
    """dH / dtheta on the contexts of the samples."""
    tokens = samples.completion_mask.sum()
    rows = torch.arange(len(samples.texts), device=tokens.device)
    for micro in rows.split(run.config.per_device_train_batch_size):
        (rollout.score(run.model, samples, micro)[1].sum() / tokens).backward()
    return take_gradient(run)


def one_step(run: train.Run) -> dict[str, float]:
    """Train one step; return the parts of its entropy change, in nats, and H and T before it."""
    torch.manual_seed(run.step)
    samples, _ = draw(run, run.task.train, SAMPLES, 1.0)
    old, (H, _) = entropies(run, samples, None)
    gradient, theta = entropy_gradient(run, samples), weights_of(run)
    metrics, _ = train.train_step(run)
    new_theta, ends = weights_of(run), {}
    for sign, point in (("-", 2 * theta - new_theta), ("+", new_theta)):  # the new weights stay
        vector_to_parameters(point, run.model.parameters())
        ends[sign] = entropies(run, samples, old)[1] - H
    return {
        "H": H,
        "T": metrics["scope_temperature"],
        "first": (gradient.double() @ (new_theta - theta).double()).item(),
        "curvature": (ends["+"][0] + ends["-"][0]) / 2,
        "fixed": ends["+"][0],
        "visiting": ends["+"][1] - ends["+"][0],
    }


def loop_table() -> str:
    """A line a run of closed_loop that was kept: H, T, and the parts in 1e-4 nats a step.

    The parts are means ± 2 standard errors.
    """
    lines, names = [], ("first", "curvature", "fixed", "visiting")
    for row in map(json.loads, LOOPS.read_text().splitlines()):
        steps = {name: np.array(values) for name, values in row["steps"].items()}
        parts = [f"{1e4 * steps[name].mean():+.1f} ± {2e4 * newey_west(steps[name]):.1f}" for name in names]
        line = [row["label"], len(steps["H"]), f"{steps['H'].mean():.3f}", f"{steps['T'].mean():.2f}"]
        lines.append([*line, *parts])
    return markdown(["goes on from; with", "steps", "H", "T", *names], lines)


def closed_loop(args: argparse.Namespace, rest: list[str]) -> None:
    """Go on with the run; print the parts as means a step, and keep them under a label."""
    run = set_up(rest, args.output_dir, args.algorithm)
    total, rows = 0.0, []
    for _ in tqdm(range(args.steps)):
        rows.append(one_step(run))
        total = total + weights_of(run)
    steps = {name: [round(row[name], 7) for row in rows] for name in rows[0]}
    print(f"entropy change a step in nats, mean ± 2 standard errors over {args.steps} steps")
    for name, values in steps.items():
        print(f"{name:<10} {np.mean(values):+.5f} ± {2 * newey_west(values):.5f}")
    if args.label:
        with open(LOOPS, "a") as file:
            file.write(json.dumps({"label": args.label, "steps": steps}) + "\n")
    if args.save:
        vector_to_parameters(total / args.steps, run.model.parameters())
        run.model.save_pretrained(args.save)
        run.tokenizer.save_pretrained(args.save)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    signs = commands.add_parser("asymmetry", epilog="Other options are train.py's.")
    signs.set_defaults(command=asymmetry)
    signs.add_argument("--seeds", type=int, default=8)
    signs.add_argument("--batch", type=int, default=SAMPLES, help="samples; half as many contexts")
    signs.add_argument("--norm", type=float, default=1e-2, help="length of the step in the weights")
    signs.add_argument("--save", metavar="POLICY", help="append the rows to signs.jsonl")
    commands.add_parser("signs").set_defaults(
        command=lambda *_: print(sign_table(), factor_table(), sep="\n")
    )
    commands.add_parser("loops").set_defaults(command=lambda *_: print(loop_table(), end=""))
    loop = commands.add_parser("closed_loop", epilog="Other options are train.py's.")
    loop.set_defaults(command=closed_loop)
    loop.add_argument("output_dir", type=Path, help="of a run of train.py, with its checkpoint")
    loop.add_argument("--steps", type=int, default=60)
    loop.add_argument("--algorithm", choices=("scope", "grpo"), help="another than the run's")
    loop.add_argument("--label", help="append the steps to loops.jsonl under it")
    loop.add_argument("--save", type=Path, help="a folder for the mean weights")
    args, rest = parser.parse_known_args()
    args.command(args, rest)


if __name__ == "__main__":
    main()
