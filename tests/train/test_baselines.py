"""The baselines against plain computations."""

import collections
import math

import numpy as np
import pytest

from train.baselines import bigram_bits, logistic_accuracy, majority_accuracy, unigram_bits
from train.tasks import make_task


def test_unigram(rng):
    train, targets = rng.integers(0, 7, 200), rng.integers(0, 9, 50)
    counts = collections.Counter(train.tolist())
    bits = [-math.log2((counts[t] + 1) / (200 + 9)) for t in targets.tolist()]
    assert unigram_bits(train, targets, vocab_size=9) == pytest.approx(np.mean(bits))


def test_bigram(rng):
    train, inputs, targets = rng.integers(0, 4, 300), rng.integers(0, 5, 40), rng.integers(0, 5, 40)
    singles = collections.Counter(train.tolist())
    pairs = collections.Counter(zip(train[:-1].tolist(), train[1:].tolist(), strict=True))
    bits = []
    for a, b in zip(inputs.tolist(), targets.tolist(), strict=True):
        seen = sum(pairs[a, c] for c in range(5))
        unigram = (singles[b] + 1) / (300 + 5)
        bits.append(-math.log2((pairs[a, b] + 3 * unigram) / (seen + 3)))
    assert bigram_bits(train, inputs, targets, vocab_size=5, prior=3) == pytest.approx(np.mean(bits))


def test_bigram_probabilities_sum_to_one(rng):
    train = rng.integers(0, 6, 100)
    for a in range(8):
        chances = [2 ** -bigram_bits(train, np.array([a]), np.array([b]), vocab_size=8) for b in range(8)]
        assert sum(chances) == pytest.approx(1)


def test_the_bigram_baseline_is_better_than_adding_one(tiny):
    task = make_task(tiny)
    train, held_out = task.dataset.train.stream[1:], task.dataset.validation.stream
    counts = np.ones((256, 256))
    np.add.at(counts, (train[:-1], train[1:]), 1)
    chances = counts / counts.sum(1, keepdims=True)
    add_one = -np.log2(chances[held_out[:-1], held_out[1:]]).mean()
    baselines = task.baselines()
    assert baselines["bigram"] < add_one < baselines["unigram"] < 8


def test_majority_and_logistic():
    train_labels, validation_labels = np.array([0, 1, 1, 1]), np.array([1, 0])
    assert majority_accuracy(train_labels, validation_labels) == 0.5
    images = np.array([[0.0], [5.0], [6.0], [7.0]])
    assert logistic_accuracy(images, train_labels, np.array([[6.5], [-1.0]]), validation_labels) == 1.0
