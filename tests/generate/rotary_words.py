"""The words in which model code writes a rotary embedding: stage -> spellings.

x is the query or the key, t the features of it that are turned, r the rotated t, y the result; cos
and sin are 8 wide, or 4 where pairs are turned one by one, `angle` is what they are taken of.
"""

PART = {
    "slices": ("t, rest = x[..., :8], x[..., 8:]", "y = torch.cat((y, rest), dim=-1)"),
    "split": ("t, rest = x.split([8, 8], dim=-1)", "y = torch.cat([y, rest], -1)"),
    "chunk": ("t, rest = torch.chunk(x, 2, dim=-1)", "y = torch.concat((y, rest), dim=-1)"),
    "narrow": ("t, rest = x.narrow(-1, 0, 8), x.narrow(-1, 8, 8)", "y = torch.cat((y, rest), 3)"),
    "written back": ("t = x[..., :8]", "x = x.clone()\nx[..., :8] = y\ny = x"),
}
"""Where half of the features are only copied: before and behind the turn."""

HALVES = {
    "slices": "r = torch.cat((-t[..., 4:], t[..., :4]), dim=-1)",
    "slices, half": (
        "half = t.shape[-1] // 2\nr = torch.cat((-t[..., half:], t[..., :half]), dim=-1)"
    ),
    "slices, from the end": "r = torch.cat([-t[..., -4:], t[..., :-4]], -1)",
    "chunk": "a, b = t.chunk(2, dim=-1)\nr = torch.cat((-b, a), dim=-1)",
    "split": "a, b = torch.split(t, 4, dim=-1)\nr = torch.cat((b.neg(), a), 3)",
    "split, sizes": "a, b = t.split([4, 4], -1)\nr = torch.concat((torch.neg(b), a), -1)",
    "narrow": "r = torch.cat((-t.narrow(-1, 4, 4), t.narrow(-1, 0, 4)), dim=-1)",
    "minus one": "a, b = t.chunk(2, dim=-1)\nr = torch.cat((-1 * b, a), dim=-1)",
    "unbind": "a, b = t.unflatten(-1, (2, 4)).unbind(-2)\nr = torch.cat((-b, a), dim=-1)",
    "stack": "a, b = t.chunk(2, dim=-1)\nr = torch.stack((-b, a), dim=-2).flatten(-2)",
    "negated before": "a, b = t[..., :4], (-t)[..., 4:]\nr = torch.cat((b, a), dim=-1)",
}
NEIGHBOURS = {
    "stack": "r = torch.stack((-t[..., 1::2], t[..., ::2]), dim=-1).flatten(-2)",
    "stack, reshape": "r = torch.stack((-t[..., 1::2], t[..., 0::2]), dim=4).reshape(t.shape)",
    "stack, view": "a, b = t[..., ::2], t[..., 1::2]\nr = torch.stack([-b, a], -1).view(t.shape)",
    "unbind": "a, b = t.unflatten(-1, (4, 2)).unbind(-1)\nr = torch.stack((-b, a), -1).flatten(-2)",
    "unbind, reshape": (
        "a, b = t.reshape(*t.shape[:-1], -1, 2).unbind(-1)\n"
        "r = torch.stack((-b, a), dim=-1).flatten(3)"
    ),
    "index": (
        "p = t.reshape(*t.shape[:-1], 4, 2)\n"
        "r = torch.stack((-p[..., 1], p[..., 0]), dim=-1).flatten(-2)"
    ),
    "cat": (
        "p = t.unflatten(-1, (4, 2))\nr = torch.cat((-p[..., 1:], p[..., :1]), dim=-1).flatten(-2)"
    ),
}
SUMS = {
    "cos first": "y = t * cos + r * sin",
    "sin first": "y = r * sin + t * cos",
    "commuted": "y = cos * t + sin * r",
    "function": "y = torch.add(torch.mul(t, cos), torch.mul(r, sin))",
    "in place": "y = t * cos\ny += r * sin",
    "addcmul": "y = torch.addcmul(t * cos, r, sin)",
}

_FIRST, _SECOND = "a * cos - b * sin", "b * cos + a * sin"
HALVES_APART = {
    "chunk": f"a, b = t.chunk(2, dim=-1)\ny = torch.cat(({_FIRST}, {_SECOND}), dim=-1)",
    "slices": f"a, b = t[..., :4], t[..., 4:]\ny = torch.cat([{_FIRST}, a * sin + b * cos], -1)",
    "commuted": (
        "a, b = t.split(4, dim=-1)\ny = torch.cat((cos * a - sin * b, sin * a + cos * b), dim=-1)"
    ),
}
NEIGHBOURS_APART = {
    "slices": (
        "a, b = t[..., ::2], t[..., 1::2]\n"
        f"y = torch.stack(({_FIRST}, {_SECOND}), dim=-1).flatten(-2)"
    ),
    "unbind": (
        "a, b = t.unflatten(-1, (4, 2)).unbind(-1)\n"
        f"y = torch.stack(({_FIRST}, a * sin + b * cos), -1).flatten(-2)"
    ),
    "reshape": (
        "a, b = t[..., 0::2], t[..., 1::2]\n"
        f"y = torch.stack(({_FIRST}, {_SECOND}), dim=-1).reshape(t.shape)"
    ),
}
"""Without a rotated tensor: each half, or each neighbour, by itself."""

