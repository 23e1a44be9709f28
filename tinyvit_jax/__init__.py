"""Small vision transformers in JAX, distilled fast from stored teacher logits.

    model = tinyvit_jax.create_model("tiny_vit_5m_224", num_classes=1000)
    variables = tinyvit_jax.load_weights("tiny_vit_5m.pth", model)
    logits = model.apply(variables, images, train=False)
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "compile_inference", "create_model", "load_weights"]


def __getattr__(name: str) -> Any:
    """Imports JAX and flax when a model is first asked for: `import tinyvit_jax` stays cheap."""
    if name == "create_model":
        from tinyvit_jax.models import create_model

        return create_model
    if name == "compile_inference":
        from tinyvit_jax.inference import compile_inference

        return compile_inference
    if name == "load_weights":
        from tinyvit_jax.weights import load_weights

        return load_weights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
