"""Models and the weights that go into them. Names, shapes and types are all compared before any weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from longwave.checkpoints.names import flat_names
from longwave.checkpoints.weights import FLOATS, Described, Weights, check
from longwave.config import ModelConfig
from longwave.errors import UserError
from longwave.layout import parse
from longwave.model import Decoder
from longwave.units import counted


class Expected(NamedTuple):
    """The shape and dtype that a stored tensor must have."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass
class StoredTensor:
    """A tensor of a folder, which holds one or more native tensors one after the other along their first dimension.

    ours: the names of those native tensors. as_row: it is a matrix (1, n) where ours is a vector (n,).
    """

    ours: list[str] = field(default_factory=list)
    as_row: bool = False

    def expected(self, own: Mapping[str, Described]) -> Expected:
        """The shape and dtype that it must have, given the native tensors."""
        tensors = [own[name] for name in self.ours]
        shape = tensors[0].shape
        if len(tensors) > 1:
            shape = torch.Size((sum(tensor.shape[0] for tensor in tensors), *shape[1:]))
        return Expected(torch.Size((1, *shape)) if self.as_row else shape, tensors[0].dtype)

    def split(self, tensor: Tensor, own: Mapping[str, Described]) -> dict[str, Tensor]:
        """The native tensors in its content: views, or copies where a view would not be aligned as torch aligns."""
        if len(self.ours) == 1:
            return {self.ours[0]: tensor[0] if self.as_row else tensor}
        pieces = tensor.split([own[name].shape[0] for name in self.ours])
        return dict(zip(self.ours, map(_aligned, pieces), strict=True))

    def join(self, native: Mapping[str, Tensor]) -> Tensor:
        """Its content, from the native tensors."""
        tensors = [native[name] for name in self.ours]
        together = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return together.unsqueeze(0) if self.as_row else together


def _aligned(piece: Tensor) -> Tensor:
    return piece if piece.data_ptr() % 64 == 0 else piece.clone()


@dataclass(frozen=True)
class ReadOptions:
    """How the weights of a folder are read.

    dtype: of the model's weights, if the caller asks for one. config_dtype: the dtype that the folder's config names,
    which decides where weights were saved in several types. tied: the stored names of the head and of the embedding
    that it is tied to: a folder may hold that matrix twice if both are equal.
    """

    dtype: torch.dtype | None = None
    config_dtype: object = None
    tied: tuple[str, str] | None = None


def empty(config: ModelConfig, weights: Weights, source: str) -> Decoder:
    """The model without memory for its weights; UserError where a folder of so few tensors cannot hold its blocks."""
    depth = parse(config.layout).depth
    if depth > len(weights.found):
        has = f"{weights.source} {counted(len(weights.found), 'tensor')}"
        raise UserError(f"{source}: the model has {counted(depth, 'block')}, but {has}")
    try:
        with torch.device("meta"):
            return Decoder(config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def fill(model: Decoder, weights: Weights, stored: Mapping[str, StoredTensor], options: ReadOptions) -> Decoder:
    """Gives a model the weights of a folder, ready for inference; tensors that `stored` does not hold stay as they are.

    stored: the tensors that the folder must have, by name. UserError for a missing, unexpected or misshapen tensor,
    under its stored name.
    """
    names = flat_names(model)
    own = {names[name]: tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    expected = {name: tensor.expected(own) for name, tensor in stored.items()}
    if options.tied and options.tied[0] in weights.found:
        expected[options.tied[0]] = expected[options.tied[1]]
    check({name: one.shape for name, one in expected.items()}, weights.found, weights.source)
    _check_types(expected, weights)
    parameters = {name for name in expected if name not in stored or _is_parameter(own, stored[name])}
    dtype = _weight_dtype(weights, sorted(parameters), options)
    read = weights.read({name: dtype if name in parameters else one.dtype for name, one in expected.items()})
    if options.tied and options.tied[0] in read:
        _drop_tied(read, *options.tied, weights.source)
    native = {name: tensor for name, tensor in own.items() if not tensor.is_meta}
    for name in list(read):
        native |= stored[name].split(read.pop(name), own)
    model.adopt({name: native[flat] for name, flat in names.items()})
    return model.eval()


def _is_parameter(own: Mapping[str, Tensor], tensor: StoredTensor) -> bool:
    return isinstance(own[tensor.ours[0]], nn.Parameter)


def _drop_tied(read: dict[str, Tensor], head: str, embedding: str, source: str) -> None:
    if not torch.equal(read.pop(head), read[embedding]):
        raise UserError(f"{source}: tensor {head} differs from {embedding}, yet the config ties them")


def _check_types(expected: Mapping[str, Expected], weights: Weights) -> None:
    """A floating tensor may be stored in any floating type; any other must be of the type that is expected."""
    for name, own in expected.items():
        found, types = weights.found[name].dtype, FLOATS.values() if own.dtype.is_floating_point else (own.dtype,)
        if found not in types:
            supported = ", ".join(map(_name, types))
            raise UserError(f"{weights.source}: tensor {name} is {_name(found)}; supported: {supported}")


def _weight_dtype(weights: Weights, parameters: Iterable[str], options: ReadOptions) -> torch.dtype:
    """The dtype that all parameters of a model take: the one asked for, or else the one they were saved in.

    UserError if they were saved in several and the config names none of these.
    """
    found = {weights.found[name].dtype: name for name in parameters}
    if options.dtype is not None or len(found) == 1:
        return options.dtype or next(iter(found))
    for dtype in FLOATS.values():
        if _name(dtype) == str(options.config_dtype).removeprefix("torch."):
            return dtype
    types = ", ".join(f"{name} is {_name(dtype)}" for dtype, name in list(found.items())[:2])
    raise UserError(f"{weights.source}: tensors of several types ({types}); give dtype, or put it into config.json")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
