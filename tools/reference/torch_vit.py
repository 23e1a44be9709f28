"""Plain vision transformers in PyTorch, with the key names of the originals.

Written from the papers (Dosovitskiy et al., 2021; Touvron et al., 2021; He et al., 2022), the names
and shapes in released files, and, for SmallViT, the slides that show its module. timm's own classes
(1.0.31) gave for the same random weights what our models give, to 4.3e-6 of logits up to 5, for
vit_tiny, vit_small, deit_tiny_distilled, deit_base_distilled, vit_small_patch14, its dinov2 form,
and MAE's base and mean-pooled small; tests/test_vit.py holds small ones to what timm gave.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Attention(nn.Module):
    """All queries, then all keys, then all values, from one fused layer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, C] -> [B, N, C]."""
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) / (C // self.heads) ** 0.5
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    """A wider layer, the exact GELU, and back."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        return x * self.gamma


class Block(nn.Module):
    """Attention and an MLP, each added to what it read through a norm."""

    def __init__(self, width: int, heads: int, hidden: int, scaled: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attn, self.mlp = Attention(width, heads), Mlp(width, hidden)
        self.ls1, self.ls2 = (LayerScale(width) if scaled else nn.Identity() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, C] -> [B, N, C]."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """A convolution whose stride is its size."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, size, size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, N, C]."""
        return self.proj(images).flatten(2).transpose(1, 2)


class TorchViT(nn.Module):
    """Of the same shape as one of our models whose blocks norm first."""

    def __init__(self, model: Any):
        super().__init__()
        width, classes = model.embed_dims[0], model.num_classes
        self.first = 2 if model.token_layout == "distilled" else 1
        rows = self.first + (model.image_size // model.patch_size) ** 2
        self.patch_embed = PatchEmbed(width, model.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if self.first == 2:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, width))
        self.blocks = nn.Sequential(*(
            Block(width, model.num_heads[0], _hidden(model), bool(model.layer_scale))
            for _ in range(model.depths[0])))
        if model.pool == "mean":
            self.fc_norm = nn.LayerNorm(width, 1e-6)
        else:
            self.norm = nn.LayerNorm(width, 1e-6)
        self.head = nn.Linear(width, classes) if classes else nn.Identity()
        if self.first == 2:
            self.head_dist = nn.Linear(width, classes) if classes else nn.Identity()

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, N, C] after the last block, not yet normed."""
        own = [self.cls_token, self.dist_token] if self.first == 2 else [self.cls_token]
        front = [token.expand(len(images), -1, -1) for token in own]
        return self.blocks(torch.cat([*front, self.patch_embed(images)], 1) + self.pos_embed)

    def answers(self, images: torch.Tensor) -> list[torch.Tensor]:
        """What each head says."""
        x = self.tokens(images)
        if hasattr(self, "fc_norm"):
            return [self.head(self.fc_norm(x[:, self.first:].mean(1)))]
        x = self.norm(x)
        return [self.head(x[:, 0]), self.head_dist(x[:, 1])] if self.first == 2 else [
            self.head(x[:, 0])]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, num_classes], or what the head reads where there is none."""
        found = self.answers(images)
        return sum(found[1:], found[0]) / len(found)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True,
                        assign: bool = False) -> Any:
        """As ever, and positions of another square grid are resized, by torch's own bicubic.

        Tokens before the patches' for which there is no row have no position.
        """
        table = state_dict.get("pos_embed")
        if table is not None and table.shape != self.pos_embed.shape:
            table = fit_positions(table[0], self.pos_embed.shape[1], self.first)[None]
            state_dict = {**state_dict, "pos_embed": table}
        return super().load_state_dict(state_dict, strict, assign)


class SmallPatchEmbed(nn.Module):
    """A dense layer of each patch's pixels, which lie row by row, the colours innermost."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.size = size
        self.proj = nn.Linear(size * size * 3, width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, N, C]."""
        p = self.size
        patches = images.unfold(2, p, p).unfold(3, p, p)  # [B, 3, H/p, W/p, p, p]
        return self.proj(patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2))


class SmallViT(nn.Module):
    """The slides' module: torch's own encoder layers, which norm after their sums."""

    def __init__(self, model: Any, dropout: float = 0.1):
        super().__init__()
        width = model.embed_dims[0]
        rows = 1 + (model.image_size // model.patch_size) ** 2
        self.patch_embed = SmallPatchEmbed(width, model.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, width))
        layer = nn.TransformerEncoderLayer(width, model.num_heads[0], _hidden(model), dropout,
                                           "gelu", batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, model.depths[0],
                                                 enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, model.num_classes) if model.num_classes else (
            nn.Identity())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, num_classes]."""
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.classifier(self.norm(self.transformer(x)[:, 0]))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True,
                        assign: bool = False) -> Any:
        """As ever, and positions of another square grid are resized, by torch's own bicubic."""
        table = state_dict.get("pos_embed")
        if table is not None and table.shape != self.pos_embed.shape:
            table = fit_positions(table[0], self.pos_embed.shape[1], 1)[None]
            state_dict = {**state_dict, "pos_embed": table}
        return super().load_state_dict(state_dict, strict, assign)


def make(model: Any) -> nn.Module:
    """The class of the order of norms that one of our models has, of its shape."""
    return SmallViT(model) if model.norm_order == "post" else TorchViT(model)


def _hidden(model: Any) -> int:
    return model.mlp_dims[0] if model.mlp_dims else 4 * model.embed_dims[0]


def fit_positions(table: torch.Tensor, rows: int, first: int) -> torch.Tensor:
    """[own + g*g, C] -> [rows, C] with `first` rows before the grid's; new ones are zeros."""
    own = next(n for n in (first, 1, 0) if math.isqrt(len(table) - n) ** 2 == len(table) - n)
    old, new = math.isqrt(len(table) - own), math.isqrt(rows - first)
    grid = table[own:].T.reshape(1, -1, old, old)
    grid = nn.functional.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    empty = torch.zeros(first - own, table.shape[1])
    return torch.cat([table[:own], empty, grid[0].flatten(1).T])


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter a random value of a plausible size, none of them silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in key or "gamma" in key:
                value.copy_(0.3 * noise + key.endswith(("weight", "gamma")))
            elif value.ndim in (2, 4):
                value.copy_(noise / value[0].numel() ** 0.5)
            else:
                value.copy_(0.3 * noise)
    return module.eval()
