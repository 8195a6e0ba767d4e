"""Statistics of a few runs, and Markdown: what the tables of this folder are made with.

"±" is half of a 95% interval. It is Student's t over the seeds, or it is made by Newey and West's rule
where the values are the steps of one run, which resemble their neighbours.
"""

import math
from collections.abc import Callable

import numpy as np


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


def newey_west(values: list[float], lags: int | None = None) -> float:
    """Standard error of the mean of a series whose values resemble their neighbours.

    The variance of the mean of n values is (c_0 + 2 sum_k (1 - k / (lags + 1)) c_k) / n, where c_k is the
    autocovariance at lag k (Newey and West 1987). By default there are sqrt(n) lags, which is more than the
    usual rules take, as n is small here.
    """
    x = np.asarray(values, dtype=float) - np.mean(values)
    n = len(x)
    if lags is None:
        lags = math.isqrt(n)
    variance = (x @ x) / n
    for k in range(1, min(lags, n - 1) + 1):
        variance += 2 * (1 - k / (lags + 1)) * (x[k:] @ x[:-k]) / n
    return math.sqrt(variance / n)


def show(values: list[float], sign: str = "") -> str:
    """`mean ± half of the interval`, see `plus_minus`."""
    return plus_minus(*interval(values), sign)


def plus_minus(mean: float, half: float, sign: str = "") -> str:
    """`mean ± half`, to two digits of half, but at most four decimals."""
    if math.isnan(half) or half < 1e-9:
        return f"{mean:{sign}.3f}"
    digits = min(4, max(0, 1 - math.floor(math.log10(half))))
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"


def stratified(groups: list[list[float]]) -> tuple[float, float]:
    """Mean of the groups' means, and half of its interval. Groups differ in their means, not in variance."""
    sizes = [len(group) for group in groups]
    freedom = sum(sizes) - len(groups)
    variance = sum(n * np.var(group) for n, group in zip(sizes, groups, strict=True)) / freedom
    error = math.sqrt(variance * sum(1 / n for n in sizes)) / len(groups)
    return float(np.mean([np.mean(group) for group in groups])), student_t(freedom) * error


def parabola_top(groups: list[list[tuple[float, float]]]) -> float:
    """The x where the parabola that fits points (x, y) best is highest, or lowest where it opens upwards.

    Each group of points has a height of its own. Subtracting the group's means leaves y = b x + a x^2.
    """
    centred = []
    for points in groups:
        x, y = np.array(points).T
        columns = np.stack([x, x**2, y], axis=1)
        centred.append(columns - columns.mean(axis=0))
    table = np.concatenate(centred)
    b, a = np.linalg.lstsq(table[:, :2], table[:, 2], rcond=None)[0]
    return float(-b / (2 * a))


def jackknife(statistic: Callable[[list], float], groups: list) -> tuple[float, float]:
    """A statistic of groups, and half of its interval, from how it changes when one group is left out."""
    n = len(groups)
    without = [statistic(groups[:i] + groups[i + 1 :]) for i in range(n)]
    return statistic(groups), student_t(n - 1) * math.sqrt(n - 1) * float(np.std(without))


def welch(values: list[float], others: list[float]) -> str:
    """The difference of two means with half of its interval, of runs that are not paired (Welch's t)."""
    parts = [np.var(x, ddof=1) / len(x) for x in (values, others)]
    freedom = sum(parts) ** 2 / sum(v**2 / (len(x) - 1) for v, x in zip(parts, (values, others), strict=True))
    half = student_t(freedom) * math.sqrt(sum(parts))
    return f"{np.mean(values) - np.mean(others):+.2f} ± {half:.2f}"


def markdown(header: list, rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def as_code(texts: list[str]) -> str:
    """Texts in code font, for a cell of a table."""
    return " ".join("`" + " ".join(text.replace("|", "/").replace("`", " ").split()) + "`" for text in texts)
