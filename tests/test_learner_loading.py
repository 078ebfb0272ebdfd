"""A model that cannot be had is explained in one sentence, whatever the reason."""

from __future__ import annotations

import json

import pytest
import torch
from learner_kit import tiny_folder

from espl_envs.core.errors import EsplError
from espl_train.config import LearnerConfig, ModelConfig
from espl_train.learner import loading
from espl_train.learner.loading import load_model, load_tokenizer, locate, pick_device
from espl_train.learner.policy import Policy


def load(path, **changes) -> Policy:
    return Policy.load(ModelConfig(path=str(path), **changes), LearnerConfig(rank=2))


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/folder", "~/no/such/folder", "models/a/b"])
def test_a_folder_that_is_not_there(path):
    with pytest.raises(EsplError, match="there is no such folder"):
        load(path)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(EsplError, match=r"has no config\.json"):
        load(tmp_path)


def test_a_hub_id_while_the_hub_is_switched_off(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EsplError, match=r"'nobody/no-such-model' at revision 'v2' .*HF_HUB_OFFLINE"):
        load("nobody/no-such-model", revision="v2")


def test_a_tokenizer_without_chat_template(tmp_path):
    folder = tiny_folder(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(EsplError, match="has no chat template"):
        load(folder)


def test_a_broken_folder_names_the_folder(tmp_path):
    folder = tiny_folder(tmp_path)
    (folder / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(EsplError, match=f"the model in '{folder}' cannot be read"):
        load_model(ModelConfig(path=str(folder)))
    (folder / "model.safetensors").unlink()
    with pytest.raises(EsplError, match="cannot be read"):
        load_model(ModelConfig(path=str(folder)))


def test_a_device_that_is_not_there():
    with pytest.raises(EsplError, match=r"model.device is 'cuda:99'"):
        pick_device("cuda:99")
    with pytest.raises(EsplError, match=r"model.device is 'gpu'"):
        pick_device("gpu")


def test_dtype_and_template_survive(tmp_path):
    config = ModelConfig(path=str(tiny_folder(tmp_path)), dtype="bfloat16", device="cpu")
    assert next(load_model(config).parameters()).dtype == torch.bfloat16
    assert load_tokenizer(config).apply_chat_template([{"role": "user", "content": "w3"}], tokenize=False) == "w3"


@pytest.mark.parametrize(
    ("stored", "device", "computes", "expected"),
    [
        ("bfloat16", "cuda", True, "bfloat16"),
        ("float16", "cuda", True, "bfloat16"),
        ("float32", "cuda", True, "float32"),           # nothing is rounded that was stored exactly
        ("bfloat16", "cuda", False, "float32"),
        ("bfloat16", "cpu", True, "float32"),
    ],
)
def test_what_is_stored_in_half_precision_is_computed_so_where_that_is_fast(
    tmp_path, monkeypatch, stored, device, computes, expected
):
    folder = tiny_folder(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "dtype": stored}))
    monkeypatch.setattr(loading, "pick_device", lambda _: torch.device(device))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: computes)
    config = ModelConfig(path=str(folder))
    assert loading.precision(config) == expected == loading.identity(config)["dtype"]
    assert {p.dtype for p in loading.blank_model(config).parameters()} == {getattr(torch, expected)}
    assert loading.precision(ModelConfig(path=str(folder), dtype="float32")) == "float32"
    assert loading.precision(ModelConfig()) == "float32", "the bundled model, which comes in bfloat16"


def test_the_model_names_its_template_set_in_config_or_card_and_exports_keep_it(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    assert load(folder).templates == "english"
    (folder / "README.md").write_text("---\nlicense: mit\nespl_templates: micro\n---\n# Card\n")
    assert load(folder).templates == "micro"
    load(folder).save_merged(tmp_path / "merged")
    assert load(tmp_path / "merged").templates == "micro"


def test_a_plain_name_may_be_a_hub_id():
    assert locate("gpt2") == "gpt2"
    assert locate("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
