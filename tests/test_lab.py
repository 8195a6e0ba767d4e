"""theory/experiments.py, report.py, closed_loop.py: the grid, the variants, the statistics, a step taken apart."""

import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import closed_loop
import experiments
import report
import reward
import train


@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS)
def test_every_cell_of_the_grid_is_a_config_of_its_own(experiment):
    configs = set()
    for options in experiments.EXPERIMENTS[experiment].values():
        variant, arguments = "", options.split()
        if arguments[0].startswith("@"):
            variant = arguments.pop(0)[1:]
            assert variant in experiments.VARIANTS
        configs.add(
            (
                variant,
                str(train.parse_config(["--preset", "tiny", "--output_dir", "x", *arguments])),
            )
        )
    assert len(configs) == len(experiments.EXPERIMENTS[experiment])


def test_variants_against_their_definitions_sample_by_sample():
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    auxiliary, alpha, N = torch.tensor([1.0, 0, 1, 1, 0]), 0.5, 12
    usual_A, usual_w = (x.tolist() for x in experiments.ORIGINAL(rewards, auxiliary, alpha))
    for name, variant in experiments.VARIANTS.items():
        A, w = (x.tolist() for x in variant(rewards.clone(), auxiliary.clone(), alpha))
        for i in range(N):
            counts = 8 if name == "equal_groups_dropped" else N  # the second group is all right
            dropped = name == "equal_groups_dropped" and i // 4 == 1
            assert A[i] == usual_A[i]
            assert w[i] == pytest.approx(0.0 if dropped else 1 / counts)
        for j, right in enumerate(auxiliary.tolist()):
            group = rewards[j % 3].tolist()
            spread = math.sqrt(sum((r - sum(group) / 4) ** 2 for r in group) / 4) + 1e-4
            expected = {
                "both_signs": 1.0 if right else -1.0,
                "group_normalised": right * (1 - sum(group) / 4) / spread,
            }
            assert A[N + j] == pytest.approx(expected.get(name, right), rel=1e-5)
            assert w[N + j] == pytest.approx(
                alpha / 3 if name == "mean_over_positives" else usual_w[N + j]
            )
    nothing = experiments.VARIANTS["mean_over_positives"](rewards, torch.zeros(5), alpha)
    assert all(torch.isfinite(x).all() for x in nothing)


def test_intervals_and_paired_differences(tmp_path, monkeypatch):
    assert report.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.30 / math.sqrt(3)))
    assert math.isnan(report.interval([1.0])[1])
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results.jsonl")
    assert experiments.cells("control") == {}
    monkeypatch.setitem(experiments.EXPERIMENTS, "two", {"A": "a", "B": "b", "none yet": "c"})
    values = {
        "a": {0: 0.1, 1: 0.5, 2: 0.9},
        "b": {0: 0.2, 1: 0.6, 3: 0.0},
    }  # seeds differ a lot, B - A hardly
    rows = [
        {
            "options": o,
            "seed": s,
            "pass@1": v,
            "entropy": 0.3,
            "target": 0.4,
            "oscillation": 0.0,
            "entropies": [v, v],
        }
        for o, cell in values.items()
        for s, v in cell.items()
    ]
    experiments.RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report.tables("two", experiments.cells("two"))
    assert "| B | 2 | +0.100 ± 0.000 |" in text  # the two seeds they share
    assert "none yet" not in text
    assert "| A | 3 | 0.300 ± 0.000 | 0.250 ± 0.000 | 0.500 ± 0.993 |" in text  # entropy, error, pass@1


def test_the_documents_show_what_the_rows_say():
    """Every table of theory/RESULTS.md, and README's, is the one that the committed rows give."""
    root = Path(train.__file__).parent
    results, readme = (root / "theory" / "RESULTS.md").read_text(), (root / "README.md").read_text()
    for name in experiments.EXPERIMENTS:
        assert report.tables(name, experiments.cells(name)) in results
    assert report.offsets(experiments.cells("control")) in results
    assert report.tables("target", experiments.cells("target")).split("\n\n")[0] in readme


def test_the_tables_of_signs_and_temperatures_show_what_the_rows_say():
    """theory/README.md against asymmetry.py's rows: the means and two standard errors, to the digits that are shown."""
    theory = Path(experiments.__file__).parent
    lines = [line.strip("| ").split("|") for line in (theory / "README.md").read_text().splitlines()]
    lines = [line for line in lines if re.match(r"(positive|negative), \d", line[0])]
    columns = [("warm-start", "held_out"), ("collapsed", "training"), ("scope", "training")]
    columns = {7: columns, 5: [("collapsed-averaged", "training"), ("scope-averaged", "training")]}
    assert sorted(map(len, lines)) == [5] * 10 + [7] * 10
    for line in lines:
        sign, temperature = line[0].strip().split(", ")
        for (name, probe), shown, predicted in zip(
            columns[len(line)], line[1::2], line[2::2], strict=True
        ):
            rows = [
                json.loads(row) for row in (theory / f"asymmetry-{name}.jsonl").read_text().splitlines()
            ]
            rows = [
                row for row in rows if (row["sign"], row["temperature"]) == (sign, float(temperature))
            ]
            if len(rows) < 8:
                assert shown.strip() == f"({len(rows)} of 8 draws)"
                continue
            values, digits = (
                np.array([[row[probe], row["predicted"]] for row in rows]),
                len(shown.split(".")[-1].strip()),
            )
            half = 2 * values[:, 0].std(ddof=1) / len(rows) ** 0.5
            assert shown.strip() == f"{values[:, 0].mean():+.{digits}f} ± {half:.{digits}f}"
            assert predicted.strip() == f"{values[:, 1].mean():+.4f}"