COMPLEX = {
    "reshape": (
        "z = torch.view_as_complex(t.float().reshape(*t.shape[:-1], -1, 2))\n"
        "y = torch.view_as_real(z * w).flatten(-2)"
    ),
    "unflatten, commuted": (
        "z = torch.view_as_complex(t.float().unflatten(-1, (4, 2)))\n"
        "y = torch.view_as_real(w * z).reshape(t.shape)"
    ),
    "from parts": (
        "z = torch.complex(t[..., ::2].float(), t[..., 1::2].float())\n"
        "y = torch.view_as_real(z * torch.complex(cos, sin)).flatten(3)"
    ),
}
FACTORS = {
    "complex": "w = torch.complex(cos, sin)",
    "viewed": "w = torch.view_as_complex(torch.stack((cos, sin), dim=-1))",
    "conjugated": "w = torch.complex(cos, -sin).conj()",
}
"""The complex factor, made once for the query and the key."""
POLAR = "cos, sin = angle.cos(), angle.sin()"

_ARANGE = "at = torch.arange(q.shape[{length}], device=q.device)\n"
_GATHERED = "angle = (self.inverse[None, :, None].expand(at.shape[0], -1, 1) @ at[:, None].float())"
ANGLES: dict[str, tuple[str, int, str]] = {
    "per position": ("S R", 2, ""),
    "batch of one": ("one S R", 3, ""),
    "per batch": ("B S R", 3, ""),
    "for heads": ("B heads S R", 4, ""),
    "outer": ("", 2, _ARANGE + "angle = torch.outer(at.float(), self.inverse)"),
    "product": ("", 2, _ARANGE + "angle = at[:, None] * self.inverse"),
    "einsum": ("", 2, _ARANGE + "angle = torch.einsum('i,j->ij', at.float(), self.inverse)"),
    "of positions": ("at", 3, _GATHERED + ".transpose(1, 2)"),
    "gathered": ("at", 3, "angle = torch.outer(torch.arange(9.0), self.inverse)[at]"),
}
"""Name -> the shape of cos and sin as inputs ("at": positions are given), their rank, and how the
angle is computed where they are not."""

DOUBLED = {
    "cat": "angle = torch.cat((angle, angle), dim=-1)",
    "repeat": "angle = angle.repeat(*[1] * (angle.dim() - 1), 2)",
    "cat of cos": "cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)",
}
INTERLEAVED = {
    "repeat_interleave": "angle = angle.repeat_interleave(2, dim=-1)",
    "stack": "angle = torch.stack((angle, angle), dim=-1).flatten(-2)",
    "of cos": "cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, -1)",
}
BROADCASTS: dict[tuple[int, int], dict[str, str]] = {
    (2, 1): {"by rank": "", "None": "c[None, None]", "unsqueeze": "c.unsqueeze(0).unsqueeze(1)"},
    (2, 2): {"None": "c[:, None]", "unsqueeze": "c.unsqueeze(-2)", "of four": "c[None, :, None]"},
    (3, 1): {
        "unsqueeze": "c.unsqueeze(1)",
        "None": "c[:, None]",
        "from the end": "c.unsqueeze(-3)",
    },
    (3, 2): {"unsqueeze": "c.unsqueeze(2)", "None": "c[:, :, None, :]", "last": "c.unsqueeze(-2)"},
    (4, 1): {"by rank": ""},
    (4, 2): {"by rank": ""},
}
"""(rank, dimension of the heads) -> how c is brought beside x."""

CASTS: dict[str, tuple[str, str, str]] = {
    "angles": ("c.to(q.dtype)", "", ""),
    "angles, type_as": ("c.type_as(q)", "", ""),
    "all to float": ("", "t = t.float()", "y = y.to(x.dtype)"),
    "promoted": ("", "", "y = y.type_as(x)"),
}
"""Of cos and sin, of what is turned, and of the result."""

LAYOUTS: dict[int, dict[str, tuple[str, str]]] = {
    1: {
        "as it is": ("B H S D", ""),
        "transposed": ("B S H D", "x = x.transpose(1, 2)"),
        "viewed": ("B S W", "x = x.view(x.shape[0], x.shape[1], -1, {D}).transpose(1, 2)"),
    },
    2: {
        "as it is": ("B S H D", ""),
        "transposed": ("B H S D", "x = x.transpose(1, 2)"),
        "viewed": ("B S W", "x = x.unflatten(-1, (-1, {D}))"),
    },
}
"""Dimension of the heads -> how a query comes: its shape and what is made of it."""
