"""What servers will say to `--tensor-parallel-size`, said before the checkpoint is written.

They give each rank some rows of the linears that a norm feeds (q, k, v, gate, up) and some columns of those that write
to the residual stream (o, down). Where there are more ranks than heads of keys, each head goes to several of them.
"""

from transformers import PretrainedConfig

from llmquant.assign import Linear
from llmquant.formats import Format
from llmquant.formats.sharding import refuse_cut
from llmquant.scheme import Scheme

KEYS_VALUES = ("k_proj", "v_proj")


def refuse_heads(config: PretrainedConfig, degree: int) -> str | None:
    """Why the attention cannot be shared out, whatever its weights are; None if it can."""
    heads, kv_heads = config.num_attention_heads, _kv_heads(config)
    if heads % degree:
        return f"{heads} attention heads cannot be shared out"
    if max(degree, kv_heads) % min(degree, kv_heads):
        return f"{kv_heads} heads of keys and values cannot be shared out"
    return None


def refuse_linear(
    linear: Linear, scheme: Scheme, layout: Format, config: PretrainedConfig, degree: int, *, normed: bool
) -> str | None:
    """Why a linear cannot be cut for so many ranks; None if it can. `normed`: a norm feeds it."""
    m, n = linear.m, linear.n
    ranks = min(degree, _kv_heads(config)) if linear.name.endswith(KEYS_VALUES) else degree
    if (m if normed else n) % ranks:
        return f"{f'{m} rows' if normed else f'{n} columns'} cannot be shared out"
    rows, columns = (m // ranks, n) if normed else (m, n // ranks)
    return refuse_cut(layout, scheme, [rows], columns, n)


def _kv_heads(config: PretrainedConfig) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
