"""Masks that are nearly a causal triangle: stages of an attention, and its meaning."""

from generate.attention import Attention

CAUSAL = Attention(keep="causal")
UNEQUAL = Attention(keep="causal", q=3, k=9)
LAST = Attention(keep="causal from the end", q=3, k=9)

NO_DIAGONAL = {
    "orientation": ({"keep": "keep = torch.ones({Sq}, {Sk}, dtype=torch.bool).triu()"}, CAUSAL),
    "orientation by transposition": ({"keep": "+keep = keep.mT"}, CAUSAL),
    "orientation by arange": (
        {"keep": "keep = torch.arange({Sq})[:, None] <= torch.arange({Sk})[None]"},
        CAUSAL,
    ),
    "key index against itself": (
        {"keep": "keep = torch.arange({Sk})[None, :] <= torch.arange({Sk})[None, :]"},
        CAUSAL,
    ),
    "flipped rows": ({"keep": "+keep = keep.flip(-2) | torch.eye({Sq}, dtype=torch.bool)"}, CAUSAL),
    "rolled": ({"keep": "+keep = keep.roll(1, -1)"}, CAUSAL),
    "one entry written": ({"keep": "+keep = keep.clone()\nkeep[..., 2, 4] = True"}, CAUSAL),
    "one entry written through a view": (
        {"keep": "+keep = keep.clone()\nrow = keep[..., 2, :]\nrow[4:].fill_(True)"},
        CAUSAL,
    ),
    "written through a flat view": (
        {
            "keep": (
                "+keep = keep.clone(memory_format=torch.contiguous_format)\nkeep.view(-1)[4] = True"
            )
        },
        CAUSAL,
    ),
    "written through a transposed view": (
        {"keep": "+keep = keep.clone()\nkeep.mT[..., 4, :] = True"},
        CAUSAL,
    ),
    "written through a detached view": (
        {"keep": "+keep = keep.clone()\nkeep.detach()[..., 5] = True"},
        CAUSAL,
    ),
    "a row selected and written": (
        {
            "keep": (
                "+keep = keep.clone()\nkeep.select(-2, "
                "1).logical_or_(torch.ones({Sk}, dtype=torch.bool))"
            )
        },
        CAUSAL,
    ),
    "everything written": ({"keep": "+keep = keep.clone()\nkeep.fill_(True)"}, CAUSAL),
    "copied into": (
        {"keep": "+keep = keep.clone()\nkeep.copy_(torch.ones({Sq}, {Sk}, dtype=torch.bool))"},
        CAUSAL,
    ),
    "or in place": ({"keep": "+keep = keep.clone()\nkeep |= keep.mT.clone()"}, CAUSAL),
    "inverted in place": (
        {"keep": "+keep = keep.clone()\nkeep.logical_not_()\nkeep[..., 0] = True"},
        CAUSAL,
    ),
    "index_put": (
        {
            "keep": (
                "+keep = keep.clone()\nkeep[..., torch.tensor([0, 1]), torch.tensor([3, 4])] = True"
            )
        },
        CAUSAL,
    ),
    "an output written": (
        {"keep": "+keep = keep.clone()\ntorch.logical_or(keep, keep.mT.clone(), out=keep)"},
        CAUSAL,
    ),
    "additive mask written": (
        {
            "exclusion": "m = torch.where(keep, 0.0, float('-inf'))\nm[..., 0, :] = 0.0\nz = z + m",
        },
        CAUSAL,
    ),
    "additive mask written through a view": (
        {
            "exclusion": (
                "m = torch.full(({Sq}, {Sk}), float('-inf')).triu(1)\n"
                "m.view(-1)[1:3].mul_(0).nan_to_num_(0)\nz = z + m"
            ),
        },
        CAUSAL,
    ),
    "the zero written": (
        {
            "exclusion": (
                "zero = torch.zeros(())\nzero += 1\n"
                "m = torch.where(keep, zero, torch.full((), -3.0))\nz = z + m"
            ),
        },
        CAUSAL,
    ),
    "arange written": (
        {"keep": "i = torch.arange({Sq})\ni[2] = 5\nkeep = torch.arange({Sk})[None] <= i[:, None]"},
        CAUSAL,
    ),
    "arange of steps": (
        {"keep": "keep = torch.arange({Sk})[None] <= 2 * torch.arange({Sq})[:, None]"},
        CAUSAL,
    ),
    "arange of halves": (
        {"keep": "keep = torch.arange({Sk})[None] // 2 <= torch.arange({Sq})[:, None]"},
        CAUSAL,
    ),
    "narrow arange": (
        {
            "keep": "i = (torch.arange({Sq}) + 253).to(torch.uint8)\n"
            "j = (torch.arange({Sk}) + 253).to(torch.uint8)\nkeep = j[None] <= i[:, None]"
        },
        CAUSAL,
    ),
    "three states": (
        {"keep": "keep = torch.ones({Sq}, {Sk}).tril() + torch.ones({Sq}, {Sk}).tril(2) > 0"},
        CAUSAL,
    ),
    "tril of a row": ({"keep": "keep = torch.ones(1, {Sk}, dtype=torch.bool).tril(3)"}, CAUSAL),
    "tril of triu": ({"keep": "keep = torch.ones({Sq}, {Sk}).tril(1).triu(-1) > 0"}, CAUSAL),
}
"""The mask is no triangle: attention may be rewritten, with the mask as it is."""

