"""Language models of Gated KalmaNet layers, alone or with softmax attention at chosen layers, for transformers.

Each block is pre-norm: x + mix(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)). mix is a GKA layer (`.gka`), softmax
attention with rotary embedding, grouped heads and an optional sliding window (`.self_attn`), or another registered
recurrent layer (`.peer`). Everything except the GKA layer comes from Qwen3, with the same module names. The cache,
the masks, generation and loading come from transformers.

Legend: B batch, T time of this call, P tokens in the cache, N packed sequences.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..nn.part import PartOfBatch
from .block import GKABlock, RMSNorm
from .cache_name import CACHE, NEW, OLD, named, takes_cache
from .captured_step import decode, forget
from .config import GKAConfig
from .inputs import LOSS_KEYWORDS, check_keywords, packing_of_call, padding_mask, positions
from .length import add_counter, check_mask_length, check_prompt, count_tokens
from .loss import check_loss_function, chunked_loss
from .packing import Packing
from .pretrained import GKAPreTrainedModel
from .shared_tokens import shares_tokens


class GKAModel(GKAPreTrainedModel):
    """The blocks, without the output projection.

    Args:
        config: sizes, layers and solver.
    """

    def __init__(self, config: GKAConfig) -> None:
        super().__init__(config)
        config.check()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(GKABlock(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.has_attention:
            self.rotary_emb = Qwen3RotaryEmbedding(config)  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()

    @shares_tokens
    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        context_parallel: PartOfBatch | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Run the blocks.

        Args:
            input_ids: [B, T] of int64; or inputs_embeds: [B, T, hidden_size]. One of the two.
            attention_mask: [B, P + T], 0 for padding, and 1 for a token or the number of its packed sequence.
                Padding may be anywhere, but a sliding window counts the padding between its tokens. Or
                transformers' masks by layer type.
            position_ids: [B, T] or [1, T], for the rotary embedding. None counts the real tokens. A packed
                sequence starts where they do not rise (`gka.hf.packing`).
            past_key_values: a cache to continue from, `DynamicCache(config=config)`; it is updated in place.
                `cache` is another name of this argument, the name in transformers from 5.24 on.
            use_cache: whether to return a cache, a new one if none is given. A packed batch returns none.
            context_parallel: the part of a batch that the tokens are, set by `gka.distributed.parallelize`. It
                knows the packed sequences; attention_mask is then None or masks by layer type.
            **kwargs: keywords of transformers' models: output_hidden_states, output_attentions, and for packed
                batches cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx. Also no_pads: True if
                none of the T tokens is padding, whatever attention_mask says about earlier tokens. cache_position
                and token_type_ids have no effect.

        Raises:
            TypeError: a keyword is unknown, or past_key_values is not a Cache.
            ValueError: arguments do not fit, or a packed batch has a mask or a cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds are both given or both missing; expected one of them")
        if past_key_values is not None and not isinstance(past_key_values, Cache):
            raise TypeError(
                f"past_key_values is a {type(past_key_values).__name__}; expected a transformers.Cache"
            )
        no_pads = kwargs.pop("no_pads", False)
        check_keywords(kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        packing = None
        if context_parallel is None:
            packing = packing_of_call(
                self.config, inputs_embeds, attention_mask, position_ids, past_key_values, kwargs
            )
        if packing is not None:
            packing = packing.to(inputs_embeds.device)
            attention_mask = None  # its pads are sequences of their own
        if use_cache and past_key_values is None and packing is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and not self.config.has_attention:
            add_counter(past_key_values)
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            check_mask_length(attention_mask, past_key_values, inputs_embeds.shape[1])
        if isinstance(attention_mask, dict):
            masks = attention_mask
        else:
            masks = self._masks(inputs_embeds, attention_mask, past_key_values, packing, no_pads)
        arguments = None
        if self.config.has_attention:
            if position_ids is None:
                position_ids = positions(inputs_embeds, attention_mask, past_key_values, packing)
            arguments = {
                "position_embeddings": self.rotary_emb(inputs_embeds, position_ids),
                "position_ids": position_ids,
                **({} if context_parallel is None else {"context_parallel": context_parallel}),
                **{name: kwargs[name] for name in FlashAttentionKwargs.__annotations__ if name in kwargs},
            }
        hidden_states = inputs_embeds
        for kind, block in zip(self.config.layer_types, self.layers, strict=True):
            hidden_states = block(
                hidden_states,
                attention_mask=masks[kind],
                **named(past_key_values),
                packing=packing,
                attention_arguments=arguments,
                context_parallel=context_parallel,
            )
        if past_key_values is not None and not self.config.has_attention:
            count_tokens(past_key_values, inputs_embeds)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            **named(past_key_values if use_cache else None),
        )

    def _masks(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        packing: Packing | None,
        no_pads: bool,
    ) -> dict[str, Any]:
        """The mask for each kind of layer in the model."""
        makers = {
            "full_attention": create_causal_mask,
            "sliding_attention": create_sliding_window_causal_mask,
        }
        masks: dict[str, Any] = {}
        for kind in set(self.config.layer_types):
            if kind == "linear_attention":
                masks[kind] = padding_mask(None if no_pads else attention_mask, inputs_embeds.shape[1])
                continue
            masks[kind] = makers[kind](
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                **named(past_key_values),
                position_ids=None if packing is None else packing.positions,
                layer_idx=self.config.layer_types.index(kind),
            )
        return masks


class GKAForCausalLM(GKAPreTrainedModel, GenerationMixin):
    """The language model: the blocks, and the projection to the logits of the next token.

    Args:
        config: sizes, layers and solver.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: GKAConfig) -> None:
        super().__init__(config)
        self.model = GKAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_chunk: int | None = None
        self.post_init()

    def set_loss_chunk(self, tokens: int | None) -> None:
        """Compute the loss in chunks of tokens from the next call on (`gka.hf.loss`); it is not saved.

        Calls with labels then return no logits and need no memory for those of the whole batch. Loss and
        gradients stay the same.

        Args:
            tokens: tokens whose logits exist at the same time, such as 2048; None, the default, for all tokens.

        Raises:
            ValueError: tokens is not None or a positive integer.
        """
        if tokens is not None and (type(tokens) is not int or tokens < 1):
            raise ValueError(f"tokens is {tokens!r}; expected a positive integer or None")
        self.loss_chunk = tokens

    @shares_tokens
    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Run the model; arguments as in `GKAModel.forward`, and:

        Args:
            labels: [B, T] int64, the input tokens (the model shifts them), with -100 at positions without a loss.
            logits_to_keep: number of last positions that get logits, 0 for all; or their indices.
            **kwargs: as in `GKAModel.forward`, and for the loss num_items_in_batch, shift_labels, ignore_index.
                num_logits_to_keep is the former name of logits_to_keep.

        Returns:
            logits [B, T or logits_to_keep, vocab_size], the mean loss (or the sum over num_items_in_batch) if
            labels are given, and the cache. With labels after `set_loss_chunk` the logits are None.

        Raises:
            ValueError: besides the errors of `GKAModel.forward`, another loss_function after `set_loss_chunk`.
        """
        logits_to_keep = kwargs.pop("num_logits_to_keep", logits_to_keep)  # type: ignore[typeddict-item]
        loss_kwargs = {name: kwargs.pop(name) for name in LOSS_KEYWORDS if name in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        last = outputs.last_hidden_state[:, kept, :]
        loss = logits = None
        if labels is not None and self.loss_chunk is not None:
            check_loss_function(self.loss_function)
            loss = chunked_loss(self.lm_head, last, labels, self.loss_chunk, **loss_kwargs)
        else:
            logits = self.lm_head(last)
            if labels is not None:
                loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs
                )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **named(outputs.get(CACHE)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, for `generate`. A cache with GKA layers only also gets a counter of tokens."""
        given = model_kwargs.get(CACHE)
        prepare: Any = super()._prepare_cache_for_generation  # type: ignore[misc]
        result = prepare(generation_config, model_kwargs, *args, **kwargs)
        if isinstance(given, Cache):
            given._is_user_defined = True  # type: ignore[attr-defined]  # transformers notes it from 5.2x on
        cache = model_kwargs.get(CACHE)
        if isinstance(cache, Cache) and not self.config.has_attention:
            add_counter(cache)
        return result

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers', for `generate`; a prompt that does not go on from the cache is an error."""
        embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
        tokens = columns = (input_ids if embeds is None else embeds).shape[1]
        if embeds is None:  # of a mask of ones transformers keeps the length alone
            columns = getattr(generation_config, "_mask_length", tokens) if mask is None else mask.shape[1]
        check_prompt(tokens, model_kwargs.get(CACHE), columns)
        prefill: Any = super()._prefill  # type: ignore[misc]
        return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    @functools.wraps(GenerationMixin._sample)
    def _sample(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return decode(GenerationMixin._sample, self, *args, **kwargs)

    @functools.wraps(GenerationMixin._beam_search)
    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return decode(GenerationMixin._beam_search, self, *args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """As PyTorch's; training mode frees the graph and the buffers that `generate` keeps on a GPU."""
        if mode:
            forget(self)
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """As PyTorch's, for `.to()` and the like; it frees the same, which belongs to the weights before."""
        forget(self)
        return super()._apply(*args, **kwargs)

    # transformers reads the signature: it must stay that of the method that is replaced
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers, without the tokenizers that `generate` passes on for stop strings.

        A generated token is never padding. The model gets this information, because it does not read the mask on a
        GPU.
        """
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc]
        inputs: dict[str, Any] = prepare(input_ids, *args, **kwargs)
        if kwargs.get("next_sequence_length") == 1 and not kwargs.get("is_first_iteration", False):
            inputs["no_pads"] = True
        if NEW in inputs:  # PEFT's prompt tuning (0.21) looks for the cache under its old name
            inputs[OLD] = inputs.pop(NEW)
        return inputs

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported, like `generate_batch`: its cache has pages for keys and values, but none for states.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "transformers' continuous batching keeps pages of keys and values and has no place for the states of "
            "GKA layers; generate() takes a batch of padded rows with an attention_mask, and `gka serve` lets "
            "requests take turns"
        )
