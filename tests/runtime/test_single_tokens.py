"""Single tokens by the native steps: the same model as without them, and transformers wherever they do not serve."""

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from llmquant.native import active_backend
from llmquant.pipeline import quantize
from llmquant.recipe import Override, Recipe
from llmquant.runtime.decode import CACHE, Decoder, Head, next_logits
from llmquant.runtime.loader import load
from llmquant.scheme import Scheme

pytestmark = pytest.mark.skipif(active_backend() != "native", reason="the native library is not in use")

MakeCheckpoint = Callable[..., Path]
PROMPT = torch.arange(20).view(1, -1) + 5
CLOSE = {"atol": 2e-3, "rtol": 0.0}  # what products in 15-bit integers leave at logits of size one


@pytest.fixture(scope="module")
def packed(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(arch: str = "llama", name: str = "plain", **recipe: Any) -> Path:
        out = tmp_path_factory.getbasetemp() / f"decode-{arch}-{name}"
        if not out.is_dir():
            wanted = {"method": "rtn", "scheme": Scheme(4, 32)} | recipe
            quantize(make_checkpoint(arch=arch), out, Recipe(**wanted))
        return out

    return make


@pytest.fixture
def model(packed: Callable[..., Path]) -> Any:
    return load(packed(), torch.float32)


@pytest.fixture
def plain(packed: Callable[..., Path]) -> Any:
    """The same without native steps."""
    return without_steps(load(packed(), torch.float32))


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the caches that native steps were taken after."""
    seen: list[int] = []
    take = Decoder._take

    def counted(self: Decoder, ids: Tensor, tokens: Sequence[Any]) -> Tensor:
        seen.extend(token.before for token in tokens)
        return take(self, ids, tokens)

    monkeypatch.setattr(Decoder, "_take", counted)
    return seen


def without_steps(model: Any) -> Any:
    del model.base_model.forward
    return model


def tokens(model: Any, count: int, start: Any = None) -> tuple[Tensor, Any]:
    """Logits of a prompt's end and of some tokens after it, and the cache."""
    cache = start if start is not None else model(PROMPT)[CACHE]
    logits = [model(torch.tensor([[30 + i]]), **{CACHE: cache}).logits for i in range(count)]
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_tokens_are_those_of_transformers(packed: Callable[..., Path], taken: list[int], arch: str) -> None:
    a, b = load(packed(arch), torch.float32), without_steps(load(packed(arch), torch.float32))
    (logits, cache), (expected, wanted) = tokens(a, 300), tokens(b, 300)
    assert taken == list(range(20, 320))
    assert torch.allclose(logits, expected, **CLOSE)
    for layer, other in zip(cache.layers, wanted.layers, strict=True):
        assert layer.keys.shape == other.keys.shape
        assert torch.allclose(layer.keys, other.keys, **CLOSE)
        assert torch.allclose(layer.values, other.values, **CLOSE)


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_tokens_of_mixtures_are_those_of_transformers(packed: Callable[..., Path], taken: list[int], arch: str) -> None:
    """Of both the same experts: one more token each time after the same cache, as a tie may be settled otherwise."""
    a, b = load(packed(arch), torch.float32), without_steps(load(packed(arch), torch.float32))
    _, cache = tokens(b, 1)
    errors = []
    for i in range(100):
        own = copy.deepcopy(cache)
        found = a(torch.tensor([[30 + i]]), **{CACHE: own})
        expected = b(torch.tensor([[30 + i]]), **{CACHE: cache})
        errors.append(float((found.logits - expected.logits).abs().max()))
        assert type(found) is type(expected)
    assert taken == list(range(21, 121))
    assert sum(error < CLOSE["atol"] for error in errors) >= 97
    assert torch.equal(
        next_logits(a, [7], [copy.deepcopy(cache)])[0], a(torch.tensor([[7]]), **{CACHE: cache}).logits[0, 0]
    )


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_who_listens_to_a_mixture_is_heard(packed: Callable[..., Path], taken: list[int], arch: str) -> None:
    model, calls = load(packed(arch), torch.float32), []
    _, cache = tokens(model, 1)
    block = model.model.layers[1].mlp
    for module in (block.gate, block.experts, block.experts[2], block.experts[1].down_proj):
        handle = module.register_forward_hook(lambda *_: calls.append(1))
        for i in range(40):  # some of them go to the expert
            model(torch.tensor([[30 + i]]), **{CACHE: cache})
        handle.remove()
        assert calls != []
        calls.clear()
    assert taken == [20]
    router = block.gate

    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Any:
            calls.append(1)
            return router(x)

    block.gate = Wrapped()
    model(torch.tensor([[7]]), **{CACHE: cache})
    block.gate = router
    assert calls == [1]
    asked = model(torch.tensor([[7]]), output_router_logits=True, **{CACHE: cache})
    assert len(asked.router_logits) == 2
    assert taken == [20]


def test_experts_that_are_not_packed_are_left_to_transformers(packed: Callable[..., Path], taken: list[int]) -> None:
    kept = (Override(match=r"re:.*\.layers\.1\.mlp\.experts\..*", skip=True),)
    tokens(load(packed("qwen3_moe", "kept", overrides=kept), torch.float32), 2)
    assert taken == []


@pytest.mark.parametrize("arch", ["mistral", "gemma2", "opt", "qwen2_moe", "olmoe", "deepseek_v3"])
def test_other_families_are_left_to_transformers(packed: Callable[..., Path], taken: list[int], arch: str) -> None:
    """Sliding windows, other norms and activations, other mixtures."""
    logits, _ = tokens(load(packed(arch), torch.float32), 2)
    assert taken == []
    assert logits.isfinite().all()


@pytest.mark.parametrize(("precision", "allowed"), [("exact", 1.0), ("int8", 1.1)])
def test_half_precision_is_nearer_to_the_truth_than_transformers(
    packed: Callable[..., Path], precision: str, allowed: float
) -> None:
    """With 8-bit activations their rounding is nearly all of the error, and the same in both."""
    a = load(packed(), torch.bfloat16, precision)
    b = without_steps(load(packed(), torch.bfloat16, precision))
    truth, _ = tokens(without_steps(load(packed(), torch.float32)), 40)
    errors = [float((tokens(m, 40)[0] - truth).square().mean()) for m in (a, b)]
    assert errors[0] < allowed * errors[1]


def test_generation_is_the_same(model: Any, plain: Any, taken: list[int]) -> None:
    told = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(PROMPT, **told), plain.generate(PROMPT, **told))
    assert len(taken) > 20


