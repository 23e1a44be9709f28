"""The floors of the house, read from the source: who may import what, and how large a room is."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tinyvit_jax"

NUMPY = {"numpy"}
JAX = {"jax", "numpy"}
GROUND = {"batch"}
HOST = {"cores", "data.draws", "data.order", "data.ops", "data.jpeg", "data.color", "data.warp",
        "data.ppm", "data.rand_augment", "data.slots", "data.spec",
        "data.microsoft", "data.augment", "data.source", "data.folder",
        "data.pack", "data.tfds", "data.binary", "data.images", "data.finder", "data.labels",
        "store.codec", "store.codec_v1", "store.levels", "store.sections", "store.keys",
        "store.files", "store.place", "store.remote", "store.claims", "store.manifest",
        "store.blocks", "store.store", "store.shards", "store.rows", "store.edit", "store.merge",
        "store.stats", "store.microsoft"}
DEVICE = {"mix", "mesh", "onednn", "optim", "objectives", "objectives.supervised",
          "objectives.stored_logits", "objectives.live_teacher", "models", "models.bases",
          "models.attention", "models.convolution", "models.forms", "models.layers",
          "models.tinyvit", "models.clip", "models.cost", "models.tokens", "models.vit",
          "models.vit_blocks", "models.grouped", "models.residual", "models.resnet",
          "models.regnet", "models.convnext"}
WEIGHTS = {"convert", "convert.files", "convert.pickles", "convert.resize", "convert.shape",
           "convert.tinyvit", "convert.clip", "convert.vit", "convert.tree", "convert.fill",
           "checkpoint", "convert.convnets", "convert.resnet", "convert.regnet", "convert.convnext",
           "heads", "weights", "log"}
MIDDLE = WEIGHTS | {"evaluate", "team", "teachers", "capture", "report", "measure", "plots",
                    "config", "matching", "forecast", "scores"}
LOOP = {"feed", "live", "memory", "meter", "packing", "program", "resident", "resume"}

# module or package: (modules of the project it may import, outside packages it may import)
FLOORS = {
    "__init__": ({"inference", "models", "weights"}, set()),
    "batch": (set(), NUMPY),
    "cores": (set(), set()),
    "config": (set(), {"ml_collections"}),
    "stages": ({"config"}, {"ml_collections"}),
    "small": ({"config"}, {"ml_collections"}),
    "log": (set(), {"tqdm"}),
    "plots": ({"log"}, NUMPY | {"matplotlib"}),
    "compile_cache": (set(), set()),
    "cli": ({"compile_cache", "config", "log", "onednn"}, {"absl", "ml_collections", "jax"}),
    "data.draws": (set(), NUMPY),
    "data.order": ({"data.draws", "store.manifest", "store.store"}, NUMPY),
    "data.jpeg": (set(), NUMPY | {"simplejpeg"}),
    "data.ppm": (set(), NUMPY),
    "data.ops": ({"data.jpeg", "data.ppm"}, NUMPY | {"cv2"}),
    "data.color": ({"data.ops"}, NUMPY | {"cv2"}),
    "data.warp": ({"data.ops"}, NUMPY | {"cv2"}),
    "data.spec": ({"data.rand_augment"}, set()),
    "data.slots": (set(), set()),
    "data.augment": ({"data.draws", "data.ops", "data.rand_augment", "data.microsoft",
                      "data.slots", "data.spec"}, NUMPY),
    "data.rand_augment": ({"data.draws", "data.ops", "data.color", "data.warp"}, NUMPY),
    "data.microsoft": ({"data.ops", "data.rand_augment", "data.spec"}, NUMPY | {"PIL"}),
    "data.source": ({"data.draws"}, NUMPY),
    "data.finder": ({"data.source"}, NUMPY),
    "data.labels": ({"data.source"}, NUMPY),
    "data.folder": ({"data.source"}, NUMPY),
    "data.pack": ({"cores", "data.source", "data.ops"}, NUMPY | {"array_record"}),
    "data.tfds": ({"data.source"}, NUMPY | {"tensorflow_datasets"}),
    "data.binary": ({"data.source", "data.ppm"}, NUMPY),
    "data.images": ({"data.source", "data.folder", "data.pack", "data.tfds", "data.binary"},
                    set()),
    "data.pipeline": (GROUND | HOST, NUMPY | {"grain", "absl"}),
    "store.sections": (set(), NUMPY | {"zstandard"}),
    "store.levels": (set(), NUMPY),
    "store.codec": ({"store.codec_v1", "store.levels", "store.sections"}, NUMPY),
    "store.codec_v1": ({"store.sections"}, NUMPY),
    "store.keys": (set(), NUMPY),
    "store.files": (set(), set()),
    "store.place": ({"store.files", "store.remote"}, set()),
    "store.remote": ({"store.files"}, {"fsspec"}),
    "store.claims": ({"store.files", "store.place", "store.manifest"}, set()),
    "store.manifest": ({"store.codec", "store.place"}, set()),
    "store.shards": ({"store.blocks", "store.files", "store.place", "store.manifest"},
                     NUMPY | {"array_record"}),
    "store.rows": (HOST, NUMPY),
    "store.blocks": ({"store.codec", "store.keys", "store.manifest"}, NUMPY | {"array_record"}),
    "store.store": ({"store.blocks", "store.keys", "store.files", "store.place",
                     "store.shards", "store.manifest"},
                    NUMPY | {"array_record"}),
    "store.edit": (HOST, NUMPY | {"pyarrow"}),
    "store.merge": (HOST, NUMPY),
    "store.stats": (HOST, NUMPY),
    "store.microsoft": ({"store.codec", "store.manifest"}, NUMPY),
    "models": (DEVICE, JAX | {"flax"}),
    "models.bases": (DEVICE, JAX | {"flax"}),
    "models.layers": (DEVICE, JAX | {"flax"}),
    "models.tinyvit": (DEVICE, JAX | {"flax"}),
    "models.cost": (DEVICE, JAX | {"flax"}),
    "models.clip": (DEVICE, JAX | {"flax"}),
    "models.tokens": (DEVICE, JAX | {"flax"}),
    "models.vit": (DEVICE, JAX | {"flax"}),
    "models.vit_blocks": (DEVICE, JAX | {"flax"}),
    "models.forms": (set(), {"jax"}),
    "onednn": (set(), {"jax"}),
    "inference": ({"onednn"}, {"jax"}),
    "models.grouped": ({"models.forms"}, JAX),
    "models.convolution": ({"models.forms", "models.grouped"}, JAX),
    "models.attention": ({"models.forms"}, JAX),
    "models.residual": (DEVICE, JAX | {"flax"}),
    "models.resnet": (DEVICE, JAX | {"flax"}),
    "models.regnet": (DEVICE, JAX | {"flax"}),
    "models.convnext": (DEVICE, JAX | {"flax"}),
    "objectives": (DEVICE, JAX | {"ml_collections"}),
    "objectives.supervised": (DEVICE, JAX),
    "objectives.stored_logits": (DEVICE, JAX),
    "objectives.live_teacher": (DEVICE, JAX),
    "mix": (DEVICE, JAX),
    "mesh": (DEVICE, JAX),
    "optim": (DEVICE | {"packing"}, JAX | {"optax", "ml_collections"}),
    "convert": (WEIGHTS, NUMPY),
    "convert.files": (WEIGHTS, NUMPY | {"torch", "safetensors"}),
    "convert.pickles": (set(), NUMPY),
    "convert.resize": (WEIGHTS, NUMPY),
    "convert.shape": (WEIGHTS, set()),
    "convert.tinyvit": (WEIGHTS, NUMPY),
    "convert.clip": (WEIGHTS, NUMPY),
    "convert.vit": (WEIGHTS, NUMPY),
    "convert.convnets": (WEIGHTS, NUMPY),
    "convert.resnet": (WEIGHTS, set()),
    "convert.regnet": (WEIGHTS, set()),
    "convert.convnext": (WEIGHTS, set()),
    "convert.tree": (set(), NUMPY),
    "convert.fill": (WEIGHTS, NUMPY),
    "checkpoint": (set(), {"jax", "orbax"}),
    "heads": ({"log", "convert.files"}, NUMPY),
    "weights": (WEIGHTS | DEVICE, JAX | {"ml_collections"}),
    "evaluate": (DEVICE, JAX),
    "scores": (set(), NUMPY),
    "report": ({"log", "evaluate", "scores"}, NUMPY),
    "measure": (MIDDLE | DEVICE | HOST | {"data.pipeline"}, JAX | {"ml_collections"}),
    "importing": ({"log"} | HOST, NUMPY),
    "team": (set(), JAX),
    "teachers": (WEIGHTS | DEVICE | {"evaluate", "team"}, JAX | {"ml_collections"}),
    "forecast": (MIDDLE | DEVICE | HOST | {"data.pipeline"}, JAX | {"ml_collections"}),
    "capture": (MIDDLE | DEVICE | HOST | {"data.pipeline"}, JAX | {"ml_collections"}),
    "matching": (MIDDLE | HOST | {"data.pipeline"}, NUMPY | {"ml_collections"}),
    "hashing": (set(), {"jax"}),
    "resident": ({"hashing", "mesh", "onednn", "data.ops", "data.slots", "data.images",
                  "data.order", "data.spec"}, JAX | {"ml_collections"}),
    "feed": ({"live", "log", "memory", "meter", "mesh", "program", "resident", "teachers",
              "data.pipeline"}, JAX | {"ml_collections"}),
    "live": ({"memory", "mesh", "mix", "program", "teachers"}, {"jax"}),
    "memory": ({"config"}, JAX | {"ml_collections"}),
    "meter": ({"log"}, {"jax"}),
    "packing": (set(), JAX),
    "program": ({"log", "memory"}, {"jax"}),
    "resume": ({"log"}, {"jax", "ml_collections"}),
    "train": (MIDDLE | LOOP | DEVICE | HOST | {"data.pipeline"},
              JAX | {"optax", "ml_collections"}),
    "recipe": (MIDDLE | DEVICE | HOST | {"data.pipeline", "train"}, JAX | {"ml_collections"}),
    "compare": (MIDDLE | LOOP | DEVICE | HOST | {"data.pipeline", "train", "recipe"},
                JAX | {"ml_collections"}),
    "benchmark": (WEIGHTS | DEVICE, JAX | {"ml_collections"}),
    "main": ({"cli", "recipe", "benchmark"}, {"absl", "jax"}),
}
ONE_PLACE = {"grain": "data.pipeline", "orbax": "checkpoint", "matplotlib": "plots",
             "cv2": ("data.ops", "data.color", "data.warp"), "simplejpeg": "data.jpeg",
             "tensorflow_datasets": "data.tfds", "optax": ("optim", "train"),
             "PIL": "data.microsoft", "zstandard": "store.sections", "fsspec": "store.remote"}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1]) if parts[-1] == "__init__" and len(parts) > 1 else (
            ".".join(parts))
        found[name] = path
    return found


def imports(path: Path, known: set[str]) -> tuple[set[str], set[str]]:
    """Modules of the project and outside packages that a file imports, lazily ones included."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "", [alias.name for alias in node.names])]
        else:
            continue
        for module, items in names:
            top, _, rest = module.partition(".")
            if top == "tinyvit_jax":
                whole = [".".join(filter(None, (rest, item))) for item in items]
                inside |= {w if w in known else rest for w in whole} if items else {rest}
            else:
                outside.add(top)
    return inside - {""}, outside


