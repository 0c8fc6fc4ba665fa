"""Let a model answer a file of prompts: the data of sequence-level distillation, never the ground truth.

    deepspeed --num_accelerators 2 --no_local_rank --module data_prep.teacher_responses \\
        --teacher DIR --data train.jsonl dev.jsonl --greedy-data test.jsonl --out answered --max-new-tokens 64

Every file comes back in the folder `--out`, each line with `output` set to the model's answer, `complete` to
whether it ended by itself, and `written_by` to the model.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from data_prep.sources import find_files
from distill.config import RolloutSettings, model_at
from distill.console import leave, positive, quiet_libraries, run_on_ranks
from distill.data.jsonl import parse_json, read_lines
from distill.data.loading import token_batch
from distill.data.templates import TEMPLATES, Malformed, parse, render
from distill.errors import BadInput, Problem
from distill.evaluation.frozen import Vocabulary, common_vocabulary, load_frozen
from distill.evaluation.generation import respond, response_tokens, share
from distill.models.downloads import bring
from distill.models.loading import load_tokenizer
from distill.rollcall import assemble
from distill.rollout.ends import EndIds
from distill.rollout.worker import RolloutWorker
from distill.topology import Topology, start


@dataclass(frozen=True)
class PromptFile:
    """One input file: where its answers go, its records as they stand, and each one's prompt ids."""

    out: Path
    records: list[dict[str, Any]]
    prompts: list[list[int]]


def read_files(args: argparse.Namespace) -> tuple[list[PromptFile], list[PromptFile]]:
    """The files of `--data` and of `--greedy-data`.

    Raises:
        BadInput: missing or malformed files, prompts too long, no tokenizer, or answers that would replace a file
            given or each other.
    """
    tokenizer = load_tokenizer(args.teacher, "--teacher")
    if args.template == "chat" and not tokenizer.chat_template:
        raise BadInput(Problem("--template", "chat", "this tokenizer has no chat template", "use alpaca or plain"))
    if not (args.data or args.greedy_data):
        raise BadInput(Problem("--data", None, "nothing to answer", "give --data or --greedy-data"))
    sampled = find_files(args.data, "--data") if args.data else []
    greedy = find_files(args.greedy_data, "--greedy-data") if args.greedy_data else []
    taken = {path.resolve() for path in (*sampled, *greedy)}
    for path in (*sampled, *greedy):
        out = (args.out / path.name).resolve()
        if out in taken:
            wrong = f"the answers to {path} would replace a file given or the answers to another"
            raise BadInput(Problem("--out", str(args.out), wrong, "name another folder, or rename the file"))
        taken.add(out)
    return [_read(path, args, tokenizer) for path in sampled], [_read(path, args, tokenizer) for path in greedy]


def _read(path: Path, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PromptFile:
    records, prompts = [], []
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        record = parse_json(line, where)
        try:
            ids = render(parse(record, where), args.template, tokenizer)
        except Malformed as error:
            raise BadInput(Problem("--data", where, str(error), "correct the line")) from None
        if len(ids) > args.max_prompt:
            raise BadInput(Problem("--data", where, f"{len(ids)} prompt tokens", "raise --max-prompt or drop it"))
        records.append(record)
        prompts.append(ids)
    if not records:
        raise BadInput(Problem("--data", str(path), "holds blank lines only", "give one JSON object a line"))
    return PromptFile(args.out / path.name, records, prompts)


def answer(args: argparse.Namespace) -> None:
    """Answer all prompts, shared out over the ranks, and write each file's in its order."""
    model = model_at(args.teacher, "--teacher", args.allow_pickle)
    roll = assemble()  # to the end: other ranks read from rank 0's store when it has gone on
    bring({"--teacher": model}, roll)
    sampled, greedy = read_files(args)
    topology = start()
    vocabulary = common_vocabulary([model])
    for file in (*sampled, *greedy):
        vocabulary.known.require(file.prompts, "--data", file.out.name)
    teacher = load_frozen(model, vocabulary, topology)
    for files, top_k, what in ((sampled, 0, "sampled responses"), (greedy, 1, "greedy responses")):
        if files:
            settings = RolloutSettings(alpha=0, max_new_tokens=args.max_new_tokens, batch=args.batch, top_k=top_k)
            ends = EndIds(vocabulary.eos_ids, topology.device)
            worker = RolloutWorker(teacher, None, settings, ends, args.seed, topology)
            answers = _respond(worker, [ids for file in files for ids in file.prompts], vocabulary, topology, what)
            if topology.is_writer:
                _write(files, iter(answers), args.teacher)
    topology.barrier()


def _respond(
    worker: RolloutWorker, prompts: list[list[int]], vocabulary: Vocabulary, topology: Topology, what: str
) -> list[tuple[str, bool]]:
    """Text of every response, and whether it ended by itself. Collective."""
    mine = share(len(prompts), topology)
    batch = token_batch([{"prompt_ids": prompts[index], "response_ids": []} for index in mine.indices])
    rollouts = respond(worker, batch, mine.indices, 0, what, topology.is_writer)
    texts = vocabulary.tokenizer.batch_decode(response_tokens(rollouts), skip_special_tokens=True)
    answers = dict(zip(mine.indices, zip(texts, rollouts.ended.tolist(), strict=True), strict=True))
    everyone = {index: value for part in topology.gather_objects(answers) for index, value in part.items()}
    return [everyone[index] for index in range(len(prompts))]


def _write(files: list[PromptFile], answers: Iterator[tuple[str, bool]], teacher: str) -> None:
    for file in files:
        for record in file.records:
            record["output"], record["complete"] = next(answers)
            record["written_by"] = teacher
        _write_jsonl(file.out, file.records)
        print(f"{file.out}: {len(file.records)} responses")


def _write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    partial.rename(path)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="Hugging Face folder or hub id")
    parser.add_argument("--data", nargs="+", help="jsonl files or globs, as for preprocess; answers are sampled")
    parser.add_argument("--greedy-data", nargs="+", help="the same, answered by the likeliest token each time")
    parser.add_argument("--out", type=Path, required=True, help="folder for files of the same names")
    parser.add_argument("--template", choices=TEMPLATES, default="alpaca")
    parser.add_argument("--max-prompt", type=positive, default=256, help="tokens")
    parser.add_argument("--max-new-tokens", type=positive, default=256)
    parser.add_argument("--batch", type=positive, default=32, help="rows decoded together on one rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--allow-pickle", action="store_true", help="read weights that are not safetensors")
    args = parser.parse_args()
    quiet_libraries()
    return run_on_ranks(lambda: answer(args))


if __name__ == "__main__":
    leave(main())
