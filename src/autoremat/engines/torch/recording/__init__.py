"""Records a step on fake tensors, operator by operator, into a ``Program``."""
