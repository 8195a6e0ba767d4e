"""theory/lab: the experiments, their variants, the statistics, the documents, and both probes."""

import itertools
import json
import math
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import arithmetic
import between
import closed_forms as cf
import countdown
import experiments
import pretrained
import probes
import report
import reward
import rollout
import scope_rl
import sums
import train
from entropy import token_entropy

THEORY = train.TINY.parent

# --- experiments.py


@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS)
def test_every_cell_of_the_grid_is_a_config_of_its_own(experiment):
    configs = set()
    for options in experiments.EXPERIMENTS[experiment].values():
        variant, arguments = experiments.variant_and_arguments(options)
        config = train.parse_config(["--preset", "tiny", "--output_dir", "x", *arguments])
        configs.add((type(variant).__name__, str(config)))
    assert len(configs) == len(experiments.EXPERIMENTS[experiment])


INGREDIENTS = ["both_signs", "mean_over_positives", "group_normalised", "equal_groups_dropped", "aepo"]


@pytest.mark.parametrize("name", ["as it is", *INGREDIENTS])
def test_variants_against_their_definitions_sample_by_sample(name):
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    auxiliary, alpha, N = torch.tensor([1.0, 0, 1, 1, 0]), 0.5, 12
    variant = experiments.VARIANTS.get(name, experiments.Variant)()
    limits = {"target": 0.4, "minimum": 0.8, "maximum": 1.2, "gain": 1.0}
    variant.scope_temperature(0.3, 0.0, **limits)
    table = variant.objective_table(rewards.clone(), auxiliary.clone(), alpha, 0.1)
    usual = scope_rl.objective_table(rewards, auxiliary, alpha, 0.1)
    assert table.entropy_coefs.tolist() == pytest.approx([0.1] * N + [0.0] * 5)
    for i in range(N):
        counts = 8 if name == "equal_groups_dropped" else N  # the second group is all right
        dropped = name == "equal_groups_dropped" and i // 4 == 1
        assert table.advantages[i] == usual.advantages[i]
        assert table.weights[i] == pytest.approx(0.0 if dropped else 1 / counts)
    for j, right in enumerate(auxiliary.tolist()):
        group = rewards[j % 3].tolist()
        spread = math.sqrt(sum((r - sum(group) / 4) ** 2 for r in group) / 4) + 1e-4
        A = {
            "both_signs": 1.0 if right else -1.0,
            "group_normalised": right * (1 - sum(group) / 4) / spread,
            "aepo": 0.0,  # 60 of 2,560 are none of 12
        }
        w = {"mean_over_positives": alpha / 3, "aepo": 1 / N}
        assert table.advantages[N + j] == pytest.approx(A.get(name, right), rel=1e-5)
        assert table.weights[N + j] == pytest.approx(w.get(name, alpha / 5))


def test_a_mean_over_no_positives_is_finite():
    table = experiments.MeanOverPositives().objective_table(torch.eye(3), torch.zeros(5), 0.5, 0.0)
    assert torch.isfinite(table.weights).all() and torch.isfinite(table.advantages).all()


@pytest.mark.parametrize(("H", "T", "count"), [(0.1, 1.2, 12), (0.4, 1.2, 12), (0.41, 0.8, 6)])
def test_aepo_switches_and_counts_the_first_positives_only(H, T, count):
    """Our batch of 512 is a fifth of theirs, and so are the positives: 60 / 5, and half above the target."""
    aepo, rewards = experiments.Aepo(), torch.zeros(64, 8)
    options = {"target": 0.4, "minimum": 0.8, "maximum": 1.2, "gain": 2.0, "integral_gain": 0.05}
    assert aepo.scope_temperature(H, 0.25, **options) == (T, 0.25)
    auxiliary = (torch.rand(128) < 0.5).float()
    table = aepo.objective_table(rewards, auxiliary, 1.0, 0.0)
    first = auxiliary.nonzero()[:count, 0].tolist()
    assert table.advantages[512:].nonzero()[:, 0].tolist() == first
    assert set(table.advantages[512:].tolist()) == {0.0, 1.0}
    assert table.weights.tolist() == pytest.approx([1 / 512] * 640)


# The rivals. A variant is asked for T with these limits, those of its experiment over them.
LIMITS = {
    "target": 0.4, "minimum": 0.8, "maximum": 1.2, "gain": 0.4, "integral_gain": 0.1, "integral_band": 0.1,
}  # fmt: skip
REWARDS = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]])


def tables_of(options: str, entropies: list[float], **limits) -> list[scope_rl.Objective]:
    """The tables of a step each, after these entropies; T must be 1 throughout."""
    variant, integral, tables = experiments.variant_and_arguments(options)[0], 0.0, []
    for H in entropies:
        T, integral = variant.scope_temperature(H, integral, **(LIMITS | limits))
        assert T == 1
        tables.append(variant.objective_table(REWARDS.clone(), torch.ones(1), 0.0, 0.0))
        assert not tables[-1].has_gradient()[12:].any()  # the one auxiliary sample counts for nothing
    return tables


@pytest.mark.parametrize(
    ("options", "limits", "entropies", "bonuses"),
    [
        # e = -.4, .05, .08, .2, 0: the integral, .1 e a step, runs within .1 of the target and off the clip.
        ("@bonus_pi", {}, [0.8, 0.35, 0.32, 0.2, 0.4], [-0.16, 0.02, 0.037, 0.093, 0.013]),
        ("@bonus_pi", {"minimum": 1.0}, [0.8, 0.35, 0.45], [0.0, 0.02, 0.0]),
        ("@bonus_pi", {"maximum": 1.01}, [0.3, 0.35, 0.4], [0.01, 0.01, 0.0]),
        # c = .4, .8, 1, 1, .6, .2, 0, .4, of which those above the target are not applied.
        (
            "@stepwise_bonus", {},
            [0.4, 0.39, 0.1, 0.1, 0.41, 0.9, 0.9, 0.3], [0.4, 0.8, 1.0, 1.0, 0.0, 0.0, 0.0, 0.4],
        ),
        # log (c / .03) = .1 times the sum of e
        ("@dual_ascent", {}, [0.8, 0.1, 0.1], [0.03 * math.exp(x) for x in (-0.04, -0.01, 0.02)]),
    ],
)  # fmt: skip
def test_a_controlled_bonus_step_by_step(options, limits, entropies, bonuses):
    tables = tables_of(options, entropies, **limits)
    for table, bonus in zip(tables, bonuses, strict=True):
        assert table.entropy_coefs.tolist() == pytest.approx([bonus] * 12 + [0.0], abs=1e-7)
        assert table.advantages[:12].tolist() == scope_rl.group_advantages(REWARDS).flatten().tolist()
        assert table.weights[:12].tolist() == pytest.approx([1 / 12] * 12)


