"""What moves the entropy in real training?  `python theory/closed_loop.py OUTPUT_DIR [--steps 60] [train.py's options]`

Goes on with a run of train.py from its checkpoint (in a copy: the folder stays as it is), and takes apart what each
step does to the mean token entropy H. With theta the weights, Delta the step's real change of them (all its gradient
steps, AdamW, momentum), and H(theta) on contexts that the policy visits before the step,

    first       <dH/dtheta, Delta>                                    what a vanishingly small step would do
    curvature   [H(theta + Delta) + H(theta - Delta)] / 2 - H(theta)  second order, 1/2 Delta' H'' Delta, and 4th, ...
    fixed       H(theta + Delta) - H(theta)                           first, curvature, and the odd rest
    visiting    H of the new policy on contexts it visits itself, minus H(theta), minus fixed

`visiting` weighs the old samples with pi_new(o) / pi_old(o), so all columns are paired and their noise is small. With
--save it also writes the policy of the *mean* weights over those steps, which is where the run is but for the noise of
its last steps: a model for asymmetry.py.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import rollout
import train

SAMPLES = 2048


@torch.no_grad()
def entropies(
    run: train.Run, samples: rollout.Rollout, old: torch.Tensor | None
) -> tuple[torch.Tensor, np.ndarray]:
    """Log-probabilities of whole completions `[B]`, and H in nats: on their contexts, and on the policy's own."""
    logprobs, token_entropies = (x.double() for x in train.score_all(run, samples))  # [B, T]
    total, length = (
        token_entropies.sum(1),
        samples.completion_mask.sum(1),
    )  # score's values are 0 outside the mask
    ratio = torch.ones_like(total) if old is None else (logprobs.sum(1) - old).exp()  # [B]
    means = [
        (total.sum() / length.sum()).item(),
        ((ratio * total).sum() / (ratio * length).sum()).item(),
    ]
    return logprobs.sum(1), np.array(means)


def entropy_gradient(run: train.Run, samples: rollout.Rollout) -> torch.Tensor:
    """dH / dtheta on the contexts of the samples, of all parameters in a row."""
    tokens = samples.completion_mask.sum()
    for rows in torch.arange(len(samples.texts), device=tokens.device).split(
        run.config.per_device_train_batch_size
    ):
        (rollout.score(run.model, samples, rows)[1].sum() / tokens).backward()
    gradient = torch.cat([p.grad.flatten() for p in run.model.parameters()])
    run.optimizer.zero_grad()
    return gradient


def one_step(run: train.Run) -> dict[str, float]:
    """Train one step; return the parts of its entropy change, in nats, and H and T before it."""
    problems = [run.task.train[i % len(run.task.train)] for i in range(SAMPLES)]
    torch.manual_seed(run.step)
    samples, _ = train.sample(run, problems, torch.ones(SAMPLES))
    old, (H, _) = entropies(run, samples, None)
    gradient, parameters = entropy_gradient(run, samples), list(run.model.parameters())
    theta = torch.nn.utils.parameters_to_vector(parameters).detach().clone()
    metrics, _ = train.train_step(run)
    new_theta = torch.nn.utils.parameters_to_vector(parameters).detach().clone()
    ends = {}
    for sign, point in {
        "-": 2 * theta - new_theta,
        "+": new_theta,
    }.items():  # the last puts the new weights in place
        torch.nn.utils.vector_to_parameters(point, parameters)
        ends[sign] = entropies(run, samples, old)[1] - H
    parts = {
        "first": (gradient.double() @ (new_theta - theta).double()).item(),
        "curvature": (ends["+"][0] + ends["-"][0]) / 2,
        "fixed": ends["+"][0],
        "visiting": ends["+"][1] - ends["+"][0],
    }
    return {"H": H, "T": metrics["scope_temperature"], **parts}


def main() -> None:
    """Copy the run, go on with it, print the parts as a mean a step ± 2 standard errors over the steps."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="Other options are train.py's."
    )
    parser.add_argument("output_dir", type=Path, help="of a run of train.py, with its checkpoint")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save", type=Path, help="write the model of the mean weights into this folder")
    args, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("config.json", "checkpoint.pt"):
            shutil.copy(args.output_dir / name, folder)
        run = train.set_up(train.parse_config(["--resume", "--output_dir", folder, *rest]))
    parameters, total, rows = list(run.model.parameters()), 0.0, []
    for _ in tqdm(range(args.steps)):
        rows.append(one_step(run))
        total = total + torch.nn.utils.parameters_to_vector(parameters).detach()
    values = np.array([list(row.values()) for row in rows])  # [steps, columns]
    errors = 2 * values.std(0, ddof=1) / args.steps**0.5
    cells = zip(rows[0], values.mean(0), errors, strict=True)
    print(f"entropy change a step, nats, over {args.steps} steps from step {run.step - args.steps}")
    print(", ".join(f"{name} {mean:+.5f} ± {error:.5f}" for name, mean, error in cells))
    if args.save:
        torch.nn.utils.vector_to_parameters(total / args.steps, parameters)
        run.model.save_pretrained(args.save)
        run.tokenizer.save_pretrained(args.save)


if __name__ == "__main__":
    main()
