"""Loading safetensors: every tensor arrives once, memory stays near the model's, damage is named by file and tensor."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from phase0_prototype.errors import CheckpointError
from phase0_prototype.weights import Destination, load_weights

A, B, C = torch.randn(4, 6), torch.randn(5).bfloat16(), torch.randn(2, 3, 4)
TENSORS = {"layer.a": A, "layer.b": B, "layer.c": C}


def save(directory: Path, layout: str) -> Path:
    """Write TENSORS as one file, as two shards with an index, or as two files without one."""
    if layout == "single":
        save_file(TENSORS, directory / "model.safetensors")
        return directory
    files = {"layer.a": "x-1.safetensors", "layer.b": "x-2.safetensors", "layer.c": "x-1.safetensors"}
    for file in set(files.values()):
        save_file({name: TENSORS[name] for name in TENSORS if files[name] == file}, directory / file)
    if layout == "indexed":
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return directory


class Model:
    """Preallocated float32 tensors and the destinations that fill them."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        wanted = {name: tuple(t.shape) for name, t in TENSORS.items()} | {
            "layer." + name: shape for name, shape in shapes.items()
        }
        self.parameters = {name: torch.full(shape, torch.nan) for name, shape in wanted.items()}
        self.order: list[str] = []
        self.destinations = {name: Destination(t.shape, self._loader(name)) for name, t in self.parameters.items()}

    def _loader(self, name: str) -> Callable[[Tensor], None]:
        def load(tensor: Tensor) -> None:
            self.order.append(name)
            self.parameters[name].copy_(tensor)

        return load


@pytest.mark.parametrize("layout", ["single", "indexed", "unindexed"])
def test_every_tensor_arrives_once_in_every_layout(layout: str, tmp_path: Path) -> None:
    model, heard = Model(), []
    stats = load_weights(save(tmp_path, layout), model.destinations, advance=heard.append)
    assert sorted(model.order) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(model.parameters[name], tensor.float(), rtol=0, atol=0)
    assert stats.tensors == 3
    assert stats.bytes == sum(heard) == A.nbytes + B.nbytes + C.nbytes
    assert stats.seconds > 0


def test_destination_gets_the_dtype_of_the_file(tmp_path: Path) -> None:
    seen: dict[str, torch.dtype] = {}
    destinations = {
        name: Destination(tuple(t.shape), lambda got, name=name: seen.update({name: got.dtype}))
        for name, t in TENSORS.items()
    }
    load_weights(save(tmp_path, "single"), destinations)
    assert seen == {name: tensor.dtype for name, tensor in TENSORS.items()}


def test_parameters_that_require_grad_can_be_filled_in_place(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model.safetensors")
    parameter = torch.nn.Parameter(torch.empty(4, 6))
    load_weights(tmp_path, {"a": Destination((4, 6), parameter.copy_)})
    assert torch.equal(parameter, A)
    assert parameter.grad_fn is None


def test_tensors_are_read_in_file_order_after_the_large_ones(tmp_path: Path) -> None:
    """The file's order is neither alphabetical nor that of the destinations."""
    tensors = {"s.c": torch.zeros(30), "s.a": torch.zeros(20), "s.b": torch.zeros(25), "s.large": torch.zeros(900)}
    header: dict[str, object] = {}
    data = b""
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + tensor.nbytes],
        }
        data += tensor.numpy().tobytes()
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    order: list[str] = []
    destinations = {
        name: Destination(tuple(tensors[name].shape), lambda got, name=name: order.append(name))
        for name in sorted(tensors)
    }
    load_weights(tmp_path, destinations)
    assert order == ["s.large", "s.c", "s.a", "s.b"]


def test_ignored_tensors_are_left_unread(tmp_path: Path) -> None:
    model = Model()
    del model.destinations["layer.b"]
    load_weights(save(tmp_path, "single"), model.destinations, ignore=lambda name: name.endswith(".b"))
    assert sorted(model.order) == ["layer.a", "layer.c"]


def test_optional_tensors_are_loaded_where_they_are_stored(tmp_path: Path) -> None:
    save_file({"a": A, "there": torch.tensor(0.25)}, tmp_path / "model.safetensors")
    parameter, there, absent = torch.zeros(4, 6), torch.ones(1), torch.ones(1)
    destinations = {
        "a": Destination((4, 6), parameter.copy_),
        "there": Destination((1,), there.copy_, optional=True),  # stored without a dimension
        "absent": Destination((1,), absent.copy_, optional=True),
    }
    assert load_weights(tmp_path, destinations).tensors == 2
    assert (there.item(), absent.item()) == (0.25, 1.0) and torch.equal(parameter, A)
    wrong = {**destinations, "there": Destination((2,), there.copy_, optional=True)}
    with pytest.raises(CheckpointError, match=r"there has shape \[\], config.json asks for \[2\]"):
        load_weights(tmp_path, wrong)


# Damage


