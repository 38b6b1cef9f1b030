"""The settings of a Llama of one block, for tests of what is done to a block."""

from jaxprune.models import llama

CONFIG = llama.LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    tie_word_embeddings=True,
)
