"""Adapters and PEFT: every family's adapters go there and back, and train alike; the files and what is wrong with them."""
import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from isara_jax.common import UserError
from isara_jax.config import Lora, Sft
from isara_jax.data.batching import collate
from isara_jax.models import adapter as adapter_lib
from isara_jax.models import decoder, families, hf, lora, tensors
from isara_jax.models.adapter import chain
from isara_jax.models.config import LayerKind
from isara_jax.models.place import placer
from isara_jax.sft.step import eval_step
from isara_jax.sharding import param_shardings
from tests import hf_models
from tests.adapters import CFG, LLAMA, MESH, assert_close, examples, fit, in_training, logits

TOKENS = np.random.default_rng(1).integers(3, hf_models.VOCABULARY, (2, 17))


# ------------------------------------------------------------------------------------------------------------------- families
@pytest.fixture(scope="module")
def model(request, tmp_path_factory):
    """(family, folder of a tiny model of transformers, our config, our parameters, that folder's model)."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp(request.param)
    theirs = hf_models.make(request.param, folder)
    cfg = hf.model_config(folder)
    params = hf.load_params(folder, cfg, placer(param_shardings(decoder.abstract_params(cfg), MESH)))
    raw = json.loads((folder / "config.json").read_text())
    return families.find(raw, folder / "config.json"), folder, cfg, params, theirs


every_family = pytest.mark.parametrize("model", list(hf_models.MODELS), indirect=True, scope="module")


@every_family
def test_adapters_of_each_family_are_what_they_merge_to_and_what_peft_reads(model, tmp_path):
    """Beside frozen weights, merged by us, read by PEFT, merged by PEFT, and read back by us."""
    import torch
    from peft import PeftModel

    family, folder, cfg, params, theirs = model
    spec = Lora(rank=2, alpha=8.0, targets="q|v|o|up|down")  # where weights are fused, k and gate have none
    adapters = in_training(cfg, spec)
    ours = lora.finished(adapters, cfg, spec)
    want = logits(lora.merge(params, ours), cfg, TOKENS)
    assert_close(logits(lora.beside(lora.frozen(params, cfg, MESH, "float32"), adapters, spec), cfg, TOKENS), want)
    assert np.abs(want - logits(params, cfg, TOKENS)).max() > 0.1

    adapter_lib.save(tmp_path / "adapter", ours, cfg, family, base="someone/model", dropout=0.25)
    wrapped = PeftModel.from_pretrained(type(theirs).from_pretrained(folder, attn_implementation="eager"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert_close(wrapped(torch.tensor(TOKENS)).logits, want)
        assert_close(wrapped.merge_and_unload()(torch.tensor(TOKENS)).logits, want)
    back = adapter_lib.load(tmp_path / "adapter", cfg, family)
    assert back.keys() == ours.keys() and [p.name for p in tmp_path.iterdir()] == ["adapter"]
    for path, low in ours.items():
        assert np.array_equal(back[path].a, low.a) and np.array_equal(back[path].b, low.b) and back[path].scale == low.scale == 4.0


@every_family
def test_what_peft_saves_of_each_family_is_read(model, tmp_path):
    import torch

    family, folder, cfg, params, theirs = model
    wrapped = _peft_saves(theirs, folder, tmp_path, target_modules="all-linear")
    read = adapter_lib.load(tmp_path, cfg, family)
    assert len([path for path in read if path[0] == "layers"]) == cfg.n_layers * (7 if cfg.gated else 6)
    with torch.no_grad():
        want = wrapped(torch.tensor(TOKENS)).logits.numpy()
    assert_close(logits(lora.merge(params, read), cfg, TOKENS), want)
    assert_close(logits(lora.apply_folder(params, tmp_path, cfg, family), cfg, TOKENS), want)
    assert np.abs(want - logits(params, cfg, TOKENS)).max() > 0.1


def _peft_saves(theirs, folder, out, **fields):
    """A PEFT model of random adapters on a fresh copy of `theirs`, saved in `out`."""
    import peft
    import torch

    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 10, "init_lora_weights": False, "task_type": "CAUSAL_LM", **fields})
    wrapped = peft.get_peft_model(type(theirs).from_pretrained(folder, attn_implementation="eager"), config).eval()
    wrapped.save_pretrained(out, save_embedding_layers=False)
    return wrapped


@pytest.mark.parametrize("model", ["llama", "gpt2", "gpt_neox", "phi3", "gemma2", "opt"], indirect=True, scope="module")
def test_training_adapters_lowers_the_loss_of_each_family(model):
    _, _, cfg, params, _ = model
    made = fit(params, cfg, examples(4, hf_models.VOCABULARY), Sft(epochs=4, batch=4, lr=5e-3, warmup=0.0, lora=Lora(rank=2, alpha=8.0)))
    assert made.losses[-1][0] < 0.98 * made.losses[0][0]


@pytest.mark.parametrize("model, fields", [
    ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 3]}),
    ("llama", {"target_modules": ["q_proj", "v_proj", "o_proj"], "rank_pattern": {"v_proj": 5, r"layers\.[12]\.self_attn\.q_proj": 2},
               "alpha_pattern": {"layers.0.self_attn.o_proj": 3, "v_proj": 1.5}}),
    ("llama", {"target_modules": r".*\.(1|2)\.self_attn\..*_proj", "exclude_modules": ["k_proj"]}),
    ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "rank_pattern": {"c_attn": 4}, "use_rslora": True}),
    ("phi3", {"target_modules": ["qkv_proj"]}),
    ("gemma2", {"target_modules": ["lm_head", "v_proj"]}),
], indirect=["model"], scope="module")
def test_scales_and_choices_of_peft_are_honoured(model, fields, tmp_path):
    import torch

    family, folder, cfg, params, theirs = model
    with torch.no_grad():
        want = _peft_saves(theirs, folder, tmp_path, **fields)(torch.tensor(TOKENS)).logits.numpy()
    assert_close(logits(lora.apply_folder(params, tmp_path, cfg, family), cfg, TOKENS), want)


def _torch_loss(wrapped, rows):
    """Mean loss of the answers' tokens."""
    import torch

    total, count = 0, 0
    for e in rows:
        made = wrapped(torch.tensor([e.tokens])).logits[0, e.prompt_length - 1:-1]
        total += torch.nn.functional.cross_entropy(made, torch.tensor(e.tokens[e.prompt_length:]), reduction="sum")
        count += len(e.tokens) - e.prompt_length
    return total / count


