"""Masks: parameter or buffer name -> boolean array of its shape, True = kept.

The file is safetensors: one boolean tensor a name, and one metadata entry, ``relief_export``, a JSON object of
``format``, ``version`` and ``weights_sha256``, the SHA-256 of the weights file that the masks belong to, or null.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from relief_export import records
from relief_export.capture import plain_copy
from relief_export.errors import InputError, IntegrityError
from relief_export.layers import JOIN_BUFFERS, connected_layers, joins, own_tensors, tensor_name
from relief_export.printing import Prints, TextTable, percent
from relief_export.state import apply_masks, bare, check_masks, tensors_of

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMAT = "relief-export masks"
VERSION = 1


@dataclass(frozen=True)
class Count:
    """Connections as the paper counts them: entries of weights and biases of layers, batch norm left out."""

    dense: int
    kept: int

    @property
    def compression(self) -> float:
        """Dense over kept; infinite where nothing is kept."""
        return self.dense / self.kept if self.kept else float("inf")

    def to_dict(self) -> dict[str, int]:
        """Return plain data."""
        return asdict(self)


class Masks(Prints, Mapping[str, Tensor]):
    """An immutable mapping of names to boolean CPU tensors; a name that is not there is kept whole."""

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        # On the CPU, so that masks of one loop can be compared, saved and combined wherever the network is.
        self._masks = {name: mask.detach().to("cpu", torch.bool) for name, mask in (masks or {}).items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __and__(self, other: Mapping[str, Tensor]) -> Masks:
        """Return masks that keep what both keep: what is masked in one stays masked."""
        both = dict(self._masks)
        for name, mask in other.items():
            both[name] = both[name] & mask if name in both else mask
        return Masks(both)

    def __repr__(self) -> str:
        kept, total = sum(int(mask.sum()) for mask in self.values()), sum(mask.numel() for mask in self.values())
        return f"Masks({len(self)} tensors, {kept:,} of {total:,} entries kept)"

    def table(self) -> TextTable:
        """Return what is kept of each tensor as a table."""
        kept = {name: int(mask.sum()) for name, mask in self.items()}
        rows = [
            (name, "x".join(map(str, mask.shape)), f"{kept[name]:,}", percent(kept[name] / max(1, mask.numel())))
            for name, mask in self.items()
        ]
        return TextTable(repr(self), ("tensor", "shape", "kept", "density"), rows)

    def same(self, other: Mapping[str, Tensor]) -> bool:
        """Return whether both mask exactly the same entries."""
        return all(
            torch.equal(self[name], other[name])
            if name in self and name in other
            # A name that is absent is kept whole, and equals a mask that masks nothing.
            else bool((self if name in self else other)[name].all())
            for name in {*self, *other}
        )

    def apply_(self, model: nn.Module) -> dict[str, int]:
        """Set every masked entry of the network to exactly zero, in place.

        Returns:
            Tensor name -> number of its masked entries that were not zero before; only where there were some.

        Raises:
            InputError: The masks do not fit the network.
        """
        return apply_masks(model, self)

    def count(self, model: nn.Module) -> Count:
        """Count the connections of the network, and those that these masks keep."""
        layers = self.count_layers(model).values()
        return Count(sum(layer.dense for layer in layers), sum(layer.kept for layer in layers))

    def count_layers(self, model: nn.Module) -> dict[str, Count]:
        """Count the connections of each linear and convolution layer; a shared parameter counts once.

        Raises:
            InputError: A weight or bias is computed from other tensors.
        """
        counts: dict[str, Count] = {}
        seen: set[int] = set()
        names = {id(parameter): name for name, parameter in bare(model).named_parameters()}
        for name, layer in connected_layers(model):
            # By identity: tied weights have several names and one memory.
            own = [t for t in own_tensors(name, layer).values() if id(t) not in seen]
            seen.update(id(t) for t in own)
            kept = sum(int(self[n].sum()) if (n := names[id(t)]) in self else t.numel() for t in own)
            counts[name] = Count(sum(t.numel() for t in own), kept)
        return counts

    def save(self, path: str | Path, weights: str | Path | None = None) -> None:
        """Write the masks to ``path``, atomically; the same masks give the same bytes.

        Args:
            path: The file to write.
            weights: The weights file that the masks belong to.
        """
        belongs = records.sha256(Path(weights)) if weights else None
        about = {"format": FORMAT, "version": VERSION, "weights_sha256": belongs, "masks_sha256": _digest(self)}
        # Sorted, so that the bytes do not depend on the order in which the masks were made.
        # One metadata entry only: safetensors writes several in an order that changes from run to run.
        data = safetensors.torch.save(
            {name: self[name].contiguous() for name in sorted(self)}, {"relief_export": json.dumps(about)}
        )
        records.write_bytes(Path(path), data)

    @classmethod
    def load(cls, path: str | Path, weights: str | Path | None = None) -> Masks:
        """Read masks written by `save`.

        Args:
            path: The file.
            weights: Refuse the masks where they belong to other weights than this file; None does not check.

        Raises:
            InputError: There is no such file.
            IntegrityError: The file is damaged, foreign, of another version, or belongs to other weights.
        """
        path = Path(path)
        about = _read_about(path)
        if about.get("format") != FORMAT or about.get("version") != VERSION:
            raise IntegrityError(f"{path} is not a file of masks of version {VERSION}: write it with this program")
        if weights is not None and about.get("weights_sha256") != records.sha256(Path(weights)):
            raise IntegrityError(
                f"{path} belongs to other weights than {weights}: use the pair that was written together"
            )
        tensors = safetensors.torch.load_file(path)
        if foreign := next((name for name, mask in tensors.items() if mask.dtype != torch.bool), None):
            raise IntegrityError(f"{path}: the mask of {foreign!r} is {tensors[foreign].dtype}, not bool")
        if about.get("masks_sha256") != _digest(tensors):
            raise IntegrityError(f"{path} is damaged: its masks are not those that were written; make it again")
        return cls(tensors)


def _digest(masks: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of names, shapes and entries: safetensors notices no flipped bit."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(f"{name} {tuple(masks[name].shape)}\n".encode())
        digest.update(masks[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_about(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("relief_export", "{}"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise IntegrityError(f"{path} is not a whole safetensors file ({error})") from None
    return about if isinstance(about, dict) else {}


# Masks that other tools left behind.

_AUTHORS_RESNET = re.compile(r"conv1\.mask|layer\d+\.\d+\.(conv\d+|shortcut)\.mask|linear\.(weight|bias)\.mask")
"""Names in the mask files of the NNrelief authors' ResNets."""
_AUTHORS_LISTS = (("feature_extractor_masks", "features_masks"), ("classifier_masks",))
"""Attributes in which their LeNets and VGGs hold positional lists of masks, of convolutions and of linear layers."""
_WRAPPED = ("_orig_mod.", "module.")
"""What torch.compile and DataParallel put before the names of a network."""
_NNI_OUTPUT = "_output_"
"""Entry of NNI's files for the mask of a layer's output; what it masks, the weight's and the bias's masks say too."""


