"""Run by the DeepSpeed launcher from test_tensor_parallel.py on two ranks that share one replica.

deepspeed --num_accelerators 2 tests/ranks/tensor_parallel.py --local_rank=K MODELS OUT

For every model in the folder MODELS: what it says of a batch, whole in one process and split in two. For every loss:
its value, gradient and collectives, of whole logits and of two uneven parts of the vocabulary.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from over_logits import sum_over_logits
from pydantic import TypeAdapter

from distill import objectives
from distill.config import ModelSettings, OptimSettings
from distill.console import leave, quiet_libraries
from distill.data.batches import Rollouts, TokenBatch
from distill.engine import Engine
from distill.models.loading import load_model
from distill.models.vocab_shard import WHOLE, VocabShard
from distill.objective_settings import ObjectiveSettings
from distill.objectives.supervised import Sft
from distill.topology import Topology, start, stop

LOSSES = {
    "minillm": {"name": "minillm"},
    "minillm, paper": {"name": "minillm", "preset": "paper"},
    "opd": {"name": "opd"},
    "sft": {"name": "sft"},
    "taid": {"name": "taid"},
    "kd with ce": {"name": "kd", "divergence": "jsd", "ce_weight": 0.3, "temperature": 2.0},
} | {
    name: {"name": "kd", "divergence": name}
    for name in ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl", "tvd")
}
WIDTHS = (12, 9)
REAL_TOKENS = 97


def main() -> None:
    models, out = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    quiet_libraries()
    topology = start(2)
    found = {
        "losses": {name: of_loss(settings, topology) for name, settings in LOSSES.items()},
        "models": {folder.name: of_model(folder, topology) for folder in sorted(Path(models).iterdir())},
    }
    everyone = topology.gather_objects(found)
    if topology.is_writer:
        Path(out).write_text(json.dumps(everyone))
    stop()


def of_loss(settings: dict, topology: Topology) -> dict:
    """Largest differences from the loss of whole logits, and the calls of collectives."""
    vocab, group = sum(WIDTHS), topology.tp_group
    bound = [0, WIDTHS[0], vocab]
    mine = slice(*bound[topology.rank : topology.rank + 2])
    g = torch.Generator().manual_seed(5)
    student, teacher = (3 * torch.randn(7, vocab, generator=g, dtype=torch.float64) for _ in range(2))
    teacher[2, WIDTHS[0] :] = -torch.inf  # all of one rank's part is ruled out
    batch: TokenBatch = rollouts(g, vocab)
    if settings.get("ce_weight"):  # recorded responses have a ground truth
        batch = TokenBatch(batch.prompt_ids, batch.prompt_lengths, batch.response_ids, batch.response_lengths)
    values, gradients = [], []
    with counted() as calls:
        for columns, shard in ((slice(None), WHOLE), (mine, VocabShard(WIDTHS, topology.rank, group))):
            calls.clear()
            logits = student[:, columns].clone().requires_grad_()
            objective = objectives.build(TypeAdapter(ObjectiveSettings).validate_python(settings))
            (prepared,) = objective.prepare([batch], lambda value: value)
            terms = objective.loss(
                lambda evaluate, z=logits, of=shard: sum_over_logits(z, evaluate, of),
                teacher[:, columns].__getitem__,
                prepared,
            )
            terms.total.backward()
            values.append(torch.stack([terms.total.detach(), *(terms.metrics[name] for name in sorted(terms.metrics))]))
            gradients.append(logits.grad)
            calls_made = dict(calls)
    return {
        # Relative: what the teacher rules out costs a great lot.
        "value": float(((values[0] - values[1]).abs() / values[0].abs().clamp_min(1)).max()),
        "gradient": float((gradients[0][:, mine] - gradients[1]).abs().max() / gradients[0].abs().max()),
        "size": float(gradients[0].abs().max()),
        "calls": calls_made,
    }


def rollouts(g: torch.Generator, vocab: int) -> Rollouts:
    """Two responses of 4 and 3 tokens, ids of either part among them."""
    lengths = torch.tensor([4, 3])

    def each(low: float, high: float) -> Tensor:
        return torch.rand(2, 4, generator=g, dtype=torch.float64) * (high - low) + low

    return Rollouts(
        prompt_ids=torch.zeros(2, 1, dtype=torch.long),
        prompt_lengths=torch.ones(2, dtype=torch.long),
        response_ids=torch.tensor([[0, 11, 12, vocab - 1], [5, 20, 13, 0]]),
        response_lengths=lengths,
        behavior_logprobs=each(-4, -1),
        teacher_logprobs=each(-4, -1),
        importance_weights=each(0.5, 1.2),
        from_teacher=torch.zeros(2, 4, dtype=torch.bool),
        ended=torch.ones(2, dtype=torch.bool),
    )


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts torch's collectives, which run as ever."""
    calls: Counter[str] = Counter()
    names = [name for name in dir(dist) if name.startswith(("all_", "reduce", "gather", "broadcast", "scatter"))]
    plain = {name: getattr(dist, name) for name in names if callable(getattr(dist, name))}

    def counting(name: str) -> object:
        def call(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return plain[name](*args, **kwargs)

        return call

    for name in plain:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)


def of_model(folder: Path, topology: Topology) -> dict:
    """Loss, gradient norm and logits of one batch: of the plain model, and of the engine that splits it."""
    settings = ModelSettings(path=str(folder))
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, REAL_TOKENS, (2, 9), generator=g)
    batch = TokenBatch(ids[:, :4], torch.tensor([4, 3]), ids[:, 4:], torch.tensor([5, 2]))
    plain = load_model(settings, torch.float32)
    logits = plain(**batch.model_inputs()).logits[:, 3:-1][batch.response_mask][:, :REAL_TOKENS]
    loss = torch.nn.functional.cross_entropy(logits, batch.response_ids[batch.response_mask])
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()

    zero3 = {"zero_optimization": {"stage": 3}}
    optim = OptimSettings(lr=1e-3, batch_size=2, micro_batch=2, steps=1, clip_norm=1e9)
    engine = Engine(settings, zero3, torch.float32, topology, REAL_TOKENS, 2, optim)
    hidden = engine.hidden(batch)
    with engine.head_gathered():
        ours = engine.head_logits(hidden)
    engine.train()
    terms = engine.loss(batch, lambda student: Sft().loss(student, None, batch))
    tokens = torch.tensor(float(len(logits)))
    engine.accumulate(terms.total, tokens)
    return {
        "loss": [float(loss), float(terms.total / tokens)],
        "norm": [float(norm), engine.step()],
        "logits": float((ours - logits).abs().max().detach()),
    }


main()
leave(0)
