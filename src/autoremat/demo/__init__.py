"""The demo: two models trained plainly, by hand and with autoremat.

The data are real; by hand means ``torch.utils.checkpoint``.

``models`` and ``data`` are also what the examples, the tests and the benchmarks use, so that all of them speak of the
same networks; ``measure`` is the allocator's own account of a step; ``train`` runs everything side by side.
"""
