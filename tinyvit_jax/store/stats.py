"""What is in a store: how much of the teacher its targets keep, how sure it is, how often right."""

import math
from typing import Any, NamedTuple

import numpy as np

from tinyvit_jax.data.source import ImageSource
from tinyvit_jax.store import blocks
from tinyvit_jax.store.manifest import StoreError
from tinyvit_jax.store.rows import check_source, is_paired, read_keys
from tinyvit_jax.store.shards import Shard
from tinyvit_jax.store.store import Store

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_STEPS = (1, 2, 5)  # K for which the kept mass is told: these times powers of ten, and 3
_BINS = 40  # of the histogram of the entropy
_RANKS = 200  # of the frequency of top classes, at most
_MEASURED = 8  # shards whose padding is counted
_READ = 256  # images that are read at once
_NAMED = 20  # most frequent classes that are named
_DIGEST = 8  # bytes of a block's digest
_RUN = 64  # zeros in a row that are padding


def compute(store: Store, source: ImageSource | None = None, views: int = 100_000, seed: int = 0
            ) -> dict[str, Any]:
    """Measures a sample of whole blocks, spread evenly over the passes that are there.

    Where views are mixed in pairs, a view counts as agreed where its class is the label of either
    image of its pair, as both images are in its pixels.

    Args:
        store: with at least one shard.
        source: its images, for the agreement with their labels; None leaves that out.
        views: how many views at least, or all there are.
        seed: of the choice of blocks.

    Returns:
        What JSON can hold: store, views, kept (by K: mean and QUANTILES), entropy (nats: mean,
        QUANTILES, histogram), agreement (top1, topk, by pass, by class), bytes (a view, in parts),
        shards, classes (never seen, most frequent, frequency by rank).

    Raises:
        StoreError: the store has no shard, or the source is another.
    """
    m = store.manifest
    if source is not None:
        check_source(store, source)
    absent = set(store.missing())
    there = [shard for shard in store.shards() if shard not in absent]
    if not there:
        raise StoreError(f"The store {store.path} has no shard yet. Make it with: {m.command}")
    sample = _sample(store, there, views, seed)
    kept = measure_kept(sample.prob)
    seen = np.bincount(sample.classes.ravel(), minlength=len(m.class_names))
    return {
        "store": str(store.path), "teacher": m.teacher.get("name", ""), "top_k": m.top_k,
        "num_classes": len(m.class_names), "passes": m.passes,
        "views_per_pass": m.views_per_pass, "views": len(sample.prob),
        "shards": {"there": len(there), "missing": len(absent)},
        "bytes": _measure_bytes(store, there),
        "kept": kept, "entropy": _summarise_entropy(
            measure_entropy(sample.prob, len(m.class_names), m.tail), len(m.class_names)),
        "agreement": None if source is None else _measure_agreement(sample, source,
                                                                   is_paired(m)),
        "classes": {"never_in_top_k": int((seen == 0).sum()),
                    **_count_tops(sample.classes[:, 0], m.class_names)}}


class _Sample(NamedTuple):
    """Rows of the sampled blocks, block after block."""

    pass_number: np.ndarray  # int64 [n]
    image: np.ndarray  # int64 [n]
    classes: np.ndarray  # int32 [n, K]
    prob: np.ndarray  # float32 [n, K]


