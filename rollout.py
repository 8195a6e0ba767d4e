"""Rollouts: sampling completions at a temperature per row, and scoring them under the same policy.

SCOPE needs samples of a policy pi, and a few of pi^T(a | s) = softmax(z(s) / T). `generate` draws
both in one call: the auxiliary ones cost their rows, and no second decoding pass. `score` gives
log pi(o_t | q, o_<t) and the entropy of pi(. | q, o_<t) of each token, at temperature 1. B rows are
laid out so, and need no attention mask: a causal model's tokens never look at what is on the right.

    sequences         [B, S]   prompt ...   completion ...  <eos>  <pad> <pad>
    completion_mask   [B, S]   0    0   0   1    1    1     1      0     0       <eos> is an action
"""

import re
import warnings
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from entropy import at_least_float32, entropy_of, log_policy, logprobs_and_entropies
from reward import check, explaining

SEGMENT = 64  # tokens between two looks at which rows have ended
LOGITS_BUDGET = 12_000_000  # float32 logits held at a time in scoring: 48 MB, a few times that in all
warnings.filterwarnings("ignore", "`(past_key_values|gradient_)", FutureWarning)  # 5.17's names


def load_policy(name: str, bf16: bool = False, gradient_checkpointing: bool = False):
    """The model, on the GPU if there is one, and its tokenizer, such that `score` sees its policy.

    Weights are float32: updates of 1e-6 would be lost in bfloat16. With `bf16` the body runs in it
    (autocast), but not the head, whose logits of 16 to 32 it would round to steps of 0.125. Dropout
    is off for good, or other policies would be sampled than the one scored; `model.train()` turns on
    gradient checkpointing and no more. Raises ValueError if they cannot be loaded, or if logits are
    not the head's weights times the states (a soft cap, a scale, a bias: `score` knows none)."""
    with explaining(f"cannot load the model {name}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        config = transformers.AutoConfig.from_pretrained(name)
        dropout = [k for k, v in config.to_dict().items() if "drop" in k and isinstance(v, float)]
        config.update(dict.fromkeys(dropout, 0.0))
        options = {"config": config, "dtype": torch.float32, "output_loading_info": True}
        model, info = transformers.AutoModelForCausalLM.from_pretrained(name, **options)
    check(not info["missing_keys"], f"the model {name} lacks weights: {sorted(info['missing_keys'])[:3]}")
    check(tokenizer.eos_token_id is not None, f"the tokenizer of {name} has no end token")
    check(all(w.isfinite().all() for w in model.parameters()), f"weights of {name} are not finite")

    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)  # can return NaN backward (pytorch #196678)
        torch.set_float32_matmul_precision("high")  # TF32, which the output head can do with
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    body, head = model.base_model, model.get_output_embeddings()
    if bf16:
        body.forward = torch.autocast(model.device.type, torch.bfloat16)(body.forward)
        head.register_forward_pre_hook(lambda head, inputs: (at_least_float32(inputs[0]),))
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.arange(4, device=model.device)[None]
    for mode in (True, False):  # evaluation mode last: it stays
        with torch.no_grad():
            logits = model.train(mode)(input_ids=ids, use_cache=False).logits  # [1, 4, V]
            states = body(input_ids=ids, use_cache=False).last_hidden_state
        wanted = at_least_float32(states) @ head.weight.T
        is_plain = torch.allclose(logits.float(), wanted, atol=1e-3)
        check(is_plain, f"logits of {name} are not states times head weights: choose another model")
    return model, tokenizer


@dataclass
class Rollout:
    """B sampled completions; the layout is in the module's docstring."""

    sequences: Tensor  # [B, S] token ids
    completion_mask: Tensor  # [B, S] bool, true up to and including the first end token
    logprobs: Tensor  # [B, S] log pi_old of each token as it was drawn, at temperature 1; 0 outside
    entropies: Tensor  # [B, S] H of the distribution it came from, at temperature 1, nats
    lengths: Tensor  # [B] tokens of prompt and completion together
    truncated: Tensor  # [B] bool, true where no end token came within the length allowed
    texts: list[str]  # B decoded completions without special tokens


def format_prompts(tokenizer: PreTrainedTokenizerBase, questions: list[str], instruction: str) -> list[str]:
    """Questions in the model's chat template, with thinking off, or as plain text without one. What
    is a special token and could end the turn is spelt out. ValueError if the template fails."""
    special = "|".join(re.escape(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special)
    contents = [f"{question}\n\n{instruction}" for question in questions]
    contents = [re.sub(special, lambda token: " ".join(token.group()), content) for content in contents]
    if tokenizer.chat_template is None:
        return [f"{tokenizer.bos_token or ''}{content}\n" for content in contents]
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    chats = ([{"role": "user", "content": content}] for content in tqdm(contents, "prompts", leave=False))
    with explaining("the model's chat template fails"):
        return [tokenizer.apply_chat_template(chat, **options) for chat in chats]


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], temperatures: Tensor,
    max_completion_length: int,
) -> Rollout:  # fmt: skip
    """A completion a prompt, row i from softmax(z / temperatures[i]), T > 0, and nothing else:
    transformers' `generate` fills what its caller leaves open from the model's generation_config
    (Qwen3's: temperature 0.6, top_k 20, top_p 0.95), so that is replaced as a whole while sampling.
    The end token counts in max_completion_length."""
    device, models_own = model.device, model.generation_config
    ends = models_own.eos_token_id  # then all that end a completion
    ends = sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])

    # Each distinct prompt is read once; `which` says where row i's prompt is.
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    which = torch.tensor([distinct[prompt] for prompt in prompts], device=device)  # [B]
    left = {"padding": True, "padding_side": "left", "add_special_tokens": False}
    inputs = tokenizer(list(distinct), return_tensors="pt", **left).to(device)  # [U, P]

    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    try:
        with torch.autocast(device.type, enabled=False):  # outside the body's: keeps the weights it has cast
            sequences, noted = decode(model, inputs, which, temperatures.to(device), max_completion_length)
    finally:
        model.generation_config = models_own

    # By position, not by id: what precedes the first end token, and that token, is the completion.
    P, S = inputs.input_ids.shape[1], sequences.shape[1]
    is_end = torch.isin(sequences[:, P:], torch.tensor(ends, device=device))
    completion_mask = F.pad(is_end.cumsum(1) - is_end.long() == 0, (P, 0))  # [B, S]

    # Turn each row about, so that its padding goes from its left to its right.
    padding = (inputs.attention_mask[which] == 0).sum(1, keepdim=True)  # [B, 1]
    columns = (torch.arange(S, device=device) + padding) % S  # [B, S]
    sequences, completion_mask = sequences.gather(1, columns), completion_mask.gather(1, columns)
    logprobs, entropies = noted.gather(2, columns.expand(2, -1, -1)) * completion_mask
    counts = completion_mask.sum(1)  # [B]
    completions = sequences[completion_mask].cpu().split(counts.tolist())
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    lengths = P - padding[:, 0] + counts
    return Rollout(sequences, completion_mask, logprobs, entropies, lengths, ~is_end.any(1), texts)


