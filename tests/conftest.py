"""Set-up of the whole suite: tests run on the CPU and leave nothing outside of tmp_path."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
