"""Formulas of a decoder's parameters, memory, bytes and arithmetic. No torch: numbers in, numbers out.

L layers, H hidden size, A heads, G heads of keys and values, D size of a head, F size of the MLP, V vocabulary,
E experts of which k read a token. Bytes everywhere, unless a name says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FLOAT32, BFLOAT16 = 4, 2
BLOCK_8BIT = 256  # moments of 8 bits that share a scale
UNPACKED = 1536  # tokens of a product; above it, matrices of 4 bits are made whole first on every GPU

# Bytes of one number or one entry in a request or an answer, measured with vLLM 0.32.
JSON_TOKEN = 81  # a token's answer with the sampled token's log-prob alone
JSON_ENTRY = 75  # each of the k most likely tokens, in JSON
BASE64_FLOAT = 16 / 3  # a float32 in base64: 4 bytes become 16 / 3 characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder of attention and gated MLPs, as transformers' Llama, Qwen2, Qwen3 and Qwen3-MoE."""

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate: int  # of the MLP, or of one expert
    vocabulary: int
    tied: bool = False  # input and output layer are one matrix
    experts: int = 0  # 0: a dense MLP
    experts_per_token: int = 0
    head_norms: bool = False  # norms of queries and keys
    biases: int = 0  # per layer
    extra: int = 0  # parameters outside of these formulas, counted in the model

    @property
    def attention(self) -> int:
        """Entries of a layer's q, k, v and o: H A D + 2 H G D + A D H."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.key_value_heads)

    @property
    def mlp(self) -> int:
        """Entries of one gated MLP, gate, up and down: 3 H F."""
        return 3 * self.hidden * self.intermediate

    @property
    def layer(self) -> int:
        """Parameters of a layer: attention, MLP (or E of them and the router, H E), norms, biases."""
        mlps = self.mlp if not self.experts else self.experts * (self.mlp + self.hidden)
        norms = 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        return self.attention + mlps + norms + self.biases

    @property
    def output(self) -> int:
        """Entries of the output layer: V H."""
        return self.vocabulary * self.hidden

    @property
    def outside(self) -> int:
        """Parameters outside of the layers: embedding, output layer if it is another matrix, last norm, extra."""
        return self.output * (1 if self.tied else 2) + self.hidden + self.extra

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.outside

    @property
    def active(self) -> int:
        """Entries of the matrices of all layers that multiply one token: all, or k of E experts."""
        mlps = self.mlp if not self.experts else self.experts_per_token * self.mlp + self.hidden * self.experts
        return self.layers * (self.attention + mlps)

    def read(self, tokens: int) -> float:
        """Parameters that a forward of `tokens` reads: of the experts those that a token reaches, if all are alike.

        An expert is missed by a token with probability 1 - k / E: E (1 - (1 - k / E)^tokens) are read.
        """
        if not self.experts:
            return self.layers * self.layer + self.output
        reached = 1 - (1 - self.experts_per_token / self.experts) ** tokens
        return self.layers * (self.layer - (1 - reached) * self.experts * self.mlp) + self.output


# --- memory -----------------------------------------------------------------------------------------------------------


def weights_bytes(shape: Shape, width: int, layer_width: float | None = None) -> float:
    """All weights: `layer_width` bytes in the layers (None: `width`), `width` outside; norms are too few to count."""
    return shape.layers * shape.layer * (width if layer_width is None else layer_width) + shape.outside * width


def muon_moments(shape: Shape, width: int) -> float:
    """Bytes of Muon per parameter: one moment of the layers' matrices, and AdamW's two of the rest."""
    return width * (shape.layers * shape.layer + 2 * shape.outside) / shape.parameters


def saved_activations(shape: Shape, tokens: int, *, width: int, autocast: bool, checkpointing: bool) -> float:
    """What autograd keeps of a forward of `tokens` for the backward, without the weights.

    A layer keeps per token, in elements: its two norms the input (the residual stream, H), the normalised input (H) and
    the output (H), which the next products read; attention q and its output (A D each), k and v (G D each), and the
    log-normaliser of each head; the MLP gate, silu(gate), up and their product (4 F). Norms of queries and keys keep
    input and normalised input of both. Softmax weights are not kept (fused attention), rotations keep nothing.

    Precision: `width` bytes each; a norm computes in float32. With bfloat16 weights it keeps 4 + 2 + 2 bytes per
    element. Under autocast the residual stream is float32, and each of the five products that read a norm's output
    casts it again: 4 + 4 bytes per norm, and 5 x 2 in a layer. With `checkpointing` a layer keeps its input, and one
    layer at a time is computed again. The last norm counts three more H.
    """
    narrow = BFLOAT16 if autocast else width
    stream = FLOAT32 if autocast else width
    norms = (5 * BFLOAT16 + 4 * FLOAT32 if autocast else 6 * FLOAT32 if width == FLOAT32 else 16) * shape.hidden
    wide = shape.head_dim * (shape.heads + shape.key_value_heads)
    per_head = (2 * FLOAT32 if narrow == FLOAT32 else FLOAT32 + BFLOAT16) * wide if shape.head_norms else 0
    used = shape.experts_per_token if shape.experts else 1
    attention = narrow * 2 * wide + FLOAT32 * shape.heads
    layer = norms + attention + per_head + narrow * 4 * shape.intermediate * used
    kept = shape.layers * stream * shape.hidden + layer if checkpointing else shape.layers * layer
    return tokens * (kept + 3 * stream * shape.hidden)


def cast_weights(shape: Shape, *, checkpointing: bool) -> int:
    """The bfloat16 copies of the layers' matrices under autocast, kept until the backward has used them.

    All layers' without checkpointing, one layer's with it. The output layer stays in float32.
    """
    matrices = shape.layer - 2 * shape.hidden
    return BFLOAT16 * matrices * (1 if checkpointing else shape.layers)


def working_memory(shape: Shape, tokens: int, width: int) -> int:
    """The most that a layer holds at once without gradient: three of the MLP's tensors (F) and the stream (3 H)."""
    used = shape.experts_per_token if shape.experts else 1
    return width * tokens * 3 * (shape.intermediate * used + shape.hidden)


