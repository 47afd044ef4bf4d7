"""A plan in words and pictures.

Text needs nothing but the plan; plots load matplotlib when they are made.
"""
