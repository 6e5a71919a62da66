"""What may be asked: everything else is refused by name."""

import json
from typing import Any

import pytest

pytest.importorskip("fastapi")

from llmquant.server.protocol import Chat, Completion, Refusal, parse

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "Hello"}


def test_what_clients_send_is_understood() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    told = {"temperature": 1, "top_p": 0.9, "stop": ["a", "b"], "n": 1, "stream_options": {"include_usage": True}}
    chat = parse(Chat, json.dumps(CHAT | told | {"messages": [{"role": "user", "content": parts}]}).encode())
    assert (chat.messages[0].text, chat.temperature, chat.stops) == ("Hello", 1.0, ("a", "b"))
    assert parse(Completion, json.dumps(COMPLETION | {"stop": "x"}).encode()).stops == ("x",)
    assert parse(Completion, json.dumps(COMPLETION | {"prompt": [1, 2]}).encode()).prompt == (1, 2)


def test_the_newer_name_of_the_limit_is_the_stronger() -> None:
    assert parse(Chat, json.dumps(CHAT | {"max_tokens": 5}).encode()).most == 5
    assert parse(Chat, json.dumps(CHAT | {"max_tokens": 5, "max_completion_tokens": 7}).encode()).most == 7


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_tokens", value) for value in (0, -1, 1.5, "5", True)),
        *(("temperature", value) for value in (-0.1, 2.1, "hot", float("nan"))),
        *(("top_p", value) for value in (0, 1.1)),
        *(("top_k", value) for value in (-1, 1.5)),
        *(("seed", value) for value in (-1, 1 << 63)),
        *(("n", value) for value in (0, 2, 10**9)),
        *(("stop", value) for value in ("", ["a"] * 5, "x" * 65, [""], 5)),
        ("stream", "yes"),
        ("stream_options", {"include": 1}),
        ("logprobs", True),
        ("tools", []),
        ("response_format", {"type": "json_object"}),
        ("chat_template", "{{ 1 }}"),
        ("messages", []),
        ("messages", [{"role": "root", "content": "x"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]),
        ("model", None),
    ],
)
def test_a_field_that_is_wrong_or_not_served_is_named(field: str, value: object) -> None:
    with pytest.raises(Refusal) as refused:
        parse(Chat, json.dumps(CHAT | {field: value}).encode())
    assert refused.value.status == 400
    assert refused.value.param == field
    assert refused.value.message.startswith(f"{field}: ")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b"[" * 100000, b'{"model": "\xff"}'])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(Refusal) as refused:
        parse(Chat, body)
    assert refused.value.status == 400
    assert refused.value.to_dict()["error"]["type"] == "invalid_request_error"
