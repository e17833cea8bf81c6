"""Heads from their tensors, prototypes' scores from a checkpoint, and what autocast may not touch."""

from typing import Any

import pytest
import torch
from torch import nn

from deepclust.errors import CheckpointError
from deepclust.methods.parts import heads


@pytest.mark.parametrize("hidden", [0, 7])
def test_a_head_is_rebuilt_from_its_tensors_alone(hidden: int) -> None:
    head = heads.projection(5, hidden, 3)
    head(torch.randn(20, 5))  # moves the running statistics
    inputs = torch.randn(4, 5)
    again = heads.load_projection(head.state_dict())
    assert not again.training
    assert torch.equal(again(inputs), head.eval()(inputs))


@pytest.mark.parametrize("spoilt", [{"1.running_var": None}, {"4.weight": 2}, {"3.weight": (3, 9)}, {"0.weight": 3}])
def test_other_tensors_are_refused(spoilt: dict[str, Any]) -> None:
    state = heads.projection(5, 7, 3).state_dict() | {name: size and torch.zeros(size) for name, size in spoilt.items()}
    with pytest.raises(CheckpointError, match=r"^[^\n]*projection head[^\n]*$"):
        heads.load_projection({name: tensor for name, tensor in state.items() if tensor is not None})


def test_what_is_exported_gives_cosines_of_the_head_in_eval_mode() -> None:
    head, sets = heads.projection(5, 7, 3), heads.PrototypeHeads([6, 4], 3)
    head(torch.randn(20, 5))
    with torch.no_grad():
        for prototypes in sets:
            prototypes.weight.mul_(2)
    exported, features = sets.exported(head), torch.randn(4, 5)
    exact = heads.load_projection(head.state_dict()).double()(features.double()).detach()
    for number, prototypes in enumerate(sets):
        cosines = torch.cosine_similarity(exact[:, None], prototypes.weight.double().detach(), dim=2)
        stored = heads.load_projection(exported["projection"]), exported["prototypes"][str(number)]
        for given in (stored, (head, prototypes.weight)):
            found = heads.prototype_scores(*given, features)
            torch.testing.assert_close(found.double(), cosines, rtol=0, atol=1e-6)
            assert not found.requires_grad
    assert head.training, "it must come back in the mode it came in"


def test_scores_keep_their_digits_under_autocast() -> None:
    head, prototypes = nn.Linear(5, 3), heads.Prototypes(6, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = head(torch.randn(4, 5))
        assert outputs.dtype == torch.bfloat16
        embeddings = heads.unit_rows(outputs)
        scores = prototypes(embeddings)
    expected = embeddings.double() @ prototypes.weight.double().T
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)
