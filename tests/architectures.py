"""Small random models of many kinds: rotary, learned and no positions, grouped heads, windows, alibi, a recurrence."""

import torch
import transformers
from transformers.models.auto import CONFIG_MAPPING

# fmt: off
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
GROUPED = SMALL | {"num_key_value_heads": 1}
HEAD = GROUPED | {"head_dim": 16}
FEW = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
GPT2 = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
ARCHITECTURES = {  # whose prompts are read once in scoring
    "qwen3": ("qwen3", HEAD | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", GROUPED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "llama": ("llama", SMALL),
    "mistral": ("mistral", GROUPED | {"sliding_window": 4}),
    "gemma3": ("gemma3_text", HEAD | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt2": ("gpt2", GPT2),
    "opt": ("opt", SMALL | {"word_embed_proj_dim": 32, "ffn_dim": 64, "init_std": 0.3, "dropout": 0.0}),
    "neox": ("gpt_neox", SMALL),
    "phi3": ("phi3", GROUPED),
    "smollm3": ("smollm3", GROUPED | {"no_rope_layers": [1, 0]}),
    "olmo": ("olmo", SMALL),
    "falcon": ("falcon", FEW | {"num_attention_heads": 2, "alibi": True}),
    # Those that cannot: without position ids, with a recurrent state.
    "bloom": ("bloom", FEW | {"n_head": 2, "hidden_dropout": 0.0}),
    "mamba": ("mamba", FEW | {"state_size": 4}),
    # One that is not causal.
    "looking ahead": ("gemma3_text", HEAD | {"use_bidirectional_attention": True}),
}
# fmt: on
NAMES = list(ARCHITECTURES)
SHARED, PLAIN = NAMES[:12], NAMES[12:14]


def make_model(name: str, tokenizer, **changes) -> transformers.PreTrainedModel:
    """A random model of an architecture above, or a type of transformers; keyword arguments go to its config."""
    torch.manual_seed(0)
    kind, options = ARCHITECTURES.get(name, (name, {}))
    names = "eos_token_id", "pad_token_id", "bos_token_id"  # the last is None
    ids = {name: getattr(tokenizer, name) for name in names}
    config = CONFIG_MAPPING[kind](vocab_size=len(tokenizer), **ids, **options | changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()
