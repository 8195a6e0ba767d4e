"""Tables and figures of the rows:  `python theory/lab/report.py`  (figures need the extra `plot`)

Writes tables.md, the folder figures/, and what stands on the pages of this project between

    <!-- table NAME -->  and  <!-- end -->        one of TABLES
    <!-- number EXPERIMENT; LABEL; COLUMN -->     mean ± half of a 95% interval over the seeds
    <!-- number EXPERIMENT; LABEL minus LABEL; COLUMN -->        of the differences, seed by seed
    <!-- strata EXPERIMENT; LABEL minus LABEL; COLUMN -->        the same, the warm starts as strata
    <!-- top EXPERIMENT; COLUMN; LABEL; LABEL; ... -->   the entropy where a parabola of the column is highest
    <!-- lead RIVAL; COLUMN -->            SCOPE's lead over a rival, at three targets, a value a seed

Below, `cells` is label -> seed -> row, a row being what experiments.py keeps of one run. Differences
are taken seed by seed first, as two runs of one seed share warm start, problems and their order.
"""

import functools
import math
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import experiments
import pretrained
import probes
from intervals import as_code, interval, jackknife, markdown, parabola_top, plus_minus, show, stratified

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "theory").glob("*.md")), *sorted(FOLDER.glob("*.md"))]
MARKED = re.compile(r"<!-- (table|number|strata|top|lead) (.*?) -->(.*?)<!-- end -->", re.DOTALL)
Cells = dict[str, dict[int, dict]]
TARGETS = experiments.TARGETS
SCOPE = [f"SCOPE, H0 {H}" for H in TARGETS]
TUNING_SEEDS = 100  # seeds from here on were looked at to choose settings, and are reported there alone
COLUMNS = (
    ("entropy", "error", "lowest", "settling", "reward", "scope_temperature", "cpu_seconds"),
    ("pass@1", "pass@4", "pass@16", "pass@64", "distinct_correct"),
)
DIFFERENCES = ("entropy", "reward", "pass@1", "pass@4", "pass@16", "pass@64", "distinct_correct")
TESTED = ("entropy", "error", "settling", "reward", "pass@1", "pass@64", "distinct_correct")
LEGEND = """# All tables

Made by `python theory/lab/report.py` from [`rows.jsonl`](rows.jsonl); [`README.md`](README.md) says
what they mean.

- A row keeps the entropy as 35 means, of ten steps each in a run of 350.
- `error` is the mean distance of these means from H0 over the last fifth, as a share of H0 (0.4 where
  there is no target). `lowest` is the lowest of them, as a share of H0.
- `settling` is the number of steps after which each of them lies within a tenth of H0. The length of the
  run stands for never.
- Reward, entropy (nats a token) and T are means over the last fifth of the steps.
- `cpu_seconds` are those of a core for the whole run, evaluations included.
- Pass@k and `distinct_correct`, the number of different right answers, are of 64 samples for each of
  128 problems that no run trains on.
- "±" is half of a 95% interval over seeds. There is none where there is one seed, or where all agree.
- A difference marked * excludes zero even at the level at which all intervals of its table hold at
  once, 95 times in 100 (Bonferroni).
- "Between warm starts" is the share of the variance over seeds that the two warm starts make.
"""


# --- Rows
def cells_of(experiment: str) -> Cells:
    """The rows of an experiment, for its labels that have any; of two rows of a run the later."""
    is_tuning = experiment in ("gains", "tuning")
    rows = [row for row in experiments.read_rows() if is_tuning or row["seed"] < TUNING_SEEDS]
    cells = {}
    for label, options in experiments.EXPERIMENTS[experiment].items():
        cells[label] = {row["seed"]: row for row in rows if row["options"] == options}
    return {label: cell for label, cell in cells.items() if cell}


def present(experiment: str) -> Cells:
    """As `cells_of`, without the law that this project had first."""
    cells = cells_of(experiment)
    return {label: cell for label, cell in cells.items() if label not in experiments.FIRST}


def number(experiment: str, label: str, column: str) -> str:
    """The mean of a column for a label, or of the differences for "LABEL minus LABEL"."""
    cells = cells_of(experiment)
    label, _, other = label.partition(" minus ")
    if not other:
        return show([row[column] for row in cells[label].values() if column in row])
    return show(gains(cells[label], cells[other], column), "+")


