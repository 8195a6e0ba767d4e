"""A picture of runs, one over the other:  `python theory/tools/plot.py RUN [RUN ...] [--output FILE]`

It reads the folders that train.py writes. It prints means over the last steps of each run. Then it
draws reward, entropy (the target H0 is a dotted line) and T at each step, and what was measured
before and after training: Pass@1 and the number of distinct right answers. A run that is still going
is drawn as far as it has come. The picture lies beside the first run. It needs matplotlib, the extra
`plot`.
"""

import argparse
import json
import sys
from pathlib import Path

LAST = 20  # steps that the printed means are taken over
TRAINING = {
    "reward": "reward, mean of a step",
    "entropy": "entropy, nats a token",
    "scope_temperature": "T of the auxiliary samples",
}
EVALUATION = {
    "pass@1": "Pass@1 on the test problems",
    "distinct_correct": "distinct right answers a problem",
}
Curves = dict[str, list[tuple[int, float]]]  # a metric's name -> pairs of step and value


def read(folder: Path) -> tuple[Curves, float | None]:
    """The curves of a run, and its target H0. GRPO alone has neither T nor a target.

    A value at step s is of the policy before that step's update. Raises ValueError for no run.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        is_scope = config["algorithm"] == "scope"
        target = config["scope_target_entropy"] if is_scope else None

        # Metrics. Without its line end the last line is still being written.
        lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]
        steps = [json.loads(line) for line in lines]
        curves = {}
        for name in TRAINING:
            if is_scope or name != "scope_temperature":
                curves[name] = [(step["step"], step[name]) for step in steps]

        # Evaluations. A task without test problems has none.
        path = folder / "eval.json"
        evaluations = json.loads(path.read_text()) if path.exists() else {}
        step_of = {"before": 0, "after": len(steps)}
        for name in EVALUATION:
            points = [(step_of[when], means[name]) for when, means in evaluations.items()]
            curves[name] = sorted(points)
        return curves, target
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder} is not a run of train.py: {reason}") from None


def last_means(curves: Curves) -> str:
    """A sentence with the means of entropy, reward and T over the last steps."""
    count = min(LAST, len(curves["entropy"]))
    if count == 0:
        return "no steps yet"
    shown = []
    for name, label in (("entropy", "entropy"), ("reward", "reward"), ("scope_temperature", "T")):
        if name in curves:
            values = [value for _, value in curves[name][-count:]]
            shown.append(f"{label} {sum(values) / count:.3f}")
    return f"means over the last {count} steps: {', '.join(shown)}"


def lay_out(runs: dict[str, tuple[Curves, float | None]]) -> tuple:
    """An empty figure, and its panels by name: training above, evaluation below.

    What no run has gets no panel. Raises ValueError where there is nothing to draw.
    """
    from matplotlib.figure import Figure  # the extra `plot`

    rows = []
    for labels in (TRAINING, EVALUATION):
        names = [name for name in labels if any(curves.get(name) for curves, _ in runs.values())]
        if names:
            rows.append(names)
    if not rows:
        raise ValueError("there is nothing to draw yet")

    figure = Figure(figsize=(12, 3.6 * len(rows)), layout="constrained")
    strips = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    panels = {}
    for names, strip in zip(rows, strips, strict=True):
        axes = strip.subplots(1, len(names), squeeze=False)[0]
        panels |= zip(names, axes, strict=True)
    for name, panel in panels.items():
        panel.set(xlabel="step", ylabel=(TRAINING | EVALUATION)[name])
    return figure, panels


def draw(runs: dict[str, tuple[Curves, float | None]]):
    """A figure of all runs. Each has one colour in all panels."""
    figure, panels = lay_out(runs)
    for i, (label, (curves, target)) in enumerate(runs.items()):
        for name, panel in panels.items():
            points = curves.get(name, [])  # where there are none, the line is only for the legend
            steps, values = [step for step, _ in points], [value for _, value in points]
            line = "o--" if name in EVALUATION else "-"  # nothing is known between before and after
            panel.plot(steps, values, line, color=f"C{i}", label=label)
        if target is not None and "entropy" in panels:
            panels["entropy"].axhline(target, color=f"C{i}", linestyle=":")

    # Evaluations are shown from 0 on, and over all steps so far.
    last_step = max(len(curves["reward"]) for curves, _ in runs.values())
    for name in panels.keys() & EVALUATION.keys():
        panels[name].update_datalim([(0, 0), (last_step, 0)])
        panels[name].autoscale_view()
    some_panel = next(iter(panels.values()))
    figure.legend(*some_panel.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def free_name(run: Path) -> Path:
    """`RUN.png` beside the run, or `RUN-2.png` and so on where such a picture is there already."""
    run = run.resolve()
    path, number = run.parent / f"{run.name}.png", 1
    while path.exists():
        number += 1
        path = run.parent / f"{run.name}-{number}.png"
    return path


def main(argv: list[str]) -> None:
    """The command line. Bad input ends in one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's output_dir")
    parser.add_argument("--output", type=Path, help="the picture; by default a new RUN.png")
    args = parser.parse_args(argv)
    try:
        runs = {str(folder): read(folder) for folder in args.runs}
        for label, (curves, _) in runs.items():
            print(f"{label}: {last_means(curves)}")
        output = args.output or free_name(args.runs[0])
        draw(runs).savefig(output, dpi=110)
    except ImportError:
        sys.exit("error: the picture needs matplotlib: pip install -e '.[plot]'")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"the picture is {output}")


if __name__ == "__main__":
    main(sys.argv[1:])
