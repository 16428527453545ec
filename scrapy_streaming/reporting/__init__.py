"""What people read of a crawl: its metrics, its failures, whether all is done.

What may live here: readers of statistics and of the ledger's views. The only file that they write is
``metrics.json``.
"""
