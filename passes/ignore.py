"""`ignore=`: patterns of module paths, as ["lm_head", "*.k_proj"], that a rewrite leaves alone."""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import filter as matching
from fnmatch import fnmatch

from torch import nn

from ridgeline.ir.errors import RidgelineError


def check_patterns(ignore: Sequence[str], error: type[RidgelineError]) -> None:
    """Raises `error` for what is no list of patterns."""
    if isinstance(ignore, str) or not all(isinstance(p, str) for p in ignore or ()):
        raise error(f"ignore is {ignore!r}; pass a list of patterns, as ['lm_head']")


def check_ignore(model: nn.Module, ignore: Sequence[str], error: type[RidgelineError]) -> None:
    """Raises `error` for what is no list of patterns, or a pattern that matches no module."""
    check_patterns(ignore, error)
    names = [name for name, _ in model.named_modules()]
    for pattern in ignore or ():
        if not matching(names, pattern):
            near = get_close_matches(pattern, names, 3)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise error(f"ignore: no module of the model matches {pattern!r}{hint}")


def ignored(path: str, ignore: Sequence[str]) -> bool:
    """Does a pattern match the module's path or that of a module around it?"""
    words = path.split(".")
    around = [".".join(words[: i + 1]) for i in range(len(words))]
    return any(fnmatch(each, pattern) for each in around for pattern in ignore)
