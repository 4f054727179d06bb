"""Targets as tables for people."""

import dataclasses

from rich.table import Table

from ridgeline.cost_model import load_target, target_names


def all_targets() -> Table:
    """Every target that ships, and the host's own once it has been probed."""
    table = Table(title="targets (dense peaks)", title_justify="left")
    for column in ("name", "arch", "bf16 TFLOP/s", "fp32 TFLOP/s", "memory", "GB/s", "cores"):
        table.add_column(column, justify="left" if column in ("name", "arch") else "right")
    for name in target_names():
        target = load_target(name)
        table.add_row(
            name,
            target.arch,
            f"{target.peaks.get('bfloat16', 0) / 1e12:.4g}",
            f"{target.peaks.get('float32', 0) / 1e12:.4g}",
            f"{target.memory_bytes / 1e9:.0f} GB",
            f"{target.bandwidth_bytes_per_s / 1e9:.0f}",
            str(target.cores),
        )
    return table


def one_target(name: str) -> Table:
    """One target: each number and where it comes from."""
    target = load_target(name)
    table = Table(title=f"{target.name} ({target.kind}, {target.arch})", title_justify="left")
    for column in ("number", "value", "source"):
        table.add_column(column)
    for field in dataclasses.fields(target):
        value = getattr(target, field.name)
        if field.name in ("name", "kind", "arch", "sources"):
            continue
        if isinstance(value, dict):
            for key, number in value.items():
                table.add_row(f"{field.name}.{key}", f"{number:g}", _source(target, key))
        else:
            text = f"{value:g}" if isinstance(value, float) else str(value)
            table.add_row(field.name, text, _source(target, field.name))
    return table


def _source(target, field: str) -> str:
    """The source whose key names the field (keys carry units: ``bandwidth_gb_per_s``)."""
    stem = field.removesuffix("_s").removesuffix("_bytes").removesuffix("_bytes_per_s")
    keys = [k for k in target.sources if k == field or stem in k or k.startswith(stem)]
    return "; ".join(sorted({target.sources[k] for k in keys}))
