"""Write a checkpoint of a published shape with random weights, to benchmark without a download.

python benchmarks/make_random.py 1B folder
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from llama32.checkpoint.reader import inspect
from llama32.checkpoint.writer import save
from llama32.config import LlamaConfig, RopeScaling
from llama32.model import Llama
from llama32.train.config import initialize

LLAMA_1B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    tie_word_embeddings=True,
    bos_token_id=128000,
    eos_token_ids=(128001, 128008, 128009),
    dtype="bfloat16",
)
SHAPES = {
    "135M": dataclasses.replace(  # SmolLM2
        LLAMA_1B,
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        rope_scaling=None,
        bos_token_id=0,
        eos_token_ids=(0,),
    ),
    "1B": LLAMA_1B,
    "3B": dataclasses.replace(
        LLAMA_1B, hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128
    ),
}


def random_model(config: LlamaConfig, seed: int) -> Llama:
    """Return a model with weights drawn in bf16 one by one: memory never exceeds the model."""
    with torch.device("meta"):
        model = Llama(config).bfloat16()
    model.to_empty(device="cpu")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed.weight  # to_empty unties the weights
    initialize(model, seed)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint with random weights.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    save(random_model(SHAPES[options.shape], options.seed), options.folder)
    print(inspect(options.folder))


if __name__ == "__main__":
    main()
