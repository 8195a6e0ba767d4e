"""Sums, the second task family: `12+30=` is answered rightly by any other sum of the same value.

`25+17=42` is right, and so is whatever else ends in 42: `answer_reward` reads the last number. The
questions go to train.py as JSONL files, like a data set of one's own.
"""

import random

from reward import Problem


def example(rng: random.Random, split: str = "train") -> tuple[Problem, str]:
    """A random problem of the split, "train" or "test", and a random right answer to it.

    The two summands alone say which split a problem belongs to.
    """
    while True:
        a, b = rng.randint(1, 49), rng.randint(1, 49)
        x = rng.randint(0, a + b)
        if ((7 * a + b) % 8 == 0) == (split == "test"):
            return Problem(f"{a}+{b}=", str(a + b)), f"{x}+{a + b - x}={a + b}"
