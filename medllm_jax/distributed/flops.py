"""FLOPs that a model needs, from its shapes alone: what MFU compares the time with (PaLM, arXiv 2204.02311, app. B).

Two for every multiplication of a matrix product; of attention's scores only those that the causal rule lets through;
norms, softmax, rotations and the embedding's look-up count nothing, nor does anything that is computed twice.
"""

from medllm_jax.config.schema import AdapterConfig, ModelConfig


def matrix_parameters(model: ModelConfig) -> int:
    """Weights that every token is multiplied with: all matrices, without the embedding that is looked up."""
    queries = model.num_attention_heads * model.dim_of_head
    keys = model.num_key_value_heads * model.dim_of_head
    block = model.hidden_size * (2 * queries + 2 * keys + 3 * model.intermediate_size)
    return model.num_hidden_layers * block + model.vocab_size * model.hidden_size


def forward_flops(model: ModelConfig, rows: int, length: int) -> float:
    """FLOPs of reading rows of so many tokens: 2 N a token, and 2 S^2 H E a layer and row for causal attention."""
    width = model.num_attention_heads * model.dim_of_head
    attention = 2.0 * length**2 * width * model.num_hidden_layers
    return rows * (2.0 * matrix_parameters(model) * length + attention)


def train_flops(model: ModelConfig, rows: int, length: int, adapter: AdapterConfig | None = None) -> float:
    """Forward, and twice that backward: 6 N a token; where only adapters are trained, 4 N, and 6 for their own A.

    Padding in a row counts, as it is computed.
    """
    whole = 3 * forward_flops(model, rows, length)
    if adapter is None:
        return whole
    return whole + rows * length * (6.0 * adapter_parameters(model, adapter) - 2.0 * matrix_parameters(model))


def adapter_parameters(model: ModelConfig, adapter: AdapterConfig) -> int:
    """Weights of all adapters: two matrices [r, in] and [out, r] for each projection and layer."""
    hidden, inner = model.hidden_size, model.intermediate_size
    queries = model.num_attention_heads * model.dim_of_head
    keys = model.num_key_value_heads * model.dim_of_head
    ends = {
        "q_proj": hidden + queries,
        "k_proj": hidden + keys,
        "v_proj": hidden + keys,
        "o_proj": queries + hidden,
        "gate_proj": hidden + inner,
        "up_proj": hidden + inner,
        "down_proj": inner + hidden,
    }
    return model.num_hidden_layers * adapter.rank * sum(ends[name] for name in adapter.projections)


def decode_flops(model: ModelConfig, rows: int, columns: int) -> float:
    """FLOPs of one more token for each row, which attends to so many columns."""
    width = model.num_attention_heads * model.dim_of_head
    return rows * (2.0 * matrix_parameters(model) + 4.0 * columns * width * model.num_hidden_layers)


def prefill_flops(model: ModelConfig, rows: int, length: int) -> float:
    """`forward_flops`, but only the last token of a row goes through the LM head."""
    return forward_flops(model, rows, length) - 2.0 * rows * (length - 1) * model.vocab_size * model.hidden_size
