"""Export: what comes out is the model that went in, transformers asks it as it was trained, and nothing half-written looks whole.

What transformers 4.57 makes of the folders is checked where ISARA_TRANSFORMERS4 names a Python that has it (with torch): slow tests.
"""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import ModelCard

import hf_models
import isara_jax
import transformers_peer
from isara_jax import chat, cli, export, new_folder
from isara_jax.common import UserError
from isara_jax.config import from_dict
from isara_jax.data import chat_templates
from isara_jax.data.prompts import show
from isara_jax.data.tokenizer import ByteTokenizer
from isara_jax.models import adapter, families, save, tensors
from isara_jax.session import make_template

torch = pytest.importorskip("torch")
PAIRS = [(f"What is {word}?", f"It is {word[::-1]}.") for word in (
    "a kettle", "the moon", "an owl", "salt", "glass", "bread", "a lamp", "the sea", "iron", "a fox", "rain", "a violin")]
QUESTION, ANSWER = "Ask {{ '%}\" ü:", "{# Tell \\"
CHATS = [[{"role": "user", "content": text}] for text in (
    "What is salt?", "  Größe – 大きさ 😀?\n", "two\n\n \nlines", "ends with space ", "{{ x }} {% y %}")]
CHATS.append([*CHATS[0], {"role": "assistant", "content": " It is tlas.\n\nYes. "}, *CHATS[2]])
CHATML = ("{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ 'Be nice.\n' }}{% endif %}"
          "{{ m['role'] + ': ' + m['content'] + eos_token }}"
          "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")


def base(folder, family="qwen2", chat_template=None, seed=0, **more):
    """A tiny random model of a family with a tokenizer of bytes: a Hugging Face folder."""
    hf_models.make(family, folder, seed=seed, num_hidden_layers=2, vocab_size=264, max_position_embeddings=512, bos_token_id=None,
                   eos_token_id=256, pad_token_id=0, **more)
    ByteTokenizer().save(folder)
    named = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in named.items() if v}))
    return folder


