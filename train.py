"""Train a language model with SCOPE-RL:  `python train.py`  (`--help` lists the options).

One step of the loop, and what explains each part:

    1. T from the previous step's entropy                     scope_rl.scope_temperature
    2. sample: G completions a prompt at 1, a few more at T   rollout.generate
    3. reward every completion                                reward.answer_reward, or the task's
    4. the entropy H of the tokens sampled                    rollout.Sampler
    5. gradient steps on -J                                   scope_rl.objective_table, scope_loss

Each step seeds its own generators from (seed, step): a resumed run goes on as if never stopped.
"""

import json
import math
import os
import re
import runpy
import shlex
import signal
import sys
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import reward
import rollout
import scope_rl
from entropy import masked_mean
from reward import check, explaining


# --- Config
def option(default, help: str):
    """A config field, with the text that `--help` shows for it."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Everything a run depends on. Defaults: the published constants, Qwen3-0.6B on one GPU."""

    # The run
    preset: Literal["qwen3-0.6b", "laptop", "tiny"] | None = option(None, "default: by the device")
    output_dir: str | None = option(None, "default: a new folder in outputs/")
    resume: bool = option(False, "go on with the run in output_dir, by its config but for options")
    seed: int = option(0, "of everything random in training; evaluation is always drawn alike")
    max_steps: int = option(500, "steps; each samples once")
    save_steps: int = option(50, "steps between checkpoints; the last two are kept")
    eval_steps: int = option(0, "steps between evaluations on the way, 0 for none")
    logging_steps: int = option(25, "steps between completions shown on screen, 0 for none")
    report_to: Literal["none", "tensorboard"] = option("none", "where metrics go as well")

    # Model and task
    model: str = option("Qwen/Qwen3-0.6B", "causal LM, a folder or a name on the hub")
    task: str = option("gsm8k", "gsm8k, or your files like it, or a .py file with a function task")
    train_file: str | None = option(None, "JSONL with question and answer, for task gsm8k")
    test_file: str | None = option(None, "the same, to evaluate on; default: a tenth of train_file")
    instruction: str | None = option(None, "said after each question; default: the task's")
    num_train_problems: int | None = option(None, "default: all there are, 128 of countdown")
    num_eval_problems: int = option(128, "evaluated before and after training, 0 for none")
    num_eval_generations: int = option(8, "samples of each: Pass@k for k = 1, 4, 16... up to it")

    # GRPO
    algorithm: Literal["scope", "grpo"] = option("scope", "grpo: without the auxiliary samples")
    generation_batch_size: int = option(128, "ordinary completions a step, over all prompts")
    num_generations: int = option(8, "G, completions of a prompt")
    max_completion_length: int = option(512, "tokens; one that does not end then gets reward 0")
    num_mini_batches: int = option(2, "gradient steps on each step's samples")
    learning_rate: float = option(1e-6, "of AdamW, constant after the warm-up, no weight decay")
    warmup_steps: int = option(10, "steps over which the learning rate rises")
    max_grad_norm: float = option(1.0, "longer gradients are scaled down to this norm")
    epsilon: float = option(0.2, "the ratio is clipped below 1 - epsilon and above 1 + epsilon")
    epsilon_high: float | None = option(None, "clip-higher, its upper range; default: epsilon")
    entropy_coef: float = option(0.0, "of an entropy bonus, the usual alternative to SCOPE")

    # SCOPE
    scope_target_entropy: float = option(0.5, "H0, nats a token")
    scope_alpha: float = option(1 / 64, "auxiliary samples for each ordinary one, and their weight")
    scope_weight: float | None = option(None, "the weight apart; default: scope_alpha")
    scope_temperature_min: float = option(0.8, "lower clip of T")
    scope_temperature_max: float = option(1.2, "upper clip of T")
    scope_gain: float = option(1.0, "temperature per nat of H0 - H")
    scope_integral_gain: float = option(0.0, "temperature per nat and step; removes the offset")
    scope_integral_band: float = option(0.1, "nats from H0 within which the integral runs")

    # The machine: none of these changes what is computed, but for rounding
    bf16: bool = option(True, "the model's body in bfloat16; weights and logits stay float32")
    gradient_checkpointing: bool = option(True, "less memory, more time in the backward pass")
    per_device_train_batch_size: int = option(8, "completions in a forward pass of an update")
    per_device_eval_batch_size: int = option(128, "completions sampled at once in evaluation")

    def __post_init__(self) -> None:
        """Raises ValueError, which names all that cannot work."""
        problems = [f"{name} is empty" for name, value in vars(self).items() if value == ""]
        for name, value in vars(self).items():
            least = 1 if type(value) is int and name not in MAY_BE_0 else 0
            if isinstance(value, int | float) and not least <= value <= 1e9:
                problems.append(f"{name} is {value}, must be a number from {least} to 1e9")
        T_min, T_max = self.scope_temperature_min, self.scope_temperature_max
        has_file = self.train_file or self.test_file
        prompts, rest = divmod(self.generation_batch_size, max(1, self.num_generations))
        impossible = {
            "num_generations must be above 1": self.num_generations < 2,
            "generation_batch_size must be a multiple of num_generations": rest > 0,
            "epsilon must be below 1": self.epsilon >= 1,
            "num_mini_batches is more than a step's prompts": self.num_mini_batches > prompts,
            "max_grad_norm must be 1e-6 or more": self.max_grad_norm < 1e-6,
            "scope_temperature_min must be from 0.01 to scope_temperature_max": not 0.01 <= T_min <= T_max,
            "train_file and test_file need --task gsm8k": has_file and self.task != "gsm8k",
        }
        problems += [problem for problem, is_so in impossible.items() if is_so]
        check(not problems, "; ".join(problems))


