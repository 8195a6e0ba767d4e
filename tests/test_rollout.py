"""rollout.py: what is sampled is what is scored, token by token, whatever a model's own defaults say."""

import copy
import math

import pytest
import tokenizers
import torch
import transformers
from architectures import PLAIN, SHARED, make_model
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig

import rollout
from entropy import token_entropy
from scope_rl import objective_table, scope_loss

HOT = torch.full((12,), 3.0)
PROMPTS = ["1+2=", "1,<eos>2:45=", "7", "12+34+5,6,7:89="]  # of one token, and longer than the windows
QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}  # what its own config says
DEFAULTS = QWEN3 | {"repetition_penalty": 1.5, "min_p": 0.2, "suppress_tokens": [3]}


@pytest.fixture
def architecture(request, tokenizer):
    return make_model(request.param, tokenizer)


def samples_of(model, tokenizer, temperatures=HOT, uniforms=None):
    """Three completions of each prompt, of 1 to 9 tokens. There are several end tokens, and one of them is the padding."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    ends = tokenizer.convert_tokens_to_ids(["1", "2", "3"])
    model.generation_config = GenerationConfig(**DEFAULTS, eos_token_id=ends)
    samples = rollout.generate(model, tokenizer, PROMPTS * 3, temperatures, 9, uniforms)
    assert len(set(samples.completion_mask.sum(1).tolist())) > 2
    return samples


def fed_to(model):
    """The shapes of all token ids that the model will read."""
    fed = []
    model.get_input_embeddings().register_forward_hook(lambda *args: fed.append(tuple(args[1][0].shape)))
    return fed


# --- Sampling
def deviation(counts, p):
    """The largest distance of a count from what its probability expects, in standard deviations."""
    n = counts.sum()
    return ((counts - n * p) / (n * p * (1 - p)).sqrt()).abs().max().item()


def test_frequencies_are_probabilities_at_three_temperatures_in_one_call(random_model, tokenizer):
    model, temperatures = random_model(), torch.tensor([0.8, 1.0, 1.2]).repeat(4000)
    model.generation_config = GenerationConfig(**DEFAULTS)
    samples = rollout.generate(model, tokenizer, ["1+2="] * 12_000, temperatures, max_completion_length=2)
    assert (samples.prompts.shape, samples.completions.shape) == ((1, 4), (12_000, 2))
    logits = model(tokenizer("1+2=", return_tensors="pt").input_ids).logits[0, -1]
    first = samples.completions[:, 0].view(-1, 3)  # a column for each temperature
    for column, T in enumerate((0.8, 1.0, 1.2)):
        counts = torch.bincount(first[:, column], minlength=len(logits))
        assert deviation(counts, torch.softmax(logits / T, -1)) < 4.5
        assert deviation(counts, torch.softmax(logits / (T + 0.2), -1)) > 4.5  # so the test can fail


@pytest.mark.parametrize("segment", [2, 64])
@pytest.mark.parametrize("architecture", [*SHARED, *PLAIN], indirect=True)
def test_tokens_log_p_and_entropies_are_those_of_a_row_alone(architecture, tokenizer, monkeypatch, segment):
    """Against a forward pass of each row in float64, without padding, cache and batch.

    A token is the first at which the cumulative probability exceeds the random number.
    """
    monkeypatch.setattr(rollout, "SEGMENT", segment)
    T, uniforms = torch.linspace(0.7, 4.0, 12), torch.rand(12, 9, dtype=torch.float64)
    samples = samples_of(architecture, tokenizer, T, uniforms)
    scored = rollout.score(architecture, samples, torch.arange(12))
    exact = copy.deepcopy(architecture).double()
    ends = tokenizer.convert_tokens_to_ids(["1", "2", "3", "<eos>"])
    for i, prompt in enumerate(PROMPTS * 3):
        mask, owner = samples.completion_mask[i], samples.owner[i]
        tokens = samples.completions[i, mask]  # [n]
        is_end = [token in ends for token in tokens.tolist()]
        assert is_end == [False] * (len(tokens) - 1) + [not samples.truncated[i]]
        assert mask.tolist() == [t < len(tokens) for t in range(len(mask))]
        assert samples.texts[i] == tokenizer.decode(tokens, skip_special_tokens=True)

        start = tokenizer(prompt, return_tensors="pt").input_ids[0]
        assert torch.equal(samples.prompts[owner][-len(start) :], start)
        assert samples.prompt_mask[owner].sum() == len(start)
        logits = exact(torch.cat([start, tokens])[None], use_cache=False).logits[0].double()
        z, places = logits[len(start) - 1 : -1], tokens[:, None]  # [n, V], [n, 1]
        p = torch.softmax(z / T[i], -1)
        above, u = p.cumsum(-1).gather(1, places), uniforms[i, : len(tokens), None]  # [n, 1]
        assert (u <= above + 1e-5).all()
        assert (u >= above - p.gather(1, places) - 1e-5).all()
        wanted = torch.log_softmax(z, -1).gather(1, places)[:, 0], token_entropy(z)
        for got in (scored, (samples.logprobs, samples.entropies)):
            for mine, right in zip(got, wanted, strict=True):
                torch.testing.assert_close(mine[i, mask].double(), right, atol=1e-5, rtol=0)
                assert not mine[i, ~mask].any()


def test_impossible_tokens_are_never_drawn_and_what_is_not_finite_is_noted():
    """At the ends of the random numbers and between; and where nothing can be drawn, which the entropy tells later."""
    uniforms = torch.tensor([[0.0], [0.5], [1 - 2**-53]], dtype=torch.float64)
    two_of_five = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(3, -1)
    assert rollout.Sampler(torch.ones(3), uniforms)(None, two_of_five).argmax(1).tolist() == [1, 3, 3]
    sick = torch.tensor([[0.0, 0.0, 50.0], [math.nan, 0.0, 0.0], [math.inf, 0.0, 0.0]])
    sampler = rollout.Sampler(torch.ones(3), torch.full((3, 1), 0.5, dtype=torch.float64))
    assert sampler(None, sick).isfinite().sum(1).tolist() == [1, 1, 1]
    assert sampler.noted[0][1].isfinite().tolist() == [True, False, False]


def test_completions_depend_on_random_numbers_and_not_on_the_batch(random_model, tokenizer):
    """Alone, in any batch, in another order; other numbers give others, and the generator's seed the same."""
    model, T, asked = random_model(), torch.linspace(0.8, 1.5, 24), PROMPTS * 6
    uniforms = torch.rand(24, 12, dtype=torch.float64)
    whole = rollout.generate(model, tokenizer, asked, T, 12, uniforms).texts
    for size in (1, 5, 24):
        texts = {}
        for rows in torch.randperm(24).split(size):
            some = [asked[i] for i in rows.tolist()]
            samples = rollout.generate(model, tokenizer, some, T[rows], 12, uniforms[rows])
            texts |= zip(rows.tolist(), samples.texts, strict=True)
        assert [texts[i] for i in range(24)] == whole
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append(rollout.generate(model, tokenizer, asked, T, 12).texts)
    assert drawn[0] == drawn[1] != drawn[2] != whole


