"""The weights of a directory: safetensors, in one file or in several that an index names."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.errors import UserError, explained, parse_json
from pretrain.hf.names import INDEX_FILE, WEIGHTS_FILE

ADVICE = "get the file again"


class WeightFiles:
    """The tensors of a directory by name; each is read when it is asked for.

    Raises UserError where there are none, or a file is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file_of: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in self._file_names():
            path = directory / name
            with explained((SafetensorError, OSError), f"{path}: not readable", ADVICE):
                self._open(path)

    def _file_names(self) -> list[str]:
        index = self.directory / INDEX_FILE
        if not index.is_file():
            if not (self.directory / WEIGHTS_FILE).is_file():
                raise UserError(
                    f"{self.directory}: no {WEIGHTS_FILE}; save the model with save_pretrained, "
                    "which writes safetensors"
                )
            return [WEIGHTS_FILE]
        told = parse_json(index.read_bytes(), str(index), ADVICE)
        with explained((KeyError, TypeError, AttributeError), f"{index}: damaged", ADVICE):
            names = sorted(set(told["weight_map"].values()))
        for name in names:
            # None outside of the directory is ever opened.
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{index}: names {name!r}, which is no file beside it; {ADVICE}")
        return names

    def _open(self, path: Path) -> None:
        opened: Any = safe_open(path, "pt")
        for name in opened.keys():  # noqa: SIM118 - a safetensors file, no dict
            self._file_of[name] = opened
            self.shapes[name] = tuple(opened.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, in fp32. Raises UserError for one that holds no numbers."""
        with explained(SafetensorError, f"{self.directory}: {name} is not readable", ADVICE):
            values: Tensor = self._file_of[name].get_tensor(name).float()
        if not values.isfinite().all():
            raise UserError(
                f"{self.directory}: {name} holds what is no number; its training diverged, or the "
                "file is damaged"
            )
        return values