def is_standard(name: str) -> bool:
    import sys

    return name in sys.stdlib_module_names


@pytest.mark.parametrize("name", sorted(modules()))
def test_floor(name):
    path = modules()[name]
    inside, outside = imports(path, set(modules()))
    outside = {o for o in outside if not is_standard(o)}
    if name in ("data", "store"):
        assert not inside
        assert not outside
        return
    assert name in FLOORS, f"{name} has no line in the floor table"
    may_inside, may_outside = FLOORS[name]
    assert inside <= may_inside
    assert outside <= may_outside


@pytest.mark.parametrize(("package", "owner"), sorted(ONE_PLACE.items()))
def test_third_party_api_has_one_user(package, owner):
    users = {n for n, p in modules().items() if package in imports(p, set(modules()))[1]}
    assert users == {owner} if isinstance(owner, str) else set(owner)


@pytest.mark.parametrize("name", sorted(modules()))
def test_rooms_stay_small(name):
    tree = ast.parse(modules()[name].read_text())
    assert len(modules()[name].read_text().splitlines()) <= 450
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and name != "config":
            assert node.end_lineno - node.lineno < 90, node.name


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda p: p.name)
def test_tools_are_thin(path):
    assert len(path.read_text().splitlines()) <= 120


def test_no_tensorflow_and_lazy_import():
    """Importing the package loads nothing heavy, and nothing ever imports TensorFlow."""
    import subprocess
    import sys

    code = ("import sys, tinyvit_jax; heavy = {'jax', 'flax', 'cv2', 'grain', 'orbax', 'torch', "
            "'matplotlib', 'tensorflow_datasets'} & set(sys.modules); sys.exit(str(heavy or ''))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip() == ""
    for path in modules().values():
        assert "tensorflow" not in imports(path, set(modules()))[1]
