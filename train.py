"""Train a language model with SCOPE-RL:  `python train.py`  (`--help` lists the options).

One step of the loop, with the function that explains each part:

    1. T from the previous step's entropy                         scope_rl.scope_temperature
    2. sample: G completions a prompt at 1, a few more at T       rollout.generate
    3. reward every completion                                    reward.countdown_reward, reward.answer_reward
    4. log pi_old and entropy H of every token                    rollout.score, entropy.logprobs_and_entropies
    5. advantages and weights, then gradient steps on -J          scope_rl.advantages_and_weights, scope_rl.scope_loss

State and files live here and nowhere else. Nothing random is carried from step to step: each step seeds its own
generators from (seed, step), so a run resumed at a step goes on as if it had never stopped.
"""

import dataclasses
import hashlib
import inspect
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import reward
import rollout
import scope_rl
from entropy import masked_mean
from reward import Problem, Task


def option(default, help: str):
    """A config field, with the text that `--help` shows for it."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Everything a run depends on. Defaults are the published constants; a preset adapts them to model and machine."""

    preset: Literal["qwen3-0.6b", "laptop", "tiny"] | None = option(None, "default: by device, and by --model")
    model: str | None = option(None, "causal LM, a folder or a name on the hub; default: the preset's")
    task: Literal["countdown", "gsm8k"] = option("gsm8k", "gsm8k: questions and answers, its own or your files'")
    train_file: str | None = option(None, "JSONL with question and answer, for task gsm8k")
    test_file: str | None = option(None, "the same, to evaluate on; default: the last tenth of train_file")
    instruction: str | None = option(None, "what the model is told after each question; default: the task's")
    num_train_problems: int | None = option(None, "use so many; default: all of a file, 128 of countdown")
    num_eval_problems: int = option(128, "problems evaluated before and after training, 0 for none")
    num_eval_generations: int = option(8, "samples of each: Pass@k is known up to this k")
    output_dir: str | None = option(None, "default: a new folder in outputs/")
    resume: bool = option(False, "continue the run in output_dir, with its config where the command line says nothing")
    seed: int = option(0, "of everything random in training; evaluation is always drawn alike")

    algorithm: Literal["scope", "grpo", "aepo"] = option(
        "scope", "grpo: no auxiliary term; aepo: T switches, weight = share"
    )
    max_steps: int = option(500, "steps; each samples once")
    generation_batch_size: int = option(128, "ordinary completions a step, num_generations for each prompt")
    num_generations: int = option(8, "G, completions of a prompt")
    max_completion_length: int = option(512, "tokens; a completion not ended by then gets reward 0")
    mask_truncated_completions: bool = option(False, "and also leave such completions out of the loss")
    num_mini_batches: int = option(2, "gradient steps on each step's samples")
    per_device_train_batch_size: int = option(8, "completions in a forward pass; does not change the gradient")
    per_device_eval_batch_size: int = option(128, "completions sampled at once in evaluation")
    learning_rate: float = option(1e-6, "of AdamW, constant after the warm-up, no weight decay")
    warmup_steps: int = option(10, "steps over which the learning rate rises")
    max_grad_norm: float = option(1.0, "longer gradients are scaled down to this norm")
    epsilon: float = option(0.2, "the ratio is clipped below 1 - epsilon and above 1 + epsilon")
    epsilon_high: float | None = option(None, "clip-higher: its upper range (DAPO: 0.28); default: epsilon")
    entropy_coef: float = option(0.0, "coefficient of an entropy bonus, the usual alternative to SCOPE")

    scope_target_entropy: float = option(0.5, "H0, nats a token")
    scope_alpha: float = option(1 / 64, "auxiliary samples for each ordinary one, and the weight of their term")
    scope_share: float | None = option(None, "the share apart; default: scope_alpha")
    scope_weight: float | None = option(None, "the weight apart; default: scope_alpha")
    scope_temperature_min: float = option(0.8, "lower clip of T")
    scope_temperature_max: float = option(1.2, "upper clip of T")
    scope_gain: float = option(1.0, "temperature per nat of H0 - H")
    scope_integral_gain: float = option(0.0, "temperature per nat and step; removes the rule's offset (ours)")
    scope_integral_band: float = option(0.1, "nats from H0 within which the integral runs")

    bf16: bool = option(False, "autocast to bfloat16; weights, logits and entropies stay float32")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    logging_steps: int = option(25, "steps between sampled completions on screen, 0 for none")
    save_steps: int = option(50, "steps between checkpoints; the last is kept")

    def __post_init__(self) -> None:
        """Fill in what follows from other options. Raises ValueError, in one line, for values that cannot work."""
        self.scope_share = self.scope_alpha if self.scope_share is None else self.scope_share
        self.scope_weight = self.scope_alpha if self.scope_weight is None else self.scope_weight
        above_zero = ["num_train_problems", "num_eval_generations", "num_generations", "generation_batch_size",
                      "max_completion_length", "num_mini_batches", "per_device_train_batch_size", "save_steps",
                      "per_device_eval_batch_size", "max_grad_norm", "scope_temperature_min"]  # fmt: skip
        for name, value in vars(self).items():
            if isinstance(value, int | float):
                check(0 <= value < math.inf, f"{name} is {value}, must be a number and not negative")
                check(value > 0 or name not in above_zero, f"{name} must be above 0")
        remainder = self.generation_batch_size % self.num_generations
        check(remainder == 0, "generation_batch_size must be a multiple of num_generations")
        check(self.num_mini_batches <= self.prompts_per_step, "num_mini_batches is more than the prompts of a step")
        ordered = self.scope_temperature_min <= self.scope_temperature_max
        check(ordered, "scope_temperature_min exceeds scope_temperature_max")

    @property
    def prompts_per_step(self) -> int:
        return self.generation_batch_size // self.num_generations


