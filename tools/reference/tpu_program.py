"""What a program compiled for TPU needs and does, read from the compiler's own text and figures."""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

# v5e: 197 TFLOP/s of bfloat16 by four units of 128 x 128 multiply-adds give its clock.
CLOCK = 1.5e9
PEAK_FLOPS = 197e12
CHIP_BYTES = 16e9

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
               "collective-broadcast")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4,
          "u32": 4, "f64": 8, "s64": 8, "u64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.+?) ([a-z][a-z\d\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One line of the compiled program."""

    name: str
    shape: str  # of the result, with its layout
    kind: str
    rest: str  # operands, attributes and the backend's configuration

    @property
    def source(self) -> str:
        """The path of modules and the operation it was made of; "" where the text has none."""
        return _find(r'op_name="([^"]*)"', self.rest)

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 where it gives none, as for collectives and transfers."""
        return int(_find(r'"estimated_cycles":"(\d+)"', self.rest) or 0)


def read(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """Reads a compiled program.

    Args:
        text: of jax's Compiled.as_text().

    Returns:
        The name of the entry computation, and the instructions of every computation by its name.
    """
    entry, here = "", ""
    computations: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            here = start[2]
            computations[here] = []
            entry = here if start[1] else entry
        elif here and (found := _INSTRUCTION.match(line)):
            computations[here].append(Instruction(*found.groups()))
    return entry, computations


def executed(text: str) -> Iterator[tuple[int, Instruction]]:
    """Every instruction that is scheduled by itself, and how often: loops' bodies by their trips.

    What is fused into one instruction counts as that one.
    """
    entry, computations = read(text)

    def walk(name: str, times: int) -> Iterator[tuple[int, Instruction]]:
        for one in computations[name]:
            yield times, one
            if one.kind == "while":
                trips = _count_trips(computations[_find(r"condition=%?([\w.\-]+)", one.rest)])
                yield from walk(_find(r"body=%?([\w.\-]+)", one.rest), times * trips)
            elif one.kind == "conditional":
                for branch in re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.rest):
                    yield from walk(branch, times)
            elif one.kind in ("call", "async-start"):
                yield from walk(_find(r"(?:to_apply|calls)=%?([\w.\-]+)", one.rest), times)

    yield from walk(entry, 1)


def _count_trips(condition: list[Instruction]) -> int:
    """How often a loop turns that goes on while its counter, from 0, is below a constant.

    Those of jax.lax.scan are such, and those that the compiler makes of a large copy.

    Raises:
        ValueError: a loop of another kind.
    """
    ends = [int(_find(r"^(\d+)\)", one.rest)) for one in condition
            if one.kind == "constant" and one.shape.startswith(("s32[]", "u32[]"))]
    if len(ends) != 1 or not any("direction=LT" in one.rest for one in condition):
        raise ValueError("the program has a loop whose turns its text does not tell; expected "
                         "those alone that count up to a constant, as jax.lax.scan's")
    return ends[0]


def count_cycles(text: str) -> int:
    """The compiler's estimate of one run, without what it gives no estimate for: collectives."""
    return sum(times * one.cycles for times, one in executed(text))


def count_collectives(text: str) -> dict[str, dict[str, int]]:
    """{kind and type: {"count", "bytes"}} of what chips exchange; bytes on one chip."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: {"count": 0, "bytes": 0})
    for times, one in executed(text):
        kind = one.kind.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        for dtype, size in _shapes(one.shape):
            row = found[f"{kind} {dtype}"]
            row["count"] += times
            row["bytes"] += times * size
    return dict(found)


def find_products(text: str) -> dict[str, dict[str, int]]:
    """{type of the inputs: {source: how many}} of convolutions and matrix products.

    The type is the wider one of the two inputs. The MXU multiplies bfloat16, so a product of
    float32 inputs costs several passes or, at the default precision, a rounding first.
    """
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for body in read(text)[1].values():
        types = {one.name: _shapes(one.shape)[0][0] for one in body if _shapes(one.shape)}
        for one in body:
            if one.kind not in ("convolution", "dot"):
                continue
            inputs = [types[name] for name in re.findall(r"%([\w.\-]+)", one.rest.split(")")[0])]
            found[max(inputs, key=_BYTES.__getitem__)][_shorten(one.source)] += 1
    return {dtype: dict(sorted(rows.items())) for dtype, rows in found.items()}


def rank_cycles(text: str) -> list[tuple[str, int]]:
    """Estimated cycles by layer and operation, most first; blocks of a stage count as one."""
    total: dict[str, int] = defaultdict(int)
    for times, one in executed(text):
        if one.cycles:
            total[_shorten(one.source)] += times * one.cycles
    return sorted(total.items(), key=lambda row: -row[1])


def count_memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes on one chip: at the most at a time, and of what they consist."""
    m = compiled.memory_analysis()
    if m is None:
        raise ValueError("the compiler gives no memory analysis of this program")
    parts = {"arguments": m.argument_size_in_bytes, "results": m.output_size_in_bytes,
             "shared": m.alias_size_in_bytes, "temporary": m.temp_size_in_bytes,
             "code": m.generated_code_size_in_bytes}
    peak = (parts["arguments"] + parts["results"] - parts["shared"] + parts["temporary"]
            + parts["code"])
    return {"peak": peak, **parts}


def describe(compiled: jax.stages.Compiled, rows: int) -> dict[str, Any]:
    """All of it, as JSON knows it.

    Args:
        compiled: for TPU.
        rows: images of one chip in a run of it.
    """
    text = compiled.as_text() or ""
    cycles = count_cycles(text)
    products = find_products(text)
    return {"memory": count_memory(compiled), "cycles": cycles, "cycles_per_image": cycles / rows,
            "images_per_second": rows * CLOCK / cycles if cycles else 0.0,
            "collectives": count_collectives(text), "products": {
                dtype: sum(rows.values()) for dtype, rows in products.items()},
            "float32_products": products.get("f32", {}), "slowest": rank_cycles(text)[:8]}


def _shapes(text: str) -> list[tuple[str, int]]:
    """The arrays of a shape or a tuple of them: types and bytes."""
    found = []
    for dtype, sides in _SHAPE.findall(text):
        if dtype in _BYTES:
            size = _BYTES[dtype]
            for side in filter(None, sides.split(",")):
                size *= int(side)
            found.append((dtype, size))
    return found


def _shorten(source: str) -> str:
    """An operation's path of modules, those of a stage's blocks as one; its direction in brackets.

    jit(step)/transpose(jvp(TinyViT))/TinyViT.features/layers_1/blocks_0/mlp/fc1/dot_general gives
    layers_1/mlp/fc1/dot_general [backward].
    """
    names = [name for name in source.split("/")[1:] if not re.search(r"TinyViT|ClipViT", name)]
    path = "/".join(name for name in names if not re.fullmatch(r"\w*blocks_\d+", name))
    return path + (" [backward]" if "transpose(" in source else "")


def _find(pattern: str, text: str) -> str:
    """What the pattern's group finds first, or ""."""
    found = re.search(pattern, text)
    return found[1] if found else ""
