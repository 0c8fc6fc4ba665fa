"""Folders of models and tokenizers."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from bad_inputs.case import Case, Place, cut, edit

_SAFE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def _changed(name: str, expected: str, change: Callable[[Path], object]) -> Case:
    """`student.path` with a change to its folder."""

    def command(place: Place) -> list[str]:
        folder = place.model()
        change(folder)
        return place.student(folder)

    return Case(name, f"student.path = 'GIVEN/student': {expected}", command)


def _config(**changes: object) -> Callable[[Path], object]:
    return lambda folder: edit(folder / "config.json", **changes)


def _sharded(*files: str, keep: bool = True) -> Callable[[Path], None]:
    """The weights behind an index that deals them out over `files`, which are one and the same."""

    def change(folder: Path) -> None:
        weights = load_file(folder / _SAFE)
        (folder / _SAFE).unlink()
        if keep:
            save_file(weights, folder / "part.safetensors")
        weight_map = {name: files[number % len(files)] for number, name in enumerate(weights)}
        (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return change


def _index(content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / _SAFE).unlink()
        (folder / _INDEX).write_text(content)

    return change


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / _SAFE), folder / "pytorch_model.bin")
    (folder / _SAFE).unlink()


def _promised(folder: Path) -> None:
    _sharded("part.safetensors")(folder)
    index = json.loads((folder / _INDEX).read_text())
    index["weight_map"]["model.no_such.weight"] = "part.safetensors"
    (folder / _INDEX).write_text(json.dumps(index))


def _longer_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(folder)


def _narrow_teacher(place: Place) -> list[str]:
    """A teacher with fewer rows than the tokenizer that it shares with the student."""
    folder = place.model("teacher")
    weights = load_file(folder / _SAFE)
    save_file(
        {name: weight[:300].clone() if len(weight) == 600 else weight for name, weight in weights.items()},
        folder / _SAFE,
    )
    edit(folder / "config.json", vocab_size=300)
    return place.doctor("rollout.stop_ids=[450]", teacher__path=str(folder))


def _own_code(folder: Path) -> None:
    edit(
        folder / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.M"},
    )
    (folder / "mine.py").write_text("open('PWNED', 'w')\n")


def _tokenizer_gone(folder: Path) -> None:
    for path in [*folder.glob("tokenizer*"), *folder.glob("special_tokens*")]:
        path.unlink()


def _no_end(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None)


def _other_family(place: Place) -> list[str]:
    folder = place.model("teacher")
    edit(folder / "tokenizer_config.json", eos_token="<|user|>")
    return place.doctor(teacher__path=str(folder))


def _pickled_and_allowed(place: Place) -> list[str]:
    folder = place.model()
    _pickled(folder)
    index = {"weight_map": {"a": "../../pytorch_model.bin"}}
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return place.doctor(student__path=str(folder), student__allow_pickle=True)


_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
MODELS = [
    Case("no such folder", "student.path = '/no/such': no such folder", lambda p: p.student(Path("/no/such"))),
    Case(
        "an empty folder",
        "student.path = 'GIVEN/empty': no readable model there",
        lambda p: p.student(p.file("empty/x", "").parent),
    ),
    Case(
        "a weights file",
        "student.path = 'GIVEN/a.safetensors': no readable model there",
        lambda p: p.student(p.file("a.safetensors", "x")),
    ),
    Case(
        "a GGUF file",
        "quantised weights, of which every rank would need all",
        lambda p: p.student(p.file("a.gguf", "GGUF")),
    ),
    _changed("no config", "no readable model there", lambda f: (f / "config.json").unlink()),
    _changed("half a config", "no readable model there", lambda f: cut(f / "config.json", 0.5)),
    _changed("a list as a config", "no readable model there", lambda f: (f / "config.json").write_text("[]")),
    _changed("no architecture", "no readable model there", _config(model_type=None, architectures=None)),
    _changed("an unknown architecture", "no readable model there", _config(model_type="no_such")),
    _changed("a word as a size", "no readable model there", _config(hidden_size="wide")),
    _changed("a negative size", "no readable causal language model there", _config(vocab_size=-5)),
    _changed(
        "a billion layers",
        "no readable causal language model there (1000000000 layers)",
        _config(num_hidden_layers=10**9),
    ),
    _changed("no causal model", "no readable causal language model there", _config(model_type="vit")),
    _changed(
        "code of its own",
        "its code comes with it and would be run; read it, then give student.trust_remote_code=true",
        _own_code,
    ),
    _changed(
        "a generation config that is none",
        "no readable generation_config.json there",
        lambda f: (f / "generation_config.json").write_text("{"),
    ),
    _changed("no tokenizer", "no readable tokenizer there", _tokenizer_gone),
    _changed("half a tokenizer", "no readable tokenizer there", lambda f: cut(f / "tokenizer.json", 0.5)),
    _changed("an empty tokenizer", "no readable tokenizer there", lambda f: (f / "tokenizer.json").write_text("{}")),
    _changed("a tokenizer without an end", "its tokenizer has no EOS", _no_end),
    _changed("no weights", "holds no weights (model.safetensors)", lambda f: (f / _SAFE).unlink()),
    _changed("half the weights", "model.safetensors is no whole safetensors file", lambda f: cut(f / _SAFE, 0.5)),
    _changed("empty weights", "model.safetensors is no whole safetensors file", lambda f: cut(f / _SAFE, 0)),
    _changed(
        "text as weights", "model.safetensors is no whole safetensors file", lambda f: (f / _SAFE).write_text("x" * 99)
    ),
    _changed(
        "a pointer as weights",
        "model.safetensors is no whole safetensors file (a pointer of git-lfs: `git lfs pull` fetches it)",
        lambda f: (f / _SAFE).write_bytes(_POINTER),
    ),
    _changed(
        "pickles",
        "its weights are pickles only (pytorch_model.bin), files that may run code when they are read; make "
        "safetensors of them, or give student.allow_pickle=true",
        _pickled,
    ),
    Case("allowed pickles of elsewhere", "pytorch_model.bin.index.json leads out of the folder", _pickled_and_allowed),
    _changed(
        "a missing shard",
        "b.safetensors, which model.safetensors.index.json names, is not there",
        _sharded("part.safetensors", "b.safetensors"),
    ),
    _changed(
        "a shard of elsewhere",
        "model.safetensors.index.json leads out of the folder, to 'GIVEN/student/../x.safetensors'",
        _sharded("../x.safetensors", keep=False),
    ),
    _changed(
        "an absolute shard",
        "model.safetensors.index.json leads out of the folder, to '/etc/passwd'",
        _sharded("/etc/passwd"),
    ),
    _changed("half an index", "model.safetensors.index.json is no index of weights", _index('{"weight_map": {')),
    _changed(
        "an index of a number", "model.safetensors.index.json is no index of weights", _index('{"weight_map": 3}')
    ),
    _changed("an index of nothing", "model.safetensors.index.json names no weights", _index('{"weight_map": {}}')),
    _changed("a broken promise", "part.safetensors lacks 'model.no_such.weight', which the index promises", _promised),
    _changed(
        "weights of elsewhere",
        "its config.json leads out of the folder, to '../x.safetensors'",
        _config(transformers_weights="../x.safetensors"),
    ),
    _changed(
        "a vocabulary of another size",
        "its embedding has the shape [600, 32], its config.json says [700, 32]",
        _config(vocab_size=700),
    ),
    _changed(
        "an end without a row",
        "its embedding has 600 rows, EOS '<|im_end|>' is id 600; resize the embedding",
        _longer_tokenizer,
    ),
    _changed(
        "an end without a row that the config names",
        "its config ends responses at the id 700, the tokenizer has the ids 0 to 599; correct eos_token_id in its",
        _config(eos_token_id=[0, 700]),
    ),
    Case(
        "records beyond the teacher's rows",
        ", the embedding of the teacher has rows for 0 to 299; resize the embedding",
        _narrow_teacher,
    ),
    Case(
        "a stop id beyond the teacher's rows",
        "rollout.stop_ids = [450]: the embedding of the teacher has rows for 0 to 299; give ids of that range",
        _narrow_teacher,
    ),
    Case("a teacher of another family", "its EOS is '<|user|>', the student's is '<eos>'", _other_family),
]
