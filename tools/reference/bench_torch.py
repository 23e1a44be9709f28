"""PyTorch's side of tools/benchmark.py step: the rivals and the forms that each may take."""

import shutil
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from reference import originals
from reference.torch_fast import FastTinyViT

PLAIN, CHANNELS_LAST, COMPILED = "plain", "channels_last", "torch.compile"
FROZEN = "torch.compile, frozen"


class Rival(NamedTuple):
    """A class of PyTorch's in one form.

    Attributes:
        origin: "Microsoft", "timm" or "PyTorch", which is ours written for PyTorch.
        form: PLAIN, CHANNELS_LAST, COMPILED or FROZEN, its weights built into the program.
        device: "cpu" or "cuda".
        bfloat16: activations by autocast; else float32 throughout.
        threads: of the CPU.
        folder: TinyViT of a checkout of microsoft/Cream, for "Microsoft".
    """

    origin: str
    form: str = PLAIN
    device: str = "cpu"
    bfloat16: bool = False
    threads: int = 1
    folder: str = ""

    @property
    def name(self) -> str:
        """As the tables call it."""
        return f"{self.origin}, {self.form}"

    @property
    def inference_alone(self) -> bool:
        """Whether it cannot train."""
        return self.form == FROZEN


def find_rivals(microsoft: str, timm: bool, compiled: bool, frozen: bool, device: str,
                bfloat16: bool, threads: int) -> tuple[list[Rival], list[str]]:
    """Whom to race against, and notes on what was left out or set, for the reader.

    Args:
        microsoft: folder TinyViT of a checkout of microsoft/Cream; "" = without it.
        timm: whether the installed timm's class takes part.
        compiled: whether torch.compile does, where it can.
        frozen: whether it does with the weights built in as well.
        device: "cpu" or "cuda".
        bfloat16: activations by autocast.
        threads: of the CPU.
    """
    origins = [*(["Microsoft"] if microsoft else []), *(["timm"] if timm else [])] or ["PyTorch"]
    notes = []
    if device == "cuda":
        notes.append("PyTorch multiplies float32 as TF32 and lets cuDNN choose by measuring.")
    if compiled and device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        compiled = False
        notes.append("torch.compile was left out: on a CPU it needs a C++ compiler, and there is "
                     "neither g++ nor clang++.")
    forms = (PLAIN, CHANNELS_LAST, *((COMPILED,) if compiled else ()),
             *((FROZEN,) if compiled and frozen else ()))
    return [Rival(origin, form, device, bfloat16, threads, microsoft)
            for origin in origins for form in forms], notes


def make_turn(rival: Rival, model: Any, train: bool, batch: int
              ) -> tuple[Callable[[int], None], float]:
    """A contender for one batch size, after two steps.

    Args:
        rival: from `find_rivals`.
        model: ours, whose shape it takes.
        train: whole training steps, or inference.
        batch: images of a step.

    Returns:
        fn(n) that does n steps and waits for their end; and the seconds that the first two steps
        took, compilation included.
    """
    torch.set_num_threads(rival.threads)
    torch.manual_seed(0)
    if rival.device == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    size = model.image_size
    module = make_module(rival, model).to(rival.device).train(train)
    images = torch.randn(batch, 3, size, size, device=rival.device)
    labels = torch.randint(0, model.num_classes, (batch,), device=rival.device)
    if rival.form != PLAIN:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    if rival.form in (COMPILED, FROZEN):
        module.compile(dynamic=False, options={"freezing": True} if rival.inference_alone else None)
    turn = (_make_training if train else _make_inference)(module, images, labels, rival)
    began = time.perf_counter()
    turn(2)
    return turn, time.perf_counter() - began


def make_module(rival: Rival, model: Any) -> torch.nn.Module:
    """The rival's class of the shape of one of our models, on the CPU."""
    if rival.origin == "Microsoft":
        return originals.make_microsoft(rival.folder, model)
    return originals.make_timm(model) if rival.origin == "timm" else FastTinyViT(model)


def _wait(rival: Rival) -> None:
    if rival.device == "cuda":
        torch.cuda.synchronize()


def _autocast(rival: Rival) -> torch.autocast:
    return torch.autocast(rival.device, dtype=torch.bfloat16, enabled=rival.bfloat16)


def _make_inference(module: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor,
                    rival: Rival) -> Callable[[int], None]:
    # Freezing is for torch.no_grad alone.
    without_gradients = torch.no_grad if rival.inference_alone else torch.inference_mode

    def turn(steps: int) -> None:
        with without_gradients(), _autocast(rival):
            for _ in range(steps):
                module(images)
            _wait(rival)

    return turn


def _make_training(module: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor,
                   rival: Rival) -> Callable[[int], None]:
    """Smoothed cross-entropy, gradients cut to length 5, AdamW in one kernel: our recipe's step."""
    params = list(module.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.05, fused=True)

    def turn(steps: int) -> None:
        for _ in range(steps):
            with _autocast(rival):
                loss = F.cross_entropy(module(images), labels, label_smoothing=0.1)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 5.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _wait(rival)

    return turn