def gains(cell: dict[int, dict], base: dict[int, dict], column: str) -> list[float]:
    """Differences of a column, for the seeds that both have."""
    return [cell[seed][column] - base[seed][column] for seed in sorted(cell.keys() & base.keys())]


def strata(experiment: str, label: str, column: str) -> str:
    """As `number` of "LABEL minus LABEL", where each of the two warm starts has a mean of its own."""
    cells = cells_of(experiment)
    label, _, other = label.partition(" minus ")
    groups = []
    for start in (0, 1):
        cell = {seed: row for seed, row in cells[label].items() if seed % 2 == start}
        groups.append(gains(cell, cells[other], column))
    return plus_minus(*stratified(groups), "+")


def top(experiment: str, column: str, *labels: str) -> str:
    """The entropy where a parabola of the column is highest; runs of one seed share a height."""
    cells, points = cells_of(experiment), {}
    for label in labels:
        for seed, row in cells[label].items():
            points.setdefault(seed, []).append((row["entropy"], row[column]))
    return plus_minus(*jackknife(parabola_top, list(points.values())))


# --- Tables of any experiment
def means(title: str, cells: Cells, columns: tuple[str, ...]) -> str:
    """Means over the seeds of the columns."""
    rows = []
    for label, cell in cells.items():
        values = [[row[name] for row in cell.values()] for name in columns]
        rows.append([label, len(cell), *map(show, values)])
    return markdown([title, "seeds", *columns], rows)


def differences(cells: Cells, columns: tuple[str, ...]) -> str:
    """Differences from the first label, paired by seed; * marks those beyond chance in so many."""
    (reference, base), *others = cells.items()
    values = {}
    for label, cell in others:
        for name in columns:
            values[label, name] = gains(cell, base, name)
    level = 1 - 0.05 / max(1, sum(len(those) > 1 for those in values.values()))
    rows = []
    for label, _ in others:
        row = [label, len(values[label, columns[0]])]
        for name in columns:
            those = values[label, name]
            if not those:
                row.append("")
                continue
            mean, half = interval(those, level)
            row.append(show(those, "+") + (" *" if abs(mean) > half > 0 else ""))
        rows.append(row)
    return markdown([f"minus {reference}, paired", "seeds", *columns], rows)


def seed_by_seed(cells: Cells) -> str:
    """H and T of every run."""
    seeds = sorted({seed for cell in cells.values() for seed in cell})
    rows = []
    for label, cell in cells.items():
        runs = [cell.get(seed) for seed in seeds]
        shown = [f"{run['entropy']:.3f}, {run['scope_temperature']:.2f}" if run else "" for run in runs]
        rows.append([label, *shown])
    return markdown(["H, T", *(f"seed {seed}" for seed in seeds)], rows)


def tested(name: str) -> str:
    """Each rule in one of the other tests."""
    return means(name, present(name), TESTED)


# --- Control
def spread(cells: Cells) -> str:
    """How far seeds lie apart in H, how much of it the warm starts make, how far H still moves.

    The last column says how much of the spread of Pass@1 is chance in drawing 64 samples a problem.
    """
    rows = []
    for label, cell in cells.items():
        if {seed % 2 for seed in cell} != {0, 1}:
            continue
        H = np.array([cell[seed]["entropy"] for seed in cell])
        starts = np.array([H[[seed % 2 == start for seed in cell]].mean() for start in (0, 1)])
        share = np.var(starts[[seed % 2 for seed in cell]]) / np.var(H)
        fifths = [np.array(row["entropies"]).reshape(5, -1).mean(1) for row in cell.values()]
        drift = [fifth[-1] - fifth[-2] for fifth in fifths]
        counted = [row for row in cell.values() if "num_right" in row]
        noise = ""
        if len(counted) > 1:
            over_seeds = np.std([row["pass@1"] for row in counted], ddof=1)
            noise = f"{np.mean([evaluation_error(row) for row in counted]):.4f} of {over_seeds:.3f}"
        rows.append([label, len(cell), f"{H.std(ddof=1):.3f}", f"{share:.0%}", show(drift, "+"), noise])
    header = ["entropy", "seeds", "standard deviation over seeds", "between warm starts"]
    header += ["last fifth minus the one before", "Pass@1: standard error of an evaluation"]
    return markdown(header, rows)


def evaluation_error(row: dict, samples: int = 64) -> float:
    """Standard error of a run's Pass@1, if its problems stay and their samples are drawn again."""
    p = np.array(row["num_right"]) / samples
    return math.sqrt((p * (1 - p)).sum() / (samples - 1)) / len(p)


