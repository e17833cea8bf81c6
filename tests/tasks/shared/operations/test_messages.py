"""What a user can mend is one line; what we have to mend keeps its traceback."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks.shared.operations.messages import errors_as_one_line


def test_a_lack_of_memory_is_one_line_and_any_other_error_of_torch_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    for allocate in (lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50)):
        with pytest.raises(SystemExit, match="2"), errors_as_one_line():
            allocate()
        said = capsys.readouterr().err
        assert said.startswith("error: expected the work to fit into memory, it does not (")
        assert said.count("\n") == 1
    with pytest.raises(RuntimeError, match="size of tensor"), errors_as_one_line():
        torch.zeros(2) + torch.zeros(3)
