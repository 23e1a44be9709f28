"""The pictures of a run; matplotlib is imported only here, and only when one is drawn."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit_jax import log

_WHOLE = 30  # classes up to which a report shows all of them by name
_NUMBERED = 12  # and up to which the confusion matrix has numbers
_CELLS = 40  # and up to which the picture of the matrix alone has some
_BARS = 20  # most confused pairs shown otherwise
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
        axis.set_title(title.replace("$", r"\$"), fontsize=8, loc="left")
    _save(figure, path)


def plot_report(report: dict[str, Any], confusion: tuple[np.ndarray, np.ndarray, np.ndarray],
                path: Path) -> None:
    """Draws an evaluation: what is taken for what, calibration, and accuracy class by class.

    Args:
        report: from `measure.run`.
        confusion: from `report.count_confusion`.
        path: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(17, 5.8), layout="constrained",
                                   width_ratios=(1.25, 1, 1.1))
    figure.suptitle(
        f"{_shorten(report['source'], 80)} ({report['split']}): {report['count']:,} images, "
        f"top-1 {report['top1']:.2f} %, top-5 {report['top5']:.2f} %", fontsize=13)
    if len(report["per_class"]) <= _WHOLE:
        _draw_confusion(axes[0], report, confusion)
    else:
        _draw_pairs(axes[0], report)
    _draw_reliability(axes[1], report["calibration"])
    _draw_classes(axes[2], report)
    _save(figure, path)


def _shorten(name: str, length: int = 18) -> str:
    """A name that fits beside an axis; no part of it means mathematics to matplotlib."""
    name = name if len(name) <= length else f"{name[:length - 1]}…"
    return name.replace("$", r"\$")


