import json
from pathlib import Path

import pytest

from tinyvit_jax import log


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.json"
    log.write_json(path, {"a": 1})
    monkeypatch.setattr(log.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match=r"deep/a\.json cannot be written: full\. Free some space"):
        log.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_metrics_resume_without_repeated_or_cut_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "seconds": 1.0}\n{"step": 2, "seconds": 2.0}\n'
                    '{"step": 3, "seconds": 3.0}\n{"step": 4, "sec')
    assert [m["step"] for m in log.read_metrics(path)] == [1, 2, 3]
    progress = log.Progress("t", 10, start=2, path=path, quiet=True)
    progress.report(3, {"loss": float("nan"), "seconds": 2.5})
    progress.close()
    assert [m["step"] for m in log.read_metrics(path)] == [1, 2, 3]
    assert log.read_metrics(path)[-1]["loss"] is None
    assert log.last_seconds(path) == 2.5


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65, "1:05"), (7384, "2:03:04")])
def test_format_seconds(seconds, text):
    assert log.format_seconds(seconds) == text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to fill up")
def test_a_full_disk_names_the_metrics_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    progress = log.Progress("t", 10, path=path, quiet=True)
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: No space left"):
        progress.report(1, {"loss": 1.0})
    progress.close()
