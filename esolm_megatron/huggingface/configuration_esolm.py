"""The network's shape for `transformers`, under the names that the network reads it by."""

from transformers import PreTrainedConfig


class EsoLMConfig(PreTrainedConfig):
    """What an export's config.json says; its other fields are attributes too.

    vocab, mask_id, head_dim, kv_heads and ffn_size are written by the exporter, which knows how they follow from the rest.
    """

    model_type = "esolm"

    num_layers: int = 12
    hidden_size: int = 768
    num_heads: int = 12
    seq_length: int = 1024
    vocab: int = 50258
    mask_id: int = 50257
    head_dim: int = 64
    kv_heads: int = 12
    ffn_size: int = 3072
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    activation: str = "gelu"
    mlp_bias: bool = True
    qkv_bias: bool = False
    output_bias: bool = True
    tied_embeddings: bool = False
    qk_norm: bool = False
    rope_base: float = 10000.0
    dropout: float = 0.0
    init_std: float = 0.02
    alpha_0: float = 1.0
    tie_word_embeddings: bool = False  # the network ties its head itself