def answers() -> str:
    """What GRPO and SCOPE answer to one question at the end of a run, seed 0; a row that keeps answers."""
    rows, question = [], ""
    for label in ("GRPO", "SCOPE, H0 0.4"):
        kept = cells_of("control").get(label, {}).get(0, {}).get("answers")
        if kept:
            question, right = kept["question"], kept["rewards"].count(1)
            rows.append([label, f"{right} of {len(kept['texts'])}", as_code(kept["texts"])])
    return markdown(["run", "right", f"answers to `{question}`"], rows)


def offsets(cells: Cells) -> str:
    """Each seed's rest under the published rule: predicted from its other runs, and measured."""
    others = ["constant T = 1.0", "constant T = 1.3", *(f"SCOPE, positional, H0 {H}" for H in TARGETS)]
    rows = []
    for H0 in TARGETS:
        cell = cells[f"SCOPE, published rule, H0 {H0}"]
        seeds = sorted(cell.keys() & set.intersection(*(set(cells[label]) for label in others)))
        predicted = []
        for seed in seeds:
            runs = [cells[label][seed] for label in others]
            points = [(run["entropy"], run["scope_temperature"]) for run in runs]
            predicted.append(predicted_rest(points, H0))
        measured = [cell[seed]["entropy"] for seed in seeds]
        gaps = np.subtract(measured, predicted).tolist()
        rows.append([H0, len(seeds), show(predicted), show(measured), show(gaps, "+")])
    return markdown(["H0, published rule", "seeds", "H predicted", "H measured", "difference"], rows)


def predicted_rest(points: list[tuple[float, float]], H0: float) -> float:
    """The rest of the published rule: where T = 1 + H0 - H meets the balance temperature T*(H).

    `points` are pairs (H, T*) at which *other* runs rest (a constant T, or the integral's), to be
    joined by lines; nats, temperature.
    """
    H = np.linspace(0, 1, 10_001)
    entropies, temperatures = zip(*sorted(points), strict=True)
    balance = np.interp(H, entropies, temperatures)
    return float(H[np.abs(1 + H0 - H - balance).argmin()])


def windows() -> str:
    """The error of SCOPE over the last 30 to 170 steps. Everywhere else it is taken over the last 70."""
    lengths = (3, 5, 7, 10, 14, 17)  # in parts of ten steps
    rows = []
    for label, cell in some("control", [*SCOPE, "SCOPE, positional, H0 0.5"]).items():
        shown = [label]
        for length in lengths:
            runs = cell.values()
            shown.append(show([experiments.error(run["entropies"], run["target"], length) for run in runs]))
        rows.append(shown)
    return markdown(["error over the last", *(f"{10 * length} steps" for length in lengths)], rows)


# --- Rules at the three targets
def rivals() -> str:
    """A row a rule: how soon, how close, how low at each target, and what SCOPE has beyond it."""
    cells = {H0: cells_of(f"rivals-{H0}") for H0 in TARGETS}
    rows = []
    for label in ("SCOPE", *experiments.RIVALS, "SCOPE, published rule", "AEPO"):
        known = [cells[H0][label].values() for H0 in TARGETS if label in cells[H0]]
        if not known:
            continue
        row = [label, min(map(len, known))]
        for name, form in (("settling", ".0f"), ("error", ".1%"), ("lowest", ".0%")):
            row.append(", ".join(f"{np.mean([run[name] for run in runs]):{form}}" for runs in known))
        lead = lead_over(label, ("pass@1", "reward"))
        rows.append([*row, *(show(values, "+") if values else "" for values in lead)])
    header = ["rule at 0.3, 0.4, 0.5", "seeds", "steps to 10%", "error", "lowest, of H0"]
    return markdown([*header, "SCOPE's Pass@1 beyond it", "and reward"], rows)


def lead_over(rival: str, columns: tuple[str, ...], first: str = "SCOPE") -> list[list[float]]:
    """What `first` has beyond a rival in each column, a value a seed: the mean over targets both have."""
    pairs = {}  # seed -> pairs of rows, one for each target
    for H0 in TARGETS:
        cells = cells_of(f"rivals-{H0}")
        own, other = cells.get(first, {}), cells.get(rival, {})
        for seed in own.keys() & other.keys():
            pairs.setdefault(seed, []).append((own[seed], other[seed]))
    if rival == first:
        return [[] for _ in columns]
    return [
        [float(np.mean([a[name] - b[name] for a, b in those])) for those in pairs.values()]
        for name in columns
    ]


