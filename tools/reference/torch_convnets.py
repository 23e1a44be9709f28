"""ResNet, RegNetY and ConvNeXt V2 in PyTorch, with the key names of released weights.

Written from the papers and the names and shapes in released files.
"""

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
from torch import nn


def conv_norm(inside: int, outside: int, size: int = 1, stride: int = 1, groups: int = 1,
              names: tuple[str, str] = ("conv", "bn")) -> nn.Sequential:
    """A convolution without bias and its BatchNorm, under two names."""
    return nn.Sequential(OrderedDict([
        (names[0], nn.Conv2d(inside, outside, size, stride, size // 2, groups=groups, bias=False)),
        (names[1], nn.BatchNorm2d(outside))]))


class ResNetBlock(nn.Module):
    """Basic or bottleneck, with the names that torchvision, timm and akamaster share."""

    def __init__(self, inside: int, outside: int, stride: int, kind: str):
        super().__init__()
        inner = outside // 4 if kind == "bottleneck" else outside
        sizes = [1, 3, 1] if kind == "bottleneck" else [3, 3]
        widths = [inside] + [inner] * (len(sizes) - 1) + [outside]
        wide = sizes.index(3)
        self.count = len(sizes)
        for i, size in enumerate(sizes):
            self.add_module(f"conv{i + 1}", nn.Conv2d(
                widths[i], widths[i + 1], size, stride if i == wide else 1, size // 2, bias=False))
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))
        self.stride, self.side = stride, (outside - inside) // 2
        self.padded = kind == "padded"
        if not self.padded and (stride > 1 or inside != outside):
            self.downsample = conv_norm(inside, outside, 1, stride, names=("0", "1"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, D, H / stride, W / stride]."""
        y = x
        for i in range(1, self.count + 1):
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
            y = y.relu() if i < self.count else y
        if self.padded:
            x = nn.functional.pad(x[:, :, ::self.stride, ::self.stride],
                                  (0, 0, 0, 0, self.side, self.side))
        elif hasattr(self, "downsample"):
            x = self.downsample(x)
        return (x + y).relu()


class TorchResNet(nn.Module):
    """Of the same shape as one of our models."""

    def __init__(self, model: Any, layout: str = "timm"):
        super().__init__()
        small, deep = model.stem_strides == (1, 1), model.block == "bottleneck"
        width = model.embed_dims[0] // (4 if deep else 1)
        self.conv1 = nn.Conv2d(3, width, 3 if small else 7, 1 if small else 2, 1 if small else 3,
                               bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.depth = len(model.depths)
        for s, (dim, count) in enumerate(zip(model.embed_dims, model.depths, strict=True)):
            self.add_module(f"layer{s + 1}", nn.Sequential(*[
                ResNetBlock(dim if i else width, dim, 2 if s and not i else 1, model.block)
                for i in range(count)]))
            width = dim
        self.classifier = "linear" if layout == "akamaster" else "fc"
        if model.num_classes:
            self.add_module(self.classifier, nn.Linear(width, model.num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, num_classes], or pooled features where there is no classifier."""
        x = self.pool(self.bn1(self.conv1(images)).relu())
        for s in range(self.depth):
            x = self.get_submodule(f"layer{s + 1}")(x)
        x = x.mean((2, 3))
        return self.get_submodule(self.classifier)(x) if hasattr(self, self.classifier) else x


class SqueezeExcite(nn.Module):
    """Scales channels by what all of them say together."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> the same shape."""
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class RegNetBlock(nn.Module):
    """The Y block: timm's names, or torchvision's."""

    def __init__(self, inside: int, outside: int, stride: int, group_width: int, layout: str):
        super().__init__()
        names = ("conv", "bn") if layout == "timm" else ("0", "1")
        groups = outside // min(group_width, outside)
        a = conv_norm(inside, outside, names=names)
        b = conv_norm(outside, outside, 3, stride, groups, names)
        se = SqueezeExcite(outside, round(inside / 4))
        c = conv_norm(outside, outside, names=names)
        if layout == "timm":
            self.conv1, self.conv2, self.se, self.conv3 = a, b, se, c
        else:
            self.f = nn.Sequential(OrderedDict(a=a, b=b, se=se, c=c))
        self.parts = [a, b, se, c]  # a list registers no module a second time
        self.shortcut = "downsample" if layout == "timm" else "proj"
        if stride > 1 or inside != outside:
            self.add_module(self.shortcut, conv_norm(inside, outside, 1, stride, names=names))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, D, H / stride, W / stride]."""
        a, b, se, c = self.parts
        y = c(se(b(a(x).relu()).relu()))
        return ((getattr(self, self.shortcut)(x) if hasattr(self, self.shortcut) else x) + y).relu()


class TorchRegNetY(nn.Module):
    """Of the same shape as one of our models."""

    def __init__(self, model: Any, layout: str = "timm"):
        super().__init__()
        own = layout == "timm"
        self.stem = conv_norm(3, 32, 3, 2, names=("conv", "bn") if own else ("0", "1"))
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        width = 32
        for s, (dim, count) in enumerate(zip(model.embed_dims, model.depths, strict=True)):
            stages[f"s{s + 1}" if own else f"block{s + 1}"] = nn.Sequential(OrderedDict(
                (f"b{i + 1}" if own else f"block{s + 1}-{i}", RegNetBlock(
                    width if i == 0 else dim, dim, 1 if i else 2, model.group_width, layout))
                for i in range(count)))
            width = dim
        self.parts = list(stages.values())
        if own:
            for name, stage in stages.items():
                self.add_module(name, stage)
        else:
            self.trunk_output = nn.Sequential(stages)
        if model.num_classes:
            fc = nn.Linear(width, model.num_classes)
            self.add_module("head" if own else "fc",
                            nn.Sequential(OrderedDict(fc=fc)) if own else fc)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, num_classes], or pooled features where there is no classifier."""
        x = self.stem(images).relu()
        for stage in self.parts:
            x = stage(x)
        x = x.mean((2, 3))
        return getattr(self, "head", getattr(self, "fc", nn.Identity()))(x)


class GlobalResponseNorm(nn.Module):
    """x + gamma x N + beta, with N each channel's norm over the map by the mean of all."""

    def __init__(self, width: int, layout: str):
        super().__init__()
        shape = (width,) if layout == "timm" else (1, 1, 1, width)
        self.names = ("weight", "bias") if layout == "timm" else ("gamma", "beta")
        for name in self.names:
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, W, C] -> the same shape."""
        gamma, beta = (getattr(self, name).flatten() for name in self.names)
        norms = x.norm(dim=(1, 2), keepdim=True)
        return x + gamma * (x * norms / (norms.mean(-1, keepdim=True) + 1e-6)) + beta


class ChannelsLast(nn.Module):
    """A layer of the last axis, used on [B, C, H, W]; its keys are the layer's own."""

    def __init__(self, layer: nn.LayerNorm):
        super().__init__()
        self.weight, self.bias, self.layer = layer.weight, layer.bias, [layer]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> the same shape."""
        return self.layer[0](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Matrix(nn.Linear):
    """A linear layer whose weight is kept as a 1x1 convolution's."""

    def __init__(self, inside: int, outside: int):
        super().__init__(inside, outside)
        self.weight = nn.Parameter(self.weight.detach()[..., None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., D]."""
        return nn.functional.linear(x, self.weight[..., 0, 0], self.bias)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm, MLP with global response norm: timm's names or Facebook's."""

    def __init__(self, width: int, layout: str, matrices: bool):
        super().__init__()
        depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, 1e-6)
        linear = nn.Linear if matrices else Matrix
        first, last = linear(width, 4 * width), linear(4 * width, width)
        grn = GlobalResponseNorm(4 * width, layout)
        if layout == "timm":
            self.conv_dw = depthwise
            self.mlp = nn.Sequential(OrderedDict(fc1=first, act=nn.GELU(), grn=grn, fc2=last))
        else:
            self.dwconv, self.pwconv1, self.grn, self.pwconv2 = depthwise, first, grn, last
        self.parts = [depthwise, nn.Sequential(first, nn.GELU(), grn, last)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> the same shape."""
        depthwise, mlp = self.parts
        y = depthwise(x).permute(0, 2, 3, 1)
        return x + mlp(self.norm(y)).permute(0, 3, 1, 2)


class TorchConvNeXt(nn.Module):
    """Of the same shape as one of our models."""

    def __init__(self, model: Any, layout: str = "timm"):
        super().__init__()
        dims, patch = model.embed_dims, model.patch_size
        matrices = layout != "timm" or dims[0] >= 96

        def norm(width: int) -> nn.Module:
            return ChannelsLast(nn.LayerNorm(width, 1e-6))

        ways = [nn.Sequential(nn.Conv2d(3, dims[0], patch, patch), norm(dims[0]))]
        ways += [nn.Sequential(norm(before), nn.Conv2d(before, after, 2, 2))
                 for before, after in pairwise(dims)]
        stages = [nn.Sequential(*[ConvNeXtBlock(dim, layout, matrices) for _ in range(count)])
                  for dim, count in zip(dims, model.depths, strict=True)]
        self.parts = list(zip(ways, stages, strict=True))
        final = nn.LayerNorm(dims[-1], 1e-6)
        fc = nn.Linear(dims[-1], model.num_classes) if model.num_classes else nn.Identity()
        self.stages: nn.Module
        self.head: nn.Module
        if layout == "timm":
            self.stem = ways[0]
            self.stages = nn.Sequential(*[nn.Sequential(OrderedDict(
                [("downsample", way)] * (s > 0) + [("blocks", stage)]))
                for s, (way, stage) in enumerate(zip(ways, stages, strict=True))])
            self.head = nn.Sequential(OrderedDict(norm=final, fc=fc))
        else:
            self.downsample_layers, self.stages = nn.ModuleList(ways), nn.ModuleList(stages)
            self.norm, self.head = final, fc
        self.last = [nn.Sequential(final, fc)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, num_classes], or pooled features where there is no classifier."""
        x = images
        for way, stage in self.parts:
            x = stage(way(x))
        return self.last[0](x.mean((2, 3)))


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter and statistic a random value of a plausible size, none silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in module.state_dict().items():
            noise = torch.randn(value.shape, generator=generator)
            if key.endswith("num_batches_tracked"):
                continue
            if key.endswith("running_var"):
                value.copy_((0.3 * noise).exp())
            elif value.squeeze().ndim > 1:
                last = key.split(".")[-2] in ("fc", "linear", "head")
                value.copy_(noise * (0.02 if last else 2) ** 0.5 / value[0].numel() ** 0.5)
            elif key.endswith("weight") and "grn" not in key:
                value.copy_(0.5 * (0.2 * noise).exp())  # branches below 1, as in trained networks
            else:
                value.copy_(0.3 * noise)
    return module.eval()
