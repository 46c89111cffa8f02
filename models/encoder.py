"""ConceptEncoder: N tokens of a sequence -> C concepts, at cost O(C * N).

B sequences, T packed tokens, C concepts, d model width.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers.utils import ModelOutput

from ..kernels.autocast import lower_precision
from . import attention_maps
from .attention_maps import Watch
from .backbone import Backbone
from .config import ConceptConfig
from .door import open_door
from .encoder_layers import ConceptAngles, Tokens, build_layers
from .layers import (
    RowNorm,
    is_plain,
    widening,
)
from .packing import Packed
from .positions import TokenPositions, anchors
from .pretrained import ConceptPreTrainedModel
from .queries import ConceptQueries
from .recursion import apply_layers
from .token_layers import Places, TokenLayers
from .token_source import Embedded, TokenReader, Where, what_is_kept


@dataclass
class ConceptEncoderOutput(ModelOutput):
    last_hidden_state: Tensor | None = None  # [B, C, d] the concepts
    pooler_output: Tensor | None = None  # [B, d] their mean; with init_queries = state in the backbone's own space
    anchors: Tensor | None = None  # [B, C] float32, where each concept stands among the tokens
    hidden_states: tuple[Tensor, ...] | None = None  # the concepts before each layer, and the last of all
    convergence: Tensor | None = None  # [K, B] float32, |c_k+1 - c_k| / |c_k| of each layer or iteration
    attentions: tuple[Tensor, ...] | None = None  # on request, of each layer: [B, H, C, N], or [H, C, T]


def plain_norm(config: ConceptConfig, width: int) -> nn.RMSNorm:
    return nn.RMSNorm(width, eps=config.norm_eps, elementwise_affine=False)


class ConceptEncoder(ConceptPreTrainedModel):
    """Reads packed or padded token ids and returns C concepts for each sequence.

        t   = RMSNorm(widen(token_layers(e_ids)))                       or of a backbone's states, see ``Backbone``
        c_0 = e_i (+ the normalised mean of the tokens around anchor i) (+ a vector for place i)
        c_l = layer_l(c_{l-1}, t),   l = 1 .. L, or K times the one tied layer         concepts = RMSNorm(c_L)

    Keys and values are read from normalised tokens; queries and keys are normalised per head. By default RoPE puts
    tokens at their positions and concepts at their anchors (``positions.anchors``), so that addressing is relative and
    any N fits any C. A sequence without tokens gives finite concepts that depend on the parameters only.

    Memory and time are linear in T. What a training step keeps of every token, for the backward pass, ``keep`` says:

        "keys"    keys and values of every layer that makes some, beside the states
        "states"  the state and its gradient, one each for all layers; layers read in chunks and make keys and values
                  again in the backward pass
        "ids"     the id: states are made again as well; for token embeddings that nothing but the norm follows
        None      "states" on a CPU for more than 1,024 tokens; "keys" for fewer, where they are made once for several
                  layers (tied, share_kv), and elsewhere

    The result is the same within rounding. None keeps keys where the rest cannot be: by layers of slots (whose softmax
    runs over concepts) and BiXT (which changes tokens), by projections that are wrapped, hooked or cut by ZeRO-3, and
    under torch.compile; "states" or "ids" there are refused, but for torch.compile, which does as it is told. What
    token layers and ``widen_tokens`` keep is not touched: for them there is gradient checkpointing. One derivative.
    Source: Perceiver IO (Jaegle et al. 2021, arXiv:2107.14795) with anchored concepts.
    """

    keep: str | None = None
    group: ProcessGroup | None = None  # of devices that each hold a part of every text, ``sharding.shard``
    hands_attentions_on = True
    # of the folder of a model with a head, whose encoder this is: what AutoModel leaves there is no surprise
    _keys_to_ignore_on_load_unexpected: ClassVar = [
        rf"^{part}\." for part in ("decoder", "exposure", "lm_head", "norm", "pool", "classifier", "qa_outputs")
    ]

    def __init__(self, config: ConceptConfig):
        super().__init__(config)
        self.backbone = None if config.backbone is None else Backbone(config)
        own = self.backbone is None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.token_dim) if own else None
        self.positions = TokenPositions(config, config.token_dim)
        # embeddings are small: as they are, what layers learn to add to all of them alike would soon outweigh them
        normalizes = config.normalize_tokens and config.num_token_layers > 0
        self.token_start = plain_norm(config, config.token_dim) if normalizes else nn.Identity()
        self.token_layers = TokenLayers(config)
        self.widen_tokens = widening(config)
        self.token_norm = RowNorm(config.hidden_size, eps=config.norm_eps)
        self.token_reader = TokenReader()
        self.concepts = ConceptQueries(config)
        self.layers = build_layers(config)
        keeps = config.init_queries == "state"  # the mean of the concepts starts as the mean of the states
        self.out_norm = nn.Identity() if keeps else plain_norm(config, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens if self.backbone is None else self.backbone.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        if self.backbone is not None:
            self.backbone.model.set_input_embeddings(value)
        else:
            self.embed_tokens = value

    @property
    def embeddings_name(self) -> str:
        """Of the table [V, e] of token embeddings, for models that tie others to it."""
        return "embed_tokens.weight" if self.backbone is None else f"backbone.{self.backbone.embeddings_name}"

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, *,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        packed: Packed | None = None, num_concepts: int | None = None, asked: Tensor | None = None,
        num_iterations: int | None = None, tolerance: float | None = None,
        cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None, max_length_k: int | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, output_convergence: bool = False, return_dict: bool | None = None,
    ) -> ConceptEncoderOutput | tuple:  # fmt: skip
        """Encodes texts, in one of the forms of ``door.open_door``: ``packed``, or ``input_ids`` [B, N] (or
        ``inputs_embeds``) with ``attention_mask`` [B, N], or [1, T] under the names of transformers' flattening
        collator. Those of the last two are packed at the door, [MASK] tokens left out if ``config.hidden_tokens`` is
        "drop" (of ``inputs_embeds`` nobody can tell: leave them out of the mask).

        Args:
            token_type_ids: not read: which of two texts a token is of, the separator says.
            num_concepts: C, any, of all texts of the batch; the configuration's by default. Learned rows follow as when
                a checkpoint is loaded with another C. ``packing.fitting_concepts`` finds one that fits the texts.
            asked: [B, Q, d] concepts of a question about each text. They join the C that read it, as the last Q rows
                of what comes back, spread over the text like others; the pooled output is that of the first C. So what
                is kept of a text can depend on what is wanted of it.
            num_iterations: K of a tied layer, any; the configuration's by default.
            tolerance: in evaluation, ends the iterations of a tied layer after one that changed the concepts of every
                sequence by less, |c_k+1 - c_k| < tolerance * |c_k|. Synchronises with the host once an iteration.
            output_attentions: also the weights with which each layer or iteration reads tokens (``attention_maps``),
                exactly, without gradient, up to 1 GiB of them: [B, H, C, N], zero at tokens that are not read; of
                packed texts [H, C, T], each column of the concepts of its own text.
            output_hidden_states, return_dict: as in transformers; None: what the configuration says.

        Raises:
            ValueError: not exactly one form of the texts came, a shape does not fit, iterations were asked of layers
                that are not tied, or attentions of a funnel, which merges tokens, or too large to hand out.
        """
        with_states, as_dict = self.wants(output_attentions, output_hidden_states, return_dict)
        door = open_door(
            input_ids, attention_mask, packed, inputs_embeds=inputs_embeds, position_ids=position_ids,
            cu_seq_lens_q=cu_seq_lens_q, cu_seq_lens_k=cu_seq_lens_k, max_length_q=max_length_q,
            max_length_k=max_length_k,
        )  # fmt: skip
        self.check_iterations(num_iterations, tolerance)
        is_count = isinstance(num_concepts, int | torch.SymInt) and not isinstance(num_concepts, bool)
        if num_concepts is not None and not (is_count and num_concepts >= 1):
            raise ValueError(f"num_concepts: expected a whole number of at least 1, got {num_concepts!r}")
        if packed is None:
            packed = self.visible(self.bare(door.packed))
        maps = None
        if self.wants_attentions(output_attentions):
            if asked is not None:
                raise ValueError("output_attentions: expected False with asked, whose rows have no maps")
            maps = attention_maps.Rows(self.config, packed, num_iterations, num_concepts, self.group is not None)
        watch = None if maps is None else maps.watch
        states, changes = self.encode(
            packed, num_iterations, tolerance, output_convergence, num_concepts, watch, asked
        )  # fmt: skip
        result = ConceptEncoderOutput(
            last_hidden_state=states[-1],
            pooler_output=self.pooled(states[-1] if asked is None else states[-1][:, : -asked.shape[1]]),
            anchors=self.all_anchors(packed, num_concepts, asked),
            hidden_states=tuple(states) if with_states else None,
            convergence=torch.stack(changes) if output_convergence else None,
        )
        if maps is not None:
            read_T = None if packed is door.packed else self.rows_read(door.packed)
            result.attentions = attention_maps.spread(maps.maps(), door, read_T)
        return result if as_dict else result.to_tuple()

    def encode(
        self, packed: Packed, num_iterations: int | None = None, tolerance: float | None = None,
        with_changes: bool = False, num_concepts: int | None = None, watch: Watch | None = None,
        asked: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
        """The concepts [B, C, d] before each layer, then the normalised ones; on request each layer's change [B]. What
        ``watch`` is given before each layer is as in ``attention_maps``, with whole tokens."""
        config, B = self.config, packed.num_sequences
        tokens = self.read_tokens(packed) if watch is None else self.whole_tokens(packed)
        anchors_BC = self.all_anchors(tokens.packed, num_concepts, asked)
        angles = self.concept_angles(anchors_BC)
        K = config.iterations if num_iterations is None else num_iterations
        num_frozen = 0
        if config.backprop_iterations is not None and torch.is_grad_enabled():
            num_frozen = max(0, K - config.backprop_iterations)
        read = tokens.states if tokens.source is None else tokens.source
        beginning = read if tokens.raw is None else tokens.raw
        start_BCd = self.concepts(beginning, tokens.packed, num_concepts, self.group)
        if asked is not None:
            self.check_asked(asked, B, start_BCd.shape[0])
            start_BCd = torch.cat((start_BCd, asked.to(start_BCd.dtype)), dim=1)
        states, changes = apply_layers(
            [self.layers[0]] * K if config.tie_layers else list(self.layers), start_BCd, angles, tokens,
            num_texts=B, num_frozen=num_frozen, tolerance=tolerance, with_changes=with_changes, watch=watch,
        )  # fmt: skip
        states[-1] = self.out_norm(states[-1])
        return [c_BCd[:B] for c_BCd in states], changes

    def concept_angles(self, anchors_BC: Tensor) -> ConceptAngles:
        return ConceptAngles(self.positions.angles(anchors_BC), self.positions.concept_angles(anchors_BC))

    def read_tokens(self, packed: Packed) -> Tokens:
        """Tokens as concepts read them: through their own layers, as wide as the model, normalised."""
        keep = self.kept_of_tokens(packed.num_tokens)
        if packed.embeds is not None:
            self.check_embeds(packed.embeds)
        if keep == "keys":
            return self.whole_tokens(packed)
        has_plain_embeddings = self.has_plain_embeddings and packed.embeds is None
        if keep == "ids" and not has_plain_embeddings:
            raise ValueError(
                "keep: expected keys or states, got 'ids': the embeddings are given, are a backbone's, or have an "
                "adapter, a hook or ZeRO-3"
            )
        dtype = raw = None
        if has_plain_embeddings:
            table, norm = self.embed_tokens.weight, self.token_norm.weight
            states, places = Embedded(packed.input_ids, table, norm, self.token_norm.eps), packed
            if keep == "states":
                wide = torch.promote_types(table.dtype, norm.dtype)
                dtype = lower_precision(table.new_empty(0, dtype=wide))[0].dtype
            positions = packed.position_ids
        else:
            states, positions, places, raw = self.token_states(packed)
        frequencies, temperature = self.positions.read_frequencies(packed.input_ids.device)
        source = self.token_reader(states, places, Where(positions, frequencies, temperature), dtype)
        return Tokens(None, None, places, raw=raw, source=source)

    def check_embeds(self, embeds_Te: Tensor) -> None:
        if self.backbone is not None:
            raise ValueError("inputs_embeds: expected input_ids: a backbone embeds the tokens of each window itself")
        if embeds_Te.shape[1] != self.config.token_dim:
            expected = f"[B, N, {self.config.token_dim}], as wide as token embeddings"
            raise ValueError(f"inputs_embeds: expected shape {expected}, got a width of {embeds_Te.shape[1]}")

    def kept_of_tokens(self, num_tokens: int) -> str:
        """What is kept of a token in this call, see ``keep``; or a ValueError that begins with "keep"."""
        is_plain = self.config.layer_kind != "cross" or all(layer.read.is_plain for layer in self.layers)
        is_on_cpu = self.token_norm.weight.device.type == "cpu"
        return what_is_kept(self.config, self.keep, is_plain, self.group is not None, is_on_cpu, num_tokens)

    @property
    def has_plain_embeddings(self) -> bool:
        return (
            self.backbone is None and is_plain(self.embed_tokens, nn.Embedding) and is_plain(self.token_norm, RowNorm)
            and self.config.token_positions == "rope" and len(self.token_layers) == 0
            and isinstance(self.token_start, nn.Identity) and isinstance(self.widen_tokens, nn.Identity)
            and not hasattr(self.embed_tokens, "parametrizations") and self.embed_tokens.max_norm is None
        )  # fmt: skip

    def token_states(self, packed: Packed) -> tuple[Tensor, Tensor, Packed, Tensor | None]:
        """States [R, d], their positions [R], whose they are, and of a backbone from which concepts start ``raw``."""
        raw = None
        if self.backbone is None:
            embeds = self.embed_tokens(packed.input_ids) if packed.embeds is None else packed.embeds
            rows_Te = self.positions(embeds, packed.position_ids, packed.max_seqlen)
            rows_Re, places = self.token_layers(self.token_start(rows_Te), packed, self.positions)
        else:
            rows_Re = self.backbone(packed) if packed.states is None else packed.states.to(self.token_norm.weight.dtype)
            places = Places(packed.position_ids, packed.sequence_ids(), packed)
            raw = self.backbone.centred(rows_Re) if self.config.init_queries == "state" else None
        if places.packed.own is not None:
            own = places.packed.own
            rows_Re, places = rows_Re[own], Places(places.positions[own], places.sequence_ids[own], packed.select(own))
        states = self.token_norm(self.widen_tokens(rows_Re))
        if self.config.layer_kind != "bixt":  # there they go on as a residual stream
            states = lower_precision(states)[0]  # once for the keys and values of all layers
        return states, places.positions, places.packed, raw

    def whole_tokens(self, packed: Packed) -> Tokens:
        """Tokens with their states and angles, for layers that make keys and values of all of them."""
        states, positions, packed, raw = self.token_states(packed)
        # the temperature of YaRN is for a softmax over tokens
        find = self.positions.angles if self.config.layer_kind == "slot" else self.positions.read_angles
        return Tokens(states, find(positions), packed, raw, group=self.group)

    def pooled(self, concepts_BCd: Tensor) -> Tensor:
        """[B, d]: the mean of the concepts. With init_queries = state, brought back into the backbone's own space: of
        layers that are still the identity it is the mean of the states at the tokens of the text, exactly."""
        mean_Bd = concepts_BCd.mean(1)
        return self.backbone.restored(mean_Bd) if self.config.init_queries == "state" else mean_Bd

    def as_states(self, concepts_BCd: Tensor) -> Tensor:
        """[B, C, d] concepts without their rows, as states of the backbone: with init_queries = state only. Untrained,
        each is the mean of the states around its anchor.

        Raises:
            ValueError: the concepts start from something else.
        """
        if self.config.init_queries != "state":
            raise ValueError(f"init_queries: expected state, got {self.config.init_queries!r}: concepts are no states")
        return self.backbone.restored(concepts_BCd - self.concepts.rows(concepts_BCd.shape[1]).to(concepts_BCd.dtype))

    def meanings(self, concepts_BCd: Tensor) -> Tensor:
        """[B, C, d] what is compared with vectors of other texts: concepts as they are, or ``as_states`` where they
        start from states. Their mean over C is ``pooled``."""
        return self.as_states(concepts_BCd) if self.config.init_queries == "state" else concepts_BCd

    def check_iterations(self, num_iterations: int | None, tolerance: float | None) -> None:
        for name, value in (("num_iterations", num_iterations), ("tolerance", tolerance)):
            if value is not None and not self.config.tie_layers:
                raise ValueError(f"{name}: expected nothing without tie_layers = true, got {value!r}")
        if num_iterations is not None and num_iterations < 1:
            raise ValueError(f"num_iterations: expected at least 1, got {num_iterations!r}")
        if tolerance is not None and self.training:
            raise ValueError(f"tolerance: expected nothing in training, got {tolerance!r}; call model.eval() first")

    def bare(self, packed: Packed) -> Packed:
        """Without the special tokens that the backbone's tokenizer put around each text: every window has its own."""
        keep = self.rows_inside(packed)
        if keep is None:
            return packed
        kept = packed.select(keep)
        positions = torch.arange(kept.num_tokens, device=keep.device) - kept.cu_seqlens[:-1].long()[kept.sequence_ids()]
        states = packed.states if kept.num_tokens == packed.num_tokens else None  # of other texts
        return Packed(kept.input_ids, positions, kept.cu_seqlens, packed.max_seqlen, states=states)

    def rows_inside(self, packed: Packed) -> Tensor | None:
        """[T] bool: what is no such token; None: nothing is."""
        backbone = self.backbone
        if backbone is None or packed.embeds is not None or packed.num_tokens == 0:
            return None
        if not (backbone.prefix or backbone.suffix):
            return None
        keep = torch.ones(packed.num_tokens, dtype=torch.bool, device=packed.input_ids.device)
        starts, ends = packed.cu_seqlens[:-1].long(), packed.cu_seqlens[1:].long()
        last = packed.num_tokens - 1
        for tokens, first in ((backbone.prefix, starts), (backbone.suffix, ends - len(backbone.suffix))):
            rows = first[:, None] + torch.arange(len(tokens), device=keep.device)
            there = ((rows >= starts[:, None]) & (rows < ends[:, None])).all(1)
            rows = rows.clamp(0, last)
            there &= (packed.input_ids[rows] == torch.tensor(tokens, device=keep.device)).all(1)
            keep[rows[there].flatten()] = False
        return keep

    def visible(self, packed: Packed) -> Packed:
        """What the encoder reads of a text with [MASK] tokens in it: without them if it was configured to drop them."""
        keep = self.rows_visible(packed)
        return packed if keep is None else packed.select(keep)

    def rows_visible(self, packed: Packed) -> Tensor | None:
        """[T] bool; None: all of them."""
        if self.config.hidden_tokens != "drop" or self.config.mask_token_id is None or packed.embeds is not None:
            return None
        return packed.input_ids != self.config.mask_token_id

    def rows_read(self, packed: Packed) -> Tensor:
        """[T] bool: which tokens of texts that came through the door are read."""
        keep = torch.ones_like(packed.input_ids, dtype=torch.bool)
        for rows in (self.rows_inside(packed), self.rows_visible(packed)):
            keep = keep if rows is None else keep & rows
        return keep

    def check_asked(self, asked: Tensor, num_texts: int, num_rows: int) -> None:
        d = self.config.hidden_size
        if asked.ndim != 3 or asked.shape[0] != num_texts or asked.shape[2] != d:
            raise ValueError(f"asked: expected shape [{num_texts}, Q, {d}], got {list(asked.shape)}")
        if num_rows != num_texts:
            raise ValueError("asked: expected nothing with a funnel, which reads one more text than there are")

    def all_anchors(self, packed: Packed, num_concepts: int | None, asked: Tensor | None) -> Tensor:
        """[B, C + Q]: those of the concepts, then of what is asked."""
        mine = self.anchors(packed, num_concepts)
        return mine if asked is None else torch.cat((mine, self.anchors(packed, asked.shape[1])), dim=1)

    def anchors(self, packed: Packed, num_concepts: int | None = None) -> Tensor:
        num_positions_B, C = packed.num_positions(), self.config.num_concepts if num_concepts is None else num_concepts
        if self.config.concept_positions != "rope":
            return num_positions_B.new_zeros((packed.num_sequences, C), dtype=torch.float32)
        return anchors(num_positions_B, C)
