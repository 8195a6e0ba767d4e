"""Train a language model with SCOPE-RL:  `python train.py`  (`--help` lists the options).

`train_step` is the whole algorithm. What it calls is explained in the other modules:

    sample      rollout.generate             G completions a prompt at temperature 1, a few more at T
    reward      reward.answer_reward         or the task's own
    objective   scope_rl.objective_table     how each completion counts
    update      rollout.score, scope_rl.scope_loss
    control     scope_rl.TemperatureRule     T of the next step, from this step's entropy

Below it stand `evaluate` and `train`, the run around the step. The rest is the machine room.
"""

import argparse
import json
import math
import os
import re
import runpy
import shlex
import signal
import sys
import time
import typing
import zipfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import filelock
import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers.hf_argparser import string_to_bool

import reward
import rollout
import scope_rl
from entropy import masked_mean
from reward import Problem, RewardError, Task, one_line_error

MAX_GRAD_NORM = 1.0  # longer gradients are scaled down to this norm
BAR = "{n}/{total} |{bar}| {elapsed}<{remaining}{postfix}"
POSTFIX = "R={reward:.2f} H={entropy:.2f} T={scope_temperature:.2f}"


def train_step(run: "Run") -> tuple[dict[str, float], list[str]]:
    """One step of SCOPE-RL. Returns its metrics, and a line for each of two completions."""
    config, model, start = run.config, run.model, time.perf_counter()
    torch.manual_seed(config.seed * 1_000_003 + run.step)  # a resumed run draws the same numbers
    T = run.rule.temperature  # set by the entropy of the last step; 1 in the first

    # 1. Sample G completions of each prompt at temperature 1, and M more at T, in one call.
    N, G, M = config.generation_batch_size, config.num_generations, config.num_auxiliary
    problems = next_problems(run, N // G)
    owner = torch.cat([torch.arange(N) // G, torch.arange(M) % len(problems)])  # [N + M]
    asked = [problems[i] for i in owner.tolist()]
    temperatures = torch.tensor([1.0] * N + [T] * M)
    prompts = [problem.prompt for problem in asked]
    length = config.max_completion_length
    samples = rollout.generate(model.eval(), run.tokenizer, prompts, temperatures, length)
    rollout_seconds = time.perf_counter() - start

    # 2. Reward them. A completion that was cut off has not answered, and earns nothing.
    rewards = grade(run.task, asked, samples)  # [N + M]
    groups, auxiliary_rewards = rewards[:N].view(-1, G), rewards[N:]  # [P, G], [M]

    # 3. Measure the entropy H of the ordinary completions' tokens, in nats.
    H = masked_mean(samples.entropies[:N], samples.completion_mask[:N]).item()

    # 4. Write the objective as a table: the advantage and the weight of each completion.
    table = run.objective_table(groups, auxiliary_rewards, config.scope_alpha, config.entropy_coef)

    # 5. Take a gradient step on each mini-batch of prompts; gradients of micro-batches add up.
    # Each sample is used once, and pi_old stays what `generate` noted of it.
    loss, norms, clip_fractions = 0.0, [], []
    model.train()
    for m in range(config.num_mini_batches):
        in_batch = (owner % config.num_mini_batches == m).to(model.device)
        rows = (in_batch & table.has_gradient()).nonzero()[:, 0]
        if len(rows) == 0:
            continue  # in each group all rewards are equal, so there is nothing to learn
        mask, num_clipped = samples.completion_mask, 0
        for micro in rollout.micro_batches(model, samples, rows, config.per_device_train_batch_size):
            logprobs, entropies = rollout.score(model, samples, micro)  # [b, C]
            old, clip = samples.logprobs[micro], (config.epsilon, config.epsilon_high)
            part, clipped = run.scope_loss(logprobs, old, entropies, mask[micro], table.rows(micro), *clip)
            (part * config.num_mini_batches).backward()  # weights are shares of the whole step
            loss += part.item()
            num_clipped += clipped.item()
        norms.append(gradient_step(run))
        clip_fractions.append(num_clipped / mask[rows].sum().item())

    # 6. Set the temperature of the next step.
    run.rule(H)
    run.step += 1
    losses = {"loss": loss, "grad_norm": mean(norms), "clip_fraction": mean(clip_fractions)}
    metrics = metrics_of(run, samples, rewards, H, T) | losses
    metrics |= {
        "rollout_seconds": rollout_seconds,
        "update_seconds": time.perf_counter() - start - rollout_seconds,
    }
    shown = [show(asked[i], temperatures[i], rewards[i], samples.texts[i]) for i in (0, N) if i < N + M]
    return metrics, shown


def next_problems(run: "Run", count: int) -> list[Problem]:
    """The next `count` problems: passes over all of them, each in its own random order."""
    problems, chosen, order = run.task.train, [], []
    for place in range(run.problems_seen, run.problems_seen + count):
        number, i = divmod(place, len(problems))  # which pass it is, and where in it
        if i == 0 or len(order) == 0:
            order = np.random.default_rng([run.config.seed, number]).permutation(len(problems))
        chosen.append(problems[order[i]])
    run.problems_seen += count
    return chosen


def grade(task: Task, problems: list[Problem], samples: rollout.Rollout) -> Tensor:
    """Rewards `[B]` of completions; 0 where they are truncated. RewardError for a bad reward."""
    answered = zip(problems, samples.texts, strict=True)
    rewards = [reward.reward_of(task, problem, text) for problem, text in answered]
    return torch.tensor(rewards, device=samples.truncated.device) * ~samples.truncated


def gradient_step(run: "Run") -> float:
    """Move the weights by the gradient that is there. Returns its norm before it was clipped."""
    warm_up = min(1.0, (run.step + 1) / max(1, run.config.warmup_steps))
    run.optimizer.param_groups[0]["lr"] = run.config.learning_rate * warm_up
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), MAX_GRAD_NORM)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return norm.item()


def metrics_of(run: "Run", samples: rollout.Rollout, rewards: Tensor, H: float, T: float) -> dict:
    """What a step is like. Where nothing else is said, of its ordinary completions."""
    N, G, M = run.config.generation_batch_size, run.config.num_generations, run.config.num_auxiliary
    equal = rewards[:N].view(-1, G).std(1) == 0  # [P] groups without advantages
    return {
        "step": run.step,
        "reward": rewards[:N].mean().item(),
        "frac_reward_zero_std": equal.float().mean().item(),
        "entropy": H,  # nats a token, of the policy that sampled: before the update
        "scope_temperature": T,
        "scope_positive_frac": (rewards[N:] == 1).sum().item() / max(1, M),  # those reinforced
        "completion_length": samples.completion_mask[:N].sum(1).float().mean().item(),  # tokens
        "truncated_frac": samples.truncated[:N].float().mean().item(),  # they have reward 0
        "learning_rate": run.optimizer.param_groups[0]["lr"],
    }


def show(problem: Problem, T: float, R: float, text: str) -> str:
    """A line for the screen."""
    return f"T {T:.2f}, reward {R:g}: {problem.question!r:.100} -> {text!r:.400}"


def mean(values: list[float]) -> float:
    """The mean; 0 of nothing."""
    return float(np.mean(values)) if values else 0.0


# --- The run
def evaluate(run: "Run", name: str) -> None:
    """Print and save the means of Pass@k and `distinct_correct`, unless that was done before."""
    if name in run.evaluations or not run.task.test:
        return
    n, size = run.config.num_eval_generations, run.config.generation_batch_size
    length = run.config.max_completion_length

    # Sample each problem n times. The random numbers are the same for every run and batch size.
    asked = [problem for problem in run.task.test for _ in range(n)]
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(len(asked), length, dtype=torch.float64, generator=generator)
    texts, rewards = [], []
    for start in tqdm(range(0, len(asked), size), "evaluate", leave=False):
        batch, numbers = asked[start : start + size], uniforms[start : start + size]
        prompts = [problem.prompt for problem in batch]
        T = torch.ones(len(batch))
        samples = rollout.generate(run.model.eval(), run.tokenizer, prompts, T, length, numbers)
        texts += samples.texts
        rewards += grade(run.task, batch, samples).tolist()

    # Measure each problem. A grade below 1 is not a right answer.
    ks = [k for k in (1, 4, 16, 64, 256) if k <= n]
    rows = []
    for start in range(0, len(asked), n):
        stop = start + n
        num_right = rewards[start:stop].count(1)
        row = [reward.pass_at_k(n, num_right, k) for k in ks]
        rows.append([*row, reward.distinct_correct(texts[start:stop], rewards[start:stop])])
    names = [*(f"pass@{k}" for k in ks), "distinct_correct"]
    means = dict(zip(names, np.mean(rows, 0).tolist(), strict=True))
    run.evaluations[name] = means
    write_whole(run.output / "eval.json", run.evaluations)
    tqdm.write(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in means.items()))


