"""What a run leaves to read: a progress bar or plain lines, metrics.jsonl, result.json."""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger("tinyvit_jax")


def set_up_logging() -> None:
    """Sends the package's messages to standard error, one plain line each."""
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError of writing, which knows no file (a full disk), the file's name."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}. Free some space or "
                      f"mend the folder, and type the command again: the run goes on from its "
                      f"newest checkpoint.") from error


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that a reader or a crash sees all of it or none of it."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_and_rename(path, data)


def _write_and_rename(path: Path, data: bytes) -> None:
    name = path.with_name(f".{path.name}.tmp")  # the next write replaces what a kill left of one
    try:
        with name.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict | None:
    """A JSON file's content, or None where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line that a kill cut off is left out."""
    lines = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


class Progress:
    """Progress of one piece of work: a bar on a terminal, plain lines and metrics.jsonl always.

    Args:
        title: what is running.
        total: updates in all.
        start: updates already done.
        path: the metrics.jsonl to append to (lines after `start` are dropped first), or None.
        quiet: print nothing (processes other than the first).
        every: seconds between two texts of a long piece of work, for `is_due`.
    """

    def __init__(self, title: str, total: int, start: int = 0, path: Path | None = None,
                 quiet: bool = False, every: float = 0.0):
        from tqdm import tqdm

        self.title, self.total, self.path, self.quiet = title, total, path, quiet
        self.every, self._said = every, -math.inf
        terminal = sys.stderr.isatty() and not quiet
        self.bar = tqdm(total=total, initial=start, desc=title, dynamic_ncols=True,
                        disable=not terminal)
        self.lines_too = not terminal and not quiet
        if path is not None:
            kept = [m for m in read_metrics(path) if m["step"] <= start] if start else []
            write_atomic(path, "".join(json.dumps(m) + "\n" for m in kept).encode())

    def advance(self, steps: int = 1) -> None:
        """Moves the bar."""
        self.bar.update(steps)

    def report(self, step: int, metrics: dict[str, float], eta: float | None = None) -> None:
        """Writes one line of metrics (non-finite values as null) and shows them."""
        if self.path is not None:
            clean = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
            with naming(self.path), self.path.open("a") as f:
                f.write(json.dumps({"step": step, **clean}) + "\n")
        self.say(step, "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k in _SHOWN), eta)

    def is_due(self) -> bool:
        """Whether `every` seconds have passed since the last text; yes before the first."""
        return time.monotonic() - self._said >= self.every

    def say(self, step: int, text: str, eta: float | None = None) -> None:
        """Shows a text: behind the bar, or as a line where there is none."""
        self._said = time.monotonic()
        self.bar.set_postfix_str(text, refresh=False)
        if self.lines_too:
            left = "" if eta is None else f"  left {format_seconds(eta)}"
            logger.info("%s %d/%d  %s%s", self.title, step, self.total, text, left)

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()


_SHOWN = ("loss", "accuracy", "images_per_second", "data_wait", "eval_top1", "views_per_second",
          "compilations")


def format_seconds(seconds: float) -> str:
    """1:05 or 2:03:04."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def last_seconds(path: Path) -> float:
    """The training time that the last line of a metrics.jsonl states; 0 for a new run."""
    lines = read_metrics(path)
    return lines[-1]["seconds"] if lines else 0.0
