"""Our own route that says which words move a score."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from rlhf_ray.config.serving import LimitSettings
from rlhf_ray.reward.serve.context import REQUEST
from rlhf_ray.reward.serve.exchange import Service
from rlhf_ray.reward.serve.occlusion import MAX_SPANS, Tokenizing, explain
from rlhf_ray.reward.serve.wire.bodies import Strict, read_body


class ExplainRequest(Strict):
    """A prompt and a response whose words are to be weighed."""

    model: str | None = Field(None, description="Name or version; without it the model with the largest share.")
    prompt: str = Field(description="Put before the response as it is; its words are not weighed.")
    response: str


class ExplainModel(BaseModel):
    """The model that scored."""

    name: str
    version: str
    temperature: float
    attributes: list[str]


class ExplainedWord(BaseModel):
    """A piece of the text; all of them in a row are prompt and response."""

    text: str
    contribution: float = Field(description="score(whole) − score(without it), on the raw scale.")
    scored: bool = Field(description="Whether it was left out; the prompt is not, nor what the model did not see.")


class ExplainResponse(BaseModel):
    """A score, and what each word does to it."""

    model: ExplainModel
    score: float
    words: list[ExplainedWord]


def routes(service: Service, tokenizing: Tokenizing, limits: LimitSettings) -> APIRouter:
    """`POST /v1/explain`."""
    router = APIRouter(tags=["rlhf_ray"])

    @router.post("/v1/explain")
    async def explain_score(request: Request) -> ExplainResponse:
        """Which words of a response move its score: each is left out once."""
        body = await read_body(request, ExplainRequest)
        context = REQUEST.get(None)
        most = MAX_SPANS if context is None else int(min(MAX_SPANS, context.caller.max_texts - 1))
        explanation = await explain(service, tokenizing, limits, body.prompt, body.response, body.model, most)
        model = explanation.model
        return ExplainResponse(
            model=ExplainModel(
                name=model.name,
                version=model.version,
                temperature=model.temperature,
                attributes=list(model.attributes),
            ),
            score=explanation.score,
            words=[
                ExplainedWord(text=word.text, contribution=word.contribution, scored=word.scored)
                for word in explanation.words
            ],
        )

    return router