MAY_BE_0 = "seed", "eval_steps", "logging_steps", "warmup_steps", "num_eval_problems"  # of integers
STATE = "step", "entropy", "integral", "evaluations"  # of a Run, in checkpoints
KEPT = "preset", "model", "task", "train_file", "test_file", "instruction", "algorithm", "seed"
TINY, LAB = (Path(__file__).parent / "theory" / name for name in ("tiny", "lab"))
PRESETS = {"laptop": LAB / "between.py", "tiny": TINY / "countdown.py"}  # files with a PRESET


def parse_config(argv: list[str]) -> Config:
    """The command line over the preset (--resume: over the run's config) over the defaults."""
    parser = transformers.HfArgumentParser(Config, allow_abbrev=False)
    parser.error = lambda message: check(False, message)
    args = parser.parse_args(argv)
    if args.resume:
        with explaining(f"nothing to resume: --output_dir must name a run; {args.output_dir}"):
            options = json.loads((Path(args.output_dir) / "config.json").read_text()).items()
            stored = vars(parser.parse_args([f"--{name}={value}" for name, value in options if value is not None]))
            wrong = [name for name, value in options if stored[name] != value]
            check(not wrong, f"config.json has something else for {', '.join(wrong)}")
    else:
        without_gpu = "laptop" if "--model" in (name.partition("=")[0] for name in argv) else "tiny"
        preset = args.preset or ("qwen3-0.6b" if torch.cuda.is_available() else without_gpu)
        stored = runpy.run_path(PRESETS[preset])["PRESET"] if preset in PRESETS else {}
        folder = time.strftime(f"outputs/{preset}-{args.algorithm}-%Y%m%d-%H%M%S")
        stored |= {"preset": preset, "output_dir": folder}
    parser.set_defaults(**stored)
    args = parser.parse_args(argv)
    changed = [name for name in KEPT if args.resume and getattr(args, name) != stored[name]]
    check(not changed, f"a resumed run keeps its {', '.join(changed)}: start another one for that")
    ignored = [name for name in argv if name.startswith("--scope") and args.algorithm == "grpo"]
    check(not ignored, f"{', '.join(ignored)} without effect on --algorithm grpo")
    return Config(**vars(args))


# --- The step
@dataclass
class Run:
    """A run: its parts, and the state that one step hands to the next."""

    config: Config
    task: reward.Task
    prompts: dict[str, str]  # each question as the model is asked it
    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    step: int = 0
    entropy: float | None = None  # H of the previous step, nats; None before the first
    integral: float = 0.0  # I of the temperature rule
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)  # what eval.json holds
    stopped_by: str = ""  # a signal, after which the run ends with the step it is in
    writer: Any = None  # TensorBoard's, if wanted
    lock: Any = None  # on output_dir, held for as long as the run lives

    def stop(self, number: int, frame) -> None:
        """Note a signal; Ctrl-C after any interrupts. (Of SIGTERM `timeout` sends two at once.)"""
        if number == signal.SIGINT and self.stopped_by:
            raise KeyboardInterrupt
        self.stopped_by = signal.Signals(number).name
        with suppress(OSError):  # who read it may have ended by the same signal
            os.write(2, f"\n{self.stopped_by}: ends with this step; Ctrl-C ends it now\n".encode())


