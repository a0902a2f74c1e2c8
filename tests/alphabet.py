"""A checkpoint whose every text is known beforehand: it says the alphabet."""

import json
from pathlib import Path
from typing import Any

import torch

from llama32.config import LlamaConfig
from llama32.model import Llama
from llama32.saving import save
from llama32.tokenizer import Tokenizer
from tests.checkpoints import tiny_config
from tests.tokenizers import byte_tokenizer_json

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def alphabet_checkpoint(
    folder: Path, *, says: str = ALPHABET, ends: bool = True, **changes: Any
) -> Path:
    """A folder in the Hub's layout, with a byte tokenizer and a chat template.

    After each byte comes the next one. `says` changes that: its letters, all different, come one
    after the other, first of all after a line break (so it is what a chat answers). After the last
    one the turn ends, or if it never `ends`, the first one comes again.
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
    save(table(config, after), folder)
    settings = {"chat_template": "{{ '<|start_header_id|>' }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def table(config: LlamaConfig, after: dict[int, int]) -> Llama:
    """A model whose layers add nothing, so that the next token depends on the last one only."""
    model = Llama(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(float(weight.ndim == 1))
        model.embed.weight.copy_(torch.eye(config.vocab_size))
        for token, following in after.items():
            model.lm_head.weight[following, token] = 1
    return model