def test_entropic_weighs_positives_and_negatives_apart():
    usual = scope_rl.group_advantages(REWARDS).flatten()
    # a = .4 (H - H0) + .1 times the sum of those before: .16, -.08 + .04, .04 + .02; and -4.9 is clipped
    for H, a in {(0.8,): 0.16, (0.8, 0.2): -0.04, (0.8, 0.2, 0.5): 0.06, (-12.0,): -1.0}.items():
        table = tables_of("@entropic", list(H))[-1]
        expected = [(1 + a if A > 0 else 1 - a) * A for A in usual.tolist()]
        assert table.advantages[:12].tolist() == pytest.approx(expected, abs=1e-6)
        assert table.entropy_coefs.tolist() == [0.0] * 13


@pytest.mark.parametrize(
    ("H", "kept"),
    [
        (0.35, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]),
        (0.25, [[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]]),
        (0.55, [[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]]),
    ],
)
def test_the_band_filter_keeps_one_sign_outside_the_band(H, kept):
    table = tables_of("@band_filter", [0.9, H])[-1]
    expected = [k / sum(group) / 3 for group in kept for k in group]
    assert table.weights[:12].tolist() == pytest.approx(expected)
    assert table.advantages[:12].tolist() == scope_rl.group_advantages(REWARDS).flatten().tolist()


@pytest.mark.parametrize(
    "name", ["bonus_pi", "stepwise_bonus", "dual_ascent", "entropic", "flow_balance", "band_filter"]
)
def test_rivals_move_the_entropy_of_a_bandit_the_right_way(name):
    """A step of theirs against one of GRPO's. Of .45, .45, .1 the first is right; only the likely ones are drawn."""
    actions = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    rewards = (actions == 0).float()[None]

    def entropy_after(H: float | None) -> float:
        variant, integral = experiments.VARIANTS[name]() if H else experiments.Variant(), 0.0
        for _ in range(5 if H else 0):
            _, integral = variant.scope_temperature(H, integral, **LIMITS)
        objective = variant.objective_table(rewards, torch.zeros(0), 0.0, 0.0)
        z = torch.tensor([0.45, 0.45, 0.1]).log().requires_grad_()
        logprobs = z.log_softmax(0)[actions][:, None]
        entropies, mask = token_entropy(z).expand(8, 1), torch.ones(8, 1, dtype=torch.bool)
        loss, _ = variant.scope_loss(logprobs, logprobs.detach(), entropies, mask, objective, 0.2, None)
        (gradient,) = torch.autograd.grad(loss, z)
        return token_entropy(z - 0.1 * gradient).item()

    assert entropy_after(0.25) > entropy_after(None) + 5e-5
    if name not in ("stepwise_bonus", "dual_ascent"):  # whose bonus is never negative
        assert entropy_after(0.55) < entropy_after(None) - 5e-5


def test_the_flow_balance_takes_away_what_lowers_the_entropy_of_a_state():
    """At a = -1 what is left of a step is, token by token, what raises H; at a = 1 what lowers it. gbar is left out."""
    torch.manual_seed(0)
    for sign in (-1, 1):
        variant = experiments.FlowBalance()
        variant.scope_temperature(0.4 + 9 * sign, 0.0, **LIMITS)
        for action, A in ((a, A) for a in range(3) for A in (1.0, -1.0)):
            z = torch.tensor([0.6, 0.3, 0.1]).log().requires_grad_()
            objective = scope_rl.Objective(torch.tensor([A]), torch.tensor([1.0]), torch.tensor([0.0]))
            x, H, mask = z.log_softmax(0)[action].view(1, 1), token_entropy(z).view(1, 1), torch.ones(1, 1).bool()
            loss, _ = variant.scope_loss(x, x.detach(), H.detach(), mask, objective, 0.2, None)
            usual, _ = scope_rl.scope_loss(x, x.detach(), H.detach(), mask, objective)
            lowers = A * (math.log([0.6, 0.3, 0.1][action]) + 0.8979) > 0  # H of this policy
            assert loss.item() == pytest.approx(2 * usual.item() if lowers == (sign > 0) else 0.0, abs=1e-6)


def test_a_moving_target_falls_and_comes_back():
    variant, _ = experiments.variant_and_arguments("@moving_target @stepwise_bonus --scope_gain 1")
    variant.run = types.SimpleNamespace(config=types.SimpleNamespace(max_steps=350))
    low = []
    for variant.run.step in range(350):
        variant.scope_temperature(0.4, 0.0, **(LIMITS | {"target": 0.5}))
        low.append(variant.bonus == 0)  # .4 lies above the target
    assert low == [False] * 150 + [True] * 100 + [False] * 100


def test_dr_grpo_leaves_the_standard_deviation_out_also_for_a_rival():
    centred = [1 / 2, -1 / 2, -1 / 2, 1 / 2, 0, 0, 0, 0, -1 / 4, -1 / 4, -1 / 4, 3 / 4]
    assert tables_of("@dr_grpo @bonus_pi", [0.3])[0].advantages[:12].tolist() == pytest.approx(centred)
    weighed = [(0.96 if A > 0 else 1.04) * A for A in centred]  # a = .4 (.3 - .4)
    assert tables_of("@dr_grpo @entropic", [0.3])[0].advantages[:12].tolist() == pytest.approx(weighed)


