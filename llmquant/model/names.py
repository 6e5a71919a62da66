"""What a model's tensors are called in its checkpoint, which may be as another library has named them.

transformers renames tensors while it loads them, and puts the matrices of experts together. Its rules for that are
data (`conversion_mapping.py`), which is followed here: every renaming, and which of an expert's matrices is which.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import takewhile
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, WeightRenaming

from llmquant.checkpoint.reader import Checkpoint
from llmquant.checkpoint.stacked import DOWN, GATE_UP
from llmquant.errors import ArchitectureError, CheckpointError
from llmquant.model.language import own_names, places, towers

FORMER = {"gpt_neox": ("embed_out.", "lm_head.")}  # what transformers has no rule for: from one name to another
# What transformers puts together from the matrices of each expert.
MATRICES = {GATE_UP: ("gate_proj", "up_proj"), DOWN: ("down_proj",), ".experts.up_proj": ("up_proj",)}


class Names:
    """What the tensors of a model are called in a checkpoint."""

    def __init__(self, model: PreTrainedModel, source: Checkpoint) -> None:
        self.model = model
        self.source = source

    def all(self) -> dict[str, tuple[str, ...]]:
        """For each tensor of the model, but for those that are tied to another; raises what `stored` raises."""
        tied = tied_names(self.model)
        return {name: self.stored(name) for name in self.model.state_dict() if name not in tied}

    def stored(self, name: str) -> tuple[str, ...]:
        """For a tensor of the model: the tensor that it is, or those that it consists of, one below the other.

        Raises:
            CheckpointError: it is in no shard.
            ArchitectureError: it holds experts of a kind that is not known.
        """
        if parts := self.parts(name):
            return parts
        root, kind = self.source.root, type(self.model).__name__
        if name.endswith((GATE_UP, DOWN)):
            raise ArchitectureError(f"{root}: {kind} has experts of a kind that is not known; it is not supported")
        if name.rpartition(".experts.")[0] and any(each.endswith((GATE_UP, DOWN)) for each in self.source.tensors):
            raise CheckpointError(f"{root}: holds all experts of a layer in one tensor; this layout is not supported")
        missing = f"{root}: tensor {name} is missing from every shard"
        if unknown := self._unknown(name):
            raise CheckpointError(
                f"{missing}, and {unknown} is there, which {kind} does not have; these names are not supported"
            )
        raise CheckpointError(f"{missing}; fetch the checkpoint again")

    def parts(self, name: str) -> tuple[str, ...]:
        """The same, or for what a packed weight is made of; none if it is nowhere."""
        if found := self.find(name):
            return (found,)
        for whole, stored in self._joined.items():
            parts = [self.find(name.removesuffix(whole) + part) for part in stored] if name.endswith(whole) else []
            if parts and all(parts):
                return tuple(part for part in parts if part)
        return ()

    def find(self, name: str) -> str | None:
        """For a tensor that the checkpoint has by itself; None if it has not."""
        direct = (each for each in spellings(name, self.model) if each in self.source.tensors)
        return next(direct, None) or self._renamed.get(name)

    def _unknown(self, name: str) -> str | None:
        """A tensor that the model does not have, though it stands in none of the modules beside it.

        Of several, the one that is called most like `name`. In a quantized checkpoint none is looked for.
        """
        if "quantization_config" in self.source.config:
            return None
        known = {part for each in self.model.state_dict() for part in self.parts(each)}
        others = [each for each in self.source.tensors if each not in known]
        outer = (tower for tower in towers(others, known) if "." not in tower) if known else ()
        beside = tuple(f".{tower}." for tower in outer)
        own = [each for each in others if not any(tower in f".{each}" for tower in beside)]
        alike = lambda each: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(each, name, strict=False)))  # noqa: E731
        return max(own, key=alike, default=None)

    @cached_property
    def _joined(self) -> dict[str, list[str]]:
        """What the names of tensors end in that transformers puts together, and those of their parts."""
        rules = get_model_conversion_mapping(self.model, add_legacy=False)
        return {rule.target_patterns[0]: rule.source_patterns for rule in rules if joins(rule)}

    def outside(self, stored: str) -> str:
        """What the model that this one is a part of calls a tensor of the checkpoint."""
        for rule in self._outer_rules:
            stored = rule.rename_source_key(stored)[0]
        return stored

    @cached_property
    def _outer_rules(self) -> list[WeightRenaming]:
        """The renamings of the model that this one is a part of."""
        kind = self.source.config.get("model_type")
        known = isinstance(kind, str) and kind != self.model.config.model_type
        return list(apart(get_checkpoint_conversion_mapping(kind) or ())) if known else []

    @cached_property
    def _renamed(self) -> dict[str, str]:
        """What transformers would call the checkpoint's tensors -> what they are called."""
        rules = renamings(self.model)
        found: dict[str, str] = {}
        for stored in self.source.tensors if rules or self._outer_rules else ():
            for name in own_names(self.outside(stored)):
                for rule in rules:
                    name = rule.rename_source_key(name)[0]
                for spelling in spellings(name, self.model):
                    found.setdefault(spelling, stored)
        return found


