"""Files of the Hugging Face hub, through its own client, of the extra ``cli``."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxprune.errors import InputError

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def is_repository(name: str) -> bool:
    """Whether ``name`` has the form ``owner/name`` of a repository on the hub."""
    return _REPOSITORY.fullmatch(name) is not None


def fetch_model(repository: str, patterns: Sequence[str]) -> Path:
    """The folder with the files of a model that match ``patterns``, downloaded where needed.

    Raises:
      InputError: no client, no network, no such repository, or no access to it.
    """
    with _one_line_errors(repository):
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(patterns)))


def fetch_dataset_file(repository: str, name: str) -> Path:
    """One file of a data set, downloaded where needed.

    Raises:
      InputError: no client, no network, no such file, or no access to it.
    """
    with _one_line_errors(f"{repository}/{name}"):
        import huggingface_hub

        return Path(huggingface_hub.hf_hub_download(repository, name, repo_type="dataset"))


@contextlib.contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    try:
        from huggingface_hub import errors
        from huggingface_hub.utils import logging
    except ImportError:
        raise InputError(
            f"{what}: no such folder or file here, and reading from the hub needs "
            "`pip install 'jaxprune[cli]'`"
        ) from None
    # The HTTP library differs between versions of the client; its errors are the base of theirs.
    http_error: Any = errors.HfHubHTTPError.__mro__[1]
    # The client logs every retry; the one line below says it once.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except errors.GatedRepoError:
        raise InputError(
            f"{what}: the hub asks for permission; accept its terms there and run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{what}: no such folder or file here, nor on the hub") from None
    except (OSError, ValueError, http_error, errors.EntryNotFoundError) as error:
        raise InputError(
            f"{what}: no such folder or file here, and the hub did not give it "
            f"({type(error).__name__}); check the name and the network, or give a local path"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
