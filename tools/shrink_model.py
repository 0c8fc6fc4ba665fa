"""Cut a student out of a teacher: keep evenly spaced layers, the first and the last among them.

python -m tools.shrink_model TEACHER OUT --layers 10
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from distill.config import model_at
from distill.data.folders import share_files
from distill.errors import EXIT_BAD_INPUT, BadInput, Problem
from distill.models.loading import load_config, load_model, load_tokenizer
from distill.models.weights import check_weights


def evenly_spaced(total: int, keep: int) -> list[int]:
    """`keep` of `total` layer indices, the first and the last always among them.

    Raises:
        BadInput: fewer than 2 layers asked for, or more than there are.
    """
    if not 2 <= keep <= total:
        raise BadInput(Problem("--layers", keep, f"the model has {total} layers", f"give 2 to {total}"))
    return [round(index * (total - 1) / (keep - 1)) for index in range(keep)]


def shrink(model: PreTrainedModel, keep: int) -> PreTrainedModel:
    """The same model with `keep` of its layers; embeddings, norms and head stay. Changes `model` in place."""
    config = model.config
    decoder: Any = model.base_model
    if not hasattr(decoder, "layers"):
        wrong = f"{type(model).__name__} keeps its layers in a way this tool does not know"
        raise BadInput(Problem("TEACHER", config.model_type, wrong, "cut it by hand or take a Llama-like model"))
    kept = evenly_spaced(config.num_hidden_layers, keep)
    decoder.layers = torch.nn.ModuleList([decoder.layers[index] for index in kept])
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index  # the KV cache's slot
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    config.num_hidden_layers = keep
    return model


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="Hugging Face folder or hub id")
    parser.add_argument("out", type=Path, help="folder of the student, made new")
    parser.add_argument("--layers", type=int, required=True, help="layers to keep")
    parser.add_argument("--allow-pickle", action="store_true", help="read weights that are not safetensors")
    args = parser.parse_args()
    try:
        if args.out.exists():
            raise BadInput(Problem("OUT", str(args.out), "exists already", "remove it or name another"))
        settings = model_at(args.teacher, "TEACHER", args.allow_pickle)
        tokenizer = load_tokenizer(args.teacher, "TEACHER")
        evenly_spaced(load_config(settings, "TEACHER").get_text_config().num_hidden_layers, args.layers)
        if Path(args.teacher).is_dir():
            check_weights(Path(args.teacher), settings, "TEACHER")
        model = load_model(settings, "auto")
        partial = args.out.with_name(args.out.name + ".partial")
        shrink(model, args.layers).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        share_files(partial)
        partial.rename(args.out)
    except BadInput as error:
        print(f"shrink_model: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"{args.out}: {args.layers} layers, {model.num_parameters() / 1e6:.1f}M parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
