"""Data sets, their preparation, and the order they are served in."""

import subprocess
import sys

import numpy as np
import pytest

from train.config import Config
from train.data.builders import topics
from train.data.rows import Windows
from train.data.store import open_dataset
from train.tasks import make_task


def words_of(paragraph: str) -> str:
    return " ".join(paragraph.split())


def test_topics_splits_share_no_paragraph():
    paragraphs = {"train": set(), "validation": set()}
    sizes = {"train": 0, "validation": 0}
    for split, text in topics().values():
        paragraphs[split] |= {words_of(p) for p in text.split("\n\n")}
        sizes[split] += len(text.encode())
    assert not paragraphs["train"] & paragraphs["validation"]
    assert sizes["train"] > 250_000
    assert 0.05 < sizes["validation"] / sum(sizes.values()) <= 0.1


def test_topics_keeps_the_text():
    from pydoc_data.topics import topics as documents

    for title, (_, text) in topics().items():
        there = {words_of(p) for p in documents[title].split("\n\n")}
        assert {words_of(p) for p in text.split("\n\n")} <= there


def test_text_dataset_is_a_tfds_dataset(data_dir):
    dataset = open_dataset("python_topics", data_dir)
    records = {r["title"].decode(): r["text"].decode() for split in (dataset.train, dataset.validation) for r in split}
    assert records == {title: text for title, (_, text) in topics().items()}
    assert open_dataset("python_topics", data_dir).fingerprint == dataset.fingerprint


def test_digits_dataset(data_dir):
    dataset = open_dataset("scikit_digits", data_dir)
    assert len(dataset.train) + len(dataset.validation) == 1797
    record = dataset.train[0]
    assert record["image"].shape == (8, 8, 1)
    assert (record["image"].min(), record["image"].max()) == (0, 1)
    labels = [int(r["label"]) for r in dataset.validation]
    assert min(np.bincount(labels)) >= 33  # every digit is there


def test_no_tensorflow():
    script = (
        "import sys, tempfile, pathlib\n"
        "from train.data.store import open_dataset\n"
        "open_dataset('python_topics', pathlib.Path(tempfile.mkdtemp())).train[0]\n"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_two_processes_may_prepare_at_once(tmp_path):
    script = (
        "import sys, pathlib\nfrom train.data.store import open_dataset\n"
        "print(open_dataset('scikit_digits', pathlib.Path(sys.argv[1])).fingerprint)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0].split()[-1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1]
    assert [p.name.rpartition("-")[0] for p in tmp_path.iterdir()] == ["scikit_digits"]  # no scratch is left


@pytest.mark.parametrize("name", ["no_such_set", "mnist"])
def test_a_missing_dataset_is_explained(name, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def offline(self, **options):
        raise ConnectionError("network is unreachable")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", offline)
    with pytest.raises(ValueError, match=f"data set '{name}'") as error:
        open_dataset(name, tmp_path)
    assert "python_topics" in str(error.value)
    assert "network" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pattern", ["*.array_record*", "dataset_info.json"])
def test_damaged_data_are_explained(pattern, tmp_path):
    open_dataset("python_topics", tmp_path)
    damaged = next(tmp_path.rglob(pattern))
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(ValueError, match="delete that folder and it is made again"):
        open_dataset("python_topics", tmp_path)


def test_windows_predict_every_token_once():
    tokens = np.arange(23, dtype=np.uint8)
    windows = Windows(tokens, length=5, stride=5)
    rows = windows.rows(np.arange(len(windows)))
    np.testing.assert_array_equal(rows["targets"].ravel(), np.arange(1, 21))
    np.testing.assert_array_equal(rows["tokens"][1], np.arange(5, 10))
    assert len(Windows(tokens, 22, 1)) == 1
    assert len(Windows(tokens, 23, 1)) == 0


def test_batches_depend_on_the_seed_alone(tiny, replaced):
    def first(config: Config) -> list[np.ndarray]:
        data = iter(make_task(config).batches())
        return [next(data)["tokens"] for _ in range(3)]

    again, other = first(tiny), first(replaced(tiny, {"seed": 1}))
    for a, b, c in zip(first(tiny), again, other, strict=True):
        assert a.shape == (8, 32)
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()


def test_an_iterator_continues_where_it_was_saved(tiny):
    task = make_task(tiny)
    data = iter(task.batches())
    for _ in range(5):
        next(data)
    state = data.get_state()
    expected = [next(data)["tokens"] for _ in range(3)]
    restored = iter(task.batches())
    restored.set_state(state)
    for batch in expected:
        np.testing.assert_array_equal(next(restored)["tokens"], batch)


def test_epochs_are_shuffled_anew(tiny, replaced):
    config = replaced(tiny, {"task": "digits", "data.name": "scikit_digits", "batch": 1442, "model.patch_size": 4})
    task = make_task(config)
    data = iter(task.batches())
    first, second = next(data)["label"], next(data)["label"]
    assert (first != second).any()
    np.testing.assert_array_equal(np.sort(first), np.sort(second))


def test_validation_batches_are_padded_with_weight_zero(tiny):
    task = make_task(tiny)
    everything, batches = task.validation(), list(task.validation_batches())
    assert sum(batch["weight"].sum() for batch in batches) == len(everything["tokens"])
    assert {batch["tokens"].shape for batch in batches} == {(8, 32)}
