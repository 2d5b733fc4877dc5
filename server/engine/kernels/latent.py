"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, 2.1) over the paged cache of latents, in whichever of its two forms is the cheaper.

Absorbed: queries are multiplied into the latents' space, 576 values wide for DeepSeek-V3, and nothing is expanded. Expanded: keys and values of each head
are made of the latents, once for all queries.
"""

from __future__ import annotations

from torch import Tensor

from server.engine.gpu.matrix import DeviceMatrix
from server.engine.gpu.place import Place
from server.engine.kernels.attention_plan import LatentShape, absorbs
from server.engine.kernels.head_products import HeadKernels, apply_heads
from server.engine.kernels.latent_absorbed import attend_absorbed, tiles
from server.engine.kernels.latent_expanded import attend_expanded
from server.engine.kernels.rotate import NewLatents, latent_queries
from server.engine.kernels.tuning import limits
from server.engine.ops import LatentPages, Norm, Rotation


def attend_latent(
    q: Tensor,
    latent: Tensor,
    norm: Norm,
    rotation: Rotation,
    cache: LatentPages,
    place: Place,
    k_b: DeviceMatrix,
    v_b: DeviceMatrix,
    scale: float,
    out: Tensor,
    kernels: HeadKernels,
) -> None:
    """Ops.attend_latent on the GPU; q and latent stay as they are.

    q [n, heads, nope + rope], latent [n, kv_lora + rope], out [n, heads, v_dim], float32; k_b `heads` matrices [kv_lora, nope], v_b [v_dim, kv_lora].
    Products are in the cache's dtype, sums in float32. Up to MATVEC_TOKENS tokens the grid depends on place.n and place.end alone, and place.end may be
    beyond the context; with more it is exact.
    """
    shape = LatentShape(q.shape[1], k_b.rows, 2 * rotation.table.shape[1], k_b.cols, v_b.rows)
    new = NewLatents(latent, norm, cache)
    if not absorbs(shape, place.n, place.end):
        attend_expanded(q, new, rotation, place, shape, k_b, v_b, scale, out, kernels)
        return
    absorbed, dtype = q.new_empty(place.n, shape.heads, shape.kv_lora), cache.latent.dtype
    apply_heads(k_b, q[..., : shape.nope], absorbed, dtype, kernels)
    queries = q.new_empty(place.n, shape.heads, shape.kv_lora + shape.rope, dtype=dtype)
    latent_queries(absorbed, q[..., shape.nope :], rotation, place, scale, queries, new)
    mixed = absorbed  # its values are in the queries now
    attend_absorbed(queries, cache, place, mixed, tiles(limits(q.device), mixed, cache, place))
    apply_heads(v_b, mixed, out, dtype, kernels)
