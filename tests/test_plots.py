import cv2
import numpy as np
import pytest

from tinyvit_jax import evaluate, plots, report
from tinyvit_jax.evaluate import Judged


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


def judge(classes, none=0):
    """Six images of each class, two of which are taken for the next class; some without answer."""
    label = np.arange(classes * 6) % classes
    rank = (np.arange(classes * 6) % 7 > 4).astype(np.int32)
    predicted = np.where(rank == 0, label, (label + 1) % classes)
    predicted[:none], rank[:none] = -1, evaluate.BROKEN
    judged = Judged(label, predicted, np.linspace(0.2, 1, len(label)), rank, rank * 1.0)
    made = {"source": "tfds:a_$et", "split": "test", **evaluate.score(judged),
            **report.make_report(judged, tuple(f"class $_{i}^ of a long name" for i in
                                               range(classes)))}
    return made, report.count_confusion(judged)


def draw_report(classes, path):
    plots.plot_report(*judge(classes), path)
    return cv2.imread(str(path))


def test_a_report_of_few_and_of_many_classes(tmp_path):
    """The blue of a confusion matrix' diagonal is in the left third for few classes alone."""
    few, many = (draw_report(n, tmp_path / f"{n}.png") for n in (3, 31))
    for picture in (few, many):
        assert picture.shape[1] > 2 * picture.shape[0]
    left_few, left_many = (p[:, :p.shape[1] // 3].astype(int) for p in (few, many))
    assert ((left_few[..., 0] - left_few[..., 2]) > 60).mean() > 0.1
    assert ((left_many[..., 0] - left_many[..., 2]) > 60).mean() < 0.01
    assert ((left_many[..., 2] - left_many[..., 0]) > 60).mean() > 0.1  # bars, orange


@pytest.mark.parametrize(("classes", "none"), [(3, 0), (10, 4), (100, 7)])
def test_a_confusion_matrix_has_a_cell_for_each_pair(classes, none, tmp_path):
    """The dark diagonal and the paler one beside it are there, and each cell has pixels enough."""
    plots.plot_confusion(*judge(classes, none), tmp_path / "it.png")
    picture = cv2.imread(str(tmp_path / "it.png")).astype(int)
    blue = picture[..., 0] - picture[..., 2]
    rows, columns = np.flatnonzero((blue > 60).sum(1) > 3), np.flatnonzero((blue > 60).sum(0) > 3)
    assert rows[-1] - rows[0] > 13 * classes
    assert columns[-1] - columns[0] > 13 * classes
    assert max(picture.shape) < 2400


def test_teachers_of_one_student(tmp_path):
    """Filled students, hollow teachers, a dashed line for labels alone; also without sizes."""
    row = {"temperature": 1.0, "student_top1": 80.0, "low": 79.0, "high": 81.0}
    taught = [{**row, "teacher": f"x{n} $", "entropy_views": 1 / n, "agreement": 90.0 - n,
               "teacher_top1": 80.0 + n, "parameter_ratio": ratio, "entropy": 0.1}
              for n, ratio in ((1, 1.0), (2, 3.9), (4, 15.4), (5, None))]
    mean = sum([0.1] * 3) / 3  # of three seeds that agree, and above each of them
    assert mean > 0.1
    taught.append({**taught[0], "student_top1": mean, "low": 0.1, "high": 0.1})
    result = {"rows": [{**row, "teacher": "labels only"}, *taught], "uniform_entropy": 2.3,
              "student": {"parameters": 1234}}
    for name, rows in (("all", result["rows"]), ("none", result["rows"][:1])):
        plots.plot_teachers({**result, "rows": rows}, tmp_path / f"{name}.png")
        picture = cv2.imread(str(tmp_path / f"{name}.png"))
        assert picture.shape[1] > 2.5 * picture.shape[0]
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 5
