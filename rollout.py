"""Rollouts: sampling completions at a temperature per row, and scoring them under the very same policy.

SCOPE needs two kinds of samples of one policy pi: ordinary ones from pi itself, and a few auxiliary ones from

    pi^T(a | s) = softmax(z(s) / T).

`generate` draws both in one call, with one temperature per row, so the auxiliary share costs its rows and no second
decoding pass. `score` then gives log pi(o_t | q, o_<t) and the entropy of pi(. | q, o_<t) for every token drawn, at
temperature 1, which is what the ratio and the entropy control are about.

Layout, for B rows with prompts padded on the left to P tokens and completions padded on the right to T:

    sequences       [B, P + T]   <pad> <pad> prompt ... | completion ... <eos> <pad>
    attention_mask  [B, P + T]     0     0     1    1   |     1      1     1     0
    completion_mask [B, T]                              |     1      1     1     0     the end token is an action
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from entropy import at_least_float32, logprobs_and_entropies

LOGITS_BUDGET = 2**26  # float32 logits held at a time when scoring: 256 MiB, a few times that with their gradients


@dataclass
class Rollout:
    """B sampled completions; the layout is in the module's docstring."""

    sequences: Tensor  # [B, P + T] token ids
    attention_mask: Tensor  # [B, P + T] bool
    completion_mask: Tensor  # [B, T] bool, true up to and including the first end token
    truncated: Tensor  # [B] bool, true where no end token came within the length allowed
    texts: list[str]  # B decoded completions without special tokens


class RowTemperature(LogitsProcessor):
    """Divides row i's logits by its own temperature T_i, so that `generate` samples from softmax(z / T_i)."""

    def __init__(self, temperatures: Tensor) -> None:
        self.temperatures = temperatures[:, None]  # [B, 1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores / self.temperatures  # [B, V]


def format_prompts(tokenizer: PreTrainedTokenizerBase, questions: list[str], instruction: str) -> list[str]:
    """Questions as the model expects them: in its chat template, with thinking off, or as plain text without one."""
    contents = [f"{question}\n\n{instruction}" for question in questions]
    if tokenizer.chat_template is None:
        return [f"{tokenizer.bos_token or ''}{content}\n" for content in contents]
    chats = [[{"role": "user", "content": content}] for content in contents]
    return tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the tokenizer's and those of the model's generation_config."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], temperatures: Tensor,
    max_completion_length: int,
) -> Rollout:  # fmt: skip
    """Sample one completion a prompt, row i from softmax(z / temperatures[i]) and from nothing else.

    A model's generation_config would apply silently (Qwen3's: temperature 0.6, top_k 20, top_p 0.95), and `generate`
    fills from it whatever the caller leaves open. So it is replaced as a whole while sampling.

    Args:
        prompts: B formatted prompts.
        temperatures: `[B]`, above zero.
        max_completion_length: tokens, the end token included.
    """
    ends = end_token_ids(model, tokenizer)
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # pad may equal an end token
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}  # [B, P]
    P = inputs["input_ids"].shape[1]
    sampling = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, use_cache=True,
        max_new_tokens=max_completion_length, eos_token_id=ends, pad_token_id=pad,
    )  # fmt: skip
    models_own, model.generation_config = model.generation_config, sampling
    try:
        per_row = RowTemperature(temperatures.to(model.device))
        sequences = model.generate(**inputs, logits_processor=LogitsProcessorList([per_row]))  # [B, P + T]
    finally:
        model.generation_config = models_own

    completion = sequences[:, P:]  # [B, T]
    is_end = torch.isin(completion, torch.tensor(ends, device=completion.device))
    # By position, not by id: everything before the first end token, and that token, belongs to the completion.
    completion_mask = is_end.cumsum(1) - is_end.long() == 0  # [B, T]
    attention_mask = torch.cat([inputs["attention_mask"].bool(), completion_mask], dim=1)  # [B, P + T]
    kept = [ids[mask].tolist() for ids, mask in zip(completion, completion_mask, strict=True)]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
    return Rollout(sequences, attention_mask, completion_mask, ~is_end.any(1), texts)


def score(model: PreTrainedModel, rollout: Rollout, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the sampled tokens, and entropies of the policy they came from, at temperature 1, in nats.

    Args:
        rows: `[n]`, which completions. Columns that are padding in all of them are left out of the forward pass.

    Returns:
        two `[n, T]` float32 tensors, zero outside `completion_mask`; differentiable where grad is enabled.
    """
    attention = rollout.attention_mask[rows]  # [n, P + T]
    used = attention.any(0).nonzero()[:, 0]
    columns = slice(int(used[0]), int(used[-1]) + 1)  # S of them
    ids, attention = rollout.sequences[rows, columns], attention[:, columns]  # [n, S]
    position_ids = (attention.cumsum(1) - 1).clamp(min=0)  # left padding does not count
    inputs = {"input_ids": ids, "attention_mask": attention.long(), "position_ids": position_ids, "use_cache": False}
    hidden = model.base_model(**inputs).last_hidden_state[:, :-1]  # the state before a token predicts it  [n, S - 1, D]
    mask = rollout.completion_mask[rows]  # [n, T]
    first = rollout.attention_mask.shape[1] - mask.shape[1] - columns.start  # where completions begin
    is_completion = attention & (torch.arange(ids.shape[1], device=ids.device) >= first)  # [n, S]
    predicted, tokens = hidden[is_completion[:, 1:]], ids[is_completion]  # only real tokens: [N, D], [N]
    chunk_size = max(1, LOGITS_BUDGET // model.get_input_embeddings().num_embeddings)
    flat = logprobs_and_entropies(predicted, model.get_output_embeddings(), tokens, chunk_size)  # [N], [N]
    zeros = torch.zeros(mask.shape, dtype=flat[0].dtype, device=mask.device)
    return zeros.masked_scatter(mask, flat[0]), zeros.masked_scatter(mask, flat[1])


def _float32_head(head: torch.nn.Linear, hidden: Tensor) -> Tensor:
    bias = None if head.bias is None else at_least_float32(head.bias)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(at_least_float32(hidden), at_least_float32(head.weight), bias)


@torch.no_grad()
def prepare_policy(model: PreTrainedModel) -> None:
    """Make sampling and scoring see one policy: dropout off, and float32 logits from one output head.

    Autocast would round logits to bfloat16 (steps of 0.125 between 16 and 32) in `generate` as in `score`; the head is
    therefore taken out of it. Its parameters and the saved model are unchanged.

    Raises:
        ValueError: if the model does more to its logits than this head (a soft cap, a scale), which `score` would miss.
    """
    model.eval()
    head = model.get_output_embeddings()
    head.forward = partial(_float32_head, head)
    ids = torch.arange(4, device=model.device)[None]
    ours = head(model.base_model(input_ids=ids).last_hidden_state)
    if not torch.allclose(model(input_ids=ids).logits.float(), ours.float(), atol=1e-3):
        raise ValueError(f"{type(model).__name__} post-processes its logits, which entropy.py does not: choose another")


def set_gradient_checkpointing(model: PreTrainedModel, enabled: bool) -> None:
    """Recompute each layer's activations in the backward pass (for updates), or not (for sampling, with a cache).

    Transformers ties this to training mode, which would also turn dropout on. So only the layers' own flag is set
    here, and every module inside them stays in evaluation mode.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if enabled and not any(layer.gradient_checkpointing for layer in layers):  # by its newer name where there is one
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    for layer in layers:
        layer.training = enabled
