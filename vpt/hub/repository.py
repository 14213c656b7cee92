"""Task files on the Hugging Face Hub: a repository of `task.safetensors` and a card, `README.md`.

What comes from the hub is checked as any stranger's file is, see `vpt.models.task_file`.

`huggingface_hub` does the talking, so what it reads from the environment holds here: HF_ENDPOINT, HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.hub.card import model_card, plain
from vpt.models.task_file import Model, load_task, open_task, read_task
from vpt.models.vit import ViT
from vpt.storage.files import MAX_BYTES
from vpt.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TASK_FILE = "task.safetensors"
LOG_IN = "log in with `hf auth login`, or give token="


def push_to_hub(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str = f"Upload {TASK_FILE}",
) -> str:
    """Put a task file and a card of it into a repository of the hub, in one commit; return the commit's URL.

    The repository is made when it is missing; what it had under these two names is replaced.

    Args:
        path: A task file; it is checked first.
        repo_id: The repository, such as "ann/pets"; without "ann/" that of the token's owner.
        private: Whether only those who may see the repository can; one that is there and public is refused.
        token: For the hub; by default that of HF_TOKEN or `hf auth login`.
        revision: The branch, made when it is missing; main by default.
        message: Of the commit.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, the repository's id cannot be, or the repository is public but should not be.
        PermissionError: The hub does not let this token write there.
        ConnectionError: The hub cannot be reached.
    """
    path = Path(path)
    metadata, tensors = open_task(path)
    with _one_line_errors(repo_id):
        api = _api(token)
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        is_public = private and not api.model_info(repo_id).private
    if is_public:
        raise ValueError(f"{repo_id}: is there and public; make it private in its settings, or name another repository")
    card = model_card(metadata, repo_id, tensors)
    with _one_line_errors(repo_id, revision):
        from huggingface_hub import CommitOperationAdd

        task = CommitOperationAdd(path_in_repo=TASK_FILE, path_or_fileobj=path)
        readme = CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=card.encode())
        if revision is not None and not revision.startswith("refs/"):  # those of pull requests are the hub's to make
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.create_commit(repo_id, [task, readme], commit_message=message, revision=revision).commit_url


def from_pretrained(
    repo_id: str | Path,
    backbone: str | ViT,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    checkpoint: str | Path | None = None,
) -> Model:
    """Read a task from the hub, or from a folder, onto a backbone; the model is in eval mode.

    Args:
        repo_id: As `download` takes it, like the next three.
        backbone: A timm ViT in memory, or the timm name of one, see `vpt.load_task`.
        revision: A branch, tag or commit.
        token: For the hub.
        cache_dir: Where downloaded files are kept.
        checkpoint: With a name: load the backbone's weights from this file.

    Raises:
        FileNotFoundError: There is no such repository, revision, folder or file.
        ValueError: The file is damaged, is no task file, or belongs to another backbone.
        PermissionError: The hub does not show the repository to this token.
        ConnectionError: The hub cannot be reached, and the file is not in the cache.
    """
    path = download(repo_id, revision=revision, token=token, cache_dir=cache_dir)
    return load_task(path, backbone, checkpoint=checkpoint)


def download(
    repo_id: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The path of a repository's task file, for a `TaskBank` say; downloaded if the cache has it not, and checked.

    Without a network the newest copy in the cache is used.

    Args:
        repo_id: The repository, such as "ann/pets". A folder of this name with a `task.safetensors`, such as a run's,
            goes first, as does a task file; the other arguments are not used then.
        revision: A branch, tag or commit; main by default.
        token: For the hub; by default that of HF_TOKEN or `hf auth login`.
        cache_dir: Where downloaded files are kept; by default where `huggingface_hub` keeps all.

    Raises:
        FileNotFoundError: There is no such repository, revision, folder or file.
        ValueError: The file is damaged or no task file, or `repo_id` cannot be the id of a repository.
        PermissionError: The hub does not show the repository to this token.
        ConnectionError: The hub cannot be reached, and the file is not in the cache.
    """
    local = _find_local(repo_id)
    if local is not None:
        return local
    repo_id = str(repo_id)
    try:
        return _fetch(repo_id, revision, token, cache_dir)
    except _RefusedFileError as refused:
        # Perhaps only the copy in the cache is damaged: the cache itself would never replace it.
        try:
            return _fetch(repo_id, revision, token, cache_dir, force_download=True)
        except OSError:
            raise refused from None


class _RefusedFileError(ValueError):
    """A file of the hub that is no whole task file."""