PRESETS = {
    # One GPU. The method's constants are the published ones.
    "qwen3-0.6b": {"model": "Qwen/Qwen3-0.6B", "bf16": True, "gradient_checkpointing": True},
    # Any small LM on a CPU: a look at the real thing, about half a minute a step, too short to learn much.
    "laptop": {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "generation_batch_size": 16, "num_generations": 4,
        "max_completion_length": 128, "max_steps": 20, "learning_rate": 5e-6, "num_eval_problems": 4,
        "num_eval_generations": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 5,
    },
    # 108 k parameters: collapse and control in minutes on 2 CPU cores. The published constants are too weak at this
    # scale (alpha = 1/64 is 8 samples a step, and T sticks at 1.2 as H drifts down), hence others here.
    "tiny": {
        "task": "countdown", "generation_batch_size": 512, "num_generations": 8, "max_completion_length": 12,
        "max_steps": 350, "learning_rate": 3e-4, "num_eval_generations": 64,
        "per_device_train_batch_size": 1024, "per_device_eval_batch_size": 4096,
        "scope_target_entropy": 0.4, "scope_alpha": 0.25, "scope_weight": 1.0, "scope_temperature_min": 0.5,
        "scope_temperature_max": 1.5, "scope_gain": 2.0, "scope_integral_gain": 0.05,
    },
}  # fmt: skip


def check(condition: bool, message: str) -> None:
    """Raise ValueError with a message for the user unless the condition holds."""
    if not condition:
        raise ValueError(message)


def parse_config(argv: list[str] | None = None) -> Config:
    """The command line over the preset (with --resume: over the interrupted run's config) over Config's defaults."""
    parser = transformers.HfArgumentParser(Config, description=__doc__.split("\n")[0], allow_abbrev=False)
    args = parser.parse_args(argv)
    if args.resume:
        path = Path(args.output_dir or "") / "config.json"
        try:
            defaults = json.loads(path.read_text())
        except (OSError, ValueError):
            raise ValueError(f"nothing to resume: --output_dir must name a run's folder; cannot read {path}") from None
    else:
        preset = args.preset or ("qwen3-0.6b" if torch.cuda.is_available() else "laptop" if args.model else "tiny")
        folder = time.strftime(f"outputs/{preset}-{args.algorithm}-%Y%m%d-%H%M%S")
        defaults = PRESETS[preset] | {"preset": preset, "output_dir": folder}
    parser.set_defaults(**defaults)
    return Config(**vars(parser.parse_args(argv)))


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A token for each character of Countdown. Its chat template keeps the question and drops the instruction."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+-,:="])}
    characters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    characters.decoder = tokenizers.decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=characters, **special)
    tokenizer.chat_template = "{{ messages[0]['content'].split('\n')[0] }}"
    return tokenizer


