"""A small CLIP, and a run whose teacher it is."""

import jax
import numpy as np
import tiny

from tinyvit_jax.models import create_model

SMALL = {"embed_dims": (64,), "depths": (2,), "num_heads": (1,), "patch_size": 4, "embed_dim": 24}


def make_small(num_classes=3, image_size=16, **changes):
    return create_model("clip_vit", num_classes, image_size, **{**SMALL, **changes})


def make_images(*shape, seed=0):
    return np.asarray(np.random.default_rng(seed).normal(size=(*shape, 3)), np.float32)


def random_variables(model, seed=0):
    """Variables of a plausible size, none of them zero, so that no branch is silent."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = np.asarray(rng.normal(size=leaf.shape), np.float32)
        if path[-1].key in ("kernel", "proj"):
            return noise / np.float32(np.prod(leaf.shape[:-1]) ** 0.5)
        return np.exp(0.3 * noise) if path[-1].key == "scale" else 0.3 * noise

    return jax.tree_util.tree_map_with_path(draw, model.variable_shapes())


def state_of(module):
    return {key: value.numpy() for key, value in module.state_dict().items()}


def to_torch(images):
    import torch

    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def write_file(path, module, **others):
    import torch

    torch.save({"model": module.state_dict(), **others}, path)
    return path


def make_config(folder, file):
    c = tiny.make_config(folder)
    c.teacher.update({key: () for key in ("embed_dims", "depths", "num_heads", "window_sizes",
                                          "stem_strides")})
    c.teacher.update({"name": "clip_vit", "weights": str(file), "image_size": 0, "epochs": 0})
    return c
