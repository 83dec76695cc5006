"""What a model's size is, from its configuration alone."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from bench.architectures import cases, configuration
from rlhf_ray.config.lora import LoraSettings
from rlhf_ray.models.sizes import read_model_size


@pytest.mark.parametrize(("name", "tied"), cases())
def test_every_architecture_is_counted(name: str, tied: bool, policy_tokenizer: Any, tmp_path: Path):
    config = configuration(name, tied, policy_tokenizer)
    config.save_pretrained(tmp_path)
    size, network = read_model_size(str(tmp_path)), AutoModelForCausalLM.from_config(config)
    assert size.parameters == size.trained == size.published == network.num_parameters()
    assert (size.layers, size.tied, size.vocabulary) == (config.num_hidden_layers, tied, config.vocab_size)

    top = read_model_size(str(tmp_path), trained_top_layers=1)
    assert 0 < top.trained < top.parameters == size.parameters
    assert top.trained_layers == 1
    backbone = read_model_size(str(tmp_path), head="none")
    assert backbone.parameters == network.base_model.num_parameters()


def test_keys_and_values_of_a_token(policy_model: str):
    # Two layers with one head of 32 numbers for keys and one for values.
    assert read_model_size(policy_model).kv_bytes(4) == 2 * 2 * 32 * 4


def test_a_snapshot_is_what_the_learner_sends(policy_model: str):
    top = read_model_size(policy_model, trained_top_layers=1)
    assert top.published == top.trained < top.parameters
    adapted = read_model_size(policy_model, lora=LoraSettings(rank=2))
    # Adapters are merged into the layers that are sent; the output projection and the embedding stay.
    assert adapted.trained < adapted.published < adapted.parameters - adapted.trained
