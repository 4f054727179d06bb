"""Quantised models on disk: a folder with `config.json` and `model.safetensors`.

The tensors are the model's `state_dict`: of each QuantizedLinear the operands of the op (packed,
scale, offset, row_scale, permutation, bias), the very artefact whose size and accuracy were
reported; of the rest all, or, saved against the model that they came from, those that differ from
its. A tensor held under several names (a tied head) is stored once. The config says per layer what
the op needs to read them (`QuantizedWeight.settings`, the dtype of products), and bits per weight.

Both files are written beside their places and then moved there; they carry one identity, so that
half of one saved model beside half of another is refused. Loading checks everything first: it
changes the whole model, or nothing.
"""

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ridgeline.ir.errors import RidgelineError
from ridgeline.passes.quantization.calibrate import in_features
from ridgeline.passes.quantization.codec import BITS, QuantizationError, QuantizedWeight
from ridgeline.passes.quantization.layer import OPERANDS, QuantizedLinear

VERSION = 1
CONFIG, TENSORS = "config.json", "model.safetensors"
_FORMAT = "ridgeline-quantized"


class StoreError(RidgelineError, ValueError):
    """A folder that does not hold a quantised model for this module, or a model to save that has
    none."""


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The model's QuantizedLinear modules by name, shared ones by each of theirs."""
    modules = model.named_modules(remove_duplicate=False)
    return {n: m for n, m in modules if isinstance(m, QuantizedLinear)}


def bits_per_weight(model: nn.Module) -> float:
    """Bits stored per weight of the model's QuantizedLinear layers: codes, scales, offsets, row
    scales and permutations, weighted by the layers' sizes.

    Raises StoreError where there is no such layer.
    """
    layers = set(_layers_of(model).values())
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return 8 * sum(layer.quantized.nbytes for layer in layers) / weights


def save_quantized(
    model: nn.Module,
    folder: str | Path,
    *,
    original: nn.Module | None = None,
    calibrated_on: str | None = None,
) -> Path:
    """Write `model` into `folder` (made if need be; files of an earlier save are replaced).

    original: the model before quantisation; tensors equal to its are left out, and loading takes
        them from the model that it is given. calibrated_on: said in the config.
    Returns the folder. Raises StoreError where the model holds no QuantizedLinear.
    """
    layers = _layers_of(model)
    kept = _changed(model.state_dict(), original, inside=tuple(f"{name}." for name in layers))
    tensors, tied = _once(kept)
    identity = uuid.uuid4().hex
    config = {
        "format": _FORMAT,
        "version": VERSION,
        "identity": identity,
        "bits_per_weight": bits_per_weight(model),
        "calibrated_on": calibrated_on,
        "complete": original is None,
        "tied": tied,
        "layers": {name: _described(layer) for name, layer in layers.items()},
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=1)
    with _placed(folder / TENSORS) as path:
        save_file(tensors, path, metadata={"format": "pt", "identity": identity})
    with _placed(folder / CONFIG) as path:
        path.write_text(text, encoding="utf-8")
    return folder


def load_quantized(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put a saved model into `model`, a plain one of the same architecture, and return it.

    Linear layers of the stored names become QuantizedLinear, on the device and in the mode (train
    or eval) of what they replace; other stored tensors are copied into the model's own. Raises
    StoreError, the model unchanged, where the folder is incomplete, of another version, damaged, or
    made of another architecture.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder, config)
    layers = {
        name: _layer(model, name, described, tensors, folder)
        for name, described in config["layers"].items()
    }
    inside = tuple(f"{name}." for name in layers)
    own = model.state_dict(keep_vars=True)
    copies: list[tuple[Tensor, Tensor]] = []
    for name, stored in tensors.items():
        if name.startswith(inside):
            continue
        target = own.get(name)
        if target is None or target.shape != stored.shape or target.is_meta:
            found = "none" if target is None else f"{tuple(target.shape)} on {target.device}"
            raise StoreError(
                f"{folder}: the stored tensor {name!r} is {tuple(stored.shape)}, and the model has"
                f" {found}; load into a model of the architecture that was saved"
            )
        copies.append((target, stored))
    lacking = [n for n in own if n not in tensors and not n.startswith(inside)]
    if config["complete"] and lacking:
        raise StoreError(
            f"{folder} was saved whole and lacks {len(lacking)} tensors of the model, the first"
            f" {lacking[0]!r}; load into a model of the architecture that was saved"
        )
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    with torch.no_grad():
        for target, stored in copies:
            target.copy_(stored)
    return model


