"""rollout.py: what is sampled is what is scored, token by token, whatever a model's own defaults say."""

import copy
import math

import pytest
import tokenizers
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

import rollout
from entropy import token_entropy

QWEN3_DEFAULTS = GenerationConfig(
    do_sample=True,
    temperature=0.6,
    top_k=20,
    top_p=0.95,
    repetition_penalty=1.5,
    min_p=0.2,
    suppress_tokens=[3],
)


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic in standard deviations from its mean (Wilson and Hilferty), rare cells pooled."""
    expected = probabilities.double() * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).clamp(min=1e-9)
    statistic, degrees = ((counts - expected) ** 2 / expected).sum().item(), len(expected) - 1
    spread = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


@pytest.mark.parametrize("own_defaults", [None, QWEN3_DEFAULTS], ids=["neutral", "like Qwen3's"])
def test_sampled_frequencies_match_scored_probabilities_at_three_temperatures_in_one_call(
    random_model, tokenizer, own_defaults
):
    model = random_model()
    if own_defaults:
        model.generation_config = own_defaults
    n, temperatures = 4000, (0.8, 1.0, 1.2)
    per_row = torch.tensor(temperatures).repeat(n)
    samples = rollout.generate(model, tokenizer, ["1+2="] * len(per_row), per_row, max_completion_length=2)
    V = len(tokenizer)

    logits = model(tokenizer("1+2=", return_tensors="pt").input_ids).logits[0, -1]
    P = len(tokenizer("1+2=").input_ids)
    first = samples.sequences[:, P]
    z = {}
    for T in temperatures:
        counts = torch.bincount(first[per_row == T], minlength=V)
        z[T] = chi_square(counts, torch.softmax(logits / T, -1))
    assert max(z.values()) < 4, z
    # The same counts are far from the policy at a neighbouring temperature: the test can fail.
    assert chi_square(torch.bincount(first[per_row == 0.8], minlength=V), torch.softmax(logits, -1)) > 6

    # The second token, scored by `score` itself: mean log-probability and its square match their expectations.
    ones = (per_row == 1.0).nonzero()[:, 0]
    logprobs, entropies = (x.detach() for x in rollout.score(model, samples, ones))
    second = samples.completion_mask[ones, P + 1]
    gap = (logprobs[:, P + 1] + entropies[:, P + 1])[second]  # E[log p] = -H, for every first token
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(len(gap))


def architectures(tokenizer):
    """Random small models: with rotary and learned positions, grouped heads, a window, alibi, a recurrent one."""
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    V = len(tokenizer)
    common = {
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64, "initializer_range": 0.3, **ids,
    }  # fmt: skip
    few = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3, **ids}
    t = transformers
    return {
        "qwen3": t.Qwen3Config(**common, num_key_value_heads=1, head_dim=16),
        "llama": t.LlamaConfig(**common),
        "mistral": t.MistralConfig(**common, num_key_value_heads=1, sliding_window=8),
        "gpt2": t.GPT2Config(
            vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, **ids
        ),
        "opt": t.OPTConfig(
            vocab_size=V, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64, init_std=0.3, **ids,
        ),
        "neox": t.GPTNeoXConfig(**common),
        "falcon": t.FalconConfig(**few, num_attention_heads=2),
        "mamba": t.MambaConfig(**few, state_size=4),
    }  # fmt: skip


ARCHITECTURES = ("qwen3", "llama", "mistral", "gpt2", "opt", "neox", "falcon", "mamba")
PROMPTS = ["1+2=", "1,2,3:45=", "7"]  # the last is a single token


@pytest.fixture
def architecture(request, tokenizer):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(architectures(tokenizer)[request.param]).eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES, indirect=True)
def test_score_equals_a_plain_unpadded_forward_in_float64(architecture, tokenizer):
    """Scored in a batch with other lengths, padded, without a mask: equal to each row alone by log_softmax."""
    model = architecture
    samples = rollout.generate(model, tokenizer, PROMPTS * 4, torch.full((12,), 1.5), max_completion_length=9)
    logprobs, entropies = rollout.score(model, samples, torch.arange(12))
    assert len(set(samples.lengths.tolist())) > 3  # the case is worth testing
    assert not logprobs[~samples.completion_mask].any()
    # What was noted while sampling, through the cache, is the same.
    torch.testing.assert_close(samples.logprobs, logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(samples.entropies, entropies, atol=1e-5, rtol=0)
    exact = copy.deepcopy(model).double()
    for i in range(12):
        ids, mask = samples.sequences[i, : samples.lengths[i]][None], samples.completion_mask[i]
        logits = exact(ids, use_cache=False).logits[0, :-1].double()[mask[1 : samples.lengths[i]]]
        wanted = torch.log_softmax(logits, -1).gather(1, ids[0, -len(logits) :, None])[:, 0]
        torch.testing.assert_close(logprobs[i, mask].double(), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(entropies[i, mask].double(), token_entropy(logits), atol=1e-5, rtol=0)


@pytest.mark.parametrize("segment", [3, 64])
@pytest.mark.parametrize("architecture", ARCHITECTURES, indirect=True)
def test_segments_and_shared_prompts_change_no_token(architecture, tokenizer, monkeypatch, segment):
    """Near temperature 0, each row is what repeated forward passes of the row alone choose, greedily."""
    monkeypatch.setattr(rollout, "SEGMENT", segment)
    samples = rollout.generate(architecture, tokenizer, PROMPTS * 2, torch.full((6,), 1e-4), max_completion_length=20)
    for i, prompt in enumerate(PROMPTS * 2):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        start = ids.shape[1]
        while ids.shape[1] < start + 20 and ids[0, -1] != tokenizer.eos_token_id:
            ids = torch.cat([ids, architecture(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert samples.sequences[i, : samples.lengths[i]].tolist() == ids[0].tolist()


def test_tokens_are_drawn_by_their_probabilities_and_impossible_ones_never():
    """Chi-square of a large vocabulary, most of it rare; and tokens of probability zero at every place."""
    logits = torch.randn(1, 5000) * 3
    logits[0, ::7] = -torch.inf
    for T in (0.5, 1.0):
        sampler = rollout.Sampler(torch.full((20_000,), T))
        drawn = sampler(None, logits.expand(20_000, -1))
        assert (drawn.isfinite().sum(1) == 1).all()
        counts = torch.bincount(drawn.argmax(1), minlength=5000)
        assert counts[::7].sum() == 0
        assert chi_square(counts, torch.softmax(logits[0] / T, -1)) < 4
        log_p = torch.log_softmax(logits[0].double(), -1)  # what it notes is at temperature 1
        torch.testing.assert_close(sampler.noted[0][0].double(), log_p[drawn.argmax(1)], atol=1e-5, rtol=0)
    only_last = torch.full((50, 9), -torch.inf)
    only_last[:, -1] = 0.0
    assert (rollout.Sampler(torch.ones(50))(None, only_last).argmax(1) == 8).all()
    nothing = rollout.Sampler(torch.ones(2))(None, torch.full((2, 9), torch.nan))  # found out later, by the entropy
    assert nothing.shape == (2, 9)


def test_a_prompt_is_read_once_and_finished_rows_leave(random_model, tokenizer, monkeypatch):
    """What the model is fed: distinct prompts without their last token, then only rows that go on."""
    monkeypatch.setattr(rollout, "SEGMENT", 2)
    model, shapes = random_model(), []
    model.get_input_embeddings().register_forward_hook(lambda *args: shapes.append(tuple(args[1][0].shape)))
    samples = rollout.generate(model, tokenizer, ["1+2="] * 40 + ["3="] * 24, torch.ones(64), 6)
    assert shapes[0] == (2, 3)
    assert shapes[1] == (64, 1)
    ended_early = (samples.completion_mask.sum(1) <= 2).sum().item()
    assert 0 < ended_early < 64
    assert shapes[3] == (64 - ended_early, 1)
    assert all(columns == 1 for _, columns in shapes[1:])


def test_sampled_frequencies_match_through_segments_at_mixed_temperatures(random_model, tokenizer, monkeypatch):
    """The third token, sampled after two segments, against the exact mixture over all prefixes of two tokens."""
    monkeypatch.setattr(rollout, "SEGMENT", 1)
    model, n, V = random_model(), 4000, len(tokenizer)
    temperatures = torch.tensor([0.7, 1.3]).repeat(n)
    samples = rollout.generate(model, tokenizer, ["1+2="] * (2 * n), temperatures, max_completion_length=3)
    prompt = tokenizer("1+2=", return_tensors="pt").input_ids
    tokens = torch.arange(V)
    prefixes = torch.cat([prompt.expand(V * V, -1), torch.cartesian_prod(tokens, tokens)], dim=1)  # [V * V, P + 2]
    logits = model(prefixes, use_cache=False).logits[:, -3:]
    for T in (0.7, 1.3):
        p = torch.softmax(logits / T, -1)  # [V * V, 3, V]
        rows = torch.arange(V * V)
        chance = p[rows, 0, prefixes[:, -2]] * p[rows, 1, prefixes[:, -1]]
        alive = (prefixes[:, -2:] != tokenizer.eos_token_id).all(1)
        expected = (chance[alive, None] * p[alive, 2]).sum(0)
        kept = samples.completion_mask[:, -1] & (temperatures == T)
        counts = torch.bincount(samples.sequences[kept, -1], minlength=V)
        assert chi_square(counts, expected / expected.sum()) < 4
        other = torch.softmax(logits[alive, 2], -1).mul(chance[alive, None]).sum(0)
        assert chi_square(counts, other / other.sum()) > 4  # the wrong temperature for the last token is noticed


class Scripted:
    """A stand-in for a model whose `generate` returns given completions, in one call (as a recurrent one's)."""

    device, _is_stateful, config = torch.device("cpu"), True, transformers.LlamaConfig()

    def __init__(self, completions, ends):
        self.completions, self.generation_config = torch.tensor(completions), GenerationConfig(eos_token_id=ends)

    def generate(self, input_ids, attention_mask, max_new_tokens, logits_processor):
        for _ in self.completions[0]:
            logits_processor[0](input_ids, torch.zeros(len(input_ids), 17))
        return torch.cat([input_ids, self.completions], dim=1)


def test_completion_masks_go_by_position(tokenizer):
    """Several end tokens, pad = eos, an end token in the prompt, nothing but the end, and truncation."""
    one, two = tokenizer.convert_tokens_to_ids(["1", "2"])
    eos, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(":")
    scripted = Scripted(
        [
            [one, two, eos, eos],  # ended; the second eos is padding (pad = eos)
            [one, other, two, eos],  # ended by the other end token; what follows does not count
            [one, two, one, two],  # truncated
            [eos, eos, eos, eos],  # the end at once
            [one, one, one, eos],  # ended in the last place: not truncated
            [two, eos, tokenizer.pad_token_id, tokenizer.pad_token_id],  # ended, and padded by another token
        ],
        ends=[eos, other],
    )
    samples = rollout.generate(scripted, tokenizer, ["1", "1<eos>2", "1", "1", "1", "1"], torch.ones(6), 4)
    assert samples.completion_mask.sum(1).tolist() == [3, 2, 4, 1, 4, 2]
    assert samples.truncated.tolist() == [False, False, True, False, False, False]
    assert samples.texts == ["12", "1:", "1212", "", "111", "2"]
    assert samples.lengths.tolist() == [1 + 3, 3 + 2, 1 + 4, 1 + 1, 1 + 4, 1 + 2]
    starts = samples.completion_mask.int().argmax(1)
    assert starts.tolist() == [1, 3, 1, 1, 1, 1]  # each row begins with its prompt
    assert samples.sequences[1, :5].tolist() == [one, eos, two, one, other]


def test_generation_config_is_restored_and_pad_may_be_missing(random_model, tokenizer):
    model = random_model()
    model.generation_config = QWEN3_DEFAULTS
    without_pad = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    samples = rollout.generate(model, without_pad, ["1+2=", "1="], torch.ones(2), 3)
    assert model.generation_config is QWEN3_DEFAULTS
    assert samples.completion_mask.int().argmax(1).tolist() == [4, 2]
    with pytest.raises(IndexError):  # a failure while sampling: token ids beyond the vocabulary
        model.resize_token_embeddings(4)
        rollout.generate(model, tokenizer, ["1:2="], torch.ones(1), 3)
    assert model.generation_config is QWEN3_DEFAULTS


@pytest.fixture
def load(random_model, tokenizer, tmp_path):
    """A function that saves a random model and loads it as train.py does; keyword arguments go to load_policy."""

    def make(model=None, **options):
        (model or random_model()).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return rollout.load_policy(str(tmp_path), **options)[0]

    return make


def test_gradient_checkpointing_changes_no_value_and_dropout_is_off_for_good(random_model, tokenizer, load):
    results, calls = [], []
    for enabled in (False, True):
        model = load(random_model(attention_dropout=0.5), gradient_checkpointing=enabled).train()
        assert not [m for m in model.modules() if getattr(m, "attention_dropout", 0.0)]
        torch.manual_seed(0)
        samples = rollout.generate(model.eval(), tokenizer, ["1+2=", "1="], torch.ones(2), 5)
        model.train().model.layers[0].mlp.register_forward_pre_hook(lambda *a: calls.append(1))
        logprobs, entropies = rollout.score(model, samples, torch.arange(2))
        (logprobs + 0.1 * entropies).sum().backward()
        results.append([logprobs.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)
    assert len(calls) == 1 + 2  # it really recomputes: the layers run twice


def test_gpt2s_dropout_is_off_too(tokenizer, load):
    config = architectures(tokenizer)["gpt2"]
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.5
    model = load(transformers.GPT2LMHeadModel(config)).train()
    ids = torch.arange(6)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_under_bfloat16_sampling_and_scoring_share_float32_logits(tokenizer, load, monkeypatch):
    """The logits that `generate` samples from are those that `score` uses, not their bfloat16 rounding."""
    model, seen = load(bf16=True), []
    draw = rollout.Sampler.__call__
    monkeypatch.setattr(rollout.Sampler, "__call__", lambda self, ids, z: seen.append(z) or draw(self, ids, z))
    samples = rollout.generate(model, tokenizer, ["1+2="] * 8, torch.ones(8), 6)
    logprobs, _ = rollout.score(model, samples, torch.arange(8))
    assert logprobs.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert any((x.bfloat16().float() != x).any() for x in seen)  # not rounded
    log_p = [torch.log_softmax(scores, -1) for scores in seen]
    tokens = samples.sequences[:, -len(seen) :]
    sampled_from = torch.stack([x.gather(1, tokens[:, t, None])[:, 0] for t, x in enumerate(log_p)], dim=1)
    mask = samples.completion_mask[:, -len(seen) :]
    gap = (sampled_from - logprobs[:, -len(seen) :]).abs()[mask]
    assert gap.max() < 0.1  # bfloat16 inside the layers, once with a cache and once without
    hidden = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: hidden.append(out.dtype))
    rollout.score(model, samples, torch.arange(8))
    assert hidden == [torch.bfloat16]  # the body does run in bfloat16


def test_the_head_is_in_float32_on_a_body_that_ends_in_bfloat16(load, monkeypatch):
    """Qwen3's last norm, with float32 weights, happens to return float32; another model's need not."""
    norm = transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: forward(self, x).bfloat16())
    model, ids = load(bf16=True), torch.arange(4)[None]
    assert model.base_model(ids).last_hidden_state.dtype == torch.bfloat16
    assert model(ids).logits.dtype == torch.float32


