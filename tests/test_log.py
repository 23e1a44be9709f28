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


def test_a_long_work_speaks_at_intervals(monkeypatch, caplog):
    caplog.set_level("INFO")
    now = [50.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    progress = log.Progress("capture", 100, every=60.0)
    assert progress.is_due()
    for _ in range(13):
        if progress.is_due():
            progress.say(40, "3 of 9 shards", eta=65)
        now[0] += 10
    progress.close()
    assert caplog.messages == ["capture 40/100  3 of 9 shards  left 1:05"] * 3


def test_without_an_interval_every_report_is_a_line(caplog):
    caplog.set_level("INFO")
    progress = log.Progress("train", 4)
    for step in range(1, 4):
        assert progress.is_due()
        progress.report(step, {"loss": 0.5, "hidden": 1.0}, eta=2.0 * (4 - step))
    progress.close()
    assert caplog.messages == ["train 1/4  loss 0.5  left 0:06", "train 2/4  loss 0.5  left 0:04",
                               "train 3/4  loss 0.5  left 0:02"]


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
