"""The spellings of each part of attention, as statements on q, k, v, scores z and weights p.

In braces: B, H, Hk, D sizes; Sq, Sk lengths; r query heads for each key head; c the scale.
"""

LAYOUTS = {
    "heads first": ("{B}, {H}, {S}, {D}", "x"),
    "heads last, transpose": ("{B}, {S}, {H}, {D}", "x.transpose(1, 2)"),
    "heads last, permute": ("{B}, {S}, {H}, {D}", "x.permute(0, 2, 1, 3)"),
    "heads last, contiguous": ("{B}, {S}, {H}, {D}", "x.transpose(1, 2).contiguous()"),
    "heads last, swapaxes": ("{B}, {S}, {H}, {D}", "x.swapaxes(-3, -2)"),
    "flat, view": (
        "{B}, {S}, {H} * {D}",
        "x.view(x.shape[0], x.shape[1], {H}, {D}).transpose(1, 2)",
    ),
    "flat, view -1": ("{B}, {S}, {H} * {D}", "x.view(*x.shape[:2], -1, {D}).transpose(1, 2)"),
    "flat, reshape": (
        "{B}, {S}, {H} * {D}",
        "torch.permute(x.reshape(x.size(0), -1, {H}, {D}), (0, 2, 1, 3))",
    ),
    "flat, unflatten": ("{B}, {S}, {H} * {D}", "x.unflatten(-1, ({H}, {D})).movedim(2, 1)"),
    "one sequence": ("{H}, {S}, {D}", "x[None]"),
    "one sequence, unsqueezed": ("{H}, {S}, {D}", "x.unsqueeze(0)"),
}
"""How query, key and value come in, and the way to [B, H, S, D]."""

REPEATS = {
    "expand": (
        "x = x[:, :, None, :, :].expand(x.shape[0], {Hk}, {r}, x.shape[2], {D})"
        ".reshape(x.shape[0], {H}, x.shape[2], {D})"
    ),
    "unsqueeze, expand": ("x = x.unsqueeze(2).expand(-1, -1, {r}, -1, -1).flatten(1, 2)"),
    "repeat_interleave": "x = x.repeat_interleave({r}, dim=1)",
    "repeat_interleave, function": "x = torch.repeat_interleave(x, {r}, -3)",
    "repeat": "x = x.unsqueeze(2).repeat(1, 1, {r}, 1, 1).flatten(1, 2)",
    "stack": "x = torch.stack([x] * {r}, dim=2).flatten(1, 2)",
    "index": "x = x[:, [h // {r} for h in range({H})]]",
}
"""Each key and value head for {r} query heads."""

SCALES = {
    "after": ("", "z = z * {c}"),
    "after, commuted": ("", "z = {c} * z"),
    "after, div": ("", "z = z / {d}"),
    "after, function": ("", "z = torch.div(z, {d})"),
    "after, true_divide": ("", "z = torch.true_divide(z, {d})"),
    "after, mul": ("", "z = torch.mul(z, {c})"),
    "after, in place": ("", "z *= {c}"),
    "after, div_": ("", "z.div_({d})"),
    "after, of a root": ("", "z = z / math.sqrt({e})"),
    "after, pow": ("", "z = z * {e} ** -0.5"),
    "after, tensor": ("", "z = z * torch.tensor({c}, dtype=z.dtype)"),
    "after, root of a tensor": ("", "z = z / torch.sqrt(torch.tensor({e}, dtype=z.dtype))"),
    "after, rsqrt of a tensor": ("", "z = z * torch.rsqrt(torch.tensor({e}, dtype=z.dtype))"),
    "after, power of a tensor": ("", "z = z * torch.tensor({e}, dtype=z.dtype).pow(-0.5)"),
    "after, full": ("", "z = z / torch.full([], {d}, dtype=z.dtype)"),
    "after, in two steps": ("", "z = z * 0.5 * {two}"),
    "query": ("q = q * {c}", ""),
    "query, commuted": ("q = {c} * q", ""),
    "query, div": ("q = q / {d}", ""),
    "query, in place": ("q = q.clone().mul_({c})", ""),
    "query, root of a tensor": ("q = q / torch.sqrt(torch.tensor({e}, dtype=q.dtype))", ""),
    "key": ("k = k * {c}", ""),
    "both": ("q, k = q * {root}, k * {root}", ""),
    "both, div": ("q = q / {fourth}; k = k / {fourth}", ""),
    "query and after": ("q = q * 0.5", "z = z * {two}"),
}
"""Statements before and after the product for a scale c = 1/d = 1/√e."""

