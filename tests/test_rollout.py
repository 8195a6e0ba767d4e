"""rollout.py: what is sampled is what is scored, token by token, whatever a model's own defaults say."""

import math

import pytest
import torch
import transformers
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
    rollout.prepare_policy(model)
    if own_defaults:
        model.generation_config = own_defaults
    n, temperatures = 4000, (0.8, 1.0, 1.2)
    per_row = torch.tensor(temperatures).repeat(n)
    samples = rollout.generate(
        model, tokenizer, ["1+2="] * len(per_row), per_row, max_completion_length=2
    )
    V = len(tokenizer)

    logits = model(tokenizer("1+2=", return_tensors="pt").input_ids).logits[0, -1]
    first = samples.sequences[:, -2]
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
    second = samples.completion_mask[ones, 1]
    gap = (logprobs[:, 1] + entropies[:, 1])[second]  # E[log p] = -H, for every first token
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(len(gap))


def gpt2(tokenizer):
    """A random model with learned absolute positions (Qwen3's are relative, and hide a mistake in position ids)."""
    ids = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        **ids,
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_score_equals_the_model_and_ignores_padding(random_model, tokenizer, architecture):
    """Scored in a batch with other lengths, and alone without any padding: the same, and equal to log_softmax."""
    model = random_model() if architecture == "qwen3" else gpt2(tokenizer)
    rollout.prepare_policy(model)
    prompts = ["1+2=", "1,2,3:45=", "7="]
    samples = rollout.generate(
        model, tokenizer, prompts * 4, torch.full((12,), 1.5), max_completion_length=9
    )
    logprobs, entropies = rollout.score(model, samples, torch.arange(12))
    lengths = samples.completion_mask.sum(1)
    assert len(set(lengths.tolist())) > 2  # the case is worth testing
    for i in range(12):
        ids = samples.sequences[i][samples.attention_mask[i]][None]
        logits = model(ids).logits[0].double()[-lengths[i] - 1 : -1]
        wanted = torch.log_softmax(logits, -1).gather(1, ids[0, -lengths[i] :, None])[:, 0]
        torch.testing.assert_close(logprobs[i, : lengths[i]].double(), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            entropies[i, : lengths[i]].double(), token_entropy(logits), atol=1e-5, rtol=0
        )
        assert not logprobs[i, lengths[i] :].any()
        seen = []
        handle = model.get_input_embeddings().register_forward_hook(
            lambda *args, seen=seen: seen.append(args[2])
        )
        alone, _ = rollout.score(model, samples, torch.tensor([i]))
        handle.remove()
        assert seen[0].shape[:2] == ids.shape  # every column of padding is gone
        torch.testing.assert_close(alone[0], logprobs[i], atol=1e-5, rtol=0)


class Scripted:
    """A stand-in for a model whose `generate` returns given completions."""

    device = torch.device("cpu")

    def __init__(self, completions, ends):
        self.completions, self.generation_config = (
            torch.tensor(completions),
            GenerationConfig(eos_token_id=ends),
        )

    def generate(self, input_ids, attention_mask, logits_processor):
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
        ],
        ends=[eos, other],
    )
    samples = rollout.generate(scripted, tokenizer, ["1", "1<eos>2", "1", "1", "1"], torch.ones(5), 4)
    assert samples.completion_mask.sum(1).tolist() == [3, 2, 4, 1, 4]
    assert samples.completion_mask.int().diff(dim=1).amax() <= 0  # a prefix of each row
    assert samples.truncated.tolist() == [False, False, True, False, False]
    assert samples.texts == ["12", "1:", "1212", "", "111"]
    assert samples.attention_mask[:, :3].sum(1).tolist() == [1, 3, 1, 1, 1]  # left padding


def test_generation_config_is_restored_and_pad_may_be_missing(random_model, tokenizer):
    model = random_model()
    model.generation_config = QWEN3_DEFAULTS
    without_pad = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>"
    )
    samples = rollout.generate(model, without_pad, ["1+2=", "1="], torch.ones(2), 3)
    assert model.generation_config is QWEN3_DEFAULTS
    assert samples.attention_mask[:, :4].sum(1).tolist() == [4, 2]
    with pytest.raises(IndexError):  # a failure while sampling: token ids beyond the vocabulary
        model.resize_token_embeddings(4)
        rollout.generate(model, tokenizer, ["1:2="], torch.ones(1), 3)
    assert model.generation_config is QWEN3_DEFAULTS


def test_gradient_checkpointing_changes_no_value_and_turns_no_dropout_on(random_model, tokenizer):
    model = random_model(attention_dropout=0.5)
    rollout.prepare_policy(model)
    samples = rollout.generate(model, tokenizer, ["1+2=", "1="], torch.ones(2), 5)
    rows, results = torch.arange(2), []
    for enabled in (False, True):
        rollout.set_gradient_checkpointing(model, enabled)
        model.zero_grad()
        logprobs, entropies = rollout.score(model, samples, rows)
        (logprobs + 0.1 * entropies).sum().backward()
        results.append([logprobs.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)
    # It really recomputes: the layers run twice, and with sampling they may use their cache again.
    calls = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *a: calls.append(1))
    rollout.score(model, samples, rows)[0].sum().backward()
    assert len(calls) == 2
    rollout.set_gradient_checkpointing(model, False)
    rollout.score(model, samples, rows)[0].sum().backward()
    assert len(calls) == 3
    handle.remove()


def test_under_autocast_sampling_and_scoring_share_float32_logits(random_model, tokenizer):
    """The logits that `generate` samples from are those that `score` uses, not their bfloat16 rounding."""
    model = random_model()
    rollout.prepare_policy(model)
    seen = []

    class Spy(rollout.RowTemperature):
        def __call__(self, input_ids, scores):
            seen.append(scores)
            return super().__call__(input_ids, scores)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(rollout, "RowTemperature", Spy)
        samples = rollout.generate(model, tokenizer, ["1+2="] * 8, torch.ones(8), 6)
        logprobs, _ = rollout.score(model, samples, torch.arange(8))
    assert logprobs.dtype == torch.float32
    assert any((x.bfloat16().float() != x).any() for x in seen)  # not rounded
    tokens = samples.sequences[:, -len(seen) :]
    log_p = [torch.log_softmax(scores, -1) for scores in seen]
    sampled_from = torch.stack(
        [x.gather(1, tokens[:, t, None])[:, 0] for t, x in enumerate(log_p)], dim=1
    )
    gap = (sampled_from - logprobs).abs()[samples.completion_mask]
    assert gap.max() < 0.1  # bfloat16 inside the layers, once with a cache and once without


def test_a_model_that_changes_its_logits_after_the_head_is_refused():
    config = transformers.Gemma2Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, initializer_range=1.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="post-processes its logits"):
        rollout.prepare_policy(transformers.Gemma2ForCausalLM(config))


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
    )
    assert rollout.format_prompts(plain, ["Why?"], "Do this.") == ["no thoughts Why?\n\nDo this.|"]
