"""Tables and figures of the experiments: means over seeds with 95% intervals, and differences paired by seed.

`cells` below is label -> seed -> row, a row being what experiments.py wrote of one run. An interval is Student's t over
the seeds. Differences are taken seed by seed first: two runs of one seed share warm start, problems and their order.
"""

import math
from pathlib import Path

import numpy as np

T_95 = {
    1: 12.71,
    2: 4.30,
    3: 3.18,
    4: 2.78,
    5: 2.57,
    6: 2.45,
    7: 2.36,
}  # Student's t by degrees of freedom
TABLES = [
    ("reward", "entropy", "error", "pass@1", "pass@64", "distinct_correct"),
    ("scope_temperature", "oscillation", "pass@4", "pass@16"),
]
DIFFERENCES = ("reward", "pass@1", "pass@16", "pass@64", "distinct_correct")


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95% interval (Student's t; NaN for one value)."""
    n = len(values)
    half = T_95.get(n - 1, 2.0) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), float(half)


def show(values: list[float], sign: str = "") -> str:
    """`mean ± half of the interval`, or the value alone."""
    mean, half = interval(values)
    return f"{mean:{sign}.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def markdown(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def tables(experiment: str, cells: dict[str, dict[int, dict]]) -> str:
    """Means and 95% intervals over the seeds; then differences from the first label, paired by seed."""
    parts = []
    reference, base = next(iter(cells.items()))
    there = set.intersection(*(set(row) for cell in cells.values() for row in cell.values()))
    for columns in TABLES:
        names = [name for name in columns if name in there]
        rows = []
        for label, cell in cells.items():
            rows.append(
                [label, len(cell), *(show([row[name] for row in cell.values()]) for name in names)]
            )
        parts.append(markdown([experiment, "seeds", *names], rows))
    names, rows = [name for name in DIFFERENCES if name in there], []
    for label, cell in cells.items():
        seeds = sorted(cell.keys() & base.keys())
        gains = [[cell[seed][name] - base[seed][name] for seed in seeds] for name in names]
        rows.append([label, len(seeds), *(show(values, "+") for values in gains)])
    parts.append(markdown([f"minus {reference}, paired", "seeds", *names], rows[1:]))
    return "\n".join(parts)


def predicted_rest(points: list[tuple[float, float]], H0: float) -> float:
    """Where the published rule should rest: where T = 1 + H0 - H meets the balance temperature T*(H).

    Args:
        points: (H, T*) at which *other* runs rest (constant T, integral), to be joined by lines; nats, temperature.
    """
    H = np.linspace(0, 1, 10_001)
    entropies, temperatures = zip(*sorted(points), strict=True)
    balance = np.interp(H, entropies, temperatures)
    return float(H[np.abs(1 + H0 - H - balance).argmin()])


def offsets(cells: dict[str, dict[int, dict]]) -> str:
    """Each seed's rest under the published rule, predicted from that seed's runs under other rules, and measured."""
    rows = []
    others = [
        "constant T = 1.0",
        "constant T = 1.3",
        *(f"SCOPE, with integral, H0 {H}" for H in (0.3, 0.4, 0.5)),
    ]
    for H0 in (0.3, 0.4, 0.5):
        cell = cells[f"SCOPE, published rule, H0 {H0}"]
        seeds = sorted(cell.keys() & set.intersection(*(set(cells[label]) for label in others)))
        points = {
            s: [(cells[o][s]["entropy"], cells[o][s]["scope_temperature"]) for o in others]
            for s in seeds
        }
        predicted = np.array([predicted_rest(points[s], H0) for s in seeds])
        measured = np.array([cell[s]["entropy"] for s in seeds])
        rows.append([H0, len(seeds), show(predicted), show(measured), show(measured - predicted, "+")])
    return markdown(["H0, published rule", "seeds", "H predicted", "H measured", "difference"], rows)


def draw(path: Path, cells: dict[str, dict[int, dict]]) -> None:
    """Entropy over the run; against it, Pass@1 minus the first label's (paired), and distinct right answers."""
    import matplotlib.pyplot as plt  # the extra `plot`

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    reference, base = next(iter(cells.items()))
    for i, (label, cell) in enumerate(cells.items()):
        color, rows = plt.cm.tab20(i % 20), list(cell.values())
        curves = [
            interval([row["entropies"][k] for row in rows]) for k in range(len(rows[0]["entropies"]))
        ]
        mean, half = np.nan_to_num(np.array(curves)).T
        share = (np.arange(len(mean)) + 0.5) / len(mean)
        axes[0].plot(share, mean, label=label, color=color)
        axes[0].fill_between(share, mean - half, mean + half, color=color, alpha=0.15, lw=0)
        gains = [row["pass@1"] - base[seed]["pass@1"] for seed, row in cell.items() if seed in base]
        x, dx = interval([row["entropy"] for row in rows])
        for axis, values in zip(
            axes[1:], (gains, [row["distinct_correct"] for row in rows]), strict=True
        ):
            y, dy = interval(values)
            axis.errorbar(x, y, dy, dx, fmt="o", color=color, lw=1)
    axes[0].set(xlabel="share of the run", ylabel="entropy, nats a token")
    axes[1].set(xlabel="entropy, last fifth of the run", ylabel=f"Pass@1 minus {reference}'s, paired")
    axes[2].set(
        xlabel="entropy, last fifth of the run",
        ylabel="distinct right answers of a problem's samples",
    )
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=100)
