"""MiniCodformer in transformers' protocol: encoder over the prompt, liquid decoder, tied embedding, caches, generation.

Padding is told by attention masks alone, never by token ids. One parameter holds the embedding and the output weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import can_return_tuple

from .config import MiniCodformerConfig
from .decoder import MiniCodformerDecoder
from .encoder import MiniCodformerEncoder
from .layers import RMSNorm, TokenEmbedding
from .ltc import LiquidMixer
from .shape import StudentShape

IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentHidden:
    """What a training step needs of the student before the vocabulary comes in."""

    decoder_BTD: Tensor
    """Normalised output of the decoder, not yet through `output_hidden`."""
    cross_attention: tuple[Tensor, ...] | None
    """Head-mean attention of each decoder layer over all prompt keys, [B, T, P]; None unless asked for."""
    encoder_attention: tuple[Tensor, ...] | None
    """The same of each encoder layer, [B, P, P]."""


class MiniCodformerPreTrainedModel(PreTrainedModel):
    config_class = MiniCodformerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _supports_sdpa = True
    _no_split_modules = ["EncoderLayer", "DecoderLayer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.embedding_std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, LiquidMixer):
            module.initialize()

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **_: Any) -> Tensor | None:
        """Static caches ask for masks per layer type; every layer here takes the plain one."""
        return attention_mask


class MiniCodformerModel(MiniCodformerPreTrainedModel):
    """Encoder and decoder without the output layer. The encoder owns the embedding; the decoder borrows it."""

    def __init__(self, config: MiniCodformerConfig) -> None:
        super().__init__(config)
        self.encoder = MiniCodformerEncoder(config)
        self.decoder = MiniCodformerDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> TokenEmbedding:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: TokenEmbedding) -> None:
        self.encoder.embed_tokens = value

    def get_encoder(self) -> MiniCodformerEncoder:
        return self.encoder

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> Seq2SeqModelOutput:
        """Masks are 1 at tokens and 0 at padding, [B, P] and [B, T]; without one, nothing is padding."""
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        if encoder_outputs is None and input_ids is not None and decoder_input_ids is not None:
            inputs_embeds, decoder_inputs_embeds = self._embed_together(input_ids, decoder_input_ids)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids, attention_mask, inputs_embeds, output_attentions, output_hidden_states
            )
        if decoder_inputs_embeds is None:
            decoder_inputs_embeds = self.encoder.embed_tokens(decoder_input_ids)
        decoded = self.decoder(
            decoder_inputs_embeds,
            decoder_attention_mask,
            encoder_outputs.last_hidden_state,
            attention_mask,
            past_key_values,
            output_attentions,
            output_hidden_states,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )

    def _embed_together(self, input_ids: Tensor, decoder_input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """One look-up for both sides: each look-up costs a gradient of the size of the vocabulary."""
        embedded = self.encoder.embed_tokens(torch.cat([input_ids.flatten(), decoder_input_ids.flatten()]))
        prompt, response = embedded.split([input_ids.numel(), decoder_input_ids.numel()])
        return prompt.unflatten(0, input_ids.shape), response.unflatten(0, decoder_input_ids.shape)


class MiniCodformerForConditionalGeneration(MiniCodformerPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MiniCodformerConfig) -> None:
        super().__init__(config)
        self.model = MiniCodformerModel(config)
        factorised = config.embedding_rank is not None
        self.narrow = nn.Linear(config.hidden_size, config.embedding_size, bias=False) if factorised else None
        self.lm_head: nn.Module = nn.Linear(config.embedding_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> TokenEmbedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: TokenEmbedding) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_encoder(self) -> MiniCodformerEncoder:
        return self.model.encoder

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor | None = None,
        need_attention: bool = False,
    ) -> StudentHidden:
        """Run both stacks and stop before the vocabulary, for losses that never hold the logits."""
        output = self.model(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, output_attentions=need_attention
        )
        return StudentHidden(
            decoder_BTD=output.last_hidden_state,
            cross_attention=tuple(w.mean(1) for w in output.cross_attentions) if need_attention else None,
            encoder_attention=tuple(w.mean(1) for w in output.encoder_attentions) if need_attention else None,
        )

    def output_hidden(self, decoder_BTD: Tensor) -> Tensor:
        """What the output weight multiplies: logits = output_hidden(h) @ output_weight().T, scaled by D^-1/2."""
        scaled_BTD = decoder_BTD * self.config.hidden_size**-0.5
        narrowed_BTD: Tensor = scaled_BTD if self.narrow is None else self.narrow(scaled_BTD)
        return narrowed_BTD

    def output_weight(self) -> nn.Parameter:
        """The tied embedding, [V, D] or [V, embedding_rank]."""
        return self.lm_head.get_parameter("weight")

    @torch.no_grad()
    def init_embedding_from_pca(self, components_VD: Any) -> None:
        """Start the embedding from principal components of a teacher's output layer, columns by falling variance.

        They are scaled to the embedding's own initial size. Columns that the student lacks are dropped; columns that
        the teacher lacks keep their random start. Raises ValueError for another vocabulary.
        """
        weight = self.output_weight()
        components_VD = torch.as_tensor(components_VD, dtype=torch.float32)[:, : weight.shape[1]]
        if components_VD.shape[0] != weight.shape[0]:
            raise ValueError(f"components of {components_VD.shape[0]} tokens for a vocabulary of {weight.shape[0]}")
        size = components_VD.square().mean().sqrt()
        weight[:, : components_VD.shape[1]] = components_VD * (self.config.embedding_std / size)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Labels moved one to the right behind the start token; what is ignored as a label is padding as an input."""
        start = labels.new_full((labels.shape[0], 1), self.config.decoder_start_token_id)
        return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED_LABEL, start[0, 0])], 1)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        logits_to_keep: int = 0,
    ) -> Seq2SeqLMOutput:
        """Logits of the last `logits_to_keep` positions (0: of all), and the mean cross-entropy of `labels`."""
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        logits_BTV = self.lm_head(self.output_hidden(output.last_hidden_state[:, -logits_to_keep:]))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits_BTV,
            past_key_values=output.past_key_values,
            decoder_hidden_states=output.decoder_hidden_states,
            cross_attentions=output.cross_attentions,
            encoder_last_hidden_state=output.encoder_last_hidden_state,
            encoder_hidden_states=output.encoder_hidden_states,
            encoder_attentions=output.encoder_attentions,
        )


