"""What the attention kernels call masks, and read them as."""

import torch


def mask_kind(mask: torch.Tensor | None) -> str:
    """What `compile_attention` calls a mask."""
    if mask is None:
        return "none"
    return "boolean" if mask.dtype == torch.bool else "added"


def mask_type(kind: str, mask_dtype: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    """What a kernel reads a mask of that kind as."""
    return {"none": dtype, "boolean": torch.uint8, "added": mask_dtype or dtype}[kind]