def _api(token: str | bool | None) -> "HfApi":
    """The client, which finds the hub by HF_ENDPOINT."""
    from huggingface_hub import HfApi

    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):  # or an error about headers would show it
        raise ValueError("token is empty, or has blanks or other characters that no token has; copy it anew")
    return HfApi(token=token, library_name="vpt", library_version=__version__)


def _find_local(repo_id: str | Path) -> Path | None:
    path = Path(repo_id)
    if not path.is_dir():
        return path if path.is_file() else None
    if not (path / TASK_FILE).is_file():
        raise FileNotFoundError(
            f"{path}: this folder has no {TASK_FILE}; name another one, or start Python elsewhere to mean a repository"
        )
    return path / TASK_FILE


def _fetch(
    repo_id: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    *,
    force_download: bool = False,
) -> Path:
    """The checked file in the cache, downloaded if it is not there or by force."""
    with _one_line_errors(repo_id, revision):
        api = _api(token)
        size = _declared_size(api, repo_id, revision)
        if size <= MAX_BYTES:
            path = Path(
                api.hf_hub_download(
                    repo_id, TASK_FILE, revision=revision, cache_dir=cache_dir, force_download=force_download
                )
            )
    if size > MAX_BYTES:
        raise ValueError(f"{repo_id}: its {TASK_FILE} has {size:,} bytes, more than {MAX_BYTES:,}; nothing was fetched")
    try:
        read_task(path)
    except ValueError as error:
        raise _RefusedFileError(f"{repo_id}: what it has as {TASK_FILE} is refused ({error})") from error
    return path


def _declared_size(api: "HfApi", repo_id: str, revision: str | None) -> int:
    """Bytes of the task file as the hub tells them; 0 if it does not, and the download will say why."""
    from huggingface_hub import hf_hub_url

    try:
        url = hf_hub_url(repo_id, TASK_FILE, revision=revision, endpoint=api.endpoint)
        return api.get_hf_file_metadata(url=url).size or 0
    except Exception:  # httpx, requests and the hub each raise kinds of their own
        return 0


@contextmanager
def _one_line_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub, and what it stands on, raise into built-in errors of one line."""
    try:
        yield
    except Exception as error:  # httpx, requests, xet and the hub each raise kinds of their own
        is_of_disk = isinstance(error, OSError) and error.errno is not None
        if is_of_disk or isinstance(error, TypeError):
            raise
        raise _explain(error, repo_id, revision) from error


def _explain(error: BaseException, repo_id: str, revision: str | None) -> Exception:
    from huggingface_hub import constants, errors

    where = repo_id if revision is None else f"{repo_id} at {revision}"
    if isinstance(error, errors.HFValidationError):
        return ValueError(f"{repo_id}: neither a file or folder here, nor the id of a repository, such as ann/pets")
    if isinstance(error, errors.LocalTokenNotFoundError):
        return PermissionError(f"{where}: token=True, but there is no token on this machine; {LOG_IN}")
    cause = error.__cause__ if isinstance(error, (errors.LocalEntryNotFoundError, ValueError)) else None
    error = cause or error  # the cause says why the hub was no help
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        return ConnectionError(f"{where}: HF_HUB_OFFLINE is set, and {TASK_FILE} is not in the cache; unset it")
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_answer(error, where)
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return ValueError(f"{where}: {_one_line(error)}")
    return ConnectionError(
        f"{where}: the transfer with {constants.ENDPOINT} failed ({_one_line(error)}); check the network and try again"
    )


def _explain_answer(error: Any, where: str) -> Exception:
    """What an answer of the hub means."""
    from huggingface_hub import constants, errors

    status = error.response.status_code
    if status in (401, 403):
        why = "private, not there, or not for this token to write"
        return PermissionError(f"{where}: refused by {constants.ENDPOINT} ({status}): {why}; {LOG_IN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{where}: no such revision; leave revision= out for main")
    if isinstance(error, errors.EntryNotFoundError):
        return FileNotFoundError(f"{where}: has no {TASK_FILE}, so it is no repository of a vpt task")
    if status == 404:
        return FileNotFoundError(
            f"{where}: no such repository on {constants.ENDPOINT}, so no {TASK_FILE}; if it is private, {LOG_IN}"
        )
    said = plain(error.server_message or "without a reason", 300)
    return ConnectionError(f"{where}: {constants.ENDPOINT} answered {status} ({said}); try again later")


def _one_line(error: BaseException) -> str:
    return plain(str(error), 300) or type(error).__name__
