"""Task files on the Hugging Face Hub: a repository with `task.safetensors` and a model card, `README.md`.

Downloaded files are not trusted, see `vpt.models.task_file`; HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE apply.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.hub.card import model_card, plain
from vpt.models.task_file import load_task, open_task, read_task
from vpt.models.task_model import TaskModel
from vpt.models.vit import ViT
from vpt.storage.files import MAX_BYTES
from vpt.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TASK_FILE = "task.safetensors"
LOG_IN = "log in with `hf auth login`, or pass token="


def push_to_hub(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str = f"Upload {TASK_FILE}",
) -> str:
    """Upload a task file and its card to a repository of the hub, in one commit; return the URL of the commit.

    The file is checked first. The repository, such as "ann/pets" or, for the owner of the token, "pets", and the branch
    `revision` are created if missing; files of these two names are replaced. For the token and errors see `download`;
    ValueError also if `private`, and the repository exists and is public.
    """
    path = Path(path)
    metadata, tensors = open_task(path)
    with _one_line_errors(repo_id):
        api = _api(token)
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        is_public = private and not api.model_info(repo_id).private
    if is_public:
        raise ValueError(f"{repo_id}: exists and is public; make it private, or name another repository")
    card = model_card(metadata, repo_id, tensors)
    with _one_line_errors(repo_id, revision):
        from huggingface_hub import CommitOperationAdd

        task = CommitOperationAdd(path_in_repo=TASK_FILE, path_or_fileobj=path)
        readme = CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=card.encode())
        if revision is not None and not revision.startswith("refs/"):  # the hub creates those of pull requests
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
) -> TaskModel:
    """Read a task from the hub, or from a folder, onto a backbone; the model is in eval mode.

    The backbone is a timm ViT in memory, or the timm name of one and, optionally, a file of its weights, see
    `vpt.load_task`; ValueError if the task belongs to another. For other arguments and errors see `download`.
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
    """Download and check the task file of a repository, or use the newest in the cache if offline; return its path.

    `repo_id` is such as "ann/pets"; a local task file of this name, or a folder with a `task.safetensors`, takes
    precedence, and the other arguments are not used then. `revision` is a branch, tag or commit, by default main. Token
    and cache folder are by default those of HF_TOKEN or `hf auth login`, and of `huggingface_hub`.

    Raises:
        FileNotFoundError: There is no such repository, revision, folder or file.
        ValueError: The file is damaged or not a task file, or `repo_id` is invalid.
        PermissionError: The token may not read the repository.
        ConnectionError: The hub cannot be reached, and the file is not in the cache.
    """
    if (local := _find_local(repo_id)) is not None:
        return local
    repo_id = str(repo_id)
    try:
        return _fetch(repo_id, revision, token, cache_dir)
    except _RefusedFileError as refused:
        # Perhaps only the cached copy is damaged, which huggingface_hub would never replace.
        try:
            return _fetch(repo_id, revision, token, cache_dir, force_download=True)
        except OSError:
            raise refused from None


class _RefusedFileError(ValueError):
    """The file of the hub is not a valid task file."""


def _api(token: str | bool | None) -> "HfApi":
    from huggingface_hub import HfApi

    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):  # or an error about headers would print it
        raise ValueError("token is empty, or has blanks or other invalid characters; copy it again")
    return HfApi(token=token, library_name="vpt", library_version=__version__)


def _find_local(repo_id: str | Path) -> Path | None:
    path = Path(repo_id)
    if not path.is_dir():
        return path if path.is_file() else None
    if not (path / TASK_FILE).is_file():
        advice = "name another one, or change the folder to use a repository"
        raise FileNotFoundError(f"{path}: this folder has no {TASK_FILE}; {advice}")
    return path / TASK_FILE


def _fetch(
    repo_id: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    *,
    force_download: bool = False,
) -> Path:
    """The path of the checked file in the cache, downloaded if missing or by force."""
    with _one_line_errors(repo_id, revision):
        api = _api(token)
        size = _declared_size(api, repo_id, revision, cache_dir)
        options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download}
        if size <= MAX_BYTES:
            path = Path(api.hf_hub_download(repo_id, TASK_FILE, **options))
    if size > MAX_BYTES:
        raise ValueError(f"{repo_id}: its {TASK_FILE} has {size:,} bytes, more than {MAX_BYTES:,}; not downloaded")
    try:
        read_task(path)
    except ValueError as error:
        raise _RefusedFileError(f"{repo_id}: its {TASK_FILE} is refused ({error})") from error
    return path


def _declared_size(api: "HfApi", repo_id: str, revision: str | None, cache_dir: str | Path | None) -> int:
    """Bytes of the task file as declared by the hub; 0 if that fails and the download says why, or takes the cache."""
    from huggingface_hub import errors, hf_hub_url, try_to_load_from_cache

    try:
        url = hf_hub_url(repo_id, TASK_FILE, revision=revision, endpoint=api.endpoint)
        return api.get_hf_file_metadata(url=url).size or 0
    except errors.HfHubHTTPError:
        return 0
    except Exception:  # without a network the download would repeat its request for half a minute
        if try_to_load_from_cache(repo_id, TASK_FILE, cache_dir=cache_dir, revision=revision) is None:
            raise
        return 0


@contextmanager
def _one_line_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Replace errors of huggingface_hub and its dependencies by built-in errors of one line."""
    try:
        yield
    except Exception as error:  # httpx, requests, xet and the hub each raise their own types
        if isinstance(error, TypeError) or (isinstance(error, OSError) and error.errno is not None):  # of the disk
            raise
        raise _explain(error, repo_id, revision) from error


def _explain(error: BaseException, repo_id: str, revision: str | None) -> Exception:
    from huggingface_hub import constants, errors

    where = repo_id if revision is None else f"{repo_id} at {revision}"
    if isinstance(error, errors.HFValidationError):
        return ValueError(f"{repo_id}: neither a local file or folder, nor a repository id such as ann/pets")
    if isinstance(error, errors.LocalTokenNotFoundError):
        return PermissionError(f"{where}: token=True, but there is no token on this machine; {LOG_IN}")
    cause = error.__cause__ if isinstance(error, (errors.LocalEntryNotFoundError, ValueError)) else None
    error = cause or error  # the cause names the problem of the hub
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        return ConnectionError(f"{where}: HF_HUB_OFFLINE is set, and {TASK_FILE} is not in the cache; unset it")
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_answer(error, where)
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return ValueError(f"{where}: {_one_line(error)}")
    what = f"the transfer with {constants.ENDPOINT} failed ({_one_line(error)})"
    return ConnectionError(f"{where}: {what}; check the network and try again")


def _explain_answer(error: Any, where: str) -> Exception:
    from huggingface_hub import constants, errors

    status = error.response.status_code
    if status in (401, 403):
        why = "it is private or missing, or the token may not write to it"
        return PermissionError(f"{where}: refused by {constants.ENDPOINT} ({status}): {why}; {LOG_IN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{where}: no such revision; omit revision= for main")
    if isinstance(error, errors.EntryNotFoundError):
        return FileNotFoundError(f"{where}: has no {TASK_FILE}, so it is not a repository of a vpt task")
    if status == 404:
        what = f"no such repository on {constants.ENDPOINT}, so no {TASK_FILE}"
        return FileNotFoundError(f"{where}: {what}; if it is private, {LOG_IN}")
    reason = plain(error.server_message or "without a reason", 300)
    return ConnectionError(f"{where}: {constants.ENDPOINT} answered {status} ({reason}); try again later")


def _one_line(error: BaseException) -> str:
    return plain(str(error), 300) or type(error).__name__
