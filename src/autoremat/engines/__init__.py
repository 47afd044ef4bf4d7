"""Engines: what records a step as a program and carries out a plan for it, one folder for each framework."""
