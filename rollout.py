"""Rollouts: sample completions, each at a temperature of its own, and score them at temperature 1.

SCOPE needs samples of a policy pi, and a few of pi^T(a | s) = softmax(z(s) / T). `generate` draws
both in one call. `score` gives each token's log pi(o_t | q, o_<t) and the entropy of its
distribution, at temperature 1, with a gradient. B samples lie in memory like this:

    prompts          [P, L]   <pad> <pad>  prompt         each distinct prompt once
    completions      [B, C]   completion  <eos> <pad>     row i answers prompt owner[i]
    completion_mask  [B, C]     1   1   1    1     0      the end token is an action too

Who draws the tokens? transformers' `generate` runs the model, keeps its cache and stops at end
tokens. It knows one temperature for a whole batch, though, and keeps no log-probabilities. So it is
told to be greedy, and a logits processor, `Sampler`, does the drawing: it picks a token of each row
at the row's own temperature, notes its log p and H, and hands on logits that leave only this token.

Each call of it continues the rows by a segment of 64 tokens. Then those that have ended leave the
batch, so that one long completion does not make all wait. The cache is kept between the calls.
"""

import inspect
import math
import re
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from entropy import at_least_float32, entropy_of, log_policy, logprobs_and_entropies

SEGMENT = 64  # tokens between two looks at which rows have ended
LOGITS_BUDGET = 12_000_000  # logits held at a time in scoring: 48 MB, a few times that in all
# transformers 5.17 warns of argument names that it is about to change.
warnings.filterwarnings("ignore", "`(past_key_values|(is_)?gradient_)", FutureWarning)


@dataclass
class Rollout:
    """B sampled completions. The layout is in the module's docstring."""

    prompts: Tensor  # [P, L] token ids, padded on the left
    prompt_mask: Tensor  # [P, L] 1 for tokens, 0 for padding
    owner: Tensor  # [B] the prompt that each row answers
    completions: Tensor  # [B, C] token ids, padded on the right
    completion_mask: Tensor  # [B, C] bool, true up to and including the first end token
    logprobs: Tensor  # [B, C] log pi_old of each token at temperature 1, from sampling; 0 outside
    entropies: Tensor  # [B, C] H of the distribution it came from, at temperature 1, nats
    truncated: Tensor  # [B] bool, true where no end token came within the length allowed
    texts: list[str]  # B completions without special tokens
    seconds: float  # what sampling took


# --- Sampling
class Sampler:
    """Draws a token of each row from softmax(z / T), and notes its log p and H at temperature 1.

    It inverts the distribution function: the token is the first one at which the cumulative
    probability exceeds a uniform random number. `generate` calls it once for each new token.
    """

    def __init__(self, temperatures: Tensor, uniforms: Tensor) -> None:
        self.temperatures = temperatures[:, None]  # [b, 1]
        self.uniforms = uniforms  # [b, n] in [0, 1)
        self.noted: list[Tensor] = []  # [2, b] for each token: log pi_old, H

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        # Draw. In float64 the sum of 151,936 probabilities is exact enough.
        p = torch.softmax(logits / self.temperatures, -1)  # [b, V]
        cumulative = p.cumsum(-1, dtype=self.uniforms.dtype)
        place = len(self.noted)
        u = self.uniforms[:, place : place + 1]  # [b, 1]
        total = cumulative[:, -1:]  # 1, up to rounding
        tokens = torch.searchsorted(cumulative, u * total, right=True)
        tokens = tokens.clamp(max=p.shape[1] - 1)

        # Note what the policy says of it at temperature 1, whatever T it was drawn at.
        log_p = log_policy(logits)  # [b, V]
        token_logprobs = log_p.gather(1, tokens)[:, 0]
        note = torch.stack([token_logprobs, entropy_of(log_p)])  # [2, b]
        self.noted.append(note)

        # Leave only this token for the greedy choice of `generate`.
        nothing = torch.full_like(logits, -torch.inf)
        return nothing.scatter(1, tokens, 0.0)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of all tokens that end a completion: the model's and the tokenizer's."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({*ids, tokenizer.eos_token_id} - {None})


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list[str], device) -> tuple:
    """Ids and mask `[P, L]` of distinct prompts, padded on the left; whose each row is, `[B]`."""
    distinct = list(dict.fromkeys(prompts))
    numbers = {prompt: i for i, prompt in enumerate(distinct)}
    owner = torch.tensor([numbers[prompt] for prompt in prompts])
    options = {"padding": True, "padding_side": "left", "add_special_tokens": False}
    inputs = tokenizer(distinct, return_tensors="pt", **options)
    return inputs.to(device), owner.to(device)


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str],
    temperatures: Tensor, max_completion_length: int, uniforms: Tensor | None = None,
) -> Rollout:  # fmt: skip
    """Sample one completion of each prompt: row i from exactly softmax(z / temperatures[i]).

    Equal prompts are read once. The end token counts in max_completion_length. `uniforms` are the
    random numbers in [0, 1), `[B, max_completion_length]`; by default they are drawn here.
    """
    started = time.perf_counter()
    device, own_config = model.device, model.generation_config
    if uniforms is None:
        uniforms = torch.rand(len(prompts), max_completion_length, dtype=torch.float64)
    ends = end_tokens(model, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])
    inputs, owner = tokenize(tokenizer, prompts, device)

    # `generate` fills what its caller leaves open from the model's own generation_config (Qwen3's
    # has temperature 0.6, top_k 20, top_p 0.95). So that is put aside as a whole while sampling.
    if device.type == "mps":
        uniforms = uniforms.float()  # Apple's GPUs have no float64
    temperatures, uniforms = temperatures.to(device), uniforms.to(device)
    pad = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    try:
        # Where an autocast ends, its cast weights are lost. This outer one keeps the body's.
        with torch.autocast(device.type, enabled=False):
            completions, noted = decode(model, inputs, owner, temperatures, uniforms)
    finally:
        model.generation_config = own_config

    # The completion is all before the first end token, and that token. Padding is known by its
    # place behind that, since its id may be the same.
    is_end = torch.isin(completions, torch.tensor(ends, device=device))  # [B, C]
    ends_before = is_end.cumsum(1) - is_end.long()
    mask = ends_before == 0
    counts = mask.sum(1)
    longest = int(counts.max())
    completions, mask = completions[:, :longest], mask[:, :longest]
    logprobs, entropies = noted[:, :, :longest] * mask

    tokens = completions[mask].cpu().split(counts.tolist())
    return Rollout(
        prompts=inputs.input_ids,
        prompt_mask=inputs.attention_mask,
        owner=owner,
        completions=completions,
        completion_mask=mask,
        logprobs=logprobs,
        entropies=entropies,
        truncated=~is_end.any(1),
        texts=tokenizer.batch_decode(tokens, skip_special_tokens=True),
        seconds=time.perf_counter() - started,
    )