def train(run: "Run") -> None:
    """The whole run: evaluate, train, evaluate, save the model. A line of metrics every step."""
    config, recent = run.config, deque(maxlen=10)
    evaluate(run, "before")
    with open(run.output / "metrics.jsonl", "a", buffering=1) as metrics_file:
        bar = tqdm(initial=run.step, total=config.max_steps, bar_format=BAR)
        while run.step < config.max_steps:
            try:
                metrics, shown = train_step(run)
            except RewardError:
                save_checkpoint(run)  # with the steps before this one
                raise
            wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
            if wrong:
                raise FloatingPointError(f"{wrong[0]} of step {run.step} is not finite")

            # First to the files, and then to the screen, which may be gone.
            metrics_file.write(json.dumps(metrics) + "\n")
            if run.step % config.save_steps == 0 or run.step == config.max_steps or run.stopped_by:
                os.fsync(metrics_file.fileno())
                save_checkpoint(run)
            if run.stopped_by:
                raise KeyboardInterrupt(f"by {run.stopped_by}, with all steps saved")
            bar.set_postfix_str(POSTFIX.format(**metrics), refresh=False)
            bar.update()
            if run.step % config.save_steps == 1:
                tqdm.write("\n  ".join([f"step {run.step}", *shown]))
            recent.append(metrics)
            if sum(step["grad_norm"] == 0 for step in recent) == 8:
                tqdm.write(f"8 of 10 steps taught nothing: {reason(recent)}")
                recent.clear()
        bar.close()

    evaluate(run, "after")
    with one_line_error(f"cannot write {run.output / 'model'}", OSError):
        run.model.save_pretrained(run.output / "model")
        run.tokenizer.save_pretrained(run.output / "model")
    print(f"all is in {run.output}; to see its course: python theory/tools/plot.py {run.output}")


