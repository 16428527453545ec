"""Settings of the example; the two lines that turn streaming on come first."""

ADDONS = {"scrapy_streaming.Addon": 300}
FILES_STORE = "downloads"

BOT_NAME = "documents"
SPIDER_MODULES = ["documents.spiders"]
ROBOTSTXT_OBEY = True
LOG_LEVEL = "WARNING"  # the spider prints its own table; -L INFO shows what Scrapy does meanwhile
