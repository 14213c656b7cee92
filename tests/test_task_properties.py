"""Task files: any valid one is restored as it was, and any change of the bytes is refused or changes nothing."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vpt
from tests.helpers import make_tiny_vit
from vpt.models.task_file import open_task, write_task
from vpt.models.task_schema import TaskMetadata

NUM_MUTATIONS = 500
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.integers(-(10**18), 10**18) | st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(TEXTS, part, max_size=3),
    max_leaves=8,
)


@st.composite
def task_files(draw):
    """Metadata and tensors of any classification task that may be written."""
    num_classes, width = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    blocks = sorted(draw(st.sets(st.integers(0, 30), min_size=1, max_size=3)))
    num_tokens = draw(st.integers(1, 4))
    sizes = {"num_tokens": num_tokens, "embed_dim": width, "width": width, "dropout": draw(st.floats(0, 0.99))}
    kind = draw(st.sampled_from(["deep", "shallow", "kv"]))
    prompt = draw(st.none() | st.just({"kind": kind, "blocks": blocks, **sizes}))
    metadata = TaskMetadata(
        backbone=draw(st.from_regex(r"\A\w[\w.-]{0,30}\Z")),
        fingerprint=draw(st.from_regex(r"\A[0-9a-f]{64}\Z")),
        prompt=prompt,
        num_classes=num_classes,
        classes=draw(st.none() | st.lists(TEXTS, min_size=num_classes, max_size=num_classes, unique=True)),
        preprocessing={
            "size": draw(st.lists(st.integers(1, 4096), min_size=2, max_size=2)),
            "mean": draw(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3)),
            "std": draw(st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=3)),
            "interpolation": "bicubic",
            "crop_pct": draw(st.floats(0.1, 1)),
            "crop_mode": draw(st.sampled_from(["center", "squash", "letterbox"])),
        },
        metrics=draw(st.dictionaries(TEXTS, st.dictionaries(TEXTS, st.none() | st.floats(-1e9, 1e9)), max_size=2)),
        config=draw(st.none() | st.dictionaries(TEXTS, PLAIN, max_size=3)),
        versions=draw(st.dictionaries(TEXTS, TEXTS, max_size=2)),
        licence=draw(TEXTS),
        note=draw(TEXTS),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shapes = {"head.weight": (num_classes, width), "head.bias": (num_classes,)}
    shapes |= {"prompt.tokens": (len(blocks), num_tokens, width)} if prompt else {}
    return metadata, {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(task=task_files())
def test_any_task_is_restored_as_it_was_written(tmp_path, task):
    metadata, tensors = task
    path = write_task(tmp_path / "a.safetensors", metadata, tensors)
    again, held = open_task(path)
    assert again == metadata
    assert held.keys() == tensors.keys()
    assert all(torch.equal(held[name], tensor) and held[name].dtype is tensor.dtype for name, tensor in tensors.items())
    before = path.read_bytes()
    assert write_task(path, again, held).read_bytes() == before


def mutate(data, draw):
    """The bytes with one change, and its name."""
    place, other, changed = draw(len(data)), draw(len(data)), bytearray(data)
    kind = ("flip", "set", "insert", "delete", "truncate", "swap", "repeat")[draw(7)]
    match kind:
        case "flip":
            changed[place] ^= 1 << draw(8)
        case "set":
            changed[place] = draw(256)
        case "insert":
            changed[place:place] = bytes(draw(256) for _ in range(1 + draw(9)))
        case "delete":
            del changed[place : place + 1 + draw(9)]
        case "truncate":
            del changed[place:]
        case "swap":
            changed[place], changed[other] = changed[other], changed[place]
        case "repeat":
            changed[place:place] = changed[place : place + 1 + draw(40)]
    return bytes(changed), kind


@pytest.mark.parametrize(
    ("num", "seed"), [(NUM_MUTATIONS, 0), pytest.param(10 * NUM_MUTATIONS, 1, marks=pytest.mark.slow)]
)
def test_any_change_of_a_task_file_is_refused_or_changes_nothing(tmp_path, num, seed):
    torch.manual_seed(0)
    model = vpt.create_model(make_tiny_vit(), prompt="deep", num_tokens=2, num_classes=3)
    model.head.weight.data.normal_()
    path = vpt.save_task(model, tmp_path / "a.safetensors", classes=["cat", "dog", "eel"], config={"seed": 1})
    generator, tried = np.random.default_rng(seed), Counter()
    whole, (metadata, tensors) = path.read_bytes(), open_task(path)
    for _ in range(num):
        changed, kind = mutate(whole, lambda high: int(generator.integers(high)))
        tried[kind] += 1
        path.write_bytes(changed)
        try:
            again, held = open_task(path)
        except ValueError:
            continue
        assert again == metadata
        assert held.keys() == tensors.keys()
        assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())
    assert sum(tried.values()) == num
    assert min(tried.values()) > num / 20


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=300))
def test_random_bytes_are_not_a_task_file(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "bytes.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        vpt.read_task(path)
