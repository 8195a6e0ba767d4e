"""reward.py against enumeration, Python's own arithmetic, and hostile text."""

import hashlib
import itertools
import json
import os
import time
import types
from pathlib import Path

import numpy as np
import pytest

import gsm8k
import reward
from reward import Problem, answer_reward, final_answer, load_problems, pass_at_k

HOSTILE = [
    "", " ", "\x00", "2+5+7+5; import os", "__import__('os')", "2+5+7+5+", "+2+5+7+5", "2+5+7+5#", "2++5+7+5", "2+5+7+5\n19",
    "٢+٥+٧+٥", "２+５+７+５", "9**9**9**9", "(2+5)+7+5", "02+5+7+5", "2+5+7+5.0", "1e999999", "#### " + "9" * 10**6,
    "9" * 10**6, "1+" * 10**6, "," * 10**6, "1,111" * 10**5, "-" * 10**6, "$" * 10**6, "#### " * 10**5, "\\boxed{" * 10**5,
    "1." * 10**6, "#### nan", "#### inf", "#### 1e400", "####", "\\boxed{}", "\ud800",
]  # fmt: skip


def test_hostile_output_scores_zero_in_linear_time():
    start = time.process_time()
    for text in HOSTILE:
        assert answer_reward(Problem("?", "72"), text) == 0
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("so 48 + 24 = 72.\n#### 72", "72", 1), ("#### $72.00", "72", 1), ("#### 72 clips", "72", 1), ("#### 72", "7", 0),
        ("#### 1,200", "1200", 1), ("#### 1200", "1,200", 1), ("#### -5", "5", 0), ("#### -$5", "-5", 1), ("10-7=3", "3", 1),
        ("#### 0.5", ".5", 1), ("#### 0.50", "0.5", 1), ("\\boxed{72}", "72", 1), ("\\boxed{1} or \\boxed{72}", "72", 1),
        ("The answer is 72.", "72", 1), ("72 or 73", "72", 0), ("#### 71\n#### 72", "72", 1), ("#### 72\nis wrong: 71", "72", 1),
        ("#### 1 2 72", "72", 0), ("no number", "72", 0), ("####72", "72", 1), ("#### Paris.", "paris", 1), ("#### Rome", "Paris", 0),
        ("#### 1/2", "1/2", 1), ("#### 1/3", "1/2", 0), ("pages 3, 4", "34", 0), ("1,2345", "12345", 0),
        ("so 12 is 5+7, 10-7", "7", 1), ("10-7", "-7", 0), ("10 - -7", "-7", 1),
    ],
)  # fmt: skip
def test_final_answers(completion, answer, expected):
    assert answer_reward(Problem("?", answer), completion) == expected


def test_numbers_are_bounded():
    assert reward.number("1" * 40) == int("1" * 40)
    assert reward.number("1" * 41) is None


def test_final_answer_takes_the_mark_before_the_box_before_the_last_number():
    assert final_answer("1 \\boxed{2} #### 3\n4") == "3"
    assert final_answer("1 \\boxed{2} 4") == "2"
    assert final_answer("1, then 4 apples") == "4"


GSM8K = Path(os.environ.get("GSM8K_DIR", Path.home() / ".cache" / "scope_rl"))
GSM8K_FILES = {s: next((p for p in GSM8K.glob(f"*{s}.jsonl") if "gsm8k" in str(p)), None) for s in ("train", "test")}


@pytest.mark.skipif(None in GSM8K_FILES.values(), reason="GSM8K is neither in the cache nor in $GSM8K_DIR")
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_gold_answer_of_gsm8k_is_right_for_itself_and_wrong_for_the_next(split):
    path = GSM8K_FILES[split]
    gold = [json.loads(line)["answer"] for line in path.read_text().split("\n") if line]
    problems = load_problems(path)
    assert len(problems) == len(gold) == {"train": 7473, "test": 1319}[split]
    values = [float(p.answer.replace(",", "").replace("$", "")) for p in problems]
    assert [answer_reward(p, g) for p, g in zip(problems, gold, strict=True)] == [1.0] * len(gold)
    wanted = [float(values[i] == values[i + 1]) for i in range(len(gold) - 1)]
    assert [answer_reward(problems[i + 1], gold[i]) for i in range(len(gold) - 1)] == wanted


def test_pass_at_k_against_enumeration():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(range(n), k))
                share = sum(any(i < c for i in subset) for subset in subsets) / len(subsets)
                assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)
    assert 0 < pass_at_k(10**5, 1, 10) < 1  # large numbers stay exact
    for n, c, k in [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)]:
        with pytest.raises(ValueError, match="pass_at_k needs"):
            pass_at_k(n, c, k)


