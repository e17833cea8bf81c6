"""kNN against a loop in float64, the linear classifier against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from deepclust.errors import DataError
from deepclust.evaluation import probing


def data(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    centres = torch.randn(3, 6, generator=torch.Generator().manual_seed(99))
    return centres[labels] + torch.randn(count, 6, generator=generator), labels


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.1), (20, 0.001)])
def test_knn_equals_a_loop_in_float64(k, temperature, monkeypatch):
    monkeypatch.setattr(probing, "_CHUNK", 7)  # the last part is shorter
    (bank, labels), (queries, _) = data(100, 0), data(30, 1)
    found = probing.knn(bank, labels, queries, classes=3, neighbours=[k], temperatures=[temperature])[k, temperature]
    b = bank.double().numpy()
    for query, predicted in zip(queries.double().numpy(), found.tolist(), strict=True):
        cosine = b @ query / np.linalg.norm(b, axis=1) / np.linalg.norm(query)
        votes = np.zeros(3)
        for index in np.argsort(-cosine)[:k]:
            votes[labels[index]] += np.exp((cosine[index] - cosine.max()) / temperature)
        assert predicted == votes.argmax()


def test_the_linear_classifier_reaches_scikit_learns_objective():
    features, labels = data(300, 0)
    features = features * torch.tensor([1, 10, 0.1, 1, 5, 0]) + 3  # the last never varies
    decay = 1e-2
    (found,) = probing.fit_linear(features, labels, classes=3, weight_decays=[decay], iterations=300)
    standard = ((features - features.mean(0)) / features.std(0, correction=0).clamp(min=1e-9)).double().numpy()
    expected = LogisticRegression(C=1 / (decay * 300), tol=1e-10, max_iter=2000).fit(standard, labels.numpy())
    ours = torch.softmax((features.double() @ found.weight.double().T + found.bias.double()), 1).numpy()
    np.testing.assert_allclose(ours, expected.predict_proba(standard), atol=2e-3)


def test_no_labels_are_refused():
    with pytest.raises(DataError, match="labelled"):
        probing.fit_linear(torch.zeros(0, 4), torch.zeros(0).long(), classes=2, weight_decays=[1.0], iterations=1)
