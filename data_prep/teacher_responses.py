"""Let a model answer a file of prompts: the data of sequence-level distillation, never the ground truth.

    deepspeed --num_accelerators 2 --no_local_rank --module data_prep.teacher_responses \\
        --teacher DIR --data prompts.jsonl --out answered.jsonl --max-new-tokens 64

Each line of `--data` comes back with `output` set to the model's answer and `complete` to whether it ended by itself.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from data_prep.sources import find_files, parse_json, read_lines
from data_prep.templates import TEMPLATES, Malformed, parse, render
from distill.config import RolloutSettings
from distill.console import positive, quiet_libraries, run_on_ranks
from distill.data.loading import token_batch
from distill.errors import BadInput, Problem
from distill.evaluation.frozen import common_vocabulary, load_frozen
from distill.evaluation.generation import respond, response_tokens, share
from distill.models.loading import load_tokenizer
from distill.rollout.worker import RolloutWorker
from distill.topology import start


def read_prompts(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """The raw records and each one's prompt ids.

    Raises:
        BadInput: missing or malformed files, prompts too long, or no tokenizer.
    """
    tokenizer = load_tokenizer(args.teacher, "--teacher")
    if args.template == "chat" and not tokenizer.chat_template:
        raise BadInput(Problem("--template", "chat", "this tokenizer has no chat template", "use alpaca or plain"))
    records, prompts = [], []
    for path in find_files(args.data, "--data"):
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
        raise BadInput(Problem("--data", args.data, "holds blank lines only", "give one JSON object a line"))
    return records, prompts


def answer(args: argparse.Namespace) -> None:
    """Sample a response to every prompt, shared out over the ranks, and write them in the input's order."""
    records, prompts = read_prompts(args)
    topology = start()
    vocabulary = common_vocabulary([args.teacher])
    teacher = load_frozen(args.teacher, vocabulary, topology)
    greedy = 1 if args.greedy else 0
    settings = RolloutSettings(alpha=0, max_new_tokens=args.max_new_tokens, batch=args.batch, top_k=greedy)
    worker = RolloutWorker(teacher, None, settings, vocabulary.eos_ids, args.seed, topology)
    mine = share(len(records), topology)
    batch = token_batch([{"prompt_ids": prompts[index], "response_ids": []} for index in mine.indices])
    rollouts = respond(worker, batch, mine.indices, 0, "teacher responses", topology.is_writer)
    texts = vocabulary.tokenizer.batch_decode(response_tokens(rollouts), skip_special_tokens=True)
    answers = dict(zip(mine.indices, zip(texts, rollouts.ended.tolist(), strict=True), strict=True))
    everyone = {index: value for part in topology.gather_objects(answers) for index, value in part.items()}
    if topology.is_writer:
        for index, record in enumerate(records):
            record["output"], record["complete"] = everyone[index]
        _write_jsonl(args.out, records)
        print(f"{args.out}: {len(records)} responses")
    topology.barrier()


def _write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    partial.rename(path)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="Hugging Face folder or hub id")
    parser.add_argument("--data", nargs="+", required=True, help="jsonl files or globs, as for preprocess")
    parser.add_argument("--out", type=Path, required=True, help="jsonl file")
    parser.add_argument("--template", choices=TEMPLATES, default="alpaca")
    parser.add_argument("--max-prompt", type=positive, default=256, help="tokens")
    parser.add_argument("--max-new-tokens", type=positive, default=256)
    parser.add_argument("--batch", type=positive, default=32, help="rows decoded together on one rank")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token instead of sampling")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quiet_libraries()
    return run_on_ranks(lambda: answer(args))


if __name__ == "__main__":
    sys.exit(main())
