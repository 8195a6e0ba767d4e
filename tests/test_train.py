"""train.py: the step against the formulas, evaluation, a run and its files, and what ends a run."""

import copy
import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import countdown
import reward
import rollout
import train

ROOT = Path(__file__).parents[1]
EASY = """
import countdown

def task(config):
    return countdown.task(config)._replace(reward=lambda problem, completion: float(len(completion) % 2))
"""
TIMES = ("rollout_seconds", "step_seconds")
SMALL = shlex.split(
    "--preset tiny --generation_batch_size 32 --num_generations 4 --max_steps 4 --save_steps 2 "
    "--num_eval_problems 3 --num_eval_generations 4 --learning_rate 1e-2"
)


@pytest.fixture
def arguments(model_folder, tmp_path):
    """Countdown with a reward that a random model earns half of the time, so that there is something to learn."""
    (tmp_path / "easy.py").write_text(EASY)
    model = ["--model", str(model_folder), "--task", str(tmp_path / "easy.py")]
    return [*SMALL, *model, "--output_dir", str(tmp_path / "run")]


def set_up(arguments, more="", folder=None):
    """A run that has not begun; `more` is a command line."""
    more = [*shlex.split(more), *(["--output_dir", str(folder)] if folder else [])]
    return train.set_up(train.parse_config([*arguments, *more]))


def run(arguments, more="", folder=None):
    """A whole run."""
    one = set_up(arguments, more, folder)
    train.train(one)
    one.lock.release()
    return one


def after_one_step(arguments, more="", folder=None, reward=None):
    """A run after one step, and the step's metrics; `reward` is every completion's, if given."""
    one = set_up(arguments, more, folder)
    if reward is not None:
        one.task = one.task._replace(reward=lambda problem, completion: reward)
    return one, train.train_step(one)[0]


def go(arguments, more=""):
    """The command line in this process. Returns what it says when it ends early, else None."""
    try:
        train.main([*arguments, *shlex.split(more)])
    except SystemExit as stop:
        return stop.code
    return None


def metrics_of(folder, without=TIMES):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in without} for row in rows]


def weights_of(arguments):
    """The weights that a run begins with."""
    return AutoModelForCausalLM.from_pretrained(arguments[arguments.index("--model") + 1]).state_dict()


def spy(one, name):
    """Note what a part of the run is given and returns."""
    calls, part = [], getattr(one, name)

    def noting(*given):
        calls.append((given, part(*given)))
        return calls[-1][1]

    setattr(one, name, noting)
    return calls


# --- One step
def test_every_problem_comes_once_a_pass_in_a_new_order(arguments, monkeypatch):
    one = set_up(arguments)  # 8 problems a step
    problems = [reward.Problem(str(i), "") for i in range(10)]
    one.task = one.task._replace(train=problems)

    def drawn(seen, seed=3):
        one.problems_seen, one.config.seed = seen, seed
        return [problem.question for problem in train.problems_of_step(one)]

    order = [question for step in range(20) for question in drawn(8 * step)]
    passes = [order[i : i + 10] for i in range(0, 160, 10)]
    assert all(sorted(p, key=int) == [str(i) for i in range(10)] for p in passes)
    assert len({tuple(p) for p in passes}) == 16
    assert drawn(0, seed=4) != drawn(0)
    assert drawn(4) == drawn(0)[4:] + drawn(8)[:4]  # whatever the batch size was before
    made, default_rng = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed) or default_rng(seed))
    drawn(8)
    assert made == [[3, 0], [3, 1]]  # an order is drawn once a pass, however many problems there are


