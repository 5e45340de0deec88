"""--push: what is asked of the hub, and what is said when it refuses."""
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from isara_jax import export, publish
from isara_jax.common import UserError


def refusal(status):
    return errors.HfHubHTTPError(f"{status} says the hub", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers; `fails` maps a call to what it raises, `calls` are those made."""
    made = SimpleNamespace(calls=[], fails={})

    class Api:
        def __getattr__(self, name):
            def call(*args, **kwargs):
                made.calls.append((name, args, kwargs))
                if name in made.fails:
                    raise made.fails[name]
                return {"whoami": {"name": "me"}, "create_repo": "https://hub/me/model"}.get(name)

            return call

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(publish.common, "reachable", lambda endpoint: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return made


def test_a_push_makes_a_private_repository_and_uploads_the_folder(hub, tmp_path, capsys):
    assert export.main(["--model=tiny-random", f"--out={tmp_path / 'out'}", "--push=me/model"]) == 0
    (_, who, _), (_, repository, how), (_, _, upload) = hub.calls
    assert [name for name, *_ in hub.calls] == ["whoami", "create_repo", "upload_folder"]
    assert repository == ("me/model",) and how["private"] is True and how["exist_ok"] is True
    assert upload["repo_id"] == "me/model" and Path(upload["folder_path"]) == tmp_path / "out"
    assert "*.safetensors" in upload["delete_patterns"]
    said = capsys.readouterr().out
    assert "to be pushed to me/model as me" in said and "pushed: https://hub/me/model" in said


@pytest.mark.parametrize("call, error, message, written", [
    ("whoami", errors.LocalTokenNotFoundError("no token"), "--push needs a token of the hub", False),
    ("whoami", refusal(401), "does not accept the token", False),
    ("create_repo", refusal(403), "has no write access, or belongs to an account that may not write for me", True),
    ("upload_folder", refusal(500), "the upload failed: 500 says the hub.*The export itself is whole.*`hf upload me/model", True)])
def test_what_the_hub_refuses_is_explained(hub, tmp_path, call, error, message, written):
    hub.fails[call] = error
    with pytest.raises(UserError, match=message):
        export.export(tmp_path / "out", model="tiny-random", repository="me/model", say=lambda line: None)
    assert (tmp_path / "out" / "config.json").exists() is written


def test_without_a_network_nothing_is_begun(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(publish.common, "reachable", lambda endpoint: False)
    with pytest.raises(UserError, match="does not answer from this machine. Export without --push"):
        export.export(tmp_path / "out", model="tiny-random", repository="me/model", say=lambda line: None)
    assert hub.calls == [] and not (tmp_path / "out").exists()
