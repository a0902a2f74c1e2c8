"""The stages of a byte-level BPE tokenizer: cut out added tokens, split into pieces, merge bytes.

Splitting uses `regex` and not tiktoken, because a tokenizer.json may split several times in a row,
and because tiktoken's regex engine panics at a million spaces. tiktoken does the merging, in time
linear in the length of a piece.
"""

import operator
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import regex
import tiktoken

SplitAddedTokens = Callable[[str], list[str | int]]  # text -> added ids and text between
Split = Callable[[str], list[str]]  # text -> pieces
Merge = Callable[[str], list[int]]  # piece -> ids

ONLY_BYTE_LEVEL_BPE = (
    "only byte-level BPE loads; `llama32.load_model(path)` still loads the weights and generates "
    "from ids"
)

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

BYTES = [bytes([b]) for b in range(256)]


def bytes_to_unicode() -> dict[int, str]:
    """Return the character that stands for each byte in a tokenizer.json, as in GPT-2's encoder.py.

    Printable bytes stand for themselves, the others are numbered from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(unprintable)}


UNICODE_TO_BYTE = {char: byte for byte, char in bytes_to_unicode().items()}

# `regex` knows newer Unicode characters than the engines with which tokenizers were trained. A code
# point that tiktoken's tables leave unassigned must not count as a letter or digit here either:
# during splitting it is swapped for a code point that is unassigned in all tables.
UNASSIGNED = tiktoken.Encoding(
    "unassigned", pat_str=r"\p{Cn}", mergeable_ranks={b: b[0] for b in BYTES}, special_tokens={}
)
SWAP_BIT = 0x40000

SPACES, SPACES_BEFORE = regex.compile(r"\s+"), regex.compile(r"(?r)\s+")


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the text before BPE. (`added_tokens` in tokenizer.json)"""

    id: int
    content: str
    special: bool = False
    normalized: bool = False  # matched in the normalized text
    single_word: bool = False
    lstrip: bool = False  # includes white space on the left
    rstrip: bool = False


@dataclass(frozen=True)
class TokenizerParts:
    """The contents of a tokenizer file: vocabulary, added tokens and the stages of encoding."""

    source: str  # file name
    tokens: dict[int, bytes]  # by id, with the added tokens
    added: list[AddedToken]
    split: Split
    merge: Merge
    bos_id: int | None
    eos_id: int | None
    normalize: Callable[[str], str] = str
    split_long: Callable[[str], Iterable[str]] = lambda text: [text]  # before the other stages


def split_added_tokens(
    added: list[AddedToken], normalize: Callable[[str], str] = str
) -> SplitAddedTokens:
    """Return a function that cuts added tokens out of a text.

    Tokens are matched in the raw text first, then the tokens marked `normalized` are matched in the
    normalized rest.
    """
    find_raw = _added_token_finder([token for token in added if not token.normalized], str)
    find_normalized = _added_token_finder([token for token in added if token.normalized], normalize)
    return lambda text: [
        part
        for raw in find_raw(text)
        for part in ([raw] if isinstance(raw, int) else find_normalized(normalize(raw)))
    ]


def _added_token_finder(
    added: list[AddedToken], normalize: Callable[[str], str]
) -> SplitAddedTokens:
    """Return a function that finds added tokens in a text.

    The leftmost match wins, then the longest; the flags are checked last, as in `tokenizers`.
    """
    if not added:
        return lambda text: [text] if text else []
    tokens = {normalize(token.content): token for token in added}
    longest_first = sorted(tokens, key=len, reverse=True)
    pattern = regex.compile("|".join(map(regex.escape, longest_first)))

    def find(text: str) -> list[str | int]:
        parts: list[str | int] = []
        end = 0
        for match in pattern.finditer(text):
            token, (start, stop) = tokens[match.group()], match.span()
            neighbours = text[max(start - 1, 0) : start] + text[stop : stop + 1]
            if token.single_word and regex.search(r"\w", neighbours):
                continue
            if token.lstrip and (spaces := SPACES_BEFORE.match(text, end, start)):
                start = spaces.start()
            if token.rstrip and (spaces := SPACES.match(text, stop)):
                stop = spaces.end()
            if end < start:
                parts.append(text[end:start])
            parts.append(token.id)
            end = stop
        return [*parts, text[end:]] if end < len(text) else parts

    return find


def chain(splits: list[Split]) -> Split:
    """Return a split that applies each of `splits` to the pieces of the previous split."""

    def split(text: str) -> list[str]:
        unassigned = bytes(UNASSIGNED.encode_ordinary(text)).decode()
        newer = map(ord, regex.findall(r"\P{Cn}", unassigned))
        swap = {char: char ^ SWAP_BIT for new in newer for char in (new, new ^ SWAP_BIT)}
        pieces = [text.translate(swap) if swap else text]
        for apply in splits:
            pieces = [part for piece in pieces for part in apply(piece)]
        return [piece.translate(swap) for piece in pieces] if swap else pieces

    return split


