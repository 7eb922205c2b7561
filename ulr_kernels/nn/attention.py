"""Multi-head attention: torch's function is one call that hides its projections; this one shows them.

The same arithmetic as `F.multi_head_attention_forward`, from calls that the estimator sees, and with the samples on the
first axis throughout. nn.MultiheadAttention and the transformer layers call that function whenever a mode watches them,
instead of their fused inference kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward`, whose arguments these are; query `[L, N, E]`, key and value `[S, N, E]`.

    `is_causal` is only a hint about attn_mask, which is used. Returns `NotImplemented` for an input
    without a batch, and for static keys or values.
    """
    if query.dim() != 3 or static_k is not None or static_v is not None:
        return NotImplemented
    packed = query is key and key is value and not use_separate_proj_weight
    q_in, k_in, v_in = (t.transpose(0, 1) for t in (query, key, value))
    batch = q_in.shape[0]
    if packed:
        q, k, v = F.linear(q_in, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        separate = (q_proj_weight, k_proj_weight, v_proj_weight)
        weights = separate if use_separate_proj_weight else in_proj_weight.chunk(3)
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((q_in, k_in, v_in), weights, biases, strict=True))
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(batch, 1, -1)], 1)
        v = torch.cat([v, bias_v.expand(batch, 1, -1)], 1)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # [N, heads, positions, E / heads]
    if add_zero_attn:
        k, v = (torch.cat([t, torch.zeros_like(t[:, :, :1])], 2) for t in (k, v))
    mask = _mask(attn_mask, key_padding_mask, batch, k.shape[2], q.dtype)
    dropout = dropout_p if training else 0.0
    attention = None
    if need_weights:
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        attention = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
        out = attention @ v
        attention = attention.mean(1) if average_attn_weights else attention
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    out = F.linear(out.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    return out.transpose(0, 1), attention


def _mask(attn_mask: Tensor | None, padding: Tensor | None, batch: int, keys: int, dtype: torch.dtype) -> Tensor | None:
    """The sum of both masks, to add to the scores `[N, heads, L, S]`; each is boolean (True is left out) or additive.

    Keys that were appended after those of a mask are never left out.
    """
    masks = []
    if attn_mask is not None:
        attn_mask = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, -1))
        masks.append(attn_mask)
    if padding is not None:
        masks.append(padding[:, None, None])
    total: Tensor | None = None
    for mask in masks:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
        mask = F.pad(mask, (0, keys - mask.shape[-1]))
        total = mask if total is None else total + mask
    return total


COMPOSITES = {F.multi_head_attention_forward: multi_head_attention}
