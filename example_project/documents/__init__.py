"""A Scrapy project of one spider: it stores every document that a site or a directory listing links to."""