class AutocastCache(DynamicCache):
    """Holds keys and values as attention uses them; under autocast Qwen3's keys come in float32."""

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        kind = keys.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else keys.dtype
        return super().update(keys.to(dtype), values.to(dtype), *args, **kwargs)


def decode(model: PreTrainedModel, inputs, which: Tensor, temperatures: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Row i continues prompt which[i]: ids, `[B, P + T]`, padded on the left, and what `Sampler`
    noted, `[2, B, P + T]`. A prompt is read once, for all its rows. Rows that have ended leave
    after each segment; where a cache has no rows (a recurrent model's), there is one segment."""
    config, cache = model.generation_config, AutocastCache(config=model.config)
    kinds = {type(layer) for layer in cache.layers}
    by_rows = kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and not model._is_stateful
    segment, options = (SEGMENT, {"past_key_values": cache}) if by_rows else (length, {})
    ids, mask = inputs.input_ids, inputs.attention_mask  # [U, P]
    if by_rows and ids.shape[1] > 1:  # all but the last token; the one sampled here is not used
        model.generate(ids[:, :-1], attention_mask=mask[:, :-1], max_new_tokens=1, **options)
        cache.batch_select_indices(which)

    sequences, mask = ids[which], mask[which]
    ends = torch.tensor(config.eos_token_id, device=ids.device)
    noted = torch.zeros(2, *sequences.shape, device=ids.device)  # log pi_old, H  [2, B, P]
    rows, left = torch.arange(len(which), device=ids.device), length  # rows that go on  [b]
    while len(rows) > 0 and left > 0:
        sampler = Sampler(temperatures[rows])
        options |= {"max_new_tokens": min(segment, left), "logits_processor": [sampler]}
        new = model.generate(sequences[rows], attention_mask=mask, **options)[:, sequences.shape[1] :]  # [b, n]
        n, going_on = new.shape[1], ~torch.isin(new, ends).any(1)  # [b]
        sequences, noted = F.pad(sequences, (0, n), value=config.pad_token_id), F.pad(noted, (0, n))
        sequences[rows, -n:], noted[:, rows, -n:] = new, torch.stack(sampler.noted, -1)[..., :n]
        rows, mask, left = rows[going_on], F.pad(mask[going_on], (0, n), value=1), left - n
        if by_rows and not going_on.all():
            cache.batch_select_indices(going_on)
    return sequences, noted


class Sampler:
    """A logits processor that draws from softmax(z / T), and notes log p and H, at temperature 1."""

    def __init__(self, temperatures: Tensor) -> None:
        self.temperatures = temperatures[:, None]  # [b, 1]
        self.noted: list[Tensor] = []  # [2, b] a token: log pi_old, H

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        p = torch.softmax(logits / self.temperatures, -1)  # [b, V]
        precise = torch.float32 if p.device.type == "mps" else torch.float64  # Apple's has none
        cumulative = p.cumsum(-1, dtype=precise)  # one random number a row; multinomial takes V
        u = torch.rand_like(cumulative[:, :1]) * cumulative[:, -1:]  # [b, 1]
        tokens = torch.searchsorted(cumulative, u, right=True).clamp(max=p.shape[1] - 1)
        log_p = log_policy(logits)  # [b, V]
        self.noted.append(torch.stack([log_p.gather(1, tokens)[:, 0], entropy_of(log_p)]))
        return torch.full_like(logits, -torch.inf).scatter(1, tokens, 0.0)


def score(model: PreTrainedModel, samples: Rollout, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (nats) of completions `rows` `[n]`, at temperature 1: both
    `[n, S]`, float32, zero outside `completion_mask`, and differentiable if grad is enabled."""
    mask, longest = samples.completion_mask[rows], int(samples.lengths[rows].max())  # [n, S]
    ids = samples.sequences[rows, :longest]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [n, longest, D]

    # The state before a token predicts it; only the completions' states meet the output head.
    is_completion = mask[:, 1:longest]
    states, tokens = hidden[:, :-1][is_completion], ids[:, 1:][is_completion]  # [N, D], [N]
    chunk_size = max(1, LOGITS_BUDGET // model.get_input_embeddings().num_embeddings)
    head = model.get_output_embeddings()
    logprobs, entropies = logprobs_and_entropies(states, head, tokens, chunk_size)  # [N], [N]
    zeros = torch.zeros(mask.shape, dtype=logprobs.dtype, device=mask.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropies)
