"""`rlhf-ray`, but the driver tries to fetch a rollout before its first step, and must not be able to."""

import os
from pathlib import Path

import ray

from rlhf_ray.cli import main
from rlhf_ray.models.buckets import UNTRAINED
from rlhf_ray.ppo.loop import PPO
from rlhf_ray.ppo.step import generate, plan_shards, score

train = PPO.train


def fetch_then_train(self: PPO) -> None:
    """Ask for one shard and its rewards, `ray.get` both, note what came of it, and go on as always."""
    prompts, config = self._inputs.prompts, self._config
    drawn = [(number, prompts[number]) for number in range(config.sampling.prompts_per_shard)]
    sampling = config.sampling.model_copy(update={"prompts_per_step": len(drawn)})
    [shard] = generate(self._roles, plan_shards(drawn, sampling, config.run.seed, "fetched"), drawn, UNTRAINED)
    [rewards] = score(self._roles, [shard])
    outcomes = []
    for stored in (shard.rollout, rewards):
        try:
            outcomes.append(f"fetched a {type(ray.get(stored.data.reference, timeout=120)).__name__}")
        except Exception as error:  # whatever Ray makes of it is the result
            outcomes.append(f"{type(error).__name__}: {error}")
    Path(os.environ["OUTCOMES"]).write_text("\n----\n".join(outcomes))
    train(self)


PPO.train = fetch_then_train  # type: ignore[method-assign]
main()
