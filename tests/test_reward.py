"""reward.py against tables of answers, enumeration, Python's own arithmetic, and hostile text."""

import hashlib
import itertools
import json
import math
import os
import random
import re
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import countdown
import reward
from reward import Problem, answer_reward, load_problems, pass_at_k

# --- Answers: a gold answer, completions that are right for it, and completions that are not; | parts them, ⏎ ends a line.
ANSWERS = [
    # The mark, the box, the last number, and which of them counts. A heading is no answer.
    ("42", r"#### 42|####42|####  42  |#### 42.|#### 42,|##### 42|####⏎42|#### 1⏎#### 42|#### 42⏎and 43|#### 42⏎Thanks!|42|so it is 42|it is 42.|41 or 42", r"|####|#### |#### 41|#### 42⏎#### |#### 1⏎####|no number|41 or 43|42 = 43|it is 42, in 3 steps"), ("42", r"\boxed{42}|\boxed{ 42 }|\boxed {42}|\fbox{42}|\boxed{41} no, \boxed{42}|$\boxed{42}$.|\boxed{42} in 3 steps|\boxed{42} apples|\[\boxed{42}\]|#### x: \boxed{42}", r"\boxed{41}|\boxed{}|\boxed{43} not 42|\boxed{42|#### \boxed{41} or \boxed{42}|#### \boxed{42} or \boxed{41}"),
    ("3", r"1 \boxed{2} #### 3⏎4|\boxed{2}⏎#### 3|#### 3⏎\boxed{4}|1 \boxed{3} 4", r"#### 2⏎\boxed{3}|1 \boxed{2} 3"), ("42", r"A: 42|A:42|#### Answer: 42|#### **Answer:** 42|#### Final Answer: 42|**Final Answer:** 42|#### The final answer is 42.|#### The answer is: $42$|#### Final Answer⏎42|#### Final Answer⏎⏎**42**|#### Answer⏎$$⏎42⏎$$|<answer>42</answer>", r"#### Answer|#### Final Answer⏎41"), ("42", r"#### The final answer is: $\boxed{42}$. I hope it is correct.|The answer is 42. I hope it helps.|The answer is **42**.|so x = 42, as wanted|#### 42⏎⏎Let me explain why.|#### 42⏎#### 42 ", r"The answer is 41. I have 2 hopes."),
    ("42", r"#### Final Answer⏎\boxed{42}|#### Step 2: the total⏎6*7 = 42⏎⏎\boxed{42}|\boxed{42}⏎#### Check⏎6*7 is right|#### 4. Sum up⏎\boxed{42}|#### 2) Sum up⏎so \boxed{42}.|#### **Step 1:** add⏎then⏎#### 42|### Answer⏎\boxed{42}", r"#### Step 42: the sum⏎we are done|#### Step 42|#### Part 42⏎and so on|#### 42. Sum up⏎we add|#### 42) Sum up|#### Case 42⏎\boxed{41}|#### Adding the 42 numbers⏎It is 41."), ("4", r"#### 4", r"#### Step 4: the sum⏎Thus it is \boxed{42}|#### Step 4: the sum⏎Thus it is 42.|#### 4. The sum⏎\boxed{42}|it is 10:04"),
    # Notation around a number.
    ("42", r"#### $42|#### $42.00|#### $42$|#### (42)|#### [42]|#### **42**|#### **$42$**|#### *42*|#### __42__|#### `42`|#### \(42\)|\[42\]|\boxed{\text{42}}|\boxed{\mathbf{42}}|\boxed{\$42}|\boxed{$42$}|\boxed{42.}|€42|#### £42.00|#### 42 €|#### 42!|#### \boxed{42}|Final Answer: **42**", r"#### 4$2|#### 4**2|#### 4$$2|#### 4*2|#### 4_2|#### 4 2"), ("42", r"#### 42.0|#### 042|#### +42|#### 4.2e1|#### 42e0|#### 420e-1|#### 42E+0", r"#### 42.5|#### .42|#### 0.42|#### 4.2|#### 4,2|#### 42,5|#### 42e1|#### 42e|#### 42e400|#### 42.42.42|#### 0x2A|#### forty-two|#### nan|#### ٤٢|#### ４２|#### 042.1"),
    ("42", r"#### x = 42|#### x=42|\boxed{x = 42}|#### = 42|#### 40 + 2 = 42|6 * 7 = 42.|#### 6 * 7 = $42.|#### 6 \times 7 = 42|#### 84/2 = 42|#### a = b = 42|#### ½ of 84 = 42|#### ٤ = 42|#### Total = $42", r"#### 42 = 43|#### 42 =|#### 1 = 42 = 42 or 42|#### x = 41, y = 42|#### x = 41 or x = 42|#### x = 42 or x = 41|#### x != 42|#### x >= 42"), ("72", r"#### 6 * 12 = $72.|6 * 12 = \$72.|so 48 + 24 = 72.⏎#### 72|#### 72⏎is wrong: 71|\boxed{1} or \boxed{72}", r"#### 1 2 72|72 or 73|#### 7"), ("72", "", " |\x00|2+5+7+5; import os|__import__('os')|2+5+7+5|2+5+7+5\n19|٢+٥+٧+٥|9**9**9**9|1e999999|#### inf|#### 1e400|\ud800"),
    # Units and words, and what makes another number of a number.
    ("42", r"#### 42 apples|#### 42 apples in all|#### 42%|#### 42 percent|#### 42nd|#### 42cm|#### 42 cm|#### 42 km/h|#### 42km/h|#### 42 L|#### 42 °C|#### 42°|\boxed{42^\circ}|\boxed{42^{\circ}}|#### $42 a day|#### $42/hour|#### 42 miles per hour|#### 42 (forty-two)|#### the answer is 42.|#### 42 is the answer|#### He has 42 apples|#### about 42|\boxed{\text{42 apples}}", r"#### 42 dollars and 0 cents|#### 42 43|#### not 42|#### more than 42|#### at least 42|#### B42|#### x42"),
    ("42", r"#### 42 cm^2|#### 42cm^2|#### 42 cm^{2}|#### 42 cm²|#### 42 cm2|#### 42 m^3|#### 42 ft^3|#### 42 in^2|#### 42 units^2|#### 42 square units|#### 42 m/s^2|\boxed{42 \text{ cm}^2}|\boxed{42\,\text{cm}^2}|\boxed{42\ \mathrm{m}^3}|it is 42 cm^2.|so 42 \text{ m}^2|area = 42 m^2", r"#### 42^2|#### 42²|#### 42**2|#### 10^42|#### 42^x|#### 42 m^2 and 1 m^2"), ("2", r"#### 2|1/2 of 4 is 2", r"#### 42 cm^2|it is 42 cm^2|it is x^2|it is x²|#### 1/2|\boxed{\frac{1}{2}}|\boxed{\frac{\sqrt{3}}{2}}|it is 1/2|it is \frac{1}{2}|it is \frac12|#### 2 1/2|#### 2½|#### 2:1|#### 2 000|#### 2 squared"),
    ("42", r"#### 42", r"#### 42 or 43|\boxed{42 or 43}|#### 42 (or 43)|#### 42 and 43|#### 42, 43|\boxed{42, 43}|\boxed{(42, 43)}|it is (41,42)|#### 42-43|#### 42 - 43|#### 42–43|it is 41-42|#### between 42 and 50|\boxed{41 \text{ or } 42}|#### 41 < x < 42|#### x > 42|#### x \geq 42|\boxed{x \ne 42}|\boxed{\pm 42}|#### 42x|#### 42 x|\boxed{42x}|\boxed{42\pi}|\boxed{42 \pi}|\boxed{42\sqrt{2}}|\boxed{\sqrt{42}}|it is \sqrt{42}|\boxed{x^{42}}|#### x_42|#### 42i|#### 42 + x|#### 42 - x|#### 42 x 1|#### 42*2|#### 2*42|#### 42(x+1)|#### 42/1|#### 42/x|#### 1/42|it is 1/42|it is \frac{1}{42}|\frac{1}{42}|#### \frac{42}{1}|#### 42 million|it is 42 million|#### 42 thousand|#### 42k|#### 42 dozen|#### 42 hundredths|#### 42 and a half|#### 42½|#### 42 1/2|#### 42 halves|#### 42 am|#### 42:30|it is 42:30|it is 1:42|#### - 42"), ("42", "#### 42\r\nand 43|#### 42\u00a0apples", "#### 42\u202843|#### 42\r43"),
    # Thousands, signs, decimals, percentages.
    ("1200", r"#### 1,200|#### $1,200.00|#### 1,200 apples|#### 1.2e3|it is 1,200.|\boxed{1{,}200}|\boxed{1\,200}|\boxed{1,\!200}|\boxed{1\!200}|\boxed{1\;200}|\boxed{1\ 200}|it is $1{,}200$.|it costs 1\,200 dollars.|\boxed{1{,}200\text{ cm}^2}", r"#### 1 200|#### 12,00|#### 1,20|\boxed{1\,20}|\boxed{1{,}2}|#### 1.200|#### 1'200|#### 1_200|it is 1, 200|\boxed{(1, 200)}|#### 1,200,000|it is 1{,}200{,}000|\boxed{200}|\boxed{1}"), ("1200", "#### 1\u202f200|#### 1\u00a0200", "#### 1\u2028200|#### 1\n200"), ("200", r"#### 200", r"\boxed{1\,200}|\boxed{1{,}200}|#### 1,200|it is 1{,}200|it is 1\,200|#### 1 200"), ("1000", r"#### 1000|#### 1e3|#### 1E3|#### 1.0e+3|#### 10^3 = 1000", r"#### 1,00|#### 10,00|#### 1000,000|#### 1,000,00|#### 10^3|#### 1e2|#### 1e33"),
    ("1234567", r"#### 1,234,567|\boxed{1{,}234{,}567}|\boxed{1\,234\,567}", r"#### 1,234567|#### 1234,567|#### 12,34,567|#### 234567"), ("12345", r"#### 12,345", r"1,2345|it is 1,2345|#### 1,2345"), ("34", r"#### 34", r"pages 3, 4|#### 3, 4|#### 3,4"), ("1", r"#### 1|#### 1.0|#### 1e0|#### 2/2 = 1|#### 0001", r"#### 1/2|#### 1,000|#### 1 000|#### 1_000|#### 1'000|#### -1|#### .1|#### 1:30|#### 1-2|\boxed{1/2}|#### 10^1"),
    ("5", r"#### 5|#### 10-5=5|10 - 5 = 5|#### 5.|#### 5-", r"#### −5|#### -5|#### .5|#### 0.5|#### 10-5|\boxed{-5}|\boxed{−5}|so x is −5"), ("-5", r"#### -5|#### −5|#### -5.0|#### -$5|#### $-5|#### $-5$|#### (-5)|#### 5 - 10 = -5|\boxed{-5}|\boxed{−5}|it is −5.|#### x=-5|so x=-5|#### -5 degrees|#### -5°C|\boxed{-5\text{ m}}|#### -5%|10 - -5", r"#### 5|#### 10-5|#### - 5|#### 0-5|it is 10-5|\boxed{5}|#### \pm 5|#### -5 or 5|#### 5-|#### -50|#### -5/1"), ("−5", r"#### -5|#### −5|\boxed{−5}", r"#### 5"), ("-7", r"10 - -7", r"10-7|#### 10-7"), ("7", r"10 - 3 = 7|10-3=7", r"so 12 is 5+7, 10-7|#### 10-7"), ("0.5", r"#### .5|#### 0.5|#### 0.50|#### $.50|#### 5e-1|#### 1/2 = .5|\boxed{.5}|it is .5", r"#### 5|#### 1/2|#### 0,5|#### -.5|#### 0 5|#### ..5.5|#### 50%"), (".5", r"#### .5|#### 0.5", r"#### 5|#### 1.5"),
    ("29", r"#### $29.00|#### 29.|#### 29.000 kg|it is $29.00.|#### 2.9e1", r"#### 29.01|#### 2900|#### 29.00.00"), ("29.00", r"#### 29|#### $29|\boxed{29.0}", r"#### 29.1|#### 2900"), ("28%", r"#### 28|#### 28 %|\boxed{28\%}|\boxed{28 \%}|#### 28.0%|#### 28 percent|so it is 28\%.", r"#### 29%|#### 0.28|#### 28% or 29%|#### 28-29%|#### 28%-29%|#### 128%"), ("0", r"#### 0|#### 0.0|#### -0|#### zero = 0|it is 0", r"|#### |#### 0.1|#### 10|#### -|#### none|#### 1:0"), ("120", r"#### 5! = 120", r"#### 5!"),
    # Gold answers in any notation.
    *[(gold, r"#### 42|\boxed{42}|so it is 42|#### 42 apples|#### \boxed{42}|#### **42**", r"#### 43|\boxed{43}|#### 42 or 43|#### 2|") for gold in [
        "$42$", "\\boxed{42}", "**42**", "42 apples", "42%", "42\\%", "$42.00", "42 cm^2", "42 \\text{ cm}^2", "(42)", "x = 42", "42.", "The answer is 42.", "\\(42\\)", "so 6*7 is this\n#### 42", "The area is\n\\boxed{42\\text{ cm}^2}.", "#### Final Answer\n42", "#### \\boxed{42}"]],
    ("1,200", r"#### 1200|#### 1,200|#### 1,200.0", r"#### 1,200,000|#### 12,00|#### 200|#### 1"), ("1\\,200", r"#### 1200|\boxed{1{,}200}", r"#### 200"), ("$1,200.50", r"#### 1200.5|\boxed{\$1{,}200.50}", r"#### 1200|#### 1,200.05"), ("", r"", r"|#### |\boxed{}|####|nothing|0"),
    # Letters and words.
    *[(gold, r"\boxed{\text{E}}|\boxed{E}|#### E|#### (E)|#### [E]|#### **E**|#### \boxed{E}|#### \text{E}|#### **(E)**|#### (**E**)|\boxed{\textbf{(E)}}|\boxed{\mathrm{E}}|\boxed{ E }|#### $E$|#### e|#### E.|#### E)|#### \(E\)|#### `E`|#### _E_|#### 'E'|#### Answer: E|#### The answer is (E)|#### Final Answer⏎E|#### E⏎because 3+4 = 7",
       r"\boxed{\text{B}}|#### B|#### (B)|#### E or B|#### A, E|#### not E|#### EE|\boxed{\text{E or B}}|\boxed{E, B}|#### e^x|#### -E|the answer is B|#### 2E|#### E2|\boxed{}|#### ()|#### (E)(B)|#### Either⏎\boxed{B}") for gold in ["E", "(E)", "\\text{E}", "**E**", "\\boxed{\\text{E}}"]],
    ("Paris", r"#### Paris|#### paris.|#### PARIS|#### **Paris**|\boxed{Paris}|#### \boxed{Paris}|\boxed{\text{Paris}}|#### Answer: Paris|#### paris⏎or Rome", r"#### Rome|Paris|#### Paris or Rome|#### Pari|#### not Paris"), ("New York", r"#### new  york|\boxed{\text{New York}}|\boxed{New\ York}", r"#### York|#### NewYork|#### New York City"),
    # Texts with digits, which are compared as they stand.
    ("3/4", r"#### 3/4|#### $3/4$|\boxed{3/4}|#### **3/4**|it is 3/4|#### 3/4.", r"#### 4/3|#### 3|#### 4|#### 0.75|#### 3/40|it is 4|#### 13/4|#### 1 3/4|#### -3/4"), ("\\frac{1}{2}", r"#### \frac{1}{2}|\boxed{\frac{1}{2}}|\boxed{\dfrac{1}{2}}|#### $\frac{1}{2}$|#### \(\tfrac{1}{2}\)|#### The answer is $\frac{1}{2}$.", r"\boxed{\frac{1}{3}}|\boxed{\frac{1}{2}|#### 2|#### 1|#### \frac{2}{1}"), ("\\frac{\\sqrt{x^{2}}}{2}", r"\boxed{\frac{\sqrt{x^{2}}}{2}}", r"\boxed{\frac{\sqrt{x^{2}}}{3}}|#### 2"), ("x − 1", r"#### x - 1|#### x − 1", r"#### x + 1|#### 1|it is 1|#### -1"), ("2x", r"#### 2x|\boxed{2x}|#### $2x$", r"#### 2|#### x|#### 2y|#### 2 apples|it is 2"), ("2\\pi", r"#### 2\pi|\boxed{2\pi}", r"#### 2|it is 2|#### \pi|#### 3\pi"),
    ("3x^2", r"#### 3x^2|\boxed{3x^2}", r"#### 3|#### 3x|it is 3|#### 2"), ("10:30", r"#### 10:30|\boxed{10:30}|it is 10:30.|#### **10:30**", r"#### 10|#### 30|#### 10:31|it is 30|it is 10|#### 1030"), ("8 a.m.", r"#### 8 a.m.|#### 8 A.M.", r"#### 8 p.m.|#### 8"), ("2-3", r"#### 2-3|\boxed{2-3}|it is 2-3", r"#### 2|#### 3|#### -1|it is 3"), ("(3, 5)", r"#### (3, 5)|\boxed{(3, 5)}|\boxed{\left(3, 5\right)}", r"#### 3|#### 5|#### (5, 3)|#### [3, 5]|#### 35"), ("3 million", r"#### 3 million|\boxed{3 \text{ million}}", r"#### 3|it is 3"),
]  # fmt: skip


