"""Open Meta's tokenizer.model: one line `base64 rank` for each token, in the order of merging."""

import base64
import re
from collections.abc import Iterator
from pathlib import Path

from llama32.text import bpe

LLAMA3_SPECIAL = (
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"),
    *("finetune_right_pad_id", "step_id", "start_header_id", "end_header_id"),
    *("eom_id", "eot_id", "python_tag", "image"),
    *(f"reserved_special_token_{i}" for i in range(2, 246)),
)
META_MAX_CHARS, META_MAX_RUN = 400_000, 25_000  # characters in a section, in a run
META_RUN_PATTERN = re.compile(  # runs of up to N characters, then N characters of a longer run
    r"(?:\s{1,N}+(?!\s)|\S{1,N}+(?!\S))*+(?:\s{N}(?=\s)|\S{N}(?=\S))".replace(
        "N", str(META_MAX_RUN)
    )
)


def open_tokenizer_model(file: Path) -> bpe.TokenizerParts:
    """Return the contents of a tokenizer.model, with the special tokens of Llama 3.

    Raises ValueError if the file is damaged or in another format, such as SentencePiece.
    """
    ranks = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(
                f"{file}: line {number} is not `base64 rank`; {bpe.ONLY_BYTE_LEVEL_BPE}"
            ) from None
    if sorted(ranks.values()) != [*range(len(ranks))] or not ranks.keys() >= set(bpe.BYTES):
        raise ValueError(
            f"{file}: ranks are missing or repeated; the file is damaged, download it again"
        )
    added = [
        bpe.AddedToken(id, f"<|{name}|>", special=True)
        for id, name in enumerate(LLAMA3_SPECIAL, len(ranks))
    ]
    tokens = {rank: token for token, rank in ranks.items()}
    return bpe.TokenizerParts(
        file.name,
        tokens | {token.id: token.content.encode() for token in added},
        added,
        bpe.chain([bpe.split_by(bpe.LLAMA3_PATTERN)]),
        bpe.bpe_merge(ranks, ranks, ignore_merges=True),
        bos_id=len(ranks),
        eos_id=len(ranks) + 1,
        split_long=split_long,
    )


def split_long(text: str) -> Iterator[str]:
    """Split a text every 400,000 characters, and every 25,000 in a run of spaces or non-spaces.

    Meta's code splits there before any other stage, and a split changes ids. (`Tokenizer.encode` in
    llama-models)
    """
    for start in range(0, len(text), META_MAX_CHARS):
        section = text[start : start + META_MAX_CHARS]
        begin = 0
        while part := META_RUN_PATTERN.match(section, begin):
            yield part.group()
            begin = part.end()
        yield section[begin:]
