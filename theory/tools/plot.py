"""A picture of runs, one over the other:  `python theory/lab/plot.py RUN [RUN ...] [--output FILE]`

Draws reward, entropy with the target H0 as a dotted line, T, and Pass@1 where it was evaluated, from
the folders that train.py writes; a run that is still going is drawn as far as it has come. The
picture is put beside the first run. Needs matplotlib, the extra `plot`.
"""

import argparse
import json
import sys
from pathlib import Path

PANELS = {
    "reward": "reward, share of right completions",
    "entropy": "entropy, nats a token",
    "scope_temperature": "T of the auxiliary samples",
    "pass@1": "Pass@1 on the test problems",
}
Curves = dict[str, list[tuple[int, float]]]  # a panel's name -> pairs of step and value


def read(folder: Path) -> tuple[Curves, float | None]:
    """The curves of a run, and H0 if it has a target (GRPO has neither T nor H0). A metric of step s
    is of the policy before that step's update. Raises ValueError if the folder is no run."""
    try:
        config = json.loads((folder / "config.json").read_text())
        lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]  # the last has no end yet
        steps = [json.loads(line) for line in lines]
        evaluations = json.loads((folder / "eval.json").read_text())
        is_scope = config["algorithm"] == "scope"
        names = ("reward", "entropy", "scope_temperature") if is_scope else ("reward", "entropy")
        curves = {name: [(step["step"], step[name]) for step in steps] for name in names}
        when = {"before": 0, "after": steps[-1]["step"] if steps else 0}  # else "step 50", for example
        evaluated = [(name, means) for name, means in evaluations.items() if means]
        points = [(when[name] if name in when else int(name.split()[1]), means["pass@1"]) for name, means in evaluated]
        curves["pass@1"] = sorted(points)
        return curves, config["scope_target_entropy"] if is_scope else None
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{folder} is not a run of train.py: {type(error).__name__}: {error}") from None


def draw(runs: dict[str, tuple[Curves, float | None]]):
    """A figure of four panels; each run has its colour in all of them."""
    from matplotlib.figure import Figure  # the extra `plot`

    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = dict(zip(PANELS, figure.subplots(2, 2).flat, strict=True))
    for i, (label, (curves, target)) in enumerate(runs.items()):
        color = f"C{i}"
        for name, pairs in curves.items():
            marker = "o" if name == "pass@1" else None
            panels[name].plot(*zip(*pairs, strict=True), color=color, marker=marker, label=label)
        if target is not None:
            panels["entropy"].axhline(target, color=color, linestyle=":")
    for name, panel in panels.items():
        panel.set(xlabel="step", ylabel=PANELS[name])
    figure.legend(*panels["entropy"].get_legend_handles_labels(), loc="outside upper center")
    return figure


def main() -> None:
    """Read the command line; bad input ends in one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's output_dir")
    parser.add_argument("--output", type=Path, help="the picture; default: RUN.png, of the first run")
    args = parser.parse_args()
    first = args.runs[0].resolve()
    output = args.output or first.parent / f"{first.name}.png"
    try:
        draw({str(folder): read(folder) for folder in args.runs}).savefig(output, dpi=110)
    except ImportError:
        sys.exit('error: plot.py needs matplotlib: pip install -e ".[plot]"')
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"the picture is {output}")


if __name__ == "__main__":
    main()
