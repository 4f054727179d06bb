"""A launch configuration: tile sizes, warps, pipeline stages."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Config:
    """One way to launch a kernel.

    blocks: the kernel's tile sizes by their constexpr name, e.g. (("BLOCK_M", 128), ...);
    splits: into how many parts the reduced dimension is cut (1: one pass, no workspace).
    """

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int
    splits: int = 1

    def constexprs(self) -> dict[str, int]:
        """The tile sizes as the kernel names them."""
        return dict(self.blocks)

    def launch(self) -> dict[str, int]:
        """The keyword arguments of the kernel's launcher."""
        sizes = {name.lower(): size for name, size in self.blocks}
        return {**sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def __str__(self) -> str:
        parts = [*self.blocks, ("warps", self.num_warps), ("stages", self.num_stages)]
        if self.splits > 1:
            parts.append(("splits", self.splits))
        return ", ".join(f"{name} {size}" for name, size in parts)