def lead(rival: str, column: str, first: str = "SCOPE") -> str:
    """One column of `lead_over`."""
    return show(lead_over(rival, (column,), first)[0], "+")


def moving() -> str:
    """The moving target, phase by phase: H over its last 50 steps, and how soon it stays near H0."""
    phases = (0, 15, 0.5), (15, 25, 0.3), (25, 35, 0.5)  # in tens of steps
    rows = []
    for label, cell in present("moving").items():
        values = []
        for first, last, H0 in phases:
            courses = [row["entropies"][first:last] for row in cell.values()]
            values.append([float(np.mean(course[-5:])) for course in courses])
            values.append([experiments.settling(course, H0, 10 * len(course)) for course in courses])
        rows.append([label, len(cell), *map(show, values)])
    header = [f"{name} {H0}" for _, _, H0 in phases for name in ("H at", "steps to")]
    return markdown(["moving target", "seeds", *header], rows)


def neighbours() -> str:
    """Each system on GRPO, and beside SCOPE: means over the seeds that all of them have."""
    cells = cells_of("neighbours")
    seeds = set.intersection(*(set(cell) for cell in cells.values()))
    pairs = {"none": ("GRPO", "SCOPE")}
    for name in experiments.NEIGHBOURS.values():
        pairs[name] = f"{name} alone", f"{name} beside SCOPE"
    columns = "entropy", "reward", "pass@1", "pass@4", "pass@16", "pass@64", "distinct_correct"
    rows = []
    for name, labels in pairs.items():
        if not cells.keys() >= set(labels):
            continue
        row = [name, len(seeds)]
        for column in columns:
            means = [np.mean([cells[label][seed][column] for seed in seeds]) for label in labels]
            row.append(", ".join(f"{mean:.1f}" if mean > 2 else f"{mean:.3f}" for mean in means))
        rows.append(row)
    rows.append(["RLRT", 0, "not run: needs a model that reasons", *[""] * 6])
    rows.append(["OGER", 0, "not run: needs several teachers, and embeddings", *[""] * 6])
    return markdown(["on GRPO, beside SCOPE", "seeds", *columns], rows)


def gain_grid() -> str:
    """The gains that were tried: steps to 10%, lowest part, error; means of two seeds."""
    cells = cells_of("gains")
    rows = []
    for gain in (1, 2, 4, 8):
        shown = [gain]
        for integral in (0.05, 0.1, 0.2, 0.4):
            runs = cells[f"{gain}, {integral}"].values()
            steps, low, far = (
                np.mean([run[name] for run in runs]) for name in ("settling", "lowest", "error")
            )
            shown.append(f"{steps:.0f}, {low:.0%}, {far:.1%}")
        rows.append(shown)
    return markdown(["gain, integral gain", 0.05, 0.1, 0.2, 0.4], rows)


def what_decides() -> str:
    """The ingredients and both meanings of alpha at a target of 0.4, under the positional law."""
    alphas = [f"share 1/4, weight {alpha}" for alpha in ("1/64", "1/16", "1")]
    alphas += ["share and weight 1/4", "share and weight 1", "share 1/64, weight 1", "share 1/16, weight 1"]
    names = ["both signs", "mean over positives", "group-normalised", "equal groups dropped"]
    shown = some("alpha", alphas) | some("ingredients", names)
    columns = ("entropy", "error", "reward", "pass@1", "distinct_correct")
    return means("positional law, H0 0.4", shown, columns)


def some(experiment: str, labels: list[str]) -> Cells:
    """Some labels of an experiment, those that have rows."""
    cells = cells_of(experiment)
    return {label: cells[label] for label in labels if label in cells}


def results() -> str:
    """README's table: before training, GRPO, and SCOPE at three targets."""
    cells = some("control", RESULTS)
    runs = cells_of("rivals-0.4")["PI on the bonus"].values()  # they kept it; it is the same for all
    before = ["before training", len(runs)]
    for name in RESULT_COLUMNS:
        values = [row[f"{name} before"] for row in runs if f"{name} before" in row]
        before.append(show(values) if values else "")
    lines = means("preset tiny", cells, RESULT_COLUMNS).splitlines()
    lines.insert(2, f"| {' | '.join(map(str, before))} |")
    return "\n".join(lines) + "\n"


