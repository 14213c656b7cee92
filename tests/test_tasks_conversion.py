import json
import os
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vpt
from tests.helpers import make_tiny_vit
from vpt.models.task_file import open_task, to_dtype, write_task
from vpt.tasks import conversion
from vpt.tasks.conversion import read_folder, read_original, task_of, write_folder

P, D, DEPTH, K = 4, 32, 3, 5


def make_task(kind, folder):
    """A task file with everything that one can hold; its prompt or head is of this kind."""
    torch.manual_seed(3)
    options = {"prompt": kind} if kind in ("shallow", "deep", "kv") else {"prompt": None}
    if kind == "detection":
        options = {"task": "detection", "channels": 16, "num_convs": 1, "category_ids": [1, 7, 90]}
    if kind == "bias":
        options["tuning"] = "bias"
    model = vpt.create_model(make_tiny_vit(img_size=64), num_classes=3, num_tokens=P, **options)
    for parameter in vpt.tuned_parameters(model).values():
        parameter.data.normal_()
    values = {"classes": ["cat", "dög", "eel"], "metrics": {"val": {"top1": 0.5, "loss": float("nan")}}}
    return vpt.save_task(model, folder / f"{kind}.safetensors", **values, config={"lr": 1e-3}, licence="MIT", note="n")


KINDS = ["none", "shallow", "deep", "kv", "bias", "detection"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_restored_from_a_folder_with_the_keys_of_peft_bit_for_bit(tmp_path, kind):
    path = make_task(kind, tmp_path)
    folder = write_folder(tmp_path / "folder", *open_task(path))
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    restored = read_folder(folder)
    assert restored[0] == open_task(path)[0]
    assert write_task(tmp_path / "again.safetensors", *restored).read_bytes() == path.read_bytes()
    config = json.loads((folder / "adapter_config.json").read_text())
    is_prompted = kind in ("shallow", "deep", "kv", "detection")
    assert config["peft_type"] == "VISUAL_PROMPT_TUNING"
    assert config["task_type"] == ("OBJECT_DETECTION" if kind == "detection" else "IMAGE_CLASSIFICATION")
    assert config["base_model_name_or_path"].startswith("vit_tiny_patch16_224")
    assert config["num_virtual_tokens"] == (P if is_prompted else 0)
    assert config["token_dim"] == ({"kv": 2 * D}.get(kind, D) if is_prompted else None)
    assert config["num_layers"] == {"none": 0, "bias": 0, "shallow": 1}.get(kind, DEPTH)
    assert config["vpt"]["classes"] == ["cat", "dög", "eel"]


@pytest.fixture
def task(tmp_path):
    return open_task(make_task("deep", tmp_path))


@pytest.fixture
def folder(tmp_path, task):
    return write_folder(tmp_path / "folder", *task)


@pytest.mark.slow
def test_peft_itself_refuses_the_folder_as_documented(folder):
    from peft import PeftConfig

    with pytest.raises(KeyError, match="VISUAL_PROMPT_TUNING"):
        PeftConfig.from_pretrained(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LORA"}, 'peft_type is "LORA"; only VISUAL_PROMPT_TUNING can be read'),
        ({"peft_type": None}, "peft_type is null; only"),
        ({"peft_type": {"a": "b" * 10_000}}, "peft_type is .{100}; only"),
        ({"auto_mapping": "x"}, r"its auto_mapping does not match adapter_model\.safetensors"),
        ({"token_dim": ...}, "its token_dim does not match"),
        ({"base_model_name_or_path": "/etc/passwd"}, "its base_model_name_or_path does not match"),
        ({"num_virtual_tokens": 10**12}, "its num_virtual_tokens does not match"),
        ({"vpt": {}}, "its vpt does not match"),
        *((content, "is not JSON$") for content in (b"", b"{", b"[" * 100_000, b"\xff\xfe", b"\x80")),
        (b"[]", "is not a JSON object"),
        (b" " * (conversion.MAX_HEADER + 1), "larger than"),
    ],
)
def test_an_edited_config_is_refused(folder, change, message):
    path = folder / "adapter_config.json"
    if isinstance(change, dict):
        values = json.loads(path.read_text()) | change
        change = json.dumps({key: value for key, value in values.items() if value is not ...}).encode()
    path.write_bytes(change)
    with pytest.raises(ValueError, match=r"adapter_config\.json: " + message):
        read_folder(folder)


def test_half_a_folder_and_a_truncated_file_are_refused(folder):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: not a readable safetensors file"):
        read_folder(folder)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
            read_folder(folder)


