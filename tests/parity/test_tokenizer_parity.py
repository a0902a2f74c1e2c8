"""Ids of the `tokenizers` library and of Meta's `llama-models`, on text of every kind."""

import ast
import base64
import hashlib
import importlib.util
import json
import random
from itertools import product
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from llama32.text.bpe import LLAMA3_PATTERN, UNICODE_TO_BYTE
from llama32.text.tokenizer import Tokenizer
from llama32.text.tokenizer_model import LLAMA3_SPECIAL
from tests.tokenizers import LLAMA3_STEPS, spell, write_tokenizer_json

WORDS = """the The THE I'm you'll We'VE 's 'S 'ſ 'K don't 12 1234 3.14 1,000,000 foo_bar x=y; //
http://a.b/c?d=e Straße naïve café e\u0301 привет мир 日本語 テスト नमस्ते สวัสดี 한국어 مرحبا 🙂👍🏽 Ⅷ
١٢٣ ǅ ﬁ 👩\u200d👧 \u200b \ufeff \0 <x> <x <|eot|> <s> <pad> word awordb ab aab abab""".split()
SPACES = ["", " ", "  ", "\n", "\r\n", "\t", "   \n\n  ", "\u3000", "\xa0", "\u2028", "\x1c"]


def a_text(rng: random.Random) -> str:
    """Return repeated letters, random code points, or words of many languages."""
    length = rng.randrange(40)
    match rng.randrange(4):
        case 0:
            return "".join(rng.choice("abc ") for _ in range(length))
        case 1:
            ends = (0x80, 0x3000, 0x110000)
            points = [rng.randrange(rng.choice(ends)) for _ in range(length)]
            return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
        case _:
            return "".join(rng.choice(WORDS) + rng.choice(SPACES) for _ in range(length))


def assert_same_ids(theirs: tokenizers.Tokenizer, ours: Tokenizer, texts: list[str]) -> None:
    for special, text in product((False, True), texts):
        theirs.encode_special_tokens = not special  # True keeps special tokens as text
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, allow_special=special) == ids, (special, text)


# The tokenizers library

