"""Layer 2: blocking I/O on one store. Knows no Scrapy, no Twisted, no asyncio.

What may live here: nothing; each module is imported by its own name, so that a command that only looks
loads no more than it needs. ``store.Storage`` is what the layers above open.
"""