@pytest.mark.parametrize("slope", [0.5, 2.0])
def test_the_predicted_rest_solves_the_linear_case(slope):
    """T* = 1 + slope (H - 0.1) meets T = 1 + H0 - H at H = (H0 + 0.1 slope) / (1 + slope)."""
    points = [(H, 1 + slope * (H - 0.1)) for H in (0.6, 0.1, 0.35)]
    for H0 in (0.3, 0.5):
        predicted = report.predicted_rest(points, H0)
        assert predicted == pytest.approx((H0 + 0.1 * slope) / (1 + slope), abs=2e-4)


def test_the_questions_of_transfer_are_right_and_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "WORK", tmp_path / "folder")
    experiments.write_sums()
    problems = {
        split: reward.load_problems(experiments.WORK / f"{split}.jsonl") for split in ("train", "test")
    }
    assert not set(problems["train"]) & set(problems["test"])
    for question, answer in problems["train"] + problems["test"]:
        a, b = question.removesuffix("=").split("+")
        assert int(answer) == int(a) + int(b)
    rng = random.Random(0)
    for _ in range(100):
        problem, example = experiments.sums_example(rng)
        shown, value = example.split("=")
        assert eval(shown) == int(value) == int(problem.answer)
        assert reward.answer_reward(problem, example) == 1
        assert reward.answer_reward(problem, example + "1") == 0
        assert problem not in problems["test"]


# --- closed_loop.py


@pytest.fixture
def small_run(model_folder, tmp_path, monkeypatch):
    """A function that sets up a run of one gradient step a step, at a learning rate."""
    monkeypatch.setattr(
        reward, "countdown_reward", lambda problem, completion: float(len(completion) % 2)
    )
    monkeypatch.setattr(closed_loop, "SAMPLES", 96)
    options = "--preset tiny --generation_batch_size 32 --num_generations 4 --num_mini_batches 1 --warmup_steps 0"

    def make(learning_rate: float) -> train.Run:
        torch.manual_seed(0)
        folder = tmp_path / f"run {learning_rate}"
        own = [
            "--model",
            str(model_folder),
            "--output_dir",
            str(folder),
            "--learning_rate",
            str(learning_rate),
        ]
        run = train.set_up(train.parse_config([*options.split(), *own]))
        # <pad>'s embedding starts as 0, where RMSNorm has a kink, and a random model does sample <pad>
        torch.nn.init.normal_(
            run.model.get_input_embeddings().weight.data[run.tokenizer.pad_token_id], std=0.3
        )
        return run

    return make


def test_the_parts_of_a_step_scale_as_their_orders(small_run):
    """AdamW's first step is proportional to the learning rate: `first` must double with it, `curvature` quadruple."""
    small, large = (closed_loop.one_step(small_run(rate)) for rate in (1e-4, 2e-4))
    assert small["H"] == large["H"]
    assert large["first"] / small["first"] == pytest.approx(2, rel=1e-2)
    assert large["curvature"] / small["curvature"] == pytest.approx(4, rel=0.1)
    for parts in (small, large):
        assert parts["fixed"] == pytest.approx(parts["first"] + parts["curvature"], rel=0.05)


def test_taking_a_step_apart_leaves_the_step_alone(small_run, tmp_path):
    run, other = small_run(1e-3), small_run(2e-3)
    other.optimizer.param_groups[0]["lr"] = other.config.learning_rate = 1e-3
    closed_loop.one_step(run)
    train.train_step(other)
    for mine, plain in zip(run.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, plain)


def test_visited_contexts_weigh_samples_by_their_ratio(small_run):
    run = small_run(1e-3)
    samples, _ = train.sample(run, run.task.train[:20], torch.ones(20))
    old, (H, same) = closed_loop.entropies(run, samples, None)
    assert same == H
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    new, (fixed, visited) = closed_loop.entropies(run, samples, old)
    logprobs, token_entropies = train.score_all(run, samples)
    above, below = 0.0, 0.0
    for i, mask in enumerate(samples.completion_mask):
        ratio = math.exp(sum(logprobs[i, mask].tolist()) - old[i].item())
        above += ratio * sum(token_entropies[i, mask].tolist())
        below += ratio * mask.sum().item()
    assert visited == pytest.approx(above / below, rel=1e-5)
    assert visited != pytest.approx(fixed, rel=1e-3)
    assert torch.isfinite(new).all()
