"""Text <-> ids, as Meta's `tokenizer.model` or the Hub's `tokenizer.json` defines it.

Both files describe a byte-level BPE; its parts are in `bpe.py`, and here they are put together
from what a file says. Text never becomes control: special tokens are found in a text on request.
"""

import base64
import codecs
import re
import unicodedata
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any

import regex

from llama32 import bpe
from llama32.files import read_json

LLAMA3_SPECIAL = (
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"),
    *("finetune_right_pad_id", "step_id", "start_header_id", "end_header_id"),
    *("eom_id", "eot_id", "python_tag", "image"),
    *(f"reserved_special_token_{i}" for i in range(2, 246)),
)
META_BLOCK, META_RUN = 400_000, 25_000  # characters
META_CUT = re.compile(  # runs that are short enough, then as much as may be of one that is not
    r"(?:\s{1,N}+(?!\s)|\S{1,N}+(?!\S))*+(?:\s{N}(?=\s)|\S{N}(?=\S))".replace("N", str(META_RUN))
)

NO_TOKEN = "\ufffd".encode()
ONLY = (
    "only byte-level BPE loads; `llama32.load_model(path)` still loads the weights and generates "
    "from ids"
)


class Tokenizer:
    """Text <-> ids of one checkpoint; `Tokenizer.load(path)` makes it.

    `special` maps the text of control tokens to their ids. `vocab_size` is the highest id plus
    one. `bos_id` is what the checkpoint's own rule puts before a prompt, `eos_id` what ends a
    text; None where it has none. `source` says in one line what was loaded.
    """

    def __init__(
        self,
        source: str,
        texts: dict[int, bytes],
        added: list[bpe.AddedToken],
        split: bpe.Split,
        merge: bpe.Merge,
        *,
        bos_id: int | None,
        eos_id: int | None,
        normalize: Callable[[str], str] = str,
        clip: Callable[[str], Iterable[str]] = lambda text: [text],
    ) -> None:
        self.special = MappingProxyType({t.content: t.id for t in added if t.special})
        self._texts = texts | {token.id: token.content.encode() for token in added}
        self.vocab_size = max(self._texts) + 1
        self.bos_id, self.eos_id = bos_id, eos_id
        counts = f"{len(self._texts) - len(added)} + {len(added)} tokens"
        self.source = f"{source} (byte-level BPE, {counts})"
        plain = [token for token in added if not token.special]
        self._cut = {True: bpe.cutter(added, normalize), False: bpe.cutter(plain, normalize)}
        self._clip, self._split, self._merge = clip, split, merge

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a checkpoint's folder, or its `tokenizer.json` or `tokenizer.model`.

        ValueError for a file that is damaged or holds another kind of tokenizer.
        """
        file = cls.find(path)
        if file is None:
            raise FileNotFoundError(f"{path}: no tokenizer.json or tokenizer.model here")
        return _read_hub(file) if file.suffix == ".json" else _read_meta(file)

    @staticmethod
    def find(path: str | Path) -> Path | None:
        """The file that `load` would read, None where there is none."""
        path = Path(path)
        names = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
        places = [path / name for name in names] if path.is_dir() else [path]
        return next((place for place in places if place.is_file()), None)

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, allow_special: bool = False
    ) -> list[int]:
        """The ids of a text. The text of a special token is plain text unless `allow_special`.

        `bos` adds nothing where `bos_id` is None; `eos` without an `eos_id` is a ValueError. A
        lone surrogate becomes U+FFFD.
        """
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        for block in self._clip(text):
            for part in self._cut[allow_special](block):
                if isinstance(part, int):
                    ids.append(part)
                else:
                    for piece in self._split(part):
                        ids += self._merge(piece)
        if eos:
            if self.eos_id is None:
                raise ValueError(f"{self.source} has no token that ends a text: use eos=False")
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens as their text, broken UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids, which may begin or end within a character.

        An id without a token, such as a row that pads an embedding, is a U+FFFD: a model may well
        choose one, and a text must not break off for it.
        """
        return b"".join([self._texts.get(id, NO_TOKEN) for id in ids])

    def stream(self) -> "TextStream":
        """A decoder of ids that come one by one."""
        return TextStream(self)


class TextStream:
    """Ids in, text out as soon as it is certain: no character is ever split.

    All that `push` and a last `flush` return makes what `decode` says of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that `id` makes certain, often none."""
        return self._utf8.decode(self._tokenizer.decode_bytes([id]))

    def flush(self) -> str:
        """What is left: U+FFFD for a character that stayed incomplete."""
        return self._utf8.decode(b"", final=True)


def _read_meta(file: Path) -> Tokenizer:
    ranks = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{file}: line {number} is not `base64 rank`; {ONLY}") from None
    if sorted(ranks.values()) != [*range(len(ranks))] or not ranks.keys() >= set(bpe.BYTES):
        raise ValueError(f"{file}: ranks are missing or double; the file is damaged, get it again")
    return Tokenizer(
        file.name,
        {rank: token for token, rank in ranks.items()},
        [
            bpe.AddedToken(id, f"<|{name}|>", special=True)
            for id, name in enumerate(LLAMA3_SPECIAL, len(ranks))
        ],
        bpe.chain([bpe.split_by(bpe.LLAMA3_PATTERN)]),
        bpe.merger(ranks, ranks, whole=True),
        bos_id=len(ranks),
        eos_id=len(ranks) + 1,
        clip=_clip,
    )


