"""TFDS builders over data that needs no network: it comes with Python and with scikit-learn."""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

VALIDATION_SHARE = 10  # one part in ten


class PythonTopics(tfds.core.GeneratorBasedBuilder):
    """The documents behind Python's `help("topics")`, as UTF-8 text.

    Several topics repeat whole paragraphs of others. A paragraph is kept where it comes first (documents in
    the order of their titles) and dropped afterwards, so nothing in the validation split stands in the train
    split. A document goes to validation whenever that keeps validation at most a tenth of the text so far.

    The text differs between versions of Python.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"pydoc_data.topics of Python {sys.version.split()[0]}",
            features=tfds.features.FeaturesDict({"title": text, "text": text}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, str]]]:
        for title, (of, text) in topics().items():
            if of == split:
                yield title, {"title": title, "text": text}


def topics() -> dict[str, tuple[str, str]]:
    """Title -> (split, text) of each topic that has paragraphs of its own."""
    from pydoc_data.topics import topics as documents

    seen: set[str] = set()
    sizes = {"train": 0, "validation": 0}
    result = {}
    for title in sorted(documents):
        fresh = []
        for paragraph in documents[title].split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                fresh.append(paragraph.strip("\n"))
        text = "\n\n".join(fresh) + "\n"
        size = len(text.encode())
        if size < 200:  # what is left of a repeated topic: a heading
            continue
        fits = VALIDATION_SHARE * (sizes["validation"] + size) <= sum(sizes.values()) + size
        split = "validation" if fits else "train"
        sizes[split] += size
        result[title] = (split, text)
    return result


class ScikitDigits(tfds.core.GeneratorBasedBuilder):
    """scikit-learn's 1,797 handwritten digits: images [8, 8, 1] in 0..1, labels 0 to 9.

    Every fifth image of each digit is for validation.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.float32),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="sklearn.datasets.load_digits",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        seen = np.zeros(10, int)
        for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            seen[label] += 1
            if (seen[label] % 5 == 0) == (split == "validation"):
                yield index, {"image": (image / 16).astype(np.float32)[..., None], "label": int(label)}


BUILDERS = {builder.name: builder for builder in (PythonTopics, ScikitDigits)}
"""Name -> builder of the data sets that come along."""