def test_an_existing_file_or_folder_is_not_overwritten(tmp_path, task):
    for path in (tmp_path, tmp_path / "deep.safetensors"):
        with pytest.raises(FileExistsError, match="exists already"):
            write_folder(path, *task)
    (tmp_path / "empty").mkdir()
    assert read_folder(write_folder(tmp_path / "empty", *task))[0] == task[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_in_a_narrower_dtype_is_read_as_it_was_rounded(tmp_path, kind):
    metadata, tensors = open_task(make_task(kind, tmp_path))
    half = write_task(tmp_path / "half.safetensors", metadata, to_dtype(tensors, torch.float16))
    assert open_task(half)[0] == metadata
    wide = to_dtype(open_task(half)[1], torch.float32)
    assert all(torch.equal(wide[name], tensors[name].half().float()) for name in tensors)
    assert all(torch.equal(to_dtype(wide, torch.float16)[name], load_file(half)[name]) for name in tensors)


def test_numbers_too_large_for_a_dtype_are_refused_and_infinity_stays():
    with pytest.raises(ValueError, match=r"^head\.bias has numbers that are too large for float16; use bfloat16"):
        to_dtype({"head.bias": torch.tensor([1e6])}, torch.float16)
    assert to_dtype({"a": torch.tensor([torch.inf])}, torch.float16)["a"].isinf().all()


def make_prompts(deep=True):
    generator = np.random.default_rng(0)
    shallow, rest = (generator.normal(size=(num, P, D)).astype(np.float32) for num in (1, DEPTH - 1))
    return {"shallow_prompt": shallow, "deep_prompt": rest} if deep else {"shallow_prompt": shallow}


def make_state(deep=True, head=True):
    """A whole state dict."""
    prompts = make_prompts(deep)
    state = OrderedDict({"module.enc.prompt_embeddings": torch.nn.Parameter(torch.tensor(prompts["shallow_prompt"]))})
    state["module.enc.encoder.layer.0.attn.query.weight"] = torch.zeros(3, 3)
    if deep:
        state["module.enc.deep_prompt_embeddings"] = torch.tensor(prompts["deep_prompt"])
    if head:
        generator = torch.Generator().manual_seed(1)
        state["module.head.last_layer.weight"] = torch.randn(K, D, generator=generator)
        state["module.head.last_layer.bias"] = torch.randn(K, generator=generator)
    return state


def plain_logits(vit, images, prompts, weight, bias):
    """The forward pass as the paper reads: tokens between CLS and patches, replaced before each block if deep."""
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    fresh = [torch.tensor(prompts["shallow_prompt"][0]), *map(torch.tensor, prompts.get("deep_prompt", ()))]
    for index, block in enumerate(vit.blocks):
        held = 0 if index == 0 else P
        if index < len(fresh):
            entering = fresh[index].expand(len(images), -1, -1)
            tokens = torch.cat([tokens[:, :1], entering, tokens[:, 1 + held :]], dim=1)
        tokens = block(tokens)
    return vit.norm(tokens)[:, 0] @ weight.T + bias


@pytest.mark.parametrize("deep", [False, True])
def test_a_converted_state_dict_returns_the_logits_of_the_paper(tmp_path, images, deep):
    torch.save(make_state(deep), tmp_path / "state.pth")
    vit = make_tiny_vit()
    task = task_of(read_original(tmp_path / "state.pth"), vit)
    path = write_task(tmp_path / "a.safetensors", *task)
    state = make_state(deep)
    weight, bias = state["module.head.last_layer.weight"], state["module.head.last_layer.bias"]
    model = vpt.load_task(path, vit)
    with torch.no_grad():
        wanted = plain_logits(vit, images, make_prompts(deep), weight, bias)
        torch.testing.assert_close(model(images), wanted, rtol=1e-5, atol=1e-5)
    assert model.backbone.prompt.variant == ("deep" if deep else "shallow")
    assert "untrained" not in vpt.read_task(path).note


@pytest.mark.parametrize("deep", [False, True])
def test_prompts_alone_get_a_head_of_zeros_and_a_note(tmp_path, images, deep):
    torch.save(make_prompts(deep), tmp_path / "prompt_ep9.pth")
    vit = make_tiny_vit()
    path = write_task(
        tmp_path / "a.safetensors", *task_of(read_original(tmp_path / "prompt_ep9.pth"), vit, num_classes=K)
    )
    model = vpt.load_task(path, vit)
    assert not model(images).any()
    model.head.weight.data.normal_()
    with torch.no_grad():
        wanted = plain_logits(vit, images, make_prompts(deep), model.head.weight, model.head.bias)
        torch.testing.assert_close(model(images), wanted, rtol=1e-5, atol=1e-5)
    metadata = vpt.read_task(path)
    assert "The head is untrained" in metadata.note
    assert "prompt_ep9.pth" in metadata.note
    assert (metadata.num_classes, metadata.classes, metadata.metrics) == (K, None, {})


def test_preprocessing_is_that_of_the_original_code_and_not_that_of_timm():
    original = conversion.OriginalPrompt(Path("a.pth"), torch.zeros(1, P, D))
    vit = make_tiny_vit()
    for crop_mode, crop_pct in (("center", 0.875), ("squash", 1.0)):
        metadata, _ = task_of(original, vit, num_classes=K, crop_mode=crop_mode)
        assert metadata.preprocessing == {
            "size": [32, 32],
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "interpolation": "bilinear",
            "crop_pct": crop_pct,
            "crop_mode": crop_mode,
        }
    with pytest.raises(ValueError, match="crop_mode=letterbox: must be one of center, squash"):
        task_of(original, vit, num_classes=K, crop_mode="letterbox")


def replace_in_zip(path, old, new, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(old, new))


@pytest.mark.parametrize("is_zip", [False, True])
def test_arrays_that_numpy_1_wrote_are_read_too(tmp_path, is_zip):
    path, names = tmp_path / "prompt_ep1.pth", (b"numpy._core.multiarray", b"numpy.core.multiarray")
    torch.save(make_prompts(), path, _use_new_zipfile_serialization=is_zip)
    if is_zip:
        replace_in_zip(path, *names)
    else:
        assert names[0] in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(*names))
    original = read_original(path)
    assert torch.equal(original.shallow, torch.tensor(make_prompts()["shallow_prompt"]))
    assert torch.equal(original.deep, torch.tensor(make_prompts()["deep_prompt"]))


