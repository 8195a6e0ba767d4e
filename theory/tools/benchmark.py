"""How fast, and how much memory?  Two commands, which take train.py's options as well:

    python theory/tools/benchmark.py speed [--repeats 5] [--peer] ...     seconds a step, peak memory
    python theory/tools/benchmark.py memory [--prompt_length 200] ...     gigabytes, calculated

`speed` takes training steps, and prints how long sampling and the update take. Steps without rewards
would skip the update and look fast. So every other completion of a group counts as right, and every
auxiliary one: then all completions teach, and the last line says how many did.

With --peer (the extra `trl`) TRL's GRPOTrainer takes a step before each of ours, in one process.
Compared are steps of GRPO: the same prompts, group size, longest completion, micro-batches, precision
and learning rate, one gradient step a batch, and everything teaches. By default these are 4 prompts x
4 completions x 48 tokens. Each program draws its own completions.

`memory` adds up what a run needs at its longest completions, without running anything.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

import reward
import rollout
import scope_rl
import train

# Options of a comparison with TRL. Those that are given come after them.
PEER = "--algorithm grpo --num_mini_batches 1 --generation_batch_size 16 --num_generations 4 "
PEER += "--max_completion_length 48 --per_device_train_batch_size 16"


# --- Memory, calculated
def parameters_and_shape(name: str) -> tuple[int, transformers.PretrainedConfig]:
    """Number of parameters of a causal LM, and its config. No weights are loaded."""
    with reward.one_line_error(f"cannot read the config of {name}", OSError):
        config = transformers.AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.num_parameters(), config


def memory(config: train.Config, prompt_length: int) -> dict[str, float]:
    """Gigabytes (10^9 bytes) of each part of a run, and what exists at once in a step's two phases.

    Activations count what a transformer block of the Llama and Qwen family keeps for its backward
    pass, a token: 34 hidden-sized values. With gradient checkpointing (which comes with bf16) it is
    one a block, and those of a single block. While a token is drawn there are 10 float32 numbers for
    each row and vocabulary entry: logits, probabilities, their sums in float64, log p, and so on.
    """
    number, shape = parameters_and_shape(config.model)
    layers, width, V = shape.num_hidden_layers, shape.hidden_size, shape.vocab_size
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    head_dim = getattr(shape, "head_dim", None) or width // shape.num_attention_heads
    rows = config.generation_batch_size + config.num_auxiliary
    tokens = prompt_length + config.max_completion_length
    in_micro_batch = min(config.per_device_train_batch_size, rows) * tokens
    chunk = min(rollout.LOGITS_BUDGET, in_micro_batch * V)

    # What bf16 changes: the size of the body's values, a copy of its weights, and checkpointing.
    size, copies, values = 4, 0, 34 * layers
    if config.bf16:
        size, copies, values = 2, 2 * number, layers + 34
    parts = {
        "weights": 4 * number,
        "optimizer": 8 * number,
        "half-precision copies": copies,
        "cache": rows * tokens * 2 * layers * heads * head_dim * size,
        "drawing a token": 10 * 4 * rows * V,
        "gradients": 4 * number,
        "activations": in_micro_batch * values * width * size,
        "logits": 4 * 4 * chunk + 4 * V * width,
    }
    gigabytes = [size / 1e9 for size in parts.values()]
    always, sampling, updating = sum(gigabytes[:3]), sum(gigabytes[3:5]), sum(gigabytes[5:])
    peaks = {"peak while sampling": always + sampling, "peak while updating": always + updating}
    return dict(zip(parts, gigabytes, strict=True)) | peaks


# --- Speed, measured
class Ours:
    """Our training step, timed. Every completion teaches."""

    def __init__(self, config: train.Config) -> None:
        self.run = train.set_up(config)
        problems = self.run.task.train[: config.generation_batch_size // config.num_generations]
        self.run.task = self.run.task._replace(train=problems)
        self.run.objective_table = self.half_are_right
        self.run.generate = self.generate
        self.sampling_peak = 0.0  # GB
        self.steps: list[dict[str, float]] = []  # metrics of each step

    def half_are_right(self, rewards, auxiliary_rewards, *constants) -> scope_rl.Objective:
        """The table of a step in which every other completion of a group is right."""
        right = (torch.arange(rewards.shape[1]) % 2).to(rewards).expand_as(rewards)
        table = scope_rl.objective_table(right, torch.ones_like(auxiliary_rewards), *constants)
        self.taught = int(table.has_gradient().sum())
        return table

    def generate(self, *given) -> rollout.Rollout:
        samples = rollout.generate(*given)
        self.sampling_peak = peak_memory()
        return samples

    def step(self) -> None:
        peak_memory()  # from here on
        started = time.perf_counter()
        metrics, _ = train.train_step(self.run)
        metrics |= {"step_seconds": time.perf_counter() - started, "taught": self.taught}
        metrics |= {"peak while sampling": self.sampling_peak, "peak while updating": peak_memory()}
        self.steps.append(metrics)


def peak_memory() -> float:
    """The most GB allocated on the GPU since the last call. On a CPU: by the process, in its whole life."""
    if not torch.cuda.is_available():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


def with_peer(ours: Ours, repeats: int) -> list[dict[str, float]]:
    """Metrics of TRL's steps, each of which is followed by one of ours."""
    import datasets
    import trl

    config, seconds = ours.run.config, []
    rows, micro_batch = config.generation_batch_size, config.per_device_train_batch_size
    if config.num_auxiliary > 0 or config.num_mini_batches > 1 or rows % micro_batch > 0:
        raise ValueError("--peer needs --algorithm grpo, one mini-batch, and equal micro-batches")

    def every_other(completions, **_) -> list[float]:
        return [float(i % config.num_generations % 2) for i in range(len(completions))]

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__) -> None:
            seconds.append(time.perf_counter() - self.started)
            ours.step()

    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.GRPOConfig(
            folder, max_steps=repeats, generation_batch_size=rows,
            per_device_train_batch_size=micro_batch, gradient_accumulation_steps=rows // micro_batch,
            num_generations=config.num_generations, max_completion_length=config.max_completion_length,
            learning_rate=config.learning_rate, beta=0.0, loss_type="grpo", save_strategy="no",
            bf16=config.bf16, gradient_checkpointing=config.bf16, report_to="none", logging_steps=1,
            use_cpu=ours.run.model.device.type == "cpu", disable_tqdm=True,
        )  # fmt: skip
        asked = [{"prompt": prompt} for prompt in ours.run.prompts.values()]
        data = datasets.Dataset.from_list(asked)
        trainer = trl.GRPOTrainer(config.model, every_other, arguments, data, callbacks=[Turns()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    steps = trainer.state.log_history[:repeats]  # the row after them is a summary
    for step, step_seconds in zip(steps, seconds, strict=True):
        step["taught"] = round(rows * (1 - step["frac_reward_zero_std"]))
        step |= {"step_seconds": step_seconds, "completion_length": step["completions/mean_length"]}
    return steps


def speed(config: train.Config, repeats: int, peer: bool) -> None:
    """Take the steps. Print medians over all but the first, with their range, and the peak memory."""
    ours = Ours(config)
    theirs = with_peer(ours, repeats + 1) if peer else []
    while len(ours.steps) < repeats + 1:
        ours.step()

    def column(steps: list[dict[str, float]], name: str) -> np.ndarray:
        return np.array([step[name] for step in steps[1:]])

    sampling, step = column(ours.steps, "rollout_seconds"), column(ours.steps, "step_seconds")
    table = {"sampling": (sampling, "s"), "update": (step - sampling, "s"), "step": (step, "s")}
    if peer:
        trl_step = column(theirs, "step_seconds")
        table |= {"TRL's step": (trl_step, "s"), "TRL's step / ours": (trl_step / step, "times")}
    for name, (values, unit) in table.items():
        print(f"{name:<20} {np.median(values):8.2f} {unit:<6}", end="")
        print(f" ({values.min():.2f} to {values.max():.2f} {unit})")
    rows, G = config.generation_batch_size, config.num_generations
    print(f"a step: {rows // G} prompts x {G} completions, gradient steps: {config.num_mini_batches}")
    for name, steps in {"ours": ours.steps, "TRL": theirs}.items():
        if steps:
            taught, length = column(steps, "taught"), column(steps, "completion_length")
            print(f"{name}: {taught.min()} of {rows + config.num_auxiliary} completions taught", end="")
            print(f" in each step, their mean length is {length.mean():.1f} tokens")
    sampling, updating = (
        column(ours.steps, f"peak while {phase}").max() for phase in ("sampling", "updating")
    )
    if not torch.cuda.is_available():
        print(f"peak memory of the process: {updating:.2f} GB")
    elif not peer:  # TRL's model would count as well
        print(f"peak memory: {sampling:.2f} GB while sampling, {updating:.2f} GB while updating")


def main(argv: list[str]) -> None:
    """The command line. What is not an option here is train.py's. Bad input ends in one line."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=["speed", "memory"])
    parser.add_argument("--repeats", type=int, default=5, help="steps that are measured")
    parser.add_argument("--peer", action="store_true", help="compare with TRL")
    parser.add_argument("--prompt_length", type=int, default=200, help="tokens of the longest prompt")
    args, options = parser.parse_known_args(argv)
    if args.peer:
        options = [*PEER.split(), *options]
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = train.parse_config([*options, "--output_dir", str(Path(folder) / "run")])
            if args.command == "speed":
                speed(config, args.repeats, args.peer)
            else:
                for name, gigabytes in memory(config, args.prompt_length).items():
                    print(f"{name:<22} {gigabytes:6.1f} GB")
    except ImportError as error:
        sys.exit(f"error: {error}: pip install -e '.[trl]'")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