def warm_start(folder: Path, steps: int = 3500, batch_size: int = 64, peak_lr: float = 4e-3, seed: int = 0) -> None:
    """Train the tiny model from scratch on random right Countdown expressions; save it and its tokenizer in `folder`.

    Supervised, and on problems of the training split only. Stopped early on purpose: it then solves almost half of the
    problems with plenty of entropy, which is where RL starts.
    """
    torch.manual_seed(seed)
    rng, tokenizer = random.Random(f"warm start {seed}"), tiny_tokenizer()
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, head_dim=16,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=steps)
    for _ in tqdm(range(steps), desc="warm start, once"):
        examples = [reward.countdown_example(rng) for _ in range(batch_size)]
        texts = [f"{problem.question}{expression}<eos>" for problem, expression in examples]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        equals = (batch.input_ids == tokenizer.convert_tokens_to_ids("=")).long()
        learned = (equals.cumsum(1) - equals) * batch.attention_mask  # 1 after the "=" up to <eos>  [B, S]
        labels = batch.input_ids.masked_fill(learned == 0, -100)
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def warm_started_model(seed: int = 0) -> str:
    """The folder of the warm-started tiny model, made on first use; changing the code that makes it makes a new one."""
    source = "".join(inspect.getsource(f) for f in (tiny_tokenizer, warm_start, reward.countdown_example))
    folder = reward.cache_dir() / f"tiny-{hashlib.sha256(source.encode()).hexdigest()[:12]}-{seed}"
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        warm_start(unfinished, seed=seed)
        shutil.rmtree(unfinished) if folder.exists() else os.replace(unfinished, folder)  # another run may be first
    return str(folder)


@dataclass
class Run:
    """A run: its parts, and the state that one step hands to the next."""

    config: Config
    task: Task
    prompts: dict[str, str]  # each question as the model is asked it
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    step: int = 0
    entropy: float | None = None  # H of the previous step, nats; None before the first
    integral: float = 0.0  # I of the temperature rule


def load_policy(config: Config) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in float32 and on the GPU if there is one, and its tokenizer.

    Float32 weights matter: at a learning rate of 1e-6 an update is below half a step of bfloat16, and would be lost.

    Raises:
        ValueError: if they cannot be loaded, weights are missing, or rollout.prepare_policy refuses the model.
    """
    name = config.model or warm_started_model()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, info = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError ...: all the same to the user
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load the model {name}: {reason}") from None
    check(not info["missing_keys"], f"the model {name} lacks weights, for example {sorted(info['missing_keys'])[:1]}")
    check(tokenizer.eos_token_id is not None, f"the tokenizer of {name} has no end token")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    rollout.prepare_policy(model)
    return model, tokenizer


def set_up(config: Config) -> Run:
    """Load everything a run needs, and its checkpoint if it resumes. Raises ValueError for input that cannot work."""
    output = Path(config.output_dir)
    fresh = config.resume or not (output / "config.json").exists()
    check(fresh, f"{output} holds a run already: add --resume, or choose another --output_dir")
    if config.task == "countdown":
        task = reward.countdown(config.num_train_problems or 128, config.num_eval_problems, config.seed)
    else:
        task = reward.question_answer(config.train_file, config.test_file)
        task = task._replace(train=task.train[: config.num_train_problems], test=task.test[: config.num_eval_problems])
    model, tokenizer = load_policy(config)
    questions = [problem.question for problem in task.train + task.test]
    prompts = rollout.format_prompts(tokenizer, questions, config.instruction or task.instruction)
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False).input_ids]
    check(min(lengths) > 0, f"the tokenizer of {config.model} makes nothing of a prompt: are its files complete?")
    room = getattr(model.config, "max_position_embeddings", None) or math.inf
    fits = max(lengths) + config.max_completion_length <= room
    check(fits, f"{max(lengths)} prompt tokens + max_completion_length exceed the {room} positions of the model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    run = Run(config, task, dict(zip(questions, prompts, strict=True)), model, tokenizer, optimizer)
    if config.resume and (output / "checkpoint.pt").exists():
        load_checkpoint(run)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "config.json", dataclasses.asdict(config) | {"resume": False})
    return run


def control(run: Run) -> tuple[float, int]:
    """T and N', the number of auxiliary samples, of this step. Moves the integral on."""
    config = run.config
    if config.algorithm == "grpo" or config.scope_share == 0:
        return 1.0, 0
    H = config.scope_target_entropy if run.entropy is None else run.entropy  # nothing known yet: T = 1
    limits = {"minimum": config.scope_temperature_min, "maximum": config.scope_temperature_max}
    factor = 1.0
    if config.algorithm == "aepo":
        temperature, factor = scope_rl.aepo_temperature(H, target=config.scope_target_entropy, **limits)
    else:
        temperature, run.integral = scope_rl.scope_temperature(
            H, run.integral, target=config.scope_target_entropy, **limits, gain=config.scope_gain,
            integral_gain=config.scope_integral_gain, integral_band=config.scope_integral_band,
        )  # fmt: skip
    return temperature, max(1, round(factor * config.scope_share * config.generation_batch_size))