def test_the_cache_is_bfloat16_and_no_token_changes(tokenizer, load, monkeypatch):
    """Qwen3's k_norm makes keys float32 under autocast; attention rounds them to bfloat16 in any case."""
    model, results = load(bf16=True), []
    for kind in (rollout.AutocastCache, transformers.DynamicCache):
        made = []
        make = lambda kind=kind, made=made, **given: made.append(kind(**given)) or made[-1]  # noqa: E731
        monkeypatch.setattr(rollout, "AutocastCache", make)
        torch.manual_seed(0)
        samples = rollout.generate(model, tokenizer, ["1+2=", "3="] * 8, torch.ones(16), 8)
        results.append((samples.sequences, {made[0].layers[0].keys.dtype, made[0].layers[0].values.dtype}))
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


def test_scoring_passes_no_attention_mask(random_model, tokenizer, monkeypatch):
    """An explicit mask rules fused attention kernels out, and cuDNN's backward returns NaN for some masked shapes."""
    model, masks = random_model(), []
    samples = rollout.generate(model, tokenizer, PROMPTS, torch.ones(3), 6)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    spy = lambda *a, attn_mask=None, **k: masks.append(attn_mask) or sdpa(*a, attn_mask=attn_mask, **k)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    rollout.score(model, samples, torch.arange(3))
    assert masks == [None, None]