def test_a_step_samples_and_counts_as_the_method_says(arguments):
    """Whose completion each row is, its advantage within its prompt's group, and the metrics, one sample at a time."""
    one = set_up(arguments, "--scope_share 0.5 --scope_alpha 0.3 --entropy_coef 0.2 --max_completion_length 5 --seed 2")
    calls, tables = spy(one, "generate"), spy(one, "objective_table")
    before = one.rule.temperature = 1.3
    metrics, shown = train.train_step(one)
    N, G, M = 32, 4, 16
    (_, _, prompts, temperatures, length), samples = calls[0]
    table = tables[0][1]
    assert len(calls) == len(tables) == 1
    asked = prompts[:N:G]  # the 8 problems of the step
    assert len(set(asked)) == 8
    assert prompts == [prompt for prompt in asked for _ in range(G)] + asked * 2
    assert temperatures.tolist() == pytest.approx([1.0] * N + [before] * M)
    assert length == 5

    # The task's rewards: an odd number of characters, but nothing for what was cut off.
    lengths = samples.completion_mask.sum(1).tolist()
    last = [samples.completions[i, lengths[i] - 1].item() for i in range(N + M)]
    ended = [token == one.tokenizer.eos_token_id for token in last]
    rewards = [float(len(text) % 2 and end) for text, end in zip(samples.texts, ended, strict=True)]
    for start in range(0, N, G):
        group = rewards[start : start + G]
        wanted = [(R - np.mean(group)) / (np.std(group) + 1e-4) for R in group]
        assert table.advantages[start : start + G].tolist() == pytest.approx(wanted, abs=1e-5)
    assert table.advantages[N:].tolist() == rewards[N:]
    assert table.weights.tolist() == pytest.approx([1 / N] * N + [0.3 / M] * M)
    assert table.entropy_coefs.tolist() == pytest.approx([0.2] * N + [0.0] * M)

    H = [samples.entropies[i, t].item() for i in range(N) for t in range(lengths[i])]
    assert metrics["entropy"] == one.rule.last_entropy == pytest.approx(np.mean(H), rel=1e-5)
    assert metrics["completion_length"] == pytest.approx(np.mean(lengths[:N]))
    assert metrics["truncated_frac"] == pytest.approx(1 - np.mean(ended[:N]))
    assert metrics["reward"] == pytest.approx(np.mean(rewards[:N]))
    assert metrics["scope_positive_frac"] == pytest.approx(np.mean(rewards[N:]))
    groups = np.reshape(rewards[:N], (-1, G))
    assert metrics["frac_reward_zero_std"] == np.mean(groups.min(1) == groups.max(1))
    assert len({metrics["reward"], metrics["scope_positive_frac"], np.mean(rewards)}) == 3  # the case tells them apart
    assert np.mean(lengths[:N]) != np.mean(lengths)
    for i, line in zip((0, -1), shown, strict=True):  # one sample of each temperature
        assert line.startswith(f"T {temperatures[i]:.2f}, reward {rewards[i]:g}: ")
        assert line.endswith(f" -> {samples.texts[i]!r}")


def test_the_entropy_of_a_step_sets_the_temperature_of_the_next(arguments):
    """And its boost the weight of the term; the rule has the run's own constants."""
    limits = "--scope_temperature_min 0.9 --scope_temperature_max 1.1 --scope_gain 0.5 --scope_integral_gain 0.2"
    one = set_up(arguments, f"{limits} --scope_target_entropy 2.8 --scope_alpha 0.3 --scope_max_boost 2")
    rule = one.rule
    assert [rule.target, rule.minimum, rule.maximum] == [2.8, 0.9, 1.1]
    assert [rule.gain, rule.integral_gain, rule.max_boost] == [0.5, 0.2, 2]
    calls, tables, twin = spy(one, "generate"), spy(one, "objective_table"), copy.deepcopy(rule)
    for step in range(4):
        assert twin.temperature == rule.temperature
        assert tables == [] or twin.boost > 1
        boost = rule.boost
        metrics, _ = train.train_step(one)
        assert metrics["scope_temperature"] == twin.temperature
        assert calls[step][0][3][32:].tolist() == pytest.approx([twin.temperature] * 8)
        assert tables[step][0][2] == pytest.approx(0.3 * boost)
        twin(metrics["entropy"])  # only now, when the step is done


@pytest.mark.parametrize(("more", "M"), [("", 8), ("--scope_share 0.001", 1), ("--scope_share 0", 0), ("--algorithm grpo", 0)])
def test_auxiliary_samples_of_each_algorithm(arguments, more, M):
    """A quarter of 32, never fewer than one, and none in GRPO, whose temperature never moves."""
    one = set_up(arguments, more)
    calls = spy(one, "generate")
    for _ in range(2):
        _, shown = train.train_step(one)
        assert len(calls[-1][0][2]) == 32 + M
        assert len(shown) == 2
    assert (one.rule.temperature == 1.0) == (M == 0)


