"""`opd push RUN REPO`: upload a finished stage's model to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from opd.errors import ConfigError, RunError, nearest
from opd.files import expanded

# The HTTP client's own base of errors. Versions of huggingface_hub use different clients.
CLIENT_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
LARGE_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def push(
    run: str,
    repo: str,
    *,
    stage: str | None = None,
    adapter: bool = False,
    public: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None],
) -> None:
    """Upload the model of a run (its last finished stage, or `stage`), or a model's folder, to the repository `repo`.

    A new repository is private unless `public`; an existing one keeps its visibility. `dry_run` lists the files.
    The token is huggingface_hub's: HF_TOKEN, or that of `hf auth login`.

    Raises ConfigError for a wrong argument or a missing token, RunError if the hub cannot be reached or refuses.
    """
    folder = folder_of(expanded(run), stage, "adapter" if adapter else None)
    _check_repo(repo)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files:
        say(f"{_size(file.stat().st_size):>10}  {file.relative_to(folder)}")
    whole = f"{len(files)} files, {_size(sum(file.stat().st_size for file in files))}, of {folder}"
    if dry_run:
        say(f"{whole} would be uploaded to {constants.ENDPOINT}/{repo}. Nothing was sent.")
        return
    if get_token() is None:
        raise ConfigError(
            "opd push needs a token of the hub with write access, and found none. Set HF_TOKEN, or run `hf auth "
            "login`; --dry-run needs none."
        )
    api = HfApi(library_name="opd")
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message=f"Model of {run}, by opd push"
        )
    except OfflineModeIsEnabled as error:
        raise RunError(f"opd push: {error}") from error
    except HfHubHTTPError as error:
        why = str(error).strip().splitlines()
        raise RunError(
            f"opd push: the hub refused {repo} ({'; '.join(line for line in why if line)}). Check the repository's "
            "name, and that the token may write there."
        ) from error
    except (OSError, CLIENT_ERROR) as error:
        raise RunError(
            f"opd push: {constants.ENDPOINT} could not be reached, or the connection broke "
            f"({error or type(error).__name__}). Check the network, HF_ENDPOINT and HTTPS_PROXY; the same command "
            "continues."
        ) from error
    say(f"{whole}: uploaded to {commit.repo_url or url}")


def folder_of(run: Path, stage: str | None, kind: str | None) -> Path:
    """The model's folder in a run's folder, or `run` itself if it is one. Raises ConfigError."""
    if any((run / name).is_file() for name in ("config.json", "adapter_config.json")):
        if stage is not None or kind is not None:
            raise ConfigError(f"opd push: {run} is a model's folder, so leave out --stage and --adapter.")
        return run
    if not (run / "recipe.yaml").is_file():
        raise ConfigError(
            f"opd push: {run} is neither a run's folder (with recipe.yaml) nor a model's folder (with config.json)."
        )
    finished = sorted(run.glob("*/done.json"), key=lambda done: done.stat().st_mtime)
    names = [done.parent.name for done in finished]
    if stage is not None and stage not in names:
        raise ConfigError(
            f"opd push: {run} has no finished stage {stage!r}.{nearest(stage, names)} Finished: {names or 'none'}."
        )
    if not names:
        raise ConfigError(f"opd push: no stage of {run} has finished, and a stage writes its model when it ends.")
    chosen = run / (stage or names[-1])
    kinds = [kind] if kind else ["model", "adapter"]
    found = next((chosen / name for name in kinds if (chosen / name).is_dir()), None)
    if found is None:
        raise ConfigError(
            f"opd push: {chosen} has no {' and no '.join(kinds)} folder. A stage with `save: both` or `save: adapter` "
            "writes the adapter."
        )
    return found


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"opd push: {repo!r} cannot be a repository's name: {error} Give OWNER/NAME.") from error


def _size(count: int) -> str:
    for unit, name in LARGE_UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"
