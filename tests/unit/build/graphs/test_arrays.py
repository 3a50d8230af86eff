"""Arrays of files become float32 tensors of their own."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from scumble_build.graphs.arrays import as_tensor


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64])
def test_every_type_keeps_its_values(dtype: type) -> None:
    values = np.array([[1, -2, 0.5], [3, 0, 8]]).astype(dtype)
    assert torch.equal(as_tensor(values), torch.tensor(values.astype(np.float32)))


def test_it_is_a_copy_that_may_be_written_to() -> None:
    values = np.ones((2, 3), np.float32).T
    values.flags.writeable = False
    tensor = as_tensor(values)
    tensor[0, 0] = 5
    assert values[0, 0] == 1
    assert tensor.is_contiguous()
