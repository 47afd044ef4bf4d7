"""Thin adapters to trainers; each imports its library, nobody imports them."""
