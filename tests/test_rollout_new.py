"""rollout.py: what is sampled is what is scored, token by token, whatever a model's own defaults say."""

import contextlib
import copy
import json
import math
import shutil

import pytest
import tokenizers
import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

import rollout
from entropy import token_entropy
from scope_rl import objective_table, scope_loss

SHARED = (
    "qwen3",
    "qwen2",
    "llama",
    "mistral",
    "gemma3",
    "gpt2",
    "opt",
    "neox",
    "phi3",
    "smollm3",
    "olmo",
    "falcon",
)
PLAIN = "bloom", "mamba"  # no position ids; a recurrent state in place of a cache
PROMPTS = ["1+2=", "1,2,3:45=", "7", "12+34+5,6,7:89="]  # of one token, and longer than the windows


def config_of(name, tokenizer):
    """A random small model's: rotary, learned and no positions, grouped heads, windows, alibi, a recurrence."""
    t, V = transformers, len(tokenizer)
    ids = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    few = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3, **ids}
    common = few | {"intermediate_size": 64, "num_attention_heads": 2, "max_position_embeddings": 64}
    grouped = common | {"num_key_value_heads": 1}
    window = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    gpt2 = {
        "vocab_size": V,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "initializer_range": 0.3,
    }
    opt = common | {"word_embed_proj_dim": 32, "ffn_dim": 64, "init_std": 0.3, "dropout": 0.0}
    makers = {
        "qwen3": lambda: t.Qwen3Config(**grouped, head_dim=16),
        "qwen2": lambda: t.Qwen2Config(
            **grouped, use_sliding_window=True, sliding_window=4, max_window_layers=1
        ),
        "llama": lambda: t.LlamaConfig(**common),
        "mistral": lambda: t.MistralConfig(**grouped, sliding_window=4),
        "gemma3": lambda: t.Gemma3TextConfig(**grouped, **window, head_dim=16),
        "gpt2": lambda: t.GPT2Config(**gpt2, **ids, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        "opt": lambda: t.OPTConfig(**opt),
        "neox": lambda: t.GPTNeoXConfig(**common),
        "phi3": lambda: t.Phi3Config(**grouped),
        "smollm3": lambda: t.SmolLM3Config(**grouped, no_rope_layers=[1, 0]),
        "olmo": lambda: t.OlmoConfig(**common),
        "falcon": lambda: t.FalconConfig(**few, num_attention_heads=2, alibi=True),
        "bloom": lambda: t.BloomConfig(**few, n_head=2, hidden_dropout=0.0),
        "mamba": lambda: t.MambaConfig(**few, state_size=4),
    }
    return makers[name]()


ARCHITECTURES = [*SHARED, *PLAIN]


@pytest.fixture
def architecture(request, tokenizer):
    torch.manual_seed(0)
    config = config_of(request.param, tokenizer)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def row(samples, i):
    """Prompt and completion of a row, without padding: `[1, S]`, and where the completion starts."""
    prompt = samples.prompts[samples.owner[i]][samples.prompt_mask[samples.owner[i]].bool()]
    return torch.cat([prompt, samples.completions[i, samples.completion_mask[i]]])[None], len(prompt)


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic in standard deviations from its mean (Wilson and Hilferty), rare cells pooled."""
    expected = probabilities.double() * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).clamp(min=1e-9)
    statistic, degrees = ((counts - expected) ** 2 / expected).sum().item(), len(expected) - 1
    spread = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


# --- Sampling
QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}  # what its own config says
DEFAULTS = GenerationConfig(**QWEN3, repetition_penalty=1.5, min_p=0.2, suppress_tokens=[3])


@pytest.mark.parametrize("own_defaults", [None, DEFAULTS], ids=["neutral", "like Qwen3's"])
def test_frequencies_match_scored_probabilities_at_three_temperatures_in_one_call(
    random_model, tokenizer, own_defaults
):
    model = random_model()
    if own_defaults:
        model.generation_config = own_defaults
    per_row = torch.tensor([0.8, 1.0, 1.2]).repeat(4000)
    samples = rollout.generate(model, tokenizer, ["1+2="] * len(per_row), per_row, max_completion_length=2)
    assert (samples.prompts.shape, samples.completions.shape) == ((1, 4), (12_000, 2))
    logits = model(tokenizer("1+2=", return_tensors="pt").input_ids).logits[0, -1]
    first = samples.completions[:, 0]
    counts = {
        T: torch.bincount(first[per_row == per_row[i]], minlength=len(logits))
        for i, T in enumerate((0.8, 1, 1.2))
    }
    z = {T: chi_square(counts[T], torch.softmax(logits / T, -1)) for T in counts}
    assert max(z.values()) < 4, z
    # The same counts are far from the policy at a neighbouring temperature: the test can fail.
    assert chi_square(counts[0.8], torch.softmax(logits, -1)) > 6

    # The second token, scored by `score` itself: E[log p] = -H, whatever the first token is.
    ones = (per_row == 1.0).nonzero()[:, 0]
    logprobs, entropies = (x.detach() for x in rollout.score(model, samples, ones))
    gap = (logprobs + entropies)[:, 1][samples.completion_mask[ones, 1]]
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(len(gap))


def test_frequencies_match_through_segments_at_mixed_temperatures(random_model, tokenizer, monkeypatch):
    """The third token, sampled after two segments, against the exact mixture over all prefixes of two tokens."""
    monkeypatch.setattr(rollout, "SEGMENT", 1)
    model, n, V = random_model(), 4000, len(tokenizer)
    temperatures = torch.tensor([0.7, 1.3]).repeat(n)
    samples = rollout.generate(model, tokenizer, ["1+2="] * (2 * n), temperatures, max_completion_length=3)
    prompt = tokenizer("1+2=", return_tensors="pt").input_ids
    prefixes = torch.cartesian_prod(torch.arange(V), torch.arange(V))  # [V * V, 2]
    logits = model(torch.cat([prompt.expand(V * V, -1), prefixes], dim=1), use_cache=False).logits[:, -3:]
    alive = (prefixes != tokenizer.eos_token_id).all(1)
    for T in (0.7, 1.3):
        p = torch.softmax(logits / T, -1)  # [V * V, 3, V]
        rows = torch.arange(V * V)
        chance = p[rows, 0, prefixes[:, 0]] * p[rows, 1, prefixes[:, 1]]
        expected = (chance[alive, None] * p[alive, 2]).sum(0)
        kept = samples.completion_mask[:, -1] & (temperatures == T)
        counts = torch.bincount(samples.completions[kept, -1], minlength=V)
        assert chi_square(counts, expected / expected.sum()) < 4
        other = torch.softmax(logits[alive, 2], -1).mul(chance[alive, None]).sum(0)
        assert (
            chi_square(counts, other / other.sum()) > 4
        )  # the wrong temperature for the last token is noticed


def test_tokens_are_drawn_by_their_probabilities_and_impossible_ones_never():
    """Chi-square of a large vocabulary, most of it rare; and tokens of probability zero at every place."""
    n, logits = 10_000, torch.randn(1, 1000) * 3
    logits[0, ::7] = -torch.inf
    for T in (0.5, 1.0):
        sampler = rollout.Sampler(torch.full((n,), T), torch.rand(n, 1, dtype=torch.float64))
        drawn = sampler(None, logits.expand(n, -1))
        assert (drawn.isfinite().sum(1) == 1).all()
        counts = torch.bincount(drawn.argmax(1), minlength=1000)
        assert counts[::7].sum() == 0
        assert chi_square(counts, torch.softmax(logits[0] / T, -1)) < 4
        log_p = torch.log_softmax(logits[0].double(), -1)  # what it notes is at temperature 1
        torch.testing.assert_close(sampler.noted[0][0].double(), log_p[drawn.argmax(1)], atol=1e-5, rtol=0)
    # At the ends of the random numbers, and at none: found out later, by the entropy.
    ends = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    middle = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf]).expand(2, -1)
    assert rollout.Sampler(torch.ones(2), ends)(None, middle).argmax(1).tolist() == [1, 2]
    sick = torch.tensor([[0.0, 0.0, 50.0], [math.nan, 0.0, 0.0], [math.inf, 0.0, 0.0]])
    sampler = rollout.Sampler(torch.ones(3), torch.full((3, 1), 0.5, dtype=torch.float64))
    assert sampler(None, sick).isfinite().sum(1).tolist() == [1, 1, 1]
    assert sampler.noted[0][1].isfinite().tolist() == [True, False, False]


def test_completions_depend_on_their_random_numbers_and_not_on_the_batch(
    random_model, tokenizer, monkeypatch
):
    """Alone, in any batch, in another order, and by other segments; other numbers give other completions."""
    model, prompts = random_model(), PROMPTS * 6
    uniforms, T = torch.rand(24, 12, dtype=torch.float64), torch.linspace(0.8, 1.5, 24)
    whole = rollout.generate(model, tokenizer, prompts, T, 12, uniforms).texts
    for size in (1, 5, 24):
        monkeypatch.setattr(rollout, "SEGMENT", size)
        texts = dict.fromkeys(range(24))
        for rows in torch.randperm(24).split(size):
            asked = [prompts[i] for i in rows.tolist()]
            samples = rollout.generate(model, tokenizer, asked, T[rows], 12, uniforms[rows])
            texts |= zip(rows.tolist(), samples.texts, strict=True)
        assert list(texts.values()) == whole
    assert rollout.generate(model, tokenizer, prompts, T, 12).texts != whole
    by_default = []
    for _ in range(2):
        torch.manual_seed(5)
        by_default.append(rollout.generate(model, tokenizer, prompts, T, 12).texts)
    assert by_default[0] == by_default[1]


@pytest.mark.parametrize("segment", [3, 64])
@pytest.mark.parametrize("architecture", ARCHITECTURES, indirect=True)
def test_segments_and_shared_prompts_change_no_token(architecture, tokenizer, monkeypatch, segment):
    """Near temperature 0, each row is what repeated forward passes of the row alone choose, greedily."""
    monkeypatch.setattr(rollout, "SEGMENT", segment)
    samples = rollout.generate(
        architecture, tokenizer, PROMPTS * 2, torch.full((8,), 1e-4), max_completion_length=12
    )
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        stop = ids.shape[1] + 12
        while ids.shape[1] < stop and ids[0, -1] != tokenizer.eos_token_id:
            ids = torch.cat([ids, architecture(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert row(samples, i)[0].tolist() == row(samples, i + 4)[0].tolist() == ids.tolist()


def test_a_prompt_is_read_once_and_rows_leave_at_any_end_token(random_model, tokenizer, monkeypatch):
    """What the model is fed: distinct prompts without their last token, then only rows that go on.

    A chat model's generation_config names more end tokens than its tokenizer.
    """
    monkeypatch.setattr(rollout, "SEGMENT", 1)
    model, fed = random_model(), []
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["1", "2", "+"])]
    model.generation_config.eos_token_id = ends[1:]
    model.get_input_embeddings().register_forward_hook(lambda *args: fed.append(tuple(args[1][0].shape)))
    samples = rollout.generate(model, tokenizer, ["1+2="] * 40 + ["3="] * 24, torch.full((64,), 3.0), 4)
    lengths = samples.completion_mask.sum(1)
    assert fed == [(2, 3), *[((lengths > t).sum(), 1) for t in range(4)]]
    last = samples.completions[torch.arange(64), lengths - 1]
    assert torch.equal(torch.isin(last, torch.tensor(ends)), ~samples.truncated)
    assert 32 < (~samples.truncated).sum() < 64


class Scripted:
    """A stand-in for a model whose `generate` returns given completions, in one call (as a recurrent one's)."""

    device, _is_stateful, config = torch.device("cpu"), True, transformers.LlamaConfig()

    def __init__(self, completions, ends):
        self.completions, self.generation_config = (
            torch.tensor(completions),
            GenerationConfig(eos_token_id=ends),
        )

    def generate(self, input_ids, attention_mask, max_new_tokens, logits_processor):
        for _ in self.completions[0]:
            logits_processor[0](input_ids, torch.zeros(len(input_ids), 17))
        return torch.cat([input_ids, self.completions], dim=1)


def test_completion_masks_go_by_position(tokenizer):
    """Several end tokens, pad = eos, an end token in the prompt, nothing but the end, and truncation."""
    one, two, other = tokenizer.convert_tokens_to_ids(["1", "2", ":"])
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    completions = [
        [one, two, eos, eos],  # ended; the second eos is padding (pad = eos)
        [one, other, two, eos],  # ended by the other end token; what follows does not count
        [one, two, one, two],  # truncated
        [eos, eos, eos, eos],  # the end at once
        [one, one, one, eos],  # ended in the last place: not truncated
        [two, eos, pad, pad],  # ended, and padded by another token
    ]
    prompts = ["1", "1<eos>2", "1", "1", "1", "1"]
    samples = rollout.generate(Scripted(completions, [eos, other]), tokenizer, prompts, torch.ones(6), 4)
    assert samples.completion_mask.sum(1).tolist() == [3, 2, 4, 1, 4, 2]
    assert samples.truncated.tolist() == [False, False, True, False, False, False]
    assert samples.texts == ["12", "1:", "1212", "", "111", "2"]
    assert samples.lengths().tolist() == [1 + 3, 3 + 2, 1 + 4, 1 + 1, 1 + 4, 1 + 2]
    assert samples.owner.tolist() == [0, 1, 0, 0, 0, 0]
    assert samples.prompts.tolist() == [[pad, pad, one], [one, eos, two]]
    assert samples.prompt_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert not samples.logprobs[~samples.completion_mask].any()
    assert not samples.entropies[~samples.completion_mask].any()


def test_generation_config_is_restored_and_pad_may_be_missing(random_model, tokenizer):
    model = random_model()
    model.generation_config = DEFAULTS
    without_pad = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>"
    )
    samples = rollout.generate(model, without_pad, ["1+2=", "1="], torch.ones(2), 3)
    assert model.generation_config is DEFAULTS
    assert samples.prompt_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    with pytest.raises(IndexError):  # a failure while sampling: token ids beyond the vocabulary
        model.resize_token_embeddings(4)
        rollout.generate(model, tokenizer, ["1:2="], torch.ones(1), 3)
    assert model.generation_config is DEFAULTS


# --- Scoring
def samples_of(model, tokenizer):
    """Three completions of each prompt, of 1 to 9 tokens."""
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["1", "2", "3"])
    samples = rollout.generate(model, tokenizer, PROMPTS * 3, torch.full((12,), 3.0), 9)
    assert len(set(samples.completion_mask.sum(1).tolist())) > 2
    return samples


