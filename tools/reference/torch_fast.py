"""TinyViT in PyTorch written for speed: the rival of tools/benchmark.py where no original is.

The layers and names of torch_tinyvit.TorchTinyViT, but for the blocks of the last three stages: all
windows are cut out by one permutation, and attention is PyTorch's own fused function.
"""

import torch
import torch.nn.functional as F
from torch import nn

from reference.torch_tinyvit import Attention, Block, TorchTinyViT


class FastAttention(Attention):
    """Attention of all windows at once by scaled_dot_product_attention."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, w*w, C] -> [B, w*w, C]."""
        B, N, C = x.shape
        per_head = self.qkv(self.norm(x)).view(B, N, self.heads, -1).transpose(1, 2)
        q, k, v = per_head.split(C // self.heads, dim=-1)
        bias = self.attention_biases[:, self.attention_bias_idxs]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(out.transpose(1, 2).reshape(B, N, C))


class FastBlock(Block):
    """A block whose windows are the rows of one batch."""

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__(dim, heads, window)
        self.attn = FastAttention(dim, heads, window)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        B, H, W, C = x.shape
        w = self.window
        if H == W == w:
            return self.attn(x.reshape(B, H * W, C)).view(B, H, W, C)
        below, right = -H % w, -W % w
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        rows, columns = (H + below) // w, (W + right) // w
        x = x.view(B, rows, w, columns, w, C).transpose(2, 3).reshape(-1, w * w, C)
        x = self.attn(x).view(B, rows, columns, w, w, C).transpose(2, 3)
        x = x.reshape(B, H + below, W + right, C)
        return x[:, :H, :W] if below or right else x


class FastTinyViT(TorchTinyViT):
    """Of the same shape as one of our models."""

    def __init__(self, model):
        super().__init__(model)
        for i, stage in enumerate(self.layers):
            if i:
                stage.blocks = nn.ModuleList(
                    FastBlock(model.embed_dims[i], model.num_heads[i], model.window_sizes[i])
                    for _ in range(model.depths[i]))
