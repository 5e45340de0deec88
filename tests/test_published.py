"""The paper's models by name: their shapes are the published ones, and a run on them can be planned without their files."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from isara_jax import config as config_lib
from isara_jax import lm
from isara_jax.common import UserError
from isara_jax.models import assets, decoder, hf, published, resolve
from isara_jax.models.config import LayerKind

ROOT = Path(__file__).parent.parent
PARAMETERS = {"llama-7b": 6_738_415_616, "opt-6.7b": 6_658_473_984, "opt-350m": 331_196_416}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache that is empty until `fill` is called, and a hub that hands out nothing: `asked` are the downloads tried."""
    class Hub:
        folder, asked = None, []

        @classmethod
        def fill(cls):
            cls.folder = tmp_path / "snapshot"
            cls.folder.mkdir()
            (cls.folder / "config.json").write_text(json.dumps(published.find("llama-7b").config))
            (cls.folder / "model.safetensors").write_bytes(b"weights")

    def download(name, *, local_files_only=False, **kwargs):
        if local_files_only and Hub.folder:
            return str(Hub.folder)
        Hub.asked += [] if local_files_only else [name]
        raise errors.LocalEntryNotFoundError("not there")

    Hub.asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(resolve.common, "reachable", lambda endpoint: True)
    monkeypatch.chdir(tmp_path)
    return Hub


# -------------------------------------------------------------------------------------------------------------------- shapes
def test_there_are_the_models_of_the_paper():
    assert set(published.names()) == set(PARAMETERS)
    assert {n: published.find(n).parameters for n in PARAMETERS} == PARAMETERS
    assert published.find("facebook/opt-350m") is published.find("opt-350m") and published.find("opt-1.3b") is None


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_fields_make_a_model_of_the_published_size(name):
    """As transformers builds it from the fields, without memory for its weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = published.find(name)
    config = transformers.AutoConfig.for_model(**model.config)
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(config)
    reference.tie_weights()
    assert sum(p.numel() for p in reference.parameters()) == PARAMETERS[name]
    assert config.max_position_embeddings == model.context


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_is_what_the_hub_folder_would_say(tmp_path, name):
    model = published.find(name)
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    assert model.model_config() == hf.model_config(tmp_path) and model.context == hf.context_length(tmp_path)
    assert decoder.n_params(model.model_config()) == PARAMETERS[name]


def test_what_sets_the_models_apart():
    llama, large, small = (published.find(name).model_config() for name in ("llama-7b", "opt-6.7b", "opt-350m"))
    assert llama.norm_eps == 1e-6, "huggyllama's; the schema's own default is 1e-5"
    assert (large.norm_at, large.final_norm, large.embed_dim, large.positions) == ("pre", True, 4096, 2050)
    assert (small.norm_at, small.final_norm, small.embed_dim, small.positions) == ("post", False, 512, 2050)
    assert large.activation == small.activation == "relu" and small.pattern == (LayerKind(None),)


# --------------------------------------------------------------------------------------------------------------------- names
def test_a_published_name_stands_for_its_hub_id(hub):
    hub.fill()
    assert resolve.resolve("llama-7b") == resolve.Source("hf", hub.folder, "llama-7b")
    assert resolve.resolve("llama-7b", shape_only=True).kind == "hf", "what is in the cache is used, shape or not"
    assert hub.asked == []


def test_without_its_files_only_the_shape_is_there_and_the_hub_is_asked_for_the_rest(hub):
    source = resolve.resolve("llama-7b", shape_only=True)
    assert (source.kind, source.path.name, hub.asked) == ("shape", "llama-7b.json", [])
    assert len(source.content_hash()) == 16
    with pytest.raises(UserError, match="'huggyllama/llama-7b' cannot be found.*(?s:.)*Its shape is known as 'llama-7b': .*--dry_run"):
        resolve.resolve("llama-7b", say=lambda text: None)
    assert hub.asked == ["huggyllama/llama-7b"]


def test_a_folder_of_that_name_comes_first(hub, tmp_path):
    hub.fill()
    hub.folder.rename(tmp_path / "llama-7b")
    assert resolve.resolve("llama-7b", shape_only=True).path == Path("llama-7b")


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_model_of_the_paper_is_planned_without_its_files(hub, name):
    for asked in (name, published.find(name).hub):
        made = lm.describe(asked, shape_only=True)
        assert (made.cfg, made.context) == (published.find(name).model_config(), 2048) and hub.asked == []


@pytest.mark.parametrize("name, meant", [("lama-7b", "llama-7b"), ("llama7b", "llama-7b"), ("opt6.7b", "opt-6.7b")])
def test_misspelt_names_are_told_what_is_near(hub, name, meant):
    with pytest.raises(UserError, match=f"Did you mean '{meant}'"):
        resolve.resolve(name, say=lambda text: None)
    with pytest.raises(UserError, match=f"no variant of this config; its variants are ood, llama-7b, .*Did you mean '{meant}'"):
        published.use(config_lib.defaults(), name, also=("ood",))


# ------------------------------------------------------------------------------------------------------------------ variants
def test_a_variant_sets_the_model_and_a_large_models_learning_rate():
    config = config_lib.defaults()
    config.sft.lr = 1e-4
    published.use(config, "llama-7b")
    assert (config.model.name, config.sft.lr) == ("llama-7b", 2e-5)


def test_a_small_model_keeps_the_learning_rate_of_the_config():
    config = config_lib.defaults()
    config.sft.lr = 1e-4
    published.use(config, "opt-350m")
    assert (config.model.name, config.sft.lr) == ("opt-350m", 1e-4)


def test_an_unknown_variant_leaves_the_config_alone():
    config = config_lib.defaults()
    with pytest.raises(UserError, match="no variant of this config"):
        published.use(config, "opt-13b")
    assert config_lib.from_dict(config) == config_lib.Config()


# ------------------------------------------------------------------------------------------------------------------- dry run
def test_a_shape_is_described_with_a_stand_in_tokenizer(hub, smollm2_gguf):
    made = lm.describe("llama-7b", shape_only=True)
    assert (made.context, made.cfg) == (2048, published.find("llama-7b").model_config())
    assert made.tokenizer.encode("a b") == lm.describe("smollm2-135m-instruct").tokenizer.encode("a b")
    assert made.tokenizer.chat_template is None, "LLaMA has none, so the chat form is refused as it would be with its own tokenizer"
    assert "estimates made with the tokenizer of smollm2-135m-instruct" in made.note and "huggyllama/llama-7b" in made.note
    assert lm.describe("tiny-random", shape_only=True).note == ""


def test_without_any_tokenizer_bytes_are_counted(hub, monkeypatch):
    monkeypatch.setattr(assets, "find", lambda name: None)
    made = lm.describe("llama-7b", shape_only=True)
    assert made.tokenizer.encode("a b") == [97, 32, 98] and "bytes for tokens" in made.note


def test_a_shape_has_a_longest_context(hub):
    assert lm.describe("llama-7b", shape_only=True, context=1024).context == 1024
    with pytest.raises(UserError, match="context=4096 is longer than the 2048 tokens of llama-7b"):
        lm.describe("llama-7b", shape_only=True, context=4096)


def test_a_dry_run_of_7b_works_offline_and_ends_with_the_memory(tmp_path, smollm2_gguf, minilm_folder):
    """The batch makes sure that no machine has the memory: what is wrong is said last, after the whole plan."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-m", "isara_jax.train", "--config=configs/quickstart.py", "--config.model.name=llama-7b",
                           "--config.sft.batch=65536", f"--workdir={tmp_path / 'run'}", "--dry_run"],
                          cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    shown = done.stdout.split("--- plan\n")
    assert "warning: llama-7b (hub id huggyllama/llama-7b) is not on this machine" in shown[0] and "--- prompt 3 of" in shown[0]
    assert "question requests" in shown[1] and "min for the run at" in shown[1]
    assert done.stderr.splitlines()[-1].startswith("error: memory: about") and "cannot suffice" in done.stderr
    assert not (tmp_path / "run").exists()


def test_published_shapes_import_no_jax():
    code = "import sys, isara_jax.models.published as p; p.find('llama-7b').model_config(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
