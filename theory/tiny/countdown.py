"""Countdown with free digits, the task of the preset `tiny`.

The prompt `2,5,7:19=` asks for an expression of 4 or 5 digits (1 to 9), joined by + and -, that
uses the given digits 2, 5 and 7, the others being free, and equals 19: `7+2+5+5` is right. Problems
are made on the fly, and a prompt has about a thousand right answers, so entropy can be held without
costing reward.
"""

import random
import re
import zlib
from pathlib import Path

from reward import Problem, Task

# 108 k parameters: collapse and control in minutes on 2 CPU cores. The published constants are too
# weak at this scale (alpha = 1/64 is 8 samples a step; T sticks at 1.2 as H drifts down).
PRESET = {
    "model": str(Path(__file__).parent / "start-0"), "task": str(__file__), "max_steps": 350,
    "generation_batch_size": 512, "num_generations": 8, "max_completion_length": 12,
    "learning_rate": 3e-4, "num_eval_generations": 64, "per_device_train_batch_size": 1024,
    "per_device_eval_batch_size": 4096, "bf16": False, "gradient_checkpointing": False,
    "scope_target_entropy": 0.4, "scope_alpha": 0.25, "scope_weight": 1.0,
    "scope_temperature_min": 0.5, "scope_temperature_max": 1.5, "scope_gain": 2.0, "scope_integral_gain": 0.05,
}  # fmt: skip
INSTRUCTION = (
    "The line above gives three digits and a target. Write an expression of four or five digits "
    "from 1 to 9, joined by + and -, that uses the three given digits (the others are free) and "
    "equals the target. For 2,5,7:19= a right answer is 7+2+5+5. Reply with the expression only."
)
EXPRESSION = re.compile(r"[1-9](?:[+-][1-9]){3,4}")


def value(expression: str) -> int:
    """Value of a string that matches EXPRESSION: digits at even places, the sign of each before."""
    signed = zip("+" + expression[1::2], expression[::2], strict=True)
    return sum(-int(digit) if sign == "-" else int(digit) for sign, digit in signed)


def example(rng: random.Random, split: str = "train") -> tuple[Problem, str]:
    """A random problem of the split, "train" or "test", and a random right answer to it.

    The splits share no problem: a hash of the sorted digits and the target says which split a
    problem belongs to.
    """
    while True:
        digits = rng.choices("123456789", k=rng.choice((4, 5)))
        expression = digits[0] + "".join(rng.choice("+-") + digit for digit in digits[1:])
        given, target = rng.sample(digits, 3), value(expression)
        is_test = zlib.crc32(f"{sorted(given)}{target}".encode()) % 8 == 0
        if 0 <= target <= 45 and is_test == (split == "test"):
            return Problem(f"{','.join(given)}:{target}=", str(target)), expression


def reward(problem: Problem, completion: str) -> float:
    """1 if the completion is such an expression, uses the given digits and equals the target."""
    expression = completion.strip()
    if not EXPRESSION.fullmatch(expression):
        return 0.0
    free = list(expression[::2])
    for digit in problem.question.split(":")[0].split(","):
        if digit not in free:
            return 0.0
        free.remove(digit)
    return float(value(expression) == int(problem.answer))


def task(config) -> Task:
    """Problems to train on, by the run's seed, and others, which are the same for every seed."""
    rng, test_rng = random.Random(config.seed), random.Random("test")
    train = [example(rng)[0] for _ in range(config.num_train_problems or 128)]
    test = [example(test_rng, "test")[0] for _ in range(config.num_eval_problems)]
    return Task(train, test, INSTRUCTION, reward)