def choose_problems(problems: list[Problem], count: int, seed: int, step: int) -> list[Problem]:
    """The `count` problems of a step: passes over all problems, each in its own random order, cut into steps."""
    passes = [divmod(i, len(problems)) for i in range(step * count, (step + 1) * count)]
    orders = {n: np.random.default_rng([seed, n]).permutation(len(problems)) for n in {n for n, _ in passes}}
    return [problems[orders[n][i]] for n, i in passes]


def sample(run: Run, problems: list[Problem], temperatures: Tensor) -> tuple[rollout.Rollout, list[float]]:
    """A completion of each problem at its temperature, and the rewards.

    A truncated completion never gave its answer: it gets 0 whatever it says, and stays in the loss.
    """
    prompts = [run.prompts[problem.question] for problem in problems]
    rollout.set_gradient_checkpointing(run.model, False)
    with autocast(run):
        samples = rollout.generate(run.model, run.tokenizer, prompts, temperatures, run.config.max_completion_length)
    ended = (~samples.truncated).tolist()
    return samples, [run.task.reward(p, text) * e for p, text, e in zip(problems, samples.texts, ended, strict=True)]


def autocast(run: Run) -> torch.autocast:
    """The precision of every forward pass, the same for sampling and for scoring."""
    return torch.autocast(run.model.device.type, dtype=torch.bfloat16, enabled=run.config.bf16)


@torch.no_grad()
def score_all(run: Run, samples: rollout.Rollout) -> tuple[Tensor, Tensor]:
    """rollout.score of all samples in micro-batches, without gradients: `[B, T]` log-probabilities and entropies."""
    rows = torch.arange(len(samples.texts), device=run.model.device)
    with autocast(run):
        parts = [rollout.score(run.model, samples, r) for r in rows.split(run.config.per_device_train_batch_size)]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def update(run: Run, samples: rollout.Rollout, prompt: Tensor, old_logprobs: Tensor, terms: dict[str, Tensor]) -> dict:
    """Gradient steps on -J: one a mini-batch of prompts, accumulated over micro-batches of completions.

    Args:
        prompt: `[B]`, which of the step's prompts a sample belongs to.
        old_logprobs: `[B, T]`.
        terms: advantages, weights and bonus_weights of `scope_loss`, each `[B]`.

    Returns:
        loss, grad_norm and clip_fraction, averaged over the mini-batches that had something to learn from.
    """
    config, stats = run.config, []
    useful = (terms["advantages"] * terms["weights"] != 0) | (terms["bonus_weights"] != 0)  # the rest has no gradient
    clips = {"epsilon": config.epsilon, "epsilon_high": config.epsilon_high}
    rollout.set_gradient_checkpointing(run.model, config.gradient_checkpointing)
    for m in range(config.num_mini_batches):
        rows = (useful & (prompt % config.num_mini_batches == m)).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        rows = rows[samples.attention_mask[rows].sum(1).argsort(stable=True)]  # like lengths together: less padding
        loss, clipped = 0.0, 0.0
        for micro in rows.split(config.per_device_train_batch_size):
            with autocast(run):
                logprobs, entropies = rollout.score(run.model, samples, micro)  # [b, T]
            mask, of_micro = samples.completion_mask[micro], {name: term[micro] for name, term in terms.items()}
            part, part_clipped = scope_rl.scope_loss(
                logprobs, old_logprobs[micro], entropies, mask, **of_micro, **clips
            )
            part.backward()
            loss, clipped = loss + part.item(), clipped + part_clipped.item()
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.max_grad_norm).item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient of step {run.step + 1} is not finite; try a lower learning_rate")
        run.optimizer.step()
        run.optimizer.zero_grad()
        stats.append((loss, norm, clipped / samples.completion_mask[rows].sum().item()))
    means = np.mean(stats, axis=0).tolist() if stats else [0.0, 0.0, 0.0]
    return dict(zip(("loss", "grad_norm", "clip_fraction"), means, strict=True))