NO_REGEX = ByteLevel(add_prefix_space=False, use_regex=False)
O200K = (  # GPT-4o
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'ll)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'ll)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "llama3": Sequence([Split(Regex(LLAMA3_PATTERN), "isolated"), NO_REGEX]),
    "gpt2": ByteLevel(add_prefix_space=False),
    "gpt2_with_space": ByteLevel(add_prefix_space=True),
    "smollm2": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "numbers": Sequence([Sequence([Digits(individual_digits=False)]), ByteLevel()]),
    "o200k": Sequence([Split(Regex(O200K), "removed", invert=True), NO_REGEX]),
    "deepseek": Sequence(
        [
            Split(Regex(r"\p{N}{1,3}"), "isolated"),
            Split(Regex("[一-龥぀-ゟ゠-ヿ]+"), "isolated"),
            Split(Regex(r"[!-/:-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"), "isolated"),
            Split(Regex(r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"),
            NO_REGEX,
        ]
    ),
    "bloom": Sequence([Split(Regex(r" ?[^(\s|[.,!?…。，、।۔،])]+"), "isolated"), NO_REGEX]),
    "possessive": Sequence([Split(Regex(r"\p{L}++|\s++(?!\S)|^\S|.$"), "isolated"), NO_REGEX]),
    "groups": Sequence([Split(Regex(r"(\p{N})(\p{L}+)?| (\S)"), "isolated"), NO_REGEX]),
    "strings": Sequence([Split("a.b", "removed"), Split(" ", "merged_with_next"), NO_REGEX]),
    "unsplit": NO_REGEX,
} | {
    f"{behavior}_{invert}": Sequence([Split(Regex(r"[ a\p{N}]"), behavior, invert), NO_REGEX])
    for behavior in ("removed", "contiguous", "merged_with_previous", "merged_with_next")
    for invert in (False, True)
}


def trained(rng: random.Random, step: PreTokenizer) -> tokenizers.Tokenizer:
    """Train a BPE of a few hundred tokens, with added tokens of every kind."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=rng.random() < 0.5))
    tokenizer.pre_tokenizer = step  # pyright: ignore
    trainer = trainers.BpeTrainer(  # pyright: ignore
        vocab_size=rng.choice((260, 300, 600)),
        initial_alphabet=sorted(ByteLevel.alphabet()) if rng.random() < 0.8 else [],
        special_tokens=rng.choice(([], ["<pad>", "<|eot|>"])),
        show_progress=False,
    )
    tokenizer.train_from_iterator([a_text(rng) for _ in range(150)], trainer)
    flag = lambda: rng.random() < 0.4  # noqa: E731
    added = [
        AddedToken("<x>", lstrip=flag(), rstrip=flag(), normalized=flag()),
        AddedToken("<x", lstrip=flag(), normalized=flag()),
        AddedToken("word", single_word=flag()),
        AddedToken("  "),
    ]
    tokenizer.add_tokens(rng.sample(added, rng.randrange(5)))
    tokenizer.add_special_tokens(["<s>", "<|eot|>x"][: rng.randrange(3)])
    return tokenizer


@pytest.mark.parametrize("step", PRE_TOKENIZERS.values(), ids=PRE_TOKENIZERS)
def test_trained_tokenizers_give_the_ids_of_the_tokenizers_library(tmp_path, step):
    rng = random.Random(0)
    for _ in range(4):
        theirs = trained(rng, step)
        theirs.save(str(tmp_path / "tokenizer.json"))
        ours = Tokenizer.load(tmp_path)
        assert_same_ids(theirs, ours, [a_text(rng) for _ in range(50)])
        assert ours.vocab_size == theirs.get_vocab_size()


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_normalized_text_gives_the_ids_of_the_tokenizers_library(tmp_path, form):
    rng = random.Random(1)
    theirs = trained(rng, PRE_TOKENIZERS["llama3"])
    theirs.normalizer = getattr(normalizers, form)()
    theirs.add_tokens([AddedToken("café", normalized=True), AddedToken("naïve", normalized=False)])
    theirs.save(str(tmp_path / "tokenizer.json"))
    texts = [" ".join(rng.choices([*WORDS, "cafe\u0301", "nai\u0308ve"], k=9)) for _ in range(200)]
    assert_same_ids(theirs, Tokenizer.load(tmp_path), texts)


def listed_merges(rng: random.Random) -> list[tuple[bytes, bytes]]:
    """Return merges unlike any training: in any order, repeated, of pieces that never occur."""
    tokens = [b"a", b"b", b"c"][: rng.randrange(1, 4)]
    merges = []
    for _ in range(rng.randrange(1, 14)):
        left, right = rng.choice(tokens), rng.choice(tokens)
        if len(left + right) < 9:
            merges.append((left, right))
            tokens.append(left + right)
    match rng.randrange(3):
        case 0:
            rng.shuffle(merges)
        case 1:  # every pair that forms a token, as in a file converted from ranks
            merged = list(dict.fromkeys(left + right for left, right in merges))
            rng.shuffle(merged)
            halves = [(token[:i], token[i:]) for token in merged for i in range(1, len(token))]
            merges = [pair for pair in halves if {*pair} <= {*tokens}]
            if rng.random() < 0.3:
                rng.shuffle(merges)
    return merges


def test_any_list_of_merges_gives_the_ids_of_the_tokenizers_library(tmp_path):
    rng = random.Random(2)
    for _ in range(100):
        ignore_merges = rng.random() < 0.5
        merges = listed_merges(rng)
        steps = [LLAMA3_STEPS[1]]
        file = write_tokenizer_json(tmp_path, merges, steps=steps, ignore_merges=ignore_merges)
        theirs, ours = tokenizers.Tokenizer.from_file(str(file)), Tokenizer.load(file)
        for length in (3, 6, 12, 12, 24, 24, 300):
            text = "".join(rng.choices("abc", k=length))
            assert ours.encode(text) == theirs.encode(text).ids, (ignore_merges, merges, text)


@pytest.mark.parametrize("name", ["llama3", "gpt2", "smollm2", "o200k", "bloom"])
def test_code_points_of_all_blocks_are_split_as_by_the_tokenizers_library(tmp_path, name):
    step = PRE_TOKENIZERS[name]
    file = tmp_path / "tokenizer.json"
    theirs = tokenizers.Tokenizer(models.BPE(vocab=UNICODE_TO_BYTE, merges=[]))
    theirs.pre_tokenizer = step  # pyright: ignore
    theirs.save(str(file))
    ours = Tokenizer.load(file)
    rng = random.Random(3)
    blocks = range(0, 0x110000, 0x80)
    points = [*range(0x100), *(rng.randrange(block, block + 0x80) for block in blocks)]
    for point in [*points, *map(ord, SPACES[-4:])]:
        if 0xD800 <= point < 0xE000:
            continue
        char = chr(point)
        text = f"a{char}'S 1{char}{char} {char}!"
        pieces = [
            bytes(map(UNICODE_TO_BYTE.__getitem__, p)) for p, _ in step.pre_tokenize_str(text)
        ]
        assert [piece.encode() for piece in ours._split(text)] == pieces, ascii(char)


# Meta's tokenizer


@pytest.fixture(scope="module")
def model_file() -> Path:
    package = importlib.util.find_spec("llama_models")
    if package is None or package.origin is None:
        pytest.skip("llama-models is not installed: it brings the Llama 3 tokenizer")
    return Path(package.origin).parent / "llama3" / "tokenizer.model"


@pytest.fixture(scope="module")
def meta(model_file) -> Tokenizer:
    return Tokenizer.load(model_file)


@pytest.fixture(scope="module")
def json_file(model_file, tmp_path_factory) -> Path:
    """Convert tokenizer.model to the Hub's form: every pair of tokens that forms a token."""
    lines = [line.split() for line in model_file.read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    merges = []
    for token in ranks:
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(left, right) for left, right in halves if left in ranks and right in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    added = [
        {"id": id, "content": f"<|{name}|>"} for id, name in enumerate(LLAMA3_SPECIAL, len(ranks))
    ]
    vocab = {spell(token): rank for token, rank in ranks.items()}
    return write_tokenizer_json(
        tmp_path_factory.mktemp("converted"), merges, vocab=vocab, added=added
    )


@pytest.fixture(scope="module")
def hub(json_file) -> Tokenizer:
    return Tokenizer.load(json_file)


@pytest.fixture(scope="module")
def cases(reference):
    return json.loads((reference / "tokenizer_meta.json").read_text("utf-8"))


def text_of(case) -> str:
    if case["text"] is not None:
        return case["text"]
    char, times = case["recipe"].rsplit("*", 1)
    return ast.literal_eval(char) * int(times)


def test_meta_tokenizer_has_the_published_pattern_and_special_tokens(meta, cases):
    assert cases["pat_str"] == LLAMA3_PATTERN
    assert dict(meta.special) == cases["special_tokens"]
    assert meta.source == "tokenizer.model (byte-level BPE, 128000 + 256 tokens)"
    assert (meta.vocab_size, meta.bos_id, meta.eos_id) == (128_256, 128_000, 128_001)


def test_meta_tokenizer_gives_the_published_ids(meta, cases):
    for case in cases["strings"]:
        ids = meta.encode(text_of(case))
        assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == case["ids_sha256"], case
        assert ids == case["ids"], case["name"]
        if "ids_allowed_special_all" in case:
            allowed = meta.encode(text_of(case), allow_special=True)
            assert allowed == case["ids_allowed_special_all"], case["name"]
    for case in cases["bos_eos"]:
        assert meta.encode(case["text"], bos=case["bos"], eos=case["eos"]) == case["ids"]


def test_the_hubs_file_gives_the_ids_of_metas_file(meta, hub, cases):
    assert hub.source == "tokenizer.json (byte-level BPE, 128000 + 256 tokens)"
    for case in cases["strings"]:
        if text := case["text"]:  # Meta splits the longer texts
            for special in (False, True):
                ids = meta.encode(text, allow_special=special)
                assert hub.encode(text, allow_special=special) == ids, case["name"]


def test_the_hubs_file_gives_the_ids_of_metas_file_on_text_of_every_kind(meta, hub):
    rng = random.Random(4)
    for text in [a_text(rng) + "<|eot_id|>" + a_text(rng) for _ in range(1000)]:
        assert hub.encode(text) == meta.encode(text), text
        assert hub.decode(hub.encode(text)) == text


def test_the_hubs_file_gives_the_ids_of_the_tokenizers_library(hub, json_file):
    rng = random.Random(5)
    theirs = tokenizers.Tokenizer.from_file(str(json_file))
    texts = [a_text(rng) + "<|eot_id|>" + a_text(rng) for _ in range(500)]
    assert_same_ids(theirs, hub, [*texts, " " * 100_000, "a" * 100_000])


def test_meta_tokenizer_gives_the_ids_of_llama_models(meta):
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    theirs = MetaTokenizer.get_instance()
    rng = random.Random(6)
    texts = [a_text(rng) + "<|eot_id|>" + a_text(rng) for _ in range(500)]
    for _ in range(4):
        lengths = rng.choices((1, 24_999, 25_000, 25_001, 60_000), k=4)
        parts = [rng.choice("a \n\x1c\u3000é") * length for length in lengths]
        texts.append("".join(parts))
    texts.append("ab cd" * 79_999 + "<|eot_id|>")  # split inside the special token
    for special, text in product((None, "all"), [*texts, "", "\ud800 \udc00", "\ufeff"]):
        ids = theirs.encode(text, bos=False, eos=False, allowed_special=special)
        assert meta.encode(text, allow_special=special is not None) == ids, text[:80]
