"""Find weights files of the Hugging Face hub by name, in the cache where its client keeps them.

A file from there is a stranger's. It must be safetensors, and is fetched only where that was asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from deepvit_train.error import CheckpointError
from deepvit_train.run.description import read_description

PREFIX = "hf:"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
# Bytes of each file that is fetched. The largest public ViTs have 22 GB of weights, and are not plain ones.
LARGEST = {WEIGHTS: 16 << 30, CONFIG: 4 << 20}
NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)


@dataclass(frozen=True)
class Repository:
    """A repository of the hub.

    Args:
        name: 'ORG/NAME'.
        revision: a branch, a tag or a commit; None: the main branch.
    """

    name: str
    revision: str | None = None

    @property
    def label(self) -> str:
        """Return the name of files and folders about it: 'ORG--NAME'."""
        return self.name.replace("/", "--")


def parse(path: str) -> Repository | None:
    """Return the repository that 'hf:ORG/NAME' or 'hf:ORG/NAME@REVISION' means, or None for another path.

    Raises ValueError for 'hf:' and anything else.
    """
    if not path.startswith(PREFIX):
        return None
    match = NAME.fullmatch(path.removeprefix(PREFIX))
    if match is None or ".." in path:
        raise ValueError(f"not of the form {PREFIX}ORG/NAME or {PREFIX}ORG/NAME@REVISION")
    return Repository(match[1], match[2])


def weights_file(repository: Repository, download: bool) -> Path:
    """Return the weights file of a repository. config.json lies beside it if the repository has one.

    Args:
        download: whether to fetch what is not in the cache.

    Raises CheckpointError for a file that is not there, can't be fetched or is no safetensors.
    """
    found = _cached(repository, WEIGHTS)
    if found is None and not download:
        raise CheckpointError("is not in the hub's cache; nearest: download=true fetches it")
    file = found or _fetched(repository)
    read_description(file)  # raises for anything but safetensors, which is all that is read of a stranger
    return file


def why(error: Exception) -> str:
    """Return in a few words why the hub's client failed."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "its owner must allow it first; then give a token (hf auth login, or HF_TOKEN)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or a private one that needs a token (hf auth login, or HF_TOKEN)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the hub can't be reached"
    if isinstance(error, errors.EntryNotFoundError):
        return f"holds no {WEIGHTS}, and no other file is read"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _cached(repository: Repository, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository.name, file, revision=repository.revision)
    return Path(found) if isinstance(found, str) else None


def _fetched(repository: Repository) -> Path:
    """Fetch the weights and config.json, if they are not too large, and return the first."""
    import huggingface_hub

    api, names = huggingface_hub.HfApi(), list(LARGEST)
    try:
        sizes = {
            entry.path: int(getattr(entry, "size", 0))
            for entry in api.get_paths_info(repository.name, names, revision=repository.revision)
        }
        for name, size in sizes.items():
            if size > LARGEST[name]:
                raise CheckpointError(f"{name} has {size:,} bytes, more than the {LARGEST[name]:,} accepted")
        if WEIGHTS not in sizes:
            raise CheckpointError(f"holds no {WEIGHTS}, and no other file is read")
        files = {
            name: Path(huggingface_hub.hf_hub_download(repository.name, name, revision=repository.revision))
            for name in sizes
        }
    except CheckpointError:
        raise
    except Exception as error:  # the client raises anything where there is no network
        raise CheckpointError(f"can't be fetched ({why(error)})") from None
    if len({file.parent for file in files.values()}) > 1:  # a folder of the cache holds one commit
        raise CheckpointError("changed while it was fetched; fetch it again")
    return files[WEIGHTS]
