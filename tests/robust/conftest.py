"""A model, a task that a random model is rewarded for half of the time, data, and runs to resume."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from robust_helpers import EASY, ROOT, SERVER, SMALL, go

import reward
import rollout


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def home(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    (folder / "easy.py").write_text(EASY)
    rows = [{"question": f"{i}+{i}=", "answer": 2 * i} for i in range(1, 21)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def arguments(home, tmp_path):
    """Four steps on the small model, into the test's own folder."""
    return [
        *SMALL,
        "--model",
        f"{home}/policy",
        "--task",
        f"{home}/easy.py",
        "--output_dir",
        f"{tmp_path}/run",
    ]


@pytest.fixture(scope="session")
def finished(home, tmp_path_factory):
    """Runs that nothing stopped: of four and six steps, and of eight without evaluations."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    line = [*SMALL, "--model", f"{home}/policy", "--task", f"{home}/easy.py"]
    for steps in (4, 6):
        assert go([*line, "--output_dir", folder / str(steps), "--max_steps", steps]) is None
    assert go([*line, "--output_dir", folder / "8", "--max_steps", 8, "--num_eval_problems", 0]) is None
    return folder


@pytest.fixture
def nothing_begins(monkeypatch, tmp_path):
    """An empty folder to be in, without a GPU, where neither a model may be loaded nor anything downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(rollout, "load_policy", lambda *_: pytest.fail("a model is loaded"))
    monkeypatch.setattr(reward, "download", lambda *_: pytest.fail("GSM8K is downloaded"))


@pytest.fixture(scope="session")
def server():
    pytest.importorskip("resource", reason="processes are forked")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "theory" / "tiny")))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SERVER], env=environment, cwd=ROOT, **pipes) as process:
        yield process
        process.stdin.close()
