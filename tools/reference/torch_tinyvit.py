"""TinyViT in PyTorch, to compare with: written from the paper, with the originals' key names.

TorchTinyViT has the names of Microsoft's class, TimmTinyViT those of timm's. Both are the same
layers, so the second proves names and shapes, and says no more about arithmetic than the first;
tools/check_parity.py compares with the originals' own classes where they are at hand.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


class ConvNorm(nn.Sequential):
    """A convolution and its BatchNorm."""

    def __init__(self, inputs, outputs, size=1, stride=1, groups=1, scale=1.0):
        super().__init__()
        conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        self.add_module("c", conv)
        norm = nn.BatchNorm2d(outputs)
        nn.init.constant_(norm.weight, scale)
        self.add_module("bn", norm)


class Stem(nn.Module):
    """Two 3x3 convolutions."""

    def __init__(self, dim, strides):
        super().__init__()
        self.seq = nn.Sequential(ConvNorm(3, dim // 2, 3, strides[0]), nn.GELU(),
                                 ConvNorm(dim // 2, dim, 3, strides[1]))

    def forward(self, images):
        """[B, 3, H, W] -> [B, C, H/4, W/4], by the strides."""
        return self.seq(images)


class MBConv(nn.Module):
    """Inverted residual block of stage 0."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.conv1 = ConvNorm(dim, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvNorm(hidden, dim, scale=0.0)

    def forward(self, x):
        """[B, C, H, W] -> [B, C, H, W]."""
        inner = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(x + self.conv3(inner))


