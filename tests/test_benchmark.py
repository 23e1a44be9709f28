import json

import pytest

from tinyvit_jax import benchmark
from tinyvit_jax import config as configs


def make_config():
    c = configs.default()
    c.model.update({"name": "tiny_vit", "image_size": 16, "stem_strides": (2, 1),
                    "embed_dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1),
                    "num_heads": (1, 1, 1, 1), "window_sizes": (4, 4, 4, 4)})
    c.benchmark.update({"batch_sizes": (1, 4), "dtypes": ("float32",), "seconds": 0.01})
    configs.check(c)
    return c


def test_run_writes_what_it_prints(tmp_path, capsys):
    result = benchmark.run(make_config(), tmp_path)
    assert json.loads((tmp_path / "benchmark.json").read_text()) == result
    assert [(r["dtype"], r["batch_size"]) for r in result["rows"]] == [("float32", 1),
                                                                       ("float32", 4)]
    for row in result["rows"]:
        assert 0 < row["images_per_second_low"] <= row["images_per_second"]
        assert row["images_per_second"] <= row["images_per_second_high"]
        seconds = row["milliseconds"] / 1000
        assert row["images_per_second"] * seconds == pytest.approx(row["batch_size"], rel=0.5)
        assert row["compile_seconds"] > 0
        assert row["calls"] >= 3
    printed = capsys.readouterr().out
    assert f"{result['parameters']:,} parameters" in printed
    assert "1 cpu device(s)" in printed
    assert printed.count("float32") == 2


def test_it_takes_onednn_where_it_is_on(tmp_path, given_to_onednn):
    benchmark.run(make_config(), tmp_path)
    assert given_to_onednn == {"apply"}


@pytest.mark.parametrize(("key", "value"), [("batch_sizes", ()), ("batch_sizes", (0,)),
                                            ("dtypes", ()), ("dtypes", ("float16",)),
                                            ("seconds", 0.0)])
def test_what_cannot_be_measured_is_named(key, value):
    c = make_config()
    c.benchmark[key] = value
    with pytest.raises(configs.ConfigError, match=rf"--config\.benchmark\.{key}="):
        configs.check(c)
