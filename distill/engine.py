"""The only file that knows DeepSpeed's quirks: initialise, gather, forward, backward, step.

Also the only place that divides: losses arrive as sums and leave as means over the tokens of the whole step.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import deepspeed
import torch
from deepspeed.module_inject.layers import ColumnParallel, VocabParallelEmbedding
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.utils import groups
from jaxtyping import Float
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from distill.config import ModelSettings, OptimSettings
from distill.data.batches import TokenBatch
from distill.deepspeed_settings import fill_auto
from distill.host import freed_memory_returned
from distill.loss_scale import LossScale
from distill.models.dropout import train_without_dropout
from distill.models.heads import Finish, check_head, hidden_states, project, vocab_shard
from distill.models.loading import load_model
from distill.models.vocab_shard import VocabShard, gather_along
from distill.objectives.chunked import Evaluate, SumOverTokens, sum_over_hidden
from distill.objectives.terms import LossTerms
from distill.optim import parameter_groups, schedule
from distill.shards import Shards
from distill.topology import Topology

AtStates = Callable[[Tensor], Tensor]


class Engine:
    """A model under DeepSpeed. Without `optim` it is frozen: no gradient, no optimizer state.

    Initialise the student before the teacher: DeepSpeed's tensor-parallel group is set by the first.
    """

    def __init__(
        self,
        settings: ModelSettings,
        deepspeed_json: dict[str, Any],
        dtype: torch.dtype,
        topology: Topology,
        vocab: int,
        tp_size: int = 1,
        optim: OptimSettings | None = None,
        head_rows: int | None = None,
    ):
        self.topology, self.vocab = topology, vocab
        ds_config = fill_auto(deepspeed_json, dtype, optim)
        zero = dict(ds_config.get("zero_optimization", {}))
        if optim is None:
            # Stages 1 and 2 shard optimizer state and gradients: a frozen model has neither.
            zero = (
                {k: v for k, v in zero.items() if k != "offload_optimizer"} if zero.get("stage") == 3 else {"stage": 0}
            )
        ds_config["zero_optimization"] = zero
        with freed_memory_returned():
            model = _load(settings, dtype, ds_config, head_rows)
            if tp_size > 1:
                dealt_out = _can_deal_out_head(model)
                ds_config["tensor_parallel"] = {"autotp_size": tp_size, "vocab_parallel_lm_head": dealt_out}
            self._ds = _freeze(model, ds_config) if optim is None else self._train(model, ds_config, optim)
            self.loss_scale = LossScale(self._ds.optimizer) if optim and dtype == torch.float16 else None
            del model
            # Tensor parallelism leaves the weights it has replaced in reference cycles: a second copy of the shards,
            # for as long as the collector does not look that far.
            gc.collect()
            self.shard = vocab_shard(self.module, vocab)
            check_head(self.module, settings.path, vocab, topology, self.head_gathered())
            self._forget_order()  # no later forward calls the head as that one did
        self._at_states: AtStates = lambda states: states
        self._has_trained = False
        self._stop_before_logits()

    def _train(
        self, model: PreTrainedModel, ds_config: dict[str, Any], optim: OptimSettings
    ) -> deepspeed.DeepSpeedEngine:
        model.train()
        fused = self.topology.device.type == "cuda"
        given: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "weight_decay": 0.0}
        # torch's AdamW comes with its wheel. DeepSpeed would compile one of its own with nvcc when a run starts; it
        # insists on that where the optimizer's state lies in host memory.
        build: Callable[[Any], AdamW] | None = lambda groups: AdamW(groups, fused=fused, **given)  # noqa: E731
        if "offload_optimizer" in ds_config["zero_optimization"]:
            ds_config["optimizer"] = {"type": "AdamW", "params": given | {"betas": list(optim.betas)}}
            build = None
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model, optim.weight_decay),
            config=ds_config,
            optimizer=build,
            lr_scheduler=lambda optimizer: schedule(optimizer, optim),
        )
        _tell_norm(engine)
        if engine.autotp_size() > 1:
            # In fp32 ZeRO 1 and 2 look at the norm alone, which is not of all ranks of a replica: see `_nan_of_any`.
            engine.optimizer.check_grad_overflow = True
        return engine

    @property
    def module(self) -> PreTrainedModel:
        """The wrapped model."""
        return self._ds.module

    def loss(self, batch: TokenBatch, of: Callable[[SumOverTokens], LossTerms]) -> LossTerms:
        """What `of` makes of the response tokens of one forward, rows in order; it is given their sum over the head."""
        found: list[LossTerms] = []

        def at_head(states: Tensor) -> Tensor:
            found.append(of(lambda evaluate: self.module.get_output_embeddings()(states, evaluate)))
            return found[0].total

        total = self._forward(batch, at_head)
        return replace(found[0], total=total)

    @torch.no_grad()
    def hidden(self, batch: TokenBatch) -> Float[Tensor, "n hidden"]:
        """Final hidden states that predict every real response token, rows in order, N = number of those tokens."""
        return self._forward(batch, lambda states: states)

    def _forward(self, batch: TokenBatch, at_head: AtStates) -> Tensor:
        if torch.is_grad_enabled() and not self._has_trained:
            self._has_trained = True
            self._forget_order()
        window, mask = slice(batch.prompt_ids.shape[1] - 1, -1), batch.response_mask
        # Not an argument: DeepSpeed compares the arguments of tensor-parallel ranks, and pickles them for it.
        self._at_states = lambda states: at_head(states[:, window][mask])
        try:
            result: Tensor = self._ds(**batch.model_inputs())
        finally:
            self._at_states = lambda states: states  # lets go of the loss, and with it of its graph
        return result

    def _forget_order(self) -> None:
        """Let ZeRO-3 learn the order of the modules anew from the next forward.

        It fetches weights ahead in the order of the first forward. A head that was called there and is not called later
        would be on its way when it is gathered for the loss, which is an error. A first forward without a backward
        would leave it fetching each weight again in every backward to come.
        """
        offload = _parameter_offload(self._ds)
        if offload is not None and not offload.get_param_coordinator().is_invalid_trace():
            offload.get_param_coordinator()._invalidate_trace()

    def _stop_before_logits(self) -> None:
        """Let the model's forward hand its final hidden states to `_at_states`, and its head sum a loss over logits.

        Both stay calls of DeepSpeed's hooked modules: that is how ZeRO-3 fetches the head once, in the forward, and how
        the head's gradient finds its way to the shards, tied or not.
        """
        model, vocab, shard = self.module, self.vocab, self.shard
        head, finish = model.get_output_embeddings(), Finish.of(model)

        def forward(input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
            return self._at_states(hidden_states(model, input_ids, attention_mask, position_ids))

        def through_head(hidden: Tensor, evaluate: Evaluate) -> Tensor:
            # Each rank's part of the vocabulary has its own part of the states' gradient.
            hidden = hidden if shard.group is None else ColumnParallel.apply(shard.group, hidden)
            local = min(vocab - shard.start, len(head.weight))
            return sum_over_hidden(hidden, head.weight, head.bias, local, finish, evaluate, shard)

        model.forward, head.forward = forward, through_head

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """All parameters gathered once and DeepSpeed's hooks off: the plain model, for many forwards in a row."""
        offload = _parameter_offload(self._ds)
        if offload is None:
            yield self.module
            return
        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            _detach_hooks(offload)
            try:
                yield self.module
            finally:
                # Private in DeepSpeed, and the way its own users switch ZeRO-3 off for generation.
                offload._register_deepspeed_module(offload.module)

    @property
    def missing_bytes(self) -> int:
        """What this rank's shards lack of the whole model."""
        parameters: list[Any] = list(self.module.parameters())
        sharded = [p for p in parameters if hasattr(p, "ds_tensor") and not p.ds_persist]
        return sum((p.ds_numel - p.ds_tensor.numel()) * p.element_size() for p in sharded)

    @contextmanager
    def by_layer(self) -> Iterator[PreTrainedModel]:
        """The model under its hooks: each layer is fetched when it is called and let go after. The head stays."""
        head = list(self.module.get_output_embeddings().parameters())
        with self.head_gathered():
            sharded = [parameter for parameter in head if hasattr(parameter, "ds_active_sub_modules")]
            for parameter in sharded:
                # Seen as in use, tied embeddings do not take it along when they are let go.
                parameter.ds_active_sub_modules.add(_SAMPLING)
            try:
                yield self.module
            finally:
                for parameter in sharded:
                    parameter.ds_active_sub_modules.discard(_SAMPLING)

    @contextmanager
    def head_gathered(self) -> Iterator[None]:
        """The lm_head whole, as `head_logits` needs it. Collective."""
        head = list(self.module.get_output_embeddings().parameters())
        with deepspeed.zero.GatheredParameters(head, enabled=_parameter_offload(self._ds) is not None):
            yield

    @torch.no_grad()
    def head_logits(self, hidden: Float[Tensor, "n hidden"]) -> Float[Tensor, "n vocab"]:
        """Logits of final hidden states, within `head_gathered`. Never part of a gradient. Tensor-parallel ranks bring
        the same states."""
        return project(self.module, hidden, self.vocab)

    @contextmanager
    def head_over(self, shard: VocabShard) -> Iterator[Callable[[Float[Tensor, "n hidden"]], Float[Tensor, "n local"]]]:
        """Logits over `shard` of any states, which need not be those of the replica's other ranks. Collective.

        No communication but for the head's weight: ZeRO-3's gather, and an all-gather of the replica's parts where it
        is dealt out and `shard` is not.
        """
        head, finish, own = self.module.get_output_embeddings(), Finish.of(self.module), self.shard

        def rows(part: Tensor | None) -> Tensor | None:
            if part is None or shard == own:
                return part
            if own.group is None:
                return part[shard.start : shard.stop]
            return gather_along(part.detach(), head._partition_sizes, own.group, 0)

        with self.head_gathered():
            weight, bias, width = rows(head.weight), rows(head.bias), self.vocab - shard.start
            assert weight is not None

            @torch.no_grad()
            def logits(hidden: Float[Tensor, "n hidden"]) -> Float[Tensor, "n local"]:
                return finish.logits(torch.nn.functional.linear(hidden, weight, bias)[..., :width])

            yield logits

    def accumulate(self, total: Float[Tensor, ""], count: Float[Tensor, ""]) -> None:
        """Backward of total/count: a sum over this micro-batch, the token count of the whole optimizer step."""
        # DeepSpeed averages gradients over the replicas; times their number makes that the sum the totals ask for.
        self._ds.backward(total / count * self.topology.dp_size)

    def step(self) -> float:
        """Clip, update, advance the schedule. Returns the gradient's global norm before clipping.

        Where that is not finite nothing else changes on any rank, but for fp16's loss scale. The schedule goes by the
        steps, skipped or not: DeepSpeed would hold it back, at some stages and in some precisions.
        """
        if self.loss_scale:
            self.loss_scale.note()
        self._ds.step()
        if not self._ds.was_step_applied():
            self._ds.lr_scheduler.step()
        return float(self._ds.get_global_grad_norm() or 0.0)

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self._ds.get_lr()[0])

    def train(self, mode: bool = True, dropout: bool = True) -> None:
        """Switch between training and evaluation mode; `dropout` False trains without the model's dropout."""
        self._ds.train(mode)
        if mode and not dropout:
            train_without_dropout(self.module)

    @property
    def shards(self) -> Shards:
        """This rank's part of the weights and of the optimizer."""
        return Shards(self._ds, self.topology.rank_in_replica)

    @contextmanager
    def reloaded(self) -> Iterator[None]:
        """While its shards are replaced. Collective."""
        zero = self._ds.optimizer
        if self._ds.zero_optimization_stage() == 3:
            zero.checkpoint_event_prologue()  # nothing is gathered
        yield
        if self._ds.zero_optimization_stage() == 3:
            zero.checkpoint_event_epilogue()  # small weights are whole on every rank

    def state_dict(self) -> dict[str, Tensor] | None:
        """Whole weights on the CPU of rank 0, gathered a layer at a time; None on the other ranks. Collective."""
        if self._ds.zero_optimization_stage() == 3 or self._ds.autotp_size() > 1:
            return self._ds._consolidated_16bit_state_dict()
        return self.module.state_dict() if self.topology.is_writer else None


