"""SentencePiece vocabularies of the BPE kind (`tokenizer.ggml.model` "llama"), run by the `tokenizers` library.

The text's spaces become "\u2581" and one more goes first. Then, starting from single characters, the two neighbours whose union has the best score
are joined, the leftmost first where scores are equal, until no union is a token. A character that is no token is written as its UTF-8 bytes'
tokens. The library joins by a list of merges in their order of rank instead; `merges_by_score` makes that list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import tokenizers
from tokenizers import Tokenizer, decoders, models, normalizers

_SPACE = "\u2581"


def build(vocab: dict[str, int], merges: Sequence[tuple[str, str]], *, unknown: str, add_space_prefix: bool) -> tokenizers.Tokenizer:
    """The library's tokenizer, without added tokens. `unknown` stands for a run of characters that have neither a token nor byte tokens.

    The space goes before each stretch of text between added tokens, which is how the models' first tokenizers wrote their training data.
    """
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces: list[normalizers.Normalizer] = [normalizers.Prepend(_SPACE)] if add_space_prefix else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", _SPACE)])
    backend.decoder = decoders.ByteFallback()
    return backend


def merges_by_score(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, best first, so that joining by rank is joining by score; `scores` holds what merging may give.

    A rank knows no left and right. Where different tokens have one score (runs of spaces), the leftmost goes first by growing what was just joined:
    the longest left half first.
    """
    ways = [(-scores[left + right], -len(left), left, right) for left, right in _splits(scores)]
    ways.sort(key=lambda way: way[:2])
    return [(left, right) for *_, left, right in ways]


def _splits(scores: dict[str, float]) -> Iterator[tuple[str, str]]:
    for token in scores:
        for cut in range(1, len(token)):
            if token[:cut] in scores and token[cut:] in scores:
                yield token[:cut], token[cut:]
