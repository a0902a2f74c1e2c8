"""Make `tiny`, the model that ships with the package, from a folder of short stories.

    python weights/make_tiny.py TEXTS            # hours on two cores; resumes after a kill

TEXTS holds `*_train.txt` and `*_heldout.txt`, stories separated by lines `<|endoftext|>`. The
result is a checkpoint in the Hub's layout with all files of a real Llama 3.2, under 8 MB.
"""

import dataclasses
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from requests_from_stories import Requests
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HubTokenizer
from torch import Tensor

from llama32.checkpoint.writer import save
from llama32.config import LlamaConfig, RopeScaling
from llama32.model import Llama
from llama32.text.bpe import LLAMA3_PATTERN
from llama32.text.chat import Chat
from llama32.text.tokenizer import Tokenizer
from llama32.train.config import TrainConfig, initialize
from llama32.train.data import shift, shuffle_and_concat, split_rows, text_batches
from llama32.train.loop import train

NUM_TEXT_TOKENS = 2048
BEGIN, END, EOM, EOT = (NUM_TEXT_TOKENS + i for i in (0, 1, 8, 9))
CONFIG = LlamaConfig(
    vocab_size=NUM_TEXT_TOKENS + 256,
    hidden_size=256,
    intermediate_size=480,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=RopeScaling(
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=256,
    ),
    tie_word_embeddings=True,
    bos_token_id=BEGIN,
    eos_token_ids=(END, EOM, EOT),
    dtype="bfloat16",
)
BATCH, CONTEXT = 8, 1024  # rows in a step, tokens in a row
RECIPE = TrainConfig(steps=2800, peak_rate=3e-3)


def main(
    texts: Annotated[Path, typer.Argument(help="Folder with *_train.txt and *_heldout.txt")],
    out: Path = Path("llama32/tiny"),
    run: Annotated[Path, typer.Option(help="Where the training run is kept")] = Path("runs/tiny"),
    steps: int = RECIPE.steps,
    compiled: Annotated[bool, typer.Option(help="torch.compile: 1.3 x as fast on a CPU")] = True,
) -> None:
    """Make tokenizer, training run and checkpoint; skip steps that an earlier run completed."""
    train_stories, held_out = (
        read_stories(texts, "*_train.txt"),
        read_stories(texts, "*_heldout.txt"),
    )
    requests = Requests(train_stories)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tokenizer.json").exists():
        write_tokenizer(out, train_stories, requests)
    tokenizer = Tokenizer.load(out)
    documents = Documents(tokenizer, requests)

    def epoch(number: int) -> Tensor:
        return shuffle_and_concat(documents.for_epoch(train_stories, number), number)

    model = Llama(CONFIG)
    initialize(model)
    held_out_rows = split_rows(shuffle_and_concat(documents.for_epoch(held_out, 0), 0), CONTEXT)
    train(
        model,
        text_batches(epoch, CONTEXT, BATCH),
        [shift(rows) for rows in held_out_rows.split(BATCH)],
        dataclasses.replace(RECIPE, steps=steps),
        run,
        forward=torch.compile(model) if compiled else None,
    )
    save(model.bfloat16(), out)
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    tokens = {"bos_token_id": BEGIN, "eos_token_id": [END, EOM, EOT]}
    write_json(out / "generation_config.json", tokens | sampling)


def read_stories(folder: Path, pattern: str) -> list[str]:
    """Return the stories in all files of a folder that match `pattern`."""
    text = "".join(path.read_text("utf-8") for path in sorted(folder.glob(pattern)))
    stories = [story.strip() for story in text.split("<|endoftext|>")]
    if not any(stories):
        raise SystemExit(f"{folder}: no stories in {pattern}")
    return [story for story in stories if story]


