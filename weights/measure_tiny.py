"""Measure how well `tiny` and another small model predict held-out stories.

    python weights/measure_tiny.py TEXTS --peer stories260K

Bits per character allow models with different vocabularies to be compared. Each story is predicted
alone, from the model's begin token on; the end of the story is not counted. The peer is a folder
`stories260K` (karpathy/tinyllamas on the Hub) with `hf/` and `vocab.json`, a list of
[piece, score] in the order of the ids.
"""

import json
import math
from functools import cache
from pathlib import Path
from typing import Annotated

import torch
import typer
from make_tiny import read_stories

import llama32
from llama32.train.loop import next_token_loss


def main(
    texts: Annotated[Path, typer.Argument(help="Folder with *_heldout.txt")],
    model: str = "tiny",
    peer: Annotated[Path | None, typer.Option(help="Folder of stories260K")] = None,
) -> None:
    """Print bits per character and the number of stories for each model."""
    stories = read_stories(texts, "*_heldout.txt")
    llm = llama32.load(model, device="cpu", dtype=torch.float32)
    assert llm.tokenizer is not None
    models = {model: (llm.model, {s: llm.tokenizer.encode(s, bos=True) for s in stories})}
    if peer is not None:
        peer_model = llama32.load_model(peer / "hf")
        models[peer.name] = peer_model, {s: encode_by_scores(s, peer) for s in stories}
    fitting = [  # the stories that fit into every model's context
        story
        for story in stories
        if all(
            len(ids[story]) <= model.config.max_position_embeddings
            for model, ids in models.values()
        )
    ]
    for name, (net, ids) in models.items():
        bits = bits_per_character(net, {story: ids[story] for story in fitting})
        size = sum(weight.numel() for weight in net.parameters())
        print(f"{name}, {size:,} parameters: {bits:.4f} bits per character, {len(fitting)} stories")


@torch.no_grad()
def bits_per_character(model: llama32.Llama, ids: dict[str, list[int]]) -> float:
    """Return total bits divided by total characters."""
    nats = sum(
        next_token_loss(model, torch.tensor([tokens])).item() * (len(tokens) - 1)
        for tokens in ids.values()
    )
    return nats / math.log(2) / sum(map(len, ids))


def encode_by_scores(text: str, folder: Path) -> list[int]:
    """Encode with SentencePiece BPE: merge the pair with the highest score until no pair is left.

    Only the first character of a piece may be a space, so words are merged one by one.
    """
    begin = 1
    words = (" " + text).replace(" ", "\0 ").split("\0")[1:]
    return [begin, *(id for word in words for id in _merge(word, folder))]


@cache
def _merge(word: str, folder: Path) -> list[int]:
    pieces = _pieces(folder)
    ids = []
    for character in word:  # without a piece: one id for each byte, 3 to 258
        if character in pieces:
            ids.append(pieces[character][0])
        else:
            ids.extend(byte + 3 for byte in character.encode())
    texts = {id: piece for piece, (id, _) in pieces.items()}
    while True:
        pairs = [
            (pieces[joined][1], -i)
            for i in range(len(ids) - 1)
            if (joined := texts[ids[i]] + texts[ids[i + 1]]) in pieces
        ]
        if not pairs:
            return ids
        _, i = max(pairs)
        ids[-i : -i + 2] = [pieces[texts[ids[-i]] + texts[ids[-i + 1]]][0]]


@cache
def _pieces(folder: Path) -> dict[str, tuple[int, float]]:
    listed = json.loads((folder / "vocab.json").read_text("utf-8"))
    return {piece: (id, score) for id, (piece, score) in enumerate(listed)}


if __name__ == "__main__":
    typer.run(main)
