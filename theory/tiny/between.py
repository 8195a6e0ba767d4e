"""A number between two others: a task for a pretrained model whose questions have many right answers.

`Pick a number between 23 and 53.` is answered right by `34`, by `The number is 50.` and by every
other completion whose last number lies between: 29 numbers, and as many forms as the model knows.
So a policy can be right and varied at once, and there is an entropy to be held.
"""

import random
import re

from reward import Problem, Task

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
