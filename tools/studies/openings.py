"""First sentences of children's stories, for models that know nothing else: jsonl files of prompts that do not overlap.

python -m tools.studies.openings OUT --train 4096 --dev 128 --test 256
"""

import argparse
import itertools
import json
import random
from pathlib import Path

_BEGINNINGS = (
    "Once upon a time, there was a {adjective} {who} named {name}.",
    "One day, a {adjective} {who} named {name} went to the {place}.",
    "{name} was a {adjective} {who} who lived near the {place}.",
    "There was a {who} called {name} who loved the {place}.",
    "{name} the {who} found a {thing} at the {place}.",
    "One morning, {name} wanted to play with a {thing}.",
    "{name} and a {adjective} {who} walked to the {place} together.",
    "In a {adjective} little house lived a {who} with a {thing}.",
)
_WORDS = {
    "name": [
        "Anna",
        "Ben",
        "Clara",
        "Daisy",
        "Ella",
        "Finn",
        "Grace",
        "Hugo",
        "Jack",
        "Lily",
        "Max",
        "Nora",
        "Sam",
        "Tim",
    ],
    "who": ["girl", "boy", "dog", "cat", "bird", "rabbit", "bear", "mouse", "frog", "duck", "fish", "horse"],
    "adjective": [
        "happy",
        "sad",
        "brave",
        "shy",
        "kind",
        "curious",
        "small",
        "big",
        "clever",
        "lonely",
        "silly",
        "tired",
    ],
    "place": ["park", "forest", "beach", "garden", "school", "river", "market", "farm", "hill", "lake"],
    "thing": ["ball", "kite", "box", "book", "hat", "drum", "boat", "cake", "stone", "key", "bell", "balloon"],
}


def openings(count: int, seed: int) -> list[str]:
    """`count` different first sentences, in an order that the seed gives."""
    found = sorted(
        {
            beginning.format(**dict(zip(_WORDS, words, strict=True)))
            for beginning in _BEGINNINGS
            for words in itertools.product(*(_WORDS[kind] if f"{{{kind}}}" in beginning else ("",) for kind in _WORDS))
        }
    )
    return random.Random(seed).sample(found, count)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for train.jsonl, dev.jsonl and test.jsonl")
    sizes = {"train": 4096, "dev": 128, "test": 256}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    counts = {name: getattr(args, name) for name in sizes}
    texts = iter(openings(sum(counts.values()), seed=0))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, count in counts.items():
        lines = [json.dumps({"prompt": text}) + "\n" for text in itertools.islice(texts, count)]
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{args.out}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
