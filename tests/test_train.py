"""train.py: the step against the formulas, evaluation, a run and its files, and what ends a run."""

import copy
import json
import math
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from run_helpers import ROOT, go, metrics_of, rows_of, step_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import countdown
import reward
import rollout
import scope_rl
import train


@pytest.fixture
def line(run_line):
    """Countdown with a reward that a random model earns half of the time, so that there is something to learn."""
    return f"{run_line} --learning_rate 1e-2"


def set_up(line):
    return train.set_up(train.parse_config(shlex.split(line)))


def run(line):
    one = set_up(line)
    train.train(one)
    one.lock.release()
    return one


def after_one_step(line, reward=None):
    """A run after one step, and the step's metrics; `reward` is every completion's, if given."""
    one = set_up(line)
    if reward is not None:
        one.task = one.task._replace(reward=lambda problem, completion: reward)
    return one, train.train_step(one)[0]


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture
def spy(monkeypatch):
    """A function that notes what a part of a run or a module is given and returns, until the test ends."""

    def begin(owner, name):
        calls, part = [], getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: calls.append((given, part(*given))) or calls[-1][1])
        return calls

    return begin


# --- One step
def test_every_problem_comes_once_a_pass_in_a_new_order(line, spy):
    one = set_up(line)  # 8 problems a step
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
    made = spy(np.random, "default_rng")
    drawn(8)
    assert [seed for (seed,), _ in made] == [[3, 0], [3, 1]]  # once a pass, however many problems there are


def test_a_step_samples_and_counts_as_the_method_says(line, spy):
    """Whose completion each row is, its advantage within its prompt's group, and the metrics, one sample at a time."""
    options = "--scope_share 0.5 --scope_alpha 0.3 --entropy_coef 0.2 --max_completion_length 5 --seed 2"
    one = set_up(f"{line} {options}")
    one.task = one.task._replace(reward=lambda problem, text: len(text) % 3 / 2)  # 0, 0.5 or 1
    one.model.generation_config.eos_token_id = ends = one.tokenizer.convert_tokens_to_ids([*"123", "<eos>"])
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

    # The task's rewards, but nothing for what was cut off.
    lengths = samples.completion_mask.sum(1).tolist()
    last = [samples.completions[i, lengths[i] - 1].item() for i in range(N + M)]
    ended = [token in ends for token in last]
    rewards = [len(text) % 3 / 2 * end for text, end in zip(samples.texts, ended, strict=True)]
    for start in range(0, N, G):
        group = rewards[start : start + G]
        wanted = [(R - np.mean(group)) / (np.std(group) + 1e-4) for R in group]
        assert table.advantages[start : start + G].tolist() == pytest.approx(wanted, abs=1e-5)
    right = [float(R == 1) for R in rewards]
    assert table.advantages[N:].tolist() == right[N:]
    assert table.weights.tolist() == pytest.approx([1 / N] * N + [0.3 / M] * M)
    assert table.entropy_coefs.tolist() == pytest.approx([0.2] * N + [0.0] * M)

    H = [samples.entropies[i, t].item() for i in range(N) for t in range(lengths[i])]
    assert metrics["entropy"] == one.rule.last_entropy == pytest.approx(np.mean(H), rel=1e-5)
    assert metrics["completion_length"] == pytest.approx(np.mean(lengths[:N]))
    assert metrics["truncated_frac"] == pytest.approx(1 - np.mean(ended[:N]))
    assert metrics["reward"] == pytest.approx(np.mean(rewards[:N]))
    assert metrics["scope_positive_frac"] == np.mean(right[N:])
    groups = np.reshape(rewards[:N], (-1, G))
    assert metrics["frac_reward_zero_std"] == np.mean(groups.min(1) == groups.max(1))
    # The case tells them apart.
    assert len({np.mean(x) for x in (rewards[:N], rewards, rewards[N:], right[N:])}) == 4
    assert np.mean(lengths[:N]) != np.mean(lengths)
    for i, said in zip((0, -1), shown, strict=True):  # one sample of each temperature
        assert said.startswith(f"T {temperatures[i]:.2f}, reward {rewards[i]:g}: ")
        assert said.endswith(f" -> {samples.texts[i]!r}")


