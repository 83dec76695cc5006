"""Raw logits of a reward model from vLLM's pooling engine: the second opinion of the release gate."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_SHARE_FREE = 0.05
_CACHE_BYTES = 1 << 28


class PoolingEngine:
    """One vLLM engine in this process, over one classifier. A process holds one at a time: `close` it first.

    Args:
        model: directory of the weights (a member's, for an ensemble of independent models).
        tokenizer: directory of the tokenizer.
        max_tokens: longest text in tokens.
        use_activation: let vLLM put its sigmoid or softmax behind the head. A reward is read without.
    """

    def __init__(
        self,
        model: str,
        tokenizer: str,
        max_tokens: int,
        use_activation: bool = False,
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM, PoolingParams

        self._pooling = PoolingParams(use_activation=use_activation)
        self._engine = LLM(
            model=model,
            tokenizer=tokenizer,
            runner="pooling",
            dtype="float32",
            max_model_len=max_tokens,
            max_num_seqs=32,
            enforce_eager=True,
            distributed_executor_backend="uni",
            # Without an explicit size an engine on a CPU claims nearly all memory.
            kv_cache_memory_bytes=_CACHE_BYTES,
            # Only looked at when it starts, on a GPU that it may share; it takes the weights and the above.
            gpu_memory_utilization=_SHARE_FREE,
            seed=0,
            disable_log_stats=True,
            load_format="safetensors",
            trust_remote_code=False,
        )

    def score_tokens(self, token_ids: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """`[N, labels]` logits of N texts, special tokens included."""
        from vllm.inputs import TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=list(ids)) for ids in token_ids]
        outputs = self._engine.classify(prompts, pooling_params=self._pooling, use_tqdm=False)
        # The field is named for what the activation would have made of them.
        return np.array([output.outputs.probs for output in outputs], dtype=np.float64)

    def close(self) -> None:
        """Give back the memory. Engines tear down what is global to a process when they are collected, so this must
        have happened before the next one is built."""
        self._engine.llm_engine.engine_core.shutdown()
        del self._engine
        gc.collect()
