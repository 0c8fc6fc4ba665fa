"""Stages that all studies have: tokenising, training, answering, evaluating, by the commands of README.md."""

import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.stages import Stage

_RECIPES = Path("launch/recipes/studies")


@dataclass(frozen=True)
class Chain:
    """Stages below `folder`, with so many ranks."""

    folder: Path
    ranks: int

    def deepspeed(self, name: str) -> list[str]:
        """The launcher, with a port that stages which run side by side do not share."""
        port = 20000 + zlib.crc32(name.encode()) % 10000
        return ["deepspeed", "--quiet", "--num_accelerators", str(self.ranks), "--master_port", str(port)]

    def python(self, name: str, output: Path, *arguments: str) -> Stage:
        """A command of Python that makes one file or folder."""
        return Stage(name, [[sys.executable, *arguments]], [output])

    def cut(self, teacher: Path, out: Path, layers: int) -> Stage:
        """A student out of the teacher."""
        shrink = ("-m", "tools.shrink_model", str(teacher), str(out), "--layers", str(layers))
        return self.python(str(out.relative_to(self.folder)), out, *shrink)

    def answers(self, teacher: Path, template: str, new_tokens: int, files: list[Path], out: Path) -> Stage:
        """Sampled responses of the teacher."""
        command = [*self.deepspeed(str(out)), "--no_local_rank", "--module", "data_prep.teacher_responses"]
        command += ["--teacher", str(teacher), "--template", template, "--max-prompt", "1024", "--batch", "64"]
        command += ["--max-new-tokens", str(new_tokens), "--data", *map(str, files), "--out", str(out)]
        return Stage("the teacher answers", [command], [out / path.name for path in files], files)

    def records(self, tokenizer: Path, template: str, max_prompt: int, max_length: int, *files: Path) -> Stage:
        """Records beside jsonl files."""
        settings = [f"TOKENIZER={tokenizer}", f"TEMPLATE={template}", f"MAX_PROMPT={max_prompt}"]
        settings.append(f"MAX_LENGTH={max_length}")
        commands = [
            ["make", "--no-print-directory", "preprocess", f"DATA={path}", f"OUT={path.with_suffix('')}", *settings]
            for path in files
        ]
        return Stage(f"tokenise {files[0].parent.name}", commands, [path.with_suffix("") for path in files], files)

    def training(self, recipe: str, run: Path, *overrides: str) -> Stage:
        """A run by one of the studies' recipes."""
        path = _RECIPES / recipe
        command = [*self.deepspeed(str(run)), "launch/train.sh", "--config", str(path), f"run.folder={run}", *overrides]
        return Stage(str(run.relative_to(self.folder)), [command], [run], [path])

    def evaluation(self, suite: Path, runs: Mapping[str, Path], out: Path, *overrides: str) -> Stage:
        """The students of `runs`, and the suite's teacher."""
        command = [
            *self.deepspeed(str(out)),
            "--no_local_rank",
            "--module",
            "distill",
            "evaluate",
            "--suite",
            str(suite),
        ]
        command += [item for name, run in runs.items() for item in ("--model", f"{name}={run / 'student'}")]
        return Stage(str(out.relative_to(self.folder)), [[*command, "--out", str(out), *overrides]], [out], [suite])
