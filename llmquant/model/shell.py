"""The transformers model without its weights: a shell that holds one part of the checkpoint at a time."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from llmquant.checkpoint.reader import Checkpoint
from llmquant.errors import ArchitectureError, CheckpointError, NumericsError
from llmquant.model.experts import has_experts, unfuse
from llmquant.model.language import causal_lm, inside, language_config, towers
from llmquant.model.names import Names, are_put_together


def read_config(source: Checkpoint) -> PretrainedConfig:
    """The transformers configuration of the language model, without its quantization block.

    Raises:
        ArchitectureError: transformers does not know the model type.
    """
    return language_config(read_whole_config(source), source)


def read_whole_config(source: Checkpoint) -> PretrainedConfig:
    """The same of the model that the language model may be a part of; raises ArchitectureError, too."""
    try:
        config = AutoConfig.from_pretrained(source.root, trust_remote_code=source.trust_remote_code)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        kind = source.config.get("model_type")
        checked = isinstance(error, StrictDataclassError)  # its cause says in one line which value is wrong
        reason = str(error.__cause__ if checked and error.__cause__ else error).splitlines()[0]
        raise ArchitectureError(
            f"{source.root / 'config.json'}: model_type {kind!r} cannot be used: {reason}"
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def empty_model(
    config: PretrainedConfig,
    *,
    trust_remote_code: bool = False,
    device: torch.device | str = "cpu",
    calibrated: bool = False,
) -> PreTrainedModel:
    """The causal language model with parameters on the meta device and computed buffers on `device`.

    Its experts, if it has some, are linears: `Experts`, or `CalibratedExperts` if it is to be `calibrated`.

    Raises:
        ArchitectureError: transformers has no causal language model for this configuration, or its experts are of
            a kind that we do not know.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model = causal_lm(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ArchitectureError(f"{config.model_type}: cannot build a causal language model: {reason}") from error
    unfuse(model, calibrated=calibrated)
    for name, buffer in model.named_buffers():
        place(model, name, buffer.to(device))
    return model.eval()


class Shell:
    """A model whose parameters come and go.

    Attributes:
        model: the transformers model; a parameter is on the meta device unless its part is filled.
        names: tensor name in the model -> tensor names in the checkpoint, several where the model puts them together,
            one below the other. Tied aliases do not appear.
        extra: checkpoint tensors that the model does not have.
        inside: the language model is a part of a model.
        towers: modules of the checkpoint beside it, as those are that see, or guess several tokens at once.
        lonely_experts: it has experts that transformers alone does not find where they lie one by one.
    """

    def __init__(self, source: Checkpoint, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.source = source
        self.device = torch.device(device)
        self.dtype = dtype
        whole = read_whole_config(source)
        self.config = language_config(whole, source)
        self.model = empty_model(
            self.config, trust_remote_code=source.trust_remote_code, device=device, calibrated=True
        )
        names = Names(self.model, source)
        self.names = names.all()
        embedding = self.model.get_input_embeddings()
        self._embedding = next(name for name, module in self.model.named_modules() if module is embedding)
        used = set(chain.from_iterable(self.names.values()))
        self.extra = [name for name in source.tensors if name not in used]
        self.inside = inside(whole)
        both = [[*stored, *map(names.outside, stored)] for stored in (self.extra, used)]
        self.towers = towers(*both)
        kinds = whole.model_type, whole.get_text_config(decoder=True).model_type
        self.lonely_experts = has_experts(self.model) and not are_put_together(*kinds)

    @contextmanager
    def filled(self, names: list[str]) -> Iterator[None]:
        """Hold the named tensors, in the compute dtype, for the length of a `with` block."""
        try:
            for name in names:
                self.set_tensor(name, self.read(name))
            yield
        finally:
            for name in names:
                place(self.model, name, self._tensor(name).to("meta"))

    def part(self, prefix: str) -> list[str]:
        """Names of the tensors below a module."""
        return [name for name in self.names if name.startswith(prefix + ".")]

    def read(self, name: str) -> Tensor:
        """One tensor of the model, or an extra one of the checkpoint; raises what `stored` raises."""
        return joined(list(self.stored(name).values()))

    def stored(self, name: str) -> dict[str, Tensor]:
        """The same as the checkpoint has it, checked: what it consists of, by name.

        Raises:
            CheckpointError: its shape is not the model's.
            NumericsError: it holds NaN or Inf.
        """
        parts = {part: self.source.read(part) for part in self.stored_names(name)}
        where = f"{self.source.file_of[next(iter(parts))]}: {', '.join(parts)}"
        shape = joined_shape([part.shape for part in parts.values()], where)
        if name in self.names and shape != self._tensor(name).shape:
            expected = tuple(self._tensor(name).shape)
            raise CheckpointError(f"{where}: shape {tuple(shape)}, but config.json asks for {expected}")
        for part, tensor in parts.items():
            check_finite(tensor, f"{self.source.file_of[part]}: {part}")
        return parts

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding: token ids must be below."""
        return int(self.model.get_parameter(f"{self._embedding}.weight").shape[0])

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The checkpoint's names of what a tensor of the model consists of, or of an extra one."""
        return self.names.get(name, (name,))

    def stored_prefix(self, linear: str) -> str:
        """The checkpoint's name of a linear: its packed tensors keep it, so that every loader knows them."""
        return self._only(f"{linear}.weight").removesuffix(".weight")

    def stored_dtype(self, name: str) -> torch.dtype:
        return self.source.tensors[self._only(name)].dtype

    def _only(self, name: str) -> str:
        (stored,) = self.names[name]
        return stored

    def set_weight(self, linear: str, weight: Tensor) -> None:
        """Put a (dequantized) weight [m, n] in the place of a filled linear's."""
        self.set_tensor(f"{linear}.weight", weight)

    def set_tensor(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in the place of a filled one."""
        place(self.model, name, tensor.to(self.device, dtype_of(name, self.model, self.dtype)))

    def _tensor(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), leaf)


def dtype_of(name: str, model: PreTrainedModel, dtype: torch.dtype) -> torch.dtype:
    """Of a tensor of a model of that dtype: fp32 where its code says so, as of what a router adds to its scores."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return torch.float32 if any(part in name for part in strict) else dtype


def joined(parts: list[Tensor]) -> Tensor:
    """Tensors one below the other; one by itself as it is."""
    return torch.cat(parts) if parts[1:] else parts[0]


def joined_shape(shapes: list[torch.Size], where: str) -> torch.Size:
    """The shape of what `joined` makes; CheckpointError if these do not fit each other."""
    if not shapes[1:]:
        return shapes[0]
    if not all(shapes) or len({shape[1:] for shape in shapes}) > 1:
        raise CheckpointError(f"{where}: shapes {', '.join(str(tuple(shape)) for shape in shapes)} do not fit together")
    return torch.Size((sum(shape[0] for shape in shapes), *shapes[0][1:]))


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer of any device and dtype."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


FINITE_PIECE = 1 << 22  # values looked at together: the check itself must not need memory for a whole embedding


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise NumericsError at the first NaN or Inf of a floating-point tensor, naming its index."""
    if not tensor.is_floating_point():
        return
    for number, piece in enumerate(tensor.reshape(-1).split(FINITE_PIECE)):
        if bool(torch.isfinite(piece.sum(dtype=torch.float32))):  # no NaN or Inf gets lost in a sum
            continue
        finite = torch.isfinite(piece)
        if not finite.all():
            first = int((~finite).nonzero()[0])
            flat = torch.tensor(number * FINITE_PIECE + first)
            index = [int(i) for i in torch.unravel_index(flat, tensor.shape)]
            raise NumericsError(
                f"{where}: {float(piece[first])} at index {index}; the checkpoint is damaged, fetch it again"
            )


class StoredTensors(Mapping[str, Tensor]):
    """A checkpoint's tensors by their names in the model; each is read, and checked, when it is asked for.

    Asking for one that is not there raises CheckpointError; see `Names` and `check_finite`.
    """

    def __init__(self, model: PreTrainedModel, source: Checkpoint) -> None:
        self.names = Names(model, source)
        self.source = source

    def __getitem__(self, name: str) -> Tensor:
        parts = {stored: self.source.read(stored) for stored in self.names.stored(name)}
        for stored, tensor in parts.items():
            check_finite(tensor, f"{self.source.root / self.source.file_of[stored]}: {stored}")
        joined_shape([tensor.shape for tensor in parts.values()], f"{self.source.root}: {', '.join(parts)}")
        return joined(list(parts.values()))

    def __contains__(self, name: object) -> bool:
        return bool(self.names.parts(str(name)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.source.tensors)

    def __len__(self) -> int:
        return len(self.source.tensors)
