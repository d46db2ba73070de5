"""Checkpoints on the Hugging Face hub: what a model needs of a repository, in huggingface_hub's cache."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_LONGEST_REPO_ID = 96
_CONFIG = "config.json"
_TOKENIZER = ("vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "added_tokens.json")
# In order of preference: a file, or an index and the pattern of the shards that it names.
_WEIGHTS = (
    ("model.safetensors", None),
    ("model.safetensors.index.json", re.compile(r"model-\d+-of-\d+\.safetensors")),
    ("pytorch_model.bin", None),
    ("pytorch_model.bin.index.json", re.compile(r"pytorch_model-\d+-of-\d+\.bin")),
)


def is_repo_id(name: str) -> bool:
    """Whether a name has the form of a repository on the hub: `name` or `owner/name`."""
    short = len(name) <= _LONGEST_REPO_ID
    return short and _REPO_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def fetch(
    repo_id: str,
    *,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    """The folder in the cache that holds the model's config, weights and tokenizer, downloading what is not
    there.

    Files are downloaded by `huggingface_hub`, whose cache, `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE` and
    progress bars apply. One form of the weights is downloaded: safetensors where the repository has it, else
    PyTorch's. Without a connection, what an earlier call downloaded is used.

    Raises:
        FileNotFoundError: no such repository or revision, no weights in it, or offline and not in the cache.
        ValueError: `repo_id` is not the name of a repository.
        RuntimeError: access needs a token, or the hub cannot be reached and the model is not in the cache.
    """
    # Importing it costs more than everything else here together, and folders do without it.
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cache_dir = None if cache_dir is None else Path(cache_dir)
    url = f"{ENDPOINT}/{repo_id}"
    cause: Exception | None = None
    try:
        if not local_files_only:
            try:
                info = HfApi(token=token).model_info(repo_id, revision=revision)
                names = [file.rfilename for file in info.siblings or []]
                wanted = needed_files(names, f"{url}{f' at {revision}' if revision else ''}")
                folder = snapshot_download(
                    repo_id, revision=revision, cache_dir=cache_dir, token=token, allow_patterns=wanted
                )
                return Path(folder)
            except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
                raise
            except FileNotFoundError as error:
                if not isinstance(error, LocalEntryNotFoundError):
                    raise
                cause = error
            except Exception as error:
                # No connection, offline mode, an answer of 500: what is in the cache is good enough.
                cause = error
        folder = snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=True,
            allow_patterns=[_CONFIG],
        )
        return Path(folder)
    except GatedRepoError as error:
        raise RuntimeError(
            f"{repo_id} is gated: ask for access at {url} and give a token (token= or HF_TOKEN)"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"no folder or file {repo_id!r} and no model of that name at {url}; "
            "a private one needs a token (token= or HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{url} has no revision {revision!r}") from error
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is neither a folder or file nor a hub name: {error}") from error
    except LocalEntryNotFoundError as error:
        raise _unreachable(repo_id, url, cause) from (cause or error)


def needed_files(names: Sequence[str], where: str) -> list[str]:
    """Which files of a repository a model needs: its config, one form of its weights, and its tokenizer.

    Args:
        names: the files of the repository.
        where: what to call it in error messages.

    Raises:
        FileNotFoundError: there is no config or there are no weights among them.
    """
    if _CONFIG not in names:
        raise FileNotFoundError(f"{where} has no {_CONFIG}")
    for first, shards in _WEIGHTS:
        if first in names:
            weights = [first] + [name for name in names if shards and shards.fullmatch(name)]
            return [_CONFIG, *weights, *(name for name in names if name in _TOKENIZER)]
    looked_for = ", ".join(first for first, _ in _WEIGHTS)
    raise FileNotFoundError(f"{where} has no weights: none of {looked_for}")


def _unreachable(repo_id: str, url: str, cause: Exception | None) -> Exception:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if cause is None or isinstance(cause, OfflineModeIsEnabled):
        return FileNotFoundError(f"{repo_id} is not in the local cache and downloads are off (offline mode)")
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return RuntimeError(f"{repo_id} is not in the local cache and {url} could not be fetched: {reason}")