@dataclass(frozen=True)
class ReadMasks:
    """Masks, and where they disagree with the weights they were read for.

    Attributes:
        masks: What to keep.
        disagreements: Parameter name -> number of masked entries whose weight is not zero.
        notes: What was left out and why, one sentence each.
        form: What the source was recognised as.
    """

    masks: Masks
    disagreements: dict[str, int]
    notes: tuple[str, ...] = ()
    form: str = ""


def read_masks(
    source: str | Path | nn.Module | Mapping[str, Any] | Sequence[Any],
    model: nn.Module,
    *,
    authors_conv1: bool = False,
) -> ReadMasks:
    """Read masks in any of the known forms and check them against a network.

    Nothing is unpickled with code execution allowed. A mask that disagrees with its weight (masked, but the weight is
    not zero) is reported by the number of such entries, and the mask wins: the weight counts as zero from then on.

    Args:
        source: A file (safetensors of this package, or what ``torch.save`` wrote of the following forms), a module
            pruned by ``torch.nn.utils.prune`` or its ``state_dict``, a dict of NNI's form ``{layer: {"weight": mask,
            "bias": mask}}``, the NNrelief authors' list ``[w0, b0, w1, b1, ...]``, ``[features, classifier]`` of two
            such lists, their network itself or their ResNet's file, or a dict of tensor names.
        model: The network that the masks are for.
        authors_conv1: Apply ``conv1.mask`` of the authors' ResNets. Their own code never does (its test of the name
            cannot match), so the network that they trained and measured is the one without it.

    Raises:
        InputError: The form is not known, or names or shapes do not fit the network.
        IntegrityError: The file is damaged, or holds more than tensors.
    """
    content = _load(Path(source)) if isinstance(source, (str, Path)) else source
    plain = plain_copy(model)  # a pruned network's weight is the masked one
    form, masks, notes = _convert(content, plain, authors_conv1=authors_conv1)
    masks = _unwrapped(masks, plain)
    check_masks(masks, plain)
    return ReadMasks(masks, disagreements(masks, plain), notes, form)


