import cv2
import numpy as np

from tinyvit_jax import plots


def test_curves_of_two_runs(tmp_path):
    lines = [{"step": s, "loss": 1 / s, "learning_rate": 0.1 * s} for s in range(1, 20)]
    lines[9] |= {"eval_top1": 50.0}
    plots.plot_curves({"student": lines, "twin": [*lines, {"step": 20, "loss": None}]},
                      tmp_path / "curves.png")
    picture = cv2.imread(str(tmp_path / "curves.png"))
    assert picture.shape[1] > 2 * picture.shape[0]
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20  # two colours, antialiased


def test_views_are_drawn_in_their_colours(tmp_path):
    pixels = np.zeros((7, 4, 4, 3))
    pixels[:, :, :, 0] = 255  # red
    plots.plot_views(pixels, [f"label: {i}" for i in range(7)], tmp_path / "views.png")
    picture = cv2.imread(str(tmp_path / "views.png"))
    assert (picture == (0, 0, 255)).all(-1).mean() > 0.2
