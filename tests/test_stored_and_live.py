"""The same student on the same views, taught by a store and by the live teacher it was taken from.

Both losses are the cross-entropy with the teacher's softened answers but for its entropy, which the
live objective leaves out and logs. What is left is how the store rounds, and, where it keeps fewer
classes than there are, how it spreads the rest.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_clip

from tinyvit_jax import log, recipe, teachers, train, weights
from tinyvit_jax import mesh as meshes
from tinyvit_jax.data import augment, pipeline

T = 2.0
STEPS, BATCH = 6, 8
# Of probabilities; 2^-11 is float16's own, and what compact blocks keep to is KL 2e-4 at most
# (tests/test_codec.py), so by Pinsker's inequality at most sqrt(2 * 2e-4) of all classes together.
ROUNDING = {"float16": 2.0**-11, "compact": 0.02}


def make_config(folder, workdir, objective, **changes):
    c = tiny.make_config(folder)
    c.objective.update({"name": objective, "alpha": 1.0, "kind": "soft", "temperature": T})
    c.teacher.update({key: () for key in ("embed_dims", "depths", "num_heads", "window_sizes",
                                          "stem_strides")})
    c.teacher.update({"name": "", "weights": str(workdir), "image_size": 0, "epochs": 0})
    c.store.update({"top_k": 3, "temperature": T, "capture": False})
    c.train.epochs = STEPS * BATCH / 33
    c.optim.learning_rate = 0.01
    c.checkpoint.every_epochs = c.eval.every_epochs = 9.0
    c.log_every = 1
    c.update_from_flattened_dict(changes)
    return c


class Home:
    """Images, a teacher, a store of each codec, and runs that are done once."""

    def __init__(self, root):
        self.root, self.done = root, {}
        self.folder = tiny.make_folder(root / "images")
        model = tiny_clip.make_small(3, image_size=24, depths=(1,))
        weights.save_trained(weights.Trained(
            model, tiny_clip.random_variables(model), tiny.CLASSES[::-1], (0.1, 0.2, 0.3),
            (0.5, 0.6, 0.7), "center", 1.0), root / "teacher")
        self.data = train.open_data(self.make("live_teacher"))
        self.save_student()
        self.stores = {codec: recipe.fill_store(
            self.make("stored_logits", **{"store.codec": codec}), root / codec, self.data,
            meshes.make_mesh())[0] for codec in ROUNDING}

    def make(self, objective, **changes):
        return make_config(self.folder, self.root / "teacher", objective,
                           **{"model.init_from": str(self.root / "student"), **changes})

    def save_student(self):
        """First weights of a student that has opinions: to a new one all targets are alike."""
        model = train.make_student(self.make("live_teacher"), self.data)
        images = jnp.zeros((1, 16, 16, 3))
        start = jax.device_get(jax.jit(lambda key: model.init(key, images, train=False))(
            jax.random.key(3)))
        start["params"]["head"]["kernel"] = 50 * start["params"]["head"]["kernel"]
        self.start = start
        weights.save_trained(weights.Trained(model, start, tiny.CLASSES, (0.4,) * 3, (0.2,) * 3,
                                             "center", 1.0), self.root / "student")

    def teacher(self):
        return teachers.make_teacher(self.make("live_teacher").teacher, tiny.CLASSES, 16,
                                     meshes.make_mesh(), T)

    def run(self, name):
        """The lines of a run: "live", "compact", "float16", "one class", "live, one class"."""
        if name not in self.done:
            stored = self.stores.get({"one class": "compact"}.get(name, name))
            c = self.make("stored_logits" if stored else "live_teacher",
                          **({"store.top_k": 1} if name == "one class" else {}))
            teacher = None if stored else self.teacher()
            if name == "live, one class":
                teacher = keep_one(teacher)
            place = self.root / name.replace(", ", "-")
            train.fit(c, place, self.data, stored, teacher=teacher)
            lines = log.read_metrics(place / "metrics.jsonl")
            self.done[name] = [m for m in lines if m["step"]]  # 0: what the student began with
            assert len(self.done[name]) == STEPS
        return self.done[name]

    def losses(self, name):
        """Cross-entropies of the updates' batches, with the factor T^2."""
        return np.array([m["loss"] + T**2 * m.get("teacher_entropy", 0.0) for m in self.run(name)])

    def first_batch(self):
        """What live teacher, each store and the student say of it at T: float64 [B, C] each, log.
        """
        c = self.make("stored_logits")
        spec, mesh, said = augment.make_spec(c.augment, 16), meshes.make_mesh(), {}
        for codec, store in self.stores.items():
            batch = pipeline.Views(self.data.train, spec, self.data.order, store).read(
                np.arange(BATCH))
            dense = np.zeros((BATCH, 3))
            np.put_along_axis(dense, batch["index"], batch["prob"].astype(np.float64), -1)
            said[codec] = np.log(dense)
        pixels = train.mix.view_pixels(meshes.put_batch(batch, mesh))
        said["live"] = np.asarray(self.teacher().log_probs(pixels), np.float64)
        model = train.make_student(c, self.data)
        logits, _ = jax.jit(lambda x: model.apply(
            self.start, x, train=True, mutable=["batch_stats"],
            rngs={"drop_path": jax.random.fold_in(jax.random.key(c.seed), 0)}))(
                train.mix.normalize(pixels, c.data.mean, c.data.std))
        said["student"] = np.asarray(jax.nn.log_softmax(logits / T), np.float64)
        return said


