"""Small convolutional networks of every family, and what PyTorch's classes make of them."""

import jax
import numpy as np

from tinyvit_jax.models import create_model

# Of every kind of block: a family's name, a shape, and the layouts that its weights come in.
SHAPES = {
    "basic": ("resnet", {"embed_dims": (8, 16), "depths": (2, 1)}),
    "bottleneck": ("resnet", {"embed_dims": (16, 32), "depths": (1, 2), "block": "bottleneck"}),
    "padded": ("resnet", {"embed_dims": (8, 12), "depths": (1, 2), "block": "padded",
                          "stem_strides": (1, 1)}),
    "regnety": ("regnety", {"embed_dims": (8, 24), "depths": (1, 2), "group_width": 8}),
    "convnextv2": ("convnextv2", {"embed_dims": (8, 12), "depths": (1, 2)}),
}
LAYOUTS = {"basic": ("timm",), "bottleneck": ("timm",), "padded": ("akamaster", "timm"),
           "regnety": ("timm", "torchvision"), "convnextv2": ("timm", "facebook")}
PAIRS = [(kind, layout) for kind, layouts in LAYOUTS.items() for layout in layouts]


def make_small(kind, num_classes=3, image_size=32, **changes):
    family, shape = SHAPES[kind]
    return create_model(family, num_classes, image_size, **{**shape, **changes})


def make_images(*shape, seed=0):
    return np.asarray(np.random.default_rng(seed).normal(size=(*shape, 3)), np.float32)


def random_variables(model, seed=0):
    """Variables of a plausible size, none of them zero, so that no branch is silent."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = np.asarray(rng.normal(size=leaf.shape), np.float32)
        if path[-1].key == "kernel":
            return noise * np.float32((2 / np.prod(leaf.shape[:-1])) ** 0.5)
        return np.exp(0.2 * noise) if path[-1].key in ("scale", "var") else 0.3 * noise

    return jax.tree_util.tree_map_with_path(draw, model.variable_shapes())


def make_torch(kind, layout, **changes):
    """The PyTorch class of a layout, of the same shape, with random weights and statistics."""
    import torch_convnets

    return torch_convnets.randomize(torch_class(kind)(make_small(kind, **changes), layout))


def torch_class(kind):
    import torch_convnets

    return {"resnet": torch_convnets.TorchResNet, "regnety": torch_convnets.TorchRegNetY,
            "convnextv2": torch_convnets.TorchConvNeXt}[SHAPES[kind][0]]


def state_of(module):
    return {key: value.numpy().copy() for key, value in module.state_dict().items()}


def to_torch(images):
    import torch

    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
