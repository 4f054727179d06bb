"""A case: the source of a small module, with what it means and the choices that spell it.

Source text, not closures: a failure prints the module that fails, ready to be pasted.
"""

import itertools
import linecache
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor argument: entries normal in a floating dtype, else kept or not with even odds."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def draw(self, generator: torch.Generator) -> Tensor:
        """A tensor for this argument; of a boolean one the first column is always True."""
        x = torch.randn(self.shape, generator=generator)
        if self.dtype.is_floating_point:
            return x.to(self.dtype)
        x = x > 0
        x[..., 0] = True  # no query may lose every key
        return x.to(self.dtype)


@dataclass(frozen=True, slots=True)
class Case:
    """A module as text.

    rewrite: name of the pass that must (or, in a trap, must not) take it. words: what it means;
    choices: axis -> spelling; respell: other choices -> the same meaning spelt so.
    setup: statements of ``__init__``; body: statements of ``forward``, the last one a return.
    forbidden: what no rewrite may do to a trap, one of `generate.verdict.FORBIDDEN`.
    """

    rewrite: str
    words: dict[str, str]
    choices: dict[str, str]
    respell: Callable[[Mapping[str, str]], "Case"]
    inputs: tuple[Input, ...]
    body: tuple[str, ...]
    setup: tuple[str, ...] = ()
    forbidden: str = "nothing"

    @property
    def source(self) -> str:
        """The module's class statement."""
        names = ", ".join(x.name for x in self.inputs)
        setup = "".join(f"\n        {line}" for line in self.setup)
        body = "".join(f"\n        {line}" for line in self.body)
        return (
            "class Case(nn.Module):\n    def __init__(self):\n        super().__init__()"
            f"{setup}\n\n    def forward(self, {names}):{body}\n"
        )

    def module(self) -> nn.Module:
        """The module, in eval mode, with the same parameters each time."""
        filename = f"<case {next(_numbers)}>"
        source = (
            f"import math\nimport torch\nimport torch.nn.functional "
            f"as F\nfrom torch import nn\n{self.source}"
        )
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
        namespace: dict[str, type[nn.Module]] = {"__name__": "generated"}  # type: ignore[dict-item]
        exec(compile(source, filename, "exec"), namespace)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return namespace["Case"]().eval()

    def arguments(self, seed: int = 0) -> list[Tensor]:
        """Tensors for `forward`."""
        generator = torch.Generator().manual_seed(seed)
        return [x.draw(generator) for x in self.inputs]

    def runs(self) -> bool:
        """Does the module run? A spoilt stage need not fit every spelling of the others."""
        try:
            self.module()(*self.arguments())
        except (RuntimeError, IndexError, NameError, AttributeError):
            return False
        return True

    def __repr__(self) -> str:
        shapes = ", ".join(f"{x.name}: {list(x.shape)} {x.dtype}" for x in self.inputs)
        spelt = ", ".join(f"{a}={c!r}" for a, c in (self.words | self.choices).items())
        return f"\n# {self.rewrite}: {spelt}\n# {shapes}\n{self.source}"