def test_two_caches_take_turns(model: Any, taken: list[int]) -> None:
    alone, _ = tokens(model, 6)
    first, second = (model(PROMPT)[CACHE] for _ in range(2))
    turns = [tokens(model, 6, start=cache)[0] for cache in (first, second)]
    assert torch.equal(turns[0], alone)
    assert torch.equal(turns[1], alone)
    assert len(taken) == 18


def test_what_transformers_does_to_a_cache_is_seen(model: Any, plain: Any) -> None:
    """Tokens taken back, then several at once, then one by one again."""
    found = []
    for m in (model, plain):
        _, cache = tokens(m, 5)
        cache.crop(-3)
        several = m(torch.tensor([[7, 8, 9]]), **{CACHE: cache}).logits
        after, _ = tokens(m, 3, start=cache)
        found.append(torch.cat((several, after), 1))
    assert torch.allclose(*found, **CLOSE)


def test_a_position_may_be_given(model: Any, plain: Any, taken: list[int]) -> None:
    found = []
    for m in (model, plain):
        _, cache = tokens(m, 1)
        found.append(m(torch.tensor([[7]]), position_ids=torch.tensor([[700]]), **{CACHE: cache}).logits)
    assert torch.allclose(*found, **CLOSE)
    assert taken == [20, 21]


def test_what_is_more_than_one_token_of_one_sequence(model: Any, plain: Any, taken: list[int]) -> None:
    """Batches, padding on the left, states of all layers, gradients."""
    for m in (model, plain):
        cache = m(PROMPT.expand(2, -1))[CACHE]
        assert m(torch.tensor([[7], [8]]), **{CACHE: cache}).logits.shape[:2] == (2, 1)
        mask = torch.ones(1, 20, dtype=torch.long)
        mask[0, :4] = 0
        cache = m(PROMPT, attention_mask=mask)[CACHE]
        m(torch.tensor([[7]]), attention_mask=torch.cat((mask, mask[:, -1:]), 1), **{CACHE: cache})
        cache = m(PROMPT)[CACHE]
        states = m(torch.tensor([[7]]), output_hidden_states=True, **{CACHE: cache}).hidden_states
        assert len(states) == len(m.base_model.layers) + 1
    assert taken == []


def test_gradients_are_left_to_torch(packed: Callable[..., Path], taken: list[int]) -> None:
    with torch.inference_mode(mode=False), torch.enable_grad():
        tokens(load(packed(), torch.float32), 2)
    assert taken == []


