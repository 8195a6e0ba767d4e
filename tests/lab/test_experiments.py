"""theory/lab/experiments.py: its tables of options, its runs, and the measures of control."""

import gc
import json

import numpy as np
import pytest

import countdown
import experiments
import reward
import rollout
import scope_rl
import sums
import train


def kinds_and_config(options: str) -> tuple[list[type], train.Config]:
    kinds, arguments = experiments.kinds_and_arguments(options)
    model = ["--model", "a-llama"] if "--train_file" in arguments else []  # the preset's reads no words
    return kinds, train.parse_config(["--preset", "tiny", *model, "--output_dir", "x", *arguments])


@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS)
def test_every_cell_of_the_grid_is_a_config_of_its_own(experiment):
    table = experiments.EXPERIMENTS[experiment]
    assert len({str(kinds_and_config(options)) for options in table.values()}) == len(table)


def test_the_rows_of_scope_are_the_preset_s():
    assert kinds_and_config(experiments.SCOPE) == kinds_and_config("")


def test_every_row_stands_in_a_table():
    shown = {options for table in experiments.EXPERIMENTS.values() for options in table.values()}
    assert {row["options"] for row in experiments.read_rows()} <= shown


SHORT = "--generation_batch_size 8 --num_generations 4 --num_eval_problems 2 --num_eval_generations 4"


def test_a_variants_run_leaves_a_row_and_the_core_and_resumes_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "WORK", tmp_path)
    core = rollout.generate, scope_rl.objective_table, scope_rl.scope_loss, scope_rl.TemperatureRule.__call__
    options = f"@entropic @positional --scope_target_entropy 0.7 --max_steps 35 --save_steps 2 {SHORT}"
    whole = experiments.one_run((options, 1))

    # The row.
    assert not list(tmp_path.iterdir())  # what the row keeps is enough
    assert [whole[name] for name in ("options", "seed", "target", "steps")] == [options, 1, 0.7, 35]
    names = {"reward", "scope_temperature", "num_right", "pass@4", "distinct_correct", "pass@1 before"}
    assert names < whole.keys() and len(whole["num_right"]) == 2
    assert np.mean(whole["entropies"][-7:]) == pytest.approx(whole["entropy"], abs=1e-4)
    assert whole["scope_temperature"] == 1  # EntroPIC leaves it, where the core's rule would move it

    # A run that is stopped after five steps, and goes on.
    train_step, asked = train.train_step, []

    def stops_at_step_5(run):
        asked.append(run.config.model)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return train_step(run)

    monkeypatch.setattr(train, "train_step", stops_at_step_5)
    with pytest.raises(KeyboardInterrupt):
        experiments.one_run((options, 1))
    gc.collect()  # a run of another process would have let go of its folder
    resumed = experiments.one_run((options, 1))
    assert set(asked) == {str(train.THEORY / "tiny" / "start-1")}
    assert resumed.pop("cpu_seconds") and whole.pop("cpu_seconds")  # no two runs have the same
    assert resumed == whole

    # Nothing of the core was changed, and a run after it has the core's parts.
    now = rollout.generate, scope_rl.objective_table, scope_rl.scope_loss, scope_rl.TemperatureRule.__call__
    run = train.set_up(kinds_and_config(f"{SHORT} --output_dir {tmp_path / 'after'}")[1])
    assert now == core == (run.generate, run.objective_table, run.scope_loss, type(run.rule).__call__)


def test_the_questions_of_transfer_are_right_and_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "WORK", tmp_path / "folder")
    experiments.write_sums()
    tested, trained = (reward.load_problems(path) for path in sorted(experiments.WORK.iterdir()))
    assert len(trained) == len(tested) == 128 and not set(trained) & set(tested)
    for problem in trained + tested:
        assert int(problem.answer) == sum(map(int, problem.question.removesuffix("=").split("+")))


def test_other_starts_are_made_once_from_their_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "WORK", tmp_path)
    monkeypatch.setattr(experiments.neighbours, "EXPLORERS", tmp_path)
    full, made = experiments.warm_start.warm_start, []

    def short(folder, config, example, steps, seed):
        made.append((config.model_type, config.hidden_size, example, steps, seed))
        full(folder, config, example, 2, seed)

    monkeypatch.setattr(experiments.warm_start, "warm_start", short)
    for seed in (3, 1):
        assert experiments.start(f"{experiments.SUMS} --algorithm grpo", seed) == tmp_path / "llama-1"
    assert experiments.start(f"@bonus_pi {experiments.WEAK}", 3) == tmp_path / "weak"
    assert experiments.start("@s2l_po --max_steps 2", 2) == train.THEORY / "tiny" / "start-0"
    assert made == [
        ("llama", 64, sums.example, 1400, 1),
        ("qwen3", 64, countdown.example, 1750, 2),  # one weak start for all seeds
        ("qwen3", 32, countdown.example, 3500, 0),
    ]
    assert json.loads((tmp_path / "smaller-0" / "config.json").read_text())["num_attention_heads"] == 2


def test_the_measures_of_control():
    course = [0.8, 0.41, 0.5, 0.43, 0.37, 0.4, 0.4, 0.4, 0.42, 0.37]
    assert experiments.settling(course, 0.4, 100) == 30
    assert experiments.settling(course[5:], 0.4, 50) == 0
    assert experiments.settling([0.4] * 34 + [0.45], 0.4, 350) == 350
    assert experiments.error(course, 0.4) == pytest.approx((0.02 + 0.03) / 2 / 0.4)
    assert experiments.lowest(course, 0.4) == pytest.approx(0.925)
