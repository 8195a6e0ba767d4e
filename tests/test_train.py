"""train.py as a user meets it: the command line, the files, killing and resuming, and bad input."""

import copy
import dataclasses
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import countdown
import reward
import rollout
import scope_rl
import train

ROOT = Path(__file__).parents[1]
EASY = """
import countdown

def task(config):
    return countdown.task(config)._replace(reward=lambda problem, completion: float(len(completion) % 2))
"""
TIMES = ("rollout_seconds", "update_seconds")
SMALL = shlex.split(
    "--preset tiny --generation_batch_size 32 --num_generations 4 --num_train_problems 12 --max_steps 4 --save_steps 2 "
    "--num_eval_problems 3 --num_eval_generations 4 --logging_steps 0 --learning_rate 1e-3"
)


@pytest.fixture
def arguments(model_folder, tmp_path):
    """Countdown with a reward that a random model earns half of the time, so that there is something to learn."""
    (tmp_path / "easy.py").write_text(EASY)
    model = ["--model", str(model_folder), "--task", str(tmp_path / "easy.py")]
    return [*SMALL, *model, "--output_dir", str(tmp_path / "run")]


def run(arguments):
    run = train.set_up(train.parse_config(arguments))
    train.train(run)
    return run


def metrics_of(folder, without=TIMES):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in without} for row in rows]


# --- The command line ---------------------------------------------------------------------------------------------------


def test_presets_defaults_and_precedence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.parse_config([]).preset == "tiny"
    assert train.parse_config(["--model", "x"]).preset == "laptop"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = train.parse_config([])
    assert (config.preset, config.model, config.task, config.bf16) == ("qwen3-0.6b", "Qwen/Qwen3-0.6B", "gsm8k", True)
    # The published constants, where no preset departs from them.
    assert (config.scope_target_entropy, config.scope_alpha, config.scope_weight) == (0.5, 1 / 64, None)
    assert (config.scope_temperature_min, config.scope_temperature_max, config.scope_gain) == (0.8, 1.2, 1.0)
    assert train.parse_config(["--preset", "tiny", "--learning_rate", "1"]).learning_rate == 1
    # A resumed run keeps its config but for what the command line says.
    (tmp_path / "config.json").write_text(json.dumps({"preset": "tiny", "epsilon": 0.3, "max_steps": 7}))
    config = train.parse_config(["--resume", "--output_dir", str(tmp_path), "--max_steps", "9"])
    assert (config.preset, config.epsilon, config.max_steps, config.resume) == ("tiny", 0.3, 9, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_generations", "3"], "multiple of num_generations"),
        (["--max_completion_length", "0"], "max_completion_length is 0, must be a number from 1"),
        (["--learning_rate", "-1"], "learning_rate is -1.0"),
        (["--learning_rate", "nan"], "learning_rate is nan"),
        (["--scope_temperature_min", "2"], "must be from 0.01 to scope_temperature_max"),
        (["--num_mini_batches", "999"], "num_mini_batches is more"),
        (["--resume"], "nothing to resume"),
        (["--resume", "--output_dir", "/nowhere"], "nothing to resume"),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        train.parse_config(["--preset", "tiny", *arguments])
    assert "\n" not in str(error.value)


def test_errors_on_the_command_line_are_one_line_without_traceback(tmp_path):
    command = [
        sys.executable,
        ROOT / "train.py",
        "--preset",
        "tiny",
        "--model",
        str(tmp_path),
        "--output_dir",
        tmp_path / "r",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: cannot load the model")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "r").exists()


# --- A run and its files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["scope", "grpo"])
def test_a_run_writes_what_it_promises_and_is_reproducible(arguments, tmp_path, algorithm, capsys):
    arguments += ["--algorithm", algorithm, "--entropy_coef", "0.01", "--epsilon_high", "0.28"]
    finished = run(arguments)
    folder = tmp_path / "run"
    rows = metrics_of(folder, without=())
    wanted = (
        "step reward frac_reward_zero_std entropy scope_temperature scope_positive_frac loss grad_norm clip_fraction completion_length "
        "truncated_frac learning_rate rollout_seconds update_seconds"
    )
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(list(row) == shlex.split(wanted) for row in rows)
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert all((row["scope_temperature"] == 1.0) == (algorithm == "grpo") for row in rows[1:])
    evaluations = json.loads((folder / "eval.json").read_text())
    assert list(evaluations) == ["before", "after"]
    assert list(evaluations["after"]) == ["pass@1", "pass@4", "distinct_correct"]
    assert json.loads((folder / "config.json").read_text())["algorithm"] == algorithm
    assert f"{algorithm} on easy, into {folder}" in capsys.readouterr().out

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for name, value in finished.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert AutoTokenizer.from_pretrained(folder / "model")("1+2=").input_ids == finished.tokenizer("1+2=").input_ids

    run([*arguments, "--output_dir", str(tmp_path / "again")])
    assert metrics_of(tmp_path / "again") == metrics_of(folder)
    run([*arguments, "--output_dir", str(tmp_path / "other"), "--seed", "1"])
    assert metrics_of(tmp_path / "other") != metrics_of(folder)


def test_a_jsonl_file_of_ones_own(arguments, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"{i}+{i}=", "answer": 2 * i}) + "\n" for i in range(40)))
    finished = run([*arguments, "--task", "gsm8k", "--train_file", str(data)])
    assert [len(finished.task.train), len(finished.task.test)] == [12, 3]
    assert len(metrics_of(tmp_path / "run")) == 4