def build_student(
    shape: StudentShape, *, vocab_size: int, start_token_id: int, end_token_id: int, seed: int
) -> MiniCodformerForConditionalGeneration:
    """A fresh student in fp32 on the CPU, the same for the same arguments. Leaves the global random state alone.

    The start token also fills finished rows in generation, so it must differ from the end token (ValueError).
    """
    if start_token_id == end_token_id:
        raise ValueError(f"token {start_token_id} cannot both start a response and end it")
    for name, token_id in (("start_token_id", start_token_id), ("end_token_id", end_token_id)):
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"{name} {token_id} lies outside a vocabulary of {vocab_size}")
    config = MiniCodformerConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        num_encoder_layers=shape.encoder_layers,
        num_hidden_layers=shape.decoder_layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate_size,
        conv_kernel=shape.conv_kernel,
        ode_unfolds=shape.ode_unfolds,
        recurrence=shape.recurrence,
        wiring=shape.wiring,
        prime_state=shape.prime_state,
        ncp_sparsity=shape.ncp_sparsity,
        ncp_seed=shape.ncp_seed,
        embedding_rank=shape.embedding_rank,
        pad_token_id=start_token_id,
        decoder_start_token_id=start_token_id,
        eos_token_id=end_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MiniCodformerForConditionalGeneration(config)


AutoConfig.register(MiniCodformerConfig.model_type, MiniCodformerConfig, exist_ok=True)
AutoModel.register(MiniCodformerConfig, MiniCodformerModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(MiniCodformerConfig, MiniCodformerForConditionalGeneration, exist_ok=True)
MiniCodformerConfig.register_for_auto_class()
MiniCodformerModel.register_for_auto_class()
MiniCodformerForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
