"""The model's sizes: DeepSeek-V3's mechanisms and head sizes on a trunk small enough to ship. Free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes in V3's terms (arXiv:2412.19437, section 2 and 4.2). Rows of 256 and its multiples, as K-quants need, but for heads of 128."""

    vocab: int = 2048
    hidden: int = 256
    layers: int = 6  # without the MTP block, which is a MoE layer of its own
    leading_dense: int = 3
    heads: int = 4
    q_lora: int = 256
    kv_lora: int = 512
    rope_dim: int = 64
    nope_dim: int = 128
    v_dim: int = 128
    ffn: int = 768  # of the dense layers
    experts: int = 32
    expert_ffn: int = 256  # of a routed expert, and of the shared one
    top_k: int = 8
    groups: int = 8
    groups_used: int = 4
    routed_scale: float = 2.5
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0
    context: int = 4096
    yarn_factor: float = 4.0
    yarn_original: int = 1024
    yarn_fast: float = 32.0
    yarn_slow: float = 1.0

    @property
    def qk_dim(self) -> int:
        """Of a head's query and key."""
        return self.nope_dim + self.rope_dim

    @property
    def attention_scale(self) -> float:
        """Of the scores; YaRN sharpens them (mscale_all_dim = 1; with mscale = 1 cos and sin keep their length)."""
        return (0.1 * math.log(self.yarn_factor) + 1.0) ** 2 / math.sqrt(self.qk_dim)

    def inverse_frequencies(self) -> list[float]:
        """Of the rope pairs: high frequencies as they are, low ones divided by the factor, a ramp between (YaRN, arXiv:2309.00071, section 3.2)."""

        def pair_turning(times: float) -> float:
            """The pair (as a fraction) that turns so often over the original context."""
            return self.rope_dim * math.log(self.yarn_original / (times * 2 * math.pi)) / (2 * math.log(self.rope_base))

        low, high = max(math.floor(pair_turning(self.yarn_fast)), 0), min(math.ceil(pair_turning(self.yarn_slow)), self.rope_dim - 1)
        frequencies = []
        for pair in range(self.rope_dim // 2):
            plain = self.rope_base ** (-2 * pair / self.rope_dim)
            ramp = min(max((pair - low) / (high - low), 0.0), 1.0)
            frequencies.append(plain * (1 - ramp) + plain / self.yarn_factor * ramp)
        return frequencies
