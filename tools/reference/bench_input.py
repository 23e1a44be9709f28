"""Measures the input path: image files to replayed views, against the original's own path.

All contenders read the same files, just read before and so in the page cache, chunk by chunk by
turns, on one CPU (where the system can pin a process). Afterwards the same files go through the
pipeline of training, with threads and with worker processes, each in a process of its own.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from reference import bench_images, bench_report, original_input
from reference.bench_timing import count_cpus, one_cpu, quartiles, race, race_rows
from tinyvit_jax import config as configs
from tinyvit_jax.data import augment, images, microsoft, ops, pack, rand_augment
from tinyvit_jax.data.folder import FolderSource
from tinyvit_jax.data.source import ImageSource
from tinyvit_jax.data.spec import Spec

CHUNK = 16  # images that a contender handles in its turn
SHORT_SIDE = 320  # of the second pack
ORIGINAL, PLAIN = "original", "original, no RandAugment"
FILES, PACK, SHORT = "files", "pack", f"pack, short side {SHORT_SIDE}"
_ROUNDS, _STREAM_ROUNDS = 5, 3
_WARM = 4  # batches that a stream gives before its clock starts
_STEPS = 1 << 20  # of a stream: more than are ever asked for
_SUFFIXES = (".jpg", ".jpeg")


class Settings(NamedTuple):
    """What is measured."""

    images: str = ""
    files: int = 192
    seconds: float = 4.0
    stream_seconds: float = 5.0
    image_size: int = 224
    batch: int = 64


MEANINGS = {
    "images": "folder of JPEG files; made from a seed where none is given",
    "files": "images that are read again and again",
    "seconds": "that each contender runs for, about",
    "stream_seconds": "that each pipeline runs for, three times; 0 leaves the pipelines out",
    "image_size": "side of a view in pixels",
    "batch": "views of a batch in the pipelines",
}


def check_settings(settings: Settings) -> None:
    """Raises ValueError for what cannot be measured."""
    for name, lowest in (("files", 2 * CHUNK), ("image_size", 32), ("batch", 2), ("seconds", 0),
                         ("stream_seconds", 0)):
        if getattr(settings, name) < lowest:
            raise ValueError(f"--{name}={getattr(settings, name)}: expected {lowest} or more")
    if settings.images:
        found = len(_list_files(Path(settings.images)))
        if found < settings.files:
            raise ValueError(f"--images={settings.images} has {found} JPEG files: expected "
                             f"--files={settings.files} or more")


def measure(settings: Settings, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Races the paths, times their stages, and runs the pipelines.

    Args:
        settings: checked.
        folder: for copies of the images and two packs of them.
        say: takes a line of progress.

    Returns:
        "images" (count, bytes, pixels), "race" and "stages" (rows), "streams" (rows).
    """
    sources = make_sources(settings, folder, say)
    found: dict[str, Any] = {"images": _describe(sources[FILES]),
                             "tensor": "torch" if original_input.HAS_TORCH else "numpy"}
    turns = make_turns(sources, settings.image_size)
    with one_cpu(), one_torch_thread():
        say(f"races {len(turns)} contenders")
        for turn in turns.values():  # imports and tables
            turn()
        speeds, busy = race(turns, settings.seconds, _ROUNDS)
        found["race"] = [row | {"per_cpu_second": float(np.median(busy[row["what"]]))}
                         for row in race_rows(speeds, (ORIGINAL, PLAIN))]
        say("times the stages")
        found["stages"] = time_stages(sources, settings)
    found["streams"] = _race_streams(settings, folder, say) if settings.stream_seconds else []
    return found


def make_sources(settings: Settings, folder: Path, say: Callable[[str], None]
                 ) -> dict[str, ImageSource]:
    """The same images as files, as a pack, and as a pack of a short side."""
    root = folder / "files"
    if settings.images:
        say(f"copies {settings.files} images of {settings.images}")
        for i, path in enumerate(_choose_files(Path(settings.images), settings.files)):
            copied = root / "train" / f"class{i % 2}" / f"{i:05d}.jpg"
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(path.read_bytes())
    else:
        say(f"makes {settings.files} images")
        bench_images.make_folder(root / "train", settings.files)
    (root / "val").mkdir()
    files = FolderSource(root, "train")
    silent = types.SimpleNamespace(update=lambda count: None)
    for name, short_side in (("pack", 0), ("short", SHORT_SIDE)):
        say(f"packs them, short side {short_side}" if short_side else "packs them")
        pack.write_pack(folder / name, {"train": files},
                        pack.PackSettings(short_side=short_side), silent)
    return {FILES: files, PACK: _open(folder, PACK), SHORT: _open(folder, SHORT)}


