"""Class names: read from files, matched, and heads that follow them."""

import numpy as np
import pytest

from tinyvit_jax import heads


def test_class_names_are_one_a_line(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("great white shark\n b \n\nc\n", encoding="utf-8")
    assert heads.read_class_names(path) == ("great white shark", "b", "c")
    assert heads.read_class_names(path, 3) == ("great white shark", "b", "c")
    with pytest.raises(heads.WeightsError, match=r"3 names \(great white .*4 classes"):
        heads.read_class_names(path, 4)
    with pytest.raises(heads.WeightsError, match=r"nowhere\.txt does not exist"):
        heads.read_class_names(tmp_path / "nowhere.txt")


def test_the_originals_list_of_indices(tmp_path):
    indices = [3 * i + 5 for i in range(1000)]
    indices[7] = -1
    ids = tuple(f"n{i:08d}" for i in range(1000))
    path = tmp_path / "imagenet_1kto22k.txt"
    path.write_text("\n".join(map(str, indices)))
    names = heads.read_class_names(path, imagenet_names=ids)
    assert len(names) == 21841
    assert [names[i] for i in (5, 8, 26, 29, 3002)] == [ids[0], ids[1], "class 26", ids[8],
                                                        ids[999]]
    assert sum(name.startswith("n") for name in names) == 999
    assert heads.read_class_names(path, 21841, ids) == names
    with pytest.raises(heads.WeightsError, match="not what they are called: 0 names"):
        heads.read_class_names(path, 21841)
    with pytest.raises(heads.WeightsError, match="2000 classes: its largest index is 3002"):
        heads.read_class_names(path, 2000, ids)
    path.write_text("\n".join(map(str, range(1000))))
    assert heads.read_class_names(path) == tuple(map(str, range(1000)))  # names that are numbers


@pytest.mark.torch
def test_from_22k_to_1k_as_the_original_does(tmp_path):
    """Its rule on its own list, in torch: the rows, their mean at the end, indexed by the list."""
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    mapping = torch.tensor(generator.permutation(21841)[:1000])
    mapping[13] = -1
    head = {"kernel": generator.normal(size=(4, 21841)).astype(np.float32),
            "bias": generator.normal(size=21841).astype(np.float32)}
    path = tmp_path / "list.txt"
    path.write_text("".join(f"{i}\n" for i in mapping.tolist()))
    ids = tuple(f"n{i:08d}" for i in range(1000))
    found = heads.map_head({"params": {"head": head}},
                           heads.read_class_names(path, imagenet_names=ids), ids)
    for leaf, value in head.items():
        rows = torch.from_numpy(value.T)
        mean = rows[mapping[mapping != -1]].mean(0, keepdim=True)
        expected = torch.cat([rows, mean])[mapping]
        np.testing.assert_allclose(found["params"]["head"][leaf].T, expected, atol=1e-6)


def test_classes_of_one_name_are_refused(tmp_path):
    variables = {"params": {"head": {"bias": np.zeros(3, np.float32)}}}
    with pytest.raises(heads.WeightsError, match=r"1 class names stand twice \(crane\)"):
        heads.map_head(variables, ("crane", "dog", "crane"), ("dog", "crane", "cat"))
    (tmp_path / "names.txt").write_text("crane\ndog\ncrane\n")
    with pytest.raises(heads.WeightsError, match="stand twice"):
        heads.read_class_names(tmp_path / "names.txt")
