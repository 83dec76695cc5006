"""`rlhf-ray`, with the faults that the variable `FAULTS` lists as JSON."""

import json
import os
from collections.abc import Callable
from typing import Any

from rlhf_ray.cli import main
from rlhf_ray.ppo import loop
from rlhf_ray.reward.core.source import RewardSource
from tests.faults import Fault, faulty, faulty_classes

FAULTS = [Fault(**each) for each in json.loads(os.environ["FAULTS"])]
constructor = RewardSource.constructor


def faulty_constructor(self: RewardSource, policy_model: str) -> Callable[[], Any]:
    return faulty(constructor(self, policy_model), "reward", FAULTS)


if __name__ == "__main__":
    loop.RoleClasses = lambda: faulty_classes(FAULTS)  # type: ignore[misc,assignment]
    RewardSource.constructor = faulty_constructor  # type: ignore[method-assign]
    main()
