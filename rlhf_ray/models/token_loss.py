"""From final hidden states to log-probs and a loss, without ever holding the logits of all positions.

With a vocabulary of 150,000 words the logits of 4,096 positions are 2.5 GB in float32, and a log-softmax with its
gradient needs several times that. Here the output projection runs over a chunk of positions at a time. A loss that is a
sum over tokens is known chunk by chunk, so the gradients of hidden states and weights are computed on the spot, from
the logits that are still there: nothing is computed twice, and the backward pass only hands the gradients on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

TokenObjective = Callable[[slice, torch.Tensor, torch.Tensor], torch.Tensor]
"""A loss that is a sum over tokens: of a slice of the batch's `[R]` predicted tokens, their log-probs and the entropies
of their distributions (nats, float32). It may be evaluated on any partition of the tokens."""


@dataclass(frozen=True)
class SequenceObjective:
    """A loss whose terms depend on the log-probs of a whole sequence, such as that of GSPO.

    A sequence may lie in several chunks, so its log-probs are computed first, without gradient: the projection runs
    twice.

    Attributes:
        given: the objective, from the `[R]` log-probs of the batch's predicted tokens.
    """

    given: Callable[[torch.Tensor], TokenObjective]


Objective = TokenObjective | SequenceObjective

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
"""Float32 logits of one chunk: enough rows to keep a matrix product efficient."""

_CHUNK_STEP = 64
"""Positions are filled up to a multiple of this, for the reason that `PackedBatch.filling` gives."""

_PROBES = (-60.0, -1.0, 0.5, 7.0, 300.0)


@dataclass(frozen=True)
class LogitTransform:
    """What an architecture does to its logits after the projection, and the sampling temperature.

    `cap · tanh(scale · z / cap) / temperature`, or `scale · z / temperature` without a cap.
    """

    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0

    @classmethod
    def of(cls, config: Any, temperature: float) -> LogitTransform:
        """From a transformers configuration: Granite's and Cohere's scales, Gemma 2's soft cap."""
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return cls(scale, getattr(config, "final_logit_softcapping", None), temperature)

    def apply_(self, logits: torch.Tensor) -> torch.Tensor:
        """In place."""
        if self.cap is None:
            factor = self.scale / self.temperature
            return logits if factor == 1.0 else logits.mul_(factor)
        return logits.mul_(self.scale / self.cap).tanh_().mul_(self.cap / self.temperature)

    def backward_(self, gradient: torch.Tensor, shifted: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
        """Gradient of the raw logits from that of the transformed ones, `shifted + highest`; both are used up."""
        if self.cap is not None:
            transformed = shifted.add_(highest)
            gradient.mul_(transformed.mul_(self.temperature / self.cap).square_().neg_().add_(1.0))
        factor = self.scale / self.temperature
        return gradient if factor == 1.0 else gradient.mul_(factor)


class ChunkedHead:
    """Takes the place of a language model's output projection.

    The model itself is run as it is, so whatever it does to its hidden states is done; only its projection is put off
    until the tokens are known whose log-probs are asked for. Calls go through the projection's module, whose hooks
    (ZeRO-3 gathers the weights there) therefore still act.

    Args:
        language_model: any `AutoModelForCausalLM`.
        temperature: logits are divided by it.
        float32_logits: compute the logits in float32 even if the weights are in bfloat16.
    """

    def __init__(self, language_model: Any, temperature: float, float32_logits: bool) -> None:
        self._float32 = float32_logits
        self.transform = LogitTransform.of(language_model.config, temperature)
        self._projection = language_model.get_output_embeddings()
        self._postponing = False
        self._postponed: torch.Tensor | None = None
        # Not known is what the model does to its logits; the first pass shows it.
        self._understood = isinstance(self._projection, nn.Linear)
        if self._understood:
            self._projection.forward = self._forward

    def __call__(
        self, language_model: Any, inputs: dict[str, Any], targets: torch.Tensor, objective: Objective | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | torch.Tensor:
        """See `PolicyModel.forward`.

        Args:
            inputs: of the model; with `logits_to_keep` only `[R]` positions reach the projection.
        """
        if self._understood:
            states = self._final_states(language_model, inputs)
            if states is not None:
                return self._projection(states, targets, objective)
        logits = language_model(**inputs).logits[0].float() / self.transform.temperature
        return _evaluated(logits, targets, objective)

    def _final_states(self, language_model: Any, inputs: dict[str, Any]) -> torch.Tensor | None:
        """`[R, H]` what the model gives to its projection; None for a model whose logits are not understood."""
        self._postponing = True
        try:
            shown = language_model(**inputs).logits
        finally:
            self._postponing = False
        states, self._postponed = self._postponed, None
        assert states is not None, "a causal language model calls its output projection"
        probes = shown.new_tensor(_PROBES, dtype=torch.float32)
        known = self.transform.apply_(probes.clone()) * self.transform.temperature
        if shown.shape != (1, 1, len(probes)) or not torch.allclose(shown.flatten().float(), known, rtol=1e-5):
            self._understood = False
            return None
        return states[0]

    def _forward(
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None, objective: Objective | None = None
    ) -> Any:
        if targets is not None:
            return self._chunked(hidden, targets, objective)
        if self._postponing:
            self._postponed = hidden
            return hidden.new_tensor(_PROBES, dtype=torch.float32)[None, None]
        weight, bias = self._projection.weight, self._projection.bias
        if not self._float32:
            return F.linear(hidden, weight, bias)
        return F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())

    def _chunked(self, hidden: torch.Tensor, targets: torch.Tensor, objective: Objective | None) -> Any:
        weight, bias = self._projection.weight, self._projection.bias
        head = _Head(weight.detach(), None if bias is None else bias.detach(), self.transform, self._float32)
        num_tokens = len(targets)
        filling = -num_tokens % head.step
        hidden, targets = F.pad(hidden, (0, 0, 0, filling)), F.pad(targets, (0, filling))
        if objective is None or isinstance(objective, SequenceObjective):
            with torch.no_grad():
                parts = [head.logprobs(hidden[part], targets[part]) for part in head.chunks(len(targets))]
                logprobs = torch.cat(parts)[:num_tokens]
            if objective is None:
                return logprobs
            objective = objective.given(logprobs)
        return _TokenLoss.apply(hidden, weight, bias, targets, num_tokens, head, objective, torch.is_grad_enabled())


class _Head:
    """Logits of some positions from a projection's weights.

    Args:
        weight: `[V, H]`.
        bias: `[V]` or None.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, transform: LogitTransform, float32: bool
    ) -> None:
        self._transform, self._bias = transform, bias
        self.weight = weight
        # A product of bfloat16 numbers is exact in float32. Where the device can sum it there, as a GPU does at full
        # speed, no float32 copy of the weights is needed.
        self._float32_sum = float32 and weight.dtype != torch.float32 and weight.device.type == "cuda"
        self._projected = weight.float() if float32 and not self._float32_sum else weight
        self._most = max(CHUNK_BYTES.get(weight.device.type, 128 << 20) // (4 * len(weight)), 1)
        self.step = min(_CHUNK_STEP, self._most)

    def chunks(self, num_positions: int) -> Iterator[slice]:
        """Slices of about equal length whose logits fit; multiples of `step`, if that is one."""
        steps, most = -(-num_positions // self.step), self._most // self.step
        size = -(-steps // -(-steps // most)) * self.step if steps else 1
        for start in range(0, num_positions, size):
            yield slice(start, min(start + size, num_positions))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[C, V]` float32, transformed and at the temperature."""
        if self._float32_sum:
            projected = torch.mm(hidden, self.weight.t(), out_dtype=torch.float32)
        else:
            projected = torch.mm(hidden.to(self._projected.dtype), self._projected.t()).float()
        if self._bias is not None:
            projected.add_(self._bias)
        return self._transform.apply_(projected)

    def logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`[C]` log-probs of the targets."""
        logits = self.logits(hidden)
        logits.sub_(logits.amax(-1, keepdim=True))
        chosen = logits.gather(-1, targets[:, None])[:, 0]
        return chosen - logits.exp_().sum(-1).log()

    def raw_gradient(
        self, chunk: _Chunk, targets: torch.Tensor, by_logprob: torch.Tensor | None, by_entropy: torch.Tensor | None
    ) -> torch.Tensor:
        """`[C, V]` gradient of the raw logits; uses up the chunk.

        With p = softmax(s): ∂ log p_t / ∂s = 1_t − p and ∂H / ∂s = −p (log p + H).
        """
        by_logprob = torch.zeros_like(chunk.entropy) if by_logprob is None else by_logprob
        slope, weighted = by_logprob, None
        if by_entropy is not None:
            slope = slope + by_entropy * (chunk.entropy - chunk.log_total)
            weighted = torch.mul(chunk.probabilities, chunk.shifted).mul_(by_entropy[:, None])
        gradient = chunk.probabilities.mul_(-slope[:, None])
        if weighted is not None:
            gradient.sub_(weighted)
        gradient.scatter_add_(1, targets[:, None], by_logprob[:, None])
        return self._transform.backward_(gradient, chunk.shifted, chunk.highest)


@dataclass(frozen=True)
class _Chunk:
    """Distributions of some positions.

    Attributes:
        shifted: `[C, V]` logits less their highest, so that no sum loses digits to a large offset.
        highest: `[C, 1]`.
        probabilities: `[C, V]`.
        log_total: `[C]` logarithm of the sum of exp(shifted).
        logprobs: `[C]` of the targets.
        entropy: `[C]`.
    """

    shifted: torch.Tensor
    highest: torch.Tensor
    probabilities: torch.Tensor
    log_total: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, targets: torch.Tensor) -> _Chunk:
        """Uses up the logits."""
        highest = logits.amax(-1, keepdim=True)
        shifted = logits.sub_(highest)
        probabilities = shifted.exp()
        total = probabilities.sum(-1, keepdim=True)
        probabilities.div_(total)
        log_total = total.log()[:, 0]
        return cls(
            shifted=shifted,
            highest=highest,
            probabilities=probabilities,
            log_total=log_total,
            logprobs=shifted.gather(-1, targets[:, None])[:, 0] - log_total,
            entropy=log_total - torch.bmm(probabilities[:, None], shifted[:, :, None])[:, 0, 0],
        )


class _TokenLoss(torch.autograd.Function):
    """`(loss, [R] log-probs, [R] entropies)`, of which the loss carries a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        num_tokens: int,
        head: _Head,
        objective: TokenObjective,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wants_hidden, wants_weight, wants_bias = (needed and with_gradient for needed in ctx.needs_input_grad[:3])
        loss = torch.zeros((), device=hidden.device)
        logprobs, entropies = torch.empty(2, num_tokens, device=hidden.device)
        by_hidden = torch.zeros_like(hidden) if wants_hidden else None
        by_weight: torch.Tensor | None = None
        by_bias = torch.zeros(len(weight), device=hidden.device) if wants_bias else None
        for part in head.chunks(len(targets)):
            states, chosen = hidden[part], targets[part]
            chunk = _Chunk.of(head.logits(states), chosen)
            real = slice(part.start, min(part.stop, num_tokens))
            num_real = real.stop - real.start
            logprobs[real], entropies[real] = chunk.logprobs[:num_real], chunk.entropy[:num_real]
            with torch.enable_grad():
                leaves = [each[real].detach().requires_grad_(with_gradient) for each in (logprobs, entropies)]
                value = objective(real, *leaves)
            loss += value.detach()
            if not value.requires_grad:
                continue
            by_logprob, by_entropy = (
                None if each is None else F.pad(each, (0, len(chosen) - num_real))
                for each in torch.autograd.grad(value, leaves, allow_unused=True)
            )
            gradient = head.raw_gradient(chunk, chosen, by_logprob, by_entropy)
            if by_bias is not None:
                by_bias += gradient.sum(0)
            # From here on in the weights' own type, as every other layer's gradients are.
            gradient = gradient.to(weight.dtype)
            if by_hidden is not None:
                by_hidden[part] = gradient @ head.weight
            if wants_weight:
                by_weight = _plus_product(by_weight, gradient.t(), states)
        ctx.gradients = (by_hidden, by_weight, by_bias)
        ctx.types = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(logprobs, entropies)
        return loss, logprobs, entropies

    @staticmethod
    def backward(ctx: Any, by_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else gradient.mul_(by_loss).to(dtype)
            for gradient, dtype in zip(gradients, ctx.types, strict=True)
        ]
        return (*scaled, None, None, None, None, None)


def _plus_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`total + left @ right`, summed in float32."""
    right = right.to(left.dtype)
    if total is None:
        return left @ right
    if left.dtype == torch.float32:
        return total.addmm_(left, right)
    return total.float().add_(left @ right)


def _evaluated(logits: torch.Tensor, targets: torch.Tensor, objective: Objective | None) -> Any:
    """From all logits (`[R, V]` float32) at once, for models whose logits are not understood."""
    distribution = torch.log_softmax(logits, -1)
    logprobs = distribution.gather(-1, targets[:, None])[:, 0]
    if objective is None:
        return logprobs.detach()
    if isinstance(objective, SequenceObjective):
        objective = objective.given(logprobs.detach())
    entropy = -(distribution.exp() * distribution).sum(-1)
    return objective(slice(0, len(targets)), logprobs, entropy), logprobs.detach(), entropy.detach()