RESULTS = ["GRPO", "GRPO, 640 samples", *SCOPE]
OTHERS = ["entropy bonus 0.1", "constant T = 1.3", "SCOPE, published rule, H0 0.4"]
CONTROL = [*RESULTS[:2], *OTHERS, *SCOPE]
RESULT_COLUMNS = ("entropy", "reward", "pass@1", "pass@64", "distinct_correct")
TABLES: dict[str, Callable[[], str]] = {
    "results": results,
    "control": lambda: means("control", some("control", CONTROL), TESTED),
    "answers": answers,
    "rivals": rivals,
    "gains": gain_grid,
    "decides": what_decides,
    "moving": moving,
    "neighbours": neighbours,
    "windows": windows,
    "weak": functools.partial(tested, "weak"),
    "pretrained": pretrained.comparison,
    "pretrained, present rule": functools.partial(pretrained.comparison, positional=False),
    "pretrained answers": pretrained.answers,
    "sums": pretrained.sums_table,
    "signs": probes.sign_table,
    "factors": probes.factor_table,
    "loops": probes.loop_table,
}


NUMBERS: dict[str, Callable[..., str]] = {"number": number, "strata": strata, "top": top, "lead": lead}


# --- Pages
def filled(text: str) -> str:
    """A page with what stands between its markers made anew. Raises KeyError for what is not known."""

    def fill(match: re.Match) -> str:
        kind, name, _ = match.groups()
        content = f"\n{TABLES[name]()}" if kind == "table" else NUMBERS[kind](*name.split("; "))
        return f"<!-- {kind} {name} -->{content}<!-- end -->"

    return MARKED.sub(fill, text)


def document() -> str:
    """All of tables.md."""
    parts = [LEGEND]
    for name in experiments.EXPERIMENTS:
        cells = cells_of(name)
        if not cells:
            continue
        parts.append(f"## {name}\n")
        known = set.intersection(*(set(row) for cell in cells.values() for row in cell.values()))
        groups = [[column for column in columns if column in known] for columns in (*COLUMNS, DIFFERENCES)]
        parts += [means(name, cells, columns) for columns in groups[:2] if columns]
        parts += [differences(cells, groups[2]), seed_by_seed(cells)]
        if name == "control":
            parts += [spread(cells), offsets(cells)]
    return "\n".join(parts)


def stale_pages() -> list[str]:
    """The pages that do not show what the rows say."""
    expected = {page: filled(page.read_text()) for page in PAGES} | {FOLDER / "tables.md": document()}
    return [str(page.relative_to(ROOT)) for page, text in expected.items() if page.read_text() != text]


def pages_are_up_to_date() -> bool:
    """Whether all pages show what the rows say; those that do not are printed."""
    stale = stale_pages()
    if stale:
        print(f"run theory/lab/report.py for {', '.join(stale)}")
    return not stale


# --- Figures
def course(axis, rows, **style) -> None:
    """The mean entropy of the parts of some runs, and its interval."""
    curves = zip(*(row["entropies"] for row in rows), strict=True)
    mean, half = np.nan_to_num([interval(parts) for parts in curves]).T
    steps = rows[0]["steps"] * (np.arange(len(mean)) + 0.5) / len(mean)
    axis.plot(steps, mean, **style)
    axis.fill_between(steps, mean - half, mean + half, color=style["color"], alpha=0.15, lw=0)


