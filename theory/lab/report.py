"""Tables and figures of the rows:  `python theory/lab/report.py`  (figures need the extra `plot`)

Writes tables.md and the folder figures/. Below, `cells` is label -> seed -> row, a row being what
experiments.py keeps of one run. "±" is half of a 95% interval: Student's t over the seeds.
Differences are taken seed by seed first, as two runs of one seed share warm start, problems and
their order.
"""

import math
from pathlib import Path

import numpy as np

import experiments

FOLDER = Path(__file__).parent
Cells = dict[str, dict[int, dict]]
COLUMNS = (
    ("reward", "entropy", "error", "pass@1", "pass@64", "distinct_correct"),
    ("scope_temperature", "oscillation", "pass@4", "pass@16", "cpu_seconds"),
)
DIFFERENCES = ("entropy", "reward", "pass@1", "pass@16", "pass@64", "distinct_correct")
# The rows and columns of `control` that README.md shows.
SHOWN = (
    "GRPO", "entropy bonus 0.1", "AEPO", "constant T = 1.3", "SCOPE, published rule, H0 0.4",
    *(f"SCOPE, with integral, H0 {H}" for H in (0.3, 0.4, 0.5)),
)  # fmt: skip
SHOWN_COLUMNS = ("entropy", "reward", "pass@1", "pass@64", "distinct_correct")
# What the README at the top shows, in a figure and a table.
RESULTS = ("GRPO", *(f"SCOPE, with integral, H0 {H}" for H in (0.3, 0.4, 0.5)))
RESULTS_COLUMNS = ("entropy", "reward", "pass@1", "distinct_correct")
# Rivals of SCOPE: the targets, and what the page shows of each.
TARGETS = (0.3, 0.4, 0.5)
RIVAL_COLUMNS = ("entropy", "error", "settling", "oscillation", "reward", "pass@1", "pass@16", "distinct_correct")
LEGEND = """# All tables

Made by `python theory/lab/report.py` from [`rows.jsonl`](rows.jsonl); [`README.md`](README.md) says
what they mean.

- Reward, entropy (nats a token), T and oscillation (the standard deviation over the steps, what
  trend is left included) are of the last fifth of the steps.
- `error` is the root mean square of H - H0 there, as a share of H0 (0.4 where there is no target).
- `settling` is the number of steps after which every mean of ten steps lies within a tenth of H0; 350 is never.
- `cpu_seconds` are those of a core for the whole run, evaluations included.
- Pass@k and `distinct_correct`, the number of different right answers, are of 64 samples for each of
  128 problems that no run trains on.
- No ± is shown where there is one seed, or where all seeds agree.
- A difference marked * excludes zero even at the level at which all intervals of its table hold at
  once, 95 times in 100 (Bonferroni).
- "Between warm starts" is the share of the variance over seeds that the two warm starts make.
"""


# --- Statistics
def student_t(freedom: int, level: float = 0.95) -> float:
    """The t that a Student variable stays within, on either side of 0, with probability `level`.

    With t = sqrt(freedom) tan(angle) its density is proportional to cos(angle)^(freedom - 1).
    """
    angles = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.append(0, np.cumsum(density[1:] + density[:-1]))
    return math.sqrt(freedom) * math.tan(np.interp(level, mass / mass[-1], angles))


def interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """Mean, and half of its interval; NaN for one value."""
    n = len(values)
    half = student_t(n - 1, level) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), float(half)


def show(values: list[float], sign: str = "") -> str:
    """`mean ± half of the interval`, to two digits of that, but at most four decimals."""
    mean, half = interval(values)
    if math.isnan(half) or half < 1e-9:
        return f"{mean:{sign}.3f}"
    digits = min(4, max(0, 1 - math.floor(math.log10(half))))
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"