FORMS = ("relief", "prune", "nni", "authors", "names", "zeros")
"""Forms of masks that a file may hold; see `read_masks`. ``zeros`` are the exact zeros of a file of weights."""


def masks_in(path: str | Path, form: str | None = None) -> ReadMasks:
    """Read the masks in a file as they stand there, without the network that they are for.

    Names are those of the file; positional lists are numbered. Where the file holds the weights too, masked entries
    that are not zero are counted.

    Args:
        path: A file of masks or weights: safetensors, or what ``torch.save`` wrote.
        form: One of `FORMS`, to refuse a file of another form; by default the file's own is found out.

    Raises:
        InputError: The file holds no masks, or those of another form.
        IntegrityError: The file is damaged, or holds more than tensors.
    """
    path = Path(path)
    # A safetensors file without this package's entry is a file of weights.
    weights = path.suffix == ".safetensors" and not _read_about(path)
    content = safetensors.torch.load_file(path) if weights else _load(path)
    found, masks = _recognise(content, zeros=weights or form == "zeros")
    if form not in {None, found}:
        raise InputError(f"{path} holds masks of the form {found!r}, not {form!r}: the forms are {', '.join(FORMS)}")
    originals = {name: content.get(f"{name}_orig") for name in masks} if found == "prune" else {}
    counts = {name: int((w[~masks[name]] != 0).sum()) for name, w in originals.items() if w is not None}
    return ReadMasks(masks, {name: count for name, count in counts.items() if count}, (), found)


def _form(content: Any) -> str:  # noqa: ANN401  any of the forms
    """Return which of `FORMS` plain data have; whether tensors by name are masks or weights is not asked here.

    Raises:
        InputError: They have none.
    """
    if isinstance(content, Masks):
        return "relief"
    if isinstance(content, Mapping) and content:
        # First, because the state of a pruned network has names of all kinds beside these.
        if any(str(name).endswith("_orig") for name in content):
            return "prune"
        if all(isinstance(value, Mapping) for value in content.values()):
            return "nni"
        return "authors" if any(_AUTHORS_RESNET.fullmatch(str(name)) for name in content) else "names"
    if isinstance(content, Sequence) and not isinstance(content, str) and content:
        return "authors"
    raise InputError(f"a {type(content).__name__} is no known form of masks, or it is empty")


def _flat(content: Sequence[Any]) -> Sequence[Any]:
    """Return the authors' list of masks, or their lists of convolutions and of linear layers one after the other."""
    nested = all(isinstance(part, Sequence) and not isinstance(part, str) for part in content)
    return [mask for part in content for mask in part] if nested else content


def _recognise(content: Any, *, zeros: bool) -> tuple[str, Masks]:  # noqa: ANN401  any of the forms
    """Return the form and the masks of a file's content, by the names that stand there."""
    form = _form(content)
    # The state of a pruned network is one of weights, too.
    if form not in {"relief", "prune"} and isinstance(content, Mapping) and (zeros or _are_weights(content)):
        named = {str(n): v != 0 for n, v in content.items() if isinstance(v, Tensor) and v.is_floating_point()}
        return "zeros", Masks({n: v for n, v in named.items() if n.rpartition(".")[2] in {"weight", "bias"}})
    return form, _named(form, content if isinstance(content, Mapping) else dict(enumerate(_flat(content))))


