"""Models of the hub: one rank of a host fetches them, all ranks open the folder where they lie.

Opened by its hub id, a model is asked for on the hub by every rank, file by file: hundreds of ranks are then refused.
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from huggingface_hub import snapshot_download

from distill.config import Config, ModelSettings
from distill.errors import BadInput, Problem
from distill.models.weights import check_weights, permission
from distill.rollcall import RollCall

# What transformers opens; the same weights in other formats, in subfolders or in one file more stay where they are.
_NEEDED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]
_PICKLED = ["pytorch_model*"]
_TWICE = ["*/*", "consolidated*"]

# Weights of a large model may be hours away.
_DOWNLOAD = timedelta(hours=24)

_folders: dict[str, str] = {}


def opened_at(path: str) -> str:
    """The folder of a fetched model; any other path as it is."""
    return _folders.get(path, path)


def bring(models: Mapping[str, ModelSettings], roll: RollCall) -> None:
    """Fetch what of `models` (by setting) lies on the hub, once a host, and open it from there.

    All hosts get one revision. From here on nothing asks the hub. Collective.

    Raises:
        BadInput: the hub does not give a model, or gave hosts different revisions.
    """
    wanted = {field: model for field, model in models.items() if not Path(model.path).exists()}
    roll.in_turn(lambda: fetch(wanted), patience=_DOWNLOAD)
    roll.compare(roll.together(lambda: use_fetched(wanted)))


def models_of(config: Config) -> dict[str, ModelSettings]:
    """The models that a run opens, by setting."""
    models = {"student.path": config.student}
    if config.teacher is not None and config.objective.needs_teacher:
        models["teacher.path"] = config.teacher
    return models


def fetch(wanted: Mapping[str, ModelSettings]) -> None:
    """Bring hub models to this host, by setting; nothing where they are here already.

    Raises:
        BadInput: the hub does not give it, or not as safetensors, where nobody allowed pickles; names the setting.
    """
    for field, model in wanted.items():
        try:
            folder = Path(snapshot_download(model.path, allow_patterns=_NEEDED, ignore_patterns=_TWICE))
            safe = any(folder.glob("*.safetensors"))
            if model.allow_pickle and not safe:
                snapshot_download(model.path, allow_patterns=_NEEDED + _PICKLED, ignore_patterns=_TWICE)
        except (OSError, ValueError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            mend = "see that this host reaches the hub and HF_TOKEN is set for a gated model, or give a folder"
            raise BadInput(Problem(field, model.path, f"not fetched from the hub ({said})", mend)) from None
        if not (safe or model.allow_pickle):
            wrong = "the hub has no safetensors of it"
            raise BadInput(Problem(field, model.path, wrong, f"take another, or {permission(field)}"))
        check_weights(folder, model, field)


def use_fetched(wanted: Mapping[str, ModelSettings]) -> dict[str, str]:
    """From now on open fetched models from this host's folders, without the hub; each one's revision, by setting."""
    revisions = {}
    for field, model in wanted.items():
        folder = snapshot_download(model.path, allow_patterns=_NEEDED, ignore_patterns=_TWICE, local_files_only=True)
        _folders[model.path], revisions[field] = folder, Path(folder).name
    return revisions
