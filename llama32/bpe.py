"""The parts of a byte-level BPE tokenizer: text is cut, split into pieces, merged into ids.

Splitting is done with `regex` and not left to tiktoken, because a tokenizer.json may split
several times over, and because tiktoken's own engine panics at a million spaces. Merging is
tiktoken's, and linear in the length of a piece.
"""

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import regex
import tiktoken

Cut = Callable[[str], list[str | int]]  # a text into ids of added tokens and the text between
Split = Callable[[str], list[str]]  # a text into pieces
Merge = Callable[[str], list[int]]  # a piece into ids

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

BYTES = [bytes([b]) for b in range(256)]

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
UNPRINTABLE = [b for b in range(256) if b not in PRINTABLE]
LETTERS = {  # how a tokenizer.json spells bytes
    **{chr(b): b for b in PRINTABLE},
    **{chr(0x100 + i): b for i, b in enumerate(UNPRINTABLE)},
}

# `regex` learns of new characters sooner than the engines that tokenizers were made with. What
# tiktoken's tables leave unassigned must be no letter or digit here either: while a text is split
# it trades places with a code point that no table knows.
UNASSIGNED = tiktoken.Encoding(
    "unassigned", pat_str=r"\p{Cn}", mergeable_ranks={b: b[0] for b in BYTES}, special_tokens={}
)
NOWHERE = 0x40000

SPACES, SPACES_BEFORE = regex.compile(r"\s+"), regex.compile(r"(?r)\s+")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text itself. (`added_tokens` in tokenizer.json)"""

    id: int
    content: str
    special: bool = False
    normalized: bool = False  # found in the normalized text
    single_word: bool = False
    lstrip: bool = False  # takes along the white space before it
    rstrip: bool = False


def cutter(added: list[AddedToken], normalize: Callable[[str], str] = str) -> Cut:
    """Cuts out the tokens found in the raw text, then those found in what is normalized."""
    raw = _finder([token for token in added if not token.normalized], str)
    normalized = _finder([token for token in added if token.normalized], normalize)
    return lambda text: [
        found
        for part in raw(text)
        for found in ([part] if isinstance(part, int) else normalized(normalize(part)))
    ]


def _finder(added: list[AddedToken], normalize: Callable[[str], str]) -> Cut:
    """Leftmost first, of these the longest; only then the flags decide, as in `tokenizers`."""
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
            beside = text[max(start - 1, 0) : start] + text[stop : stop + 1]
            if token.single_word and regex.search(r"\w", beside):
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
    """One split after the other, each within the pieces of the one before."""

    def split(text: str) -> list[str]:
        unassigned = bytes(UNASSIGNED.encode_ordinary(text)).decode()
        newer = map(ord, regex.findall(r"\P{Cn}", unassigned))
        swap = {char: char ^ NOWHERE for new in newer for char in (new, new ^ NOWHERE)}
        pieces = [text.translate(swap) if swap else text]
        for step in splits:
            pieces = [part for piece in pieces for part in step(piece)]
        return [piece.translate(swap) for piece in pieces] if swap else pieces

    return split


JOINS = {  # whether a piece joins the one before, given whether that one and this one match
    "Isolated": lambda before, now: False,
    "Removed": lambda before, now: False,
    "Contiguous": operator.eq,
    "MergedWithPrevious": operator.lt,
    "MergedWithNext": operator.gt,
}


def split_by(pattern: str, behavior: str = "Isolated", invert: bool = False) -> Split:
    """Pieces are what matches `pattern` and what lies between. (`Split` in tokenizer.json)

    V1 and MULTILINE because such patterns are written for Oniguruma: sets nest, `$` ends a line.
    Only its `\\w` differs from ours, in ² ³ ¹ ¼ ½ ¾ and the zero-width joiner and non-joiner.
    """
    try:
        compiled = regex.compile(f"({pattern})", regex.V1 | regex.MULTILINE)
    except regex.error as error:
        raise ValueError(f"the pattern {pattern!r} is broken: {error}") from None
    period = compiled.groups + 1  # gap, match, groups within it; gap, match, ...
    joins = JOINS[behavior]

    def split(text: str) -> list[str]:
        parts = compiled.split(text)
        if behavior == "Isolated" and period == 2:
            return [part for part in parts if part]
        pieces: list[list[str]] = []
        before = None
        for i, part in enumerate(parts):
            now = (i % period == 1) != invert
            if i % period > 1 or not part or (now and behavior == "Removed"):
                continue
            if before is not None and joins(before, now):
                pieces[-1].append(part)
            else:
                pieces.append([part])
            before = now
        return ["".join(piece) for piece in pieces]

    return split


def merger(vocab: dict[bytes, int], ranks: dict[bytes, int], whole: bool) -> Merge:
    """Merges pieces by `ranks`; with `whole` not those that are tokens as they stand.

    Ids need not be in the order of merging. Bytes that have no token are dropped, as they are
    by the `tokenizers` library.
    """
    bpe = tiktoken.Encoding("bpe", pat_str="", mergeable_ranks=ranks, special_tokens={})
    ids = {rank: vocab[token] for token, rank in ranks.items() if token in vocab}
    tokens = vocab if whole else {}
    unknown = b"".join(byte for byte in BYTES if byte not in vocab)

    def merge(piece: str) -> list[int]:
        data = piece.encode()
        if data in tokens:
            return [tokens[data]]
        data = data.translate(None, unknown)
        return [ids[rank] for rank in bpe._encode_single_piece(data)] if data else []

    return merge


def ranks_of(merges: list[tuple[bytes, bytes]], whole: bool) -> dict[bytes, int]:
    """Ranks with which tiktoken makes exactly the listed merges.

    tiktoken merges any neighbours that together are a ranked token, a tokenizer.json only listed
    pairs. But bytes merge as if they stood alone until a merge crosses their edge. So the last
    pair of a token is the same in every text, and the place of that one pair in the list is all
    that tiktoken needs. A token that the listed merges do not make of its own bytes gets no rank.
    """
    order = {pair: i for i, pair in enumerate(merges)}
    made = [left + right for left, right in merges]
    ranks: dict[bytes, int | None] = {token: i for i, token in enumerate(made)}
    if not (whole and _lists_all(order, made)):
        ranks = {token: _last_merge(token, order) for token in ranks}
    ranked = {token: len(BYTES) + rank for token, rank in ranks.items() if rank is not None}
    return {byte: byte[0] for byte in BYTES} | ranked


def _lists_all(order: dict[tuple[bytes, bytes], int], made: list[bytes]) -> bool:
    """Whether every pair that makes a token is listed, token by token, as Llama 3's file does.

    Then the place of any pair says the token's rank, and 128,000 tokens need not be tried.
    """
    tokens = {*BYTES, *made}
    in_turn = 1 + sum(map(operator.ne, made, made[1:])) == len({*made})
    return in_turn and all(
        (token[:i], token[i:]) in order
        for token in {*made}
        for i in range(1, len(token))
        if token[:i] in tokens and token[i:] in tokens
    )


def _last_merge(token: bytes, order: dict[tuple[bytes, bytes], int]) -> int | None:
    """The listed merge that completes a token out of its own bytes; None if none does."""
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
