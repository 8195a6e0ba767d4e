"""Train a language model with SCOPE-RL:  `python train.py`  (`--help` lists the options).

`train_step` is the whole algorithm. What it calls is explained in the other modules:

    sample      rollout.generate             G completions a prompt at temperature 1, few more at T
    reward      reward.answer_reward         or the task's own
    objective   scope_rl.objective_table     how each completion counts
    update      rollout.score, scope_rl.scope_loss
    control     scope_rl.TemperatureRule     T of the next step, from this step's entropy

Below it stand `evaluate` and `train`, the run around the step. The rest is the machine room.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in these long imports just ends it

import argparse
import json
import logging
import math
import os
import re
import runpy
import shlex
import sys
import time
import typing
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

WARMUP_STEPS = 10  # in which the learning rate rises
MAX_GRAD_NORM = 1.0  # longer gradients are scaled down to this norm


def train_step(run: "Run") -> tuple[dict, list[str]]:
    """One step of SCOPE-RL. Returns its metrics, and a line for each of two completions."""
    config, model = run.config, run.model
    torch.manual_seed(config.seed * 1_000_003 + run.step)  # a resumed run draws the same numbers
    T, alpha = run.rule.temperature, config.scope_alpha * run.rule.boost  # by the last entropy

    # 1. Sample G completions of each prompt at temperature 1, and M more at T, in one call.
    N, G, M = config.generation_batch_size, config.num_generations, config.num_auxiliary
    problems = problems_of_step(run)
    owner = torch.cat([torch.arange(N) // G, torch.arange(M) % (N // G)])  # prompt of a row  [N + M]
    asked = [problems[i] for i in owner.tolist()]
    prompts = [run.prompts[problem.question] for problem in asked]
    temperatures = torch.cat([torch.ones(N), torch.full((M,), T)])
    length = config.max_completion_length
    samples = run.generate(model.eval(), run.tokenizer, prompts, temperatures, length)

    # 2. Reward them. A completion that was cut off has not answered: it counts as a wrong one.
    rewards = grade(run.task, asked, samples)  # [N + M]

    # 3. Measure the entropy H of the ordinary completions' tokens, in nats.
    mask = samples.completion_mask
    H = masked_mean(samples.entropies[:N], mask[:N]).item()

    # 4. Write the objective as a table: the advantage and the weight of each completion.
    groups, auxiliary = rewards[:N].view(-1, G), rewards[N:]  # [P, G], [M]
    table = run.objective_table(groups, auxiliary, alpha, config.entropy_coef)

    # 5. Take a gradient step on each mini-batch of prompts. Gradients of micro-batches add up.
    # Each sample is used once, and pi_old stays what `generate` noted of it.
    loss, norms, num_tokens, num_clipped = 0.0, [], 0, 0
    num_batches, size = config.num_mini_batches, config.per_device_train_batch_size
    clip = config.epsilon, config.epsilon_high
    for m in range(num_batches):
        in_batch = (owner % num_batches == m).to(model.device)
        rows = (in_batch & table.has_gradient()).nonzero()[:, 0]
        if len(rows) == 0:
            continue  # nothing here has a gradient
        for micro in rollout.micro_batches(model.train(), samples, rows, size):
            logprobs, entropies = rollout.score(model, samples, micro)  # [b, C]
            old, own = samples.logprobs[micro], table.rows(micro)
            part, clipped = run.scope_loss(logprobs, old, entropies, mask[micro], own, *clip)
            (part * num_batches).backward()  # w_i are shares of a step; this is one of its batches
            loss += part.detach()
            num_tokens += mask[micro].sum()
            num_clipped += clipped
        norms.append(gradient_step(run))

    # 6. Set the temperature of the next step by this step's entropy.
    run.rule(H)
    run.step += 1
    run.problems_seen += len(problems)
    metrics = {"step": run.step, "entropy": H, "scope_temperature": T, "scope_alpha": alpha}
    metrics |= {"loss": float(loss), "clip_fraction": float(num_clipped / max(1, num_tokens))}
    metrics |= {"grad_norm": mean(norms), **sample_metrics(samples, groups, auxiliary)}
    return metrics, examples(asked, samples, rewards, temperatures)


def sample_metrics(samples, groups: Tensor, auxiliary: Tensor) -> dict:
    """Means over a step's ordinary completions, and the share of auxiliary ones that count.

    Of the other metrics, entropy is in nats a token, and of the policy before the update. The loss
    is -J. grad_norm is before clipping. clip_fraction is the share of the tokens taught whose
    gradient the ratio's clip removed. scope_alpha is alpha with its boost.
    """
    N, M = groups.numel(), len(auxiliary)
    lengths = samples.completion_mask[:N].sum(1).float()
    equal = groups.std(1) == 0  # [P] groups without advantages
    return {
        "reward": groups.mean().item(),
        "frac_reward_zero_std": equal.float().mean().item(),
        "scope_positive_frac": (auxiliary == 1).sum().item() / max(1, M),
        "completion_length": lengths.mean().item(),  # tokens
        "truncated_frac": samples.truncated[:N].float().mean().item(),  # they have reward 0
        "rollout_seconds": samples.seconds,
    }


def examples(asked: list[Problem], samples, rewards: Tensor, temperatures: Tensor) -> list[str]:
    """The first and the last completion of a step, a line each."""
    lines = []
    for i in (0, -1):
        question, text = asked[i].question, samples.texts[i]
        drawn = f"T {temperatures[i]:.2f}, reward {rewards[i]:g}"
        lines.append(f"{drawn}: {question!r:.100} -> {text!r:.400}")
    return lines


def problems_of_step(run: "Run") -> list[Problem]:
    """The next P problems: passes over all of them, each in its own random order."""
    problems, chosen = run.task.train, []
    count = run.config.generation_batch_size // run.config.num_generations
    for place in range(run.problems_seen, run.problems_seen + count):
        number, i = divmod(place, len(problems))  # which pass it is, and where in it
        if i == 0 or not chosen:
            generator = np.random.default_rng([run.config.seed, number])
            order = generator.permutation(len(problems))
        chosen.append(problems[order[i]])
    return chosen


def grade(task: Task, problems: list[Problem], samples: rollout.Rollout) -> Tensor:
    """Rewards `[B]` of completions, 0 where they are truncated. RewardError for a bad reward."""
    answered = zip(problems, samples.texts, strict=True)
    rewards = [reward.reward_of(task, problem, text) for problem, text in answered]
    ended = ~samples.truncated
    earned = torch.tensor(rewards, device=ended.device)
    return earned * ended


def gradient_step(run: "Run") -> float:
    """Move the weights by the gradient that is there. Returns its norm before it was clipped."""
    warm_up = min(1.0, (run.step + 1) / WARMUP_STEPS)
    group = run.optimizer.param_groups[0]
    group["lr"] = run.config.learning_rate * warm_up
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), MAX_GRAD_NORM)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return norm.item()


def mean(values: list[float]) -> float:
    """The mean, which is 0 of no values."""
    return float(np.mean(values)) if values else 0.0


# --- The run
def evaluate(run: "Run", name: str) -> None:
    """Print and save means of Pass@k and `distinct_correct`, unless that was done before."""
    if name in run.evaluations or not run.task.test:
        return
    config, model = run.config, run.model.eval()
    n, size = config.num_eval_generations, config.generation_batch_size
    length = config.max_completion_length

    # Sample each problem n times. The random numbers are the same for every run and batch size.
    asked = [problem for problem in run.task.test for _ in range(n)]
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(len(asked), length, dtype=torch.float64, generator=generator)
    texts, rewards = [], []
    starts = range(0, len(asked), size)
    for start in tqdm(starts, "evaluate", leave=False):
        rows = slice(start, start + size)
        batch = asked[rows]
        prompts = [run.prompts[problem.question] for problem in batch]
        ones = torch.ones(len(batch))
        samples = rollout.generate(model, run.tokenizer, prompts, ones, length, uniforms[rows])
        if run.stopped_by:
            raise KeyboardInterrupt(f"by {run.stopped_by}, in an evaluation")
        texts += samples.texts
        rewards += grade(run.task, batch, samples).tolist()

    # Measure each problem. A grade below 1 is not a right answer.
    num_right, distinct = [], []
    for start in range(0, len(asked), n):
        own = slice(start, start + n)
        num_right.append(rewards[own].count(1))
        distinct.append(reward.distinct_correct(texts[own], rewards[own]))
    means = {}
    for k in (1, 4, 16, 64, 256):
        if k <= n:
            chances = [reward.pass_at_k(n, right, k) for right in num_right]
            means[f"pass@{k}"] = mean(chances)
    means["distinct_correct"] = mean(distinct)
    shown = [f"{key} {value:.3g}" for key, value in means.items()]
    tqdm.write(f"{name}: {', '.join(shown)}")
    means["num_right"] = num_right
    run.evaluations[name] = means
    write_whole(run.output / "eval.json", run.evaluations)


def train(run: "Run") -> None:
    """The whole run: evaluate, train, evaluate, save the model. A line of metrics every step."""
    config, recent = run.config, deque(maxlen=10)
    evaluate(run, "before")
    bar = tqdm(initial=run.step, total=config.max_steps, bar_format=BAR)
    with open(run.output / "metrics.jsonl", "a", buffering=1) as metrics_file, bar:
        while run.step < config.max_steps:
            started = time.perf_counter()
            try:
                metrics, shown = train_step(run)
            except RewardError:
                save_checkpoint(run)  # with the steps before this one
                raise
            metrics["step_seconds"] = time.perf_counter() - started
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise FloatingPointError(f"{name} of step {run.step} is not finite")

            # First to the files, and then to the screen, which may be gone.
            metrics_file.write(json.dumps(metrics) + "\n")
            is_last = run.step == config.max_steps or run.stopped_by
            if is_last or run.step % config.save_steps == 0:
                os.fsync(metrics_file.fileno())
                save_checkpoint(run)
            bar.set_postfix_str(POSTFIX.format(**metrics), refresh=False)
            bar.update()
            if run.stopped_by:
                raise KeyboardInterrupt(f"by {run.stopped_by}; step {run.step} is saved")
            if (run.step - 1) % config.save_steps == 0:
                tqdm.write(f"step {run.step}")
                for line in shown:
                    tqdm.write(f"  {line}")

            # Say so when there is nothing to learn from.
            recent.append(metrics)
            if sum(step["grad_norm"] == 0 for step in recent) >= 8:
                tqdm.write(f"8 of 10 steps taught nothing: {reason(recent)}")
                recent.clear()

    evaluate(run, "after")
    with one_line_error(f"cannot write {run.output / 'model'}", OSError):
        run.model.save_pretrained(run.output / "model")
        run.tokenizer.save_pretrained(run.output / "model")
    folder = shlex.quote(str(run.output))
    print(f"all is in {folder}; to see its course: python theory/tools/plot.py {folder}")


def reason(steps: deque) -> str:
    """Why steps had no gradient, and what helps."""
    if mean([step["truncated_frac"] for step in steps]) > 0.5:
        return "most completions are cut off; raise --max_completion_length"
    if mean([step["reward"] for step in steps]) > 0.5:
        return "all answers to a question are right; take harder ones"
    return "all answers to a question are wrong; take easier ones, another --instruction or model"


# ------------------------------------------------------------------------------------------------
# The machine room: options, set-up, files, command line. There is no algorithm from here on.
# ------------------------------------------------------------------------------------------------
THEORY = Path(__file__).parent / "theory"
COUNTDOWN = f"{THEORY}/tiny/countdown.py"
BETWEEN = f"{THEORY}/tiny/between.py"
START = f"{THEORY}/tiny/start-0"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
PRESETS = "qwen3-0.6b", "laptop", "tiny"
PRESET_HELP = "constants: qwen3-0.6b if there is a GPU, else laptop if --model is given, else tiny"
BAR = "{n}/{total} |{bar}| {elapsed}<{remaining}{postfix}"
POSTFIX = "R={reward:.2f} H={entropy:.2f} T={scope_temperature:.2f}"


def option(default, help: str, laptop=None, tiny=None, **more):
    """A field of Config: its value in each preset, its help, and maybe its choices or minimum."""
    presets = {"qwen3-0.6b": default, "laptop": laptop, "tiny": tiny}
    for preset, value in presets.items():
        presets[preset] = default if value is None else value
    return field(default=default, metadata={"help": help, "presets": presets, **more})


@dataclass
class Config:
    """Everything that a run depends on. Raises ValueError, which names what cannot work.

    The first value is that of the preset qwen3-0.6b: the published constants, on one GPU. They are
    too weak for `tiny` (a Qwen3 of 108 thousand parameters): with 1/64 for share and alpha T sticks
    at 1.2 while H drifts down. So `tiny` and `laptop` have more, and a rule without an offset.
    """

    preset: str = option("qwen3-0.6b", PRESET_HELP, choices=PRESETS, group="run")
    output_dir: str = option("", "folder of the run; by default a new one in outputs/")
    resume: bool = option(False, "go on with the run in output_dir")
    seed: int = option(0, "seed for training; evaluations always use the same one", minimum=0)
    max_steps: int = option(500, "steps; each samples once", laptop=45, tiny=350)
    save_steps: int = option(50, "steps between checkpoints, and between samples shown", laptop=15)

    model: str = option("Qwen/Qwen3-0.6B", "folder, or hub name", laptop=SMOLLM2, tiny=START, group="task")
    task: str = option("gsm8k", "gsm8k, or a file with `task`", laptop=BETWEEN, tiny=COUNTDOWN)
    train_file: str | None = option(None, "JSONL with question and answer, for task gsm8k")
    test_file: str | None = option(None, "the same, to evaluate; by default a tenth of train_file")
    instruction: str | None = option(None, "said after each question; by default the task's")
    num_eval_problems: int = option(128, "evaluated before and after", laptop=16, minimum=0)
    num_eval_generations: int = option(8, "samples of each: the largest k of Pass@k", tiny=64)

    algorithm: str = option("scope", "grpo is GRPO alone", choices=("scope", "grpo"), group="GRPO")
    generation_batch_size: int = option(128, "ordinary completions a step", laptop=48, tiny=512)
    num_generations: int = option(8, "G, completions of a prompt", laptop=4, minimum=2)
    max_completion_length: int = option(512, "tokens; longer ones earn nothing", laptop=12, tiny=12)
    num_mini_batches: int = option(2, "gradient steps on each step's samples")
    learning_rate: float = option(1e-6, "of AdamW, constant after warm-up", laptop=1e-5, tiny=3e-4)
    epsilon: float = option(0.2, "the ratio is clipped below 1 - epsilon and above 1 + epsilon")
    epsilon_high: float | None = option(None, "upper clip (clip-higher); by default epsilon")
    entropy_coef: float = option(0.0, "of an entropy bonus, the usual alternative to SCOPE")

    scope_target_entropy: float = option(0.5, "H0, nats a token", laptop=0.8, tiny=0.4, group="SCOPE")
    scope_alpha: float = option(1 / 64, "alpha, the weight of the term", laptop=2.0, tiny=1.0)
    scope_share: float = option(1 / 64, "auxiliary samples per ordinary one", laptop=0.5, tiny=0.25)
    scope_temperature_min: float = option(0.8, "smallest T", laptop=0.9, tiny=0.5, minimum=0.01)
    scope_temperature_max: float = option(1.2, "largest T", laptop=1.5, tiny=1.5, minimum=0.01)
    scope_gain: float = option(1.0, "temperature per nat", tiny=8.0)
    scope_integral_gain: float = option(0.0, "per nat and step; published: 0", laptop=0.2, tiny=0.4)
    scope_max_boost: float = option(1.0, "largest factor of alpha while T is at T_max", minimum=1)

    bf16: bool = option(True, "body in bfloat16", laptop=False, tiny=False, group="machine")
    per_device_train_batch_size: int = option(8, "completions in a pass", laptop=36, tiny=1024)

    def __post_init__(self) -> None:
        # Each value by itself.
        problems = []
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            kinds = typing.get_args(option.type) or (option.type,)
            choices = option.metadata.get("choices", [value])
            least = option.metadata.get("minimum", 1 if int in kinds else 0)
            if float in kinds:
                kinds = (int, *kinds)
            if value == "" or type(value) not in kinds or value not in choices:
                problems.append(f"{name} cannot be {value!r}")
            elif type(value) in (int, float) and not least <= value <= 1e9:
                problems.append(f"{name} must be from {least} to 1e9")
        if problems:
            raise ValueError("; ".join(problems))

        # What does not go together.
        num_prompts = self.generation_batch_size / self.num_generations
        has_file = self.train_file or self.test_file
        wrong = {
            "generation_batch_size must be a multiple of num_generations": num_prompts % 1 > 0,
            "num_mini_batches is more than a step's prompts": self.num_mini_batches > num_prompts,
            "epsilon must be below 1": self.epsilon >= 1,
            "scope_temperature_min is above scope_temperature_max": (
                self.scope_temperature_min > self.scope_temperature_max
            ),
            "train_file and test_file need --task gsm8k": has_file and self.task != "gsm8k",
            "train_file needs --model or --preset laptop: that of tiny reads no words": (
                has_file and self.model == START
            ),
        }
        problems = [problem for problem, is_there in wrong.items() if is_there]
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
    prompts: dict[str, str]  # what the model is asked, by question
    output: Path  # its folder
    generate: Callable = rollout.generate
    objective_table: Callable = scope_rl.objective_table
    scope_loss: Callable = scope_rl.scope_loss
    step: int = 0
    problems_seen: int = 0
    evaluations: dict[str, dict] = field(default_factory=dict)  # what eval.json holds
    stopped_by: str = ""  # a signal, after which the run ends with the step it is in
    lock: filelock.BaseFileLock | None = None  # on the folder, for as long as the run lives


# --- Set-up
def set_up(config: Config) -> Run:
    """Everything a run needs, and its checkpoint. Raises ValueError before it writes anything."""
    output = Path(config.output_dir)
    names = "config.json", "metrics.jsonl", "checkpoint.pt", "model"
    found = [name for name in names if (output / name).exists()]
    if found and not config.resume:
        held = ", ".join(found)
        raise ValueError(f"{output} holds {held}: add --resume, or take another folder")
    is_name = re.fullmatch(r"[\w-]+(/[\w.-]+)?", config.model)
    if not is_name and not Path(config.model).is_dir():
        raise ValueError(f"there is no folder {config.model}: if it was moved, give --model")
    task = load_task(config)
    with one_line_error(f"cannot use the model {config.model}"):
        model, tokenizer = rollout.load_policy(config.model, config.bf16)

    is_cuda = model.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=is_cuda)
    prompts = prompts_of(config, task, model, tokenizer)
    run = Run(config, task, model, tokenizer, optimizer, rule_of(config), prompts, output)

    output.mkdir(parents=True, exist_ok=True)
    run.lock = filelock.FileLock(output / "lock", timeout=0)
    with one_line_error(f"cannot lock {output} (does another run write into it?)"):
        run.lock.acquire()
    if config.resume:
        load_checkpoint(run)
    write_whole(output / "config.json", vars(config) | {"resume": False})
    return run


def rule_of(config: Config) -> scope_rl.TemperatureRule:
    """The temperature rule of a run. GRPO's has no gain, so its T is always 1."""
    if config.num_auxiliary == 0:
        return scope_rl.TemperatureRule(config.scope_target_entropy, gain=0.0)
    return scope_rl.TemperatureRule(
        target=config.scope_target_entropy,
        gain=config.scope_gain,
        integral_gain=config.scope_integral_gain,
        minimum=config.scope_temperature_min,
        maximum=config.scope_temperature_max,
        max_boost=config.scope_max_boost,
    )


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
            if not task.train or not problems_of(task):
                raise ValueError("it has no problems to train on")
    return task._replace(test=task.test[: config.num_eval_problems])


