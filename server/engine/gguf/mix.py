"""Which type each tensor of a quantised file has: llama.cpp's mixes, so that a synthetic file weighs and runs like a downloaded one.

A mix has one type for most matrices and a better one for what matters more: the head, and for some the values, the attention's output and the down
projections. A row that the type's blocks do not fill takes a finer type of smaller blocks. Source: llama.cpp, src/llama-quant.cpp; the IQ mixes as it makes
them with an importance matrix. Two differences: attn_k_b, whose rows of 128 no block of 256 fills, is Q8_0 here, where llama-quantize by itself would fall
back to types of 4 and 5 bits (published files have either); and the first eighth of the down projections is counted by layer in every mix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from server.errors import ConfigError

_T = GGMLQuantizationType


@dataclass(frozen=True, slots=True)
class Model:
    """What of a model decides about types."""

    layers: int
    experts: int  # 0 in a dense model
    tied: bool
    queries_per_value: int  # query heads that share one of keys and values


Rule = Callable[[int, Model], GGMLQuantizationType | None]  # of a layer; None for the mix's own type


@dataclass(frozen=True, slots=True)
class Mix:
    """A named mix of types."""

    base: GGMLQuantizationType
    file_type: LlamaFileType  # what the file says of itself
    rules: Mapping[str, Rule] = field(default_factory=dict)  # for "attn_v", "attn_output", ...; "ffn_down" holds for experts' too
    head: GGMLQuantizationType = _T.Q6_K
    embedding: GGMLQuantizationType | None = None
    stacked: GGMLQuantizationType | None = None  # matrices of several experts, or heads
    # Of models with just 8 experts:
    keys_8_experts: GGMLQuantizationType = _T.Q8_0  # and values
    output_8_experts: GGMLQuantizationType | None = None


def _always(kind: GGMLQuantizationType) -> Rule:
    return lambda layer, model: kind


def _shared(kind: GGMLQuantizationType, otherwise: GGMLQuantizationType | None = None) -> Rule:
    """Where four heads or more share a value, it is a small matrix that much depends on."""
    return lambda layer, model: kind if model.queries_per_value >= 4 else otherwise


def _first(share: int, kind: GGMLQuantizationType, otherwise: GGMLQuantizationType | None = None) -> Rule:
    """The first 1 / share of the layers."""
    return lambda layer, model: kind if layer < model.layers // share else otherwise


def _six_bits_here_and_there(layer: int, model: Model) -> GGMLQuantizationType | None:
    """The first and the last eighth of the layers, and every third between."""
    eighth = model.layers // 8
    return _T.Q6_K if layer < eighth or layer >= 7 * model.layers // 8 or (layer - eighth) % 3 == 2 else None


def _tiny_values(layer: int, model: Model) -> GGMLQuantizationType:
    return _T.Q4_K if model.queries_per_value >= 4 or model.experts >= 4 else _T.Q2_K


_SIX_BITS: Mapping[str, Rule] = {"attn_v": _six_bits_here_and_there, "ffn_down": _six_bits_here_and_there}
_TINY: Mapping[str, Rule] = {"attn_v": _tiny_values, "ffn_down": _first(8, _T.Q2_K)}
_TWO_BITS: Mapping[str, Rule] = {"attn_v": _shared(_T.Q4_K, _T.Q3_K), "attn_output": _always(_T.Q3_K), "ffn_down": _always(_T.Q3_K)}
_THREE_BITS: Mapping[str, Rule] = {
    "attn_v": lambda layer, model: _T.Q5_K if layer < 2 else _T.Q4_K,
    "attn_output": _always(_T.Q4_K),
    "ffn_down": _first(16, _T.Q5_K, _T.Q4_K),
}
_IQ3: Mapping[str, Rule] = {"attn_v": _shared(_T.Q4_K), "attn_k": _always(_T.IQ2_S), "attn_q": _always(_T.IQ2_S), "attn_output": _always(_T.IQ3_S)}

MIXES: Mapping[str, Mix] = {
    "q4_k_m": Mix(_T.Q4_K, LlamaFileType.MOSTLY_Q4_K_M, _SIX_BITS, output_8_experts=_T.Q5_K),
    "q2_k": Mix(_T.Q2_K, LlamaFileType.MOSTLY_Q2_K, _TWO_BITS, output_8_experts=_T.Q5_K),
    "q3_k_m": Mix(_T.Q3_K, LlamaFileType.MOSTLY_Q3_K_M, _THREE_BITS, output_8_experts=_T.Q5_K),
    "q5_k_m": Mix(_T.Q5_K, LlamaFileType.MOSTLY_Q5_K_M, _SIX_BITS),
    "q6_k": Mix(_T.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q8_0": Mix(_T.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_0": Mix(_T.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_0": Mix(_T.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "iq1_s": Mix(
        _T.IQ1_S, LlamaFileType.MOSTLY_IQ1_S, {**_TINY, "attn_output": _always(_T.IQ2_XXS)},
        head=_T.Q5_K, embedding=_T.Q2_K, keys_8_experts=_T.Q4_K, output_8_experts=_T.Q5_K,
    ),
    "iq2_xxs": Mix(
        _T.IQ2_XXS, LlamaFileType.MOSTLY_IQ2_XXS, _TINY, head=_T.Q5_K, embedding=_T.Q2_K, keys_8_experts=_T.Q4_K, output_8_experts=_T.Q5_K
    ),
    "iq3_xxs": Mix(_T.IQ3_XXS, LlamaFileType.MOSTLY_IQ3_XXS, _IQ3, head=_T.Q5_K, embedding=_T.IQ3_S, output_8_experts=_T.Q5_K),
    "iq4_xs": Mix(_T.IQ4_XS, LlamaFileType.MOSTLY_IQ4_XS, {"attn_v": _shared(_T.Q5_K)}, output_8_experts=_T.Q5_K),
    "mxfp4": Mix(_T.Q8_0, LlamaFileType.MOSTLY_MXFP4_MOE, stacked=_T.MXFP4),
    "bf16": Mix(_T.BF16, LlamaFileType.MOSTLY_BF16),
    "f16": Mix(_T.F16, LlamaFileType.MOSTLY_F16),
}  # fmt: skip

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
    model: Model

    def __call__(self, name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
        """The type of a tensor; shape in numpy order."""
        if len(shape) < 2 or _ALWAYS_F32.fullmatch(name):
            return _T.F32
        if self.mix.base in _FLOATS:
            return self.mix.base
        return fitting(self._wanted(name, shape), shape[-1])

    def _wanted(self, name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
        mix, part = self.mix, name.removesuffix(".weight").rpartition(".")[2]
        fits = shape[-1] % GGML_QUANT_SIZES[mix.base][0] == 0
        if part == "output" or (self.model.tied and part == "token_embd"):
            return mix.head if fits and mix.base is not _T.Q8_0 else _T.Q8_0
        if part == "token_embd":
            return mix.embedding or mix.base
        if len(shape) > 2 and mix.stacked is not None:
            return mix.stacked
        if part == "attn_k_b" and not fits:
            return _T.Q8_0
        return self._in_a_block(part, int(name.split(".")[1]))  # blk.N.part.weight

    def _in_a_block(self, part: str, layer: int) -> GGMLQuantizationType:
        mix = self.mix
        if self.model.experts == 8 and part in ("attn_v", "attn_k"):
            return mix.keys_8_experts
        if self.model.experts == 8 and part == "attn_output":
            return mix.output_8_experts or mix.base
        rule = mix.rules.get("ffn_down" if part.startswith("ffn_down") else part)
        return (rule(layer, self.model) if rule else None) or mix.base


def fitting(kind: GGMLQuantizationType, cols: int) -> GGMLQuantizationType:
    """The type itself, or where its blocks do not fill a row the next that does."""
    if cols % GGML_QUANT_SIZES[kind][0]:
        kind = _FALLBACKS.get(kind, kind)
    return _T.F16 if cols % GGML_QUANT_SIZES[kind][0] else kind
