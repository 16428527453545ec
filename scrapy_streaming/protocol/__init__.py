"""Layer 1: rules as pure functions over values. No I/O, no clock, no logging, no Scrapy, no SQL."""
