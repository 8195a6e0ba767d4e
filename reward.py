"""Verifiable rewards: two tasks whose answers a program can check, and the measures of what was solved.

*Countdown with free digits* (`countdown`): the prompt `2,5,7:19=` asks for an expression of 4 or 5 digits (1 to 9) with
+ and - that uses the given digits 2, 5 and 7, the others being free, and equals 19: `7+2+5+5` is right. It is made on
the fly, and a prompt has about a thousand right answers, so entropy can be held without costing reward.

*Question and answer* (`question_answer`): a JSONL file with `question` and `answer`, the final answer after `####`, as
in GSM8K. Your own data trains the same way.

A reward is R(q, o) in {0, 1}. The model's output is hostile input: it is only ever matched against patterns that take
linear time, and read as numbers of bounded length.
"""

import json
import os
import random
import re
import urllib.error
import zlib
from collections.abc import Callable
from decimal import Decimal
from math import comb
from pathlib import Path
from typing import NamedTuple

import torch


class Problem(NamedTuple):
    question: str
    answer: str


class Task(NamedTuple):
    """A task: problems to train on, others to evaluate on, what to tell the model, and the reward R(q, o)."""

    train: list[Problem]
    test: list[Problem]
    instruction: str
    reward: Callable[[Problem, str], float]


COUNTDOWN_INSTRUCTION = (
    "The line above gives three digits and a target. Write an expression of four or five digits from 1 to 9, joined by "
    "+ and -, that uses the three given digits (the others are free) and equals the target. "
    "For 2,5,7:19= a right answer is 7+2+5+5. Reply with the expression only."
)
EXPRESSION = re.compile(r"[1-9](?:[+-][1-9]){3,4}")


def _value(expression: str) -> int:
    """Value of a string that matches EXPRESSION: digits at the even places, the sign of each before it."""
    return sum(
        (-1 if sign == "-" else 1) * int(d) for sign, d in zip("+" + expression[1::2], expression[::2], strict=True)
    )


def countdown_example(rng: random.Random, split: str = "train") -> tuple[Problem, str]:
    """A random problem of the split, "train" or "test", and a random right answer to it.

    The splits share no problem: a hash of the sorted digits and the target says which split a problem belongs to.
    """
    while True:
        digits = rng.choices("123456789", k=rng.choice((4, 5)))
        expression = digits[0] + "".join(rng.choice("+-") + d for d in digits[1:])
        given, target = rng.sample(digits, 3), _value(expression)
        is_test = zlib.crc32(f"{sorted(given)}{target}".encode()) % 8 == 0
        if 0 <= target <= 45 and is_test == (split == "test"):
            return Problem(f"{','.join(given)}:{target}=", str(target)), expression


def countdown_reward(problem: Problem, completion: str) -> float:
    """1 if the completion is an expression of the form asked for, uses the given digits and equals the target."""
    expression = completion.strip()
    if not EXPRESSION.fullmatch(expression):
        return 0.0
    free = list(expression[::2])
    for digit in problem.question.split(":")[0].split(","):
        if digit not in free:
            return 0.0
        free.remove(digit)
    return float(_value(expression) == int(problem.answer))


def countdown(num_train: int, num_test: int, seed: int) -> Task:
    """`num_train` problems drawn with `seed`, and `num_test` others that are the same for every seed."""
    rng, test_rng = random.Random(seed), random.Random("test")
    return Task(
        [countdown_example(rng)[0] for _ in range(num_train)],
        [countdown_example(test_rng, "test")[0] for _ in range(num_test)],
        COUNTDOWN_INSTRUCTION,
        countdown_reward,
    )


