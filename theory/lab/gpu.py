"""Is it right, does it fit, and does it work on a GPU?  In the order of their value:

    for part in right fits fast 24GB 16GB works; do python theory/lab/gpu.py $part OUT; done

    right         sampling against scoring, finite gradients, a step here against a step on the CPU
    fits          the preset qwen3-0.6b: seconds, and peak memory beside benchmark.py's calculation
    fast          sampling with CUDA graphs (graphs.py) against sampling without
    24GB, 16GB    the same as fits in so much memory
    works         the preset tiny, and a pretrained model with SCOPE and with GRPO: their curves

TRL's step beside ours: `python theory/tools/benchmark.py speed --peer --preset qwen3-0.6b`.

A part prints each figure, and writes it to OUT/PART.json at once. It exits with 1 if a check failed. With
--toy all is small enough for a CPU, and what depends on size or speed is measured but not checked. Where a
model's folder has a config and a tokenizer but no weights, random ones are taken, in a copy. They need the
same memory, and nearly all their completions are of the greatest length. OUT/PART.json says so.
"""

import argparse
import gc
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
AT_MOST = {"false": 1e-4, "true": 0.05}  # by bf16: nats between sampled and scored log p, in the mean
HAS_GPU = torch.cuda.is_available()


class Report:
    """The figures of a part, in a file that is whole after each of them."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.figures: dict[str, float] = {}
        self.failed: list[str] = []
        self.random: list[str] = []  # models without trained weights
        self.is_finished = False
        self.qwen, self.smollm = self.with_weights(args.qwen), self.with_weights(args.smollm)
        device = torch.cuda.get_device_name() if HAS_GPU else "CPU"
        self.on = f"{device}, torch {torch.__version__}, transformers {transformers.__version__}"
        self.write()

    def with_weights(self, model: str) -> str:
        """The model, or a copy of its folder with random weights if it has none."""
        folder = Path(model)
        files = [file for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern)]
        if not folder.is_dir() or files:
            return model
        self.random.append(model)
        copy = tempfile.mkdtemp(dir=self.work)
        transformers.AutoTokenizer.from_pretrained(model).save_pretrained(copy)
        shape = transformers.AutoConfig.from_pretrained(model)
        transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(copy)
        return copy

    def note(self, name: str, value: float, at_most: float = np.inf, of_size: bool = False) -> None:
        """Print and write a figure. It fails above `at_most`, except a toy's if it is one `of_size`."""
        is_checked = at_most < np.inf and not (of_size and self.args.toy)
        if is_checked and not value <= at_most:  # nor may it be NaN
            self.failed.append(name)
        print(f"{name:<60} {value:<10.5g} {'FAILS' if name in self.failed else ''}", flush=True)
        self.figures[name] = float(value)
        self.write()

    def write(self) -> None:
        """Write what is known so far."""
        content = {"on": self.on, "random weights": self.random, "finished": self.is_finished}
        content |= {"failed": self.failed, "figures": self.figures}
        path = self.args.out / f"{self.args.part}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")

    def config(self, options: str, model: str) -> train.Config:
        """A config of train.py, for a new folder. A toy's is smaller."""
        if self.args.toy:
            options += f" {TOY}"
        folder = tempfile.mkdtemp(dir=self.work)
        return train.parse_config([*options.split(), "--model", model, "--output_dir", folder])


def set_up(report: Report, options: str, bf16: str) -> train.Run:
    """A run of the preset. In float32 it computes without TF32."""
    run = train.set_up(report.config(f"{QWEN} {options} --bf16 {bf16}", report.qwen))
    if bf16 == "false":
        torch.set_float32_matmul_precision("highest")
    return run


# --- Right
def right(report: Report) -> None:
    """Sampling against scoring in float32 and in bfloat16, and a step here against one on the CPU."""
    for bf16, at_most in AT_MOST.items():
        run = set_up(report, "--generation_batch_size 32 --max_completion_length 64", bf16)
        compare_with_scores(report, f"bf16 {bf16}", run, samples_of_all_lengths(run), at_most)
    compare_with_cpu(report)


def samples_of_all_lengths(run: train.Run) -> rollout.Rollout:
    """Completions of a step's prompts, cut to 1, 2, 3 and more tokens. Each fourth is drawn hot."""
    model, G = run.model, run.config.num_generations
    prompts = [run.prompts[problem.question] for problem in train.problems_of_step(run) for _ in range(G)]
    temperatures = torch.ones(len(prompts))
    temperatures[::4] = 1.5
    length = run.config.max_completion_length
    samples = run.generate(model.eval(), run.tokenizer, prompts, temperatures, length)
    rows, places = torch.arange(len(prompts)), torch.arange(samples.completions.shape[1])
    within = places < 1 + rows[:, None] % len(places)  # [B, C]
    return replace(samples, completion_mask=samples.completion_mask & within.to(model.device))