@pytest.mark.parametrize(
    "store",
    [
        torch.tensor,
        lambda array: torch.tensor(array).double(),
        lambda array: array.astype(np.float64),
        lambda array: array.astype(">f4"),
        np.asfortranarray,
        lambda array: np.repeat(array, 2, axis=2)[:, :, ::2],
        lambda array: torch.tensor(np.repeat(array, 2, axis=2))[:, :, ::2],
    ],
)
def test_prompts_are_read_however_they_were_stored(tmp_path, store):
    torch.save({name: store(array) for name, array in make_prompts().items()}, tmp_path / "a.pth")
    original = read_original(tmp_path / "a.pth")
    assert torch.equal(original.deep, torch.tensor(make_prompts()["deep_prompt"]))
    assert (original.deep.dtype, original.deep.is_contiguous()) == (torch.float32, True)


class Evil:
    """An object whose pickle runs a command when it is read."""

    def __init__(self, function, *arguments):
        self.called = (function, arguments)

    def __reduce__(self):
        return self.called


@pytest.mark.parametrize("is_zip", [False, True])
@pytest.mark.parametrize(
    "hide", [lambda evil: evil, lambda evil: {"a": [evil]}, lambda evil: np.array([evil], dtype=object)]
)
@pytest.mark.parametrize("function", ["system", "exec", "open", "getattr"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, is_zip, hide, function):
    sentinel = tmp_path / "ran"
    evil = {
        "system": Evil(os.system, f"touch {sentinel}"),
        "exec": Evil(exec, f"open({str(sentinel)!r}, 'w')"),
        "open": Evil(open, str(sentinel), "w"),
        "getattr": Evil(getattr, Evil(os.open, str(sentinel), os.O_CREAT), "real"),
    }[function]
    path = tmp_path / "prompt_ep1.pth"
    torch.save({**make_prompts(), "more": hide(evil)}, path, _use_new_zipfile_serialization=is_zip)
    named = {"system": "posix.system", "getattr": "getattr"}.get(function, "")
    with pytest.raises(
        ValueError, match=r"^[^\n]*not a \.pth file that can be read safely [^\n]*nothing in it was run$"
    ) as error:
        read_original(path)
    assert named in str(error.value)
    assert "weights_only" not in str(error.value)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "array", [np.array([[[1.0]]], dtype=object), np.ones((1, 2, 3), dtype=np.int64), np.array("a")]
)
def test_arrays_of_other_types_are_refused(tmp_path, array):
    torch.save({"shallow_prompt": array}, tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=r"a\.pth: shallow_prompt is not a usable array of floats .*its dtype is not a float"
    ):
        read_original(tmp_path / "a.pth")


def test_the_state_of_a_pickled_array_is_checked(tmp_path):
    """numpy.ndarray itself would accept such a state, and read memory outside of the array."""

    class Array:
        def __init__(self, state):
            self.state = state

        def __reduce__(self):
            make, arguments, _ = np.zeros(1, np.float32).__reduce__()
            return make, arguments, self.state

    dtype = np.dtype(np.float32)
    for state in [
        (1, (1, 9, 9), dtype, False, b"1234"),
        (1, (-1, 1, 1), dtype, False, b"1234"),
        (1, None, dtype),
        "x",
        (),
    ]:
        torch.save({"shallow_prompt": Array(state)}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"a\.pth: (shallow_prompt is not a usable array|not a \.pth file)"):
            read_original(tmp_path / "a.pth")