def test_a_model_that_changes_its_logits_after_the_head_is_refused(load, tokenizer):
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, initializer_range=1.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="are not states times head weights"):
        load(transformers.Gemma2ForCausalLM(config))


def test_a_model_whose_head_has_a_bias_is_refused(load, tokenizer):
    """Phi's and GPT-J's heads have one, which `score` would leave out."""
    config = transformers.PhiConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.PhiForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias)
    with pytest.raises(ValueError, match="are not states times head weights"):
        load(model)


def test_a_model_that_is_random_in_training_is_refused(load, monkeypatch):
    """Dropout by any name that the config does not show must not slip through either."""
    forward = transformers.models.qwen3.modeling_qwen3.Qwen3MLP.forward
    shaky = lambda self, x: torch.nn.functional.dropout(forward(self, x), 0.5, self.training)  # noqa: E731
    monkeypatch.setattr(transformers.models.qwen3.modeling_qwen3.Qwen3MLP, "forward", shaky)
    with pytest.raises(ValueError, match="are not states times head weights"):
        load()


def test_prompts_with_and_without_a_chat_template(tokenizer):
    assert rollout.format_prompts(tokenizer, ["1,2,3:4="], "Do this.") == ["1,2,3:4="]  # the tiny model's own template
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>")
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
    assert samples.completion_mask.int().argmax(1).tolist() == [4, 2]


