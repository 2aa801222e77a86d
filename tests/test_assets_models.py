"""Loading models by name, and the conversion of the default one."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pruner_lib.assets import DEFAULT_MODEL, AssetError, DownloadError, UnknownAssetError, load_model, models


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama with a word tokenizer, as save_pretrained writes it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    place = tmp_path / "tiny"
    LlamaForCausalLM(config).save_pretrained(place)
    words = {f"w{i}": i for i in range(15)} | {"[UNK]": 15}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]"))).save_pretrained(
        place
    )
    return place


def test_folder_loads_in_evaluation_mode_with_the_customary_dtype(folder):
    model, tokenizer = load_model(folder)
    expected = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    assert not model.training and model.dtype == expected
    assert tokenizer.vocab_size == 16


def test_device_and_dtype_are_taken_as_given(folder):
    model, _ = load_model(str(folder), device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    model, _ = load_model(folder, device=torch.device("cpu"), dtype=torch.float64)
    assert model.dtype == torch.float64


def test_loading_leaves_the_random_state_and_the_bars_alone(folder):
    from transformers.utils import logging

    before, shown = torch.random.get_rng_state(), logging.is_progress_bar_enabled()
    load_model(folder, device="cpu")
    assert torch.equal(before, torch.random.get_rng_state())
    assert logging.is_progress_bar_enabled() == shown


@pytest.mark.parametrize("name", ["SmolLM", "./nowhere", "/nowhere/at/all", "a/b/c", "owner/", ""])
def test_unknown_name_says_what_exists_and_how_to_use_the_hub_or_a_folder(name):
    with pytest.raises(UnknownAssetError) as caught:
        load_model(name or "./")
    message = str(caught.value)
    assert "folder" in message
    if name:
        assert repr(name) in message and repr(DEFAULT_MODEL) in message and "hub id" in message


def test_misspelt_default_is_recognised():
    with pytest.raises(UnknownAssetError, match=f"Did you mean '{DEFAULT_MODEL}'"):
        load_model("smollm2-135m-instruct")


def test_unreachable_hub_id_says_what_a_hub_id_needs():
    with pytest.raises(AssetError, match="needs the network"):
        load_model("no-such-owner/no-such-model")


def test_folder_without_weights_is_an_asset_error(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(AssetError, match="safetensors weights"):
        load_model(folder)


def test_a_checkpoint_that_lacks_a_weight_is_an_asset_error(folder):
    """transformers would fill it with random numbers."""
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssetError, match=rf"lacks 1 weights of a LlamaForCausalLM, .*{name}"):
        load_model(folder)


def test_pickled_weights_are_not_read(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(AssetError, match="safetensors"):
        load_model(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "unknown to torch"),
        ({"device": "mps"}, "'mps' was asked for.*float64, which MPS lacks; give 'cpu'"),
        ({"device": torch.device("mps", 0)}, "'mps:0' was asked for"),
        ({"dtype": "int8"}, "not a floating"),
        ({"dtype": "float7"}, "float32"),
    ],
)
def test_bad_device_or_dtype_is_refused_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        load_model("owner/never-asked-for", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_refused():
    with pytest.raises(ValueError, match="no CUDA device"):
        load_model("owner/never-asked-for", device="cuda")


def test_no_network_and_empty_cache_is_a_download_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNER_LIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(DownloadError, match="Connect to the network"):
        load_model()


@pytest.fixture
def conversion(tmp_path, folder, monkeypatch):
    """The conversion with its slow part replaced by copying the tiny model."""
    monkeypatch.setenv("PRUNER_LIB_CACHE", str(tmp_path / "cache"))
    calls = []

    def write(gguf, part, name):
        calls.append(part)
        LlamaForCausalLM.from_pretrained(folder).save_pretrained(part)
        AutoTokenizer.from_pretrained(folder).save_pretrained(part)

    monkeypatch.setattr(models, "fetch", lambda name: tmp_path / "model.gguf")
    monkeypatch.setattr(models, "_write_conversion", write)
    return calls


def test_conversion_happens_once(conversion):
    first = models.default_model_folder()
    assert models.default_model_folder() == first
    assert len(conversion) == 1
    assert load_model(DEFAULT_MODEL, device="cpu")[0].config.hidden_size == 8


def test_incomplete_conversion_is_never_picked_up(conversion):
    place = models.default_model_folder()
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    models.default_model_folder()
    assert len(conversion) == 2
    (place / "conversion.json").unlink()
    models.default_model_folder()
    assert len(conversion) == 3


def test_full_disk_while_converting_leaves_nothing_half_written(conversion, monkeypatch, tmp_path):
    def fill(gguf, part, name):
        part.mkdir()
        (part / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(models, "_write_conversion", fill)
        with pytest.raises(AssetError, match="No space left on device"):
            models.default_model_folder()
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    assert (models.default_model_folder() / "model.safetensors").is_file()


@pytest.mark.real_model
def test_default_model_is_the_published_one(default_model):
    model, tokenizer = default_model
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (9, 3)
    assert not hasattr(model.config, "quantization_config")
    text = "The quick  brown\n\nfox 1234"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.real_model
def test_default_model_answers_and_can_be_saved(default_model, tmp_path):
    model, tokenizer = default_model
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 500e6