def _open(folder: Path, name: str) -> ImageSource:
    """What `make_sources` made, opened anew."""
    places = {FILES: f"folder:{folder / 'files'}", PACK: f"pack:{folder / 'pack'}",
              SHORT: f"pack:{folder / 'short'}"}
    return images.open_source(places[name], "train")


def _list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)


def _choose_files(folder: Path, count: int) -> list[Path]:
    """So many of a folder's files, always the same."""
    files = _list_files(folder)
    return [files[i] for i in np.random.default_rng(0).choice(len(files), count, replace=False)]


def _describe(source: ImageSource) -> dict[str, Any]:
    """Number, mean bytes, mean width and height of a source's images."""
    found = source.read(range(len(source)))
    sizes = np.array([original_input.decode(example.image).size for example in found])
    count = [len(example.image) for example in found]
    return {"count": len(found), "bytes": float(np.mean(count)),
            "bytes_a_pixel": float(np.mean(count / sizes.prod(1))),
            "width": float(np.median(sizes[:, 0])), "height": float(np.median(sizes[:, 1]))}


def make_spec(kind: str, image_size: int, rand_augment_on: bool = True, pixels: str = "faster"
              ) -> Spec:
    """The views of the recipes: crop, flip, rand-m9-mstd0.5-inc1, erasing of a quarter.

    Args:
        kind: "imagenet", or "microsoft" for the original's own.
        image_size: pixels.
        rand_augment_on: False leaves RandAugment out, and has no colour jitter in its place.
        pixels: "faster", "fast" or "exact".
    """
    section = configs.default().augment
    section.update({"spec": kind, "pixels": pixels})
    if not rand_augment_on:
        section.update({"rand_augment": "", "color_jitter": 0.0})
    return augment.make_spec(section, image_size)


def make_turns(sources: dict[str, ImageSource], image_size: int) -> dict[str, Callable[[], int]]:
    """The contenders of a race: each makes the views of the next chunk of images.

    Args:
        sources: from `make_sources`.
        image_size: pixels.
    """
    turns: dict[str, Callable[[], int]] = {}
    for name, on in ((ORIGINAL, True), (PLAIN, False)):
        spec = make_spec("microsoft", image_size, on)
        turns[name] = _make_turn(sources[FILES], partial(_view_original, spec=spec))
    for name, source in sources.items():
        for label, on, pixels in (("", True, "faster"), (", no RandAugment", False, "faster"),
                                  (", fast pixels", True, "fast"),
                                  (", exact pixels", True, "exact")):
            spec = make_spec("imagenet", image_size, on, pixels)
            turns[name + label] = _make_turn(source, partial(augment.replay_batch, spec=spec))
    return turns


def _view_original(images: list[tuple[bytes, str]], seeds: list[int], spec: Spec
                   ) -> Iterator[Any]:
    return (original_input.make_view(data, seed, spec)
            for (data, _), seed in zip(images, seeds, strict=True))


def _make_turn(source: ImageSource, view: Callable[[list[tuple[bytes, str]], list[int]],
                                                   Iterator[Any]]) -> Callable[[], int]:
    """A turn of one contender; all have the same order of chunks, and of seeds."""
    chunks = _cycle_chunks(len(source))

    def turn() -> int:
        numbers, seeds = next(chunks)
        images = [(example.image, example.key) for example in source.read(numbers)]
        return sum(1 for _ in view(images, seeds))

    return turn