def test_the_entropy_of_a_step_sets_the_temperature_of_the_next(line, spy):
    """And its boost the weight of the term; the rule has the run's own constants."""
    gains = "--scope_gain 0.5 --scope_integral_gain 0.2 --scope_max_boost 2 --scope_target_entropy 2.8"
    limits = "--scope_temperature_min 0.9 --scope_temperature_max 1.1 --scope_alpha 0.3"
    one = set_up(f"{line} {gains} {limits}")
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
        assert tables[step][0][2] == metrics["scope_alpha"] == pytest.approx(0.3 * boost)
        twin(metrics["entropy"])  # only now, when the step is done


def plain_gradient_descent(monkeypatch):
    """AdamW's first step keeps only the sign of a gradient, and so magnifies rounding where it is near 0."""
    sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, **options: sgd(parameters, lr=1.0))


def test_an_update_equals_plain_gradient_steps(line, spy, monkeypatch):
    """Against one forward pass a sample, autograd's log_softmax, J's equations, and steps made by hand."""
    plain_gradient_descent(monkeypatch)
    monkeypatch.setattr(train, "MAX_GRAD_NORM", 0.5)
    sizes = "--num_mini_batches 3 --per_device_train_batch_size 3 --generation_batch_size 96"
    clips = "--epsilon 0.01 --epsilon_high 0.03"
    one = set_up(f"{line} {sizes} {clips} --scope_share 0.5 --learning_rate 1")
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
            A, w = table.advantages[i].item(), table.weights[i].item()
            problem = i // 4 if i < 96 else (i - 96) % 24
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


def test_the_gpu_presets_precision_on_a_cpu(line, tmp_path):
    """bfloat16 autocast and gradient checkpointing: the same step up to rounding, with float32 weights throughout."""
    plain, expected = after_one_step(line)
    half, got = after_one_step(f"{line} --bf16 --output_dir {tmp_path}/half")
    assert half.model.is_gradient_checkpointing
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert got["entropy"] == pytest.approx(expected["entropy"], rel=0.05)
    pairs = zip(plain.model.parameters(), half.model.parameters(), strict=True)
    moved = [(a - b).abs().max().item() for a, b in pairs]
    assert 0 < max(moved) <= 2.1 * 2 * 1e-3  # AdamW moves a weight by the learning rate at most


def test_nothing_to_learn_from_changes_nothing(line, model_folder):
    one, metrics = after_one_step(line, reward=0.0)
    start = weights_of(model_folder)
    assert all(torch.equal(value, start[name]) for name, value in one.model.state_dict().items())
    assert (metrics["loss"], metrics["grad_norm"], metrics["scope_positive_frac"]) == (0.0, 0.0, 0.0)
    assert metrics["entropy"] > 0  # measured all the same


def test_the_learning_rate_rises_in_ten_steps_and_stays(line):
    one, rates = set_up(line), []
    for step in (0, 1, 8, 9, 10, 400):
        one.step = step
        train.gradient_step(one)
        rates.append(one.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 2e-3, 9e-3, 1e-2, 1e-2, 1e-2])


def test_updates_are_in_training_mode_and_sampling_is_not(line, monkeypatch):
    """The mode turns gradient checkpointing on, which saves memory in updates and would cost sampling its cache."""
    modes, generate, score = [], rollout.generate, rollout.score
    one = set_up(f"{line} --max_steps 2")
    one.generate = lambda m, *a: modes.append(("generate", m.training)) or generate(m, *a)
    monkeypatch.setattr(rollout, "generate", one.generate)  # of evaluations
    monkeypatch.setattr(rollout, "score", lambda m, *a: modes.append(("score", m.training)) or score(m, *a))
    train.train(one)
    assert set(modes) == {("generate", False), ("score", True)}


