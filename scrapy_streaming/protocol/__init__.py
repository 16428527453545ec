"""The rules of a download: what to request, what an answer means, what may happen to a job.

What may live here: values, and pure functions over them. No I/O, no clock, no logging, no Scrapy, no SQL.
"""
