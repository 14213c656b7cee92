"""The web application over real HTTP: answers equal those of single models, and errors are refused clearly."""

import http.client
import io
import json
import logging
import re
import shutil
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from fastapi import HTTPException
from PIL import Image

import vpt
import vpt.serve.service
from tests.helpers import NANO, SLOW, make_tiny_vit, png_bytes, save_nano_task, served
from vpt.data.images import read_image
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import Preprocessing, letterboxed_size
from vpt.models.bank import TaskBank
from vpt.models.task_schema import TaskMetadata
from vpt.task_types.detection import to_original

HOSTILE = ["<img src=x onerror=alert(1)>", "plain", "日本"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Task files on the backbone of the package: deep, shallow, none, and boxes."""
    folder = tmp_path_factory.mktemp("tasks")
    save_nano_task(folder / "deep.safetensors", 0, ["a", "b", "c", "d", "e", "f", "g"], prompt="deep", num_tokens=3)
    save_nano_task(folder / "shallow.safetensors", 1, HOSTILE, prompt="shallow", num_tokens=5)
    save_nano_task(folder / "linear.safetensors", 2, ["yes", "no"], prompt=None)
    save_nano_task(
        folder / "boxes.safetensors", 3, ["cat", "dog"], prompt="deep", num_tokens=2, task="detection", channels=16
    )
    return folder


@pytest.fixture(scope="module")
def bank(files):
    bank = TaskBank(NANO)
    for path in sorted(files.iterdir()):
        bank.load(path)
    return bank


@pytest.fixture(scope="module")
def client(bank):
    with served(bank) as client:
        yield client


def send_header(client, length, body=None):
    """Status of a request whose header announces a length, whatever is sent."""
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=10)
    connection.putrequest("POST", "/predict?task=a")
    connection.putheader("Content-Type", "image/png")
    connection.putheader("Content-Length", str(length))
    connection.endheaders(body)
    status = connection.getresponse().status
    connection.close()
    return status


def one_bit_png(width, height):
    """A small file of many pixels."""
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def ask(client, tasks, *images, field="images", **query):
    parts = [(field, (f"{number}.png", data, "image/png")) for number, data in enumerate(images)]
    return client.post("/predict", params={"task": tasks, **query}, files=parts)


def detail(response, status):
    assert response.status_code == status, response.text
    text = response.json()["detail"]
    assert set(response.json()) == {"detail"}
    assert "\n" not in text
    return text


def wait_for(client, number):
    """Until this many predictions wait."""
    while client.get("/health").json()["waiting"] < number:
        time.sleep(0.01)


class FakeBank:
    """A bank without a model: logits depend on the task; batches can be held back, or fail."""

    device = torch.device("cpu")

    def __init__(self, *names, num_classes=2):
        half = [0.5, 0.5, 0.5]
        preprocessing = {"size": [8, 8], "mean": half, "std": half, "interpolation": "bicubic"}
        preprocessing |= {"crop_pct": 1.0, "crop_mode": "center"}
        metadata = TaskMetadata("fake", "0" * 64, None, num_classes, None, preprocessing)
        self.held = dict.fromkeys(names or ("a", "b"), metadata)
        self.batches, self.error, self.failing = [], None, None
        self.began, self.may_go_on = threading.Event(), threading.Event()
        self.may_go_on.set()

    @property
    def names(self):
        return tuple(self.held)

    def metadata(self, name):
        if name not in self.held:
            raise ValueError("unknown")
        return self.held[name]

    def num_bytes(self, name):
        return 7

    def remove(self, name):
        del self.held[name]

    def __call__(self, images, names, *, sizes=None):
        self.batches.append(list(names))
        self.began.set()
        assert self.may_go_on.wait(SLOW)
        if self.error is not None or self.failing in names:
            raise self.error or RuntimeError("this task fails")
        return [torch.tensor([2.0, 0.0]) if name == "a" else torch.tensor([0.0, 2.0]) for name in names]

    def hold(self):
        self.may_go_on.clear()
        self.began.clear()


# Answers


def expected_logits(path, data, tmp_path):
    """Logits of the model of a task file, without a bank."""
    file = tmp_path / "one"
    file.write_bytes(data)
    model, metadata = vpt.load_task(path, NANO), vpt.read_task(path)
    image = EvalTransform(Preprocessing.from_dict(metadata.preprocessing))(read_image(file))
    with torch.inference_mode():
        return model(image[None])[0]


def test_mixed_tasks_return_the_predictions_of_their_models(client, files, tmp_path):
    images = [png_bytes(seed, (60 + 7 * seed, 80)) for seed in range(3)]
    answer = ask(client, ["deep", "shallow", "linear"], *images, top_k=100).json()["images"]
    assert [(one["name"], one["width"], one["height"]) for one in answer] == [
        ("0.png", 60, 80),
        ("1.png", 67, 80),
        ("2.png", 74, 80),
    ]
    for data, one in zip(images, answer, strict=True):
        assert list(one["tasks"]) == ["deep", "shallow", "linear"]
        for name, found in one["tasks"].items():
            path = files / f"{name}.safetensors"
            wanted = expected_logits(path, data, tmp_path).softmax(0)
            values = {entry["class"]: entry["probability"] for entry in found["predictions"]}
            assert found["task_type"] == "classification"
            assert [values[label] for label in vpt.read_task(path).classes] == pytest.approx(wanted.tolist(), abs=1e-5)
            probabilities = [entry["probability"] for entry in found["predictions"]]
            assert probabilities == sorted(probabilities, reverse=True)


def test_boxes_are_those_of_the_model_in_pixels_of_the_image(client, files, tmp_path):
    path, data = files / "boxes.safetensors", png_bytes(5, (200, 100))
    (tmp_path / "one").write_bytes(data)
    model, image = vpt.load_task(path, NANO), read_image(tmp_path / "one")
    preprocessing = Preprocessing.from_dict(vpt.read_task(path).preprocessing)
    with torch.inference_mode():
        sizes = [letterboxed_size((100, 200), preprocessing)]
        (found,) = model(EvalTransform(preprocessing)(image)[None], sizes=sizes)
    wanted = to_original(found, (100, 200), preprocessing)
    least = float(wanted["scores"].median())
    (answer,) = ask(client, "boxes", data, min_score=least).json()["images"]
    boxes = answer["tasks"]["boxes"]["predictions"]
    kept = wanted["scores"] >= least
    assert 0 < len(boxes) < len(kept)
    np.testing.assert_allclose([box["box"] for box in boxes], wanted["boxes"][kept].numpy(), atol=1e-3)
    np.testing.assert_allclose([box["score"] for box in boxes], wanted["scores"][kept].numpy(), atol=1e-5)
    assert [box["class"] for box in boxes] == [("cat", "dog")[label] for label in wanted["labels"][kept]]
    assert max(box["box"][2] for box in boxes) > 64  # not pixels of the input
    (fewer,) = ask(client, "boxes", data, min_score=least, max_detections=2).json()["images"]
    assert fewer["tasks"]["boxes"]["predictions"] == boxes[:2]


def test_tasks_with_different_preprocessing_each_get_their_own(files, tmp_path):
    bank = TaskBank(NANO)
    own = vpt.read_task(files / "deep.safetensors").preprocessing
    model = vpt.load_task(files / "deep.safetensors", NANO)
    others = {"squash": own | {"crop_mode": "squash"}, "dark": own | {"mean": [0.1, 0.2, 0.3]}}
    paths = {"deep": files / "deep.safetensors"}
    for name, preprocessing in others.items():
        paths[name] = vpt.save_task(model, tmp_path / f"{name}.safetensors", preprocessing=preprocessing)
    for name, path in paths.items():
        bank.load(path, name)
    data = png_bytes(1, (120, 50))
    with served(bank) as client:
        found = ask(client, list(paths), data, top_k=7).json()["images"][0]["tasks"]
    rows = []
    for name, path in paths.items():
        wanted = expected_logits(path, data, tmp_path).softmax(0).sort(descending=True).values
        rows.append([entry["probability"] for entry in found[name]["predictions"]])
        assert rows[-1] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert not np.allclose(rows[0], rows[1], atol=1e-4)
    assert not np.allclose(rows[0], rows[2], atol=1e-4)


def test_inputs_of_different_sizes_share_no_batch_and_are_all_answered(tmp_path):
    vit = make_tiny_vit("cls", dynamic_img_size=True)
    bank, sizes = TaskBank(vit), {"small": 32, "large": 48}
    for name, size in sizes.items():
        model = vpt.create_model(vit, prompt="deep", num_tokens=2, num_classes=2)
        preprocessing = vpt.models.vit.preprocessing_of(vit) | {"size": [size, size]}
        bank.load(vpt.save_task(model, tmp_path / f"{name}.safetensors", preprocessing=preprocessing))
    with served(bank) as client:
        found = ask(client, ["small", "large"], png_bytes(), png_bytes(1)).json()["images"]
        assert [list(one["tasks"]) for one in found] == [["small", "large"]] * 2
        assert client.get("/health").json()["batches"] == 2


def test_requests_for_different_tasks_go_through_the_bank_in_one_call():
    bank = FakeBank("a", "b")
    with served(bank, max_wait_ms=2000, max_batch=6) as client, ThreadPoolExecutor(6) as pool:
        names = ["a", "b", "b", "a", "a", "b"]
        answers = list(pool.map(lambda name: ask(client, name, png_bytes()).json(), names))
    assert [sorted(batch) for batch in bank.batches] == [["a", "a", "a", "b", "b", "b"]]
    for name, answer in zip(names, answers, strict=True):
        best = answer["images"][0]["tasks"][name]["predictions"][0]
        assert best["class"] == {"a": "0", "b": "1"}[name]  # classes that nobody named are numbers


def test_answers_are_strict_json(client):
    text = ask(client, ["shallow", "boxes"], png_bytes()).text
    assert json.loads(text, parse_constant=pytest.fail)["images"]
    assert "日本" in text


def test_an_image_may_be_the_whole_body(client):
    by_form = ask(client, "deep", png_bytes(3)).json()["images"][0]
    response = client.post(
        "/predict", params={"task": "deep"}, content=png_bytes(3), headers={"Content-Type": "image/png"}
    )
    (by_body,) = response.json()["images"]
    assert by_body["tasks"] == by_form["tasks"]
    assert by_body["name"] == "image"
    assert ask(client, "deep", png_bytes(3), field="file").json()["images"][0] == by_form


def test_an_image_is_upright_before_it_is_measured_and_a_repeated_task_predicted_once(client):
    exif = Image.Exif()
    exif[0x0112] = 6
    (answer,) = ask(client, ["deep", "deep"], png_bytes(0, (90, 60), "JPEG", exif=exif)).json()["images"]
    assert (answer["width"], answer["height"]) == (60, 90)
    assert list(answer["tasks"]) == ["deep"]


def test_many_clients_at_once_get_the_answers_of_single_ones(client):
    questions = [(("deep", "shallow", "linear", "boxes")[number % 4], png_bytes(number % 5)) for number in range(40)]

    def put(question):
        return ask(client, *question, min_score=0.0).json()["images"][0]["tasks"]

    alone = [put(question) for question in questions]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(put, questions))
    for one, other in zip(alone, together, strict=True):
        (first,), (second,) = one.values(), other.values()
        assert len(first["predictions"]) == len(second["predictions"])
        for a, b in zip(first["predictions"], second["predictions"], strict=True):
            assert a.get("probability", a.get("score")) == pytest.approx(b.get("probability", b.get("score")), abs=1e-5)
    totals = client.get("/health").json()
    assert totals["batches"] < totals["predictions"]


# Tasks, health, OpenAPI


def test_tasks_are_described(client, files):
    tasks = client.get("/tasks").json()
    assert [task["name"] for task in tasks] == ["boxes", "deep", "linear", "shallow"]
    deep = client.get("/tasks/deep").json()
    assert deep == tasks[1]
    metadata = vpt.read_task(files / "deep.safetensors")
    assert deep["classes"] == metadata.classes
    assert deep["backbone"] == metadata.backbone
    assert deep["preprocessing"] == metadata.preprocessing
    assert deep["metrics"] == {"test": {"top1": 0.5}}
    assert deep["bytes"] > 12 * 3 * 192 * 4
    assert "config" not in deep
    assert client.get("/tasks/shallow").json()["classes"] == HOSTILE
    assert "no task nobody; there are boxes, deep" in detail(client.get("/tasks/nobody"), 404)


def test_health_counts(client):
    before = client.get("/health").json()
    ask(client, ["deep", "linear"], png_bytes(), png_bytes(1))
    after = client.get("/health").json()
    assert (after["status"], after["tasks"], after["waiting"], after["uploads"]) == ("ok", 4, 0, False)
    assert after["predictions"] == before["predictions"] + 4


def test_openapi_describes_requests_and_answers(client):
    paths = client.get("/openapi.json").json()
    predict = paths["paths"]["/predict"]["post"]
    assert set(predict["requestBody"]["content"]) == {"multipart/form-data", "image/*"}
    assert predict["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/Answer")
    assert predict["responses"]["422"]["content"]["application/json"]["schema"]["$ref"].endswith("/Problem")
    schemas = paths["components"]["schemas"]
    assert set(schemas["ClassProbability"]["properties"]) == {"class", "probability"}
    assert set(schemas["DetectedBox"]["properties"]) == {"class", "score", "box"}
    assert set(paths["paths"]["/tasks/{name}"]) == {"get", "put", "delete"}
    assert client.get("/docs").status_code == 200


def test_the_page_may_only_run_its_own_script(client):
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "innerHTML" not in response.text
    assert re.findall(r"https?://", response.text) == []
    assert "access-control-allow-origin" not in response.headers


# Refusals


@pytest.mark.parametrize(
    ("query", "request_", "status", "message"),
    [
        ("task=dogs", {"files": {"images": png_bytes()}}, 404, "no task dogs; there are boxes, deep, linear, shallow"),
        ("", {"files": {"images": png_bytes()}}, 422, "task: "),
        ("task=deep&top_k=0", {"files": {"images": png_bytes()}}, 422, "top_k: "),
        ("task=deep&top_k=1001", {"files": {"images": png_bytes()}}, 422, "top_k: "),
        ("task=deep&max_detections=1001", {"files": {"images": png_bytes()}}, 422, "max_detections: "),
        ("task=deep&topk=3", {"files": {"images": png_bytes()}}, 422, "did you mean top_k"),
        ("task=deep&min_score=much", {"files": {"images": png_bytes()}}, 422, "min_score: "),
        ("task=deep", {"content": b"x"}, 415, "curl"),
        ("task=deep", {"files": {"photo": png_bytes()}}, 422, "images or file"),
        ("task=deep", {"data": {"images": "a"}, "files": {"a": b""}}, 422, "images or file"),
        ("task=deep", {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 422, "cannot be read"),
        (
            "task=deep",
            {"content": b"x" * 99, "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
            422,
            "cannot be read",
        ),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(client, query, request_, status, message):
    assert message in detail(client.post(f"/predict?{query}", **request_), status)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "the file is empty"),
        (b"GIF89a", "not a"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a"),
        (png_bytes()[:400], "broken"),
        (png_bytes(0, (3000, 2)), "narrow"),
        (one_bit_png(10_000, 6_000), "60,000,000 pixels"),  # by its header: its pixels would be white and usable
    ],
)
def test_an_unusable_image_is_named_with_the_reason(client, data, why):
    text = detail(ask(client, "deep", png_bytes(), data), 422)
    assert text.startswith("1.png: ")
    assert why in text


@pytest.mark.parametrize("name", ["../../etc/passwd", "a\nb.png", "<b>x</b>.png", "x" * 1000, "", "\x00"])
def test_a_hostile_file_name_stays_a_name(client, name):
    response = client.post("/predict?task=deep", files={"images": (name or " ", png_bytes(), "image/png")})
    (answer,) = response.json()["images"]
    assert 0 < len(answer["name"]) <= 200
    assert answer["name"].isprintable()
    text = detail(client.post("/predict?task=deep", files={"images": (name or " ", b"x", "image/png")}), 422)
    assert text.startswith(f"{answer['name']}: ")


def test_a_body_that_is_too_large_is_refused_by_its_length_and_while_it_is_read():
    with served(FakeBank(), max_body_mb=0.1) as client:
        assert "larger than 100,000 bytes" in detail(ask(client, "a", b"x" * 200_000), 413)
        assert "larger than 100,000 bytes" in detail(ask(client, "a", b"x" * 30_000_000), 413)

        def chunks():
            for _ in range(1000):
                yield b"x" * 1000

        image = {"Content-Type": "image/png"}
        assert "larger than" in detail(client.post("/predict?task=a", content=chunks(), headers=image), 413)
        assert send_header(client, 10**12) == 413
        assert ask(client, "a", png_bytes(0, (20, 20))).status_code == 200


def test_the_memory_of_all_requests_has_a_limit(monkeypatch):
    monkeypatch.setattr("vpt.serve.bodies.NUM_HELD", 1.5)
    bank = FakeBank()
    noise = np.random.default_rng(0).bytes(60_000)  # after the image, where no decoder reads
    with served(bank, max_body_mb=0.1) as client, ThreadPoolExecutor(2) as pool:
        bank.hold()
        first = [pool.submit(ask, client, "a", png_bytes(0, (20, 20)) + noise) for _ in range(2)]
        assert bank.began.wait(SLOW)
        wait_for(client, 2)
        refused = ask(client, "a", png_bytes(0, (20, 20)) + noise)
        assert "too many large requests" in detail(refused, 429)
        bank.may_go_on.set()
        assert [future.result().status_code for future in first] == [200, 200]
        assert ask(client, "a", png_bytes(0, (20, 20)) + noise).status_code == 200


def test_a_full_queue_is_refused_with_a_time_to_try_again():
    bank = FakeBank()
    with served(bank, max_queue=3) as client, ThreadPoolExecutor(3) as pool:
        bank.hold()
        first = [pool.submit(ask, client, "a", png_bytes()) for _ in range(3)]
        wait_for(client, 3)
        refused = ask(client, "a", png_bytes())
        assert "3 of 3 places are taken" in detail(refused, 429)
        assert refused.headers["retry-after"] == "1"
        bank.may_go_on.set()
        assert [future.result().status_code for future in first] == [200, 200, 200]
        assert client.get("/health").json()["waiting"] == 0
        assert ask(client, "a", png_bytes()).status_code == 200
        assert "4 images for 1 tasks" in detail(ask(client, "a", *[png_bytes()] * 4), 413)


def test_a_timeout_is_reported_and_its_work_is_dropped():
    bank = FakeBank()
    with served(bank, timeout_s=0.5, max_batch=1) as client, ThreadPoolExecutor(2) as pool:
        bank.hold()
        running = pool.submit(ask, client, "a", png_bytes())
        assert bank.began.wait(SLOW)
        assert "not answered within 0.5 s" in detail(ask(client, "b", png_bytes(), png_bytes()), 504)
        assert running.result().status_code == 504
        assert client.get("/health").json()["waiting"] == 0
        bank.may_go_on.set()
        assert ask(client, "a", png_bytes()).status_code == 200
    assert bank.batches == [["a"], ["a"]]  # b never ran


def test_a_client_that_sends_slowly_has_the_same_time():
    with served(FakeBank(), timeout_s=0.3) as client:
        assert send_header(client, 1000, b"x") == 504


def test_a_client_that_disconnects_does_no_harm(caplog):
    with served(FakeBank()) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
            raw.sendall(
                b"POST /predict?task=a HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
                b"Content-Length: 9\r\n\r\nx"
            )
            time.sleep(0.2)
        assert ask(client, "a", png_bytes()).status_code == 200
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_model_error_fails_its_batch_and_its_task_only(caplog):
    bank = FakeBank()
    with served(bank, max_wait_ms=2000, max_batch=2) as client, ThreadPoolExecutor() as pool:
        bank.error = RuntimeError("out of memory\nlong story")
        assert detail(ask(client, "a", png_bytes()), 500) == "the model could not run this batch (out of memory)"
        bank.error, bank.failing = None, "b"
        answers = {task: pool.submit(ask, client, task, png_bytes()) for task in ("a", "b")}
        assert answers["a"].result().status_code == 200
        assert detail(answers["b"].result(), 500) == "the model could not run this batch (this task fails)"
        assert sorted(bank.batches[1]) == ["a", "b"]
        assert client.get("/health").json()["failed_batches"] == 1
    assert "a batch of a failed" in caplog.text


def test_numbers_that_are_not_finite_are_an_error(files, tmp_path):
    model = vpt.load_task(files / "linear.safetensors", NANO)
    torch.nn.init.constant_(model.head.bias, float("nan"))
    bank = TaskBank(NANO)
    bank.load(vpt.save_task(model, tmp_path / "broken.safetensors"))
    bank.load(files / "deep.safetensors")
    with served(bank) as client:
        assert "task broken: logits are not finite" in detail(ask(client, "broken", png_bytes()), 500)
        assert ask(client, "deep", png_bytes()).status_code == 200


def test_an_image_that_takes_long_to_decode_is_refused():
    with served(FakeBank(), decode_s=0.02) as client:
        assert "to decode" in detail(ask(client, "a", one_bit_png(7000, 7000)), 422)


def test_an_answer_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr("vpt.serve.service.MAX_ANSWER", 5000)
    with served(FakeBank("a")) as client:
        assert ask(client, "a", *[png_bytes()] * 3).status_code == 200
        assert "5,000 bytes" in detail(ask(client, "a", *[png_bytes()] * 100), 413)
        assert client.get("/health").json()["waiting"] == 0


@pytest.mark.parametrize("path", ["/predict", "/tasks"])
def test_the_server_answers_others_while_it_builds_a_large_answer(monkeypatch, path):
    building, may_go_on = threading.Event(), threading.Event()

    def build(*arguments):
        building.set()
        assert may_go_on.wait(SLOW)
        raise HTTPException(413, "built")

    for name in ("_to_json", "describe_all"):
        monkeypatch.setattr(vpt.serve.service.Service, name, build)
    with served(FakeBank()) as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(*((ask, client, "a", png_bytes()) if path == "/predict" else (client.get, path)))
        assert building.wait(SLOW)
        assert client.get("/health").status_code == 200
        may_go_on.set()
        assert asked.result().status_code == 413


def test_a_full_or_empty_server_is_alive_but_not_ready():
    bank = FakeBank()
    with served(bank, max_queue=1) as client, ThreadPoolExecutor(1) as pool:
        assert client.get("/ready").json() == {"status": "ready"}
        bank.hold()
        running = pool.submit(ask, client, "a", png_bytes())
        wait_for(client, 1)
        assert "queue" in detail(client.get("/ready"), 503)
        bank.may_go_on.set()
        assert running.result().status_code == 200
        bank.held.clear()
        assert "no task" in detail(client.get("/ready"), 503)
        assert client.get("/health").status_code == 200


def test_no_part_of_an_image_is_written_to_disk(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a temporary file")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with served(FakeBank()) as client:
        data = png_bytes(0, (900, 900), "BMP")
        assert len(data) > 2_000_000  # more than Starlette keeps in memory otherwise
        assert ask(client, "a", data).status_code == 200


def test_a_shutdown_waits_for_accepted_requests():
    bank = FakeBank()
    with ThreadPoolExecutor(5) as pool:
        with served(bank, max_batch=2, max_wait_ms=1000) as client:
            bank.hold()
            where = f"{client.base_url}/predict?task="
            send = {"files": {"images": png_bytes()}, "timeout": SLOW}
            asked = [pool.submit(httpx.post, where + "ab"[number % 2], **send) for number in range(5)]
            wait_for(client, 5)
            threading.Timer(0.5, bank.may_go_on.set).start()
        assert [future.result().status_code for future in asked] == [200] * 5


# Changes of tasks


@pytest.fixture
def changing(files, tmp_path):
    """A client of a server whose tasks may be changed, and the folder."""
    folder = tmp_path / "served"
    folder.mkdir()
    shutil.copy(files / "deep.safetensors", folder)
    bank = TaskBank(NANO)
    bank.load(folder / "deep.safetensors")
    with served(bank, folder=folder, max_body_mb=2) as client:
        yield client, folder


def test_tasks_are_not_changed_unless_allowed(client, files):
    data = (files / "linear.safetensors").read_bytes()
    for response in (client.put("/tasks/new", content=data), client.delete("/tasks/deep")):
        assert "uploads=true" in detail(response, 403)
    assert [task["name"] for task in client.get("/tasks").json()] == ["boxes", "deep", "linear", "shallow"]


def test_a_task_is_put_replaced_and_deleted(changing, files, tmp_path):
    client, folder = changing
    linear, shallow = ((files / f"{name}.safetensors").read_bytes() for name in ("linear", "shallow"))
    created = client.put("/tasks/new-1", content=linear)
    assert (created.status_code, created.json()["classes"]) == (201, ["yes", "no"])
    assert (folder / "new-1.safetensors").read_bytes() == linear
    assert ask(client, "new-1", png_bytes()).json()["images"][0]["tasks"]["new-1"]["predictions"][0]["class"] in "yesno"
    replaced = client.put("/tasks/new-1", content=shallow)
    assert (replaced.status_code, replaced.json()["classes"]) == (200, HOSTILE)
    assert (folder / "new-1.safetensors").read_bytes() == shallow
    wanted = expected_logits(files / "shallow.safetensors", png_bytes(4), tmp_path).softmax(0)
    found = ask(client, "new-1", png_bytes(4)).json()["images"][0]["tasks"]["new-1"]["predictions"]
    assert found[0]["probability"] == pytest.approx(float(wanted.max()), abs=1e-5)
    assert client.delete("/tasks/new-1").status_code == 204
    assert not (folder / "new-1.safetensors").exists()
    detail(ask(client, "new-1", png_bytes()), 404)
    detail(client.delete("/tasks/new-1"), 404)
    assert sorted(path.name for path in folder.iterdir()) == ["deep.safetensors"]


@pytest.mark.parametrize(
    "name", ["..%2Fevil", "%2e%2e", "a.b", "a%00", "a%0A", "x" * 65, "%20", "ü", "-%2F..", "%5C..%5Cevil"]
)
def test_an_invalid_name_is_refused(changing, files, tmp_path, name):
    client, _ = changing
    before = sorted(tmp_path.rglob("*"))
    response = client.put(f"/tasks/{name}", content=(files / "linear.safetensors").read_bytes())
    assert response.status_code in (404, 405, 422)
    assert sorted(tmp_path.rglob("*")) == before
    assert [task["name"] for task in client.get("/tasks").json()] == ["deep"]


def test_an_invalid_task_file_is_refused_and_nothing_changes(changing, files, tmp_path):
    client, folder = changing
    good = (files / "linear.safetensors").read_bytes()
    vit = make_tiny_vit("cls")
    other = vpt.save_task(vpt.create_model(vit, prompt=None, num_classes=2), tmp_path / "other.safetensors")
    wrong = {
        "not a readable safetensors file": b"junk" * 10,
        "": b"",
        "sha256": good[:-1] + bytes([good[-1] ^ 1]),
        "made for the backbone": other.read_bytes(),
    }
    for name in ("deep", "new"):
        for why, data in wrong.items():
            text = detail(client.put(f"/tasks/{name}", content=data), 422)
            assert why in text
            assert text.startswith(f"{name}: ")
            assert tempfile.gettempdir() not in text
    assert "2,000,000" in detail(client.put("/tasks/new", content=b"x" * 2_000_001), 413)
    assert [path.name for path in folder.iterdir()] == ["deep.safetensors"]
    assert (folder / "deep.safetensors").read_bytes() == (files / "deep.safetensors").read_bytes()
    assert client.get("/tasks").json()[0]["classes"] == list("abcdefg")


def test_a_task_that_cannot_be_written_is_not_served(changing, files, monkeypatch):
    client, _ = changing

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vpt.serve.service, "write_bytes", full)
    data = (files / "shallow.safetensors").read_bytes()
    for name in ("new", "deep"):
        assert "No space left" in detail(client.put(f"/tasks/{name}", content=data), 507)
    assert [(task["name"], len(task["classes"])) for task in client.get("/tasks").json()] == [("deep", 7)]


def test_an_existing_file_that_is_not_served_is_not_overwritten(changing, files):
    client, folder = changing
    (folder / "mine.safetensors").write_bytes(b"precious")
    data = (files / "linear.safetensors").read_bytes()
    assert "choose another name" in detail(client.put("/tasks/mine", content=data), 409)
    assert (folder / "mine.safetensors").read_bytes() == b"precious"


def test_a_web_page_cannot_use_a_local_server_under_its_host_name(changing, files):
    client, _ = changing
    data = (files / "linear.safetensors").read_bytes()
    for host in ("evil.example:8000", "localhost.evil.example", "", "127.0.0.1@evil"):
        evil = {"Host": host}
        for path in ("/", "/health", "/ready", "/tasks", "/tasks/deep", "/openapi.json", "/docs", "/nowhere"):
            assert "127.0.0.1" in detail(client.get(path, headers=evil), 403)
        detail(client.post("/predict?task=deep", files={"images": png_bytes()}, headers=evil), 403)
        detail(client.put("/tasks/deep", content=data, headers=evil), 403)
        detail(client.delete("/tasks/deep", headers=evil), 403)
    assert client.delete("/tasks/deep", headers={"Host": "localhost:8000"}).status_code == 204


def test_a_put_is_answered_although_another_client_deletes_the_task_just_afterwards(changing, files, monkeypatch):
    client, _ = changing
    put = vpt.serve.service.Service.put

    def put_and_delete(self, name, data):
        result = put(self, name, data)
        self.delete(name)
        return result

    monkeypatch.setattr(vpt.serve.service.Service, "put", put_and_delete)
    created = client.put("/tasks/new", content=(files / "linear.safetensors").read_bytes())
    assert (created.status_code, created.json()["classes"]) == (201, ["yes", "no"])
    assert [task["name"] for task in client.get("/tasks").json()] == ["deep"]


@pytest.mark.parametrize(
    ("change", "status", "message"), [("delete", 404, "no task b"), ("replace", 409, "task b was replaced")]
)
def test_an_image_of_a_task_that_changes_while_it_waits_is_refused_and_no_other(change, status, message):
    bank = FakeBank("a", "b")
    with served(bank, folder=Path("/nowhere"), max_batch=1) as client, ThreadPoolExecutor(4) as pool:
        bank.hold()
        running = pool.submit(ask, client, "a", png_bytes())
        assert bank.began.wait(SLOW)
        waiting = [pool.submit(ask, client, name, png_bytes()) for name in "ab"]
        wait_for(client, 3)
        time.sleep(0.2)  # they are prepared
        if change == "delete":
            deleted = pool.submit(client.delete, "/tasks/b")
            time.sleep(0.2)
        else:
            old = bank.held["b"]
            bank.held["b"] = replace(old, preprocessing=old.preprocessing | {"crop_mode": "squash"})
        bank.may_go_on.set()
        assert [running.result().status_code, waiting[0].result().status_code] == [200, 200]
        assert message in detail(waiting[1].result(), status)
        if change == "delete":
            assert deleted.result().status_code == 204
        else:
            assert ask(client, "b", png_bytes()).status_code == 200


def test_concurrent_uploads_and_predictions_use_one_task_or_the_other(changing, files, tmp_path):
    """One task has the classes a to g, the other yes and no; no answer may mix them."""
    client, _ = changing
    contents = [(files / f"{name}.safetensors").read_bytes() for name in ("deep", "linear")]
    wanted = [
        expected_logits(files / f"{name}.safetensors", png_bytes(), tmp_path).softmax(0).max().item()
        for name in ("deep", "linear")
    ]
    end, seen = threading.Event(), []

    def predict():
        while not end.is_set():
            found = ask(client, "deep", png_bytes(), top_k=9).json()["images"][0]["tasks"]["deep"]["predictions"]
            which = 0 if {entry["class"] for entry in found} == set("abcdefg") else 1
            assert len(found) == (7, 2)[which]
            assert found[0]["probability"] == pytest.approx(wanted[which], abs=1e-5)
            seen.append(which)

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(predict) for _ in range(3)]
        for number in range(1, 13):
            assert client.put("/tasks/deep", content=contents[number % 2]).status_code == 200
        end.set()
        for future in running:
            future.result()
    assert set(seen) == {0, 1}