def _named(form: str, content: Mapping[Any, Any]) -> Masks:
    """Return masks that stand by names, as they stand."""
    if form == "prune":
        return _from_prune_state(content)
    if form == "nni":
        return _from_nni(content)
    return content if isinstance(content, Masks) else Masks({str(n): _mask(str(n), v) for n, v in content.items()})


def _are_weights(content: Mapping[str, Any]) -> bool:
    """Return whether a mapping of tensors holds weights: its largest tensor has other numbers than zeros and ones."""
    if not all(isinstance(value, Tensor) for value in content.values()):
        return False
    # The largest, because a small bias may well hold nothing but zeros and ones.
    largest = max(content.values(), key=torch.numel)
    return not bool(((largest == 0) | (largest == 1)).all())


def disagreements(masks: Mapping[str, Tensor], model: nn.Module) -> dict[str, int]:
    """Count the masked entries whose weight is not zero, by tensor; tensors without any are left out.

    The masks that a join holds as buffers are no weights: they are ones wherever nothing was masked yet.
    """
    tensors = tensors_of(model)
    counts = {
        name: int((tensors[name].cpu()[~mask] != 0).sum())
        for name, mask in masks.items()
        if name.rpartition(".")[2] not in JOIN_BUFFERS
    }
    return {name: count for name, count in counts.items() if count}


def zeros(model: nn.Module) -> Masks:
    """Return the masks that a network's exact zeros amount to, over the weights and biases of its layers."""
    plain = plain_copy(model)
    tensors = tensors_of(plain)
    return Masks({name: tensors[name] != 0 for name in _layer_tensors(plain)})


def _load(path: Path) -> Any:  # noqa: ANN401  a torch file holds any of the forms
    if path.suffix == ".safetensors":
        return Masks.load(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol, of a file that is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, struct.error) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise IntegrityError(f"{path} is damaged or holds more than tensors ({reason}): it is not loaded") from None


def _convert(
    content: Any,  # noqa: ANN401  any of the forms
    model: nn.Module,
    *,
    authors_conv1: bool,
) -> tuple[str, Masks, tuple[str, ...]]:
    """Return the name of the form, the masks by the network's names, and notes."""
    if isinstance(content, nn.Module):
        # Their networks are modules, too, but hold their masks as attributes and not as torch's pruning does.
        if (authors := _authors_network(content)) is not None:
            return _convert(authors, model, authors_conv1=authors_conv1)
        return "prune", _from_prune(content), ()
    form = _form(content)
    if form == "authors":
        if isinstance(content, Mapping):
            return form, *_from_authors_resnet(content, model, conv1=authors_conv1)
        return form, _from_authors_list(_flat(content), model), ()
    return form, _named(form, content), ()


def _unwrapped(masks: Masks, model: nn.Module) -> Masks:
    """Take the prefixes of a wrapper from the names, where the network has them without."""
    tensors = tensors_of(model)

    def own(name: str) -> str:
        for prefix in _WRAPPED:
            # A network may have a part of its own that is called "module".
            if name not in tensors and name.startswith(prefix):
                name = name.removeprefix(prefix)
        return name

    return Masks({own(name): mask for name, mask in masks.items()})


def _from_prune(module: nn.Module) -> Masks:
    try:
        return _from_prune_state(tensors_of(module))
    except InputError:
        raise InputError(f"{type(module).__name__} has nothing pruned by torch.nn.utils.prune") from None


def _from_prune_state(state: Mapping[str, Any]) -> Masks:
    """Find ``NAME_mask`` beside ``NAME_orig``, as torch.nn.utils.prune leaves them."""
    names = [str(name).removesuffix("_orig") for name in state if str(name).endswith("_orig")]
    found = {name: _mask(name, state[f"{name}_mask"]) for name in names if f"{name}_mask" in state}
    if not found:
        raise InputError("the state_dict has no tensor NAME_mask beside NAME_orig: nothing in it is pruned")
    return Masks(found)


