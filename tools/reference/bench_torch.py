"""PyTorch's side of tools/benchmark.py step: the rivals and the forms that each may take."""

import copy
import shutil
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from reference import originals
from reference.torch_fast import FastTinyViT

PLAIN, CHANNELS_LAST, COMPILED = "plain", "channels_last", "torch.compile"


class Rivals(NamedTuple):
    """What is raced against.

    Attributes:
        modules: by name, freshly made and on no device yet.
        forms: of each.
        device: "cpu" or "cuda".
        autocast: dtype of the activations, or None for float32 throughout.
        notes: what was left out, and why.
    """

    modules: dict[str, torch.nn.Module]
    forms: tuple[str, ...]
    device: str
    autocast: torch.dtype | None
    notes: tuple[str, ...]


def make_rivals(model: Any, microsoft: str, timm: bool, compiled: bool, device: str,
                bfloat16: bool, threads: int) -> Rivals:
    """The classes to race against, of the shape of one of our models.

    Args:
        model: ours.
        microsoft: folder TinyViT of a checkout of microsoft/Cream; "" = without it.
        timm: whether the installed timm's class takes part.
        compiled: whether torch.compile does, where it can.
        device: "cpu" or "cuda".
        bfloat16: activations by autocast.
        threads: of the CPU.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    modules: dict[str, torch.nn.Module] = {}
    if microsoft:
        modules["Microsoft"] = originals.make_microsoft(microsoft, model)
    if timm:
        modules["timm"] = originals.make_timm(model)
    if not modules:
        modules["PyTorch"] = FastTinyViT(model)
    notes = []
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        notes.append("PyTorch multiplies float32 as TF32 and lets cuDNN choose by measuring.")
    if compiled and device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        compiled = False
        notes.append("torch.compile was left out: on a CPU it needs a C++ compiler, and there is "
                     "neither g++ nor clang++.")
    forms = (PLAIN, CHANNELS_LAST, *((COMPILED,) if compiled else ()))
    return Rivals(modules, forms, device, torch.bfloat16 if bfloat16 else None, tuple(notes))


def make_turns(rivals: Rivals, train: bool, batch: int, image_size: int, classes: int,
               say: Callable[[str], None]) -> tuple[dict[str, Callable[[int], None]],
                                                    dict[str, float]]:
    """The contenders for one batch size.

    Args:
        rivals: from `make_rivals`.
        train: whole training steps, or inference.
        batch: images of a step.
        image_size: pixels.
        classes: of the head.
        say: takes a line of progress.

    Returns:
        By name: fn(n) that does n steps and waits for their end; and the seconds that the first
        two steps took, compilation included.
    """
    turns: dict[str, Callable[[int], None]] = {}
    first: dict[str, float] = {}
    images = torch.randn(batch, 3, image_size, image_size, device=rivals.device)
    labels = torch.randint(0, classes, (batch,), device=rivals.device)
    for name, module in rivals.modules.items():
        for form in rivals.forms:
            own = copy.deepcopy(module).to(rivals.device).train(train)
            shown = images
            if form != PLAIN:
                own = own.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                shown = images.contiguous(memory_format=torch.channels_last)
            if form == COMPILED:
                say(f"torch.compile, {name}, batch {batch}, {'training' if train else 'inference'}")
                torch._dynamo.reset()
                own.compile(dynamic=False)
            turn = (_make_training if train else _make_inference)(own, shown, labels, rivals)
            began = time.perf_counter()
            turn(2)
            turns[f"{name}, {form}"] = turn
            first[f"{name}, {form}"] = time.perf_counter() - began
    return turns, first


def _wait(rivals: Rivals) -> None:
    if rivals.device == "cuda":
        torch.cuda.synchronize()


def _autocast(rivals: Rivals) -> torch.autocast:
    return torch.autocast(rivals.device, dtype=rivals.autocast or torch.bfloat16,
                          enabled=rivals.autocast is not None)


def _make_inference(module: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor,
                    rivals: Rivals) -> Callable[[int], None]:
    def turn(steps: int) -> None:
        with torch.inference_mode(), _autocast(rivals):
            for _ in range(steps):
                module(images)
            _wait(rivals)

    return turn


def _make_training(module: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor,
                   rivals: Rivals) -> Callable[[int], None]:
    """Smoothed cross-entropy, gradients cut to length 5, AdamW in one kernel: our recipe's step."""
    params = list(module.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.05, fused=True)

    def turn(steps: int) -> None:
        for _ in range(steps):
            with _autocast(rivals):
                loss = F.cross_entropy(module(images), labels, label_smoothing=0.1)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 5.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _wait(rivals)

    return turn
