"""Beat the rule: `python theory/lab/beat.py FILE` runs yours beside those that the lab knows.

FILE is a Python file with a function `rule(entropies, H0)`. It is given the entropies of all steps so
far, in nats a token, and returns T of the next step. The preset `tiny` runs with it from both warm
starts; options of train.py may follow. The other lines are the same seeds in rows.jsonl.
"""

import runpy
import sys
import tempfile
from pathlib import Path

import experiments
import train

KNOWN = "SCOPE", "SCOPE, published rule", "PI on the bonus", "stepwise bonus"


class Own(train.scope_rl.TemperatureRule):
    """The rule of a file."""

    def __call__(self, entropy: float) -> float:
        self.entropies.append(entropy)
        self.temperature = float(self.rule(self.entropies, self.target))
        return self.temperature


def own_row(rule, seed: int, options: list[str]) -> dict:
    """Train with a rule. Returns the row of the run."""
    start = str(train.THEORY / "tiny" / f"start-{seed}")
    with tempfile.TemporaryDirectory() as folder:
        words = ["--preset", "tiny", "--model", start, "--num_eval_problems", "0", *options]
        run = train.set_up(train.parse_config([*words, "--seed", str(seed), "--output_dir", folder]))
        run.rule = Own(run.config.scope_target_entropy)
        run.rule.rule, run.rule.entropies = rule, []
        train.train(run)
        return experiments.summary(Path(folder)) | {"target": run.rule.target}


def show(name: str, row: dict) -> None:
    """Print after how many steps a run settled, how low it fell, how far off it ended, its reward."""
    course, H0 = row["entropies"], row["target"]
    settled = experiments.settling(course, H0, row["steps"])
    low, error = experiments.lowest(course, H0), experiments.error(course, H0)
    print(
        f"{name:21}  settled {settled:3}  lowest {low:.2f} H0  error {error:5.1%}  reward {row['reward']:.3f}"
    )


if __name__ == "__main__":
    file, *options = sys.argv[1:]
    for seed in (0, 1):
        row = own_row(runpy.run_path(file)["rule"], seed, options)
        show(f"yours, seed {seed}", row)
        known = {row["options"]: row for row in experiments.read_rows() if row["seed"] == seed}
        for name in KNOWN:
            words = experiments.EXPERIMENTS[f"rivals-{row['target']}"][name]
            if words in known:
                show(name, known[words])
