r"""Verifiable rewards: tasks whose answers a program can check, and measures of what was solved.

A verifiable reward needs no judge. The final answer is read from the completion and compared with
the right one: R = 1 if they agree, else 0. A problem of GSM8K (Cobbe et al. 2021) looks like this:

    question  Natalia sold clips to 48 of her friends in April, and then she sold half as many clips
              in May. How many clips did Natalia sell altogether in April and May?
    answer    Natalia sold 48/2 = <<48/2=24>>24 clips in May.
              Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.
              #### 72

The final answer stands after the last `####`, or in the last `\boxed{}`. Without either, the last
number of the completion is taken. Answers agree if they are the same number or the same text, in any
notation. Completions are hostile: nothing in them is evaluated, and patterns take linear time.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import torch


class Problem(NamedTuple):
    question: str
    answer: str


class Task(NamedTuple):
    """Problems for training and evaluation, what is said after each, and R(problem, completion)."""

    train: list[Problem]
    test: list[Problem]
    instruction: str
    reward: Callable[[Problem, str], float]


# --- Reading answers
# Where an answer stands: after the last #### and words like "The answer is", or in a box.
LABEL = r"[#*_\s]*(?:(?:the )?(?:final )?answer(?![a-z])(?: is\b)?[:*_$\s]*)?"
MARKED = re.compile(rf"(?is).*####{LABEL}([^\n]*)(.*)")  # this line, and the text below it
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}")
LAST_NUMBER = re.compile(r"(?<![^\s=])[^\s=]*[0-9][^\s=]*(?:(?<=[0-9]) [^\W\d]+)?")  # and the next word

# How it may be written: a pattern, and what a plain answer has instead.
COMMA = r"(?:,|\{,\}|,?\\[,;:! ]|[\u00a0\u2009\u202f])"  # what may stand between thousands
UNIT = r"(?:%|st|nd|rd|th|[kcdm]?m|k?g|m?[lL]|lbs?|oz|ft|in|yd|mi|mph|h|hrs?|min|s|sec)"
NOTATION = [
    (rf"(?<=[0-9])(?<![0-9]{{4}}){COMMA}(?=[0-9]{{3}}(?![0-9]))", ""),  # 1,200
    (r"\\[()\[\],;:! ]|\\(?:left|right)(?![a-z])|</?[a-z]+>|~|°|\^(?:\\circ|\{\\circ\})", " "),
    (r"\\(?:(?:text|math)[a-z]{0,3}|[mf]box|boxed)\s*\{([^{}]*)\}|\[([^\[\],]*)\]", r"\1\2"),  # [E]
    (r"\\[dt]?(frac)|\\([$%])", r"\1\2"),  # \dfrac is \frac is frac
    (r"-[$€£]|\u2212", "-"),  # -$5, and the typographer's minus
    (r"(?<![0-9])[$€£*`]|[$€£*`](?![0-9])", " "),  # not the sign in 6*7
    (r"(?<=[A-Za-z]):", " : "),
    (r"\s+", " "),
    (rf"([0-9] ?(?:{UNIT}|[a-z/]{{3,20}}))(?: ?\^)?\{{?[23]\}}?(?![0-9])", r"\1"),  # cm^2, m/s^2
]

# A number, with a unit and words around it, except the words that make it another number.
DIGITS = r"[+-]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,2})?"
BEFORE = r"\D*(?::|\b(?i:is|are|was|has|have|costs|about|total)) "
OTHER = r"or\b|and an?\b|(?i:[ap]\.?m\b)|hal[fv]|third|quarter|squared|cubed|dozen|hundred|thousand|\w+illion"
AFTER = rf" (?!{OTHER})(?:[%(]|[aghlmsACFJKLNVW]\b|[^\W\d_]{{2}})\D*"
NUMBER = re.compile(rf"(?:{BEFORE})?({DIGITS}){UNIT}?(?:/(?:[hs]|[a-z]{{2,}}))?[,;]?(?:{AFTER})?")


def plain(text: str) -> str:
    r"""The text without notation: `**\$1{,}200**.` is `1200`, `42 cm^2` is `42 cm`, `(E)` is `E`."""
    for pattern, replacement in NOTATION:
        text = re.sub(pattern, replacement, text)
    return text.rstrip(" .,:;!?-_()\"'").lstrip(" ,:;!?_()\"'")


def value(answer: str) -> Decimal | str:
    """An answer's one number, as in `x = 42` and `$42 a day`, or else its text in small letters."""
    text = plain(answer)

    # Of an equation it is the right side that counts; "x = 3 or x = 4" is more than one number.
    left, _, right = text.rpartition("=")
    several = re.search(r"[,;<>]|!$|\b(?:or|and)\b", left)
    found = NUMBER.fullmatch(right.strip())
    return Decimal(found[1]) if found and not several else text.casefold()


def stated_answer(text: str) -> str | None:
    r"""What stands after the last `####`, or else in the last `\boxed{}`, or else None."""
    boxes = BOX.findall(text)
    marked = MARKED.match(text)
    if marked:
        # Words with more text below them are a heading; a box anywhere comes before it.
        line, below = marked.groups()
        is_heading = below.strip() and isinstance(value(line), str)
        if not (boxes and is_heading):
            inside = BOX.findall(line)
            return inside[0] if len(inside) == 1 else line.strip()
    return boxes[-1] if boxes else None


