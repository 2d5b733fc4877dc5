"""How a text is cut into words before byte-level BPE merges them: one row of a table for each `tokenizer.ggml.pre`.

A GGUF names its pre-tokenizer and does not describe it. Each row gives the regular expressions of the model's own tokenizer.json, applied one
after another, each match becoming a piece of its own; what lies between matches stays a piece as well. A new model family adds a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from server.errors import UnsupportedModel

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-4's shape: contractions in any case, one leading mark kept with a word, line breaks kept with what precedes them.
_CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One row: what happens to a text before the merges."""

    splits: tuple[str, ...]  # Oniguruma regular expressions, in order
    nfc: bool = False  # the text is brought to Unicode NFC first
    ignore_merges: bool = False  # a piece that is a token as a whole is taken as it is
    add_bos: bool = False  # whether a prompt starts with BOS when the metadata does not say

    def normalizer(self) -> normalizers.Normalizer | None:
        """What `tokenizers` runs on the text first."""
        return normalizers.NFC() if self.nfc else None

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The row as `tokenizers` runs it: every split, then bytes as printable characters."""
        splits: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(split), "isolated") for split in self.splits]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_QWEN2 = PreTokenizer((_CL100K.format(digits=""),), nfc=True)
_LLAMA3 = PreTokenizer((_CL100K.format(digits="{1,3}"),), ignore_merges=True, add_bos=True)

PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer((_GPT2,)),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
}


def pre_tokenizer(name: object) -> PreTokenizer:
    """The row for `tokenizer.ggml.pre`; UnsupportedModel for a name that the table lacks, or none."""
    row = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if row is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModel(
            f"The GGUF asks for the pre-tokenizer {name!r} (tokenizer.ggml.pre), which this version does not know; it knows {known}. "
            f"Give the model's Hugging Face directory with --model_path to use the tokenizer found there."
        )
    return row
