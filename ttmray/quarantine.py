"""What an exception means for a job over many clips: one clip is quarantined, or nothing goes on.

The one policy of corpus, pools, generation, evaluation and the ranker. A clip that breaks a model in a way that nobody
foresaw costs that clip; what would hit every other clip too (missing weights, no memory, a full disk, a broken GPU)
ends the job.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from ttmray.errors import ClipError, UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
LONGEST_MESSAGE = 500


def clip_error(error: Exception, way_out: str = "") -> ClipError:
    """What to record of the clip that an exception came from: itself, or failed/`error` with its type and text.

    Args:
        way_out: what to change where a GPU's memory is too small.

    Raises:
        UserError: a GPU out of memory.
        Exception: `error` itself where it is not the clip's fault.
    """
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch here
        raise UserError(f"the GPU is out of memory: {error}", way_out or "Lower the batch.") from error
    broken_gpu = type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)
    if broken_gpu or isinstance(error, UserError | MemoryError | OSError):
        raise error
    if isinstance(error, ClipError):
        return error
    return ClipError("failed", "error", f"{type(error).__name__}: {error}"[:LONGEST_MESSAGE])


def together(
    items: Sequence[Item], work: Callable[[Sequence[Item]], Result], way_out: str = ""
) -> list[tuple[Sequence[Item], Result | ClipError]]:
    """(items, what `work` makes of them): of all at once, or where that fails of one at a time, to find the bad ones.

    Args:
        items: none are no work.
        work: called again with single items after it failed, so it must not leave half a result behind.
        way_out: see `clip_error`.

    Raises:
        Exception: as `clip_error`.
    """
    if not items:
        return []
    try:
        return [(items, work(items))]
    except Exception as error:
        failure = clip_error(error, way_out)
    if len(items) == 1:
        return [(items, failure)]
    return [outcome for item in items for outcome in together([item], work, way_out)]