def test_a_module_that_was_replaced_or_is_listened_to_is_called(model: Any, taken: list[int]) -> None:
    layer = model.base_model.layers[1]
    tokens(model, 1)
    inner, calls = layer.mlp.up_proj, []

    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x.shape)
            return inner(x)

    layer.mlp.up_proj = Wrapped()
    tokens(model, 2)
    layer.mlp.up_proj = inner
    assert len(calls) == 3
    handle = layer.self_attn.q_proj.register_forward_hook(lambda *_: calls.append(torch.Size()))
    tokens(model, 2)
    handle.remove()
    assert len(calls) == 6
    assert taken == [20]
    tokens(model, 1)
    assert taken == [20, 20]


def test_changed_weights_are_seen(model: Any, plain: Any) -> None:
    tokens(model, 1)
    state = {name: tensor * 2 if "scale" in name else tensor for name, tensor in model.state_dict().items()}
    for m in (model, plain):
        m.load_state_dict(state)
    assert torch.allclose(tokens(model, 3)[0], tokens(plain, 3)[0], **CLOSE)


def test_a_cast_is_seen(model: Any, taken: list[int]) -> None:
    tokens(model, 1)
    model.to(torch.bfloat16)
    assert tokens(model, 2)[0].dtype == torch.bfloat16
    assert len(taken) == 3


def test_the_precision_of_activations_is_seen(model: Any) -> None:
    exact, _ = tokens(model, 3)
    for module in model.modules():
        if hasattr(module, "precision"):
            module.precision = "int8"
    rough, _ = tokens(model, 3)
    assert 0 < float((rough - exact).abs().max()) < 0.2


def test_a_copy_stands_for_itself(model: Any) -> None:
    before, _ = tokens(model, 3)
    other = copy.deepcopy(model)
    assert other.base_model.forward._base is other.base_model
    assert torch.equal(tokens(other, 3)[0], before)


def test_a_linear_that_is_not_packed_is_left_to_transformers(packed: Callable[..., Path], taken: list[int]) -> None:
    skipped = packed(name="skipped", overrides=(Override(match="re:.*layers.1.mlp.(gate|up)_proj", skip=True),))
    tokens(load(skipped, torch.float32), 2)
    assert taken == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_is_a_linear(dtype: torch.dtype) -> None:
    head = nn.Linear(40, 300, bias=False, dtype=dtype)
    x = torch.randn(1, 9, 40, dtype=dtype)
    plain = head(x)
    head.__class__ = Head
    for part in (slice(None), slice(8, None), slice(2, 5), slice(0, 0)):
        assert torch.allclose(head(x[:, part]), plain[:, part], atol=1e-5 if dtype == torch.float32 else 0.02)


def test_the_head_lets_gradients_through() -> None:
    with torch.inference_mode(mode=False), torch.enable_grad():
        head = nn.Linear(40, 30, bias=False)
        head.__class__ = Head
        head(torch.randn(1, 1, 40)).sum().backward()
        assert head.weight.grad is not None


def test_threads_may_share_a_model(model: Any) -> None:
    alone, _ = tokens(model, 20)
    caches = [model(PROMPT)[CACHE] for _ in range(4)]

    def run(cache: Any) -> Tensor:
        with torch.inference_mode():  # of this thread
            return tokens(model, 20, start=cache)[0]

    with ThreadPoolExecutor(4) as pool:
        for logits in pool.map(run, caches):
            assert torch.equal(logits, alone)


# ---- several sequences at once

LENGTHS = [20, 1, 7, 300, 2, 33, 20, 64, 5, 12, 90]
COUNTS = [2, 3, 5, 8, 11]  # of sequences; from 6 on other products serve, where the processor has them


def started(model: Any, count: int) -> list[Any]:
    """Caches of different lengths."""
    return [model((torch.arange(n) * 7 % 400 + i).view(1, -1))[CACHE] for i, n in enumerate(LENGTHS[:count])]


def together(model: Any, caches: list[Any], steps: int) -> Tensor:
    """Logits [steps, sequences, vocab]."""
    found = [next_logits(model, [40 + 3 * i + step for i in range(len(caches))], caches) for step in range(steps)]
    assert all(logits is not None for logits in found)
    return torch.stack(found)