def truncate(directory: Path) -> None:
    file = directory / "x-1.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def break_header(directory: Path) -> None:
    file = directory / "x-2.safetensors"
    file.write_bytes(file.read_bytes()[:8] + b"!" + file.read_bytes()[9:])


def break_length(directory: Path) -> None:
    file = directory / "x-2.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def break_offsets(directory: Path) -> None:
    file = directory / "x-2.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[5]', b'"shape":[7]'))


def point_index_at_the_wrong_shard(directory: Path) -> None:
    change_index(directory, "layer.b", "x-1.safetensors")


def point_index_outside(directory: Path) -> None:
    change_index(directory, "layer.b", "../x-1.safetensors")


def change_index(directory: Path, name: str, file: str) -> None:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][name] = file
    index.write_text(json.dumps(content))


def duplicate_a_tensor(directory: Path) -> None:
    save_file({"layer.a": A, "layer.b": B}, directory / "x-2.safetensors")


def add_a_tensor(directory: Path) -> None:
    save_file({"layer.b": B, "layer.surplus": A}, directory / "x-2.safetensors")


def store_integers(directory: Path) -> None:
    save_file({"layer.b": torch.zeros(5, dtype=torch.int32)}, directory / "x-2.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, ["x-1.safetensors", "layer.", "cut short"]),
        (break_header, ["x-2.safetensors", "header"]),
        (break_length, ["x-2.safetensors", "header"]),
        (lambda directory: (directory / "x-2.safetensors").write_bytes(b""), ["x-2.safetensors", "0 in the file"]),
        (break_offsets, ["x-2.safetensors", "layer.b", "header"]),
        (lambda directory: (directory / "x-2.safetensors").unlink(), ["x-2.safetensors", "layer.b", "missing"]),
        (point_index_at_the_wrong_shard, ["x-1.safetensors", "layer.b", "index"]),
        (point_index_outside, ["layer.b", "../x-1.safetensors"]),
        (lambda directory: (directory / "model.safetensors.index.json").write_text("{"), ["index.json", "weight_map"]),
        (duplicate_a_tensor, ["x-2.safetensors", "layer.a", "x-1.safetensors"]),
        (add_a_tensor, ["x-2.safetensors", "layer.surplus", "not in this model"]),
        (store_integers, ["x-2.safetensors", "layer.b", "I32", "BF16"]),
    ],
)
def test_damage_is_one_line_naming_file_and_tensor_before_anything_is_loaded(
    damage: Callable[[Path], object], words: list[str], tmp_path: Path
) -> None:
    model = Model()
    damage(save(tmp_path, "indexed"))
    with pytest.raises(CheckpointError) as caught:
        load_weights(tmp_path, model.destinations)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert model.order == []


def test_missing_tensors_are_counted_and_the_first_few_listed(tmp_path: Path) -> None:
    model = Model(d1=(1,), d2=(1,), d3=(1,), d4=(1,))
    with pytest.raises(CheckpointError, match=r"4 tensors .* layer\.d1, layer\.d2, layer\.d3 and 1 more"):
        load_weights(save(tmp_path, "single"), model.destinations)


def test_wrong_shape_says_which_was_found_and_which_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor layer\.a has shape \[4, 6\].*\[6, 4\]"):
        load_weights(save(tmp_path, "single"), Model(a=(6, 4)).destinations)


@pytest.mark.parametrize(("file", "word"), [("pytorch_model.bin", "convert"), ("readme.txt", "no .*safetensors")])
def test_directory_without_safetensors_says_what_to_do(file: str, word: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=word):
        load_weights(tmp_path, Model().destinations)


# Memory

MEASURE = """
    import json, sys
    from pathlib import Path
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file
    from phase0_prototype.weights import Destination, load_weights

    def peak():
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    def fill(how):
        # peak growth in multiples of the weights
        parameters = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        how(parameters)
        assert all(bool((p.view(-1)[:: 4096] == 1).all()) for p in parameters.values())
        return (peak() - before) / sum(p.nbytes for p in parameters.values())

    def ours(parameters):
        load_weights(directory, {n: Destination(shapes[n], p.copy_) for n, p in parameters.items()})

    def the_library(parameters):
        for file in sorted(directory.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                parameters[name].copy_(tensor)

    directory, shapes = Path(sys.argv[1]), {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    before = peak()
    print(json.dumps([fill(ours), fill(the_library)]))  # in this order: a peak never falls
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_peak_memory_is_at_most_1_15_times_the_weights(tmp_path: Path) -> None:
    """300 MB, of which the embedding is 30 % and lies last, where a copy from a mapped file costs most."""
    blocks = {f"layers.{i}": torch.ones(10_500_000, dtype=torch.bfloat16) for i in range(10)}
    save_file(blocks, tmp_path / "model-1.safetensors")
    save_file({"z.embedding": torch.ones(45_000_000, dtype=torch.bfloat16)}, tmp_path / "model-2.safetensors")
    del blocks
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path)]
    ours, the_library = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert ours <= 1.15
    assert the_library > 1.2  # or the measurement would see nothing