def train_step(run: Run) -> tuple[dict[str, float], list[str]]:
    """One step: control, sample, reward, score, update. Returns its metrics, and lines that show two completions."""
    config, start = run.config, time.perf_counter()
    N, P, G = config.generation_batch_size, config.prompts_per_step, config.num_generations
    torch.manual_seed(config.seed * 1_000_003 + run.step)
    temperature, num_auxiliary = control(run)  # T, N'

    # G ordinary completions of each prompt at temperature 1, then the auxiliary ones at T, spread over the prompts.
    prompt = torch.cat([torch.arange(P).repeat_interleave(G), torch.arange(num_auxiliary) % P])  # [N + N']
    chosen = choose_problems(run.task.train, P, config.seed, run.step)
    problems = [chosen[p] for p in prompt.tolist()]
    temperatures = torch.tensor([1.0] * N + [temperature] * num_auxiliary)  # [N + N']
    samples, rewards = sample(run, problems, temperatures)
    rewards = torch.tensor(rewards, device=run.model.device)  # [N + N']
    rollout_seconds = time.perf_counter() - start

    old_logprobs, entropies = score_all(run, samples)  # [N + N', T]
    ordinary = samples.completion_mask[:N]
    run.entropy = masked_mean(entropies[:N], ordinary).item()  # H(pi_old), of all ordinary tokens
    alpha = num_auxiliary / N if config.algorithm == "aepo" else config.scope_weight
    advantages, weights = scope_rl.advantages_and_weights(rewards[:N].view(P, G), rewards[N:], alpha)
    if config.mask_truncated_completions:
        weights = weights * ~samples.truncated
    bonus_weights = torch.full_like(weights, config.entropy_coef / N)
    bonus_weights[N:] = 0.0
    M = config.num_mini_batches  # weights sum to 1 over the step, so to 1 / M over one of its M mini-batches
    terms = {"advantages": advantages, "weights": weights * M, "bonus_weights": bonus_weights * M}
    learning_rate = config.learning_rate * min(1.0, (run.step + 1) / max(1, config.warmup_steps))
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    stats = update(run, samples, prompt.to(rewards.device), old_logprobs, terms)

    run.step += 1
    seconds = time.perf_counter() - start
    metrics = {
        "step": run.step,
        "reward": rewards[:N].mean().item(),
        "entropy": run.entropy,
        "scope_temperature": temperature,
        "scope_positive_frac": rewards[N:].mean().item() if num_auxiliary else 0.0,
        **stats,
        "completion_length": ordinary.sum(1).float().mean().item(),
        "truncated_frac": samples.truncated[:N].float().mean().item(),
        "learning_rate": learning_rate,
        "rollout_seconds": rollout_seconds,
        "update_seconds": seconds - rollout_seconds,
        "tokens_per_second": samples.completion_mask.sum().item() / seconds,
    }
    shown = [(0, 1.0), (N, temperature)][: 2 if num_auxiliary else 1]
    line = "  T {:.2f}, reward {:.0f}: {!r:.100} -> {!r:.400}".format
    return metrics, [line(T, rewards[i], problems[i].question, samples.texts[i]) for i, T in shown]


def evaluate(run: Run) -> dict[str, float]:
    """Pass@1, Pass@k and distinct right answers a test problem, at temperature 1; always seeded alike."""
    n, size, texts, rewards = run.config.num_eval_generations, run.config.per_device_eval_batch_size, [], []
    torch.manual_seed(0)
    problems = [problem for problem in run.task.test for _ in range(n)]
    for first in tqdm(range(0, len(problems), size), desc="evaluate", leave=False):
        batch = problems[first : first + size]
        samples, batch_rewards = sample(run, batch, torch.ones(len(batch)))
        texts, rewards = texts + samples.texts, rewards + batch_rewards
    groups = [slice(first, first + n) for first in range(0, len(problems), n)]
    ks = [k for k in (1, 4, 16, 64, 256) if k <= n]
    means = {f"pass@{k}": [reward.pass_at_k(n, int(sum(rewards[g])), k) for g in groups] for k in ks}
    means["distinct_correct"] = [reward.distinct_correct(texts[g], rewards[g]) for g in groups]
    return {name: float(np.mean(values)) for name, values in means.items() if values}


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then put it in place at once: a crash leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: dict) -> None:
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def save_checkpoint(run: Run) -> None:
    """Weights, optimizer, and the state that steps hand on; schedule, data and random numbers follow from the step."""
    state = {"step": run.step, "entropy": run.entropy, "integral": run.integral}
    content = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "state": state}
    write_whole(Path(run.config.output_dir) / "checkpoint.pt", lambda temporary: torch.save(content, temporary))