def _trainable(theirs, folder, out, adapter, cfg, family):
    """PEFT's model of an adapter, to be trained."""
    from peft import PeftModel

    adapter_lib.save(out, adapter, cfg, family, base="")
    return PeftModel.from_pretrained(type(theirs).from_pretrained(folder, attn_implementation="eager"), out, is_trainable=True)


@pytest.mark.parametrize("model, module", [
    ("llama", "model.layers.{}.self_attn.q_proj"), ("gpt2", "transformer.h.{}.attn.c_attn"),
], indirect=["model"], scope="module")
def test_gradients_are_those_of_peft_and_torch(model, module, tmp_path):
    family, folder, cfg, params, theirs = model
    spec, rows = Lora(rank=2, alpha=8.0), examples(4, hf_models.VOCABULARY)
    adapters, frozen, batch = in_training(cfg, spec), lora.frozen(params, cfg, MESH, "float32"), collate(rows, 1, 128)
    total = lambda a: eval_step(cfg, MESH, "float32")(lora.beside(frozen, a, spec), batch)
    ours = jax.grad(lambda a: total(a)[0] / total(a)[1])(adapters)["layers"]["attn"]["q"]
    wrapped = _trainable(theirs, folder, tmp_path / "a", lora.finished(adapters, cfg, spec), cfg, family)
    _torch_loss(wrapped, rows).backward()
    gradients = {name: p.grad.numpy().T for name, p in wrapped.named_parameters() if p.grad is not None}
    width = cfg.n_heads * cfg.head_dim
    for i in range(cfg.n_layers):
        a, b = (gradients[f"base_model.model.{module.format(i)}.lora_{half}.default.weight"] for half in "AB")
        a, b = a[:, :2], b[:2, :width]
        np.testing.assert_allclose(ours["lora_a"][i], a, atol=1e-4 * np.abs(a).max())  # where weights are fused: the block of q
        np.testing.assert_allclose(ours["lora_b"][i], b, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize("model", ["llama"], indirect=True, scope="module")
def test_the_loss_curve_is_that_of_peft_and_torch(model, tmp_path):
    import torch
    import transformers

    family, folder, cfg, params, theirs = model
    rows, sft = examples(4, hf_models.VOCABULARY), Sft(epochs=5, batch=4, lr=5e-3, lora=Lora(rank=2, alpha=8.0))
    made, start = fit(params, cfg, rows, sft), lora.finished(lora.init(cfg, sft.lora, MESH, seed=0), cfg, sft.lora)
    wrapped = _trainable(theirs, folder, tmp_path / "a", start, cfg, family)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=sft.lr, betas=sft.betas, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 1, 5)
    for total, count in made.losses:
        loss = _torch_loss(wrapped, rows)
        assert total / count == pytest.approx(loss.item(), rel=2e-4)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), sft.clip)
        optimizer.step()
        schedule.step()
    assert made.losses[-1][0] < 0.98 * made.losses[0][0]