def answer_reward(problem: Problem, completion: str) -> float:
    """1.0 if the completion's final answer is the problem's, else 0.0."""
    wanted = value(stated_answer(problem.answer) or problem.answer)
    given = stated_answer(completion)
    if given is None:
        numbers = LAST_NUMBER.findall(plain(completion))
        given = numbers[-1] if numbers else ""
    return float(value(given) == wanted and wanted != "")


# --- Problems from files
def gold_answer(answer: str | float) -> str:
    """The final answer in a field `answer`. Raises ValueError if no completion can earn it."""
    if not isinstance(answer, str | int | float) or str(answer) in ("nan", "inf", "-inf"):
        raise ValueError("the answer is neither a text nor a finite number")

    # A worked solution must mark its final answer.
    text = str(answer).strip()
    final = stated_answer(text) or text
    words = re.findall(r"(?<![\\\w])[^\W\d_]{2,}", text)  # \frac is none
    if final == text and (len(words) > 5 or "\n" in text):
        raise ValueError("the answer is long: put #### before the final answer")

    # What the file says must earn 1, and the final answer in a box as well.
    for completion in (f"#### {text}", f"\\boxed{{{final}}}"):
        if answer_reward(Problem("", final), completion) != 1:
            raise ValueError(f"no completion can earn {final!r:.60}: make it a number or a short text")
    return final


def load_problems(path: str | Path) -> list[Problem]:
    r"""Read a JSONL file of questions and answers. Of equal questions the first is kept.

    An answer is short, as `42` or `Paris`, or a solution that marks it with `####` or a `\boxed{}`.
    Raises ValueError, naming file and line, if a line is no problem, or if no completion can earn 1.
    """
    expected = 'expected an object like {"question": "...", "answer": "... #### 42"}'
    with one_line_error(f"cannot read the data file {path}"):
        lines = Path(path).read_bytes().split(b"\n")
    problems = {}  # by question
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        shown = line[:60].decode(errors="replace")
        with one_line_error(f"{path}, line {number}: {expected}, got {shown!r}"):
            record = json.loads(line)
            question, answer = record["question"], record["answer"]
            if not isinstance(question, str) or not question.strip():
                raise ValueError("the question is empty or no text")
            (question + str(answer)).encode()  # fails for half a surrogate pair, as tokenizers do
            if question not in problems:
                problems[question] = Problem(question, gold_answer(answer))
    if not problems:
        raise ValueError(f"{path} holds no problems")
    return list(problems.values())


# --- GSM8K
INSTRUCTION = "Reason step by step, briefly. Then give the final answer alone on the last line, after ####."
URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
SHA256 = {
    "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}


def download(split: str) -> Path:
    """GSM8K's file "train" or "test", kept in $SCOPE_RL_CACHE or ~/.cache/scope_rl; or ValueError."""
    folder = Path(os.environ.get("SCOPE_RL_CACHE") or Path.home() / ".cache" / "scope_rl")
    path = folder / f"gsm8k-{split}.jsonl"
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256[split]:
        with one_line_error("cannot download GSM8K (give --train_file and --test_file)"):
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(f"{URL}{split}.jsonl", str(path), SHA256[split])
    return path


def gsm8k_task(train_file: str | None = None, test_file: str | None = None) -> Task:
    """GSM8K, or files like it. Raises ValueError if no problem is left to train on."""
    train = load_problems(train_file or download("train"))
    if train_file and not test_file:
        test = train[-math.ceil(len(train) / 10) :]  # the last tenth is held out
    else:
        test = load_problems(test_file or download("test"))

    # A question that stands in both files is evaluated, not trained on.
    evaluated = {problem.question for problem in test}
    train = [problem for problem in train if problem.question not in evaluated]
    if not train:
        raise ValueError(f"{train_file}: all its questions are for evaluation, none is left to train on")
    return Task(train, test, INSTRUCTION, answer_reward)


# --- Rewards and measures
class RewardError(ValueError):
    """A reward that failed, or that is not a number from 0 to 1."""


def reward_of(task: Task, problem: Problem, completion: str) -> float:
    """The task's reward, checked. Raises RewardError, which names the completion and the question."""
    with one_line_error(f"the reward of {completion!r:.80} for {problem.question!r:.80}", RewardError):
        reward = task.reward(problem, completion)
        if not hasattr(reward, "__float__") or not 0 <= float(reward) <= 1:
            raise ValueError(f"{reward!r:.80} is not a number from 0 to 1: mend the task's function")
        return float(reward)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Pass@k's unbiased estimate (Chen et al. 2021, eq. 1) from c right of n; or ValueError."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def distinct_correct(texts: list[str], rewards: list[float]) -> int:
    """How many different right answers a prompt's completions hold, whatever their white space."""
    right = [text for text, reward in zip(texts, rewards, strict=True) if reward == 1]
    return len({" ".join(text.split()) for text in right})


@contextmanager
def one_line_error(failure: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Turn whatever is raised inside, and each library has its own, into one line for the user."""
    try:
        yield
    except (Exception, SystemExit) as error:
        message = str(error).strip()
        if " " not in message:
            message = repr(error)  # a bare word needs its type: KeyError('task')
        first_line = message.splitlines()[0].rstrip()
        if first_line.endswith(":"):
            first_line = " ".join(message.split())  # it only announces the lines below
        raise kind(f"{failure}: {first_line:.400}") from error