def trained_on(folder, workdir):
    """A run of two small iterations with markers of its own on the model in `folder`."""
    config = cli.load("configs/tiny.py")
    config.model.name = str(folder)
    config.prompt.question_marker, config.prompt.answer_marker = QUESTION, ANSWER
    config.stop.iterations, config.generate.requests, config.data.holdout = 2, 8, 0.5
    isara_jax.align(isara_jax.load(str(folder), "float32", weights="float32"), PAIRS, from_dict(config), workdir)
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A plain run on a bfloat16 model of the Qwen family."""
    place = tmp_path_factory.mktemp("run")
    return trained_on(base(place / "base", dtype="bfloat16"), place / "run")


@pytest.fixture(scope="module")
def exported(run):
    """Its last iteration in float32, so that rounding does not hide anything, in shards."""
    said = []
    made = export.export(run / "made", workdir=run, dtype="float32", shard_size="50KB", say=said.append,
                         command="python -m isara_jax.export ...")
    return SimpleNamespace(folder=made.folder, made=made, said="\n".join(said))


def peer(folders, *, python=None, **asked):
    """What transformers makes of folders: the one here, or that of another Python."""
    if python in (None, sys.executable):
        return [transformers_peer.read(str(f), asked) for f in folders]
    question = json.dumps({"folders": [str(f) for f in folders], **asked})
    done = subprocess.run([python, transformers_peer.__file__], input=question, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def ours(workdir, iteration="last"):
    """(the exported model of a run in float32, its template), as training left it."""
    job = export._of_run(str(workdir), iteration)
    plan = save.layout(job.blueprint.source, job.blueprint.cfg, job.blueprint.context, "float32")
    return export._load(job, plan), job.template


def prompts(lm, template, chats):
    """Our prompts of chats: segments and token ids."""
    segments = [chat_templates._conversation(template, [m["content"] for m in messages]) for messages in chats]
    return segments, [lm.tokenizer.encode_segments(s) for s in segments]


def same_until_a_near_tie(new, expected, margins, eos):
    """Greedy ids equal up to the first choice that transformers itself made by less than 1e-3."""
    n = next((i for i, margin in enumerate(margins) if margin < 1e-3), len(new))
    expected = [*expected, eos][:len(new)]
    return n > 0 and new[:n] == expected[:n]


# ------------------------------------------------------------------------------------------------------------------- what comes out
def test_an_exported_run_is_asked_by_transformers_as_it_was_trained(run, exported):
    lm, template = ours(run)
    segments, ids = prompts(lm, template, CHATS)
    rows = [ids[0], ids[3][:20]]
    (made,) = peer([exported.folder], chats=CHATS, rows=rows, texts=["a  b ü"], new_tokens=48)
    assert made["problems"] == {} and made["dtype"] == "torch.float32"
    assert made["texts"] == [lm.tokenizer.encode("a  b ü", bos=True)]
    assert [c["text"] for c in made["chats"]] == [show(s) for s in segments] and [c["ids"] for c in made["chats"]] == ids
    for theirs, row in zip(made["logits"], lm.logits(rows)):
        np.testing.assert_allclose(theirs, row, rtol=0, atol=1e-4 * np.abs(row).max())
    samples = lm.generate(ids, max_new_tokens=48)
    assert all(same_until_a_near_tie(c["new"], s.ids, c["margins"], 256) for c, (s,) in zip(made["chats"], samples))
    assert sum(len(c["new"]) for c in made["chats"]) > 100, "there is something to compare"


def test_the_whole_chat_is_the_training_example(run, exported):
    lm, template = ours(run)
    for question, answer in (("What is salt?", "It is tlas."), (" a\n\nb ", " as it is\n\n")):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        (made,) = peer([exported.folder], chats=[messages])
        prompt, continuation = lm.tokenizer.encode_pair(template.training_segments(question), template.continuation(answer))
        tokenizer = isara_jax.lm.describe(str(exported.folder)).tokenizer
        assert tokenizer.encode_segments(((made["chats"][0]["whole"], True),)) == [*prompt, *continuation, 256]


def test_a_system_message_is_refused_with_a_reason(exported):
    (made,) = peer([exported.folder], chats=[[{"role": "system", "content": "Be kind."}, *CHATS[0]]])
    assert "no place for a system message" in made["chats"][0]["error"]


def test_our_chat_asks_the_exported_folder_as_the_run(run, exported, capsys):
    question = run / "made.txt"
    question.write_text("What is salt?\n")
    answers = []
    for i, model in enumerate((run, exported.folder)):
        out = run / f"answer{i}.jsonl"
        assert chat.main([f"--model={model}", f"--file={question}", f"--out={out}", "--max_new_tokens=20"]) == 0
        answers.append(json.loads(out.read_text())["answer"])
    assert answers[0] == answers[1]


def test_the_folder_has_what_other_programs_read(run, exported):
    names = {f.name for f in exported.folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md",
            "model.safetensors.index.json"} <= names and sum(n.endswith(".safetensors") for n in names) > 3
    config = json.loads((exported.folder / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (exported.folder / "chat_template.jinja").read_text()
    assert json.loads((exported.folder / "generation_config.json").read_text())["eos_token_id"] == 256
    assert "verified: all bytes of all tensors" in exported.said and f"{exported.made.tensors} tensors" in exported.said
    vllm, llama_cpp = exported.made.next
    assert vllm.startswith(f"vLLM:      vllm serve {exported.folder} --dtype float32 --max-model-len ")
    assert f"convert_hf_to_gguf.py {exported.folder} --outtype f32 --outfile {exported.folder}.gguf" in llama_cpp
    assert oct(exported.folder.stat().st_mode & 0o777) == oct(0o777 & ~_umask())


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_card_is_one_the_hub_reads_and_tells_where_the_model_comes_from(run, exported):
    card = ModelCard.load(exported.folder / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation" and "isara" in card.data.tags
    kept = [json.loads((run / "iterations" / f"{t:02d}" / "DONE").read_text())["kept"] for t in (1, 2)]
    seeds = len((run / "pool" / "000-seeds.jsonl").read_text().splitlines())
    for line in (f"| 0 | seed | {seeds} | - |", *(f"| {t} | generated | {n} | 8 |" for t, n in enumerate(kept, 1) if n),
                 f"| all | | {seeds + sum(kept)} | |", "iteration 2 of the run", "not fact-checked", "- model: not stated",
                 "- seed pairs: ",
                 "python -m isara_jax.export ...", show(ours(run)[1].training_segments("Why do cats purr?"))):
        assert line in card.content, line


def test_a_runs_weights_are_cast_to_what_its_base_stores(run, tmp_path):
    said = []
    made = export.export(tmp_path / "out", workdir=run, iteration="1", say=said.append)
    written, before = tensors.open_folder(tmp_path / "out"), tensors.open_folder(run.parent / "base")
    assert {s.dtype for s in written.entries.values()} == {"BF16"} and set(written.entries) == set(before.entries)
    lm, _ = ours(run, "1")
    key, kernel = "model.layers.0.mlp.up_proj.weight", lm.params["layers"]["0"]["mlp"]["up"]["kernel"]
    assert written.read(key).tobytes() == np.asarray(kernel.T.astype("bfloat16")).tobytes() != before.read(key).tobytes()
    assert 0 < made.rounding < 0.1 and "when the weights were rounded to bfloat16" in "\n".join(said)


@pytest.mark.parametrize("asked, expected", [("best", None), ("last", 2), ("1", 1)])
def test_iterations_are_named(run, asked, expected):
    best = export.Checkpoints(run / "checkpoints").best()
    assert best and export._of_run(str(run), asked).iteration == (expected or best)


def test_without_a_measured_loss_there_is_no_best(run, tmp_path):
    """And an error ends the command with its message alone."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "held_out.json").write_text('{"1": null, "2": null}')
    command = [sys.executable, "-m", "isara_jax.export", f"--workdir={tmp_path / 'run'}", "--iteration=best", f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "measured no held-out loss. Take last, or a number (1, 2)" in done.stderr


def test_a_chat_run_gets_the_models_own_template_behind_the_empty_system_turn(tmp_path):
    """A job as a run in the chat form makes it, with the weights of its base."""
    job = export._of_model(str(base(tmp_path / "base", "llama", CHATML)), "base")
    template = make_template(from_dict({"model": {"form": "chat"}}), job.blueprint)
    job = dataclasses.replace(job, template=template)
    export._write(job, tmp_path / "out", "", 10**9, "", lambda line: None)
    lm = isara_jax.load(str(tmp_path / "base"), "float32")
    segments, ids = prompts(lm, template, CHATS)
    (made,) = peer([tmp_path / "out"], chats=CHATS, new_tokens=24)
    assert [c["text"] for c in made["chats"]] == [show(s) for s in segments] and [c["ids"] for c in made["chats"]] == ids
    assert made["chats"][0]["text"] == "system: <|end|>user: What is salt?<|end|>assistant: "
    samples = lm.generate(ids, max_new_tokens=24)
    assert all(same_until_a_near_tie(c["new"], s.ids, c["margins"], 256) for c, (s,) in zip(made["chats"], samples))


# ----------------------------------------------------------------------------------------------------------------------- conversions
@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "opt_post", "phi3", "gpt_neox"])
def test_folders_of_token_ids_alone_come_back_byte_for_byte(tmp_path, family):
    hf_models.make(family, tmp_path / "a", dtype="bfloat16")
    made = export.export(tmp_path / "b", model=str(tmp_path / "a"), say=lambda line: None)
    before, after = tensors.open_folder(tmp_path / "a"), tensors.open_folder(tmp_path / "b")
    assert set(before.entries) == set(after.entries) and made.rounding == 0
    for key, stored in before.entries.items():
        assert (stored.dtype, before.read(key).tobytes()) == (after.entries[key].dtype, after.read(key).tobytes())
    assert not list((tmp_path / "b").glob("tokenizer*")) and "takes and gives token ids" in (tmp_path / "b" / "README.md").read_text()
    assert "--skip-tokenizer-init" in made.next[0]
    rows = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]]
    source, copy = peer([tmp_path / "a", tmp_path / "b"], rows=rows)
    assert source["logits"] == copy["logits"] and copy["problems"] == {}


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_an_adapter_is_merged_on_the_way(tmp_path, family):
    """As `isara_jax.load` merges it, and as its definition says: kernel + alpha / rank * a @ b."""
    hf_models.make(family, tmp_path / "a")
    plain, kind = isara_jax.load(str(tmp_path / "a"), "float32"), families.FAMILIES[family]
    rng, D = np.random.default_rng(0), plain.cfg.d_model
    low = adapter.LowRank(rng.standard_normal((D, 3)).astype(np.float32), rng.standard_normal((3, plain.cfg.d_ff)).astype(np.float32), 6.0)
    adapter.save(tmp_path / "lora", {("layers", "1", "mlp", "up"): low}, plain.cfg, kind, base="a")
    export.export(tmp_path / "b", model=str(tmp_path / "a"), adapter=str(tmp_path / "lora"), say=lambda line: None)
    copy, loaded = isara_jax.load(str(tmp_path / "b"), "float32"), isara_jax.load(str(tmp_path / "a"), "float32", adapter=tmp_path / "lora")
    up = lambda lm, i: np.asarray(lm.params["layers"][i]["mlp"]["up"]["kernel"])
    np.testing.assert_allclose(up(copy, "1"), up(plain, "1") + 2.0 * low.a @ low.b, rtol=1e-4, atol=1e-5)
    assert np.array_equal(up(copy, "0"), up(plain, "0")) and np.array_equal(up(copy, "1"), up(loaded, "1"))
    with pytest.raises(UserError, match="no --model is named"):
        export.export(tmp_path / "c", workdir=tmp_path, adapter=tmp_path / "lora")