def test_the_instruction_is_the_tasks_or_ones_own(arguments, tmp_path, monkeypatch):
    asked, format_prompts = [], rollout.format_prompts
    monkeypatch.setattr(rollout, "format_prompts", lambda *given: asked.append(given[2]) or format_prompts(*given))
    arguments += ["--task", str(ROOT / "theory" / "tiny" / "countdown.py")]
    for more in ([], ["--instruction", "Be brief."]):
        train.set_up(train.parse_config([*arguments, *more]))
        (tmp_path / "run" / "config.json").unlink()
    assert asked == [countdown.INSTRUCTION, "Be brief."]


def test_seeds_sample_differently_from_the_same_prompts(arguments, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1+1=", "answer": 2}\n')
    more = ["--task", "gsm8k", "--train_file", str(data), "--test_file", str(data)]
    first, second = (after_one_step(arguments, tmp_path / seed, *more, "--seed", seed)[1] for seed in "01")
    assert first["entropy"] != second["entropy"]
    still = ["--algorithm", "grpo", "--learning_rate", "0"]
    one, first = after_one_step(arguments, tmp_path / "2", *more, *still)
    assert train.train_step(one)[0]["entropy"] != first["entropy"]  # and so do steps


def test_killed_at_a_random_moment_a_run_resumes_as_if_it_had_not_been(arguments, tmp_path):
    """SIGKILL to a real process; from the checkpoint on the metrics equal those of a run that was left alone."""
    arguments += ["--max_steps", "40", "--save_steps", "7"]

    def start(folder, *more):
        command = [sys.executable, "train.py", *arguments, "--output_dir", str(tmp_path / folder), *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "theory" / "tiny")}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    moment = random.Random()  # really random: any moment must do
    rows = moment.randrange(1, 39)
    print(f"killed after {rows} rows")
    killed = start("killed")
    while not (path := tmp_path / "killed" / "metrics.jsonl").exists() or len(path.read_text().splitlines()) < rows:
        assert killed.poll() is None
        time.sleep(0.001)
    time.sleep(moment.random() * 0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    with open(path, "a") as file:
        file.write('{"step": 99, "rew')  # a row cut off in the middle
    assert start("killed", "--resume").wait() == 0
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    evaluations = [(tmp_path / folder / "eval.json").read_text() for folder in ("killed", "whole")]
    assert evaluations[0] == evaluations[1]


def test_a_crash_while_saving_leaves_the_last_good_checkpoint(arguments, tmp_path, monkeypatch):
    run([*arguments, "--max_steps", "2"])
    folder = tmp_path / "run"
    good = (folder / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(torch, "save", lambda content, path: (path.write_bytes(b"half"), 1 / 0))
    resume = [*arguments, "--resume", "--max_steps", "4"]
    with pytest.raises(OSError, match=r"cannot write .*checkpoint.pt \(is the disk full\?\): division by zero"):
        run(resume)
    assert (folder / "checkpoint-previous.pt").read_bytes() == good
    assert not (folder / "checkpoint.pt").exists()
    monkeypatch.undo()
    assert train.set_up(train.parse_config(resume)).step == 2


def test_a_resumed_run_goes_on_from_its_checkpoint_and_without_one_from_the_start(arguments, tmp_path, monkeypatch):
    """Both end as the run that was not stopped; what was evaluated before training is not evaluated again."""
    calls, evaluate = [], train.evaluate

    def spy(run, name):
        if name not in run.evaluations:
            calls.append(run.step)
        evaluate(run, name)

    monkeypatch.setattr(train, "evaluate", spy)
    files = [tmp_path / name / "eval.json" for name in ("run", "stopped")]
    run(arguments)
    arguments += ["--output_dir", str(tmp_path / "stopped")]
    run([*arguments, "--max_steps", "2"])
    # Resumed at step 2; then with rows, but without a checkpoint, and no more of them than come before the first one.
    for steps, save_steps in (([4], "2"), ([0, 4], "4")):
        calls.clear()
        run([*arguments, "--resume", "--max_steps", "4", "--save_steps", save_steps])
        assert calls == steps
        assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "run")
        assert files[0].read_text() == files[1].read_text()
        for path in (tmp_path / "stopped").glob("checkpoint*.pt"):
            path.unlink()


def test_a_checkpoint_holds_all_that_steps_hand_on(arguments, tmp_path, monkeypatch):
    """Weights, AdamW's moments and counters, step, entropy and integral; rows written after it go."""
    saved, save = [], train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda run: saved.append(run.step) or save(run))
    finished = run([*arguments, "--max_steps", "3"])
    assert saved == [2, 3]  # every second step, and the last
    finished.entropy, finished.integral = 0.375, 0.0625
    train.save_checkpoint(finished)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4}\n{"st')
    torch.manual_seed(1)
    finished.lock.lock.release()
    resumed = train.set_up(train.parse_config([*arguments, "--resume"]))
    assert (resumed.step, resumed.entropy, resumed.integral) == (3, 0.375, 0.0625)
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2, 3]
    for a, b in zip(finished.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
        for name, value in finished.optimizer.state[a].items():
            assert torch.equal(value, resumed.optimizer.state[b][name])
    group = resumed.optimizer.param_groups[0]
    assert isinstance(resumed.optimizer, torch.optim.AdamW)
    assert group["weight_decay"] == 0


def test_what_is_there_is_not_overwritten_and_damage_is_reported(arguments, tmp_path):
    run([*arguments, "--max_steps", "2"])
    with pytest.raises(ValueError, match="holds a run already"):
        run(arguments)
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    rows = metrics_of(tmp_path / "run")
    with pytest.raises(ValueError, match="cannot resume from"):
        run([*arguments, "--resume"])
    assert metrics_of(tmp_path / "run") == rows


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights(arguments, tmp_path, monkeypatch):
    started = train.set_up(train.parse_config(arguments))
    before = {name: value.clone() for name, value in started.model.state_dict().items()}
    score = rollout.score
    monkeypatch.setattr(rollout, "score", lambda *a: tuple(x * x.new_tensor(float("nan")) for x in score(*a)))
    with pytest.raises(FloatingPointError, match="step 1 is not finite"):
        train.train_step(started)
    assert all(torch.equal(value, before[name]) for name, value in started.model.state_dict().items())


@pytest.mark.parametrize("damage", ["no folder", "no tokenizer", "cut weights", "missing weights"])
def test_bad_model_folders_are_refused_in_one_line(arguments, model_folder, damage):
    weights = model_folder / "model.safetensors"
    if damage == "no folder":
        arguments += ["--model", "/no/such/folder"]
    elif damage == "no tokenizer":
        for path in model_folder.glob("tokenizer*"):
            path.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    else:
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"cannot load the model|lacks weights|are empty or all alike|no model of such a name"
    ) as error:
        train.set_up(train.parse_config(arguments))
    assert "\n" not in str(error.value)