def draw(path: Path, cells: Cells) -> None:
    """Entropy over the run; against it, Pass@1 minus the first label's, and right answers."""
    import matplotlib.pyplot as plt  # the extra `plot`

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    reference, base = next(iter(cells.items()))
    for i, (label, cell) in enumerate(cells.items()):
        color, rows = plt.cm.tab20(i % 20), list(cell.values())
        course(axes[0], rows, label=label, color=color)
        x, dx = interval([row["entropy"] for row in rows])
        values = gains(cell, base, "pass@1"), [row["distinct_correct"] for row in rows]
        for axis, those in zip(axes[1:], values, strict=True):
            if those:
                y, dy = interval(those)
                axis.errorbar(x, y, dy, dx, fmt="o", color=color, lw=1)
    axes[0].set(xlabel="step", ylabel="entropy, nats a token")
    axes[1].set(ylabel=f"Pass@1 minus {reference}'s, paired")
    axes[2].set(ylabel="distinct right answers of a problem's samples")
    for axis in axes[1:]:
        axis.set(xlabel="entropy, last fifth of the run")
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_entropies(path: Path) -> None:
    """The README's figure: entropy over the run of GRPO and of SCOPE with three targets."""
    import matplotlib.pyplot as plt  # the extra `plot`

    figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
    cells = cells_of("control")
    for label, color in zip(("GRPO", *SCOPE), ("black", "tab:blue", "tab:green", "tab:orange"), strict=True):
        rows = list(cells.get(label, {}).values())
        if rows:
            course(axis, rows, label=f"{label} ({len(rows)} seeds)", color=color)
            axis.legend(loc="upper right", ncols=2)
        if label != "GRPO":
            axis.axhline(float(label.split()[-1]), color=color, lw=0.8, ls=":")
    rule = experiments.SCOPE.removeprefix("--scope_").replace(" --scope_", ", ").replace("_", " ")
    axis.set(title=f"preset tiny; SCOPE with {rule}, T in [0.5, 1.5]", xlabel="step")
    axis.set(ylabel="entropy, nats a token", xlim=(0, 350), ylim=(0, 0.9))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_rivals(path: Path) -> None:
    """A panel a rule: the entropy over the run of every seed at each of the three targets."""
    import matplotlib.pyplot as plt  # the extra `plot`

    cells = {H0: cells_of(f"rivals-{H0}") for H0 in TARGETS}
    known = set().union(*cells.values())
    labels = [label for label in experiments.EXPERIMENTS[f"rivals-{TARGETS[0]}"] if label in known]
    options = {"sharex": True, "sharey": True, "layout": "constrained"}
    figure, axes = plt.subplots(math.ceil(len(labels) / 5) or 1, 5, figsize=(17, 9), **options)
    for axis in axes.flat[len(labels) :]:
        axis.axis("off")
    for axis, label in zip(axes.flat, labels, strict=False):
        for H0, color in zip(TARGETS, ("tab:blue", "tab:green", "tab:orange"), strict=True):
            rows = cells[H0].get(label, {}).values()
            for row in rows:
                axis.plot(range(5, 350, 10), row["entropies"], color=color, lw=0.8)
            axis.axhline(H0, color=color, lw=0.8, ls=":", label=f"target {H0}, seeds: {len(rows)}")
        axis.set(title=label, ylim=(0, 0.9))
        axis.legend(fontsize=8, loc="upper right")
    figure.supxlabel("step")
    figure.supylabel("entropy, nats a token")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_tests(path: Path) -> None:
    """A panel a test: the entropy over the run of each rule, a line a seed."""
    import matplotlib.pyplot as plt  # the extra `plot`

    order = list(experiments.EXPERIMENTS["cooling"])  # a colour for each
    constant = [0, 350]
    tests = {
        "moving": ("moving target", [0, 150, 150, 250, 250, 350], [0.5, 0.5, 0.3, 0.3, 0.5, 0.5]),
        "cooling": ("cooling: sums, target 0.2", constant, [0.2, 0.2]),
        "weak": ("a weaker start, target 0.4", constant, [0.4, 0.4]),
        "dr_grpo": ("no standard deviation, target 0.4", constant, [0.4, 0.4]),
    }
    figure, axes = plt.subplots(1, len(tests), figsize=(17, 4), layout="constrained")
    for axis, (name, (title, steps, H0)) in zip(axes, tests.items(), strict=True):
        for label, cell in cells_of(name).items():
            for k, row in enumerate(cell.values()):
                text = f"{label}, seeds: {len(cell)}" if k == 0 else None
                color = f"C{order.index(label)}"
                axis.plot(range(5, 350, 10), row["entropies"], color=color, lw=0.8, label=text)
        axis.plot(steps, H0, color="black", lw=0.8, ls=":", label="target")
        axis.set(title=title, xlabel="step", ylabel="entropy, nats a token")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    """Write tables.md, the pages, and the figures."""
    (FOLDER / "tables.md").write_text(document())
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    if find_spec("matplotlib") is None:
        sys.exit("the tables are new; the figures need matplotlib: pip install -e '.[plot]'")
    draw_entropies(FOLDER / "figures" / "entropy.png")
    draw_rivals(FOLDER / "figures" / "rivals.png")
    draw_tests(FOLDER / "figures" / "tests.png")
    pretrained.draw(FOLDER / "figures" / "pretrained.png")
    for name in ("control", "alpha", "target", "beyond", "ingredients", "transfer", "neighbours"):
        draw(FOLDER / "figures" / f"{name}.png", cells_of(name))
    print(f"tables.md, figures/ and the pages show what {experiments.ROWS.name} says")


if __name__ == "__main__":
    main()