def test_answers_of_every_kind():
    """A number is the one number in an answer, whatever its notation and its unit; all else are texts."""
    for gold, *columns in ANSWERS:
        for texts, wanted in zip(columns, (1.0, 0.0), strict=True):
            for text in texts.replace("⏎", "\n").split("|") if texts else []:
                assert answer_reward(Problem("?", gold), text) == wanted, (gold, text)


def test_numbers_are_those_that_float_reads():
    """Written in many ways, against Python's own reading of them; a different number is always wrong."""
    rng = random.Random(0)
    for _ in range(400):
        number = round(rng.uniform(-50, 5000), rng.randrange(4))
        value = rng.choice([rng.randrange(10), rng.randrange(-9999, 10**6), number])
        texts = [f"{value}", f"{value:,}", f"{value:+}", f"{value:e}", f"${value:,}", f"{value}."]
        texts += [f"{value}".replace("-", "\u2212"), re.sub(r"^(-?)0(?=\.)", r"\1", f"{value}")]
        for text, gold in itertools.product(texts, (value, -value, value + 1, value * 10)):
            wanted = float(re.sub("[,$]|[.]$", "", text).replace("\u2212", "-")) == gold
            in_latex = text.rstrip(".").replace(",", "{,}") + " \\text{ cm}^2"
            for completion in (f"#### {text}", f"\\boxed{{{in_latex}}}", f"so it is {text}"):
                assert answer_reward(Problem("?", str(gold)), completion) == wanted, (completion, gold)
    assert reward.value("1" * 4000) == int("1" * 4000)  # exact


