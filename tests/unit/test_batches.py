"""Padding is a matter of lengths: cutting, joining, splitting and moving rows loses nothing."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.data.batches import Rollouts, concatenate
from distill.data.loading import token_batch
from distill.data.sampler import ShuffledStream

rows_of_ids = st.lists(
    st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.lists(st.integers(0, 9), min_size=1, max_size=6)),
    min_size=1,
    max_size=6,
)


def as_rollouts(rows: list[tuple[list[int], list[int]]]) -> Rollouts:
    batch = token_batch([{"prompt_ids": prompt, "response_ids": response} for prompt, response in rows])
    values = batch.response_mask * torch.arange(1.0, batch.response_ids.shape[1] + 1)
    return Rollouts(
        **batch.tensors(),
        behavior_logprobs=values,
        teacher_logprobs=-values,
        importance_weights=values / 2,
        from_teacher=values > 2,
        ended=batch.response_lengths > 3,
        teacher_hidden=values[..., None].expand(-1, -1, 3),
    )


def unpadded(batch: Rollouts) -> list[tuple[list[int], list[int], list[float]]]:
    out = []
    for row in range(len(batch)):
        prompt, response = int(batch.prompt_lengths[row]), int(batch.response_lengths[row])
        ids = batch.prompt_ids[row, batch.prompt_ids.shape[1] - prompt :].tolist()
        out.append((ids, batch.response_ids[row, :response].tolist(), batch.behavior_logprobs[row, :response].tolist()))
    return out


@given(rows_of_ids, st.integers(1, 4))
def test_split_and_concatenate_keep_every_row(rows: list, size: int) -> None:
    batch = as_rollouts(rows)
    assert [(prompt, response) for prompt, response, _ in unpadded(batch)] == [tuple(row) for row in rows]
    parts = batch.split(size)
    assert max(len(part) for part in parts) <= size
    assert unpadded(concatenate(parts)) == unpadded(batch)
    widths = [(part.prompt_ids.shape[1], part.response_ids.shape[1]) for part in parts]
    assert widths == [(int(p.prompt_lengths.max()), int(p.response_lengths.max())) for p in parts]


def test_model_inputs_count_real_tokens_only() -> None:
    batch = token_batch([{"prompt_ids": [5, 6, 7], "response_ids": [8]}, {"prompt_ids": [5], "response_ids": [8, 9]}])
    inputs = batch.model_inputs()
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 0], [0, 0, 5, 8, 9]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 3], [0, 0, 0, 1, 2]]


def test_id_zero_is_a_token_like_any_other() -> None:
    batch = token_batch([{"prompt_ids": [0, 0], "response_ids": [0, 0, 0]}])
    assert batch.response_mask.tolist() == [[True, True, True]]


def test_fields_that_are_not_filled_stay_so() -> None:
    batch = as_rollouts([([1], [2, 3]), ([1, 2], [3])])
    bare = replace(batch, teacher_hidden=None)
    assert bare.rows([1]).teacher_hidden is None
    assert concatenate(bare.split(1)).teacher_hidden is None


def test_stream_visits_every_record_once_an_epoch_and_ranks_share_a_batch() -> None:
    stream = ShuffledStream(10, seed=4)
    first, second = stream.take(0, 10), stream.take(10, 10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    dealt = [stream.take(7, 6, rank, 3) for rank in range(3)]
    assert [index for turn in zip(*dealt, strict=True) for index in turn] == stream.take(7, 6)
    assert ShuffledStream(10, seed=5).take(0, 10) != first
    assert ShuffledStream(10, seed=4).at(13) == second[3]