def _cycle_chunks(count: int) -> Iterator[tuple[list[int], list[int]]]:
    """Image numbers and view seeds of whole chunks, over and over; never the same seed twice."""
    generator = np.random.default_rng(0)
    starts = range(0, count - CHUNK + 1, CHUNK)
    for start in itertools.cycle(starts):
        yield (list(range(start, start + CHUNK)),
               generator.integers(0, 1 << 32, CHUNK).tolist())


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """PyTorch's operations on this thread alone, where there is PyTorch."""
    if not original_input.HAS_TORCH:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Clock:
    """Seconds of each stage, by wrapping functions: a call inside a watched call is the outer's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inside = False

    def watch(self, function: Callable, stage: str) -> Callable:
        """The function, timed."""
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            self.inside, began = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False
                self.seconds[stage] = (self.seconds.get(stage, 0.0) + time.perf_counter() - began)

        return timed


# Stages of each side: the module or table whose function it is, and the function.
_OUR_STAGES: tuple[tuple[Any, tuple[str, ...], str], ...] = (
    (ops, ("decode", "find_window", "decode_window"), "decode"),
    (ops, ("crop", "resize"), "crop and resize"),
    *((table, tuple(table), "RandAugment") for table in rand_augment.BY_PIXELS.values()))
_ORIGINAL_STAGES: tuple[tuple[Any, tuple[str, ...], str], ...] = (
    (original_input, ("decode",), "decode"),
    (original_input, ("crop_and_resize",), "crop and resize"),
    (microsoft.OPERATIONS, tuple(microsoft.OPERATIONS), "RandAugment"))


def time_stages(sources: dict[str, ImageSource], settings: Settings) -> list[dict[str, Any]]:
    """Microseconds of a view in each stage: a row for each side and source."""
    cases = [(ORIGINAL, FILES, "microsoft", _view_original, _ORIGINAL_STAGES),
             *((name, name, "imagenet", augment.replay_batch, _OUR_STAGES) for name in sources)]
    runs: list[tuple[str, _Clock, Callable[[], int], Any, list[float]]] = []
    for label, source, kind, view, stages in cases:
        spec = make_spec(kind, settings.image_size)
        runs.append((label, _Clock(), _make_turn(sources[source], partial(view, spec=spec)),
                     stages, []))
    began = time.perf_counter()
    while time.perf_counter() - began < settings.seconds * len(runs) / 2 or not runs[-1][-1]:
        for _, clock, turn, stages, totals in runs:
            with _watched(clock, stages):
                start = time.perf_counter()
                turn()
                totals.append(time.perf_counter() - start)
    rows = []
    for label, clock, _, _, totals in runs:
        views, rest = CHUNK * len(totals), sum(totals) - sum(clock.seconds.values())
        rows.append({"what": label, **{stage: 1e6 * clock.seconds[stage] / views
                                       for stage in original_input.STAGES[:-1]},
                     "rest": 1e6 * rest / views})
    return rows


@contextlib.contextmanager
def _watched(clock: _Clock, stages: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, names, stage in stages:
            for name in names:
                if isinstance(owner, dict):
                    stack.enter_context(mock.patch.dict(
                        owner, {name: clock.watch(owner[name], stage)}))
                else:
                    stack.enter_context(mock.patch.object(
                        owner, name, clock.watch(getattr(owner, name), stage)))
        yield


def _race_streams(settings: Settings, folder: Path, say: Callable[[str], None]
                  ) -> list[dict[str, Any]]:
    """Images a second through the pipeline, for several numbers of threads and workers."""
    cpus = count_cpus()
    shapes = [(1, 0), (2, 0), (1, 1), (1, 2)] + ([(cpus, 0), (1, cpus)] if cpus > 2 else [])
    cases = list(itertools.product((FILES, SHORT), shapes))
    runs: dict[Any, list[dict]] = {case: [] for case in cases}
    for number in range(_STREAM_ROUNDS):
        say(f"runs the pipelines, {number + 1} of {_STREAM_ROUNDS}")
        for name, (threads, workers) in cases:
            runs[name, (threads, workers)].append(run_probe(
                f"probe_stream({str(folder)!r}, {name!r}, {settings.image_size}, {settings.batch}, "
                f"{threads}, {workers}, {settings.stream_seconds})"))
    return [{"source": name, "threads": threads, "workers": workers, "rounds": len(found),
             **quartiles([run["speed"] for run in found]),
             "first_mib": _median([run["first"] for run in found]),
             "last_mib": _median([run["last"] for run in found]),
             "views": int(np.median([run["views"] for run in found]))}
            for (name, (threads, workers)), found in runs.items()]


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def run_probe(call: str) -> dict[str, Any]:
    """What a function of this module prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"from reference import bench_input; bench_input.{call}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                          "PYTHONWARNINGS": "ignore"},  # workers that are ended leave their queues
        stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def probe_stream(folder: str, name: str, image_size: int, batch: int, threads: int, workers: int,
                 seconds: float) -> None:
    """Takes batches of training views from the pipeline; prints a dict.

    Args:
        folder: of `make_sources`.
        name: of the source.
        image_size: pixels.
        batch: views of a batch.
        threads: of each process.
        workers: processes.
        seconds: how long the batches are counted.
    """
    from tinyvit_jax.data import pipeline
    from tinyvit_jax.data.order import Order

    source = _open(Path(folder), name)
    views = pipeline.Views(source, make_spec("imagenet", image_size), Order(0, len(source), False))
    stream = pipeline.batch_stream(
        pipeline.TrainBatches(views, batch, pipeline.Rows(0, batch), _STEPS),
        threads=threads, workers=workers)
    for _ in range(max(_WARM, threads * 2, workers * 4)):  # what was prepared ahead, too
        next(stream)
    first, began, count = _memory(), time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        next(stream)
        count += batch
    took = time.perf_counter() - began
    print(json.dumps({"speed": count / took, "views": count, "first": first, "last": _memory()}),
          flush=True)
    for worker in multiprocessing.active_children():
        worker.kill()  # else it would keep the standard output, which the caller reads, open
    os._exit(0)  # threads would prepare batches to the end


