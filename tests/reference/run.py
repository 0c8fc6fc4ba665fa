"""A whole run by the reference: every record of metrics.jsonl, and the weights after every step."""

import math
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from reference import feed, minillm, sampling
from reference.divergences import entropy, sorted_distance, taid, tempered
from reference.models import Model
from reference.optimizer import AdamW
from reference.texts import repetition, rouge_l

Records = list[dict[str, float]]
_FALLING = ("loss", "reverse_kl")
ONE_TOKEN = {
    "first_reward": "current",
    "gamma": 0.0,
    "whitening": "none",
    "reward_scale": 1.0,
    "weighted_single_step": True,
    "length_normalised": False,
    "single_step": False,
}
"""On-policy distillation as MiniLLM's policy gradient: the advantage of a token is its own log p − log q_old."""


class ReferenceRun:
    """Runs `config`, in which every knob that the objective reads is given, as `ranks` ranks would.

    The number of ranks and the micro-batch matter to one whitening alone.
    """

    def __init__(self, config: dict[str, Any], ranks: int = 1, dtype: torch.dtype = torch.float64):
        self.config, self.ranks, self.objective = config, ranks, config["objective"]
        if self.objective["name"] == "opd":
            self.objective = ONE_TOKEN | self.objective
        self.seed, self.dtype = config["run"]["seed"], dtype
        self.tokenizer = AutoTokenizer.from_pretrained(config["student"]["path"])
        self.eos = {self.tokenizer.eos_token_id}
        self.foreign = self.objective["name"] == "uld"
        paths = [config["student"]["path"], *([config["teacher"]["path"]] if "teacher" in config else [])]
        shared = paths[:1] if self.foreign else paths
        vocab = min([len(self.tokenizer), *(AutoConfig.from_pretrained(path).vocab_size for path in shared)])
        self.student = Model(paths[0], vocab, dtype)
        self.teacher: Model | None = None
        if self.foreign:
            self.their_tokenizer = AutoTokenizer.from_pretrained(paths[1])
            self.teacher = Model(paths[1], len(self.their_tokenizer), dtype)
        elif len(paths) > 1:
            self.teacher = Model(paths[1], vocab, dtype)
        self.optimizer = AdamW(self.student.parameters(), config["optim"])
        self.records = datasets.load_from_disk(config["data"]["train"])
        self.valid = datasets.load_from_disk(config["data"]["valid"]) if "valid" in config["data"] else None
        self.plain_text: feed.Recorded | None = None
        if "plain_text" in config["data"]:
            self.plain_text = feed.Recorded(datasets.load_from_disk(config["data"]["plain_text"]), config)
        self.feed = self._feed()
        self.t, self.momentum, self.last_loss = self.objective.get("start", 0.0), 0.0, None
        self.done, self.tokens = 0, 0
        self.weights: list[dict[str, Tensor]] = []
        self.drawn: list[sampling.Rollout] = []

    def run(self) -> Records:
        """All steps, with a validation where one is due; a record each."""
        found: Records = []
        every, steps = self.config["evaluation"]["every"], self.config["optim"]["steps"]
        while self.done < steps:
            found.append(self.step())
            if self.valid is not None and (self.done == steps or self.done % every == 0):
                found.append({"step": self.done, **self.validate(), "tokens/total": self.tokens})
        return found

    def best(self, records: Records) -> int:
        """The step whose student is kept: the first of the best validations, or the last step."""
        metric = self._metric()
        scored = [(row[f"valid/{metric}"], row["step"]) for row in records if f"valid/{metric}" in row]
        if not scored:
            return self.done
        sign = -1 if metric in _FALLING else 1
        return int(max(scored, key=lambda pair: (sign * pair[0], -pair[1]))[1])

    def step(self) -> dict[str, float]:
        """One optimizer step and its record."""
        step = self.feed.step(self.done)
        count = sum(len(row.response) for row in step.rows)
        total, sums = self._losses(step.rows)
        loss = total / count
        figures = {name: value / count for name, value in sums.items()}
        if self.plain_text is not None:
            texts = self.plain_text.step(self.done).rows
            lm = self._plain_text(texts) / sum(len(row.response) for row in texts)
            loss = loss + self.objective["lm_coef"] * lm
            figures["loss/lm"] = float(lm)
        parameters = self.student.parameters()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        adaptive = self._adaptive()
        norm, rate = self.optimizer.step({name: g.double() for name, g in zip(parameters, gradients, strict=True)})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.optimizer.masters[name])
        self.weights.append({name: p.detach().clone() for name, p in parameters.items()})
        self.done += 1
        self.tokens += count
        figures |= {"step": self.done, "loss/total": float(loss), "optim/grad_norm": norm, "optim/lr": rate}
        figures |= {"tokens/response": count, "tokens/total": self.tokens} | adaptive | self._rollout_figures(step)
        figures |= {"fault/skipped_steps": 0, "fault/skipped_in_a_row": 0}
        if self.teacher is not None:
            figures["teacher/forwards_per_token"] = 1
        if self.objective["name"] == "taid":
            self._advance_taid(figures["loss/taid"])
        return figures

    def _feed(self) -> Any:
        config, objective = self.config, self.objective
        name, records = objective["name"], self.records
        size = config["optim"]["batch_size"]
        if name == "distillm":
            return feed.Replay(records, config, self._draw, self.validation_loss)
        if name == "distillm2":
            return feed.Paired(records, config, self._draw)
        share = {"minillm": 1.0, "opd": 1.0}.get(name, objective.get("on_policy", 0.0))
        if share == 0:
            return feed.Recorded(records, config)
        rounds = feed.Rounds(records, config, self._draw, size)
        recorded = feed.Recorded(records, config, feed.chance.RECORDED_IN_MIX)
        return rounds if share == 1 else feed.Mixed(recorded, rounds, share, self.seed)

    def _draw(self, record: int, row: int, round_index: int) -> sampling.Rollout:
        rollout = self.config["rollout"]
        prompt = self.records[record]["prompt_ids"]
        teacher = None if self.foreign else self.teacher
        ends = self.eos | set(rollout["stop_ids"])
        found = sampling.sample(self.student, teacher, prompt, row, round_index, self.seed, rollout, ends)
        self.drawn.append(found)
        return found

    def _losses(self, rows: list[feed.Row]) -> tuple[Tensor, dict[str, float]]:
        """The summed loss of a step's rows, and the sums that its figures are made of."""
        if self.objective["name"] in ("minillm", "opd"):
            return self._policy_gradient(rows)
        parts = [self._row_loss(row) for row in rows]
        sums: dict[str, float] = {}
        for _, figures in parts:
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + value
        return torch.stack([total for total, _ in parts]).sum(), sums

    def _policy_gradient(self, rows: list[feed.Row]) -> tuple[Tensor, dict[str, float]]:
        rollouts = [row.rollout for row in rows if row.rollout is not None]
        micro_batch = self.config["optim"]["micro_batch"]
        table = minillm.advantages(rollouts, self.objective, self.ranks, micro_batch)
        total, sums = torch.zeros((), dtype=torch.float64), dict.fromkeys(minillm.FIGURES, 0.0)
        for rollout, advantage in zip(rollouts, table, strict=True):
            student = self.student.response_logits(rollout.prompt, rollout.response)
            teacher = self._teacher_logits(rollout.prompt, rollout.response)
            part, figures = minillm.loss(rollout, advantage, student, teacher, self.objective)
            total, sums = total + part, {name: sums[name] + figures[name] for name in sums}
        return total, sums

    def _row_loss(self, row: feed.Row) -> tuple[Tensor, dict[str, float]]:
        knobs, name = self.objective, self.objective["name"]
        student = self.student.response_logits(row.prompt, row.response)
        ce = -student.log_softmax(-1)[range(len(row.response)), row.response].sum()
        if name in ("sft", "seqkd"):
            return ce, {"loss/sft": float(ce), "student/entropy": sum(entropy(z) for z in student)}
        if name == "uld":
            pairs = zip(student, self._translated_logits(row), strict=False)
            value, figure = torch.stack([sorted_distance(z, u) for z, u in pairs]).sum(), "loss/uld"
        else:
            teacher = self._teacher_logits(row.prompt, row.response)
            pairs = list(zip(student, teacher, strict=True))
            figure, values = self._divergence(pairs, row.rollout is not None)
            value = torch.stack(values).sum()
        if name == "distillm2":
            weight = knobs["beta"] if row.rollout is not None else 2 - knobs["beta"]
            return weight * value, {figure: float(value)}
        share = 0.0 if row.rollout is not None else knobs.get("ce_weight", 0.0)
        sums = {figure: float(value)} | ({"loss/ce": float(ce)} if share else {})
        return (1 - share) * value + share * ce, sums

    def _divergence(self, pairs: list[tuple[Tensor, Tensor]], is_sampled: bool) -> tuple[str, list[Tensor]]:
        knobs, name = self.objective, self.objective["name"]
        if name == "taid":
            return "loss/taid", [taid(z, u, self.t) for z, u in pairs]
        if name == "gkd":
            kind, given = "jsd", {"beta": knobs["beta"], "temperature": knobs["temperature"]}
        elif name == "distillm":
            kind, given = knobs["divergence"], {"alpha": knobs["alpha"]}
        elif name == "distillm2":
            kind, given = ("skew_rkl" if is_sampled else "skew_kl"), {"alpha": knobs["alpha"]}
        else:
            kind = knobs["divergence"]
            given = {key: knobs[key] for key in ("alpha", "beta", "mu", "temperature") if key in knobs}
        return f"loss/{kind}", [tempered(kind, z, u, **given) for z, u in pairs]

    def _plain_text(self, rows: list[feed.Row]) -> Tensor:
        soft, total = self.objective["lm_soft_weight"], torch.zeros((), dtype=torch.float64)
        for row in rows:
            log_q = self.student.response_logits(row.prompt, row.response).log_softmax(-1)
            p = self._teacher_logits(row.prompt, row.response).softmax(-1)
            hard = -log_q[range(len(row.response)), row.response].sum()
            total = total + (1 - soft) * hard - soft * (p * log_q).sum()
        return total

    def _teacher_logits(self, prompt: list[int], response: list[int]) -> Tensor:
        assert self.teacher is not None
        return sampling.no_gradient(self.teacher, prompt, response)

    def _translated_logits(self, row: feed.Row) -> Tensor:
        """A teacher with another tokenizer reads the same text in its own tokens, as many as the student's at most."""
        ours, theirs = self.tokenizer, self.their_tokenizer
        ended = row.response[-1] in self.eos
        text = ours.decode(row.response[:-1] if ended else row.response)
        response = theirs.encode(text, add_special_tokens=False) + ([theirs.eos_token_id] if ended else [])
        return self._teacher_logits(theirs.encode(ours.decode(row.prompt)), response[: len(row.response)])

    def _rollout_figures(self, step: feed.Step) -> dict[str, float]:
        rollouts = [row.rollout for row in step.rows if row.rollout is not None]
        found = {"rollout/distinct_4": sampling.distinct_4(step.fresh)} if step.fresh else {}
        if not rollouts:
            return found
        tokens = sum(len(one.response) for one in rollouts)
        weights = [weight for one in rollouts for weight in one.weights]
        return found | {
            "rollout/response_length": tokens / len(rollouts),
            "rollout/eos_rate": sum(one.ended for one in rollouts) / len(rollouts),
            "rollout/teacher_share": sum(sum(one.from_teacher) for one in rollouts) / tokens,
            "rollout/effective_sample_size": sampling.effective_sample_size(weights),
            "rollout/student_forwards_per_token": 1,
        }

    def _adaptive(self) -> dict[str, float]:
        found: dict[str, float] = {}
        if isinstance(self.feed, feed.Replay):
            found = self.feed.memory()
        if self.objective["name"] == "taid":
            found = {"t": self.t, "momentum": self.momentum}
            found |= {} if self.last_loss is None else {"loss": self.last_loss}
        return {f"adaptive/{name}": value for name, value in found.items()}

    def _advance_taid(self, loss: float) -> None:
        knobs, gain = self.objective, 0.0
        if self.last_loss is not None:
            fall = (self.last_loss - loss) / self.last_loss
            self.momentum = knobs["momentum"] * self.momentum + (1 - knobs["momentum"]) * fall
            gain = knobs["step_size"] / (1 + math.exp(-self.momentum)) * (1 - self.t)
        share = self.done / self.config["optim"]["steps"]
        line = knobs["start"] + (knobs["end"] - knobs["start"]) * share
        self.t, self.last_loss = min(knobs["end"], max(line, self.t + gain)), loss

    def _metric(self) -> str:
        metric = self.config["evaluation"]["metric"]
        if metric != "auto":
            return str(metric)
        return "rouge_l" if self.teacher is not None and not self.foreign else "loss"

    def _validation_rows(self) -> list[dict[str, Any]]:
        assert self.valid is not None
        return [self.valid[i] for i in range(min(len(self.valid), self.config["evaluation"]["prompts"]))]

    def validation_loss(self) -> float:
        """−log q per token of the recorded responses."""
        total, count = 0.0, 0
        for record in self._validation_rows():
            response = record["response_ids"]
            logits = sampling.no_gradient(self.student, record["prompt_ids"], response)
            total -= float(logits.log_softmax(-1)[range(len(response)), response].sum())
            count += len(response)
        return total / count

    def validate(self) -> dict[str, float]:
        """The figures of one validation: the student alone, at temperature 1, always with the same draws."""
        scores, found = self.teacher is not None and not self.foreign, {}
        if scores or self._metric() == "rouge_l":
            found = self._sampled_figures(scores)
        if self._metric() == "loss":
            found["loss"] = self.validation_loss()
        return {f"valid/{name}": value for name, value in found.items()}

    def _sampled_figures(self, scores: bool) -> dict[str, float]:
        rollout = self.config["rollout"] | {"alpha": 0.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        ends, rounds = self.eos | set(rollout["stop_ids"]), []
        for turn in range(self.config["evaluation"]["seeds"]):
            rows, nats, tokens = [], 0.0, 0
            for index, record in enumerate(self._validation_rows()):
                prompt = record["prompt_ids"]
                one = sampling.sample(self.student, None, prompt, index, turn, self.seed, rollout, ends)
                text = self.tokenizer.decode(one.response, skip_special_tokens=True)
                rows.append(
                    (rouge_l(text, record["references"]), len(one.response), repetition(one.response), one.ended)
                )
                tokens += len(one.response)
                if scores:
                    q = sampling.no_gradient(self.student, prompt, one.response)
                    p = self._teacher_logits(prompt, one.response)
                    nats += sum(float(tempered("reverse_kl", z, u)) for z, u in zip(q, p, strict=True))
            means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
            rounds.append([*means, *([nats / tokens] if scores else [])])
        names = ["rouge_l", "mean_length", "repetition", "ended", *(["reverse_kl"] if scores else [])]
        return {name: sum(column) / len(rounds) for name, column in zip(names, zip(*rounds, strict=True), strict=True)}
