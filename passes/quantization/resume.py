"""Quantised weights kept on disk layer by layer, so that a long run can be taken up again."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ridgeline.passes.quantization.codec import QuantizationError, QuantizedWeight

_FIELDS = ("bits", "group_size", "in_features", "codec_name", "group_rows", "terms")


class Results:
    """Results of one run; `known` are those of its earlier, interrupted starts.

    folder: None keeps nothing. fingerprint: of the run; a folder that holds another run's results
    raises QuantizationError.
    """

    def __init__(self, folder: str | Path | None, fingerprint: str) -> None:
        self.folder = None if folder is None else Path(folder)
        self.fingerprint = fingerprint
        self.known: dict[str, QuantizedWeight] = {}
        if self.folder is not None:
            if self.folder.exists() and not self.folder.is_dir():
                raise QuantizationError(f"folder is {self.folder}, a file; name a folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(self.folder.glob("*.safetensors")):
                name, weight = self._read(file)
                self.known[name] = weight

    def add(self, name: str, weight: QuantizedWeight) -> None:
        """Keep one result: the file appears whole or not at all."""
        if self.folder is None:
            return
        about = {field: getattr(weight, field) for field in _FIELDS}
        metadata = {"run": self.fingerprint, "layer": name, "about": json.dumps(about)}
        file = self.folder / f"{name}.safetensors"
        part = file.with_suffix(".part")
        tensors = {key: tensor.contiguous() for key, tensor in weight.tensors.items()}
        save_file(tensors, part, metadata)
        part.replace(file)

    def _read(self, file: Path) -> tuple[str, QuantizedWeight]:
        try:
            with safe_open(file, "pt") as held:
                metadata = held.metadata() or {}
                tensors = {key: held.get_tensor(key) for key in held.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise QuantizationError(f"{file} cannot be read ({error}); delete it") from error
        if metadata.get("run") != self.fingerprint:
            raise QuantizationError(
                f"{file} is of another model, codec or calibration text; name an empty folder, or"
                " delete this one"
            )
        about = json.loads(metadata["about"])
        return metadata["layer"], QuantizedWeight(**({"offset": None} | tensors | about))