@pytest.mark.parametrize("architecture", ARCHITECTURES, indirect=True)
def test_score_equals_a_plain_unpadded_forward_in_float64(architecture, tokenizer):
    """Scored in a batch of prompts and completions of other lengths: equal to each row alone by log_softmax."""
    samples = samples_of(architecture, tokenizer)
    logprobs, entropies = rollout.score(architecture, samples, torch.arange(12))
    assert not logprobs[~samples.completion_mask].any()
    # What was noted while sampling, through the cache, is the same.
    torch.testing.assert_close(samples.logprobs, logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(samples.entropies, entropies, atol=1e-5, rtol=0)
    exact = copy.deepcopy(architecture).double()
    for i in range(12):
        (ids, start), mask = row(samples, i), samples.completion_mask[i]
        logits = exact(ids, use_cache=False).logits[0, start - 1 : -1].double()
        wanted = torch.log_softmax(logits, -1).gather(1, ids[0, start:, None])[:, 0]
        torch.testing.assert_close(logprobs[i, mask].double(), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(entropies[i, mask].double(), token_entropy(logits), atol=1e-5, rtol=0)


class InFloat64(TorchFunctionMode):
    """What a model raises to float32 on its way, as norms do, stays in float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = torch.Tensor.double if function is torch.Tensor.float else function
        args = [torch.float64 if x is torch.float32 else x for x in args]
        kwargs = {k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()}
        return function(*args, **kwargs)


def gradient_of_a_step(model, samples, size):
    """Log p, H, and the gradient of a step's loss, from micro-batches of a size."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(2, (12,), generator=generator).double()
    table = objective_table(rewards[:8].view(2, 4), rewards[8:], scope_alpha=0.5, entropy_coef=0.1)
    old = samples.logprobs + 0.2 * torch.randn(samples.logprobs.shape, generator=generator)
    scored = torch.zeros(2, *old.shape, dtype=torch.float64)
    model.zero_grad()
    for rows in rollout.micro_batches(model, samples, torch.arange(12), size):
        logprobs, entropies = rollout.score(model, samples, rows)
        scored[:, rows] = torch.stack([logprobs, entropies]).detach().double()
        mask = samples.completion_mask[rows]
        scope_loss(logprobs, old[rows], entropies, mask, table.rows(rows))[0].backward()
    return scored, torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("architecture", SHARED, indirect=True)
def test_a_step_with_shared_prompts_equals_the_plain_step(
    architecture, tokenizer, dtype, monkeypatch, request
):
    """Log p, H and the gradient, whatever the prompts' lengths and the micro-batches."""
    samples = samples_of(architecture, tokenizer)
    model, tolerance = architecture.to(dtype).train(), 1e-5 if dtype == torch.float32 else 1e-12
    assert rollout.can_share_prompts(model)
    with (
        pytest.MonkeyPatch.context() as patch,
        InFloat64() if dtype == torch.float64 else contextlib.nullcontext(),
    ):
        patch.setattr(rollout, "can_share_prompts", lambda model: False)
        wanted, wanted_gradient = gradient_of_a_step(model, samples, 12)
        patch.undo()
        is_first = request.node.callspec.params["architecture"] == SHARED[0]
        for size in range(1, 13) if is_first else (2, 5, 12):
            got, gradient = gradient_of_a_step(model, samples, size)
            torch.testing.assert_close(got, wanted, atol=tolerance, rtol=0)
            longest = wanted_gradient.abs().max().item()
            torch.testing.assert_close(gradient, wanted_gradient, atol=tolerance * max(1, longest), rtol=0)
    assert longest > 0.1


@pytest.mark.parametrize("architecture", ["qwen3", *PLAIN], indirect=True)
def test_what_cannot_share_prompts_reads_whole_rows(architecture, tokenizer, monkeypatch):
    """Without position ids, with a recurrent state, under gradient checkpointing, and on a GPU."""
    samples, model, read = samples_of(architecture, tokenizer), architecture.train(), []

    def share():
        """Whether it says that it shares prompts, and whether it does."""
        for name in ("states_of_whole_rows", "states_after_shared_prompts"):
            inner = getattr(rollout, name)
            spy = lambda *given, name=name, inner=inner: read.append(name) or inner(*given)  # noqa: E731
            monkeypatch.setattr(rollout, name, spy)
        rollout.score(model, samples, torch.arange(12))
        monkeypatch.undo()
        return rollout.can_share_prompts(model), read.pop() == "states_after_shared_prompts"

    is_qwen3 = model.config.model_type == "qwen3"
    assert share() == (is_qwen3, is_qwen3)
    if not is_qwen3:
        return
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "device", torch.device("cuda"))
        assert not rollout.can_share_prompts(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert share() == (False, False)
    model.eval()  # where nothing is recomputed
    assert share() == (True, True)


def test_scoring_reads_each_prompt_of_a_micro_batch_once_and_no_padding(random_model, tokenizer):
    """Its own prompts at their own length, and then its completions at theirs, after the last token of the prompt."""
    model, fed = random_model(), []
    samples = samples_of(model, tokenizer)
    model.get_input_embeddings().register_forward_hook(lambda *args: fed.append(tuple(args[1][0].shape)))
    for owners in ([0, 1], [2], [0, 1, 2, 3]):
        fed.clear()
        rows = torch.isin(samples.owner, torch.tensor(owners)).nonzero()[:, 0]
        rollout.score(model, samples, rows)
        prompt, completion = max(len(PROMPTS[i]) for i in owners), samples.completion_mask[rows].sum(1).max()
        reads = [(len(owners), prompt - 1)] if prompt > 1 else []
        assert fed == [*reads, (len(rows), completion)]
    # Micro-batches keep the rows of a prompt together; for whole rows they go by length.
    rows = torch.randperm(12)
    parts = rollout.micro_batches(model, samples, rows, 3)
    assert [samples.owner[part].tolist() for part in parts] == [[i] * 3 for i in range(4)]
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    parts = rollout.micro_batches(model, samples, rows, 5)
    lengths = samples.lengths()[torch.cat(parts)]
    assert [len(part) for part in parts] == [5, 5, 2]
    assert torch.equal(lengths, samples.lengths().sort().values)
    fed.clear()
    rollout.score(model, samples, parts[0])
    assert fed == [(5, lengths[4])]


def test_scoring_meets_the_head_in_chunks_of_the_budget(random_model, tokenizer, monkeypatch):
    model, chunks, inner = random_model(), [], rollout.logprobs_and_entropies
    samples = samples_of(model, tokenizer)
    monkeypatch.setattr(rollout, "logprobs_and_entropies", lambda *a: chunks.append(a[3]) or inner(*a))
    for budget in (3 * len(tokenizer), 1):
        monkeypatch.setattr(rollout, "LOGITS_BUDGET", budget)
        rollout.score(model, samples, torch.arange(2))
    assert chunks == [3, 1]


def test_whole_rows_are_read_without_a_mask(random_model, tokenizer, monkeypatch):
    """It would rule fused attention kernels out, and cuDNN's backward returns NaN for some masked shapes."""
    model, masks, sdpa = random_model(), [], torch.nn.functional.scaled_dot_product_attention
    samples = samples_of(model, tokenizer)
    spy = lambda *a, attn_mask=None, **k: masks.append(attn_mask) or sdpa(*a, attn_mask=attn_mask, **k)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    rollout.states_of_whole_rows(model, samples, torch.arange(12))
    assert masks == [None, None]


# --- The model
@pytest.fixture
def load(random_model, tokenizer, tmp_path):
    """A function that saves a model and loads it as train.py does; options go to load_policy."""

    def make(model=None, **options):
        (model or random_model()).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return rollout.load_policy(str(tmp_path), **options)[0]

    return make


def test_a_policy_is_loaded_in_float32_and_evaluation_mode(random_model, load):
    model = load(random_model().bfloat16())  # stored in half precision
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training


def test_dropout_is_off_for_good_and_gradient_checkpointing_changes_no_value(random_model, tokenizer, load):
    results, calls = [], []
    for enabled in (False, True):
        model = load(random_model(attention_dropout=0.5))
        assert not [m for m in model.modules() if getattr(m, "attention_dropout", 0.0)]
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        samples = rollout.generate(
            model, tokenizer, ["1+2=", "1="], torch.ones(2), 5, torch.full((2, 5), 0.3)
        )
        model.train().model.layers[0].mlp.register_forward_pre_hook(lambda *a: calls.append(1))
        calls.clear()
        logprobs, entropies = rollout.score(model, samples, torch.arange(2))
        (logprobs + 0.1 * entropies).sum().backward()
        results.append([logprobs.detach(), *(p.grad.clone() for p in model.parameters())])
        assert len(calls) == 2  # the prompts and the completions, or whole rows that are recomputed
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-5, rtol=1e-5)
    gpt2 = config_of("gpt2", tokenizer)
    gpt2.resid_pdrop = gpt2.embd_pdrop = gpt2.attn_pdrop = 0.5
    model, ids = load(transformers.GPT2LMHeadModel(gpt2)).train(), torch.arange(6)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_under_bfloat16_sampling_and_scoring_share_float32_logits(tokenizer, load, monkeypatch):
    """The logits that `generate` samples from are those that `score` uses, not their bfloat16 rounding."""
    model, seen, draw = load(bf16=True), [], rollout.Sampler.__call__
    monkeypatch.setattr(
        rollout.Sampler, "__call__", lambda self, ids, z: seen.append(z) or draw(self, ids, z)
    )
    samples = rollout.generate(model, tokenizer, ["1+2="] * 8, torch.ones(8), 6)
    logprobs, _ = rollout.score(model.train(), samples, torch.arange(8))
    assert logprobs.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert any((x.bfloat16().float() != x).any() for x in seen)  # not rounded
    gap = (samples.logprobs - logprobs).abs()[samples.completion_mask]
    assert gap.max() < 0.1  # bfloat16 inside the layers, once with a cache and once without
    hidden = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: hidden.append(out.dtype))
    rollout.score(model, samples, torch.arange(8))
    assert hidden == [torch.bfloat16]  # the body does run in bfloat16


