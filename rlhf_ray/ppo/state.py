"""What the loop itself must remember. Everything else follows from the seed, or is in the learners' checkpoints."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rlhf_ray.tracking.run_folder import CHECKPOINT_STATE, write_atomic


@dataclass
class LoopState:
    """The loop's position.

    Attributes:
        step: steps done; also the position in the prompts, whose order is a function of it, and the version of the
            policy's weights.
        samples, tokens: responses and response tokens since the run began.
        kl_controller: its state.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    kl_controller: dict[str, float] = field(default_factory=dict)

    def save(self, checkpoint: Path) -> None:
        """Written last: it makes the checkpoint a complete one."""
        write_atomic(checkpoint / CHECKPOINT_STATE, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, checkpoint: Path) -> LoopState:
        return cls(**json.loads((checkpoint / CHECKPOINT_STATE).read_text(encoding="utf-8")))
