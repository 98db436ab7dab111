"""Files of a Hub repository, fetched into the cache; without a connection, what the cache has."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from varkern.models.files import CheckpointError

FILES = ("config.json", "model.safetensors", "vae.safetensors", "classes.json")
_SUFFIX = re.compile(r"\.(safetensors|pth|pt|bin|ckpt|th|json|zip|tar|gz|tgz|png)$", re.IGNORECASE)
_PATIENCE = 5.0  # seconds for the first answer


def is_hub_id(source: str) -> bool:
    """Whether a string that names nothing here is a repository, ``user/name``, and no mistyped path."""
    return (
        re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) is not None
        and not _SUFFIX.search(source)
        and not Path(source.split("/")[0]).exists()
    )


def fetch(
    repository: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder in the cache with what `FILES` names of a repository. Raises CheckpointError in one sentence."""
    # huggingface_hub itself tries for half a minute, at every file.
    unreachable = "" if local_files_only else _unreachable()
    settings: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
    try:
        return Path(
            snapshot_download(
                repository,
                allow_patterns=list(FILES),
                force_download=force_download and not unreachable,
                local_files_only=local_files_only or bool(unreachable),
                **settings,
            )
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"the repository {repository} asks for consent: give it on its page, then log in"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository} is neither a file, nor a directory, nor a repository on the Hub that is open to you; "
            "check the name, or log in"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"the repository {repository} has no revision {revision}; name a branch, tag or commit that it has"
        ) from error
    except LocalEntryNotFoundError as error:
        why = f"the Hub cannot be reached ({unreachable})" if unreachable else "only the cache was to be read"
        raise CheckpointError(
            f"{repository} is neither a file nor a directory, nor a Hub repository in the cache, and {why}"
        ) from error
    except (HFValidationError, OSError, RuntimeError, ValueError) as error:  # a full disk, an error of the server ...
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"{repository} could not be fetched from the Hub: {reason}") from error


def _unreachable() -> str:
    """Why the Hub does not answer, or nothing where it does."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception as error:  # of the HTTP library, which changes with huggingface_hub's version
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ""
