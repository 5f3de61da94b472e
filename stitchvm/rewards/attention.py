"""One arithmetic for attention, whatever the mode.

torch's `nn.MultiheadAttention`, which open_clip's towers are made of, computes in three ways that round differently:
with gradients; frozen in training mode; and an inference shortcut (in bfloat16 they are 1e-2 apart at the end of a
tower). A frozen teacher and its trainable copy would then disagree before any training. Frozen weights also send
the projections through a batched product, many times slower on a CPU. `SelfAttention` has the same parameters
and is, bit for bit, the first of the three.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SelfAttention", "unify_attention"]


class SelfAttention(nn.Module):
    """Stands in for an `nn.MultiheadAttention` in a residual block of open_clip, sharing its parameters.

    Arguments:
        attention: The module that is replaced.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Returns self-attention of the tokens (B, N, D); key and value are the query."""
        # the bias is added to the rounded product, as there: not F.linear, which fuses the two
        qkv = query @ self.in_proj_weight.T + self.in_proj_bias
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(o.transpose(1, 2).flatten(2)), None


def unify_attention(model: nn.Module) -> None:
    """Replaces every attention in open_clip's transformers, and makes all of them take (B, N, D)."""
    from open_clip.transformer import ResidualAttentionBlock, Transformer

    for module in model.modules():
        if isinstance(module, Transformer):
            module.batch_first = True  # older towers work in (N, B, D)
        if isinstance(module, ResidualAttentionBlock):
            assert not hasattr(module, "ln_1_kv") and torch.is_tensor(module.attn.in_proj_bias)
            module.attn = SelfAttention(module.attn)
