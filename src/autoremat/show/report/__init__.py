"""One HTML page of a plan, with everything in it.

It opens from disk and asks the network for nothing.

``data`` says what the page shows, ``render`` fills the template, ``page/`` is the page itself: HTML, CSS, JavaScript.
"""
