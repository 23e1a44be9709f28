"""The host tower: images, their replayed views, and the batches made of them."""