def _sample(store: Store, there: list[Shard], views: int, seed: int) -> _Sample:
    """Reads as many blocks of each pass, whichever the seed chooses, from front to back.

    Where a pass has fewer, the others give more.
    """
    size = store.manifest.block_views
    starts: dict[int, list[tuple[int, int]]] = {}
    for shard in there:
        starts.setdefault(shard.pass_number, []).extend(
            (start, min(start + size, shard.stop)) for start in range(shard.start, shard.stop,
                                                                      size))
    drawn = {p: np.random.default_rng((seed, p)).permutation(len(ranges))
             for p, ranges in starts.items()}
    gained = np.zeros(max(map(len, starts.values())), np.int64)  # by the n-th block of each pass
    for p, ranges in starts.items():
        gained[:len(ranges)] += np.diff(ranges)[drawn[p], 0]
    each = int(np.searchsorted(np.cumsum(gained), views)) + 1
    parts = []
    for p, ranges in starts.items():
        for start, stop in (ranges[i] for i in np.sort(drawn[p][:each])):
            keys = read_keys(store, p, start, stop)
            parts.append((np.full(stop - start, p), keys[0], *store.read(p, start, stop, keys)))
    return _Sample(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def measure_kept(prob: np.ndarray) -> list[dict[str, float]]:
    """The mass that the K most probable classes hold, for K = 1, 2, 3, 5, 10, 20, 50 ... and all.

    Args:
        prob: float32 [n, K], descending.

    Returns:
        For each K: {"k", "mean", "q05", "q25", "q50", "q75", "q95"}.
    """
    most = prob.shape[1]
    ks = sorted({3, *(s * 10**e for e in range(8) for s in _STEPS)} | {most})
    total = np.cumsum(prob, axis=1, dtype=np.float64)
    return [{"k": k, **_summarise(total[:, k - 1])} for k in ks if k <= most]


def _summarise(values: np.ndarray) -> dict[str, float]:
    """Mean and quantiles, rounded as they are read."""
    quantiles = np.quantile(values, QUANTILES)
    return {"mean": _round(values.mean()),
            **{f"q{round(100 * q):02d}": _round(v) for q, v in zip(QUANTILES, quantiles,
                                                                  strict=True)}}


def _round(value: Any) -> float:
    return float(f"{float(value):.6g}")


def measure_entropy(prob: np.ndarray, num_classes: int, tail: str = "uniform") -> np.ndarray:
    """The entropy of stored targets in nats: float64 [n].

    Args:
        prob: float32 [n, K].
        num_classes: C.
        tail: "uniform", what is left over is spread evenly over the other C - K classes; "none",
            the K probabilities are scaled to sum to 1.
    """
    p = prob.astype(np.float64)
    total = p.sum(1, keepdims=True)
    if tail == "none":
        p, total = p / total, np.ones_like(total)
    others = num_classes - p.shape[1]
    # Of all classes nothing is left over: what the sum lacks is rounding.
    rest = np.maximum(1 - total[:, 0], 0) if others else np.zeros(len(p))
    return (-(p * np.log(np.maximum(p, 1e-300))).sum(1)
            - rest * np.log(np.maximum(rest / max(others, 1), 1e-300)))


def _summarise_entropy(values: np.ndarray, num_classes: int) -> dict[str, Any]:
    """Mean, quantiles and a histogram up to the largest there is."""
    top = min(math.log(num_classes), float(values.max()) * 1.02 + 1e-6)
    counts, edges = np.histogram(values, _BINS, (0, top))
    return {**_summarise(values), "uniform": _round(math.log(num_classes)),
            "histogram": {"edges": [_round(e) for e in edges], "views": counts.tolist()}}


def _measure_agreement(sample: _Sample, source: ImageSource, paired: bool) -> dict[str, Any]:
    """How often the labels of the images are the top class, or among the K."""
    images, inverse = np.unique(sample.image, return_inverse=True)
    labels = np.concatenate([
        [e.label for e in source.read(images[s:s + _READ].tolist())]
        for s in range(0, len(images), _READ)])[inverse]
    own = labels[:, None]
    if paired:
        own = np.stack([labels, labels.reshape(-1, 2)[:, ::-1].ravel()], 1)
    top1 = (sample.classes[:, :1] == own).any(1)
    among = np.zeros(len(labels), bool)
    for column in own.T:
        among |= (sample.classes == column[:, None]).any(1)
    views = np.bincount(labels)
    rates = np.bincount(labels, top1)[views > 0] / views[views > 0]
    return {"rule": "either label of a mixed pair" if paired else "the image's label",
            "top1": _round(top1.mean()), "topk": _round(among.mean()),
            "by_pass": [{"pass": int(p), "top1": _round(top1[sample.pass_number == p].mean()),
                         "topk": _round(among[sample.pass_number == p].mean())}
                        for p in np.unique(sample.pass_number)],
            "by_class": {"classes": len(rates), **_summarise(rates)}}


def _measure_bytes(store: Store, there: list[Shard]) -> dict[str, float]:
    """Bytes of a view on disk: in all, of sidecars, and what those of shards are made of.

    Padding is counted in a few shards spread over the store: ArrayRecord pads its files with zeros,
    of which nothing else has long runs. Values are what keys and padding leave.
    """
    m, sizes = store.manifest, store.place.list()
    views = sum(s.stop - s.start for s in there)
    sidecars = sum(sizes[f"{s.name}.json"] for s in there) / views
    shards = sum(sizes[f"{s.name}.array_record"] for s in there) / views
    few = [there[i] for i in np.unique(np.linspace(0, len(there) - 1, _MEASURED).astype(int))]
    padding = sum(_count_padding(store, s) for s in few) / sum(s.stop - s.start for s in few)
    # Of a formula store, a view has one bit of a hash.
    keys = (blocks.key_bytes(m) or 1 / 8) + _DIGEST / min(m.block_views, m.views_per_pass)
    return {"a_view": _round(shards + sidecars), "values": _round(shards - keys - padding),
            "keys": _round(keys), "padding": _round(padding), "sidecars": _round(sidecars)}


def _count_padding(store: Store, shard: Shard) -> int:
    """Bytes of long runs of zeros in the file of a shard."""
    data = np.fromfile(store.place.fetch(f"{shard.name}.array_record"), np.uint8)
    filled = np.concatenate([[-1], np.flatnonzero(data), [len(data)]])
    runs = np.diff(filled) - 1
    return int(runs[runs >= _RUN].sum())


def _count_tops(top: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """How often each class is the most probable: the first by name, all by rank."""
    counts = np.bincount(top, minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    used = int((counts > 0).sum())
    ranks = np.unique(np.geomspace(1, used, _RANKS).round().astype(int))
    return {"never_on_top": len(names) - used,
            "most_frequent": [{"name": names[i], "share": _round(counts[i] / len(top))}
                              for i in order[:min(_NAMED, used)]],
            "by_rank": {"rank": ranks.tolist(), "views": counts[order[ranks - 1]].tolist()}}


def format_table(stats: dict[str, Any]) -> str:
    """The result of `compute` as text for people."""
    b, e, c = stats["bytes"], stats["entropy"], stats["classes"]
    lines = [
        f"{stats['store']}: {stats['passes']} passes of {stats['views_per_pass']:,} views, top "
        f"{stats['top_k']} of {stats['num_classes']:,} classes by {stats['teacher'] or 'unknown'}",
        f"{stats['shards']['there']:,} shards are there, {stats['shards']['missing']:,} missing; "
        f"measured on {stats['views']:,} views",
        f"bytes a view {b['a_view']:.2f}: values {b['values']:.2f}, keys {b['keys']:.2f}, padding "
        f"{b['padding']:.2f}, sidecars {b['sidecars']:.2f}",
        "", f"{'':<22}{'mean':>9}" + "".join(f"{f'{100 * q:.0f} %':>9}" for q in QUANTILES)]
    lines += [f"{'kept by top ' + str(k['k']):<22}{_numbers(k)}" for k in stats["kept"]]
    lines.append(f"{'entropy, nats':<22}{_numbers(e)}")
    a = stats["agreement"]
    if a is not None:
        lines.append(f"{'top-1 of a class':<22}{_numbers(a['by_class'])}")
        lines += ["", f"top class is {a['rule']}: {a['top1']:.2%}; among the {stats['top_k']}: "
                      f"{a['topk']:.2%}"]
    lines += ["", f"classes in no top {stats['top_k']} of these views: {c['never_in_top_k']:,}; "
                  f"never the top class: {c['never_on_top']:,}", "most frequent top classes: "
              + ", ".join(f"{f['name']} {f['share']:.2%}" for f in c["most_frequent"][:8])]
    return "\n".join(lines)


def _numbers(summary: dict[str, float]) -> str:
    """Mean and quantiles as columns."""
    names = ["mean", *(f"q{round(100 * q):02d}" for q in QUANTILES)]
    return "".join(f"{summary[name]:>9.4f}" for name in names)
