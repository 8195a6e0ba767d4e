"""Is it right, does it fit, and does it work on a GPU?  In the order of their value:

    for part in right fits fast 24GB 16GB works; do python theory/lab/gpu.py $part OUT; done

    right         sampling against scoring, finite gradients, a step here against a step on the CPU
    fits          the preset qwen3-0.6b: seconds, and peak memory beside benchmark.py's calculation
    fast          sampling with CUDA graphs (graphs.py) against sampling without
    24GB, 16GB    the same as fits in so much memory
    works         the preset tiny, and a pretrained model with SCOPE and with GRPO: their curves

TRL's step beside ours is measured by `python theory/tools/benchmark.py speed --peer --preset qwen3-0.6b`.

A part prints each figure, and writes it to OUT/PART.json at once. It exits with 1 if a check failed. With
--toy all is small enough for a CPU, and what depends on size or speed is measured but not checked. A
model's folder that has a config and a tokenizer, but no weights, is given random ones: they are as fast.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers

import graphs
import rollout
import train

sys.path.append(str(train.THEORY / "tools"))
import benchmark

LONG = "1+" * 75  # makes prompts as long as GSM8K's
QWEN = f"--preset qwen3-0.6b --task {train.COUNTDOWN} --instruction {LONG} --num_eval_problems 0"
SMOLLM = "--preset laptop --generation_batch_size 512 --num_generations 8 --num_mini_batches 4 "
SMOLLM += "--learning_rate 5e-6 --max_steps 60 --bf16 true --per_device_train_batch_size 64"
TOY = "--instruction = --generation_batch_size 16 --num_generations 4 --max_completion_length 6 "
TOY += "--max_steps 5 --num_eval_problems 2 --num_eval_generations 4 --per_device_train_batch_size 8"
HAS_GPU = torch.cuda.is_available()


class Report:
    """The figures of a part, in a file that is whole after each of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.figures, self.failed = args, {}, []
        device = torch.cuda.get_device_name() if HAS_GPU else "CPU"
        self.on = f"{device}, torch {torch.__version__}, transformers {transformers.__version__}"

    def note(self, name: str, value: float | str, at_most: float = np.inf, of_size: bool = False) -> None:
        """Print and write a figure. It fails above `at_most`, except a toy's if it is one `of_size`."""
        is_checked = at_most < np.inf and not (of_size and self.args.toy)
        if is_checked and not value <= at_most:  # nor may it be NaN
            self.failed.append(name)
        print(f"{name:<60} {value:<10.5g} {'FAILS' if name in self.failed else ''}", flush=True)
        self.figures[name] = float(value)
        content = {"on": self.on, "failed": self.failed, "figures": self.figures}
        path = self.args.out / f"{self.args.part}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")

    def config(self, options: str, model: str) -> train.Config:
        """A config of train.py, for a new folder. A toy's is smaller."""
        if self.args.toy:
            options += f" {TOY}"
        folder = tempfile.mkdtemp()
        return train.parse_config([*options.split(), "--model", model, "--output_dir", folder])


# --- Right
def right(report: Report) -> None:
    """Sampling against scoring in float32 and in bfloat16, and a step here against one on the CPU."""
    for bf16, at_most in (("false", 1e-4), ("true", 0.05)):
        options = f"{QWEN} --generation_batch_size 32 --max_completion_length 64 --bf16 {bf16}"
        run = train.set_up(report.config(options, report.args.qwen))
        torch.set_float32_matmul_precision("highest")
        compare_with_scores(report, f"bf16 {bf16}", run, at_most)
    compare_with_cpu(report)


