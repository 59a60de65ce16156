"""Where a pipeline's folder comes from: the bundled demo, the disk, or the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from flexvar.checkpoint import MissingCheckpointError
from flexvar.storage import CONFIG_FILE, WEIGHTS_FILE

DEMO = "demo"
DEMO_FOLDER = Path(__file__).resolve().parents[1] / "demo"

TOKENIZER_FOLDER = "tokenizer"
TRANSFORMER_FOLDER = "transformer"
SETTINGS_FILE = "generation.json"
#: What a pipeline's folder holds, besides the optional :data:`SETTINGS_FILE`. Nothing else is ever read or fetched.
FILES = tuple(
    f"{part}/{file}" for part in (TOKENIZER_FOLDER, TRANSFORMER_FOLDER) for file in (CONFIG_FILE, WEIGHTS_FILE)
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_pipeline_folder(folder: Path) -> bool:
    """Whether the four files of a pipeline are there."""
    return all((folder / file).is_file() for file in FILES)


def locate_pipeline(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a pipeline: ``"demo"``, a folder, or a Hub id ``owner/name``, in that order.

    Raises:
        OSError: nothing is there, files are missing, or the Hub cannot be reached.
        ImportError: it is a Hub id and ``huggingface_hub`` is not installed.
        ValueError: a revision for something that is not on the Hub.
    """
    name = os.fspath(source)
    folder = DEMO_FOLDER if name == DEMO else Path(name)
    if name != DEMO and not folder.is_dir() and isinstance(source, str) and _is_hub_id(name):
        return _download(name, revision)
    if revision is not None:
        raise ValueError(f"from_pretrained: revision must be left out where {name!r} is not a Hub id, got {revision!r}")
    if not folder.is_dir():
        raise MissingCheckpointError(
            f'from_pretrained: source must be "demo", a folder or a Hub id owner/name, got {name!r}'
        )
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise MissingCheckpointError(
            f"from_pretrained: {folder} must hold {', '.join(FILES)}, but lacks {', '.join(missing)}"
        )
    return folder


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and ".." not in name


def _download(repository: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"from_pretrained: {repository!r} is no folder here, and huggingface_hub, which would fetch it, is not "
            "installed: pip install huggingface_hub"
        ) from error
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[*FILES, SETTINGS_FILE]))
    except (OSError, ValueError) as error:  # its errors are all of these: offline, not found, no access, a bad id
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"from_pretrained: {repository!r} cannot be fetched from the Hub: {reason}") from error
    if not is_pipeline_folder(folder):
        raise MissingCheckpointError(f"from_pretrained: {repository!r} on the Hub must hold {', '.join(FILES)}")
    return folder
