"""Turn a GGUF file into a Hugging Face folder, its quantised weights written out in bf16.

python -m tools.import_gguf model.gguf OUT
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from distill.data.folders import share_files
from distill.errors import EXIT_BAD_INPUT, BadInput, Problem


def import_gguf(file: Path, out: Path) -> None:
    """Read weights and tokenizer from `file`, write both to the new folder `out`.

    Raises:
        BadInput: no such file, one that cannot be read, or `out` exists.
    """
    if not file.is_file():
        raise BadInput(Problem("FILE", str(file), "no such file", "give the path of a .gguf file"))
    if out.exists():
        raise BadInput(Problem("OUT", str(out), "exists already", "remove it or name another"))
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise BadInput(Problem("FILE", str(file), "is no GGUF file", "give the path of a .gguf file"))
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        # A GGUF file has no code; the flag keeps that of a folder around it from being asked about.
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            **where,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            trust_remote_code=False,
        )
    # Of a damaged file gguf and transformers let any error through.
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        mend = "fetch it again, or take an architecture that transformers reads"
        raise BadInput(Problem("FILE", str(file), f"cannot be read ({said})", mend)) from None
    # Left in place it would make transformers take the plain weights for quantised ones.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    partial = out.with_name(out.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    share_files(partial)
    partial.rename(out)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="GGUF file of an architecture that transformers reads")
    parser.add_argument("out", type=Path, help="folder of the model, made new")
    args = parser.parse_args()
    try:
        import_gguf(args.file, args.out)
    except BadInput as error:
        print(f"import_gguf: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
