"""Text to token ids and back: what the other rooms see of a vocabulary, and the two kinds there are. `load.py` makes them from files.

Every tokenizer gives the exact bytes of each token, and decoding is joining those bytes: a reply that is streamed token by token reads like one
decoded at once. Tokenizers are immutable and safe to use from several threads.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import tokenizers

from server.errors import RequestError

# The library's batches, of one text each here, need no threads beside the pool's: idle ones would spin on its cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Control tokens that end a reply in the model families there are, whether or not the metadata says so.
END_OF_GENERATION = frozenset(
    {
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek's, with full-width bars and low blocks
        "<|EOT|>",
        "<|user|>",  # GLM ends its turn by opening the next one: the user's, or a tool's
        "<|observation|>",
        "[EOS]",  # Kimi's
        "[EOT]",
        "<end_of_turn>",
        "<|end|>",
        "</s>",
    }
)
# GGUF files mark as control whatever looks like it: hiding these would hide where the reasoning ends, and where and how tools are called.
_ALWAYS_SHOWN = re.compile(r"</?think>|<\|python_tag\|>|<.*tool[_\u2581](call|sep).*>|</?arg_(key|value)>|\[(TOOL_CALLS|CALL_ID|ARGS)\]")


class Tokenizer(ABC):
    """What the other rooms see of a vocabulary."""

    def __init__(
        self,
        *,
        vocab_size: int,
        bos_id: int | None = None,
        eos_id: int | None = None,
        add_bos: bool = False,
        stop_ids: Iterable[int] = (),
        special_tokens: Mapping[str, int] | None = None,
    ) -> None:
        self.vocab_size = vocab_size  # ids are 0 .. vocab_size - 1; the model's embedding may be padded beyond
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.add_bos = add_bos and bos_id is not None  # a prompt starts with BOS
        self.stop_ids = frozenset(stop_ids)  # each of them ends a reply
        self.special_tokens: Mapping[str, int] = special_tokens or {}  # text -> id of the control tokens

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`, with no BOS put before them. `special`: control tokens written in the text are recognised as such.

        RequestError when `text` holds half a surrogate pair, which JSON can write but no encoding of Unicode can.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"Character {error.start} of the text is half of a surrogate pair, which is not valid Unicode. Send the whole pair.") from error
        return self._encode(text, special)

    @abstractmethod
    def _encode(self, text: str, special: bool) -> list[int]:
        """`encode` for valid text."""

    @abstractmethod
    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """The exact bytes of one token: b"" for an id that has no token, and for a control token unless `skip_special` is off."""

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a whole prompt: BOS goes first where the model wants it, once, also when a chat template wrote it already."""
        ids = self.encode(text)
        if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. RequestError for an id outside the vocabulary."""
        return b"".join([self.token_bytes(self._checked(token_id), skip_special=skip_special) for token_id in ids]).decode("utf-8", errors="replace")

    def text_of(self, token_id: int | None) -> str:
        """The text of one token, control tokens included; "" for None. Chat templates get BOS and EOS this way."""
        return "" if token_id is None else self.decode([token_id], skip_special=False)

    def _checked(self, token_id: int) -> int:
        if 0 <= token_id < self.vocab_size:
            return token_id
        raise RequestError(f"There is no token {token_id}: the model's vocabulary has the ids 0 to {self.vocab_size - 1}.", param="tokens")


class ByteTokenizer(Tokenizer):
    """One token a byte, for tests and for models without a vocabulary. Ids above 255 read as `<300>`."""

    def _encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = []
        for piece in re.split(r"(<[1-9]\d{2,8}>)", text):
            token_id = int(piece[1:-1]) if special and re.fullmatch(r"<[1-9]\d{2,8}>", piece) else 0
            ids += [token_id] if 256 <= token_id < self.vocab_size else piece.encode()
        return ids

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        if skip_special and token_id in self.stop_ids:
            return b""
        return bytes([token_id]) if token_id < 256 else b"<%d>" % token_id


class FastTokenizer(Tokenizer):
    """A vocabulary that the `tokenizers` library runs: byte-level BPE, or SentencePiece with byte tokens."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        add_bos: bool = False,
        stop_ids: Iterable[int] = (),
    ) -> None:
        added = backend.get_added_tokens_decoder()
        ends = {token_id for token_id, token in added.items() if token.special and token.content in END_OF_GENERATION}
        super().__init__(
            vocab_size=max([backend.get_vocab_size(), *(token_id + 1 for token_id in added)]),
            bos_id=bos_id,
            eos_id=eos_id,
            add_bos=add_bos,
            stop_ids=ends.union(stop_ids),
            special_tokens={token.content: token_id for token_id, token in added.items() if token.special},
        )
        self._backend = backend
        self._plain = _blind_to_specials(backend)
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}
        self._hidden = {token_id for token_id, token in added.items() if token.special and not _ALWAYS_SHOWN.fullmatch(token.content)}
        self._piece_bytes = _byte_level_bytes if "ByteLevel" in repr(backend.decoder) else _sentencepiece_bytes

    def _encode(self, text: str, special: bool) -> list[int]:
        backend = self._backend if special else self._plain
        # As a batch of one: `encode` keeps the GIL, so that half a megabyte would hold up every other thread for half a second.
        return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        if token_id in self._added:
            return b"" if skip_special and token_id in self._hidden else self._added[token_id]
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._piece_bytes(token)


def _blind_to_specials(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer, taking control tokens in a text as plain text. It shares the vocabulary; a flag to switch would not be thread-safe."""
    plain = tokenizers.Tokenizer(backend.model)
    plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    plain.add_tokens([token for _, token in sorted(backend.get_added_tokens_decoder().items())])
    plain.encode_special_tokens = True
    return plain


def _byte_chars() -> list[str]:
    """GPT-2's printable character for each byte: printable Latin-1 stands for itself, the others follow from U+0100 in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_BYTE_CHARS = _byte_chars()
_BYTE_OF_CHAR = {char: byte for byte, char in enumerate(_BYTE_CHARS)}


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:  # no byte-level token, so it is plain text (placeholders that pad a vocabulary)
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