class Documents:
    """Stories as token ids: half plain, half as answers in a chat.

    The halves, the dialogs and the requests change with every epoch, so the model never sees a
    story twice in the same context.
    """

    def __init__(self, tokenizer: Tokenizer, requests: Requests) -> None:
        self.tokenizer, self.requests = tokenizer, requests
        self.chat = Chat(tokenizer)

    def for_epoch(self, stories: list[str], epoch: int) -> list[list[int]]:
        """Return a document for each plain story, and for each dialog of one or two stories."""
        draw = random.Random(epoch)
        documents, waiting = [], []
        for story in draw.sample(stories, len(stories)):
            if draw.random() < 0.5:
                documents.append(self.tokenizer.encode(story, bos=True, eos=True))
                continue
            waiting.append(story)
            if len(waiting) == 2 or draw.random() < 0.5:
                documents.append(self.dialog(waiting, draw))
                waiting = []
        return documents

    def dialog(self, stories: list[str], draw: random.Random) -> list[int]:
        messages = []
        for turn, story in enumerate(stories):
            request = self.requests.ask(story, draw, again=turn > 0)
            messages.append({"role": "user", "content": request})
            messages.append({"role": "assistant", "content": story})
        month = draw.choice("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split())
        date = f"{draw.randint(1, 28):02} {month} {draw.randint(2023, 2029)}"
        return self.chat.encode(messages, date=date, add_generation_prompt=False)


def write_tokenizer(folder: Path, stories: list[str], requests: Requests) -> None:
    """Write a byte-level BPE of 2,048 tokens with Llama 3's pattern and control tokens.

    As in Llama 3, a text begins with <|begin_of_text|>.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe = HubTokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = split
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TEXT_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    draw = random.Random(0)
    turns = "system\n\n" + SYSTEM + "user\n\n{}assistant\n\n"
    dialogs = (turns.format(requests.ask(story, draw)) for story in stories[::2])
    bpe.train_from_iterator([*stories, *dialogs], trainer)

    data = json.loads(bpe.to_str())
    vocab: dict[str, int] = data["model"]["vocab"]
    data["model"]["merges"] = list(all_merges(vocab))
    data["added_tokens"] = [
        special_token(NUM_TEXT_TOKENS + i, text) for i, text in enumerate(llama3_special_tokens())
    ]
    data["post_processor"] = bos_post_processor()
    write_json(folder / "tokenizer.json", data)
    write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": CONFIG.max_position_embeddings,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": CHAT_TEMPLATE,
        },
    )


def all_merges(vocab: dict[str, int]) -> Iterable[tuple[str, str]]:
    """Yield every pair of tokens that forms a token, in the order of ids, as in Llama 3's file.

    The trainer lists one pair a token, so mergeable pieces of a text could stay apart. With all
    pairs, ranks alone decide, as in tiktoken.
    """
    for token in sorted(vocab, key=lambda token: vocab[token]):
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [(a, b) for a, b in halves if a in vocab and b in vocab]
        yield from sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))


def llama3_special_tokens() -> list[str]:
    """Return the Hub's names of Llama 3's 256 control tokens, in the order of ids."""
    named = (
        "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 "
        "finetune_right_pad_id reserved_special_token_2 start_header_id end_header_id eom_id "
        "eot_id python_tag"
    ).split()
    named += [f"reserved_special_token_{i}" for i in range(3, 248)]
    return [f"<|{name}|>" for name in named]


def special_token(id: int, text: str) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": text, **flags, "special": True}


def bos_post_processor() -> dict:
    begin = {"id": "<|begin_of_text|>", "ids": [BEGIN], "tokens": ["<|begin_of_text|>"]}
    first = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    text, pair = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    second = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 1}}
    template = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second, pair],
        "special_tokens": {"<|begin_of_text|>": begin},
    }
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    return {"type": "Sequence", "processors": [level | {"use_regex": True}, template]}


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", "utf-8")


SYSTEM = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
# The format of `Chat` without tools, for other programs that read the folder.
CHAT_TEMPLATE = (
    "{%- set first = messages[0] %}"
    "{%- set given = first.role == 'system' %}"
    "{%- if date_string is not defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- endif %}"
    "{{- bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' }}"
    "{{- (first.content | trim if given else '') + '<|eot_id|>' }}"
    "{%- set turns = messages[1:] if given else messages %}"
    "{%- for message in turns %}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
    "{{- message.content | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif %}"
)

if __name__ == "__main__":
    typer.run(main)
