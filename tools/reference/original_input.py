"""The input path of the original TinyViT, re-enacted: a file's bytes to the tensor a model sees.

PIL decodes the whole image, one call crops and one resizes it (bicubic), RandAugment works on the
PIL image; then come torchvision's tensor, its normalisation, and Random Erasing of that tensor. The
draws and the PIL operations are those of tinyvit_jax.data.microsoft, whose views are the original's
byte for byte; what that module does otherwise is done here as the original does it: resizing by one
call, whole noise kept as float32, nothing rounded back to pixels. Where PyTorch is missing numpy
does the tensor's part, which is a third of a millisecond either way.
"""

import importlib.util
import io
from typing import Any

import numpy as np
from PIL import Image

from tinyvit_jax.data import microsoft
from tinyvit_jax.data.spec import NO_BOX, Spec

STAGES = ("decode", "crop and resize", "RandAugment", "rest")

HAS_TORCH = importlib.util.find_spec("torch") is not None


def make_view(data: bytes, seed: int, spec: Spec) -> Any:
    """The view of a seed as the original's loader gives it.

    Args:
        data: of the image's file.
        seed: of the view.
        spec: of kind "microsoft".

    Returns:
        float32 [3, S, S], normalised: a torch tensor, or an array where torch is missing.
    """
    image = decode(data)
    view = microsoft.sample_view(seed, image.height, image.width, spec)
    image = crop_and_resize(image, view, spec)
    for name, argument in view.ops:
        image = microsoft.OPERATIONS[name](image, argument, spec.fill)
    return finish(image, view, spec)


def decode(data: bytes) -> Image.Image:
    """The whole image as RGB."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def crop_and_resize(image: Image.Image, view: microsoft.View, spec: Spec) -> Image.Image:
    """The crop of a view, S x S pixels, mirrored where the view is."""
    y0, x0, y1, x1 = view.crop
    size = (spec.image_size, spec.image_size)
    image = image.crop((x0, y0, x1, y1)).resize(size, Image.Resampling.BICUBIC)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else image


def finish(image: Image.Image, view: microsoft.View, spec: Spec) -> Any:
    """Tensor, normalisation, erasing: float32 [3, S, S]."""
    tensor = (_normalise_torch if HAS_TORCH else _normalise_numpy)(image, spec)
    if view.erase != NO_BOX:
        y0, x0, y1, x1 = view.erase
        noise: Any = microsoft.make_noise(view.noise, y1 - y0, x1 - x0).transpose(2, 0, 1)
        if HAS_TORCH:
            import torch

            noise = torch.tensor(noise, dtype=torch.float32)
        tensor[:, y0:y1, x0:x1] = noise
    return tensor


def _normalise_torch(image: Image.Image, spec: Spec) -> Any:
    """As torchvision's functions for PIL images do it, call by call."""
    import torch

    tensor = torch.from_numpy(np.array(image, np.uint8, copy=True))
    tensor = tensor.permute(2, 0, 1).contiguous().to(torch.float32).div(255).clone()
    mean, std = (torch.as_tensor(x, dtype=torch.float32)[:, None, None]
                 for x in (spec.mean, spec.std))
    return tensor.sub_(mean).div_(std)


def _normalise_numpy(image: Image.Image, spec: Spec) -> np.ndarray:
    tensor = np.array(image, np.uint8).transpose(2, 0, 1).astype(np.float32, order="C")
    tensor /= 255
    mean, std = (np.array(x, np.float32)[:, None, None] for x in (spec.mean, spec.std))
    tensor -= mean
    tensor /= std
    return tensor