def _layers_of(model: nn.Module) -> dict[str, QuantizedLinear]:
    layers = quantized_layers(model)
    if not layers:
        raise StoreError(
            f"{type(model).__name__} holds no QuantizedLinear layer: quantise it first. What"
            " ridgeline.optimize returns quantises inside its graphs and keeps the plain weights"
        )
    if "" in layers:
        raise StoreError("the model is a QuantizedLinear itself: put it into a module that has one")
    return layers


def _described(layer: QuantizedLinear) -> dict[str, Any]:
    weight = layer.quantized
    products = None if layer.multiply is None else str(layer.multiply).removeprefix("torch.")
    return {
        **layer.settings,
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "multiply": products,
        "bits_per_weight": weight.average_bits,
    }


def _changed(
    state: Mapping[str, Tensor], original: nn.Module | None, inside: tuple[str, ...]
) -> dict[str, Tensor]:
    """The tensors of `state` that `original` does not hold under the same names, and all `inside`
    quantised layers."""
    if original is None:
        return dict(state)
    known = original.state_dict()

    def same(name: str, tensor: Tensor) -> bool:
        other = None if name.startswith(inside) else known.get(name)
        if other is None or other.dtype != tensor.dtype or other.shape != tensor.shape:
            return False
        return torch.equal(other.to(tensor.device), tensor)

    return {name: tensor for name, tensor in state.items() if not same(name, tensor)}


def _once(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(distinct tensors, name -> the name under which the very same tensor is stored)."""
    first: dict[Any, str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in first:
            tied[name] = first[key]
            continue
        first[key] = name
        # Views of one storage (rows of stacked weights) are stored as tensors of their own.
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, tied


@contextlib.contextmanager
def _placed(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place once it is whole."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are their owner's alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read ({error.strerror}); give the folder that save_quantized wrote"
        ) from error
    except ValueError as error:
        raise StoreError(f"{path} is not JSON: {error}; save the model again") from error
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise StoreError(
            f"{path}: expected format {_FORMAT!r}, found"
            f" {config.get('format') if isinstance(config, dict) else config!r}; give the folder"
            " that save_quantized wrote"
        )
    if config.get("version") != VERSION:
        raise StoreError(
            f"{path}: expected version {VERSION}, found {config.get('version')!r}; load it with the"
            " ridgeline that saved it, or save it again with this one"
        )
    expected = {"identity": str, "complete": bool, "tied": dict, "layers": dict}
    for key, kind in expected.items():
        if not isinstance(config.get(key), kind):
            raise StoreError(
                f"{path}: key {key!r}: expected a {kind.__name__}, found {config.get(key)!r};"
                " save the model again"
            )
    return config


def _read_tensors(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The stored tensors by every name that they have."""
    path = folder / TENSORS
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error}); save the model again") from error
    except SafetensorError as error:
        raise StoreError(f"{path} is damaged ({error}); save the model again") from error
    if metadata.get("identity") != config["identity"]:
        raise StoreError(
            f"{path} and {folder / CONFIG} are of two different saves; save the model again"
        )
    for name, other in config["tied"].items():
        if str(other) not in tensors:
            raise StoreError(f"{path} lacks {other!r}, which {name!r} is tied to; save again")
        tensors[name] = tensors[str(other)]
    return tensors