def reason(steps: deque) -> str:
    """Why steps had no gradient, and what helps."""
    if np.mean([step["truncated_frac"] for step in steps]) > 0.5:
        return "most completions are cut off; raise --max_completion_length"
    if np.mean([step["reward"] for step in steps]) > 0.5:
        return "all answers to a question are right; take harder ones"
    return "all answers to a question are wrong; take easier ones, another --instruction or model"


# ------------------------------------------------------------------------------------------------
# The machine room: options, set-up, files, command line. There is no algorithm from here on.
# ------------------------------------------------------------------------------------------------
THEORY = Path(__file__).parent / "theory"
COUNTDOWN, BETWEEN = str(THEORY / "tiny" / "countdown.py"), str(THEORY / "tiny" / "between.py")
PRESETS = "qwen3-0.6b", "laptop", "tiny"
SMOLLM2, START = "HuggingFaceTB/SmolLM2-135M-Instruct", str(THEORY / "tiny" / "start-0")


def option(default, help: str, laptop=None, tiny=None, **more):
    """A field of Config: its default, which is preset qwen3-0.6b's, and what other presets have."""
    presets = {"qwen3-0.6b": default, "laptop": default, "tiny": default}
    presets |= {} if laptop is None else {"laptop": laptop}
    presets |= {} if tiny is None else {"tiny": tiny}
    return field(default=default, metadata={"help": help, "presets": presets, **more})


@dataclass
class Config:
    """Everything that a run depends on. Raises ValueError, which names all that cannot work."""

    preset: str = option("qwen3-0.6b", "set of constants", choices=PRESETS, group="run")
    output_dir: str = option("", "folder of the run; by default a new one in outputs/")
    resume: bool = option(False, "go on with the run in output_dir")
    seed: int = option(0, "seed for training; evaluations always use the same one", minimum=0)
    max_steps: int = option(500, "steps; each samples once", laptop=45, tiny=350)
    save_steps: int = option(50, "steps between checkpoints, after which samples are shown", laptop=15)

    model: str = option("Qwen/Qwen3-0.6B", "folder, or name on the hub", SMOLLM2, START, group="task")
    task: str = option("gsm8k", "gsm8k, or a Python file with a function task", BETWEEN, COUNTDOWN)
    train_file: str | None = option(None, "JSONL with question and answer, for task gsm8k")
    test_file: str | None = option(None, "the same, to evaluate; default: a tenth of train_file")
    instruction: str | None = option(None, "said after each question; default: the task's")
    num_eval_problems: int = option(128, "evaluated before and after", laptop=16, minimum=0)
    num_eval_generations: int = option(8, "samples of each: the largest k of Pass@k", tiny=64)

    algorithm: str = option("scope", "grpo is GRPO alone", choices=("scope", "grpo"), group="GRPO")
    generation_batch_size: int = option(128, "ordinary completions a step", laptop=48, tiny=512)
    num_generations: int = option(8, "G, completions of a prompt", laptop=4, minimum=2)
    max_completion_length: int = option(512, "tokens; else truncated: reward 0", laptop=12, tiny=12)
    num_mini_batches: int = option(2, "gradient steps on each step's samples")
    learning_rate: float = option(1e-6, "of AdamW, constant after the warm-up", laptop=1e-5, tiny=3e-4)
    warmup_steps: int = option(10, "steps in which the learning rate rises", laptop=3, minimum=0)
    epsilon: float = option(0.2, "the ratio is clipped below 1 - epsilon and above 1 + epsilon")
    epsilon_high: float | None = option(None, "upper clip (clip-higher); default: epsilon")
    entropy_coef: float = option(0.0, "of an entropy bonus, the usual alternative to SCOPE")

    scope_target_entropy: float = option(0.5, "H0, nats a token", tiny=0.4, group="SCOPE")
    scope_alpha: float = option(1 / 64, "alpha, the weight of the auxiliary term", laptop=2.0, tiny=1.0)
    scope_share: float = option(1 / 64, "auxiliary samples for each ordinary one", laptop=0.5, tiny=0.25)
    scope_temperature_min: float = option(0.8, "lower clip of T", laptop=0.9, tiny=0.5, minimum=0.01)
    scope_temperature_max: float = option(1.2, "upper clip of T", laptop=1.75, tiny=1.5, minimum=0.01)
    scope_gain: float = option(1.0, "temperature per nat", laptop=1.0, tiny=4.0)
    scope_integral_gain: float = option(
        0.0, "temperature per nat and step; the paper's rule has 0", laptop=0.05, tiny=0.2
    )

    bf16: bool = option(True, "body in bfloat16, and gradient checkpointing", False, False, group="machine")
    per_device_train_batch_size: int = option(8, "completions in a forward pass", laptop=16, tiny=1024)

    def __post_init__(self) -> None:
        problems = []
        for name, option in OPTIONS.items():
            value, kind = getattr(self, name), type(option.default)
            least = option.metadata.get("minimum", 1 if kind is int else 0)
            if value == "":
                problems.append(f"{name} is empty")
            elif kind in (int, float) and not least <= value <= 1e9:
                problems.append(f"{name} is {value}, must be from {least} to 1e9")
        if problems:
            raise ValueError("; ".join(problems))
        wrong = {
            "generation_batch_size must be a multiple of num_generations":
                self.generation_batch_size % self.num_generations > 0,
            "num_mini_batches is more than a step's prompts":
                self.num_mini_batches > self.generation_batch_size // self.num_generations,
            "epsilon must be below 1": self.epsilon >= 1,
            "scope_temperature_min is above scope_temperature_max":
                self.scope_temperature_min > self.scope_temperature_max,
            "train_file and test_file need --task gsm8k":
                bool(self.train_file or self.test_file) and self.task != "gsm8k",
            "train_file and test_file need --model, as tiny's knows no words":
                bool(self.train_file or self.test_file) and self.model == START,
        }  # fmt: skip
        problems = [problem for problem, is_so in wrong.items() if is_so]
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def num_auxiliary(self) -> int:
        """M, the auxiliary completions of a step."""
        if self.algorithm == "grpo" or self.scope_share == 0:
            return 0
        return max(1, round(self.scope_share * self.generation_batch_size))


OPTIONS = {option.name: option for option in fields(Config)}


@dataclass
class Run:
    """A run: its parts, any of which you may replace, and the state that steps hand on."""

    config: Config
    task: Task
    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    rule: scope_rl.TemperatureRule
    objective_table: Callable = scope_rl.objective_table
    scope_loss: Callable = scope_rl.scope_loss
    step: int = 0
    problems_seen: int = 0
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)  # what eval.json holds
    stopped_by: str = ""  # a signal, after which the run ends with the step it is in
    lock: filelock.BaseFileLock | None = None  # on the folder, as long as the run lives

    @property
    def output(self) -> Path:
        """The run's folder."""
        return Path(self.config.output_dir)


# --- Set-up
def set_up(config: Config) -> Run:
    """Everything a run needs, and its checkpoint. ValueError before it writes, except the lock."""
    output, model_path = Path(config.output_dir), Path(config.model)
    names = "config.json", "metrics.jsonl", "eval.json", "checkpoint.pt", "model"
    found = [name for name in names if (output / name).exists()]
    if found and not config.resume:
        raise ValueError(f"{output} holds {', '.join(found)}: add --resume, or take another folder")
    if not model_path.is_dir() and not re.fullmatch(r"[\w-]+(/[\w.-]+)?", config.model):
        raise ValueError(f"there is no folder {config.model}, and no model has such a name")
    task = load_task(config)
    with one_line_error(f"cannot use the model {config.model}"):
        model, tokenizer = rollout.load_policy(config.model, config.bf16)

    is_cuda = model.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=is_cuda)
    rule = scope_rl.TemperatureRule(config.scope_target_entropy)
    if config.num_auxiliary > 0:
        rule.gain, rule.integral_gain = config.scope_gain, config.scope_integral_gain
        rule.minimum, rule.maximum = config.scope_temperature_min, config.scope_temperature_max
    else:
        rule.gain = 0.0  # T stays 1
    run = Run(config, task, model, tokenizer, optimizer, rule)
    give_prompts(run)

    output.mkdir(parents=True, exist_ok=True)
    with one_line_error(f"cannot lock {output} (does another run write into it?)"):
        run.lock = filelock.FileLock(output / "lock", timeout=0).acquire()
    if config.resume:
        load_checkpoint(run)
    write_whole(output / "config.json", vars(config) | {"resume": False})
    return run


def load_task(config: Config) -> Task:
    """The task, with as many problems to evaluate as wanted. Raises ValueError if there is none."""
    path = Path(config.task)
    if config.task == "gsm8k":
        task = reward.gsm8k_task(config.train_file, config.test_file)
    elif not path.is_file():
        raise ValueError(f"there is no file {path}: --task is gsm8k, or a Python file")
    else:
        sys.path.insert(0, str(path.parent))  # it may import modules beside it
        with one_line_error(f"the task {path} fails"):
            task = runpy.run_path(str(path))["task"](config)
            if not task.train:
                raise ValueError("it has no problems to train on")
    return task._replace(test=task.test[: config.num_eval_problems])


def give_prompts(run: Run) -> None:
    """Give each problem its prompt. Raises ValueError for what this model cannot be asked."""
    name, problems = run.config.model, run.task.train + run.task.test
    questions = [problem.question for problem in problems]
    with one_line_error("the model's chat template, or a question, cannot be used"):
        instruction = run.config.instruction or run.task.instruction
        prompts = rollout.format_prompts(run.tokenizer, questions, instruction)
        ids = run.tokenizer(prompts, add_special_tokens=False).input_ids
    set_prompts(run, prompts)

    # The tokenizer must tell questions from each other, and the model have room for them.
    if not all(ids) or len({tuple(row) for row in ids}) == 1 < len(set(questions)):
        raise ValueError(f"questions are empty or the same to {name}: check its tokenizer")
    V, largest = run.model.get_input_embeddings().num_embeddings, max(max(row) for row in ids)
    if largest >= V:
        raise ValueError(f"the tokenizer has a token {largest}, but the model {name} only {V}")
    if run.config.scope_target_entropy >= math.log(V):
        raise ValueError(f"scope_target_entropy must be below log {V}, the largest entropy")
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    needed = len(ids[longest]) + run.config.max_completion_length
    room = rollout.context_length(run.model)
    if needed > room:
        what = f"prompt and max_completion_length take {needed} tokens, and {name} has {room}"
        raise ValueError(f"{what}: {questions[longest]!r:.60}")


def set_prompts(run: Run, prompts: list[str]) -> None:
    """Put the prompts into the problems, in the order of training and test problems."""
    problems = run.task.train + run.task.test
    asked = [p._replace(prompt=prompt) for p, prompt in zip(problems, prompts, strict=True)]
    split = len(run.task.train)
    run.task = run.task._replace(train=asked[:split], test=asked[split:])


