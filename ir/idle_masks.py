"""Masks that exclude nothing, which transformers makes only while a model is exported.

A bidirectional attention without padding needs no mask, and in an ordinary call transformers makes
none. Under torch.export it does, since with padding the values would decide; without padding there
is nothing to decide, and the mask only hides from readers of the graph that no key is excluded.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_DECIDES = "_ignore_bidirectional_mask_sdpa"


@contextmanager
def left_out() -> Iterator[None]:
    """While it lasts, transformers makes no mask where neither padding nor a window is given."""
    module: Any = sys.modules.get("transformers.masking_utils")
    decides = getattr(module, _DECIDES, None)
    if decides is None:
        yield
        return

    def ignored(padding_mask: Any, kv_length: int, local_attention_size: Any = None) -> bool:
        nothing = padding_mask is None and local_attention_size is None
        return nothing or decides(padding_mask, kv_length, local_attention_size)

    setattr(module, _DECIDES, ignored)
    try:
        yield
    finally:
        setattr(module, _DECIDES, decides)
