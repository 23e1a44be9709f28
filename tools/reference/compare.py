"""How far our models are from PyTorch's: whole and layer by layer, in float32 on the CPU."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from reference import torch_clip, torch_convnets, torch_tinyvit, torch_vit
from tinyvit_jax.convert import clip, convnets, convnext, files, regnet, resnet, tinyvit, vit
from tinyvit_jax.models import tinyvit as ours

TOLERANCE = 1e-4  # of logits
LAYER_TOLERANCE = 1e-5  # of one layer, given the same input, where its outputs are of size 1
_CLASSES = {"microsoft": torch_tinyvit.TorchTinyViT, "timm": torch_tinyvit.TimmTinyViT}
_HEADS = tuple(f"{name}.{leaf}" for leaf in ("weight", "bias") for name in (
    "head", "head.fc", "head_dist", "classifier", "fc", "linear"))
_CONVNETS = {resnet: torch_convnets.TorchResNet, regnet: torch_convnets.TorchRegNetY,
             convnext: torch_convnets.TorchConvNeXt}


class Layer(NamedTuple):
    """A layer's difference from PyTorch's on the same input."""

    name: str
    difference: float
    scale: float  # the largest absolute value that PyTorch's layer gives


def make_images(size: int, seed: int = 0) -> np.ndarray:
    """Two images of normalised pixels: float32 [2, size, size, 3]."""
    return np.random.default_rng(seed).normal(size=(2, size, size, 3)).astype(np.float32)


def to_torch(images: np.ndarray) -> torch.Tensor:
    """[B, H, W, C] -> [B, C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))


def read_reference(path: str, model: Any, written_here: bool) -> torch.nn.Module:
    """The PyTorch class of a file's layout, of the shape of `model`, with the file's weights.

    Args:
        path: a PyTorch file on disk.
        model: of ours, of the same shape.
        written_here: the class must take the file as it is (strict=True); of files of others,
            what surrounds a trunk and buffers that follow from the rest do not count.
    """
    state = files.read_state(path)
    family = next((converter for converter in _CONVNETS if converter.owns(state)), None)
    if clip.owns(state):
        module: torch.nn.Module = torch_clip.TorchClip(model)
        own = clip.strip(state)
    elif vit.owns(state):
        module = torch_vit.make(model)
        own = vit.strip(state)
    elif family:
        module = _CONVNETS[family](model, family.detect_layout(state))
        own = convnets.strip(state)
    else:
        own = tinyvit.strip(state)
        module = _CLASSES[tinyvit.detect_layout(own)](model)
    if not model.num_classes:
        own = {key: value for key, value in own.items() if key not in _HEADS}
    if not written_here:
        counts = {key: np.zeros((), np.int64) for key in module.state_dict()
                  if key.endswith("num_batches_tracked")}
        state = own | counts
    tensors = {key: torch.tensor(value) for key, value in state.items()}
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not load in PyTorch with strict=True: "
                         f"{' '.join(str(error).split())}") from error
    return module.eval()


def compare_file(path: str, model: Any, variables: dict, written_here: bool) -> float:
    """The largest difference between a file's model in PyTorch and ours, on two random images.

    Args:
        path: a PyTorch file on disk.
        model: ours, of the same shape.
        variables: {"params", "batch_stats"} that should be the file's.
        written_here: as in `read_reference`.
    """
    return compare_logits(read_reference(path, model, written_here), model, variables)


@functools.cache
def _compile(model: Any, method: str = "__call__") -> Callable:
    """A model's function, compiled once for all files it is compared by."""
    return jax.jit(functools.partial(model.apply, method=method))


def compare_logits(module: torch.nn.Module, model: Any, variables: dict) -> float:
    """The largest difference of logits, or of pooled features where there is no classifier."""
    images = make_images(model.image_size)
    with torch.no_grad():
        expected = module(to_torch(images)).numpy()
    found = _compile(model)(variables, images)
    return largest(found, expected)


def compare_maps(module: torch.nn.Module, model: Any, variables: dict) -> float:
    """The largest difference of the last stage's map; `module` with Microsoft's names."""
    images = make_images(model.image_size)
    out: list[torch.Tensor] = []
    last = list(module.get_submodule("layers.3.blocks").children())[-1]
    hook = last.register_forward_hook(lambda _, inputs, result: out.append(result))
    with torch.no_grad():
        module(to_torch(images))
    hook.remove()
    found = _compile(model, "features")(variables, images)[-1]
    return largest(found, _to_map(out[0]))


