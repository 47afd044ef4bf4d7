"""Settings of all tests."""

from hypothesis import settings

settings.register_profile("shared", deadline=None)  # a machine that others use too is slow now and then
settings.load_profile("shared")