ANSWER_INSTRUCTION = "Reason step by step, briefly. Then give the final answer alone on the last line, after ####."
NUMBER = re.compile(r"(?:(?<![0-9])-)?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")
GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{}.jsonl"
GSM8K_SHA256 = {
    "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}


def _number(text: str) -> Decimal | None:
    """`$1,200.50` -> 1200.50; None if the text is no number or has more than 40 characters."""
    if len(text) > 40 or not NUMBER.fullmatch(text):
        return None
    return Decimal(text.replace(",", "").replace("$", ""))


def final_answer(completion: str) -> str:
    r"""A completion's answer: the line after its last `####`, else its last `\boxed{}`, else its last number."""
    if "####" in completion:
        return completion.rpartition("####")[2].strip().partition("\n")[0].strip()
    if "\\boxed{" in completion:
        return completion.rpartition("\\boxed{")[2].partition("}")[0].strip()
    return (NUMBER.findall(completion) or [""])[-1]


def answer_reward(problem: Problem, completion: str) -> float:
    """1 if the completion's final answer is the problem's: equal as text but for case and a full stop, or as numbers.

    If the right answer is a number, it is compared with the first number of the final answer, so "#### $72." is 72.
    """
    given, wanted = final_answer(completion), problem.answer
    number = _number(wanted)
    if number is not None:
        first = NUMBER.search(given)
        return float(first is not None and _number(first.group()) == number)
    return float(given.rstrip(".").casefold() == wanted.rstrip(".").casefold())


def load_problems(path: str | Path) -> list[Problem]:
    """Read a JSONL file of `question` and `answer`; the final answer is what follows `####`, or the whole field.

    Raises:
        ValueError: naming file and line, if the file cannot be read, is empty, or a line is not such an object.
    """
    problems = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the data file {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            question, answer = record["question"], record["answer"]
        except (ValueError, KeyError, TypeError, RecursionError):
            question = answer = None
        final = str(answer).rpartition("####")[2].strip()
        if not (isinstance(question, str) and question and isinstance(answer, str | int | float) and final):
            example = '{"question": "...", "answer": "... #### 42"}'
            raise ValueError(f"{path}, line {number}: expected an object like {example}, got {line[:60]!r}")
        problems.append(Problem(question, final))
    if not problems:
        raise ValueError(f"{path} holds no problems")
    return problems


def download_gsm8k(split: str) -> Path:
    """GSM8K's "train" or "test" file from its public repository, kept in the user's cache, checked by SHA-256.

    Raises:
        ValueError: if it cannot be fetched, or is not the file it should be.
    """
    path = cache_dir() / f"gsm8k-{split}.jsonl"
    if not path.exists():
        try:
            torch.hub.download_url_to_file(GSM8K_URL.format(split), str(path), hash_prefix=GSM8K_SHA256[split])
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            raise ValueError(
                f"cannot download GSM8K ({error}): give your own with --train_file and --test_file"
            ) from None
    return path


def question_answer(train_file: str | None, test_file: str | None) -> Task:
    """The task of a JSONL file, GSM8K if none is given; the last tenth is held out where there is no test file."""
    train = load_problems(train_file or download_gsm8k("train"))
    if test_file or not train_file:
        test = load_problems(test_file or download_gsm8k("test"))
    elif len(train) > 1:
        held_out = -(-len(train) // 10)
        train, test = train[:-held_out], train[-held_out:]
    else:
        raise ValueError(
            f"{train_file} holds one problem: without --test_file it takes two or more, one to evaluate on"
        )
    return Task(train, test, ANSWER_INSTRUCTION, answer_reward)


def cache_dir() -> Path:
    """Where downloads and the warm start are kept: $SCOPE_RL_CACHE, or scope_rl in the user's cache folder."""
    path = Path(os.environ.get("SCOPE_RL_CACHE") or Path.home() / ".cache" / "scope_rl")
    path.mkdir(parents=True, exist_ok=True)
    return path


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them right, hold a right one: 1 - C(n - c, k) / C(n, k).

    It is the unbiased estimate of Pass@k (Chen et al. 2021, equation 1), exact in integers.

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - comb(n - c, k) / comb(n, k)


def distinct_correct(texts: list[str], rewards: list[float]) -> int:
    """How many different right answers are among the completions of one prompt (white space apart)."""
    return len({" ".join(text.split()) for text, reward in zip(texts, rewards, strict=True) if reward == 1})