def test_the_head_is_in_float32_on_a_body_that_ends_in_bfloat16(load, monkeypatch):
    """Qwen3's last norm, with float32 weights, happens to return float32; another model's need not."""
    model, ids = load(bf16=True), torch.arange(4)[None]
    norm = transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: forward(self, x).bfloat16())
    assert model.base_model(ids).last_hidden_state.dtype == torch.bfloat16
    assert model(ids).logits.dtype == torch.float32


def test_the_cache_is_bfloat16_and_no_token_changes(tokenizer, load, monkeypatch):
    """Qwen3's k_norm makes keys float32 under autocast; attention rounds them to bfloat16 in any case."""
    model, results, uniforms = load(bf16=True), [], torch.rand(16, 8, dtype=torch.float64)
    for kind in (rollout.AutocastCache, transformers.DynamicCache):
        made = []
        make = lambda kind=kind, made=made, **given: made.append(kind(**given)) or made[-1]  # noqa: E731
        monkeypatch.setattr(rollout, "AutocastCache", make)
        samples = rollout.generate(model, tokenizer, ["1+2=", "3="] * 8, torch.ones(16), 8, uniforms)
        results.append((samples.completions, {made[0].layers[0].keys.dtype, made[0].layers[0].values.dtype}))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == {torch.bfloat16}
    assert torch.float32 in results[1][1]  # what transformers' own cache would store


