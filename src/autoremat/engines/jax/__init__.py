"""The engine for JAX: functions and their gradients as programs, plans as code that XLA compiles."""
