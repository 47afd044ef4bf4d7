"""The search behind ``auto``: candidates for all budgets, and what makes better ones of them."""
