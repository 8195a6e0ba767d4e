"""theory/tiny: Countdown against enumeration and hostile text, sums, and the warm start."""

import itertools
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import countdown
import reward
import rollout
import sums
import warm_start
from reward import Problem

TINY = Path(warm_start.__file__).parent


def countdown_task(num_test: int, seed: int = 0) -> reward.Task:
    return countdown.task(SimpleNamespace(num_eval_problems=num_test, seed=seed))


def test_countdown_against_enumeration():
    """Every expression of 4 digits: right exactly when Python says so and the digits are in it."""
    problem, right = Problem("2,5,7:19=", "19"), 0
    for digits in itertools.product("123456789", repeat=4):
        for signs in itertools.product("+-", repeat=3):
            expression = digits[0] + "".join(s + d for s, d in zip(signs, digits[1:], strict=True))
            wanted = not Counter("257") - Counter(digits) and eval(expression) == 19
            assert countdown.reward(problem, expression) == float(wanted)
            right += wanted
    assert right == 30
    assert countdown.reward(Problem("5,5,2:17=", "17"), "5+5+2+5") == 1
    assert countdown.reward(Problem("5,5,2:17=", "17"), "5+2+9+1") == 0  # one 5 for two
    for expression, right in [("2+5+7", 0), ("2+5+7+1-1", 1), ("2+5+7+1-2+1", 0)]:  # 4 or 5 digits
        assert eval(expression) == 14
        assert countdown.reward(Problem("2,5,7:14=", "14"), expression) == right


def test_countdown_examples_are_right_and_the_splits_are_disjoint():
    rng = random.Random(1)
    for split in ("train", "test"):
        for _ in range(500):
            problem, expression = countdown.example(rng, split)
            assert countdown.reward(problem, expression) == 1
            assert 0 <= int(problem.answer) <= 45

    def key(problem):
        given, target = problem.question.rstrip("=").split(":")
        return "".join(sorted(given)), target

    first, second = (countdown_task(2000, seed) for seed in (0, 1))
    assert not {key(p) for p in first.train + second.train} & {key(p) for p in first.test}
    assert first.train != second.train
    assert first.test == second.test  # evaluation does not depend on the seed
    assert [len(first.train), len(first.test)] == [128, 2000]


def test_countdown_has_about_a_thousand_right_answers():
    """Counted over all expressions; uniform over them is the most entropy a token that full reward allows."""
    values, counts = {}, {}
    for n in (4, 5):
        digits = np.array(list(itertools.product(range(1, 10), repeat=n)))
        signs = np.array([(1, *s) for s in itertools.product((1, -1), repeat=n - 1)])
        values[n] = digits @ signs.T
        counts[n] = np.stack([(digits == d).sum(1) for d in range(10)], axis=1)
    totals, bounds = [], []
    for problem in countdown_task(60).test:
        given = Counter(problem.question.split(":")[0].split(","))
        needed = np.array([given[str(d)] for d in range(10)])
        right = {}
        for n in (4, 5):
            has_digits = (counts[n] >= needed).all(1)[:, None]
            right[n] = ((values[n] == int(problem.answer)) & has_digits).sum()
        total, tokens = right[4] + right[5], 8 * right[4] + 10 * right[5]  # the end included
        totals.append(total)
        bounds.append(np.log(total) * total / tokens)
    assert 800 < np.median(totals) < 1500
    assert 0.65 < np.median(bounds) < 0.75


def test_hostile_output_scores_zero_in_linear_time():
    """What reads like an answer; pieces in any order are fuzzed in test_reward.py."""
    texts = ["__import__('os')", "9**9**9**9", "(2+5)+7+5", "02+5+7+5", "2+5+7+5.0", "２+５+７+５", "\ud800"]
    texts += [piece * 10**6 for piece in ("9", "1+", ",", "-", "1-1+")]
    start = time.process_time()
    assert [countdown.reward(Problem("2,5,7:19=", "19"), text) for text in texts] == [0] * len(texts)
    assert time.process_time() - start < 10


def test_sums_are_right_and_kept_apart():
    rng, seen = random.Random(0), {"train": set(), "test": set()}
    for split, _ in itertools.product(seen, range(500)):
        problem, answer = sums.example(rng, split)
        seen[split].add(problem)
        shown, value = answer.split("=")
        assert eval(problem.question.removesuffix("=")) == eval(shown) == int(value)
        assert int(value) == int(problem.answer)
        assert reward.answer_reward(problem, answer) == 1
        assert reward.answer_reward(problem, answer + "1") == 0
    assert not seen["train"] & seen["test"]


# --- The warm start
CASES = {
    "qwen3": ("countdown", 60, "2,5,7:19=", countdown.EXPRESSION),
    "llama": ("sums", 100, "12+30=", re.compile(r"\d+\+\d+=\d+")),
}


@pytest.mark.parametrize("architecture", CASES)
def test_a_short_warm_start_learns_the_form_of_answers(tmp_path, architecture):
    task, steps, question, form = CASES[architecture]
    config, example = warm_start.make_config(architecture), warm_start.EXAMPLES[task]
    warm_start.warm_start(tmp_path, config, example, steps=steps, seed=0)
    model, tokenizer = rollout.load_policy(str(tmp_path))
    assert model.config.model_type == architecture
    assert model.num_parameters() < 120_000
    samples = rollout.generate(model, tokenizer, [question] * 64, torch.ones(64), 12)
    shaped = sum(form.fullmatch(text) is not None for text in samples.texts)
    assert shaped > 16  # of random text, about none


@pytest.mark.parametrize("seed", [0, 1])
def test_the_committed_models_are_of_this_config_and_tokenizer(seed):
    folder = TINY / f"start-{seed}"
    tokenizer, fresh = AutoTokenizer.from_pretrained(folder), warm_start.make_tokenizer()
    assert tokenizer.get_vocab() == fresh.get_vocab()
    assert tokenizer.chat_template == fresh.chat_template
    for each in (tokenizer, fresh):
        assert each.convert_ids_to_tokens(each("2,5,7:19=<eos>")["input_ids"]) == [*"2,5,7:19=", "<eos>"]
        assert (each.eos_token, each.pad_token) == ("<eos>", "<pad>")
    model = AutoModelForCausalLM.from_pretrained(folder)
    fresh = AutoModelForCausalLM.from_config(warm_start.make_config("qwen3"))
    shapes = [{name: value.shape for name, value in m.state_dict().items()} for m in (model, fresh)]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_script_makes_the_committed_weights(seed, tmp_path):
    script, folder = TINY / "warm_start.py", TINY / f"start-{seed}"
    subprocess.run([sys.executable, script, tmp_path, "--seed", str(seed)], check=True)
    made, committed = (load_file(path / "model.safetensors") for path in (tmp_path, folder))
    assert made.keys() == committed.keys()
    assert all(torch.equal(made[name], committed[name]) for name in made)