def _memory() -> float | None:
    """MiB of this process and its workers; None where the system has no /proc."""
    pages = 0
    for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        try:
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
        except OSError:
            return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


_RACE = """\
Images a second from the file's bytes to the view, on one core: median and quartiles of turns of
{chunk} images, taken in rotation; the ratios are of the same rounds. What a CPU second gives
(median) differs from that only where others use the core too. Original: PIL, whole image, one crop,
one resize, RandAugment on PIL images, then {tensor} to a normalised and erased float32 tensor. Ours
ends in uint8 with the noise in it; normalising is the device's. Exact pixels are
--config.augment.pixels=exact. Reading the file or the record is in it on both sides."""
_STAGES = """\
Microseconds of a view, mean, wall time, on the same core. Rest: reading, draws, flip, erasing, and
for the original the tensor and its normalisation."""
_STREAMS = """\
Images a second out of the pipeline that training reads, batches of {batch}: median and quartiles of
fresh processes. Memory is that of the process and its workers, after the first batches and at the
end; pages that several of them share count for each."""


def format_result(result: dict[str, Any]) -> str:
    """The tables of tools/benchmark.py input."""
    found, settings = result["images"], result["settings"]
    source = f"of {settings['images']}" if settings["images"] else "made from a seed"
    parts = [
        f"# Images to views\n\n{bench_report.format_machine(result['machine'])}\n\n"
        f"{found['count']} images {source}: median {found['width']:.0f} x {found['height']:.0f} "
        f"pixels, mean {found['bytes'] / 1000:.0f} KB, {found['bytes_a_pixel']:.2f} bytes a pixel. "
        f"Views of {settings['image_size']} pixels.",
        "## One core\n\n" + bench_report.format_race(
            result["race"], {ORIGINAL: "to original", PLAIN: "to it without RandAugment"},
            "images/s"), _RACE.format(chunk=CHUNK, tensor=result["tensor"]),
        "## Stages\n\n" + _format_stages(result["stages"]), _STAGES]
    if result["streams"]:
        parts += ["## Pipeline\n\n" + _format_streams(result["streams"]),
                  _STREAMS.format(batch=settings["batch"])]
    return "\n\n".join(parts) + "\n"


def _format_stages(rows: list[dict[str, Any]]) -> str:
    stages = original_input.STAGES
    lines = [[row["what"], *(f"{row[stage]:.0f}" for stage in stages),
              f"{sum(row[stage] for stage in stages):.0f}"] for row in rows]
    return bench_report.format_table(["", *stages, "sum"], lines)


def _format_streams(rows: list[dict[str, Any]]) -> str:
    single = {row["source"]: row["median"] for row in rows
              if (row["threads"], row["workers"]) == (1, 0)}
    lines = [[row["source"], str(row["threads"]), str(row["workers"]), f"{row['median']:,.0f}",
              f"{row['low']:,.0f}-{row['high']:,.0f}",
              f"{row['median'] / single[row['source']]:.2f}", *(
                  "-" if row[key] is None else f"{row[key]:.0f}"
                  for key in ("first_mib", "last_mib")), f"{row['views']:,}"] for row in rows]
    return bench_report.format_table(
        ["", "threads", "workers", "images/s", "quartiles", "to one thread", "MiB at first",
         "MiB at the end", "views"], lines)
