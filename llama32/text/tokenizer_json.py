"""Open the Hub's tokenizer.json, the format of the `tokenizers` library. Only byte-level BPE."""

import unicodedata
from collections import ChainMap
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import regex

from llama32.json_files import read_json
from llama32.text import bpe


def open_tokenizer_json(file: Path) -> bpe.TokenizerParts:
    """Return the contents of a tokenizer.json, and the end token of tokenizer_config.json.

    Raises ValueError if the file is damaged or holds another kind of tokenizer.
    """
    data = read_json(file)
    config = file.with_name("tokenizer_config.json")
    match read_json(config) if config.is_file() else None:
        case {"eos_token": str(eos)} | {"eos_token": {"content": str(eos)}}:
            pass
        case _:
            eos = None
    try:
        return _from_json(file.name, data, eos)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not laid out like a tokenizer.json: {error!r}") from None


def _from_json(source: str, data: Any, eos: Any) -> bpe.TokenizerParts:
    model, steps = data["model"], _flatten(data.get("pre_tokenizer"), "pretokenizers")
    _check_kind(model, steps)
    ids: dict[str, int] = model["vocab"]
    as_bytes = {
        token: bytes(map(bpe.UNICODE_TO_BYTE.__getitem__, token))
        for token in ids
        if bpe.UNICODE_TO_BYTE.keys() >= {*token}
    }
    vocab = {as_bytes[token]: ids[token] for token in as_bytes}
    drops_unknown = not (model.get("unk_token") or model.get("byte_fallback"))
    if not vocab or not (drops_unknown or vocab.keys() >= {*bpe.BYTES}):
        raise ValueError(f"the vocabulary lacks single bytes; {bpe.ONLY_BYTE_LEVEL_BPE}")
    ignore_merges = bool(model.get("ignore_merges"))
    ranks = bpe.merge_ranks(_merges(model["merges"], as_bytes), ignore_merges)
    if unlisted := ranks.keys() - vocab.keys() - {*bpe.BYTES}:
        raise ValueError(f"a merge makes {unlisted.pop()!r}, which is not in the vocabulary")
    added = [bpe.AddedToken(**token) for token in data.get("added_tokens", []) if token["content"]]
    tokens = {id: as_bytes.get(token, token.encode()) for token, id in ids.items()}
    tokens |= {token.id: token.content.encode() for token in added}
    if not all(isinstance(id, int) for id in tokens):
        raise TypeError("an id is not an integer")
    ids_by_text = ChainMap({token.content: token.id for token in added}, ids)
    return bpe.TokenizerParts(
        source,
        tokens,
        added,
        bpe.chain([split for step in steps for split in _splits(step)]),
        bpe.bpe_merge(vocab, ranks, ignore_merges),
        bos_id=_bos_id(data.get("post_processor")),
        eos_id=ids_by_text.get("<|end_of_text|>", ids_by_text.get(eos)),
        normalize=_normalizer(data.get("normalizer")),
    )


def _check_kind(model: Any, steps: list[Any]) -> None:
    """Raise ValueError unless the file describes a byte-level BPE."""
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"the model is {model['type']}; {bpe.ONLY_BYTE_LEVEL_BPE}")
    if [step["type"] == "ByteLevel" for step in steps] != [False] * (len(steps) - 1) + [True]:
        raise ValueError(f"the pre_tokenizer does not end in ByteLevel; {bpe.ONLY_BYTE_LEVEL_BPE}")
    for field in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(field):
            raise ValueError(f"the model has {field} {model[field]!r}; {bpe.ONLY_BYTE_LEVEL_BPE}")


def _merges(merges: list[Any], as_bytes: dict[str, bytes]) -> list[tuple[bytes, bytes]]:
    """Return the merges as pairs of bytes; a file has strings "a b" or pairs."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    try:
        return [(as_bytes[left], as_bytes[right]) for left, right in pairs]
    except (KeyError, ValueError) as error:
        raise ValueError(f"the merges are not all pairs from the vocabulary: {error}") from None


def _flatten(node: Any, children: str) -> list[Any]:
    """Return the steps of a Sequence, which may be nested, or an empty list for null."""
    if node is None or node["type"] != "Sequence":
        return [] if node is None else [node]
    return [step for child in node[children] for step in _flatten(child, children)]


def _splits(step: Any) -> list[bpe.Split]:
    """Return the splits of a pre-tokenizer step."""
    match step:
        case {"type": "Split", "pattern": {"Regex": pattern}}:
            return [bpe.split_by(pattern, step["behavior"], step["invert"])]
        case {"type": "Split", "pattern": {"String": text}}:
            return [bpe.split_by(regex.escape(text), step["behavior"], step["invert"])]
        case {"type": "Digits", "individual_digits": is_individual}:
            return [bpe.split_by(r"\p{N}" if is_individual else r"\p{N}+")]
        case {"type": "ByteLevel", "add_prefix_space": add_space}:
            space = [lambda text: [text if text.startswith(" ") else " " + text]]
            words = [bpe.split_by(bpe.GPT2_PATTERN)]
            return space * add_space + words * step.get("use_regex", True)
    raise ValueError(
        f"the pre_tokenizer has {step['type']}, which is not supported; {bpe.ONLY_BYTE_LEVEL_BPE}"
    )


def _normalizer(node: Any) -> Callable[[str], str]:
    """Return a function for all Unicode normalization forms in the file."""
    forms = [step["type"] for step in _flatten(node, "normalizers")]
    if unknown := {*forms} - {"NFC", "NFD", "NFKC", "NFKD"}:
        raise ValueError(
            f"the normalizer has {unknown.pop()}, which is not supported; {bpe.ONLY_BYTE_LEVEL_BPE}"
        )

    def normalize(text: str) -> str:
        for form in forms:
            text = unicodedata.normalize(form, text)
        return text

    return normalize


def _bos_id(node: Any) -> int | None:
    """Return the id that the post-processor puts before a text, or None."""
    ids = []
    for step in _flatten(node, "processors"):
        if step["type"] == "TemplateProcessing":
            front = takewhile(lambda part: "SpecialToken" in part, step["single"])
            names = [part["SpecialToken"]["id"] for part in front]
            ids += [id for name in names for id in step["special_tokens"][name]["ids"]]
        elif step["type"] != "ByteLevel":
            raise ValueError(f"the post_processor has {step['type']}, which is not supported")
    if len(ids) > 1:
        raise ValueError(f"the post_processor puts {len(ids)} tokens before a text, allowed: 1")
    return ids[0] if ids else None
