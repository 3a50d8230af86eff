"""Download from the Hugging Face Hub, by its own client.

A revision is resolved to its commit first, and only files of that commit are downloaded. HF_TOKEN (or the token of
`hf auth login`) and HF_ENDPOINT apply.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from scumble.errors import IntegrityError, InvalidRequest, NotFound, Refused, Unavailable
from scumble_registry.hashes import file_sha256
from scumble_registry.sources import LARGEST, Fetched, HubSource
from scumble_registry.sources.hub_files import choose

_TIMEOUT = 30.0


def fetch(source: HubSource, folder: Path, *, include: Collection[str] = (), max_bytes: int | None = None) -> Fetched:
    """Download the needed files of a repository into `folder`; `include` are patterns that select other files.

    Raises InvalidRequest, NotFound, Refused (gated or too large, before anything is downloaded), IntegrityError,
    Unavailable.
    """
    with _explained(source):
        info = HfApi(endpoint=_endpoint()).model_info(
            source.repo, revision=source.revision, files_metadata=True, timeout=_TIMEOUT
        )
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or () if _stays_inside(sibling.rfilename)}
        names = choose(siblings, source.path, include)
        limit = LARGEST if max_bytes is None else max_bytes
        _check_size(names, sum(siblings[name].size or 0 for name in names), limit, source)
        if not info.sha:
            raise Unavailable(f"{source.repo}: the Hub did not name the commit; try again later")
        fetched = 0
        for name in names:
            fetched += _fetch_file(source.repo, info.sha, siblings[name], folder)
            _check_size(names, fetched, limit, source)  # the Hub's sizes may be missing or wrong
    path = folder / source.path if source.path else folder
    if len(names) == 1 and source.path not in siblings:
        path = folder / names[0]
    return Fetched(path, _origin(source, info.sha, names, path), _license(info))


def _fetch_file(repo: str, commit: str, sibling: RepoSibling, folder: Path) -> int:
    """Download one file, check its sha256 if the Hub has one, and return its size. Raises IntegrityError."""
    path = Path(hf_hub_download(repo, sibling.rfilename, revision=commit, local_dir=folder, endpoint=_endpoint()))
    expected = sibling.lfs.sha256 if sibling.lfs is not None else None
    if expected is not None and (actual := file_sha256(path)) != expected:
        raise IntegrityError(
            f"{sibling.rfilename} of {repo} came with sha256 {actual}, not {expected}; try again",
            digest=f"sha256:{expected}",
            actual=f"sha256:{actual}",
        )
    return path.stat().st_size


def _stays_inside(name: str) -> bool:
    return not {"", ".", ".."} & set(name.split("/")) and name.isprintable()


def _check_size(names: list[str], size: int, limit: int, source: HubSource) -> None:
    if size > limit:
        raise Refused(
            f"{source.repo}: the {len(names)} files that are needed have {size:,} bytes; "
            f"at most {limit:,} are fetched (--max-size)",
            bytes=size,
        )


def _origin(source: HubSource, commit: str, names: list[str], path: Path) -> dict[str, Any]:
    name = names[0] if path.is_file() else source.path
    what = "resolve" if path.is_file() else "tree"
    url = f"https://huggingface.co/{source.repo}/{what}/{commit}" + (f"/{quote(name)}" if name else "")
    origin: dict[str, Any] = {"url": url, "repository": source.repo, "commit": commit}
    return origin | ({"file": path.name, "sha256": file_sha256(path)} if path.is_file() else {"files": names})


def _license(info: ModelInfo) -> str | None:
    """Return the model card's license, if it names one."""
    text = info.card_data.get("license") if info.card_data is not None else None
    return text if isinstance(text, str) and text.isprintable() and text not in {"", "other", "unknown"} else None


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def _explained(source: HubSource) -> Iterator[None]:
    what = f"{source.repo}@{source.revision}" if source.revision else source.repo
    try:
        yield
    except HFValidationError as error:
        raise InvalidRequest(f"{source.repo} is not the name of a repository: {error}", field="source") from error
    except GatedRepoError as error:
        raise Refused(
            f"{source.repo} is gated: accept its conditions at https://huggingface.co/{source.repo} and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise NotFound(
            f"{source.repo} has no revision {source.revision}; check its branches and tags", revision=source.revision
        ) from error
    except RepositoryNotFoundError as error:
        raise NotFound(
            f"there is no repository {source.repo}, or it is private: check the name, or set HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        raise Unavailable(f"{what} could not be fetched: the Hub did not answer; try again later") from error
    except EntryNotFoundError as error:
        raise NotFound(f"{what} has no such file; check the path") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise Unavailable(
            f"the Hub answered with status {status} for {what}; try again later", status=status
        ) from error
    except (httpx2.HTTPError, OSError) as error:
        raise Unavailable(f"{what} could not be fetched: {error}; check the network, space and permissions") from error
