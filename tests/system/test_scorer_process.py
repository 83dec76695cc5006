"""The process in which a replica's models compute: what it takes, and what becomes of those who wait when it dies."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from rlhf_ray.config.serving import BatchingSettings, ServedModelSettings, ServedScorerSettings
from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.core.encoding import Encoded
from rlhf_ray.reward.core.scorer import RewardScorer
from rlhf_ray.reward.serve.batcher import MicroBatcher, ScoredBatch
from rlhf_ray.reward.serve.model_table import LoadedModel, ModelTable, Weights, read_table
from rlhf_ray.reward.serve.scorer_process import ScorerHost, ScorerProcess, reward_settings
from tests.planting import copied, edit_weights

SETTINGS = ServedScorerSettings(cpus=0.5)
DEADLY = 7


class Mortal(ScorerHost):
    """Dies of one token, as of a kernel that crashes."""

    def score(self, key: str, texts: Sequence[Encoded]) -> ScoredBatch:
        if any(DEADLY in token_ids for token_ids, _ in texts):
            os._exit(1)
        return super().score(key, texts)


Test = Callable[[ScorerProcess, MicroBatcher, LoadedModel], Awaitable[None]]


def run(path: Path, test: Test) -> None:
    async def main() -> None:
        process = ScorerProcess(SETTINGS, Mortal)
        batcher = MicroBatcher(
            BatchingSettings(wait_ms=50), lambda model, texts: process.score(model.key, texts), lambda record: None
        )
        model = read_table([ServedModelSettings(name="main", path=str(path))], SETTINGS, ModelTable(())).models[0]
        await process.load(model.weights)
        try:
            await asyncio.wait_for(test(process, batcher, model), 100)
        finally:
            await batcher.close()

    asyncio.run(main())


@pytest.mark.usefixtures("local_ray")
def test_one_text_that_kills_the_process_is_tried_twice_and_its_neighbours_are_scored(tiny: Path):
    path = tiny / "reward_model"
    sound = [[11, 12, 13, number] for number in range(20, 24)]
    expected = RewardScorer(reward_settings(SETTINGS, str(path))).score_tokens(sound).scores

    async def test(process: ScorerProcess, batcher: MicroBatcher, model: LoadedModel) -> None:
        texts = [*sound[:2], [11, DEADLY, 12], *sound[2:]]
        jobs = [asyncio.ensure_future(batcher.score(model, [(ids, False)])) for ids in texts]
        found = await asyncio.gather(*jobs, return_exceptions=True)
        error = found.pop(2)
        assert isinstance(error, ApiError)
        assert (error.type, error.index) == (ErrorType.UNSCORABLE, 0)
        scores = [each.rows[0][0].scores[each.rows[0][1]] for each in found if not isinstance(each, BaseException)]
        assert scores == expected.tolist()
        assert process.restarts == 2

    run(path, test)


@pytest.mark.usefixtures("local_ray")
def test_a_process_takes_only_the_weights_that_were_read_and_a_model_that_is_lost_answers_nothing(
    tiny: Path, tmp_path: Path
):
    path = copied(tiny / "reward_model", tmp_path / "model")

    async def test(process: ScorerProcess, batcher: MicroBatcher, model: LoadedModel) -> None:
        before = await batcher.score(model, [([11, 12], False)])
        edit_weights(path, lambda weights: {**weights, "score.weight": weights["score.weight"] * 2})
        other = Weights.read(str(path), "models.main.path")
        # What is in memory goes on, and is not what lies in the directory by now.
        again = await batcher.score(model, [([11, 12], False)])
        assert again.rows[0][0].scores == before.rows[0][0].scores
        with pytest.raises(RayTaskError, match="holds version"):
            await process.load(Weights(other.path, "a-version-of-before", ()))
        process.check([model.key, "another"])
        with pytest.raises(ApiError):
            await batcher.score(model, [([DEADLY], False)])
        with pytest.raises(ApiError, match="other weights"):
            process.check([model.key])
        with pytest.raises(ApiError) as caught:
            await batcher.score(model, [([11, 12], False)])
        assert caught.value.type is ErrorType.UNAVAILABLE
        await process.load(other)
        process.check([other.key])
        scored = (await process.score(other.key, [([11, 12], False)])).scored
        assert scored.version == other.version
        assert scored.scores[0] == pytest.approx(2 * before.rows[0][0].scores[0])

    run(path, test)