def test_the_tiny_model_and_gguf_files_become_folders_in_float32(tmp_path, smollm2_gguf):
    said = []
    export.export(tmp_path / "tiny", model="tiny-random", say=said.append)
    assert "the tiny model has no files: written as float32" in "\n".join(said)
    lm, again = isara_jax.load("tiny-random", "float32"), isara_jax.load(str(tmp_path / "tiny"), "float32")
    assert again.generate(["abc"], max_new_tokens=9) == lm.generate(["abc"], max_new_tokens=9)
    source = isara_jax.models.resolve.Source("gguf", smollm2_gguf, "smollm2-135m-instruct")
    assert save.licence(source) == "apache-2.0"
    export._legal(tmp_path, source)
    assert "Apache License" in (tmp_path / "LICENSE").read_text()


def test_a_folder_with_pickles_alone_is_converted_on_the_way(tmp_path):
    model = hf_models.make("llama", tmp_path / "a")
    whole = model.state_dict()
    (tmp_path / "a" / "model.safetensors").unlink()
    torch.save(whole, tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(UserError, match="--from_bin --out=NEW"):
        export.export(tmp_path / "b", model=str(tmp_path / "a"), say=lambda line: None)
    export.export(tmp_path / "b", model=str(tmp_path / "a"), bins=True, say=lambda line: None)
    written = tensors.open_folder(tmp_path / "b")
    assert set(written.entries) == set(whole) - {"lm_head.weight"}, "tied, and kept once"
    assert all(np.array_equal(written.read(key), whole[key].numpy()) for key in written.entries)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "b"], "what was between is gone"
    assert f"converted from {tmp_path / 'a'}" in (tmp_path / "b" / "README.md").read_text()


