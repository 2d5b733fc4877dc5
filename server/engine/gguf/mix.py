"""Which type each tensor of a quantised file has: llama.cpp's mixes, so that a synthetic file weighs and runs like a downloaded one.

A mix has one type for most matrices and a better one for what matters more: the head, and in the "_m" mixes the values and the down projections of
the first and last eighth of the layers and of every third between. A row that the type's blocks do not fill takes a finer type of smaller blocks.
Source: llama.cpp, src/llama-quant.cpp. One difference: attn_k_b, whose rows of 128 no K-quant fits, is Q8_0 here in the K mixes, where llama-quantize by
itself would fall back to Q5_0; published files have either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from server.errors import ConfigError

_T = GGMLQuantizationType


@dataclass(frozen=True, slots=True)
class Mix:
    """A named mix of types."""

    base: GGMLQuantizationType
    file_type: LlamaFileType  # what the file says of itself
    more_bits: bool = False  # Q6_K for half of the values and down projections
    output_8_experts: GGMLQuantizationType | None = None  # attn_output of models with just 8 experts


MIXES: Mapping[str, Mix] = {
    "q4_k_m": Mix(_T.Q4_K, LlamaFileType.MOSTLY_Q4_K_M, more_bits=True, output_8_experts=_T.Q5_K),
    "q5_k_m": Mix(_T.Q5_K, LlamaFileType.MOSTLY_Q5_K_M, more_bits=True),
    "q6_k": Mix(_T.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q8_0": Mix(_T.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_0": Mix(_T.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_0": Mix(_T.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "bf16": Mix(_T.BF16, LlamaFileType.MOSTLY_BF16),
    "f16": Mix(_T.F16, LlamaFileType.MOSTLY_F16),
}

_FLOATS = frozenset({_T.F16, _T.BF16})
_IQ = (_T.IQ1_S, _T.IQ1_M, _T.IQ2_XXS, _T.IQ2_XS, _T.IQ2_S, _T.IQ3_XXS, _T.IQ3_S, _T.IQ4_XS)
_FALLBACKS = {  # from blocks of 256 to blocks of 32
    _T.Q2_K: _T.Q4_0,
    _T.Q3_K: _T.Q4_0,
    _T.Q4_K: _T.Q5_0,
    _T.Q5_K: _T.Q5_1,
    _T.Q6_K: _T.Q8_0,
    **dict.fromkeys(_IQ, _T.IQ4_NL),
}
_ALWAYS_F32 = re.compile(r".*(_norm\.weight|\.bias|ffn_gate_inp\.weight)")


def mix_named(name: str) -> Mix:
    """Raises ConfigError with the list of those there are."""
    mix = MIXES.get(name.lower())
    if mix is None:
        raise ConfigError(f"--quant {name}: there is no such mix; there is {', '.join(MIXES)}.")
    return mix


@dataclass(frozen=True, slots=True)
class TypeChooser:
    """A mix applied to one model."""

    mix: Mix
    layers: int
    experts: int  # 0 in a dense model
    tied: bool

    def __call__(self, name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
        """The type of a tensor; shape in numpy order."""
        if len(shape) < 2 or _ALWAYS_F32.fullmatch(name):
            return _T.F32
        if self.mix.base in _FLOATS:
            return self.mix.base
        return fitting(self._wanted(name, shape[-1]), shape[-1])

    def _wanted(self, name: str, cols: int) -> GGMLQuantizationType:
        part = name.removesuffix(".weight").rpartition(".")[2]
        if part == "output" or (self.tied and part == "token_embd"):
            return _T.Q8_0 if self.mix.base is _T.Q8_0 or cols % GGML_QUANT_SIZES[self.mix.base][0] else _T.Q6_K
        if part in ("attn_v", "attn_k") and self.experts == 8:
            return _T.Q8_0
        if part == "attn_output" and self.experts == 8:
            return self.mix.output_8_experts or self.mix.base
        if part == "attn_k_b" and cols % GGML_QUANT_SIZES[self.mix.base][0]:
            return _T.Q8_0
        if self.mix.more_bits and (part == "attn_v" or part.startswith("ffn_down")) and _more_bits(_layer(name), self.layers):
            return _T.Q6_K
        return self.mix.base


def _layer(name: str) -> int:
    return int(name.split(".")[1])  # blk.N.part.weight


def _more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def fitting(kind: GGMLQuantizationType, cols: int) -> GGMLQuantizationType:
    """The type itself, or where its blocks do not fill a row the next that does."""
    if cols % GGML_QUANT_SIZES[kind][0]:
        kind = _FALLBACKS.get(kind, kind)
    return _T.F16 if cols % GGML_QUANT_SIZES[kind][0] else kind