def train_step(run: Run) -> tuple[dict[str, float], list[tuple]]:
    """One step of the loop. Returns its metrics, and (T, reward, question, text) of two samples."""
    config, start = run.config, time.perf_counter()
    N, G = config.generation_batch_size, config.num_generations
    torch.manual_seed(config.seed * 1_000_003 + run.step)

    # 1. The temperature of the auxiliary samples, and how many there are (M is N').
    T, M = control(run)

    # 2. and 3. G completions of each prompt at temperature 1, and N' at T, spread over the prompts.
    chosen = choose_problems(run.task.train, N // G, config.seed, run.step)
    prompt = torch.cat([torch.arange(N) // G, torch.arange(M) % len(chosen)])  # whose  [N + N']
    problems, temperatures = [chosen[p] for p in prompt.tolist()], [1.0] * N + [T] * M
    samples, rewards = sample(run, problems, torch.tensor(temperatures))
    rollout_seconds = time.perf_counter() - start

    # 4. The entropy of all ordinary tokens, which the next step's T will follow.
    run.entropy = masked_mean(samples.entropies[:N], samples.completion_mask[:N]).item()  # H
    if not math.isfinite(run.entropy):
        raise FloatingPointError(f"the entropy of step {run.step + 1} is not finite")

    # 5. Gradient steps.
    weight = config.scope_alpha if config.scope_weight is None else config.scope_weight
    objective = scope_rl.objective_table(rewards[:N].view(-1, G), rewards[N:], weight, config.entropy_coef)
    loss, norm, clip_fraction = update(run, samples, prompt.to(rewards.device), objective)

    run.step += 1
    metrics = {
        "step": run.step,
        "reward": rewards[:N].mean().item(),  # mean of the ordinary completions
        "frac_reward_zero_std": (rewards[:N].view(-1, G).std(1) == 0).float().mean().item(),
        "entropy": run.entropy,  # nats a token, of the policy that sampled: before the update
        "scope_temperature": T,
        "scope_positive_frac": (rewards[N:] == 1).float().mean().item() if M else 0.0,  # reinforced
        "loss": loss,  # -J, like the next two a mean over the step's mini-batches
        "grad_norm": norm,  # before it was clipped
        "clip_fraction": clip_fraction,  # tokens whose gradient the ratio's clip removed
        "completion_length": samples.completion_mask[:N].sum(1).float().mean().item(),  # tokens
        "truncated_frac": samples.truncated[:N].float().mean().item(),  # they have reward 0
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "rollout_seconds": rollout_seconds,
        "update_seconds": time.perf_counter() - start - rollout_seconds,
    }
    rows = [0, N] if M else [0]
    return metrics, [(temperatures[i], rewards[i], problems[i].question, samples.texts[i]) for i in rows]


def control(run: Run) -> tuple[float, int]:
    """T and N' of this step (T = 1 in the first); moves the integral on."""
    config = run.config
    if config.algorithm == "grpo" or config.scope_alpha == 0:
        return 1.0, 0
    T, run.integral = scope_rl.scope_temperature(
        config.scope_target_entropy if run.entropy is None else run.entropy, run.integral,
        target=config.scope_target_entropy, gain=config.scope_gain,
        minimum=config.scope_temperature_min, maximum=config.scope_temperature_max,
        integral_gain=config.scope_integral_gain, integral_band=config.scope_integral_band,
    )  # fmt: skip
    return T, max(1, round(config.scope_alpha * config.generation_batch_size))


def choose_problems(problems: list, count: int, seed: int, step: int) -> list[reward.Problem]:
    """The `count` problems of a step: passes over all of them, each in its own random order."""
    size = len(problems)
    places = [divmod(place, size) for place in range(step * count, (step + 1) * count)]  # pass, i
    orders = {n: np.random.default_rng([seed, n]).permutation(size) for n in {n for n, _ in places}}
    return [problems[orders[n][i]] for n, i in places]


def sample(run: Run, problems: list, temperatures: Tensor) -> tuple[rollout.Rollout, Tensor]:
    """A completion of each problem at its temperature, and the rewards `[B]`: 0 where truncated."""
    run.model.eval()
    prompts = [run.prompts[problem.question] for problem in problems]
    samples = rollout.generate(run.model, run.tokenizer, prompts, temperatures, run.config.max_completion_length)
    answered = zip(problems, samples.texts, strict=True)
    rewards = torch.tensor([float(run.task.reward(problem, text)) for problem, text in answered])
    return samples, rewards.to(run.model.device) * ~samples.truncated


def update(run: Run, samples: rollout.Rollout, prompt: Tensor, objective: scope_rl.Objective) -> list[float]:
    """Gradient steps on -J, one a mini-batch of prompts; `prompt` `[B]` is each sample's. Returns
    loss, gradient norm and clip fraction, means over mini-batches with something to learn."""
    config, model, stats = run.config, run.model.train(), []
    warm_up = min(1.0, (run.step + 1) / max(1, config.warmup_steps))
    run.optimizer.param_groups[0]["lr"] = config.learning_rate * warm_up
    for m in range(config.num_mini_batches):
        # The mini-batch: samples with a gradient, those of like length together (less padding).
        rows = (objective.has_gradient() & (prompt % config.num_mini_batches == m)).nonzero()[:, 0]
        rows = rows[samples.lengths[rows].argsort(stable=True)]
        if len(rows) == 0:
            continue

        # Its loss and its gradient are sums over its micro-batches.
        loss, clipped = 0.0, 0.0
        for micro in rows.split(config.per_device_train_batch_size):
            logprobs, entropies = rollout.score(model, samples, micro)  # [b, S]
            micro_loss, micro_clipped = scope_rl.scope_loss(
                logprobs, samples.logprobs[micro], entropies, samples.completion_mask[micro],
                objective.rows(micro), config.epsilon, config.epsilon_high,
            )  # fmt: skip
            micro_loss = micro_loss * config.num_mini_batches  # J is the mean over the whole step
            micro_loss.backward()
            loss, clipped = loss + micro_loss.detach(), clipped + micro_clipped

        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        if not norm.isfinite():
            raise FloatingPointError(f"the gradient of step {run.step + 1} is not finite")
        run.optimizer.step()
        run.optimizer.zero_grad()
        stats.append([loss.item(), norm.item(), (clipped / samples.completion_mask[rows].sum()).item()])
    return np.mean(stats or [[0.0] * 3], axis=0).tolist()


# --- The run
def evaluate(run: Run, name: str) -> None:
    """Evaluate, unless done: means of Pass@k and `distinct_correct`, on screen and in eval.json."""
    if name in run.evaluations:
        return
    n, size = run.config.num_eval_generations, run.config.per_device_eval_batch_size
    texts, rewards = [], []
    torch.manual_seed(0)  # alike in every run
    problems = [problem for problem in run.task.test for _ in range(n)]
    for first in tqdm(range(0, len(problems), size), desc="evaluate", leave=False):
        batch = problems[first : first + size]
        samples, batch_rewards = sample(run, batch, torch.ones(len(batch)))
        texts, rewards = texts + samples.texts, rewards + batch_rewards.tolist()

    groups = [slice(first, first + n) for first in range(0, len(problems), n)]
    num_right = [rewards[g].count(1) for g in groups]  # grades below 1 are not right
    values = {f"pass@{k}": [reward.pass_at_k(n, c, k) for c in num_right] for k in (1, 4, 16, 64, 256) if k <= n}
    values["distinct_correct"] = [reward.distinct_correct(texts[g], rewards[g]) for g in groups]
    run.evaluations[name] = {key: float(np.mean(x)) for key, x in values.items() if x}
    write_whole(Path(run.config.output_dir) / "eval.json", run.evaluations)
    tqdm.write(f"{name}: " + ", ".join(f"{key} {mean:.3f}" for key, mean in run.evaluations[name].items()))


def train(run: Run) -> None:
    """The whole run: evaluate, train, evaluate, save the model; a line of metrics every step."""
    config, output, idle = run.config, Path(run.config.output_dir), 0
    print(f"preset {config.preset}: {config.algorithm} on {Path(config.task).stem}, into {output}")
    print(f"{run.model.num_parameters():,} parameters on {run.model.device}, {len(run.task.train)} problems")
    evaluate(run, "before")

    with open(output / "metrics.jsonl", "a" if run.step else "w", buffering=1) as metrics_file:
        bar = tqdm(range(run.step, config.max_steps), "train", config.max_steps, initial=run.step)
        for step in bar:
            if config.eval_steps and step % config.eval_steps == 0 < step:
                evaluate(run, f"step {step}")
            metrics, shown = train_step(run)

            # To the files, and then to the screen, which may be gone.
            metrics_file.write(json.dumps(metrics) + "\n")
            for name, value in metrics.items() if run.writer else ():
                run.writer.add_scalar(name, value, run.step)
            if run.step % config.save_steps == 0 or run.step == config.max_steps or run.stopped_by:
                os.fsync(metrics_file.fileno())
                save_checkpoint(run)
                if run.stopped_by:
                    raise KeyboardInterrupt(f"by {run.stopped_by}, with all steps saved")
            bar.set_postfix({k: metrics[k] for k in ("reward", "entropy", "scope_temperature")})
            if config.logging_steps and step % config.logging_steps == 0:
                tqdm.write(f"step {run.step}")
                for T, R, question, text in shown:
                    tqdm.write(f"  T {T:.2f}, reward {R:g}: {question!r:.100} -> {text!r:.400}")
            idle = idle + 1 if metrics["grad_norm"] == 0 else 0
            if idle == 10:
                tqdm.write("ten steps taught nothing: in each group all rewards are equal")

    evaluate(run, "after")
    with explaining(f"cannot write {output / 'model'} (is the disk full?)", OSError):
        run.model.save_pretrained(output / "model")
        run.tokenizer.save_pretrained(output / "model")
    print(f"all is in {output}; to see its course: python theory/lab/plot.py {output}")


def set_up(config: Config) -> Run:
    """Everything a run needs, and its checkpoint. ValueError before it writes, the lock apart."""
    if config.report_to == "tensorboard":
        from torch.utils import tensorboard  # or an error, before anything is done
    output = Path(config.output_dir)
    names = ["config.json", "metrics.jsonl", "eval.json", "checkpoint.pt", "checkpoint-previous.pt", "model"]
    found = [name for name in names if (output / name).exists() and not config.resume]
    check(not found, f"{output} holds a run already ({', '.join(found)}): add --resume, or take another folder")
    check(not (output / "model").is_file(), f"{output / 'model'} is a file, not a folder")
    known = Path(config.model).is_dir() or re.fullmatch(r"[\w-]+(/[\w.-]+)?", config.model)
    check(known, f"there is no folder {config.model}, and no model of such a name")
    task = load_task(config)
    model, tokenizer = rollout.load_policy(config.model, config.bf16, config.gradient_checkpointing)
    prompts = prepare_prompts(config, task, model, tokenizer)
    fused = model.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=0.0, fused=fused)
    run = Run(config, task, prompts, model, tokenizer, optimizer)

    output.mkdir(parents=True, exist_ok=True)
    with explaining(f"cannot lock {output} (does another run write into it?)"):
        run.lock = filelock.FileLock(output / "lock", timeout=0).acquire()
    if config.resume:
        load_checkpoint(run)
    if config.report_to == "tensorboard":
        run.writer = tensorboard.SummaryWriter(output, purge_step=run.step + 1)
    write_whole(output / "config.json", vars(config) | {"resume": False})
    return run


def prepare_prompts(config: Config, task: reward.Task, model, tokenizer) -> dict[str, str]:
    """Each question as the model is asked it. Raises ValueError for what it cannot be asked."""
    questions = [problem.question for problem in task.train + task.test]
    prompts = rollout.format_prompts(tokenizer, questions, config.instruction or task.instruction)
    ids = tokenizer(prompts, add_special_tokens=False).input_ids
    unread = not all(ids) or len(set(map(tuple, ids))) == 1 < len(set(questions))
    check(not unread, f"questions are empty or all alike to {config.model}: check its tokenizer")
    special = tokenizer.eos_token_id, tokenizer.pad_token_id or 0
    V, largest = model.get_input_embeddings().num_embeddings, max(map(max, [*ids, special]))
    check(largest < V, f"the tokenizer has a token {largest}, but the model only {V}")
    check(config.scope_target_entropy < math.log(V), f"scope_target_entropy must be below log {V}")
    room = getattr(model.config, "max_position_embeddings", None) or math.inf
    longest, question = max(zip(map(len, ids), questions, strict=True))
    fits = longest + config.max_completion_length <= room
    check(fits, f"{longest} prompt tokens + max_completion_length exceed {room}: {question!r:.60}")
    return dict(zip(questions, prompts, strict=True))


def load_task(config: Config) -> reward.Task:
    """The task, with as many problems as wanted. Raises ValueError if there is none."""
    path = LAB / "gsm8k.py" if config.task == "gsm8k" else Path(config.task)
    check(path.is_file(), f"--task must be gsm8k or a Python file, not {config.task}")
    with explaining(f"the task {config.task} fails"):
        task = runpy.run_path(str(path))["task"](config)
        questions = [problem.question for problem in task.train + task.test]
        check(task.train and all(isinstance(q, str) for q in questions), "it has no questions")
    train, test = task.train[: config.num_train_problems], task.test[: config.num_eval_problems]
    return task._replace(train=train, test=test)


# --- Files
def write_whole(path: Path, content: dict) -> None:
    """Write JSON, or a checkpoint, and put it in place at once. Raises OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    with explaining(f"cannot write {path} (is the disk full?)", OSError):
        if path.suffix == ".json":
            temporary.write_text(json.dumps(content, indent=2) + "\n")
        else:
            torch.save(content, temporary)
        os.replace(temporary, path)


def save_checkpoint(run: Run) -> None:
    """Weights, optimizer, and the state that steps hand on; the rest follows from the step."""
    path = Path(run.config.output_dir) / "checkpoint.pt"
    if path.exists():
        os.replace(path, path.with_name("checkpoint-previous.pt"))  # the last whole one
    content = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    write_whole(path, content | {"state": {name: getattr(run, name) for name in STATE}})


def load_checkpoint(run: Run) -> None:
    """Restore what `save_checkpoint` wrote, if it did. ValueError for a damaged or foreign file."""
    output = Path(run.config.output_dir)
    paths = [output / name for name in ("checkpoint.pt", "checkpoint-previous.pt")]
    path, metrics = next((path for path in paths if path.exists()), None), output / "metrics.jsonl"
    rows = metrics.read_bytes().split(b"\n")[:-1] if metrics.is_file() else []  # the whole ones
    if path is None:
        check(len(rows) <= run.config.save_steps, f"{metrics} has {len(rows)} rows, no checkpoint")
        return
    with explaining(f"cannot resume from {path} (if you remove it, the one before is tried)"):
        check(zipfile.ZipFile(path).testzip() is None, "its checksums do not match: it is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        run.model.load_state_dict(content["model"])
        run.optimizer.load_state_dict(content["optimizer"])
        state = content["state"]
        check(state["step"] <= len(rows), f"{metrics} is shorter than it was")
        check(state["step"] <= run.config.max_steps, f"max_steps is below the {state['step']} done")
        vars(run).update({name: state[name] for name in STATE})
        os.truncate(metrics, sum(len(row) + 1 for row in rows[: state["step"]]))  # later ones go


def main() -> None:
    """The command line: bad input ends in one line, an interruption in how to go on."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show
    try:
        run = set_up(parse_config(sys.argv[1:]))
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        sys.exit("error: " + (str(error).strip() or "interrupted before it began").splitlines()[0])
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):
        if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:  # which nohup asks for
            signal.signal(getattr(signal, name), run.stop)
    resume = f"to go on: python train.py --resume --output_dir {shlex.quote(run.config.output_dir)}"
    try:
        train(run)
    except torch.OutOfMemoryError:
        smaller = "per_device_train_batch_size, generation_batch_size or per_device_eval_batch_size"
        sys.exit(f"out of memory: lower {smaller}, or add --gradient_checkpointing\n{resume}")
    except FloatingPointError as error:
        sys.exit(f"stopped: {error}\n{resume} --learning_rate {run.config.learning_rate / 2:g}")
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(f"stopped: {str(error) or 'at once, without the last steps'}\n{resume}")


if __name__ == "__main__":
    main()
