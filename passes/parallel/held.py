"""The weights that all ranks hold whole, as a rank tells of them at each call.

torch counts the changes in place of each tensor; samples are read again where the count is another.
What is changed through ``weight.data`` is not counted, and is read after `refresh`. Weights that
are split are each rank's own, so nothing can be compared of them.
"""

import hashlib
import operator
from collections.abc import Container

from torch import Tensor, nn

from ridgeline.passes.parallel.signature import SAMPLED, digest_of

_CHANGES = operator.attrgetter("_version")


class Held:
    """Parameters of a rank's `model` that are not among `splits`, and what was read of them."""

    def __init__(self, model: nn.Module, splits: Container[str]) -> None:
        self.model, self.splits = model, splits
        self.forget()

    def forget(self) -> None:
        """The model may hold others now."""
        self._named: dict[str, Tensor] | None = None

    def said(self) -> str:
        """Equal where the samples of all are."""
        if self._named is None:
            self._named = {
                name: p
                for name, p in self.model.named_parameters()
                if name not in self.splits and not p.is_inference()  # whose changes are not counted
            }
            self._changes, self._each, self._said = [-1] * len(self._named), {}, ""
        changes = list(map(_CHANGES, self._named.values()))
        if changes != self._changes:
            counts = zip(self._named.items(), changes, self._changes, strict=True)
            for (name, p), now, before in counts:
                if now != before:
                    self._each[f"weight {name}"] = digest_of([(name, p)], SAMPLED)
            told = hashlib.sha256(" ".join(self._each.values()).encode())
            self._changes, self._said = changes, told.hexdigest()[:16]
        return self._said

    def each(self) -> dict[str, str]:
        """What was said, by the name of each."""
        return dict(self._each)
