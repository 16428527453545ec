"""What runs beside the downloads of a crawl: jobs and leases, a stop, pacing, open parts, statistics.

What may live here: asynchronous work that knows no HTTP. Each module has one subject and is handed what it
needs; ``runtime.crawl`` puts them together for one crawl.
"""