def _layer(
    model: nn.Module, name: str, described: Any, tensors: Mapping[str, Tensor], folder: Path
) -> QuantizedLinear:
    """The layer `name` as stored, checked against the one that it will replace."""

    def refuse(why: str) -> StoreError:
        return StoreError(f"{folder}: layer {name!r}: {why}")

    try:
        replaced = model.get_submodule(name)
        sizes = _sizes(replaced)
    except (AttributeError, QuantizationError) as error:
        raise refuse(f"{error}; load into a model of the architecture that was saved") from error
    try:
        weight, multiply = _weight(name, described, tensors)
    except (KeyError, TypeError, AttributeError) as error:
        raise refuse(f"incomplete: {error!r}; save the model again") from error
    except QuantizationError as error:
        raise refuse(f"{error}; save the model again") from error
    if (stored := (len(weight.packed), weight.in_features)) != sizes:
        raise refuse(
            f"stored as {stored[0]}x{stored[1]}, where the model has {sizes[0]}x{sizes[1]}; load"
            " into a model of the architecture that was saved"
        )
    bias = tensors.get(f"{name}.bias")
    if (bias is None) != (replaced.bias is None) or (bias is not None and len(bias) != sizes[0]):
        raise refuse("its bias is not the model's; load into the architecture that was saved")
    device = next(iter(replaced.state_dict().values())).device
    layer = QuantizedLinear(weight, bias, multiply).to(device)
    return layer.train(replaced.training)


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(N, K) of a linear layer, plain or quantised."""
    if isinstance(module, QuantizedLinear):
        return module.out_features, module.in_features
    k = in_features(module)
    return module.get_parameter("weight").numel() // k, k


_CODECS: Mapping[str, Callable[[int, int], bool]] = {
    "uniform": lambda bits, terms: bits in BITS["minimum"],
    "binary": lambda bits, terms: bits in BITS["binary"],
    "shift": lambda bits, terms: bits in BITS["shift"] and bits % terms == 0,
}
"""The codecs of the op, and which of their bits and terms it reads."""
_PRODUCTS = ("float32", "bfloat16", "float16", "int16")


def _weight(
    name: str, described: Any, tensors: Mapping[str, Tensor]
) -> tuple[QuantizedWeight, torch.dtype | None]:
    settings = {k: described[k] for k in ("bits", "group_size", "group_rows", "terms")}
    for key, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise QuantizationError(f"{key} is {value!r}; expected a positive integer")
    codec = described["codec"]
    if codec not in _CODECS or not _CODECS[codec](settings["bits"], settings["terms"]):
        raise QuantizationError(
            f"codec {codec!r} with {settings['bits']} bits in {settings['terms']} terms is not"
            f" known; expected one of {', '.join(_CODECS)}"
        )
    multiply = described["multiply"]
    if multiply not in (None, *_PRODUCTS):
        raise QuantizationError(f"multiply is {multiply!r}; expected null or one of {_PRODUCTS}")
    held = {n: tensors.get(f"{name}.{n}") for n in OPERANDS}
    for key in ("packed", "scale"):
        if held[key] is None:
            raise KeyError(f"{name}.{key}")
    for key in ("scale", "offset", "row_scale"):
        tensor = held[key]
        if tensor is not None and tensor.is_floating_point() and not tensor.isfinite().all():
            raise QuantizationError(f"{key} holds NaN or infinite numbers")
    weight = QuantizedWeight(
        **held, codec_name=codec, in_features=described["in_features"], **settings
    )  # pyright: ignore[reportArgumentType]
    order = weight.permutation
    if order is not None:
        straight = torch.arange(weight.in_features)
        if not torch.equal(order.long().sort().values, straight):
            raise QuantizationError("permutation does not name every column once")
    return weight, None if multiply is None else getattr(torch, multiply)