def test_float16_that_cannot_hold_a_value_names_the_tensor(tmp_path):
    folder = base(tmp_path / "a", "llama")
    file = folder / "model.safetensors"
    checkpoint = tensors.open_folder(folder)
    made = {key: checkpoint.read(key) for key in checkpoint.entries}
    made["model.layers.1.self_attn.v_proj.weight"][1, 2] = 1e6
    tensors.write_file(file, [(key, "F32", a.shape, [a]) for key, a in made.items()])
    with pytest.raises(UserError, match="model.layers.1.self_attn.v_proj.weight holds values up to 1,000,000, which float16 cannot"):
        export.export(tmp_path / "b", model=str(folder), dtype="float16", say=lambda line: None)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a"]


# -------------------------------------------------------------------------------------------------------------- nothing half-written
def test_a_disk_that_fills_leaves_nothing(tmp_path):
    """A file may not grow beyond 200 kB here, so that writing itself fails, as on a full disk."""
    base(tmp_path / "a", "llama")
    code = ("import resource, signal, sys\nfrom isara_jax import export\nresource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nsys.exit(export.main(sys.argv[1:]))")
    env = os.environ | {"ISARA_NO_COMPILATION_CACHE": "1"}
    done = subprocess.run([sys.executable, "-c", code, f"--model={tmp_path / 'a'}", f"--out={tmp_path / 'b'}"], capture_output=True,
                          text=True, env=env)
    assert done.returncode == 2 and "could not be written: File too large" in done.stderr and "Traceback" not in done.stderr
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_whatever_ends_it_in_the_middle_leaves_nothing(tmp_path, monkeypatch, stop, capsys):
    base(tmp_path / "a", "llama")
    write, calls = tensors.write_file, []

    def fails(path, *args):
        calls.append(path)
        if len(calls) == 2:
            raise stop
        write(path, *args)

    monkeypatch.setattr(tensors, "write_file", fails)
    status = export.main([f"--model={tmp_path / 'a'}", f"--out={tmp_path / 'b'}", "--shard_size=100KB"])
    assert status == (130 if isinstance(stop, KeyboardInterrupt) else 2) and calls[0].exists() is False
    assert ("was not written" if status == 130 else "No space left on device. Nothing is left there. Make room") in capsys.readouterr().err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a"]