class Downsample(nn.Module):
    """Between stages: to the next width at half the resolution."""

    def __init__(self, dim, out):
        super().__init__()
        self.conv1 = ConvNorm(dim, out)
        self.conv2 = ConvNorm(out, out, 3, 2, groups=out)
        self.conv3 = ConvNorm(out, out)

    def forward(self, x):
        """[B, C, H, W] -> [B, C', H/2, W/2]."""
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class Attention(nn.Module):
    """Multi-head attention within a window."""

    attention_bias_idxs: torch.Tensor

    def __init__(self, dim, heads, window):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        y, x = y.flatten(), x.flatten()
        index = (y[:, None] - y).abs() * window + (x[:, None] - x).abs()
        self.register_buffer("attention_bias_idxs", index, persistent=False)

    def forward(self, x):
        """[B, w*w, C] -> [B, w*w, C]."""
        B, N, C = x.shape
        d = C // self.heads
        per_head = self.qkv(self.norm(x)).view(B, N, self.heads, 3 * d).transpose(1, 2)
        q, k, v = per_head.split(d, dim=-1)
        bias = self.attention_biases[:, self.attention_bias_idxs]
        weights = torch.softmax(q @ k.transpose(-2, -1) / d**0.5 + bias, dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    """LayerNorm, a wider layer, GELU, and back."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        """[..., C] -> [..., C]."""
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class Block(nn.Module):
    """Window attention, a local convolution, an MLP."""

    def __init__(self, dim, heads, window):
        super().__init__()
        self.window = window
        self.attn = Attention(dim, heads, window)
        self.mlp = Mlp(dim, 4 * dim)
        self.local_conv = ConvNorm(dim, dim, 3, groups=dim)

    def forward(self, x):
        """[B, C, H, W] -> [B, C, H, W]."""
        x = x + self.attend(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.local_conv(x)
        return x + self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def attend(self, x):
        """Window by window, the plain way: [B, H, W, C] -> [B, H, W, C]."""
        B, H, W, C = x.shape
        w = self.window
        x = F.pad(x, (0, 0, 0, -W % w, 0, -H % w))
        out = torch.empty_like(x)
        for top in range(0, x.shape[1], w):
            for left in range(0, x.shape[2], w):
                window = x[:, top:top + w, left:left + w].reshape(B, w * w, C)
                out[:, top:top + w, left:left + w] = self.attn(window).view(B, w, w, C)
        return out[:, :H, :W]


class Stage(nn.Module):
    """The blocks of a stage and the way down after them."""

    def __init__(self, blocks, downsample):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x):
        """The stage's own map and the next stage's input."""
        for block in self.blocks:
            x = block(x)
        return x, x if self.downsample is None else self.downsample(x)


class TorchTinyViT(nn.Module):
    """Of the same shape as one of our models."""

    def __init__(self, model):
        super().__init__()
        dims = model.embed_dims
        self.patch_embed = Stem(dims[0], model.stem_strides)
        self.layers = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, model.depths, strict=True)):
            make = (lambda d=dim: MBConv(d, 4 * d)) if i == 0 else (
                lambda d=dim, i=i: Block(d, model.num_heads[i], model.window_sizes[i]))
            down = Downsample(dim, dims[i + 1]) if i < 3 else None
            self.layers.append(Stage([make() for _ in range(depth)], down))
        self.norm_head = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], model.num_classes) if model.num_classes else nn.Identity()

    def features(self, images):
        """The maps of the four stages."""
        x = self.patch_embed(images)
        maps = []
        for stage in self.layers:
            own, x = stage(x)
            maps.append(own)
        return maps

    def forward(self, images):
        """[B, 3, H, W] -> logits [B, C], or pooled features without classes."""
        return self.head(self.norm_head(self.features(images)[-1].mean((2, 3))))


class TimmStage(nn.Module):
    """A stage that begins with the way down to it."""

    def __init__(self, downsample, blocks):
        super().__init__()
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = blocks

    def forward(self, x):
        """[B, C, H, W] -> [B, C', H', W']."""
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class TimmTinyViT(nn.Module):
    """The layers of TorchTinyViT under timm's names."""

    def __init__(self, model):
        super().__init__()
        own = TorchTinyViT(model)
        for layer in own.modules():
            if isinstance(layer, ConvNorm):
                layer._modules = OrderedDict(zip(("conv", "bn"), layer.children(), strict=True))
        stem = own.patch_embed.seq
        self.patch_embed = nn.Sequential(
            OrderedDict(conv1=stem[0], act=stem[1], conv2=stem[2]))
        downs = [None, *(stage.downsample for stage in own.layers)]
        self.stages = nn.ModuleList(TimmStage(down, stage.blocks)
                                    for down, stage in zip(downs, own.layers, strict=False))
        self.head = nn.Sequential(OrderedDict(norm=own.norm_head, fc=own.head))

    def features(self, images):
        """The maps of the four stages."""
        x = self.patch_embed(images)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, images):
        """[B, 3, H, W] -> logits [B, C], or pooled features without classes."""
        return self.head(self.features(images)[-1].mean((2, 3)))


def randomize(module, seed=0):
    """Gives every weight and every BatchNorm statistic a random value of a plausible size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in module.state_dict().items():
            noise = torch.randn(value.shape, generator=generator)
            if key.endswith("running_var"):
                value.copy_(torch.exp(0.3 * noise))
            elif value.is_floating_point() and value.ndim > 1 and "biases" not in key:
                value.copy_(noise / value[0].numel() ** 0.5)
            elif key.endswith("weight"):
                value.copy_(1 + 0.3 * noise)
            elif value.is_floating_point():
                value.copy_(0.3 * noise)
    return module.eval()


def variables_of(module):
    """The flax variables of any module above, told by its key names and shapes alone."""
    variables: dict = {"params": {}, "batch_stats": {}}
    for key, tensor in module.state_dict().items():
        *words, leaf = key.split(".")
        if leaf in ("num_batches_tracked", "attention_bias_idxs"):
            continue
        value = tensor.numpy().copy()
        if leaf == "weight":
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
            leaf = "kernel" if value.ndim > 1 else "scale"
        node = variables["batch_stats" if leaf.startswith("running") else "params"]
        names: list[str] = []
        for word in words:
            names[-1:] = [f"{names[-1]}_{word}"] if word.isdigit() else [*names[-1:], word]
        for name in names:
            node = node.setdefault(name, {})
        node[leaf.removeprefix("running_")] = value
    return variables
