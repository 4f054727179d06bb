"""Coded layers of one input -> one product with their codes, one upon the other.

Law: `ridgeline.passes.coded_sites`. What `merged_linear` does for plain weights: one call takes the
place of several, for a second copy of the codes, which are few bytes. Equal in real arithmetic:
codes, scales and the dtype of products stay. A decode step of a small model is bound by its calls
as much as by its weights, so that query, key and value, or gate and up, are worth putting together.
Source: the packed projections of Megatron-LM and vLLM.
"""

from collections.abc import Sequence

from torch import fx

from ridgeline.codegen.kernel import keyword
from ridgeline.ir.match import Reject, Site
from ridgeline.ir.quantized_linear import QUANTIZED_LINEAR
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.coded_sites import (
    after,
    apply,
    before,
    call_of,
    constants_of,
    copied_bytes,
    side_by_side,
)


def search(graph: fx.Graph) -> tuple[list[Site], list[Reject]]:
    """The sites of several coded layers that read one input."""
    return side_by_side(graph), []


def accepts(site: Site, setting: Setting) -> Sequence[Candidate]:
    """Not while training: what is merged is a copy."""
    if setting.training:
        return []
    call = call_of(site, keyword(site.outs[0], "multiply"))
    return [
        Candidate(
            rewrite=MERGED_CODED,
            site=site,
            call=call,
            before=before(site),
            after=after(call, site),
            variant=f"{len(site.outs)} layers of one input",
            memory_bytes=copied_bytes(site),
            preconditions=(constants_of(site),),
        )
    ]


MERGED_CODED = Pass(
    name="merged_coded",
    op=QUANTIZED_LINEAR,
    exactness="reassociating",
    patterns=tuple,
    search=search,
    accepts=accepts,
    apply=apply,
    rounding={"float32": 2e-6, "bfloat16": 4e-3, "float16": 6e-4},
)
