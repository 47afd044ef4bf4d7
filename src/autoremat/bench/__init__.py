"""The public benchmark: programs, the best that is known of each, and a judge."""
