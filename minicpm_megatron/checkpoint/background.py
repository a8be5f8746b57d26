"""What an asynchronous save needs: the state as it is now, in host memory, and a thread that publishes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minicpm_megatron.storage.sharded import Fragment

THREAD = "checkpoint"


class Staging:
    """Host memory that fragments are copied into: as large as what this rank saves, and kept from save to save.

    Page-locked where there is CUDA, so that the copies run at the speed of the bus.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    def copy(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The fragments with values that later steps do not change; the next `copy` does."""
        staged = [
            replace(fragment, tensor=self._copy(number, fragment.valid)) for number, fragment in enumerate(fragments)
        ]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return staged

    def _copy(self, number: int, values: Tensor) -> Tensor:
        buffer = self._buffers.get(number)
        if buffer is None or (buffer.dtype, buffer.shape) != (values.dtype, values.shape):
            buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=torch.cuda.is_available())
            self._buffers[number] = buffer
        return buffer.copy_(values, non_blocking=True)


class BackgroundSave:
    """A save that a thread of this process does.

    The thread does not outlive the process: whoever wants the checkpoint waits for it.
    """

    def __init__(self, publish: Callable[[], Path]) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(publish,), name=THREAD, daemon=True)
        self._thread.start()

    def _run(self, publish: Callable[[], Path]) -> None:
        try:
            publish()
        except BaseException as error:
            self._error = error

    def done(self) -> bool:
        """Whether the thread has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the end, and raise what the thread raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
