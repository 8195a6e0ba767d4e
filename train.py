"""Train a language model with SCOPE-RL:  `python train.py`  (`--help` lists the options).

One step of the loop, with the file that explains each part:

    1. T from the previous step's entropy                         scope_rl.scope_temperature
    2. sample: G completions a prompt at 1, a few more at T       rollout.generate
    3. reward every completion                                    reward.countdown_reward, reward.answer_reward
    4. log pi_old and entropy H of every token                    rollout.score, entropy.logprobs_and_entropies
    5. advantages and weights, then gradient steps on -J          scope_rl.advantages_and_weights, scope_rl.scope_loss

State and files live here and nowhere else. Nothing random is carried from step to step: each step seeds its own
generators from (seed, step), so a run resumed at a step goes on exactly as if it had never stopped.
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
    """A config field with the text that `--help` shows for it."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Everything a run depends on. Defaults are the published constants; a preset adapts them to model and machine."""

    preset: Literal["qwen3-0.6b", "laptop", "tiny"] | None = option(None, "default: by device, and by --model")
    model: str | None = option(None, "causal LM, a folder or a name on the hub; default: the preset's")
    task: Literal["countdown", "gsm8k"] = option("gsm8k", "gsm8k: questions and answers from JSONL files, GSM8K's own by default")
    train_file: str | None = option(None, "JSONL with question and answer (task gsm8k)")
    test_file: str | None = option(None, "the same, for evaluation; default: the last tenth of train_file")
    num_train_problems: int | None = option(None, "train on so many problems; default: all of a file, 128 of countdown")
    num_eval_problems: int = option(128, "problems evaluated before and after, others than those trained on; 0: none")
    num_eval_generations: int = option(8, "samples of each, so that Pass@k is known up to this k")
    output_dir: str | None = option(None, "default: a new folder in outputs/")
    resume: bool = option(False, "continue the run in output_dir, with its config where the command line says nothing")
    seed: int = option(0, "of everything random in training; evaluation always draws the same problems and seeds")

    algorithm: Literal["scope", "grpo", "aepo"] = option("scope", "grpo: no auxiliary term; aepo: switch T, weight = share")
    max_steps: int = option(500, "steps; each samples once")
    generation_batch_size: int = option(128, "ordinary completions a step, num_generations for each prompt")
    num_generations: int = option(8, "G, completions of a prompt")
    max_completion_length: int = option(512, "tokens; a completion that has not ended by then gets reward 0")
    num_mini_batches: int = option(2, "gradient steps on each step's samples")
    per_device_train_batch_size: int = option(8, "completions in a forward and backward pass; does not change the gradient")
    per_device_eval_batch_size: int = option(128, "completions sampled at once in evaluation")
    learning_rate: float = option(1e-6, "of AdamW, constant after the warm-up, no weight decay")
    warmup_steps: int = option(10, "steps over which the learning rate rises linearly")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    epsilon: float = option(0.2, "the ratio is clipped below 1 - epsilon and above 1 + epsilon")
    epsilon_high: float | None = option(None, "clip-higher: the upper range (DAPO: 0.28); default: epsilon")
    entropy_coef: float = option(0.0, "coefficient of an entropy bonus, the usual alternative to SCOPE")

    scope_target_entropy: float = option(0.5, "H0, nats a token")
    scope_alpha: float = option(1 / 64, "alpha: auxiliary samples for each ordinary one, and weight of their term (aepo: 0.117)")
    scope_share: float | None = option(None, "the auxiliary share apart; default: scope_alpha")
    scope_weight: float | None = option(None, "the weight of the term apart; default: scope_alpha")
    scope_temperature_min: float = option(0.8, "lower clip of T")
    scope_temperature_max: float = option(1.2, "upper clip of T")
    scope_gain: float = option(1.0, "temperature per nat of H0 - H")
    scope_integral_gain: float = option(0.0, "temperature per nat and step: removes the rule's offset (ours; 0: as published)")
    scope_integral_band: float = option(0.1, "nats from H0 within which the integral runs")

    bf16: bool = option(False, "autocast to bfloat16; weights, logits and entropies stay float32")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, a third more time")
    logging_steps: int = option(25, "steps between sampled completions on screen; 0: none")
    save_steps: int = option(50, "steps between checkpoints; the last one is kept")

    def __post_init__(self) -> None:
        """Raise ValueError, in one line, for values that cannot work."""
        share, weight = self.scope_share, self.scope_weight
        self.scope_share = self.scope_alpha if share is None else share
        self.scope_weight = self.scope_alpha if weight is None else weight
        for name in ("max_steps", "warmup_steps", "num_eval_problems", "logging_steps", "seed"):
            check(getattr(self, name) >= 0, f"{name} must not be negative")
        for name in ("num_generations", "generation_batch_size", "max_completion_length", "num_mini_batches", "save_steps",
                     "per_device_train_batch_size", "per_device_eval_batch_size", "num_eval_generations",
                     "learning_rate", "max_grad_norm", "scope_temperature_min"):  # fmt: skip
            check(0 < getattr(self, name) < math.inf, f"{name} must be above 0")
        for name in ("epsilon", "epsilon_high", "entropy_coef", "scope_share", "scope_weight", "scope_target_entropy",
                     "scope_gain", "scope_integral_gain", "scope_integral_band"):  # fmt: skip
            value = getattr(self, name)
            check(value is None or 0 <= value < math.inf, f"{name} must be a number, 0 or more")
        check(self.num_train_problems is None or self.num_train_problems > 0, "num_train_problems must be above 0")
        check(self.generation_batch_size % self.num_generations == 0, "generation_batch_size must be a multiple of num_generations")
        check(self.num_mini_batches <= self.prompts_per_step, "num_mini_batches is more than the prompts of a step")
        check(self.scope_temperature_min <= self.scope_temperature_max < math.inf, "scope_temperature_min exceeds scope_temperature_max")

    @property
    def prompts_per_step(self) -> int:
        return self.generation_batch_size // self.num_generations


