"""PyTorch classes that our models are compared with; the package itself never imports them."""