def test_prompts_that_do_not_fit_are_refused(arguments):
    with pytest.raises(ValueError, match=r"prompt tokens \+ max_completion_length exceed 64"):
        train.set_up(train.parse_config([*arguments, "--max_completion_length", "60"]))


# --- One step -----------------------------------------------------------------------------------------------------------


def test_every_problem_comes_once_a_pass_in_a_new_order(monkeypatch):
    problems = [reward.Problem(str(i), "") for i in range(10)]
    drawn = [p.question for step in range(20) for p in train.choose_problems(problems, 4, seed=3, step=step)]
    passes = [drawn[i : i + 10] for i in range(0, 80, 10)]
    assert all(sorted(p, key=int) == [str(i) for i in range(10)] for p in passes)
    assert len({tuple(p) for p in passes}) == 8
    assert train.choose_problems(problems, 10, seed=4, step=0) != train.choose_problems(problems, 10, seed=3, step=0)
    assert len(train.choose_problems(problems, 25, seed=0, step=2)) == 25  # more than there are
    orders, default_rng = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: orders.append(seed) or default_rng(seed))
    train.choose_problems(problems, 8, seed=3, step=1)
    assert sorted(orders) == [[3, 0], [3, 1]]  # an order is drawn once a pass, however many problems there are


def after_one_step(arguments, folder, *more, reward=None):
    """A run after one step, and the step's metrics; `reward` is every completion's, if given."""
    one = train.set_up(train.parse_config([*arguments, "--output_dir", str(folder), *more]))
    if reward is not None:
        one.task = one.task._replace(reward=lambda problem, completion: reward)
    metrics, _ = train.train_step(one)
    return one, metrics