def load_checkpoint(run: Run) -> None:
    """Restore what `save_checkpoint` wrote. Raises ValueError if the file is damaged or another model's."""
    path = Path(run.config.output_dir) / "checkpoint.pt"
    try:
        content = torch.load(path, map_location=run.model.device, weights_only=True)
        run.model.load_state_dict(content["model"])
        run.optimizer.load_state_dict(content["optimizer"])
        run.step, run.entropy, run.integral = (content["state"][key] for key in ("step", "entropy", "integral"))
    except Exception as error:  # a cut-off zip, a foreign pickle, other keys or shapes
        raise ValueError(f"cannot resume from {path}: {(str(error) or repr(error)).splitlines()[0]}") from None


def open_metrics(path: Path, steps: int):
    """metrics.jsonl, open for appending, without the rows that a killed run wrote after its last checkpoint."""
    rows = path.read_text().splitlines()[:steps] if path.exists() else []  # a row a step
    write_whole(path, lambda temporary: temporary.write_text("".join(row + "\n" for row in rows)))
    return open(path, "a", buffering=1)


def announce(run: Run) -> None:
    """Say in a few lines what is about to run, and where it departs from the published constants."""
    config, published = dataclasses.asdict(run.config), dataclasses.asdict(Config())
    print(
        "preset {preset}: {algorithm} on {task}, steps {0} to {max_steps}, into {output_dir}".format(run.step, **config)
    )
    print(f"{run.model.num_parameters():,} parameters on {run.model.device}, {len(run.task.train)} problems")
    ours = {name: value for name, value in config.items() if name.startswith("scope_") and value != published[name]}
    if ours and run.config.algorithm == "scope":
        print("not the published constants:", ", ".join(f"{name} {value:g}" for name, value in ours.items()))


def train(run: Run) -> None:
    """The whole run: evaluate, train, evaluate, save the model; every step's metrics on the way."""
    config, output = run.config, Path(run.config.output_dir)
    announce(run)
    evaluations = json.loads((output / "eval.json").read_text()) if run.step else {}
    if not evaluations:
        evaluations["before"] = evaluate(run)
        write_json(output / "eval.json", evaluations)
    summary = lambda when: ", ".join(f"{name} {value:.3f}" for name, value in evaluations[when].items())  # noqa: E731
    print(f"before: {summary('before')}")
    with open_metrics(output / "metrics.jsonl", run.step) as metrics_file:
        bar = tqdm(range(run.step, config.max_steps), initial=run.step, total=config.max_steps, desc="train")
        for step in bar:
            metrics, lines = train_step(run)
            metrics_file.write(json.dumps(metrics) + "\n")
            bar.set_postfix_str(
                "reward {reward:.2f}, entropy {entropy:.3f}, T {scope_temperature:.2f}".format(**metrics)
            )
            if config.logging_steps and step % config.logging_steps == 0:
                tqdm.write("\n".join([f"step {run.step}", *lines]))
            if run.step % config.save_steps == 0 or run.step == config.max_steps:
                save_checkpoint(run)
    evaluations["after"] = evaluate(run)
    write_json(output / "eval.json", evaluations)
    run.model.save_pretrained(output / "model")
    run.tokenizer.save_pretrained(output / "model")
    print(f"after: {summary('after')}\nconfig, metrics, evaluations and the model are in {output}")


def main() -> None:
    """The command line: bad input ends in one line, an interruption in how to go on."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        run = set_up(parse_config())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        train(run)
    except (KeyboardInterrupt, FloatingPointError) as stop:
        sys.exit(
            f"stopped: {stop or 'by hand'}\nto go on: python train.py --resume --output_dir {run.config.output_dir}"
        )


if __name__ == "__main__":
    main()
