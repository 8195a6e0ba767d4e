"""Does the temperature-sign asymmetry hold in a transformer?  `python theory/asymmetry.py [options, also train.py's]`

The theorem is about one softmax with free logits. Here one policy, a real network, takes one small gradient step on a
batch of its own samples, drawn at T, with one sign:

    positive:  theta + eta * grad  1/N sum_{i: R_i = 1} 1/|o_i| sum_t log pi(o_t)
    negative:  theta - eta * grad  1/N sum_{i: R_i = 0} 1/|o_i| sum_t log pi(o_t)

and its exact token entropy is measured before and after on fixed contexts: of held-out problems, and of the problems
trained on. Set beside it is what the tabular theory predicts, -+(g_a - gbar) of each token sampled, with the same
weights: exact if each context had logits of its own. Here they share weights, so its scale means nothing, but its sign
and its order can be compared. Prints a table over seeds, and appends the rows to a file with --save.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

import closed_forms as cf
import rollout
import train
from entropy import masked_mean

TEMPERATURES = (0.6, 0.8, 1.0, 1.2, 1.4)


def contexts(run: train.Run, problems: list, temperature: float) -> tuple[rollout.Rollout, torch.Tensor]:
    """Samples of the problems at the temperature, in one rollout, with their rewards."""
    samples, rewards = train.sample(run, problems, torch.full((len(problems),), temperature))
    return samples, torch.tensor(rewards, device=run.model.device)


@torch.no_grad()
def mean_entropy(run: train.Run, samples: rollout.Rollout) -> float:
    """Mean token entropy in nats of the present policy on the contexts of given samples."""
    entropies = train.score_all(run, samples)[1]
    return masked_mean(entropies.double(), samples.completion_mask).item()


def step_along(run: train.Run, samples: rollout.Rollout, weights: torch.Tensor) -> float:
    """Put the gradient of sum_i w_i 1/|o_i| sum_t log pi(o_t) into .grad, and return the tabular prediction."""
    predicted, head = 0.0, run.model.get_output_embeddings()
    seen: list[torch.Tensor] = []
    handle = head.register_forward_hook(lambda module, args, logits: seen.append(logits.detach()))
    for rows in weights.nonzero()[:, 0].split(run.config.per_device_train_batch_size):
        seen.clear()
        mask = samples.completion_mask[rows]
        logprobs, _ = rollout.score(run.model, samples, rows)
        g, gbar = cf.sensitivity(torch.cat(seen).double())  # of every token's distribution  [N, V], [N]
        tokens = samples.sequences[rows, -mask.shape[1] :][mask]
        change = torch.zeros(mask.shape, dtype=g.dtype, device=mask.device)
        change = change.masked_scatter(
            mask, gbar - g.gather(1, tokens[:, None])[:, 0]
        )  # -(g_a - gbar)  [n, T]
        predicted += (weights[rows] * masked_mean(change, mask, dim=1)).sum().item()
        (weights[rows] * masked_mean(logprobs, mask, dim=1)).sum().backward()
    handle.remove()
    return predicted


def measure(run: train.Run, seed: int, batch: int, norm: float) -> list[dict]:
    """One row per temperature and sign: measured and predicted entropy change, per unit of eta."""
    torch.manual_seed(seed)
    original, rows = copy.deepcopy(run.model.state_dict()), []
    held_out = [run.task.test[i % len(run.task.test)] for i in range(batch // 2)]
    problems = [run.task.train[i % len(run.task.train)] for i in range(batch)]
    probes = {
        "held_out": contexts(run, held_out, 1.0)[0],
        "training": contexts(run, problems[: batch // 2], 1.0)[0],
    }
    for temperature in TEMPERATURES:
        samples, rewards = contexts(run, problems, temperature)
        for sign, chosen in (("positive", rewards == 1), ("negative", rewards == 0)):
            if not chosen.any():
                continue  # a policy that is always right at this temperature has no negative samples
            direction = 1.0 if sign == "positive" else -1.0
            predicted = step_along(run, samples, direction * chosen / batch)
            gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
            length = torch.cat([g.flatten() for g in gradients]).norm().item()
            eta = norm / max(length, 1e-12)  # steps of one length, small enough to be first order
            ends = []
            for side in (1, -1):  # central difference
                with torch.no_grad():
                    for p in run.model.parameters():
                        if p.grad is not None:
                            p += side * eta * p.grad
                ends.append([mean_entropy(run, probe) for probe in probes.values()])
                run.model.load_state_dict(original)
            run.model.zero_grad()
            measured = dict(zip(probes, (np.array(ends[0]) - ends[1]) / (2 * eta), strict=True))
            rows.append({"seed": seed, "temperature": temperature, "sign": sign, "share": chosen.float().mean().item(),
                         **measured, "predicted": predicted})  # fmt: skip
    return rows


def main() -> None:
    """Load the policy, measure with every seed, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="Other options are train.py's."
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument(
        "--batch",
        type=int,
        default=2048,
        help="samples for each step; half as many held-out contexts",
    )
    parser.add_argument("--norm", type=float, default=1e-2, help="length of the step in parameter space")
    parser.add_argument("--save", type=Path, help="append the rows to this JSONL file")
    args, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        run = train.set_up(train.parse_config([*rest, "--output_dir", folder]))
    rows = [row for seed in range(args.seeds) for row in measure(run, seed, args.batch, args.norm)]
    if args.save:
        with open(args.save, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    print(
        f"dH / d eta, nats: mean ± 2 standard errors over {args.seeds} seeds; predicted: by the tabular theory"
    )
    columns = ("share", "held_out", "training", "predicted")
    print(f"{'sign':<9} {'T':>3} " + "".join(f"{name:>18}" for name in columns))
    for sign in ("positive", "negative"):
        for temperature in TEMPERATURES:
            cell = [row for row in rows if (row["sign"], row["temperature"]) == (sign, temperature)]
            if not cell:
                continue
            values = np.array([[row[name] for name in columns] for row in cell])  # [seeds, columns]
            errors = 2 * values.std(0, ddof=min(1, len(cell) - 1)) / len(cell) ** 0.5
            cells = zip(values.mean(0), errors, strict=True)
            print(
                f"{sign:<9} {temperature:>3} "
                + "".join(f"{mean:>+9.4f} ± {error:.4f}" for mean, error in cells)
            )


if __name__ == "__main__":
    main()