PIECES = [
    "#### ", "####", "#", "\\boxed{", "}", "{", "{}", "\\frac{1}{2}", "=", "-", "\u2212", "$", ".", ",", "0", "1", "42", "1,200", "e", "E+", "1e9", "/", " ", "\n", "\r", "\x00", "\u2028", "٤", "４", "²", "½", "é", "\ud800", "\U0001f600", "nan", "inf", "9" * 45, "a" * 30, "<|im_end|>", "\\", "(", "+", "2+5+7+5", "%s", "1+", "1,111", "1.", "9",
    "\\text{", "\\text{ cm}^2", "\\,", "{,}", "*", "**a", "_", "`", "[", "]", "<a", "</a>", "answer is ", "the final ", "Answer:", "or ", "x = ", "42 cm^2", "1 a", "^\\circ",
]  # fmt: skip


def test_a_hundred_thousand_fuzzed_completions_are_right_or_wrong_and_nothing_else():
    """The same for questions and answers and for Countdown; the answer behind the mark at the end is right."""
    rng, right = random.Random(0), 0
    problems = [Problem("?", answer) for answer in ("42", "-5", "0.5", "1,200", "1/2", "\\frac{1}{2}", "E")]
    for i, problem in zip(range(10**5), itertools.cycle(problems), strict=False):
        text = "".join(rng.choices(PIECES, k=rng.randrange(12)))
        got = answer_reward(problem, text), countdown.reward(Problem("2,5,7:19=", "19"), text)
        assert all(type(value) is float and value in (0.0, 1.0) for value in got), text
        if i % 10 == 0:
            assert answer_reward(problem, f"{text}\n#### {problem.answer}") == 1.0, text
        right += got[0]
    assert 100 < right < 10**5  # the pieces make both


