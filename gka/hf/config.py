"""The configuration: all hyperparameters of the layer and of the model, with their defaults.

Section numbers are those of the paper (arXiv 2511.21016).
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ..nn.first_weights import default_std, residual_factor
from ..ops.checks import MAX_DIM, check_solver
from ..ops.solvers import RIDGE_RATIO
from .mixers import OURS, known_mixers, registered_mixer
from .published import MODEL_TYPE as PUBLISHED
from .published import read_config
from .recipe import read_recipe
from .tensor_parallel import plan

_FORMER = {"steps": "solver_steps"}  # former names in saved configurations
_ELSEWHERE = {  # names of the same sizes in the layer, in the commands and in other libraries
    "num_heads": "num_attention_heads",
    "heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "kv_heads": "num_key_value_heads",
    "num_layers": "num_hidden_layers",
    "n_layers": "num_hidden_layers",
    "layers": "num_hidden_layers",
    "hidden_dim": "hidden_size",
    "d_model": "hidden_size",
}
LAYER_TYPES = ("linear_attention", "full_attention", "sliding_attention")

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "conv_size",
    "max_position_embeddings",
)
_OPTIONAL_COUNTS = ("chunk_size", "sliding_window", "kv_proj_rank")
_SWITCHES = (
    "use_v_conv",
    "use_alpha_connection",
    "use_beta_gate",
    "use_forget_gate",
    "use_output_gate",
    "kv_learnable_residual",
    "attention_bias",
    "mlp_bias",
    "use_qk_norm",
    "use_cache",
    "tie_word_embeddings",
)
# Fields that only a GKA layer has, besides those of the solver.
_OWN = (
    "ridge_ratio",
    "chunk_size",
    "use_v_conv",
    "use_alpha_connection",
    "use_beta_gate",
    "use_forget_gate",
    "use_output_gate",
    "kv_proj_rank",
    "kv_learnable_residual",
)


class GKAConfig(PreTrainedConfig):
    """Configuration of [`GatedKalmaNet`], [`GKAModel`] and [`GKAForCausalLM`].

    The defaults are the paper's 440M model: 28 layers, hidden size 1024, 8 heads of 128.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU feed-forward block.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads H, in GKA layers and in softmax attention layers.
        num_key_value_heads: key/value heads Hk, a divisor of H; None means H.
        head_dim: dim of queries, keys and values of a head; None means hidden_size // H.
        layer_types: one of "linear_attention" (a GKA layer), "full_attention" and
            "sliding_attention" (softmax attention) for each block; None means GKA in all blocks.
        mixer: the layer in "linear_attention" blocks: "gka", or "gla" (the same layer without the solve,
            alpha = 0 and no S_kk), or a name given to `register_mixer`. A registered layer does not use the
            fields that belong to GKA layers only.
        ridge_ratio: a of the paper: lambda_t = a * ||S_kk_t||_F, greater than 0.
        solver: "chebyshev", the paper's, or "cg", conjugate gradient.
        solver_steps: steps of each stage of the solve: Chebyshev nodes, e.g. [31] (the paper's 30 iterations) or
            [16, 16] (two stages with one refinement), or products of conjugate gradient, e.g. [10, 10]; None
            means the default for the dtype of the input.
        tolerance: for "cg": the residual at which a stage ends, relative to its start, between 0 and 1; the steps
            are then an upper limit. None means that all steps are made.
        chunk_size: tokens per chunk in training and prefill; None means the default of the device. The
            result does not depend on it.
        conv_size: width of the causal depthwise convolutions of q, k and v.
        use_v_conv: whether v has a convolution too.
        use_alpha_connection: whether to use the alpha connection; without it alpha = 1.
        use_beta_gate: whether to use the write strength; without it beta = 1.
        use_forget_gate: whether the state decays; without it g = 0.
        use_output_gate: whether SiLU(x W_g) multiplies the normalised output.
        kv_proj_rank: rank of a learned map that gives every query head its own keys and values, added to the
            repeated key/value heads; needs Hk < H. None means no such map.
        kv_learnable_residual: whether the repeated heads are learned mixtures of all heads; needs kv_proj_rank.
        hidden_act: activation of the feed-forward block.
        max_position_embeddings: length of the longest sequence for the rotary embedding of attention layers;
            GKA layers have no such limit.
        rope_parameters: rotary embedding of the attention layers, as in transformers.
        sliding_window: tokens that a "sliding_attention" layer sees.
        attention_bias: whether q, k, v and o of the attention layers have a bias.
        attention_output_bias: whether o of the attention layers has a bias; None means attention_bias.
        mlp_bias: whether the projections of the feed-forward block have a bias.
        attention_dropout: dropout of the attention weights in training.
        use_qk_norm: whether queries and keys of the attention layers are RMS-normalised.
        initializer_range: standard deviation of all initial weights. None means 1 / sqrt(hidden_size), and
            projections into the residual stream are smaller by sqrt(2 num_hidden_layers).
        rms_norm_eps: epsilon of every RMSNorm.
        use_cache: whether `forward` returns a cache for decoding.
        tie_word_embeddings: whether the output projection uses the matrix of the embedding.
        pad_token_id, bos_token_id, eos_token_id: special token ids.

    Raises:
        ValueError: a value is invalid, or an unknown keyword is similar to the name of a field. The message
            names the field, its value and the expected value.
    """

    model_type = "gka"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012  (transformers adds lists to it)
    # TRL reads it of every model that is not in transformers: no code comes with our checkpoints.
    auto_map = dict[str, str]()  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 28
    num_attention_heads: int = 8
    num_key_value_heads: int = None  # type: ignore[assignment]  # these three: filled in by __post_init__
    head_dim: int = None  # type: ignore[assignment]
    layer_types: list[str] = None  # type: ignore[assignment]
    mixer: str = "gka"
    ridge_ratio: float = RIDGE_RATIO
    solver: str = "chebyshev"
    solver_steps: list[int] | None = None
    tolerance: float | None = None
    chunk_size: int | None = None
    conv_size: int = 4
    use_v_conv: bool = True
    use_alpha_connection: bool = True
    use_beta_gate: bool = True
    use_forget_gate: bool = True
    use_output_gate: bool = True
    kv_proj_rank: int | None = None
    kv_learnable_residual: bool = False
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rope_parameters: Any = None
    sliding_window: int | None = None
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    use_qk_norm: bool = True
    initializer_range: float | None = None
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_misspelt(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self._check_counts("hidden_size", "num_attention_heads")
            if self.hidden_size % self.num_attention_heads:
                self._refuse("hidden_size", f"a multiple of num_attention_heads, {self.num_attention_heads}")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self._check_counts("num_hidden_layers")
            self.layer_types = ["linear_attention"] * self.num_hidden_layers
        if isinstance(self.solver_steps, tuple):
            self.solver_steps = list(self.solver_steps)
        if isinstance(self.rope_parameters, dict):  # transformers fills it in: not in the caller's dict
            self.rope_parameters = dict(self.rope_parameters)
        self.check()
        # transformers has it on the class, for models whose layers are all alike
        self.base_model_tp_plan = plan(self.layer_types, self.mixer in OURS, self.use_qk_norm)  # type: ignore[misc]
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers'; a published configuration is translated."""
        found, rest = super().get_config_dict(*args, **kwargs)
        return read_config(found), rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'; a published configuration is translated, and `steps` of a configuration that was saved
        under the former name of `solver_steps`. Keywords replace what the dict says.
        """
        if "steps" in config_dict:
            config_dict = {_FORMER.get(name, name): value for name, value in config_dict.items()}
        if isinstance(kwargs.get("solver_steps"), tuple):
            kwargs["solver_steps"] = list(kwargs["solver_steps"])
        return super().from_dict(read_config(config_dict), **kwargs)

    @classmethod
    def from_recipe(cls, path: str | Path, **fields: Any) -> GKAConfig:
        """Make the configuration from a recipe, a YAML file of `gka train` options such as configs/440m.yaml.

        Args:
            path: the file; its options for data and training are not used.
            **fields: other fields, which override the file; e.g. vocab_size, which is not in a recipe.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file does not describe a model.
        """
        return cls(**{**read_recipe(path), **fields})

    def check(self) -> None:
        """Check all fields. The model calls this again, because fields can be set later.

        Raises:
            ValueError: a field is invalid; the message names it, its value and the expected value.
        """
        self._check_counts(*_COUNTS)
        self._check_counts(*(name for name in _OPTIONAL_COUNTS if getattr(self, name) is not None))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "True or False")
        if self.attention_output_bias is not None and not isinstance(self.attention_output_bias, bool):
            self._refuse("attention_output_bias", "True, False or None, which means attention_bias")
        for name in (
            "ridge_ratio",
            "rms_norm_eps",
            *(() if self.initializer_range is None else ("initializer_range",)),
        ):
            if not (self._is_number(name) and 0.0 < getattr(self, name) < math.inf):
                self._refuse(name, "a finite number greater than 0")
        if not (self._is_number("attention_dropout") and 0.0 <= self.attention_dropout < 1.0):
            self._refuse("attention_dropout", "a number of at least 0 and less than 1")
        if self.mixer not in known_mixers():
            self._refuse("mixer", f"one of {known_mixers()}, or a layer given to register_mixer")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACT2FN:
            self._refuse("hidden_act", f"one of {sorted(ACT2FN)}")
        self._check_solver()
        self._check_layers()
        self._check_mixer()
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            self._refuse(
                "pad_token_id",
                f"None or a token id less than vocab_size, {self.vocab_size}; for a new token call "
                "model.resize_token_embeddings first, then set model.config.pad_token_id",
            )

    def _check_solver(self) -> None:
        if self.mixer != "gka":
            for name in ("solver", "tolerance"):
                if getattr(self, name) != getattr(type(self), name):
                    self._refuse(
                        name, f"{getattr(type(self), name)!r} with mixer={self.mixer!r}, which solves nothing"
                    )
        check_solver(self.solver, self.tolerance)
        if self.solver_steps is None:
            return
        if self.mixer != "gka":
            self._refuse("solver_steps", f"None with mixer={self.mixer!r}, which solves nothing")
        whole = isinstance(self.solver_steps, list) and all(_is_count(n) for n in self.solver_steps)
        if not whole or not self.solver_steps:
            self._refuse("solver_steps", "None or a list of integers of at least 1, such as [31] or [16, 16]")

    def _check_layers(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            self._refuse("num_key_value_heads", f"a divisor of num_attention_heads, {self.num_attention_heads}")
        if self.kv_proj_rank is not None and self.num_key_value_heads == self.num_attention_heads:
            self._refuse("kv_proj_rank", "None where there are as many key/value heads as query heads")
        if self.kv_learnable_residual and self.kv_proj_rank is None:
            self._refuse("kv_learnable_residual", "False without kv_proj_rank")
        types = self.layer_types
        if not isinstance(types, list) or any(name not in LAYER_TYPES for name in types):
            self._refuse("layer_types", f"a list of {', '.join(LAYER_TYPES)}")
        if len(types) != self.num_hidden_layers:
            self._refuse("layer_types", f"one entry for each of num_hidden_layers = {self.num_hidden_layers}")
        if "linear_attention" in types and self.head_dim > MAX_DIM:
            self._refuse("head_dim", f"at most {MAX_DIM} with a linear_attention layer")
        if self.has_attention and self.head_dim % 2:
            self._refuse("head_dim", "an even number with softmax attention layers, for the rotary embedding")
        if "sliding_attention" in types and self.sliding_window is None:
            self._refuse("sliding_window", "a number of tokens, as a layer is sliding_attention")

    def _check_mixer(self) -> None:
        """Refuse changed fields of a GKA layer if the mixer does not have them."""
        if self.mixer in OURS:
            return
        for name in _OWN:
            if getattr(self, name) != getattr(type(self), name):
                self._refuse(name, f"{getattr(type(self), name)} with mixer={self.mixer!r}")
        registered_mixer(self.mixer).check(self)

    @property
    def number_of_conv_states(self) -> int:
        """Number of convolution states of a layer in the cache: three (q, k, v), or one with other mixers.

        Recurrent states are 0 S_kk and 1 S_kv.
        """
        return 3 if self.mixer in OURS else 1

    @property
    def initializer_std(self) -> float:
        """The standard deviation of the initial weights, from initializer_range."""
        return default_std(self.hidden_size) if self.initializer_range is None else self.initializer_range

    @property
    def output_factor(self) -> float:
        """The factor of the initial weights of projections into the residual stream."""
        return residual_factor(self.num_hidden_layers) if self.initializer_range is None else 1.0

    @property
    def has_attention(self) -> bool:
        """Whether any block is softmax attention."""
        return any(name != "linear_attention" for name in self.layer_types)

    def _check_counts(self, *names: str) -> None:
        for name in names:
            if not _is_count(getattr(self, name)):
                self._refuse(name, "an integer of at least 1")

    def _is_number(self, name: str) -> bool:
        value = getattr(self, name)
        return isinstance(value, int | float) and not isinstance(value, bool)

    def _refuse(self, name: str, expected: str) -> NoReturn:
        raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")

    def _refuse_misspelt(self, unknown: dict[str, Any]) -> None:
        """Raise ValueError for a misspelt field; transformers would keep it as an attribute."""
        fields = [name for name in GKAConfig.__annotations__ if not name.endswith("_token_id")]
        for name in unknown:
            if other := _FORMER.get(name, _ELSEWHERE.get(name)):
                raise ValueError(f"{name} is no field of GKAConfig; expected {other}")
            if near := difflib.get_close_matches(name, fields, n=1, cutoff=0.85):
                raise ValueError(f"{name} is no field of GKAConfig; expected {near[0]}?")


class PublishedConfig(GKAConfig):
    """The class for the published model type in transformers' AutoConfig; it makes a GKAConfig."""

    model_type = PUBLISHED

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As GKAConfig.from_dict."""
        return GKAConfig.from_dict(config_dict, **kwargs)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