CAPS = {
    "div, tanh, mul": "z = z / 5.0\nz = torch.tanh(z)\nz = z * 5.0",
    "commuted": "z = 5.0 * torch.tanh(z / 5.0)",
    "mul": "z = torch.tanh(z * 0.2) * 5.0",
    "functions": "z = torch.mul(torch.tanh(torch.div(z, 5.0)), 5.0)",
    "method": "z = (z / 5).tanh() * 5",
    "tensor": "z = torch.tanh(z / torch.tensor(5.0, dtype=z.dtype)) * 5.0",
    "divided": "z = torch.tanh(z / 5.0) / 0.2",
}
"""A cap of 5 on the scores; it comes before the mask."""

PRODUCTS = {
    "transpose(-1, -2)": "z = q @ k.transpose(-1, -2)",
    "transpose(2, 3)": "z = torch.matmul(q, k.transpose(2, 3))",
    "mT": "z = q @ k.mT",
    "permute": "z = q.matmul(k.permute(0, 1, 3, 2))",
    "swapaxes": "z = q @ k.swapaxes(-2, -1)",
    "swapdims, contiguous": "z = q @ torch.swapdims(k, 2, 3).contiguous()",
    "movedim": "z = q @ k.movedim(-1, 2)",
    "einsum": "z = torch.einsum('bhqd,bhkd->bhqk', q, k)",
    "einsum, other letters": "z = torch.einsum('bnid,bnjd->bnij', q, k)",
    "einsum, ellipsis": "z = torch.einsum('...id,...jd->...ij', q, k)",
    "einsum, key first": "z = torch.einsum('bhkd,bhqd->bhqk', k, q)",
    "key first": "z = (k @ q.transpose(-1, -2)).transpose(-1, -2)",
    "bmm": (
        "z = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))"
        ".unflatten(0, (q.shape[0], {H}))"
    ),
    "bmm, views": (
        "z = torch.bmm(q.reshape(-1, q.shape[2], {D}), k.reshape(-1, k.shape[2], {D}).mT)"
        ".view(q.shape[0], {H}, q.shape[2], k.shape[2])"
    ),
    "baddbmm": (
        "z = torch.baddbmm(torch.zeros(1, dtype=q.dtype), q.flatten(0, 1),"
        " k.flatten(0, 1).mT, beta=0, alpha=1).view(q.shape[0], {H}, q.shape[2], k.shape[2])"
    ),
    "matmul of three dimensions": (
        "z = (q.flatten(0, 1) @ k.flatten(0, 1).transpose(-1, -2))"
        ".view(q.shape[0], {H}, q.shape[2], k.shape[2])"
    ),
    "summed products": "z = (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1)",
}

