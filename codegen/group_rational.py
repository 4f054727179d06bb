"""Gives `ridgeline::group_rational` and its backward their kernels, for training and inference.

Importing this module registers the TVM kernels for CPU tensors and the Triton kernels for CUDA and
ROCm ones. Neither package is imported until the first call; where it is missing, the operation runs
by its reference and says so once.
"""

from ridgeline.codegen.triton import group_rational_launch as group_rational_launch
from ridgeline.codegen.tvm import group_rational as group_rational