def test_seeds_and_steps_sample_differently_from_the_same_prompts(line, home, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1+1=", "answer": 2}\n{"question": "1+2=", "answer": 3}\n')
    line += f" --task gsm8k --train_file {data} --algorithm grpo --learning_rate 0"
    one, first = after_one_step(line)
    _, other = after_one_step(f"{line} --seed 1 --output_dir {tmp_path}/other")
    assert [len(one.task.train), len(one.task.test)] == [1, 1]
    few = set_up(f"{line} --train_file {home}/data.jsonl --num_eval_problems 1 --output_dir {tmp_path}/few")
    assert [len(few.task.train), len(few.task.test)] == [18, 1]  # of 18 and 2
    assert len({step["entropy"] for step in (first, other, train.train_step(one)[0])}) == 3


# --- Evaluation
def test_an_evaluation_is_pass_at_k_of_each_problem(line, monkeypatch):
    """Batches that cut through the problems' samples; known rights and wrongs; grades below 1 are no right answers."""
    one = set_up(f"{line} --generation_batch_size 8")
    drawn = zip(one.task.test, ("..--", ".a--", "bacb"), strict=True)
    scripts = {one.prompts[problem.question]: iter(texts) for problem, texts in drawn}
    generate, grades, made = rollout.generate, {".": 0.0, "-": 0.5}, []

    def scripted(model, tokenizer, prompts, temperatures, *more):
        samples = generate(model, tokenizer, prompts, temperatures, *more)
        made.append(temperatures.tolist())
        samples.texts = [next(scripts[prompt]) for prompt in prompts]
        samples.truncated[:] = False
        return samples

    monkeypatch.setattr(rollout, "generate", scripted)
    one.task = one.task._replace(reward=lambda problem, text: grades.get(text, 1.0))
    for name in ("before", "before"):  # what is evaluated already is not evaluated again
        train.evaluate(one, name)
    assert made == [[1.0] * 8, [1.0] * 4]
    expected = {"pass@1": (0 + 1 / 4 + 1) / 3, "pass@4": 2 / 3, "distinct_correct": (0 + 1 + 3) / 3}
    assert one.evaluations["before"].pop("num_right") == [0, 1, 4]
    assert one.evaluations["before"] == pytest.approx(expected)


def test_an_evaluation_is_drawn_the_same_whatever_batch_size_and_seed(line, spy, tmp_path):
    texts, calls = [], spy(rollout, "generate")
    for more in ("--seed 1", "--generation_batch_size 8", "--generation_batch_size 56"):
        one = set_up(f"{line} {more} --output_dir {tmp_path}/{len(texts)}")
        calls.clear()
        train.evaluate(one, "before")
        texts.append([text for _, samples in calls for text in samples.texts])
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 12
    assert len(set(texts[0])) > 6


# --- A run and its files
def test_presets_defaults_and_precedence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.parse_config([]).preset == "tiny"
    assert train.parse_config(["--model", "x"]).preset == train.parse_config(["--model=x"]).preset == "laptop"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = train.parse_config([])
    assert (config.preset, config.model, config.task) == ("qwen3-0.6b", "Qwen/Qwen3-0.6B", "gsm8k")
    assert config.bf16
    # The published constants, and the published rule.
    assert (config.scope_target_entropy, config.scope_alpha, config.scope_share) == (0.5, 1 / 64, 1 / 64)
    assert (config.scope_temperature_min, config.scope_temperature_max, config.scope_gain) == (0.8, 1.2, 1.0)
    assert (config.scope_integral_gain, config.scope_max_boost, config.num_auxiliary) == (0.0, 1.0, 2)
    assert train.parse_config(["--preset", "tiny", "--learning_rate", "1"]).learning_rate == 1
    # A quarter of 32 auxiliary samples, never fewer than one, and none in GRPO.
    shares = {"": 8, "--scope_share 0.001": 1, "--scope_share 0": 0, "--algorithm grpo": 0}
    for more, M in shares.items():
        line = f"--preset tiny --generation_batch_size 32 {more}"
        assert train.parse_config(line.split()).num_auxiliary == M


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_config(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{name}" in said for name in train.OPTIONS)


@pytest.mark.parametrize("algorithm", ["scope", "grpo"])
def test_a_run_writes_what_it_promises_and_is_reproducible(line, model_folder, tmp_path, algorithm):
    line += f" --algorithm {algorithm} --entropy_coef 0.01 --epsilon_high 0.28"
    finished, folder = run(line), tmp_path / "run"
    rows = rows_of(folder)
    wanted = (
        "step entropy scope_temperature scope_alpha loss clip_fraction grad_norm reward frac_reward_zero_std "
        "scope_positive_frac completion_length truncated_frac rollout_seconds step_seconds"
    )
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(list(row) == wanted.split() for row in rows)
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert all(0 < row["rollout_seconds"] < row["step_seconds"] for row in rows)
    assert all((row["scope_temperature"] == 1.0) == (algorithm == "grpo") for row in rows[1:])
    evaluations = json.loads((folder / "eval.json").read_text())
    assert list(evaluations) == ["before", "after"]
    assert list(evaluations["after"]) == ["pass@1", "pass@4", "distinct_correct", "num_right"]
    assert json.loads((folder / "config.json").read_text()) == vars(finished.config)

    model, before = weights_of(folder / "model"), weights_of(model_folder)
    for name, value in finished.model.state_dict().items():
        assert torch.equal(model[name], value), name
    assert any(not torch.equal(model[name], before[name]) for name in before)
    saved = AutoTokenizer.from_pretrained(folder / "model")
    assert saved("1+2=").input_ids == finished.tokenizer("1+2=").input_ids

    run(f"{line} --output_dir {tmp_path}/again")
    assert metrics_of(tmp_path / "again") == metrics_of(folder)
    run(f"{line} --seed 1 --output_dir {tmp_path}/other")
    assert metrics_of(tmp_path / "other") != metrics_of(folder)


def test_the_instruction_is_the_tasks_or_ones_own(line, spy, tmp_path):
    calls = spy(rollout, "format_prompts")
    for i, more in enumerate(("", "--instruction 'Be brief.'")):
        set_up(f"{line} --task {countdown.__file__} {more} --output_dir {tmp_path}/{i}")
    assert [instruction for (_, _, instruction), _ in calls] == [countdown.INSTRUCTION, "Be brief."]


def test_a_checkpoint_is_read_on_the_cpu_and_holds_the_rule_and_the_evaluations(line, tmp_path, monkeypatch):
    """That a resumed run goes on as if it had not been stopped is tested in robust."""
    saved, save = [], train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda run: saved.append(run.step) or save(run))
    finished = run(f"{line} --max_steps 3 --scope_max_boost 4")
    assert saved == [2, 3]  # every second step, and the last
    finished.rule(0.01)
    save(finished)
    places, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *path, **more: places.append(more) or load(*path, **more))
    resumed = set_up(f"--resume --output_dir {tmp_path}/run")
    # AdamW's counters cost no waiting there, and nothing is on the GPU twice; and no code is run.
    assert places == [{"map_location": "cpu", "weights_only": True}]
    assert resumed.rule == finished.rule
    assert resumed.rule.boost > 1
    assert list(resumed.evaluations) == ["before", "after"]
    monkeypatch.setattr(rollout, "generate", lambda *_: pytest.fail("it is evaluated again"))
    train.evaluate(resumed, "before")
    assert isinstance(resumed.optimizer, torch.optim.AdamW)
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0