def test_a_variants_run_leaves_a_row_and_resumes_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "WORK", tmp_path)
    usual, train_step, asked = scope_rl.objective_table, train.train_step, []
    options = (
        "@aepo --scope_temperature_min 0.8 --scope_temperature_max 1.3 --scope_target_entropy 2"
        " --scope_gain 0 --max_steps 35 --save_steps 2 --generation_batch_size 8 --num_generations 4"
        " --num_eval_problems 2 --num_eval_generations 4"
    )
    whole = experiments.one_run((options, 1))
    assert scope_rl.objective_table is usual
    assert not list(tmp_path.iterdir())  # what the row keeps is enough
    assert [whole[name] for name in ("options", "seed", "target")] == [options, 1, 2.0]
    assert whole["scope_temperature"] == pytest.approx(1.3)  # SCOPE's rule with a gain of 0 says 1
    assert {"reward", "entropy", "oscillation", "pass@1", "pass@4", "distinct_correct"} < whole.keys()
    assert len(whole["entropies"]) == 35
    assert np.mean(whole["entropies"][-7:]) == pytest.approx(whole["entropy"], abs=1e-4)
    assert np.std(whole["entropies"][-7:]) == pytest.approx(whole["oscillation"], abs=1e-4)

    def stops_at_step_5(run):
        asked.append(run.config.model)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return train_step(run)

    monkeypatch.setattr(train, "train_step", stops_at_step_5)
    with pytest.raises(KeyboardInterrupt):
        experiments.one_run((options, 1))
    assert set(asked) == {str(train.TINY / "start-1")}
    resumed = experiments.one_run((options, 1))
    assert resumed.pop("cpu_seconds") and whole.pop("cpu_seconds")  # no two runs have the same
    assert resumed == whole


def test_the_questions_of_transfer_are_right_and_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "WORK", tmp_path / "folder")
    experiments.write_sums()
    folder = experiments.WORK
    problems = {s: reward.load_problems(folder / f"{s}.jsonl") for s in ("train", "test")}
    assert {split: len(those) for split, those in problems.items()} == {"train": 512, "test": 128}
    assert not set(problems["train"]) & set(problems["test"])
    for question, answer in problems["train"] + problems["test"]:
        a, b = question.removesuffix("=").split("+")
        assert int(answer) == int(a) + int(b)


def test_other_starts_are_made_once_from_their_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "WORK", tmp_path)
    full, made = experiments.warm_start.warm_start, []

    def short(folder, config, example, steps, seed):
        made.append((example, seed))
        full(folder, config, example, 2, seed)

    monkeypatch.setattr(experiments.warm_start, "warm_start", short)
    folder = experiments.start(f"{experiments.SUMS} --algorithm grpo", 3)
    assert folder == tmp_path / "llama-1"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert experiments.start(f"{experiments.SUMS} --algorithm grpo", 1) == folder
    assert experiments.start(f"@bonus_pi {experiments.WEAK}", 3) == tmp_path / "weak"
    assert made == [(sums.example, 1), (countdown.example, 2)]  # one weak start for all seeds
    assert experiments.start("--algorithm grpo", 2) == train.TINY / "start-0"


def test_settling_is_the_end_of_the_last_part_outside_the_tenth():
    assert experiments.settling([0.8, 0.41, 0.5, 0.43, 0.37, 0.4], 0.4) == 30
    assert experiments.settling([0.42, 0.38], 0.4) == 0
    assert experiments.settling([0.4] * 34 + [0.45], 0.4) == 350


# --- report.py


@pytest.mark.parametrize(
    ("freedom", "level", "t"),
    [
        (1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (7, 0.95, 2.365), (8, 0.95, 2.306),
        (30, 0.95, 2.042), (1000, 0.95, 1.962), (3, 0.99, 5.841), (7, 0.999, 5.408),
    ],
)  # fmt: skip
def test_students_t_is_the_one_of_the_tables(freedom, level, t):
    assert report.student_t(freedom, level) == pytest.approx(t, abs=6e-4)


def test_an_interval_shows_two_of_its_digits():
    assert report.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.3027 / math.sqrt(3), rel=1e-4))
    assert math.isnan(report.interval([1.0])[1])
    assert report.show([1.0, 2.0, 3.0]) == "2.0 ± 2.5"
    assert report.show([0.1, 0.2, 0.3], "+") == "+0.20 ± 0.25"
    assert report.show([10.0, 20.0, 30.0]) == "20 ± 25"
    assert report.show([0.1234]) == "0.123"
    assert report.show([0.5, 0.5]) == "0.500"


@pytest.fixture
def two_labels(tmp_path, monkeypatch):
    """Cells whose seeds differ a lot, and B - A hardly."""
    monkeypatch.setattr(experiments, "ROWS", tmp_path / "rows.jsonl")
    assert report.cells_of("control") == {}
    monkeypatch.setitem(experiments.EXPERIMENTS, "two", {"A": "a", "B": "b", "none yet": "c"})
    values = {"a": {0: 0.1, 1: 0.5, 2: 0.9}, "b": {0: 0.2, 1: 0.61, 3: 0.0}}
    usual = {"entropy": 0.3, "scope_temperature": 1.2, "target": 0.4, "oscillation": 0.0}
    rows = []
    for options, cell in values.items():
        for seed, value in cell.items():
            entropies = [0.0] * 28 + [value] * 7
            own = {"options": options, "seed": seed, "pass@1": value, "entropies": entropies}
            own |= {"distinct_correct": 9.0}
            rows.append(json.dumps(usual | own) + "\n")
    experiments.ROWS.write_text("".join(rows))
    return report.cells_of("two")


def test_means_and_paired_differences(two_labels):
    text = report.means("two", two_labels, ("entropy", "error", "pass@1"))
    assert "| A | 3 | 0.300 | 0.250 | 0.50 ± 0.99 |" in text
    assert "none yet" not in text
    text = report.differences(two_labels, ("pass@1",))
    assert "| B | 2 | +0.105 ± 0.064 * |" in text  # the two seeds they share


def test_a_difference_among_many_needs_to_be_larger(two_labels):
    """+0.105 ± 0.064 excludes zero alone, not as one of four: then t is 25.5 and not 12.7."""
    many = two_labels | {name: two_labels["B"] for name in "CDE"}
    assert report.differences(many, ("pass@1",)).count("| +0.105 ± 0.064 |") == 4


