"""Which GGUF type each matrix of an exported file has.

A mix that is called as a type is called has every matrix in it, embedding and head too. llama.cpp's mixes of these names spend more on the head; with one
type throughout, figures compare types. Rows that its blocks do not fill (attn_k_b's, of 128, where a block has 256) are Q8_0. The mixes with _M have Q6_K where
llama.cpp's spend more: head, values, and the down projections outside the routed experts. Q4_K_M is what ships.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, LlamaFileType
from gguf.constants import GGMLQuantizationType as Type

_FINER = frozenset({"output.weight", "attn_v_b.weight", "ffn_down.weight", "ffn_down_shexp.weight"})


@dataclass(frozen=True, slots=True)
class Mix:
    """A named mix of types."""

    base: Type
    file_type: LlamaFileType  # what the file says of itself; of K-quants without more, "small" comes closest
    finer: frozenset[str] = frozenset()  # parts of a block, or top-level tensors, in Q6_K

    def __call__(self, name: str, cols: int) -> Type:
        """The type of a matrix whose rows have `cols` values."""
        block_part = name.split(".", 2)[2] if name.startswith("blk.") else name
        wanted = Type.Q6_K if block_part in self.finer else self.base
        return Type.Q8_0 if cols % GGML_QUANT_SIZES[wanted][0] else wanted


MIXES: Mapping[str, Mix] = {
    "F32": Mix(Type.F32, LlamaFileType.ALL_F32),
    "F16": Mix(Type.F16, LlamaFileType.MOSTLY_F16),
    "BF16": Mix(Type.BF16, LlamaFileType.MOSTLY_BF16),
    "Q8_0": Mix(Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "Q6_K": Mix(Type.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "Q5_K": Mix(Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_S),
    "Q5_1": Mix(Type.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "Q5_0": Mix(Type.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "Q4_K": Mix(Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_S),
    "Q4_1": Mix(Type.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "Q4_0": Mix(Type.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "IQ4_NL": Mix(Type.IQ4_NL, LlamaFileType.MOSTLY_IQ4_NL),
    "IQ4_XS": Mix(Type.IQ4_XS, LlamaFileType.MOSTLY_IQ4_XS),
    "MXFP4": Mix(Type.MXFP4, LlamaFileType.MOSTLY_MXFP4_MOE),
    "Q3_K": Mix(Type.Q3_K, LlamaFileType.MOSTLY_Q3_K_S),
    "Q2_K": Mix(Type.Q2_K, LlamaFileType.MOSTLY_Q2_K_S),
    "Q5_K_M": Mix(Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_M, _FINER),
    "Q4_K_M": Mix(Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_M, _FINER),
}
SHIPPED = ("BF16", "Q4_K_M")  # what an export writes by itself
