"""The demo: two models on real data, trained plainly, with ``torch.utils.checkpoint`` and with autoremat.

``models`` and ``data`` are also what the examples, the tests and the benchmarks use, so that all of them speak of the
same networks; ``measure`` is the allocator's own account of a step; ``train`` runs everything side by side.
"""
