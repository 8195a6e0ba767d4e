"""theory/knob.html: the mathematics of the page, run with node, against closed_forms.py and scope_rl.py."""

import collections
import json
import math
import random
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import closed_forms as cf
from entropy import token_entropy
from scope_rl import TemperatureRule

PAGE = Path(__file__).parents[1] / "theory" / "knob.html"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="no node: theory/knob.html was NOT checked")


def evaluate(expression: str, data=None):
    """The value of a JavaScript expression, after the page's script. In it `data` is what is given here."""
    (script,) = re.findall(r"<script>\n(.*?)</script>", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    source = f"""{script}
    const data = JSON.parse(require("fs").readFileSync(0, "utf8"));
    const asText = value => (typeof value === "number" && !Number.isFinite(value) ? String(value) : value);
    console.log(JSON.stringify({expression}, (_, value) => asText(value)));"""
    run = subprocess.run([NODE, "-e", source], input=json.dumps(data), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def random_cases() -> list[dict]:
    """240 random policies, peaked and flat, of 2 to 8 tokens, among them degenerate ones; and a loop for each."""
    rng, cases = random.Random(11), []
    for i in range(240):
        V, scale = rng.randint(2, 8), 10 ** rng.uniform(-1, 0.7)
        z, w = [rng.gauss(0, scale) for _ in range(V)], [rng.randint(0, 1) for _ in range(V)]
        w[rng.randrange(V)] = 1
        degenerate = {
            1: ([0.0] * V, w),  # uniform
            2: ([max(z) + rng.uniform(10, 30), *z[1:]], w),  # nearly certain
            3: (z, [1] * V),  # all right, none wrong
            4: (z, [1] + [0] * (V - 1)),  # one right
            5: ([0.3 if right else value for value, right in zip(z, w, strict=True)], w),  # the right ones equally likely
            100: (z, [0] * V),  # none right
        }  # fmt: skip
        z, w = degenerate.get(i if i == 100 else i % 10, (z, w))
        loop = {
            "tail": [0, 0, 5, 50][i % 4], "positives": 1 in w and rng.random() < 0.5, "pull": rng.uniform(0, 0.05), "steps": 40,
            "start": rng.uniform(0, 1.3), "target": rng.uniform(0.1, 1), "gain": rng.uniform(0.25, 6), "eta": rng.uniform(0.1, 1),
            "integralGain": rng.uniform(0, 0.4) * rng.randint(0, 1), "minimum": rng.uniform(0.5, 1), "maximum": rng.uniform(1, 3),
        }  # fmt: skip
        T, eta = 10 ** rng.uniform(-0.7, 1), 10 ** rng.uniform(-2, 1)
        cases.append({"z": z, "w": w, "T": T, "eta": eta, "loop": loop})
    return cases


def close(ours, theirs) -> bool:
    """Equal to 1e-9, absolutely or relatively; not a number where the other is not one."""
    ours, theirs = torch.as_tensor(ours, dtype=torch.float64), torch.as_tensor(theirs, dtype=torch.float64)
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9, equal_nan=True)


def check_theorem(case: dict, page: dict) -> None:
    """Every number of the first tab."""
    z, w = (torch.tensor(case[name], dtype=torch.float64) for name in ("z", "w"))
    T, eta, p = case["T"], case["eta"], torch.softmax(z, -1)
    up, down = cf.sampled(z, w, T) - p, p - cf.sampled(z, 1 - w, T)
    expected = {
        "H": token_entropy(z), "p": p, "q": cf.sampled(z, w, T), "passRate": (torch.softmax(z / T, -1) * w).sum(),
        "dhPositive": cf.dh_positive(z, w, T), "dhPositiveDt": cf.dh_positive_dt(z, w, T), "hotLimit": cf.dh_positive(z, w, torch.inf),
        "dhNegative": cf.dh_negative(z, 1 - w, T), "dhObjective": cf.dh_objective(z, w, T),
        "linearPositive": eta * cf.dh_positive(z, w, T), "linearNegative": eta * cf.dh_negative(z, 1 - w, T),
        "realPositive": token_entropy(z + eta * up) - token_entropy(z),
        "realNegative": token_entropy(z + eta * down) - token_entropy(z),
    }  # fmt: skip
    assert page.keys() == expected.keys() | {"crossing", "watershed"}
    for name, value in expected.items():
        shown = [float(one) for one in page[name]] if name in ("p", "q") else float(page[name])
        assert close(shown, value), (name, shown, value)

    # At the watershed g = gbar, and it is a probability above exp(-H): the lemma says that there is only one.
    c, (g, gbar), H = page["watershed"], cf.sensitivity(z), token_entropy(z).item()
    assert close(c * (math.log(c) + H), gbar)
    assert math.exp(-H) <= c * (1 + 1e-9)
    assert ((g > gbar) == (p > c))[(g - gbar).abs() > 1e-9].all()

    # The crossing is closed_forms' own, unless the curve is flat at zero, where rounding decides.
    crossing, theirs = float(page["crossing"]), cf.crossing_temperature(z, w).item()
    ends = cf.dh_positive(z.expand(2, -1), w.expand(2, -1), torch.tensor([1e-3, 1e6], dtype=torch.float64))
    if ends.abs().min() > 1e-12:  # neither flat nor, with no token right, NaN
        assert close(crossing, theirs) or cf.dh_positive(z, w, crossing).abs() < 1e-15, (crossing, theirs)


def check_loop(case: dict, page: dict) -> None:
    """Every number of the second tab."""
    o = case["loop"]
    z, w = (torch.tensor(case[name], dtype=torch.float64) for name in ("z", "w"))
    if o["tail"]:  # more wrong tokens, which share 2%
        tail = torch.full((o["tail"],), 0.02 / o["tail"], dtype=torch.float64)
        z, w = torch.cat([0.98 * torch.softmax(z, -1), tail]).log(), torch.cat([w, 0 * tail])
    f, df = (cf.dh_positive, cf.dh_positive_dt) if o["positives"] else (cf.dh_objective, cf.dh_objective_dt)

    def new_rule() -> TemperatureRule:
        return TemperatureRule(o["target"], o["gain"], o["integralGain"], o["minimum"], o["maximum"])

    # The run, step by step, with the rule of scope_rl.py.
    rule, H, run = new_rule(), o["start"], {"H": [o["start"]], "T": [1.0]}
    for _ in range(o["steps"]):
        push = f(z, w, rule.temperature).item() - o["pull"]
        run["T"].append(rule(H))
        H = min(max(H + o["eta"] * push, 0.0), math.log(len(z)))
        run["H"].append(H)
    assert close(page["run"]["T"], run["T"])
    assert close(page["run"]["H"], run["H"])

    # The balances are where the curve meets the pull, all of them, and on the side that they say.
    grid = 0.1 * 1000 ** (torch.arange(121, dtype=torch.float64) / 120)
    curve = f(z.expand(121, -1), w.expand(121, -1), grid)
    above = curve >= o["pull"]
    places = (above[1:] != above[:-1]).nonzero()[:, 0].tolist()
    assert len(page["found"]) == len(places)
    for one, i in zip(page["found"], places, strict=True):
        assert grid[i] <= one["T"] <= grid[i + 1]
        assert abs(f(z, w, one["T"]).item() - o["pull"]) < 1e-12
        assert one["rising"] == above[i + 1].item()
    balance = next((one["T"] for one in page["found"] if one["rising"]), math.nan)
    assert close(float(page["balance"]), balance)

    # At rest the rule keeps the balance, step after step. Where the clip keeps it from there, there is no rest.
    rest, rule = float(page["rest"]), new_rule()
    assert math.isnan(rest) != (o["minimum"] <= balance <= o["maximum"])
    if not math.isnan(rest):
        rule.wanted = balance
        assert close([rule(rest), rule(rest)], [balance, balance])

    # The turning point is on top of the curve, and flat.
    turning, top = float(page["turning"]), curve.argmax().item()
    assert close(float(page["peak"]), f(z, w, min(turning, 100.0)))
    assert float(page["peak"]) >= curve.max().item() - 1e-9
    if curve.max() - curve.min() > 1e-12 and 0 < top < 120:
        assert grid[top - 1] <= turning <= grid[top + 1]
        assert abs(df(z, w, turning).item()) * turning < 1e-9
    elif top == 120 and curve[-1] - curve[-2] > 1e-12:
        assert turning == math.inf


def test_the_numbers_of_the_page():
    cases, kinds = random_cases(), collections.Counter()
    both = "[theoremNumbers(o.z, o.w, o.T, o.eta), loopNumbers(o.z, o.w, o.loop)]"
    pages = evaluate(f"data.map(o => {both})", cases)
    for case, (theorem, loop) in zip(cases, pages, strict=True):
        check_theorem(case, theorem)
        check_loop(case, loop)
        crossing = float(theorem["crossing"])
        kinds["crosses" if 0 < crossing < math.inf else f"crosses at {crossing}"] += 1
        kinds["balanced" if loop["found"] else "not balanced"] += 1
        kinds["turns"] += 0.1 < float(loop["turning"]) < math.inf
        kinds["rests"] += float(loop["rest"]) != case["loop"]["target"] and loop["rest"] != "NaN"
        kinds["rests on target"] += loop["rest"] == case["loop"]["target"]
    del kinds["crosses at nan"]  # of the policy with no token right
    assert len(kinds) == 8 and min(kinds.values()) >= 10, kinds  # or the test would pass by seeing little


def test_the_answers_to_the_questions_on_the_theorem():
    """What the first tab says of its own policies, from closed_forms.py alone."""
    policies, tasks = evaluate("[POLICIES, TASKS.theorem]")

    def loaded(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        _, p, w = policies[tasks[i]["policy"]]
        return torch.tensor(p, dtype=torch.float64).log(), torch.tensor(w, dtype=torch.float64)

    def ten_steps(z, w, T) -> list[torch.Tensor]:
        zs = [z]
        for _ in range(10):
            zs.append(zs[-1] + 0.5 * (cf.sampled(zs[-1], w, T) - torch.softmax(zs[-1], -1)))
        return zs

    z, w = loaded(0)  # hot or cold
    assert cf.dh_positive(z, w, 0.3) < 0 and cf.dh_positive(z, w, 1.0) < 0 < cf.dh_positive(z, w, 8.0)
    z, w = loaded(2)  # two equals
    assert cf.dh_positive(z, w, torch.inf) < 0

    z, w = loaded(3)  # ten steps, each from another policy
    zs = ten_steps(z, w, tasks[3]["T"])
    H = [round(token_entropy(one).item(), 3) for one in zs]
    assert (H[0], H[9]) == (0.965, 1.088) and H[10] < H[9] and H[1:10] == sorted(H[1:10])
    assert round(torch.softmax(zs[9], -1)[2].item(), 2) == 0.29
    assert cf.crossing_temperature(zs[9], w) == math.inf  # c raises H by less than a lowers it
    assert round(token_entropy(ten_steps(z, w, 0.5)[-1]).item(), 3) == 0.457

    z, w = loaded(4)  # the wrong ones
    curve = [cf.dh_negative(z, 1 - w, T).item() for T in (0.3, 1.0, 2.0, 5.0, 6.0, 10.0)]
    assert curve == sorted(curve, reverse=True) and curve[3] > 0 > curve[4]


def rests(o) -> bool:
    return o.H[-1] == pytest.approx(o.rest, abs=1e-3)


RUNS = [  # a question on the loop, the sliders that it moves, and what its answer says of the run
    (0, {}, lambda o: rests(o) and o.rest == pytest.approx(0.37, abs=0.005)),
    (1, {}, lambda o: round(o.balance, 2) == 1.33 and o.T[-1] == 1.2 and o.H[-1] == 0),
    (1, {"maximum": 1.4}, lambda o: rests(o) and o.H[-1] > 0.1),
    (2, {}, lambda o: rests(o) and o.rest == 0.5 and min(o.H) > 0.495),
    (2, {"start": 0.05}, lambda o: 1.5 in o.T and max(o.H) < 0.51 and max(T for T, H in zip(o.T, o.H, strict=True) if H > 0.495) < 1.4),
    (2, {"gain": 1}, lambda o: min(o.H) < 0.45),
    (2, {"integralGain": 0}, lambda o: rests(o) and o.H[-1] < 0.45),
    (3, {}, lambda o: o.balance < 1.7 < o.turning < 1.75 and o.T[-1] == 3 and o.H[-1] == 0),
    (3, {"integralGain": 0.2}, lambda o: o.H[-1] == 0),
    (3, {"maximum": 1.7}, lambda o: rests(o) and o.H[-1] > 0.4),
    (4, {}, rests),
    (4, {"positives": False}, lambda o: o.balance == "NaN" and o.peak < 0.05 and o.H[-1] == 0),
]  # fmt: skip


def test_the_answers_to_the_questions_on_the_loop():
    """What the second tab says of its five runs, and of the sliders that it asks to move."""
    settings = "{ ...PUBLISHED, ...TASKS.loop[i].settings, ...moved, eta: 0.5, steps: 300 }"
    run = f"const o = {settings}; return loopNumbers(FOUR.map(Math.log), [1, 1, 1, 1], {{ ...o, tail: TAILS[o.tail] }})"
    pages = evaluate(f"data.map(([i, moved]) => {{ {run} }})", [case[:2] for case in RUNS])
    for (i, moved, holds), page in zip(RUNS, pages, strict=True):
        assert holds(SimpleNamespace(**page, **page["run"])), (i, moved)


def test_the_page_is_one_file_without_network():
    text = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//cdn|@import|url\((?!#)|src=|fetch\(|XMLHttpRequest|import ", text)