def plain_gradient_descent(monkeypatch):
    """AdamW's first step keeps only the sign of a gradient, and so magnifies rounding where it is near 0."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, **options: torch.optim.SGD(parameters, lr=1.0))


def test_an_update_equals_plain_gradient_steps(arguments, monkeypatch):
    """Against one forward pass a sample, autograd's log_softmax, J's equations, and steps made by hand."""
    plain_gradient_descent(monkeypatch)
    monkeypatch.setattr(train, "MAX_GRAD_NORM", 0.5)
    one = set_up(
        arguments,
        "--num_mini_batches 3 --epsilon 0.01 --epsilon_high 0.03 --learning_rate 1 --per_device_train_batch_size 3 "
        "--scope_share 0.5 --generation_batch_size 96",
    )
    dull = {problem.question for problem in train.problems_of_step(one)[::3]}  # all of the first mini-batch
    parity = one.task.reward
    one.task = one.task._replace(reward=lambda p, text: float(p.question not in dull) * parity(p, text))
    calls, tables, model = spy(one, "generate"), spy(one, "objective_table"), copy.deepcopy(one.model)
    metrics, _ = train.train_step(one)
    samples, table, norms = calls[0][1], tables[0][1], []
    loss, low, high, tokens = 0.0, 0, 0, 0
    for m in range(3):
        J = 0.0
        for i in range(96 + 48):
            A, w, problem = table.advantages[i].item(), table.weights[i].item(), i // 4 if i < 96 else (i - 96) % 24
            if problem % 3 != m or A == 0:
                continue
            mask, owner = samples.completion_mask[i], samples.owner[i]
            prompt = samples.prompts[owner][samples.prompt_mask[owner].bool()]
            completion = samples.completions[i][mask]
            logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
            log_p = torch.log_softmax(logits, -1).gather(1, completion[:, None])[:, 0]
            r = (log_p - samples.logprobs[i, mask]).exp()
            J = J + w * torch.minimum(r * A, r.clamp(0.99, 1.03) * A).mean()
            low, high = low + (A < 0) * (r < 0.99).sum().item(), high + (A > 0) * (r > 1.03).sum().item()
            tokens += len(r)
        if m == 0:
            assert J == 0.0
            continue
        loss -= J.item()
        gradients = torch.autograd.grad(-3 * J, list(model.parameters()))  # a mini-batch's own mean
        norms.append(sum(g.square().sum() for g in gradients).sqrt().item())
        with torch.no_grad():
            for weight, g in zip(model.parameters(), gradients, strict=True):
                weight -= 0.1 * g * min(1, 0.5 / norms[-1])  # the first step of ten of the warm-up
    assert min(low, high) > 0  # both sides are worth testing
    assert max(norms) > 0.5
    got = [metrics[name] for name in ("loss", "grad_norm", "clip_fraction")]
    assert got == pytest.approx([loss, np.mean(norms), (low + high) / tokens], rel=1e-3, abs=1e-5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(one.model.state_dict()[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 7])
def test_micro_batches_do_not_change_the_update(arguments, tmp_path, size, monkeypatch):
    plain_gradient_descent(monkeypatch)
    more = "--learning_rate 10 --entropy_coef 0.1"
    whole, expected = after_one_step(arguments, more, tmp_path / "a")
    parts, got = after_one_step(arguments, f"{more} --per_device_train_batch_size {size}", tmp_path / "b")
    moved, start = 0.0, weights_of(arguments)
    for name, value in whole.model.state_dict().items():
        moved = max(moved, (value - start[name]).abs().max().item())
        torch.testing.assert_close(parts.model.state_dict()[name], value, atol=1e-5, rtol=1e-4)
    assert moved > 1e-2
    for name in ("loss", "grad_norm", "clip_fraction", "entropy"):
        assert got[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)


def test_mini_batches_share_the_batch_without_changing_its_scale(arguments, tmp_path):
    """At a learning rate of nearly 0 they have the loss of one batch in all, and gradients as long."""
    results = []
    for count in (1, 2, 4):
        more = f"--num_mini_batches {count} --learning_rate 1e-12 --scope_share 2 --entropy_coef 0.1"
        results.append(after_one_step(arguments, more, tmp_path / str(count))[1])
    assert results[0]["scope_positive_frac"] > 0
    assert abs(results[0]["loss"]) > 0.1
    for metrics in results[1:]:
        assert metrics["loss"] == pytest.approx(results[0]["loss"], rel=1e-4)
        assert metrics["grad_norm"] >= 0.9 * results[0]["grad_norm"]  # a mean is no longer than its parts


def test_the_gpu_presets_precision_on_a_cpu(arguments, tmp_path):
    """bfloat16 autocast and gradient checkpointing: the same step up to rounding, with float32 weights throughout."""
    plain, expected = after_one_step(arguments, "", tmp_path / "a")
    half, got = after_one_step(arguments, "--bf16", tmp_path / "b")
    assert half.model.is_gradient_checkpointing
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert got["entropy"] == pytest.approx(expected["entropy"], rel=0.05)
    moved = [(a - b).abs().max().item() for a, b in zip(plain.model.parameters(), half.model.parameters(), strict=True)]
    assert 0 < max(moved) <= 2.1 * 2 * 1e-3  # AdamW moves a weight by the learning rate at most


def test_nothing_to_learn_from_changes_nothing(arguments):
    one, metrics = after_one_step(arguments, reward=0.0)
    start = weights_of(arguments)
    assert all(torch.equal(value, start[name]) for name, value in one.model.state_dict().items())
    assert (metrics["loss"], metrics["grad_norm"], metrics["scope_positive_frac"]) == (0.0, 0.0, 0.0)
    assert metrics["entropy"] > 0  # measured all the same


def test_one_update_a_step_is_on_policy_and_never_clipped(arguments, tmp_path):
    """What was noted while sampling is what scoring finds: the ratio is 1 up to rounding."""
    for epsilon in ("0.2", "1e-4"):
        more = f"--num_mini_batches 1 --epsilon {epsilon}"
        assert after_one_step(arguments, more, tmp_path / epsilon)[1]["clip_fraction"] == 0


def test_an_entropy_bonus_raises_the_entropy(arguments, monkeypatch):
    """One step on the bonus alone."""
    plain_gradient_descent(monkeypatch)
    monkeypatch.setattr(train, "MAX_GRAD_NORM", 1e9)
    more = "--algorithm grpo --learning_rate 5 --num_mini_batches 1 --entropy_coef 1"
    one, first = after_one_step(arguments, more, reward=0.0)
    one.step = one.problems_seen = 0  # the same prompts and random numbers
    assert train.train_step(one)[0]["entropy"] > first["entropy"] + 0.01


def test_the_learning_rate_rises_in_ten_steps_and_stays(arguments):
    one, rates = set_up(arguments), []
    for step in (0, 1, 8, 9, 10, 400):
        one.step = step
        train.gradient_step(one)
        rates.append(one.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 2e-3, 9e-3, 1e-2, 1e-2, 1e-2])


def test_updates_are_in_training_mode_and_sampling_is_not(arguments, monkeypatch):
    """The mode turns gradient checkpointing on, which saves memory in updates and would cost sampling its cache."""
    modes, generate, score = [], rollout.generate, rollout.score
    one = set_up(arguments, "--max_steps 2")
    one.generate = lambda m, *a: modes.append(("generate", m.training)) or generate(m, *a)
    monkeypatch.setattr(rollout, "generate", one.generate)  # of evaluations
    monkeypatch.setattr(rollout, "score", lambda m, *a: modes.append(("score", m.training)) or score(m, *a))
    train.train(one)
    assert set(modes) == {("generate", False), ("score", True)}


def test_seeds_and_steps_sample_differently_from_the_same_prompts(arguments, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1+1=", "answer": 2}\n{"question": "1+2=", "answer": 3}\n')
    more = f"--task gsm8k --train_file {data} --algorithm grpo --learning_rate 0"
    (one, first), (_, second) = (after_one_step(arguments, f"{more} --seed {i}", tmp_path / str(i)) for i in (0, 1))
    assert [len(one.task.train), len(one.task.test)] == [1, 1]
    assert first["entropy"] != second["entropy"] != train.train_step(one)[0]["entropy"] != first["entropy"]


# --- Evaluation
def test_an_evaluation_is_pass_at_k_of_each_problem(arguments, monkeypatch):
    """Batches that cut through the problems' samples; known rights and wrongs; grades below 1 are no right answers."""
    one = set_up(arguments, "--generation_batch_size 8")
    scripts = {problem.prompt: iter(t) for problem, t in zip(one.task.test, ("..--", ".a--", "bacb"), strict=True)}
    generate, grades, made = rollout.generate, {".": 0.0, "-": 0.5}, []

    def scripted(model, tokenizer, prompts, temperatures, length, uniforms):
        samples = generate(model, tokenizer, prompts, temperatures, length, uniforms)
        made.append(temperatures.tolist())
        samples.texts, samples.truncated = [next(scripts[prompt]) for prompt in prompts], torch.zeros(len(prompts)).bool()
        return samples

    monkeypatch.setattr(rollout, "generate", scripted)
    one.task = one.task._replace(reward=lambda problem, text: grades.get(text, 1.0))
    for name in ("before", "before"):  # what is evaluated already is not evaluated again
        train.evaluate(one, name)
    assert made == [[1.0] * 8, [1.0] * 4]
    expected = {"pass@1": (0 + 1 / 4 + 1) / 3, "pass@4": 2 / 3, "distinct_correct": (0 + 1 + 3) / 3}
    assert one.evaluations["before"].pop("num_right") == [0, 1, 4]
    assert one.evaluations["before"] == pytest.approx(expected)


def test_an_evaluation_is_drawn_the_same_whatever_the_batch_size_seed_and_moment(arguments, tmp_path, monkeypatch):
    texts, generate = {}, rollout.generate

    def noting(*given):
        samples = generate(*given)
        texts.setdefault(more, []).extend(samples.texts)
        return samples

    monkeypatch.setattr(rollout, "generate", noting)
    cases = "--seed 1", "--generation_batch_size 4 --num_mini_batches 1", "--generation_batch_size 8"
    for i, more in enumerate(cases):
        one = set_up(arguments, more, tmp_path / str(i))
        texts.clear() if i == 0 else None
        torch.manual_seed(i)
        train.evaluate(one, "before")
    assert [one[-12:] for one in texts.values()] == [texts[cases[0]][-12:]] * 3
    assert len(set(texts[cases[0]][-12:])) > 6
