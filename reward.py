"""Verifiable rewards: tasks whose answers a program can check, and measures of what was solved.

What is rewarded here is the right final answer to a question, read from JSONL with `question` and
`answer`, as GSM8K is. (A task is a file, as theory/lab/gsm8k.py.) The model's output is
hostile input: it is only matched against patterns of linear time, and read as short numbers.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from math import comb, isfinite
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm


class Problem(NamedTuple):
    question: str
    answer: str


class Task(NamedTuple):
    """Problems to train and to evaluate on, what is said after each, and R(q, o) in [0, 1]."""

    train: list[Problem]
    test: list[Problem]
    instruction: str
    reward: Callable[[Problem, str], float]


WHOLE = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9])"  # 1,200 or 1200, or nothing before .5
NUMBER = re.compile(rf"(?:(?<![0-9])-)?\$?(?:{WHOLE})(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{{1,2}})?")
BOX = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")  # as of \frac{\sqrt{3}}{2}


def check(condition: bool, message: str) -> None:
    """Raise ValueError with a message for the user unless the condition holds."""
    if not condition:
        raise ValueError(message)


@contextmanager
def explaining(failure: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Turn whatever is raised in there, and each library has its own, into a line for the user."""
    try:
        yield
    except (Exception, SystemExit) as error:
        text = str(error).strip()  # and its type, where that is a word, as in KeyError('task')
        raise kind(f"{failure}: {(text if ' ' in text else repr(error)).splitlines()[0]}") from None


def number(text: str) -> Decimal | None:
    """`$1,200.50` -> 1200.50; None if the text is no number or has more than 40 characters."""
    if len(text) > 40 or not NUMBER.fullmatch(text):
        return None
    return Decimal(text.replace(",", "").replace("$", ""))


def final_answer(completion: str) -> str:
    r"""The line after the last `####`, else the last `\boxed{}`, else the last number."""
    completion = completion.replace("\u2212", "-")  # the typographer's minus
    if "####" in completion:
        return completion.rpartition("####")[2].strip().partition("\n")[0].strip()
    return (BOX.findall(completion) or NUMBER.findall(completion) or [""])[-1].strip()


def answer_reward(problem: Problem, completion: str) -> float:
    """1 if final answers agree, else 0: as numbers, where there is one and no other behind the last
    "=" ("#### 6 * 12 = $72." is 72; "42 or 43" is wrong), or as texts, but for case and full stop."""
    given, wanted = final_answer(completion), final_answer(f"#### {problem.answer}")
    if number(wanted) is not None:
        found = NUMBER.findall(given.rpartition("=")[2])
        return float(len(found) == 1 and number(found[0]) == number(wanted))
    return float(given.rstrip(".").casefold() == wanted.rstrip(".").casefold())


def load_problems(path: str | Path) -> list[Problem]:
    """Read a JSONL file; the final answer is what follows `####`, or the whole field. Raises
    ValueError, naming file and line, if the file cannot be read or a line is not a problem."""
    problems, wanted = [], 'expected an object like {"question": "...", "answer": "... #### 42"}'
    with explaining(f"cannot read the data file {path}"):
        lines = Path(path).read_bytes().split(b"\n")
    for line_number, line in enumerate(tqdm(lines, "read", leave=False), start=1):
        if not line.strip():
            continue
        with explaining(f"{path}, line {line_number}: {wanted}, got {line[:60].decode(errors='replace')!r}"):
            record = json.loads(line)
            question, answer = record["question"], final_answer(f"#### {record['answer']}")
            f"{question}{answer}".encode()  # or a half of a surrogate pair, which no tokenizer takes
            is_answer = isinstance(record["answer"], str | int) or isfinite(record["answer"])
            check(isinstance(question, str) and question.strip(), "the question is empty or no text")
            check(answer and is_answer, "the answer is empty or infinite")
            problems.append(Problem(question, answer))
    check(len(problems) > 0, f"{path} holds no problems")
    return problems


def pass_at_k(n: int, c: int, k: int) -> float:
    """Pass@k's unbiased estimate (Chen et al. 2021, equation 1) from c right of n; or ValueError."""
    check(0 <= c <= n and 1 <= k <= n, f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - comb(n - c, k) / comb(n, k)


def distinct_correct(texts: list[str], rewards: list[float]) -> int:
    """How many different right answers are among a prompt's completions, white space apart."""
    right = [text for text, reward in zip(texts, rewards, strict=True) if reward == 1]
    return len({" ".join(text.split()) for text in right})
