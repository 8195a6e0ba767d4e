"""theory/lab/pretrained.py and the tasks it was run on."""

import re

import pytest
from lab_helpers import json_lines

import arithmetic
import between
import experiments
import pretrained
import reward
import train


@pytest.mark.parametrize("module, size", [(arithmetic, 400), (between, 345)])
def test_the_splits_share_no_problem(module, size):
    task, again = (module.task(train.Config(seed=seed, output_dir="x")) for seed in (3, 4))
    assert task.test == again.test and task.train != again.train and sorted(task.train) == sorted(again.train)
    assert len(task.train + task.test) == len({*task.train, *task.test}) == size


def test_the_last_digits_of_an_answer_count():
    problem, is_between = reward.Problem("Pick a number between 23 and 53.", "23 53"), between.is_between
    right = ("24", "52.", "The number is 50!", "23 < 30", "99, no: 40", "-30", "12.40", "034")
    wrong = ("23", "53", "", "none", "40 and 99", "3", "5 1", "30.5", "1" * 5000)
    assert [is_between(problem, text) for text in (*right, *wrong)] == [1] * len(right) + [0] * len(wrong)


def test_every_label_is_a_config_of_its_own_that_is_named_so():
    configs = set()
    for label, options in pretrained.LABELS.items():
        kinds, words = experiments.kinds_and_arguments(options)
        config = train.parse_config([*pretrained.COMMON.split(), *words, "--output_dir", "x"])
        assert config.generation_batch_size // config.num_generations == int(label.split()[0])
        assert (config.algorithm == "grpo", bool(kinds)) == ("GRPO" in label, "stepwise" in label)
        if target := re.search(r"H0 ([\d.]+)", label):
            assert config.scope_target_entropy == float(target[1])
        configs.add((str(kinds), str(config)))
    assert len(configs) == len(pretrained.LABELS)


def test_a_short_run_of_the_pretrained_kind_leaves_a_row(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "WORK", tmp_path / "work")
    common = "--preset tiny --generation_batch_size 8 --num_generations 4 --num_eval_problems 2 --task "
    monkeypatch.setattr(pretrained, "COMMON", common + str(train.THEORY / "tiny" / "countdown.py"))
    monkeypatch.setattr(pretrained, "LABELS", {"short": "@mean_over_positives --max_steps 6"})
    row = pretrained.one_run(str(model_folder), "short", 1)
    assert {len(row[name]) for name in pretrained.KEPT} == {6}
    assert row["settings"]["max_steps"] == 6 and "seed" not in row["settings"]
    assert [len(texts) for texts in row["texts"]] == [8, 8] and set(row["evaluations"]) == {"before", "after"}
    assert not list((tmp_path / "work").iterdir())


def test_the_table_compares_the_last_fifth_with_grpo_s(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "ROWS", tmp_path / "rows.jsonl")
    rows = []
    # Seed 1 stands first; the last of five parts of three steps are .7 and .5.
    for label, seed, ends, distinct in (
        ("SCOPE, H0 0.5", 1, [0.6, 0.7, 0.8], 3.0), ("SCOPE, H0 0.5", 0, [0.5, 0.5, 0.5], 4.0),
        ("GRPO", 0, [0.1, 0.2, 0.3], 2.0), ("GRPO", 1, [0.2, 0.2, 0.2], 2.0),
    ):  # fmt: skip
        row = {name: [1.0] * 15 for name in pretrained.KEPT} | {"entropy": [2.0] * 9 + [0.4] * 3 + ends}
        after = {"pass@1": 0.25, "distinct_correct": distinct}
        row |= {"label": f"12 prompts: {label}", "seed": seed, "target": 0.5, "question": ["?"]}
        rows.append(row | {"evaluations": {"after": after}, "texts": [["a|b"], [f"of {seed}"]]})
    pretrained.ROWS.write_text(json_lines(rows))
    for row, error in zip(rows[:2], (0.4, 0.0), strict=True):
        measured = pretrained.measures(row)
        numbers = [measured[name] for name in ("first", "error", "lowest")]
        assert numbers == pytest.approx([2.0, error, 0.8])
    grpo, scope = (line.strip("| ").split(" | ") for line in pretrained.comparison().splitlines()[2:])
    assert grpo[0] == "12 prompts: GRPO" and grpo[2] == "0.200"
    values = [float(cell.split(" ±")[0]) for cell in scope[2:]]
    assert values == pytest.approx([0.6, 0.2, 0.8, 1, 1, 0.25, 3.5, 0.4, 1.5], abs=0.051)
    last = ["| before | `a/b` |", "| 12 prompts: GRPO | `of 0` |", "| 12 prompts: SCOPE, H0 0.5 | `of 0` |"]
    assert pretrained.answers().splitlines()[2:] == last
