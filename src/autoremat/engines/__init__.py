"""Engines record steps as programs and carry out plans for them.

Each framework has a folder.
"""