def test_a_kill_leaves_no_folder_of_that_name_and_a_polite_one_nothing_at_all(tmp_path):
    base(tmp_path / "a", "llama")
    code = ("import os, signal, sys\nfrom isara_jax import export\nfrom isara_jax.models import save\nwrite = save.check_tensors\n"
            "save.check_tensors = lambda *args: os.kill(os.getpid(), int(sys.argv[1]))\nsys.exit(export.main(sys.argv[2:]))")
    for number, left in ((signal.SIGTERM, 0), (signal.SIGKILL, 1)):
        done = subprocess.run([sys.executable, "-c", code, str(int(number)), f"--model={tmp_path / 'a'}", f"--out={tmp_path / 'b'}"],
                              capture_output=True, text=True)
        assert done.returncode == (143 if number == signal.SIGTERM else -9), done.stderr
        assert not (tmp_path / "b").exists() and len(list(tmp_path.glob(".b.*.tmp"))) == left


def _flip(folder, *args):
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 64
    file.write_bytes(data)


def _other_config(folder, *args):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"rms_norm_eps": 0.5}))


def _other_template(folder, *args):
    (folder / "chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize("place, damage, message", [
    ("check_tensors", _flip, "bytes from row"), ("check_tensors", _other_config, "the mathematics in config.json"),
    ("check_tensors", _other_template, "the chat template")])