KEEPS = {
    "causal": {
        "tril": "torch.ones({Sq}, {Sk}, dtype=torch.bool).tril()",
        "tril function": "torch.tril(torch.ones(({Sq}, {Sk}))).bool()",
        "tril, four dimensions": "torch.ones(1, 1, {Sq}, {Sk}, dtype=torch.bool).tril()",
        "tril, viewed": (
            "torch.tril(torch.ones({Sq}, {Sk}, dtype=torch.bool)).view(1, 1, {Sq}, {Sk})"
        ),
        "tril, compared": "torch.tril(torch.ones({Sq}, {Sk})) != 0",
        "not triu": "~torch.ones({Sq}, {Sk}, dtype=torch.bool).triu(1)",
        "triu, compared": "torch.triu(torch.ones({Sq}, {Sk}), diagonal=1) == 0",
        "triu, transposed": "torch.triu(torch.ones({Sk}, {Sq}, dtype=torch.bool)).T",
        "arange": "torch.arange({Sk})[None, :] <= torch.arange({Sq})[:, None]",
        "arange, view": "torch.arange({Sq}).view(-1, 1) >= torch.arange({Sk}).view(1, -1)",
        "arange, strict": "torch.arange({Sk}) < torch.arange({Sq}).add(1).unsqueeze(-1)",
        "arange, difference": (
            "torch.arange({Sq}).unsqueeze(1) - torch.arange({Sk}).unsqueeze(0) >= 0"
        ),
        "arange, one tensor": "(r := torch.arange({Sk}))[None] <= r[:{Sq}, None]",
        "arange, not greater": (
            "~(torch.arange({Sk})[None, None, None, :] > torch.arange({Sq})[None, None, :, None])"
        ),
        "cumsum": "torch.ones({Sq}, {Sk}).cumsum(-1) <= torch.ones({Sq}, {Sk}).cumsum(0)",
        "buffer": "self.triangle[:{Sq}, :{Sk}]",
    },
    "causal from the end": {
        "tril": "torch.ones({Sq}, {Sk}, dtype=torch.bool).tril({Sk} - {Sq})",
        "triu": "torch.triu(torch.ones({Sq}, {Sk}), {Sk} - {Sq} + 1) == 0",
        "arange": "torch.arange({Sk})[None, :] <= torch.arange({Sq})[:, None] + ({Sk} - {Sq})",
        "arange, offset": "torch.arange({Sk}) <= torch.arange({Sk} - {Sq}, {Sk})[:, None]",
        "last rows": "torch.ones({Sk}, {Sk}, dtype=torch.bool).tril()[-{Sq}:]",
        "rows by slice": "torch.ones({Sk}, {Sk}, dtype=torch.bool).tril()[{Sk} - {Sq}:{Sk}, :{Sk}]",
    },
    "window": {
        "and": (
            "torch.ones({Sq}, {Sk}, dtype=torch.bool).tril()"
            " & torch.ones({Sq}, {Sk}, dtype=torch.bool).triu(-2)"
        ),
        "difference": (
            "((j := torch.arange({Sq})[:, None] - torch.arange({Sk})) >= 0).logical_and(j < 3)"
        ),
        "tril of triu": "torch.ones({Sq}, {Sk}).tril().triu(-2).bool()",
        "xor": (
            "torch.ones({Sq}, {Sk}, dtype=torch.bool).tril()"
            " ^ torch.ones({Sq}, {Sk}, dtype=torch.bool).tril(-3)"
        ),
    },
    "given": {
        "as it is": "keep",
        "unsqueezed": "keep[:, 0][:, None]",
        "not not": "~(~keep)",
        "compared": "keep == True",
        "integers": "keep.long() != 0",
        "floats": "keep.to(q.dtype) > 0",
        "beside everything": "keep & torch.ones({Sq}, {Sk}, dtype=torch.bool)",
    },
}
"""Boolean masks, True where a key is read."""

EXCLUSIONS = {
    "masked_fill": "z = z.masked_fill(~keep, float('-inf'))",
    "masked_fill, compared": "z = z.masked_fill(keep == 0, float('-inf'))",
    "masked_fill, logical_not": "z = torch.masked_fill(z, torch.logical_not(keep), -math.inf)",
    "masked_fill, lowest": "z = z.masked_fill(~keep, torch.finfo(z.dtype).min)",
    "masked_fill, in place": "z = z.masked_fill_(~keep, float('-inf'))",
    "masked_fill, tensor": "z = z.masked_fill(~keep, torch.tensor(float('-inf'), dtype=z.dtype))",
    "where": "z = torch.where(keep, z, float('-inf'))",
    "where, excluded first": "z = torch.where(~keep, float('-inf'), z)",
    "where, lowest": "z = torch.where(keep, z, torch.finfo(z.dtype).min)",
    "where, tensor": "z = torch.where(keep, z, torch.full([], -1e4 ** 8, dtype=z.dtype))",
    "where, full": "z = torch.where(keep, z, torch.full_like(z, float('-inf')))",
    "where, method": "z = z.where(keep, torch.tensor(float('-inf'), dtype=z.dtype))",
    "added": "z = z + torch.where(keep, 0.0, float('-inf')).to(z.dtype)",
    "added, commuted": "z = torch.where(keep, 0.0, float('-inf')).to(z.dtype) + z",
    "added, in place": "z += torch.where(keep, 0.0, float('-inf')).to(z.dtype)",
    "added, function": "z = torch.add(z, torch.where(~keep, float('-inf'), 0.0).to(z.dtype))",
    "added, filled": (
        "z = z + torch.zeros_like(keep, dtype=z.dtype).masked_fill_(~keep, float('-inf'))"
    ),
    "added, lowest filled": (
        "z = z + torch.full_like(keep, torch.finfo(z.dtype).min, "
        "dtype=z.dtype).masked_fill(keep, 0)"
    ),
    "added, product": "z = z + (1.0 - keep.to(z.dtype)) * torch.finfo(z.dtype).min",
    "subtracted, product": "z = z - (~keep).to(z.dtype) * -torch.finfo(z.dtype).min",
    "added, log": "z = z + keep.to(z.dtype).log()",
}
"""How scores of keys that are not read are taken out."""

