"""CLIP's image tower with a classifier in PyTorch, with the key names of the original's teacher.

Written from the paper (Radford et al., 2021) and the names and shapes in the released file.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        return x * (1.702 * x).sigmoid()


class Block(nn.Module):
    """Attention and an MLP, each added to what it read through a norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(),
            c_proj=nn.Linear(4 * width, width)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, C] -> [B, N, C]."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class ImageTower(nn.Module):
    """Images to CLIP's embedding, read from the class token."""

    def __init__(self, model: Any):
        super().__init__()
        width, patch = model.embed_dims[0], model.patch_size
        tokens = 1 + (model.image_size // patch) ** 2
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        blocks = [Block(width, model.num_heads[0]) for _ in range(model.depths[0])]
        self.transformer = nn.Sequential(OrderedDict(resblocks=nn.Sequential(*blocks)))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, model.embed_dim))

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, N, C] after the last block, the class token first."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(images), 1, -1)
        x = torch.cat([first, patches], 1) + self.positional_embedding
        return self.transformer(self.ln_pre(x))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, embed_dim]."""
        return self.ln_post(self.tokens(images)[:, 0]) @ self.proj


class TorchClip(nn.Module):
    """Of the same shape as one of our models."""

    def __init__(self, model: Any):
        super().__init__()
        self.visual = ImageTower(model)
        if model.num_classes:
            self.head = nn.Linear(model.embed_dim, model.num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, num_classes], or the embedding where there is no head."""
        x = self.visual(images)
        return self.head(x) if hasattr(self, "head") else x

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True,
                        assign: bool = False) -> Any:
        """As ever, and positions of another square grid are resized, by torch's own bicubic."""
        key, own = "visual.positional_embedding", self.visual.positional_embedding
        table = state_dict.get(key)
        if table is not None and table.shape != own.shape:
            state_dict = {**state_dict, key: resize_positions(table, len(own))}
        return super().load_state_dict(state_dict, strict, assign)


def resize_positions(table: torch.Tensor, tokens: int) -> torch.Tensor:
    """[1 + g*g, C] -> [tokens, C]; the class token's row stays."""
    old, new = math.isqrt(len(table) - 1), math.isqrt(tokens - 1)
    grid = table[1:].T.reshape(1, -1, old, old)
    grid = nn.functional.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], grid[0].flatten(1).T])


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter a random value of a plausible size, none of them silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if ".ln_" in key:
                value.copy_(0.3 * noise + key.endswith("weight"))
            elif key.endswith("proj"):
                value.copy_(noise / len(value) ** 0.5)
            elif value.ndim > 1 and "positional" not in key:
                value.copy_(noise / value[0].numel() ** 0.5)
            else:
                value.copy_(0.3 * noise)
    return module.eval()
