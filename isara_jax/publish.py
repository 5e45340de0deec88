"""An exported folder as a repository of the Hugging Face hub. Imports no jax."""
from __future__ import annotations

from pathlib import Path

from isara_jax import common
from isara_jax.common import UserError

STALE = ["*.safetensors", "*.safetensors.index.json"]  # what an earlier upload may have left and this one does not replace


def check(repository: str) -> str:
    """The account that will push. Raises `UserError`, before any work, for a name that is none, without a network, and without a token."""
    from huggingface_hub import HfApi, constants, errors, utils

    try:
        utils.validate_repo_id(repository)
    except errors.HFValidationError as e:
        raise UserError(f"--push={repository} is not the name of a repository ({_line(e)}). It has the form owner/name.") from None
    if repository.count("/") != 1:
        raise UserError(f"--push={repository} names no owner. It has the form owner/name.")
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push: HF_HUB_OFFLINE is set, so the hub is not asked. Unset it, or leave out --push.")
    if not common.reachable(constants.ENDPOINT):
        raise UserError(f"--push: the hub ({constants.ENDPOINT}) does not answer from this machine. Export without --push, and run "
                        f"`hf upload {repository} FOLDER` where there is a network.")
    try:
        return str(HfApi().whoami(token=True)["name"])
    except (errors.HTTPError, OSError) as e:
        raise _refused(repository, e) from None


def push(folder: Path, repository: str) -> str:
    """Create the repository, private unless it exists already, and upload the folder in one commit; return its address.

    Weight files of an earlier upload that the folder does not have are deleted in the same commit. Raises `UserError` when the hub refuses.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Model exported by isara_jax", delete_patterns=STALE)
    except (errors.HTTPError, OSError) as e:
        raise UserError(f"{_refused(repository, e)} The export itself is whole, in {folder}: `hf upload {repository} {folder}` tries the "
                        "upload again.") from None
    return str(url)


def _refused(repository: str, e: Exception) -> UserError:
    from huggingface_hub import errors

    status = getattr(getattr(e, "response", None), "status_code", None)
    if isinstance(e, errors.LocalTokenNotFoundError):
        return UserError("--push needs a token of the hub, and there is none: run `hf auth login`, or set HF_TOKEN to one that may "
                         "write.")
    if status == 401:
        return UserError("--push: the hub does not accept the token (401): run `hf auth login`, or set HF_TOKEN to one that is valid.")
    if status in (403, 404):
        return UserError(f"--push={repository}: the hub refused it ({status}): the token has no write access, or belongs to an account "
                         f"that may not write for {repository.partition('/')[0]}.")
    return UserError(f"--push={repository}: the upload failed: {_line(e)}.")


def _line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:300].rstrip(".")
