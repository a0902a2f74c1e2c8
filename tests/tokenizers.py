"""Small tokenizer.json files, written by hand."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama32.text.bpe import LLAMA3_PATTERN, bytes_to_unicode

BYTE_TO_UNICODE = bytes_to_unicode()

LLAMA3_STEPS = (
    {
        "type": "Split",
        "pattern": {"Regex": LLAMA3_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    },
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
)
HUB_NAMES = {  # index -> name; the Hub numbers the others as reserved
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
}


def spell(token: bytes) -> str:
    """Return the bytes of a token as a tokenizer.json writes them."""
    return "".join(BYTE_TO_UNICODE[byte] for byte in token)


def write_tokenizer_json(
    folder: Path,
    pairs: Iterable[tuple[bytes, bytes]] = (),
    *,
    vocab: dict[str, int] | None = None,
    steps: Iterable[dict[str, Any]] = LLAMA3_STEPS,
    added: Iterable[dict[str, Any]] = (),
    normalizer: dict[str, Any] | None = None,
    post_processor: dict[str, Any] | None = None,
    **model: Any,
) -> Path:
    """Write a byte-level tokenizer.json; the default vocabulary is 256 bytes and merged pairs."""
    pairs = list(pairs)
    if vocab is None:
        tokens = [bytes([byte]) for byte in range(256)] + [left + right for left, right in pairs]
        vocab = {spell(token): id for id, token in enumerate(dict.fromkeys(tokens))}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"special": True} | flags | token for token in added],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)},
        "post_processor": post_processor,
        "decoder": LLAMA3_STEPS[1],
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": [[spell(left), spell(right)] for left, right in pairs],
        }
        | model,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(data, ensure_ascii=False), "utf-8")
    return file


def starts_with(token: str, id: int) -> dict[str, Any]:
    """Return a post-processor that puts one token before a text."""
    return {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": token, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }


def byte_tokenizer_json(folder: Path) -> Path:
    """Write Llama 3's tokenizer.json without merges: 256 bytes, then the 256 special tokens."""
    reserved = iter(range(256))
    names = [HUB_NAMES.get(i) or f"reserved_special_token_{next(reserved)}" for i in range(256)]
    added = [{"id": id, "content": f"<|{name}|>"} for id, name in enumerate(names, 256)]
    return write_tokenizer_json(
        folder, added=added, post_processor=starts_with("<|begin_of_text|>", 256)
    )