@pytest.mark.parametrize("size", [1, 7])
def test_micro_batches_do_not_change_the_update(arguments, tmp_path, size):
    with pytest.MonkeyPatch.context() as patch:
        plain_gradient_descent(patch)
        whole, expected = after_one_step(arguments, tmp_path / "a", "--learning_rate", "10")
        parts, got = after_one_step(
            arguments, tmp_path / "b", "--learning_rate", "10", "--per_device_train_batch_size", str(size)
        )
    moved = 0.0
    start = AutoModelForCausalLM.from_pretrained(arguments[arguments.index("--model") + 1]).state_dict()
    for name, value in whole.model.state_dict().items():
        moved = max(moved, (value - start[name]).abs().max().item())
        torch.testing.assert_close(parts.model.state_dict()[name], value, atol=1e-5, rtol=1e-4)
    assert moved > 1e-2
    for name in ("loss", "grad_norm", "clip_fraction", "entropy"):
        assert got[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)


def test_the_gpu_presets_precision_on_a_cpu(arguments, tmp_path):
    """bfloat16 autocast and gradient checkpointing: the same step but for rounding, with float32 weights throughout."""
    plain, expected = after_one_step(arguments, tmp_path / "a")
    half, got = after_one_step(arguments, tmp_path / "b", "--bf16", "--gradient_checkpointing")
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert got["entropy"] == pytest.approx(expected["entropy"], rel=0.05)
    moved = [(a - b).abs().max().item() for a, b in zip(plain.model.parameters(), half.model.parameters(), strict=True)]
    assert 0 < max(moved) <= 2.1 * 2 * expected["learning_rate"]  # AdamW moves a weight by the learning rate at most


def test_mini_batches_share_the_batch_without_changing_its_scale(arguments, tmp_path):
    """At a learning rate of nearly 0 the mean loss over mini-batches is the loss of one batch, and gradients are as long."""
    results = []
    for count in ("1", "2", "4"):
        folder = tmp_path / count
        more = ["--num_mini_batches", count, "--learning_rate", "1e-12", "--scope_alpha", "2", "--entropy_coef", "0.1"]
        results.append(after_one_step(arguments, folder, *more)[1])
    assert results[0]["scope_positive_frac"] > 0
    assert abs(results[0]["loss"]) > 0.1
    for metrics in results[1:]:
        assert metrics["loss"] == pytest.approx(results[0]["loss"], rel=1e-4)
        assert metrics["grad_norm"] >= 0.9 * results[0]["grad_norm"]  # a mean is no longer than its parts


def test_nothing_to_learn_from_changes_nothing(arguments, tmp_path):
    one, metrics = after_one_step(arguments, tmp_path / "a", reward=0.0)
    start = AutoModelForCausalLM.from_pretrained(arguments[arguments.index("--model") + 1]).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in one.model.state_dict().items())
    assert (metrics["loss"], metrics["grad_norm"], metrics["scope_positive_frac"]) == (0.0, 0.0, 0.0)
    assert metrics["entropy"] > 0  # measured all the same
    assert metrics["learning_rate"] == pytest.approx(1e-3 / 10)  # the first step of the warm-up


def test_truncated_completions_earn_nothing(arguments, tmp_path):
    _, metrics = after_one_step(arguments, tmp_path / "a", "--max_completion_length", "3", reward=1.0)
    assert 0 < metrics["truncated_frac"] < 1
    assert metrics["reward"] == pytest.approx(1 - metrics["truncated_frac"])


def test_one_update_a_step_is_on_policy_and_never_clipped(arguments, tmp_path):
    """What was noted while sampling is what scoring finds: the ratio is 1 but for rounding."""
    for epsilon in ("0.2", "1e-4"):
        more = ["--num_mini_batches", "1", "--epsilon", epsilon]
        assert after_one_step(arguments, tmp_path / epsilon, *more)[1]["clip_fraction"] == 0


def test_temperature_and_share_of_each_algorithm(arguments):
    def control(entropy, *more):
        one = train.Run(train.parse_config([*arguments, *more]), None, {}, None, None, None, entropy=entropy)
        return train.control(one)

    assert control(None) == (1.0, 8)  # nothing known before the first step; a quarter of 32
    assert control(0.3)[0] == pytest.approx(1.2)  # gain 2 toward 0.4
    assert control(0.3, "--algorithm", "grpo") == (1.0, 0)
    assert control(0.3, "--scope_alpha", "0") == (1.0, 0)
    assert control(0.3, "--scope_alpha", "0.001")[1] == 1  # never fewer than one


def test_what_each_sample_weighs(arguments, tmp_path, monkeypatch):
    """`scope_weight` where it is given, 0 as well, and else alpha (here 1/4; the preset gives a weight of 1)."""
    seen, set_up = [], train.set_up
    monkeypatch.setattr(train, "update", lambda *given: seen.append(given[-1]) or (0.0, 0.0, 0.0))
    for given, expected in ((0.5, 0.5), (0.0, 0.0), (None, 0.25)):
        monkeypatch.setattr(train, "set_up", lambda c, w=given: set_up(dataclasses.replace(c, scope_weight=w)))
        after_one_step(arguments, tmp_path / str(given), "--entropy_coef", "0.3")
        assert seen[-1].weights.tolist() == pytest.approx([1 / 32] * 32 + [expected / 8] * 8)
        assert seen[-1].entropy_coefs.tolist() == pytest.approx([0.3] * 32 + [0.0] * 8)


def test_one_sample_of_each_temperature_is_shown(arguments, tmp_path):
    for more, count in (("--scope_alpha 0.25", 2), ("--scope_alpha 2", 2), ("--scope_alpha 0", 1)):
        options = [*arguments, *more.split(), "--output_dir", str(tmp_path / more)]
        one = train.set_up(train.parse_config(options))
        one.entropy = 0.0  # far below the target: T at its upper clip
        _, shown = train.train_step(one)
        assert [T for T, *_ in shown] == [1.0, one.config.scope_temperature_max][:count]


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_config(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{field.name}" in said for field in dataclasses.fields(train.Config))


def test_a_step_samples_and_counts_as_the_method_says(arguments, tmp_path, monkeypatch):
    """Whose completion each row is, its advantage within its prompt's group, and the metrics, one sample at a time."""
    seen, generate, update = {}, rollout.generate, train.update

    def spy(model, tokenizer, prompts, temperatures, length):
        seen["prompts"], seen["samples"] = prompts, generate(model, tokenizer, prompts, temperatures, length)
        return seen["samples"]

    monkeypatch.setattr(rollout, "generate", spy)
    monkeypatch.setattr(train, "update", lambda *given: seen.update(given=given[2:]) or update(*given))
    more = ["--scope_alpha", "0.5", "--max_completion_length", "5", "--seed", "2"]
    one, metrics = after_one_step(arguments, tmp_path / "a", *more)
    N, G, samples = 32, 4, seen["samples"]
    asked = seen["prompts"][:N:G]  # the 8 problems of the step
    assert len(set(asked)) == 8
    assert seen["prompts"] == [prompt for prompt in asked for _ in range(G)] + asked * 2
    prompt, objective = seen["given"]
    assert [asked[p] for p in prompt.tolist()] == seen["prompts"]

    lengths, last = samples.completion_mask.sum(1).tolist(), samples.sequences[range(N + 16), samples.lengths - 1]
    ended = (last == one.tokenizer.eos_token_id).tolist()
    rewards = [float(len(text) % 2 and end) for text, end in zip(samples.texts, ended, strict=True)]  # the task's
    for p in range(N // G):
        group = rewards[p * G : (p + 1) * G]
        wanted = [(R - np.mean(group)) / (np.std(group) + 1e-4) for R in group]
        assert objective.advantages[p * G : (p + 1) * G].tolist() == pytest.approx(wanted, abs=1e-5)
    assert objective.advantages[N:].tolist() == rewards[N:]
    entropies = [samples.entropies[i, t].item() for i in range(N) for t in samples.completion_mask[i].nonzero()[:, 0]]
    assert metrics["entropy"] == one.entropy == pytest.approx(np.mean(entropies), rel=1e-5)
    assert metrics["completion_length"] == pytest.approx(np.mean(lengths[:N]))
    assert metrics["truncated_frac"] == pytest.approx(1 - np.mean(ended[:N]))
    assert metrics["reward"] == pytest.approx(np.mean(rewards[:N]))
    assert metrics["scope_positive_frac"] == pytest.approx(np.mean(rewards[N:]))
    assert len({metrics["reward"], metrics["scope_positive_frac"], np.mean(rewards)}) == 3  # the case tells them apart
    assert np.mean(lengths[:N]) != np.mean(lengths)


def test_an_update_equals_plain_gradient_steps(arguments, tmp_path, monkeypatch):
    """Against one forward pass a sample, autograd's log_softmax, J's equations, and steps made by hand."""
    plain_gradient_descent(monkeypatch)
    seen, update = {}, train.update

    def spy(run, *given):
        seen["model"], seen["given"] = copy.deepcopy(run.model), given
        return update(run, *given)

    monkeypatch.setattr(train, "update", spy)
    more = (
        "--num_mini_batches 3 --epsilon 0.01 --epsilon_high 0.03 --max_grad_norm 0.5 --learning_rate 0.1 --warmup_steps 2 "
        "--per_device_train_batch_size 3 --scope_alpha 0.5 --generation_batch_size 96 --num_train_problems 24"
    )
    one = train.set_up(train.parse_config([*arguments, *shlex.split(more)]))
    dull = {p.question for p in train.choose_problems(one.task.train, 24, 0, 0)[::3]}  # all of the first mini-batch
    parity = one.task.reward
    one.task = one.task._replace(reward=lambda p, text: float(p.question not in dull) * parity(p, text))
    metrics, _ = train.train_step(one)
    model, (samples, prompt, objective), stats = seen["model"], seen["given"], []
    for m in range(3):
        J, low, high, tokens = 0.0, 0, 0, 0
        for i in range(len(prompt)):
            A, w = objective.advantages[i].item(), objective.weights[i].item()
            if prompt[i] % 3 != m or A == 0:
                continue
            mask = samples.completion_mask[i]
            log_p = torch.log_softmax(model(samples.sequences[i : i + 1]).logits[0, :-1], -1)
            log_p = log_p.gather(1, samples.sequences[i, 1:, None])[:, 0][mask[1:]]
            r = (log_p - samples.logprobs[i, mask]).exp()
            J = J + 3 * w * torch.minimum(r * A, r.clamp(0.99, 1.03) * A).mean()
            low, high = low + (A < 0) * (r < 0.99).sum().item(), high + (A > 0) * (r > 1.03).sum().item()
            tokens += len(r)
        if tokens == 0:
            continue
        gradients = torch.autograd.grad(-J, list(model.parameters()))
        norm = sum(g.square().sum() for g in gradients).sqrt().item()
        with torch.no_grad():
            for weight, g in zip(model.parameters(), gradients, strict=True):
                weight -= 0.05 * g * min(1, 0.5 / norm)
        stats.append([-J.item(), norm, (low + high) / tokens])
    assert len(stats) == 2
    assert min(low, high) > 0  # both sides are worth testing, in the last mini-batch
    assert max(norm for _, norm, _ in stats) > 0.5
    got = [metrics[name] for name in ("loss", "grad_norm", "clip_fraction")]
    assert got == pytest.approx(np.mean(stats, axis=0).tolist(), rel=1e-3, abs=1e-5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(one.model.state_dict()[name], value, atol=1e-5, rtol=1e-4)


def test_updates_are_in_training_mode_and_sampling_is_not(arguments, monkeypatch):
    """The mode turns gradient checkpointing on, which saves memory in updates and would cost sampling its cache."""
    modes, generate, score = [], rollout.generate, rollout.score
    monkeypatch.setattr(rollout, "generate", lambda m, *a: modes.append(("generate", m.training)) or generate(m, *a))
    monkeypatch.setattr(rollout, "score", lambda m, *a: modes.append(("score", m.training)) or score(m, *a))
    run([*arguments, "--max_steps", "2"])
    assert set(modes) == {("generate", False), ("score", True)}


def test_an_evaluation_is_pass_at_k_of_each_problem_always_drawn_alike(arguments, monkeypatch):
    """Batches that cut through the problems' samples; known rights and wrongs; the same random numbers every time."""
    one = train.set_up(train.parse_config([*arguments, "--per_device_eval_batch_size", "5"]))
    script = {problem: iter(texts * 2) for problem, texts in zip(one.task.test, ("..--", ".a--", "bacb"), strict=True)}
    random_numbers, grades = [], {".": 0.0, "-": 0.5}  # two halves are not a right answer

    def scripted(run, problems, temperatures):
        assert 0 < len(problems) == len(temperatures) <= 5
        assert temperatures.tolist() == [1.0] * len(problems)
        random_numbers.append(torch.rand(1).item())
        texts = [next(script[problem]) for problem in problems]
        return types.SimpleNamespace(texts=texts), torch.tensor([grades.get(text, 1.0) for text in texts])

    monkeypatch.setattr(train, "sample", scripted)
    expected = {"pass@1": (0 + 1 / 4 + 1) / 3, "pass@4": 2 / 3, "distinct_correct": (0 + 1 + 3) / 3}
    Path(one.config.output_dir).mkdir(exist_ok=True)
    for seed, name in enumerate(("before", "after", "after")):  # what is evaluated already is not evaluated again
        one.config.seed = seed
        train.evaluate(one, name)
        assert one.evaluations[name] == pytest.approx(expected)
    assert random_numbers[:3] == random_numbers[3:]


def test_the_learning_rate_rises_and_stays(arguments, tmp_path):
    for steps, expected in ((3, [1 / 3, 2 / 3, 1, 1]), (0, [1, 1, 1, 1])):
        folder = tmp_path / str(steps)
        run([*arguments, "--output_dir", str(folder), "--warmup_steps", str(steps), "--num_eval_problems", "0"])
        assert [row["learning_rate"] for row in metrics_of(folder)] == pytest.approx([1e-3 * x for x in expected])


def test_the_temperature_follows_the_rule_by_the_runs_own_constants(arguments):
    options = {"minimum": 0.9, "maximum": 1.1, "gain": 0.5, "integral_gain": 0.2, "integral_band": 0.15}
    names = (
        "scope_temperature_min",
        "scope_temperature_max",
        "scope_gain",
        "scope_integral_gain",
        "scope_integral_band",
    )
    more = [x for name, value in zip(names, options.values(), strict=True) for x in (f"--{name}", str(value))]
    config = train.parse_config([*arguments, *more, "--scope_target_entropy", "0.6", "--scope_alpha", "0.05"])
    one, integral = train.Run(config, None, {}, None, None, None), 0.0
    for entropy in (None, 0.5, 0.48, 0.3, 0.65, 0.9):
        one.entropy = entropy
        T, integral = scope_rl.scope_temperature(0.6 if entropy is None else entropy, integral, target=0.6, **options)
        assert train.control(one) == (pytest.approx(T), 2)  # 0.05 * 32 is nearly 2
        assert one.integral == pytest.approx(integral)


def plain_gradient_descent(monkeypatch):
    """AdamW's first step keeps only the sign of a gradient, and so magnifies rounding where it is near 0."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **rest: torch.optim.SGD(parameters, lr=lr))


def test_out_of_memory_ends_in_one_line_that_names_settings(arguments, monkeypatch):
    def full(run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(train, "train", full)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit, match="lower per_device_train_batch_size") as stop:
        train.main()
    assert stop.value.code.count("\n") == 1
    assert stop.value.code.endswith(f"--resume --output_dir {arguments[-1]}")


def test_a_checkpoint_is_read_on_the_cpu(arguments, monkeypatch):
    """AdamW's step counters stay on the host, where they cost no waiting, and the GPU holds nothing twice."""
    run([*arguments, "--max_steps", "2"])
    places, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *given, **options: places.append(options) or load(*given, **options))
    train.set_up(train.parse_config([*arguments, "--resume"]))
    assert places == [{"map_location": "cpu", "weights_only": True}]


def test_an_entropy_bonus_raises_the_entropy(arguments, tmp_path, monkeypatch):
    """One step on the bonus alone."""
    plain_gradient_descent(monkeypatch)
    options = ["--algorithm", "grpo", "--learning_rate", "5", "--max_grad_norm", "1e9", "--num_mini_batches", "1"]
    with_bonus, first = after_one_step(arguments, tmp_path / "a", *options, "--entropy_coef", "1", reward=0.0)
    with_bonus.step = 0  # the same prompts and random numbers
    assert train.train_step(with_bonus)[0]["entropy"] > first["entropy"] + 0.01


def test_micro_batches_cost_no_waiting_for_the_device(arguments, tmp_path, monkeypatch):
    """Numbers come to the host a fixed number of times an update, however small the micro-batches are."""
    counts, update = [], train.update

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts[-1] += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    def counted(*given):
        counts.append(0)
        with Count():
            return update(*given)

    def free_of_charge(model, samples, rows):  # scoring itself looks at the longest row
        zero = model.get_input_embeddings().weight.sum() * 0
        return zero + torch.zeros_like(samples.sequences[rows], dtype=zero.dtype), zero.detach()

    monkeypatch.setattr(train, "update", counted)
    monkeypatch.setattr(rollout, "score", free_of_charge)
    for size in ("64", "1"):
        after_one_step(arguments, tmp_path / size, "--per_device_train_batch_size", size)
    assert counts[0] == counts[1] > 0


def test_a_resumed_run_takes_alphas_weight_with_it(arguments, tmp_path):
    """The weight is alpha's unless it was given apart, also when alpha changes on --resume."""
    for given, expected in (([], None), (["--scope_weight", "0.3"], 0.3)):  # None is alpha's
        folder = tmp_path / str(expected)
        plain = [x for x in arguments if x not in ("--preset", "tiny")] + ["--preset", "qwen3-0.6b"]
        plain += ["--max_completion_length", "8"]
        train.set_up(train.parse_config([*plain, "--output_dir", str(folder), *given]))
        again = ["--resume", "--output_dir", str(folder), "--scope_alpha", "0.5"]
        assert train.parse_config(again).scope_weight == expected
        assert train.parse_config(again).scope_alpha == 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "nothing to resume"),
        ('{"scope_share": 1}', "unrecognized arguments: --scope_share=1"),
        ("{", "nothing to resume"),
    ],
)
def test_a_config_that_is_not_this_programs_is_refused_on_resume(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        train.parse_config(["--resume", "--output_dir", str(tmp_path)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--task must be gsm8k or a Python file, not .*mine.py"),
        ("", "the task .*mine.py fails: KeyError"),
        ("import nothing_of_that_name", "the task .*mine.py fails: No module named"),
        ("tasks = 3", "the task .*mine.py fails: KeyError"),
    ],
)
def test_a_task_that_is_none_is_refused_in_one_line(arguments, tmp_path, content, message):
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        train.set_up(train.parse_config([*arguments, "--task", str(tmp_path / "mine.py")]))
    assert "\n" not in str(error.value)


def test_rewards_may_be_booleans_or_integers(arguments, tmp_path):
    for right in (True, 1):
        assert after_one_step(arguments, tmp_path / type(right).__name__, reward=right)[1]["reward"] > 0


def test_metrics_shorter_than_the_checkpoint_are_refused(arguments, tmp_path):
    run([*arguments, "--max_steps", "2"])
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text()[:-100])
    with pytest.raises(ValueError, match="is shorter than it was"):
        train.set_up(train.parse_config([*arguments, "--resume", "--max_steps", "4"]))