PRESETS = {
    # One GPU of 40 GB or more. The method's constants are the published ones.
    "qwen3-0.6b": {"model": "Qwen/Qwen3-0.6B", "bf16": True, "gradient_checkpointing": True},
    # Any small LM on a CPU: a look at the real thing, a minute or so a step; too short to learn much.
    "laptop": {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "generation_batch_size": 16, "num_generations": 4,
        "max_completion_length": 96, "max_steps": 20, "learning_rate": 5e-6, "num_eval_problems": 4, "num_eval_generations": 4,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 16, "logging_steps": 1, "save_steps": 5,
    },
    # A model of 108 k parameters: the phenomenon and its control on 2 CPU cores, in minutes. The published constants are
    # too weak at this scale (alpha = 1/64 is 8 samples a step; T is stuck at 1.2), hence its own alpha, gain and range.
    "tiny": {
        "task": "countdown", "generation_batch_size": 512, "num_generations": 8, "max_completion_length": 12,
        "max_steps": 250, "learning_rate": 3e-4, "per_device_train_batch_size": 1024, "per_device_eval_batch_size": 4096,
        "num_eval_generations": 64, "scope_target_entropy": 0.4, "scope_alpha": 0.25, "scope_weight": 1.0,
        "scope_temperature_min": 0.5, "scope_temperature_max": 1.5, "scope_gain": 2.0, "scope_integral_gain": 0.05,
    },
}  # fmt: skip


def check(condition: bool, message: str) -> None:
    """Raise ValueError with a message for the user unless the condition holds."""
    if not condition:
        raise ValueError(message)


def parse_config(argv: list[str] | None = None) -> Config:
    """The command line over the preset (or, with --resume, over the interrupted run's config) over Config's defaults."""
    parser = transformers.HfArgumentParser(Config, description=__doc__.split("\n")[0], allow_abbrev=False)
    args = parser.parse_args(argv)
    if args.resume:
        check(args.output_dir is not None, "--resume needs the --output_dir of the run to continue")
        path = Path(args.output_dir) / "config.json"
        check(path.exists(), f"nothing to resume in {args.output_dir}: it holds no config.json")
        defaults = json.loads(path.read_text())
    else:
        cpu_preset = "laptop" if args.model else "tiny"
        preset = args.preset or ("qwen3-0.6b" if torch.cuda.is_available() else cpu_preset)
        stamp = time.strftime(f"{preset}-{args.algorithm}-%Y%m%d-%H%M%S")
        defaults = PRESETS[preset] | {"preset": preset, "output_dir": f"outputs/{stamp}"}
    parser.set_defaults(**defaults)
    return Config(**vars(parser.parse_args(argv)))