def spellings(name: str, model: PreTrainedModel) -> list[str]:
    """The names under which a checkpoint may hold a tensor that has not been renamed, most usual first.

    Checkpoints of the base model alone lack its prefix; some hold it where the model has none; and where the model is
    a part of another, it has a place in that.
    """
    prefix = model.base_model_prefix + "."
    return [name, name.removeprefix(prefix), prefix + name, *places(name)]


def renamings(model: PreTrainedModel) -> list[WeightRenaming]:
    """transformers' rules for the names of a model's tensors, and of those of its experts, which stay apart."""
    rules = list(apart(get_model_conversion_mapping(model, add_legacy=False)))
    former = FORMER.get(model.config.model_type)
    return [*rules, WeightRenaming(*former)] if former else rules


def apart(rules: Iterable[Any]) -> Iterator[WeightRenaming]:
    """Of rules, those that rename; and renamings in the place of those that put experts together."""
    for rule in rules:
        if isinstance(rule, WeightRenaming):
            yield rule
        for stored, matrix in _matrices(rule):
            if stored != matrix:
                # Dots as they are: older ones of transformers leave backslashes in names that they save.
                yield WeightRenaming(rf"(\.experts\.\d+).{stored}.", rf"\1.{matrix}.")


def joins(rule: Any) -> bool:
    """Whether a rule puts a tensor together from others, one below the other, as the convolution of q, k and v."""
    match getattr(rule, "operations", None):
        case [Concatenate(dim=0)]:
            return len(rule.source_patterns) > 1 and not any("*" in source for source in rule.source_patterns)
    return False


def converts_others(rule: Any) -> bool:
    """Whether a rule does more than rename, to tensors that are not of experts."""
    return not isinstance(rule, WeightRenaming) and not any("experts" in target for target in rule.target_patterns)


def are_put_together(*model_types: str) -> bool:
    """Whether transformers puts experts together that lie one by one in a checkpoint of one of these."""
    rules = (rule for kind in model_types for rule in get_checkpoint_conversion_mapping(kind) or ())
    return any(list(_matrices(rule)) for rule in rules)


def _matrices(rule: Any) -> Iterator[tuple[str, str]]:
    """What the matrices of an expert are called in files, and which they are, by a rule that puts experts together."""
    for target, matrices in MATRICES.items():
        leaves = [source.rpartition("*.")[2] for source in rule.source_patterns if "*." in source]
        if rule.target_patterns[0].endswith(target[1:]) and len(leaves) == len(matrices):
            yield from zip((leaf.removesuffix(".weight") for leaf in leaves), matrices, strict=True)


def tied_names(model: PreTrainedModel) -> set[str]:
    """Names that are only another name for the input embedding."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return set()
    output = model.get_output_embeddings()
    return {f"{name}.weight" for name, module in model.named_modules() if module is output and output is not None}
