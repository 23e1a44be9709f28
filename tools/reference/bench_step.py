"""Measures inference and the training step of a model, against PyTorch in the same run.

Each contender has a process of its own and the whole machine in turn, its data on the device
already, and as many threads as there are CPUs. Nothing is raced before it was compiled and had run.
Where JAX has an accelerator, PyTorch must have the same one.
"""

import contextlib
import importlib.util
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from reference import bench_process, bench_report
from reference.bench_timing import count_cpus, race_rows, race_speeds

OURS = "tinyvit_jax"
_ROUNDS = 5
_TURN = 0.2  # seconds of a turn, about: many steps where one is shorter

# Peak of a device in bfloat16, without sparsity, in 10^12 operations a second, from the makers'
# data sheets; the first name that is part of the device's own.
PEAKS = {"H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "GH200": 989.0,
         "B200": 2250.0, "A100": 312.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0,
         "A10G": 70.0, "RTX 4090": 165.0, "RTX 3090": 71.0,
         "TPU v5 lite": 197.0, "TPU v5e": 197.0, "TPU v5p": 459.0, "TPU v5": 459.0,
         "TPU v6 lite": 918.0, "TPU v6e": 918.0, "TPU v4": 275.0, "TPU v3": 123.0}


class Settings(NamedTuple):
    """What is measured."""

    model: str = "tiny_vit_5m_224"
    image_size: int = 0
    classes: int = 1000
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    train_batches: tuple[int, ...] = (16,)
    dtype: str = ""
    seconds: float = 5.0
    microsoft: str = ""
    timm: bool = False
    frozen: bool = False
    eager: bool = False
    onednn: bool = False
    peak_tflops: float = 0.0


MEANINGS = {
    "model": "a variant of TinyViT",
    "image_size": "pixels; 0 = the variant's own",
    "classes": "of the head",
    "batch_sizes": "of inference, joined by commas; 0 = none",
    "train_batches": "of the training step; 0 = none",
    "dtype": "of activations, float32 or bfloat16; by default float32 on a CPU, bfloat16 else",
    "seconds": "that each contender runs for, about, at each batch size",
    "microsoft": "folder TinyViT of a checkout of microsoft/Cream: its class takes part",
    "timm": "the installed timm's class takes part",
    "frozen": "inference with PyTorch's weights built in, too: torch.compile with \"freezing\"",
    "eager": "without torch.compile, which takes minutes on a CPU",
    "onednn": "ours as --config.onednn=True has it: on a CPU with oneDNN's matrix products",
    "peak_tflops": "of the device, for the model FLOP utilisation; 0 = by a table, where known",
}


def check_settings(settings: Settings) -> None:
    """Raises ValueError for what cannot be measured."""
    from tinyvit_jax.models import VARIANTS

    names = [name for name, variant in VARIANTS.items()  # which the rivals have too
             if name.startswith("tiny_vit_") and "stem_strides" not in variant]
    if settings.model not in names:
        raise ValueError(f"--model={settings.model}: expected one of {', '.join(names)}")
    if settings.dtype not in ("", "float32", "bfloat16"):
        raise ValueError(f"--dtype={settings.dtype}: expected float32 or bfloat16")
    for name in ("batch_sizes", "train_batches"):
        value = getattr(settings, name)
        if value != (0,) and min(value) < 1:
            raise ValueError(f"--{name}={','.join(map(str, value))}: expected whole numbers above "
                             f"0, or 0 alone for none")
    for name in ("image_size", "seconds", "peak_tflops"):
        if getattr(settings, name) < 0:
            raise ValueError(f"--{name}={getattr(settings, name)}: expected 0 or more")
    if settings.classes < 2:
        raise ValueError(f"--classes={settings.classes}: expected 2 or more")
    if settings.timm and importlib.util.find_spec("timm") is None:
        raise ValueError("--timm: timm is not installed. Install it (pip install timm), or leave "
                         "--timm out")