def compare_with_scores(report: Report, name: str, run: train.Run, at_most: float) -> None:
    """log p and H as noted in sampling against `score`, and whether each gradient is finite."""
    # Completions of a step's prompts. Each fourth is drawn hot. They are cut to 1, 2, 3 and more tokens.
    model, G, size = run.model, run.config.num_generations, run.config.per_device_train_batch_size
    prompts = [run.prompts[problem.question] for problem in train.problems_of_step(run) for _ in range(G)]
    temperatures = torch.ones(len(prompts))
    temperatures[::4] = 1.5
    length = run.config.max_completion_length
    samples = run.generate(model.eval(), run.tokenizer, prompts, temperatures, length)
    rows, places = torch.arange(len(prompts)), torch.arange(samples.completions.shape[1])
    within = places < 1 + rows[:, None] % len(places)  # [B, C]
    mask = samples.completion_mask & within.to(model.device)
    samples = replace(samples, completion_mask=mask)

    def broken_gradients(loss: torch.Tensor) -> int:
        loss.backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        model.zero_grad()
        return sum(not gradient.isfinite().all() for gradient in gradients)

    distances, broken, rows = [], 0, rows.to(model.device)
    for micro in rollout.micro_batches(model.train(), samples, rows, size):
        logprobs, entropies = rollout.score(model, samples, micro)
        both = torch.stack([logprobs - samples.logprobs[micro], entropies - samples.entropies[micro]])
        distances.append(both[:, mask[micro]].abs().detach())  # [2, tokens]
        broken += broken_gradients((logprobs + entropies).sum())
    for quantity, distance in zip(("log p", "H"), torch.cat(distances, 1), strict=True):
        report.note(f"{name}, {quantity}: mean distance, nats", distance.mean(), at_most)
        report.note(f"{name}, {quantity}: largest distance, nats", distance.max())
    report.note(f"{name}: gradients that are not finite", broken, at_most=0)

    # On a GPU the core does not read shared prompts once. Would that be right? (Not with checkpointing.)
    if not model.is_gradient_checkpointing:
        states = rollout.states_after_shared_prompts(model, samples, rows)
        distance = (states - rollout.states_of_whole_rows(model, samples, rows)).abs().max()
        report.note(f"{name}, shared prompts: largest distance of states", distance.item())
        broken = broken_gradients(states.sum())
        report.note(f"{name}, shared prompts: gradients that are not finite", broken)


def compare_with_cpu(report: Report) -> None:
    """A step here and a step on the CPU from the same weights, with the same samples, in float32."""
    kept, steps = [], []

    def same_samples(*given) -> rollout.Rollout:
        if not kept:
            kept.append(rollout.generate(*given))
            return kept[0]
        tensors = {name: x.cpu() for name, x in vars(kept[0]).items() if isinstance(x, torch.Tensor)}
        return replace(kept[0], **tensors)

    for device in ("cuda" if HAS_GPU else "cpu", "cpu"):
        ours = benchmark.Ours(report.config("--preset laptop", report.args.smollm))
        torch.set_float32_matmul_precision("highest")
        ours.run.model.to(device)
        ours.run.generate = same_samples
        ours.step()
        steps += ours.steps
    for name in ("entropy", "loss", "grad_norm"):
        here, there = (step[name] for step in steps)
        distance = abs(here - there) / max(abs(there), 0.01)
        report.note(f"a step here and on the CPU, {name}: relative distance", distance, at_most=1e-3)


# --- Fits
def fits(report: Report) -> None:
    """Steps of SCOPE and of GRPO at the preset's own size."""
    scope = measure_steps(report, "SCOPE")
    grpo = measure_steps(report, "GRPO", "--algorithm grpo")
    report.note("SCOPE's step / GRPO's step", scope / grpo, 1.05, of_size=True)


def measure_steps(report: Report, name: str, options: str = "", gigabytes: float = 0) -> float:
    """Median seconds of steps in which every completion teaches; peaks of memory, under a limit if given."""
    if HAS_GPU and gigabytes > 0:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total)
    config = report.config(f"{QWEN} {options}", report.args.qwen)
    ours = benchmark.Ours(config)

    # A short step comes first, which loads kernels.
    length, config.max_completion_length = config.max_completion_length, 4
    ours.step()
    config.max_completion_length = length
    ours.step()
    ours.step()
    for key in ("step_seconds", "rollout_seconds", "completion_length", "taught"):
        report.note(f"{name}: {key}", np.median([step[key] for step in ours.steps[1:]]))

    # Peaks of memory, in GB, beside those that are calculated.
    prompts = ours.run.tokenizer(list(ours.run.prompts.values())).input_ids
    calculated = benchmark.memory(config, max(len(ids) for ids in prompts))
    for phase in ("peak while sampling", "peak while updating"):
        peak = max(step[phase] for step in ours.steps[1:])
        error = abs(peak / calculated[phase] - 1)
        report.note(f"{name}: {phase}", peak)
        report.note(f"{name}: {phase}, relative error of its calculation", error, 0.15, of_size=True)
    return report.figures[f"{name}: step_seconds"]


