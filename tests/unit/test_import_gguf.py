"""A GGUF file becomes a folder that holds the same model."""

import json
from pathlib import Path

import torch
from gguf import GGUFWriter, TokenType
from tiny_models import tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tools.import_gguf import import_gguf

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection as GGUF has them: the halves that rotate together lie side by side."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    model = tiny_llama(len(tokenizer), 2, seed=0, tie_word_embeddings=False)
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    content = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    ids = sorted(content["vocab"], key=content["vocab"].get)
    special = set(tokenizer.all_special_tokens)
    writer.add_token_list(ids)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in ids])
    writer.add_token_merges([" ".join(pair) for pair in content["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    state = model.state_dict()
    tensors = {"token_embd": state["model.embed_tokens.weight"], "output_norm": state["model.norm.weight"]}
    tensors["output"] = state["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        for ours, theirs in _NAMES.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            tensors[f"blk.{layer}.{theirs}"] = interleaved(weight, heads) if heads else weight
    for name, weight in tensors.items():
        writer.add_tensor(f"{name}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_the_folder_holds_the_files_model_and_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    written = write_gguf(tmp_path / "model.gguf", tokenizer)
    import_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    read = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Write a short poem about the sea."
    ids = tokenizer.encode(text)
    assert read.encode(text, add_special_tokens=False) == ids
    assert read.eos_token_id == tokenizer.eos_token_id
    rounded = {name: weight.to(torch.bfloat16) for name, weight in written.state_dict().items()}
    assert model.state_dict().keys() == rounded.keys()
    assert all(torch.equal(weight, rounded[name]) for name, weight in model.state_dict().items())
    # In fp32 again: whatever else the file says of the model is the same too.
    written.load_state_dict(rounded)
    with torch.no_grad():
        ours, theirs = (one(torch.tensor([ids])).logits for one in (written, model.float()))
    torch.testing.assert_close(theirs, ours)
