"""Draw the two pictures of theory/README.md:  `python theory/lab/pictures.py`  (extra `plot`)"""

import sys
from pathlib import Path

import torch

try:
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("error: the pictures need matplotlib: pip install -e '.[plot]'")

sys.path.append(str(Path(__file__).parents[1]))  # for the closed forms, beside the theory

import closed_forms as cf

THEORY = Path(__file__).parents[1]
POLICIES = {  # probabilities and which tokens are rewarded
    "a rare right token": ([0.6, 0.3, 0.06, 0.04], [1, 0, 1, 0]),
    "the likeliest wrong": ([0.6, 0.3, 0.06, 0.04], [0, 1, 1, 0]),
    "all tokens right": ([0.6, 0.3, 0.06, 0.04], [1, 1, 1, 1]),
    "only the likeliest right": ([0.6, 0.3, 0.06, 0.04], [1, 0, 0, 0]),
    "collapsed": ([0.97, 0.02, 0.006, 0.004], [1, 1, 1, 0]),
}


def draw_crossing() -> None:
    """dH+ and dH- against T; dH- suppresses the tokens that are not rewarded."""
    T = torch.logspace(-0.7, 1.3, 200, dtype=torch.float64)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, layout="constrained")
    for name, (p, w) in POLICIES.items():
        z, w = torch.tensor(p, dtype=torch.float64).log(), torch.tensor(w, dtype=torch.float64)
        rows = z.expand(len(T), -1), w.expand(len(T), -1)
        (line,) = axes[0].plot(T, cf.dh_positive(*rows, T), label=name)
        crossing = cf.crossing_temperature(z, w).item()
        if T[0] < crossing < T[-1]:
            axes[0].plot(crossing, 0, "o", color=line.get_color())
        if (w == 0).any():
            axes[1].plot(T, cf.dh_negative(rows[0], 1 - rows[1], T), color=line.get_color())
    for axis, title in zip(
        axes, ("dH+: rewarded samples reinforced", "dH-: the others suppressed"), strict=True
    ):
        axis.axhline(0, color="black", lw=0.6)
        axis.set(xscale="log", xlabel="sampling temperature T", title=title)
    axes[0].set_ylabel("dH / d eta, nats")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(THEORY / "crossing.png", dpi=110)


def draw_simplex(n: int = 300) -> None:
    """The crossing temperature over all policies of three tokens, two of them rewarded."""
    right, upper = torch.meshgrid(*[(torch.arange(n, dtype=torch.float64) + 0.5) / n] * 2, indexing="xy")
    inside = right + upper < 1  # p = (right, upper, the rest); the rest is the wrong token
    p = torch.stack([right, upper, 1 - right - upper], -1)[inside]
    crossing = cf.crossing_temperature(
        p.log(), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64).expand_as(p)
    )
    shown = torch.full(right.shape, torch.nan, dtype=torch.float64)
    shown[inside] = crossing.clamp(0.1, 10).log10()
    figure, axis = plt.subplots(figsize=(5.4, 4.2), layout="constrained")
    mesh = axis.pcolormesh(right, upper, shown, cmap="coolwarm", vmin=-1, vmax=1)
    labels = axis.contour(right, upper, shown, levels=[0.08, 0.3, 0.6], colors="black", linewidths=0.7)
    axis.clabel(labels, fmt=lambda level: f"T = {10**level:.1f}", fontsize=8)
    axis.set(
        xlabel="probability of the first right token",
        ylabel="probability of the second right token",
    )
    axis.set_title("T above which reinforcing rewarded samples raises entropy", fontsize=10)
    bar = figure.colorbar(mesh, ticks=[-1, -0.5, 0, 0.5, 1])
    bar.set_ticklabels(["always", "0.3", "1", "3", "never"])
    figure.savefig(THEORY / "simplex.png", dpi=110)


if __name__ == "__main__":
    draw_crossing()
    draw_simplex()
    print(f"crossing.png and simplex.png are in {THEORY}")
