"""How much memory a call takes at most, beyond what was held before it.

On a GPU torch's allocator keeps the count itself. On a CPU the profiler reports every allocation and release of torch's
allocator, scratch inside of operators among them, and the count is the largest sum; what libraries beside torch allocate on their
own (MKL's buffers, Python's objects) is in neither. A profiled call takes longer, so none of these is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that torch held while ``run()`` ran, above what it held when that began."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