def problems_of(task: Task) -> list[list[str]]:
    """Question and answer of all problems, by which a resumed run knows its data."""
    pairs = []
    for problem in task.train + task.test:
        pairs.append([problem.question, str(problem.answer)])
    return pairs


def prompts_of(config: Config, task: Task, model, tokenizer) -> dict[str, str]:
    """The prompt of each question. Raises ValueError for what this model cannot be asked."""
    questions = [problem.question for problem in task.train + task.test]
    instruction = config.instruction or task.instruction
    with one_line_error("a question, or the model's chat template, cannot be used"):
        prompts = rollout.format_prompts(tokenizer, questions, instruction)
        ids = tokenizer(prompts, add_special_tokens=False).input_ids

    # The tokenizer must tell questions from each other, and fit the model.
    lengths = [len(row) for row in ids]
    all_equal = all(row == ids[0] for row in ids)
    if min(lengths) == 0 or (all_equal and len(set(questions)) > 1):
        raise ValueError(f"questions are empty or the same to {config.model}: check its tokenizer")
    V = model.get_input_embeddings().num_embeddings
    largest = max(max(row) for row in ids)
    if largest >= V:
        raise ValueError(f"the tokenizer has a token {largest}, but {config.model} only {V}")
    if config.scope_target_entropy >= math.log(V):
        raise ValueError(f"scope_target_entropy must be below log {V}, the largest entropy")

    # The model must have room for the longest prompt and its completion.
    longest, room = max(lengths), rollout.room(model)
    if longest + config.max_completion_length > room:
        question = questions[lengths.index(longest)]
        needed = f"{longest} prompt tokens + max_completion_length exceed {room}"
        raise ValueError(f"{needed}: {question!r:.60}")
    return dict(zip(questions, prompts, strict=True))


