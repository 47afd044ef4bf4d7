"""Thin adapters to the trainers that people use; each imports its library, and nothing else imports it."""