def test_reading_hostile_answers_takes_linear_time():
    """Ten times longer inputs take about ten times as long, whatever they repeat; quadratic would be a hundred times."""
    rng, problem = random.Random(0), Problem("?", "72")
    boxes = ["\\boxed{{}", "\\boxed{\\boxed{}", "\\boxed{{{", "\\boxed{{a}", "\\boxed{{{}}"]
    pairs = ["".join(rng.choices(PIECES, k=2)) for _ in range(40)]
    for start, piece in itertools.product(("", "#### ", "\\boxed{"), PIECES + boxes + pairs):
        took = []
        for length in (4000, 40_000):
            text = start + piece * (length // len(piece)) + rng.choice(["", "!", "1", "}"])
            begin = time.process_time()
            assert answer_reward(problem, text) == 0.0
            took.append(time.process_time() - begin)
        assert took[1] <= 40 * max(took[0], 1e-3), (start, piece)


GSM8K = Path(os.environ.get("GSM8K_DIR", Path.home() / ".cache" / "scope_rl"))
GSM8K_FILES = {s: next((p for p in GSM8K.glob(f"*{s}.jsonl") if "gsm8k" in str(p)), None) for s in ("train", "test")}  # fmt: skip
GRADED = GSM8K / "example_model_solutions.jsonl"  # from the same repository


@pytest.mark.skipif(None in GSM8K_FILES.values(), reason="GSM8K is neither in the cache nor in $GSM8K_DIR")
@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_every_gold_answer_of_gsm8k_is_right_for_itself_and_wrong_for_the_next(split, count):
    gold = [json.loads(line)["answer"] for line in GSM8K_FILES[split].read_text().split("\n") if line]
    problems = load_problems(GSM8K_FILES[split])
    assert len(problems) == len(gold) == count
    values = [float(p.answer.replace(",", "").replace("$", "")) for p in problems]
    for shift in (0, 1):
        wanted = [float(a == b) for a, b in zip(values[shift:], values, strict=False)]
        assert [answer_reward(p, text) for p, text in zip(problems[shift:], gold, strict=False)] == wanted


@pytest.mark.skipif(not GRADED.exists(), reason="OpenAI's graded solutions are not beside GSM8K")
def test_solutions_that_openai_graded_get_the_same_grade():
    solutions = 0
    for row in map(json.loads, GRADED.read_text().split("\n")[:1319]):
        problem = Problem("?", row["ground_truth"].rpartition("A: ")[2])
        for graded in [entry for entry in row.values() if isinstance(entry, dict)]:
            for mark in ("A: ", "#### "):
                text = graded["solution"].replace("\nA: ", f"\n{mark}")
                assert answer_reward(problem, text) == graded["is_correct"], text
            solutions += 1
    assert solutions == 5276


# --- Rewards and measures
GOOD = [0, 1, 0.5, True, np.float32(0.5), np.bool_(True), np.int64(1), torch.tensor(0.5), torch.ones(1)]
BAD = [-1.0, 2.0, 1 + 1e-9, -1e-9, math.nan, math.inf, None, "1", b"1", [1.0], 1j, torch.ones(2), 10**400]
RAISED = [ValueError("the judge\ndid not answer"), KeyError("k"), SystemExit(0), AssertionError()]


def reward_of(outcome):
    """What reward_of makes of a reward that returns this, or raises it if it is an error."""
    task = reward.Task([], [], "", mock.Mock(side_effect=[outcome]))
    return reward.reward_of(task, Problem("6*7?\n", "42"), "I say\n" + "42 " * 100)


def test_a_reward_is_a_number_from_0_to_1():
    rewards = [reward_of(outcome) for outcome in GOOD]
    assert rewards == GOOD and {type(reward) for reward in rewards} == {float}
    with pytest.raises(KeyboardInterrupt):
        reward_of(KeyboardInterrupt())


@pytest.mark.parametrize("outcome", BAD + RAISED, ids=lambda got: f"{got!r:.9}")
def test_anything_else_is_an_error_that_names_problem_and_completion(outcome):
    with pytest.raises(
        reward.RewardError, match=r"^the reward of 'I say.n42 42.* for '6[*]7[?].n': "
    ) as error:
        reward_of(outcome)
    said = str(error.value)
    assert repr(outcome)[:17] in said or isinstance(outcome, ValueError | torch.Tensor | int)
    assert "\n" not in said and len(said) < 400


@pytest.mark.parametrize(("raised", "line"), [
    (ValueError("no such file"), "no such file"), (KeyError("task"), "KeyError('task')"), (ValueError(), "ValueError()"), (OSError("two words\nand more"), "two words"), (SystemExit(2), "SystemExit(2)"),
    (RuntimeError("one of: \n(1) a file, \n(2) b or \n(3) c."), "one of: (1) a file, (2) b or (3) c."), (ValueError("one of:\n" + "a " * 9999), "one of: " + "a " * 196),
])  # fmt: skip
def test_errors_are_one_line_that_says_what_is_missing(raised, line):
    for kind in (ValueError, OSError):
        with pytest.raises(kind) as error, reward.one_line_error("it fails", kind):
            raise raised
        assert type(error.value) is kind
        assert str(error.value) == f"it fails: {line}"


def test_pass_at_k_against_enumeration():
    """It is the share of k samples of n that hold a right one, and in the mean over draws 1 - (1 - p)^k."""
    for k, n in itertools.combinations_with_replacement(range(1, 8), 2):
        subsets = list(itertools.combinations(range(n), k))
        for c in range(n + 1):
            share = sum(any(i < c for i in subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)
        mean = sum(math.comb(n, c) * 0.3**c * 0.7 ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - 0.7**k)
    assert 0 < pass_at_k(10**5, 1, 10) < 1  # large numbers stay exact
    for n, c, k in [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)]:
        with pytest.raises(ValueError, match="pass_at_k needs"):
            pass_at_k(n, c, k)


def test_distinct_correct():
    assert reward.distinct_correct(["1+2", "1+2", " 1+2\n", "2+1", "9"], [1.0, 1.0, 1.0, 1.0, 0.0]) == 2
    assert reward.distinct_correct(["a  b\nc", "a b c", "ab c"], [1.0] * 3) == 2


# --- Data files
RIGHT = b'{"question": "6*7?", "answer": "so\\n#### 42"}'
DATA = [  # the bytes of a file, and its questions and answers, or the error
    (b"\xef\xbb\xbf" + RIGHT + b"\n\xef\xbb\xbf" + RIGHT.replace(b"7", b"8"), [("6*7?", "42"), ("6*8?", "42")]),  # two files with byte order marks
    (RIGHT + b"\r\n" + RIGHT + b"\r\n", [("6*7?", "42")]), (b"\n\n  \n" + RIGHT + b"\n\n", [("6*7?", "42")]), (b'{"question": "\\ud83d\\ude00", "answer": "1"}', [("\U0001f600", "1")]), (b'{"question": "a\\u0000b", "answer": "1"}', [("a\x00b", "1")]), ('{"question": "Wie viele Äpfel\u2028?", "answer": "1"}'.encode(), [("Wie viele Äpfel\u2028?", "1")]),
    (b'{"question": "a", "answer": 1}\n{"question": "b", "answer": 2}\n{"question": "a", "answer": 3}', [("a", "1"), ("b", "2")]), (b'{"question": "a", "answer": 42, "more": [1]}', [("a", "42")]),
    *[(b'{"question": "a", "answer": %b}' % json.dumps(text).encode(), [("a", answer)]) for text, answer in [
        (-0.5, "-0.5"), (1e21, "1e+21"), (10**400, "1" + "0" * 400),  # no float is as large
        ("#### 42\nThat was easy.", "42"), ("#### 1\n#### 42", "42"), (" 42 ", "42"), ("$42$", "$42$"), ("\\boxed{42}", "42"), ("42 cm", "42 cm"), ("42\\%", "42\\%"), ("so\n#### It is $\\boxed{42}$.", "42"), ("Paris", "Paris"), ("Either x - 1 = 7 and x = 8,\nor x - 1 = -7 and x = -6, so the sum is $\\boxed{2}$.", "2"), ("So it is \\boxed{3/4} of the cake that she had at first.", "3/4"),
        ("It is long.\n#### The Lord of the Rings, book one", "The Lord of the Rings, book one"), ("The answer is 42.", "The answer is 42."), ("\\frac{\\sqrt{3}}{2}", "\\frac{\\sqrt{3}}{2}")]],
    *[(b'{"question": "a", "answer": %b}' % json.dumps(text).encode(), f"line 1: .*{reason}") for reason, texts in [
        ("put ####", ["42\nThat was easy.", "She has 3*4 = 12.\nThe answer is 12.", "18 divided by 2 is 9.\n### 9", "3 boxes of 4 are 3*4 = 12. The answer is 12."]), ("expected", ["\\boxed{3} or \\boxed{4}"]),
        ("no completion can earn", ["#### \\boxed{3} or \\boxed{4}", "\\frac{1}{2", "{" * 9 + "1" + "}" * 9, "#### Final Answer", "$$", "\\boxed{}", "why ####", ""])] for text in texts],
    ('{"question": "a", "answer": "1"}\n'.encode("utf-16") * 2, "line 2: expected"), (b"\xef\xbb\xbf", "line 1: expected"), (b"", "holds no problems"), (b"\n \n\t\n", "holds no problems"), (None, "cannot read the data file"),
    *[(RIGHT + b'\n\n{"question": "a", "answer": %b}' % answer, "line 3: expected an object like") for answer in [
        b"NaN", b"Infinity", b"1e400", b"-1e400", b'"\\udfff"', b'["1"]', b'{"a": 1}', b"null", b"1" + b"0" * 5000]],
    *[(RIGHT + b"\n\n" + line, "line 3: expected an object like") for line in [
        b'{"question": "\\ud800", "answer": "1"}', b'{"question": "caf\xe9", "answer": "1"}', b'{"question": ["a"], "answer": "1"}', b'{"question": 3, "answer": "1"}', b'{"Question": "a", "Answer": "1"}', b'{"question": "a"}', b'{"question": " \\t", "answer": "1"}', b'{"question": "", "answer": "1"}', b"\xff\xfe\x00", RIGHT + RIGHT, b"[" + RIGHT + b"]", RIGHT + b",", b"question,answer", b'"text"', b"3",
        b'["a", "1"]', b'{"a":' * 10**5, b"[" * 10**5, b"\x00" * 1000, b"not json", b'{"prompt": [{"role": "user", "content": "6*7?"}], "reward_model": {"ground_truth": "42"}}']],
]  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), DATA, ids=range(len(DATA)))
def test_data_files_are_read_rightly_or_refused_with_the_line(content, expected, tmp_path):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    if isinstance(expected, list):
        problems = load_problems(path)
        assert problems == [Problem(*pair) for pair in expected]
        assert all(answer_reward(problem, f"so\n#### {problem.answer}") == 1 for problem in problems)
    else:
        with pytest.raises(ValueError, match=expected) as error:
            load_problems(path)
        said = str(error.value)
        assert str(path) in said and "\n" not in said and len(said.encode()) < 400 + len(str(path))