def test_a_prompt_is_read_once_and_rows_leave_at_any_end_token(random_model, tokenizer, monkeypatch):
    """What the model is fed: distinct prompts without their last token, then only rows that go on.

    A chat model's generation_config names more end tokens than its tokenizer.
    """
    monkeypatch.setattr(rollout, "SEGMENT", 1)
    model = random_model()
    fed = fed_to(model)
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["1", "2", "+"])]
    model.generation_config.eos_token_id = ends[1:]
    samples = rollout.generate(model, tokenizer, ["1+2="] * 40 + ["3="] * 24, torch.full((64,), 3.0), 4)
    lengths = samples.completion_mask.sum(1)
    assert fed == [(2, 3), *[((lengths > t).sum(), 1) for t in range(4)]]
    last = samples.completions[torch.arange(64), lengths - 1]
    assert torch.equal(torch.isin(last, torch.tensor(ends)), ~samples.truncated)
    assert 32 < (~samples.truncated).sum() < 64


def test_generation_config_is_restored_and_pad_may_be_missing(random_model, tokenizer):
    model = random_model()
    model.generation_config = own = GenerationConfig(**DEFAULTS)
    backend = tokenizer.backend_tokenizer
    without_pad = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    samples = rollout.generate(model, without_pad, ["1+2=", "1="], torch.ones(2), 3)
    assert model.generation_config is own
    assert samples.prompt_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    with pytest.raises(IndexError):  # a failure while sampling: token ids beyond the vocabulary
        model.resize_token_embeddings(4)
        rollout.generate(model, tokenizer, ["1:2="], torch.ones(1), 3)
    assert model.generation_config is own


# --- Scoring
class InFloat64(TorchFunctionMode):
    """What a model raises to float32 on its way, as norms do, stays in float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = torch.Tensor.double if function is torch.Tensor.float else function
        kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in (kwargs or {}).items()}
        return function(*[torch.float64 if x is torch.float32 else x for x in args], **kwargs)


def gradient_of_a_step(model, samples, size):
    """Log p and H `[2, B, C]`, and the gradient of a step's loss, from micro-batches of a size."""
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