def test_the_lead_over_a_rival_is_a_mean_over_targets_first(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "ROWS", tmp_path / "rows.jsonl")
    # By hand: seeds 0 and 1 lead by .2 and .3, seed 3, at one target, by -.1: mean .1333, sd .2082, t 4.303.
    gains = {0.3: {0: 0.1, 1: 0.4}, 0.4: {0: 0.2, 1: 0.3, 3: -0.1}, 0.5: {0: 0.3, 1: 0.2}}
    rows = []
    for H0, cell in gains.items():
        table = experiments.EXPERIMENTS[f"rivals-{H0}"]
        for seed, gain in cell.items():
            for label, value in (("SCOPE, with integral", H0 + gain), ("dual ascent", H0)):
                own = {"options": table[label], "seed": seed, "pass@1": value, "target": H0}
                rows.append(own | {"entropy": H0, "oscillation": 0.0, "entropies": [H0] * 35})
    experiments.ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report.lead(("pass@1", "entropy"))
    assert text.splitlines()[2:] == ["| dual ascent | 3 | 6 of 7 | +0.13 ± 0.52 | +0.000 |"]


def test_the_spread_over_seeds_and_warm_starts():
    H = {0: 0.1, 1: 0.3, 2: 0.2, 3: 0.4}
    course = [0.5] * 21 + [0.3] * 7 + [0.2] * 7
    cells = {"A": {seed: {"entropy": h, "entropies": course} for seed, h in H.items()}}
    sd = math.sqrt(sum((h - 0.25) ** 2 for h in H.values()) / 3)
    assert f"| A | 4 | {sd:.3f} | 80% | -0.100 |" in report.spread(cells)  # .15 and .35: .01 of .0125


@pytest.mark.parametrize("slope", [0.5, 2.0])
def test_the_predicted_rest_solves_the_linear_case(slope):
    """T* = 1 + slope (H - 0.1) meets T = 1 + H0 - H at H = (H0 + 0.1 slope) / (1 + slope)."""
    points = [(H, 1 + slope * (H - 0.1)) for H in (0.6, 0.1, 0.35)]
    for H0 in (0.3, 0.5):
        predicted = report.predicted_rest(points, H0)
        assert predicted == pytest.approx((H0 + 0.1 * slope) / (1 + slope), abs=2e-4)


def test_the_documents_show_what_the_rows_say():
    """tables.md as a whole, the tables of the lab's page, and the one at the top with the sentence of the main test."""
    assert (THEORY / "lab" / "tables.md").read_text() == report.document()
    page = (THEORY / "lab" / "README.md").read_text()
    assert report.shown_control() in page
    assert report.offsets(report.cells_of("control")) in page
    assert report.shown_tuning() in page
    assert report.shown_rivals() in page
    assert report.lead() in page
    assert report.shown_moving() in page
    assert all(report.shown_test(name) in page for name in ("cooling", "weak", "dr_grpo"))
    top = (THEORY.parent / "README.md").read_text()
    assert report.shown_results() in top
    assert "| PI on the bonus | 8 | 18 of 24 | +0.019 ± 0.017 |" in page
    assert "by .019 ± .017 (eight seeds, targets 0.3, 0.4, 0.5)" in top


def test_what_readme_says_of_benefit_and_cost_are_differences_of_pairs():
    top = " ".join((THEORY.parent / "README.md").read_text().split()).replace(" .", " 0.")
    cells = report.cells_of("control")

    def gains(name, sign):
        pairs = [(cells["GRPO"], cells[f"SCOPE, with integral, H0 {H0}"]) for H0 in report.TARGETS]
        return [report.show([sign * (scope[s][name] - grpo[s][name]) for s in range(8)]) for grpo, scope in pairs]

    more, less = gains("distinct_correct", 1), gains("reward", -1)
    assert f"{more[0]}, {more[1]} and {more[2]} more a problem (eight pairs" in top
    shown = [f"{float(mean):.3f} ± {float(half):.3f}" for mean, half in (cell.split(" ± ") for cell in less)]
    assert f"lower, by {shown[0]}, {shown[1]} and {shown[2]} (the same pairs)" in top
    assert f"(at 0.3: +{gains('pass@1', 1)[0]})" in top.replace("+.", "+0.")


def test_what_the_page_says_of_the_rivals_beyond_its_tables():
    """Numbers of the section *Rivals* that stand in no table, from the rows."""
    page = (THEORY / "lab" / "README.md").read_text()
    cells = {H0: report.cells_of(f"rivals-{H0}") for H0 in report.TARGETS}
    grpo = report.cells_of("control")["GRPO"]

    def gains(rival, name, seeds):  # SCOPE's, a seed a row and a target a column
        pairs = [[(cells[H0]["SCOPE, with integral"][s], cells[H0][rival][s]) for H0 in report.TARGETS] for s in seeds]
        return np.array([[scope[name] - other[name] for scope, other in seed] for seed in pairs])

    twin = gains("PI on the bonus", "pass@1", range(8))
    without = [s for s in range(8) if s != 2]
    for sentence, shown in {
        ".135 lower": f"{twin[2, 0]:.3f}",
        "it is .013 ± .012": report.show(twin[without].mean(1).tolist()),
        "in 22\n  of 24 pairs": f"{(gains('PI on the bonus', 'reward', range(8)) > 0).sum()}",
        "four left -.005 ± .036": report.show(gains("stepwise bonus", "pass@1", range(4)).mean(1).tolist()),
        "(.155 ± .036 with these four seeds)": report.show([grpo[s]["entropy"] for s in range(4)]),
        "from the same seeds, at .155 ± .036": report.show([grpo[s]["entropy"] for s in range(4)]),
    }.items():
        assert sentence in page
        assert shown.replace("0.", ".") in sentence


def test_a_moving_target_is_measured_phase_by_phase(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "ROWS", tmp_path / "rows.jsonl")
    course = [0.9] * 3 + [0.5] * 12 + [0.4] * 2 + [0.3] * 8 + [0.3] * 10  # it never comes back
    own = {"options": experiments.EXPERIMENTS["moving"]["stepwise bonus"], "seed": 0, "target": 0.5, "entropy": 0.3}
    experiments.ROWS.write_text(json.dumps(own | {"oscillation": 0.0, "entropies": course}) + "\n")
    cells = "0.500 | 30.000 | 0.300 | 20.000 | 0.300 | 100.000"
    assert report.shown_moving().splitlines()[2:] == [f"| stepwise bonus | 1 | {cells} |"]


def test_the_figures_are_drawn(two_labels, tmp_path):
    pytest.importorskip("matplotlib")
    report.draw(tmp_path / "two.png", two_labels)
    assert (tmp_path / "two.png").stat().st_size > 10_000


def test_the_figures_of_entropies_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for draw in (report.draw_entropies, report.draw_rivals, report.draw_tests):
        draw(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 10_000
        (tmp_path / "figure.png").unlink()


def test_the_tables_of_signs_and_temperatures_show_what_the_rows_say():
    """theory/README.md against signs.jsonl: means and two standard errors, to the digits that are shown."""
    lines = [line.strip("| ").split("|") for line in (THEORY / "README.md").read_text().splitlines()]
    lines = [line for line in lines if re.match(r"(positive|negative), \d", line[0])]
    columns = [("warm-start", "held_out"), ("collapsed", "training"), ("scope", "training")]
    columns = {7: columns, 5: [("collapsed-averaged", "training"), ("scope-averaged", "training")]}
    assert sorted(map(len, lines)) == [5] * 10 + [7] * 10
    signs = [json.loads(line) for line in probes.SIGNS.read_text().splitlines()]
    for line in lines:
        sign, temperature = line[0].strip().split(", ")
        cells = zip(columns[len(line)], line[1::2], line[2::2], strict=True)
        for (policy, probe), shown, predicted in cells:
            key = (policy, sign, float(temperature))
            rows = [row for row in signs if (row["policy"], row["sign"], row["temperature"]) == key]
            if len(rows) < 8:
                assert shown.strip() == f"({len(rows)} of 8 draws)"
                continue
            values = np.array([[row[probe], row["predicted"]] for row in rows])
            half = 2 * values[:, 0].std(ddof=1) / len(rows) ** 0.5
            digits = len(shown.split(".")[-1].strip())
            assert shown.strip() == f"{values[:, 0].mean():+.{digits}f} ± {half:.{digits}f}"
            assert predicted.strip() == f"{values[:, 1].mean():+.4f}"


def test_how_far_one_factor_goes_is_what_the_theory_page_says(capsys):
    """The fit of `one_factor` against numpy's weighted least squares, and its numbers against theory/README.md."""
    signs = [json.loads(line) for line in probes.SIGNS.read_text().splitlines()]
    rows = [row for row in signs if row["policy"] == "warm-start"]
    k, chi2, freedom = probes.one_factor(rows, "held_out")
    groups = [[row for row in rows if (row["sign"], row["temperature"]) == key] for key in
              sorted({(row["sign"], row["temperature"]) for row in rows})]  # fmt: skip
    y = np.array([np.mean([row["held_out"] for row in group]) for group in groups])
    x = np.array([np.mean([row["predicted"] for row in group]) for group in groups])
    w = np.array([8**0.5 / np.std([row["held_out"] for row in group], ddof=1) for group in groups])
    (slope,), (misses,), *_ = np.linalg.lstsq((x * w)[:, None], y * w, rcond=None)
    assert (k, chi2, freedom) == (pytest.approx(slope), pytest.approx(misses), 9)
    probes.print_factors(None, [])
    printed = capsys.readouterr().out
    page = " ".join((THEORY / "README.md").read_text().split())
    assert "measured = 4.9 predicted, chi^2 51 on 9" in printed
    assert "measured = 4.9 predicted" in page
    assert "sum to 51 on 9" in page
    assert "15.3 predicted, chi^2 29 on 7" in printed
    assert "5.9 predicted, chi^2 48 on 9" in printed
    assert "(15.3 and 5.9;" in page
    assert "29 on 7 degrees of freedom and 48 on 9" in page


# --- probes.py

TASK = """import countdown

def task(config):
    return countdown.task(config)._replace(reward=lambda problem, text: float(len(text) % 2))
"""


@pytest.fixture
def small_run(model_folder, tmp_path, monkeypatch):
    """A function that sets up a run of one gradient step a step, at a learning rate."""
    monkeypatch.setattr(probes, "SAMPLES", 96)
    (tmp_path / "task.py").write_text(TASK)
    options = (
        "--preset tiny --generation_batch_size 32 --num_generations 4 --num_mini_batches 1"
        f" --warmup_steps 0 --model {model_folder} --task {tmp_path / 'task.py'}"
    )

    def make(learning_rate: float) -> train.Run:
        torch.manual_seed(0)
        run = probes.set_up([*options.split(), "--learning_rate", str(learning_rate)])
        # <pad>'s embedding starts as 0, where RMSNorm has a kink, and a random model does sample it.
        pad = run.model.get_input_embeddings().weight.data[run.tokenizer.pad_token_id]
        torch.nn.init.normal_(pad, std=0.3)
        return run

    return make


def test_the_tabular_prediction_token_by_token(small_run):
    run = small_run(1e-3)
    samples, rewards = probes.draw(run, run.task.train, 20, 1.3)
    weights = rewards / 20
    assert 0 < rewards.mean() < 1
    _, predicted = probes.direction(run, samples, weights)
    total = 0.0
    with torch.no_grad():
        logits = run.model(input_ids=samples.sequences).logits.double()
    for i, mask in enumerate(samples.completion_mask):
        changes = []
        for t in mask.nonzero()[:, 0].tolist():
            z = logits[i, t - 1].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(token_entropy(z), z)  # dH / dz
            step = -z.detach().softmax(0)
            step[samples.sequences[i, t]] += 1  # d log p_a / dz
            changes.append((gradient @ step).item())
        total += weights[i].item() * np.mean(changes)
    assert predicted == pytest.approx(total, rel=1e-4)


def test_measured_changes_are_the_gradients_and_the_weights_stay(small_run):
    """The central difference along a step is the inner product of the step and dH / dtheta."""
    run = small_run(1e-3)
    theta = probes.weights_of(run)
    rows = probes.measure(run, seed=3, batch=40, norm=1e-3)
    assert torch.equal(probes.weights_of(run), theta)
    assert {(row["sign"], row["temperature"]) for row in rows} == {
        (sign, T) for sign in ("positive", "negative") for T in probes.TEMPERATURES
    }
    torch.manual_seed(3)
    contexts = {
        "held_out": probes.draw(run, run.task.test, 20, 1.0)[0],
        "training": probes.draw(run, run.task.train, 20, 1.0)[0],
    }
    samples, rewards = probes.draw(run, run.task.train, 40, probes.TEMPERATURES[0])
    for row, weights in zip(rows[:2], (rewards / 40, (rewards - 1) / 40), strict=True):
        assert row["share"] == pytest.approx((weights != 0).float().mean().item())
        gradient, _ = probes.direction(run, samples, weights)
        for name, context in contexts.items():
            expected = (probes.entropy_gradient(run, context) @ gradient).item()
            assert row[name] == pytest.approx(expected, rel=0.02, abs=1e-3)


def test_the_parts_of_a_step_scale_as_their_orders(small_run):
    """AdamW's first step is proportional to the learning rate: `first` doubles with it, `curvature` quadruples."""
    small, large = (probes.one_step(small_run(rate)) for rate in (1e-4, 2e-4))
    assert small["H"] == large["H"]
    assert large["first"] / small["first"] == pytest.approx(2, rel=1e-2)
    assert large["curvature"] / small["curvature"] == pytest.approx(4, rel=0.1)
    rest = [parts["fixed"] - parts["first"] - parts["curvature"] for parts in (small, large)]
    assert rest[1] / rest[0] == pytest.approx(8, rel=0.3)  # third order


def test_taking_a_step_apart_leaves_the_step_alone(small_run):
    run, other = small_run(1e-3), small_run(2e-3)
    other.optimizer.param_groups[0]["lr"] = other.config.learning_rate = 1e-3
    probes.one_step(run)
    train.train_step(other)
    for mine, plain in zip(run.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, plain)


def test_visited_contexts_weigh_samples_by_their_ratio(small_run):
    run = small_run(1e-3)
    samples, _ = train.sample(run, run.task.train[:20], torch.ones(20))
    old, (H, same) = probes.entropies(run, samples, None)
    assert same == H
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    new, (fixed, visited) = probes.entropies(run, samples, old)
    logprobs, token_entropies = probes.score_all(run, samples)
    above, below = 0.0, 0.0
    for i, mask in enumerate(samples.completion_mask):
        ratio = math.exp(sum(logprobs[i, mask].tolist()) - old[i].item())
        above += ratio * sum(token_entropies[i, mask].tolist())
        below += ratio * mask.sum().item()
    assert visited == pytest.approx(above / below, rel=1e-5)
    assert visited != pytest.approx(fixed, rel=1e-3)
    assert torch.isfinite(new).all()


def test_the_closed_loop_goes_on_with_a_run_and_leaves_its_folder(small_run, tmp_path, capsys, monkeypatch):
    run = small_run(1e-3)
    run.config.output_dir, run.config.max_steps = str(tmp_path / "run"), 2
    run.config.num_eval_problems, run.task = 0, run.task._replace(test=[])
    Path(run.config.output_dir).mkdir()
    train.write_whole(tmp_path / "run" / "config.json", vars(run.config))
    train.train(run)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    arguments = probes.argparse.Namespace(
        output_dir=tmp_path / "run", steps=2, save=tmp_path / "mean", label="two", algorithm="grpo"
    )
    monkeypatch.setattr(probes, "LOOPS", tmp_path / "loops.jsonl")
    probes.closed_loop(arguments, [])
    assert probes.loop_table().splitlines()[-1].startswith("| two | 2 | ")
    assert set(json.loads(probes.LOOPS.read_text())["steps"]["T"]) == {1}  # GRPO's, of a run of SCOPE
    assert "over 2 steps" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert (tmp_path / "mean" / "model.safetensors").exists()


# --- pretrained.py and its task


def test_the_sums_asked_are_checked_and_the_splits_share_none():
    config = train.Config(seed=3)
    task, again = arithmetic.task(config), arithmetic.task(train.Config(seed=4))
    assert task.test == again.test and task.train != again.train and sorted(task.train) == sorted(again.train)
    assert len(task.train + task.test) == len({*task.train, *task.test}) == 400
    problem = reward.Problem("What is 7 + 12?", "19")
    assert problem in task.train + task.test
    right = ("19", "19.", "The answer is 19.", "7 + 12 = 19")
    assert [task.reward(problem, text) for text in (*right, "7 + 12", "", "191")] == [1] * 4 + [0] * 3


def test_a_number_between_is_right_and_the_splits_share_none():
    task, again = between.task(train.Config(seed=3)), between.task(train.Config(seed=4))
    assert task.test == again.test and task.train != again.train and sorted(task.train) == sorted(again.train)
    assert (len(task.train), len(task.test), len({*task.train, *task.test})) == (302, 43, 345)
    problem = reward.Problem("Pick a number between 23 and 53.", "23 53")
    assert problem in task.train + task.test
    right = ("24", "52.", "The number is 50!", "23 < 30", "99, no: 40", "-30", "12.40", "034")  # the last digits count
    wrong = ("23", "53", "", "none", "40 and 99", "3", "5 1", "30.5", "1" * 5000)
    assert [task.reward(problem, text) for text in (*right, *wrong)] == [1] * len(right) + [0] * len(wrong)


def test_every_label_is_a_config_of_its_own():
    configs = set()
    for label, options in pretrained.EXPERIMENT.items():
        variant, top_k, words = pretrained.parts(options)
        config = train.parse_config([*words, "--output_dir", "x"])
        assert Path(config.task).name == ("arithmetic.py" if label.startswith("sums") else "between.py")
        named = [kind.__name__ for kind in type(variant).__mro__[1:-2]]
        assert (top_k > 0, "MeanOverPositives" in named) == ("top" in label, "mean over" in label)
        assert ("StepwiseBonus" in named) == ("stepwise" in label) and (config.algorithm == "grpo") == ("GRPO" in label)
        if target := re.search(r"H0 ([\d.]+)", label):
            assert config.scope_target_entropy == float(target[1])
        configs.add((str(named), top_k, str(config), "collapsed" in label))
    assert len(configs) == len(pretrained.EXPERIMENT)
    with pytest.raises(KeyError, match="bonus_pl"):
        pretrained.parts("@bonus_pl --max_steps 2")


def test_a_prompt_read_once_scores_the_same(random_model, tokenizer):
    model, prompts = random_model(), ["1,2,3:6=", "4,5,6:11=", "1"]
    samples = rollout.generate(model, tokenizer, prompts * 2, torch.ones(6), 8)
    for i in (2, 5):  # all prompts of these rows are one token long
        alone = pretrained.score(model, samples, torch.tensor([i]))
        for usual, once in zip(rollout.score(model, samples, torch.tensor([i])), alone, strict=True):
            assert torch.allclose(usual, once, atol=1e-4)
    rows = torch.tensor([5, 0, 1, 2, 3])
    results = []
    for score in (rollout.score, pretrained.score):
        logprobs, entropies = score(model, samples, rows)
        (logprobs.sum() + 0.3 * entropies.sum()).backward()
        results.append([logprobs.detach(), entropies.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    for usual, once in zip(*results, strict=True):
        assert torch.allclose(usual, once, atol=1e-4)


def test_the_noting_sampler_notes_the_tabular_change_and_draws_hot_rows_from_the_likeliest():
    logits, T = 2 * torch.randn(6, 30), torch.tensor([1.0, 1, 1, 5, 5, 5])
    sampler = type("Sampler", (pretrained.NotingSampler,), {"top_k": 2})(T)
    for _ in range(40):
        tokens = sampler(torch.zeros(6, 1), logits).argmax(1)
        assert (tokens[3:, None] == logits[3:].topk(2).indices).any(1).all()
        g, gbar = cf.sensitivity(logits.double())
        expected = gbar - g.gather(1, tokens[:, None])[:, 0]
        assert sampler.changes[-1].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
        x = torch.log_softmax(logits, 1).gather(1, tokens[:, None])[:, 0]
        assert torch.allclose(sampler.noted[-1], torch.stack([x, token_entropy(logits)]), atol=1e-5)


def test_a_short_run_of_the_pretrained_kind_leaves_a_row(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "WORK", tmp_path / "work")
    task = Path(train.TINY) / "countdown.py"
    monkeypatch.setattr(
        pretrained, "COMMON", f"--preset tiny --generation_batch_size 8 --num_generations 4 --task {task}"
    )
    options = "@top_k=3 @mean_over_positives --max_steps 3 --num_eval_problems 2 --scope_temperature_min 1.2"
    monkeypatch.setattr(pretrained, "EXPERIMENT", {"short": options})
    usual = rollout.score, rollout.Sampler, train.update, train.sample, scope_rl.objective_table, scope_rl.scope_loss
    row = pretrained.one_run(str(model_folder), "short", 1, tmp_path / "end")
    now = rollout.score, rollout.Sampler, train.update, train.sample, scope_rl.objective_table, scope_rl.scope_loss
    config = train.parse_config([*pretrained.parts(options)[2], "--output_dir", "x"])
    assert usual == now and row["settings"] == pretrained.settings(config)
    assert {len(row[name]) for name in pretrained.KEPT} == {3}
    assert (tmp_path / "end" / "model.safetensors").exists() and not list((tmp_path / "work").iterdir())
    assert min(row["scope_temperature"]) >= 1.2
    assert [len(texts) for texts in row["texts"]] == [64, 64] and set(row["evaluations"]) == {"before", "after"}


def test_the_noise_of_a_step_is_its_mean_distance_from_their_mean(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "WORK", tmp_path / "work")
    task = Path(train.TINY) / "countdown.py"
    monkeypatch.setattr(pretrained, "COMMON", f"--preset tiny --num_generations 4 --task {task}")
    sizes, entropies = [], itertools.cycle([0.4, 0.6])

    def draw(run, problems, count, T):
        sizes.append((len(problems), count, T))
        samples = types.SimpleNamespace(entropies=torch.full((count, 2), next(entropies)))
        samples.completion_mask = torch.ones(count, 2, dtype=torch.bool)
        return samples, None

    monkeypatch.setattr(probes, "draw", draw)
    pretrained.noise(str(model_folder), steps=4)
    assert sizes == [(12, 48, 1.0)] * 4 + [(32, 128, 1.0)] * 4
    assert capsys.readouterr().out.splitlines()[-2:] == ["| 12 | 0.500 | 0.100 |", "| 32 | 0.500 | 0.100 |"]


def test_the_tables_of_the_pretrained_model_are_means_of_the_last_fifth(tmp_path, monkeypatch):
    steps = {name: [1.0] * 10 for name in pretrained.KEPT} | {"reward": [0.1] + [0.5] * 9}
    evaluations = {"before": {"pass@1": 0.0}, "after": {"pass@1": 0.25, "distinct_correct": 3.0}}
    rest = {"target": 0.5, "evaluations": evaluations, "question": ["?"]}
    # Seed 1 stands first: means |H - H0| of .1 and .3, entropies of .5 and .8 at the end.
    ends = {1: [0.6, 0.4], 0: [0.7, 0.9]}
    rows = [
        {"label": "SCOPE, H0 0.5", "seed": seed, "texts": [["a|b"], [f"of {seed}"]], **rest, **steps}
        | {"entropy": [2.0] * 8 + end} for seed, end in ends.items()
    ]  # fmt: skip
    grpo = {"before": {"pass@1": 0.0}, "after": {"pass@1": 0.25, "distinct_correct": 2.0}}
    rows += [
        row | {"label": "GRPO", "entropy": [2.0] * 8 + [row["entropy"][-1] - 0.3] * 2, "evaluations": grpo}
        for row in rows
    ]
    monkeypatch.setattr(pretrained, "ROWS", tmp_path / "rows.jsonl")
    pretrained.ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = pretrained.comparison().splitlines()[-1].strip("| ").split(" | ")
    assert cells[0] == "SCOPE, H0 0.5" and cells[2] == "0.80, 0.50"
    expected = [2, 0.65, 0.2, 0.35, 1.0, 1, 0.1, 0.5, 0.25, 3]
    shown = [float(cell.split(" ±")[0]) for cell in (cells[1], *cells[3:])]
    assert shown == pytest.approx(expected, abs=0.051)
    assert pretrained.last_fifth(rows[0])["distance"] == pytest.approx(0.1)
    assert pretrained.last_fifth(rows[1])["distance"] == pytest.approx(0.3)
    assert not pretrained.comparison("32 prompts").splitlines()[2:]  # the other group has no rows here
    assert pretrained.answers().splitlines()[2:] == [
        "| before | `a/b` |",
        "| GRPO | `of 0` |",
        "| SCOPE, H0 0.5 | `of 0` |",
    ]


def test_the_page_shows_the_rows_of_the_pretrained_model():
    page = (THEORY / "lab" / "README.md").read_text()
    tables = [table(group) for table in (pretrained.comparison, pretrained.answers) for group in pretrained.GROUPS]
    for shown in (*tables, pretrained.hot_samples(), pretrained.sums_table()):
        assert shown in page
    for row in map(json.loads, pretrained.ROWS.read_text().splitlines()):
        if not row["label"].startswith("sums, stopped"):
            assert row["options"] == pretrained.EXPERIMENT[row["label"]]
            config = train.parse_config([*pretrained.parts(row["options"])[2], "--output_dir", "x"])
            assert row["settings"] == pretrained.settings(config)


def as_written(values, sign="", digits=2):
    """Mean and half of the interval, as the prose has them: .30 ± .12."""
    mean, error = report.interval(values)
    return f"{mean:{sign}.{digits}f} ± {error:.{digits}f}".replace("0.", ".")


def gain(rows, base, name, **form):
    """What `name` is beyond the base's of the same seed, as written."""
    return as_written([row[name] - other[name] for row, other in zip(rows, base, strict=True)], **form)


def test_what_the_pages_say_of_the_pretrained_model():
    """The numbers of the prose, from the rows."""
    last = {label: [pretrained.last_fifth(row) for row in cell] for label, cell in pretrained.cells().items()}
    grpo, half, high = (last[label] for label in ("GRPO", "SCOPE, H0 0.5", "SCOPE, H0 0.8"))
    at_rest = [np.array(row["entropy"][-9:]) for row in pretrained.cells()["GRPO"]]
    noise = np.mean([np.abs(H - H.mean()).mean() for H in at_rest])
    courses = [np.array(row["entropy"]) for row in pretrained.cells()["SCOPE, H0 0.8"]]
    lowest = [H[:30].min() for H in courses]
    before = [f"{H[-18:-9].mean():.2f}".replace("0.", ".") for H in courses]
    published = gain(last["SCOPE, all published"], grpo, "entropy", sign="+")
    both = [(THEORY.parent / "README.md").read_text(), (THEORY / "lab" / "README.md").read_text()]
    for said, pages in (
        (as_written([row["entropy"] for row in grpo]), both),
        (as_written([row["entropy"] for row in half]), both),
        (as_written([row["entropy"] for row in high]), both),
        (f"GRPO ({gain(half, grpo, 'entropy', sign='+')})", both[:1]),
        (f"by three seeds ({gain(half, grpo, 'entropy', sign='+')})", both[1:]),
        (f"{gain(high, grpo, 'entropy')} nats above GRPO", both[:1]),
        (f"each seed**, by {gain(high, grpo, 'entropy')}", both[1:]),
        (f"{gain(high, grpo, 'distinct_correct', digits=1)} more distinct right answers", both),
        (f"which is {np.mean([row['distance'] for row in half]):.3f} at 0.5".replace("0.0", ".0"), both[1:]),
        (f"last fifth by {noise:.2f}".replace("0.", "."), both[1:]),
        (f"last fifth, {before[0]}, {before[1]} and {before[2]} in the fifth before", both[1:]),
        (f"not told from GRPO ({published})", both[1:]),
        (as_written([row["entropy"] for row in last["stepwise bonus, H0 0.5"]]), both[1:]),
        (f"to {min(lowest):.2f} to {max(lowest):.2f}".replace("0.", "."), both[1:]),
    ):
        assert all(said in " ".join(page.split()) for page in pages), said


def test_what_the_pages_say_of_more_samples_a_step():
    cells = pretrained.cells(pretrained.GROUPS[1])
    rows = {H0: cells[f"SCOPE, H0 {H0}"] for H0 in (0.6, 0.8)}
    last = {H0: [pretrained.last_fifth(row) for row in cell] for H0, cell in rows.items()}
    ends = {H0: as_written([row["entropy"] for row in cell]) for H0, cell in last.items()}
    off = {H0: as_written([row["distance"] for row in cell], digits=3) for H0, cell in last.items()}
    shares = [round(100 * row["distance"] / H0) for H0, cell in last.items() for row in cell]
    means = {round(100 * np.mean([row["distance"] for row in cell]) / H0) for H0, cell in last.items()}
    assert means == {11}
    grpo = [pretrained.last_fifth(row) for row in cells["GRPO"]]
    resting = as_written([row["entropy"] for row in grpo])
    courses = [np.array(row["entropy"][-12:]) for cell in rows.values() for row in cell]
    own = [np.abs(H - H.mean()).mean() for H in courses]
    lab = " ".join((THEORY / "lab" / "README.md").read_text().split())
    assert f"{ends[0.6]} for 0.6 and {ends[0.8]} for 0.8. (With" in lab
    low, high = (gain(last[H0], grpo, "entropy") for H0 in (0.6, 0.8))
    assert f"by {high} at 0.8. At 0.6 it is above in each seed, but the gain, {low}" in lab
    few, many = gain(last[0.6], grpo, "distinct_correct"), gain(last[0.8], grpo, "distinct_correct", digits=1)
    assert f"right answers are {few} more at 0.6, and {many} more at 0.8." in lab
    assert f"11% of the target**: {off[0.6]} and {off[0.8]}, from {min(shares)} to {max(shares)}% in" in lab
    assert f"its own mean by {min(own):.2f} to {max(own):.2f}".replace("0.", ".") in lab
    top, questions = (
        " ".join((THEORY.parent / name).read_text().split()) for name in ("README.md", "theory/QUESTIONS.md")
    )
    assert f"ends at {ends[0.6]} for a target of 0.6 and at {ends[0.8]} for 0.8 (GRPO {resting}; the gain is" in top
    assert f"ended at {ends[0.6]} for 0.6 and {ends[0.8]} for 0.8" in questions


def test_the_closed_loop_s_table_is_in_ten_thousandths_of_a_nat(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "LOOPS", tmp_path / "loops.jsonl")
    steps = {"visiting": [0.0, 0.0], "H": [0.4, 0.5], "T": [1, 1.5], "first": [1e-4, 3e-4], "curvature": [-1e-4, -1e-4]}
    probes.LOOPS.write_text(json.dumps({"label": "x", "steps": steps | {"fixed": [5e-4, 5e-4]}}) + "\n")
    expected = "| x | 2 | 0.450 | 1.25 | +2.0 ± 2.0 | -1.0 ± 0.0 | +5.0 ± 0.0 | +0.0 ± 0.0 |"
    assert probes.loop_table().splitlines()[-1] == expected


def test_the_theory_shows_the_steps_of_the_closed_loop():
    assert probes.loop_table() in (THEORY / "README.md").read_text()
