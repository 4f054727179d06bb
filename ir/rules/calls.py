"""Rules of the normal form that look at one call alone: another name for the same function.

No bit of any result changes.
"""

import torch
from torch import fx

aten = torch.ops.aten
_ROOTS = {0.5: aten.sqrt.default, -0.5: aten.rsqrt.default}


def plain_power(node: fx.Node) -> bool:
    """x * x and square(x) -> pow(x, 2), pow(x, -0.5) -> rsqrt(x), pow(x, 0.5) -> sqrt(x): the
    functions by which torch computes these powers."""
    args, value = node.args, node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    if node.target is aten.pow.Tensor_Scalar and args[1] in _ROOTS:
        node.target, node.args = _ROOTS[args[1]], args[:1]
        return True
    product = node.target is aten.mul.Tensor and args[0] is args[1]
    if not (product or node.target is aten.square.default):
        return False
    node.target, node.args = aten.pow.Tensor_Scalar, (args[0], 2)
    return True


def explicit_layer_norm(node: fx.Node) -> bool:
    """layer_norm(x, shape, weight, bias, eps), every default written out; which library
    computes it is not said."""
    if node.target is not aten.layer_norm.default:
        return False
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    args = (*(given.get(name) for name in names[:4]), given.get("eps", 1e-5))
    if (args, {}) == (node.args, node.kwargs):
        return False
    node.args, node.kwargs = args, {}
    return True


def explicit_rms_norm(node: fx.Node) -> bool:
    """rms_norm(x, shape, weight, eps) of float32 without eps -> with that of float32. For narrower
    dtypes it is left to the library, and devices differ."""
    if node.target is not aten.rms_norm.default or node.meta["val"].dtype != torch.float32:
        return False
    names = ("input", "normalized_shape", "weight", "eps")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if given.get("eps") is not None:
        return False
    given["eps"] = torch.finfo(torch.float32).eps
    node.args, node.kwargs = tuple(given.get(name) for name in names), {}
    return True