SOFTMAX = "p = torch.softmax(z, -1)"
"""A first row of large finite scores: x - logsumexp(x) would lose what is left of them."""

OTHER_DIAGONALS = {
    "one more": ({"keep": "keep = torch.ones({Sq}, {Sk}, dtype=torch.bool).tril(1)"}, CAUSAL),
    "triu, one more": ({"keep": "keep = torch.ones({Sq}, {Sk}).triu(2) == 0"}, CAUSAL),
    "one less": (
        {
            "keep": "keep = torch.ones({Sq}, {Sk}, dtype=torch.bool).tril(-1)",
            "exclusion": "z = z.masked_fill(~keep, -1e30)",
            "softmax": SOFTMAX,
        },
        CAUSAL,
    ),
    "strict": (
        {
            "keep": "keep = torch.arange({Sk})[None] < torch.arange({Sq})[:, None]",
            "exclusion": "z = torch.where(keep, z, torch.finfo(z.dtype).min)",
            "softmax": SOFTMAX,
        },
        CAUSAL,
    ),
    "from the end, one more": (
        {"keep": "keep = torch.ones({Sq}, {Sk}, dtype=torch.bool).tril({Sk} - {Sq} + 1)"},
        LAST,
    ),
    "from the end, one less": (
        {"keep": "keep = torch.ones({Sq}, {Sk}, dtype=torch.bool).tril({Sk} - {Sq} - 1)"},
        LAST,
    ),
    "from the start of longer keys": ({"keep": "+"}, UNEQUAL),
    "from the start of longer queries": ({"keep": "+"}, Attention(keep="causal", q=9, k=3)),
    "first rows": (
        {"keep": "keep = torch.ones({Sk}, {Sk}, dtype=torch.bool).tril()[:{Sq}]"},
        LAST,
    ),
    "rows one too early": (
        {
            "keep": (
                "keep = torch.ones({Sk}, {Sk}, dtype=torch.bool).tril()[{Sk} - {Sq} - 1 : {Sk} - 1]"
            )
        },
        LAST,
    ),
    "columns one too late": (
        {
            "keep": (
                "keep = torch.ones(16, 16, dtype=torch.bool).tril()[:{Sq}, "
                "1 : {Sk} + 1]\nkeep[0, 0] = True"
            )
        },
        CAUSAL,
    ),
}
"""Triangles of another diagonal, or of another alignment."""
