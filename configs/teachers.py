"""Which teacher suits a small student: twice and four times as wide, and the large one's assistant.

Data     10,000 + 2,000 images of Fashion-MNIST, shipped inside the package
Command  python tools/compare_teachers.py --config=configs/teachers.py --workdir=runs/teachers
Cost     seven short trainings of students and four of teachers: ten minutes on two cores
Result   78.0 to 78.5 from each teacher at T = 1, 76.8 from labels; docs/teachers.md has the table
"""

from tinyvit_jax import config as configs


def get_config():
    """A student that is smaller than the quickstart's, so that teachers of 16 times fit a laptop.
    """
    c = configs.default()
    c.data.source = "embedded"
    c.data.mean, c.data.std = (0.286,) * 3, (0.353,) * 3
    c.augment.update({"spec": "small", "pad": 2, "rand_augment": "", "color_jitter": 0.0})

    # At 32 pixels the stages see maps of 8, 4, 2 and 1 tokens: each is one window.
    shape = {"name": "tiny_vit", "image_size": 32, "depths": (1, 1, 1, 1),
             "window_sizes": (8, 4, 2, 1)}
    c.model.update({**shape, "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4)})
    # Of a plain run of this config; a comparison takes the shape from compare.teachers.
    c.teacher.update({**shape, "embed_dims": (16, 32, 48, 64), "num_heads": (2, 4, 6, 8)})
    c.teacher.epochs = 8
    c.teacher.learning_rate = 3e-3

    c.objective.update({"name": "live_teacher", "kind": "soft", "alpha": 0.9, "temperature": 1.0})
    c.compare.teachers = ("x2", "x4", "x4>x2")
    c.compare.temperatures = (1.0, 4.0)

    c.train.batch_size = 100
    c.train.epochs = 5.0
    c.optim.update({"scale_by_batch": False, "learning_rate": 3e-3, "warmup_learning_rate": 1e-5,
                    "min_learning_rate": 1e-5, "warmup_epochs": 1.0})
    c.eval.crop_ratio = 1.0
    c.eval.every_epochs = 5.0
    c.checkpoint.every_epochs = 1.0
    c.log_every = 25
    return c