# --- The tiny model: a character-level Qwen3 that knows Countdown a little ----------------------------------------------


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A token for each character of Countdown. Its chat template keeps the question and drops the instruction."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+-,:="])}
    characters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    characters.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.chat_template = "{{ messages[0]['content'].split('\n')[0] }}"
    return tokenizer


def warm_start(folder: Path, steps: int = 1250, batch_size: int = 256, learning_rate: float = 2e-3, seed: int = 0) -> None:
    """Train the tiny model from scratch on random right Countdown expressions, and save it with its tokenizer.

    Supervised, on the training split only, and stopped early on purpose: it then solves about 4 of 10 problems with
    plenty of entropy, which is where RL starts.
    """
    torch.manual_seed(seed)
    rng, tokenizer = random.Random(f"warm start {seed}"), tiny_tokenizer()
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    equals = tokenizer.convert_tokens_to_ids("=")
    for _ in tqdm(range(steps), desc="warm start (once; then cached)"):
        examples = [reward.countdown_example(rng) for _ in range(batch_size)]
        texts = [f"{problem.question}{expression}<eos>" for problem, expression in examples]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        after = (batch.input_ids == equals).cumsum(1) - (batch.input_ids == equals).long()  # 1 after the "="  [B, S]
        labels = batch.input_ids.masked_fill(after * batch.attention_mask == 0, -100)
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def warm_started_model() -> str:
    """The folder of the warm-started tiny model, made on first use. Changing the code that makes it makes a new one."""
    source = "".join(inspect.getsource(f) for f in (tiny_tokenizer, warm_start, reward.countdown_example))
    folder = reward.cache_dir() / f"tiny-{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        warm_start(unfinished)
        os.replace(unfinished, folder) if not folder.exists() else shutil.rmtree(unfinished)
    return str(folder)


# --- Set-up -----------------------------------------------------------------------------------------------------------


def load_policy(config: Config) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in float32 on the GPU if there is one, and its tokenizer.

    Float32 master weights matter: at a learning rate of 1e-6 an update is below half a step of bfloat16 and is lost.

    Raises:
        ValueError: if they cannot be loaded, weights are missing, or the model cannot be scored (rollout.prepare_policy).
    """
    name = config.model or warm_started_model()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, info = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, ...: all mean the same to the user
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load the model {name}: {reason}") from None
    check(not info["missing_keys"], f"the model {name} lacks weights, for example {sorted(info['missing_keys'])[:1]}")
    check(tokenizer.eos_token_id is not None, f"the tokenizer of {name} has no end token")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    rollout.prepare_policy(model)
    if config.gradient_checkpointing:  # named activation_checkpointing_enable in later releases of transformers
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model, tokenizer


def load_task(config: Config) -> Task:
    """The task with as many problems as the config says."""
    if config.task == "countdown":
        return reward.countdown(config.num_train_problems or 128, config.num_eval_problems, config.seed)
    task = reward.question_answer(config.train_file, config.test_file)
    return task._replace(train=task.train[: config.num_train_problems], test=task.test[: config.num_eval_problems])


def check_lengths(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, config: Config) -> None:
    """Raise ValueError if the longest prompt and a full completion do not fit the model's positions."""
    prompts = rollout.format_prompts(tokenizer, [p.question for p in task.train + task.test], task.instruction)
    longest = max(len(ids) for ids in tokenizer(prompts, add_special_tokens=False).input_ids)
    room = getattr(model.config, "max_position_embeddings", None) or math.inf
    needed = longest + config.max_completion_length
    check(needed <= room, f"{longest} prompt tokens + max_completion_length exceed the model's {room} positions")


def autocast(config: Config, model: PreTrainedModel) -> torch.autocast:
    """The precision of every forward pass, the same for sampling and for scoring."""
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=config.bf16)


# --- One step ---------------------------------------------------------------------------------------------------------


@dataclass
class State:
    """What one step hands to the next, beside weights and optimizer."""

    step: int = 0
    entropy: float | None = None  # H of the previous step, nats; None before the first
    integral: float = 0.0  # I of the temperature rule


