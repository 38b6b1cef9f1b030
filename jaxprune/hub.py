"""Files from and to the Hugging Face hub, through its own client, of the extra ``cli``."""

from __future__ import annotations

import contextlib
import re
import shlex
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
    except ImportError:
        raise InputError(
            f"{what}: no such folder or file here, and reading from the hub needs "
            "`pip install 'jaxprune[cli]'`"
        ) from None
    try:
        with _no_retries_told():
            yield
    except errors.GatedRepoError:
        raise InputError(
            f"{what}: the hub asks for permission; accept its terms there and run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{what}: no such folder or file here, nor on the hub") from None
    except (OSError, ValueError, _http_error(), errors.EntryNotFoundError) as error:
        raise InputError(
            f"{what}: no such folder or file here, and the hub did not give it "
            f"({type(error).__name__}); check the name and the network, or give a local path"
        ) from None


def _http_error() -> Any:
    """The base of the errors of the HTTP library, which differs between versions of the client."""
    from huggingface_hub import errors

    return errors.HfHubHTTPError.__mro__[1]


@contextlib.contextmanager
def _no_retries_told() -> Iterator[None]:
    """The client logs every retry; the one line of an error says it once."""
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def check_upload(push: str, *, public: bool = False) -> None:
    """Raise ``InputError`` unless a folder may be expected to go where ``upload`` is to put it.

    To be called before long work. The hub is asked whose token is there, and whether what is
    called ``push`` already is as visible as is asked for.

    Args:
      push: ``owner/name`` of a repository on the hub, new or not.
      public: everyone is to see it.

    Raises:
      InputError: no such form, no token that may write, no network, or another visibility.
    """
    import huggingface_hub
    from huggingface_hub.utils import validate_repo_id

    try:
        if not (is_repository(push) and push.isascii()):
            raise ValueError
        validate_repo_id(push)
    except ValueError:
        raise InputError(
            f"push {push!r:.120}: expected OWNER/NAME in letters, digits and single -, _ or ."
        ) from None
    if huggingface_hub.get_token() is None:
        raise InputError(f"push {push}: no token of the hub is stored here; run `hf auth login`")
    api = huggingface_hub.HfApi()
    with _no_retries_told():
        try:
            token = api.whoami().get("auth", {}).get("accessToken", {})
            _check_visibility(api, push, public=public)
        except InputError:
            raise
        except (OSError, ValueError, _http_error()) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403):
                raise InputError(
                    f"push {push}: the hub refuses the token that is stored here; run "
                    "`hf auth login`"
                ) from None
            raise InputError(
                f"push {push}: the hub does not answer ({_first_line(error)})"
            ) from None
    if token.get("role") == "read":
        raise InputError(
            f"push {push}: the token that is stored here may only read; make one that may write, "
            "and run `hf auth login`"
        )


def upload(folder: Path, push: str, *, public: bool = False) -> str:
    """Upload the files of a folder to a repository, made where there is none; its address.

    Args:
      folder: of a finished checkpoint; it stays as it is.
      push: see ``check_upload``.
      public: everyone may see it; else the owner alone.

    Raises:
      InputError: it failed; the message says how to try again.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        with _no_retries_told():
            _check_visibility(api, push, public=public)
            address = api.create_repo(push, private=not public, exist_ok=True)
            api.upload_folder(
                repo_id=push, folder_path=folder, commit_message="Upload a pruned checkpoint"
            )
    except Exception as error:  # noqa: BLE001 - the client, HTTP and its transfer raise anything
        again = f"hf upload {push} {shlex.quote(str(folder))} ." + (" --private" * (not public))
        reason = _first_line(error)
        if isinstance(error, InputError):
            reason = str(error).removeprefix(f"push {push}: ")
        raise InputError(
            f"push {push}: not uploaded ({reason}); {folder} is finished, `{again}` uploads it"
        ) from None
    return str(address)


def _check_visibility(api: Any, push: str, *, public: bool) -> None:
    """Raise ``InputError`` for a repository that is there and is not as visible as asked for."""
    from huggingface_hub import errors

    try:
        private = api.repo_info(push).private
    except errors.RepositoryNotFoundError:
        return
    if private == public:
        raise InputError(
            f"push {push}: is on the hub already and is {'private' if private else 'public'}; "
            f"{'leave out' if public else 'give'} `public`, or choose another name"
        )


def _first_line(error: Exception) -> str:
    """What an error of the client says first, without its page of details."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]:.200}" if lines else type(error).__name__