def plot_confusion(report: dict[str, Any], confusion: tuple[np.ndarray, np.ndarray, np.ndarray],
                   path: Path) -> None:
    """Draws the confusion matrix alone, so large that 100 classes can be read.

    Args:
        report: from `measure.run`.
        confusion: from `report.count_confusion`.
        path: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colors, pyplot

    names = [_shorten(c["name"]) for c in report["per_class"]]
    share, columns = _share_confusion(confusion, names)
    side = min(19.0, 4.5 + (0.42 if len(names) <= _CELLS else 0.155) * len(names))
    size = 9 if len(names) <= _CELLS else 7.5
    figure, axis = pyplot.subplots(figsize=(side + 1.2, side), layout="constrained")
    # By square roots: mistakes are few percent each, and would all be white otherwise.
    drawn = axis.imshow(share, cmap="Blues", norm=colors.PowerNorm(0.5, 0, 100))
    axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=size)
    axis.set_yticks(range(len(names)), names, fontsize=size)
    axis.set_xticks(np.arange(len(columns)) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(names)) - 0.5, minor=True)
    axis.grid(which="minor", color="#c9cdd3", linewidth=0.4)
    axis.tick_params(which="minor", length=0)
    axis.set_xlabel("predicted")
    axis.set_ylabel("label")
    macro = report["macro"]
    source = report["source"].replace("$", r"\$")
    source = source if len(source) <= 40 else f"…{source[-39:]}"  # a path tells most at its end
    figure.suptitle(
        f"{source} ({report['split']}): {report['count']:,} images\ntop-1 {report['top1']:.2f} %, "
        f"MCC {report['mcc']:.2f} %; means: F1 {macro['f1']:.2f} %, precision "
        f"{macro['precision']:.2f} %, recall {macro['recall']:.2f} %", fontsize=10)
    bar = figure.colorbar(drawn, shrink=0.6, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    bar.set_label("% of each label")
    if len(names) <= _CELLS:
        _write_shares(axis, share, 8)
    _save(figure, path)


def _share_confusion(confusion, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """The whole matrix, each row in percent of its class, and the names of its columns.

    A last column is for answers that are none, where there are some.
    """
    label, predicted, images = confusion
    table = np.zeros((len(names), len(names) + 1))
    table[label, predicted] = images  # -1 is the last column
    if not table[:, -1].any():
        table = table[:, :-1]
    return (100 * table / np.maximum(table.sum(-1, keepdims=True), 1),
            [*names, "(none)"][:table.shape[1]])


def _write_shares(axis, share: np.ndarray, size: float, light: float = 30) -> None:
    """Writes percentages into the cells that have some, in white where they are above `light`."""
    for i, j in np.argwhere(share > 0):
        text = f"{share[i, j]:.0f}" if share[i, j] >= 1 else "<1"
        axis.text(j, i, text, ha="center", va="center", fontsize=size,
                  color="white" if share[i, j] > light else "black")


def _draw_confusion(axis, report: dict[str, Any], confusion) -> None:
    """The whole matrix in a part of a figure."""
    names = [_shorten(c["name"]) for c in report["per_class"]]
    share, columns = _share_confusion(confusion, names)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, rotation=90 if len(names) > 4 else 0, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xlabel("predicted")
    axis.set_ylabel("label")
    axis.set_title("confusion, % of each label", fontsize=10)
    if len(names) <= _NUMBERED:
        _write_shares(axis, share, 9, light=55)


def _draw_pairs(axis, report: dict[str, Any]) -> None:
    """The most frequent mistakes as bars."""
    pairs = report["most_confused"][:_BARS][::-1]
    axis.barh(range(len(pairs)), [p["count"] for p in pairs], color=_COLOURS[1])
    axis.set_yticks(range(len(pairs)), [
        f"{_shorten(p['label'])} → {_shorten(p['predicted'])}" for p in pairs], fontsize=8)
    for i, p in enumerate(pairs):
        axis.text(p["count"], i, f" {100 * p['share']:.0f} %", va="center", fontsize=7.5)
    axis.margins(x=0.12)
    axis.set_xlabel("images, and their share of the label's")
    axis.set_title("most frequent mistakes: label → predicted", fontsize=10)


def _draw_reliability(axis, calibration: dict[str, Any]) -> None:
    """Accuracy over confidence, and how many images each bin has."""
    bins = calibration["bins"]
    width = 1 / len(bins)
    full = [b for b in bins if b["count"]]
    total = sum(b["count"] for b in bins)
    axis.bar([b["low"] for b in full], [b["accuracy"] for b in full], 0.94 * width, align="edge",
             color=_COLOURS[0], alpha=0.55, label="accuracy")
    axis.bar([b["low"] + 0.3 * width for b in full], [b["count"] / total for b in full],
             0.34 * width, align="edge", color="#3b3f46", label="share of the images")
    axis.plot([0, 1], [0, 1], "--", color="black", linewidth=0.9, label="accuracy = confidence")
    axis.set(xlim=(0, 1), ylim=(0, 1.02))
    axis.set_xlabel("confidence (largest probability)")
    axis.set_title(f"calibration: expected error {calibration['error']:.4f}", fontsize=10)
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_classes(axis, report: dict[str, Any]) -> None:
    """Top-1 of each class: bars with names where they fit, else a histogram and the sorted line."""
    rated = sorted((c for c in report["per_class"] if c["count"]), key=lambda c: c["top1"])
    values = np.array([c["top1"] for c in rated])
    mean = values.mean()
    if len(report["per_class"]) <= _WHOLE:
        axis.barh(range(len(rated)), values, color=_COLOURS[2])
        axis.set_yticks(range(len(rated)), [_shorten(c["name"]) for c in rated], fontsize=8)
        for i, c in enumerate(rated):
            axis.text(1, i, f"{c['top1']:.1f} % of {c['count']:,}", va="center", fontsize=7.5)
        axis.set_xlim(0, 100)
    else:
        axis.hist(values, np.linspace(0, 100, 21), color=_COLOURS[2], alpha=0.8)
        axis.set_xlim(0, 100)
        axis.set_ylabel("classes")
        worst = "\n".join(f"{c['top1']:5.1f}  {_shorten(c['name'])}" for c in rated[:10])
        axis.text(0.03, 0.97, f"worst classes:\n{worst}", transform=axis.transAxes, va="top",
                  fontsize=8, family="monospace")
    axis.axvline(mean, color="black", linestyle="--", linewidth=0.9)
    axis.set_xlabel("top-1 of a class, %")
    axis.set_title(f"classes: mean {mean:.2f} %, lowest {values[0]:.1f}, "
                   f"median {np.median(values):.1f}, highest {values[-1]:.1f}", fontsize=10)


def plot_teachers(result: dict[str, Any], path: Path) -> None:
    """Draws what several teachers made of one student, by their size, sureness and agreement.

    Args:
        result: from `compare.run`.
        path: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    alone = [row for row in result["rows"] if "entropy" not in row]
    taught = [row for row in result["rows"] if "entropy" in row]
    colours = [pyplot.get_cmap("tab10")(i) for i in range(10)]
    figure, axes = pyplot.subplots(1, 3, figsize=(17, 6), layout="constrained", sharey=True)
    figure.suptitle(f"one student of {result['student']['parameters']:,} parameters, "
                    f"{len(taught)} ways to teach it", fontsize=13)
    for axis, key, title, label in (
            (axes[0], "parameter_ratio", "capacity gap", "parameters of the teacher x student's"),
            (axes[1], "entropy_views", "sureness of the teacher",
             f"its mean entropy at T on training views, nats (all classes alike: "
             f"{result['uniform_entropy']:.2f})"),
            (axes[2], "agreement", "how well it could be followed",
             "evaluation images on which both say the same, %")):
        rows = [(i, row) for i, row in enumerate(taught) if row[key] is not None]
        for number, row in rows:
            colour, top1 = colours[number % len(colours)], row["student_top1"]
            x = row[key]
            if key == "parameter_ratio":  # those of one size side by side
                x *= 1.04 ** sum(other[key] == x for i, other in rows if i < number)
            # The mean of equal numbers may lie beside them.
            spread = [[max(0.0, top1 - row["low"])], [max(0.0, row["high"] - top1)]]
            axis.errorbar(x, top1, spread, fmt="o",
                          color=colour, markersize=7, capsize=3,
                          label=f"{_shorten(row['teacher'], 26)}, T = {row['temperature']:g}: "
                                f"{top1:.2f}")
            axis.plot(x, row["teacher_top1"], "D", markerfacecolor="none", color=colour,
                      markersize=7)
        for row in alone:
            axis.axhline(row["student_top1"], color="black", linestyle="--", linewidth=0.9)
            axis.axhspan(row["low"], row["high"], color="black", alpha=0.08, linewidth=0)
        if key == "parameter_ratio" and rows:
            axis.set_xscale("log")
            ticks = sorted({round(row[key], 1) for _, row in rows})
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
        axis.margins(x=0.15, y=0.12)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("top-1 on the evaluation images, %\n"
                       "filled: student, hollow: its teacher, dashed: student on labels only")
    if taught:
        figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center",
                      ncols=min(4, len(taught)), frameon=False, fontsize=9)
    _save(figure, path)


