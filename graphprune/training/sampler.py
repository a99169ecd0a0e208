"""Gradients of single batches, drawn in the middle of training without disturbing it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.ir.program import Program, device_of
from graphprune.training.randomness import random_state, set_random_state

_STREAM = 1_000_003


class GradientSampler:
    """Draws batches and computes the gradient of each, for criteria that need samples at a mask update.

    Sampling is in eval mode: no dropout, the running statistics of batch normalization are used and not changed, and
    observers do not look (the choice of the oBERT authors' code too). Gradients are in the Program's own dtype; no gradient scaler
    is involved. Random numbers that the batches draw (a shuffling loader, augmentation) come from a stream of the sampler's own,
    which depends only on ``seed`` and on how many batches were drawn. So the same position gives the same batches, in a resumed
    run too, provided that the iterable draws from the global generators or from none.

    Args:
        batches: An iterable that can be started again (a DataLoader, a list), or a function that returns one; it is
            started again whenever it is exhausted. A batch is a mapping of inputs by name, a tuple of positional inputs or a single
            tensor; tensors are moved to the Program's device. Batches of one example give the best Fisher information.
        loss: ``loss(output, batch)`` returns a scalar; the batch may then hold more than the Program's inputs (labels, for
            example: entries with other names, or positions after the last input). None takes ``loss`` of the output, as Hugging
            Face models return it.
        seed: Of the stream of random numbers; give every process its own where they share ``batches``.

    Attributes:
        drawn: Batches drawn in this pass over ``batches``.
        passes: Passes finished.
        skipped: Samples left out because a gradient was NaN or infinite.
    """

    def __init__(
        self,
        batches: Callable[[], Iterable[object]] | Iterable[object],
        loss: Callable[[Any, Any], Tensor] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.batches = batches
        self.loss = loss
        self.seed = seed
        self.drawn = 0
        self.passes = 0
        self.skipped = 0
        self._iterator: Iterator[object] | None = None

    def sample(self, program: Program, count: int) -> Iterator[None]:
        """Compute the gradients of ``count`` batches, one after the other.

        While the caller holds a sample, ``.grad`` of each trainable parameter is that sample's gradient (None where the loss
        does not depend on it); nothing else differs from before. Hooks on parameters run as in any backward pass. In the end,
        or when the iterator is closed or dropped, every parameter has its own ``.grad`` object back, unchanged.

        Args:
            program: The Program itself, without wrappers; in any mode, with or without grad mode.
            count: Samples to yield. One that is not finite is left out and another one drawn.

        Yields:
            None, once for each sample.

        Raises:
            SparsityError: There are no batches, the loss is no scalar or does not depend on the parameters, or ``count``
                samples of this call were not finite.
        """
        parameters = [item for item in program.parameters() if item.requires_grad]
        before = [item.grad for item in parameters]
        refused = 0
        try:
            for _ in range(count):
                while not self._compute(program, parameters):
                    self.skipped += 1
                    refused += 1
                    if refused >= count:
                        raise SparsityError(
                            f"{refused} of the batches drawn for gradient samples gave NaN or infinite gradients; look for a "
                            f"diverged loss, or sample in float32"
                        )
                yield
        finally:
            for parameter, grad in zip(parameters, before, strict=True):
                parameter.grad = grad

    def state_dict(self) -> dict[str, int]:
        """Return the position, as numbers."""
        return {"passes": self.passes, "drawn": self.drawn, "skipped": self.skipped, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to a position; at the next draw ``batches`` is started again and what was drawn before is passed over."""
        self.passes, self.drawn = int(state["passes"]), int(state["drawn"])
        self.skipped, self.seed = int(state["skipped"]), int(state["seed"])
        self._iterator = None

    def _compute(self, program: Program, parameters: Sequence[torch.nn.Parameter]) -> bool:
        """Put the gradients of the next batch into ``.grad``; say whether they are finite. Modes and generators are put back."""
        training, state = program.training, random_state()
        try:
            batch = _moved(self._draw(), device_of(program))
            program.eval()
            for parameter in parameters:
                parameter.grad = None
            with torch.enable_grad():
                self._loss_of(program, batch).backward()  # type: ignore[no-untyped-call]
        finally:
            program.train(training)
            set_random_state(state)
        sums = [item.grad.sum(dtype=torch.float32) for item in parameters if item.grad is not None]
        return not sums or bool(torch.stack(sums).isfinite().all())

    def _loss_of(self, program: Program, batch: object) -> Tensor:
        output = _called(program, batch, exactly=self.loss is None)
        if self.loss is not None:
            loss: object = self.loss(output, batch)
        else:
            loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            source = "the loss function returned" if self.loss is not None else "the output's loss is"
            raise SparsityError(
                f"gradient samples need a scalar loss and {source} {found}; give GradientSampler a loss(output, batch), or "
                f"batches with labels"
            )
        if not loss.requires_grad:
            raise SparsityError(
                "the loss of a gradient sample depends on no trainable parameter; compute it from the output"
            )
        return loss

    def _draw(self) -> object:
        """Return the next batch; starts, starts again, and passes over what a resumed run had drawn."""
        if self._iterator is None:
            self._pass_over()
        try:
            return self._next()
        except StopIteration:
            if not self.drawn:
                raise SparsityError(
                    "there are no batches for gradient samples; give a list, a DataLoader or a function that returns a new "
                    "iterator, not an iterator that is exhausted after one pass"
                ) from None
        self.passes, self.drawn = self.passes + 1, 0
        self._start()
        return self._draw()

    def _pass_over(self) -> None:
        """Start ``batches`` and pass over what was drawn already."""
        wanted, self.drawn = self.drawn, 0
        self._start()
        try:
            for _ in range(wanted):
                self._next()
        except StopIteration:
            raise SparsityError(
                f"batches end after {self.drawn}, but the state of the gradient sampler is at {wanted}; resume with the same data"
            ) from None

    def _start(self) -> None:
        self._seed()
        self._iterator = iter(self.batches() if callable(self.batches) else self.batches)

    def _next(self) -> object:
        assert self._iterator is not None
        self._seed()
        batch = next(self._iterator)
        self.drawn += 1
        return batch

    def _seed(self) -> None:
        """Set the global generators for this position; the caller puts them back."""
        seed = ((self.seed * _STREAM + self.passes) * _STREAM + self.drawn) % (1 << 63)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % (1 << 32))


def _called(program: Program, batch: object, *, exactly: bool) -> Any:
    """Call a Program with a batch; unless ``exactly``, entries that it has no input for are left out."""
    names = program.interface.names
    if isinstance(batch, Mapping):
        return program(**{key: value for key, value in batch.items() if exactly or key in names})
    if isinstance(batch, tuple | list):
        return program(*(batch if exactly else batch[: len(names)]))
    return program(batch)


def _moved(batch: object, device: torch.device) -> object:
    """Move the tensors of a batch to a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_moved(value, device) for value in batch)
    return batch
