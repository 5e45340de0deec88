"""`ModelConfig`: the mathematics of a decoder and nothing else; every field changes the logits."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a Llama-family decoder (RMSNorm, RoPE, grouped-query attention, SwiGLU).

    The context limit, rematerialisation and the attention backend are not mathematics and live elsewhere.
    """

    vocab_size: int                # V
    d_model: int                   # D
    n_layers: int                  # L
    n_heads: int                   # N
    n_kv_heads: int                # K
    head_dim: int                  # H
    d_ff: int                      # F
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings need pairs")

    @property
    def n_params(self) -> int:
        """Number of parameters, tied embeddings counted once."""
        attention = self.d_model * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        layer = attention + 3 * self.d_model * self.d_ff + 2 * self.d_model
        return self.n_layers * layer + self.d_model + self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
