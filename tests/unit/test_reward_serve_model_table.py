"""Which model a request gets."""

from __future__ import annotations

from typing import Any, cast

import pytest

from rlhf_ray.config.load import load_config
from rlhf_ray.config.serving import ServedModelSettings, ServedScorerSettings, ServingConfig
from rlhf_ray.failures import BadInput
from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.core.card import directory_version
from rlhf_ray.reward.serve.exchange import ModelInfo
from rlhf_ray.reward.serve.model_table import LoadedModel, ModelTable, Weights, read_table, shares
from tests.planting import copied, edit_weights, sentiment_pairs, train_reward_model


def loaded(name: str, share: float, role: str = "live") -> LoadedModel:
    info = ModelInfo(name, f"{name}-version", 1.0, ("preference",), 1, 64, "float32", cast(Any, role), share)
    return LoadedModel(info, Weights("", info.version, ()), cast(Any, None), cast(Any, None), None)


TABLE = ModelTable((loaded("main", 0.9), loaded("canary", 0.1), loaded("next", 0.0, "shadow")))


def test_requests_are_shared_out_as_configured_and_a_key_stays():
    names = [TABLE.choose(None, f"prompt {number}").info.name for number in range(20_000)]
    assert names.count("canary") == pytest.approx(2000, abs=170)
    assert "next" not in names
    assert names == [TABLE.choose(None, f"prompt {number}").info.name for number in range(20_000)]


def test_a_larger_share_only_adds_keys_to_a_canary():
    wider = ModelTable((loaded("canary", 0.3), loaded("main", 0.7)))
    narrow = ModelTable((loaded("canary", 0.1), loaded("main", 0.9)))
    keys = [str(number) for number in range(2000)]
    first = {key for key in keys if wider.choose(None, key).info.name == "main"}
    second = {key for key in keys if narrow.choose(None, key).info.name == "main"}
    assert first < second


@pytest.mark.parametrize("name", ["canary", "canary-version", "next"])
def test_a_model_can_be_asked_for_by_name_and_version(name):
    assert TABLE.choose(name, "key").info.name == name.removesuffix("-version")


def test_a_name_that_is_not_there_is_an_error_where_it_was_meant():
    with pytest.raises(ApiError, match="main, canary, next") as caught:
        TABLE.choose("gpt", "key")
    assert caught.value.type is ErrorType.NOT_FOUND
    # A canary must not change what clients may send that have to send something.
    names = {TABLE.choose("gpt", str(key), any_name=True).info.name for key in range(100)}
    assert names == {"main", "canary"}
    assert TABLE.choose("next", "key", any_name=True).info.name == "next"


def test_one_model_takes_what_the_others_leave():
    models = [ServedModelSettings(name=name, path="x", share=share) for name, share in (("a", None), ("b", 0.25))]
    assert shares(models) == {"a": 0.75, "b": 0.25}


@pytest.mark.parametrize(
    ("models", "cause"),
    [
        ("{a: {path: x, shadow: true}}", "all are shadows"),
        ("{a: {path: x}, b: {path: y}}", "have no share"),
        ("{a: {path: x, share: 0.7}, b: {path: y, share: 0.7}}", "add up to 1.4"),
        ("{a: {path: x, share: 0.5}}", "add up to 0.5"),
        ("{a.b: {path: x}}", "a.b"),
        ("{a: {path: x, share: 1.0, shadow: true}, b: {path: x, shadow: true}}", "all are shadows"),
    ],
)
def test_models_that_do_not_share_the_traffic_are_refused(models, cause, tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text(f"run: {{name: s}}\nmodels: {models}\n")
    with pytest.raises(BadInput, match=cause):
        load_config(ServingConfig, path)


def test_a_directory_is_read_again_when_it_was_written(tiny, tmp_path):
    folder = copied(tiny / "reward_model", tmp_path / "model")
    settings = ServedScorerSettings()
    entries = [ServedModelSettings(name="main", path=str(folder))]
    first = read_table(entries, settings, ModelTable(()))
    assert read_table(entries, settings, first).models == first.models
    edit_weights(folder, lambda weights: {**weights, "score.weight": weights["score.weight"] * 2})
    second = read_table(entries, settings, first)
    assert second.models[0].info.version == directory_version(folder) != first.models[0].info.version
    second.models[0].weights.check()
    (folder / "model.safetensors").touch()
    second.models[0].weights.check()
    with pytest.raises(BadInput, match="holds version"):
        first.models[0].weights.check()


def test_weights_that_their_card_does_not_name_are_not_served(tiny, tmp_path):
    folder = tmp_path / "model"
    train_reward_model(tiny / "reward_model", folder, sentiment_pairs(0, 8), 0, steps=0)
    Weights.read(str(folder), "models.main.path")
    edit_weights(folder, lambda weights: {**weights, "score.weight": weights["score.weight"] * 2})
    with pytest.raises(BadInput, match=r"models\.main\.path: the files .* as their card says"):
        Weights.read(str(folder), "models.main.path")
