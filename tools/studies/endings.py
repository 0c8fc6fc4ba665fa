"""Where responses end: how likely the teacher and a student find an end there, and where the response goes on.

python -m tools.studies.endings runs/studies/dolly/evaluation-1 dolly --responses teacher start kd minillm \\
  --scorers runs/studies/dolly/teacher/student runs/studies/dolly/start-1/student

Reads the first seed's responses of an evaluation. A model that is rewarded by log p − log q ends its responses no more
where the first scorer, the teacher, gives the end far less than it does itself.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill.console import positive, quiet_libraries
from distill.evaluation.prompt_sets import read_prompts
from distill.evaluation.suite import Suite
from distill.evaluation.table import EVALUATION, markdown
from distill.models.loading import load_tokenizer


class Response(NamedTuple):
    """One row of an answers file."""

    prompt_ids: list[int]
    ids: list[int]
    ended: bool


class Scored(NamedTuple):
    """What a model gives to responses, in nats; an entry a response."""

    end: list[float]
    """log p(end) where a response ends; without those that were cut."""
    elsewhere: list[float]
    """Mean p(end) where it goes on."""
    nll: list[float]
    """Mean −log p of its tokens, the end among them."""


@torch.no_grad()
def response_logprobs(model: PreTrainedModel, prompt_ids: list[int], ids: list[int]) -> Float[Tensor, "T vocabulary"]:
    """log p of every token at each place of a response; fp32."""
    logits = model(torch.tensor([prompt_ids + ids]), logits_to_keep=len(ids) + 1).logits
    return logits[0, :-1].float().log_softmax(-1)


def score(model: PreTrainedModel, responses: list[Response], eos: list[int]) -> Scored:
    """An end is any token of `eos`."""
    found = Scored([], [], [])
    for prompt_ids, ids, ended in responses:
        logprobs = response_logprobs(model, prompt_ids, ids)
        ends = logprobs[:, eos].logsumexp(-1)
        found.nll.append(-logprobs[range(len(ids)), ids].mean().item())
        if ended:
            found.end.append(ends[-1].item())
        if len(going_on := ends[:-1] if ended else ends):
            found.elsewhere.append(going_on.exp().mean().item())
    return found


def _responses(path: Path, prompts: list[list[int]], rows: int) -> tuple[list[Response], list[int]]:
    header, *lines = map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1])
    lines.sort(key=lambda line: line["row"])
    return [Response(prompts[line["row"]], line["ids"], line["ended"]) for line in lines[:rows]], header["eos"]


def _mean(values: list[float], digits: int) -> str:
    """With its standard error."""
    if len(values) < 2:
        return "–"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.{digits}f}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, help="folder of `python -m distill evaluate`")
    parser.add_argument("set", help="of the evaluation's suite")
    parser.add_argument("--responses", nargs="+", required=True, help="of these models of the evaluation")
    parser.add_argument("--scorers", nargs="+", required=True, help="folders of the models to ask")
    parser.add_argument("--rows", type=positive, default=100, help="the first so many")
    args = parser.parse_args()
    quiet_libraries()
    suite = Suite.model_validate(json.loads((args.evaluation / EVALUATION).read_text(encoding="utf-8"))["suite"])
    prompts = read_prompts(args.set, suite.sets[args.set], suite, load_tokenizer(args.scorers[0], "--scorers"))
    table = [["responses of", "asked", "ended", "log p(end) at the end", "p(end) elsewhere", "−log p a token"]]
    models = {
        Path(folder): AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
        for folder in args.scorers
    }
    for name in args.responses:
        path = args.evaluation / name / f"{args.set}.seed-{suite.seeds[0]}.jsonl"
        responses, eos = _responses(path, prompts.prompt_ids, args.rows)
        for folder, model in models.items():
            found = score(model, responses, eos)
            figures = [_mean(found.end, 1), _mean(found.elsewhere, 4), _mean(found.nll, 2)]
            table.append([name, str(folder), f"{len(found.end)} of {len(responses)}", *figures])
    print(markdown(table))


if __name__ == "__main__":
    main()