JOIN_RULES = {  # (previous piece matches, piece matches) -> whether to join the two
    "Isolated": lambda previous, current: False,
    "Removed": lambda previous, current: False,
    "Contiguous": operator.eq,
    "MergedWithPrevious": operator.lt,
    "MergedWithNext": operator.gt,
}


def split_by(pattern: str, behavior: str = "Isolated", invert: bool = False) -> Split:
    """Return a function that splits a text into matches of `pattern` and the text between.

    (`Split` in tokenizer.json) Patterns are written for Oniguruma, hence V1 (nested sets) and
    MULTILINE (`$` ends a line). The only difference left: Oniguruma's `\\w` treats ² ³ ¹ ¼ ½ ¾ and
    the zero-width joiner and non-joiner differently. Raises ValueError if the pattern does not
    compile.
    """
    try:
        compiled = regex.compile(f"({pattern})", regex.V1 | regex.MULTILINE)
    except regex.error as error:
        raise ValueError(f"the pattern {pattern!r} does not compile: {error}") from None
    period = compiled.groups + 1  # parts repeat: text between, match, groups in the match
    joins = JOIN_RULES[behavior]

    def split(text: str) -> list[str]:
        parts = compiled.split(text)
        if behavior == "Isolated" and period == 2:
            return [part for part in parts if part]
        pieces: list[list[str]] = []
        previous = None
        for i, part in enumerate(parts):
            current = (i % period == 1) != invert
            if i % period > 1 or not part or (current and behavior == "Removed"):
                continue
            if previous is not None and joins(previous, current):
                pieces[-1].append(part)
            else:
                pieces.append([part])
            previous = current
        return ["".join(piece) for piece in pieces]

    return split


def bpe_merge(vocab: dict[bytes, int], ranks: dict[bytes, int], ignore_merges: bool) -> Merge:
    """Return a function that merges the bytes of a piece, lowest rank first, into token ids.

    With `ignore_merges` (a field in tokenizer.json) a piece that equals a token gets the token's id
    without merging. The order of ids may differ from the order of merges. Bytes without a token are
    dropped, as in `tokenizers`.
    """
    bpe = tiktoken.Encoding("bpe", pat_str="", mergeable_ranks=ranks, special_tokens={})
    ids = {rank: vocab[token] for token, rank in ranks.items() if token in vocab}
    tokens = vocab if ignore_merges else {}
    unknown = b"".join(byte for byte in BYTES if byte not in vocab)

    def merge(piece: str) -> list[int]:
        data = piece.encode()
        if data in tokens:
            return [tokens[data]]
        data = data.translate(None, unknown)
        return [ids[rank] for rank in bpe._encode_single_piece(data)] if data else []

    return merge


def merge_ranks(merges: list[tuple[bytes, bytes]], ignore_merges: bool) -> dict[bytes, int]:
    """Return ranks with which tiktoken performs exactly the listed merges.

    tiktoken merges any neighbours that form a ranked token, whereas a tokenizer.json merges only
    the listed pairs. Yet the bytes of a token merge as in a text of only the token, unless a merge
    crosses the token's edge. So the last merge of a token is the same in every text, and the index
    of the last merge is the only rank that tiktoken needs. A token that no listed merge completes
    gets no rank.
    """
    order = {pair: i for i, pair in enumerate(merges)}
    merged = [left + right for left, right in merges]
    ranks: dict[bytes, int | None] = {token: i for i, token in enumerate(merged)}
    if not (ignore_merges and _lists_every_pair(order, merged)):
        ranks = {token: _last_merge(token, order) for token in ranks}
    ranked = {token: len(BYTES) + rank for token, rank in ranks.items() if rank is not None}
    return {byte: byte[0] for byte in BYTES} | ranked


def _lists_every_pair(order: dict[tuple[bytes, bytes], int], merged: list[bytes]) -> bool:
    """True if every pair that forms a token is listed, grouped by token, as in Llama 3's file.

    The index of any pair then serves as the token's rank, which saves merging 128,000 tokens.
    """
    tokens = {*BYTES, *merged}
    is_grouped = 1 + sum(map(operator.ne, merged, merged[1:])) == len({*merged})
    return is_grouped and all(
        (token[:i], token[i:]) in order
        for token in {*merged}
        for i in range(1, len(token))
        if token[:i] in tokens and token[i:] in tokens
    )


def _last_merge(token: bytes, order: dict[tuple[bytes, bytes], int]) -> int | None:
    """Return the index of the listed merge that completes a token, or None."""
    parts = [BYTES[b] for b in token]
    last = never = sys.maxsize
    while len(parts) > 1:
        ranks = [order.get(pair, never) for pair in pairwise(parts)]
        last = min(ranks)
        if last == never:
            return None
        i = ranks.index(last)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return last