TRIANGLES = {
    "triu of -inf": "z = z + torch.full(({Sq}, {Sk}), float('-inf'), dtype=z.dtype).triu(1)",
    "triu of lowest": (
        "z = torch.triu(torch.full(({Sq}, {Sk}), torch.finfo(z.dtype).min, dtype=z.dtype),"
        " diagonal=1) + z"
    ),
    "filled upper triangle": (
        "z = z + torch.zeros({Sq}, {Sk}, dtype=z.dtype)"
        ".masked_fill(torch.ones({Sq}, {Sk}).triu(1) == 1, float('-inf'))"
    ),
    "triangle times comparison": (
        "m = torch.full(({Sq}, {Sk}), torch.finfo(z.dtype).min, dtype=z.dtype)\n"
        "m = torch.triu(m, diagonal=1)\n"
        "m *= torch.arange({Sk}) > torch.arange({Sq}).reshape(-1, 1)\n"
        "z = z + m[None, None, :, :]"
    ),
    "filled below the diagonal": (
        "m = torch.full(({Sq}, {Sk}), float('-inf'), dtype=z.dtype)\n"
        "m.masked_fill_(torch.arange({Sk}) < torch.arange({Sq}).add(1).view(-1, 1), 0)\n"
        "z = z + m"
    ),
}
"""Additive causal masks with no boolean of their own."""

SOFTMAXES = {
    "F.softmax": "p = F.softmax(z, dim=-1)",
    "torch.softmax": "p = torch.softmax(z, -1)",
    "method": "p = z.softmax(3)",
    "module": "p = nn.Softmax(dim=-1)(z)",
    "dtype": "p = F.softmax(z, dim=-1, dtype=torch.float32).to(q.dtype)",
    "method, dtype": "p = z.softmax(-1, dtype=torch.float32).type_as(z)",
    "cast": "p = torch.softmax(z.float(), dim=-1).to(z.dtype)",
    "cast, type": "p = F.softmax(z.type(torch.float32), -1).type(q.dtype)",
    "maximum, exp, sum": (
        "e = torch.exp(z - z.amax(dim=-1, keepdim=True))\np = e / e.sum(dim=-1, keepdim=True)"
    ),
    "max, exp, sum": (
        "e = (z - z.max(-1, keepdim=True).values).exp()\np = e / e.sum(-1, keepdim=True)"
    ),
    "max, exp, reciprocal": (
        "e = torch.exp(z - z.max(dim=-1, keepdim=True)[0])\n"
        "p = e * torch.reciprocal(torch.sum(e, -1, True))"
    ),
    "exp, sum": "e = z.exp()\np = e / e.sum(-1, keepdim=True)",
    "log_softmax, exp": "p = F.log_softmax(z, -1).exp()",
    "logsumexp": "p = torch.exp(z - torch.logsumexp(z, -1, keepdim=True))",
    "maximum first": "p = torch.softmax(z - z.amax(-1, keepdim=True), -1)",
}

_COLUMN = "sinks.view(1, {H}, 1, 1).expand(z.shape[0], -1, z.shape[2], 1)"
_GPT_OSS = "sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)"
_REPEATED = "sinks[None, :, None, None].repeat(z.shape[0], 1, z.shape[2], 1)"

