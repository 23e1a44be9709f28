"""A workdir keeps to the config that its run began with."""

import shutil

import pytest
import tiny

from tinyvit_jax import resume, train


def record(config, workdir):
    data = train.open_data(config)
    resume.record_config(config, workdir,
                         {"train": data.train.fingerprint, "eval": data.eval.fingerprint})


def make_config(folder, **changes):
    c = tiny.make_config(folder)
    c.update_from_flattened_dict(changes)
    return c


def test_another_config_does_not_resume(tmp_path):
    folder = tiny.make_folder(tmp_path / "images")
    c = make_config(folder)
    record(c, tmp_path)
    moved = make_config(shutil.copytree(folder, tmp_path / "moved"), **{"data.threads": 7})
    record(moved, tmp_path)
    with pytest.raises(resume.ResumeError, match=r"optim\.learning_rate was 0\.05, now 0\.1"):
        record(make_config(folder, **{"optim.learning_rate": 0.1}), tmp_path)
    (tmp_path / "moved" / "blobs" / "000.jpg").unlink()
    with pytest.raises(resume.ResumeError, match=r"images\.train was"):
        record(moved, tmp_path)
