"""Sums of two small numbers, asked in words: a task for a pretrained model on a laptop.

`What is 7 + 12?` is answered right by `19`, and by `The answer is 19.` and every other completion
whose last number is 19: a question has many right answers, so entropy can be held without costing
reward. The questions are short, and so are the answers once the model has learnt to give the number.
"""

import random

from reward import Problem, Task, answer_reward

# A pretrained model, on a laptop. What is settled here is the reward; the entropy is not held by the
# term as it is (README.md, *A pretrained model*): hotter than 1.5 hardly any sample is right.
PRESET = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "task": str(__file__), "max_steps": 40,
    "logging_steps": 4, "save_steps": 20, "generation_batch_size": 32, "num_generations": 8,
    "max_completion_length": 12, "learning_rate": 5e-6, "warmup_steps": 3, "num_eval_problems": 16,
    "per_device_train_batch_size": 16, "bf16": False, "gradient_checkpointing": False,
    "scope_target_entropy": 0.3, "scope_alpha": 0.375, "scope_weight": 1.0,
    "scope_temperature_min": 1.0, "scope_temperature_max": 1.5, "scope_gain": 5.0,
}  # fmt: skip
INSTRUCTION = "Reply with the number only."
LARGEST = 20


def problem(a: int, b: int) -> Problem:
    """The sum of a and b, as a question."""
    return Problem(f"What is {a} + {b}?", str(a + b))


def task(config) -> Task:
    """Problems to train on, in an order of the run's seed, and others, which are the same for every seed."""
    numbers = range(1, LARGEST + 1)
    problems = [problem(a, b) for a in numbers for b in numbers]
    random.Random("test").shuffle(problems)
    test, train = problems[: len(problems) // 8], problems[len(problems) // 8 :]
    random.Random(config.seed).shuffle(train)
    return Task(train, test, INSTRUCTION, answer_reward)
