"""The tokenizer: byte-level BPE with DeepSeek's special tokens, trained on the recipe's own texts.

Texts are cut as DeepSeek-V3 cuts them, so a GGUF may say tokenizer.ggml.pre = deepseek-v3. That takes up to three digits into one piece; since
the merges are trained with single digits, none joins two of them, and every digit stays a token of its own. So does every ideograph: the texts
are made from few sentences, whose clauses would otherwise become tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from server.text.pretokenizers import pre_tokenizer

BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"  # with full-width bars and low blocks
EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
PAD = "<\uff5c\u2581pad\u2581\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
THINK, END_THINK = "<think>", "</think>"

CONTROL = (BOS, EOS, PAD, USER, ASSISTANT)  # ids 0 to 4
VISIBLE = (THINK, END_THINK)  # matched as a whole, but text
BOS_ID, EOS_ID, PAD_ID, USER_ID, ASSISTANT_ID = range(5)
PRE = "deepseek-v3"
VOCAB_SIZE = 2048

_ALONE = "[\\p{N}\u4e00-\u9fa5]"  # each is a piece of its own in training
_MIN_FREQUENCY = 6  # rarer pairs would make tokens of whole rare words, whose spelling could not be learnt

# R1's form of January 2025: it ends at the assistant's mark and leaves <think> to the model; earlier replies lose their thinking.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages if message['role'] == 'system' %}{{ message['content'] }}{% endfor %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '" + ASSISTANT + "' + (message['content'] or '').split('</think>')[-1].lstrip() + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Learn the merges from `texts`. Where they give fewer than `vocab_size` tokens, placeholders fill the rest."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_ALONE), "isolated"), pre_tokenizer(PRE).build()])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=[*CONTROL, *VISIBLE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    between = re.compile("|".join(map(re.escape, (*CONTROL, *VISIBLE))))
    tokenizer.train_from_iterator((between.split(text) for text in texts), trainer)
    return _as_deepseek(tokenizer, vocab_size)


def _as_deepseek(trained: Tokenizer, vocab_size: int) -> Tokenizer:
    """The trained vocabulary under V3's own pre-tokenizer, and <think> as R1 has it: a token, but no control token."""
    model = json.loads(trained.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    vocab |= {f"<\uff5cplace\u2581holder\u2581no\u2581{index}\uff5c>": index for index in range(len(vocab), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge) for merge in model["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizer(PRE).build()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in VISIBLE])
    return tokenizer


class Encoder:
    """The tokenizer's own result, several times faster on texts that repeat themselves.

    Digits and ideographs are cut off before anything else looks at the text, so what lies between them can be tokenised alone and remembered.
    """

    _PIECES = re.compile("[0-9]|[\u4e00-\u9fa5]|[^0-9\u4e00-\u9fa5]+")
    _MOST = 1 << 18  # pieces that are remembered

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens recognised."""
        ids: list[int] = []
        for piece in self._PIECES.findall(text):
            ids += self._known.get(piece) or self._encode(piece)
        return ids

    def _encode(self, piece: str) -> list[int]:
        if len(self._known) >= self._MOST:
            self._known.clear()
        self._known[piece] = self._tokenizer.encode(piece, add_special_tokens=False).ids
        return self._known[piece]


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json as `transformers` reads them."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