def test_a_micro_batch_is_scored_at_its_own_width_and_in_chunks_of_the_budget(random_model, tokenizer, monkeypatch):
    model, widths, chunks, whole = random_model(), [], [], rollout.logprobs_and_entropies
    samples = rollout.generate(model, tokenizer, ["1+2=", "1="] * 8, torch.ones(16), 9)
    model.get_input_embeddings().register_forward_hook(lambda *args: widths.append(args[1][0].shape[1]))
    monkeypatch.setattr(rollout, "logprobs_and_entropies", lambda *a: chunks.append(a[3]) or whole(*a))
    for budget in (3 * len(tokenizer), 1):
        monkeypatch.setattr(rollout, "LOGITS_BUDGET", budget)
        rollout.score(model, samples, samples.lengths.argsort()[:2])
    assert widths == [samples.lengths.sort().values[1]] * 2
    assert widths[0] < samples.sequences.shape[1]
    assert chunks == [3, 1]


def test_rows_leave_at_any_of_the_models_end_tokens(random_model, tokenizer, monkeypatch):
    """A chat model's generation_config names more of them than its tokenizer."""
    monkeypatch.setattr(rollout, "SEGMENT", 1)
    model, fed = random_model(), []
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["1", "2", "+"])]
    model.generation_config.eos_token_id = ends[1:]
    model.get_input_embeddings().register_forward_hook(lambda *args: fed.append(args[1][0].shape[0]))
    samples = rollout.generate(model, tokenizer, ["1+2="] * 64, torch.full((64,), 3.0), 4)
    lengths = samples.completion_mask.sum(1)
    assert fed[1:] == [(lengths > t).sum() for t in range(4)]
    assert torch.isin(samples.sequences[torch.arange(64), samples.lengths - 1], torch.tensor(ends)).sum() > 32


def test_a_policy_is_loaded_in_float32_and_evaluation_mode_and_needs_an_end_token(
    random_model, tokenizer, load, tmp_path
):
    model = load(random_model().bfloat16())  # stored in half precision
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    endless = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    endless.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no end token"):
        rollout.load_policy(str(tmp_path))
