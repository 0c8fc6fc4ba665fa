"""Models of the hub: one rank of a host fetches them, all ranks open the folder where they lie.

Opened by its hub id, a model is asked for on the hub by every rank, file by file: hundreds of ranks are then refused.
"""

from pathlib import Path

from huggingface_hub import snapshot_download

from distill.config import Config
from distill.errors import BadInput, Problem

# What transformers opens; the same weights in other formats, in subfolders or in one file more stay where they are.
_NEEDED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]
_TWICE = ["*/*", "consolidated*"]

_folders: dict[str, str] = {}


def opened_at(path: str) -> str:
    """The folder of a fetched model; any other path as it is."""
    return _folders.get(path, path)


def fetch_models(config: Config) -> None:
    """Bring to this host what the run needs from the hub; nothing if it is here already, or only folders are named.

    Raises:
        BadInput: the hub does not give it; names the setting.
    """
    for field, path in _on_the_hub(config).items():
        try:
            snapshot_download(path, allow_patterns=_NEEDED, ignore_patterns=_TWICE)
        except (OSError, ValueError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            mend = "see that this host reaches the hub and HF_TOKEN is set for a gated model, or give a folder"
            raise BadInput(Problem(field, path, f"not fetched from the hub ({said})", mend)) from None


def use_fetched(config: Config) -> dict[str, str]:
    """From now on open fetched models from this host's folders, without the hub; each one's revision, by setting."""
    revisions = {}
    for field, path in _on_the_hub(config).items():
        folder = snapshot_download(path, allow_patterns=_NEEDED, ignore_patterns=_TWICE, local_files_only=True)
        _folders[path], revisions[field] = folder, Path(folder).name
    return revisions


def _on_the_hub(config: Config) -> dict[str, str]:
    models = {"student.path": config.student}
    if config.teacher is not None and config.objective.needs_teacher:
        models["teacher.path"] = config.teacher
    return {field: model.path for field, model in models.items() if not Path(model.path).exists()}
