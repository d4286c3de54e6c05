"""GPU kernels in Triton, for CUDA and ROCm; with TRITON_INTERPRET=1 the same kernels run on CPU tensors."""

from .candidates import select
from .divergence import divergence
from .divergence_backward import divergence_backward
from .launch import why_not
from .scores import scores, scores_and_candidates

__all__ = ["divergence", "divergence_backward", "scores", "scores_and_candidates", "select", "why_not"]
