"""A number between two others: a task for a pretrained model whose questions have many right answers.

`Pick a number between 23 and 53.` is answered right by `34`, by `The number is 50.` and by every
other completion whose last number lies between: 29 numbers, and as many forms as the model knows.
So a policy can be right and varied at once, and there is an entropy to be held.
"""

import random
import re

from reward import Problem, Task

# A pretrained model, on a laptop. T cools little (0.9): colder samples would hasten the fall to below the target.
PRESET = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "task": str(__file__), "max_steps": 45,
    "logging_steps": 9, "save_steps": 15, "generation_batch_size": 48, "num_generations": 4,
    "max_completion_length": 12, "learning_rate": 1e-5, "warmup_steps": 3,
    "num_eval_problems": 16, "per_device_train_batch_size": 16, "bf16": False, "gradient_checkpointing": False,
    "scope_target_entropy": 0.5, "scope_alpha": 0.5, "scope_weight": 2.0,
    "scope_temperature_min": 0.9, "scope_temperature_max": 1.75, "scope_gain": 2.0,
    "scope_integral_gain": 0.05, "scope_integral_band": 0.25,
}  # fmt: skip
INSTRUCTION = "Reply with the number only."
LARGEST, WIDTHS = 99, range(28, 33)


def problem(low: int, high: int) -> Problem:
    """The question, and its two numbers in place of an answer."""
    return Problem(f"Pick a number between {low} and {high}.", f"{low} {high}")


def is_between(problem: Problem, text: str) -> float:
    """1 if the last run of digits in a completion, read as a number, lies between, else 0."""
    low, high = map(int, problem.answer.split())
    numbers = re.findall(r"\d+", text)
    return float(bool(numbers) and low < int(numbers[-1][:9]) < high)


def task(config) -> Task:
    """Problems to train on, in an order of the run's seed, and others, which are the same for every seed."""
    problems = [problem(low, low + width) for width in WIDTHS for low in range(1, LARGEST + 1 - width)]
    random.Random("test").shuffle(problems)
    test, train = problems[: len(problems) // 8], problems[len(problems) // 8 :]
    random.Random(config.seed).shuffle(train)
    return Task(train, test, INSTRUCTION, is_between)
