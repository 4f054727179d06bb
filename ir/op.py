"""An operation with a meaning: name, plain-torch reference, fake implementation, gradient.

Registration goes through `torch.library.Library.define/impl`, which is about three times cheaper
to call than `torch.library.custom_op`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ridgeline.ir.errors import RidgelineError

LIBRARY = torch.library.Library("ridgeline", "DEF")


class TransformError(RidgelineError, NotImplementedError):
    """An operation called within a torch.func transform, for which it has no rule."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of the `ridgeline::` vocabulary.

    schema: the operator's schema without namespace, e.g. ``"twice(Tensor x) -> Tensor"``.
    reference: the law in plain torch; it *is* the implementation on any device without a kernel.
    fake: shapes and dtypes only.
    setup_context, backward: as `torch.library.register_autograd` takes them; None when the op is
        for inference only.
    """

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        LIBRARY.define(self.schema)
        LIBRARY.impl(self.name, self.reference, "CompositeExplicitAutograd")
        torch.library.register_fake(self.qualified, self.fake)
        # Before any transform sees the call: some would drop a derivative without a word.
        LIBRARY.impl(self.name, self._refuse_transforms, "FuncTorchDynamicLayerFrontMode")
        if self.backward is not None:
            torch.library.register_autograd(
                self.qualified, self.backward, setup_context=self.setup_context
            )

    def implement(self, key: str, kernel: Callable[..., Any]) -> None:
        """Let `kernel` compute the operation for tensors of torch's dispatch key `key`.

        It is called as the schema says, defaults left out; where it returns None the reference
        runs, which is also who raises for operands that the law does not define.
        """

        def run(*operands: Any, **attributes: Any) -> Any:
            made = kernel(*operands, **attributes)
            return self.reference(*operands, **attributes) if made is None else made

        LIBRARY.impl(self.name, run, key)

    def _refuse_transforms(self, *args: Any, **kwargs: Any) -> Any:
        raise TransformError(
            f"{self.qualified} expects to be called outside torch.func's transforms (grad, jvp,"
            " vmap, ...) and found one active; use torch.autograd.grad, or transform"
            f" its law in plain torch, {self.reference.__module__}.{self.reference.__name__}"
        )

    @property
    def name(self) -> str:
        """The operator's name without namespace."""
        return self.schema.partition("(")[0]

    @property
    def qualified(self) -> str:
        """The operator's name with namespace, as ``ridgeline::name``."""
        return f"ridgeline::{self.name}"

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The callable that stands as `target` of a graph node."""
        return getattr(torch.ops.ridgeline, self.name).default
