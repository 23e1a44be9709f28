"""A workdir keeps to the config that its run began with."""

import json
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


@pytest.mark.parametrize("sign", ["metrics.jsonl", "checkpoints/2"])
def test_another_config_does_not_resume(tmp_path, sign):
    """But one that never came to an update leaves its workdir to what its error advised."""
    folder = tiny.make_folder(tmp_path / "images")
    record(make_config(folder, **{"optim.learning_rate": 0.9}), tmp_path)
    c = make_config(folder)
    record(c, tmp_path)
    (tmp_path / sign).parent.mkdir(exist_ok=True)
    (tmp_path / sign).touch()
    moved = make_config(shutil.copytree(folder, tmp_path / "moved"), **{"data.threads": 7})
    record(moved, tmp_path)
    with pytest.raises(resume.ResumeError, match=r"optim\.learning_rate was 0\.05, now 0\.1"):
        record(make_config(folder, **{"optim.learning_rate": 0.1}), tmp_path)
    (tmp_path / "moved" / "blobs" / "000.jpg").unlink()
    with pytest.raises(resume.ResumeError, match=r"images\.train was"):
        record(moved, tmp_path)


def test_a_run_whose_config_had_fewer_keys_resumes_as_it_was(tmp_path):
    c = make_config(tiny.make_folder(tmp_path / "images"), **{"augment.pixels": "exact"})
    record(c, tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["augment"]["pixels"], fields["objective"]["temperature"]
    path.write_text(json.dumps(fields))
    c.augment.pixels = "fast"
    with pytest.raises(resume.ResumeError, match=r"augment\.pixels was exact, now fast"):
        record(c, tmp_path)
    c.augment.pixels = "exact"
    record(c, tmp_path)
