"""Images of a prepared set of tensorflow-datasets, read without TensorFlow."""

import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinyvit_jax.data.source import Example, Fingerprint, SourceError, read_keys

# The feature of all right classes of an image, any number of them, and that of the one class it
# came with: ImageNet-Real, Beyer et al., arXiv 2006.07159.
_SEVERAL = {"real_label": "original_label"}
_FINGERPRINT_SAMPLE = 4096  # records that a fingerprint reads: all of them would be all the images


class TfdsSource:
    """A prepared set of tensorflow-datasets with "image" and "label", read without TensorFlow.

    ImageNet-Real, which has "real_label" instead, gives examples with several labels or none.
    """

    def __init__(self, dataset: str, split: str, data_dir: str):
        self.name = f"tfds:{dataset}"
        import tensorflow_datasets as tfds

        command = _prepare_command(dataset, data_dir)
        try:
            builder = tfds.builder(dataset, data_dir=data_dir or None)
        except ValueError as error:
            raise SourceError(
                f"tensorflow-datasets does not know {dataset}: {str(error).splitlines()[0]} Check "
                f"the name; a set of your own must lie prepared in --config.data.data_dir."
            ) from error
        self._check(builder, dataset, command)
        splits = builder.info.splits
        self.split = _choose_split(self.name, split, list(splits))
        self._label, self._several = _find_labels(builder.info.features)
        self.class_names = tuple(builder.info.features[self._label].names)
        self._version = str(builder.info.version)
        self._data = builder.as_data_source(
            split=self.split, decoders={"image": tfds.decode.SkipDecoding()})

    def _check(self, builder: Any, dataset: str, command: str) -> None:
        info = builder.info
        if not info.splits:
            raise SourceError(
                f"{self.name} is not prepared in {builder.data_path}. Prepare it once with  "
                f"{command}  and pass the same --config.data.data_dir. Sets that cannot be "
                f"downloaded freely (imagenet2012) also need --manual_dir=FOLDER_OF_ITS_ARCHIVES."
            )
        if info.file_format is None or info.file_format.value != "array_record":
            found = info.file_format.value if info.file_format else "unknown"
            raise SourceError(
                f"{self.name} in {builder.data_path} is prepared in the format {found}: expected "
                f"array_record, which can be read by position. Delete that folder, or choose "
                f"another --config.data.data_dir, and prepare the set again with  {command}"
            )
        features = dict(info.features)
        label, _ = _find_labels(features)
        classes = getattr(features.get(label), "num_classes", None) or 0  # a ClassLabel has them
        if "image" not in features or classes < 2:
            raise SourceError(
                f"{self.name} is not a set for image classification: expected the features image "
                f"and label, of two classes or more, found {', '.join(sorted(features))}."
            )

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> Example:
        return self._example(self._data[range(len(self))[i]])

    def read(self, indices: Sequence[int]) -> list[Example]:
        """Reads several examples at once, in the order asked for."""
        places = [range(len(self))[i] for i in indices]
        return [self._example(record) for record in self._data.__getitems__(places)]

    def keys(self) -> np.ndarray:
        """The key of every image as UTF-8, out of all the records: dtype S [n]."""
        return read_keys(self)

    def _example(self, record: dict[str, Any]) -> Example:
        image, label = record["image"], int(record[self._label])
        if label < 0:
            raise SourceError(f"{self.name}, split {self.split}, has images without a label. "
                              f"Choose another split by --config.data.train_split or eval_split.")
        several = None
        if self._several:
            several = tuple(sorted({int(i) for i in record[self._several]}))
            label = label if label in several or not several else several[0]
        for field in ("file_name", "id"):
            if field in record:
                return Example(record[field].decode(), image, label, several)
        return Example(hashlib.sha256(image).hexdigest(), image, label, several)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 over class names, version, split, length, and up to 4,096 keys and labels."""
        count = min(len(self), _FINGERPRINT_SAMPLE)
        places = [i * len(self) // count for i in range(count)]
        head = [(self._version, 0), (self.split, len(self))]
        pairs = ((e.key, label) for e in self.read(places)
                 for label in (e.label, *(e.labels or ())))
        return Fingerprint(self.class_names).add(itertools.chain(head, pairs)).hexdigest()


def list_classes(dataset: str) -> tuple[str, ...]:
    """The class names of a set, in order, which tensorflow-datasets knows without its images."""
    import tensorflow_datasets as tfds

    return tuple(tfds.builder(dataset).info.features["label"].names)


def _find_labels(features: Mapping[str, Any]) -> tuple[str, str]:
    """The feature with an image's class, and the one with all its right classes, "" for none."""
    if "label" in features:
        return "label", ""
    several = next((name for name in _SEVERAL if name in features), "")
    return _SEVERAL.get(several, "label"), several


def _prepare_command(dataset: str, data_dir: str) -> str:
    where = f" --data_dir={data_dir}" if data_dir else ""
    return f"tfds build {dataset} --file_format=array_record{where}"


def _choose_split(name: str, split: str, found: list[str]) -> str:
    """The set's own name of "train" or "eval"."""
    for wanted in ("validation", "test") if split == "eval" else (split,):
        if wanted in found:
            return wanted
    expected = "validation or test" if split == "eval" else split
    raise SourceError(f"{name} has no split {expected}: it has {', '.join(found)}. Choose one by "
                      f"--config.data.train_split or --config.data.eval_split.")