def plot_stats(stats: dict[str, Any], path: Path) -> None:
    """Draws what is in a store: kept mass, entropy, agreement with labels, top classes.

    Args:
        stats: from `store.stats.compute`.
        path: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9),
                                   layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12))
    figure.suptitle(
        f"top {stats['top_k']} of {stats['num_classes']:,} classes, {stats['views']:,} views of "
        f"{stats['passes']} x {stats['views_per_pass']:,}, {stats['bytes']['a_view']:.1f} bytes a "
        f"view", fontsize=13)
    _draw_kept(axes[0, 0], stats["kept"])
    _draw_entropy(axes[0, 1], stats["entropy"])
    _draw_agreement(axes[1, 0], stats["agreement"], stats["top_k"])
    _draw_frequency(axes[1, 1], stats["classes"]["by_rank"], stats["num_classes"])
    _save(figure, path)


def _draw_kept(axis, kept: list[dict[str, float]]) -> None:
    """Mean mass of the K most probable classes by K, and the bands of its quantiles."""
    ks = [point["k"] for point in kept]
    for low, high, alpha, label in (("q05", "q95", 0.15, "5 to 95 % of the views"),
                                    ("q25", "q75", 0.3, "25 to 75 %")):
        axis.fill_between(ks, [p[low] for p in kept], [p[high] for p in kept], alpha=alpha,
                          color=_COLOURS[0], linewidth=0, label=label)
    axis.plot(ks, [p["mean"] for p in kept], "o-", color=_COLOURS[0], markersize=3.5, label="mean")
    axis.set_xscale("log")
    axis.set_xticks(ks, [f"{k:,}" for k in ks])
    axis.minorticks_off()
    axis.set_ylim(0, 1.14)  # the legend above what is drawn
    axis.set_yticks(np.linspace(0, 1, 6))
    axis.set_xlabel("K, classes of a view")
    axis.set_ylabel("probability that the top K hold")
    axis.set_title(f"kept mass: {kept[-1]['mean']:.4f} of it at K = {ks[-1]:,}, on average",
                   fontsize=10)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9, loc="upper center", ncols=3)


def _draw_entropy(axis, entropy: dict[str, Any]) -> None:
    """Histogram over the views."""
    edges, counts = entropy["histogram"]["edges"], np.array(entropy["histogram"]["views"])
    axis.stairs(100 * counts / counts.sum(), edges, fill=True, color=_COLOURS[1], alpha=0.8)
    axis.axvline(entropy["mean"], color="black", linestyle="--", linewidth=0.9)
    axis.set_xlabel("entropy of a target, nats")
    axis.set_ylabel("views, % in each bin")
    axis.set_title(f"entropy: mean {entropy['mean']:.3f}, median {entropy['q50']:.3f}; all classes "
                   f"alike would be {entropy['uniform']:.3f}", fontsize=10)


def _draw_agreement(axis, agreement: dict[str, Any] | None, top_k: int) -> None:
    """Top-1 and top-K agreement with the labels by pass, and the classes' quantiles beside it."""
    if agreement is None:
        axis.axis("off")
        axis.text(0.5, 0.5, "agreement with the labels:\nnot measured, without the images",
                  ha="center", va="center", fontsize=11)
        return
    passes = agreement["by_pass"]
    numbers = [p["pass"] for p in passes]
    for key, label, colour in (("topk", f"among the top {top_k}", _COLOURS[2]),
                               ("top1", "top class", _COLOURS[0])):
        axis.plot(numbers, [100 * p[key] for p in passes], "o-", markersize=4, color=colour,
                  label=f"{label}: {100 * agreement[key]:.1f} %")
    c = agreement["by_class"]
    for low, high, alpha, label in (("q05", "q95", 0.1, "5 to 95 % of the classes, top class"),
                                    ("q25", "q75", 0.2, "25 to 75 %")):
        axis.axhspan(100 * c[low], 100 * c[high], alpha=alpha, color=_COLOURS[0], linewidth=0,
                     label=label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
    axis.set_ylim(0, 102)
    axis.set_xlabel("pass")
    axis.set_ylabel("views, %")
    axis.set_title(f"agreement with {agreement['rule']}", fontsize=10)
    axis.legend(frameon=True, framealpha=0.8, edgecolor="none", fontsize=9, loc="best")


def _draw_frequency(axis, ranked: dict[str, list[int]], num_classes: int) -> None:
    """How often each class is the most probable, from the most to the least frequent."""
    views = np.array(ranked["views"])
    axis.loglog(ranked["rank"], views, color=_COLOURS[3], linewidth=1.6,
                marker="o" if len(views) <= _WHOLE else "", markersize=4)
    axis.set_ylim(min(0.8, views.min()), 2 * views.max())
    axis.set_xlabel("rank of the class")
    axis.set_ylabel("views that it is the top class of")
    axis.set_title(f"top classes: {max(ranked['rank']):,} of {num_classes:,} are on top of a view",
                   fontsize=10)
    axis.grid(alpha=0.25, which="both")