def decode(
    model: PreTrainedModel, inputs, owner: Tensor, temperatures: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Continue prompt owner[i] in row i. Token ids `[B, C]`, and `Sampler`'s notes `[2, B, C]`."""
    B, C = uniforms.shape
    device, config = owner.device, model.generation_config
    ends = torch.tensor(config.eos_token_id, device=device)
    completions = torch.full((B, C), config.pad_token_id, device=device)
    noted = torch.zeros(2, B, C, device=device)

    # Read each prompt once, up to its last token. The token that is sampled here is not used.
    prompts, mask = inputs.input_ids, inputs.attention_mask  # [P, L]
    cache, options, segment = empty_cache(model), {}, C
    if cache is not None:
        options, segment = {"past_key_values": cache}, SEGMENT
        if prompts.shape[1] > 1:
            before = prompts[:, :-1]
            model.generate(before, attention_mask=mask[:, :-1], max_new_tokens=1, **options)
            cache.batch_select_indices(owner)

    sequences, mask = prompts[owner], mask[owner]  # [B, L]
    rows = torch.arange(B, device=device)  # those that go on  [b]
    start = 0
    while start < C and len(rows) > 0:
        # Continue them by a segment of n tokens.
        stop = min(start + segment, C)
        sampler = Sampler(temperatures[rows], uniforms[rows, start:stop])
        options |= {"max_new_tokens": stop - start, "logits_processor": [sampler]}
        length = sequences.shape[1]
        sequences = model.generate(sequences, attention_mask=mask, **options)
        new = sequences[:, length:]  # [b, n]
        n = new.shape[1]
        stop = start + n
        completions[rows, start:stop] = new
        notes = torch.stack(sampler.noted, -1)  # [2, b, n]
        noted[:, rows, start:stop] = notes

        # Those that have ended leave the batch and the cache.
        goes_on = ~torch.isin(new, ends).any(1)  # [b]
        rows = rows[goes_on]
        sequences = sequences[goes_on]
        mask = F.pad(mask[goes_on], (0, n), value=1)
        if cache is not None and not goes_on.all():
            cache.batch_select_indices(goes_on)
        start = stop
    return completions, noted


class AutocastCache(DynamicCache):
    """Keeps keys and values in the type that attention computes in.

    Under autocast Qwen3's keys arrive in float32, and a plain cache would double its memory.
    """

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        device = keys.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            keys, values = keys.to(dtype), values.to(dtype)
        return super().update(keys, values, *args, **kwargs)


def empty_cache(model: PreTrainedModel) -> AutocastCache | None:
    """A new cache, or None where its rows cannot be picked and copied (a recurrent model's)."""
    cache = AutocastCache(config=model.config)
    with_rows = DynamicLayer, DynamicSlidingWindowLayer
    if model._is_stateful or any(type(layer) not in with_rows for layer in cache.layers):
        return None
    return cache


# --- Scoring
def score(model: PreTrainedModel, samples: Rollout, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (nats) of the completions `rows` `[n]`, at temperature 1.

    Both are `[n, C]`, in float32 or better, 0 outside `completion_mask`, and differentiable if grad
    is enabled. Where it can be, a prompt is read once for all its completions among the rows.
    """
    mask = samples.completion_mask[rows]  # [n, C]
    tokens = samples.completions[rows][mask]  # [N]
    read = states_after_shared_prompts if can_share_prompts(model) else states_of_whole_rows
    states = read(model, samples, rows)  # the state before each of these tokens predicts it  [N, D]

    # Only these states meet the output head.
    vocabulary_size = model.get_input_embeddings().num_embeddings
    chunk_size = max(1, LOGITS_BUDGET // vocabulary_size)
    head = model.get_output_embeddings()
    logprobs, entropies = logprobs_and_entropies(states, head, tokens, chunk_size)  # [N], [N]
    zeros = torch.zeros(mask.shape, dtype=logprobs.dtype, device=mask.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropies)


def states_of_whole_rows(model: PreTrainedModel, samples: Rollout, rows: Tensor) -> Tensor:
    """`[N, D]` from prompt and completion in one row. A causal model needs no mask for that.

    All padding is on the right, and there a causal model does not look.
    """
    owner = samples.owner.tolist()
    prompt_lengths = samples.prompt_mask.sum(1).tolist()  # [P]
    completion_lengths = samples.completion_mask.sum(1).tolist()  # [B]
    ids, is_completion = [], []
    for i in rows.tolist():
        prompt = samples.prompts[owner[i], -prompt_lengths[owner[i]] :]
        completion = samples.completions[i, : completion_lengths[i]]
        ids.append(torch.cat([prompt, completion]))
        is_completion.append(torch.arange(len(ids[-1])) >= len(prompt))
    ids = pad_sequence(ids, batch_first=True)  # [n, longest]
    is_completion = pad_sequence(is_completion, batch_first=True).to(ids.device)

    # The state before a token predicts it.
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    before = hidden[:, :-1]
    return before[is_completion[:, 1:]]


def states_after_shared_prompts(model: PreTrainedModel, samples: Rollout, rows: Tensor) -> Tensor:
    """The same `[N, D]`, from prompts that are read once, with a gradient through their cache."""
    body, cache = model.base_model, empty_cache(model)
    options = {"past_key_values": cache, "use_cache": True}

    # The prompts of these rows, without the columns in which all have padding.
    used, owner = samples.owner[rows].unique(return_inverse=True)  # [U], [n]
    mask = samples.prompt_mask[used]
    L = int(mask.sum(1).max())
    mask = mask[:, -L:]  # [U, L]
    prompts = samples.prompts[used, -L:]
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    # All but the last token of a prompt goes into the cache, which is copied for its completions.
    if L > 1:
        before = prompts[:, :-1]
        places = positions[:, :-1]
        body(before, attention_mask=mask[:, :-1], position_ids=places, **options)
        cache.batch_select_indices(owner)

    # The last token is read with the completion, whose own last token predicts nothing.
    is_completion = samples.completion_mask[rows]  # [n, C]
    c = int(is_completion.sum(1).max())
    last = prompts[owner, -1:]  # [n, 1]
    completions = samples.completions[rows, : c - 1]
    ids = torch.cat([last, completions], 1)  # [n, c]
    mask = mask[owner]
    mask = F.pad(mask, (0, c - 1), value=1)  # [n, L + c - 1]
    offsets = torch.arange(c, device=ids.device)
    positions = positions[owner, -1:] + offsets
    output = body(ids, attention_mask=mask, position_ids=positions, **options)
    return output.last_hidden_state[is_completion[:, :c]]


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether a prompt is read once. That needs a cache of rows, position ids, and a CPU.

    Gradient checkpointing has no cache, and on a GPU attention under a mask can return NaN.
    """
    if model.device.type != "cpu" or empty_cache(model) is None:
        return False
    if model.training and model.is_gradient_checkpointing:
        return False
    parameters = inspect.signature(type(model.base_model).forward).parameters
    return "position_ids" in parameters


def micro_batches(model, samples: Rollout, rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """Rows, `size` at a time, in an order that is cheap to score: by prompt, or by length."""
    keys = samples.owner  # [B]
    if not can_share_prompts(model):
        prompt_lengths = samples.prompt_mask.sum(1)  # [P]
        keys = prompt_lengths[samples.owner] + samples.completion_mask.sum(1)
    order = keys[rows].argsort(stable=True)
    return rows[order].split(size)


# --- The model
def load_policy(name: str, bf16: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, on the GPU if there is one, and its tokenizer.

    Weights are float32, since updates of 1e-6 would be lost in bfloat16. With `bf16` the body runs
    in bfloat16 (autocast), with gradient checkpointing. The head does not: its logits of 16 to 32
    would be rounded to steps of 0.125. Dropout is off for good, or other policies would be sampled
    than the one scored; `model.train()` turns on gradient checkpointing and no more.

    Raises ValueError for a model that cannot be trained here, and what transformers raises.
    """
    check_folder(Path(name))
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise ValueError("its tokenizer has no end token")
    config = transformers.AutoConfig.from_pretrained(name)
    if getattr(config, "quantization_config", None):
        raise ValueError("quantized weights cannot be trained: take the original model")
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    options = {"config": config, "dtype": torch.float32, "output_loading_info": True}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(name, **options)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"it lacks weights: {missing[:3]}")
    for key, weight in model.named_parameters():
        if weight.dtype != torch.float32 or not weight.requires_grad:
            raise ValueError(f"{key} cannot be trained: it is frozen, or not in float32")

    # A generation_config that transformers 5.17 could not save keeps its tokens only.
    own = model.generation_config
    try:
        own.validate(strict=True)
    except ValueError:
        tokens = {"eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id}
        model.generation_config = GenerationConfig(**tokens)

    # The check is exact, so it comes before everything that rounds, TF32 and bfloat16.
    device = torch.accelerator.current_accelerator(check_available=True)
    model.to(device or "cpu")
    torch.set_float32_matmul_precision("highest")
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)  # can return NaN backward (pytorch #196678)
    check_sampled_is_scored(model, tokenizer)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32, exact enough for the output head
    if bf16:
        body, head = model.base_model, model.get_output_embeddings()
        bfloat16 = torch.autocast(model.device.type, torch.bfloat16)
        body.forward = bfloat16(body.forward)
        head.register_forward_pre_hook(lambda head, inputs: (at_least_float32(inputs[0]),))
        if model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.eval(), tokenizer


def check_folder(folder: Path) -> None:
    """Raise ValueError for a folder that holds something else than a whole model."""
    if (folder / "adapter_config.json").exists():
        raise ValueError("it has an adapter: merge that into its weights first")
    if folder.is_dir() and not (folder / "config.json").exists():
        snapshots = sorted(folder.glob("snapshots/*"))
        hint = f"take {snapshots[-1]}" if snapshots else "save_pretrained saves a model"
        raise ValueError(f"the folder holds no config.json: {hint}")


@torch.no_grad()
def check_sampled_is_scored(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sample from prompts of two lengths, and compare the log p that is noted with `score`.

    They part where the model is not causal, minds padding, has dropout, or changes its logits after
    the output head (a soft cap, a scale, a bias). Raises ValueError then. Samples at a temperature
    of 2 have unlikely tokens, too.
    """
    if model.base_model is model:
        raise ValueError("its body and its output head cannot be told apart: choose another model")
    prompts = ["1+2=", "12+34+56+78="] * 4
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(8, 16, generator=generator, dtype=torch.float64)
    temperatures = torch.full((8,), 2.0)
    samples = generate(model.eval(), tokenizer, prompts, temperatures, 16, uniforms)
    rows = torch.arange(8, device=model.device)
    logprobs, _ = score(model.train(), samples, rows)
    distance = (logprobs - samples.logprobs).abs().max().item()
    if not distance <= 0.01:
        wrong = f"log p in sampling and in scoring differ by {distance:.2g} nats"
        raise ValueError(f"{wrong}: it is no plain causal model, choose another")


def room(model: PreTrainedModel) -> float:
    """The tokens that the model has positions for, which is infinite where none are numbered."""
    config = model.config.get_text_config()
    lengths = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        # Beyond this length they turn keys in another way, those in the cache too.
        lengths.append(rope.get("original_max_position_embeddings"))
        lengths.append(getattr(config, "original_max_position_embeddings", None))
    return min([length for length in lengths if length], default=math.inf)


def format_prompts(tokenizer, questions: list[str], instruction: str) -> list[str]:
    """Questions in the model's chat template, with thinking off, or as plain text without one.

    A special token in a question could end the turn, so it is spelt with spaces between.
    """
    added = tokenizer.added_tokens_decoder.values()
    patterns = [re.escape(token.content) for token in added if token.special]
    special = re.compile("|".join(patterns))
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    prompts = []
    for question in questions:
        content = f"{question}\n\n{instruction}"
        content = special.sub(lambda token: " ".join(token.group()), content)
        if tokenizer.chat_template is None:
            prompt = f"{tokenizer.bos_token or ''}{content}\n"
        else:
            chat = [{"role": "user", "content": content}]
            prompt = tokenizer.apply_chat_template(chat, **options)
        prompts.append(prompt)
    return prompts
