"""Layer 2: blocking I/O on one store, without Scrapy, Twisted or asyncio.

What may live here: nothing. Each module is imported by its own name, so that a command that only reads
loads no more than it needs. The layers above open ``store.Storage``, or ``store.view_of`` to read.
"""
