"""Sums of two small numbers, asked in words: a task for a pretrained model on a laptop.

`What is 7 + 12?` is answered right by `19`, and by `The answer is 19.` and every other completion
whose last number is 19. So its right answers differ in their form alone, in two or three of some
ten tokens, most of which repeat the question.
"""

import random

from reward import Problem, Task, answer_reward

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
