"""Statistics of a few runs, and Markdown: what the tables of this folder are made with.

"±" is half of a 95% interval. It is Student's t over the seeds, or it is made by Newey and West's rule
where the values are the steps of one run, which resemble their neighbours.
"""

import math

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
    """`mean ± half of the interval`, to two digits of that, but at most four decimals."""
    mean, half = interval(values)
    if math.isnan(half) or half < 1e-9:
        return f"{mean:{sign}.3f}"
    digits = min(4, max(0, 1 - math.floor(math.log10(half))))
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"


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
