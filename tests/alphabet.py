"""A checkpoint with known outputs: the model recites the alphabet."""

import json
from pathlib import Path
from typing import Any

import torch

from llama32.checkpoint.writer import save
from llama32.config import LlamaConfig
from llama32.model import Llama
from llama32.text.tokenizer import Tokenizer
from tests.checkpoints import tiny_config
from tests.tokenizers import byte_tokenizer_json

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def alphabet_checkpoint(
    folder: Path, *, says: str = ALPHABET, ends: bool = True, **changes: Any
) -> Path:
    """Write a checkpoint in the Hub's layout, with a byte tokenizer and a chat template.

    The model predicts byte + 1 after each byte, except for the letters of `says`, which must all
    differ: the first letter follows a line break (so `says` is the answer in a chat), and each
    letter follows the previous letter. After the last letter the turn ends, or, without `ends`,
    the first letter follows again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer_json(folder)
    tokenizer = Tokenizer.load(folder)
    vocab_size = tokenizer.vocab_size
    after = {byte: (byte + 1) % 256 for byte in range(256)}
    letters = list(says.encode())
    last = tokenizer.special["<|eot_id|>"] if ends else letters[0]
    after |= dict(zip([ord("\n"), *letters], [*letters, last], strict=True))
    config = tiny_config(
        vocab_size=vocab_size,
        hidden_size=vocab_size,
        num_hidden_layers=1,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_id,
        eos_token_ids=(tokenizer.special["<|eot_id|>"],),
        **changes,
    )
    save(bigram_model(config, after), folder)
    settings = {"chat_template": "{{ '<|start_header_id|>' }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def bigram_model(config: LlamaConfig, after: dict[int, int]) -> Llama:
    """Return a model with layers that add nothing: the next token depends on the last alone."""
    model = Llama(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(float(weight.ndim == 1))
        model.embed.weight.copy_(torch.eye(config.vocab_size))
        for token, next_token in after.items():
            model.lm_head.weight[next_token, token] = 1
    return model
