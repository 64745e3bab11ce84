"""Which errors end the use of a GPU in a process."""

import pytest

from vnet_core.gpu_faults import STICKY, sticky_fault


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously", "device-side assert"),
        ("CUDA error: an illegal memory access was encountered", "illegal memory access"),
        ("CUDA error: unspecified launch failure", "unspecified launch failure"),
        ("CUDA error: uncorrectable ECC error encountered", "uncorrectable ECC error"),
        ("CUDA error: an illegal instruction was encountered", "illegal instruction"),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "CUDNN_STATUS_EXECUTION_FAILED"),
    ],
)
def test_errors_after_which_every_call_fails(message, words):
    assert sticky_fault(message) == words
    assert words in STICKY


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 16.00 GiB",
        "CUDA error: out of memory",
        "CUDA error: invalid argument",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
        "a path with illegal memory access in its name",
        "",
    ],
)
def test_errors_that_pass(message):
    assert sticky_fault(message) is None
