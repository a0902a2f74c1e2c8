"""Text to token ids and back, for a byte-level BPE tokenizer in either file format.

`tokenizer_json.py` and `tokenizer_model.py` open the files, `bpe.py` has the stages of encoding.
Special tokens in a text stay plain text unless the caller allows special tokens.
"""

import codecs
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType

from llama32.text import bpe
from llama32.text.tokenizer_json import open_tokenizer_json
from llama32.text.tokenizer_model import open_tokenizer_model

UNKNOWN_ID_BYTES = "\ufffd".encode()


class Tokenizer:
    """The tokenizer of a checkpoint, made by `Tokenizer.load(path)`.

    `special` maps the texts of control tokens to ids. `vocab_size` is the highest id plus 1.
    `bos_id` goes before a prompt by the checkpoint's own rule, `eos_id` ends a text; both may be
    None. `source` describes the loaded file in a line.
    """

    def __init__(self, parts: bpe.TokenizerParts) -> None:
        added = parts.added
        self.special = MappingProxyType(
            {token.content: token.id for token in added if token.special}
        )
        self._tokens = parts.tokens
        self.vocab_size = max(self._tokens) + 1
        self.bos_id, self.eos_id = parts.bos_id, parts.eos_id
        counts = f"{len(self._tokens) - len(added)} + {len(added)} tokens"
        self.source = f"{parts.source} (byte-level BPE, {counts})"
        plain = [token for token in added if not token.special]
        self._split_added = {  # allow_special -> function
            True: bpe.split_added_tokens(added, parts.normalize),
            False: bpe.split_added_tokens(plain, parts.normalize),
        }
        self._split_long, self._split, self._merge = parts.split_long, parts.split, parts.merge

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load the tokenizer in a checkpoint folder, or a tokenizer.json or tokenizer.model.

        Raises FileNotFoundError if the folder has no tokenizer, ValueError if the file is damaged
        or holds another kind of tokenizer.
        """
        file = cls.find(path)
        if file is None:
            raise FileNotFoundError(f"{path}: no tokenizer.json or tokenizer.model here")
        is_json = file.suffix == ".json"
        return cls(open_tokenizer_json(file) if is_json else open_tokenizer_model(file))

    @staticmethod
    def find(path: str | Path) -> Path | None:
        """Return the file for `load`, or None if no file exists."""
        path = Path(path)
        names = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
        files = [path / name for name in names] if path.is_dir() else [path]
        return next((file for file in files if file.is_file()), None)

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, allow_special: bool = False
    ) -> list[int]:
        """Return the ids of a text, with special tokens as plain text unless `allow_special`.

        `bos` adds nothing if `bos_id` is None; `eos` raises ValueError if `eos_id` is None. A lone
        surrogate becomes U+FFFD.
        """
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        for section in self._split_long(text):
            for part in self._split_added[allow_special](section):
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
        """Return the text of ids, with special tokens as text and broken UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids, which may begin or end inside a character.

        An id without a token, such as a padding row of the embedding, becomes U+FFFD: a model may
        choose the id, and decoding must not fail.
        """
        return b"".join([self._tokens.get(id, UNKNOWN_ID_BYTES) for id in ids])

    def stream(self) -> "TextStream":
        """Return a decoder for streamed ids."""
        return TextStream(self)


class TextStream:
    """A decoder of single ids that never splits a character.

    The texts from all `push` calls and a last `flush` add up to `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Return the text completed by `id`, often empty."""
        return self._utf8.decode(self._tokenizer.decode_bytes([id]))

    def flush(self) -> str:
        """Return U+FFFD for an incomplete last character, otherwise an empty text."""
        return self._utf8.decode(b"", final=True)
