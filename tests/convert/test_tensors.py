import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtune.convert.folders import new_folder
from jaxtune.convert.tensors import Plan, Safetensors, parse_size, write_tensors
from jaxtune.errors import ModelError

RNG = np.random.default_rng(0)
TENSORS = {
    "a.10.w": RNG.standard_normal((3, 5)).astype(np.float32),
    "a.9.w": RNG.standard_normal((4, 2)).astype(ml_dtypes.bfloat16),
    "scalar": np.array(1.5, np.float16),
    "empty": np.zeros((0, 4), np.float32),
    "ids": np.arange(7, dtype=np.int64),
    "mask": np.array([True, False, True]),
    "bytes": RNG.integers(0, 256, (5, 1), dtype=np.uint8),
}


def write(folder, tensors=TENSORS, **kwargs):
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, [Plan(name, array.dtype, array.shape) for name, array in tensors.items()], tensors.__getitem__, **kwargs)
    return folder


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_the_safetensors_package_reads_what_we_write(tmp_path):
    assert_same(load_file(write(tmp_path) / "model.safetensors"), TENSORS)


def test_we_read_what_the_safetensors_package_writes(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    files = Safetensors(tmp_path)
    assert_same({name: files.read(name) for name in files.entries}, TENSORS)


def test_shards_hold_at_most_the_asked_size_and_the_index_names_them(tmp_path):
    write(tmp_path, max_shard_size=70)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1 and not (tmp_path / "model.safetensors").exists()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in TENSORS.values())
    for shard in shards:
        held = load_file(shard)
        assert sum(array.nbytes for array in held.values()) <= 70
        assert all(index["weight_map"][name] == shard.name for name in held)
    files = Safetensors(tmp_path)
    assert_same({name: files.read(name) for name in files.entries}, TENSORS)


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "2GiB", "7kb", "12", 12)] == [5 * 10**9, 2 * 2**30, 7000, 12, 12]
    for text in ("5 apples", "", "-1GB", "0"):
        with pytest.raises(ModelError, match="is not a size"):
            parse_size(text)


def damage(file, edit):
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    edit(header, rest)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda header, rest: header["a.10.w"].update(shape=[3, 6]), r"tensor a.10.w says F32 \[3, 6\] but takes 60 bytes"),
        (lambda header, rest: header["a.10.w"].update(dtype="Q4"), "tensor a.10.w has dtype Q4, which is not supported"),
        (lambda header, rest: header["a.10.w"].pop("dtype"), "corrupt header"),
        (lambda header, rest: rest.extend(b"more"), "bytes long, but its header describes"),
        (lambda header, rest: rest.clear(), "tensor .* ends at byte .* it was cut"),
    ],
)
def test_damaged_headers(tmp_path, edit, message):
    damage(write(tmp_path) / "model.safetensors", edit)
    with pytest.raises(ModelError, match=message) as caught:
        Safetensors(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize("size", [0, 4, 8, 60])
def test_a_file_cut_inside_its_header(tmp_path, size):
    file = write(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"model.safetensors is not a safetensors file, or is cut"):
        Safetensors(tmp_path)


def test_any_cut_of_the_data_is_noticed(tmp_path):
    file = write(tmp_path) / "model.safetensors"
    data = file.read_bytes()
    for cut in (1, 20, 100):
        file.write_bytes(data[:-cut])
        with pytest.raises(ModelError, match="it was cut"):
            Safetensors(tmp_path)


def test_a_missing_shard_a_misplaced_tensor_and_a_bad_index(tmp_path):
    folder = write(tmp_path / "m", max_shard_size=70)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name, file = next(iter(content["weight_map"].items()))
    other = next(f for f in content["weight_map"].values() if f != file)
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {name: other}}))
    with pytest.raises(ModelError, match=f"{other} does not hold {name}"):
        Safetensors(folder)
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {name: "../elsewhere.safetensors"}}))
    with pytest.raises(ModelError, match="weight_map is not a map"):
        Safetensors(folder)
    index.write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        Safetensors(folder)
    index.write_text(json.dumps(content))
    (folder / file).unlink()
    with pytest.raises(ModelError, match=f"{file} is missing"):
        Safetensors(folder)


def test_a_folder_of_pickles_is_refused(tmp_path):
    with pytest.raises(ModelError, match="holds no model.safetensors.*; fetch the folder again"):
        Safetensors(tmp_path)
    (tmp_path / "training_args.bin").touch()  # transformers leaves one beside every trained model
    with pytest.raises(ModelError, match="holds no model.safetensors"):
        Safetensors(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="pytorch_model.bin is a pickle"):
        Safetensors(tmp_path)


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()  # an empty folder may be used
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]
    with pytest.raises(ModelError, match="not empty"), new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "whole").exists()
