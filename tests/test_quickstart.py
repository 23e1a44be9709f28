"""The README's first command at its full size."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tinyvit_jax import weights
from tinyvit_jax.convert import files, tinyvit

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_distillation_beats_labels_within_minutes(tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tinyvit_jax.main", "--config=configs/quickstart.py",
         f"--workdir={tmp_path}"], cwd=ROOT, capture_output=True, text=True,
        env={"PATH": "/usr/bin", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert time.monotonic() - began < 360
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["teacher_top1"] > 85
    assert result["student_top1"] > result["label_only_top1"] > 75
    assert result["store_bytes_per_view"] < 25
    state = files.read_state(tmp_path / "student.safetensors")
    trained = weights.load_run(tmp_path)
    again = tinyvit.from_torch(state, trained.model)
    np.testing.assert_array_equal(again["params"]["head"]["kernel"],
                                  trained.variables["params"]["head"]["kernel"])
