"""The pictures of a run; matplotlib is imported only here, and only when one is drawn."""

import io
from pathlib import Path

import numpy as np

from tinyvit_jax import log

_COLOURS = ("#1f5fa8", "#d1732f", "#3f8f58", "#8a4f9e")


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    log.write_atomic(path, buffer.getvalue())


def plot_curves(runs: dict[str, list[dict]], path: Path) -> None:
    """Draws loss, accuracy and learning rate by update for one or several runs.

    Args:
        runs: title -> lines of its metrics.jsonl.
        path: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for number, (title, lines) in enumerate(runs.items()):
        colour, line = _COLOURS[number % len(_COLOURS)], ("-", "--")[number % 2]
        for axis, key, style in ((axes[0], "loss", line), (axes[1], "eval_top1", "o" + line),
                                 (axes[2], "learning_rate", line)):
            points = [(m["step"], m[key]) for m in lines if m.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, label=title,
                          markersize=3.5, linewidth=1.4)
    for axis, title in zip(axes, ("training loss (each its own objective)",
                                  "top-1 on the evaluation images, %", "learning rate"),
                           strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update")
        axis.grid(alpha=0.25)
        if axis.lines:
            axis.legend(frameon=False, fontsize=9)
    _save(figure, path)


def plot_views(pixels: np.ndarray, titles: list[str], path: Path) -> None:
    """Draws replayed views with a caption each.

    Args:
        pixels: [n, H, W, 3], values 0 to 255.
        titles: n captions, for instance the teacher's top classes.
        path: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(6, len(pixels))
    rows = -(-len(pixels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(2.3 * columns, 3.1 * rows),
                                   layout=ConstrainedLayoutEngine(h_pad=0.15), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, pixels, titles, strict=False):
        axis.imshow(np.clip(np.round(image), 0, 255).astype(np.uint8), interpolation="nearest")
        axis.set_title(title, fontsize=8, loc="left")
    _save(figure, path)
