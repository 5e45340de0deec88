"""`ModelConfig`: the mathematics of a decoder and nothing else; every field changes the logits. Imports no jax.

One config covers every family (see models/families): what differs by layer (rotary embedding, window, score scale) is in `LayerKind`.
"""
from __future__ import annotations

from dataclasses import dataclass

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid", "tanh")
SCALINGS = ("default", "linear", "llama3", "yarn", "factors")


@dataclass(frozen=True)
class Rope:
    """A rotary position embedding (Su et al. 2021) in the half-split layout, and how its frequencies are scaled.

    Attributes:
        theta: base of the frequencies.
        fraction: share of the head width that is rotated, from its beginning (GPT-NeoX's rotary_pct).
        scaling: "default"; "linear" (Chen et al. 2023); "llama3" (Llama 3.1's by wavelength); "yarn" (Peng et al. 2023); "factors" (a
            divisor for each frequency: LongRoPE's short factors, and what GGUF files store).
        factor: of the scaling: how much longer texts become.
        original: context in tokens before scaling (llama3, yarn).
        low, high: llama3: wavelengths above original / low are scaled by `factor`, those below original / high are not.
            yarn: rotations in `original` at the ends of the ramp between scaled (low, beta_slow) and kept (high, beta_fast).
        round_ends: yarn: the ends of the ramp are rounded to whole frequencies.
        gain: cos and sin are multiplied by it (yarn, LongRoPE).
        factors: one divisor for each rotated pair.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: str = "default"
    factor: float = 1.0
    original: int = 0
    low: float = 0.0
    high: float = 0.0
    round_ends: bool = True
    gain: float = 1.0
    factors: tuple[float, ...] = ()

    def __post_init__(self):
        if self.scaling not in SCALINGS:
            raise ValueError(f"rope scaling {self.scaling!r} is not one of {', '.join(SCALINGS)}")


@dataclass(frozen=True)
class LayerKind:
    """What one layer does differently from another.

    Attributes:
        rope: None for a layer without rotary embedding (SmolLM3's every fourth; models with learned positions).
        window: keys that a query sees, itself included; 0 is all of them.
        scale: of the scores; 0 is head_dim ** -0.5.
    """

    rope: Rope | None = Rope()
    window: int = 0
    scale: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a decoder. The defaults are Llama's.

    The context limit, rematerialisation and the attention backend are not mathematics and live elsewhere.

    Attributes:
        pattern: the kinds of the layers; layer i has pattern[i % len(pattern)].
        norm: "rms" (Zhang and Sennrich 2019) or "layer" (Ba et al. 2016, with bias).
        norm_offset: added to the stored scale: 1 for Gemma, which stores it around 0.
        norm_affine: whether norms have a scale (and LayerNorm a bias).
        norm_at: "pre" (x + f(norm(x))), "post" (norm(x + f(x)), OPT-350M), "sandwich" (x + norm(f(norm(x))), Gemma 2) or "output"
            (x + norm(f(x)), OLMo 2).
        final_norm: whether the last hidden states are normed.
        parallel: attention and MLP both read the layer's input (GPT-NeoX).
        qk_norm: "none"; "head": RMSNorm over each head's width (Qwen3); "row": over all heads together (OLMo 2).
        attn_softcap, logit_softcap: cap * tanh(x / cap) of scores and logits (Gemma 2); 0 is none.
        activation: one of `ACTIVATIONS`; "gelu" is exact, "gelu_tanh" its tanh approximation.
        gated: down(activation(gate(x)) * up(x)), else down(activation(up(x))).
        embed_width: width E of the embeddings where it is not d_model, with projections between (OPT-350M); 0 is d_model.
        embed_scale: embeddings are multiplied by it (Gemma).
        positions: rows of a learned position table, offset included; 0 is none.
        position_offset: row of position 0 (OPT: 2).
    """

    vocab_size: int                # V
    d_model: int                   # D
    n_layers: int                  # L
    n_heads: int                   # N
    n_kv_heads: int                # K
    head_dim: int                  # H
    d_ff: int                      # F
    pattern: tuple[LayerKind, ...] = (LayerKind(),)
    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    norm_affine: bool = True
    norm_at: str = "pre"
    final_norm: bool = True
    parallel: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = "none"
    attn_softcap: float = 0.0
    logit_softcap: float = 0.0
    activation: str = "silu"
    gated: bool = True
    embed_width: int = 0           # E
    embed_scale: float = 1.0
    positions: int = 0
    position_offset: int = 0
    tie_embeddings: bool = False

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        for name, allowed in (("norm", ("rms", "layer")), ("norm_at", ("pre", "post", "sandwich", "output")),
                              ("qk_norm", ("none", "head", "row")), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.parallel and self.norm_at != "pre":
            raise ValueError(f"parallel=True goes with norm_at='pre', not {self.norm_at!r}")
        ropes = {kind.rope for kind in self.pattern if kind.rope}
        if len({rope.fraction for rope in ropes}) > 1:
            raise ValueError("the rotary embeddings of all layers rotate the same share of the head width (fraction)")
        if self.rotary_dim + self.rotary_dim % 2 > self.head_dim:
            raise ValueError(f"{self.rotary_dim} of head_dim={self.head_dim} are rotated; rotary embeddings need pairs")
        for rope in ropes:
            if rope.scaling in ("yarn", "factors") and self.rotary_dim % 2:
                raise ValueError(f"{self.rotary_dim} of head_dim={self.head_dim} are rotated; {rope.scaling} needs an even number")
            if rope.factors and len(rope.factors) != self.rotary_dim // 2:
                raise ValueError(f"{len(rope.factors)} rope factors; {self.rotary_dim // 2} are needed, one for each rotated pair")

    @property
    def rotary_dim(self) -> int:
        """Width of a head that is rotated; 0 without rotary embeddings. One more is rotated where it is odd, for the sake of pairs."""
        return next((int(self.head_dim * kind.rope.fraction) for kind in self.pattern if kind.rope), 0)

    @property
    def embed_dim(self) -> int:
        """Width E of the embeddings and of what the vocabulary head reads."""
        return self.embed_width or self.d_model

    def kind(self, i: int) -> LayerKind:
        """The kind of layer i."""
        return self.pattern[i % len(self.pattern)]
