"""What a reward model is shown, without its weights: of texts, conversations, and responses that a policy sampled."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.data.rows import RowError
from rlhf_ray.failures import BadInput
from rlhf_ray.models.loading import check_tokenizer_fits, check_weight_files, load_tokenizer, read_model_facts
from rlhf_ray.reward.core.card import MemberLayout, RewardModelCard, directory_version
from rlhf_ray.reward.core.encoding import RewardEncoding
from rlhf_ray.reward.core.loading import check_reward_model, load_reward_tokenizer
from rlhf_ray.rollout import Rollout


@dataclass(frozen=True)
class RewardTexts(RewardEncoding):
    """A reward model's directory but for its weights.

    Attributes:
        model: the directory, or a hub id.
        card: of the model, or None.
    """

    model: str = ""
    card: RewardModelCard | None = None

    @classmethod
    def read(
        cls, model: str, max_length: int | None = None, key: str = "reward.model", section: str = "reward"
    ) -> RewardTexts:
        """Read card and tokenizer, and see that there is a reward model that fits them.

        Args:
            max_length: longest text in tokens; None: what the model was trained with, else its position limit.
            key: of the model in the configuration.
            section: of the configuration that has `max_length`.

        Raises:
            BadInput: the model cannot be read, is no reward model, or takes shorter texts.
        """
        facts = read_model_facts(model, key)
        card = RewardModelCard.load(model, key)
        check_reward_model(facts, card, model, key)
        for member in card.layout.folders if card is not None else ():
            if member != ".":
                check_weight_files(Path(model) / member, key)
        tokenizer = load_reward_tokenizer(model, key)
        check_tokenizer_fits(tokenizer, facts, model, key)
        if card is not None and card.chat_template is not None:
            tokenizer.chat_template = card.chat_template
        if max_length is not None and max_length > facts.context_tokens:
            raise BadInput(
                f"{section}.max_length", f"{max_length} tokens", f"at most {facts.context_tokens}, the model's limit"
            )
        # Some models hold more positions than a text may have; their tokenizer knows.
        longest = min(facts.context_tokens, tokenizer.model_max_length)
        limit = max_length or (card.max_length if card else longest)
        encoding = RewardEncoding.of_model(tokenizer, card, limit)
        return cls(**vars(encoding), model=model, card=card)

    @cached_property
    def version(self) -> str:
        """Of the weights and everything else that a score depends on."""
        if self.card is not None:
            return self.card.version
        folder = Path(self.model)
        return directory_version(folder) if folder.is_dir() else self.model

    @property
    def layout(self) -> MemberLayout:
        """What the model's labels mean."""
        return self.card.layout if self.card else MemberLayout()

    @property
    def folders(self) -> list[str]:
        """Where the models of an ensemble lie."""
        return [str(Path(self.model) / member) if member != "." else self.model for member in self.layout.folders]


class SharedIds(Enum):
    """Which sampled texts a reward model can be given as the policy's token ids."""

    NONE = "another tokenizer"
    TEXTS = "the same tokenizer, another chat template: prompts that are texts"
    ALL = "the same tokenizer and chat template"


class ResponseReader:
    """Reads what a policy sampled.

    An embedding often has more rows than there are tokens, because round numbers suit the hardware, and a policy may
    sample the id of such a row. Nobody can read that response, so it cannot be scored.

    Args:
        policy_model: whose tokenizer decodes.

    Raises:
        BadInput: it has no readable tokenizer.
    """

    def __init__(self, policy_model: str) -> None:
        self._tokenizer = load_tokenizer(policy_model, "policy.model")
        self._vocabulary = self._tokenizer.get_vocab()
        ids = list(self._vocabulary.values())
        self._known = np.zeros(max(ids) + 2, dtype=bool)  # the last entry stands for all higher ids
        self._known[ids] = True

    def token_ids(self, rollout: Rollout, index: int) -> NDArray[np.int32]:
        """The tokens of one response.

        Raises:
            RowError: the tokenizer does not have all of them.
        """
        token_ids = rollout.sample_tokens(index)[int(rollout.prompt_lengths[index]) :]
        if not self._known[np.minimum(token_ids, len(self._known) - 1)].all():
            raise RowError("the response has a token id that the policy's tokenizer does not know", "known token ids")
        return token_ids

    def text(self, rollout: Rollout, index: int) -> str:
        """One response without special tokens.

        Raises:
            RowError: as `token_ids`.
        """
        return str(self._tokenizer.decode(self.token_ids(rollout, index), skip_special_tokens=True))

    def shared_ids(self, texts: RewardTexts) -> SharedIds:
        """Which sampled texts have the token ids that a reward model would give them."""
        own, tokenizer = self._tokenizer, texts.tokenizer
        # An empty text shows which special tokens are put around a text.
        if own("").input_ids != tokenizer("").input_ids or self._vocabulary != tokenizer.get_vocab():
            return SharedIds.NONE
        names = ("chat_template", "bos_token", "eos_token")
        same_template = all(getattr(own, name) == getattr(tokenizer, name) for name in names)
        # A published model was shown what its template puts behind the token at which a policy stops.
        return SharedIds.ALL if same_template and texts.card is not None else SharedIds.TEXTS
