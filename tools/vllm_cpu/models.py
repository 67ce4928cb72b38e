"""Tiny random models for real engines; runs in vLLM's environment.

python -m kvferry.tools.vllm_cpu.models FOLDER [llama | hybrid | mla]
"""

from __future__ import annotations

import sys
from typing import Any

# Special tokens first, then single bytes: the same for all models.
BOS, EOS, PAD, NUM_TOKENS = 0, 1, 2, 259
COMMON: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "vocab_size": NUM_TOKENS,
    "max_position_embeddings": 4096,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # large, so that every token depends on the whole prompt
}
WINDOW_TOKENS = 80  # of the hybrid: neither a block nor a multiple of one


def make_tokenizer(folder: str) -> None:
    """A tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    assert len(names) == NUM_TOKENS
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast
    make(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def make_llama() -> Any:
    """Return a Llama of 4 layers with 4 KV heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=32, **COMMON
        )
    )


def make_hybrid() -> Any:
    """Return a Gemma 3 of 6 layers, every third of which attends to all, the others to a window.

    vLLM makes three groups of them, of two layers each, which share the same two tensors.
    """
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            query_pre_attn_scalar=8,  # attention that picks few tokens, so that each one counts
            sliding_window=WINDOW_TOKENS,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
            **COMMON,
        )
    )


def make_mla() -> Any:
    """Return a DeepSeek V2 of 3 dense layers, with the latent that vLLM's CPU kernel knows: 512 +
    64."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    return DeepseekV2ForCausalLM(
        DeepseekV2Config(
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            kv_lora_rank=512,
            q_lora_rank=None,
            qk_rope_head_dim=64,
            qk_nope_head_dim=32,
            v_head_dim=32,
            first_k_dense_replace=3,
            # As DeepSeek's own models have it. vLLM 0.32's CPU kernel for plain rotary positions
            # takes keys that are a slice of a latent for contiguous, and overwrites the latent: its
            # tokens then depend on what is computed beside them.
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            n_routed_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=64,
            **COMMON,
        )
    )


MODELS = {"llama": make_llama, "hybrid": make_hybrid, "mla": make_mla}


def main(folder: str, kind: str = "llama") -> None:
    """Write one of them, as vLLM loads it."""
    import torch

    make_tokenizer(folder)
    torch.manual_seed(0)
    MODELS[kind]().to(torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