SINKS = {
    "last, sliced": (f"z = torch.cat((z, {_COLUMN}), -1)", "p = p[..., :-1]"),
    "last, of gpt-oss": (f"z = torch.cat([z, {_GPT_OSS}], dim=-1)", "p = p[..., :-1]"),
    "last, repeated": (f"z = torch.cat((z, {_REPEATED}), 3)", "p = p[:, :, :, :-1]"),
    "last, narrow": (f"z = torch.cat((z, {_COLUMN}), -1)", "p = p.narrow(-1, 0, k.shape[2])"),
    "last, up to the keys": (f"z = torch.cat((z, {_COLUMN}), -1)", "p = p[..., : k.shape[2]]"),
    "last, cast": (
        f"z = torch.cat((z, {_COLUMN}.to(z.dtype)), -1)",
        "p = p[..., :-1].contiguous().to(q.dtype)",
    ),
    "first, sliced": (f"z = torch.cat(({_COLUMN}, z), -1)", "p = p[..., 1:]"),
    "first, narrow": (f"z = torch.concat(({_COLUMN}, z), -1)", "p = p.narrow(3, 1, k.shape[2])"),
    "first, from the end": (f"z = torch.cat(({_COLUMN}, z), -1)", "p = p[..., -k.shape[2] :]"),
}
"""A score per head beside those of the keys, and the way its weight is dropped."""

DROPOUTS = {
    "none": "",
    "p = 0": "p = F.dropout(p, 0.0)",
    "p = 0, training": "p = F.dropout(p, p=0.0, training=True)",
    "not training": "p = F.dropout(p, 0.1, training=self.training)",
    "module": "p = nn.Dropout(0.1).eval()(p)",
    "identity": "p = nn.Identity()(p)",
}

VALUES = {
    "@": "o = p @ v",
    "matmul": "o = torch.matmul(p, v)",
    "cast": "o = p.to(v.dtype).matmul(v)",
    "einsum": "o = torch.einsum('bhqk,bhkd->bhqd', p, v)",
    "einsum, value first": "o = torch.einsum('bhkd,bhqk->bhqd', v, p)",
    "bmm": (
        "o = torch.bmm(p.flatten(0, 1), v.flatten(0, 1)).view(q.shape[0], {H}, q.shape[2], {D})"
    ),
    "transposed": "o = (v.mT @ p.mT).mT",
}

OUTPUTS = {
    "as it is": "return o",
    "heads last": "return o.transpose(1, 2).contiguous()",
    "flat": "return o.transpose(1, 2).reshape(o.shape[0], -1, {H} * {D})",
    "flatten": "return o.permute(0, 2, 1, 3).flatten(2)",
}

FUSED = {
    "plain": "o = F.scaled_dot_product_attention(q, k, v{mask}, scale={c})",
    "no dropout": "o = F.scaled_dot_product_attention(q, k, v{mask}, dropout_p=0.0, scale={c})",
    "query scaled": "o = F.scaled_dot_product_attention(q * {d8c}, k, v{mask})",
    "contiguous": (
        "o = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous(){mask},"
        " scale={c})"
    ),
}
"""The fused call; d8c makes up for its own scale of 1/√D."""

FUSED_MASKS = {
    "boolean": "keep",
    "additive": "torch.where(keep, 0.0, float('-inf')).to(q.dtype)",
    "lowest": "torch.where(keep, 0.0, torch.finfo(q.dtype).min).to(q.dtype)",
    "expanded": "keep.expand({B}, 1, {Sq}, {Sk})",
    "zeros filled": "torch.zeros({Sq}, {Sk}, dtype=q.dtype).masked_fill(~keep, float('-inf'))",
}

BIASES = {
    "added": "z = z + bias",
    "added, commuted": "z = bias + z",
    "added, in place": "z += bias",
    "added, function": "z = torch.add(z, bias)",
    "subtracted": "z = z - -bias",
    "added, cast": "z = z + bias.to(z.dtype)",
    "added, sliced": "z = z + bias[:, :, :, : k.shape[-2]]",
}
"""The additive input; it comes after the scale."""