# --- Files
def write_whole(path: Path, content: dict) -> None:
    """Write JSON, or a checkpoint, and put it in place at once. Raises OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with one_line_error(f"cannot write {path}", OSError):
            if path.suffix == ".json":
                temporary.write_text(json.dumps(content, indent=2) + "\n")
            else:
                torch.save(content, temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # what a full disk leaves


def save_checkpoint(run: Run) -> None:
    """Save weights, optimizer, and the state that steps hand on."""
    if not all(weight.isfinite().all() for weight in run.model.parameters()):
        raise FloatingPointError(f"weights are not finite after step {run.step}")
    problems = run.task.train + run.task.test
    content = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "rule": run.rule.state_dict(),
        "step": run.step,
        "problems_seen": run.problems_seen,
        "evaluations": run.evaluations,
        "questions": [problem.question for problem in problems],
        "prompts": [problem.prompt for problem in problems],  # a template may hold the date
    }
    write_whole(run.output / "checkpoint.pt", content)


def load_checkpoint(run: Run) -> None:
    """Restore what `save_checkpoint` saved, if it did. ValueError for a damaged or foreign file."""
    path, metrics = run.output / "checkpoint.pt", run.output / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    if path.exists():
        with one_line_error(f"cannot resume from {path}"):
            if zipfile.ZipFile(path).testzip() is not None:
                raise ValueError("its checksums do not match: it is damaged")
            content = torch.load(path, map_location="cpu", weights_only=True)
            questions = [problem.question for problem in run.task.train + run.task.test]
            if content["questions"] != questions:
                raise ValueError("the task has other questions than when the run began")
            set_prompts(run, content["prompts"])
            run.model.load_state_dict(content["model"])
            run.optimizer.load_state_dict(content["optimizer"])
            run.rule.load_state_dict(content["rule"])
            run.step, run.problems_seen = content["step"], content["problems_seen"]
            run.evaluations = content["evaluations"]
            if len(lines) < run.step:
                raise ValueError(f"{metrics} is shorter than it was")
    if run.step > run.config.max_steps:
        raise ValueError(f"{run.step} steps are done, so --max_steps must be {run.step} or more")
    metrics.write_bytes(b"".join(lines[: run.step]))  # later steps are done again
    print(f"goes on after step {run.step}")


# --- The command line
def parse_config(argv: list[str]) -> Config:
    """The command line over the preset (--resume: over the run's config). Raises ValueError."""
    preset = preset_of(argv)
    if preset not in PRESETS:
        raise ValueError(f"preset {preset} is none of {', '.join(PRESETS)}")
    given = parse_options(argv, preset)
    if given.get("resume"):
        with one_line_error("nothing to resume: --output_dir must name the folder of a run"):
            values = json.loads((Path(given["output_dir"]) / "config.json").read_text())
        for name in ("preset", "algorithm", "seed", "instruction"):
            if given.get(name, values[name]) != values[name]:
                raise ValueError(f"a resumed run keeps its {name}: start another one for that")
    else:
        algorithm = given.get("algorithm", "scope")
        values = {name: option.metadata["presets"][preset] for name, option in OPTIONS.items()}
        folder = time.strftime(f"outputs/{preset}-{algorithm}-%Y%m%d-%H%M%S")
        values |= {"preset": preset, "output_dir": folder}
    if (values | given)["algorithm"] == "grpo":
        ignored = [name for name in given if name.startswith("scope_")]
        if ignored:
            raise ValueError(f"{', '.join(ignored)} without effect on --algorithm grpo")
    with one_line_error("config.json does not fit"):
        return Config(**values | given)


def preset_of(argv: list[str]) -> str:
    """The preset that is named, or the one for this machine and model."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--model")
    known, _ = parser.parse_known_args(argv)
    without_gpu = "laptop" if known.model else "tiny"
    return known.preset or ("qwen3-0.6b" if torch.cuda.is_available() else without_gpu)


def parse_options(argv: list[str], preset: str) -> dict:
    """The options that are given, and no others. The help shows the preset's values."""
    about = f"Train a language model with SCOPE-RL. In brackets: the values of the preset {preset}."
    parser = argparse.ArgumentParser(
        description=about, usage="train.py [--OPTION VALUE ...]", allow_abbrev=False
    )
    parser.error = refuse
    for name, option in OPTIONS.items():
        if "group" in option.metadata:
            group = parser.add_argument_group(option.metadata["group"])
        kind = (typing.get_args(option.type) or (option.type,))[0]  # float of float | None
        more = {"type": string_to_bool, "nargs": "?", "const": True} if kind is bool else {"type": kind}
        text = f"{option.metadata['help']} [{option.metadata['presets'][preset]}]"
        choices = option.metadata.get("choices")
        group.add_argument(f"--{name}", help=text, choices=choices, default=argparse.SUPPRESS, **more)
    return vars(parser.parse_args(argv))


def refuse(message: str) -> None:
    """What argparse does with a wrong option."""
    raise ValueError(message)


def main(argv: list[str] = ()) -> None:
    """The command line: bad input ends in one line, an interruption in how to go on."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show
    try:
        run = set_up(parse_config(argv))
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        sys.exit("error: " + (str(error).strip() or "interrupted before it began"))
    stop_with_the_step(run)
    resume = f"to go on: python train.py --resume --output_dir {shlex.quote(run.config.output_dir)}"
    try:
        train(run)
    except torch.OutOfMemoryError:
        smaller = "per_device_train_batch_size or generation_batch_size"
        sys.exit(f"out of memory: lower {smaller}\n{resume}")
    except FloatingPointError as error:
        sys.exit(f"stopped: {error}\n{resume} --learning_rate {run.config.learning_rate / 2:g}")
    except (KeyboardInterrupt, RewardError, OSError) as error:
        sys.exit(f"stopped: {str(error) or 'at once, without the last steps'}\n{resume}")


def stop_with_the_step(run: Run) -> None:
    """Let Ctrl-C and SIGTERM end the run with the step it is in. A second Ctrl-C ends it at once."""

    def stop(number: int, frame) -> None:
        if run.stopped_by and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stopped_by = signal.Signals(number).name
        os.write(2, f"\n{run.stopped_by}: ends with this step; Ctrl-C ends it now\n".encode())

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


if __name__ == "__main__":
    main(sys.argv[1:])
