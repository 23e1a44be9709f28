"""Small vision transformers in JAX, distilled fast from stored teacher logits."""

__version__ = "0.1.0"