# ---------------------------------------------------------------------------------------------------------------------- files
def saved(folder, spec=Lora(rank=2, alpha=8.0), cfg=CFG, **changes):
    """A folder with random adapters, its adapter_config.json changed."""
    adapter = lora.finished(in_training(cfg, spec), cfg, spec)
    adapter_lib.save(folder, adapter, cfg, LLAMA, base="someone/model")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return adapter


def test_the_files_say_what_peft_needs(tmp_path):
    saved(tmp_path / "adapter", Lora(rank=2, alpha=8.0, targets="q|down"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["self_attn.q_proj", "mlp.down_proj"] and config["base_model_name_or_path"] == "someone/model"
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["peft_type"]) == (2, 8, {}, "LORA")
    stored = tensors.read_header(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 8
    assert stored["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (2, 20)
    assert stored["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (12, 2)


def test_fused_modules_say_their_ranks(tmp_path):
    cfg = dataclasses.replace(CFG, n_kv_heads=4, gated=False, norm="layer", qkv_bias=True, o_bias=True, mlp_bias=True, positions=32,
                              pattern=(LayerKind(None),))
    adapter = lora.finished(in_training(cfg, Lora(rank=2, alpha=8.0)), cfg, Lora(rank=2, alpha=8.0))
    del adapter["layers", "1", "attn", "k"]
    adapter_lib.save(tmp_path / "a", adapter, cfg, families.FAMILIES["gpt2"], base="")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    whole, less = "transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"
    assert config["target_modules"] == [whole, less, "attn.c_proj", "mlp.c_fc", "mlp.c_proj"] and config["fan_in_fan_out"]
    assert config["rank_pattern"] == {whole: 6, less: 4} and config["alpha_pattern"] == {whole: 24, less: 16}
    assert adapter_lib.load(tmp_path / "a", cfg, families.FAMILIES["gpt2"]).keys() == adapter.keys()


def test_a_folder_is_replaced_whole_and_a_failure_leaves_the_old_one(tmp_path, monkeypatch):
    saved(tmp_path / "adapter")
    again = saved(tmp_path / "adapter", Lora(rank=3, alpha=6.0))
    assert adapter_lib.load(tmp_path / "adapter", CFG, LLAMA)["layers", "0", "attn", "q"].rank == 3

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "write_file", full)
    with pytest.raises(OSError, match="No space"):
        saved(tmp_path / "adapter")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    for path, low in adapter_lib.load(tmp_path / "adapter", CFG, LLAMA).items():
        assert np.array_equal(low.a, again[path].a) and np.array_equal(low.b, again[path].b)


def test_chained_adapters_add_what_both_add(tmp_path):
    params = decoder.init_params(CFG, 0)
    first, then = saved(tmp_path / "1"), saved(tmp_path / "2", Lora(rank=3, alpha=6.0, targets="q|v"))
    both = chain(first, then)
    assert both["layers", "0", "attn", "q"].rank == 5 and both["layers", "0", "attn", "q"].scale == 4.0
    assert both["layers", "0", "attn", "k"] is first["layers", "0", "attn", "k"]
    assert_close(logits(lora.merge(params, both), CFG, TOKENS % 23), logits(lora.merge(lora.merge(params, first), then), CFG, TOKENS % 23))
    adapter_lib.save(tmp_path / "both", both, CFG, LLAMA, base="")
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["rank_pattern"] == {"self_attn.q_proj": 5, "self_attn.v_proj": 5}
    assert config["alpha_pattern"] == {"self_attn.q_proj": 20, "self_attn.v_proj": 20}


@pytest.mark.parametrize("changes, said", [
    ({"use_dora": True}, "use_dora=true: DoRA"),
    ({"bias": "all"}, 'bias="all": trained biases'),
    ({"modules_to_save": ["lm_head"]}, "modules trained whole"),
    ({"trainable_token_indices": [3]}, "trained embeddings"),
    ({"init_lora_weights": "pissa_niter_4"}, "base model was changed"),
    ({"peft_type": "IA3"}, "peft_type='IA3' is not 'LORA'"),
    ({"r": "8"}, "r='8' is not a whole number"),
    ({"r": True}, "r=True is not a whole number"),
    ({"lora_alpha": None}, "lora_alpha=None is not a number"),
    ({"rank_pattern": {"(": 2}}, r"rank_pattern={'\(': 2} is not an object"),
    ({"newer_than_us": {"on": 1}}, "newer_than_us=.*: a field that is not known here"),
    ({"r": 3}, r"q_proj: lora_A and lora_B have shapes \[2, 12\] and \[24, 2\]; by adapter_config.json and this model they are \[3, 12\]"),
])
def test_what_is_not_plain_lora_is_refused(tmp_path, changes, said):
    saved(tmp_path / "adapter", **changes)
    with pytest.raises(UserError, match=said):
        adapter_lib.load(tmp_path / "adapter", CFG, LLAMA)


def test_settings_that_change_nothing_are_not_refused(tmp_path):
    saved(tmp_path / "adapter", lora_dropout=0.3, inference_mode=False, init_lora_weights="gaussian", peft_version="9", newer_than_us=None)
    assert adapter_lib.load(tmp_path / "adapter", CFG, LLAMA)


def test_other_spellings_and_dtypes_of_the_same_adapter_are_read(tmp_path):
    """Of the base model alone, with the adapter's name, in bfloat16."""
    want = saved(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    checkpoint = tensors.Checkpoint(path.parent, tensors.read_header(path))
    stored = {name: checkpoint.read(name) for name in checkpoint.entries}
    for spell in (lambda name: name.replace("base_model.model.model.", "base_model.model."),
                  lambda name: name.replace(".weight", ".default.weight"), lambda name: name.removeprefix("base_model.model.")):
        tensors.write_file(path, [(spell(name), "BF16", x.shape, [x.astype(ml_dtypes.bfloat16)]) for name, x in stored.items()])
        for product, low in adapter_lib.load(tmp_path / "adapter", CFG, LLAMA).items():
            assert low.a.dtype == np.float32
            np.testing.assert_allclose(low.b, want[product].b, rtol=2**-8)


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    from safetensors.numpy import load_file, save_file

    saved(tmp_path / "adapter")
    path, module = tmp_path / "adapter" / "adapter_model.safetensors", "base_model.model.model.layers.{}.self_attn.{}"
    stored = load_file(path)
    del stored[module.format(0, "q_proj.lora_A.weight")]
    del stored[module.format(1, "v_proj.lora_A.weight")], stored[module.format(1, "v_proj.lora_B.weight")]
    stored[module.format(2, "q_proj.lora_A.weight")] = np.zeros((2, 12), np.float32)
    stored[module.format(0, "q_proj.lora_magnitude_vector")] = np.zeros(24, np.float32)
    stored["base_model.model.model.embed_tokens.lora_embedding_A"] = np.zeros((2, 23), np.float32)
    save_file(stored, path)
    with pytest.raises(UserError) as e:
        adapter_lib.load(tmp_path / "adapter", CFG, LLAMA)
    for said in ("layers.0.self_attn.q_proj: its lora_A is missing", "layers.1.self_attn.v_proj: its lora_A and lora_B are missing",
                 "layers.2.self_attn.q_proj.lora_A.weight: this model has no such", "q_proj.lora_magnitude_vector: DoRA",
                 "embed_tokens.lora_embedding_A: this model has no such linear module", "(llama, 2 layers)"):
        assert said in str(e.value)


def test_folders_that_are_none_are_said(tmp_path):
    with pytest.raises(UserError, match="no adapter_config.json: it is no adapter folder"):
        adapter_lib.load(tmp_path, CFG, LLAMA)
    saved(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin is not read: load it with PEFT"):
        adapter_lib.load(tmp_path / "adapter", CFG, LLAMA)
