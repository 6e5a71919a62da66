"""The tokenizer of a checkpoint, as llama.cpp wants it: byte-level BPE, and the name of how it splits text."""

from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFWriter, TokenType

from llmquant.checkpoint.source import member, read_small
from llmquant.checkpoint.strict_json import parse_object
from llmquant.errors import CheckpointError

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# The steps of a pre-tokenizer -> what llama.cpp calls them.
SPLITS: dict[tuple[str, ...], str] = {
    ("bytes by words",): "gpt-2",
    ("digits", "bytes by words"): "smollm",
    (WORDS % "", "bytes"): "qwen2",
    (WORDS % "{1,3}", "bytes"): "llama-bpe",
}


def add_tokenizer(writer: GGUFWriter, root: Path, size: int) -> None:
    """Tokens, their kinds, merges, special tokens and chat template; `size` is that of the embedding.

    Raises:
        CheckpointError: there is no tokenizer.json, or one that llama.cpp has no name for.
    """
    path = root / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{root}: has no tokenizer.json, which a GGUF file needs; fetch the checkpoint again")
    spec = parse_object(read_small(member(root, path.name)), path)
    model = spec["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise CheckpointError(f"{path}: model: only byte-level BPE is written as GGUF")
    steps = tuple(_steps(spec.get("pre_tokenizer") or {}))
    if steps not in SPLITS:
        raise CheckpointError(f"{path}: pre_tokenizer: llama.cpp has no name for {' then '.join(steps) or 'none'}")
    tokens, kinds = _tokens(model["vocab"], spec.get("added_tokens") or [], size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(SPLITS[steps])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    gguf.SpecialVocab(root, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def _steps(rule: dict[str, Any]) -> list[str]:
    kind = rule.get("type")
    if kind == "Sequence":
        return [step for inner in rule["pretokenizers"] for step in _steps(inner)]
    if kind == "ByteLevel" and not rule.get("add_prefix_space"):
        return ["bytes by words" if rule.get("use_regex", True) else "bytes"]
    if kind == "Digits" and rule.get("individual_digits"):
        return ["digits"]
    if kind == "Split" and rule.get("behavior") == "Isolated" and not rule.get("invert"):
        return [str(rule["pattern"].get("Regex"))]
    return [str(kind)]


def _tokens(vocab: dict[str, int], added: list[dict[str, Any]], size: int) -> tuple[list[str], list[TokenType]]:
    """Text and kind of each id; ids without a token are filled up."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [TokenType.UNUSED] * size
    special = {token["id"]: token for token in added}
    for text, i in [*vocab.items(), *((token["content"], token["id"]) for token in added)]:
        if i >= size:
            raise CheckpointError(f"tokenizer.json: {text!r} has id {i}, the embedding {size} rows")
        tokens[i] = text
        kinds[i] = TokenType.NORMAL
        if i in special:
            kinds[i] = TokenType.CONTROL if special[i]["special"] else TokenType.USER_DEFINED
    return tokens, kinds