def _clip(text: str) -> Iterator[str]:
    """Blocks of 400,000 characters, cut after each 25,000 in a run of spaces or of non-spaces.

    Meta's code does so, and a cut changes ids.
    """
    for start in range(0, len(text), META_BLOCK):
        block = text[start : start + META_BLOCK]
        begin = 0
        while part := META_CUT.match(block, begin):
            yield part.group()
            begin = part.end()
        yield block[begin:]


def _read_hub(file: Path) -> Tokenizer:
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


def _from_json(source: str, data: Any, eos: Any) -> Tokenizer:
    model, steps = data["model"], _leaves(data.get("pre_tokenizer"), "pretokenizers")
    _refuse_other_kinds(model, steps)
    ids: dict[str, int] = model["vocab"]
    spelled = {
        token: bytes(map(bpe.LETTERS.__getitem__, token))
        for token in ids
        if bpe.LETTERS.keys() >= {*token}
    }
    vocab = {token: ids[letters] for letters, token in spelled.items()}
    drops = not (model.get("unk_token") or model.get("byte_fallback"))
    if not vocab or not (drops or vocab.keys() >= {*bpe.BYTES}):
        raise ValueError(f"the vocabulary lacks single bytes; {ONLY}")
    whole = bool(model.get("ignore_merges"))
    ranks = bpe.ranks_of(_merges(model["merges"], spelled), whole)
    if lost := ranks.keys() - vocab.keys() - {*bpe.BYTES}:
        raise ValueError(f"a merge makes {lost.pop()!r}, which is not in the vocabulary")
    added = [bpe.AddedToken(**token) for token in data.get("added_tokens", []) if token["content"]]
    names = ChainMap({token.content: token.id for token in added}, ids)
    return Tokenizer(
        source,
        {id: spelled.get(token, token.encode()) for token, id in ids.items()},
        added,
        bpe.chain([split for step in steps for split in _splits(step)]),
        bpe.merger(vocab, ranks, whole),
        bos_id=_bos(data.get("post_processor")),
        eos_id=names.get("<|end_of_text|>", names.get(eos)),
        normalize=_normalizer(data.get("normalizer")),
    )


def _refuse_other_kinds(model: Any, steps: list[Any]) -> None:
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"the model is {model['type']}; {ONLY}")
    if [step["type"] == "ByteLevel" for step in steps] != [False] * (len(steps) - 1) + [True]:
        raise ValueError(f"the pre_tokenizer does not end in ByteLevel; {ONLY}")
    for field in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(field):
            raise ValueError(f"the model has {field} {model[field]!r}; {ONLY}")


def _merges(merges: list[Any], spelled: dict[str, bytes]) -> list[tuple[bytes, bytes]]:
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    try:
        return [(spelled[left], spelled[right]) for left, right in pairs]
    except (KeyError, ValueError) as error:
        raise ValueError(f"the merges are not all pairs from the vocabulary: {error}") from None


def _leaves(node: Any, children: str) -> list[Any]:
    """The steps of a Sequence, which may hold Sequences; none for null."""
    if node is None or node["type"] != "Sequence":
        return [] if node is None else [node]
    return [leaf for child in node[children] for leaf in _leaves(child, children)]


def _splits(step: Any) -> list[bpe.Split]:
    match step:
        case {"type": "Split", "pattern": {"Regex": pattern}}:
            return [bpe.split_by(pattern, step["behavior"], step["invert"])]
        case {"type": "Split", "pattern": {"String": text}}:
            return [bpe.split_by(regex.escape(text), step["behavior"], step["invert"])]
        case {"type": "Digits", "individual_digits": one_by_one}:
            return [bpe.split_by(r"\p{N}" if one_by_one else r"\p{N}+")]
        case {"type": "ByteLevel", "add_prefix_space": add_space}:
            space = [lambda text: [text if text.startswith(" ") else " " + text]]
            words = [bpe.split_by(bpe.GPT2_PATTERN)]
            return space * add_space + words * step.get("use_regex", True)
    raise ValueError(f"the pre_tokenizer has {step['type']}, which is unknown here; {ONLY}")


def _normalizer(node: Any) -> Callable[[str], str]:
    forms = [leaf["type"] for leaf in _leaves(node, "normalizers")]
    if unknown := {*forms} - {"NFC", "NFD", "NFKC", "NFKD"}:
        raise ValueError(f"the normalizer has {unknown.pop()}, which is unknown here; {ONLY}")

    def normalize(text: str) -> str:
        for form in forms:
            text = unicodedata.normalize(form, text)
        return text

    return normalize


def _bos(node: Any) -> int | None:
    ids = []
    for leaf in _leaves(node, "processors"):
        if leaf["type"] == "TemplateProcessing":
            front = takewhile(lambda part: "SpecialToken" in part, leaf["single"])
            names = [part["SpecialToken"]["id"] for part in front]
            ids += [id for name in names for id in leaf["special_tokens"][name]["ids"]]
        elif leaf["type"] != "ByteLevel":
            raise ValueError(f"the post_processor has {leaf['type']}, which is unknown here")
    if len(ids) > 1:
        raise ValueError(f"the post_processor puts {len(ids)} tokens before a text, not one")
    return ids[0] if ids else None
