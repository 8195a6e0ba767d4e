r"""Verifiable rewards: tasks whose answers a program can check, and measures of what was solved.

A verifiable reward needs no judge: the final answer is read from the completion and compared with the
right one, R = 1 if they agree and 0 if not. This is how a problem of GSM8K looks (Cobbe et al. 2021):

    question  Natalia sold clips to 48 of her friends in April, and then she sold half as many clips
              in May. How many clips did Natalia sell altogether in April and May?
    answer    Natalia sold 48/2 = <<48/2=24>>24 clips in May.
              Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.
              #### 72

The right answer and the completion's are read by the same steps:

    stated_answer   what stands after the last `####`, or in the last `\boxed{}`
    plain           without notation: `**1{,}200**` -> `1200`, `\text{(E)}` -> `E`
    number          the one number of `$1200 a day`, `x = 42`, `42 cm`, `28%`; none in `42 or 43`, `3/4`
    value           that number, else the text in small letters; two values agree if they are equal

A completion that states no answer is read at its last number. Completions are hostile input: they are
only matched against patterns that take linear time, and nothing in them is ever evaluated.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from math import comb, isfinite, nan
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm


class Problem(NamedTuple):
    question: str
    answer: str
    prompt: str = ""  # the question as the model is asked it; train.py fills it in


class Task(NamedTuple):
    """Problems to train and to evaluate on, what is said after each, and R(problem, completion) in [0, 1]."""

    train: list[Problem]
    test: list[Problem]
    instruction: str
    reward: Callable[[Problem, str], float]


class RewardError(ValueError):
    """A reward that failed, or that is no number from 0 to 1."""


@contextmanager
def one_line_error(failure: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Turn whatever is raised inside, and each library has its own, into one line for the user."""
    try:
        yield
    except (Exception, SystemExit) as error:
        message = str(error).strip()
        if " " not in message:
            message = repr(error)  # a bare word needs its type: KeyError('task')
        lines = message.splitlines()
        if lines[0].rstrip().endswith(":"):
            lines = [" ".join(message.split())]  # the first line only announces the others
        raise kind(f"{failure}: {lines[0][:400]}") from None


# --- Reading an answer
NESTED = r"[^{}]"
for _ in range(4):
    NESTED = rf"(?:[^{{}}]|\{{{NESTED}*\}})"  # braces in braces, as in \frac{\sqrt{3}}{2}
BOX = re.compile(rf"\\(?:boxed|fbox)\s*\{{({NESTED}*)\}}")
LABEL = re.compile(r"[#*_\s]*(?:(?:the\s+)?(?:final\s+)?answer(?![a-z])(?:\s+is\b)?[:*_\s]*)?", re.IGNORECASE)

COMMA = r"(?:,|\{,\}|,?\\[,;:! ]|[\u00a0\u2009\u202f])"  # what may stand between thousands
THOUSANDS = re.compile(rf"(?<![0-9.,])[0-9]{{1,3}}(?:{COMMA}[0-9]{{3}})+(?![0-9])")
UNIT = r"(?:st|nd|rd|th|[kcdm]?m|k?g|m?[lL]|mg|lbs?|oz|ft|in|yd|mi|mph|h|hrs?|min|s|sec)"  # may be glued to a number
NOTATION = [  # patterns, and what stands for them in a plain answer
    (r"\u2212", "-"),  # the typographer's minus
    (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1"),
    (r"\\[()\[\]]|\\(?:left|right)(?![a-z])|</?[a-z]+>", " "),
    (r"\\[dt]frac", r"\\frac"),
    (r"\^\{?\\circ\}?", "°"),
    (r"\\([$%])", r"\1"),
    (r"\\[,;:! ]|~", " "),
    (r"-[$€£]", "-"),  # -$5
    (r"(?<![0-9])[$€£*_`]|[$€£*_`](?![0-9])", " "),  # dollars and emphasis; not the sign of 6*7
    (rf"([0-9] ?{UNIT}|[0-9] [a-z/]{{3,20}})(?: ?\^ ?\{{?-?)?[23]\}}?(?![0-9])", r"\1"),  # cm^2, m/s^2
]
NUMBER = re.compile(r"[+-]?(?:[0-9]+|(?=\.[0-9]))(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2}(?![0-9]))?")
LEAD = re.compile(  # `x =`, `the total is`, `Answer:`; up to the last of them, in one statement
    r"\A(?:(?!\b(?:or|and)\b)[^,;<>!])*(?:=|(?<![0-9]):|\b(?:is|are|was|has|have|costs|about|total)\b)\s*(?=[-+.0-9])",
    re.IGNORECASE,
)
CONTINUED = re.compile(  # what makes of a number another one
    rf"(?!{UNIT}(?![a-z]))[^\W\d]|[({{\[:]"  # 2x, 2pi, 10², 2(x + 1)
    r"|\s?[-+*^\\<>=×÷·√]|\s?/(?![a-z]{2})"  # 42 + x, 2\pi, 3/x; not 5/hour
    r"|[.)]\s*[^\W\d]"  # 4. The sum
    r"|\s(?:[b-fi-kn-rt-zπ]|or|and an?|[ap]m|half|halves|thirds?|quarters?|(?:fif|ten|hundred)ths?"
    r"|dozen|hundred|thousand|[a-z]+illion)\b"
)
LAST = re.compile(r"(?<![^\s=])[^\s=]*[0-9][^\s=]*(?:(?<=[0-9]) [^\W\d]+)?")  # a word with a digit, and the next


def plain(text: str) -> str:
    r"""The text without notation: `**\$1{,}200**.` -> `1200`, `\text{(E)}` -> `E`, `42 cm^2` -> `42 cm`."""
    text = THOUSANDS.sub(lambda match: re.sub("[^0-9]", "", match[0]), text)
    for pattern, replacement in NOTATION:
        text = re.sub(pattern, replacement, text)
    return " ".join(text.split()).rstrip(" .,:;!?-()\"'").lstrip(" ,:;!?()\"'≈→")


def number(answer: str) -> Decimal | None:
    """The one number of a plain answer; None if there is none, or more, or one of over 40 characters."""
    answer = LEAD.sub("", answer, count=1)
    match = NUMBER.match(answer)
    if match is None or len(match[0]) > 40:
        return None
    rest = answer[match.end() :]
    if CONTINUED.match(rest) or re.search(r"\d", rest):
        return None
    return Decimal(match[0])


def value(answer: str) -> Decimal | str:
    """What an answer says, to be compared: a number, or a text in small letters."""
    boxes = BOX.findall(answer)
    if len(boxes) == 1:
        answer = boxes[0]
    answer = plain(answer)
    found = number(answer)
    return answer.casefold() if found is None else found


def stated_answer(text: str) -> str | None:
    r"""The line after the last `####`, or the last `\boxed{}`; None if there is neither.

    A line of words after `####`, with more text below it, is a heading: then a box comes first.
    """
    boxes = BOX.findall(text)
    _, mark, after = text.rpartition("####")
    line, _, below = after[LABEL.match(after).end() :].partition("\n")
    is_heading = below.strip() and number(plain(line)) is None
    if mark and not (is_heading and boxes):
        return line.strip()
    return boxes[-1] if boxes else None


def answer_reward(problem: Problem, completion: str) -> float:
    """1.0 if the completion's final answer is the problem's, else 0.0."""
    wanted = stated_answer(problem.answer)
    if wanted is None:
        wanted = problem.answer
    given = stated_answer(completion)
    if given is None:
        given = (LAST.findall(plain(completion)) or [""])[-1]
    return float(value(given) == value(wanted) != "")
