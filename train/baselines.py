"""What a model has to beat: counts for tokens, a constant and a linear classifier for images."""

import numpy as np
from jaxtyping import Float, Int


def unigram_bits(train: Int[np.ndarray, "n"], targets: Int[np.ndarray, "m"], vocab_size: int = 256) -> float:
    """Bits per target under token frequencies of `train`, with one added to every count."""
    return float(-np.log2(_unigram(train, vocab_size)[targets]).mean())


def bigram_bits(
    train: Int[np.ndarray, "n"],
    inputs: Int[np.ndarray, "m"],
    targets: Int[np.ndarray, "m"],
    vocab_size: int = 256,
    prior: float = 4.0,
) -> float:
    """Bits per target, given the token before it (`inputs`), under counts of pairs in `train`.

    A row of counts is mixed with the unigram distribution as if `prior` more pairs had been seen: better
    than adding one to every count, so the harder baseline.
    """
    seen_pairs, counts = np.unique(_pairs(train[:-1], train[1:], vocab_size), return_counts=True)
    asked = _pairs(inputs, targets, vocab_size)
    at = np.minimum(np.searchsorted(seen_pairs, asked), len(seen_pairs) - 1)
    together = np.where(seen_pairs[at] == asked, counts[at], 0)
    unigram = _unigram(train, vocab_size)
    seen = np.bincount(train[:-1], minlength=vocab_size)
    chances = (together + prior * unigram[targets]) / (seen[inputs] + prior)
    return float(-np.log2(chances).mean())


def _pairs(first: np.ndarray, second: np.ndarray, vocab_size: int) -> Int[np.ndarray, "n"]:
    """One number per pair: a table of all pairs would not fit where the vocabulary is large."""
    return first.astype(np.int64) * vocab_size + second


def _unigram(train: np.ndarray, vocab_size: int) -> Float[np.ndarray, "v"]:
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return counts / counts.sum()


def majority_accuracy(train: Int[np.ndarray, "n"], validation: Int[np.ndarray, "m"]) -> float:
    """Accuracy of always answering with the commonest label of `train`."""
    return float((validation == np.bincount(train).argmax()).mean())


def logistic_accuracy(
    images: Float[np.ndarray, "n ..."],
    labels: Int[np.ndarray, "n"],
    validation_images: Float[np.ndarray, "m ..."],
    validation_labels: Int[np.ndarray, "m"],
) -> float:
    """Accuracy of multinomial logistic regression on the pixels (scikit-learn's, with its defaults)."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=1000).fit(images.reshape(len(images), -1), labels)
    return float(model.score(validation_images.reshape(len(validation_images), -1), validation_labels))
