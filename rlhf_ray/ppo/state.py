"""What the loop itself must remember. Everything else follows from the seed, or is in the learners' checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field


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

    def advance(self, samples: int, tokens: int) -> None:
        """One more step is done."""
        self.step += 1
        self.samples += samples
        self.tokens += tokens