# --- What ends a run
@pytest.mark.parametrize(("what", "last"), [("entropy", 3), ("loss", 3), ("weights", 4)])
def test_a_policy_that_has_diverged_is_not_saved(what, last, line, tmp_path, monkeypatch):
    """Numbers that are not finite in the third step, or weights after the last: a lower learning rate is tried."""
    train_step = train.train_step

    def sick(run):
        if run.step + 1 == last and what == "entropy":
            monkeypatch.setattr(train, "masked_mean", lambda *given: torch.tensor(math.nan))
        if run.step + 1 == last and what == "loss":
            run.scope_loss = lambda *given: [x * math.nan for x in scope_rl.scope_loss(*given)]
        done = train_step(run)
        if run.step == last and what == "weights":
            run.model.lm_head.weight.data[3, 5] = math.inf
        return done

    monkeypatch.setattr(train, "train_step", sick)
    said, resume = go(f"{line} --num_eval_problems 0 --save_steps 1").split("\n")
    monkeypatch.undo()
    assert re.match(rf"stopped: ({what} of|\S+ is not finite after) step {last}\b", said)
    assert not (tmp_path / "run" / "model").exists()
    assert step_of(tmp_path / "run") == last - 1
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert resume.endswith(" --learning_rate 0.005")
    assert go(resume.removeprefix("to go on: python train.py ")) is None  # what it says works
    assert len(metrics_of(tmp_path / "run")) == 4


