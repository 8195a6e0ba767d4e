"""theory/knob.html: the mathematics of the page, run with node, against closed_forms.py and scope_rl.py."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import closed_forms as cf
import limits
from entropy import token_entropy
from scope_rl import scope_temperature

PAGE = Path(__file__).parents[1] / "theory" / "knob.html"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(
    NODE is None, reason="node is missing: the numbers of theory/knob.html were NOT checked"
)

STEPS = 40
DRIVER = """
const cases = JSON.parse(require("fs").readFileSync(0, "utf8"));
const answers = cases.map(({ z, w, T, eta, loop }) => [theoremNumbers(z, w, T, eta), loopNumbers(z, w, loop)]);
console.log(JSON.stringify(answers, (_, value) => (Number.isFinite(value) || typeof value !== "number" ? value : String(value))));
"""


def script() -> str:
    """The page's one script."""
    (found,) = re.findall(r"<script>\n(.*?)</script>", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return found


def page_numbers(source: str, cases: list[dict]) -> list:
    """What the page would show for these cases: the numbers of its first tab and of its second, a pair a case."""
    run = subprocess.run([NODE, "-e", source + DRIVER], input=json.dumps(cases), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    """200 random policies, peaked and flat, of 2 to 8 tokens, among them degenerate ones; and a loop for each."""
    generator = torch.Generator().manual_seed(11)

    def uniform(low, high):
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

    def integer(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    found = []
    for i in range(200):
        V = integer(2, 8)
        z = torch.randn(V, generator=generator, dtype=torch.float64) * 10 ** uniform(-1, 0.7)
        w = torch.randint(2, (V,), generator=generator)
        w[integer(0, V - 1)] = 1
        if i % 10 == 1:
            z[:] = 0.0  # uniform
        if i % 10 == 2:
            z[0] = z.max() + uniform(10, 30)  # nearly certain
        if i % 10 == 3:
            w[:] = 1  # all right, none wrong
        if i % 10 == 4:
            w[:] = 0
            w[integer(0, V - 1)] = 1  # one right
        if i % 10 == 5:
            z[w == 1] = 0.3  # the right ones equally likely
        if i == 0:
            w[:] = 0  # none right
        loop = {
            "tail": [0, 0, 5, 50][i % 4], "positives": bool(integer(0, 1)), "pull": uniform(0, 0.05), "steps": STEPS,
            "start": uniform(0, 1.3), "target": uniform(0.1, 1), "gain": uniform(0.25, 6), "minimum": uniform(0.5, 1),
            "maximum": uniform(1, 3), "integralGain": uniform(0, 0.1) * integer(0, 1), "integralBand": uniform(0.05, 0.3),
            "eta": uniform(0.1, 1),
        }  # fmt: skip
        found.append(
            {"z": z.tolist(), "w": w.tolist(), "T": 10 ** uniform(-0.7, 1), "eta": 10 ** uniform(-2, 1), "loop": loop}
        )
    return found


def close(ours, theirs) -> bool:
    """Equal to 1e-9, absolutely or relatively; not a number where the other is not one."""
    ours, theirs = torch.as_tensor(ours, dtype=torch.float64), torch.as_tensor(theirs, dtype=torch.float64)
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9, equal_nan=True)


def number(value) -> float:
    return float(value)  # "NaN" and "Infinity" travel as text


def check_theorem(case: dict, page: dict) -> None:
    """Every number of the first tab."""
    z, w = (torch.tensor(case[name], dtype=torch.float64) for name in ("z", "w"))
    T, eta, p = case["T"], case["eta"], torch.softmax(z, -1)
    up, down = cf.sampled(z, w, T) - p, p - cf.sampled(z, 1 - w, T)
    expected = {
        "H": token_entropy(z), "p": p, "q": cf.sampled(z, w, T), "passRate": limits.pass_rate(z, w, T),
        "dhPositive": cf.dh_positive(z, w, T), "dhPositiveDt": cf.dh_positive_dt(z, w, T), "hotLimit": cf.dh_positive(z, w, torch.inf),
        "dhNegative": cf.dh_negative(z, 1 - w, T), "dhObjective": cf.dh_objective(z, w, T),
        "linearPositive": eta * cf.dh_positive(z, w, T), "linearNegative": eta * cf.dh_negative(z, 1 - w, T),
        "realPositive": token_entropy(z + eta * up) - token_entropy(z),
        "realNegative": token_entropy(z + eta * down) - token_entropy(z),
    }  # fmt: skip
    assert page.keys() == expected.keys() | {"crossing", "watershed"}
    for name, value in expected.items():
        shown = [number(one) for one in page[name]] if name in ("p", "q") else number(page[name])
        assert close(shown, value), (name, shown, value)

    # At the watershed g = gbar, and it is a probability above exp(-H): the lemma says that there is only one.
    c, (g, gbar), H = page["watershed"], cf.sensitivity(z), token_entropy(z).item()
    assert close(c * (math.log(c) + H), gbar)
    assert math.exp(-H) <= c * (1 + 1e-9)
    assert ((g > gbar) == (p > c))[(g - gbar).abs() > 1e-9].all()

    # The crossing is closed_forms' own, unless the curve is flat at zero, where rounding decides.
    crossing, theirs = number(page["crossing"]), cf.crossing_temperature(z, w).item()
    ends = cf.dh_positive(z.expand(2, -1), w.expand(2, -1), torch.tensor([1e-3, 1e6], dtype=torch.float64))
    if ends.abs().min() > 1e-12:  # neither flat nor, with no token right, NaN
        assert close(crossing, theirs) or cf.dh_positive(z, w, crossing).abs() < 1e-15, (crossing, theirs)


def with_tail(case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy of the second tab: more wrong tokens, which share 2%."""
    z, w = (torch.tensor(case[name], dtype=torch.float64) for name in ("z", "w"))
    n = case["loop"]["tail"]
    p = torch.cat([0.98 * torch.softmax(z, -1), torch.full((n,), 0.02 / max(n, 1), dtype=torch.float64)])
    return (p.log(), torch.cat([w, torch.zeros(n, dtype=torch.float64)])) if n else (z, w)


def check_loop(case: dict, page: dict) -> None:
    """Every number of the second tab."""
    o, (z, w) = case["loop"], with_tail(case)
    f, df = (cf.dh_positive, cf.dh_positive_dt) if o["positives"] else (cf.dh_objective, cf.dh_objective_dt)
    assert page.keys() == {"found", "balance", "turning", "peak", "rest", "run"}

    # The run, with the rule that train.py uses.
    H, integral, run = o["start"], 0.0, {"H": [o["start"]], "T": []}
    for _ in range(o["steps"]):
        T, integral = scope_temperature(
            H, integral, target=o["target"], minimum=o["minimum"], maximum=o["maximum"], gain=o["gain"],
            integral_gain=o["integralGain"], integral_band=o["integralBand"],
        )  # fmt: skip
        H = min(max(H + o["eta"] * (f(z, w, T).item() - o["pull"]), 0.0), math.log(len(z)))
        run["T"].append(T)
        run["H"].append(H)
    assert page["run"].keys() == run.keys()
    assert close(page["run"]["T"], run["T"]), "T"
    assert close(page["run"]["H"], run["H"]), "H"

    # The balances are where the curve meets the pull, all of them, and on the side that they say.
    grid = 0.1 * 1000 ** (torch.arange(121, dtype=torch.float64) / 120)
    rows = z.expand(121, -1), w.expand(121, -1)
    curve = f(*rows, grid)
    above = curve >= o["pull"]
    places = (above[1:] != above[:-1]).nonzero()[:, 0].tolist()
    assert len(page["found"]) == len(places)
    for one, i in zip(page["found"], places, strict=True):
        assert grid[i] <= one["T"] <= grid[i + 1]
        assert abs(f(z, w, one["T"]).item() - o["pull"]) < 1e-12
        assert one["rising"] == above[i + 1].item()
    balance = next((one["T"] for one in page["found"] if one["rising"]), math.nan)
    assert close(number(page["balance"]), balance)

    # The rest: the rule asks for the balance there, or the integral does.
    rest = number(page["rest"])
    if not o["minimum"] <= balance <= o["maximum"]:
        assert math.isnan(rest)
    elif o["integralGain"]:
        assert rest == o["target"]
    else:
        options = {"target": o["target"], "minimum": o["minimum"], "maximum": o["maximum"], "gain": o["gain"]}
        assert close(scope_temperature(rest, 0.0, **options)[0], balance)

    # The turning point is on top of the curve, and flat.
    turning, top = number(page["turning"]), curve.argmax().item()
    assert close(number(page["peak"]), f(z, w, min(turning, 100.0)))
    assert number(page["peak"]) >= curve.max().item() - 1e-9
    if curve.max() - curve.min() > 1e-12 and 0 < top < 120:
        assert grid[top - 1] <= turning <= grid[top + 1]
        assert abs(df(z, w, turning).item()) * turning < 1e-9
    elif top == 120 and curve[-1] - curve[-2] > 1e-12:
        assert turning == math.inf


def test_the_numbers_of_the_page(cases):
    kinds = {"crosses": 0, "never": 0, "always": 0, "balanced": 0, "not balanced": 0, "turns": 0, "rests": 0}
    for case, (theorem, loop) in zip(cases, page_numbers(script(), cases), strict=True):
        check_theorem(case, theorem)
        check_loop(case, loop)
        crossing = number(theorem["crossing"])
        kinds["crosses"] += 0 < crossing < math.inf
        kinds["never"] += crossing == math.inf
        kinds["always"] += crossing == 0
        kinds["balanced" if loop["found"] else "not balanced"] += 1
        kinds["turns"] += 0.1 < number(loop["turning"]) < math.inf
        kinds["rests"] += not math.isnan(number(loop["rest"]))
    assert min(kinds.values()) >= 10, kinds  # or the test would pass by seeing little


MUTANTS = [  # a text of the page that occurs once, and what it is made
    ("(value - meanF) * (h[a] - meanH)", "value * (h[a] - meanF)"),
    ("value - top - logZ", "value - logZ"),
    ("-expectation(policy(z), logPolicy(z))", "-expectation(policy(z), logPolicy(z)) / Math.LN2"),
    ("x + Math.log(w[a])", "x + w[a]"),
    ("Math.exp(value) * (value + H)", "Math.exp(value) * value"),
    ("gbar: expectation(policy(z), g)", "gbar: 0"),
    ("return gbar - expectation(sampled(z, w, T), g)", "return expectation(sampled(z, w, T), g) - gbar"),
    ("sensitivity(z).g, logPolicy(z)) / T ** 2", "sensitivity(z).g, logPolicy(z)) / T"),
    ("w[a] * (value - gbar)", "w[a] * value"),
    ("objective(z, w), logPolicy(z)) / T ** 2", "objective(z, w), policy(z)) / T ** 2"),
    ("passRate = (z, w, T) => expectation(policy(z, T), w)", "passRate = (z, w, T) => expectation(policy(z), w)"),
    ("value / sum(w)", "value / w.length"),
    ("if (dhPositive(z, w, high) < 0) return Infinity;", ""),
    ("Math.exp(logT)) < 0", "Math.exp(logT)) < 1e-7"),
    ("Math.exp(u - H) * u < gbar", "Math.exp(u - H) < gbar"),
    ("value + sign * eta * (q[a] - p[a])", "value + sign * eta * q[a]"),
    ("entropy(step(z, wrong, T, eta, -1))", "entropy(step(z, wrong, T, eta, 1))"),
    ("x + Math.log(1 - mass)", "x"),
    ("above = T => change(T) >= pull", "above = T => change(T) >= 1.0001 * pull"),
    ("slope(T) > 0, GRID", "slope(T) > 1e-6, GRID"),
    ("wanted = 1 + gain * error + I", "wanted = 1 + gain * error"),
    ("T === wanted && ", ""),
    (" && Math.abs(error) <= integralBand", ""),
    ("I + integralGain * error : I", "I + integralGain * error : 0"),
    ("target - (balance - 1) / gain", "target - balance / gain"),
    ("eta * (change(T) - pull), 0), most", "eta * (change(T) - pull), 0), 1"),
    ("found.find(one => one.rising)", "found.find(one => !one.rising)"),
]  # fmt: skip


@pytest.mark.parametrize(("right", "wrong"), MUTANTS)
def test_a_wrong_formula_is_noticed(cases, right, wrong):
    assert script().count(right) == 1
    some = cases[:50]
    with pytest.raises((AssertionError, ValueError)):
        for case, (theorem, loop) in zip(some, page_numbers(script().replace(right, wrong), some), strict=True):
            check_theorem(case, theorem)
            check_loop(case, loop)


def experiment(index: int, **changes) -> dict:
    """One of the second tab's experiments, with the sliders as changed: the numbers, with the last H and T."""
    change = json.dumps({"integralBand": 0.1, "eta": 0.5, "steps": 300} | changes)
    source = f"""{script()}
    const o = {{ ...PUBLISHED, ...EXPERIMENTS[{index}][1], ...{change} }};
    const {{ run, ...n }} = loopNumbers(FOUR.map(Math.log), [1, 1, 1, 1], {{ ...o, tail: TAILS[o.tail] }});
    console.log(JSON.stringify({{ ...n, H: run.H.at(-1), T: run.T.at(-1), target: o.target }}));"""
    return json.loads(subprocess.run([NODE, "-e", source], capture_output=True, text=True, check=True).stdout)


def test_the_experiments_show_what_they_say():
    """Sentence by sentence, what the page says of its five experiments."""
    published, doubled = experiment(0), experiment(0, gain=2)
    assert published["H"] == pytest.approx(published["target"] - (published["balance"] - 1), abs=1e-3)
    assert published["target"] - doubled["H"] == pytest.approx((published["target"] - published["H"]) / 2, abs=1e-3)
    clipped, wider = experiment(1), experiment(1, maximum=1.5)
    assert clipped["balance"] > 1.2 and clipped["T"] == 1.2 and clipped["H"] == 0.0
    assert wider["H"] == pytest.approx(wider["rest"], abs=1e-3) and wider["H"] > 0
    integral, without, asleep = experiment(2), experiment(2, integralGain=0), experiment(2, gain=1, start=0)
    assert integral["H"] == pytest.approx(0.5, abs=1e-3)
    assert without["H"] == pytest.approx(0.5 - (without["balance"] - 1) / 2, abs=1e-3)
    assert asleep["H"] == pytest.approx(0.5 - (asleep["balance"] - 1), abs=1e-3) and asleep["H"] < 0.4
    hot = experiment(3)
    assert hot["balance"] < hot["turning"] < 3 and hot["T"] == 3 and hot["H"] == 0.0
    assert 1.7 < hot["turning"] < 1.75
    recovered = experiment(3, maximum=1.7)
    assert recovered["H"] == pytest.approx(recovered["rest"], abs=1e-3) and recovered["rest"] > 0
    right, over_all = experiment(4), experiment(4, positives=False)
    assert right["H"] == pytest.approx(right["rest"], abs=1e-3)
    assert over_all["balance"] is None and over_all["peak"] < 0.05 and over_all["H"] == 0.0


def test_the_page_is_one_file_without_network():
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 500
    assert not re.search(r"https?:|//cdn|@import|url\((?!#)|src=|fetch\(|XMLHttpRequest|import ", text)