def predicted_rest(points: list[tuple[float, float]], H0: float) -> float:
    """The rest of the published rule: where T = 1 + H0 - H meets the balance temperature T*(H).

    `points` are pairs (H, T*) at which *other* runs rest (a constant T, or the integral's), to be
    joined by lines; nats, temperature.
    """
    H = np.linspace(0, 1, 10_001)
    entropies, temperatures = zip(*sorted(points), strict=True)
    balance = np.interp(H, entropies, temperatures)
    return float(H[np.abs(1 + H0 - H - balance).argmin()])


# --- Tables
def cells_of(experiment: str) -> Cells:
    """The rows of an experiment, for its labels that have any."""
    rows, cells = experiments.read_rows(), {}
    for label, options in experiments.EXPERIMENTS[experiment].items():
        cells[label] = {row["seed"]: row for row in rows if row["options"] == options}
    return {label: cell for label, cell in cells.items() if cell}


def markdown(header: list, rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


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
    gains = {}
    for label, cell in others:
        seeds = sorted(cell.keys() & base.keys())
        for name in columns:
            gains[label, name] = [cell[seed][name] - base[seed][name] for seed in seeds]
    level = 1 - 0.05 / max(1, sum(len(values) > 1 for values in gains.values()))
    shown = {}
    for key, values in gains.items():
        mean, half = interval(values, level)
        shown[key] = show(values, "+") + (" *" if abs(mean) > half > 0 else "")
    rows = [[label, len(gains[label, columns[0]]), *(shown[label, name] for name in columns)] for label, _ in others]
    return markdown([f"minus {reference}, paired", "seeds", *columns], rows)


def spread(cells: Cells) -> str:
    """How far seeds lie apart in H, how much of it the warm starts make, how far H still moves."""
    rows = []
    for label, cell in cells.items():
        H = np.array([cell[seed]["entropy"] for seed in cell])
        starts = np.array([H[[seed % 2 == s for seed in cell]].mean() for s in (0, 1)])
        share = np.var(starts[[seed % 2 for seed in cell]]) / np.var(H)
        fifths = [np.array(row["entropies"]).reshape(5, -1).mean(1) for row in cell.values()]
        drift = [fifth[-1] - fifth[-2] for fifth in fifths]
        cells_shown = [f"{H.std(ddof=1):.3f}", f"{share:.0%}", show(drift, "+")]
        rows.append([label, len(cell), *cells_shown])
    header = ["entropy", "seeds", "standard deviation over seeds", "between warm starts"]
    return markdown([*header, "last fifth minus the one before"], rows)


def seed_by_seed(cells: Cells) -> str:
    """H and T of every run."""
    seeds = sorted({seed for cell in cells.values() for seed in cell})
    rows = []
    for label, cell in cells.items():
        runs = [cell.get(seed) for seed in seeds]
        shown = [f"{r['entropy']:.3f}, {r['scope_temperature']:.2f}" if r else "" for r in runs]
        rows.append([label, *shown])
    return markdown(["H, T", *(f"seed {seed}" for seed in seeds)], rows)


def offsets(cells: Cells) -> str:
    """Each seed's rest under the published rule: predicted from its other runs, and measured."""
    others = [f"constant T = {T}" for T in (1.0, 1.3)]
    others += [f"SCOPE, with integral, H0 {H}" for H in (0.3, 0.4, 0.5)]
    rows = []
    for H0 in (0.3, 0.4, 0.5):
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
    header = ["H0, published rule", "seeds", "H predicted", "H measured", "difference"]
    return markdown(header, rows)


def shown_control() -> str:
    """The eight rows of `control` that README.md shows."""
    cells = cells_of("control")
    return means("control", {label: cells[label] for label in SHOWN}, SHOWN_COLUMNS)


def shown_results() -> str:
    """The four rows that the README at the top shows."""
    cells = cells_of("control")
    return means("preset tiny", {label: cells[label] for label in RESULTS}, RESULTS_COLUMNS)


def shown_rivals() -> str:
    """Each controller at each target, as the lab's page shows them."""
    cells = {H0: cells_of(f"rivals-{H0}") for H0 in TARGETS}
    labels = experiments.EXPERIMENTS[f"rivals-{TARGETS[0]}"]
    shown = {f"{label}, {H0}": cells[H0][label] for label in labels for H0 in TARGETS if label in cells[H0]}
    return means("controller, H0", shown, RIVAL_COLUMNS)


def shown_tuning() -> str:
    """Each setting that was tried: 200 steps at 0.4."""
    return means("tuning", cells_of("tuning"), ("entropy", "error", "oscillation", "reward", "cpu_seconds"))


def lead(columns: tuple[str, ...] = ("pass@1", "entropy", "reward", "distinct_correct")) -> str:
    """SCOPE with integral minus each other controller: a seed's value is the mean over the targets that both have.

    "Above" counts the pairs of one seed and target in which SCOPE has the higher Pass@1.
    """
    cells, rows = [cells_of(f"rivals-{H0}") for H0 in TARGETS], []
    for rival in list(experiments.EXPERIMENTS[f"rivals-{TARGETS[0]}"])[1:]:
        pairs = {}  # seed -> rows of SCOPE and of the rival, a pair a target
        for cell in cells:
            for seed in cell["SCOPE, with integral"].keys() & cell.get(rival, {}).keys():
                pairs.setdefault(seed, []).append((cell["SCOPE, with integral"][seed], cell[rival][seed]))
        if pairs:
            above = [scope["pass@1"] > other["pass@1"] for those in pairs.values() for scope, other in those]
            gains = [[np.mean([s[name] - r[name] for s, r in those]) for those in pairs.values()] for name in columns]
            shown = [show(values, "+") for values in gains]
            rows.append([rival, len(pairs), f"{sum(above)} of {len(above)}", *shown])
    return markdown(["SCOPE, with integral, minus", "seeds", "above", *columns], rows)


def shown_moving() -> str:
    """The moving target, phase by phase: H over its last 50 steps, and how soon the means of ten steps stay near H0."""
    phases, rows = ((0, 15, 0.5), (15, 25, 0.3), (25, 35, 0.5)), []  # in tens of steps
    for label, cell in cells_of("moving").items():
        values = []
        for first, last, H0 in phases:
            courses = [row["entropies"][first:last] for row in cell.values()]
            values += [[float(np.mean(course[-5:])) for course in courses]]
            values += [[float(experiments.settling(course, H0)) for course in courses]]
        rows.append([label, len(cell), *map(show, values)])
    header = [f"{name} {H0}" for _, _, H0 in phases for name in ("H at", "steps to")]
    return markdown(["moving target", "seeds", *header], rows)


def shown_test(name: str) -> str:
    """Each controller in one of the other tests."""
    return means(name, cells_of(name), ("entropy", "error", "settling", "reward", "pass@1", "distinct_correct"))


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
        parts += [means(name, cells, columns) for columns in groups[:2]]
        parts += [differences(cells, groups[2]), seed_by_seed(cells)]
        if name == "control":
            parts += [spread(cells), offsets(cells)]
    return "\n".join(parts)


# --- Figures
def draw(path: Path, cells: Cells) -> None:
    """Entropy over the run; against it, Pass@1 minus the first label's, and right answers."""
    import matplotlib.pyplot as plt  # the extra `plot`

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    reference, base = next(iter(cells.items()))
    for i, (label, cell) in enumerate(cells.items()):
        color, rows = plt.cm.tab20(i % 20), list(cell.values())
        curves = np.array([interval(parts) for parts in zip(*(row["entropies"] for row in rows), strict=True)])
        mean, half = np.nan_to_num(curves).T
        share = (np.arange(len(mean)) + 0.5) / len(mean)
        axes[0].plot(share, mean, label=label, color=color)
        axes[0].fill_between(share, mean - half, mean + half, color=color, alpha=0.15, lw=0)

        x, dx = interval([row["entropy"] for row in rows])
        gains = [row["pass@1"] - base[seed]["pass@1"] for seed, row in cell.items() if seed in base]
        distinct = [row["distinct_correct"] for row in rows]
        for axis, values in zip(axes[1:], (gains, distinct), strict=True):
            y, dy = interval(values)
            axis.errorbar(x, y, dy, dx, fmt="o", color=color, lw=1)
    axes[0].set(xlabel="share of the run", ylabel="entropy, nats a token")
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
    for label, color in zip(RESULTS, ("black", "tab:blue", "tab:green", "tab:orange"), strict=True):
        rows = cells[label].values()
        curves = zip(*(row["entropies"] for row in rows), strict=True)
        mean, half = np.array([interval(parts) for parts in curves]).T
        steps = 350 * (np.arange(len(mean)) + 0.5) / len(mean)
        axis.plot(steps, mean, label=label.replace(", with integral, H0", ", target"), color=color)
        axis.fill_between(steps, mean - half, mean + half, color=color, alpha=0.2, lw=0)
        if label != "GRPO":
            axis.axhline(float(label.split()[-1]), color=color, lw=0.8, ls=":")
    axis.set(xlabel="step", ylabel="entropy, nats a token", xlim=(0, 350), ylim=(0, 0.9))
    axis.legend(loc="upper right", ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_rivals(path: Path) -> None:
    """A panel a controller: the entropy over the run of every seed at each of the three targets."""
    import matplotlib.pyplot as plt  # the extra `plot`

    cells = {H0: cells_of(f"rivals-{H0}") for H0 in TARGETS}
    labels = experiments.EXPERIMENTS[f"rivals-{TARGETS[0]}"]
    figure, axes = plt.subplots(2, 5, figsize=(17, 6), sharex=True, sharey=True, layout="constrained")
    for axis, label in zip(axes.flat, labels, strict=True):
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
    """A panel a test: the entropy over the run of each controller, a line a seed."""
    import matplotlib.pyplot as plt  # the extra `plot`

    order = list(experiments.EXPERIMENTS["cooling"])  # a colour for each
    tests = {
        "moving": "moving target",
        "cooling": "cooling: sums, target 0.2",
        "weak": "a weaker start, target 0.4",
        "dr_grpo": "no standard deviation, target 0.4",
    }
    figure, axes = plt.subplots(1, len(tests), figsize=(17, 4), layout="constrained")
    for axis, (name, title) in zip(axes, tests.items(), strict=True):
        cells = cells_of(name)
        for label, cell in cells.items():
            for k, row in enumerate(cell.values()):
                shown = f"{label}, seeds: {len(cell)}" if k == 0 else None
                axis.plot(range(5, 350, 10), row["entropies"], color=f"C{order.index(label)}", lw=0.8, label=shown)
        target = [row["target"] for cell in cells.values() for row in cell.values()][-1]  # GRPO, the first, has none
        steps, H0 = ([0, 150, 150, 250, 250, 350], [0.5, 0.5, 0.3, 0.3, 0.5, 0.5]) if name == "moving" else (
            [0, 350], [target] * 2
        )  # fmt: skip
        axis.plot(steps, H0, color="black", lw=0.8, ls=":", label="target")
        axis.set(title=title, xlabel="step", ylabel="entropy, nats a token")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    """Write tables.md and the figures."""
    draw_entropies(FOLDER / "figures" / "entropy.png")
    draw_rivals(FOLDER / "figures" / "rivals.png")
    draw_tests(FOLDER / "figures" / "tests.png")
    (FOLDER / "tables.md").write_text(document())
    for name in ("control", "alpha", "target", "beyond", "ingredients", "transfer"):
        draw(FOLDER / "figures" / f"{name}.png", cells_of(name))
    print(f"tables.md and figures/ are in {FOLDER}")


if __name__ == "__main__":
    main()