def test_out_of_memory_ends_in_one_line_that_names_settings(line, tmp_path, monkeypatch):
    def full(run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(train, "train", full)
    said, resume = go(line).split("\n")
    assert all(name in train.OPTIONS for name in re.findall(r"\w+_batch_size", said))
    assert "per_device_train_batch_size" in said
    assert resume.endswith(f"--resume --output_dir {tmp_path}/run")


NORMS = {"0" * 8: 1, "0" * 7 + "111": 0, "0101000000": 1, "0" * 16: 2, "1" * 20: 0, "0011100" * 3: 0}


@pytest.mark.parametrize(("norms", "times"), NORMS.items())
def test_eight_idle_steps_of_ten_are_said_once_with_their_reason(norms, times, line, monkeypatch, capsys):
    def step(run):
        run.step += 1
        sample = {"reward": 0.0, "entropy": 1.0, "scope_temperature": 1.0, "truncated_frac": 0.9}
        return sample | {"step": run.step, "grad_norm": float(norms[run.step - 1])}, []

    monkeypatch.setattr(train, "train_step", step)
    run(f"{line} --max_steps {len(norms)} --save_steps 100 --num_eval_problems 0")
    assert capsys.readouterr().out.count("raise --max_completion_length") == times
    reasons = {"max_completion_length": (0.9, 0.1), "harder": (0.1, 1.0), "easier": (0.1, 0.0)}
    for advice, (truncated, R) in reasons.items():
        assert advice in train.reason([{"truncated_frac": truncated, "reward": R}] * 10)


@pytest.mark.slow
def test_the_main_job_raises_reward_and_holds_entropy(tmp_path):
    """README's command on the preset tiny, and the same without the auxiliary term."""
    results = {}
    for algorithm in ("scope", "grpo"):
        folder = tmp_path / algorithm
        command = [sys.executable, ROOT / "train.py", "--preset", "tiny", "--algorithm", algorithm]
        subprocess.run([*command, "--output_dir", folder], check=True)
        rows = metrics_of(folder)
        last = rows[-len(rows) // 5 :]
        results[algorithm] = [np.mean([row[name] for row in last]) for name in ("reward", "entropy")]
        assert results[algorithm][0] >= rows[0]["reward"] + 0.3
    target = train.parse_config(["--preset", "tiny"]).scope_target_entropy
    assert abs(results["scope"][1] - target) <= 0.1 * target
    assert results["grpo"][1] < 0.5 * target