def cache_size(shape: Shape, rows: int, tokens: int, width: int) -> int:
    """Keys and values of `rows` sequences of `tokens`: 2 L G D entries per token."""
    return 2 * shape.layers * shape.key_value_heads * shape.head_dim * width * rows * tokens


def lora_parameters(matrices: list[tuple[int, int]], rank: int) -> int:
    """Parameters of adapters of matrices [out, in]: rank (out + in) each."""
    return sum(rank * (rows + columns) for rows, columns in matrices)


# --- bytes ------------------------------------------------------------------------------------------------------------


def sampled_bytes() -> float:
    """Per token: the sampled token's log-prob from a server, in JSON."""
    return JSON_TOKEN


def top_k_bytes(k: int) -> float:
    """Per token: the k most likely tokens of a server, in JSON."""
    return JSON_ENTRY * k


def by_position_bytes(k: int, vocabulary: int) -> tuple[float, float]:
    """Per token, (request, answer): k + 1 given ids as JSON text, and their log-probs as base64 of float32."""
    digits = len(str(max(1, vocabulary - 1)))
    return (k + 1) * (digits + 1), (k + 1) * BASE64_FLOAT


def states_bytes(hidden: int, width: int) -> int:
    """Per token: a teacher's hidden state, from which its output layer gives the whole distribution."""
    return hidden * width


def distribution_bytes(vocabulary: int) -> int:
    """Per token: log-probs of the whole vocabulary in float32."""
    return FLOAT32 * vocabulary


# --- arithmetic -------------------------------------------------------------------------------------------------------


def attention_flops(shape: Shape, length: int) -> float:
    """Of one sequence's forward: q k and the product with v, 4 A D for each of the n (n + 1) / 2 pairs, all layers."""
    return 4.0 * shape.layers * shape.heads * shape.head_dim * length * (length + 1) / 2


def layers_flops(shape: Shape, sequences: int, length: int) -> float:
    """Of a forward of whole sequences through the layers: 2 per entry of a matrix and token, and attention."""
    return sequences * (2.0 * shape.active * length + attention_flops(shape, length))


def output_flops(shape: Shape, tokens: int) -> float:
    """Of the output layer at `tokens` positions: 2 V H each."""
    return 2.0 * shape.output * tokens


def training_factor(*, checkpointing: bool, all_weights: bool) -> int:
    """A step of the layers in forwards: forward 1, gradient of the inputs 1, of the weights 1, forward again 1."""
    return 2 + all_weights + checkpointing


def weight_traffic(read: float, outside: float, width: int, layer_width: float | None, tokens: int) -> float:
    """Bytes that a forward of `tokens` moves for `read` weights, `outside` of them not in the layers.

    `width` bytes each. Inside the layers weights of 4 bits have `layer_width` bytes; None: `width`. A product with few
    tokens reads them as they are. For more than `UNPACKED` bitsandbytes 0.50 writes the whole matrix in `width` bytes,
    and the product reads that (its `_gemm_4bit_use_custom_cuda`; between, it depends on the GPU: the least is counted).
    """
    if layer_width is None:
        return read * width
    return (read - outside) * (layer_width + (2 * width if tokens > UNPACKED else 0)) + outside * width


def gather_bytes(parameters: float, width: int, devices: int) -> float:
    """What a device receives to hold all of the weights beside its own shard: P (N - 1) / N."""
    return parameters * width * (devices - 1) / devices


def batches_of_rows(rows: int, length: int, tokens: int) -> tuple[int, int]:
    """(micro-batches, rows in each) of rows of one length: as many as fit into `tokens`, at least one."""
    each = min(rows, max(1, tokens // length))
    return math.ceil(rows / each), each