def largest(found: Any, expected: Any) -> float:
    """The largest absolute difference; infinite where a value is not finite or shapes differ."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        return math.inf
    difference = float(np.abs(found - expected).max())
    return difference if math.isfinite(difference) else math.inf


def check_difference(path: str, difference: float) -> str:
    """One line on a difference that is as it should be; raises ValueError for another."""
    if difference <= TOLERANCE:
        return (f"checked: in PyTorch {Path(path).name} gives the same outputs, largest difference "
                f"{difference:.1e}")
    raise ValueError(
        f"{path} does not give the same outputs in PyTorch: on two random images the largest "
        f"difference is {difference:.1e}, and {TOLERANCE} is expected. Do not use the files; check "
        f"--image_size, --stem_strides and --num_heads, which a file does not tell, and convert "
        f"again.")


def compare_layers(module: torch.nn.Module, model: Any, variables: dict) -> list[Layer]:
    """Every layer's difference, each fed with what PyTorch's own layer was fed with.

    Args:
        module: with Microsoft's names; its maps may be [B, C, H, W] or tokens [B, H*W, C].
        model: ours, of the same shape.
        variables: {"params", "batch_stats"} of both.

    Returns:
        The stem, all blocks and all ways down, in their order.
    """
    seen = _record(module, make_images(model.image_size))
    compiled = {name: jax.jit(layer.apply, static_argnums=2)
                for name, layer in _make_layers(model).items()}
    found = []
    for name, (before, after) in seen.items():
        words = tinyvit_path(name)
        own = {kind: _pick(variables[kind], words) for kind in ("params", "batch_stats")}
        kind = ".".join(name.split(".")[:3])  # the blocks of a stage are one kind of layer
        out = compiled[kind](own, _to_map(before), False)
        expected = _to_map(after)
        found.append(Layer(name, largest(out, expected), float(np.abs(expected).max())))
    return found


def tinyvit_path(name: str) -> list[str]:
    """The names of our modules on the way to one of Microsoft's: layers.1.blocks.0 and such."""
    words = name.split(".")
    if len(words) == 1:
        return words
    return [f"layers_{words[1]}", "_".join(words[2:])]


def _make_layers(model: Any) -> dict[str, Any]:
    """Our modules by the kind of layer."""
    made: dict[str, Any] = {"patch_embed": ours.PatchEmbed(model.embed_dims[0], model.stem_strides)}
    for s, dim in enumerate(model.embed_dims):
        made[f"layers.{s}.blocks"] = ours.MBConv(int(dim * model.expand_ratio)) if s == 0 else (
            ours.Block(model.num_heads[s], model.window_sizes[s], int(dim * model.mlp_ratio)))
        if s < 3:
            made[f"layers.{s}.downsample"] = ours.PatchMerging(model.embed_dims[s + 1])
    return made


def _record(module: torch.nn.Module, images: np.ndarray) -> dict[str, tuple[Any, Any]]:
    """What goes into and comes out of the stem, the blocks and the ways down."""
    seen: dict[str, tuple[Any, Any]] = {}

    def record(name: str) -> Any:
        # Copies: the original adds in place.
        return lambda _, inputs, out: seen.update({name: (inputs[0].clone(), out.clone())})

    hooks = []
    for name, layer in module.named_modules():
        words = name.split(".")
        if name == "patch_embed" or (len(words) == 4 and words[2] == "blocks") or (
                len(words) == 3 and words[2] == "downsample"):
            hooks.append(layer.register_forward_hook(record(name)))
    with torch.no_grad():
        module(to_torch(images))
    for hook in hooks:
        hook.remove()
    return seen


def _to_map(x: torch.Tensor) -> np.ndarray:
    """[B, C, H, W], or tokens [B, H*W, C] of a square map, as [B, H, W, C]."""
    if x.ndim == 4:
        return np.moveaxis(x.numpy(), 1, -1)
    side = math.isqrt(x.shape[1])
    return x.numpy().reshape(len(x), side, side, -1)


def _pick(tree: dict, words: list[str]) -> dict:
    for word in words:
        tree = tree[word]
    return tree
