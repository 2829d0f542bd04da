"""Models and data sets on the Hub of Hugging Face, by `huggingface_hub` and in its cache.

`HF_HUB_OFFLINE`, `HF_HOME`, `HF_TOKEN` and `HF_ENDPOINT` have the meaning that they have there.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from patchdiffusion.system.files import expanded
from patchdiffusion.system.optional import require
from patchdiffusion.system.text import printable

Kind = Literal["model", "dataset"]

_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9])?"
_NAME = re.compile(rf"({_PART}/{_PART})((?:/[\w.-]+)*)(?:@([\w][\w./-]*))?", re.ASCII)
FORM = "user/name, or user/name@revision"
_LONGEST_REASON = 200


class HubName(NamedTuple):
    """Repository on the hub, a folder in it, and the revision: a branch, tag or commit."""

    repository: str
    folder: str
    revision: str | None

    @property
    def short(self) -> str:
        """Name without that of the user."""
        return self.repository.partition("/")[2]


def hub_name(text: str) -> HubName | None:
    """Name on the hub, of the form user/name@revision; None for a text that is none.

    A path below a folder that exists is none either, nor is one that exists.
    """
    match = _NAME.fullmatch(text)
    if match is None or ".." in text or expanded(text).exists():
        return None
    if Path(text.partition("/")[0]).is_dir():
        return None
    return HubName(match[1], match[2].strip("/"), match[3])


def snapshot(name: HubName, kind: Kind, patterns: Sequence[str], missing: str) -> Path:
    """Folder of the files of a repository, in the cache of the hub; fetched if they are not there.

    `patterns` are those of the files, `missing` says what the name was not found as. Raises
    `ValueError` in one line if they cannot be had.
    """
    hub = _library(f"{missing}; names on the hub need huggingface_hub")
    try:
        folder = hub.snapshot_download(
            name.repository, repo_type=kind, revision=name.revision, allow_patterns=list(patterns)
        )
    except Exception as error:  # of many kinds, also of the libraries below
        raise ValueError(f"{missing}: {reason(error)}") from error
    return Path(folder) / name.folder


def upload(name: HubName, folder: Path, *, private: bool, message: str) -> str:
    """Put the files of a folder into a repository, which is created if there is none; its address.

    Raises `ValueError` in one line if that cannot be done.
    """
    hub = _library("a model is pushed by huggingface_hub")
    try:
        api = hub.HfApi()
        api.create_repo(name.repository, private=private, exist_ok=True)
        if name.revision is not None:
            api.create_branch(name.repository, branch=name.revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=name.repository,
            folder_path=folder,
            revision=name.revision,
            commit_message=message,
        )
    except Exception as error:
        raise ValueError(
            f"{name.repository} could not be pushed to the hub: {reason(error)}"
        ) from error
    return str(done.repo_url)


def _library(why: str) -> Any:
    try:
        return require("huggingface_hub", extra="hub")
    except ImportError as error:
        raise ImportError(f"{why}: {error}") from error


def reason(error: BaseException) -> str:
    """One line about an error of `huggingface_hub`: the problem, and the remedy."""
    errors = require("huggingface_hub.errors", extra="hub")
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and len(chain) < 20:
        chain.append(cause)

    def of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    answers = [vars(e).get("response") for e in chain if isinstance(e, errors.HfHubHTTPError)]
    status = next((answer.status_code for answer in answers if answer is not None), 0)
    if of(errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and the cache of the hub does not have it"
    if of(errors.LocalTokenNotFoundError) or status == 401:
        return (
            "401, there is no such repository, or it is private and this is no user who may see or "
            "change it; log in by `hf auth login`, or set HF_TOKEN"
        )
    if of(errors.GatedRepoError) or status == 403:
        return "403, access must be granted: ask for it on its page, or use a token that may write"
    if of(errors.RevisionNotFoundError):
        return "404, there is no such revision; name a branch, tag or commit"
    if status == 404 or of(errors.RepositoryNotFoundError):
        return "404, there is no such repository on the hub"
    if status:
        return f"the hub answers {status}: {_line(error)}"
    if of(ConnectionError, TimeoutError) or any(
        "connect" in type(e).__name__.lower() for e in chain
    ):
        return "the hub cannot be reached, and its cache does not have it; see your network"
    if of(errors.LocalEntryNotFoundError):
        return "the hub cannot be reached, or HF_HUB_OFFLINE is set, and its cache does not have it"
    return _line(error)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:_LONGEST_REASON]
    return printable(text) or type(error).__name__
