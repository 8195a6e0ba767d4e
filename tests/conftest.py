"""Small random models and their tokenizer, for tests that need no training."""

import pytest
import torch
import transformers

import train

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(train.TINY / "start-0")


@pytest.fixture
def random_model(tokenizer):
    """A function that makes a random Qwen3 of two layers; keyword arguments go to its config."""

    def make(**changes) -> transformers.Qwen3ForCausalLM:
        torch.manual_seed(0)
        config = transformers.Qwen3Config(
            **{
                "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64,
                "initializer_range": 0.3, "tie_word_embeddings": True, "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
            }
            | changes
        )  # fmt: skip
        return transformers.Qwen3ForCausalLM(config).eval()

    return make


@pytest.fixture
def model_folder(random_model, tokenizer, tmp_path):
    """A folder that `--model` takes: a random model with its tokenizer."""
    folder = tmp_path / "model"
    random_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
