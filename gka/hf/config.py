"""The one list of hyperparameters: every default of the layer and of the model stands here.

Section numbers are those of the paper (arXiv 2511.21016).
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

MIXERS = ("gka", "gla")
LAYER_TYPES = ("linear_attention", "full_attention", "sliding_attention")


class GKAConfig(PreTrainedConfig):
    """Configuration of [`GatedKalmaNet`], [`GKAModel`] and [`GKAForCausalLM`].

    The defaults are the paper's 440M model: 28 layers, hidden size 1024, 8 heads of 128.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU feed-forward block.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads H, of GKA layers and of softmax attention layers alike.
        num_key_value_heads: key/value heads Hk, a divisor of H; None means H.
        head_dim: dim of queries, keys and values of a head; None means hidden_size // H.
        layer_types: one of "linear_attention" (a GKA layer), "full_attention" and
            "sliding_attention" (softmax attention) for each block; None means GKA everywhere.
        mixer: what a "linear_attention" block is: "gka", or "gla", the same layer without the solve
            (alpha = 0 and no S_kk).
        ridge_ratio: a of the paper: lambda_t = a * ||S_kk_t||_F, greater than 0.
        steps: Chebyshev nodes of each stage of the solve, e.g. [31] (the paper's 30 iterations) or
            [16, 16] (two stages with one refinement); None means what suits the input's dtype.
        chunk_size: tokens per chunk of the training form; None means what suits the device. The
            result does not depend on it.
        conv_size: width of the causal depthwise convolutions of q, k and v.
        use_v_conv: whether v has a convolution too.
        use_alpha_connection: whether the alpha-connection is there; without it alpha = 1.
        use_beta_gate: whether the write strength is there; without it beta = 1.
        use_forget_gate: whether the state fades; without it g = 0.
        use_output_gate: whether SiLU(x W_g) multiplies the normalised output.
        hidden_act: activation of the feed-forward block.
        max_position_embeddings: longest sequence that the rotary embedding of attention layers is
            made for; GKA layers have no such limit.
        rope_parameters: rotary embedding of the attention layers, as in transformers.
        sliding_window: tokens that a "sliding_attention" layer sees.
        attention_bias: whether q, k, v and o of the attention layers have a bias.
        attention_dropout: dropout of the attention weights while training.
        use_qk_norm: whether queries and keys of the attention layers are RMS-normalised.
        initializer_range: standard deviation of the weights at initialisation.
        rms_norm_eps: epsilon of every RMSNorm.
        use_cache: whether `forward` returns its states for decoding.
        tie_word_embeddings: whether the output projection is the embedding's matrix.
        pad_token_id, bos_token_id, eos_token_id: special token ids.

    Raises:
        ValueError: naming the field, for values that do not fit.
    """

    model_type = "gka"
    keys_to_ignore_at_inference = ("past_key_values",)
    # Three states each: convolutions of q, k, v; S_kk is recurrent state 0 and S_kv state 1.
    number_of_conv_states = 3

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 28
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    layer_types: list[str] | None = None
    mixer: str = "gka"
    ridge_ratio: float = 0.02
    steps: list[int] | None = None
    chunk_size: int | None = None
    conv_size: int = 4
    use_v_conv: bool = True
    use_alpha_connection: bool = True
    use_beta_gate: bool = True
    use_forget_gate: bool = True
    use_output_gate: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rope_parameters: Any = None
    sliding_window: int | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    use_qk_norm: bool = True
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
