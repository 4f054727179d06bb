"""Gives `ridgeline::group_rational`, its backward, and what is fused with it, their kernels.

Importing this module registers the TVM kernels for CPU tensors and the Triton kernels for CUDA and
ROCm ones. Neither package is imported until the first call; where it is missing, the operation runs
by its reference and says so once.
"""

from ridgeline.codegen.triton import group_rational_launch as group_rational_launch
from ridgeline.codegen.triton import linear_rational_launch as linear_rational_launch
from ridgeline.codegen.triton import norm_rational_launch as norm_rational_launch
from ridgeline.codegen.tvm import group_rational as group_rational
from ridgeline.codegen.tvm import norm_rational as norm_rational
