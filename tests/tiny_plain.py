"""Small plain vision transformers, one for each kind that there is."""

from tinyvit_jax.models import create_model

SHAPE = {"embed_dims": (32,), "depths": (2,), "num_heads": (4,), "patch_size": 4}
KINDS = {"class": {}, "distilled": {"token_layout": "distilled"},
         "mean": {"pool": "mean", "mlp_dims": (48,)}, "scaled": {"layer_scale": 0.1},
         "fixed": {"positions": "sincos"}, "post": {"norm_order": "post"}}


def make_small(kind="class", num_classes=3, image_size=16, **changes):
    return create_model("vit", num_classes, image_size, **{**SHAPE, **KINDS[kind], **changes})