def test_the_auxiliary_samples_are_drawn_at_t_in_the_same_call(arguments, tmp_path, monkeypatch):
    calls, generate = [], rollout.generate
    monkeypatch.setattr(rollout, "generate", lambda *a: calls.append(a[3]) or generate(*a))
    one, _ = after_one_step(arguments, tmp_path / "a")
    one.entropy = 0.3
    train.train_step(one)
    assert len(calls) == 2
    assert calls[1].tolist() == pytest.approx([1.0] * 32 + [1.2] * 8)


@pytest.mark.slow
def test_the_main_job_raises_reward_and_holds_entropy(tmp_path):
    """The README's command on the tiny preset, warm start included, and the same without the auxiliary term."""
    results = {}
    for algorithm in ("scope", "grpo"):
        folder = tmp_path / algorithm
        command = [
            sys.executable,
            ROOT / "train.py",
            "--preset",
            "tiny",
            "--algorithm",
            algorithm,
            "--output_dir",
            folder,
        ]
        subprocess.run(command, check=True)
        rows = metrics_of(folder)
        last = rows[-len(rows) // 5 :]
        results[algorithm] = [np.mean([row[name] for row in last]) for name in ("reward", "entropy")]
        assert results[algorithm][0] >= rows[0]["reward"] + 0.3
    target = countdown.PRESET["scope_target_entropy"]
    assert abs(results["scope"][1] - target) <= 0.1 * target
    assert results["grpo"][1] < 0.5 * target