def lines_of(name, count, repeat=1):
    """JSONL of problems `{name} 0`, `{name} 1` and so on, all of them once and then again."""
    problems = ({"question": f"{name} {i}", "answer": f"{'so ' * 99}\n#### {i}"} for i in range(count))
    return "\n".join([json.dumps(problem) for problem in problems] * repeat)


def test_where_the_problems_of_each_split_come_from(tmp_path, monkeypatch):
    """Files of one's own, GSM8K's two files, each checked against its own hash, or a held-out tenth, rounded up."""
    monkeypatch.setenv("SCOPE_RL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reward, "URL", f"file://{tmp_path}/")
    monkeypatch.setattr(reward, "gold_answer", mock.Mock(wraps=reward.gold_answer))
    files = {name: lines_of(name, 11) for name in ("train", "test", "mine", "more")}
    files |= {"both": lines_of("mine", 5) + "\n" + lines_of("more", 11), "one": lines_of("mine", 1, repeat=3)}
    files["long"] = lines_of("long", 2000, repeat=100)
    path = {name: tmp_path / f"{name}.jsonl" for name in files}
    for name, text in files.items():
        path[name].write_text(text)
        monkeypatch.setitem(reward.SHA256, name, hashlib.sha256(path[name].read_bytes()).hexdigest())
    for train_file, test_file, train, test in [
        ("long", None, ("long", 0, 1800), ("long", 1800, 2000)),
        (None, None, ("train", 0, 11), ("test", 0, 11)), (None, "mine", ("train", 0, 11), ("mine", 0, 11)), ("mine", "more", ("mine", 0, 11), ("more", 0, 11)),
        ("mine", None, ("mine", 0, 9), ("mine", 9, 11)), ("mine", "both", ("mine", 5, 11), None), ("both", "mine", ("more", 0, 11), ("mine", 0, 11)),
    ]:  # fmt: skip
        task = reward.gsm8k_task(path.get(train_file), str(path[test_file]) if test_file else None)
        assert [p.question for p in task.train] == [f"{train[0]} {i}" for i in range(*train[1:])]
        assert test is None or [p.question for p in task.test] == [f"{test[0]} {i}" for i in range(*test[1:])]
        assert (task.instruction, task.reward) == (reward.INSTRUCTION, answer_reward)
        assert train_file != "long" or reward.gold_answer.call_count == 2000  # each question is prepared once
    for train_file, test_file in [("one", None), ("mine", "mine"), ("one", "both")]:
        with pytest.raises(ValueError, match=f"{path[train_file]}: .*none is left to train on"):
            reward.gsm8k_task(path[train_file], path.get(test_file))


def test_a_download_is_checked_and_kept_and_repeated_if_damaged(tmp_path, monkeypatch):
    source, refused = tmp_path / "train.jsonl", r"cannot download GSM8K \(.*give --train_file and --test_file"
    source.write_bytes(RIGHT)
    monkeypatch.setenv("SCOPE_RL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reward, "URL", f"file://{tmp_path}/")
    for split in ("train", "test"):  # the wrong content, and no file at all
        with pytest.raises(ValueError, match=refused):
            reward.download(split)
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setitem(reward.SHA256, "train", hashlib.sha256(RIGHT).hexdigest())
    path = reward.download("train")
    path.write_bytes(RIGHT[:20])
    reward.download("train")
    source.unlink()
    assert load_problems(reward.download("train")) == [Problem("6*7?", "42")]
    path.write_bytes(RIGHT[:20])
    with pytest.raises(ValueError, match=refused):
        reward.download("train")
