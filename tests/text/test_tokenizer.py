"""Text and ids, on small tokenizers with ids that can be computed by hand."""

import base64
import json

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from llama32.text.bpe import (
    BYTES,
    LLAMA3_PATTERN,
    UNASSIGNED,
    bpe_merge,
    chain,
    merge_ranks,
    split_by,
)
from llama32.text.tokenizer import Tokenizer
from llama32.text.tokenizer_model import META_MAX_CHARS, META_MAX_RUN, split_long
from tests.tokenizers import LLAMA3_STEPS, byte_tokenizer_json, starts_with, write_tokenizer_json

BYTE_LEVEL = LLAMA3_STEPS[1]
ABC = [(b"a", b"b"), (b"ab", b"c")]  # ids 256 and 257


def write_tokenizer_model(file, tokens=(b"ab", b"abc")):
    lines = [
        f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate([*BYTES, *tokens])
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    return file


def split_step(pattern, behavior="Isolated", invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return Tokenizer.load(byte_tokenizer_json(tmp_path_factory.mktemp("hub")))


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    return Tokenizer.load(
        write_tokenizer_model(tmp_path_factory.mktemp("meta") / "tokenizer.model")
    )


# Special tokens


def test_special_tokens_are_plain_text_unless_allowed(hub, meta):
    for tokenizer in (hub, meta):
        plain = tokenizer.encode("x<|eot_id|>")
        assert not set(plain) & set(tokenizer.special.values())
        assert tokenizer.decode(plain) == "x<|eot_id|>"
        eot = tokenizer.special["<|eot_id|>"]
        assert tokenizer.encode("x<|eot_id|>", allow_special=True) == [ord("x"), eot]


def test_the_first_special_token_of_meta_follows_the_last_rank(meta):
    assert [*meta.special.values()] == [*range(258, 258 + 256)]
    assert meta.special["<|begin_of_text|>"] == meta.bos_id == 258
    assert meta.special["<|end_of_text|>"] == meta.eos_id == 259
    assert meta.special["<|image|>"] == 258 + 11
    assert meta.special["<|reserved_special_token_245|>"] == 258 + 255
    assert meta.vocab_size == 258 + 256


def test_bos_and_eos_are_added_on_request(hub):
    assert hub.encode("a") == [97]
    assert hub.encode("a", bos=True, eos=True) == [256, 97, 257]
    assert hub.encode("", bos=True) == [256]


def test_a_checkpoint_without_rules_has_no_bos_and_no_eos(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer_json(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, dict(tokenizer.special)) == (None, None, {})
    assert tokenizer.encode("a", bos=True) == [97]
    with pytest.raises(ValueError, match="no token that ends a text"):
        tokenizer.encode("a", eos=True)


@pytest.mark.parametrize("eos", ["<end>", {"content": "<end>", "lstrip": False}])
def test_eos_comes_from_tokenizer_config_json(tmp_path, eos):
    write_tokenizer_json(tmp_path, added=[{"id": 300, "content": "<end>"}])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_id == 300
    assert tokenizer.vocab_size == 301  # the highest id plus 1, even with gaps


def test_end_of_text_is_eos_even_if_the_tokenizer_config_differs(tmp_path):
    byte_tokenizer_json(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|eot_id|>"}')
    assert Tokenizer.load(tmp_path).eos_id == 257


def test_bos_is_found_in_a_nested_post_processor(tmp_path):
    nested = {"type": "Sequence", "processors": [BYTE_LEVEL, starts_with("<s>", 9)]}
    assert Tokenizer.load(write_tokenizer_json(tmp_path, post_processor=nested)).bos_id == 9


def test_a_token_after_the_text_is_not_bos(tmp_path):
    after = starts_with("<s>", 9)
    after["single"].reverse()
    assert Tokenizer.load(write_tokenizer_json(tmp_path, post_processor=after)).bos_id is None


def test_plain_added_tokens_are_matched_in_every_text(tmp_path):
    added = [
        {"id": 256, "content": "<tool", "special": False},
        {"id": 257, "content": "<tool>", "special": False},
        {"id": 258, "content": "<|s|>"},
    ]
    tokenizer = Tokenizer.load(write_tokenizer_json(tmp_path, added=added))
    assert tokenizer.encode("<tool><tool<|s|>") == [257, 256, *b"<|s|>"]
    assert dict(tokenizer.special) == {"<|s|>": 258}


def test_an_added_token_without_text_never_matches(tmp_path):
    added = [{"id": 256, "content": "", "special": False}]
    assert Tokenizer.load(write_tokenizer_json(tmp_path, added=added)).encode("ab") == [97, 98]


# Files


def test_a_folder_prefers_the_json_and_searches_original(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        Tokenizer.load(tmp_path)
    assert Tokenizer.find(tmp_path) is None
    write_tokenizer_model(tmp_path / "original" / "tokenizer.model")
    assert Tokenizer.load(tmp_path).source == "tokenizer.model (byte-level BPE, 258 + 256 tokens)"
    write_tokenizer_model(tmp_path / "tokenizer.model", tokens=())
    assert Tokenizer.load(str(tmp_path)).source.endswith("256 + 256 tokens)")
    byte_tokenizer_json(tmp_path)
    assert Tokenizer.load(tmp_path).source.startswith("tokenizer.json")
    assert Tokenizer.find(tmp_path) == tmp_path / "tokenizer.json"


def test_a_model_without_type_is_bpe(tmp_path):  # as in GPT-2's own file
    file = write_tokenizer_json(tmp_path, ABC, ignore_merges=False)
    data = json.loads(file.read_text("utf-8"))
    del data["model"]["type"], data["model"]["ignore_merges"]
    file.write_text(json.dumps(data))
    assert Tokenizer.load(file).encode("abc") == [257]


BAD_STEPS = [{"type": "Metaspace", "replacement": "▁"}]
BAD_JSON = {
    "unigram": ({"type": "Unigram"}, "Unigram; only byte-level BPE .*load_model"),
    "prefix": ({"continuing_subword_prefix": "##"}, "continuing_subword_prefix '##'"),
    "dropout": ({"dropout": 0.1}, "dropout 0.1"),
    "metaspace": ({"steps": BAD_STEPS}, "does not end in ByteLevel; only"),
    "no_steps": ({"steps": []}, "does not end in ByteLevel; only"),
    "bytes_then_more": ({"steps": [BYTE_LEVEL, BYTE_LEVEL]}, "does not end in ByteLevel"),
    "step": ({"steps": [{"type": "Whitespace"}, BYTE_LEVEL]}, "Whitespace, which is not supported"),
    "pattern": ({"steps": [split_step("(a"), BYTE_LEVEL]}, r"pattern '\(a' does not compile"),
    "behavior": ({"steps": [split_step("a", "Maybe"), BYTE_LEVEL]}, "Maybe"),
    "normalizer": ({"normalizer": {"type": "Lowercase"}}, "Lowercase, which is not supported"),
    "post_processor": ({"post_processor": {"type": "Bert"}}, "Bert, which is not supported"),
    "unk": ({"vocab": {"a": 0, "?": 1}, "unk_token": "?"}, "lacks single bytes; only"),
    "fallback": ({"vocab": {"a": 0}, "byte_fallback": True}, "lacks single bytes; only"),
    "empty": ({"vocab": {}}, "lacks single bytes"),
    "part": ({"merges": ["a ☃"]}, "merges are not all pairs from the vocabulary: '☃'"),
    "one_part": ({"merges": ["ab"]}, "merges are not all pairs from the vocabulary"),
    "made": ({"merges": ["a b"]}, "makes b'ab', which is not in the vocabulary"),
    "ids": ({"vocab": {"a": "0"}}, "not laid out like a tokenizer.json"),
    "added": ({"added": [{"content": "x"}]}, "not laid out like a tokenizer.json"),
}


@pytest.mark.parametrize(("wrong", "message"), BAD_JSON.values(), ids=BAD_JSON)
def test_a_tokenizer_json_of_another_kind_is_refused_in_one_line(tmp_path, wrong, message):
    file = write_tokenizer_json(tmp_path, **wrong)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


def test_two_tokens_before_a_text_are_refused(tmp_path):
    twice = {"type": "Sequence", "processors": [starts_with("a", 97), starts_with("b", 98)]}
    with pytest.raises(ValueError, match="puts 2 tokens before a text"):
        Tokenizer.load(write_tokenizer_json(tmp_path, post_processor=twice))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\x00", b'{"model": 3}', b"{}"])
def test_a_damaged_tokenizer_json_is_refused_in_one_line(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: ") as error:
        Tokenizer.load(file)
    assert "\n" not in str(error.value)


BAD_MODELS = {
    "empty": (lambda whole: b"", "damaged"),
    "cut_in_a_token": (lambda whole: whole[:-7], "line 258 is not `base64 rank`"),
    "cut_in_a_rank": (lambda whole: whole[:-2], "damaged"),
    "a_line_missing": (lambda whole: whole.replace(b"YWI= 256\n", b""), "damaged"),
    "a_byte_missing": (lambda whole: whole.replace(b"YQ== 97\n", b"YWE= 97\n"), "damaged"),
    "no_base64": (lambda whole: whole.replace(b"YWI=", b"YW*I="), "line 257 is not"),
    "sentencepiece": (lambda whole: b"\n\x0e\n\x05<unk>\x15\x00\x00", "line 1 .*only byte-level"),
    "pointer": (lambda whole: b"version https://git-lfs.github.com/spec/v1\n", "line 1 is not"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_damaged_tokenizer_model_is_refused_in_one_line(tmp_path, damage, message):
    file = write_tokenizer_model(tmp_path / "tokenizer.model")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


# Merging


def test_ids_need_not_be_in_the_order_of_merging(tmp_path):
    vocab = {"abc": 3, "<s>": 0, "bc": 1, "ab": 2}
    vocab |= {chr(byte): byte for byte in range(ord("!"), ord("~"))}
    file = write_tokenizer_json(tmp_path, [(b"b", b"c"), *ABC], vocab=vocab, ignore_merges=False)
    assert Tokenizer.load(file).encode("abcab") == [ord("a"), 1, 2]


def test_merges_may_be_strings_or_pairs(tmp_path):
    pairs = Tokenizer.load(write_tokenizer_json(tmp_path, ABC))
    file = write_tokenizer_json(tmp_path, ABC, merges=["a b", "ab c"])
    assert Tokenizer.load(file).encode("abcab") == pairs.encode("abcab") == [257, 256]


def test_only_listed_pairs_merge_even_if_the_union_is_a_token(tmp_path):
    # b and c merge first, and a + bc is not listed: no text gives abc
    file = write_tokenizer_json(tmp_path, [(b"b", b"c"), *ABC], ignore_merges=False)
    assert Tokenizer.load(file).encode("abc") == [97, 256]
    file = write_tokenizer_json(tmp_path, [(b"b", b"c"), *ABC], ignore_merges=True)
    assert Tokenizer.load(file).encode("abc") == [258]  # the whole piece is looked up first
    assert Tokenizer.load(file).encode("abcabc") == [97, 256, 97, 256]


def test_a_token_that_no_merge_completes_is_never_used(tmp_path):
    # bc merges first, so ab and cd never meet, though both are listed
    merges = [(b"b", b"c"), (b"a", b"b"), (b"c", b"d"), (b"ab", b"cd")]
    file = write_tokenizer_json(tmp_path, merges, ignore_merges=False)
    assert Tokenizer.load(file).encode("abcd") == [97, 256, 100]
    assert b"abcd" not in merge_ranks(merges, ignore_merges=False)
    assert b"abcd" in merge_ranks(
        merges, ignore_merges=True
    )  # a whole piece is looked up without merging


def test_a_rank_is_the_position_of_the_pair_that_completes_the_token():
    merges = [(b"a", b"bc"), (b"b", b"c"), (b"c", b"d"), (b"ab", b"c"), (b"x", b"y"), (b"x", b"y")]
    ranks = merge_ranks(merges, ignore_merges=False)
    assert {token: rank - 256 for token, rank in ranks.items() if len(token) > 1} == {
        b"bc": 1,
        b"cd": 2,
        b"abc": 0,
        b"xy": 5,
    }


def test_pairs_of_a_token_need_not_be_listed_together(tmp_path):
    merges = [(b"a", b"b"), (b"ab", b"c"), (b"c", b"d"), (b"b", b"c"), (b"a", b"bc")]
    tokenizer = Tokenizer.load(write_tokenizer_json(tmp_path, merges))
    assert tokenizer.encode("abcd") == [257, 100]  # abc by the second merge, cd by the third


def test_bytes_without_a_token_are_dropped_before_merging():
    merge = bpe_merge({b"a": 0, b"b": 1, b"ab": 2}, merge_ranks([(b"a", b"b")], False), False)
    assert [merge(text) for text in ("ab", "aéb", "é", "bé")] == [[2], [2], [], [1]]


# Splitting


def pieces(text, *steps):
    return chain([split_by(*step) for step in steps])(text)


BEHAVIORS = {
    ("Isolated", False): ["1", "2", "ab", "3", "c"],
    ("Isolated", True): ["1", "2", "ab", "3", "c"],
    ("Removed", False): ["ab", "c"],
    ("Removed", True): ["1", "2", "3"],
    ("Contiguous", False): ["12", "ab", "3", "c"],
    ("MergedWithPrevious", False): ["1", "2", "ab3", "c"],
    ("MergedWithPrevious", True): ["1", "2ab", "3c"],
    ("MergedWithNext", False): ["1", "2ab", "3c"],
    ("MergedWithNext", True): ["1", "2", "ab3", "c"],
}


@pytest.mark.parametrize(("behavior", "invert"), BEHAVIORS)
def test_the_behavior_of_a_split_decides_on_the_matches(behavior, invert):
    expected = BEHAVIORS[behavior, invert]
    assert pieces("12ab3c", (r"\d", behavior, invert)) == expected
    assert pieces("12ab3c", (r"(\d)()", behavior, invert)) == expected  # groups do not matter


def test_each_split_works_within_the_pieces_of_the_previous():
    assert pieces("a  1b", (r"\d",), (r"\s+(?!\S)|\w|\s",)) == ["a", "  ", "1", "b"]


def test_patterns_have_onigurumas_meaning():
    assert pieces("a b\nb", (r"[\w&&[^b]]|b$",)) == ["a", " ", "b", "\n", "b"]


STEPS = {
    "digits": ([{"type": "Digits", "individual_digits": True}], [97, 49, 50]),
    "numbers": ([{"type": "Digits", "individual_digits": False}], [97, 257]),
    "string": ([split_step("a", "Removed", kind="String")], [257]),
    "nothing": ([], [256, 50]),
}


@pytest.mark.parametrize(("steps", "ids"), STEPS.values(), ids=STEPS)
def test_the_steps_of_a_tokenizer_json_decide_what_can_merge(tmp_path, steps, ids):
    file = write_tokenizer_json(tmp_path, [(b"a", b"1"), (b"1", b"2")], steps=[*steps, BYTE_LEVEL])
    assert Tokenizer.load(file).encode("a12") == ids


def test_byte_level_splits_words_and_adds_a_space_in_front(tmp_path):
    step = BYTE_LEVEL | {"use_regex": True, "add_prefix_space": True}
    file = write_tokenizer_json(tmp_path, [(b" ", b"a"), (b"a", b" ")], steps=[step])
    tokenizer = Tokenizer.load(file)
    assert tokenizer.encode("a a") == tokenizer.encode(" a a") == [256, 256]
    assert tokenizer.encode("") == []


def test_a_text_is_normalized_before_splitting(tmp_path):
    nfc = {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "NFC"}]}
    added = [{"id": 256, "content": "e\u0301!", "special": False, "normalized": True}]
    tokenizer = Tokenizer.load(write_tokenizer_json(tmp_path, normalizer=nfc, added=added))
    assert tokenizer.encode("e\u0301") == [*"é".encode()]
    assert tokenizer.encode("é!") == [256]


def test_characters_newer_than_tiktokens_tables_are_split_as_by_tiktoken():
    points = map(chr, [*range(0xD800), *range(0xE000, 0x110000)])
    unassigned = bytes(UNASSIGNED.encode_ordinary("".join(points))).decode()
    pairs = [first + second for first in BYTES for second in BYTES]
    ranks = {token: rank for rank, token in enumerate([*BYTES, *pairs])}
    theirs = tiktoken.Encoding(
        "pairs", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    merge, split = bpe_merge(ranks, ranks, ignore_merges=True), chain([split_by(LLAMA3_PATTERN)])
    for char in regex.findall(r"\P{Cn}", unassigned)[::7]:
        text = f"{char}a1{char}!{char}"
        assert [id for piece in split(text) for id in merge(piece)] == theirs.encode_ordinary(text)


def split_char_by_char(text):
    """Split as Meta does, character by character: the oracle of `split_long`."""
    parts = []
    for start in range(0, len(text), META_MAX_CHARS):
        section = text[start : start + META_MAX_CHARS]
        run, begin = 0, 0
        for i, char in enumerate(section):
            run = run + 1 if i and char.isspace() == section[i - 1].isspace() else 1
            if run > META_MAX_RUN:
                parts.append(section[begin:i])
                run, begin = 1, i
        parts.append(section[begin:])
    return parts


RUNS = st.tuples(
    st.sampled_from(["a", "é", " ", "\n", "\x1c", "\u3000"]),
    st.sampled_from([1, 2, META_MAX_RUN - 1, META_MAX_RUN, META_MAX_RUN + 1, 2 * META_MAX_RUN + 1]),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(RUNS, max_size=5))
def test_long_runs_are_split_as_by_meta(runs):
    text = "".join(char * times for char, times in runs)
    assert [*split_long(text)] == split_char_by_char(text)


def test_sections_are_split_as_by_meta():
    text = "x " * (META_MAX_CHARS // 2 - 10_000) + "y" * 2 * META_MAX_RUN
    assert (
        [*map(len, split_long(text))]
        == [*map(len, split_char_by_char(text))]
        == [400_000, 25_000, 5_000]
    )


@pytest.mark.parametrize("char", ["a", " ", "\n", "!", "é", "\u3000"])
def test_a_million_equal_characters_are_encoded(hub, meta, char):
    text = char * 1_000_000
    assert len(hub.encode(text)) == len(text.encode())
    assert len(meta.encode(text)) == len(text.encode())


# Decoding


@settings(deadline=None)
@given(st.text())
def test_decoding_restores_every_text(hub, meta, text):
    assert hub.decode(hub.encode(text)) == meta.decode(meta.encode(text)) == text


def test_a_lone_surrogate_becomes_a_replacement_character(hub):
    assert hub.decode(hub.encode("a\ud800b\ud83d\ude42")) == "a\ufffdb🙂"


def test_special_tokens_are_decoded_as_their_text(hub):
    assert hub.decode([256, 72, 105, 265]) == "<|begin_of_text|>Hi<|eot_id|>"
    assert hub.decode_bytes([0xF0, 0x9F]) == b"\xf0\x9f"


def test_an_id_without_a_token_becomes_a_replacement_character(hub):
    for id in (-1, 512):
        assert hub.decode([97, id, 98]) == "a\ufffdb"


def test_a_stream_waits_for_the_end_of_a_character(hub):
    stream = hub.stream()
    assert [stream.push(byte) for byte in "aé🙂".encode()] == ["a", "", "é", "", "", "", "🙂"]
    assert stream.flush() == ""
    stream.push(0xF0)
    assert stream.flush() == "\ufffd"


BYTE_OF_UTF8 = st.sampled_from([*"aé€🙂".encode(), 0x80, 0xC0, 0xED, 0xA0, 0xF4, 0xFF])


@settings(deadline=None)
@given(st.lists(BYTE_OF_UTF8 | st.integers(0, 511)))
def test_streamed_pieces_add_up_to_decode(hub, ids):
    stream = hub.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == hub.decode(ids)