@pytest.mark.parametrize("is_zip", [False, True])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, is_zip):
    path = tmp_path / "prompt_ep1.pth"
    torch.save(make_prompts(), path, _use_new_zipfile_serialization=is_zip)
    whole = path.read_bytes()
    for length in [0, 1, 7, *range(20, len(whole) - 1, len(whole) // 23)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"ep1\.pth: not a \.pth file that can be read safely"):
            read_original(path)


def test_a_file_that_is_too_large_or_expands_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "prompt_ep1.pth"
    torch.save({"shallow_prompt": torch.zeros(1, 100, 1000)}, path)
    replace_in_zip(path, b"", b"", zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(conversion, "MAX_BYTES", 100_000)
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match="larger than 100000 bytes"):
        read_original(path)
    torch.save({"shallow_prompt": torch.zeros(1, 1, 1).expand(1, 1000, 1000)}, path)  # a view of one number
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"shallow_prompt is not .*its shape is \(1, 1000, 1000\)"):
        read_original(path)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "contains a list; expected a dict with a shallow_prompt"),
        (torch.zeros(3), "contains a Tensor; expected a dict"),
        ({}, r"has no prompt \(.*\), only nothing"),
        ({"cls": torch.zeros(3), 7: 1, "pos": 2}, r"has no prompt \(.*\), only cls, pos$"),
        ({"deep_prompt": np.ones((2, P, D), np.float32)}, "has no prompt"),
        ({"shallow_prompt": None}, "shallow_prompt is not a usable array of floats .*NoneType"),
        ({"shallow_prompt": torch.ones(1, P, D, dtype=torch.int32)}, r"shallow_prompt is not .*torch\.int32"),
        ({"shallow_prompt": torch.ones(1, P, D).to_sparse()}, "shallow_prompt is not a usable array"),
        ({"shallow_prompt": torch.ones(1, P, D, device="meta")}, "shallow_prompt is not a usable array"),
        ({"shallow_prompt": torch.full((1, P, D), torch.nan)}, "shallow_prompt contains nan or inf"),
        ({"shallow_prompt": torch.ones(P, D)}, r"its first block has shape \(4, 32\); expected \(1, P, D\)"),
        ({"shallow_prompt": torch.ones(1, 0, D)}, r"its first block has shape \(1, 0, 32\)"),
        (
            {**make_prompts(), "deep_prompt": torch.ones(2, P + 1, D)},
            r"shape \(2, 5, 32\); expected \(depth - 1, 4, 32\)",
        ),
        ({**make_prompts(), "deep_prompt": torch.ones(P, D)}, r"its deep prompt has shape \(4, 32\)"),
        ({**make_prompts(), "a.prompt_embeddings": torch.ones(1, P, D)}, "contains two prompts"),
        ({**make_prompts(), "a.prompt_proj.weight": torch.ones(D, D)}, "has a.prompt_proj.weight; prompts with a proj"),
        ({**make_prompts(), "deep_prompt_embeddings_0": torch.ones(1)}, "has deep_prompt_embeddings_0; .*Swin"),
        ({**make_prompts(), "head.projection.0.weight": torch.ones(1)}, "only a head of one layer"),
        ({**make_prompts(), "head.last_layer.weight": torch.ones(K, D)}, "of the head it has only the weight"),
        (
            {**make_state(), "module.head.last_layer.bias": torch.ones(K + 1)},
            r"its head has shapes \(5, 32\) and \(6,\)",
        ),
        ({**make_state(), "module.head.last_layer.bias": torch.ones(())}, r"its head has shapes \(5, 32\) and \(\)"),
    ],
)
def test_a_file_without_a_prompt_that_can_be_converted_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: .*" + message):
        read_original(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("has_head", "vit", "num_classes", "message"),
    [
        (True, {"embed_dim": 48}, None, "its prompt tokens have width 32, those of .* 48; name another"),
        (True, {"depth": 4}, None, "its prompt is for 3 blocks, .* has 4; name another backbone"),
        (True, {"global_pool": "avg"}, None, "the original ViT reads the CLS token, .* pools avg"),
        (True, {}, 6, "its head has 5 classes, not num_classes=6"),
        (False, {}, None, "has prompts but no head; num_classes"),
        (False, {}, 1_000_000, "num_classes is 1000000; allowed: an integer in"),
    ],
)
def test_a_backbone_or_a_number_of_classes_that_does_not_fit_is_refused(tmp_path, has_head, vit, num_classes, message):
    torch.save(make_state() if has_head else make_prompts(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"a\.pth: {message}"):
        task_of(read_original(tmp_path / "a.pth"), make_tiny_vit(**vit), num_classes=num_classes)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.pth: no such file"):
        read_original(tmp_path / "a.pth")
