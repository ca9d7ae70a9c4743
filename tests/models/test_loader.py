"""Loading: what arrives, how much memory it takes, and what is said when it cannot work."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.errors import CheckpointError, ModelError, UnsupportedModelError
from models.loader import load, resolve_dtype

LLAMA = "LlamaForCausalLM"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    tiny_checkpoint(LLAMA, tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tiny_checkpoint, tmp_path):
    tiny_checkpoint(LLAMA, tmp_path, shard_size="100KB")
    return tmp_path


def assert_refused(folder, *words, error=CheckpointError):
    """Loading the folder ends in one sentence with all of the words."""
    with pytest.raises(error) as caught:
        load(folder)
    sentence = str(caught.value)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")


def test_every_tensor_arrives_unchanged(folder):
    decoder, _ = load(folder, dtype="float32")
    stored = load_file(folder / "model.safetensors")
    parameters = dict(decoder.named_parameters())
    assert parameters.keys() == stored.keys()
    assert all(torch.equal(parameters[name], stored[name]) for name in stored)


def test_shards_load_like_a_single_file(tiny_checkpoint, tmp_path):
    tiny_checkpoint(LLAMA, tmp_path / "one")
    tiny_checkpoint(LLAMA, tmp_path / "many", shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = (load(tmp_path / name, dtype="float32")[0] for name in ("one", "many"))
    weights = many.state_dict()
    assert one.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in one.state_dict().items())


def test_weights_are_converted_on_the_way(folder):
    decoder, _ = load(folder, dtype="bfloat16")
    stored = load_file(folder / "model.safetensors")
    for name, parameter in decoder.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, stored[name].bfloat16())


def test_a_progress_bar_counts_the_bytes(folder, capsys):
    load(folder)
    assert "Loading weights: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "checkpoint", "device", "bf16_cpu", "expected"),
    [
        ("auto", "bfloat16", CPU, True, torch.bfloat16),
        ("auto", "float16", CPU, True, torch.bfloat16),
        ("auto", "bfloat16", CPU, False, torch.float32),
        ("auto", "float32", CPU, True, torch.float32),
        ("auto", None, CPU, True, torch.float32),
        ("auto", "float16", CUDA, False, torch.float16),
        ("auto", "bfloat16", CUDA, False, torch.bfloat16),
        ("float64", "bfloat16", CPU, True, torch.float64),
    ],
)
def test_the_dtype_fits_checkpoint_and_device(
    dtype, checkpoint, device, bf16_cpu, expected, monkeypatch
):
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: bf16_cpu, raising=False)
    assert resolve_dtype(dtype, checkpoint, device) is expected


def test_a_torch_without_the_cpu_probes_means_float32(monkeypatch):
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, probe, raising=False)
    assert resolve_dtype("auto", "bfloat16", CPU) is torch.float32


def test_a_checkpoint_that_states_no_dtype_is_asked_for_it(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    tiny_checkpoint(LLAMA, tmp_path, dtype=torch.bfloat16)
    edit_config(tmp_path, dtype=None, torch_dtype=None)
    decoder, _ = load(tmp_path)
    assert decoder.model.norm.weight.dtype == torch.bfloat16


def test_unknown_dtypes_and_devices_are_refused(folder):
    with pytest.raises(ModelError, match="'int8' is not supported; use float64"):
        load(folder, dtype="int8")
    with pytest.raises(ModelError, match="device 'nonsense' cannot be used"):
        load(folder, device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="device 'cuda' cannot be used"):
            load(folder, device="cuda")


def test_dummy_weights_need_the_config_alone_and_repeat(folder):
    (folder / "model.safetensors").unlink()
    first, _ = load(folder, dtype="float32", load_format="dummy")
    second, _ = load(folder, dtype="float32", load_format="dummy")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()
    assert first.model.norm.weight.eq(1).all()
    assert first.lm_head.weight.std() > 0


def test_a_missing_tensor_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert_refused(folder, "lacks the tensor 'model.layers.1.mlp.up_proj.weight'", "fetch")


def test_a_missing_output_layer_hints_at_the_tie(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert_refused(folder, "'lm_head.weight'", "tie_word_embeddings")


def test_a_wrong_shape_is_named(folder):
    edit_config(folder, intermediate_size=112)
    assert_refused(folder, "mlp", "[96, 64]", "[112, 64]", "model.safetensors")


def test_a_tensor_without_a_use_is_refused(folder):
    edit_tensors(
        folder,
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
    )
    assert_refused(folder, "q_proj.bias", "no use")


def test_tensors_that_follow_from_the_rest_are_ignored(folder):
    edit_config(folder, tie_word_embeddings=True)

    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit_tensors(folder, tie)
    decoder, _ = load(folder)
    assert decoder.lm_head is None


def test_a_tie_that_the_weights_contradict_is_refused(folder):
    edit_config(folder, tie_word_embeddings=True)
    assert_refused(folder, "lm_head.weight differs", "tie_word_embeddings to false")


@pytest.mark.parametrize("size", [0, 5, 100, -1, -4096])
def test_a_truncated_file_is_named(folder, size):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:size])
    assert_refused(folder, "model.safetensors is truncated or damaged", "fetch the file again")


def test_a_pointer_in_place_of_a_file_is_damage(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert_refused(folder, "model.safetensors is truncated or damaged")


def test_a_truncated_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    assert_refused(sharded, shard.name, "truncated or damaged")


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert_refused(sharded, shard.name, "is missing")


def test_an_index_that_disagrees_with_its_shards_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shards = sorted(set(content["weight_map"].values()))
    content["weight_map"]["model.norm.weight"] = shards[0]
    content["weight_map"]["lm_head.weight"] = shards[-1]
    index.write_text(json.dumps(content))
    assert_refused(sharded, "lacks the tensor", "index.json says")
    index.write_text("{}")
    assert_refused(sharded, "lacks 'weight_map'")


@pytest.mark.parametrize("where", ["../other/x.safetensors", "/etc/x.safetensors", "a/b", ""])
def test_an_index_names_no_file_outside_its_folder(sharded, where):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = where
    index.write_text(json.dumps(content))
    assert_refused(sharded, "not in its folder")


def test_a_configuration_that_nests_without_end_is_refused(folder):
    (folder / "config.json").write_text('{"a":' * 100_000)
    assert_refused(folder, "not valid JSON")


def test_quantised_tensors_are_refused(folder):
    edit_tensors(
        folder,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["lm_head.weight"].to(torch.int8)}
        ),
    )
    assert_refused(folder, "'lm_head.weight' is stored as I8", "not quantised")


def test_pickled_weights_are_never_loaded(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert_refused(folder, "pytorch_model.bin", "only safetensors")


def test_a_folder_without_weights_or_config_says_so(folder):
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "neither model.safetensors nor model.safetensors.index.json")
    (folder / "config.json").unlink()
    assert_refused(folder, "config.json cannot be read")


def test_an_unsupported_architecture_is_refused(folder):
    edit_config(folder, architectures=["FalconForCausalLM"])
    assert_refused(folder, "FalconForCausalLM is not supported", error=UnsupportedModelError)


PEAK = """
import sys
from models.loader import load

def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

before = memory("VmRSS")
decoder, _ = load(sys.argv[1], dtype=sys.argv[2])
print(memory("VmHWM") - before, sum(p.nbytes for p in decoder.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_is_the_weights_and_one_tensor(folder, dtype):
    edit_config(folder, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, head_dim=128)
    stored = load(folder, load_format="dummy", dtype="bfloat16")[0].state_dict()
    save_file(stored, folder / "model.safetensors")
    largest = max(tensor.nbytes for tensor in stored.values())
    result = subprocess.run(
        [sys.executable, "-c", PEAK, folder, dtype],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    peak, weights = map(int, result.stdout.split())
    assert weights > 30e6
    # A copy of the weights, whole or as mapped pages of their file, would be 32 MB more.
    assert peak < weights + 2 * largest + 12e6


def test_the_config_comes_with_the_decoder(folder):
    decoder, config = load(folder)
    assert decoder.config is config
    assert dataclasses.is_dataclass(config)