def _load(
    settings: ModelSettings, dtype: torch.dtype, ds_config: dict[str, Any], head_rows: int | None
) -> PreTrainedModel:
    # While this object lives, from_pretrained shards every weight over the ranks as it is read.
    sharding = HfDeepSpeedConfig(ds_config) if ds_config["zero_optimization"].get("stage") == 3 else None
    model = load_model(settings, dtype)
    if head_rows is not None and head_rows != model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(head_rows, mean_resizing=False)
    del sharding
    return model


def _can_deal_out_head(model: PreTrainedModel) -> bool:
    """Whether DeepSpeed can split the head over the vocabulary; it refuses one tied to an embedding that does more than
    look up, as Gemma's. That one every rank keeps whole."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:
        return True
    try:
        VocabParallelEmbedding.validate_embedding(embedding)
    except NotImplementedError:
        return False
    return True


def _freeze(model: PreTrainedModel, ds_config: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    # Tensor parallelism is a global of the process: left on, it would be the student's too, where that is whole.
    ours = groups.mpu
    try:
        engine, *_ = deepspeed.initialize(model=model.requires_grad_(False), config=ds_config)
    finally:
        groups.mpu = ours
    engine.eval()
    return engine


def _tell_norm(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let DeepSpeed keep the gradient's norm where no ZeRO and no scaled optimizer does: fp32 at stage 0.

    There it does not look whether the norm is finite either: without gradients the optimizer changes nothing.
    """

    def clip() -> None:
        parameters, most = list(engine.module.parameters()), engine.gradient_clipping()
        norm = clip_grad_norm_(parameters, most, mpu=engine.mpu)
        if engine.mpu is not None:
            norm = norm + _nan_of_any(parameters, engine.mpu.get_model_parallel_group())
        engine._global_grad_norm = norm
        if not norm.isfinite():
            engine.zero_grad()

    engine.clip_fp32_gradients = clip


def _nan_of_any(parameters: list[torch.nn.Parameter], ranks: Any) -> Tensor:
    """0, or NaN if a gradient is not finite on any of the ranks. Collective over them.

    Of the weights that tensor parallelism leaves whole DeepSpeed's norm takes the first rank's gradients alone.
    """
    spoilt = 0 * torch.stack([p.grad.sum() for p in parameters if p.grad is not None]).sum()
    deepspeed.comm.all_reduce(spoilt, group=ranks)
    return spoilt


def _parameter_offload(engine: deepspeed.DeepSpeedEngine) -> Any:
    """DeepSpeed's keeper of ZeRO-3 hooks and shards; None below stage 3."""
    if engine.zero_optimization_stage() != 3:
        return None
    return getattr(engine.optimizer, "parameter_offload", engine.optimizer)


# No module's id.
_SAMPLING = -1


def _detach_hooks(offload: Any) -> None:
    for parameter in offload.module.parameters():
        parameter.ds_active_sub_modules.clear()
    for hook in [*offload.forward_hooks, *offload.backward_hooks]:
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []
