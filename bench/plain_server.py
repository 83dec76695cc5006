"""The server to compare with: `python -m bench.plain_server --model DIR --port N`

One forward pass for each request, in the coroutine that answers it: the design of OpenRLHF's `serve_rm`. The texts of
one request share a padded batch, requests never share one. The model is transformers' own in the given type, with the
attention that transformers picks, and tokens as the scorer makes them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from transformers import AutoModelForSequenceClassification

from rlhf_ray.reward.core.encoding import RewardEncoding
from rlhf_ray.reward.core.loading import load_reward_tokenizer


class PlainModel:
    """A classifier and its tokenizer.

    Args:
        model: directory.
        dtype: a torch type by name.
    """

    def __init__(self, model: str, dtype: str) -> None:
        self._tokenizer = load_reward_tokenizer(model, "model")
        network = AutoModelForSequenceClassification.from_pretrained(model, dtype=getattr(torch, dtype))
        network.config.pad_token_id = self._tokenizer.pad_token_id
        self._network = network.eval()
        limit = min(int(network.config.max_position_embeddings), self._tokenizer.model_max_length)
        self._limit = limit
        self._appends_eos = RewardEncoding.for_backbone(self._tokenizer, limit).append_eos

    @torch.inference_mode()
    def score(self, texts: Sequence[str]) -> list[float]:
        """The logit of each text."""
        end = self._tokenizer.eos_token if self._appends_eos else ""
        batch = self._tokenizer(
            [text + end for text in texts],
            padding=True,
            truncation=True,
            max_length=self._limit,
            return_tensors="pt",
        )
        logits: list[float] = self._network(**batch).logits[:, 0].float().tolist()
        return logits


def application(model: PlainModel) -> FastAPI:
    """`POST /get_reward`, as OpenRLHF's clients send it."""
    app = FastAPI()

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        return {}

    @app.post("/get_reward")
    async def get_reward(request: Request) -> JSONResponse:
        body = await request.json()
        rewards = model.score(body["query"]) if body["query"] else []
        return JSONResponse({"rewards": rewards, "scores": rewards, "extra_logs": {}})

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="A reward server that runs one forward pass for each request.")
    parser.add_argument("--model", required=True, help="directory of an AutoModelForSequenceClassification")
    parser.add_argument("--dtype", default="bfloat16", help="a torch type")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    app = application(PlainModel(arguments.model, arguments.dtype))
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