def test_bfloat16_copies_of_weights_are_made_once_a_rollout(tokenizer, load):
    """Not once a token: the cast of a weight outlives the forward pass that made it."""
    model, copies = load(bf16=True), []
    shapes = {p.shape for p in model.base_model.layers.parameters() if p.dim() == 2}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].shape in shapes:
                copies.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    with Watch():
        rollout.generate(model, tokenizer, ["1+2="] * 4, torch.ones(4), 8)
    assert 0 < len(copies) <= sum(p.dim() == 2 for p in model.base_model.layers.parameters())


def odd_model(name, tokenizer):
    """Models whose logits are not those of a causal body and a plain head."""
    t = transformers
    few = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    small = few | {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    heads = small | {"num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.5}
    bart = few | {
        "d_model": 16,
        "decoder_layers": 1,
        "decoder_attention_heads": 1,
        "encoder_layers": 1,
        "init_std": 1.0,
    }
    if name == "a soft cap on the logits":
        return t.Gemma2ForCausalLM(t.Gemma2Config(**heads, final_logit_softcapping=0.5))
    if name == "a scale of the logits":
        return t.CohereForCausalLM(t.CohereConfig(**small, logit_scale=0.5))
    if name == "attention to later tokens":
        return t.Gemma3ForCausalLM(t.Gemma3TextConfig(**heads, use_bidirectional_attention=True))
    if name == "positions that count padding":
        return t.BartForCausalLM(t.BartConfig(**bart, decoder_start_token_id=1))
    model = t.PhiForCausalLM(t.PhiConfig(**small))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


ODD = "a soft cap on the logits", "a scale of the logits", "attention to later tokens", "a head with a bias"


@pytest.mark.parametrize("name", [*ODD, "positions that count padding"])
def test_a_model_that_is_no_plain_causal_one_is_refused(name, load, tokenizer):
    with pytest.raises(ValueError, match="log p in sampling and in scoring differ"):
        load(odd_model(name, tokenizer))


def test_a_model_that_is_random_in_training_is_refused(load, monkeypatch):
    """Dropout by any name that the config does not show must not slip through either."""
    mlp = transformers.models.qwen3.modeling_qwen3.Qwen3MLP
    forward = mlp.forward
    shaky = lambda self, x: torch.nn.functional.dropout(forward(self, x), 0.5, self.training)  # noqa: E731
    monkeypatch.setattr(mlp, "forward", shaky)
    with pytest.raises(ValueError, match="log p in sampling and in scoring differ"):
        load()


def test_what_cannot_be_trained_is_refused(load, random_model, tokenizer, tmp_path, monkeypatch):
    """Quantized weights, frozen ones and those in half precision, an adapter, a tokenizer without an end."""
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained

    def changed(change):
        def loaded(*given, **options):
            model, info = from_pretrained(*given, **options)
            change(model.model.layers[1].mlp.up_proj.weight)
            return model, info

        return loaded

    for change in (lambda w: w.requires_grad_(False), lambda w: setattr(w, "data", w.data.half())):
        with monkeypatch.context() as patch:
            patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", changed(change))
            with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight cannot be trained"):
                load()
    with pytest.raises(ValueError, match="quantized weights cannot be trained"):
        load(random_model(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}))
    endless = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    endless.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no end token"):
        rollout.load_policy(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has an adapter"):
        rollout.load_policy(str(tmp_path))


@pytest.mark.parametrize("odd", [{"temperature": 0.9}, {"early_stopping": True, "length_penalty": 2.0}])
def test_a_model_can_be_saved_whatever_its_generation_config_says(odd, load, model_folder, tmp_path):
    """transformers 5.17 saves none with options that have no effect. The tokens in it stay."""
    folder = shutil.copytree(model_folder, tmp_path / "odd")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, 5]} | odd))
    model, _ = rollout.load_policy(str(folder))
    model.generation_config.validate(strict=True)
    assert model.generation_config.eos_token_id == [1, 5]


