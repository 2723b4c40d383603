"""Weights: found or named with the command that fetches them, read selectively, never executed."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stages import weights
from stages.weights import (
    WeightsMissing,
    WeightsRefused,
    load_strict,
    parse_seed,
    read_tensors,
    resolve,
    resolve_any,
    resolve_weights,
    seeded_init,
    weights_digest,
    without_weights,
)
from tests.extract.tiny import Touch, cached

TENSORS = {
    "vision.a": torch.arange(6.0).reshape(2, 3),
    "vision.b": torch.ones(4, dtype=torch.float16),
    "text.c": torch.full((5,), 7.0),
    "text.steps": torch.tensor(3),
}
SHARDS = {"one": ("vision.a",), "two": ("vision.b",), "three": ("text.c", "text.steps")}


def write_shards(folder: Path, suffix: str, stem: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for name, keys in SHARDS.items():
        part = {key: TENSORS[key] for key in keys}
        file = folder / f"{stem}-{name}.{suffix}"
        save_file(part, file) if suffix == "safetensors" else torch.save(part, file)
        weight_map |= dict.fromkeys(keys, file.name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(params=["safetensors", "bin"])
def sharded(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    stem = "model" if request.param == "safetensors" else "pytorch_model"
    return write_shards(tmp_path / "sharded", request.param, stem)


# ---------------------------------------------------------------- seeds


def test_a_seed_is_read_and_a_malformed_one_is_an_error() -> None:
    assert parse_seed("seed:3") == 3
    assert parse_seed("laion400m_s11b_b41k") is None
    assert parse_seed("") is None
    for text in ("seed:", "seed:-1", "seed:x"):
        with pytest.raises(ValueError, match="seed:<n>"):
            parse_seed(text)


def test_seeded_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (seeded_init(lambda: nn.Linear(3, 5), seed) for seed in (1, 1, 2))
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_module_without_weights_has_real_buffers_and_leaves_the_global_generator_alone() -> None:
    class Net(nn.Module):
        table: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    before = torch.random.get_rng_state()
    net = without_weights(Net)
    assert net.linear.weight.is_meta
    assert net.table.tolist() == [0, 1, 2]
    assert torch.equal(torch.random.get_rng_state(), before)


# ---------------------------------------------------------------- reading


def test_only_the_wanted_prefixes_are_returned_under_their_full_names(sharded: Path) -> None:
    tensors = read_tensors(sharded, ("vision.",))
    assert sorted(tensors) == ["vision.a", "vision.b"]
    assert torch.equal(tensors["vision.a"], TENSORS["vision.a"])


def test_shards_that_hold_nothing_wanted_are_never_opened(sharded: Path) -> None:
    unwanted = next(sharded.glob("*-three.*"))
    unwanted.write_bytes(b"poison")
    assert len(read_tensors(sharded, ("vision.",))) == 2
    unwanted.unlink()
    assert len(read_tensors(sharded, ("vision.",))) == 2


def test_a_filter_keeps_shards_closed_too(sharded: Path) -> None:
    next(sharded.glob("*-two.*")).unlink()
    assert list(read_tensors(sharded, ("vision.",), keep=lambda key: key != "vision.b")) == ["vision.a"]


def test_floats_are_converted_and_integers_are_not(sharded: Path) -> None:
    tensors = read_tensors(sharded, dtype=torch.float32)
    assert tensors["vision.b"].dtype == torch.float32
    assert tensors["text.steps"].dtype == torch.int64


def test_a_prefix_without_tensors_is_named(sharded: Path) -> None:
    with pytest.raises(WeightsMissing, match=r"qformer\.\*"):
        read_tensors(sharded, ("vision.", "qformer."))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = next(sharded.glob("*-one.*"))
    shard.unlink()
    with pytest.raises(WeightsMissing, match=shard.name):
        read_tensors(sharded, ("vision.",))


def test_a_tensor_that_the_index_promises_and_the_shard_lacks_is_named(sharded: Path) -> None:
    index = next(sharded.glob("*.index.json"))
    document = json.loads(index.read_text())
    document["weight_map"]["vision.ghost"] = document["weight_map"]["vision.a"]
    index.write_text(json.dumps(document))
    with pytest.raises(WeightsRefused, match=r"vision\.ghost"):
        read_tensors(sharded, ("vision.",))


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/x.safetensors", "a\\b.bin", "..", "notes.txt"])
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path: Path, file: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(WeightsRefused, match="same folder"):
        read_tensors(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "{"])
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsRefused, match=r"index\.json"):
        read_tensors(tmp_path)


def test_safetensors_are_preferred_to_bin(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert read_tensors(tmp_path)["a"].item() == 1


def test_a_truncated_safetensors_file_is_refused_by_name(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-9])
    with pytest.raises(WeightsRefused, match=r"model\.safetensors is not a whole"):
        read_tensors(tmp_path)


HEADERS = {
    "longer than the file": (1 << 62, b"{}"),
    "not JSON": (None, b"{"),
    "overlapping": (
        None,
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
        b' "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
    ),
    "beyond the end": (None, b'{"a": {"dtype": "F32", "shape": [9999], "data_offsets": [0, 39996]}}'),
    "another size than the shape": (None, b'{"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 12]}}'),
    "an unknown dtype": (None, b'{"a": {"dtype": "O", "shape": [3], "data_offsets": [0, 12]}}'),
}


@pytest.mark.parametrize("what", HEADERS)
def test_31_a_hostile_safetensors_header_is_refused_by_file(tmp_path: Path, what: str) -> None:
    length, header = HEADERS[what]
    size = (len(header) if length is None else length).to_bytes(8, "little")
    (tmp_path / "model.safetensors").write_bytes(size + header + bytes(12))
    with pytest.raises(WeightsRefused, match=r"model\.safetensors"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_file_with_code_is_refused_without_running_it(tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "executed"
    hostile = {"vision.a": torch.ones(2), "payload": Touch(mark)}
    torch.save(hostile, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsRefused, match="convert it to safetensors with"):
        read_tensors(tmp_path)
    assert not mark.exists()


def test_a_plain_pickle_is_refused_without_running_it(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Touch(mark)}))
    with pytest.raises(WeightsRefused):
        read_tensors(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("wrap", ["state_dict", "model", ""])
def test_checkpoints_of_training_scripts_are_unwrapped(tmp_path: Path, wrap: str) -> None:
    table = OrderedDict((f"module.{key}", value) for key, value in TENSORS.items())
    torch.save({wrap: table, "epoch": 3} if wrap else table, tmp_path / "checkpoint.pth")
    assert read_tensors(tmp_path / "checkpoint.pth").keys() == TENSORS.keys()


def test_what_was_read_does_not_change_when_the_file_does(tmp_path: Path) -> None:
    for name, write in (("model.safetensors", save_file), ("pytorch_model.bin", torch.save)):
        write({"a": torch.ones(10_000)}, tmp_path / name)
        tensor = read_tensors(tmp_path / name)["a"]
        with open(tmp_path / name, "r+b") as file:
            file.write(bytes((tmp_path / name).stat().st_size))
        assert tensor.sum().item() == 10_000


# ---------------------------------------------------------------- into modules


def test_a_strict_load_names_what_is_missing_left_over_and_misshapen() -> None:
    tensors = {"0.weight": torch.ones(5, 4), "0.bias": torch.ones(5), "2.weight": torch.ones(1)}
    with pytest.raises(WeightsRefused) as caught:
        load_strict(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), tensors, source="here")
    text = str(caught.value)
    assert "2 missing: 1.bias, 1.weight" in text
    assert "1 unexpected: 2.weight" in text
    assert "1 of another shape: 0.weight (5, 4) for (5, 3)" in text


def test_a_strict_load_fills_a_module_without_weights() -> None:
    net = without_weights(lambda: nn.Linear(3, 5))
    load_strict(net, {"weight": torch.ones(5, 3), "bias": torch.zeros(5)}, source="here")
    assert net(torch.ones(1, 3)).tolist() == [[3.0] * 5]


# ---------------------------------------------------------------- hashing


def test_the_digest_does_not_depend_on_order_memory_format_or_module() -> None:
    conv = seeded_init(lambda: nn.Conv2d(3, 4, 5), 0)
    digest = weights_digest(conv)
    assert weights_digest(dict(reversed(conv.state_dict().items()))) == digest
    assert weights_digest(conv.to(memory_format=torch.channels_last)) == digest


@pytest.mark.parametrize(
    "change",
    [
        {"a": torch.tensor([1.0, 2.0, 3.0, 4.5])},
        {"b": torch.tensor([1.0, 2.0, 3.0, 4.0])},
        {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]])},
        {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]).view(torch.int32)},
        {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.zeros(())},
    ],
)
def test_the_digest_changes_with_any_value_name_shape_dtype_or_number(change: dict[str, torch.Tensor]) -> None:
    assert weights_digest(change) != weights_digest({"a": torch.tensor([1.0, 2.0, 3.0, 4.0])})


def test_every_dtype_can_be_hashed() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool):
        assert len(weights_digest({"a": torch.ones(3, dtype=dtype), "scalar": torch.ones((), dtype=dtype)})) == 64


# ---------------------------------------------------------------- finding


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path), patterns=("config.json", "*.index.json")) == tmp_path


def test_a_file_that_a_local_folder_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match=r"vae/config\.json"):
        resolve(str(tmp_path), patterns=("vae/config.json",))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "a/b/c", "a/../b", "-", ""])
def test_a_missing_folder_is_not_asked_from_the_hub(name: str, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "snapshot_download", lambda *_args, **_kwargs: pytest.fail("asked the hub"))
    with pytest.raises(WeightsMissing, match="not a folder"):
        resolve(name, patterns=("config.json",))
    assert not hub.exists()


@pytest.mark.usefixtures("hub")
def test_the_error_for_a_hub_model_gives_the_command_that_fetches_it() -> None:
    with pytest.raises(WeightsMissing) as caught:
        resolve("facebook/DiT-XL-2-256", "v1.0", patterns=("a.json",), advise=("transformer/*", "vae/*"))
    command = "hf download facebook/DiT-XL-2-256 --revision v1.0 --include 'transformer/*' --include 'vae/*'"
    assert command in str(caught.value)
    assert "a.json" in str(caught.value)


def test_the_hub_cache_is_used_without_asking_the_network(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cached(hub, "some/model")
    (snapshot / "config.json").write_text("{}")
    real: Any = huggingface_hub.snapshot_download

    def only_offline(*args: object, **kwargs: object) -> object:
        assert kwargs["local_files_only"], "asked the network"
        return real(*args, **kwargs)

    monkeypatch.setattr(weights, "snapshot_download", only_offline)
    assert resolve("some/model", patterns=("config.json",)) == snapshot


def test_a_cached_copy_that_lacks_a_file_is_named_with_the_command(hub: Path) -> None:
    (cached(hub, "some/model") / "config.json").write_text("{}")
    with pytest.raises(WeightsMissing, match=r"hf download some/model --include extra\.json"):
        resolve("some/model", patterns=("extra.json",))


def test_of_a_sharded_hub_model_only_the_shards_with_wanted_tensors_are_asked_for(hub: Path) -> None:
    snapshot = write_shards(cached(hub, "some/model"), "safetensors", "model")
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model-two.safetensors").unlink()
    (snapshot / "model-three.safetensors").unlink()
    with pytest.raises(WeightsMissing) as caught:
        resolve_weights("some/model", prefixes=("vision.",), configs=("config.json",))
    assert "--include model-one.safetensors --include model-two.safetensors" in str(caught.value)
    assert "model-three" not in str(caught.value)


def test_an_unsharded_hub_model_is_found_under_either_name(hub: Path) -> None:
    snapshot = cached(hub, "some/model")
    (snapshot / "unet").mkdir()
    torch.save(TENSORS, snapshot / "unet" / "pytorch_model.bin")
    (snapshot / "config.json").write_text("{}")
    assert resolve_weights("some/model", prefixes=("",), configs=("config.json",), subfolder="unet") == snapshot
    assert resolve_any("some/model", choices=("nothing.bin", "config.json")) == snapshot
    with pytest.raises(WeightsMissing, match=r"nothing\.bin"):
        resolve_any("some/model", choices=("nothing.bin", "neither.bin"))


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match=r"model\.safetensors, .*pytorch_model\.bin"):
        read_tensors(tmp_path)
