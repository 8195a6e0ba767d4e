"""Countdown with free digits, the task of the preset `tiny`.

The prompt `2,5,7:19=` asks for an expression of 4 or 5 digits (1 to 9), joined by + and -, that
uses the given digits 2, 5 and 7, the others being free, and equals 19: `7+2+5+5` is right. Problems
are made on the fly, and a prompt has about a thousand right answers, so entropy can be held without
costing reward.
"""

import random
import re
import zlib

from reward import Problem, Task

INSTRUCTION = (
    "The line above gives three digits and a target. Write an expression of four or five digits "
    "from 1 to 9, joined by + and -, that uses the three given digits (the others are free) and "
    "equals the target. For 2,5,7:19= a right answer is 7+2+5+5. Reply with the expression only."
)
NUM_TRAIN_PROBLEMS = 128
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
    """Problems to train on, from the run's seed, and others to evaluate on, the same for every seed."""
    rng, test_rng = random.Random(config.seed), random.Random("test")
    train = [example(rng)[0] for _ in range(NUM_TRAIN_PROBLEMS)]
    test = [example(test_rng, "test")[0] for _ in range(config.num_eval_problems)]
    return Task(train, test, INSTRUCTION, reward)
