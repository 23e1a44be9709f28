"""The originals' own classes: Microsoft's from a checkout, timm's where it is installed.

Microsoft's file asks timm for a few small things. Where timm is missing they are stood in for, by
what evaluation needs of them.
"""

import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class _DropPath(torch.nn.Module):
    """Stochastic depth in evaluation, which is nothing."""

    def __init__(self, drop_prob: float | None = None):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise RuntimeError("this stand-in for timm's DropPath is for evaluation alone")
        return x


def make_microsoft(folder: str, model: Any) -> torch.nn.Module:
    """Microsoft's TinyViT of the shape of one of our models.

    Args:
        folder: TinyViT of a checkout of github.com/microsoft/Cream.
        model: ours; it needs the stem strides (2, 2) and image sides that 32 divides.

    Raises:
        FileNotFoundError: a folder without the model's code.
    """
    path = Path(folder) / "models" / "tiny_vit.py"
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give --microsoft the folder TinyViT of "
                                f"a checkout of microsoft/Cream")
    spec = importlib.util.spec_from_file_location("microsoft_tiny_vit", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    with _timm_or_stand_in():
        sys.modules[spec.name] = module  # where timm's register_model looks for it
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules[spec.name]
    return module.TinyViT(
        img_size=model.image_size, num_classes=model.num_classes, drop_path_rate=0.0,
        embed_dims=list(model.embed_dims), depths=list(model.depths),
        num_heads=list(model.num_heads), window_sizes=list(model.window_sizes))


def make_timm(model: Any) -> torch.nn.Module:
    """timm's TinyVit of the shape of one of our models; raises ImportError without timm."""
    from timm.models.tiny_vit import TinyVit

    return TinyVit(num_classes=model.num_classes, drop_path_rate=0.0, embed_dims=model.embed_dims,
                   depths=model.depths, num_heads=model.num_heads, window_sizes=model.window_sizes)


@contextmanager
def _timm_or_stand_in() -> Iterator[None]:
    """Makes `import timm` work for Microsoft's file and leaves no trace of a stand-in."""
    if importlib.util.find_spec("timm") is not None:
        yield
        return
    contents: dict[str, dict[str, Any]] = {
        "timm": {"__version__": "0.6"},
        "timm.models": {},
        "timm.models.layers": {"DropPath": _DropPath, "to_2tuple": lambda side: (side, side),
                               "trunc_normal_": torch.nn.init.trunc_normal_},
        "timm.models.registry": {"register_model": lambda function: function},
        "timm.models._builder": {"build_model_with_cfg": None}}  # its own models we do not ask for
    for name, content in contents.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    try:
        yield
    finally:
        for name in contents:
            del sys.modules[name]