def _from_nni(content: Mapping[str, Mapping[str, Any]]) -> Masks:
    return Masks(
        {
            tensor_name(layer, tensor): _mask(tensor_name(layer, tensor), mask)
            for layer, masks in content.items()
            for tensor, mask in masks.items()
            if mask is not None and not str(tensor).startswith(_NNI_OUTPUT)
        }
    )


def _authors_network(module: nn.Module) -> Any | None:  # noqa: ANN401  one of the authors' forms
    """Return the masks that a network of the NNrelief authors holds as attributes, or None for any other network."""
    attributes: dict[str, Any] = {name: getattr(module, name) for name in dir(module) if name.endswith("masks")}
    lists: list[Any] = [next((attributes[n] for n in names if n in attributes), []) for names in _AUTHORS_LISTS]
    if lists[-1]:
        return [masks for masks in lists if masks]
    if "layers_masks" not in attributes or "linear_masks" not in attributes:
        return None
    found = {"conv1.mask": attributes["conv1_masks"]}
    for layer, blocks in enumerate(attributes["layers_masks"], 1):
        for block, masks in enumerate(blocks):
            names = (*(f"conv{i}" for i in range(1, len(masks))), "shortcut")
            found |= {f"layer{layer}.{block}.{name}.mask": mask for name, mask in zip(names, masks, strict=True)}
    weight, bias = attributes["linear_masks"]
    return found | {"linear.weight.mask": weight, "linear.bias.mask": bias}


def _from_authors_list(content: Sequence[Any], model: nn.Module) -> Masks:
    """Pair the positional list with the weights and biases of the network's layers, in their order of definition."""
    # The lists are positional: with one tensor too many or too few, masks would go to other layers.
    names = _layer_tensors(model)
    if len(names) != len(content):
        raise InputError(f"the list has {len(content)} masks, the network {len(names)} weights and biases of layers")
    return Masks({name: _mask(name, mask) for name, mask in zip(names, content, strict=True)})


def _from_authors_resnet(content: Mapping[str, Any], model: nn.Module, *, conv1: bool) -> tuple[Masks, tuple[str, ...]]:
    """Rename the authors' masks; ``shortcut`` multiplies the shortcut's channels at the block's join."""
    blocks = {name.rpartition(".")[0]: name for name, _ in joins(model)}
    for block in blocks:
        if f"{block}.shortcut.mask" not in content:
            raise InputError(
                f"the masks lack '{block}.shortcut.mask': without its shortcut masks a residual network is another one "
                "than was trained, and its weights do not hold them"
            )
    masks: dict[str, Tensor] = {}
    notes: tuple[str, ...] = ()
    for key, value in content.items():
        layer, mask = key.removesuffix(".mask"), _mask(key, value)
        block = layer.removesuffix(".shortcut")
        if block == layer:
            masks[layer if layer.startswith("linear.") else f"{layer}.weight"] = mask
        elif block in blocks:
            masks[f"{blocks[block]}.shortcut_mask"] = mask.flatten()
        else:
            raise InputError(f"the network has no residual join in {block!r} for the mask {key!r}")
    if not conv1 and (unused := masks.pop("conv1.weight", None)) is not None and not bool(unused.all()):
        why = "the authors' own code never applies it, and their network was trained without it"
        masked = int((~unused).sum())
        notes = (f"conv1.mask, which masks {masked} entries, is left out: {why} (authors_conv1=True applies it)",)
    return Masks(masks), notes


def _layer_tensors(model: nn.Module) -> list[str]:
    return [
        tensor_name(name, tensor)
        for name, layer in connected_layers(model)
        for tensor in ("weight", "bias")
        if getattr(layer, tensor) is not None
    ]


def _mask(name: str, value: Any) -> Tensor:  # noqa: ANN401  checked here
    mask = torch.as_tensor(value) if not isinstance(value, (str, Mapping, type(None))) else None
    if mask is None or not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError(f"the mask of {name!r} holds something else than zeros and ones")
    return mask.bool()
