"""Chat messages as text, with the tokenizer's own chat template and in one place for training, scoring and rollout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from rlhf_ray.data.rows import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message: TypeAlias = dict[str, Any]


def parse_messages(value: Any, name: str) -> list[Message]:
    """Check that a list holds messages with `role` and `content` strings; further keys are for the template."""
    allowed = "a list of messages, each with `role` and `content` strings"
    if not isinstance(value, list) or not value:
        raise RowError(f"`{name}` has no messages", allowed)
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(part), str) for part in ("role", "content")):
            raise RowError(f"message {number} of `{name}` is malformed", allowed)
        messages.append({part: content for part, content in message.items() if content is not None})
    return messages


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """Messages as the text that the model sees, special tokens included.

    Raises:
        RowError: no template, or the template refuses these messages.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise RowError(
            "has chat messages, but the tokenizer has no chat template",
            "text in place of messages, or a tokenizer with a chat template",
        )
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
        )
    except TemplateError as error:
        raise RowError(
            f"the chat template refuses the messages ({' '.join(str(error).split())})",
            "roles in the order that the template expects",
        ) from None


def render_turn(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], response: Sequence[Message]
) -> tuple[str, str]:
    """Prompt (with the generation prompt) and response, cut so that they add up to the rendered conversation.

    Raises:
        RowError: the template renders the prompt differently once there is a response, or as `render`.
    """
    prompt_text = render(tokenizer, prompt, add_generation_prompt=True)
    whole = render(tokenizer, [*prompt, *response], add_generation_prompt=False)
    if not whole.startswith(prompt_text):
        raise RowError(
            "the chat template renders the prompt differently once the response follows",
            "a template whose generation prompt is how a response begins, or text in place of messages",
        )
    return prompt_text, whole[len(prompt_text) :]


def end_at_eos(tokenizer: PreTrainedTokenizerBase, rendered: str) -> str:
    """Rendered text without the white space behind its end-of-sequence token, which a policy never writes."""
    ended = rendered.rstrip()
    return ended if tokenizer.eos_token and ended.endswith(tokenizer.eos_token) else rendered