def control(config: Config, state: State) -> tuple[float, int]:
    """T and the number of auxiliary samples N' of this step. Updates the integral."""
    if config.algorithm == "grpo" or config.scope_share == 0:
        return 1.0, 0
    H = config.scope_target_entropy if state.entropy is None else state.entropy  # nothing known yet: T = 1
    rule = {"target": config.scope_target_entropy, "minimum": config.scope_temperature_min, "maximum": config.scope_temperature_max}
    share = config.scope_share
    if config.algorithm == "aepo":
        temperature, factor = scope_rl.aepo_temperature(H, **rule)
        share *= factor
    else:
        temperature, state.integral = scope_rl.scope_temperature(
            H, state.integral, **rule, gain=config.scope_gain,
            integral_gain=config.scope_integral_gain, integral_band=config.scope_integral_band,
        )  # fmt: skip
    return temperature, max(1, round(share * config.generation_batch_size))


def choose_problems(problems: list[Problem], config: Config, step: int) -> list[Problem]:
    """This step's prompts: passes over the problems, each in a new random order, cut into steps."""
    first = step * config.prompts_per_step
    positions = range(first, first + config.prompts_per_step)
    orders = {i // len(problems): None for i in positions}
    orders = {e: np.random.default_rng([config.seed, e]).permutation(len(problems)) for e in orders}
    return [problems[orders[i // len(problems)][i % len(problems)]] for i in positions]


def update(model, optimizer, samples: rollout.Rollout, terms: dict[str, Tensor], prompt: Tensor, config: Config) -> dict[str, float]:
    """Gradient steps on -J: one a mini-batch of prompts, accumulated over micro-batches of completions.

    Args:
        terms: per sample `[B]` advantages, weights, bonus_weights; per token `[B, T]` old_logprobs.
        prompt: `[B]`, which of the step's prompts a sample belongs to.

    Returns:
        loss, grad_norm and clip_fraction, averaged over the mini-batches that had something to learn from.
    """
    useful = (terms["advantages"] * terms["weights"] != 0) | (terms["bonus_weights"] != 0)  # the rest has no gradient
    stats = []
    for m in range(config.num_mini_batches):
        rows = (useful & (prompt % config.num_mini_batches == m)).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        rows = rows[samples.attention_mask[rows].sum(1).argsort(stable=True)]  # like lengths together: less padding
        loss, clipped, tokens = 0.0, 0, int(samples.completion_mask[rows].sum())
        for index in rows.split(config.per_device_train_batch_size):
            micro = samples.rows(index)
            T = micro.completion_mask.shape[1]
            with autocast(config, model):
                logprobs, entropies = rollout.score(model, micro)  # [b, T]
            micro_loss, micro_clipped = scope_rl.scope_loss(
                logprobs, terms["old_logprobs"][index, :T], entropies, micro.completion_mask,
                terms["advantages"][index], terms["weights"][index], terms["bonus_weights"][index],
                config.epsilon, config.epsilon_high,
            )  # fmt: skip
            micro_loss = micro_loss * config.num_mini_batches  # weights are 1 / N of the step: scale to the mini-batch
            micro_loss.backward()
            loss, clipped = loss + micro_loss.item(), clipped + int(micro_clipped)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        stats.append((loss, float(norm), clipped / tokens))
    means = np.mean(stats, axis=0).tolist() if stats else [0.0, 0.0, 0.0]
    return dict(zip(("loss", "grad_norm", "clip_fraction"), means, strict=True))


def train_step(model, tokenizer, optimizer, task: Task, config: Config, state: State) -> tuple[dict, list[str]]:
    """One step: control, sample, reward, score, update. Returns its metrics and two sampled completions to show."""
    start, G, P = time.perf_counter(), config.num_generations, config.prompts_per_step
    torch.manual_seed(config.seed * 1_000_003 + state.step)
    temperature, num_auxiliary = control(config, state)  # T and N'

    # Sample, all in one call: G ordinary completions of each prompt, then the auxiliary ones, spread over the prompts.
    problems = choose_problems(task.train, config, state.step)
    prompt = torch.cat([torch.arange(P).repeat_interleave(G), torch.arange(num_auxiliary) % P]).to(model.device)  # [N + N']
    problems = [problems[i] for i in prompt.tolist()]
    temperatures = torch.tensor([1.0] * (P * G) + [temperature] * num_auxiliary)
    formatted = rollout.format_prompts(tokenizer, [p.question for p in problems], task.instruction)
    rollout.set_gradient_checkpointing(model, False)
    with autocast(config, model):
        samples = rollout.generate(model, tokenizer, formatted, temperatures, config.max_completion_length)
    rewards = torch.tensor(rewards_of(task, problems, samples), device=model.device)  # [N + N']
    sampled = time.perf_counter()

    old_logprobs, entropies = score_all(model, samples, config)  # [N + N', T]
    ordinary, N = slice(0, P * G), P * G
    mask = samples.completion_mask[ordinary]
    state.entropy = float(masked_mean(entropies[ordinary], mask))  # H(pi_old), over all ordinary tokens
    scope_weight = num_auxiliary / N if config.algorithm == "aepo" else config.scope_weight
    advantages, weights = scope_rl.advantages_and_weights(rewards[ordinary].view(P, G), rewards[N:], scope_weight)
    bonus_weights = torch.zeros_like(weights)
    bonus_weights[ordinary] = config.entropy_coef / N
    terms = {"advantages": advantages, "weights": weights, "bonus_weights": bonus_weights, "old_logprobs": old_logprobs}
    learning_rate = config.learning_rate * min(1.0, (state.step + 1) / max(1, config.warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    rollout.set_gradient_checkpointing(model, config.gradient_checkpointing)
    stats = update(model, optimizer, samples, terms, prompt, config)

    state.step += 1
    metrics = {
        "step": state.step,
        "reward": float(rewards[ordinary].mean()),
        "entropy": state.entropy,
        "scope_temperature": temperature,
        "scope_positive_frac": float(rewards[N:].mean()) if num_auxiliary else 0.0,
        **stats,
        "completion_length": float(mask.sum(1).float().mean()),
        "truncated_frac": float(samples.truncated[ordinary].float().mean()),
        "learning_rate": learning_rate,
        "rollout_seconds": sampled - start,
        "update_seconds": time.perf_counter() - sampled,
        "tokens_per_second": int(samples.completion_mask.sum()) / (time.perf_counter() - start),
    }
    shown = [(i, 1.0) for i in (0,)] + [(N, temperature)] * (num_auxiliary > 0)
    lines = [f"  T={t:.2f} R={rewards[i]:.0f}  {problems[i].question!r} -> {samples.texts[i]!r}" for i, t in shown]
    return metrics, lines


def rewards_of(task: Task, problems: list[Problem], samples: rollout.Rollout) -> list[float]:
    """The reward of each completion. A truncated one never gave its answer: it gets 0, whatever it says, and stays in."""
    finished = (~samples.truncated).tolist()
    return [task.reward(p, text) * done for p, text, done in zip(problems, samples.texts, finished, strict=True)]


@torch.no_grad()
def score_all(model: PreTrainedModel, samples: rollout.Rollout, config: Config) -> tuple[Tensor, Tensor]:
    """rollout.score in micro-batches, without gradients: `[B, T]` log-probabilities and entropies."""
    logprobs = torch.zeros(samples.completion_mask.shape, device=model.device)
    entropies = torch.zeros_like(logprobs)
    for index in torch.arange(len(logprobs), device=model.device).split(config.per_device_train_batch_size):
        micro = samples.rows(index)
        T = micro.completion_mask.shape[1]
        with autocast(config, model):
            logprobs[index, :T], entropies[index, :T] = rollout.score(model, micro)
    return logprobs, entropies


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, config: Config) -> dict[str, float]:
    """Pass@1, Pass@k and distinct right answers per problem on the test problems, sampled at temperature 1."""
    torch.manual_seed(0)
    n = config.num_eval_generations
    problems = [problem for problem in task.test for _ in range(n)]
    texts, rewards, lengths = [], [], []
    rollout.set_gradient_checkpointing(model, False)
    for first in tqdm(range(0, len(problems), config.per_device_eval_batch_size), desc="evaluate", leave=False):
        batch = problems[first : first + config.per_device_eval_batch_size]
        formatted = rollout.format_prompts(tokenizer, [p.question for p in batch], task.instruction)
        with autocast(config, model):
            samples = rollout.generate(model, tokenizer, formatted, torch.ones(len(batch)), config.max_completion_length)
        texts += samples.texts
        rewards += rewards_of(task, batch, samples)
        lengths += samples.completion_mask.sum(1).tolist()
    groups = [slice(first, first + n) for first in range(0, len(problems), n)]
    correct = [int(sum(rewards[group])) for group in groups]
    ks = sorted({1, n} | {4**i for i in range(1, 6) if 4**i < n})
    result = {f"pass@{k}": float(np.mean([reward.pass_at_k(n, c, k) for c in correct])) for k in ks}
    result["distinct_correct"] = float(np.mean([reward.distinct_correct(texts[g], rewards[g]) for g in groups]))
    return result | {"samples": n, "problems": len(groups), "completion_length": float(np.mean(lengths))}


# --- Files ------------------------------------------------------------------------------------------------------------


def write_whole(path: Path, write) -> None:
    """Let `write(temporary_path)` write the file, then put it in place at once: a crash leaves the old file or the new."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Weights, optimizer, and the state that steps hand on; schedule, data and random numbers follow from the step."""
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": dataclasses.asdict(state)}
    write_whole(path, lambda temporary: torch.save(content, temporary))


def load_checkpoint(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> State:
    """Restore what `save_checkpoint` wrote. Raises ValueError if the file is damaged or of another model."""
    try:
        content = torch.load(path, map_location=model.device, weights_only=True)
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        return State(**content["state"])
    except Exception as error:  # a truncated zip, a foreign pickle, other keys or shapes
        raise ValueError(f"cannot resume from {path}: {str(error).splitlines()[0]}") from None


def open_metrics(path: Path, step: int):
    """Open metrics.jsonl for appending, after dropping rows beyond `step` (a killed run's) and a half-written last line."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = "".join(line + "\n" for line in lines[:step])  # a row a step, in order
    write_whole(path, lambda temporary: temporary.write_text(kept))
    return open(path, "a", buffering=1)


# --- The loop ---------------------------------------------------------------------------------------------------------


def train(config: Config) -> Path:
    """The whole run. Returns the output folder."""
    output = Path(config.output_dir)
    started = (output / "config.json").exists()
    check(config.resume or not started, f"{output} already holds a run: continue it with --resume, or give another --output_dir")
    task = load_task(config)
    model, tokenizer = load_policy(config)
    check_lengths(model, tokenizer, task, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    checkpoint = output / "checkpoint.pt"
    state = load_checkpoint(checkpoint, model, optimizer) if config.resume and checkpoint.exists() else State()
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "config.json", dataclasses.asdict(config) | {"resume": False})
    announce(config, model, task, state)

    evaluations = json.loads((output / "eval.json").read_text()) if state.step else {}
    if not evaluations:
        evaluations["before"] = evaluate(model, tokenizer, task, config)
        write_json(output / "eval.json", evaluations)
    tqdm.write(f"before: {summary(evaluations['before'])}")

    with open_metrics(output / "metrics.jsonl", state.step) as log:
        bar = tqdm(range(state.step, config.max_steps), initial=state.step, total=config.max_steps, desc="train")
        for step in bar:
            metrics, lines = train_step(model, tokenizer, optimizer, task, config, state)
            log.write(json.dumps(metrics) + "\n")
            bar.set_postfix_str("reward {reward:.2f}, entropy {entropy:.3f}, T {scope_temperature:.2f}".format(**metrics))
            if config.logging_steps and step % config.logging_steps == 0:
                tqdm.write("\n".join([f"step {state.step}", *lines]))
            if state.step % config.save_steps == 0 or state.step == config.max_steps:
                save_checkpoint(checkpoint, model, optimizer, state)

    evaluations["after"] = evaluate(model, tokenizer, task, config)
    write_json(output / "eval.json", evaluations)
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    print(f"after:  {summary(evaluations['after'])}\nmodel, metrics and evaluation are in {output}")
    return output


def announce(config: Config, model: PreTrainedModel, task: Task, state: State) -> None:
    """Say in a few lines what is about to run, and where it departs from the published constants."""
    parameters = sum(p.numel() for p in model.parameters())
    print(f"preset {config.preset} on {model.device}: {config.algorithm} on {config.task}, {parameters:,} parameters, "
          f"{len(task.train)} problems, steps {state.step} to {config.max_steps}, in {config.output_dir}")  # fmt: skip
    published = {f.name: f.default for f in dataclasses.fields(Config) if f.name.startswith("scope_")}
    published |= {"scope_share": published["scope_alpha"], "scope_weight": published["scope_alpha"]}
    changed = {name: getattr(config, name) for name, value in published.items() if getattr(config, name) != value}
    if changed and config.algorithm == "scope":
        print("not the published constants:", ", ".join(f"{name} {value:g}" for name, value in changed.items()))


def summary(evaluation: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in evaluation.items() if name.startswith(("pass", "distinct")))


def write_json(path: Path, value: dict) -> None:
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def main() -> None:
    transformers.logging.set_verbosity_error()
    try:
        train(parse_config())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
