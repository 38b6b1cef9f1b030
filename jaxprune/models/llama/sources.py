"""Where a checkpoint comes from: the package, a folder, a GGUF file, the hub."""

from __future__ import annotations

from pathlib import Path

from jaxprune import hub
from jaxprune.errors import InputError
from jaxprune.models.llama import gguf
from jaxprune.models.llama.files import CARD_FILE, CARRIED
from jaxprune.models.zoo import ZOO


def locate(model: str | Path) -> Path:
    """The folder of a checkpoint.

    Args:
      model: ``zoo`` (the embedded model), a folder, a GGUF file (converted once, see ``gguf``),
        or a repository ``owner/name`` of the hub.

    Raises:
      InputError: there is none.
    """
    if str(model) == "zoo":
        return ZOO
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.suffix.lower() == ".gguf":
        return gguf.converted(folder)
    if folder.exists():
        raise InputError(
            f"{model}: is not a file that holds a model; give a folder with config.json or a .gguf"
        )
    if isinstance(model, str) and hub_name(model) is not None:
        return hub.fetch_model(model, [*CARRIED, CARD_FILE, "*.safetensors"])
    raise InputError(
        f"{model}: no such folder; give zoo, a folder, a .gguf, or owner/name on the hub"
    )


def hub_name(model: str) -> str | None:
    """The repository on the hub that ``locate`` takes a name for; ``None`` for what is here."""
    return model if hub.is_repository(model) and not Path(model).exists() else None
