"""push_to_hub and from_pretrained against a small hub in this process with the protocol of the real one."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.utils
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard, constants
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import save

import vpt
from tests.helpers import make_tiny_vit
from vpt.data.images import read_image
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import Preprocessing, letterboxed_size
from vpt.hub.card import model_card
from vpt.hub.repository import download, from_pretrained, push_to_hub
from vpt.models.task_file import open_task
from vpt.models.task_schema import TaskMetadata
from vpt.models.vit import load_vit
from vpt.task_types.detection import to_original

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_" + "a" * 34
LOG_IN = r"^ann/pets: .* log in with `hf auth login`, or pass token=$"
FRONT_MATTER = {
    "library_name": "vpt",
    "pipeline_tag": "image-classification",
    "tags": ["visual-prompt-tuning", "parameter-efficient"],
}
NASTY = r"""---
<script>alert(1)</script>
`a`
a | b |
\|
[a](https://example.org)
![a](https://example.org/a.png)
https://example.org
www.example.org
ann@example.org
*a* _b_ ~~c~~ **
# a
1. a
&lt;b&gt; &#42;
{{ 7 * 7 }} {% x %}
$$a$$
: a
yes
1e3
=""".splitlines()
NASTY[1:1] = ["a\n---\nlicense: mit\n---\n# b", "```\nimport os", "<!-- "]
NASTY += ["\u202egnp.exe", "\ud800\x00\x1b[31m\u2028", "\u00e9\u732b"]


class Repository:
    """Commits, each a dict of files by name, and branches, each the key of a commit."""

    def __init__(self, private):
        self.private = private
        self.commits = {"0" * 40: {}}
        self.branches = {"main": "0" * 40}
        self.messages = []

    def commit(self, branch, files, message):
        content = self.commits[self.branches[branch]] | files
        key = hashlib.sha1(repr((content, message, len(self.commits))).encode()).hexdigest()
        self.commits[key] = content
        self.branches[branch] = key
        self.messages.append(message)
        return key


class FakeHub(ThreadingHTTPServer):
    """The part of the hub's HTTP interface that the real client uses here; ann owns TOKEN."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories = {}
        self.requests = []  # method, path, headers
        self.harm = lambda body: body  # of what is downloaded
        self.status = None  # of every answer, if not None
        self.digest = git_sha1  # what a file is called by; of large ones it is the sha256
        self.declared = None  # bytes of every file that it only tells of, if not None

    def files(self, name, branch="main"):
        repository = self.repositories[name]
        return repository.commits[repository.branches[branch]]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.server.requests.append((self.command, "/".join(parts), dict(self.headers)))
        given = self.headers.get("Authorization")
        if self.server.status is not None:
            return self.reply(self.server.status, {"error": "as the test wants it"})
        if given not in (None, f"Bearer {TOKEN}"):
            return self.reply(401, {"error": "Invalid credentials in Authorization header"})
        match parts:
            case ["api", "validate-yaml"]:
                front_matter = ModelCard(json.loads(self.body)["content"]).data.to_dict()
                return self.reply(200 if front_matter else 400, {"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                return self.create(given)
            case ["api", "models", owner, name, *rest]:
                return self.with_repository(f"{owner}/{name}", given, rest)
            case [owner, name, "resolve", revision, file]:
                return self.with_repository(f"{owner}/{name}", given, ["resolve", revision, file])
        return self.reply(404, {"error": "no such address"})

    def create(self, given):
        asked = json.loads(self.body)
        if given is None:
            return self.reply(401, {"error": "Invalid username or password."})
        if asked["organization"] not in (None, "ann"):
            return self.reply(403, {"error": "You don't have the rights to create a model under this namespace"})
        name = f"ann/{asked['name']}"
        is_new = name not in self.server.repositories
        if is_new:
            private = asked.get("visibility") == "private" or asked.get("private", False)
            self.server.repositories[name] = Repository(private)
        return self.reply(200 if is_new else 409, {"url": f"{self.server.url}/{name}"})

    def with_repository(self, name, given, rest):
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and given is None):
            if given is None:
                return self.reply(401, {"error": "Invalid username or password."})
            return self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if self.command == "POST" and given is None:
            return self.reply(401, {"error": "Invalid username or password."})
        match rest:
            case [] | ["revision", _]:
                key = repository.branches[rest[1] if rest else "main"]
                return self.reply(200, {"id": name, "private": repository.private, "sha": key, "siblings": []})
            case ["branch", branch]:
                is_new = branch not in repository.branches
                repository.branches.setdefault(branch, repository.branches["main"])
                return self.reply(200 if is_new else 409, {})
            case ["preupload", branch] if branch not in repository.branches:
                return self.reply(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            case ["preupload", branch]:
                return self.preupload(repository.commits[repository.branches[branch]])
            case ["commit", branch]:
                return self.commit(name, repository, branch)
            case ["resolve", revision, file]:
                return self.resolve(repository, revision, file)
        return self.reply(404, {"error": "no such address"})

    def preupload(self, held):
        files = [
            {
                "path": asked["path"],
                "uploadMode": "regular",
                "shouldIgnore": False,
                "oid": git_sha1(held[asked["path"]]) if asked["path"] in held else None,
            }
            for asked in json.loads(self.body)["files"]
        ]
        return self.reply(200, {"files": files})

    def commit(self, name, repository, branch):
        lines = [json.loads(line) for line in self.body.splitlines()]
        values = [line["value"] for line in lines if line["key"] == "file"]
        assert all(value["encoding"] == "base64" for value in values)
        files = {value["path"]: base64.b64decode(value["content"]) for value in values}
        key = repository.commit(branch, files, lines[0]["value"]["summary"])
        return self.reply(200, {"commitUrl": f"{self.server.url}/{name}/commit/{key}", "commitOid": key})

    def resolve(self, repository, revision, file):
        key = repository.branches.get(revision, revision)
        if key not in repository.commits:
            return self.reply(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        headers = {"X-Repo-Commit": key}
        if file not in repository.commits[key]:
            return self.reply(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
        body = repository.commits[key][file]
        size = self.server.declared if self.command == "HEAD" and self.server.declared else len(body)
        headers |= {"ETag": f'"{self.server.digest(body)}"', "Content-Length": str(size)}
        return self.send(200, body if self.command == "HEAD" else self.server.harm(body), headers)

    def reply(self, status, value, headers=None):
        body = json.dumps(value).encode()
        known = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self.send(status, body, known | (headers or {}))

    def send(self, status, body, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


for verb in ("HEAD", "GET", "POST"):
    setattr(Handler, f"do_{verb}", Handler.answer)


def git_sha1(body):
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def sha256(body):
    return hashlib.sha256(body).hexdigest()


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A home of huggingface_hub's below the test's folder, logged out, without retries that wait."""
    real, home = constants.HF_HOME, tmp_path / "home"
    for name, value in list(vars(constants).items()):
        if isinstance(value, str) and value.startswith(real):
            monkeypatch.setattr(constants, name, str(home) + value.removeprefix(real))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    huggingface_hub.utils.close_session()
    yield home
    huggingface_hub.utils.close_session()


def use_endpoint(monkeypatch, url):
    """What HF_ENDPOINT does in a new process."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(home, monkeypatch):
    server = FakeHub()
    use_endpoint(monkeypatch, server.url)
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    yield server
    huggingface_hub.utils.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


def make_model(seed=3, vit=None, **options):
    torch.manual_seed(seed)
    model = vpt.create_model(vit or make_tiny_vit(), prompt="deep", num_classes=3, num_tokens=4, **options)
    model.head.weight.data.normal_()
    return model.eval()


@pytest.fixture
def task(tmp_path):
    return vpt.save_task(make_model(), tmp_path / "pets.safetensors", classes=["cat", "dog", "eel"])


def describe(**changes):
    """Metadata of a classification task, as a task file has it."""
    preprocessing = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    preprocessing |= {"interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
    fields = {
        "backbone": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "fingerprint": "0" * 64,
        "prompt": {"kind": "deep", "num_tokens": 4, "embed_dim": 32, "width": 32, "blocks": [0, 1, 2], "dropout": 0.0},
        "num_classes": len(changes.get("classes") or "abc"),
        "classes": ["cat", "dog", "eel"],
        "preprocessing": preprocessing,
    }
    return TaskMetadata(**(fields | changes))


def front_matter(card):
    _, text, body = re.split(r"^---$\n?", card, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(text), body


# Round trips.


def test_a_task_returns_the_same_logits_after_a_push_and_a_download(hub, task, images):
    url = push_to_hub(task, "ann/pets", token=TOKEN)
    (key,) = set(hub.repositories["ann/pets"].commits) - {"0" * 40}
    assert url == f"{hub.url}/ann/pets/commit/{key}"
    assert type(url) is str
    assert set(hub.files("ann/pets")) == {"task.safetensors", "README.md"}
    assert hub.files("ann/pets")["task.safetensors"] == task.read_bytes()
    vit = make_tiny_vit()
    model = from_pretrained("ann/pets", vit)
    assert torch.equal(model(images), make_model()(images))
    assert model.backbone.vit is vit
    assert model.classes == ("cat", "dog", "eel")
    assert not model.training


def test_a_detection_task_is_restored_and_named_in_its_card(hub, tmp_path):
    options = {"task": "detection", "num_classes": 2, "head": "dense", "channels": 16, "num_convs": 1}
    model = vpt.create_model(make_tiny_vit(img_size=64), num_tokens=2, **options).eval()
    for parameter in model.head.parameters():
        parameter.data.normal_(std=0.1)
    push_to_hub(vpt.save_task(model, tmp_path / "boxes.safetensors"), "ann/boxes", token=TOKEN)
    images = torch.randn(2, 3, 64, 64)
    loaded = from_pretrained("ann/boxes", make_tiny_vit(img_size=64))
    for one, other in zip(loaded(images), model(images), strict=True):
        assert len(one["boxes"]) > 0
        assert all(torch.equal(one[name], other[name]) for name in one)
    data, _ = front_matter(hub.files("ann/boxes")["README.md"].decode())
    assert data["pipeline_tag"] == "object-detection"


def test_a_task_is_loaded_onto_a_backbone_by_name_and_another_one_is_refused(hub, task, tmp_path):
    model = make_model(vit="vit_nano_patch8_64")
    push_to_hub(vpt.save_task(model, tmp_path / "a.safetensors"), "ann/pets", token=TOKEN)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(from_pretrained("ann/pets", "vit_nano_patch8_64")(images), model(images))
    with pytest.raises(ValueError, match=r"made for the backbone vit_nano.*, but the given one is vit_tiny"):
        from_pretrained("ann/pets", make_tiny_vit())


def test_pushes_are_commits_of_which_each_can_be_read(hub, task, tmp_path, images):
    """A second push replaces the task, the same task makes no commit, and a branch leaves main as it is."""
    url = push_to_hub(task, "ann/pets", token=TOKEN)
    assert push_to_hub(task, "ann/pets", token=TOKEN) == url
    assert len(hub.repositories["ann/pets"].commits) == 2
    other = make_model(seed=4)
    path = vpt.save_task(other, tmp_path / "other.safetensors")
    for _ in range(2):  # the second time the branch exists
        push_to_hub(path, "ann/pets", token=TOKEN, revision="trial/1")
    assert hub.files("ann/pets")["task.safetensors"] == task.read_bytes()
    push_to_hub(path, "pets", token=TOKEN, message="Better")  # without an owner: that of the token
    assert hub.repositories["ann/pets"].messages[-1] == "Better"
    assert {*hub.repositories["ann/pets"].messages[:-1]} == {"Upload task.safetensors"}
    for revision, model in {None: other, "trial/1": other, url.rpartition("/")[2]: make_model()}.items():
        assert torch.equal(from_pretrained("ann/pets", make_tiny_vit(), revision=revision)(images), model(images))
    assert '"ann/pets"' in hub.files("ann/pets")["README.md"].decode()


def test_every_request_has_the_user_agent_and_the_token_if_there_is_one(hub, task, monkeypatch):
    push_to_hub(task, "ann/pets", token=TOKEN, private=True)
    assert hub.repositories["ann/pets"].private
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    download("ann/pets")
    assert {method for method, _, _ in hub.requests} == {"HEAD", "GET", "POST"}
    assert all(headers["authorization"] == f"Bearer {TOKEN}" for _, _, headers in hub.requests)
    assert all(headers["user-agent"].startswith(f"vpt/{vpt.__version__}; ") for _, _, headers in hub.requests)
    monkeypatch.delenv("HF_TOKEN")
    hub.repositories["ann/pets"].private = False
    hub.requests.clear()
    download("ann/pets")
    assert hub.requests
    assert not any("authorization" in headers for _, _, headers in hub.requests)


def test_a_private_task_does_not_go_into_a_public_repository_and_needs_a_token(hub, task):
    push_to_hub(task, "ann/pets", token=TOKEN)
    with pytest.raises(ValueError, match=r"^ann/pets: exists and is public; make it private"):
        push_to_hub(task, "ann/pets", token=TOKEN, private=True)
    assert len(hub.repositories["ann/pets"].commits) == 2
    hub.repositories["ann/pets"].private = True
    push_to_hub(task, "ann/pets", token=TOKEN, private=True)
    for token in (None, "hf_wrong"):
        with pytest.raises(PermissionError, match=LOG_IN):
            download("ann/pets", token=token)
    assert download("ann/pets", token=TOKEN).is_file()


def test_files_are_cached_and_downloaded_once(hub, task, home, tmp_path):
    push_to_hub(task, "ann/pets", token=TOKEN)
    hub.requests.clear()
    first, second = download("ann/pets"), download("ann/pets")
    assert first == second
    assert first.is_relative_to(home / "hub")
    assert [method for method, _, _ in hub.requests] == ["HEAD", "HEAD", "GET", "HEAD", "HEAD"]
    assert download("ann/pets", cache_dir=tmp_path / "mine").is_relative_to(tmp_path / "mine")


def test_a_local_folder_or_file_takes_precedence_over_the_hub(task, tmp_path, images, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "ann" / "pets").mkdir(parents=True)
    file = tmp_path / "ann" / "pets" / "task.safetensors"
    task.rename(file)
    monkeypatch.chdir(tmp_path)
    for place in ("ann/pets", tmp_path / "ann" / "pets", str(file), file):
        assert torch.equal(from_pretrained(place, make_tiny_vit())(images), make_model()(images))
    assert download("ann/pets") == Path("ann/pets/task.safetensors")
    with pytest.raises(FileNotFoundError, match=r"this folder has no task\.safetensors; name another one"):
        download(tmp_path)


# Without a network.


def test_without_a_network_the_cache_is_enough(hub, task, images, monkeypatch):
    push_to_hub(task, "ann/pets", token=TOKEN)
    path = download("ann/pets")
    hub.requests.clear()
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert torch.equal(from_pretrained("ann/pets", make_tiny_vit())(images), make_model()(images))
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert download("ann/pets") == path
    assert hub.requests == []


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_and_a_cache_one_line_names_the_reason(home, task, monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("a request is repeated"))
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    message = r"the transfer with http://127\.0\.0\.1:9 failed \(.+\); check the network and try again$"
    message = r"HF_HUB_OFFLINE is set, and task\.safetensors is not in the cache; unset it$" if offline else message
    for act in (lambda: download("ann/pets"), lambda: push_to_hub(task, "ann/pets", token=TOKEN)):
        with pytest.raises(ConnectionError, match=f"^ann/pets: {message}"):
            act()


# Refusals.


def test_a_damaged_or_missing_file_is_not_pushed(hub, task, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: no such file"):
        push_to_hub(tmp_path / "none.safetensors", "ann/pets", token=TOKEN)
    task.write_bytes(task.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        push_to_hub(task, "ann/pets", token=TOKEN)
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["a/b/c", "ann/pe ts", "../pets", "ann/pets.git", "", "-", "ann/" + "a" * 97])
def test_an_invalid_repository_id_is_refused(hub, task, repo_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = f"^{re.escape(repo_id)}: neither a local file or folder, nor a repository id such as ann/pets$"
    with pytest.raises(ValueError, match=message):
        push_to_hub(task, repo_id, token=TOKEN)
    if repo_id:  # the empty path is this folder
        with pytest.raises(ValueError, match=message):
            download(repo_id)
    with pytest.raises(ValueError, match="epo"):
        model_card(describe(), repo_id)
    assert hub.requests == []


@pytest.mark.parametrize("token", ["", "hf_a\n", "hf a", "hf_\u00e9"])
def test_an_invalid_token_is_refused_and_not_printed(hub, task, token):
    with pytest.raises(ValueError, match=r"^ann/pets: token is empty, or has blanks") as caught:
        push_to_hub(task, "ann/pets", token=token)
    assert not token or token.strip() not in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repo_id", "options", "error", "message"),
    [
        ("ann/pets", {"message": ""}, ValueError, "^ann/pets: .*can't be empty"),
        (None, {}, (TypeError, ValueError), None),
        ("ann/pets", {"token": None}, PermissionError, LOG_IN),
        ("ann/pets", {"token": "hf_wrong"}, PermissionError, LOG_IN),
        ("ann/pets", {"token": True}, PermissionError, "^ann/pets: token=True, but there is no token"),
        ("bob/pets", {}, PermissionError, r"^bob/pets: refused by http:.* \(403\): .* log in with"),
    ],
)
def test_a_push_that_is_not_allowed_is_refused_with_what_to_do(hub, task, repo_id, options, error, message):
    with pytest.raises(error, match=message):
        push_to_hub(task, repo_id, **{"token": TOKEN, **options})
    assert not any(repository.messages for repository in hub.repositories.values())


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_an_error_of_the_hub_is_reported_with_its_number(hub, task, status):
    hub.status = status
    error = PermissionError if status < 404 else ConnectionError
    message = LOG_IN if status < 404 else rf"^ann/pets: http://127\.0\.0\.1:\d+ answered {status} \(.*\); try again"
    for act in (lambda: push_to_hub(task, "ann/pets", token=TOKEN), lambda: download("ann/pets")):
        with pytest.raises(error, match=message):
            act()


def test_a_missing_repository_revision_or_file_is_named(hub, task):
    with pytest.raises(FileNotFoundError, match=r"^ann/pets: no such repository on .*, so no task\.safetensors; if it"):
        download("ann/pets", token=TOKEN)
    hub.repositories["ann/pets"] = Repository(private=False)
    hub.repositories["ann/pets"].commit("main", {"model.safetensors": b""}, "A model")
    with pytest.raises(FileNotFoundError, match=r"^ann/pets: has no task\.safetensors, so it is not a repository of a"):
        download("ann/pets")
    push_to_hub(task, "ann/pets", token=TOKEN)
    with pytest.raises(FileNotFoundError, match=r"^ann/pets at v2: no such revision; omit revision= for main$"):
        download("ann/pets", revision="v2")
    with pytest.raises(FileNotFoundError, match=r"^ann/pets at refs/pr/1: no such revision"):
        push_to_hub(task, "ann/pets", token=TOKEN, revision="refs/pr/1")


def test_a_file_of_another_format_is_refused(hub):
    hub.repositories["bob/other"] = Repository(private=False)
    hub.repositories["bob/other"].commit("main", {"task.safetensors": save({"weight": torch.zeros(3)})}, "A model")
    with pytest.raises(ValueError, match=r"^bob/other: its task\.safetensors is refused \(.*not one of vpt"):
        download("bob/other")


def flip_a_bit(body):
    return body[:-9] + bytes([body[-9] ^ 1]) + body[-8:]


@pytest.mark.parametrize(
    ("harm", "declared", "error", "message"),
    [
        (flip_a_bit, None, ValueError, r"its task\.safetensors is refused \(.*sha256"),
        (lambda body: body[:100], None, ConnectionError, r"the transfer with .* failed \(.*\); check the network"),
        (lambda body: body, 3 * 1024**3, ValueError, r"its task\.safetensors has 3,221,225,472 bytes, more than"),
    ],
    ids=["flipped bit", "truncated", "too large"],
)
def test_a_damaged_or_too_large_download_is_refused_and_not_cached(hub, task, home, harm, declared, error, message):
    push_to_hub(task, "ann/pets", token=TOKEN)
    hub.requests.clear()
    hub.harm, hub.declared = harm, declared
    with pytest.raises(error, match=f"^ann/pets: {message}"):
        download("ann/pets")
    if declared:  # refused before the download
        assert {method for method, _, _ in hub.requests} == {"HEAD"}
        assert not list(home.rglob("blobs/*"))
    if harm is not flip_a_bit:
        assert not list(home.rglob("snapshots/*/*"))
    hub.harm, hub.declared = (lambda body: body), None
    assert download("ann/pets").read_bytes() == task.read_bytes()


def test_a_copy_that_is_damaged_in_the_cache_is_replaced_or_refused_offline(hub, task, monkeypatch):
    push_to_hub(task, "ann/pets", token=TOKEN)
    path = download("ann/pets")
    path.resolve().write_bytes(flip_a_bit(task.read_bytes()))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^ann/pets: its task\.safetensors is refused"):
        download("ann/pets")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert download("ann/pets").read_bytes() == task.read_bytes()


# Weights of backbones.

TINY = "test_vit.r160_in1k"  # the smallest ViT of timm


@pytest.fixture
def weights(hub, monkeypatch):
    """Random weights of TINY, where timm looks for them."""
    monkeypatch.setattr(hub, "digest", sha256)
    torch.manual_seed(0)
    state = timm.create_model(TINY, pretrained=False).state_dict()
    config = timm.get_pretrained_cfg(TINY)
    hub.repositories[config.hf_hub_id + TINY if config.hf_hub_id.endswith("/") else config.hf_hub_id] = (
        repository := Repository(private=False)
    )
    repository.commit("main", {"model.safetensors": save(state)}, "weights")
    return state


def test_weights_of_the_hub_are_used_and_cached(hub, weights, home):
    vit = load_vit(TINY)
    assert torch.equal(vit.blocks[0].attn.qkv.weight, weights["blocks.0.attn.qkv.weight"])
    (blob,) = home.rglob("blobs/*")
    assert blob.name == sha256(blob.read_bytes())
    hub.requests.clear()
    load_vit(TINY)
    assert "GET" not in {method for method, _, _ in hub.requests}


def test_weights_that_are_not_here_are_asked_for_once_without_a_network(home, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("a request is repeated"))
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=rf"{TINY}: .*127\.0\.0\.1:9 cannot be reached.* use checkpoint=FILE$"):
        load_vit(TINY)


@pytest.mark.parametrize("place", [-5, 8])  # in a number, so that the file can be read; in the header
def test_weights_that_are_not_those_of_the_hub_are_refused_and_not_cached(hub, weights, home, place):
    def harm(body):
        changed = bytearray(body)
        changed[place] ^= 1
        return bytes(changed)

    hub.harm = harm
    with pytest.raises(ValueError, match=rf"{TINY}: the download differs from the file on the hub"):
        load_vit(TINY)
    assert not list(home.rglob("blobs/*"))
    hub.harm = lambda body: body
    assert torch.equal(load_vit(TINY).blocks[0].attn.qkv.weight, weights["blocks.0.attn.qkv.weight"])


def test_a_cache_that_cannot_be_written_is_named(hub, task, tmp_path):
    push_to_hub(task, "ann/pets", token=TOKEN)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "file"))):
        download("ann/pets", cache_dir=tmp_path / "file")


# The card.


def test_the_card_has_what_the_hub_and_its_readers_need(tmp_path):
    described = {"classes": ["cat", "dog", "eel"], "licence": "CC-BY-4.0", "note": "Two\nlines."}
    metrics = {"val": {"top1": 0.93333, "loss": 0.25}, "test": {"top1": 0.9, "loss": float("nan")}}
    config = {"dataset": {"title": "Oxford pets"}}
    path = vpt.save_task(make_model(), tmp_path / "a.safetensors", metrics=metrics, config=config, **described)
    metadata, tensors = open_task(path)
    card = model_card(metadata, "ann/pets", tensors)
    data, text = front_matter(card)
    task, dataset = {"type": "image-classification"}, {"name": "Oxford pets", "type": "unknown"}
    val = [{"type": "accuracy", "name": "top1", "value": 0.93333}, {"type": "loss", "name": "loss", "value": 0.25}]
    found = {"val": val, "test": [{"type": "accuracy", "name": "top1", "value": 0.9}]}
    results = [{"task": task, "dataset": {**dataset, "split": name}, "metrics": found[name]} for name in found]
    assert data == FRONT_MATTER | {
        "license": "cc-by-4.0",
        "base_model": "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "model-index": [{"name": "pets", "results": results}],
    }
    for line in (
        "# pets",
        "| type | classification, 3 classes |",
        f"| backbone | `{metadata.backbone}`, with the weights of fingerprint `{metadata.fingerprint}` |",
        "| prompt | deep, 4 tokens in blocks 0, 1, 2 |",
        "| head | linear |",
        "| input | 32 x 32 px, bicubic, crop 0.9 (center), mean 0.5, 0.5, 0.5, std 0.5, 0.5, 0.5 |",
        "| size | 483 numbers (head 99, prompt 384), 2 kB |",
        "| licence | CC\\-BY\\-4\\.0 |",
        "|  | val | test |",
        "| top1 | 0.9333 | 0.9 |",
        "| loss | 0.25 |  |",
        "cat, dog, eel",
        "> Two  ",
        "> lines\\.",
    ):
        assert line in text.splitlines(), line


def test_a_card_of_little_metadata_is_short():
    data, text = front_matter(model_card(describe(classes=None, prompt=None, backbone="vit_nano_patch8_64.vpt"), "a/b"))
    assert data == FRONT_MATTER  # the backbone ships with the package: the hub has it not
    assert re.findall("^## .*", text, re.MULTILINE) == ["## Use"]
    assert "| prompt | none |" in text


@pytest.mark.parametrize(
    ("licence", "name"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        (" mit ", {"license": "mit"}),
        ("GPL-3.0-or-later", {"license": "gpl-3.0"}),
        ("LGPL-2.1-only", {"license": "lgpl-2.1"}),
        ("GPL-2.0+", {"license": "gpl-2.0"}),
        ("ODbL-1.0", {"license": "odbl"}),
        ("Research use, by Ann", {"license": "other", "license_name": "research-use-by-ann"}),
        ("\u732b", {"license": "other", "license_name": "unnamed"}),
        ("MIT\nlibrary_name: evil", {"license": "other", "license_name": "mit-library-name-evil"}),
        ("a" * 1000, {"license": "other", "license_name": "a" * 100}),
        ("  ", {}),
    ],
)
def test_a_licence_has_its_name_on_the_hub(licence, name):
    data, _ = front_matter(model_card(describe(licence=licence), "ann/pets"))
    assert {key: value for key, value in data.items() if key.startswith("license")} == name


def nasty(fill):
    """Metadata with a text in every field that may have one; `fill` returns it for the intended text."""
    names = [fill(name) for name in NASTY]
    preprocessing = describe().preprocessing | {"interpolation": "lanczos", "crop_mode": "squash"}
    return describe(
        classes=list(dict.fromkeys(names)),
        note="\n".join(fill(" ".join(name.split())) for name in NASTY),
        licence=fill("<b>|`"),
        versions={fill(f"{name}{i}"): fill(name) for i, name in enumerate(NASTY)},
        metrics={fill(split): {fill(f"{name}{i}"): 0.5 for i, name in enumerate(NASTY)} for split in ("---", "<b>|`")},
        preprocessing=preprocessing,
        config={"dataset": {"title": fill(NASTY[1])}},
    )


def structure(card):
    """Kinds of the parts of a card, as a renderer of GitHub's markdown with HTML and autolinks on finds them."""
    parser = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    return [
        [token.type, token.tag, token.attrs, *((child.type, child.tag, child.attrs) for child in token.children or [])]
        for token in parser.parse(front_matter(card)[1])
    ]


def shown(card):
    """The text that a reader of a card sees."""
    parser = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    return [child.content for token in parser.parse(front_matter(card)[1]) for child in token.children or []]


def test_untrusted_texts_do_not_change_the_markdown():
    names = {}
    harmless = model_card(nasty(lambda text: names.setdefault(text, f"name{len(names)}")), "ann/pets")
    card = model_card(nasty(lambda text: text), "ann/pets")
    assert structure(card) == structure(harmless)
    assert "<" not in card
    assert card.count("://") == card.count("](") == 1  # the paper
    card.encode()
    assert all(character.isprintable() or character == "\n" for character in card)
    seen = "".join(shown(card))
    for text in ("<script>alert(1)</script>", "a | b |", "\\|", "[a](https://example.org)", "*a* _b_ ~~c~~ **", "`a`"):
        assert text in seen
    assert "&lt;b&gt; &#42;" in seen
    assert "\u00e9\u732b" in seen


def test_untrusted_texts_do_not_change_the_front_matter():
    data, _ = front_matter(model_card(nasty(lambda text: text), "ann/pets"))
    assert set(data) == {*FRONT_MATTER, "license", "license_name", "base_model", "model-index"}
    assert (data["license"], data["license_name"]) == ("other", "b")
    assert {name: data[name] for name in FRONT_MATTER} == FRONT_MATTER
    (index,) = data["model-index"]
    assert index["name"] == "pets"
    assert [result["dataset"]["split"] for result in index["results"]] == ["---", "b"]
    for result in index["results"]:
        assert set(result) == {"task", "dataset", "metrics"}
        assert result["dataset"]["name"] == "a --- license mit --- b"
        assert [metric["value"] for metric in result["metrics"]] == [0.5] * len(NASTY)
        assert all(isinstance(metric["name"], str) for metric in result["metrics"])


@pytest.mark.parametrize("config", [{"dataset": {"title": 3}}, {"dataset": "---"}, {"dataset": {"title": " "}}, {}])
def test_an_unusual_config_names_no_data(config):
    data, _ = front_matter(model_card(describe(config=config, metrics={"val": {"top1": 1}}), "ann/pets"))
    assert data["model-index"][0]["results"][0]["dataset"]["name"] == "unknown"


def test_a_card_stays_short():
    metrics = {f"split{i}": {f"metric{i}": 0.5 for i in range(200)} for i in range(200)}
    classes = [f"{i}".rjust(500, "a") for i in range(1000)]
    card = model_card(describe(classes=classes, metrics=metrics), "ann/pets")
    assert " and 950 more" in card
    assert len(card) < 500_000


# The snippet.


def snippet_of(hub, name):
    (snippet,) = re.findall("^```python\n(.*?)^```$", hub.files(name)["README.md"].decode(), re.MULTILINE | re.DOTALL)
    return snippet


@pytest.fixture
def image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = torch.randint(0, 256, (90, 120, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save("photo.jpg")
    return read_image("photo.jpg")


@pytest.fixture
def best(hub, image, tmp_path):
    """Class and probability of the image, by a task that was pushed as ann/pets."""
    model = make_model(vit="vit_nano_patch8_64")
    path = vpt.save_task(model, tmp_path / "a.safetensors", classes=["cat", "dog", "eel"])
    push_to_hub(path, "ann/pets", token=TOKEN)
    preprocessing = Preprocessing.from_dict(vpt.read_task(path).preprocessing)
    with torch.inference_mode():
        probability, index = model(EvalTransform(preprocessing)(image)[None]).softmax(dim=1)[0].max(dim=0)
    return ["cat", "dog", "eel"][index], pytest.approx(float(probability), rel=1e-5)


def test_the_snippet_of_the_card_works(hub, best, capsys):
    exec(snippet_of(hub, "ann/pets"), {})
    name, probability = capsys.readouterr().out.split()
    assert (name, float(probability)) == best


@pytest.mark.slow
def test_the_snippet_works_in_a_new_process_which_finds_hub_and_cache_by_the_environment(hub, home, best):
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", snippet_of(hub, "ann/pets")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    name, probability = done.stdout.split()
    assert (name, float(probability)) == best
    assert (home / "hub" / "models--ann--pets").is_dir()


def test_the_snippet_of_a_detection_card_works(hub, image, tmp_path, capsys):
    torch.manual_seed(3)
    options = {"task": "detection", "num_classes": 2, "head": "dense", "channels": 16, "num_convs": 1, "num_tokens": 2}
    model = vpt.create_model("vit_nano_patch8_64", **options).eval()
    for parameter in model.head.parameters():
        parameter.data.normal_(std=0.1)
    path = vpt.save_task(model, tmp_path / "a.safetensors")
    push_to_hub(path, "ann/boxes", token=TOKEN)
    exec(snippet_of(hub, "ann/boxes"), {})
    lines = capsys.readouterr().out.splitlines()
    preprocessing, size = Preprocessing.from_dict(vpt.read_task(path).preprocessing), (90, 120)
    with torch.inference_mode():
        images = EvalTransform(preprocessing)(image)[None]
        found = to_original(model(images, sizes=[letterboxed_size(size, preprocessing)])[0], size, preprocessing)
    assert len(lines) == len(found["boxes"]) > 0
    label, score, box = lines[0].split(maxsplit=2)
    assert (int(label), float(score)) == (int(found["labels"][0]), pytest.approx(float(found["scores"][0])))
    assert json.loads(box) == pytest.approx(found["boxes"][0].tolist())
