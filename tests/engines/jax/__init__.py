"""Tests of the engine for JAX; skipped where there is none."""