def measure(settings: Settings, folder: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """Races inference at each batch size, then the training step.

    Args:
        settings: checked.
        folder: unused; no files are made.
        say: takes a line of progress.

    Returns:
        "device", "dtype", "macs", "parameters", "peak_tflops" (None where unknown), "notes", and
        "cases": for each batch size the rows of the race and the name of the best rival.
    """
    # The contenders share an accelerator: none may take all its memory at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from tinyvit_jax import onednn
    from tinyvit_jax.models import cost, create_model

    device = jax.devices()[0]
    if jax.device_count() > 1:
        raise RuntimeError(f"JAX has {jax.device_count()} devices, and PyTorch would use one: show "
                           f"both the same one, for example by CUDA_VISIBLE_DEVICES=0.")
    if settings.onednn and not onednn.turn_on():
        raise ValueError("--onednn needs a CPU as JAX's device and an XLA that has oneDNN.")
    dtype = settings.dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    # PyTorch's classes know no other classes' windows, so the shape is that of the image size.
    model = create_model(settings.model, settings.classes, settings.image_size or None, dtype=dtype)
    rivals, notes = _find_rivals(settings, device.platform, dtype == "bfloat16")
    peak = settings.peak_tflops or find_peak(device.device_kind)
    found: dict[str, Any] = {
        "device": f"{device.platform} ({device.device_kind})", "dtype": dtype,
        "image_size": model.image_size, "parameters": cost.count_parameters(model),
        "macs": cost.count_macs(model), "peak_tflops": peak, "notes": notes, "cases": []}
    for train, sizes in ((False, settings.batch_sizes), (True, settings.train_batches)):
        for batch in sizes if sizes != (0,) else ():
            found["cases"].append(race_case(rivals, model, train, batch, settings.seconds, say,
                                            use_onednn=settings.onednn))
            for row in found["cases"][-1]["rows"]:
                flops = 2 * found["macs"] * (3 if train else 1) * row["median"]
                row["utilisation"] = flops / (peak * 1e12) if peak else None
    return found


def find_peak(kind: str) -> float | None:
    """The peak of a device by its name, in 10^12 operations a second; None where unknown."""
    return next((peak for name, peak in PEAKS.items() if name.lower() in kind.lower()), None)


def _find_rivals(settings: Settings, platform: str, bfloat16: bool) -> tuple[list[Any], list[str]]:
    """PyTorch's side and notes, or none and the reason."""
    if importlib.util.find_spec("torch") is None:
        return [], ["PyTorch is not installed, so ours ran alone."]
    import torch

    from reference import bench_torch

    devices = {"cpu": "cpu"} | ({"gpu": "cuda"} if torch.cuda.is_available() else {})
    if platform not in devices:
        return [], [f"PyTorch has no access to the {platform} that JAX uses, so ours ran alone."]
    return bench_torch.find_rivals(settings.microsoft, settings.timm, not settings.eager,
                                   settings.frozen, devices[platform], bfloat16, count_cpus())


def race_case(rivals: list[Any], model: Any, train: bool, batch: int, seconds: float,
              say: Callable[[str], None], turn: float = _TURN, use_onednn: bool = False
              ) -> dict[str, Any]:
    """One batch size of inference or training.

    Args:
        rivals: of bench_torch.find_rivals.
        model: ours.
        train: whole updates, or inference.
        batch: images of a step.
        seconds: that each contender runs for, about.
        say: takes a line of progress.
        turn: seconds of one, about.
        use_onednn: ours takes its products from it.

    Returns:
        "train", "batch", the name of the "best" rival or None, the "rows" of the race, and
        "ours_against" each rival.
    """
    what = f"{'training' if train else 'inference'} at batch {batch}"
    makers: dict[str, tuple[Any, ...]] = {
        OURS: (_make_counted, make_ours, turn, batch, model, train, batch, use_onednn)}
    for rival in rivals:
        if train and rival.inference_alone:
            continue
        makers[rival.name] = (_make_counted, make_rival, turn, batch, rival, model, train, batch)
    with contextlib.ExitStack() as stack:
        contenders, first = {}, {}
        for name, maker in makers.items():  # one after the other: compiling takes the machine
            say(f"{what}: {name} begins")
            contenders[name] = stack.enter_context(bench_process.start(name, *maker))
            first[name] = contenders[name].wait()
        say(f"races {what}: {len(contenders)} contenders")
        speeds, busy = race_speeds({name: one.speed for name, one in contenders.items()}, seconds,
                                   _ROUNDS)
    others = {name: float(np.median(values)) for name, values in speeds.items() if name != OURS}
    best = max(others, key=lambda name: others[name], default=None)
    rows = [row | {"per_cpu_second": float(np.median(busy[row["what"]])),
                   "first_seconds": first[row["what"]]}
            for row in race_rows(speeds, (best,) if best else ())]
    ratio = next(iter(race_rows(speeds, tuple(others))))["against"] if others else {}
    return {"train": train, "batch": batch, "best": best, "rows": rows, "ours_against": ratio}


def _make_counted(make: Callable[..., tuple[Callable[[int], None], float]], seconds: float,
                  batch: int, *args: Any) -> tuple[Callable[[], int], float]:
    """A contender's turn, counted in images; runs in the contender's process."""
    turn, first = make(*args)
    return count_steps(turn, batch, seconds), first


def make_rival(rival: Any, *args: Any) -> tuple[Callable[[int], None], float]:
    """bench_torch.make_turn, where importing torch is left to the contender's process."""
    from reference import bench_torch

    return bench_torch.make_turn(rival, *args)


def count_steps(turn: Callable[[int], None], batch: int, seconds: float) -> Callable[[], int]:
    """A turn of as many steps as fill so many seconds, counted in images."""
    turn(1)
    began = time.perf_counter()
    turn(1)
    steps = max(1, round(seconds / (time.perf_counter() - began)))

    def whole() -> int:
        turn(steps)
        return steps * batch

    return whole


def make_ours(model: Any, train: bool, batch: int, use_onednn: bool = False
              ) -> tuple[Callable[[int], None], float]:
    """Our contender: fn(n) that does n steps and waits for their end; seconds of compiling."""
    from tinyvit_jax import onednn

    onednn.turn_on(use_onednn)
    return _make_training(model, batch) if train else _make_inference(model, batch)


def _make_inference(model: Any, batch: int) -> tuple[Callable[[int], None], float]:
    import jax
    import jax.numpy as jnp

    from tinyvit_jax import inference
    from tinyvit_jax.program import run_once

    shape = (batch, model.image_size, model.image_size, 3)
    images = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    variables = run_once(partial(model.init, train=False), jax.random.key(0), images[:1])
    began = time.perf_counter()
    infer = inference.compile_inference(model, variables)
    infer(images).block_until_ready()
    compiled = time.perf_counter() - began
    # On a CPU calls that nobody waits for run side by side; PyTorch's do not.
    each = jax.default_backend() == "cpu"

    def turn(steps: int) -> None:
        for _ in range(steps):
            logits = infer(images)
            if each:
                logits.block_until_ready()
        logits.block_until_ready()

    return turn, compiled


def _make_training(model: Any, batch: int) -> tuple[Callable[[int], None], float]:
    """The package's own step as its recipes run it: uint8 in, AdamW, smoothed cross-entropy."""
    import jax

    from tinyvit_jax import config as configs
    from tinyvit_jax import mesh as meshes
    from tinyvit_jax import optim, train

    config, mesh = configs.default(), meshes.make_mesh()
    config.train.batch_size = batch
    generator = np.random.default_rng(0)
    shape = (batch, model.image_size, model.image_size, 3)
    data = meshes.put_batch({
        "image": generator.integers(0, 256, shape, np.uint8),
        "label": generator.integers(0, model.num_classes, batch).astype(np.int32),
        "weight": np.ones(batch, np.float32)}, mesh)

    state = meshes.put_state(train.init_state(config, model), mesh)
    step: Any = train.make_train_step(
        config, model, optim.make_schedule(config.optim, batch, 10_000, 100.0), mesh)
    began = time.perf_counter()
    step.lower(state, data).compile()  # a call finds it
    compiled = time.perf_counter() - began
    held = [state]

    def turn(steps: int) -> None:
        for _ in range(steps):
            held[0], metrics = step(held[0], data)
        jax.block_until_ready(metrics["loss"])

    return turn, compiled


_RACE = """\
Images a second: median and quartiles of turns of about {turn} s, taken in rotation, each contender
in a process of its own; the ratio is that of the same rounds to the best rival. First: seconds of
compiling (ours), or of the first two steps with whatever they compile (PyTorch). Inference of ours
is tinyvit_jax.compile_inference, with the weights built in; "frozen" is PyTorch's likewise.
Training is one whole update from a batch on the device: {dtype} forward and backward, smoothed
cross-entropy, the gradient cut to length 5, AdamW; ours normalises uint8 images in it."""


def format_result(result: dict[str, Any]) -> str:
    """The tables of tools/benchmark.py step."""
    settings = result["settings"]
    peak = f", peak {result['peak_tflops']:,.0f} TFLOP/s" if result["peak_tflops"] else ""
    products = ", ours with oneDNN" if settings["onednn"] else ""
    parts = [f"# {settings['model']} at {result['image_size']} pixels in {result['dtype']}"
             f"{products}\n\n"
             f"{bench_report.format_machine(result['machine'])}\n\n"
             f"{result['device']}{peak}; {result['parameters']:,} parameters, "
             f"{result['macs'] / 1e9:.2f} G multiply-adds an image."]
    for case in result["cases"]:
        title = f"## {'Training' if case['train'] else 'Inference'}, batch {case['batch']}"
        parts.append(f"{title}\n\n{_format_case(case)}")
    return "\n\n".join([*parts, _RACE.format(turn=_TURN, dtype=result["dtype"]),
                        *result["notes"]]) + "\n"


def _format_case(case: dict[str, Any]) -> str:
    heads = ["", "images/s", "quartiles", *([f"ratio to {case['best']}", "quartiles"] if (
        case["best"]) else []), "first, s", "rounds"]
    known = case["rows"][0]["utilisation"] is not None
    lines = []
    for row in case["rows"]:
        line = [row["what"], f"{row['median']:,.1f}", f"{row['low']:,.1f}-{row['high']:,.1f}"]
        if case["best"]:
            ratio = row["against"][case["best"]]
            line += [f"{ratio['median']:.2f}", f"{ratio['low']:.2f}-{ratio['high']:.2f}"]
        line += [f"{row['first_seconds']:.1f}", str(row["rounds"])]
        lines.append([*line, *([f"{row['utilisation']:.1%}"] if known else [])])
    return bench_report.format_table([*heads, *(["utilisation"] if known else [])], lines)
