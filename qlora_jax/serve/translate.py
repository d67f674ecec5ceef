"""Between requests and arrays: what the device is told of rows, and a token as its request wants to have it."""

from collections.abc import Mapping

import numpy as np

from qlora_jax.generation.sampling import RowSampling
from qlora_jax.serve.job import Job, Row
from qlora_jax.serve.programs import DRAWN_BEFORE, Rows, Scores
from qlora_jax.serve.request import Token
from qlora_jax.serve.runner import idle_rows


def inputs_of(rows: Mapping[int, Row], places: int, length: int) -> Rows:
    """What the device is told of rows by their places; the other places do nothing.

    Args:
      length: tokens that a row has room for.
    """
    given = idle_rows(places, length)
    for place, row in rows.items():
        assert row.job
        _fill(given, place, row, row.job)
    return given


def _fill(given: Rows, place: int, row: Row, job: Job) -> None:
    sampling: RowSampling = given.sampling
    given.tokens[place] = DRAWN_BEFORE if job.ahead else job.last
    given.lengths[place], given.counts[place] = len(row.tokens) + job.ahead, 1
    given.slots[place] = job.slot
    sampling.temperature[place] = job.request.sampling.temperature
    sampling.top_k[place], sampling.top_p[place] = job.request.sampling.top_k, job.request.sampling.top_p
    seed = job.request.seed % 2**64
    given.seeds[place] = (seed >> 32, seed & 0xFFFFFFFF)
    given.drawn[place], given.scored[place] = job.drawn + job.ahead, wants_scores(job)


def wants_scores(job: Job) -> bool:
    """Whether the request asks for log probabilities."""
    return job.request.top_logprobs is not None or job.request.score_prompt


def token_of(job: Job, token: int, scores: Scores, place: int) -> Token:
    """A token as its request wants to have it: with log probabilities, or without."""
    if not wants_scores(job):
        return Token(token)
    count = job.request.top_logprobs or 0
    ids, values = np.asarray(scores.top_ids[place, :count]), np.asarray(scores.top_logprobs[place, :count])
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(token, float(scores.logprobs[place]), top)
