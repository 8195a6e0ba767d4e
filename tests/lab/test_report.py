"""theory/lab/report.py and intervals.py: statistics by hand or by another formula, tables, and the pages."""

import math

import numpy as np
import pytest
from lab_helpers import json_lines

import experiments
import intervals
import report


def test_students_t_is_the_one_of_the_tables():
    table = {(1, 0.95): 12.706, (3, 0.95): 3.182, (7, 0.95): 2.365, (1000, 0.95): 1.962, (7, 0.999): 5.408}
    for (freedom, level), t in table.items():
        assert intervals.student_t(freedom, level) == pytest.approx(t, abs=6e-4)


def test_intervals_are_those_by_hand():
    assert intervals.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.3027 / math.sqrt(3), rel=1e-4))
    # Strata: squares of 2 and 8 over 2 degrees of freedom make a variance of 5, of the mean 5 / 4; t is 4.303.
    mean, half = intervals.stratified([[1.0, 3.0], [10.0, 14.0]])
    assert (mean, half) == (7.0, pytest.approx(4.3027 * math.sqrt(5 / 4), rel=1e-4))
    # Not paired: variances 1 and 4 of three each give 5/3, its root 1.291; 2.94 degrees of freedom, t 3.22.
    assert intervals.welch([1.0, 2.0, 3.0], [4.0, 2.0, 0.0]) == "+0.00 ± 4.16"
    values = [0.1, 0.5, 0.9, 0.2]  # of a mean the jackknife's interval is Student's
    assert intervals.jackknife(np.mean, values) == pytest.approx(intervals.interval(values))


def test_an_interval_shows_two_of_its_digits():
    series = [1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [0.1234], [0.5, 0.5]
    assert [*map(intervals.show, series)] == ["2.0 ± 2.5", "20 ± 25", "0.123", "0.500"]


def test_newey_west_is_the_error_of_the_mean_of_a_series_with_memory():
    """x_t = .6 x_(t-1) + e_t has a mean of standard error 1 / (.4 sqrt(n)), 2 times what independence says."""
    x = np.random.default_rng(0).normal(size=(900, 300))  # 300 series, which forget their first 100 values
    for t in range(1, 900):
        x[t] += 0.6 * x[t - 1]
    series = x[100:].T
    error = np.mean([intervals.newey_west(values) for values in series])
    assert error == pytest.approx(np.std(series.mean(1)), rel=0.1)
    assert error == pytest.approx(1 / (0.4 * 800**0.5), rel=0.1)
    assert np.mean(series.std(1) / 800**0.5) == pytest.approx(error / 2, rel=0.1)
    assert intervals.newey_west([1.0, 2.0, 4.0], lags=0) == pytest.approx(np.std([1, 2, 4]) / 3**0.5)


def test_the_top_of_a_parabola_and_its_interval():
    """Exact points of two heights; noisy ones agree with a fit that has a column for each group."""
    x, rng = np.array([0.1, 0.2, 0.4, 0.5]), np.random.default_rng(0)
    exact = [list(zip(x, height - 2 * (x - 0.3) ** 2, strict=True)) for height in (0.0, 5.0)]
    assert intervals.parabola_top(exact) == pytest.approx(0.3)
    groups = [[(X, y + rng.normal(0, 0.01)) for X, y in exact[i % 2][: 4 - i % 2]] for i in range(6)]
    design = [[X**2, X, *np.eye(6)[i]] for i, group in enumerate(groups) for X, _ in group]
    a, b, *_ = np.linalg.lstsq(design, [y for group in groups for _, y in group], rcond=None)[0]
    assert intervals.parabola_top(groups) == pytest.approx(-b / (2 * a))


@pytest.fixture
def write_rows(tmp_path, monkeypatch):
    """A function that makes these all the rows there are; what a row leaves out is as usual."""
    monkeypatch.setattr(experiments, "ROWS", tmp_path / "rows.jsonl")
    usual = {"scope_temperature": 1.2, "target": 0.4, "steps": 350, "reward": 0.9, "distinct_correct": 9.0}
    usual |= {"seed": 0, "entropy": 0.3, "entropies": [0.0] * 28 + [0.3] * 7}
    return lambda *rows: experiments.ROWS.write_text(json_lines(usual | row for row in rows))


@pytest.fixture
def two_labels(write_rows, monkeypatch):
    """Cells whose seeds differ a lot, and B - A hardly; of two rows of A and 0 the later counts."""
    monkeypatch.setitem(experiments.EXPERIMENTS, "two", {"A": "a", "B": "b", "none yet": "c"})
    # Pairs of a seed and a value; seed 100 is one of the tuning.
    cells = {"a": [(0, 9), (0, 0.1), (1, 0.5), (2, 0.9), (100, 5.0)], "b": [(0, 0.2), (1, 0.61), (3, 0)]}
    pairs = [(options, *pair) for options, cell in cells.items() for pair in cell]
    write_rows(*({"options": options, "seed": seed, "pass@1": value} for options, seed, value in pairs))
    return report.cells_of("two")


def test_means_and_paired_differences(two_labels):
    text = report.means("two", two_labels, ("entropy", "error", "pass@1"))
    assert "| A | 3 | 0.300 | 0.250 | 0.50 ± 0.99 |" in text
    assert "none yet" not in text
    assert report.number("two", "A", "pass@1") == "0.50 ± 0.99"
    assert report.number("two", "B minus A", "pass@1") == "+0.105 ± 0.064"  # the two seeds they share
    assert "| B | 2 | +0.105 ± 0.064 * |" in report.differences(two_labels, ("pass@1",))
    # One of four has to be larger: then t is 25.5 and not 12.7.
    many = two_labels | {name: two_labels["B"] for name in "CDE"}
    assert report.differences(many, ("pass@1",)).count("| +0.105 ± 0.064 |") == 4


def test_pages_are_filled_between_their_markers(two_labels, monkeypatch):
    monkeypatch.setitem(report.TABLES, "name", lambda: "| a |\n")
    page = "x <!-- number two; A; pass@1 -->{}<!-- end --> <!-- table name -->{}<!-- end --> y"
    filled = page.format("0.50 ± 0.99", "\n| a |\n")
    assert report.filled(page.format(" ", "old")) == report.filled(filled) == filled
    with pytest.raises(KeyError):
        report.filled("<!-- table of nothing --><!-- end -->")


def test_the_numbers_of_strata_and_of_a_top_take_the_rows_of_their_labels(write_rows, monkeypatch):
    """Warm starts lead by .1 and .5 with a spread of 0; every seed has its height, and the top is at .3."""
    monkeypatch.setitem(experiments.EXPERIMENTS, "x", {"A": "a", "B": "b", "C": "c"})
    rows = []
    for seed in range(4):
        for options, H in (("a", 0.1), ("b", 0.2), ("c", 0.5)):
            own = {"pass@1": 0.2 * seed - (H - 0.3) ** 2, "reward": (0.1, 0.5)[seed % 2] * (options == "b")}
            rows.append(own | {"options": options, "seed": seed, "entropy": H})
    write_rows(*rows)
    assert report.number("x", "B minus A", "reward") == "+0.30 ± 0.37"
    page = "<!-- strata x; B minus A; reward -->{}<!-- end --><!-- top x; pass@1; A; B; C -->{}<!-- end -->"
    assert report.filled(page.format("", "")) == page.format("+0.300", "0.300")


def test_the_error_over_other_windows(write_rows):
    # By hand, for a target of 0.4: the last 30 steps are a tenth off, the 40 before them a fifth, all else exact.
    course = [0.4] * 28 + [0.48] * 4 + [0.36] * 3
    options = experiments.EXPERIMENTS["control"]["SCOPE, H0 0.4"]
    write_rows({"options": options, "entropies": course})
    shown = "| SCOPE, H0 0.4 | 0.100 | 0.140 | 0.157 | 0.110 | 0.079 | 0.065 |"
    assert report.windows().splitlines()[2:] == [shown]
    assert experiments.error(course, 0.4) == pytest.approx(1.1 / 7)


def test_the_lead_over_a_rival_is_a_mean_over_targets_first(write_rows):
    # By hand: seeds 0 and 1 lead by .2 and .3, seed 3, at one target, by -.1.
    gains = {0.3: {0: 0.1, 1: 0.4}, 0.4: {0: 0.2, 1: 0.3, 3: -0.1}, 0.5: {0: 0.3, 1: 0.2}}
    rows = []
    for H0, cell in gains.items():
        table, course = experiments.EXPERIMENTS[f"rivals-{H0}"], [0.5 * H0] * 7 + [H0] * 28
        for seed, gain in cell.items():
            usual = {"seed": seed, "target": H0, "entropies": course}
            rows.append(usual | {"options": table["SCOPE"], "pass@1": H0 + gain})
            rows.append(usual | {"options": table["dual ascent"], "pass@1": H0})
    write_rows(*rows)
    assert report.lead_over("dual ascent", ("pass@1",)) == [pytest.approx([0.2, 0.3, -0.1])]
    shown = "| dual ascent | 2 | 70, 70, 70 | 0.0%, 0.0%, 0.0% | 50%, 50%, 50% | +0.13 ± 0.52 |"
    assert shown in report.rivals()


def test_the_spread_over_seeds_and_warm_starts():
    H = {0: 0.1, 1: 0.3, 2: 0.2, 3: 0.4}
    course = [0.5] * 21 + [0.3] * 7 + [0.2] * 7
    cells = {"A": {seed: {"entropy": h, "entropies": course} for seed, h in H.items()}}
    sd = math.sqrt(sum((h - 0.25) ** 2 for h in H.values()) / 3)
    assert f"| A | 4 | {sd:.3f} | 80% | -0.100 |" in report.spread(cells)  # .15 and .35: .01 of .0125


def test_the_error_of_an_evaluation_is_that_of_other_samples():
    p, rng = np.array([0.1, 0.5, 0.9, 0.7]), np.random.default_rng(0)
    drawn = rng.binomial(64, p, size=(20_000, 4))
    errors = [report.evaluation_error({"num_right": row}) for row in drawn[:500]]
    assert np.mean(errors) == pytest.approx(np.std(drawn.mean(1) / 64), rel=0.03)


@pytest.mark.parametrize("slope", [0.5, 2.0])
def test_the_predicted_rest_solves_the_linear_case(slope):
    """T* = 1 + slope (H - 0.1) meets T = 1 + H0 - H at H = (H0 + 0.1 slope) / (1 + slope)."""
    points = [(H, 1 + slope * (H - 0.1)) for H in (0.6, 0.1, 0.35)]
    for H0 in (0.3, 0.5):
        predicted = report.predicted_rest(points, H0)
        assert predicted == pytest.approx((H0 + 0.1 * slope) / (1 + slope), abs=2e-4)


def test_a_moving_target_is_measured_phase_by_phase(write_rows):
    course = [0.9] * 3 + [0.5] * 12 + [0.4] * 2 + [0.3] * 8 + [0.3] * 10  # it never comes back
    write_rows({"options": experiments.EXPERIMENTS["moving"]["stepwise bonus"], "entropies": course})
    shown = "| stepwise bonus | 1 | 0.500 | 30.000 | 0.300 | 20.000 | 0.300 | 100.000 |"
    assert report.moving().splitlines()[2:] == [shown]


def test_the_figures_are_drawn(two_labels, tmp_path):
    pytest.importorskip("matplotlib")
    report.draw(tmp_path / "two.png", two_labels)
    for draw in (report.draw_entropies, report.draw_rivals, report.draw_tests, report.pretrained.draw):
        draw(tmp_path / f"{draw.__name__}.png")
    assert all(path.stat().st_size > 8_000 for path in tmp_path.glob("*.png"))


def test_the_pages_show_what_the_rows_say():
    assert report.pages_are_up_to_date()
