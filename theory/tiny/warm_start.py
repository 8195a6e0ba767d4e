"""How the tiny models were made:  `python theory/tiny/warm_start.py OUT [--seed 1]`

RL needs a policy that is right now and then. A language model has that from its pretraining; the
tiny one gets it here, by supervised training on random right answers. It is stopped early on
purpose: it then solves about half of the problems with plenty of entropy, where RL starts.

start-0 and start-1, beside this file, are what seeds 0 and 1 give (two minutes on one core). The
experiments' second policy is a Llama that answers sums:

    python theory/tiny/warm_start.py OUT --task sums --architecture llama --steps 1400
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import tokenizers
import torch
import transformers
from tqdm import tqdm

import countdown
import sums

EXAMPLES = {"countdown": countdown.example, "sums": sums.example}
CONFIGS = {"qwen3": transformers.Qwen3Config, "llama": transformers.LlamaConfig}
BATCH_SIZE, PEAK_LEARNING_RATE = 64, 4e-3


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token for each character of the tasks. Its chat template drops the instruction."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+-,:="])}
    characters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    characters.decoder = tokenizers.decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=characters, **special)
    tokenizer.chat_template = "{{ messages[0]['content'].split('\n')[0] }}"
    return tokenizer


def make_config(architecture: str) -> transformers.PreTrainedConfig:
    """Two layers of width 64, 108 k parameters: "qwen3" or "llama"."""
    tokenizer = make_tokenizer()
    return CONFIGS[architecture](
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=16, max_position_embeddings=64,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip


def warm_start(
    folder: Path, config: transformers.PreTrainedConfig, example: Callable, steps: int, seed: int
) -> None:
    """Train a model of this config from scratch on the task's examples; save it with its tokenizer.

    `example(rng)` gives a problem of the training split and a right answer to it.
    """
    torch.manual_seed(seed)
    rng, tokenizer = random.Random(f"warm start {seed}"), make_tokenizer()
    model = transformers.AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    for _ in tqdm(range(steps), desc="warm start"):
        examples = [example(rng) for _ in range(BATCH_SIZE)]
        texts = [f"{problem.question}{answer}<eos>" for problem, answer in examples]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")

        # What is learned is the answer: what follows the (first) "=", up to <eos>.
        equals = (batch.input_ids == tokenizer.convert_tokens_to_ids("=")).long()
        learned = (equals.cumsum(1) - equals) * batch.attention_mask  # [B, S]
        labels = batch.input_ids.masked_fill(learned == 0, -100)
        ids, attention_mask = batch.input_ids, batch.attention_mask
        model(input_ids=ids, attention_mask=attention_mask, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--task", choices=EXAMPLES, default="countdown")
    parser.add_argument("--architecture", choices=CONFIGS, default="qwen3")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the last bit of a sum depends on how many threads share it
    config = make_config(args.architecture)
    warm_start(args.folder, config, EXAMPLES[args.task], args.steps, args.seed)


if __name__ == "__main__":
    main()
