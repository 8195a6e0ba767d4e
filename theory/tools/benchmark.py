"""How fast, and how much memory?  Two commands, which take train.py's options as well:

    python theory/lab/benchmark.py speed [--repeats 5] [--peer] ...     seconds a step, by phase; peak memory
    python theory/lab/benchmark.py memory [--prompt_length 200] ...     gigabytes, calculated, nothing is run

`speed` takes training steps on a model and says how long sampling and updating took, and what they
would take at the least on this machine. Every completion counts and half of them are rewarded, so
that every group has something to learn. With --peer (the extra `trl`) TRL's GRPOTrainer takes its
steps in turn with ours, in one process, on the same prompts, group size, lengths and precision,
without gradient checkpointing, one gradient step a batch (give ours --num_mini_batches 1).
"""

import argparse
import resource
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers

import train


def parameters_and_shape(name: str) -> tuple[int, transformers.PretrainedConfig]:
    """Number of parameters of a causal LM, and its config; no weights are loaded."""
    config = transformers.AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.num_parameters(), config


def memory(config: train.Config, prompt_length: int) -> dict[str, float]:
    """Gigabytes (10^9 bytes) of each part of a run, at the longest completions; see `main` for the sums.

    Activations count what a transformer block of the Llama and Qwen family keeps for its backward
    pass, a token: 34 hidden-sized values without gradient checkpointing, and with it one a block and
    those of a single block.
    """
    number, shape = parameters_and_shape(config.model)
    half = 2 if config.bf16 else 4  # bytes of a value in the body
    layers, width, vocabulary = shape.num_hidden_layers, shape.hidden_size, shape.vocab_size
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    head_dim = getattr(shape, "head_dim", None) or width // shape.num_attention_heads
    tokens = prompt_length + config.max_completion_length
    rows = config.generation_batch_size * (1 + config.scope_alpha * (config.algorithm == "scope"))
    evaluated = min(config.per_device_eval_batch_size, config.num_eval_problems * config.num_eval_generations)
    in_micro_batch = config.per_device_train_batch_size * tokens
    blocks = layers + 34 if config.gradient_checkpointing else 34 * layers
    chunk = min(train.rollout.LOGITS_BUDGET, in_micro_batch * vocabulary)
    return {
        "weights": 4 * number / 1e9,
        "optimizer": 8 * number / 1e9,
        "gradients": 4 * number / 1e9,
        "half-precision copies": (2 * number if config.bf16 else 0) / 1e9,
        "cache": max(rows, evaluated) * tokens * 2 * layers * heads * head_dim * half / 1e9,
        "activations": in_micro_batch * blocks * width * half / 1e9,
        "logits": (4 * 4 * chunk + 4 * vocabulary * width) / 1e9,
    }


def coin_toss(problem, completion: str) -> float:
    """A reward that half of all texts earn, whatever the task: nearly every group has something to learn."""
    return float(zlib.crc32(completion.encode()) % 2)


def as_if_ended(*given) -> train.rollout.Rollout:
    """`rollout.generate`, whose truncated completions may earn their reward too, as TRL's do."""
    samples = GENERATE(*given)
    samples.truncated[:] = False
    LAST["samples"] = samples
    return samples


GENERATE, LAST = train.rollout.generate, {}


class Ours:
    """Our training step, timed, with something to learn from every group."""

    def __init__(self, config: train.Config) -> None:
        self.run, self.steps = train.set_up(config), []
        self.run.task = self.run.task._replace(reward=coin_toss)
        train.rollout.generate = as_if_ended

    def step(self) -> None:
        metrics, _ = train.train_step(self.run)
        self.steps.append([metrics["rollout_seconds"], metrics["update_seconds"]])