def spread_tail(log_prob):
    """The top class as it is, and what it leaves over spread evenly."""
    best = log_prob.max(-1, keepdims=True)
    rest = jnp.log1p(-jnp.exp(best)) - jnp.log(log_prob.shape[-1] - 1.0)
    return jnp.where(log_prob == best, best, rest)


def keep_one(teacher):
    """The teacher as a store of one class shows it."""
    rows, own = meshes.sharded(meshes.make_mesh()), teacher.log_probs
    compiled = jax.jit(spread_tail, out_shardings=rows)
    return teacher._replace(log_probs=lambda pixels: compiled(own(pixels)))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("home"))


def cross_entropy(target, student):
    """T^2 times that of log-probabilities [B, C], mean of the rows."""
    return T**2 * -(np.exp(target) * student).sum(-1).mean()


@pytest.mark.parametrize("codec", sorted(ROUNDING))
def test_a_store_of_all_classes_teaches_as_the_teacher_does(home, codec):
    said, own, other = home.first_batch(), home.losses("live"), home.losses(codec)
    live, stored, student = (said[k] for k in ("live", codec, "student"))
    for said_of in (live, student):  # both tell views apart
        assert np.ptp(np.exp(said_of), 0).max() > 0.05
    apart = np.abs(np.exp(stored) - np.exp(live)).sum(-1).max()
    assert 0 < apart <= ROUNDING[codec]
    # The first update, from the same weights: what the codec rounds and nothing else.
    assert own[0] == pytest.approx(cross_entropy(live, student), rel=1e-5)
    assert other[0] == pytest.approx(cross_entropy(stored, student), rel=1e-5)
    # Later ones, whose weights drift apart by it: within what the codec may round.
    most = T**2 * ROUNDING[codec] * np.abs(student).max()
    print(f"{codec}: targets apart {apart:.1e}, losses {np.abs(other - own)} of {own}, at most "
          f"{most:.1e}")
    assert np.abs(other - own).max() <= most
    assert np.ptp(own) > 10 * np.abs(other - own).max()  # and the student learns meanwhile


def test_what_a_store_of_fewer_classes_loses_is_its_tail(home):
    """Evenly spread, as the store assumes it, the live teacher says the same again."""
    whole, stored, spread = (home.losses(name) for name in (
        "live", "one class", "live, one class"))
    said = home.first_batch()
    even = np.asarray(spread_tail(jnp.asarray(said["live"])), np.float64)
    assert spread[0] == pytest.approx(cross_entropy(even, said["student"]), rel=1e-5)
    tail = cross_entropy(even, said["student"]) - cross_entropy(said["live"], said["student"])
    most = T**2 * ROUNDING["compact"] * np.abs(said["student"]).max()
    print(f"tail {tail:.1e}: {stored - whole}, rounding {stored - spread}, at most {most:.1e}")
    np.testing.assert_allclose(stored, spread, atol=most)
    assert abs(stored[0] - spread[0]) < abs(tail) / 5
    assert stored[0] - whole[0] == pytest.approx(tail, abs=abs(tail) / 5)
