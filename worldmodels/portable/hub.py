"""Models on the Hugging Face hub: a push is one commit, and a pull has its place only once all hashes are right."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from worldmodels.data.disk import atomic, disk_errors, make_folder, on_disk
from worldmodels.portable.folder import ABOUT, FILES, WEIGHTS, check_files, read_about, vacant
from worldmodels.types import UserError


def push(
    checkpoint: str | Path,
    repo: str,
    revision: str = "main",
    private: bool = True,
    replace: bool = False,
    endpoint: str | None = None,
) -> str | None:
    """Put the folder of a model on the hub, whole or not at all; a repository that is not there is made, with `main`.

    Args:
        checkpoint: folder of `worldmodels export-model`.
        repo: USER/NAME.
        revision: branch.
        private: whether a new repository is.
        replace: take the place of another model, which stays in the repository's history.
        endpoint: address of the hub; None is the library's own.

    Returns:
        The address of the commit; None where this very model is there already.

    Raises:
        UserError: the folder is not as it was written, the repository holds something else, or the hub cannot be
            reached or refuses.
    """
    folder = Path(checkpoint)
    about = check_files(folder)
    hub = _library()
    with _told(repo, revision):
        api = hub.HfApi(endpoint=endpoint)
        if revision == "main":  # another branch is not there before its repository is
            api.create_repo(repo, private=private, exist_ok=True)
        info = api.model_info(repo, revision=revision)
        there = {file.rfilename for file in info.siblings or []} & set(FILES)
        if ABOUT in there and _about(hub, repo, info.sha, endpoint).get("sha256") == about["sha256"]:
            return None
        if there and not replace:
            raise UserError(
                f"{repo} holds another {' and '.join(sorted(there))} already; give another repo=..., or replace=true, "
                "which keeps what is there in the history alone"
            )
        own = [name for name in FILES if (folder / name).is_file()]
        changes = [hub.CommitOperationAdd(name, str(folder / name)) for name in own]
        changes += [hub.CommitOperationDelete(name) for name in sorted(there - set(own))]
        message = f"{about['kind']} of {about['card']['game']}, {about['sha256'][:12]}"
        # the parent says what has been looked at: another commit in between makes the hub refuse this one
        given = {"commit_message": message, "revision": revision, "parent_commit": info.sha}
        return api.create_commit(repo, changes, **given).commit_url


def pull(repo: str, out: str | Path, revision: str = "main", endpoint: str | None = None) -> bool:
    """Bring a model from the hub, its known files alone, whole or not at all.

    Args:
        repo: USER/NAME.
        out: a new or empty folder.
        revision: branch, tag or commit.
        endpoint: address of the hub; None is the library's own.

    Returns:
        False where this very model lies there already.

    Raises:
        UserError: there is no such model, its files are not what its model.json says, the folder holds something else,
            or the hub cannot be reached.
    """
    out, hub = on_disk(out), _library()
    with _told(repo, revision):
        info = hub.HfApi(endpoint=endpoint).model_info(repo, revision=revision)
        there = [name for name in FILES if name in {file.rfilename for file in info.siblings or []}]
        if not {ABOUT, WEIGHTS} <= set(there):
            raise UserError(f"{repo} on the hub is no model of this program: it has no {ABOUT} with {WEIGHTS}")
        if not vacant(out, _about(hub, repo, info.sha, endpoint)):
            return False
        make_folder(out.parent)
        with disk_errors(out), atomic(out) as tmp:
            for name in there:
                hub.hf_hub_download(repo, name, revision=info.sha, endpoint=endpoint, local_dir=tmp)
            shutil.rmtree(tmp / ".cache", ignore_errors=True)  # what the library notes of a download
            check_files(tmp)
    return True


def _about(hub: Any, repo: str, commit: str, endpoint: str | None) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        hub.hf_hub_download(repo, ABOUT, revision=commit, endpoint=endpoint, local_dir=folder)
        return read_about(Path(folder))


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            'the hub needs a library that is not installed: pip install "worldmodels[hub]" brings it'
        ) from error
    return huggingface_hub


@contextmanager
def _told(repo: str, revision: str) -> Iterator[None]:
    """Turn what the hub answers, and that it does not answer, into one sentence."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"repo={repo} is no name of a repository: give it as USER/NAME") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repo} has no revision={revision} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no {repo} on the hub, or it is not yours to see; log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        mend: dict[int, str] = {401: "log in with `hf auth login`, or set HF_TOKEN", 403: "its owner must let you"}
        mend |= dict.fromkeys((409, 412), "it was changed in the meantime: run the same command again")
        raise UserError(f"the hub refuses {repo} with code {code}; {mend.get(code, 'try again later')}") from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:  # pyrefly: ignore
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"the hub cannot be reached ({first}); what is here is as it was") from error