def with_peer(ours: Ours, config: train.Config, repeats: int) -> list[float]:
    """Seconds of TRL's steps, each followed by one of ours."""
    import datasets
    import trl

    rows = [{"prompt": ours.run.prompts[p.question], "problem": i} for i, p in enumerate(ours.run.task.train)]

    def rewarded(completions, problem, **kwargs):
        pairs = zip(problem, completions, strict=True)
        return [ours.run.task.reward(ours.run.task.train[i], text) for i, text in pairs]

    class Turns(transformers.TrainerCallback):
        """Seconds of each of TRL's steps."""

        def __init__(self):
            self.seconds = []

        def on_step_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            self.seconds.append(time.perf_counter() - self.start)
            ours.step()

    turns = Turns()
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.GRPOConfig(
            folder, max_steps=repeats, per_device_train_batch_size=config.generation_batch_size,
            num_generations=config.num_generations, max_completion_length=config.max_completion_length,
            learning_rate=config.learning_rate, beta=0.0, loss_type="grpo", temperature=1.0, top_k=0, top_p=1.0,
            bf16=config.bf16, gradient_checkpointing=False, report_to="none", save_strategy="no",
            use_cpu=ours.run.model.device.type == "cpu", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            config.model, rewarded, arguments, datasets.Dataset.from_list(rows), callbacks=[turns]
        )
        trainer.train()
    return turns.seconds


def seconds_of(work, repeats: int = 10) -> float:
    """Mean time of a call, after one that is not counted."""
    work()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def floor(run: train.Run) -> tuple[float, float]:
    """Seconds that sampling and updating on the last step's samples would take at the least.

    Floating-point operations at the speed of a matrix product, and for sampling, if that is more, one
    reading of the weights for each token at the speed of a copy.
    """
    a, block = (torch.randn(1024, 1024, device=run.model.device) for _ in range(2))
    speed = 2 * 1024**3 / seconds_of(lambda: a @ block)
    copy = torch.randn(2**25, device=run.model.device)
    bandwidth = 2 * 4 * copy.numel() / seconds_of(copy.clone)

    samples, V = LAST["samples"], run.model.get_input_embeddings().num_embeddings
    head = V * run.model.get_output_embeddings().in_features
    body = run.model.num_parameters() - head
    sampled, all_tokens = samples.completion_mask.sum().item(), samples.lengths.sum().item()
    prompts = (all_tokens - sampled) / run.config.num_generations
    steps = samples.completion_mask.sum(1).max().item()
    operations = 2 * body * (prompts + sampled) + 2 * head * sampled
    sampling = max(operations / speed, 4 * (body + head) * steps / bandwidth)
    return sampling, (6 * body * all_tokens + 8 * head * sampled) / speed


def speed(config: train.Config, repeats: int, peer: bool) -> None:
    """Take the steps and print medians over all but the first, with the range; then peak memory and floor."""
    ours = Ours(config)
    theirs = with_peer(ours, config, repeats + 1) if peer else []
    for _ in range(0 if peer else repeats + 1):
        ours.step()
    steps = np.array(ours.steps)[1:]
    columns = {"sampling": steps[:, 0], "update": steps[:, 1], "step": steps.sum(1)}
    if peer:
        columns |= {"TRL's step": np.array(theirs)[1:], "TRL / ours": np.array(theirs)[1:] / steps.sum(1)}
    for name, values in columns.items():
        print(f"{name:<20} {np.median(values):8.2f}   {values.min():.2f} to {values.max():.2f}")
    for name, seconds in zip(("floor of sampling", "floor of updating"), floor(ours.run), strict=True):
        print(f"{name:<20} {seconds:8.2f}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    print(f"{'peak memory, GB':<20} {memory / 1e9:8.2f}")


def main() -> None:
    """Read the command line; what is not an option here is train.py's."""
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=["speed", "memory"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--prompt_length", type=int, default=200, help="tokens of the longest prompt")
    args, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        config = train.parse_config([*rest, "--output_dir", str(Path(folder) / "run")])
        if args.command == "speed":
            speed(config, args.repeats, args.peer)
            return
    parts = memory(config, args.prompt_length)
    for name, size in parts.items():
        print(f"{name:<24} {size:6.1f} GB")
    fixed = parts["weights"] + parts["optimizer"] + parts["half-precision copies"]
    print(f"{'peak while sampling':<24} {fixed + parts['cache']:6.1f} GB")
    updating = fixed + parts["gradients"] + parts["activations"] + parts["logits"]
    print(f"{'peak while updating':<24} {updating:6.1f} GB")


if __name__ == "__main__":
    main()
