"""Causal attention: the native kernels on every instruction set, the operator, and its place in transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmquant.kernels import attention, reference
from llmquant.kernels.cpu import Native
from llmquant.native import Library, find_library

Rows = tuple[Tensor, Tensor, Tensor]


def rows(batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int, v_width: int) -> Rows:
    """q, k, v as a model has them, heads beside each other in each position: [batch, heads, positions, width]."""
    generator = torch.Generator().manual_seed(queries * 31 + keys)
    shapes = (queries, heads, width), (keys, kv_heads, width), (keys, kv_heads, v_width)
    q, k, v = (torch.randn(batch, *shape, generator=generator).transpose(1, 2) for shape in shapes)
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Query by query, key by key, in float64."""
    out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=torch.float64)
    shared, offset = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    for b, t, h in torch.cartesian_prod(*(torch.arange(size) for size in out.shape[:3])).tolist():
        seen = slice(offset + t + 1)
        weights = (k[b, h // shared, seen].double() @ q[b, h, t].double() * scale).softmax(0)
        out[b, t, h] = weights @ v[b, h // shared, seen].double()
    return out


def off(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def test_the_reference_is_the_definition() -> None:
    q, k, v = rows(2, 6, 2, 9, 13, 8, 5)
    assert off(reference.attention(q, k, v, 0.3), exact(q, k, v, 0.3)) < 1e-6


library = find_library()
NATIVE = Native(library) if isinstance(library, Library) else None
LEVELS = range(len(library.levels)) if isinstance(library, Library) else range(0)
native_only = pytest.mark.skipif(NATIVE is None, reason=f"the native library is not in use: {library}")
# bf16 rounds the output by 2^-9 at most, and where products are in bf16, each weight of it.
BOUND = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@native_only
@settings(deadline=None)
@given(
    level=st.sampled_from(LEVELS or [0]),
    dtype=st.sampled_from(sorted(BOUND, key=str)),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    shared=st.integers(1, 3),
    queries=st.integers(1, 150),
    before=st.integers(0, 150),
    width=st.integers(1, 70),
    v_width=st.integers(1, 70),
)
def test_any_shape(
    level: int,
    dtype: torch.dtype,
    batch: int,
    kv_heads: int,
    shared: int,
    queries: int,
    before: int,
    width: int,
    v_width: int,
) -> None:
    assert NATIVE
    q, k, v = rows(batch, kv_heads * shared, kv_heads, queries, queries + before, width, v_width)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out = NATIVE.attention(q, k, v, width**-0.5, level)
    assert out.dtype == dtype
    q, k, v = q.double(), k.double(), v.double()
    size = reference.attention(q, k, v.abs(), width**-0.5)  # of what is summed, which may cancel
    assert (out - reference.attention(q, k, v, width**-0.5)).norm() < BOUND[dtype] * size.norm()


@native_only
@pytest.mark.parametrize("level", LEVELS)
def test_large_scores_and_many_keys(level: int) -> None:
    """Weights that differ by all that a float can hold, over several blocks of keys, the largest in the last."""
    assert NATIVE
    q, k, v = rows(1, 2, 1, 300, 700, 16, 8)
    k = k * torch.linspace(1, 60, 700).view(1, 1, -1, 1)
    out = NATIVE.attention(q, k, v, 1.0, level)
    assert off(out, exact(q, k, v, 1.0)) < 1e-5


@native_only
@pytest.mark.parametrize("level", LEVELS)
def test_what_comes_later_is_not_seen(level: int) -> None:
    assert NATIVE
    q, k, v = rows(1, 3, 1, 40, 40, 16, 8)
    before = NATIVE.attention(q, k, v, 0.25, level)
    k[:, :, 20:], v[:, :, 20:] = 1e4, -1e4
    assert torch.equal(NATIVE.attention(q, k, v, 0.25, level)[:, :20], before[:, :20])


@native_only
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", BOUND)
def test_nan_is_not_hidden(level: int, dtype: torch.dtype) -> None:
    assert NATIVE
    q, k, v = (tensor.to(dtype) for tensor in rows(1, 1, 1, 8, 8, 16, 8))
    q[0, 0, 3, 5] = float("nan")
    out = NATIVE.attention(q, k, v, 0.25, level)
    assert out[0, 3].isnan().all()
    assert out[0, [0, 1, 2, 4, 5, 6, 7]].isfinite().all()


def test_threads_do_not_change_the_result() -> None:
    q, k, v = rows(2, 6, 3, 200, 200, 32, 32)
    threads = torch.get_num_threads()
    try:
        outs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outs.append(torch.ops.llmquant.attention(q, k, v, 0.2))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_accepts_the_operator(dtype: torch.dtype) -> None:
    q, k, v = (tensor.to(dtype) for tensor in rows(1, 4, 2, 5, 7, 16, 8))
    torch.library.opcheck(torch.ops.llmquant.attention.default, (q, k, v, 0.25))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("q, k, v are", lambda q, k, v: (q.long(), k, v, 1.0)),
        ("q, k, v are", lambda q, k, v: (q, k.half(), v, 1.0)),
        ("q, k, v are", lambda q, k, v: (q[0], k, v, 1.0)),
        ("q, k, v are", lambda q, k, v: (q[:, :, :0], k, v, 1.0)),
        ("do not fit", lambda q, k, v: (q, k[..., :3], v, 1.0)),
        ("do not fit", lambda q, k, v: (q, k[:, :, 1:], v, 1.0)),
        ("do not fit", lambda q, k, v: (q[:, :3], k, v, 1.0)),
        ("do not fit", lambda q, k, v: (q, k[:, :, :4], v[:, :, :4], 1.0)),
        ("scale is 0.0", lambda q, k, v: (q, k, v, 0.0)),
    ],
)
def test_sizes_are_checked_before_native_code_trusts_them(message: str, change: object) -> None:
    assert callable(change)
    with pytest.raises(RuntimeError, match=f"attention: .*{message}|attention: {message}"):
        torch.ops.llmquant.attention(*change(*rows(1, 4, 2, 5, 7, 16, 8)))


def test_an_operand_may_stand_in_any_order() -> None:
    q, k, v = rows(1, 4, 2, 5, 7, 16, 8)
    out = torch.ops.llmquant.attention(q, k, v, 0.25)
    turned = [tensor.mT.contiguous().mT for tensor in (q, k, v)]
    assert torch.equal(torch.ops.llmquant.attention(*turned, 0.25), out)


# ---- in transformers


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The queries of each call of our attention, which computes all the same."""
    seen: list[torch.Size] = []

    def counted(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        seen.append(q.shape)
        return torch.ops.llmquant.attention(q, k, v, scale)

    monkeypatch.setattr(attention, "ATTENTION", counted)
    return seen


IDS = torch.arange(3 * 40).view(3, 40) % 64


@native_only
def test_a_model_attends_by_ours(model: LlamaForCausalLM, calls: list[torch.Size]) -> None:
    with torch.no_grad():
        before = model(IDS).logits
        attention.use_attention(model)
        assert torch.allclose(model(IDS).logits, before, atol=1e-5)
    assert len(calls) == 2


@native_only
def test_what_is_not_plainly_causal_is_left_to_torch(model: LlamaForCausalLM, calls: list[torch.Size]) -> None:
    """Padding on the left, single tokens and few, gradients."""
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    wide = torch.cat((mask, torch.ones_like(IDS)), 1)
    asked = [
        lambda: model(IDS, attention_mask=mask).logits,
        lambda: model(IDS, attention_mask=wide, past_key_values=model(IDS, attention_mask=mask).past_key_values).logits,
        lambda: model(IDS[:, :9]).logits,
        lambda: model(IDS[:, 9:20], past_key_values=model(IDS[:, :9]).past_key_values).logits,
        lambda: model(IDS[:, 9:10], past_key_values=model(IDS[:, :9]).past_key_values).logits,
    ]
    with torch.no_grad():
        expected = [ask() for ask in asked]
        attention.use_attention(model)
        assert all(torch.equal(ask(), logits) for ask, logits in zip(asked, expected, strict=True))
    model(IDS).logits.sum().backward()
    assert calls == []
    assert all(p.grad is not None for p in model.model.layers.parameters())


@native_only
def test_tokens_after_others_are_causal_where_ours_does_not_serve(model: LlamaForCausalLM) -> None:
    """There is no mask for them then, and torch would take them for the first."""
    cached = [model(IDS[:, :12]).past_key_values for _ in range(2)]
    expected = model(IDS[:, 12:], past_key_values=cached[0]).logits
    attention.use_attention(model)
    found = model(IDS[:, 12:], past_key_values=cached[1]).logits
    assert found.requires_grad
    assert torch.allclose(found, expected, atol=1e-5)


@native_only
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("part", [16, 61, 128])
def test_parts_of_a_prompt_are_the_whole(
    model: LlamaForCausalLM, calls: list[torch.Size], dtype: torch.dtype, part: int
) -> None:
    """Bit for bit: a query's result does not depend on those beside it. With a mask that hides nothing, too."""
    model.to(dtype)
    attention.use_attention(model)
    ids = (torch.arange(300) * 7 % 64).expand(2, -1)
    with torch.no_grad():
        whole = model(ids, use_cache=True)
        cache, logits = None, []
        for start in range(0, 300, part):
            seen = torch.ones(2, min(300, start + part), dtype=torch.long) if start % 2 else None
            told = {"attention_mask": seen, "past_key_values": cache, "use_cache": True}
            out = model(ids[:, start : start + part], **told)
            cache = out.past_key_values
            logits.append(out.logits)
    short = 300 % part < attention.FEWEST  # these are torch's
    assert len(calls) == 2 * (1 + len(logits) - short)
    together, end = torch.cat(logits, 1), 300 - 300 % part * short
    assert torch.equal(together[:, :end], whole.logits[:, :end])


@native_only
def test_generation_is_the_same(model: LlamaForCausalLM) -> None:
    told = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    before = model.generate(IDS, attention_mask=torch.ones_like(IDS), **told)
    attention.use_attention(model)
    assert torch.equal(model.generate(IDS, attention_mask=torch.ones_like(IDS), **told), before)


@native_only
def test_a_saved_model_does_not_ask_for_ours(model: LlamaForCausalLM, tmp_path: object) -> None:
    attention.use_attention(model)
    model.save_pretrained(tmp_path)
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_model_that_has_another_attention_keeps_it(model: LlamaForCausalLM) -> None:
    model.set_attn_implementation("eager")
    attention.use_attention(model)
    assert model.config._attn_implementation == "eager"