def test_pass_at_k_is_unbiased():
    """Averaged over draws of n samples it is 1 - (1 - p)^k, where the plug-in 1 - (1 - c/n)^k is not."""
    n, k, p = 6, 4, 0.3
    correct = np.random.default_rng(0).binomial(n, p, 20_000)
    mean = np.mean([pass_at_k(n, int(c), k) for c in correct])
    plug_in = np.mean(1 - (1 - correct / n) ** k)
    assert abs(mean - (1 - (1 - p) ** k)) < 0.01 < abs(plug_in - (1 - (1 - p) ** k))


def test_distinct_correct():
    assert reward.distinct_correct(["1+2", "1+2", " 1+2\n", "2+1", "9"], [1.0, 1.0, 1.0, 1.0, 0.0]) == 2
    assert reward.distinct_correct(["a  b\nc", "a b c", "ab c"], [1.0] * 3) == 2  # how much white space, not whether


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no problems"),
        ("\n\n", "holds no problems"),
        ('{"question": "a", "answer": "1"}\nnot json', "line 2: expected an object"),
        ('{"question": "a"}', "line 1: expected an object"),
        ('{"question": "", "answer": "1"}', "line 1: expected an object"),
        ('{"question": 3, "answer": "1"}', "line 1: expected an object"),
        ('{"question": "a", "answer": "#### "}', "line 1: expected an object"),
        ('{"question": "a", "answer": null}', "line 1: expected an object"),
        ('["a", "1"]', "line 1: expected an object"),
        ("[" * 10**5, "line 1: expected an object"),
        (b'{"question": "a", "answer": "1"}\n{"question": "\xff", "answer": "1"}', "line 2: expected an object"),
        (None, "cannot read the data file"),
    ],
)
def test_bad_data_files_are_named_in_one_line(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        load_problems(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def files(train_file=None, test_file=None):
    """What the task reads of a config."""
    return types.SimpleNamespace(train_file=train_file, test_file=test_file)


def test_data_files_of_ones_own(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"question": f"q{i}\u2028", "answer": i if i % 2 else f"because\n#### {i}"} for i in range(20)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    task = gsm8k.task(files(path))
    assert [len(task.train), len(task.test)] == [18, 2]
    assert task.test[-1] == Problem("q19\u2028", "19")
    path.write_text('{"question": "half of 5?", "answer": 2.5}')
    assert load_problems(path) == [Problem("half of 5?", "2.5")]
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(ValueError, match="one problem"):
        gsm8k.task(files(path))


def test_download_is_checked_and_kept(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text('{"question": "a", "answer": "#### 1"}\n')
    monkeypatch.setenv("SCOPE_RL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gsm8k, "URL", f"file://{tmp_path}/")
    for split in ("train", "test"):  # the wrong content, and no file at all
        with pytest.raises(ValueError, match="cannot download GSM8K"):
            gsm8k.download(split)
    assert not list((tmp_path / "cache").iterdir())
    digest = hashlib.sha256((tmp_path / "train.jsonl").read_bytes()).hexdigest()
    monkeypatch.setitem(gsm8k.SHA256, "train", digest)
    path = gsm8k.download("train")
    (tmp_path / "train.jsonl").unlink()
    assert gsm8k.download("train") == path
    assert load_problems(path) == [Problem("a", "1")]


def test_where_the_problems_of_each_split_come_from(tmp_path, monkeypatch):
    """Files of one's own, GSM8K's two files, each checked against its own hash, or a held-out tenth, rounded up."""
    monkeypatch.setenv("SCOPE_RL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gsm8k, "URL", f"file://{tmp_path}/")
    for name in ("train", "test", "mine", "mine too"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"question": f"{name} {i}", "answer": i}) + "\n" for i in range(11)))
        monkeypatch.setitem(gsm8k.SHA256, name, hashlib.sha256(path.read_bytes()).hexdigest())
    mine, mine_too = str(tmp_path / "mine.jsonl"), str(tmp_path / "mine too.jsonl")
    for paths, train, test in [
        ((None, None), "train", "test"),
        ((None, mine), "train", "mine"),
        ((mine, mine_too), "mine", "mine too"),
    ]:
        task = gsm8k.task(files(*paths))
        assert [p.question for p in task.train] == [f"{train} {i}" for i in range(11)]
        assert [p.question for p in task.test] == [f"{test} {i}" for i in range(11)]
    task = gsm8k.task(files(mine))
    assert [p.answer for p in task.train] == [str(i) for i in range(9)]
    assert [p.answer for p in task.test] == ["9", "10"]