def fast(report: Report) -> None:
    """Sampling with and without CUDA graphs: the same tokens in float32, and half the time in bfloat16."""
    plain = rollout.decode
    for bf16, sizes in (("false", "--generation_batch_size 16 --max_completion_length 64"), ("true", "")):
        run = train.set_up(report.config(f"{QWEN} {sizes} --bf16 {bf16}", report.args.qwen))
        B, C = run.config.generation_batch_size, run.config.max_completion_length
        prompts = [*run.prompts.values()][:B]
        uniforms, samples = torch.rand(B, C, dtype=torch.float64), []
        for decode in (plain, graphs.decode):
            rollout.decode = decode
            for length in (4, C):  # a short call comes first, which loads kernels
                chosen = run.generate(run.model, run.tokenizer, prompts, torch.ones(B), length, uniforms)
            samples.append(chosen)
        rollout.decode = plain
        if bf16 == "false":
            equal = samples[0].texts == samples[1].texts
            report.note("bf16 false: graphs' tokens are others", 0.0 if equal else 1.0, at_most=0)
        ratio = samples[1].seconds / samples[0].seconds
        report.note(f"bf16 {bf16}: seconds without", samples[0].seconds)
        report.note(f"bf16 {bf16}: seconds with / without", ratio, 0.5 if bf16 == "true" else np.inf, True)


# --- Works
def works(report: Report) -> None:
    """Whole runs. Their metrics are kept in OUT; noted are H and the reward, and how soon they are there."""
    control(report, "tiny", "--preset tiny", train.START)
    control(report, "pretrained, SCOPE", SMOLLM, report.args.smollm)
    control(report, "pretrained, GRPO", f"{SMOLLM} --algorithm grpo", report.args.smollm)


def control(report: Report, name: str, options: str, model: str) -> None:
    """A run: SCOPE's H must end within 10% of its target, and GRPO's below a quarter of its start."""
    run = train.set_up(report.config(options, model))
    train.train(run)
    lines = (run.output / "metrics.jsonl").read_text()
    (report.args.out / f"{name}.jsonl").write_text(lines)
    steps = [json.loads(line) for line in lines.splitlines()]
    columns = [[step[key] for step in steps] for key in ("entropy", "reward", "step_seconds")]
    H, reward, seconds = np.array(columns)  # [steps] each
    target, last = run.config.scope_target_entropy, slice(-(len(steps) // 5), None)
    if run.config.algorithm == "scope":
        error = abs(H[last].mean() / target - 1)
        report.note(f"{name}: relative distance of H from {target}", error, 0.1, of_size=True)
        arrived = (np.abs(H / target - 1) < 0.1) & (reward >= 0.9)
        took = seconds[: arrived.argmax() + 1].sum() if arrived.any() else np.inf
        report.note(f"{name}: seconds to a reward of .9 within a tenth of the target", took)
    else:
        report.note(f"{name}: H at the end / at first", H[last].mean() / H[0], 0.25, of_size=True)
    report.note(f"{name}: reward at the end", reward[last].mean())
    report.note(f"{name}: seconds a step", np.median(seconds))


PARTS = {
    "right": right,
    "fits": fits,
    "fast": fast,
    "24GB": lambda report: measure_steps(report, "24 GB", gigabytes=24),
    "16GB": lambda report: measure_steps(report, "16 GB", "--generation_batch_size 64", gigabytes=16),
    "works": works,
}


def main(argv: list[str]) -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("out", type=Path, help="folder for what is measured")
    parser.add_argument("--qwen", default="Qwen/Qwen3-0.6B", help="folder, or name on the hub")
    parser.add_argument("--smollm", default=train.SMOLLM2, help="folder, or name on the hub")
    parser.add_argument("--toy", action="store_true", help="small sizes, for a CPU")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in (args.qwen, args.smollm):
        if Path(name).is_dir() and not list(Path(name).glob("*.safetensors")):
            shape = transformers.AutoConfig.from_pretrained(name)
            transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(name)
    report = Report(args)
    print(f"{args.part}, on {report.on}")
    PARTS[args.part](report)
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