@pytest.mark.parametrize("architecture", SHARED, indirect=True)
def test_a_step_with_shared_prompts_equals_the_plain_step(architecture, tokenizer, monkeypatch):
    """Log p, H and the gradient, whatever the prompts' lengths and the micro-batches."""
    samples, model = samples_of(architecture, tokenizer), architecture.double().train()
    assert rollout.can_share_prompts(model)
    with InFloat64():
        with monkeypatch.context() as patch:
            patch.setattr(rollout, "can_share_prompts", lambda model: False)
            wanted, wanted_gradient = gradient_of_a_step(model, samples, 12)
        largest = wanted_gradient.abs().max().item()
        for size in range(1, 13) if model.config.model_type == "qwen3" else (2, 5, 12):
            got, gradient = gradient_of_a_step(model, samples, size)
            torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
            torch.testing.assert_close(gradient, wanted_gradient, atol=1e-12 * max(1, largest), rtol=0)
    assert largest > 0.1


@pytest.mark.parametrize("architecture", ["qwen3", *PLAIN], indirect=True)
def test_what_cannot_share_prompts_reads_whole_rows(architecture, tokenizer, monkeypatch):
    """Without position ids, with a recurrent state, under gradient checkpointing, and on a GPU."""
    model = architecture.train()
    samples, fed = samples_of(model, tokenizer), fed_to(model)

    def shares():
        fed.clear()
        rollout.score(model, samples, torch.arange(12))
        assert rollout.can_share_prompts(model) == (len(fed) == 2)  # prompts, and then completions
        return rollout.can_share_prompts(model)

    can = model.config.model_type == "qwen3"
    assert shares() == can
    if can:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert not shares()
        model.eval()  # where nothing is recomputed
        assert shares()
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
        assert not rollout.can_share_prompts(model)


def test_scoring_reads_each_prompt_of_a_micro_batch_once_and_no_padding(random_model, tokenizer):
    """Its own prompts at their own length, and then its completions at theirs, after the last token of the prompt."""
    model = random_model()
    samples, fed = samples_of(model, tokenizer), fed_to(model)
    for owners in ([0, 1], [2], [0, 1, 2, 3]):
        fed.clear()
        rows = torch.isin(samples.owner, torch.tensor(owners)).nonzero()[:, 0]
        rollout.score(model, samples, rows)
        before_last = max(len(tokenizer(PROMPTS[i]).input_ids) for i in owners) - 1
        prompts = [(len(owners), before_last)] if before_last else []
        assert fed == [*prompts, (len(rows), samples.completion_mask[rows].sum(1).max())]
    # Micro-batches keep the rows of a prompt together; for whole rows they go by length.
    rows = torch.randperm(12)
    parts = rollout.micro_batches(model, samples, rows, 3)
    assert [samples.owner[part].tolist() for part in parts] == [[i] * 3 for i in range(4)]
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    parts = rollout.micro_batches(model, samples, rows, 5)
    every = samples.prompt_mask.sum(1)[samples.owner] + samples.completion_mask.sum(1)
    lengths = every[torch.cat(parts)]
    assert [len(part) for part in parts] == [5, 5, 2]
    assert torch.equal(lengths, every.sort().values)
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


# --- Prompts
def test_prompts_with_and_without_a_chat_template(tokenizer):
    assert rollout.format_prompts(tokenizer, ["1+2="], "Do this.") == ["1+2="]  # the tiny model's template
    backend = tokenizer.backend_tokenizer
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    assert rollout.format_prompts(plain, ["Why?"], "Do this.") == ["<s>Why?\n\nDo this.\n"]
    plain.chat_template = "{% if enable_thinking is false %}no thoughts {% endif %}{{ messages[0].content }}"
    plain.chat_template += "{% if add_generation_prompt %}|You:{% endif %}"
    assert rollout.format_prompts(plain, ["Why?"], "Do this.") == ["no thoughts Why?\n\nDo this.|You:"]


def test_prompts_are_tokenized_as_they_stand(random_model, tokenizer):
    """A template has written the special tokens already: a tokenizer that adds its own must not begin a prompt twice."""
    eager, first = copy.deepcopy(tokenizer), ("<eos>", tokenizer.eos_token_id)
    adds = tokenizers.processors.TemplateProcessing(single="<eos> $A", special_tokens=[first])
    eager.backend_tokenizer.post_processor = adds
    assert eager("1+2=").input_ids == [first[1], *tokenizer("1+2=").input_ids]
    samples = rollout.generate(random_model(), eager, ["1+2=", "1="], torch.ones(2), 3)
    assert samples.prompts[0].tolist() == tokenizer("1+2=").input_ids
