"""What the repository's code never does, read from its syntax, and how it opens what others wrote."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.config import ModelSettings
from distill.errors import BadInput, Problem
from distill.models.loading import load_config, load_model, load_tokenizer
from distill.models.weights import check_weights

ROOT = Path(__file__).resolve().parents[2]
OURS = [path for name in ("distill", "data_prep", "tools") for path in sorted((ROOT / name).rglob("*.py"))]
ALL = [*OURS, *sorted((ROOT / "tests").rglob("*.py"))]
assert OURS
assert len(ALL) > len(OURS)


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file, by the name that stands there."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(given.value) for given in call.keywords if given.arg == name), None)


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_no_text_is_run() -> None:
    forbidden = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput"}
    for path in ALL:
        for name, call in calls(path):
            assert name not in forbidden, f"{path}:{call.lineno}"
            assert keyword(call, "shell") in (None, "False"), f"{path}:{call.lineno}"


def test_no_pickle_is_read_but_tensors() -> None:
    """And no archive is unpacked: pip alone does that, for the demo."""
    for path in ALL:
        assert imports(path).isdisjoint({"pickle", "dill", "cloudpickle", "shelve", "joblib", "marshal"}), path
        assert imports(path).isdisjoint({"tarfile", "zipfile", "py7zr"}), path
        for name, call in calls(path):
            assert name != "shutil.unpack_archive", f"{path}:{call.lineno}"
            if name == "torch.load" or (name == "AutoModelForCausalLM.from_pretrained" and path.name == "loading.py"):
                assert keyword(call, "weights_only") == "True", f"{path}:{call.lineno}"


def test_yaml_is_loaded_safely() -> None:
    for path in ALL:
        for name, call in calls(path):
            assert name not in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"), (
                f"{path}:{call.lineno}"
            )
    loaders = [
        node
        for path in OURS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and any("Loader" in ast.unparse(base) for base in node.bases)
    ]
    assert [ast.unparse(loader.bases[0]) for loader in loaders] == ["yaml.SafeLoader"]


def test_code_of_models_runs_only_where_it_is_asked_for() -> None:
    """Left out, transformers would ask at the terminal."""
    seen = 0
    for path in OURS:
        for name, call in calls(path):
            if (
                not name.endswith((".from_pretrained", "AutoModelForCausalLM.from_config"))
                or "GenerationConfig" in name
            ):
                continue
            seen += 1
            asked = keyword(call, "trust_remote_code")
            allowed = {"False", "trusted", "trust_remote_code", "settings.trust_remote_code"}
            of_checked = name.endswith("from_config") and path.name == "shapes.py"  # whose code came with load_config
            assert asked in allowed or of_checked, f"{path}:{call.lineno}"
    assert seen >= 8


def test_files_get_the_rights_that_the_umask_says() -> None:
    for path in OURS:
        for name, call in calls(path):
            assert name not in ("tempfile.mkstemp", "tempfile.NamedTemporaryFile", "os.umask"), f"{path}:{call.lineno}"
            if name.endswith("chmod"):
                assert path.name == "folders.py", f"{path}:{call.lineno}"


def pickled(models_dir: Path, folder: Path, content: Any) -> Path:
    for path in (models_dir / "student").iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save(content, folder / "pytorch_model.bin")
    return folder


class Harmful:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_pickles_are_read_where_they_are_allowed_and_run_nothing_even_there(models_dir: Path, tmp_path: Path) -> None:
    weights = load_file(models_dir / "student" / "model.safetensors")
    folder = pickled(models_dir, tmp_path, weights)
    settings = ModelSettings(path=str(folder))
    with pytest.raises(BadInput, match="pickles only"):
        check_weights(folder, settings, "student.path")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load_model(settings, torch.float32)
    allowed = ModelSettings(path=str(folder), allow_pickle=True)
    check_weights(folder, allowed, "student.path")
    loaded = load_model(allowed, torch.float32).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    mark = tmp_path / "PWNED"
    pickled(models_dir, tmp_path, weights | {"x": Harmful(mark)})
    with pytest.raises(Exception, match=r"(?i)weights_only|unpickl"):
        load_model(allowed, torch.float32)
    assert not mark.exists()


def test_code_beside_a_model_does_not_run(models_dir: Path, tmp_path: Path) -> None:
    mark = tmp_path / "PWNED"
    for path in (models_dir / "student").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name, kind in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        text = (tmp_path / name).read_text().rstrip().removesuffix("}")
        target = '"evil.Evil"' if kind == "AutoConfig" else '["evil.Evil", null]'
        (tmp_path / name).write_text(f'{text}, "auto_map": {{"{kind}": {target}}}}}')
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    # A known architecture is opened by transformers' own code, whatever lies beside it.
    load_config(ModelSettings(path=str(tmp_path)), "student.path")
    load_tokenizer(str(tmp_path), "student.path")
    load_model(ModelSettings(path=str(tmp_path)), torch.float32)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("problem", "hidden"),
    [
        (Problem("log.api_key", "abcdef", "unknown key", "known: every"), "abcdef"),
        (Problem("log.hf-token", "abcdef", "unknown key", "known: every"), "abcdef"),
        (Problem("student.path", "https://me:abcdef@host/x", "is an address", "give a path"), "abcdef"),
        (Problem("--teacher", "x", "not fetched (at http://u:abcdef@proxy:1)", "see HF_TOKEN"), "abcdef"),
    ],
)
def test_a_message_repeats_no_secret(problem: Problem, hidden: str) -> None:
    assert hidden not in str(problem)
    assert "***" in str(problem)


def test_a_message_is_one_short_line_of_printable_text() -> None:
    said = str(Problem("a\nb\x1b[31m", "x" * 10_000, "wrong\r", "mend"))
    assert said.isprintable()
    assert len(said) < 400
    assert "max_new_tokens = 5" in str(Problem("rollout.max_new_tokens", 5, "too many", "give 4"))
