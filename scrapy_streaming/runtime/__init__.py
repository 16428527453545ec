"""What runs beside the downloads of a crawl: jobs and leases, a stop, pacing, open parts, statistics.

Asynchronous; knows no HTTP. Each module has one subject and is handed what it needs; ``runtime.crawl``
puts them together for one crawl.
"""