# --- Files
def write_whole(path: Path, content: dict) -> None:
    """Write JSON, or a checkpoint, and put it in place at once. Raises OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with one_line_error(f"cannot write {path}", OSError):
            if path.suffix == ".json":
                temporary.write_text(json.dumps(content) + "\n")
            else:
                torch.save(content, temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # what a full disk leaves


def save_checkpoint(run: Run) -> None:
    """Save weights, optimizer, and the state that steps hand on."""
    for name, weight in run.model.named_parameters():
        if not weight.isfinite().all():
            raise FloatingPointError(f"{name} is not finite after step {run.step}")
    content = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "rule": run.rule.state_dict(),
        "step": run.step,
        "problems_seen": run.problems_seen,
        "evaluations": run.evaluations,
        "problems": problems_of(run.task),
        "prompts": run.prompts,  # a chat template may hold the date
    }
    write_whole(run.output / "checkpoint.pt", content)


def load_checkpoint(run: Run) -> None:
    """Restore what `save_checkpoint` saved, if it did. ValueError for a damaged or foreign file."""
    path = run.output / "checkpoint.pt"
    metrics = run.output / "metrics.jsonl"
    lines = []
    if metrics.exists():
        every = metrics.read_bytes().splitlines(keepends=True)
        lines = [line for line in every if line.endswith(b"\n")]  # a kill may have cut the last
    if path.exists():
        with one_line_error(f"cannot resume from {path}"):
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content["problems"] != problems_of(run.task):
                raise ValueError("other problems, or another num_eval_problems, than at its start")
            run.model.load_state_dict(content["model"])
            run.optimizer.load_state_dict(content["optimizer"])
            run.rule.load_state_dict(content["rule"])
            run.prompts.update(content["prompts"])
            run.step, run.problems_seen = content["step"], content["problems_seen"]
            run.evaluations = content["evaluations"]
            if len(lines) < run.step:
                raise ValueError(f"{metrics} is shorter than it was")
    if run.step > run.config.max_steps:
        raise ValueError(f"{run.step} steps are done, so --max_steps must be {run.step} or more")
    with open(metrics, "ab") as file:
        kept = b"".join(lines[: run.step])
        file.truncate(len(kept))  # later steps are done again
    print(f"goes on after step {run.step}")


# --- The command line
def parse_config(argv: list[str]) -> Config:
    """The command line over the preset (--resume: over the run's config). Raises ValueError."""
    given = parse_options(argv)
    if given.get("resume"):
        if "output_dir" not in given:
            raise ValueError("--resume needs --output_dir, the folder of a run")
        with one_line_error("nothing to resume: --output_dir must name the folder of a run"):
            path = Path(given["output_dir"]) / "config.json"
            values = dict(json.loads(path.read_text()))
        for name in ("preset", "algorithm", "seed", "instruction"):
            if given.get(name, values.get(name)) != values.get(name):
                raise ValueError(f"a resumed run keeps its {name}: start another one for that")
    else:
        preset = "laptop" if "model" in given else "tiny"
        if torch.cuda.is_available():
            preset = "qwen3-0.6b"
        preset = given.get("preset", preset)
        values = {}
        for name, option in OPTIONS.items():
            values[name] = option.metadata["presets"][preset]
        algorithm = given.get("algorithm", "scope")
        started = time.strftime("%Y%m%d-%H%M%S")
        folder = f"outputs/{preset}-{algorithm}-{started}-{os.getpid()}"
        values |= {"preset": preset, "output_dir": folder}
    values |= given
    ignored = [name for name in given if name.startswith("scope_")]
    if ignored and values["algorithm"] == "grpo":
        raise ValueError(f"{', '.join(ignored)} without effect on --algorithm grpo")
    try:
        return Config(**values)
    except TypeError as error:
        raise ValueError(f"config.json does not fit: {error}") from None


def parse_options(argv: list[str]) -> dict:
    """The options that are given, and no others. Raises ValueError."""

    def refuse(message: str) -> None:
        raise ValueError(message)

    about = "Train a language model with SCOPE-RL. In brackets: the default, or if presets differ "
    about += f"those of {', '.join(PRESETS)}."
    usage = "python train.py [--OPTION VALUE ...]"
    parser = argparse.ArgumentParser(description=about, usage=usage, allow_abbrev=False)
    parser.error = refuse
    for name, option in OPTIONS.items():
        more = option.metadata
        if "group" in more:
            group = parser.add_argument_group(more["group"])

        # The type is the first of `float | None`. A bool may stand alone or have a value.
        kind = (typing.get_args(option.type) or [option.type])[0]
        settings = {"type": kind, "choices": more.get("choices")}
        if kind is bool:
            settings = {"type": string_to_bool, "nargs": "?", "const": True}
        values = [str(value) for value in more["presets"].values()]
        if len(set(values)) == 1:
            values = values[:1]
        shown = ", ".join(values)
        shown = shown.replace(f"{THEORY.parent}/", "")
        text = more["help"]
        if option.default not in (None, "") and name != "preset":
            text += f" [{shown}]"
        group.add_argument(f"--{name}", help=text, default=argparse.SUPPRESS, **settings)
    return vars(parser.parse_args(argv))


def main(argv: list[str] = ()) -> None:
    """The command line: bad input ends in one line, an interruption in how to go on."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # for what a terminal cannot show
    try:
        run = set_up(parse_config(argv))
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        said = str(error).strip() or "interrupted before it began"
        sys.exit(f"error: {said}")

    stop_at_signals(run)
    config, parameters = run.config, run.model.num_parameters()
    task = Path(config.task).stem
    megabytes = 16 * parameters / 1e6
    print(f"preset {config.preset}: {config.algorithm} on {task}, into {run.output}")
    print(f"{parameters:,} parameters on {run.model.device}")
    print(f"{len(run.task.train)} problems to train on")
    print(f"needs {megabytes:,.0f} MB of disk, and nearly as much again while it saves")
    resume = f"to go on: python train.py --resume --output_dir {shlex.quote(str(run.output))}"
    try:
        train(run)
    except torch.OutOfMemoryError:
        smaller = "per_device_train_batch_size or generation_batch_size"
        sys.exit(f"out of memory: lower {smaller}\n{resume}")
    except FloatingPointError as error:
        lower = config.learning_rate / 2
        sys.exit(f"stopped: {error}\n{resume} --learning_rate {lower:g}")
    except (KeyboardInterrupt, RewardError, OSError) as error:
        reason = str(error) or "at once, without the last steps"
        sys.exit(f"stopped: {reason}\n{resume}")
    finally:
        # A notebook goes on, and so its next run may need the folder and the signals.
        run.lock.release()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stop_at_signals(run: Run) -> None:
    """Let Ctrl-C and SIGTERM end the run after the step it is in, and a second Ctrl-C at once."""

    def stop(number: int, frame) -> None:
        if run.stopped_by and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stopped_by = signal.Signals(number).name
        said = f"\n{run.stopped_by}: ends after this step or batch; Ctrl-C ends it now\n"
        os.write(2, said.encode())

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(sys.argv[1:])
