"""Make the golden files of the decoder with ``transformers`` (tested with 5.24, torch 2.13).

    python tests/golden/make_llama.py [CASE ...] [--trained FOLDER --text FILE]

Writes a checkpoint of a tiny random model and what it computes, in float32, for every case, and
perplexities of a trained model, if one is given. Cases of other families than Llama's also have
the logits of ``transformers`` in bfloat16. Tests read the files and need no PyTorch.
"""

import argparse
import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
BASE = {
    "architectures": None,
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Of 8 frequencies two stay, two are interpolated wholly and the others in part.
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 2.0,
    "beta_slow": 0.05,
}
CASES = {
    "tied_mha": {"tie_word_embeddings": True},
    "untied_gqa": {"num_key_value_heads": 2},
    "one_kv_head": {"num_key_value_heads": 1, "num_hidden_layers": 3, "rms_norm_eps": 1e-2},
    "head_dim": {"head_dim": 12, "num_key_value_heads": 2, "rope_theta": 500.0},
    "llama3": {"head_dim": 16, "num_key_value_heads": 2, "rope_scaling": SCALING},
    "rope_parameters": {
        "head_dim": 16,
        "rope_theta": None,
        "rope_parameters": {**SCALING, "rope_theta": 300.0},
    },
    "sharded": {"num_key_value_heads": 2},
    "bfloat16": {"num_key_value_heads": 2, "torch_dtype": "bfloat16"},
    "float16": {"tie_word_embeddings": True, "torch_dtype": "float16"},
    "llama_biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    # The window ends where the text does: no token is hidden.
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 16},
    "mistral_linear": {
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "head_dim": 6,
        "sliding_window": "null",
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "qwen2": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen2_yarn": {
        "model_type": "qwen2",
        "head_dim": 16,
        "num_key_value_heads": 2,
        "torch_dtype": "bfloat16",
        "rope_scaling": YARN,
    },
    "qwen3": {
        "model_type": "qwen3",
        "head_dim": 12,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-2,
        "torch_dtype": "bfloat16",
    },
    "qwen3_biases": {
        "model_type": "qwen3",
        "head_dim": 16,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "torch_dtype": "bfloat16",
        "rope_theta": None,
        "rope_parameters": {
            **YARN,
            "rope_theta": 500.0,
            "attention_factor": 1.3,
            "truncate": False,
        },
    },
    # Every fourth layer has no positions; the head is the embedding: neither is in the file.
    "smollm3": {
        "model_type": "smollm3",
        "num_hidden_layers": 4,
        "torch_dtype": "bfloat16",
        "num_key_value_heads": 2,
        "rope_theta": None,
        "tie_word_embeddings": None,
        "pad_token_id": 0,
    },
    "smollm3_yarn": {
        "model_type": "smollm3",
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "no_rope_layers": [0, 1, 1],
        "torch_dtype": "float16",
        "pad_token_id": 0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 2.0,
            "mscale_all_dim": 0.5,
        },
    },
}


def make(name, changes):
    torch.manual_seed(len(name))
    content = {field: v for field, v in {**BASE, **changes}.items() if v is not None}
    content = {field: None if v == "null" else v for field, v in content.items()}
    family = content["model_type"]
    content = {"architectures": [ARCHITECTURES[family]], **content}
    fields = copy.deepcopy({field: v for field, v in content.items() if field != "model_type"})
    config = transformers.AutoConfig.for_model(family, **fields)
    model = getattr(transformers, ARCHITECTURES[family])(config).eval()
    for key, parameter in model.named_parameters():
        # Large enough for attention and gates to be far from uniform.
        scale, shift = (0.3, 1.0) if "norm" in key else (0.35, 0.0)
        torch.nn.init.normal_(parameter, shift, scale)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    shard = 6000 if name == "sharded" else "1GB"
    model.to(getattr(torch, content["torch_dtype"]))
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    added = "model_type" in changes or "biases" in name
    arrays = expected(folder, (1, 16) if added else (2, 24))
    if added:
        arrays["logits_bfloat16"] = logits_bfloat16(folder, arrays["tokens"])
    np.savez_compressed(folder / "expected.npz", **arrays)


def logits_bfloat16(folder, tokens):
    """Logits of the model with weights and activations in bfloat16."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def expected(folder, shape):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(0, model.config.vocab_size, shape)
    arrays = {}

    def keep(name):
        def hook(_, arguments):
            arrays[name] = arguments[0].detach().numpy()

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_pre_hook(keep(f"attention_{i}"))
        layer.self_attn.o_proj.register_forward_pre_hook(keep(f"output_{i}"))
        layer.mlp.gate_proj.register_forward_pre_hook(keep(f"mlp_{i}"))
        layer.mlp.down_proj.register_forward_pre_hook(keep(f"down_{i}"))
        layer.register_forward_pre_hook(keep(f"hidden_{i}"))
    model.model.norm.register_forward_pre_hook(keep(f"hidden_{len(model.model.layers)}"))
    with torch.no_grad():
        logits = model(tokens).logits
    return {
        **arrays,
        "tokens": tokens.numpy().astype(np.int32),
        "logits": logits.numpy(),
        "inverse_frequencies": model.model.rotary_emb.inv_freq.numpy(),
    }


def perplexities(folder, text):
    """Perplexity on consecutive windows of 256 tokens, the text or each window with one BOS."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    whole = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    assert whole[0] == tokenizer.bos_token_id
    bare = whole[1 : 1 + (len(whole) - 1) // 255 * 255].reshape(-1, 255)
    sets = {
        "one": whole[: len(whole) // 256 * 256].reshape(-1, 256),
        "each": torch.cat([torch.full((len(bare), 1), tokenizer.bos_token_id), bare], dim=1),
    }
    results = {}
    for bos, windows in sets.items():
        losses = []
        with torch.no_grad():
            for window in windows:
                logits = model(window[None]).logits[0, :-1].float()
                losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
        results[bos] = {"windows": len(windows), "perplexity": math.exp(np.mean(losses))}
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all if left out")
    parser.add_argument("--trained", type=Path)
    parser.add_argument("--text", type=Path)
    arguments = parser.parse_args()
    for name in arguments.cases or CASES:
        make(name, CASES[name])
    if arguments.trained:
        content = {arguments.trained.name: perplexities(arguments.trained, arguments.text)}
        (HERE / "perplexity.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