def compare_with_scores(report: Report, name: str, run: train.Run, samples, at_most: float) -> None:
    """log p and H as noted in sampling against `score`, and whether each gradient is finite."""
    model, mask, size = run.model, samples.completion_mask, run.config.per_device_train_batch_size
    rows = torch.arange(len(mask), device=model.device)
    distances, broken = [], 0
    for micro in rollout.micro_batches(model.train(), samples, rows, size):
        logprobs, entropies = rollout.score(model, samples, micro)
        both = torch.stack([logprobs - samples.logprobs[micro], entropies - samples.entropies[micro]])
        distances.append(both[:, mask[micro]].abs().detach())  # [2, tokens]
        (logprobs + entropies).sum().backward()
        for weight in model.parameters():
            broken += weight.grad is None or not bool(weight.grad.isfinite().all())
        model.zero_grad()
    for quantity, distance in zip(("log p", "H"), torch.cat(distances, 1), strict=True):
        report.note(f"{name}, {quantity}: mean distance, nats", distance.mean(), at_most)
        report.note(f"{name}, {quantity}: largest distance, nats", distance.max())
    report.note(f"{name}: gradients that are missing or not finite", broken, at_most=0)


def compare_with_cpu(report: Report) -> None:
    """A step here and a step on the CPU, from the same weights and samples: how far do weights move?

    In float32, and with plain gradient descent, since AdamW's first step keeps only signs.
    """
    kept, moves = [], []

    def same_samples(*given) -> rollout.Rollout:
        if not kept:
            kept.append(rollout.generate(*given))
            return kept[0]
        tensors = {name: x.cpu() for name, x in vars(kept[0]).items() if isinstance(x, torch.Tensor)}
        return replace(kept[0], **tensors)

    for device in ("cuda" if HAS_GPU else "cpu", "cpu"):
        run = benchmark.Ours(report.config("--preset laptop --learning_rate 1", report.smollm)).run
        torch.set_float32_matmul_precision("highest")
        run.model.to(device)
        run.generate = same_samples
        run.optimizer = torch.optim.SGD(run.model.parameters())
        before = torch.nn.utils.parameters_to_vector(run.model.parameters()).detach().cpu()
        train.train_step(run)
        after = torch.nn.utils.parameters_to_vector(run.model.parameters()).detach().cpu()
        moves.append(after - before)
    here, there = moves
    report.note("a step here: how far the weights move", here.norm())
    report.note("distance from a step on the CPU, relative", (here - there).norm() / there.norm(), 1e-3)


# --- Fits
def fits(report: Report) -> None:
    """Steps of SCOPE and of GRPO at the preset's own size."""
    scope = measure_steps(report, "SCOPE")
    grpo = measure_steps(report, "GRPO", "--algorithm grpo")
    report.note("SCOPE's step / GRPO's step", scope / grpo, 1.05, of_size=True)


def measure_steps(report: Report, name: str, options: str = "", gigabytes: float = 0) -> float:
    """Seconds of a step in which every completion teaches, the best of two; peaks, under a limit if given."""
    if HAS_GPU and gigabytes > 0:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total)
    gc.collect()  # a run before this one, which holds itself
    torch.cuda.empty_cache()
    config = report.config(f"{QWEN} {options}", report.qwen)
    ours = benchmark.Ours(config)
    for _ in range(3):  # the first loads kernels and is not measured
        ours.step()
    for key in ("step_seconds", "rollout_seconds", "completion_length", "taught"):
        report.note(f"{name}: {key}", min(step[key] for step in ours.steps[1:]))
    if HAS_GPU:
        stats = torch.cuda.memory_stats()
        report.note(f"{name}: memory reserved in the end, GB", stats["reserved_bytes.all.current"] / 1e9)
        report.note(f"{name}: retries of the allocator", stats["num_alloc_retries"])

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
    """Sampling with CUDA graphs and without: are its log p those of `score`, and how fast is it?"""
    plain = rollout.decode
    for bf16, at_most in AT_MOST.items():
        run = set_up(report, "", bf16)
        B, C = run.config.generation_batch_size, run.config.max_completion_length
        C = 64 if bf16 == "false" else C
        prompts, T = [*run.prompts.values()][:B], torch.ones(B)
        uniforms, sampled = torch.rand(B, C, dtype=torch.float64), []
        for decode in (plain, graphs.decode):
            rollout.decode = decode
            for length in (4, C):  # the short call loads kernels
                own = uniforms[:, :length]
                samples = rollout.generate(run.model.eval(), run.tokenizer, prompts, T, length, own)
            sampled.append(samples)
        rollout.decode = plain

        compare_with_scores(report, f"bf16 {bf16}, with graphs", run, samples, at_most)
        equal = np.mean([one == other for one, other in zip(*(both.texts for both in sampled), strict=True)])
        report.note(f"bf16 {bf16}: share of equal texts (rounding can turn a draw)", equal)
        report.note(f"bf16 {bf16}: seconds without graphs", sampled[0].seconds)
        report.note(f"bf16 {bf16}: seconds with graphs", sampled[1].seconds)


# --- Works
def works(report: Report) -> None:
    """Whole runs. Their metrics are kept in OUT; noted are H and the reward, and how soon they are there."""
    control(report, "tiny", "--preset tiny", train.START)
    control(report, "pretrained, SCOPE", SMOLLM, report.smollm)
    control(report, "pretrained, GRPO", f"{SMOLLM} --algorithm grpo", report.smollm)


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
        if arrived.any():
            took = seconds[: arrived.argmax() + 1].sum()
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
    with tempfile.TemporaryDirectory() as work:
        report = Report(args, Path(work))
        print(f"{args.part}, on {report.on}")
        try:
            PARTS[args.part](report)
            report.is_finished = True
        except (ValueError, OSError, RuntimeError) as error:  # memory that ran out is the last
            report.failed.append(f"{type(error).__name__}: {error!s:.300}")
            print(report.failed[-1])
        report.write()
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