def test_the_room_ends_where_positions_change_their_meaning(random_model, tokenizer):
    """LongRoPE turns to other frequencies beyond the original length, in the middle of a completion."""
    assert rollout.room(random_model()) == 64
    rope = {"rope_theta": 10000.0, "original_max_position_embeddings": 24}
    long = rope | {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    llama3 = rope | {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert rollout.room(random_model(rope_parameters=long)) == 24
    assert rollout.room(random_model(rope_parameters=llama3)) == 64
    assert rollout.room(transformers.BloomForCausalLM(config_of("bloom", tokenizer))) == math.inf


# --- Prompts
def test_prompts_with_and_without_a_chat_template(tokenizer):
    assert rollout.format_prompts(tokenizer, ["1,2,3:4="], "Do this.") == [
        "1,2,3:4="
    ]  # the tiny model's own template
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>"
    )
    assert rollout.format_prompts(plain, ["Why?"], "Do this.") == ["<s>Why?\n\nDo this.\n"]
    plain.chat_template = (
        "{% if enable_thinking is false %}no thoughts {% endif %}{{ messages[0]['content'] }}|"
        "{% if add_generation_prompt %}You:{% endif %}"
    )
    assert rollout.format_prompts(plain, ["Why?"], "Do this.") == ["no thoughts Why?\n\nDo this.|You:"]


def test_prompts_are_tokenized_as_they_stand(random_model, tokenizer):
    """A template has written the special tokens already: a tokenizer that adds its own must not begin a prompt twice."""
    eager, first = copy.deepcopy(tokenizer), ("<eos>", tokenizer.eos_token_id)
    adds = tokenizers.processors.TemplateProcessing(single="<eos> $A", special_tokens=[first])
    eager.backend_tokenizer.post_processor = adds
    assert eager("1+2=").input_ids == [first[1], *tokenizer("1+2=").input_ids]
    samples = rollout.generate(random_model(), eager, ["1+2=", "1="], torch.ones(2), 3)
    assert samples.prompts[0].tolist() == tokenizer("1+2=").input_ids
