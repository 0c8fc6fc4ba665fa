"""The student as a Hugging Face folder, replaced at once."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from distill.checkpoint.disk import sync_file
from distill.data.folders import recover_folder, replace_folder
from distill.engine import Engine
from distill.whereabouts import here

STUDENT = "student"
_LOOK_SECONDS = 5.0


def write_student(folder: Path, student: Engine, tokenizer: PreTrainedTokenizerBase, card: str) -> str | None:
    """Put the student into `folder/student`, replacing what is there at once. Collective.

    Returns what the disk refused, if it did: then the old one is still there. The same on every rank.
    """
    weights, error = student.state_dict(), None
    if student.topology.is_writer:
        partial = folder / f"{STUDENT}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            with _watched(partial):
                student.module.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
            (partial / "README.md").write_text(card, encoding="utf-8")
            for path in partial.iterdir():
                sync_file(path)
            replace_folder(partial, folder / STUDENT)
        except (OSError, RuntimeError) as caught:
            # safetensors has an error of its own for what the system says.
            if not isinstance(caught, OSError) and "os error" not in str(caught).lower():
                raise
            shutil.rmtree(partial, ignore_errors=True)
            error = str(caught)
    return student.topology.gather_objects(error)[0]


def recover_student(folder: Path) -> None:
    """Put a student back that a kill has left set aside."""
    shutil.rmtree(folder / f"{STUDENT}.partial", ignore_errors=True)
    recover_folder(folder / STUDENT)


@contextmanager
def _watched(folder: Path) -> Iterator[None]:
    """While the block lasts, it is progress if the files in `folder` grow: a library writes them, for minutes."""
    done = threading.Event()

    def look() -> None:
        before = 0
        while not done.wait(_LOOK_SECONDS):
            with suppress(OSError):  # a file may just get its name
                now = sum(path.stat().st_size for path in folder.iterdir())
                if now != before:
                    before = now
                    here.tick()

    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        done.set()
