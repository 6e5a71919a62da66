"""Requests side by side in one engine: none notices another."""

import queue
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import torch
from transformers import AutoTokenizer

from llmquant.native import active_backend
from llmquant.runtime.decode import next_logits
from llmquant.runtime.loader import load
from llmquant.server import engine as module
from llmquant.server.engine import Engine, Full, Job, Progress
from llmquant.server.room import room_for, token_bytes
from llmquant.server.sampling import Sampling

POISON = 77  # a token at which the model fails


class Asked:
    """A job and what it is told."""

    def __init__(self, ids: list[int], most: int = 12, **how: float) -> None:
        self.told: queue.Queue[Progress | Exception] = queue.Queue()
        self.job = Job(ids, most, Sampling(**{"temperature": 0.0} | how), (), self.told.put)

    def result(self) -> tuple[str, int, str | None] | Exception:
        """Text, tokens and reason of the end."""
        text, tokens = "", 0
        while True:
            event = self.told.get(timeout=60)
            if isinstance(event, Exception):
                return event
            text, tokens = text + event.text, tokens + 1
            if event.finished:
                return text, tokens, event.finished


@pytest.fixture
def engine(packed: Path) -> Iterator[Engine]:
    model = load(packed, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(packed)
    running = Engine(model, tokenizer.backend_tokenizer, frozenset(), at_once=3, queue=5, room=10**11)
    yield running
    running.close()


def poisoned(_: object, args: tuple[()], kwargs: dict[str, torch.Tensor]) -> None:
    if bool((kwargs["input_ids"] == POISON).any()):
        raise torch.OutOfMemoryError("no room")


def test_an_answer_does_not_depend_on_the_others(engine: Engine) -> None:
    prompts = [[5, 6, 7], [8, 9], list(range(10, 60)), [3], [4, 4, 4, 4]]
    seeds = [{}, {"temperature": 1.0, "seed": 3}, {}, {"temperature": 0.7, "seed": 4}, {}]
    alone = []
    for ids, how in zip(prompts, seeds, strict=True):
        asked = Asked(ids, **how)
        engine.submit(asked.job)
        alone.append(asked.result())
    together = [Asked(ids, **how) for ids, how in zip(prompts, seeds, strict=True)]
    for asked in together:
        engine.submit(asked.job)
    assert [asked.result() for asked in together] == alone
    assert all(tokens == 12 and reason == "length" for _, tokens, reason in alone)


@pytest.mark.skipif(active_backend() != "native", reason="the native library is not in use")
@pytest.mark.parametrize("fails", [False, True])
def test_tokens_of_several_requests_pass_together(engine: Engine, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """And if they cannot, one by one."""
    seen: list[int] = []

    def counted(model: Any, ids: list[int], caches: list[Any]) -> torch.Tensor | None:
        seen.append(len(ids))
        if fails and len(ids) > 1:
            raise MemoryError
        return next_logits(model, ids, caches)

    monkeypatch.setattr(module, "next_logits", counted)
    alone = Asked([5, 6, 7])
    engine.submit(alone.job)
    expected = alone.result()
    assert seen == [1] * 11
    together = [Asked([5, 6, 7], most=40), Asked([5, 6, 7]), Asked([8, 9], most=30)]
    for asked in together:
        engine.submit(asked.job)
    results = [asked.result() for asked in together]
    assert results[1] == expected
    assert max(seen) > 1


def test_a_prompt_in_parts_has_the_same_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits, too, however little is left for the last part."""
    seen: list[torch.Tensor] = []
    take = module._Turn.take
    monkeypatch.setattr(module._Turn, "take", lambda *args: seen.append(args[1]) or take(*args))
    for length in (70, 63, 80):
        ids = torch.randint(3, 500, (length,), generator=torch.Generator().manual_seed(0)).tolist()
        answers, logits = [], []
        for chunk in (256, 16):
            monkeypatch.setitem(module.CHUNKS, "cpu", chunk)
            asked = Asked(ids, most=5)
            engine.submit(asked.job)
            answers.append(asked.result())
            logits.append(torch.stack(seen[-5:]))
        assert answers[0] == answers[1]
        assert torch.equal(*logits)
    assert len(seen) == 3 * 5 + (4 + 4) + (3 + 4) + (5 + 4)


def test_what_fails_fails_alone(engine: Engine) -> None:
    good = Asked([5, 6, 7])
    engine.submit(good.job)
    expected = good.result()
    engine._model.register_forward_pre_hook(poisoned, with_kwargs=True)
    asked = [Asked([5, 6, 7]), Asked([POISON]), Asked([5, 6, 7])]
    for each in asked:
        engine.submit(each.job)
    first, failed, last = (each.result() for each in asked)
    assert first == last == expected
    assert isinstance(failed, torch.OutOfMemoryError)
    assert failed.__traceback__ is None


def test_a_listener_that_is_gone_ends_nothing_but_itself(engine: Engine) -> None:
    def gone(_: object) -> None:
        raise RuntimeError("Event loop is closed")

    engine.submit(Job([5], 3, Sampling(0.0), (), gone))
    asked = Asked([5, 6])
    engine.submit(asked.job)
    assert isinstance(asked.result(), tuple)


def test_a_cancelled_request_makes_room_within_a_token(engine: Engine) -> None:
    endless = [Asked([5], most=10**9) for _ in range(3)]
    for each in endless:
        engine.submit(each.job)
        each.told.get(timeout=60)
    late = Asked([6, 7])
    engine.submit(late.job)
    assert (len(engine.active), len(engine.waiting)) == (3, 1)
    endless[1].job.cancelled.set()
    assert isinstance(late.result(), tuple)
    for each in endless:
        each.job.cancelled.set()
    deadline = time.monotonic() + 30
    while engine.active and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.active


def test_more_than_may_wait_are_refused(engine: Engine) -> None:
    asked = [Asked([5], most=10**9) for _ in range(8)]
    for each in asked[:3]:
        engine.submit(each.job)
        each.told.get(timeout=60)
    for each in asked[3:]:
        engine.submit(each.job)
    with pytest.raises(Full):
        engine.submit(Asked([5]).job)
    asked[5].job.cancelled.set()
    engine.submit(Asked([5]).job)


def test_an_end_token_ends_without_text(packed: Path) -> None:
    model = load(packed, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(packed)
    with torch.inference_mode():
        end = int(model(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
    running = Engine(model, tokenizer.backend_tokenizer, frozenset({end}), at_once=1, queue=1, room=100)
    asked = Asked([5, 6, 7])
    running.submit(asked.job)
    assert asked.result() == ("", 1, "stop")
    running.close()
    assert not any(thread.name == "llmquant-engine" and thread is running._thread for thread in threading.enumerate())


def test_requests_wait_until_their_caches_have_room(packed: Path) -> None:
    model = load(packed, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(packed)
    running = Engine(model, tokenizer.backend_tokenizer, frozenset(), at_once=3, queue=5, room=30)
    asked = [Asked([5, 6, 7], most=17), Asked([5, 6, 7], most=17), Asked([8], most=4), Asked([9, 10], most=28)]
    order: list[int] = []
    seen: list[tuple[int, int]] = []  # reserved, active

    def told(number: int, event: Progress | Exception) -> None:
        order.append(number)
        seen.append((running.reserved, len(running.active)))
        asked[number].told.put(event)

    for number, each in enumerate(asked):
        each.job.tell = partial(told, number)
    gate = threading.Event()
    hook = model.register_forward_pre_hook(lambda *_: gate.wait(30) and None)  # until all of them are there
    for each in asked:
        running.submit(each.job)
    gate.set()
    results = [each.result() for each in asked]
    hook.remove()
    assert results[0] == results[1]
    assert [tokens for _, tokens, _ in results] == [17, 17, 4, 28]
    last = {number: len(order) - order[::-1].index(number) for number in range(4)}
    first = {number: order.index(number) for number in range(4)}
    assert first[1] >= last[0], "there is no room for both"
    assert first[2] < last[1], "for these there is"
    assert first[2] > first[1] - 1, "who came first is first"
    assert first[3] >= max(last[1], last[2]), "it needs all of it"
    assert max(reserved for reserved, _ in seen) == 30
    with pytest.raises(ValueError, match="31 tokens, but caches have room for 30"):
        running.submit(Asked([1], most=30).job)
    running.close()


def test_who_hangs_up_while_waiting_for_room_holds_up_nobody(packed: Path) -> None:
    model = load(packed, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(packed)
    running = Engine(model, tokenizer.backend_tokenizer, frozenset(), at_once=3, queue=5, room=10**9 + 20)
    endless, large, small = Asked([5], most=10**9), Asked([5], most=10**9), Asked([6], most=3)
    for each in (endless, large):
        running.submit(each.job)
    endless.told.get(timeout=60)
    running.submit(small.job)
    large.job.cancelled.set()
    assert isinstance(small.result(), tuple)
    endless.job.cancelled.set()
    running.close()


def test_what_a_token_takes_is_measured(packed: Path) -> None:
    model = load(packed, torch.bfloat16)
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert token_bytes(model) == config.num_hidden_layers * 2 * config.num_key_value_heads * width * 2
    assert room_for(model, 100 * token_bytes(model) + 1) == 100
    assert room_for(model, None) > 1000
