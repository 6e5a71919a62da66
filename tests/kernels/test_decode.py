"""A token through all layers, and the dense product, against float64 on every instruction set."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Weight, weight
from torch import Tensor
from torch.nn import functional as F

from llmquant.kernels import ops  # noqa: F401  (registers the operators)
from llmquant.kernels.cpu import Native
from llmquant.kernels.decode import ATTENTION, FEED_FORWARD, LINEARS, Block, Buffers, Mixture, Place, Steps
from llmquant.kernels.decode import Weight as Operand
from llmquant.native import LIBRARY, Library
from llmquant.scheme import Scheme

if not LIBRARY.is_file():
    pytest.skip("the native library was not built", allow_module_level=True)

LIBRARY_IN_USE = Library()
LEVELS = range(len(LIBRARY_IN_USE.levels))
KINDS = [torch.float32, torch.bfloat16, torch.float16]
# Two planes leave 15 bits of an activation; a state of 16 bits is rounded to 8 (bf16) or 11 bits at its end, and so are
# keys and values.
BOUND = {torch.float32: 3e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Model(NamedTuple):
    """Layers of the Llama family in float64, and the same as the kernels are given them."""

    weights: list[dict[str, Weight]]
    biases: list[dict[str, Tensor | None]]
    gains: list[Tensor]
    head_gains: list[Tensor]  # of the queries' and the keys' heads in each layer; or none at all
    experts: list[list[dict[str, Weight]]]  # of each layer, in the place of gate, up and down; or none at all
    mixtures: list[Mixture | None]
    heads: int
    kv_heads: int
    width: int
    steps: Steps

    def step(self, state: Tensor, cosines: Tensor, sines: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """The definition: keys and values [kv_heads, before, width] grow by one."""
        for i, (linears, biases) in enumerate(zip(self.weights, self.biases, strict=True)):

            def apply(name: str, x: Tensor, linears=linears, biases=biases) -> Tensor:  # type: ignore[no-untyped-def]
                bias = biases[name]
                return F.linear(x, linears[name].real, None if bias is None else bias.double())

            n = norm(state, self.gains[2 * i])
            q, k, v = (apply(name, n).view(-1, self.width) for name in ("q", "k", "v"))
            if self.head_gains:
                q, k = (norm(x, gain) for x, gain in zip((q, k), self.head_gains[2 * i :], strict=False))
            q, k = (
                x * cosines + torch.cat((-x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]), 1) * sines for x in (q, k)
            )
            keys[i] = torch.cat((keys[i], k.unsqueeze(1)), 1)
            values[i] = torch.cat((values[i], v.unsqueeze(1)), 1)
            shared = self.heads // self.kv_heads
            k, v = keys[i].repeat_interleave(shared, 0), values[i].repeat_interleave(shared, 0)
            weights = (k @ q.unsqueeze(2) * self.width**-0.5).softmax(1)
            state = state + apply("out", (v * weights).sum(1).reshape(-1))
            m = norm(state, self.gains[2 * i + 1])
            if (mixture := self.mixtures[i]) is None:
                state = state + apply("down", F.silu(apply("gate", m)) * apply("up", m))
                continue
            shares, numbers = (mixture.router.double() @ m).softmax(0).topk(mixture.chosen)
            shares = shares / shares.sum() if mixture.normalized else shares
            for share, number in zip(shares, numbers, strict=True):
                expert = self.experts[i][int(number)]
                gate, up = (expert[name].real @ m for name in ("gate", "up"))
                state = state + share * (expert["down"].real @ (F.silu(gate) * up))
        return norm(state, self.gains[-1])


def norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain.double()


def model(
    kind: torch.dtype,
    level: int,
    *,
    layers: int = 2,
    hidden: int = 40,
    ffn: int = 56,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 16,
    schemes: tuple[Scheme, ...] = (Scheme(4, 32), Scheme(4, 32, symmetric=False)),
    planes: int = 2,
    biased: bool = True,
    head_norms: bool = False,
    experts: int = 0,
    chosen: int = 2,
    normalized: bool = True,
    dense: int = 0,
) -> Model:
    """`schemes` go around the linears, so that some of those that share an input differ. `dense` has no `experts`."""
    inner, kv = heads * width, kv_heads * width
    shapes = ((inner, hidden), (kv, hidden), (kv, hidden), (hidden, inner), (ffn, hidden), (ffn, hidden), (hidden, ffn))
    generator = torch.Generator().manual_seed(hidden)
    weights, biases, blocks, mixtures = [], [], [], list[Mixture | None]()
    every: list[list[dict[str, Weight]]] = []
    gains = [torch.rand(hidden, generator=generator).add(0.5).to(kind) for _ in range(2 * layers + 1)]
    heads_too = 2 * layers if head_norms else 0
    head_gains = [torch.rand(width, generator=generator).add(0.5).to(kind) for _ in range(heads_too)]
    for i in range(layers):
        mixed = experts > 0 and (not dense or i != dense)
        every.append(
            [
                {
                    name: weight(schemes[(e + j) % len(schemes)], m, n, seed=100 * i + 3 * e + j)
                    for j, (name, (m, n)) in enumerate(zip(FEED_FORWARD, shapes[4:], strict=True))
                }
                for e in range(experts if mixed else 0)
            ]
        )
        made = {
            name: weight(schemes[j % len(schemes)], m, n, seed=7 * i + j)
            for j, (name, (m, n)) in enumerate(zip(ATTENTION if mixed else LINEARS, shapes, strict=False))
        }
        if mixed:
            router = torch.randn(experts, hidden, generator=generator).to(kind)
            packed = [
                tuple(Operand(w.panels, None, *w.real.shape, w.scheme, planes) for w in expert.values())
                for expert in every[-1]
            ]
        mixtures.append(Mixture(router, tuple(packed), chosen, normalized) if mixed else None)
        bias = {
            name: torch.randn(len(w.real), generator=generator).to(kind) if biased else None for name, w in made.items()
        }
        operands = [Operand(w.panels, bias[name], *w.real.shape, w.scheme, planes) for name, w in made.items()]
        own = *gains[2 * i : 2 * i + 2], *head_gains[2 * i : 2 * i + 2]
        blocks.append(Block(tuple(operands), *own, mixture=mixtures[-1]))
        weights.append(made)
        biases.append(bias)
    steps = Steps(LIBRARY_IN_USE, blocks, gains[-1], head_width=width, eps=1e-5, scale=width**-0.5, level=level)
    return Model(weights, biases, gains, head_gains, every, mixtures, heads, kv_heads, width, steps)


def rotation(width: int, position: int) -> tuple[Tensor, Tensor]:
    angles = position / 100.0 ** (torch.arange(0, width, 2) / width)
    return torch.cat((angles, angles)).cos(), torch.cat((angles, angles)).sin()


def compare(made: Model, kind: torch.dtype, hidden: int, before: int, tokens: int) -> list[float]:
    """How far each of some tokens is off, and each key and value written."""
    generator = torch.Generator().manual_seed(before)
    shape = made.kv_heads, before + tokens, made.width
    buffers = [[torch.randn(shape, generator=generator).to(kind) for _ in made.weights] for _ in range(2)]
    keys, values = ([buffer[:, :before].double() for buffer in side] for side in buffers)
    room, errors = Buffers(*buffers), []
    for i in range(tokens):
        state = torch.randn(hidden, generator=generator).to(kind)
        cosines, sines = rotation(made.width, before + i)
        expected = made.step(state.double(), cosines.double(), sines.double(), keys, values)
        made.steps.take(state, [Place(room, before + i, cosines, sines)])
        errors.append(float((state.double() - expected).norm() / expected.norm()))
    for written, wanted in zip(buffers[0] + buffers[1], keys + values, strict=True):
        errors.append(float((written.double() - wanted).norm() / wanted.norm()))
    return errors


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("before", [0, 1, 37])
def test_a_token_is_right(level: int, kind: torch.dtype, before: int) -> None:
    assert max(compare(model(kind, level), kind, 40, before, tokens=3)) < BOUND[kind]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_heads_may_have_norms(level: int, kind: torch.dtype) -> None:
    assert max(compare(model(kind, level, head_norms=True), kind, 40, 21, tokens=3)) < BOUND[kind]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shared", range(1, 8))
def test_heads_that_share_a_key(level: int, shared: int) -> None:
    """As many as are taken at once, and more, with a part of them for another thread."""
    made = model(torch.float32, level, heads=2 * shared, kv_heads=2)
    assert max(compare(made, torch.float32, 40, 19, tokens=2)) < BOUND[torch.float32]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "mixture",
    [
        {"experts": 5},
        {"experts": 9, "chosen": 4, "normalized": False, "head_norms": True},
        {"experts": 4, "chosen": 1, "ffn": 23, "layers": 3, "dense": 1},
        {"experts": 3, "chosen": 3, "normalized": False, "hidden": 33},
    ],
    ids=["two of five", "weights of all", "one of four, and a dense layer", "all of three"],
)
def test_tokens_go_to_their_experts(level: int, kind: torch.dtype, mixture: dict[str, int]) -> None:
    made = model(kind, level, **{"biased": False} | mixture)
    assert max(compare(made, kind, mixture.get("hidden", 40), 21, tokens=4)) < BOUND[kind]


def test_of_equal_experts_the_first_ones_are_chosen() -> None:
    made = model(torch.float32, 0, experts=6, chosen=2, layers=1)
    (mixture,) = made.mixtures
    assert mixture is not None
    mixture.router.copy_(mixture.router[:1].expand(6, -1))
    room, (cosines, sines) = Buffers(*[[torch.ones(2, 8, 16)] for _ in range(2)]), rotation(16, 5)
    states = []
    for number in (0, 1, 5):  # only what is chosen counts
        for panels in mixture.experts[number][2].panels[:2]:
            panels.zero_()
        state = torch.linspace(-1, 1, 40)
        made.steps.take(state, [Place(room, 5, cosines, sines)])
        states.append(state)
    assert not torch.equal(states[0], states[1])
    assert torch.equal(states[1], states[2])


@settings(deadline=None, max_examples=60)
@given(
    level=st.sampled_from(LEVELS),
    hidden=st.integers(8, 70),
    ffn=st.integers(8, 70),
    kv_heads=st.integers(1, 3),
    shared=st.integers(1, 6),
    width=st.sampled_from([16, 32, 48, 80]),
    before=st.integers(0, 40),
    scheme=st.sampled_from([Scheme(4, 32), Scheme(4, -1), Scheme(8, 64), Scheme(4, 128, symmetric=False)]),
)
def test_any_shape(
    level: int, hidden: int, ffn: int, kv_heads: int, shared: int, width: int, before: int, scheme: Scheme
) -> None:
    made = model(
        torch.float32,
        level,
        layers=1,
        hidden=hidden,
        ffn=ffn,
        heads=kv_heads * shared,
        kv_heads=kv_heads,
        width=width,
        schemes=(scheme,),
        biased=False,
    )
    assert max(compare(made, torch.float32, hidden, before, tokens=2)) < 5e-3  # few terms may cancel


def test_eight_bits_of_an_activation_err_more() -> None:
    errors = [max(compare(model(torch.float32, 0, planes=planes), torch.float32, 40, 9, 2)) for planes in (1, 2)]
    assert 10 * errors[1] < errors[0] < 0.05


@pytest.mark.parametrize("experts", [0, 5])
def test_threads_do_not_change_the_result(experts: int) -> None:
    threads, states = torch.get_num_threads(), []
    made = model(torch.float32, 0, experts=experts)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            buffers = [[torch.ones(2, 8, 16) for _ in range(2)] for _ in range(2)]
            state = torch.linspace(-1, 1, 40)
            made.steps.take(state, [Place(Buffers(*buffers), 5, *rotation(16, 5))])
            states.append(torch.cat((state, *(buffer.flatten() for side in buffers for buffer in side))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in pairwise(states))


def test_no_room_is_an_error() -> None:
    made = model(torch.float32, 0)
    room = Buffers(*[[torch.ones(2, 8, 16) for _ in range(2)] for _ in range(2)])
    places = [Place(room, before, *rotation(16, 8)) for before in (7, 8)]
    with pytest.raises(ValueError, match="no room for key 8 of 8"):
        made.steps.take(torch.ones(2, 40), places)


@settings(deadline=None, max_examples=60)
@given(
    level=st.sampled_from(LEVELS),
    kind=st.sampled_from(KINDS),
    lengths=st.lists(st.integers(0, 70), min_size=2, max_size=20),
    hidden=st.integers(8, 70),
    ffn=st.integers(8, 70),
    planes=st.sampled_from([1, 2]),
    threads=st.integers(1, 3),
    scheme=st.sampled_from([Scheme(4, 32), Scheme(4, -1), Scheme(8, 64), Scheme(4, 128, symmetric=False)]),
    experts=st.sampled_from([0, 3, 7]),
)
def test_sequences_do_not_see_each_other(
    level: int,
    kind: torch.dtype,
    lengths: list[int],
    hidden: int,
    ffn: int,
    planes: int,
    threads: int,
    scheme: Scheme,
    experts: int,
) -> None:
    """Together each has the bits that it has alone, in its state and in what is written of it; the rest stays."""
    made = model(kind, level, hidden=hidden, ffn=ffn, schemes=(scheme,), planes=planes, experts=experts)
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    alone, together = torch.randn(2, len(lengths), hidden, generator=generator).to(kind)
    together.copy_(alone)
    ends = [(n, n + 1 + i % 3) for i, n in enumerate(lengths)]  # keys that are there, and room
    buffers = [
        [[torch.randn(2, room, 16, generator=generator).to(kind) for _ in range(2)] for _ in range(2)]
        for _, room in ends
    ]
    places = [
        Place(Buffers(*each), n, *rotation(16, 3 * n + i))
        for i, ((n, _), each) in enumerate(zip(ends, buffers, strict=True))
    ]
    copies = [
        place._replace(buffers=Buffers(*[[tensor.clone() for tensor in side] for side in each]))
        for place, each in zip(places, buffers, strict=True)
    ]
    torch.set_num_threads(threads)
    try:
        made.steps.take(together, places)
        for state, place in zip(alone, copies, strict=True):
            made.steps.take(state, [place])
    finally:
        torch.set_num_threads(before)
    assert together.isfinite().all()
    assert torch.equal(together, alone)
    for place, copied in zip(places, copies, strict=True):
        for side in ("keys", "values"):
            assert all(map(torch.equal, getattr(place.buffers, side), getattr(copied.buffers, side)))


# ---- dense products

NATIVE = Native(LIBRARY_IN_USE)


@settings(deadline=None)
@given(
    level=st.sampled_from(LEVELS),
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 9) | st.sampled_from([16, 33, 100]),
    m=st.integers(1, 70),
    n=st.integers(1, 200) | st.sampled_from([32, 64, 160]),
)
def test_dense_products_are_right(level: int, kind: torch.dtype, tokens: int, m: int, n: int) -> None:
    generator = torch.Generator().manual_seed(m + n)
    x, w = torch.randn(tokens, n, generator=generator).to(kind), torch.randn(m, n, generator=generator).to(kind)
    exact = x.double() @ w.double().T
    size = x.double().abs() @ w.double().abs().T
    bound = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[kind]
    assert float(((NATIVE.dense(x, w, level).double() - exact) / size).abs().max()) < bound


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("tokens", "m", "n"), [(1, 37, 96), (5, 16, 64), (20, 50, 160), (70, 3, 128)])
def test_dense_products_of_whole_tiles(tokens: int, m: int, n: int, level: int, kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(tokens, n, generator=generator).to(kind), torch.randn(m, n, generator=generator).to(kind)
    exact = x.double() @ w.double().T
    bound = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[kind]
    assert float((NATIVE.dense(x, w, level).double() - exact).norm() / exact.norm()) < bound


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", [75, 96])
def test_tokens_of_a_dense_product_do_not_see_each_other(n: int, level: int, kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(70, n, generator=generator).to(kind), torch.randn(37, n, generator=generator).to(kind)
    alone = torch.cat([NATIVE.dense(x[i : i + 1].clone(), w, level) for i in range(len(x))])
    for tokens in (2, 7, 16, 70):
        assert torch.equal(NATIVE.dense(x[:tokens].contiguous(), w, level), alone[:tokens])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(level: int, value: float) -> None:
    x, w = torch.ones(3, 64, dtype=torch.bfloat16), torch.ones(20, 64, dtype=torch.bfloat16)
    x[1, 5] = value
    y = NATIVE.dense(x, w, level)
    assert not y[1].isfinite().any()
    assert (y[[0, 2]] == 64).all()


def test_a_large_dense_product_is_shared_between_threads() -> None:
    x, w = torch.randn(3, 300), torch.randn(1001, 300)
    assert torch.allclose(torch.ops.llmquant.dense(x, w), x @ w.T, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_torch_accepts_the_operator(kind: torch.dtype) -> None:
    torch.library.opcheck(
        torch.ops.llmquant.dense.default, (torch.randn(2, 1, 24).to(kind), torch.randn(9, 24).to(kind))
    )


def test_dense_operands_have_to_fit() -> None:
    x, w = torch.randn(2, 24), torch.randn(9, 24)
    for operands, message in (
        ((x, w[:, 1:]), "do not fit"),
        ((x, w[0]), "do not fit"),
        ((x[:0], w), "do not fit"),
        ((x.double(), w.double()), "bf16, fp16 or fp32"),
        ((x, w.half()), "bf16, fp16 or fp32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.llmquant.dense(*operands)