@pytest.mark.parametrize(
    ("precision", "arch"), [("exact", "llama"), ("int8", "llama"), ("exact", "mixtral"), ("int8", "qwen3_moe")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", COUNTS)
def test_each_sequence_is_given_what_it_is_given_alone(
    packed: Callable[..., Path], taken: list[int], count: int, dtype: torch.dtype, precision: str, arch: str
) -> None:
    model = load(packed(arch), dtype, precision)
    logits, caches = together(model, found := started(model, count), 3), started(model, count)
    taken.clear()
    for i, cache in enumerate(caches):
        for step in range(3):
            alone = model(torch.tensor([[40 + 3 * i + step]]), **{CACHE: cache}).logits
            assert torch.equal(alone[0, 0], logits[step, i])
        for layer, other in zip(cache.layers, found[i].layers, strict=True):
            assert torch.equal(layer.keys, other.keys)
            assert torch.equal(layer.values, other.values)
    assert taken == [n + step for n in LENGTHS[:count] for step in range(3)]


def test_sequences_are_those_of_transformers(model: Any, plain: Any) -> None:
    logits = together(model, started(model, 5), 300)
    expected = [started(plain, 5), []]
    for step in range(300):
        expected[1].append(
            torch.stack(
                [
                    plain(torch.tensor([[40 + 3 * i + step]]), **{CACHE: cache}).logits[0, 0]
                    for i, cache in enumerate(expected[0])
                ]
            )
        )
    assert torch.allclose(logits, torch.stack(expected[1]), **CLOSE)


def test_who_comes_and_goes_is_not_noticed(model: Any) -> None:
    alone, _ = tokens(model, 6)
    cache, others = model(PROMPT)[CACHE], started(model, 4)
    for step in range(6):
        beside = others[step % 3 :]
        logits = next_logits(model, [30 + step, *(50 for _ in beside)], [cache, *beside])
        assert logits is not None
        assert torch.equal(logits[0], alone[0, step])


def test_what_cannot_go_together_is_left_to_transformers(model: Any, taken: list[int]) -> None:
    """And the caches as they were."""
    good, empty, other = model(PROMPT)[CACHE], DynamicCache(config=model.config), StaticCache(model.config, 40)
    assert next_logits(model, [5, 6], [good, empty]) is None
    assert next_logits(model, [5, 6], [good, other]) is None
    assert next_logits(model, [5, 6], [good, good]) is None
    assert next_logits(model, [], []) is None
    for module in (model, model.base_model, model.lm_head, model.base_model.layers[0].mlp):
        handle = module.register_forward_hook(lambda *_: None)
        assert next_logits(model, [5], [good]) is None
        handle.remove()
    assert next_logits(without_steps(copy.deepcopy(model)), [5], [good]) is None
    with torch.inference_mode(mode=False), torch.enable_grad():
        assert next_logits(model, [5], [good]) is None
    assert good.get_seq_length() == 20
    assert taken == []
    assert next_logits(model, [5], [good]) is not None
    assert good.get_seq_length() == 21


def test_a_cache_of_another_model_is_refused(model: Any) -> None:
    """Before native code would read past its end."""
    for part in ((1, 1, 20, 16), (2, 2, 20, 16), (1, 2, 20, 8)):
        cache = DynamicCache(config=model.config)
        for i in range(len(model.base_model.layers)):
            cache.update(torch.zeros(part), torch.zeros(part), i)
        with pytest.raises(RuntimeError, match=r"the cache holds \(.*\); this model has \(1, 2, 20, 16\)"):
            model(torch.tensor([[5]]), **{CACHE: cache})
        with pytest.raises(RuntimeError, match="the cache holds"):
            next_logits(model, [5], [cache])


def test_other_models_are_left_to_transformers(packed: Callable[..., Path]) -> None:
    model = load(packed("gemma2"), torch.float32)
    assert next_logits(model, [5], [model(PROMPT)[CACHE]]) is None


def test_norms_may_have_another_dtype_than_the_embedding(packed: Callable[..., Path], taken: list[int]) -> None:
    """The native steps have one dtype, the norms': what comes in others is brought to it."""
    models = load(packed(), torch.bfloat16), without_steps(load(packed(), torch.bfloat16))
    truth, _ = tokens(without_steps(load(packed(), torch.float32)), 1)
    errors = []
    for model in models:
        cache = model(PROMPT)[CACHE]
        for name, module in model.named_modules():
            if "norm" in name:
                module.float()
        state = model.base_model(input_ids=torch.tensor([[30]]), **{CACHE: cache}).last_hidden_state.float()
        errors.append(float((state @ models[0].lm_head.weight.float().T - truth).norm() / truth.norm()))
    assert taken == [20]
    assert errors[0] < 1.1 * errors[1] < 0.1
