"""Errors of a GPU after which every further call of the process fails, told from those that pass."""

from __future__ import annotations

STICKY = (
    "device-side assert",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "unspecified launch failure",
    "the launch timed out and was terminated",
    "hardware stack error",
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "Invalid access of peer GPU memory",
    "GPU is lost",
    "MPS client",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_EXECUTION_FAILED",
)
"""CUDA's words for errors that leave the process's context unusable; libraries above it report theirs in their own."""


def sticky_fault(message: str) -> str | None:
    """The words by which an error's message tells that its process can use the GPU no more; None for any other error.

    An error of memory that ran out is none: what was asked for was not given, and a smaller request may be.
    """
    lowered = message.lower()
    if "cuda" not in lowered and "cudnn" not in lowered and "cublas" not in lowered:
        return None
    return next((words for words in STICKY if words.lower() in lowered), None)