def test_what_is_not_the_model_is_noticed_before_it_appears(run, tmp_path, monkeypatch, place, damage, message):
    real = getattr(save, place)

    def damaged(folder, *args):
        damage(folder)
        return real(folder, *args)

    monkeypatch.setattr(save, place, damaged)
    with pytest.raises(UserError, match=message):
        export.export(tmp_path / "out", workdir=run, say=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_logits_that_differ_are_noticed(run, tmp_path, monkeypatch):
    """Bytes that are not looked at again: the folder loaded again gives them away."""
    monkeypatch.setattr(save, "check_tensors", _flip)
    with pytest.raises(UserError, match="is not the model that was exported: other are logits, by up to"):
        export.export(tmp_path / "out", workdir=run, say=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_room_is_looked_for_before_weights_are_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr(new_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    monkeypatch.setattr(export, "_load", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(UserError, match="GiB are needed and 0.00 GiB are free"):
        export.export(tmp_path / "out", workdir=run, say=lambda line: None)


# --------------------------------------------------------------------------------------------------------------------- bad commands
@pytest.mark.parametrize("flags, message", [
    ([], "name what to export: either --workdir"), (["--workdir={run}", "--model=tiny-random", "--out={new}"], "name what to export"),
    (["--model=tiny-random"], "--out is missing"),
    (["--model=tiny-random", "--out={run}"], "is not empty, and nothing in it is overwritten"),
    (["--model=tiny-random", "--out={run}/config.json"], "is a file. Name a new folder"),
    (["--model=tiny-random", "--out={run}/config.json/x"], "could not be written: "),
    (["--model=tiny-random", "--out={new}", "--iteration=1"], "is one of a run"),
    (["--workdir={run}", "--out={new}", "--from_bin"], "that --model names"),
    (["--model=tiny-random", "--out={new}", "--shard_size=5"], "give a number with KB"),
    (["--model={run}", "--out={new}"], "name it as --workdir="),
    (["--model=tiny-random", "--out={new}", "--shard_size=0GB"], "give a number with KB"),
    (["--workdir={base}", "--out={new}"], "is not the workdir of a run"),
    (["--workdir={run}", "--out={new}", "--iteration=7"], "one of 1, 2"),
    (["--workdir={run}", "--out={new}", "--iteration=0"], "The starting model is exported with --model"),
    (["--workdir={run}", "--out={new}", "--iteration=first"], "take last, best, or one of 1, 2"),
    (["--model={new}", "--from_bin", "--out={new}"], "--from_bin converts a folder"),
    (["--model=tiny-random", "--out={new}", "--push=x"], "names no owner"),
    (["--model=tiny-random", "--out={new}", "--push=a/b/c"], "is not the name of a repository")])
def test_mistakes_are_one_message(run, tmp_path, capsys, flags, message):
    places = {"run": run, "new": tmp_path / "new", "base": run.parent / "base"}
    assert export.main([flag.format(**places) for flag in flags]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.startswith("isara_jax.export: ") and not list(tmp_path.iterdir())


def test_a_run_without_parameters_or_whose_base_changed_is_refused(run, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(UserError, match="holds no parameters"):
        export.export(tmp_path / "out", workdir=tmp_path)
    monkeypatch.setattr(isara_jax.models.resolve.Source, "content_hash", lambda self: "0" * 16)
    with pytest.raises(UserError, match="is not what .* started from: its content hash is 0000000000000000, and was"):
        export.export(tmp_path / "out", workdir=run)


# ------------------------------------------------------------------------------------------------------------- transformers 4 and 5
@pytest.fixture(scope="session")
def pythons():
    """This Python, and the one with transformers 4.57 that ISARA_TRANSFORMERS4 names."""
    old = os.environ.get("ISARA_TRANSFORMERS4")
    if not old:
        pytest.skip("ISARA_TRANSFORMERS4 is not set: it names a Python with transformers 4.57 and torch")
    return sys.executable, old


@pytest.mark.slow
def test_both_versions_read_the_folders_of_every_family(tmp_path, pythons):
    """But for what the export itself says that transformers 4 cannot be told."""
    rows, expected, folders, refused = [[(7 * i + 3) % 90 + 3 for i in range(40)]], {}, [], []
    for family in hf_models.MODELS:
        model, said = hf_models.make(family, tmp_path / family), []
        export.export(tmp_path / f"{family}_out", model=str(tmp_path / family), say=said.append)
        with torch.no_grad():
            expected[family] = model(torch.tensor(rows)).logits[0].numpy()
        (refused if "take transformers 5" in "\n".join(said) else folders).append(family)
    assert refused == ["olmo2", "olmo3"]
    for python, families in ((pythons[0], [*folders, *refused]), (pythons[1], folders)):
        for family, made in zip(families, peer([tmp_path / f"{f}_out" for f in families], python=python, rows=rows), strict=True):
            assert made["problems"] == {}, (family, made["version"])
            near = 1e-5 * np.abs(expected[family]).max()
            np.testing.assert_allclose(made["logits"][0], expected[family], rtol=0, atol=near, err_msg=family)


@pytest.mark.slow
def test_smollm2_after_a_run_continues_text_in_both_versions_as_here(tmp_path, pythons, smollm2_gguf):
    config = cli.load("configs/tiny.py")
    config.model.name, config.stop.iterations, config.generate.requests, config.model.dtype = str(smollm2_gguf), 1, 8, "float32"
    config.sft.lr, config.filters.question, config.filters.answer = 1e-4, ("min_words",), ("min_words",)  # so that pairs are kept
    isara_jax.align(isara_jax.load(str(smollm2_gguf), "float32"), PAIRS, from_dict(config), tmp_path / "run")
    export.export(tmp_path / "out", workdir=tmp_path / "run")
    lm, template = ours(tmp_path / "run")
    chats = [CHATS[0], CHATS[1], CHATS[-1]]
    segments, ids = prompts(lm, template, chats)
    free = [lm.tokenizer.encode(text) for text in ("The three largest oceans of the world are", "Once upon a time,")]
    for python in pythons:
        (made,) = peer([tmp_path / "out"], python=python, chats=chats, free=free, new_tokens=64)
        assert [c["text"] for c in made["chats"]] == [show(s) for s in segments] and [c["ids"] for c in made["chats"]] == ids
        for c, (s,) in zip(made["chats"], lm.generate(ids, max_new_tokens=64)):
            assert same_until_a_near_tie(c["new"], s.ids, c["margins"], lm.tokenizer.eos_id)
        for c, (s,) in zip(made["free"], lm.generate(free, max_new_tokens=64, ignore_eos=True)):
            assert len(c["new"]) == 64 and same_until_a_near_tie(c["new"], s.ids, c["margins"], None)
