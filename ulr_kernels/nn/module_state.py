"""The state of a model's modules beside their parameters: it is put back after each forward of a step."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ulr_kernels.nn.batch import tensors

SMALL = 2**20  # bytes; tensors up to this size are cloned by every snapshot, larger ones while they may change

# Large tensors of a model by id, and whether a forward was seen to change them. An id that is used again costs one
# clone or one error, never a wrong value.
_LARGE: weakref.WeakKeyDictionary[nn.Module, dict[int, bool]] = weakref.WeakKeyDictionary()

_OF_TORCH = frozenset(nn.Module().__dict__)  # the attributes that every module has
_VALUES = frozenset({bool, int, float, complex, str, bytes, type(None), torch.device, torch.dtype, torch.Size})
_NO_STATE = (nn.Module, nn.Parameter, type, types.ModuleType, types.FunctionType, types.MethodType)


class Place(NamedTuple):
    """A place where a module keeps something: an attribute, a buffer, an entry of a dict or a list."""

    holder: dict | list
    key: Any

    @property
    def value(self) -> Any:
        """The value that is there now; None if there is none."""
        if isinstance(self.holder, dict):
            return self.holder.get(self.key)
        return self.holder[self.key] if self.key < len(self.holder) else None


class ModuleState:
    """A snapshot of all that a forward may leave on a model: attributes, buffers, and the contents of both.

    A module may cache what it computes from its weights. Such a cache must not reach from one noised forward into the
    next one, nor stay after the step.

        state = ModuleState(model)              # before the first forward, in no mode
        for each forward:
            state.restore()
            state.drop_caches()                 # in no mode
            with noised mode:
                state.fill_caches()             # from noised weights
                model(...)
        state.restore()

    The snapshot holds the attributes of every module and of the plain objects among them; the contents of dicts, lists,
    sets and deques, also of those within another; and the values of tensors. It does not hold parameters, except those
    that belong to a module with a `train` method of its own.

    Attributes:
        modules: all of the model's.
        tensors: floating tensors that are attributes of modules, or in these, and are neither parameters nor buffers;
            after `drop_caches` without those that it has dropped.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = _modules(model)
        self._mappings = [module.__dict__ for module in self.modules]
        self._containers: list[tuple[Any, Any]] = []
        self._slotted: list[tuple[Any, dict[str, Any]]] = []  # objects without a dict, their attributes
        self._copied: list[tuple[Tensor, Tensor, int]] = []  # tensor, alias of its memory, address
        self._values: list[Tensor] = []  # of `_copied`
        self._inference = False  # some of them can be written in inference mode only
        self._large: list[tuple[Tensor, int, Tensor | None]] = []  # tensor, version, value
        self._seen: set[int] = set()
        self._known = _LARGE.setdefault(model, {})
        self._switching: list[nn.Module] = []  # modules with a `train` method of their own
        self.tensors: list[Tensor] = []
        for module in self.modules:
            own = module.__dict__
            for name in own.keys() - _OF_TORCH:
                if type(own[name]) not in _VALUES:
                    self._keep(own[name], 2)
            if buffers := own.get("_buffers"):
                self._mappings.append(buffers)
                for buffer in buffers.values():
                    if buffer is not None:
                        self._keep_tensor(buffer)
            if (type(module).train is not nn.Module.train or "train" in own) and _switches(module.train):
                self._switching.append(module)
                for parameter in own.get("_parameters", {}).values():
                    if parameter is not None:
                        self._keep_tensor(parameter, always=True)
        # Values in one list are compared faster than mapping by mapping. No forward gives an attribute another name.
        self._saved = [dict(mapping) for mapping in self._mappings]
        self._others = self._mappings[len(self.modules) :]
        self._keys = list(chain.from_iterable(self._others))
        self._items = list(chain.from_iterable(map(dict.values, self._saved)))
        self._sizes = list(map(len, self._saved))

    def restore(self) -> None:
        """Put everything back as it was in the snapshot.

        Raises:
            RuntimeError: a tensor above `SMALL`, which no forward had changed in earlier snapshots of this model, was
                changed in place. It keeps its new values; later snapshots hold it.
        """
        if not (
            list(map(len, self._mappings)) == self._sizes
            and all(map(is_, chain.from_iterable(map(dict.values, self._mappings)), self._items))
            and all(map(is_, chain.from_iterable(self._others), self._keys))
        ):
            for mapping, saved in zip(self._mappings, self._saved, strict=True):
                if not (_same(mapping, saved) and all(map(is_, mapping.values(), saved.values()))):
                    mapping.clear()
                    mapping.update(saved)
        for container, saved in self._containers:
            if not _same(container, saved):
                container.clear()
                container.update(saved) if isinstance(container, set) else container.extend(saved)
        for value, attributes in self._slotted:
            for name in _slots(type(value)):
                if name in attributes:
                    setattr(value, name, attributes[name])
                elif hasattr(value, name):
                    delattr(value, name)
        if self._copied:
            self._copy_back()
        for tensor, version, value in self._large:
            self._restore_large(tensor, version, value)

    def left(self) -> list[Place]:
        """The places in which a forward has left other tensors than there were before it."""
        pairs = chain(zip(self._mappings, self._saved, strict=True), self._containers)
        found = []
        for holder, saved in pairs:
            if isinstance(holder, dict):
                changed = [key for key, value in holder.items() if value is not saved.get(key)]
            elif isinstance(holder, list):
                changed = [i for i, value in enumerate(holder) if i >= len(saved) or value is not saved[i]]
            else:
                continue
            found += [place for key in changed if tensors((place := Place(holder, key)).value)]
        return found

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor belongs to the snapshot, and is no parameter."""
        return id(tensor) in self._seen and not isinstance(tensor, nn.Parameter)

    def drop_caches(self) -> None:
        """Let modules with a `train` method of their own drop what they keep in eval mode."""
        for module in self._switching:
            module.train(True)
        if self._switching and self.tensors:
            kept = {id(tensor) for tensor in ModuleState(self.modules[0]).tensors}
            self.tensors = [tensor for tensor in self.tensors if id(tensor) in kept]

    def fill_caches(self) -> None:
        """Let these modules compute what they keep in eval mode; then every module is in eval mode."""
        if self._switching:
            for module in self._switching:
                module.train(False)
            for module in self.modules:
                module.training = False

    def _keep(self, value: Any, depth: int) -> None:
        """Note an attribute's value, and values within it down to a depth."""
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                self._keep_tensor(value)
                if value.is_floating_point():
                    self.tensors.append(value)
            return
        if isinstance(value, _NO_STATE) or id(value) in self._seen or depth < 0:
            return
        self._seen.add(id(value))
        inner: Iterable = ()
        if isinstance(value, dict):
            self._mappings.append(value)
            inner = value.values()
        elif isinstance(value, list | set | deque):
            self._containers.append((value, set(value) if isinstance(value, set) else list(value)))
            inner = value
        elif isinstance(value, tuple):
            inner = value
        elif hasattr(value, "__dict__") and not type(value).__module__.startswith("torch."):
            own = value.__dict__
            if type(own) is dict:
                self._mappings.append(own)
                inner = own.values()
        elif hasattr(type(value), "__slots__") and not type(value).__module__.startswith(("torch", "builtins")):
            own = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
            self._slotted.append((value, own))
            inner = own.values()
        if set(map(type, inner)) - _VALUES:
            for each in inner:
                self._keep(each, depth - 1)

    def _keep_tensor(self, tensor: Tensor, always: bool = False) -> None:
        if id(tensor) in self._seen:
            return
        self._seen.add(id(tensor))
        inference = tensor.is_inference()
        if always or inference or tensor.nbytes <= SMALL:
            if 0 not in tensor.stride():  # memory that elements share cannot be written in place
                alias = tensor.data
                self._copied.append((tensor, alias, alias.data_ptr()))
                self._values.append(alias.clone())
                self._inference |= inference
            return
        value = None if self._known.get(id(tensor)) is False else tensor.detach().clone()
        self._large.append((tensor, tensor._version, value))

    def _copy_back(self) -> None:
        with torch.inference_mode(self._inference), torch.no_grad():
            for tensor, alias, address in self._copied:
                if tensor.data_ptr() != address:
                    tensor.data = alias
            # Whatever their versions say: writes through `.data` do not count there.
            torch._foreach_copy_([alias for _, alias, _ in self._copied], self._values)

    def _restore_large(self, tensor: Tensor, version: int, value: Tensor | None) -> None:
        if tensor._version == version:
            self._known.setdefault(id(tensor), False)
            return
        self._known[id(tensor)] = True
        if value is None:
            raise RuntimeError(
                f"ulr: a forward must not change a buffer of {list(tensor.shape)} in place that no forward has changed "
                "before; put its values back and repeat the step, which will then keep a copy of it"
            )
        tensor.data.copy_(value)


def _modules(model: nn.Module) -> list[nn.Module]:
    """A model's modules, each before those inside it; faster than `modules()`, which makes their names."""
    modules, seen = [model], {model}
    for module in modules:  # which grows meanwhile
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                modules.append(child)
    return modules


def _same(found: Any, saved: Any) -> bool:
    """Whether two containers hold the same objects; mappings: the same keys."""
    if isinstance(found, set):
        return found == saved
    return len(found) == len(saved) and all(map(is_, found, saved))


def _slots(kind: type) -> list[str]:
    """The attributes that an object without a dict can have."""
    found: list[str] = []
    for each in kind.__mro__:
        slots = each.__dict__.get("__slots__", ())
        found += [slots] if isinstance(slots, str) else slots
    return [name for name in found if name not in ("__weakref__", "__dict__")]


def _switches(train: Callable) -> bool:
    """Whether a method named `train` is torch's switch between train and eval mode, by its one argument."""
    return _takes_a_mode(getattr(train, "__func__", train), inspect.ismethod(train))


@functools.cache
def _takes_a_mode(function: Callable, bound: bool) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters.values())[bound:]
    except (TypeError, ValueError):
        return False
    return len(parameters) == 1 and (parameters[0].name == "mode" or parameters[0].default is True)
